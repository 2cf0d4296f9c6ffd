"""The places of a file's arrays, and writes to them."""

import os
from collections.abc import Iterable
from typing import BinaryIO

import numpy as np

from logitgen.file.header import Places
from logitgen.file.layout import Array, Layout, nbytes, row_crc32
from logitgen.head import Head
from logitgen.split.rows import Rows

_HAS_PWRITE = hasattr(os, "pwrite")
"""Not on Windows."""


class Arrays:
    """The datasets of an open file, by their places in it."""

    def __init__(self, file: BinaryIO, layout: Layout, places: Places) -> None:
        self._file = file
        self._fields = layout.datasets
        self._places = places

    def put(self, name: str, start: int, values: Array) -> None:
        """Overwrite entries of a dataset, beginning at entry `start`."""
        data = values.astype(self._fields[name][1], copy=False).reshape(-1).view(np.uint8)
        num_entries = len(data) // self._entry_bytes(name)
        self.put_parts(name, data, [(0, num_entries, int(start))])

    def put_parts(self, name: str, data: Array, parts: Iterable[tuple[int, int, int]]) -> None:
        """Overwrite entries of a dataset with parts of an array.

        Args:
            name: The dataset.
            data: The array as it is stored, uint8.
            parts: First entry of a part in the array, the entry after its last, and its first entry in the dataset.
        """
        place, size = self._places[name], self._entry_bytes(name)
        view = memoryview(data)  # type: ignore[arg-type]
        for start, end, at in parts:
            write_at(self._file, place + at * size, view[start * size : end * size])

    def _entry_bytes(self, name: str) -> int:
        (_, *entry), dtype = self._fields[name]
        return nbytes((tuple(entry), dtype))


def write_at(file: BinaryIO, place: int, data: memoryview) -> None:
    """Overwrite bytes of a file, beginning at byte `place`."""
    if _HAS_PWRITE:  # one system call instead of two, some five times for every row
        written = os.pwrite(file.fileno(), data, place)
    else:
        file.seek(place)
        written = file.write(data)
    if written < len(data):
        write_at(file, place + written, data[written:])


def write_known(file: BinaryIO, places: Places, layout: Layout, rows: Rows, head: Head | None = None) -> None:
    """Write all data known before the first forward pass. It completes rows without a captured position.

    Args:
        file: The new file.
        places: The byte at which each dataset starts.
        layout: The file's sizes.
        rows: The tokenised split.
        head: The teacher's output head, if the file has one.
    """
    datasets = Arrays(file, layout, places)
    datasets.put("source_row", 0, rows.source_row)
    datasets.put("offsets", 0, offsets_of(rows.lengths))
    datasets.put("position_offsets", 0, offsets_of(rows.num_positions))
    num_tokens = num_positions = 0
    for input_ids, positions in rows.blocks():
        datasets.put("input_ids", num_tokens, input_ids)
        datasets.put("positions", num_positions, positions)
        num_tokens, num_positions = num_tokens + len(input_ids), num_positions + len(positions)
    for name, start, block in head.blocks() if head else ():
        datasets.put(name, start, block)
    nothing = [np.empty((0, *entry), dtype) for entry, dtype in layout.captured.values()]
    ids_dtype = layout.datasets["input_ids"][1]
    for row in np.flatnonzero(rows.num_positions == 0).tolist():
        known = [rows.input_ids(row).astype(ids_dtype), rows.positions(row), *nothing]
        datasets.put("crc32", row, np.array([row_crc32(row, rows.source_row[row], known)]))
    datasets.put("done", 0, rows.num_positions == 0)


def offsets_of(counts: Array) -> Array:
    """Turn the sizes of rows into the offsets of their starts and of the last end, [N+1]."""
    return np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
