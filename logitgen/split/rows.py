"""The rows of a run: the tokenised split as one long stream of tokens and a few numbers per row.

Shape letters: N rows, B rows of a batch, T tokens of a row, P captured positions.
"""

import hashlib
from collections.abc import Iterator
from functools import cached_property
from typing import Any

import datasets
import numpy as np
import numpy.typing as npt

from logitgen.config import Config
from logitgen.errors import UsageError
from logitgen.split.batch import Batch, checked
from logitgen.split.stream import Stream, list_lengths
from logitgen.split.tree import CPU_COST, PassCost

Array = npt.NDArray[Any]

_BLOCK_TOKENS = 2**20


class Rows:
    """The tokenised split.

    A row of L tokens has a captured position for every token that has a next token. With a completion mask, the next
    token must also belong to a completion.

    Attributes:
        lengths: Tokens per row, int32[N].
        num_positions: Captured positions per row, int32[N].
        forward_lengths: Tokens of each row the teacher must read, up to the last captured position, int32[N].
        source_row: Row of the dataset split a row (or, with packing, its first token) comes from, int64[N].
        num_cut: Rows of the split that were too long, and were truncated or split.
        num_dropped_tokens: Tokens in no row: cut off, or at the end of the split too few to fill a packed block.
    """

    def __init__(
        self, tokens: datasets.Dataset, config: Config, max_length: int | None, length_switch: int | None = None
    ) -> None:
        """Cut the tokenised rows as the options say.

        Args:
            tokens: Lists of `input_ids`, the `source_row` of each unless it is its place, and a `completion_mask` if
                only completions count.
            config: Overflow, packing and completion options.
            max_length: Longest row in tokens, or None for no limit.
            length_switch: The teacher must read longer rows whole, to see that they are longer.

        Raises:
            UsageError: A row is longer than `max_length` and the overflow option forbids it, or nothing is left.
        """
        self._input_ids = Stream(tokens.data.column("input_ids"))
        self._mask = Stream(tokens.data.column("completion_mask")) if config.completion_only else None
        self._row_ends = np.cumsum(list_lengths(tokens.data.column("input_ids")), dtype=np.int64)
        self._seed = config.seed
        self._sources = _sources(tokens)
        self._starts, self.lengths, rows = _cut(self._row_ends, self._sources, config, max_length)
        self.source_row = self._sources[rows]
        too_long = np.diff(self._row_ends, prepend=0) > (max_length or np.inf)
        self.num_cut = 0 if config.packing else len(np.unique(self._sources[too_long]))
        self.num_dropped_tokens = int(self._row_ends[-1]) - self.num_tokens
        if not len(self):
            raise UsageError(
                f"--packing with --max_length {max_length} needs at least that many tokens, the split has "
                f"{self._row_ends[-1]}. Lower --max_length or leave --packing out."
            )
        self.num_positions, self.forward_lengths = self._counted()
        if length_switch is not None:
            whole = (self.lengths > length_switch) & (self.num_positions > 0)
            self.forward_lengths = np.where(whole, self.lengths, self.forward_lengths)
        if not self.num_positions.any():
            raise UsageError(
                f"--max_length {max_length} cuts off every completion of the split. Raise it."
                if self.num_emptied
                else "The split has no position to capture: every row is empty or has no token to predict."
            )

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def num_tokens(self) -> int:
        """Tokens of all rows together."""
        return int(self.lengths.sum(dtype=np.int64))

    @property
    def num_captured(self) -> int:
        """Captured positions of all rows together."""
        return int(self.num_positions.sum(dtype=np.int64))

    @cached_property
    def num_emptied(self) -> int:
        """Rows that were truncated before their completions, and have no captured position left."""
        if not (self._mask and self.num_cut) or len(self) != len(self._row_ends):
            return 0
        ends = self._starts + self.lengths
        emptied = np.flatnonzero((ends < self._row_ends) & (self.num_positions == 0))
        return sum(bool(self._mask[ends[row], self._row_ends[row]].any()) for row in emptied)

    def input_ids(self, row: int) -> Array:
        """Tokens of a row, int32[T]."""
        return self._input_ids[self._starts[row], self._starts[row] + self.lengths[row]]

    def positions(self, row: int) -> Array:
        """Captured positions of a row, ascending, int32[P]."""
        if self._mask is None:
            return np.arange(self.lengths[row] - 1, dtype=np.int32)
        mask = self._mask[self._starts[row], self._starts[row] + self.lengths[row]]
        return np.flatnonzero(mask[1:]).astype(np.int32)

    def blocks(self) -> Iterator[tuple[Array, Array]]:
        """Yield the tokens of all rows, int32, and their captured positions, int32, many rows at a time."""
        for first, end, tokens in self.tokens(0, len(self)):
            yield tokens, self._captured(first, end)[1].astype(np.int32)

    def tokens(self, first: int, end: int) -> Iterator[tuple[int, int, Array]]:
        """Yield the tokens of the rows from `first` to before `end`, int32, many rows at a time, with their span."""
        for span in self._spans(first, end):
            yield *span, self._joined(self._input_ids, *span)

    def _spans(self, first: int, last: int) -> Iterator[tuple[int, int]]:
        """Cut the rows from `first` to before `last` into spans of about `_BLOCK_TOKENS` tokens of the stream."""
        ends = self._starts[first:last] + self.lengths[first:last]
        start = first
        while start < last:
            end = first + int(np.searchsorted(ends, self._starts[start] + _BLOCK_TOKENS, side="right"))
            yield start, max(start + 1, end)
            start = max(start + 1, end)

    def _joined(self, stream: "Stream", first: int, end: int) -> Array:
        """Join the values of a stream for the rows from `first` to before `end`."""
        starts, lengths = self._starts[first:end], self.lengths[first:end]
        found = stream[starts[0], starts[-1] + lengths[-1]]
        if len(found) == lengths.sum(dtype=np.int64):
            return found
        return np.asarray(found[np.repeat(starts - starts[0], lengths) + within(lengths)])

    def _captured(self, first: int, end: int) -> tuple[Array, Array]:
        """Find the captured positions of rows `first` to before `end`: their rows, counted from `first`, and them."""
        lengths = self.lengths[first:end]
        if self._mask is None:
            lengths = np.maximum(lengths - 1, 0)
            return np.repeat(np.arange(end - first), lengths), within(lengths)
        token = within(lengths)
        predicted = (self._joined(self._mask, first, end) != 0) & (token > 0)
        return np.repeat(np.arange(end - first), lengths)[predicted], token[predicted] - 1

    def _counted(self) -> tuple[Array, Array]:
        """Count every row's captured positions, and the tokens up to the last of them, int32[N] each."""
        if self._mask is None:
            num_positions = np.maximum(self.lengths - 1, 0)
            return num_positions, num_positions
        num_positions, forward_lengths = np.zeros((2, len(self)), dtype=np.int32)
        for first, end in self._spans(0, len(self)):
            row, position = self._captured(first, end)
            num_positions[first:end] = np.bincount(row, minlength=end - first)
            forward_lengths[first + row] = position + 1  # the last of several positions stays
        return num_positions, forward_lengths

    def batch(
        self, rows: Array, shared: Array | None = None, batch_tokens: int = 0, pass_cost: PassCost = CPU_COST
    ) -> Batch:
        """Collect the rows of a batch.

        Args:
            rows: Row numbers, [B].
            shared: Tokens that each shares with the row before it, [B]; none if not given.
            batch_tokens: The token budget of its passes, if rows share prefixes.
            pass_cost: What a pass costs, if they do.
        """
        tokens = [self.input_ids(row) for row in rows]
        positions = [self.positions(row) for row in rows]
        counts = np.array([len(found) for found in positions], dtype=np.int64)
        return Batch(
            rows=rows,
            source_rows=self.source_row[rows],
            tokens=tokens,
            lengths=self.forward_lengths[rows].astype(np.int64),
            shared=checked(tokens, shared if shared is not None else np.zeros(len(rows), dtype=np.int64)),
            batch_tokens=batch_tokens,
            pass_cost=pass_cost,
            num_positions=counts,
            row_of_position=np.repeat(np.arange(len(rows)), counts),
            positions=np.concatenate(positions).astype(np.int64),
            targets=np.concatenate(
                [row_tokens[found + 1] for row_tokens, found in zip(tokens, positions, strict=True)]
            ).astype(np.int64),
            seed=self._seed,
        )

    def check_ids(self, vocab_size: int) -> None:
        """Refuse token ids the teacher has no embedding for.

        Raises:
            UsageError: An id is negative or not below `vocab_size`.
        """
        for start, chunk in self._input_ids.chunks():
            if len(chunk) and not 0 <= chunk.min() <= chunk.max() < vocab_size:
                at = int(np.flatnonzero((chunk < 0) | (chunk >= vocab_size))[0])
                row = self._sources[np.searchsorted(self._row_ends, start + at, side="right")]
                raise UsageError(
                    f"Row {row} of the split has token id {chunk[at]}, but the teacher's vocabulary "
                    f"is 0 to {vocab_size - 1}. Use the teacher's own tokenizer."
                )

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over the stream of tokens and completion masks, and over the places of the rows in it."""
        digest = hashlib.sha256(self._starts.tobytes() + self.lengths.tobytes() + self.source_row.tobytes())
        for stream in (self._input_ids, self._mask):
            for _, chunk in stream.chunks() if stream else ():
                digest.update(chunk.data)
        return digest.hexdigest()


def within(lengths: Array) -> Array:
    """Count 0, 1, ... for every length anew, int64[sum of the lengths]."""
    ends = np.cumsum(lengths, dtype=np.int64)
    return np.arange(ends[-1]) - np.repeat(ends - lengths, lengths)


def _sources(tokens: datasets.Dataset) -> Array:
    """Return the row of the split that each tokenised row comes from, int64."""
    if "source_row" in tokens.column_names:
        return np.asarray(tokens.data.column("source_row").to_numpy())
    return np.arange(len(tokens))


def _cut(row_ends: Array, sources: Array, config: Config, max_length: int | None) -> tuple[Array, Array, Array]:
    """Return start in the stream, length and tokenised row of every row of the file."""
    starts, lengths = np.concatenate([[0], row_ends[:-1]]), np.diff(row_ends, prepend=0)
    if config.packing:
        if max_length is None:
            raise UsageError("--packing needs --max_length: the teacher's configuration names no context length.")
        block_starts = np.arange(0, row_ends[-1] - max_length + 1, max_length)
        rows = np.searchsorted(row_ends, block_starts, side="right")
        return block_starts, np.full(len(block_starts), max_length, dtype=np.int32), rows
    rows = np.arange(len(lengths))
    if max_length is None or (lengths <= max_length).all():
        return starts, lengths.astype(np.int32), rows
    if config.overflow == "error":
        row = int(np.argmax(lengths > max_length))
        raise UsageError(
            f"Row {sources[row]} of the split has {lengths[row]} tokens, --max_length is {max_length}. "
            "Raise it, or choose --overflow truncate or split."
        )
    if config.overflow == "truncate":
        return starts, np.minimum(lengths, max_length).astype(np.int32), rows
    pieces = np.maximum(1, -(-lengths // max_length))
    rows = np.repeat(rows, pieces)
    piece = np.arange(len(rows)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    piece_lengths = np.minimum(lengths[rows] - piece * max_length, max_length)
    return starts[rows] + piece * max_length, piece_lengths.astype(np.int32), rows
