"""The order in which rows that share a prefix are neighbours: found by hashes of prefixes, at every eighth token.

A hash that lies costs nothing but time: a batch compares the tokens before it shares them.

Shape letters: N rows of the split, R rows of a window, S of them that share, H hashes.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from logitgen.file.layout import Array
from logitgen.split.rows import Rows, within

FEWEST_SHARED = 32
"""Tokens. Shorter prefixes are not worth a pass of their own."""

_STEP = 8
_WINDOW_TOKENS = 2**27
"""Prefixes are looked for among neighbours of so many tokens, which bounds the memory to some 600 MB."""

_PROBED = 4
"""Tokens that decide whether a row may share a prefix at all: the last of the shortest prefix."""

_MULTIPLIERS = (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)  # splitmix64


@dataclass(frozen=True)
class Neighbours:
    """The rows that share a prefix with another row, in the order of a prefix tree, the deepest branch first.

    Attributes:
        rows: Row numbers, int64[S].
        shared: Tokens that each shares at least with the row before it, int64[S]: 0, or a multiple of 8.
        num_positions: Captured positions of each, int64[S].
    """

    rows: Array
    shared: Array
    num_positions: Array


def neighbours(rows: Rows, longest: int | None = None) -> Neighbours:
    """Find the rows that share a prefix with another row.

    Args:
        rows: The tokenised split.
        longest: Longer rows are left out.
    """
    lengths = rows.forward_lengths
    may_share = (lengths >= FEWEST_SHARED) & (lengths <= (longest or np.inf))
    found = [_of_window(rows, may_share, first, end) for first, end in _windows(rows.lengths)]
    order, shared = (np.concatenate(parts) for parts in zip(*found, strict=True))
    return Neighbours(order, shared, rows.num_positions[order].astype(np.int64))


def _windows(lengths: Array) -> Iterator[tuple[int, int]]:
    """Cut the rows into windows of about `_WINDOW_TOKENS` tokens."""
    ends, first = np.cumsum(lengths, dtype=np.int64), 0
    while first < len(lengths):
        before = ends[first] - lengths[first]
        end = max(first + 1, int(np.searchsorted(ends, before + _WINDOW_TOKENS, side="right")))
        yield first, end
        first = end


def _of_window(rows: Rows, may_share: Array, first: int, end: int) -> tuple[Array, Array]:
    """Find the order of a window's rows, and the tokens each shares with the row before it."""
    chosen = first + np.flatnonzero(may_share[first:end])
    chosen = chosen[_is_repeated(_probes(rows, chosen))]
    if not len(chosen):
        return chosen, chosen
    lengths = rows.forward_lengths[chosen].astype(np.int64)
    num_hashes = (lengths - FEWEST_SHARED) // _STEP + 1
    starts = np.cumsum(num_hashes) - num_hashes
    _, node_H, counts = np.unique(_hashes(rows, chosen, num_hashes), return_inverse=True, return_counts=True)
    num_shared = np.add.reduceat((counts[node_H] > 1).astype(np.int64), starts)
    order, depth = _order(lengths, node_H, starts, num_shared)
    shares = num_shared[order] > 0
    depth = depth[shares]
    return chosen[order[shares]], np.where(depth, FEWEST_SHARED + _STEP * (depth - 1), 0)


def _is_repeated(keys: Array) -> Array:
    """Flag the keys that occur more than once."""
    ascending = np.sort(keys)
    return np.isin(keys, ascending[1:][ascending[1:] == ascending[:-1]])


def _probes(rows: Rows, chosen: Array) -> Array:
    """Hash the last few tokens of the shortest prefix of some rows, uint64[R]."""
    probes = [np.empty(0, dtype=np.uint64)]
    for starts, tokens in _tokens_of(rows, chosen):
        probe = np.zeros(len(starts), dtype=np.uint64)
        for offset in range(FEWEST_SHARED - _PROBED, FEWEST_SHARED):
            probe = _mixed(probe + tokens[starts + offset].astype(np.uint64))
        probes.append(probe)
    return np.concatenate(probes)


