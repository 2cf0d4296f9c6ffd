"""From the launch to the first row in the file, phase by phase, with and without tokens in the cache.

python -m benchmarks.startup --teacher FOLDER --dataset ROWS.jsonl
"""

import compileall
import shutil
import sys
import time
from itertools import pairwise
from statistics import median

import torch

from benchmarks.harness import ROOT, Spread, in_turns, launch, measure, parse, scratch, write_report
from logitgen.config import Config
from logitgen.estimate import _taken_bytes
from logitgen.teacher.identity import fingerprint, weights_of
from logitgen.teacher.model import load_model

PHASES = {
    "Reading ": "launcher, imports, options",
    "Loading ": "rows and tokens",
    "Capturing ": "teacher, plan, file",
    "First rows are in the file.": "first batch",
}
"""What the leader logs, and what has happened before it."""
ABOVE = "until the first batch starts, above an empty launch"


def loading(teacher: str) -> dict[str, float]:
    """Load a teacher. Return the bytes of its weights and of the memory it took, the seconds to load and to hash it."""
    config, device = Config(teacher=teacher, dataset="none", output="none"), torch.device("cpu")
    models, start = [], time.perf_counter()
    taken_bytes = _taken_bytes(device, lambda: models.append(load_model(config, device)))
    loaded = time.perf_counter()
    fingerprint(weights_of(models[0]))
    seconds = {"load_seconds": loaded - start, "hash_seconds": time.perf_counter() - loaded}
    return {"weight_bytes": sum(p.nbytes for p in models[0].parameters()), "taken_bytes": taken_bytes} | seconds


def main() -> None:
    """Measure in turns: an empty launch, a run with nothing in the caches, a run with everything, and `inspect`."""
    options = parse(__doc__, teacher=str, dataset=str, ranks=2, rounds=2)
    compileall.compile_dir(ROOT / "logitgen", quiet=1)  # as pip does when it installs a package
    teacher = loading(options.teacher)  # before anything else has filled the heap
    with scratch(options) as folder:
        nothing, out, logs, cache = (folder / name for name in ("nothing.py", "out.h5", "logs", "cache"))
        nothing.touch()
        run = [*launch(options.ranks), "generate.py", f"--teacher={options.teacher}", f"--dataset={options.dataset}"]
        run += [f"--output={out}", f"--log_dir={logs}", "--split=train[:1%]", "--batch_tokens=512", "--overwrite"]

        def phases(*command: str) -> list[float]:
            shutil.rmtree(logs, ignore_errors=True)
            measured = measure(command, logs, HF_DATASETS_CACHE=str(cache), HF_HUB_OFFLINE="1")
            ends = [measured.seconds_of(f"(^|: ){begin}") for begin in PHASES]
            if None in ends:
                return [measured.wall_seconds]  # it captures nothing
            return [end - start for start, end in pairwise([0.0, *ends])]

        def first_time() -> list[float]:
            shutil.rmtree(cache, ignore_errors=True)
            return phases(*run)

        ways = {
            "an empty launch": lambda: phases(*launch(options.ranks), str(nothing)),
            "first time": first_time,
            "again, tokens cached": lambda: phases(*run),
            "`inspect`": lambda: phases(sys.executable, "-m", "logitgen", "inspect", str(out)),
        }
        seconds = in_turns(ways, options.rounds)
    table, (empty, *_) = [], seconds.values()
    for way, runs in seconds.items():
        row = {"seconds": way} | dict(zip(PHASES.values(), map(median, zip(*runs, strict=True)), strict=False))
        if len(runs[0]) > 1:
            more = [sum(run[:-1]) - nothing for run, (nothing,) in zip(runs, empty, strict=True)]
            row[ABOVE] = Spread.of(more)
        table.append(row)
    forms = dict.fromkeys((*PHASES.values(), ABOVE), ".2f")
    write_report(options.output, "startup", table, forms, {"seconds": seconds} | teacher)
    print(
        f"Loading {teacher['weight_bytes'] / 1e6:,.0f} MB of weights took {teacher['taken_bytes'] / 1e6:,.0f} MB at "
        f"most and {teacher['load_seconds']:.2f} s, their hash {teacher['hash_seconds']:.2f} s."
    )


if __name__ == "__main__":
    main()
