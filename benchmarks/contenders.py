"""Who is compared: ours, the ways people capture without it, and ours with one piece taken away."""

import argparse
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.check import read_flat, read_groups, read_ours, read_zarr
from benchmarks.harness import ROOT, launch

COMPETITORS = ROOT / "benchmarks" / "competitors"
OURS, CEILING, BASH = "logitgen", "forward passes alone", "bash, file per process"
PIECES = {
    "plan": "rows in split order, by 8",
    "chunks": "head not in chunks",
    "transport": "all-gather every step",
    "leader": "file per rank, merge",
}
"""What `benchmarks/without.py` takes away, and what is there instead."""

Read = Callable[[Sequence[Path]], Iterator[tuple[int, dict[str, Any]]]]


@dataclass(frozen=True, kw_only=True)
class Contender:
    """A way to capture."""

    command: list[str]
    files: str = "*.h5"  # pattern of what it leaves in its folder
    read: Read | None = read_flat  # None where nothing is kept
    code: str = ""  # files in `competitors/` whose lines the user owns
    after: str = ""  # whose files it goes on from, if not from nothing: it runs at once behind that one


def contenders(options: argparse.Namespace, split: Path) -> dict[str, Contender]:
    """List what is compared by name, each of them to leave its files in `{folder}`."""
    ranks, profile = str(options.ranks), "multi_gpu" if options.ranks > 1 else "single_gpu"
    accelerate = launch(options.ranks, profile if torch.cuda.is_available() else "cpu")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", ranks]
    read = [f"--teacher={options.teacher}", f"--dataset={split}", f"--top_k={options.top_k}"]
    tokens = f"--batch_tokens={options.batch_tokens}"
    ours = [*read, tokens, "--output={folder}/out.h5", "--log_dir={folder}/logs", "--dtype=float32", "--overflow=error"]

    def other(code: str, start: list[str], *words: str, **more: Any) -> Contender:
        script = str(COMPETITORS / code.split()[0])
        return Contender(command=[*start, script, *(words or read), "--output={folder}"], code=code, **more)

    python, bash = [sys.executable], "independent.sh independent_worker.py recipe.py flat.py"
    found = {
        OURS: Contender(command=[*accelerate, "generate.py", *ours], read=read_ours),
        CEILING: replace(other("ceiling.py", accelerate, *read, tokens), read=None, code=""),
        BASH: other(bash, ["bash"], ranks, *read, files="worker_*.h5"),
        "bash + merge": other(f"merge.py {bash}", python, "{folder}", files="merged.h5", after=BASH),
        "Accelerate, gather": other("accelerate_gather.py recipe.py flat.py", accelerate),
        "torch.distributed, gather": other("torch_distributed.py recipe.py flat.py", torchrun),
        "one HDF5 file, lock": other("file_lock.py recipe.py flat.py", torchrun),
        "Zarr, parallel writers": other("zarr_writers.py recipe.py", torchrun, files="*.zarr", read=read_zarr),
        "HDF5 group per row, gzip": other(
            "group_per_sample.py recipe.py", python, *read, f"--num_ranks={ranks}", read=read_groups
        ),
    }
    for piece, words in PIECES.items() if not options.no_ablation else ():
        found[f"ours, {words}"] = Contender(
            command=[*accelerate, "-m", "benchmarks.without", piece, *ours], read=read_ours
        )
    return found


def code_lines(names: str) -> int:
    """Count lines of files in `competitors/` that are neither blank nor comment nor docstring."""
    texts = [(COMPETITORS / name).read_text(encoding="utf-8") for name in names.split()]
    without_docstrings = re.sub(r'^\s*"""(?s:.*?)"""$', "", "\n".join(texts), flags=re.MULTILINE)
    return sum(1 for line in without_docstrings.splitlines() if line.strip() and not line.strip().startswith("#"))
