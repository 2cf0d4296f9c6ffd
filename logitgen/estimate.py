"""The cost of a run, from its plan and a short pilot, without writing anything."""

import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from logitgen.file.header import Attributes, file_bytes
from logitgen.file.layout import ENCODINGS, Encoding, Layout
from logitgen.provenance import attributes_with
from logitgen.ranks.deliver import NUM_BUFFERS, Outbox
from logitgen.split.job import Job
from logitgen.split.plan import Plan
from logitgen.teacher.capture import capture_batch, seal
from logitgen.teacher.mass import KeptMass, MeasuredTeacher
from logitgen.teacher.model import Teacher

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

PROBE_TOKENS = 2048
MAX_BATCH_TOKENS = 4096
"""A larger batch only takes more memory on a CPU."""
MAX_BATCH_TOKENS_GPU = 32768

SAFE_SHARE = 0.7
"""Share of the free memory for a batch: the need is measured on one batch, and memory gets fragmented."""

PILOT_SECONDS = 20.0
NUM_PILOTS = 8
OTHER_KEPT = (8, 16, 32, 64, 128, 256)
NUM_MEASURED = 4096
"""Positions at which the mass of the top k is measured, about."""
OTHER_DRAWN = 12
OTHER_ENCODINGS: tuple[Encoding, ...] = ("plain", "packed")
NUM_RANKS = (1, 2, 4, 8, 16, 32, 64)


@dataclass(frozen=True)
class Pilot:
    """The measurements of a rank on a few batches.

    Attributes:
        seconds_per_token: Time from a row to a checksummed payload in host memory, over `Plan.costs`: of a token,
            padding or not, but that passes over shared prefixes count for more than they read.
        host_bytes: Largest resident memory of the process, or 0 where the system does not tell.
        device_bytes: Largest memory reserved on the GPU, or 0 on CPU.
        kept_mass: Probability mass of the top k. All ranks compute the same batches, and measure the same positions.
    """

    seconds_per_token: float
    host_bytes: int
    device_bytes: int
    kept_mass: KeptMass = KeptMass(0, {})


def fitting_batch_tokens(teacher: Teacher, job: Job, ranks_of_machine: int) -> int:
    """Find the largest token budget of a batch that fits, from the free memory and the need of a small batch.

    The result is a power of two, so that a little more or less free memory does not change it.

    Args:
        teacher: The loaded teacher.
        job: The job with a budget of `PROBE_TOKENS`. The probe takes its first batch, and the first whose rows share
            prefixes.
        ranks_of_machine: Number of ranks that share the machine's memory, unless each has a GPU with its own.
    """
    plan = job.plan
    on_gpu = teacher.device.type == "cuda"  # Apple's shares the machine's memory, and does not say how much is free
    most = MAX_BATCH_TOKENS_GPU if on_gpu else MAX_BATCH_TOKENS
    free_bytes = _free_bytes(teacher.device) / (1 if on_gpu else ranks_of_machine)
    # A batch that shares prefixes reads one beside its budget.
    probed = {0: int(plan.padded_tokens[0])} | {int(number): plan.batch_tokens for number in plan.sharing[:1]}
    bytes_per_token = max(_need(teacher, job, number) / tokens for number, tokens in probed.items())
    if free_bytes <= 0 or bytes_per_token <= 0:
        return most
    fitting = int(SAFE_SHARE * free_bytes / bytes_per_token)
    return min(most, 1 << max(0, fitting.bit_length() - 1))


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    return _proc_bytes("/proc/meminfo", "MemAvailable")


def _need(teacher: Teacher, job: Job, number: int) -> int:
    """Return the memory that a batch of the plan takes, in bytes, or 0 where the system does not tell."""
    batch = job.batch(number)
    capture_batch(teacher, batch, job.layout)  # the first run also allocates memory that stays
    return _taken_bytes(teacher.device, lambda: capture_batch(teacher, batch, job.layout))


