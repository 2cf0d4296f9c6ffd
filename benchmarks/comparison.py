"""Capture the same rows in every way people have done it, and compare.

    python -m benchmarks.comparison --teacher FOLDER --dataset ROWS.jsonl

Whole commands in turns, from their start to a file that can be trained from. What they leave is compared with ours row
by row; a difference ends the benchmark. `--batch_tokens` is for ours and for the forward passes alone, `--no_ablation`
leaves out ours with one piece taken away. `--only` names rows of the table; ours and the forward passes are always
there.
"""

import argparse
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.check import MismatchError, check, read_flat, read_groups, read_ours, read_zarr
from benchmarks.harness import ROOT, Measured, Row, Spread, in_turns, launch, measure, parse, scratch, write_report
from logitgen.file.reader import LogitsFile

COMPETITORS = ROOT / "benchmarks" / "competitors"
OURS, CEILING = "logitgen", "forward passes alone"
PIECES = {
    "plan": "rows in split order, by 8",
    "chunks": "head not in chunks",
    "transport": "all-gather every step",
    "leader": "file per rank, merge",
}
"""What `benchmarks/without.py` takes away, and what is there instead."""

RATIO = "speed, ours = 1 (least-most)"
FORMS = {RATIO: ".2f"} | dict.fromkeys(("seconds", "first row, s", "MB on disk"), ",.1f")

Read = Callable[[list[Path]], Iterator[tuple[int, dict[str, Any]]]]


@dataclass(frozen=True, kw_only=True)
class Contender:
    """A way to capture."""

    commands: list[list[str]]  # run one after the other
    files: str = "*.h5"  # pattern of what they leave in their folder
    read: Read | None = read_flat  # None where nothing is kept
    code: str | None = None  # files in `competitors/` whose lines the user owns; None where none of it is a user's


def contenders(options: argparse.Namespace, split: Path) -> dict[str, Contender]:
    """List what is compared by name, each of them to leave its files in `{folder}`; ours comes first."""
    ranks, profile = str(options.ranks), "multi_gpu" if options.ranks > 1 else "single_gpu"
    accelerate = launch(options.ranks, profile if torch.cuda.is_available() else "cpu")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", ranks]
    read = [f"--teacher={options.teacher.resolve()}", f"--dataset={split}", f"--top_k={options.top_k}"]
    tokens = f"--batch_tokens={options.batch_tokens}"
    ours = [*read, tokens, "--output={folder}/out.h5", "--log_dir={folder}/logs", "--dtype=float32", "--overflow=error"]

    def other(code: str, start: list[str], *words: str, **more: Any) -> Contender:
        script = str(COMPETITORS / code.split()[0])
        return Contender(commands=[[*start, script, *(words or read), "--output={folder}"]], code=code, **more)

    def own(*script: str) -> Contender:
        return Contender(commands=[[*accelerate, *script, *ours]], read=read_ours)

    bash = other("independent.sh independent_worker.py recipe.py flat.py", ["bash"], ranks, *read, files="worker_*.h5")
    merge = [sys.executable, str(COMPETITORS / "merge.py"), "{folder}"]
    merged = replace(bash, commands=[*bash.commands, merge], files="merged.h5", code=f"merge.py {bash.code}")
    found = {
        OURS: replace(own("generate.py"), code=""),
        CEILING: replace(other("ceiling.py", accelerate, *read, tokens), read=None, code=None),
        "bash, file per process": bash,
        "bash + merge": merged,
        "Accelerate, gather": other("accelerate_gather.py recipe.py flat.py", accelerate),
        "torch.distributed, gather": other("torch_distributed.py recipe.py flat.py", torchrun),
        "one HDF5 file, lock": other("file_lock.py recipe.py flat.py", torchrun),
        "Zarr, parallel writers": other("zarr_writers.py recipe.py", torchrun, files="*.zarr", read=read_zarr),
        "HDF5 group per row, gzip": other(
            "group_per_sample.py recipe.py", [sys.executable], *read, f"--num_ranks={ranks}", read=read_groups
        ),
    }
    if not options.no_ablation:
        found |= {f"ours, {words}": own("-m", "benchmarks.without", piece) for piece, words in PIECES.items()}
    return {name: found[name] for name in found if name in (OURS, CEILING, *(options.only or found))}


