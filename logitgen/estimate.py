"""What a run would take, from its plan and a short pilot, without writing anything."""

import json
import sys
import time
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch

from logitgen.capture import capture_batch, seal
from logitgen.header import Attributes, file_bytes
from logitgen.plan import Plan
from logitgen.rows import Rows
from logitgen.schema import Layout
from logitgen.teacher import Teacher
from logitgen.transport import NUM_BUFFERS, Outbox

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

PILOT_SECONDS = 20.0
NUM_PILOTS = 8
OTHER_KEPT = (8, 16, 32, 64, 128, 256)
NUM_RANKS = (1, 2, 4, 8, 16, 32, 64)


@dataclass(frozen=True)
class Pilot:
    """What a rank measured on a few batches.

    Attributes:
        seconds_per_batch: Mean time of a batch, from its rows to a checksummed payload in host memory.
        host_bytes: Largest resident memory of the process; 0 where the system does not tell.
        device_bytes: Largest memory reserved on the GPU; 0 on CPU.
    """

    seconds_per_batch: float
    host_bytes: int
    device_bytes: int


def run_pilot(teacher: Teacher, rows: Rows, plan: Plan, layout: Layout) -> Pilot:
    """Compute a few of the batches as a run would, and throw the result away.

    The first, which is the largest, only warms up and shows how much memory is needed, unless time is up after it; the
    others are drawn evenly from the plan.
    """
    payload_bytes = layout.payload_bytes(plan.num_rows, plan.sums(rows.num_positions))
    outbox = Outbox(int(payload_bytes.max()), lambda number, payload: lambda: None, teacher.device)

    def seconds(number: int) -> float:
        start = time.perf_counter()
        batch = rows.batch(plan.rows(number))
        payload = capture_batch(teacher, batch, layout)
        outbox.put(number, payload, partial(seal, batch=batch, layout=layout, dtype=teacher.dtype))
        outbox.flush()
        return time.perf_counter() - start

    first = seconds(0)
    timed, spent = [], first
    for number in np.unique(np.linspace(0, plan.num_batches - 1, NUM_PILOTS).astype(int)):
        if spent < PILOT_SECONDS:
            timed.append(seconds(number))
            spent += timed[-1]
    return Pilot(float(np.mean(timed or [first])), *_peak_memory(teacher.device))


def _peak_memory(device: torch.device) -> tuple[int, int]:
    """Largest memory of this process so far, in bytes, on the host and on its GPU."""
    unit = 1 if sys.platform == "darwin" else 1024
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit if resource else 0
    return host, torch.cuda.max_memory_reserved(device) if device.type == "cuda" else 0


@dataclass(frozen=True)
class Estimate:
    """What a run would take.

    Attributes:
        num_rows: Rows of the file.
        num_tokens: Tokens of the file.
        num_positions: Captured positions.
        num_cut: Rows of the split that were too long, and were truncated or split.
        num_dropped_tokens: Tokens of the split that are in no row.
        num_batches: Forward passes.
        padding_share: Share of the tokens that go through the teacher only to fill up a batch.
        tokens_per_second: Tokens a rank computes in a second, without padding, as measured in the pilot.
        seconds: Expected time of the forward passes by number of ranks, each with a device of its own.
        pilots: What every rank measured.
        size_bytes: Size of the file, exact.
        other_sizes: The same with other things kept, by their names; exact.
        buffer_bytes: Memory of the leader's buffers.
    """

    num_rows: int
    num_tokens: int
    num_positions: int
    num_cut: int
    num_dropped_tokens: int
    num_batches: int
    padding_share: float
    tokens_per_second: float
    seconds: dict[int, float]
    pilots: list[Pilot]
    size_bytes: int
    other_sizes: dict[str, int]
    buffer_bytes: int


def estimate(rows: Rows, plan: Plan, layout: Layout, attributes: Attributes, pilots: list[Pilot]) -> Estimate:
    """Work out what a run would take from what every rank measured in its pilot."""
    seconds_per_batch = float(np.mean([pilot.seconds_per_batch for pilot in pilots]))
    largest_payload = int(layout.payload_bytes(plan.num_rows, plan.sums(rows.num_positions)).max())
    others = [replace(layout, capture="topk", top_k=k) for k in OTHER_KEPT if k <= layout.vocab_size]
    others.append(replace(layout, capture="full", top_k=0))
    return Estimate(
        num_rows=layout.num_rows,
        num_tokens=layout.num_tokens,
        num_positions=layout.num_positions,
        num_cut=rows.num_cut,
        num_dropped_tokens=rows.num_dropped_tokens,
        num_batches=plan.num_batches,
        padding_share=plan.padding_share,
        tokens_per_second=plan.num_tokens / plan.num_batches / seconds_per_batch,
        seconds={ranks: -(-plan.num_batches // ranks) * seconds_per_batch for ranks in NUM_RANKS},
        pilots=pilots,
        size_bytes=file_bytes(layout, attributes),
        other_sizes={other.kept: file_bytes(other, _attributes_of(other, attributes)) for other in others},
        buffer_bytes=NUM_BUFFERS * len(pilots) * largest_payload,
    )


def _attributes_of(layout: Layout, attributes: Attributes) -> Attributes:
    """Return the attributes of a file that keeps something else."""
    settings = json.loads(str(attributes["settings"])) | {"capture": layout.capture}
    if layout.capture == "topk":
        settings["top_k"] = layout.top_k
    return attributes | {
        "capture": layout.capture,
        "top_k": layout.top_k,
        "settings": json.dumps(settings, sort_keys=True),
    }
