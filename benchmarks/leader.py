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

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.harness import Row, Spread, in_turns, launch, measure, parse, write_report
from benchmarks.synthetic import Job, make_job, random_payload
from logitgen.estimate import forget_peak, peak_bytes
from logitgen.file.header import Places
from logitgen.file.layout import nbytes
from logitgen.leader.writer import COMMIT_BYTES, Writer
from logitgen.ranks.agree import Ranks
from logitgen.ranks.launch import launched

VOCAB_SIZE = 151_936
GPU_TOKENS_PER_SECOND = (5_000, 20_000, 50_000)


Result = tuple[float, int]
"""Seconds of some work, and this process's peak of memory in bytes."""


KINDS = (
    ("k=64", 64, 8192, 500),
    ("k=64, short rows", 64, 8192, 60),
    ("k=128", 128, 8192, 500),
    ("12 sampled ids (as k=9)", 9, 8192, 500),
    ("hidden 4096 x 2 B (as k=1364)", 1364, 1024, 250),
)
"""What is kept of a position, in the bytes of so many log-probs; tokens of a batch, and of a row on average."""


def main() -> None:
    """Start the ranks, or be one of them, whose leader prints a line of JSON for each kind."""
    options = parse(__doc__, ranks=[2, 4, 8, 16], kinds=[*range(len(KINDS))], megabytes=300.0, rounds=3)
    if "RANK" in os.environ:
        with launched() as ranks:
            wire = dist.new_group(backend="gloo")
            for number in options.kinds:
                measured = measure_kind(ranks, wire, options, *KINDS[number])
                if ranks.is_leader:
                    print(json.dumps(measured), flush=True)
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


def measure_kind(
    ranks: Ranks, wire: dist.ProcessGroup, options: argparse.Namespace, name: str, k: int, batch: int, row: int
) -> Row:
    """Run all ways in turns, and ours once more over twice the rows."""
    path = options.output / "leader.h5"
    size_bytes = int(1e6 * options.megabytes)
    job, long_job = (make_job(times * size_bytes, k, VOCAB_SIZE, batch, row) for times in (1, 2))
    payload = torch.from_numpy(random_payload(int(max(job.payload_bytes.max(), long_job.payload_bytes.max()))))
    plain = {"wire": (True, None), "disk": (False, False), "both": (True, False)}
    plain |= {"places": (False, True), "bare": (True, True)}
    ways = {"ours": partial(deliver, ranks, job, payload, path)}
    for way, (travels, in_places) in plain.items():
        ways[way] = partial(move, ranks, job, payload, path, wire if travels else None, in_places)
    found = in_turns(ways, options.rounds)
    megabytes = job.payload_bytes.sum() / 1e6  # of the whole file: the leader's own batches do not travel, but count
    rates = {way: Spread.of([megabytes / seconds for seconds, _ in runs]) for way, runs in found.items()}
    ours, medians = rates.pop("ours"), {way: rate.median for way, rate in rates.items()}
    return {
        "kind": name,
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


def deliver(ranks: Ranks, job: Job, payload: Tensor, path: Path) -> Result:
    """Send every batch through transport and writer into a new file."""
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

    return timed(ranks, path, work)


class Bare:
    """A file that takes blocks from any thread: one after the other, or every part of a block in its place of a run."""

    def __init__(self, path: Path, job: Job, *, in_places: bool) -> None:
        """Make the file, its space reserved."""
        places = job.create_file(path).places
        self._parts = list(parts_of(job, places)) if in_places else None
        self._file = path.open("r+b", buffering=0)
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
) -> Result:
    """Move the same blocks with nothing around them.

    Rank 0 has them all if there is no wire, and throws them away if they have no places, not even one after the other.
    """
    sizes, shares = job.payload_bytes, job.shares(ranks.num_ranks if wire else 1)
    file = Bare(path, job, in_places=in_places) if ranks.is_leader and in_places is not None else None

    def take(peer: int) -> None:
        block = torch.empty_like(payload) if peer else payload
        for number in shares[peer]:
            if peer:
                dist.recv(block[: sizes[number]], src=peer, group=wire)
            if file:
                file.write(number, block[: sizes[number]])

    def work() -> None:
        if ranks.is_leader:
            with ThreadPoolExecutor(len(shares)) as pool:
                list(pool.map(take, range(len(shares))))
        elif wire:
            for number in shares[ranks.rank]:
                dist.send(payload[: sizes[number]], dst=0, group=wire)
        if file:
            file.close()
        ranks.gathered(None)

    return timed(ranks, path, work)


def timed(ranks: Ranks, path: Path, work: Callable[[], None]) -> Result:
    """Start some work on all ranks at once, and delete its file."""
    ranks.gathered(None)
    forget_peak()
    start = time.perf_counter()
    work()
    found = time.perf_counter() - start, peak_bytes()
    ranks.gathered(None)
    if ranks.is_leader:
        path.unlink(missing_ok=True)
    return found


if __name__ == "__main__":
    main()
