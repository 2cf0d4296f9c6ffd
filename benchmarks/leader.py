"""The leader's ceiling: how fast payloads come from the ranks into the file, against wire and disk alone.

    python -m benchmarks.leader

No teacher: each rank has one payload of random bytes, which stands for all of its batches. They go through the real
transport and the real writer into a real file, and to the disk. In turns with it, over the same blocks:

- `sealed`: the ranks also collect and checksum their batches, as a run does; on GPU machines, on cores of their own;
- `wire`: plain send and recv to rank 0, which throws them away;
- `disk`: rank 0 writes them one after the other into one file, and syncs it;
- `both`: rank 0 receives them and writes them one after the other;
- `places`: like `disk`, but every row's parts where they belong in the file, by one bare `pwrite` each, and synced
  meanwhile as ours are: rows are computed by length and stored in split order, so the format asks it of any writer;
- `bare`: rank 0 receives them and writes them to their places, which is all that a run needs of these cores.

A rank is not starved if all of them are near 50 % of their batches when half of all are in the file.
"""

import argparse
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.harness import Spread, launch, measure, median_and_spread, write_report
from benchmarks.synthetic import Job, make_job, prepare_memory, random_payload
from logitgen.estimate import forget_peak, peak_bytes
from logitgen.file.header import Places
from logitgen.file.layout import nbytes
from logitgen.leader.writer import COMMIT_BYTES, Writer
from logitgen.ranks.agree import Ranks
from logitgen.ranks.launch import launched

VOCAB_SIZE = 151_936
GPU_TOKENS_PER_SECOND = (5_000, 20_000, 50_000)

_BATCHES_TO_SEE_PROGRESS = 20
"""Per rank: each has up to four on their way, two in its own buffers and two in the leader's."""


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
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4, 8, 16])
    parser.add_argument("--kinds", type=int, nargs="+", default=[*range(len(KINDS))], help="Which, counted from 0.")
    parser.add_argument("--megabytes", type=float, default=300.0, help="What a run puts into the file.")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path(".bench"), help="Also the disk that is measured.")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    if "RANK" in os.environ:
        be_rank(options)
        return
    found = [line for num_ranks in options.ranks for line in start_ranks(num_ranks, options)]
    write_report(options.out, "leader", found, [summary(line) for line in found])
    kinds = dict.fromkeys(line["kind"] for line in found)
    write_report(options.out, "leader_gpus", found, [gpus_fed(kind, found) for kind in kinds])


