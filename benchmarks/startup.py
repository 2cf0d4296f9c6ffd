"""From the launch to the first row in the file, phase by phase, with and without tokens in the cache.

python -m benchmarks.startup --teacher FOLDER --dataset ROWS.jsonl
"""

import argparse
import shutil
import sys
from collections.abc import Iterator
from datetime import datetime
from itertools import pairwise
from pathlib import Path

from benchmarks.harness import ROOT, Measured, launch, measure, median_and_spread, write_report

PHASES = {
    "Reading": "launcher, imports, options",
    "Loading": "rows and tokens",
    "Capturing": "teacher, plan, file",
    "First rows are in the file.": "first batch",
}
"""What a line of the leader's log begins with, and what has happened before it."""


def phases(measured: Measured, log: Path) -> Iterator[tuple[str, float]]:
    """Yield each phase with its seconds, from the times in the leader's log."""
    found = {"": measured.started}
    for line in log.read_text(encoding="utf-8").splitlines():
        time, message = line[:23], line.partition(": ")[2]
        if phase := next((phase for begin, phase in PHASES.items() if message.startswith(begin)), None):
            found[phase] = datetime.strptime(time, "%Y-%m-%d %H:%M:%S,%f").timestamp()
    for (_, start), (phase, end) in pairwise(found.items()):
        yield phase, end - start
    yield "the rest", measured.started + measured.wall_seconds - end


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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--output", type=Path, default=ROOT / ".bench")
    options = parser.parse_args()
    folder = options.output.resolve() / "startup_files"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    nothing = folder / "nothing.py"
    nothing.touch()
    out, logs = folder / "out.h5", folder / "logs"
    run = [
        *launch(options.ranks),
        "generate.py",
        f"--teacher={options.teacher}",
        f"--dataset={options.dataset}",
        "--split=train[:1%]",
    ]
    run += [f"--output={out}", f"--log_dir={logs}", "--batch_tokens=512", "--overwrite"]
    seconds: dict[str, dict[str, list[float]]] = {}
    env = {"HF_DATASETS_CACHE": str(folder / "cache"), "HF_HUB_OFFLINE": "1"}
    for _ in range(options.rounds):
        shutil.rmtree(folder / "cache", ignore_errors=True)
        empty = measure([*launch(options.ranks), str(nothing)], env).wall_seconds
        seconds.setdefault("empty launch", {}).setdefault("launcher, imports, options", []).append(empty)
        for name in ("first time", "again, tokens cached"):
            shutil.rmtree(logs, ignore_errors=True)
            for phase, taken in phases(measure(run, env), logs / "rank_0.log"):
                seconds.setdefault(name, {}).setdefault(phase, []).append(taken)
        inspect = measure([sys.executable, "-m", "logitgen", "inspect", str(out)]).wall_seconds
        seconds.setdefault("inspect", {}).setdefault("launcher, imports, options", []).append(inspect)
    table = []
    for name, taken in seconds.items():
        cells = {
            phase: f"{median_and_spread(taken[phase]).median:.2f}" if phase in taken else "-"
            for phase in PHASES.values()
        }
        table.append(
            {
                "seconds": name,
                **cells,
                "the rest": f"{median_and_spread(taken['the rest']).median:.2f}" if "the rest" in taken else "-",
            }
        )
    teacher = loading(options.teacher)
    write_report(options.output, "startup", {"seconds": seconds, "loading": teacher}, table)
    print(
        f"Loading {teacher['weight_bytes'] / 1e6:,.0f} MB of weights took {teacher['taken_bytes'] / 1e6:,.0f} MB at "
        f"most and {teacher['load_seconds']:.2f} s, their hash {teacher['hash_seconds']:.2f} s."
    )
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