def _taken_bytes(device: torch.device, work: Callable[[], object]) -> int:
    """Return the largest growth of memory during some work, or 0 where the system does not tell."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        work()
        return torch.cuda.max_memory_allocated(device) - before
    forget_peak()
    before = _proc_bytes("/proc/self/status", "VmRSS")
    work()
    return peak_bytes() - before


def forget_peak() -> None:
    """Reset this process's peak of memory, where Linux can."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_bytes() -> int:
    """Return the largest resident memory of this process since the last reset, or 0 where the system does not tell."""
    return _proc_bytes("/proc/self/status", "VmHWM")


def _proc_bytes(path: str, name: str) -> int:
    """Read a size from a file of Linux, or 0 elsewhere."""
    try:
        lines = Path(path).read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:")), 0)


def run_pilot(teacher: Teacher, job: Job, agreed: Callable[[int], int]) -> Pilot:
    """Compute a few of the batches as a run would, and throw the result away.

    The first and largest batch warms up. It shows the memory a run needs and the number of batches there is time for.
    The others are drawn evenly from the plan.

    Args:
        teacher: The loaded teacher.
        job: The job of the run.
        agreed: Turns a number of batches into a number that is the same on all ranks: ranks that share a teacher must
            run it equally often.
    """
    plan = job.plan
    outbox = Outbox(int(job.payload_bytes.max()), lambda number, payload: lambda: None, teacher.device)
    measured = _measured(teacher, job)

    def seconds(number: int) -> float:
        start, before = time.perf_counter(), measured.seconds
        batch = job.batch(number)
        measured.expect(number, batch)
        payload = capture_batch(measured, batch, job.layout)
        outbox.put(number, payload, partial(seal, batch=batch, layout=job.layout, dtype=teacher.dtype))
        outbox.flush()
        return time.perf_counter() - start - (measured.seconds - before)

    first = seconds(0)
    num_timed = agreed(min(NUM_PILOTS, int(PILOT_SECONDS / first)))
    timed = {number: seconds(number) for number in _spread(plan, num_timed)} or {0: first}
    cost = int(plan.costs[list(timed)].sum())
    return Pilot(sum(timed.values()) / cost, *_peak_memory(teacher.device), measured.kept_mass)


def _spread(plan: Plan, count: int) -> list[int]:
    """Draw some batches evenly from a plan."""
    return sorted({int(number) for number in np.linspace(0, plan.num_batches - 1, count)})


def _measured(teacher: Teacher, job: Job) -> MeasuredTeacher:
    """Have a teacher measure the mass of its top k at positions of the pilot's batches, all as likely to be drawn."""
    layout = job.layout
    chosen = {layout.top_k} if layout.capture == "topk" else set()
    ks = sorted(k for k in {*OTHER_KEPT, *chosen} if k <= layout.vocab_size) or [layout.vocab_size]
    num_positions = job.plan.sums(job.rows.num_positions)[_spread(job.plan, NUM_PILOTS)].sum()
    return MeasuredTeacher(teacher, ks, NUM_MEASURED / float(num_positions))


def _peak_memory(device: torch.device) -> tuple[int, int]:
    """Return the largest memory of this process so far, in bytes, on the host and on its GPU."""
    unit = 1 if sys.platform == "darwin" else 1024
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit if resource else 0
    return host, torch.cuda.max_memory_reserved(device) if device.type == "cuda" else 0


