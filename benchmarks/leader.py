"""The leader's ceiling: how fast payloads come from the ranks into the file, against wire and disk alone.

    python -m benchmarks.leader

No teacher: each rank has one payload of random bytes, which stands for all of its batches. They go through the real
transport and the real writer into a real file, `--megabytes` in all. The comparisons, which docs/benchmarks.md
explains, run in turns with it over the same blocks. Rows are computed by length and stored in split order, so the
format asks of any writer to put each part of a row in its place. `--kinds` are numbers of those below, from 0.
"""

import argparse
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.harness import Row, Spread, in_turns, launch, measure, parse, write_report
from benchmarks.synthetic import Job, make_job, prepare_memory, random_payload
from logitgen.estimate import forget_peak, peak_bytes
from logitgen.file.header import Places
from logitgen.file.layout import nbytes
from logitgen.leader.writer import COMMIT_BYTES, Writer
from logitgen.ranks.agree import Ranks
from logitgen.ranks.launch import launched

VOCAB_SIZE = 151_936
GPU_TOKENS_PER_SECOND = (5_000, 20_000, 50_000)


class Kind(NamedTuple):
    """What is kept of a position, in the bytes of so many log-probs; tokens per batch, and per row on average."""

    name: str
    top_k: int
    batch_tokens: int = 8192
    row_tokens: int = 500


KINDS = (
    Kind("k=64", 64),
    Kind("k=64, short rows", 64, row_tokens=60),
    Kind("k=128", 128),
    Kind("12 sampled ids (as k=9)", 9),
    Kind("hidden 4096 x 2 B (as k=1364)", 1364, batch_tokens=1024, row_tokens=250),
)


def main() -> None:
    """Start the ranks, or be one of them."""
    options = parse(__doc__, ranks=[2, 4, 8, 16], kinds=[*range(len(KINDS))], megabytes=300.0, rounds=3)
    if "RANK" in os.environ:
        be_rank(options)
        return
    words = ["--module", "benchmarks.leader", *sys.argv[1:], f"--output={options.output}"]
    runs = [measure([*launch(num_ranks), *words], OMP_NUM_THREADS="1") for num_ranks in options.ranks]
    table = [json.loads(line) for run in runs for _, line in run.lines if line.startswith("{")]
    for row in table:
        row["MB/s into the file"] = Spread(*row["MB/s into the file"])
    write_report(options.output, "leader", table, {"of lower limit": ".0%", "of bare": ".0%"})
    slowest: dict[str, Row] = {}
    for row in table:
        slowest[row["kind"]] = min(slowest.get(row["kind"], row), row, key=lambda row: row["positions/s"])
    feeds = [
        {"kind (computed from the slowest MB/s)": kind, "MB/s": row["MB/s into the file"].median}
        | {f"GPUs of {speed:,} tokens/s": row["positions/s"] / speed for speed in GPU_TOKENS_PER_SECOND}
        for kind, row in slowest.items()
    ]
    write_report(options.output, "leader_gpus", feeds)


def be_rank(options: argparse.Namespace) -> None:
    """Go through all kinds; the leader prints a line of JSON for each."""
    with launched() as ranks:
        wire = dist.new_group(backend="gloo")
        for kind in (KINDS[number] for number in options.kinds):
            measured = measure_kind(ranks, wire, kind, options)
            if ranks.is_leader:
                print(json.dumps(measured), flush=True)


def measure_kind(ranks: Ranks, wire: dist.ProcessGroup, kind: Kind, options: argparse.Namespace) -> Row:
    """Run all ways in turns, and ours once more over twice the rows."""
    path = options.output / "leader.h5"
    jobs = [
        make_job(int(times * options.megabytes * 1e6), kind.top_k, VOCAB_SIZE, kind.batch_tokens, kind.row_tokens)
        for times in (1, 2)
    ]
    job, long_job = jobs
    payload = torch.from_numpy(random_payload(max(int(job.payload_bytes.max()) for job in jobs)))
    plain = {"wire": (True, None), "disk": (False, False), "both": (True, False)}
    plain |= {"places": (False, True), "bare": (True, True)}
    ways: dict[str, Callable[[], tuple[float, int]]] = {"ours": partial(deliver, ranks, job, payload, path)}
    for name, (travels, in_places) in plain.items():
        ways[name] = partial(move, ranks, job, payload, path, wire if travels else None, in_places)
    found = in_turns(ways, options.rounds)
    megabytes = job.payload_bytes.sum() / 1e6  # of the whole file: the leader's own batches do not travel, but count
    rates = {name: Spread.of([megabytes / seconds for seconds, _ in runs]) for name, runs in found.items()}
    ours, medians = rates.pop("ours"), {name: rate.median for name, rate in rates.items()}
    return {
        "kind": kind.name,
        "ranks": ranks.num_ranks,
        "B/position": job.layout.bytes_per_position,
        "MB/s into the file": ours,
        "positions/s": ours.median * 1e6 / job.layout.bytes_per_position,
        **medians,
        "of lower limit": ours.median / min(medians["wire"], medians["disk"]),
        "of bare": ours.median / medians["bare"],
        "leader's peak MB": max(peak for _, peak in found["ours"]) / 1e6,
        "twice the rows": deliver(ranks, long_job, payload, path)[1] / 1e6,
    }


