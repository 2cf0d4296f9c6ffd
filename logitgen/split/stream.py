"""Columns of lists, read as one flat array without a copy."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

Array = npt.NDArray[Any]


class Stream:
    """A list column read as one flat array, memory-mapped chunk by chunk."""

    def __init__(self, column: pa.ChunkedArray) -> None:
        self._chunks = [chunk.flatten().to_numpy() for chunk in column.chunks]
        self._starts = np.cumsum([0, *map(len, self._chunks)])

    def __getitem__(self, span: tuple[int, int]) -> Array:
        start, end = span
        index = int(np.searchsorted(self._starts, start, side="right")) - 1
        pieces = []
        while start < end:
            until = min(end, self._starts[index + 1])
            pieces.append(self._chunks[index][start - self._starts[index] : until - self._starts[index]])
            start, index = until, index + 1
        return pieces[0] if len(pieces) == 1 else np.concatenate([np.empty(0, dtype=np.int32), *pieces])

    def chunks(self) -> Iterator[tuple[int, Array]]:
        """Pair each chunk with the index of its first element."""
        return zip(map(int, self._starts), self._chunks, strict=False)


def list_lengths(column: pa.ChunkedArray) -> Array:
    """Return the number of values of every list, int[N]."""
    return np.concatenate([np.diff(chunk.offsets.to_numpy()) for chunk in column.chunks] or [np.empty(0, dtype=int)])
