"""The job of a run: the rows, the plan of their batches, and the layout of the file they go into."""

from dataclasses import dataclass
from functools import cached_property

from logitgen.file.layout import Array, Layout
from logitgen.split.batch import Batch
from logitgen.split.plan import Plan
from logitgen.split.prefixes import Neighbours
from logitgen.split.rows import Rows
from logitgen.split.tree import CPU_COST, GPU_COST

_SHARING_BYTES = 2**24
"""Most bytes of the payload of a batch that shares prefixes, unless its token budget allows for more."""


@dataclass(frozen=True)
class Job:
    """The values that define the numbers to compute and their places in the file.

    Attributes:
        rows: The tokenised split.
        plan: The rows of every batch.
        layout: The file's sizes.
    """

    rows: Rows
    plan: Plan
    layout: Layout

    @cached_property
    def payload_bytes(self) -> Array:
        """Size of the payload of every batch, [num_batches]."""
        return self.layout.payload_bytes(self.plan.num_rows, self.plan.sums(self.rows.num_positions))

    @cached_property
    def forward_tokens(self) -> Array:
        """Tokens of every batch that the teacher must read, in each row alone, [num_batches]."""
        return self.plan.sums(self.rows.forward_lengths)

    def batch(self, number: int) -> Batch:
        """Collect the rows of a batch of the plan."""
        plan = self.plan
        return self.rows.batch(plan.rows(number), plan.shared(number), plan.batch_tokens, plan.pass_cost)


def job_of(
    rows: Rows,
    layout: Layout,
    batch_tokens: int,
    length_switch: int | None,
    prefixes: Neighbours | None,
    device_type: str = "cpu",
) -> Job:
    """Plan a job for a device of some type. See `Plan` for the three arguments before."""
    most_positions = _SHARING_BYTES // layout.bytes_per_position
    pass_cost = CPU_COST if device_type == "cpu" else GPU_COST
    plan = Plan(rows.forward_lengths, batch_tokens, length_switch, prefixes, most_positions, pass_cost)
    return Job(rows, plan, layout)
