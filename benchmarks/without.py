r"""Run `generate.py` with one of its pieces replaced by what it is there to avoid.

accelerate launch ... -m benchmarks.without NAME OPTIONS_OF_GENERATE...

plan       batches of 8 rows in split order, padded to their longest
chunks     the head over whole padded batches, in a plain forward
transport  payloads padded and gathered on all ranks, every step, with everybody waiting
leader     a file per rank, then a merge
"""

import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import h5py
import numpy as np
import torch
from accelerate.utils import gather, pad_across_processes
from torch import Tensor

from logitgen import generate
from logitgen.file.header import create
from logitgen.file.layout import Array
from logitgen.file.reader import LogitsFile
from logitgen.options import parse_config
from logitgen.ranks.agree import Ranks
from logitgen.ranks.deliver import Submit
from logitgen.split import job
from logitgen.split.plan import Plan
from logitgen.split.tree import CPU_COST
from logitgen.teacher.model import Teacher

_BATCH_ROWS = 8
_OF_A_LAUNCH = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_", "TORCHELASTIC")


class SplitOrder(Plan):
    """Rows as they come, so many to a batch however long they are."""

    def __init__(self, lengths: Array, batch_tokens: int, *_: object) -> None:
        """Plan one forward pass over every row that needs one."""
        self.batch_tokens, self.pass_cost, self._shared = batch_tokens, CPU_COST, None
        self._rows = np.flatnonzero(lengths)
        self._starts = np.append(np.arange(0, len(self._rows), _BATCH_ROWS), len(self._rows))
        longest = np.maximum.reduceat(lengths[self._rows], self._starts[:-1]).astype(np.int64)
        self.costs = self.padded_tokens = longest * np.diff(self._starts)
        self.num_tokens = self.num_read = int(lengths.sum(dtype=np.int64))


def whole(*arguments: Any, **options: Any) -> Teacher:
    """Make a teacher that runs whole, as it does where its head cannot be run apart."""
    teacher = Teacher(*arguments, **options)
    teacher._decoder = None
    return teacher


@contextmanager
def deliver_in_steps(
    ranks: Ranks, shares: Sequence[Array], sizes: Array, submit: Submit | None, on_waited: object
) -> Iterator[SimpleNamespace]:
    """Stand in for the outbox: a payload leaves when all ranks have one, and everybody waits."""
    steps = count()

    def exchange(payload: Tensor) -> None:
        step, received = next(steps), gather(pad_across_processes(payload[None].to(ranks.device), dim=1)).cpu()
        for share, theirs in zip(shares, received, strict=True) if submit else ():
            if step < len(share):
                submit(share[step], theirs[: sizes[share[step]]].numpy())

    def put(batch: int, payload: Tensor, finish: Callable[[Array], None]) -> None:
        on_host = payload.cpu()
        finish(on_host.numpy())
        exchange(on_host)

    yield SimpleNamespace(put=put)
    for _ in range(max(map(len, shares)) - len(shares[ranks.stream])):  # others still have batches
        exchange(torch.zeros(0, dtype=torch.uint8))


REPLACED = {
    "plan": (job, "Plan", SplitOrder),
    "chunks": (generate, "Teacher", whole),
    "transport": (Ranks, "deliver", deliver_in_steps),
}
"""Where each piece is, and what is there instead."""


def run_without_leader(arguments: list[str]) -> None:
    """Let every rank believe to be alone with its part of the split, then merge what they wrote."""
    config = parse_config(arguments)
    rank, num_ranks = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    for name in [name for name in os.environ if name.startswith(_OF_A_LAUNCH)]:
        del os.environ[name]
    with open(config.dataset, "rb") as lines:
        num_rows = sum(1 for _ in lines)
    start, end = (num_rows * part // num_ranks for part in (rank, rank + 1))
    parts = [Path(config.output).with_name(f"rank_{number}.h5") for number in range(num_ranks)]
    own = [f"--split=train[{start}:{end}]", f"--output={parts[rank]}", f"--log_dir={config.log_dir}/part_{rank}"]
    sys.argv[1:] = [*arguments, *own]
    generate.main()
    if rank == 0:
        while not all(part.exists() for part in parts):  # each appears when it is complete
            time.sleep(0.05)
        merge(parts, Path(config.output))


def merge(parts: list[Path], output: Path) -> None:
    """Join files of consecutive parts of a split; what they say of their source rows is left as it is."""
    files = [LogitsFile(part) for part in parts]
    counted = ("num_rows", "num_tokens", "num_positions")
    sums = {name: sum(getattr(file.layout, name) for file in files) for name in counted}
    layout = replace(files[0].layout, **sums)
    with h5py.File(parts[0]) as first:
        plain = {name: v.decode() if isinstance(v, bytes) else int(v) for name, v in first.attrs.items()}
    create(output, layout, plain)
    with h5py.File(output, "r+") as merged:
        for name in layout.datasets:
            values = [file.arrays[name] for file in files]
            if name.endswith("offsets"):
                values = [np.zeros(1, np.int64), np.cumsum(np.concatenate([np.diff(part) for part in values]))]
            merged[name][:] = np.concatenate(values)
    for part in parts:
        part.unlink()


def main() -> None:
    """Replace a piece, and run."""
    name, *arguments = sys.argv[1:]
    sys.argv[1:] = arguments
    if name == "leader":
        run_without_leader(arguments)
        return
    setattr(*REPLACED[name])
    generate.main()


if __name__ == "__main__":
    main()