def _hashes(rows: Rows, chosen: Array, num_hashes: Array) -> Array:
    """Hash the prefixes of some rows, at every depth of them that another row may share, uint64[H].

    The hash of a prefix is the sum of its tokens, each mixed with its position. Sums of many prefixes are one running
    sum, without a step for each row.
    """
    hashes = [np.empty(0, dtype=np.uint64)]
    done = 0
    for starts, tokens in _tokens_of(rows, chosen):
        counts = num_hashes[done : done + len(starts)]
        done += len(starts)
        position = within(np.diff(starts, append=len(tokens)))
        mixed = _mixed((position.astype(np.uint64) << np.uint64(32)) | tokens[starts[0] :].astype(np.uint64))
        sums = np.concatenate([np.zeros(1, dtype=np.uint64), np.cumsum(mixed, dtype=np.uint64)])
        begins = np.repeat(starts - starts[0], counts)
        hashes.append(sums[begins + FEWEST_SHARED + _STEP * within(counts)] - sums[begins])
    return np.concatenate(hashes)


def _tokens_of(rows: Rows, chosen: Array) -> Iterator[tuple[Array, Array]]:
    """Yield the starts of some rows, ascending, in an array of tokens that holds them, many rows at a time."""
    first_of_all, end_of_all = (int(chosen[0]), int(chosen[-1]) + 1) if len(chosen) else (0, 0)
    for first, end, tokens in rows.tokens(first_of_all, end_of_all):
        here = chosen[np.searchsorted(chosen, first) : np.searchsorted(chosen, end)]
        if len(here):
            lengths = rows.lengths[first:end].astype(np.int64)
            yield (np.cumsum(lengths) - lengths)[here - first], tokens


def _mixed(keys: Array) -> Array:
    """Mix the bits of uint64 keys, so that sums of them hardly ever meet."""
    keys = (keys + _MULTIPLIERS[0]) * _MULTIPLIERS[0]
    keys = (keys ^ (keys >> np.uint64(30))) * _MULTIPLIERS[1]
    keys = (keys ^ (keys >> np.uint64(27))) * _MULTIPLIERS[2]
    return np.asarray(keys ^ (keys >> np.uint64(31)))


def _order(lengths: Array, node_H: Array, starts: Array, num_shared: Array) -> tuple[Array, Array]:
    """Sort rows so that all with a common prefix are neighbours, at every depth.

    The branch in which rows share most comes first, and of those that share as much the one with the longest row. So
    prefixes of about one length share batches, whose passes they fill together.

    Args:
        lengths: Tokens of each row, [R].
        node_H: Number of the prefix at each depth of each row, row by row.
        starts: Place of each row's first prefix there, [R].
        num_shared: Depths up to which each row shares its prefix, [R].

    Returns:
        The order of the rows, and the depths that each shares with the row before it, [R] each.
    """
    sizes = (num_shared << 32) + lengths
    order = np.argsort(-sizes, kind="stable")
    shared = np.zeros_like(order)
    places, group = np.arange(len(order)), np.zeros_like(order)
    depth = 0
    while len(places):  # the rows that still share their prefix with another row
        row = order[places]
        goes_on = num_shared[row] > depth
        # A row that shares no more is a branch of its own.
        child = np.where(goes_on, node_H[np.where(goes_on, starts[row] + depth, 0)], len(node_H) + row)
        if not goes_on.all() or (child[1:] != child[:-1])[group[1:] == group[:-1]].any():
            branches, branch = np.unique(child, return_inverse=True)
            largest = np.zeros(len(branches), dtype=np.int64)
            np.maximum.at(largest, branch, sizes[row])
            by = np.lexsort((branch, -largest[branch], group))
            order[places], child, goes_on = row[by], child[by], goes_on[by]
        depth += 1
        shared[places[1:][child[1:] == child[:-1]]] = depth
        places, child = places[goes_on], child[goes_on]
        group = np.cumsum(np.diff(child, prepend=-1) != 0)  # ascending, as their places are
    return order, shared