def start_ranks(num_ranks: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Launch so many ranks, and read what the leader measured of every kind."""
    words = ["--kinds", *map(str, options.kinds), "--megabytes", str(options.megabytes)]
    words += ["--rounds", str(options.rounds), "--out", str(options.out.resolve())]
    measured = measure([*launch(num_ranks), "--module", "benchmarks.leader", *words], {"OMP_NUM_THREADS": "1"})
    return [json.loads(line) for _, line in measured.lines if line.startswith("{")]


def be_rank(options: argparse.Namespace) -> None:
    """Go through all kinds; the leader prints a line of JSON for each."""
    with launched() as ranks:
        wire = dist.new_group(backend="gloo")
        for kind in (KINDS[number] for number in options.kinds):
            measured = measure_kind(ranks, wire, kind, options)
            if ranks.is_leader:
                print(json.dumps(measured), flush=True)


def measure_kind(ranks: Ranks, wire: dist.ProcessGroup, kind: Kind, options: argparse.Namespace) -> dict[str, Any]:
    """Run all ways in turns, and ours once more over twice the rows; what the leader returns is for all ranks."""
    path = options.out / "leader.h5"
    size_bytes = int(options.megabytes * 1e6)
    job, long_job = (
        make_job(size, kind.top_k, VOCAB_SIZE, kind.batch_tokens, kind.row_tokens)
        for size in (size_bytes, 2 * size_bytes)
    )
    payload = torch.from_numpy(random_payload(int(max(job.payload_bytes.max(), long_job.payload_bytes.max()))))
    ways: dict[str, tuple[dist.ProcessGroup | None, type[Plain] | None]] = {
        "wire": (wire, None),
        "disk": (None, Plain),
        "both": (wire, Plain),
        "places": (None, InPlaces),
        "bare": (wire, InPlaces),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ("ours", "sealed", *ways)}
    runs = []
    for _ in range(options.rounds):
        runs.append(deliver(ranks, job, payload, path))
        seconds["ours"].append(runs[-1]["seconds"])
        seconds["sealed"].append(deliver(ranks, job, payload, path, sealed=True)["seconds"])
        for name, way in ways.items():
            seconds[name].append(move(ranks, job, payload, *way, path))
    return {
        "kind": kind.name,
        "position_bytes": job.layout.bytes_per_position,
        "num_ranks": ranks.num_ranks,
        "num_batches": job.plan.num_batches,
        "num_rows": len(job.rows),
        "num_positions": job.layout.num_positions,
        "payload_bytes": int(job.payload_bytes.sum()),
        "seconds": seconds,
        "peak_bytes": max(run["peak_bytes"] for run in runs),
        "peak_bytes_of_twice_the_rows": deliver(ranks, long_job, payload, path)["peak_bytes"],
        "shares_at_half": [run["shares_at_half"] for run in runs],
        "finish_seconds": [run["finish_seconds"] for run in runs],
    }


def deliver(ranks: Ranks, job: Job, payload: Tensor, path: Path, *, sealed: bool = False) -> dict[str, Any]:
    """Send every batch through transport and writer into a new file; timed from the first one until all are on disk."""
    sizes, shares = job.payload_bytes, job.shares(ranks.num_ranks)
    written: list[int] = []

    def on_written(batch: int, busy_seconds: float) -> None:
        written.append(batch)

    with ranks.together():
        head = job.create_file(path) if ranks.is_leader else None
    with timed(ranks) as seconds:
        writer = Writer(path, head, job, np.zeros(len(job.rows), bool), on_written) if head else None
        with writer or nullcontext():
            with ranks.deliver(shares, sizes, writer.submit if writer else None, lambda *_: None) as outbox:
                for number in shares[ranks.rank]:
                    outbox.put(number, payload[: sizes[number]], job.sealing(number) if sealed else lambda _: None)
            finished = seconds()
            with ranks.together():
                if writer:
                    writer.finish()
    most_bytes = peak_bytes()
    finish_seconds = ranks.gathered(finished)
    if ranks.is_leader:
        path.unlink()
    at_half = set(written[: len(written) // 2])
    return {
        "seconds": seconds(),
        "peak_bytes": most_bytes,
        "shares_at_half": [len(at_half & set(own.tolist())) / max(1, len(own)) for own in shares],
        "finish_seconds": finish_seconds,
    }


class Plain:
    """A file, its space reserved, that takes blocks one after the other."""

    def __init__(self, path: Path, job: Job) -> None:
        """Make the file."""
        self._create(path, job)
        self._file = path.open("r+b", buffering=0)
        self._one_by_one = threading.Lock()

    def _create(self, path: Path, job: Job) -> None:
        with path.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, int(job.payload_bytes.sum()))
        prepare_memory(path)

    def write(self, number: int, block: Tensor) -> None:
        """Take a block, from any thread."""
        left = memoryview(block.numpy())
        with self._one_by_one:
            while len(left):
                left = left[self._file.write(left) :]

    def close(self) -> None:
        """Have all on the disk."""
        os.fsync(self._file.fileno())
        self._file.close()


class InPlaces(Plain):
    """A file of a run, in which every part of a block has its place; synced while it is written."""

    def _create(self, path: Path, job: Job) -> None:
        self._parts = list(parts_of(job, job.create_file(path).places))
        self._syncer = ThreadPoolExecutor(1)
        self._sync, self._unsynced = self._syncer.submit(lambda: None), 0

    def write(self, number: int, block: Tensor) -> None:
        """Take a block, from any thread."""
        view, descriptor = memoryview(block.numpy()), self._file.fileno()
        with self._one_by_one:
            for place, start, end in self._parts[number]:
                self._unsynced += os.pwrite(descriptor, view[start:end], place)
            if self._unsynced > COMMIT_BYTES and self._sync.done():
                self._sync, self._unsynced = self._syncer.submit(os.fsync, descriptor), 0

    def close(self) -> None:
        """Have all on the disk."""
        self._syncer.shutdown()
        super().close()


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
    ranks: Ranks,
    job: Job,
    payload: Tensor,
    wire: dist.ProcessGroup | None,
    kind: type[Plain] | None,
    path: Path,
) -> float:
    """Move the same blocks with nothing around them, and return the seconds it took.

    Args:
        ranks: The ranks.
        job: Which blocks there are.
        payload: What is in them.
        wire: How they come to rank 0; None if it has them all.
        kind: What file takes them on rank 0; None if it throws them away.
        path: Where that file is, while it is.
    """
    sizes, shares = job.payload_bytes, job.shares(ranks.num_ranks)
    file = kind(path, job) if kind and ranks.is_leader else None
    write = file.write if file else lambda number, block: None

    def receive(peer: int) -> None:
        block = torch.empty_like(payload)
        for number in shares[peer]:
            dist.recv(block[: sizes[number]], src=peer, group=wire)
            write(number, block[: sizes[number]])

    with timed(ranks) as seconds:
        if not ranks.is_leader:
            for number in shares[ranks.rank] if wire else ():
                dist.send(payload[: sizes[number]], dst=0, group=wire)
        elif wire:
            with ThreadPoolExecutor(ranks.num_ranks) as pool:
                received = [pool.submit(receive, peer) for peer in range(1, ranks.num_ranks)]
                for number in shares[0]:
                    write(number, payload[: sizes[number]])
            for future in received:
                future.result()
        else:
            for number, size in enumerate(sizes):
                write(number, payload[:size])
        if file:
            file.close()
        ranks.gathered(None)
    if file:
        path.unlink()
    return seconds()


@contextmanager
def timed(ranks: Ranks) -> Iterator[Callable[[], float]]:
    """Start all ranks at once; yield how many seconds ago that was, which stands still once the block has ended."""
    ranks.gathered(None)
    forget_peak()
    start = time.perf_counter()
    end: list[float] = []
    yield lambda: (end[0] if end else time.perf_counter()) - start
    end.append(time.perf_counter())


def rates(line: dict[str, Any]) -> dict[str, Spread]:
    """Bytes per second of every way, of the whole file: the leader's own batches do not travel, but count."""
    return {
        name: median_and_spread([line["payload_bytes"] / found for found in line["seconds"][name]])
        for name in line["seconds"]
    }


def summary(line: dict[str, Any]) -> dict[str, str]:
    """Turn what was measured of a kind on so many ranks into a row of the table."""
    found = {name: Spread(*(value / 1e6 for value in spread)) for name, spread in rates(line).items()}
    ours, limit = found["ours"].median, min(found["wire"].median, found["disk"].median)
    # Progress of the ranks says nothing where the buffers hold much of what each of them has.
    fair = line["num_batches"] >= _BATCHES_TO_SEE_PROGRESS * line["num_ranks"]
    at_half = [pick(map(pick, line["shares_at_half"])) for pick in (min, max)]
    finish = min(min(seconds) / max(seconds) for seconds in line["finish_seconds"])
    return {
        "kind": line["kind"],
        "B/position": f"{line['position_bytes']:,}",
        "ranks": str(line["num_ranks"]),
        "MB/s into the file": f"{ours:,.0f} ({found['ours'].least:,.0f}-{found['ours'].most:,.0f})",
        "positions/s": f"{ours * 1e6 / line['position_bytes']:,.0f}",
        **{name: f"{found[name].median:,.0f}" for name in found if name != "ours"},
        "of lower limit": f"{ours / limit:.0%}",
        "of bare": f"{ours / found['bare'].median:.0%}",
        "leader's peak MB": f"{line['peak_bytes'] / 1e6:,.0f}",
        "twice the rows": f"{line['peak_bytes_of_twice_the_rows'] / 1e6:,.0f}",
        "least, most at half": f"{at_half[0]:.0%}, {at_half[1]:.0%}" if fair else "",
        "first/last finish": f"{finish:.2f}" if fair else "",
    }


def gpus_fed(kind: str, found: list[dict[str, Any]]) -> dict[str, str]:
    """Compute how many GPUs the slowest median of a kind is enough for, if every token is captured."""
    lines = [line for line in found if line["kind"] == kind]
    rate = min(rates(line)["ours"].median for line in lines)
    positions = rate / lines[0]["position_bytes"]
    speeds = {f"GPUs of {speed:,} tokens/s": f"{positions / speed:,.0f}" for speed in GPU_TOKENS_PER_SECOND}
    return {"kind (computed from the slowest MB/s)": kind, "MB/s": f"{rate / 1e6:,.0f}"} | speeds


if __name__ == "__main__":
    main()
