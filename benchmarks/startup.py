"""From the launch to the first row in the file, phase by phase, with and without tokens in the cache.

python -m benchmarks.startup --teacher FOLDER --dataset ROWS.jsonl
"""

import shutil
import sys
from collections.abc import Iterator
from itertools import pairwise
from math import nan
from pathlib import Path
from statistics import median

from benchmarks.harness import Measured, in_turns, launch, measure, parse, scratch, write_report

PHASES = {
    "Reading": "launcher, imports, options",
    "Loading": "rows and tokens",
    "Capturing": "teacher, plan, file",
    "First rows are in the file.": "first batch",
}
"""What a line of the leader's log begins with, and what has happened before it."""

WHOLE, REST = "launcher, imports, options", "the rest"


def phases(measured: Measured, log: Path) -> Iterator[tuple[str, float]]:
    """Yield each phase with its seconds, from the times in the leader's log."""
    ends = {"": 0.0}
    for seconds, message in measured.log_lines(log):
        ends |= {phase: seconds for begin, phase in PHASES.items() if message.startswith(begin)}
    for (_, start), (phase, end) in pairwise((ends | {REST: measured.wall_seconds}).items()):
        yield phase, end - start


_LOADING = """
import sys, time, torch
from logitgen.config import Config
from logitgen.estimate import _taken_bytes
from logitgen.teacher.identity import fingerprint, weights_of
from logitgen.teacher.model import load_model

config, found = Config(teacher=sys.argv[1], dataset="none", output="none"), []
start = time.perf_counter()
taken = _taken_bytes(torch.device("cpu"), lambda: found.append(load_model(config, torch.device("cpu"))))
loaded = time.perf_counter()
fingerprint(weights_of(found[0]))
print("loading", sum(p.nbytes for p in found[0].parameters()), taken, loaded - start, time.perf_counter() - loaded)
"""


def loading(teacher: str) -> dict[str, float]:
    """Load a teacher in a process of its own. Return its weights and memory in bytes, load and hash in seconds."""
    measured = measure([sys.executable, "-c", _LOADING, teacher])
    numbers = next(line.split()[1:] for _, line in measured.lines if line.startswith("loading"))
    return dict(zip(("weight_bytes", "taken_bytes", "load_seconds", "hash_seconds"), map(float, numbers), strict=True))


def main() -> None:
    """Measure in turns: an empty launch, a run with nothing in the caches, a run with everything, and `inspect`."""
    options = parse(__doc__, teacher=str, dataset=str, ranks=2, rounds=2)
    with scratch(options) as folder:
        nothing, out, logs, cache = (folder / name for name in ("nothing.py", "out.h5", "logs", "cache"))
        nothing.touch()
        run = [*launch(options.ranks), "generate.py", f"--teacher={options.teacher}", f"--dataset={options.dataset}"]
        run += [f"--output={out}", f"--log_dir={logs}", "--split=train[:1%]", "--batch_tokens=512", "--overwrite"]
        inspect = [sys.executable, "-m", "logitgen", "inspect", str(out)]

        def whole(*command: str) -> dict[str, float]:
            return {WHOLE: measure(command, HF_DATASETS_CACHE=str(cache), HF_HUB_OFFLINE="1").wall_seconds}

        def capture() -> dict[str, float]:
            shutil.rmtree(logs, ignore_errors=True)
            return dict(phases(measure(run, HF_DATASETS_CACHE=str(cache), HF_HUB_OFFLINE="1"), logs / "rank_0.log"))

        def first_time() -> dict[str, float]:
            shutil.rmtree(cache, ignore_errors=True)
            return capture()

        ways = {"an empty launch": lambda: whole(*launch(options.ranks), str(nothing)), "first time": first_time}
        ways |= {"again, tokens cached": capture, "`inspect`": lambda: whole(*inspect)}
        seconds = in_turns(ways, options.rounds)
    table = [
        {"seconds": name}
        | {column: median(run.get(column, nan) for run in runs) for column in (*PHASES.values(), REST)}
        for name, runs in seconds.items()
    ]
    teacher = loading(options.teacher)
    forms = dict.fromkeys(table[0], ".2f")
    write_report(options.output, "startup", table, forms, {"seconds": seconds, "loading": teacher})
    print(
        f"Loading {teacher['weight_bytes'] / 1e6:,.0f} MB of weights took {teacher['taken_bytes'] / 1e6:,.0f} MB at "
        f"most and {teacher['load_seconds']:.2f} s, their hash {teacher['hash_seconds']:.2f} s."
    )


if __name__ == "__main__":
    main()
