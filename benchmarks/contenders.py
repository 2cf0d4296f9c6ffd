"""Who is compared: ours, the ways people capture without it, and ours with one piece taken away."""

import argparse
import ast
import io
import sys
import tokenize
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.check import read_flat, read_groups, read_ours, read_zarr
from benchmarks.harness import ROOT, launch

COMPETITORS = ROOT / "benchmarks" / "competitors"
OURS, CEILING, BASH, MERGE = "logitgen", "forward passes alone", "bash, file per process", "bash + merge"

Read = Callable[[Sequence[Path]], Iterator[tuple[int, dict[str, Any]]]]


@dataclass(frozen=True, kw_only=True)
class Contender:
    """A way to capture.

    Attributes:
        name: What the table calls it.
        command: What is run.
        files: Pattern of the files it leaves in its folder.
        read: How they are read; None where nothing is kept.
        code: Files in `competitors/` whose lines the user owns.
        after: What it goes on from, if not from nothing: it runs at once behind that one.
    """

    name: str
    command: list[str]
    files: str = "*.h5"
    read: Read | None = read_flat
    code: tuple[str, ...] = ()
    after: str = ""


def contenders(options: argparse.Namespace, split: Path) -> list[Contender]:
    """List what is compared, each of them to leave its files in `{folder}`."""
    python, ranks = sys.executable, str(options.ranks)
    shared = [f"--teacher={options.teacher}", f"--dataset={split}", f"--top_k={options.top_k}", "--output={folder}"]
    torchrun = [python, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", ranks]
    profile = "cpu" if not torch.cuda.is_available() else "multi_gpu" if options.ranks > 1 else "single_gpu"
    accelerate = launch(options.ranks, profile)
    ours = [*shared[:3], "--output={folder}/out.h5", "--log_dir={folder}/logs", "--dtype=float32", "--overflow=error"]
    ours += [f"--batch_tokens={options.batch_tokens}"]
    flat = ("recipe.py", "flat.py")
    bash = ("independent.sh", "independent_worker.py", *flat)

    def script(name: str) -> str:
        return str(COMPETITORS / name)

    merge = [python, script("merge.py"), "{folder}", ranks]
    ceiling = [*accelerate, script("ceiling.py"), *shared, f"--batch_tokens={options.batch_tokens}"]
    groups = [python, script("group_per_sample.py"), *shared, f"--num_ranks={ranks}"]
    found = [
        Contender(name=OURS, command=[*accelerate, "generate.py", *ours], read=read_ours),
        Contender(name=CEILING, command=ceiling, read=None),
        Contender(name=BASH, command=["bash", script("independent.sh"), ranks, *shared], code=bash),
        Contender(name=MERGE, command=merge, code=(*bash, "merge.py"), after=BASH),
        *(
            Contender(name=name, command=[*start, script(code), *shared], code=(code, *flat))
            for name, start, code in (
                ("Accelerate, gather", accelerate, "accelerate_gather.py"),
                ("torch.distributed, gather", torchrun, "torch_distributed.py"),
                ("one HDF5 file, lock", torchrun, "file_lock.py"),
            )
        ),
        Contender(
            name="Zarr, parallel writers",
            command=[*torchrun, script("zarr_writers.py"), *shared],
            files="*.zarr",
            read=read_zarr,
            code=("zarr_writers.py", "recipe.py"),
        ),
        Contender(
            name="HDF5 group per row, gzip", command=groups, read=read_groups, code=("group_per_sample.py", "recipe.py")
        ),
    ]
    pieces = {
        "plan": "rows in split order, by 8",
        "chunks": "head not in chunks",
        "transport": "all-gather every step",
        "leader": "file per rank, merge",
    }
    found += [
        Contender(
            name=f"ours, {words}", command=[*accelerate, "-m", "benchmarks.without", piece, *ours], read=read_ours
        )
        for piece, words in pieces.items()
        if not options.no_ablation
    ]
    return found


def code_lines(names: Sequence[str]) -> int:
    """Count lines that are neither blank nor comment nor docstring."""
    return sum(_code_lines(COMPETITORS / name) for name in names)


def _code_lines(path: Path) -> int:
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".py":
        return sum(1 for line in text.splitlines() if line.strip() and not line.strip().startswith("#"))
    silent = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    lines = {
        line
        for token in tokenize.generate_tokens(io.StringIO(text).readline)
        if token.type not in silent
        for line in range(token.start[0], token.end[0] + 1)
    }
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.FunctionDef | ast.ClassDef) and ast.get_docstring(node):
            docstring = node.body[0]
            lines -= set(range(docstring.lineno, (docstring.end_lineno or docstring.lineno) + 1))
    return len(lines)
