"""The plan: the rows of every batch, a pure function of the row lengths and the token budget.

The number of ranks plays no part. A batch always has the same shape, whichever rank computes it, so the file comes out
the same. The plan is also the transport's protocol: it tells the leader the sender and the size of every batch.
"""

import heapq
from bisect import bisect_right

import numpy as np
import numpy.typing as npt

from logitgen.file.layout import Array
from logitgen.split.forest import Forest
from logitgen.split.prefixes import Neighbours
from logitgen.split.rows import within
from logitgen.split.tree import CPU_COST, PassCost

MOST_PADDING = 0.02
"""Largest share of padding. Splits of few rows pay for it with smaller batches: 156 rows of prose make 35 instead of 2
with 8,192 tokens each and 47 % of padding. That is cheap: a batch of 128 tokens computes as fast per token as a batch
of 2,048, and a batch of 64 some 17 % slower (SmolLM2-135M, one CPU thread).
"""


class Plan:
    """Rows sorted by length, longest first, cut into batches within a budget of tokens, padding included.

    Longest first: a batch that does not fit into memory then fails in the first seconds. Sorted: neighbours of nearly
    equal length need almost no padding. Where lengths differ more, batches end before the budget is used up, so padding
    never exceeds `MOST_PADDING` of the tokens.

    Rows that share a prefix are neighbours in batches of their own, where that saves enough of the tokens.

    Attributes:
        padded_tokens: Tokens of every batch that go through the teacher, padding included, [num_batches].
        costs: The time of every batch, counted in tokens, [num_batches]: passes over shared prefixes cost more than
            they read.
        num_tokens: Tokens of all rows.
        num_read: Tokens that go through the teacher, without padding.
    """

    def __init__(
        self,
        lengths: npt.NDArray[np.integer],
        batch_tokens: int,
        length_switch: int | None = None,
        neighbours: Neighbours | None = None,
        most_positions: int = 0,
        pass_cost: PassCost = CPU_COST,
    ) -> None:
        """Plan one forward pass over every row that needs it.

        Args:
            lengths: Tokens the teacher must read of each row, [N]. Rows of length 0 get no batch.
            batch_tokens: Upper bound of rows x longest row of a batch. A single longer row is a batch of its own.
            length_switch: Rows longer than this never share a batch with the others.
            neighbours: The rows that may share prefixes, or None to read every row whole.
            most_positions: Captured positions that a batch of them may have beyond `batch_tokens`.
            pass_cost: What a pass over them costs.
        """
        self.batch_tokens, self.pass_cost = batch_tokens, pass_cost
        forest, alone = None, lengths
        if neighbours is not None and len(neighbours.rows):
            forest = Forest(lengths, neighbours, batch_tokens, max(most_positions, batch_tokens), pass_cost)
            alone = lengths.copy()
            alone[forest.rows] = 0
        needed = np.flatnonzero(alone).astype(np.min_scalar_type(len(lengths)))  # 100 million rows fit into 32 bits
        self._rows = needed[_longest_first(lengths[needed])]
        sorted_lengths = lengths[self._rows]
        self._starts = _batch_starts(sorted_lengths, batch_tokens, length_switch or 0)
        self.costs = self.padded_tokens = sorted_lengths[self._starts[:-1]].astype(np.int64) * np.diff(self._starts)
        self.num_tokens = self.num_read = int(sorted_lengths.sum(dtype=np.int64))
        self._shared: Array | None = None
        if forest is not None and len(forest.rows):
            self._merge(forest, lengths)

    def _merge(self, forest: Forest, lengths: npt.NDArray[np.integer]) -> None:
        """Put the batches that share prefixes among the others, by their longest rows."""
        rows = np.concatenate([self._rows, forest.rows.astype(self._rows.dtype)])
        sizes = np.concatenate([np.diff(self._starts), forest.num_rows])
        starts = np.cumsum(sizes) - sizes
        order = np.argsort(-np.maximum.reduceat(lengths[rows].astype(np.int64), starts), kind="stable")
        moved = np.repeat(starts[order], sizes[order]) + within(sizes[order])
        self._shared = np.concatenate([np.zeros(len(self._rows), dtype=np.int32), forest.shared])[moved]
        self._rows = rows[moved]
        self._starts = np.append(0, np.cumsum(sizes[order]))
        self.costs = np.concatenate([self.padded_tokens, forest.costs])[order]
        self.padded_tokens = np.concatenate([self.padded_tokens, forest.padded_tokens])[order]
        self.num_tokens += int(lengths[forest.rows].sum(dtype=np.int64))
        self.num_read += forest.num_read

    @property
    def num_batches(self) -> int:
        """Number of batches."""
        return len(self._starts) - 1

    @property
    def padding_share(self) -> float:
        """Share of the tokens that go through the teacher only as padding, 0 to 1."""
        return 1 - self.num_read / int(self.padded_tokens.sum()) if self.num_batches else 0.0

    @property
    def saved_share(self) -> float:
        """Share of the rows' tokens that need not go through the teacher, because rows share prefixes, 0 to 1."""
        return 1 - self.num_read / self.num_tokens if self.num_tokens else 0.0

    def rows(self, batch: int) -> npt.NDArray[np.int64]:
        """Row numbers of a batch: longest row first, or in the order of a prefix tree."""
        return self._rows[self._starts[batch] : self._starts[batch + 1]].astype(np.int64)

    def shared(self, batch: int) -> npt.NDArray[np.int64]:
        """Tokens that each row of a batch shares with the row before it."""
        if self._shared is None:
            return np.zeros(self._starts[batch + 1] - self._starts[batch], dtype=np.int64)
        return self._shared[self._starts[batch] : self._starts[batch + 1]].astype(np.int64)

    @property
    def sharing(self) -> npt.NDArray[np.int64]:
        """Numbers of the batches whose rows share prefixes."""
        if self._shared is None:
            return np.empty(0, dtype=np.int64)
        return np.flatnonzero(np.maximum.reduceat(self._shared, self._starts[:-1]))

    def sums(self, values: npt.NDArray[np.integer | np.bool_]) -> npt.NDArray[np.int64]:
        """Sum a per-row number, [N], over the rows of every batch: [num_batches]."""
        return np.add.reduceat(values[self._rows].astype(np.int64), self._starts[:-1])

    @property
    def num_rows(self) -> npt.NDArray[np.int64]:
        """Rows of every batch, [num_batches]."""
        return np.diff(self._starts)

    def pending(self, done: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
        """Return the batches with a row that is not done, [N] flags, in the order of computation."""
        return np.flatnonzero(self.sums(~done))

    def shares(
        self, batches: npt.NDArray[np.int64], num_replicas: int, fsdp_size: int = 1
    ) -> list[npt.NDArray[np.int64]]:
        """Deal batches to the replicas of the teacher: each goes to the replica with the least to do so far.

        Dealt in turns, eight ranks would have waited up to a third of the time for the rank with the largest batches
        (260 rows of prose). Dealt by tokens, they wait at most 8 %.

        Args:
            batches: The batches to compute.
            num_replicas: Number of replicas.
            fsdp_size: Ranks of a replica that each compute batches of their own, but in step with one another. They
                take turns, so batches computed at the same time have about the same size.

        Returns:
            The batches of every rank that computes some of its own, replica by replica. The first rank of a replica
            never has fewer than the others, and at most one more.
        """
        loads = [(0, replica) for replica in range(num_replicas)]
        owners = np.empty(len(batches), dtype=np.int32)
        for index, cost in enumerate(self.costs[batches].tolist()):
            load, owners[index] = loads[0]
            heapq.heapreplace(loads, (load + cost, int(owners[index])))
        of_replicas = [batches[owners == replica] for replica in range(num_replicas)]
        return [share[turn::fsdp_size] for share in of_replicas for turn in range(fsdp_size)]


def _longest_first(lengths: npt.NDArray[np.integer]) -> npt.NDArray[np.int64]:
    shortness = lengths.max(initial=0) - lengths
    fits_16_bits = shortness.max(initial=0) < 2**16  # then numpy sorts by radix, ten times faster
    return np.argsort(shortness.astype(np.uint16) if fits_16_bits else shortness, kind="stable")


def _batch_starts(
    sorted_lengths: npt.NDArray[np.integer], batch_tokens: int, length_switch: int
) -> npt.NDArray[np.int64]:
    num_longer = int((sorted_lengths > length_switch).sum())
    ends = np.cumsum(sorted_lengths, dtype=np.int64)  # tokens up to and including a row
    same_length_ends = np.append(np.flatnonzero(np.diff(sorted_lengths)) + 1, len(sorted_lengths)).tolist()
    run = start = padded = 0
    starts = [np.zeros(1, dtype=np.int64)]
    while start < len(sorted_lengths):
        longest = int(sorted_lengths[start])
        most_rows = max(1, batch_tokens // longest)
        while same_length_ends[run] <= start:
            run += 1
        full = (same_length_ends[run] - start) // most_rows
        if full:  # all full batches of equally long rows at once
            starts.append(start + most_rows * np.arange(1, full + 1))
            end = start + most_rows * full
        else:
            most = min(start + most_rows, num_longer if start < num_longer else len(sorted_lengths))
            end = _last_within_padding(start, most, longest, padded, ends)
            starts.append(np.array([end]))
        padded += (end - start) * longest
        start = end
    return np.concatenate(starts)


def _last_within_padding(start: int, most: int, longest: int, padded: int, ends: npt.NDArray[np.int64]) -> int:
    """Return the end of a batch that keeps padding within `MOST_PADDING` of all tokens so far.

    Args:
        start: First row of the batch.
        most: Latest possible end.
        longest: Length of its first row.
        padded: Tokens of the batches before, padding included.
        ends: Tokens up to and including each row.
    """

    def excess(end: int) -> float:
        return (1 - MOST_PADDING) * (padded + (end - start) * longest) - float(ends[end - 1])

    # One row stays within bounds. Beyond the bound every further row makes it worse, because rows only get shorter.
    return start + 1 + bisect_right(range(start + 2, most + 1), 0.0, key=excess)
