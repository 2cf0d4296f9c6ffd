"""The forward passes of a batch: each prefix that rows share is read once, and continued by every row that has it.

The rows of a batch stand in the order of a prefix tree: two rows share the least that any two neighbours between them
share. A depth is a number of tokens from the start of a row. All lines of a pass start at one depth, and only the
last passes of a row are padded, so a cache never has a gap.

Shape letters: B rows of a batch, L lines of a pass.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from logitgen.file.layout import Array


class PassCost(NamedTuple):
    """The time of a forward pass, counted in tokens.

    Attributes:
        extra: A pass costs so many tokens more than it reads.
        least: And it costs at least so many.
    """

    extra: int
    least: int

    def of(self, num_tokens: Array) -> Array:
        """Return the costs of passes that read some tokens."""
        return np.asarray(np.maximum(num_tokens, self.least) + self.extra)


CPU_COST = PassCost(extra=16, least=0)
"""SmolLM2-135M, one thread."""

GPU_COST = PassCost(extra=128, least=4096)
"""A GPU waits while the host launches the kernels of a pass: 15 to 31 ms for 24 to 32 layers, in which an H200 reads
900 tokens with 8 billion parameters, 2,700 with 1.5 and 4,600 with 0.5. By its times in docs/gpu.md, no rows of
`benchmarks/prefixes` take longer shared than whole for any of these. With 2,048, six turns did for the smaller two.
"""

_MOST_KEYS = 4
"""Tokens that the lines of a pass may look back on, in budgets, if there are several lines: each gets a copy of its
prefix's keys and values. Those of a trunk stay in memory.
"""


@dataclass(frozen=True)
class Step:
    """The place of a forward pass in the tree.

    Attributes:
        rows: A row of the batch that has the tokens of each line, int64[L].
        line: The line with the tokens of each row of the batch, or -1, int64[B].
        start: Depth of its first tokens.
        ends: Depth after the last token of each line, int64[L].
        parents: The line of the last trunk that each line continues, int64[L], or None if `start` is 0.
        is_trunk: True if other steps may continue it. All its lines are then equally long.
    """

    rows: Array
    line: Array
    start: int
    ends: Array
    parents: Array | None
    is_trunk: bool

    @property
    def length(self) -> int:
        """Tokens of the longest line."""
        return int(self.ends.max()) - self.start

    @property
    def num_tokens(self) -> int:
        """Tokens of all lines, without padding."""
        return int((self.ends - self.start).sum())


def steps(lengths: Array, shared: Array, batch_tokens: int, cost: PassCost) -> list[Step]:
    """Plan the forward passes of a batch, in the order of their computation.

    Args:
        lengths: Tokens the teacher must read of each row, [B], each at least 1.
        shared: Tokens that a row shares with the row before it, [B]; 0 for the first.
        batch_tokens: Token budget of a pass.
        cost: What a pass costs.
    """
    lengths, shared = lengths.astype(np.int64), shared.astype(np.int64)
    rows = np.arange(len(lengths))
    if not shared.any():
        return [Step(rows, rows, 0, lengths, None, is_trunk=False)]
    reach = np.maximum(shared, np.append(shared[1:], 0))  # the deepest prefix of a row that another row has too
    cuts = np.array(_cuts(lengths, shared, reach, batch_tokens, cost))
    last_cut = cuts[np.searchsorted(cuts, reach, side="right") - 1]
    found: list[Step] = []
    trunk, depth = rows, 0
    for cut in cuts.tolist():
        if cut:
            in_trunk = reach >= cut
            is_first = in_trunk & (shared < cut)
            line, of_line = np.where(in_trunk, np.cumsum(is_first) - 1, -1), rows[is_first]
            ends = np.full(len(of_line), cut)
            found.append(Step(of_line, line, depth, ends, trunk[of_line] if depth else None, is_trunk=True))
            trunk, depth = line, cut
        found += _suffixes(rows[(last_cut == cut) & (lengths > cut)], lengths, trunk, cut, batch_tokens, cost)
    return found


def _cuts(lengths: Array, shared: Array, reach: Array, batch_tokens: int, cost: PassCost) -> list[int]:
    """Choose the depths at which trunks end, for the fewest tokens, passes counted too.

    A row continues the deepest trunk that it has in common with another row. What it shares beyond, it reads alone.
    The lines of a trunk, each with the keys and values of its whole prefix, have no more tokens than the budget.
    """
    depths = np.unique(shared)  # also where prompts part that have several completions each: no row reaches just there
    of_row = np.searchsorted(depths, reach)
    num_rows = np.cumsum(np.bincount(of_row, minlength=len(depths)))
    num_tokens = np.cumsum(np.bincount(of_row, lengths, minlength=len(depths)))
    after = np.append(shared[1:], 0)

    def costs(end: int) -> Array:
        # With no cut between a depth and `end`, the rows that reach that far continue from that depth.
        rows_below = num_rows[end - 1] - np.append(0, num_rows)[:end]
        tokens_below = num_tokens[end - 1] - np.append(0, num_tokens)[:end] - depths[:end] * rows_below
        total = np.where(tokens_below > 0, cost.of(tokens_below), 0.0)
        if end < len(depths):
            lines = np.count_nonzero((shared < depths[end]) & (after >= depths[end]))
            total += cost.of(lines * (depths[end] - depths[:end]))
            if lines > 1 and lines * depths[end] > batch_tokens:
                total += np.inf
        return total

    return [int(depths[stop]) for stop in _cheapest(len(depths), costs)[:-1]]


def _cheapest(last: int, costs: Callable[[int], Array]) -> list[int]:
    """Choose the stops on the cheapest way from 0 to `last`, both among them.

    Args:
        last: The last stop.
        costs: Given a stop, the costs to come to it from every stop before.
    """
    least, before = np.zeros(last + 1), np.zeros(last + 1, dtype=np.int64)
    for end in range(1, last + 1):
        total = least[:end] + costs(end)
        before[end] = total.argmin()
        least[end] = total[before[end]]
    stops = [last]
    while stops[-1]:
        stops.append(int(before[stops[-1]]))
    return stops[::-1]


def _suffixes(
    rows: Array, lengths: Array, trunk: Array, start: int, batch_tokens: int, cost: PassCost
) -> Iterator[Step]:
    """Cut the rows that continue at a depth into passes, longest first, for the fewest tokens, passes counted too.

    Padding is tokens: a pass ends where that is cheaper than to pad the rows behind it. A pass of several rows has no
    more tokens and keys than it may. A single row may have any number.
    """
    rows = rows[np.argsort(-lengths[rows], kind="stable")]
    ends = lengths[rows]
    most = np.maximum(1, np.minimum(batch_tokens // (ends - start), _MOST_KEYS * batch_tokens // ends))
    firsts = _firsts(ends, most)

    def costs(end: int) -> Array:
        before = firsts[:end]
        count = firsts[end] - before
        return np.where(count <= most[before], cost.of(count * (ends[before] - start)), np.inf)

    for first, end in pairwise(firsts[_cheapest(len(firsts) - 1, costs)]):
        of_line, line = rows[first:end], np.full(len(lengths), -1)
        line[of_line] = np.arange(end - first)
        yield Step(of_line, line, start, lengths[of_line], trunk[of_line] if start else None, is_trunk=False)


def _firsts(ends: Array, most: Array) -> Array:
    """Return where a pass may begin: at each row that is shorter than the one before it, and behind full passes.

    So the search for the cheapest passes takes a step for each length, not for each row.

    Args:
        ends: Lengths of the rows, the longest first.
        most: Rows that a pass may have which begins with each.
    """
    begins, full = np.diff(ends, prepend=0) != 0, 0
    while full < len(ends):
        begins[full] = True
        full += int(most[full])
    return np.append(np.flatnonzero(begins), len(ends))
