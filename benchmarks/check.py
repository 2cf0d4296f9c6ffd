"""Whether two files hold the same capture, whatever their layout.

Shape letters: K kept.
"""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt

from logitgen.file.layout import FLOAT16_ERROR
from logitgen.file.reader import LogitsFile

Array = npt.NDArray[Any]
Row = dict[str, Array]

TOLERANCE = 1e-3
"""Nats by which two ways to compute a log-prob may differ; batches of another shape round differently."""

_OF_POSITIONS = ("kept_ids", "kept_logprobs", "logsumexp", "target_logprob")


class MismatchError(ValueError):
    """A file does not hold what ours does."""


def read_ours(paths: Sequence[Path]) -> Iterator[tuple[int, Row]]:
    """Rows of a file of logitgen."""
    file = LogitsFile(paths[0])
    return ((number, file.row(number)) for number in range(len(file)))


def read_flat(paths: Sequence[Path]) -> Iterator[tuple[int, Row]]:
    """Rows of HDF5 files of flat datasets, in the order in which they lie there."""
    for path in paths:
        with h5py.File(path) as file:
            yield from _rows({name: values[:] for name, values in file.items()})


def read_groups(paths: Sequence[Path]) -> Iterator[tuple[int, Row]]:
    """Rows of an HDF5 file with a group for each."""
    with h5py.File(paths[0]) as file:
        for name, group in file.items():
            yield int(name.removeprefix("row_")), {field: values[:] for field, values in group.items()}


def read_zarr(paths: Sequence[Path]) -> Iterator[tuple[int, Row]]:
    """Rows of a Zarr store, where regions of several writers have gaps between them."""
    import zarr

    return _rows({name: values[:] for name, values in zarr.open_group(paths[0], mode="r").arrays()})


def _rows(arrays: Row) -> Iterator[tuple[int, Row]]:
    lengths = arrays["num_tokens"]
    counts = np.maximum(lengths - 1, 0)
    numbers = arrays.get("row", np.arange(len(lengths)))
    starts = arrays.get("position_starts", np.cumsum(counts) - counts)
    for number, end, length, start, count in zip(numbers, np.cumsum(lengths), lengths, starts, counts, strict=True):
        fields = {name: arrays[name][start : start + count] for name in _OF_POSITIONS}
        yield int(number), fields | {"input_ids": arrays["input_ids"][end - length : end]}


def check(found: Iterable[tuple[int, Row]], ours: LogitsFile) -> int:
    """Compare all rows of a file with ours; return how many there are.

    Raises:
        MismatchError: A row is missing, there twice, or holds something else.
    """
    missing = set(range(len(ours)))
    for number, row in found:
        if number not in missing:
            raise MismatchError(f"Row {number} is there twice, or there is no such row among {len(ours)}.")
        missing.remove(number)
        _check_row(number, row, ours.row(number))
    if missing:
        raise MismatchError(f"{len(missing)} of {len(ours)} rows are missing, row {min(missing)} the first.")
    return len(ours)


def _check_row(number: int, row: Row, ours: Row) -> None:
    if not np.array_equal(row["input_ids"], ours["input_ids"]):
        raise MismatchError(f"Row {number} has other tokens.")
    if not np.array_equal(ours["positions"], row.get("positions", np.arange(len(row["logsumexp"])))):
        raise MismatchError(f"Row {number} has other positions: {len(row['logsumexp'])} of them.")
    # Each side was rounded to float16 on its own, by at most half a step.
    for name, relative in {"logsumexp": 0, "target_logprob": 0, "kept_logprobs": 2 * FLOAT16_ERROR}.items():
        if row[name].shape != ours[name].shape:
            raise MismatchError(f"Row {number} has {name} of shape {row[name].shape}, expected {ours[name].shape}.")
        values, expected = row[name].astype(np.float32), ours[name].astype(np.float32)
        wrong = ~(np.abs(values - expected) <= TOLERANCE + relative * np.abs(expected))  # so that NaN is wrong, too
        if wrong.any():
            at = tuple(map(int, np.argwhere(wrong)[0]))
            raise MismatchError(f"Row {number} has {name} {values[at]:.5f} at {at}, expected {expected[at]:.5f}.")
    for position in np.flatnonzero((row["kept_ids"] != ours["kept_ids"]).any(axis=-1)):
        theirs, expected = (
            dict(zip(side["kept_ids"][position].tolist(), side["kept_logprobs"][position].tolist(), strict=True))
            for side in (row, ours)
        )
        _check_ids(f"Row {number}, position {position}:", theirs, expected)


def _check_ids(where: str, theirs: dict[int, float], ours: dict[int, float]) -> None:
    """Let ids differ only where log-probs are nearly equal: in their order, or in which one comes last."""
    if len(theirs) < len(ours):
        raise MismatchError(f"{where} keeps a token twice.")
    least = min(ours.values())
    for token, logprob in theirs.items():
        expected = ours.get(token, least)
        if not abs(logprob - expected) <= TOLERANCE + 2 * FLOAT16_ERROR * abs(expected):
            wanted = f"{expected:.5f}" if token in ours else f"it below {least:.5f}"
            raise MismatchError(f"{where} keeps token {token} with {logprob:.5f}, expected {wanted}.")