@dataclass(frozen=True)
class Estimate:
    """The cost of a run.

    Attributes:
        num_rows: Rows of the file.
        num_tokens: Tokens of the file.
        num_positions: Captured positions.
        num_cut: Rows of the split that were too long, and were truncated or split.
        num_dropped_tokens: Tokens of the split that are in no row.
        num_batches: Forward passes.
        padding_share: Share of the tokens that go through the teacher only as padding.
        saved_share: Share of the rows' tokens that need not go through it, because rows share prefixes.
        tokens_per_second: Tokens of rows a rank captures in a second, as measured in the pilot.
        seconds: Expected time of the forward passes by number of ranks, each with a device of its own.
        pilots: The measurements of every rank.
        size_bytes: Size of the file, exact.
        other_sizes: Sizes with other values kept, by their names; exact.
        buffer_bytes: Memory of the leader's buffers.
        kept: Kept values of a position, in words.
        masses: Probability mass that such values and those of `other_sizes` keep, by their names: the mean over some
            positions and the 10th percentile. Draws have none.
        num_measured: Number of these positions.
    """

    num_rows: int
    num_tokens: int
    num_positions: int
    num_cut: int
    num_dropped_tokens: int
    num_batches: int
    padding_share: float
    saved_share: float
    tokens_per_second: float
    seconds: dict[int, float]
    pilots: list[Pilot]
    size_bytes: int
    other_sizes: dict[str, int]
    buffer_bytes: int
    kept: str
    masses: dict[str, tuple[float, float]]
    num_measured: int


def estimate(job: Job, attributes: Attributes, pilots: list[Pilot], tp_size: int = 1, fsdp_size: int = 1) -> Estimate:
    """Estimate the cost of a run.

    Args:
        job: The job of the run.
        attributes: The attributes of the file.
        pilots: The measurements of every rank.
        tp_size: Ranks that compute a batch together.
        fsdp_size: Number of such groups that share a teacher.
    """
    rows, plan, layout = job.rows, job.plan, job.layout
    seconds_per_token = float(np.mean([pilot.seconds_per_token for pilot in pilots]))
    others, mass = _other_layouts(layout), pilots[0].kept_mass
    masses = {each.kept: found for each in (layout, *others) if (found := _mass_of(each, mass))}
    return Estimate(
        num_rows=layout.num_rows,
        num_tokens=layout.num_tokens,
        num_positions=layout.num_positions,
        num_cut=rows.num_cut,
        num_dropped_tokens=rows.num_dropped_tokens,
        num_batches=plan.num_batches,
        padding_share=plan.padding_share,
        saved_share=plan.saved_share,
        tokens_per_second=plan.num_tokens / int(plan.costs.sum()) / seconds_per_token,
        seconds={
            num_ranks: _largest_cost(plan, num_ranks // (tp_size * fsdp_size), fsdp_size) * seconds_per_token
            for num_ranks in NUM_RANKS
            if num_ranks % (tp_size * fsdp_size) == 0
        },
        pilots=pilots,
        size_bytes=file_bytes(layout, attributes),
        other_sizes={other.kept: file_bytes(other, attributes_with(other, attributes)) for other in others},
        buffer_bytes=NUM_BUFFERS * (len(pilots) // tp_size) * int(job.payload_bytes.max()),
        kept=layout.kept,
        masses=masses if mass.num_positions else {},
        num_measured=mass.num_positions,
    )


def _mass_of(layout: Layout, measured: KeptMass) -> tuple[float, float] | None:
    """Return the mean and the 10th percentile of the mass that is kept, or None where it is not known."""
    if layout.capture in ("hidden", "full"):
        return 1.0, 1.0
    return measured.of_k.get(layout.top_k) if layout.capture == "topk" else None


def _other_layouts(layout: Layout) -> list[Layout]:
    """Lay out the files that other options would make of the same rows."""
    others = [
        replace(layout, capture="topk", top_k=k, encoding=encoding)
        for encoding in OTHER_ENCODINGS
        for k in OTHER_KEPT
        if k <= layout.vocab_size
    ]
    drawn = replace(layout, capture="sample", top_k=OTHER_DRAWN, encoding="packed")
    if drawn.top_k <= drawn.num_ids:
        others.append(drawn)
    if layout.head:
        others += [replace(layout, capture="hidden", top_k=0, encoding=encoding) for encoding in ENCODINGS["hidden"]]
    return [*others, replace(layout, capture="full", top_k=0, encoding="plain")]


def _largest_cost(plan: Plan, num_replicas: int, fsdp_size: int) -> int:
    """Return the cost of all batches of the rank that takes longest, in tokens."""
    shares = plan.shares(np.arange(plan.num_batches), num_replicas, fsdp_size)
    return max(int(plan.costs[share].sum()) for share in shares)