def code_lines(names: str) -> int:
    """Count lines of files in `competitors/` that are neither blank nor comment nor docstring."""
    texts = [(COMPETITORS / name).read_text(encoding="utf-8") for name in names.split()]
    without_docstrings = re.sub(r'^\s*"""(?s:.*?)"""$', "", "\n".join(texts), flags=re.MULTILINE)
    return sum(1 for line in without_docstrings.splitlines() if line.strip() and not line.strip().startswith("#"))


def run(name: str, contender: Contender, base: Path, num_ranks: int) -> Row:
    """Run a contender once, with as many threads as all and caches of its own, and check what it left."""
    folder = base / re.sub(r"\W+", "_", name)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    env = {"HF_DATASETS_CACHE": str(folder / "cache"), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    env |= {"OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) // num_ranks)), "PYTHON": sys.executable}
    seconds, first_seconds, most_bytes = 0.0, None, 0
    for words in contender.commands:
        measured = measure([word.replace("{folder}", str(folder)) for word in words], folder, **env)
        said = measured.seconds_of("[Ff]irst rows?")  # by a competitor, or by our log
        first_seconds = said and seconds + said  # of the last command: the others' files are not what is trained from
        seconds += measured.wall_seconds
        most_bytes = max(most_bytes, measured.largest(1)[0][0])
    ours = LogitsFile(base / OURS / "out.h5")
    left = sorted(folder.glob(contender.files))
    print(f"{name}: {seconds:.1f} s, {checked(name, contender, left, measured, ours)}", flush=True)
    files = [file for path in left for file in (path, *path.rglob("*")) if file.is_file()]
    return {
        "tokens/s": ours.layout.num_positions / seconds,  # the tokens up to the last captured position of each row
        "seconds": seconds,
        "first row, s": first_seconds,
        "MB per rank": most_bytes / 1e6,
        "MB on disk": sum(file.stat().st_blocks * 512 for file in files) / 1e6 or None,
        "files": len(files) or None,
    }


def checked(name: str, contender: Contender, left: list[Path], measured: Measured, ours: LogitsFile) -> str:
    """Compare what a contender left with ours, or what it read if it keeps nothing; tell how much that was."""
    if contender.read:
        try:
            return f"{check(contender.read(left), ours):,} rows as ours"
        except MismatchError as error:
            raise MismatchError(f"'{name}' does not yield what ours does. {error}") from error
    read = sum(int(line.split()[1]) for _, line in measured.lines if line.startswith("tokens "))
    if read != ours.layout.num_positions:
        raise MismatchError(f"'{name}' read {read:,} tokens, not {ours.layout.num_positions:,}.")
    return f"{read:,} tokens read"


def main() -> None:
    """Run all rounds, and sum them up."""
    sizes = {"rows": 200, "rounds": 2, "ranks": torch.cuda.device_count() or 2, "top_k": 64, "batch_tokens": 1024}
    options = parse(__doc__, teacher=Path, dataset=Path, **sizes, no_ablation=False, only=[])
    with scratch(options) as folder:
        split = folder / "split.jsonl"
        with options.dataset.open(encoding="utf-8") as lines:
            split.write_text("".join(islice(lines, options.rows)), encoding="utf-8")
        found = contenders(options, split)
        ways = {name: partial(run, name, contender, folder, options.ranks) for name, contender in found.items()}
        rounds = in_turns(ways, options.rounds)
    table = []
    for name, runs in rounds.items():
        columns = {column: [run[column] for run in runs] for column in runs[0]}
        medians = {column: None if None in values else median(values) for column, values in columns.items()}
        speed = {"tokens/s": 0, RATIO: Spread.of(columns["tokens/s"], [run["tokens/s"] for run in rounds[OURS]])}
        code = found[name].code
        row = {"approach": name} | speed | medians
        table.append(row | {"own lines of code": None if code is None else code_lines(code)})
    write_report(options.output, "comparison", table, FORMS, {"settings": vars(options), "rounds": rounds})


if __name__ == "__main__":
    main()