def deliver(ranks: Ranks, job: Job, payload: Tensor, path: Path) -> tuple[float, int]:
    """Send every batch through transport and writer into a new file; return the seconds and the peak of memory."""
    sizes, shares = job.payload_bytes, job.shares(ranks.num_ranks)
    with ranks.together():
        head = job.create_file(path) if ranks.is_leader else None

    def work() -> None:
        writer = Writer(path, head, job, np.zeros(len(job.rows), bool)) if head else None
        with writer or nullcontext():
            with ranks.deliver(shares, sizes, writer.submit if writer else None, lambda *_: None) as outbox:
                for number in shares[ranks.rank]:
                    outbox.put(number, payload[: sizes[number]], lambda _: None)
            with ranks.together():
                if writer:
                    writer.finish()

    found = timed(ranks, work)
    ranks.gathered(None)
    if ranks.is_leader:
        path.unlink()
    return found


class Bare:
    """A file that takes blocks from any thread: one after the other, or every part of a block in its place of a run."""

    def __init__(self, path: Path, job: Job, *, in_places: bool) -> None:
        """Make the file, its space reserved."""
        self._parts = list(parts_of(job, job.create_file(path).places)) if in_places else None
        self._file = path.open("r+b" if in_places else "w+b", buffering=0)
        if not in_places:
            os.posix_fallocate(self._file.fileno(), 0, int(job.payload_bytes.sum()))
            prepare_memory(path)
        self._syncer, self._one_by_one = ThreadPoolExecutor(1), threading.Lock()
        self._sync, self._end, self._unsynced = self._syncer.submit(lambda: None), 0, 0

    def write(self, number: int, block: Tensor) -> None:
        """Take a block; a file of places is synced meanwhile."""
        view, descriptor = memoryview(block.numpy()), self._file.fileno()
        with self._one_by_one:
            for place, start, end in self._parts[number] if self._parts else [(self._end, 0, len(view))]:
                self._unsynced += os.pwrite(descriptor, view[start:end], place)
            self._end += len(view)
            if self._parts and self._unsynced > COMMIT_BYTES and self._sync.done():
                self._sync, self._unsynced = self._syncer.submit(os.fsync, descriptor), 0

    def close(self) -> None:
        """Have all on the disk."""
        self._syncer.shutdown()
        os.fsync(self._file.fileno())
        self._file.close()


def parts_of(job: Job, places: Places) -> Iterator[list[tuple[int, int, int]]]:
    """Yield of every batch where in the file each part of its payload goes, and from where to where in it it is."""
    counts = job.rows.num_positions
    offsets = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
    for batch in range(job.plan.num_batches):
        rows = job.plan.rows(batch).tolist()
        sizes = [(places["crc32"] + 4 * row, 4) for row in rows]
        for name, field in job.layout.captured.items():
            entry_bytes = nbytes(field)
            sizes += [(places[name] + int(offsets[row]) * entry_bytes, int(counts[row]) * entry_bytes) for row in rows]
        ends = np.cumsum([size for _, size in sizes]).tolist()
        yield [(place, end - size, end) for (place, size), end in zip(sizes, ends, strict=True)]


def move(
    ranks: Ranks, job: Job, payload: Tensor, path: Path, wire: dist.ProcessGroup | None, in_places: bool | None
) -> tuple[float, int]:
    """Move the same blocks with nothing around them; return the seconds and the peak of memory.

    Rank 0 has them all if there is no wire, and throws them away if they have no places, not even one after the other.
    """
    sizes, shares = job.payload_bytes, job.shares(ranks.num_ranks)
    file = None if in_places is None or not ranks.is_leader else Bare(path, job, in_places=in_places)
    write = file.write if file else lambda number, block: None

    def take(peer: int) -> None:
        block = torch.empty_like(payload) if peer else payload
        for number in shares[peer]:
            if peer:
                dist.recv(block[: sizes[number]], src=peer, group=wire)
            write(number, block[: sizes[number]])

    def work() -> None:
        if ranks.is_leader and wire:
            with ThreadPoolExecutor(ranks.num_ranks) as pool:
                list(pool.map(take, range(ranks.num_ranks)))
        elif ranks.is_leader:
            for number, size in enumerate(sizes):
                write(number, payload[:size])
        elif wire:
            for number in shares[ranks.rank]:
                dist.send(payload[: sizes[number]], dst=0, group=wire)
        if file:
            file.close()
        ranks.gathered(None)

    found = timed(ranks, work)
    if file:
        path.unlink()
    return found


def timed(ranks: Ranks, work: Callable[[], None]) -> tuple[float, int]:
    """Start some work on all ranks at once; return the seconds it took here, and the peak of memory in bytes."""
    ranks.gathered(None)
    forget_peak()
    start = time.perf_counter()
    work()
    return time.perf_counter() - start, peak_bytes()


if __name__ == "__main__":
    main()
