"""Whether two files hold the same capture, whatever their layout.

Shape letters: P positions of a row, K kept.
"""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import h5py
import numpy as np

from logitgen.file.layout import FLOAT16_ERROR, Array
from logitgen.file.reader import LogitsFile

Row = dict[str, Array]
Rows = Iterator[tuple[int, Row]]

TOLERANCE = 1e-3
"""Nats by which two ways to compute a log-prob may differ; batches of another shape round differently."""

_OF_POSITIONS = ("kept_ids", "kept_logprobs", "logsumexp", "target_logprob")


class MismatchError(ValueError):
    """A file does not hold what ours does."""


def read_ours(paths: Sequence[Path]) -> Rows:
    """Rows of a file of logitgen."""
    file = LogitsFile(paths[0])
    return ((number, file.row(number)) for number in range(len(file)))


def read_flat(paths: Sequence[Path]) -> Rows:
    """Rows of HDF5 files of flat datasets, in the order in which they lie there."""
    for path in paths:
        with h5py.File(path) as file:
            yield from _rows({name: values[:] for name, values in file.items()})


def read_groups(paths: Sequence[Path]) -> Rows:
    """Rows of an HDF5 file with a group for each."""
    with h5py.File(paths[0]) as file:
        for name, group in file.items():
            yield int(name.removeprefix("row_")), {field: values[:] for field, values in group.items()}


def read_zarr(paths: Sequence[Path]) -> Rows:
    """Rows of a Zarr store, where regions of several writers have gaps between them."""
    import zarr

    return _rows({name: values[:] for name, values in zarr.open_group(paths[0], mode="r").arrays()})


def _rows(arrays: Row) -> Rows:
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
        if problem := _problem(row, ours.row(number)):
            raise MismatchError(f"Row {number} {problem}.")
    if missing:
        raise MismatchError(f"{len(missing)} of {len(ours)} rows are missing, row {min(missing)} the first.")
    return len(ours)


def _problem(row: Row, ours: Row) -> str | None:
    """Say what is wrong with a row, if anything is."""
    if not np.array_equal(row["input_ids"], ours["input_ids"]):
        return "has other tokens"
    if not np.array_equal(ours["positions"], row.get("positions", np.arange(len(row["logsumexp"])))):
        return f"has other positions: {len(row['logsumexp'])} of them"
    if (np.diff(np.sort(row["kept_ids"])) == 0).any():
        return "keeps a token twice"
    pairs = {name: (row[name], ours[name]) for name in ("logsumexp", "target_logprob", "kept_logprobs")}
    pairs["log-probs of kept_ids"] = row["kept_logprobs"], _expected_logprobs(row, ours)
    for name, (values, expected) in pairs.items():
        if values.shape != expected.shape:
            return f"has {name} of shape {values.shape}, expected {expected.shape}"
        values, expected = values.astype(np.float32), expected.astype(np.float32)
        # Each side's kept log-probs were rounded to float16 on their own, by at most half a step.
        rounding = 2 * FLOAT16_ERROR * np.abs(expected) if "kept" in name else 0
        wrong = ~(np.abs(values - expected) <= TOLERANCE + rounding)  # so that NaN is wrong, too
        if wrong.any():
            at = tuple(map(int, np.argwhere(wrong)[0]))
            return f"has {name} {values[at]:.5f} at {at}, expected {expected[at]:.5f}"
    return None


def _expected_logprobs(row: Row, ours: Row) -> Array:
    """Our log-probs of the tokens that a row keeps, [P, K], or our least one of a token that we do not keep.

    So tokens may come in another order, or another one last, where their log-probs are nearly equal.
    """
    same_PKK = row["kept_ids"][:, :, None] == ours["kept_ids"][:, None]
    logprobs_PK = np.take_along_axis(ours["kept_logprobs"], same_PKK.argmax(-1), axis=-1)
    return np.where(same_PKK.any(-1), logprobs_PK, ours["kept_logprobs"].min(-1, keepdims=True))
