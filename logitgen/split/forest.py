"""The batches of rows that share prefixes: neighbours in the order of a prefix tree, cut within the token budget."""

import numpy as np

from logitgen.file.layout import Array
from logitgen.split.prefixes import Neighbours
from logitgen.split.tree import PassCost, steps

_WORTH = 0.9
"""Largest cost of a batch that shares prefixes, relative to its rows read whole."""


class Forest:
    """Batches that read prefixes once.

    Apart from the prefix that its first two rows share, a batch has no more different tokens than the budget, and no
    more prefixes than one pass may read. It may read some tokens again, where one more pass is not worth it. Its
    payload has the positions of all rows, which are limited too.

    Attributes:
        rows: Row numbers of all batches, one after another, int64[S].
        shared: Tokens that each row shares with the row before it in its batch, int32[S].
        num_rows: Rows of every batch.
        padded_tokens: Tokens of every batch that go through the teacher, padding included.
        costs: What the passes of every batch cost, in tokens.
        num_read: Tokens of all batches that go through the teacher, without padding.
    """

    def __init__(
        self, lengths: Array, neighbours: Neighbours, batch_tokens: int, most_positions: int, pass_cost: PassCost
    ) -> None:
        """Cut the batches, and leave out those that save too little.

        Args:
            lengths: Tokens the teacher must read of each row of the split, [N].
            neighbours: The rows that share prefixes.
            batch_tokens: The token budget.
            most_positions: Captured positions of a batch of several rows.
            pass_cost: What a pass costs.
        """
        tree_lengths = lengths[neighbours.rows].astype(np.int64)
        rows, shared, num_rows, padded_tokens, costs = [], [], [], [], []
        self.num_read = 0
        for start, end in zip(*_spans(tree_lengths, neighbours, batch_tokens, most_positions), strict=True):
            of_rows = neighbours.shared[start:end].copy()
            of_rows[0] = 0
            plan = steps(tree_lengths[start:end], of_rows, batch_tokens, pass_cost)
            padded = np.array([each.length * len(each.rows) for each in plan])
            cost = pass_cost.of(padded).sum()
            if cost <= _WORTH * tree_lengths[start:end].sum():
                rows.append(neighbours.rows[start:end])
                shared.append(of_rows)
                num_rows.append(end - start)
                padded_tokens.append(padded.sum())
                costs.append(cost)
                self.num_read += sum(each.num_tokens for each in plan)
        none = [np.empty(0, dtype=np.int64)]
        self.rows, self.shared = np.concatenate(none + rows), np.concatenate(none + shared).astype(np.int32)
        self.num_rows, self.padded_tokens = np.array(num_rows, dtype=int), np.array(padded_tokens, dtype=int)
        self.costs = np.array(costs, dtype=int)


def _spans(
    lengths: Array, neighbours: Neighbours, batch_tokens: int, most_positions: int
) -> tuple[list[int], list[int]]:
    """Return where the batches start and end, in the order of the neighbours."""
    shared, after = neighbours.shared, np.append(neighbours.shared[1:], 0)
    trees = np.flatnonzero(shared == 0)
    tokens = np.append(0, np.cumsum(lengths - shared))
    positions = np.append(0, np.cumsum(neighbours.num_positions))
    starts, end = list[int](), 0
    while end < len(lengths):
        start = end
        starts.append(start)
        left = batch_tokens - (lengths[start] - after[start])
        within_tokens = np.searchsorted(tokens, tokens[start + 1] + left, side="right") - 1
        within_positions = np.searchsorted(positions, positions[start] + most_positions, side="right") - 1
        end = max(start + 1, int(min(within_tokens, within_positions, len(lengths))))
        more = trees[np.searchsorted(trees, start, side="right") : np.searchsorted(trees, end)]
        too_deep = np.arange(2, len(more) + 2) * after[more] > batch_tokens  # for a pass that reads all their prefixes
        if too_deep.any():
            end = int(more[too_deep.argmax()])
        elif end < len(lengths):  # near there, where the least is read twice
            first = max(start + 1, end - (end - start) // 4)
            end -= int(np.argmin(shared[first : end + 1][::-1]))
    return starts, [*starts[1:], len(lengths)]
