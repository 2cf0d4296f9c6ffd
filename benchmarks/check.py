"""Whether two files hold the same capture, whatever their layout.

Shape letters: N rows of the split, T tokens of a row, P positions of a row, K kept.
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
    (path,) = paths
    file = LogitsFile(path)
    for number in range(len(file)):
        yield number, file.row(number)


def read_flat(paths: Sequence[Path]) -> Iterator[tuple[int, Row]]:
    """Rows of HDF5 files of flat datasets, in the order in which they lie there."""
    for path in paths:
        with h5py.File(path) as file:
            arrays = {name: values[:] for name, values in file.items()}
        starts = _starts(np.maximum(arrays["num_tokens"] - 1, 0))
        yield from _rows(arrays["row"], arrays, starts)


def read_groups(paths: Sequence[Path]) -> Iterator[tuple[int, Row]]:
    """Rows of an HDF5 file with a group for each."""
    (path,) = paths
    with h5py.File(path) as file:
        for name, group in file.items():
            yield int(name.removeprefix("row_")), {field: values[:] for field, values in group.items()}


def read_zarr(paths: Sequence[Path]) -> Iterator[tuple[int, Row]]:
    """Rows of a Zarr store, where regions of several writers have gaps between them."""
    import zarr

    (path,) = paths
    arrays = {name: values[:] for name, values in zarr.open_group(path, mode="r").arrays()}
    yield from _rows(np.arange(len(arrays["num_tokens"])), arrays, arrays["position_starts"])


def _starts(lengths: Array) -> Array:
    return np.cumsum(lengths) - lengths


def _rows(numbers: Array, arrays: Row, position_starts: Array) -> Iterator[tuple[int, Row]]:
    token_starts = _starts(arrays["num_tokens"])
    for number, length, token, position in zip(
        numbers, arrays["num_tokens"], token_starts, position_starts, strict=True
    ):
        positions = slice(position, position + max(length - 1, 0))
        fields = {name: arrays[name][positions] for name in _OF_POSITIONS}
        yield int(number), fields | {"input_ids": arrays["input_ids"][token : token + length]}


def check(found: Iterable[tuple[int, Row]], ours: LogitsFile) -> int:
    """Compare all rows of a file with ours; return how many there are.

    Raises:
        MismatchError: A row is missing, there twice, or holds something else.
    """
    seen: set[int] = set()
    for number, row in found:
        if number in seen or not 0 <= number < len(ours):
            raise MismatchError(f"Row {number} is there twice, or there is no such row among {len(ours)}.")
        seen.add(number)
        _check_row(number, row, ours.row(number))
    if len(seen) < len(ours):
        missing = min(set(range(len(ours))) - seen)
        raise MismatchError(f"{len(ours) - len(seen)} of {len(ours)} rows are missing, row {missing} the first.")
    return len(seen)


def _check_row(number: int, row: Row, ours: Row) -> None:
    if not np.array_equal(row["input_ids"], ours["input_ids"]):
        raise MismatchError(f"Row {number} has other tokens.")
    if not np.array_equal(ours["positions"], row.get("positions", np.arange(len(row["logsumexp"])))):
        raise MismatchError(f"Row {number} has other positions: {len(row['logsumexp'])} of them.")
    for name in _OF_POSITIONS:
        if row[name].shape != ours[name].shape:
            raise MismatchError(f"Row {number} has {name} of shape {row[name].shape}, expected {ours[name].shape}.")
    for name in ("logsumexp", "target_logprob"):
        _check_close(number, name, row[name], ours[name], 0)
    # Each side was rounded to float16 on its own, by at most half a step.
    _check_close(number, "kept_logprobs", row["kept_logprobs"], ours["kept_logprobs"], 2 * FLOAT16_ERROR)
    for position in np.flatnonzero((row["kept_ids"] != ours["kept_ids"]).any(axis=-1)):
        _check_ids(number, position, *(side[name][position] for side in (row, ours) for name in _OF_POSITIONS[:2]))


def _check_close(number: int, name: str, values: Array, expected: Array, relative: float) -> None:
    values, expected = values.astype(np.float32), expected.astype(np.float32)
    wrong = ~(np.abs(values - expected) <= TOLERANCE + relative * np.abs(expected))  # so that NaN is wrong, too
    if wrong.any():
        at = tuple(map(int, np.argwhere(wrong)[0]))
        raise MismatchError(f"Row {number} has {name} {values[at]:.5f} at {at}, expected {expected[at]:.5f}.")


def _check_ids(number: int, position: int, ids_K: Array, kept_K: Array, our_ids_K: Array, our_kept_K: Array) -> None:
    """Let ids differ only where log-probs are nearly equal: in their order, or in which one comes last."""
    ours = dict(zip(our_ids_K.tolist(), our_kept_K.tolist(), strict=True))
    theirs = dict(zip(ids_K.tolist(), kept_K.tolist(), strict=True))
    if len(theirs) < len(ids_K):
        raise MismatchError(f"Row {number} keeps a token twice at position {position}.")
    least = float(our_kept_K[-1])
    for token, logprob in theirs.items():
        expected = ours.get(token, least)
        if not abs(logprob - expected) <= TOLERANCE + 2 * FLOAT16_ERROR * abs(expected):
            raise MismatchError(
                f"Row {number} keeps token {token} with {logprob:.5f} at position {position}, expected "
                f"{f'{expected:.5f}' if token in ours else f'it below {least:.5f}'}."
            )
