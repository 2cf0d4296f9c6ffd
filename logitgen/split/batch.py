"""The batch: the rows of one payload, the forward passes that read them, and their captured positions.

Shape letters: B rows of a batch, L lines of a pass, T tokens of the longest line, P captured positions, U distinct
ones.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from logitgen.file.layout import Array
from logitgen.split.tree import PassCost, Step, steps


@dataclass(frozen=True)
class Pass:
    """The input of a forward pass.

    Right padding needs neither attention mask nor position ids: a causal model never looks to the right.

    Attributes:
        input_ids: int64[L, T], right-padded with 0.
        parents: The line of the last trunk that each line continues, int64[L], or None where rows start.
        is_trunk: True if later passes may continue its lines. They are not padded then.
    """

    input_ids: Array
    parents: Array | None = None
    is_trunk: bool = False


@dataclass(frozen=True)
class Distinct:
    """The captured positions with values of their own: rows that share a prefix have the same values there.

    Attributes:
        index: A captured position for each, ascending by slot, int64[U].
        copies: Every captured position, and the value of its own, ascending by value: int64[2, P]. None if `index` is
            all positions in their order.
    """

    index: Array
    copies: Array | None

    def of_span(self, span: slice) -> Array:
        """Return the captured positions that have some of the values, and the place of each value in the span."""
        assert self.copies is not None
        start, end = np.searchsorted(self.copies[1], (span.start, span.stop))
        return np.asarray(self.copies[:, start:end] - np.array([[0], [span.start]]))


@dataclass(frozen=True)
class Batch:
    """The rows that are computed together, and their captured positions.

    Attributes:
        rows: Row numbers, int64[B].
        source_rows: Row of the split that each row comes from, int64[B].
        tokens: All tokens of each row, B arrays of int32.
        lengths: Tokens of each row the teacher must read, up to its last captured position, int64[B].
        shared: Tokens that each row shares with the row before it and that are read once, int64[B].
        batch_tokens: Token budget of a pass, where rows share prefixes.
        pass_cost: What a pass costs then.
        num_positions: Captured positions per row, int64[B].
        row_of_position: Index into the batch of each captured position, int64[P], row by row.
        positions: Position within its row, int64[P].
        targets: The actual next token, int64[P].
        seed: The run's seed.
    """

    rows: Array
    source_rows: Array
    tokens: list[Array]
    lengths: Array
    shared: Array
    batch_tokens: int
    pass_cost: PassCost
    num_positions: Array
    row_of_position: Array
    positions: Array
    targets: Array
    seed: int

    @cached_property
    def _steps(self) -> list[Step]:
        return steps(self.lengths, self.shared, self.batch_tokens, self.pass_cost)

    @cached_property
    def passes(self) -> list[Pass]:
        """The forward passes, in the order of their computation."""
        return [Pass(self._input_ids(step), step.parents, step.is_trunk) for step in self._steps]

    def _input_ids(self, step: Step) -> Array:
        input_ids = np.zeros((len(step.rows), step.length), dtype=np.int64)
        for line, (row, end) in enumerate(zip(step.rows, step.ends, strict=True)):
            input_ids[line, : end - step.start] = self.tokens[row][step.start : end]
        return input_ids

    @cached_property
    def slots(self) -> Array:
        """Place of each captured position among the tokens of all passes, padding included, int64[P]."""
        slots, before = np.empty(len(self.positions), dtype=np.int64), 0
        for step in self._steps:
            line = step.line[self.row_of_position]
            here = (line >= 0) & (self.positions >= step.start)
            if step.is_trunk:
                here &= self.positions < step.ends[0]
            slots[here] = before + line[here] * step.length + self.positions[here] - step.start
            before += len(step.rows) * step.length
        return slots

    def distinct(self, of_each_row: bool) -> Distinct:
        """Find the captured positions to compute.

        Args:
            of_each_row: True where a value is a row's own even inside a shared prefix, as draws are.
        """
        every = np.arange(len(self.positions))
        if not self.shared.any():
            return Distinct(every, None)
        # Where rows part, the last position they share has another target in each.
        keys = (self.slots << 32) | (every if of_each_row else self.targets)
        _, index, value = np.unique(keys, return_index=True, return_inverse=True)
        places = np.argsort(value, kind="stable")
        return Distinct(index, np.stack([places, value[places]]))

    def halves(self) -> tuple["Batch", "Batch"]:
        """Cut the batch into its first and its last rows. It must have at least two."""
        middle = len(self.rows) // 2
        return self._part(0, middle), self._part(middle, len(self.rows))

    def _part(self, first: int, end: int) -> "Batch":
        rows = slice(first, end)
        positions = slice(int(self.num_positions[:first].sum()), int(self.num_positions[:end].sum()))
        return Batch(
            rows=self.rows[rows],
            source_rows=self.source_rows[rows],
            tokens=self.tokens[rows],
            lengths=self.lengths[rows],
            shared=np.append(0, self.shared[first + 1 : end]),
            batch_tokens=self.batch_tokens,
            pass_cost=self.pass_cost,
            num_positions=self.num_positions[rows],
            row_of_position=self.row_of_position[positions] - first,
            positions=self.positions[positions],
            targets=self.targets[positions],
            seed=self.seed,
        )


def checked(tokens: Sequence[Array], shared: Array) -> Array:
    """Return the tokens that rows share with the row before them, 0 where the tokens differ after all."""
    shared = shared.copy()
    for row in np.flatnonzero(shared).tolist():
        count = shared[row]
        shared[row] *= np.array_equal(tokens[row - 1][:count], tokens[row][:count])
    return shared
