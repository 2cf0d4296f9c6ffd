"""A file, or several, as a `torch.utils.data.Dataset`, and a collate function that joins its rows into batches.

Shape letters: B rows of a batch, T tokens, P captured positions, K kept per position, V vocabulary, D hidden size.
"""

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset

from logitgen.errors import FormatError
from logitgen.file.layout import Array
from logitgen.file.reader import LogitsFile
from logitgen.head import Head, restored

IGNORED_LABEL = -100
"""Label that torch's cross-entropy and transformers ignore."""

_EQUAL = (
    "capture",
    "encoding",
    "top_k",
    "vocab_size",
    "teacher_fingerprint",
    "teacher_config",
    "teacher_dtype",
    "quantization",
    "tokenizer_fingerprint",
)
"""Attributes that must be equal in files read as one dataset."""

Row = dict[str, Tensor]


class LogitsDataset(Dataset[Row]):
    """The rows of a file in split order, or of several files one after another, with random access.

    It needs only torch and h5py. DataLoader workers may be forked or spawned.

    Attributes:
        attributes: The first file's attributes: `teacher`, `capture`, `top_k`, `vocab_size`, `settings`, ...
        settings: The options of the run that made it.
    """

    def __init__(self, path: str | Path | Sequence[str | Path]) -> None:
        """Open a file, or several files that hold one teacher's logits, captured in the same way.

        Raises:
            FormatError: A file is missing, foreign, of a newer version, not complete, or does not fit the first.
        """
        paths = [path] if isinstance(path, str | Path) else list(path)
        if not paths:
            raise FormatError("A dataset needs at least one file, got none. Give a path.")
        self._paths = [Path(name).absolute() for name in paths]  # a worker may be started in another folder
        self._files = [LogitsFile(name) for name in self._paths]
        for file in self._files[1:]:
            _check_fits(file, self._files[0])
        self._ends = list(accumulate(map(len, self._files)))
        self.attributes: dict[str, Any] = self._files[0].attributes
        self.settings: dict[str, Any] = self.attributes["settings"]

    def __len__(self) -> int:
        return self._ends[-1]

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Tokens of each row, [N], without reading a row."""
        return np.concatenate([np.diff(file.arrays["offsets"]) for file in self._files])

    def __getitem__(self, row: int) -> Row:
        """Read one row.

        Returns:
            `input_ids` int64[T] and `positions` int64[P]. At these positions, predicting the token after, `logsumexp`
            and `target_logprob` float32[P], and the captured values: `kept_ids` int64[P, K] with `kept_logprobs`
            float32[P, K] (nats, descending; for drawn tokens with `threshold` float32[P], from which their weights
            follow), or `hidden` float32[P, D], which `head` turns into logits, or `logits` float32[P, V].

        Raises:
            IndexError: There is no such row.
        """
        number = row + len(self) if row < 0 else row
        if not 0 <= number < len(self):
            raise IndexError(f"Row must be between 0 and {len(self) - 1}, got {row}.")
        index = bisect_right(self._ends, number)
        found = self._files[index].row(number - self._ends[index] + len(self._files[index]))
        return {name: _tensor(array) for name, array in found.items()}

    @property
    def head(self) -> Head | None:
        """The teacher's output head in its own dtype, read anew each time. None unless hidden states were captured."""
        return head_of(self._files[0])

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self._paths}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["path"])  # type: ignore[misc]


def head_of(file: LogitsFile) -> Head | None:
    """Read the teacher's output head, if the file has one."""
    if not file.layout.of_head:
        return None
    attributes, arrays = file.attributes, file.arrays
    return Head(
        weight_VD=restored(arrays["head_weight"], attributes["teacher_dtype"]),
        bias_V=restored(arrays["head_bias"], attributes["teacher_dtype"]) if "head_bias" in arrays else None,
        scale=attributes["head_scale"],
        soft_cap=attributes["head_soft_cap"],
    )


def _check_fits(file: LogitsFile, first: LogitsFile) -> None:
    for name in _EQUAL:
        value, expected = file.attributes[name], first.attributes[name]
        if value == expected:
            continue
        if isinstance(value, dict):
            key = min(key for key in value.keys() | expected if value.get(key) != expected.get(key))
            name, value, expected = f"{key} ({name})", value.get(key), expected.get(key)
        raise FormatError(
            f"{file.path} must have the {name} of {first.path}: expected {expected}, got {value}. "
            "Capture all files of a dataset in the same way."
        )


def collate(rows: Sequence[Row], pad_token_id: int = 0, *, padding_free: bool = False) -> Row:
    """Join rows into one batch, everything aligned with the student's logits of shape [B, T, V].

    Args:
        rows: Rows of a `LogitsDataset`.
        pad_token_id: Token that fills up `input_ids`, on the right.
        padding_free: Put the rows one after another instead, [1, T] with the T tokens of all.

    Returns:
        `input_ids` and `attention_mask` int64[B, T]; `captured` bool[B, T], true where the teacher's distribution is
        known; the captured values at these places (`kept_ids` int64[B, T, K], ...) and 0 elsewhere; `labels`
        int64[B, T], the tokens that captured positions predict, -100 elsewhere, unshifted as transformers wants them.
        With `padding_free`, `position_ids` int64[1, T], which start at 0 in each row, instead of `attention_mask`.

    Source: `DataCollatorForLanguageModeling` of TRL, whose `padding_free` leaves out the mask too: with one, attention
    kernels would take the rows for a single one.
    """
    # In numpy: torch would share each small copy out among threads, which can take ten times as long as the copy.
    arrays = [{name: tensor.numpy() for name, tensor in row.items()} for row in rows]
    lengths = [len(row["input_ids"]) for row in arrays]
    if padding_free:
        shape = 1, sum(lengths)
        places = [(0, slice(end - length, end)) for end, length in zip(accumulate(lengths), lengths, strict=True)]
    else:
        shape = len(rows), max(lengths)
        places = [(index, slice(length)) for index, length in enumerate(lengths)]
    batch = {
        "input_ids": np.full(shape, pad_token_id),
        "position_ids" if padding_free else "attention_mask": np.zeros(shape, np.int64),
        "captured": np.zeros(shape, np.bool_),
        "labels": np.full(shape, IGNORED_LABEL),
    }
    for name, values in arrays[0].items():
        if name not in ("input_ids", "positions"):
            batch[name] = np.zeros((*shape, *values.shape[1:]), values.dtype)
    for row, place in zip(arrays, places, strict=True):
        _fill({name: array[place] for name, array in batch.items()}, row)
    return {name: torch.from_numpy(array) for name, array in batch.items()}


def _fill(part: dict[str, Array], row: dict[str, Array]) -> None:
    """Write a row of T tokens into its part of a batch, views of shape [T, ...]."""
    tokens, positions = row["input_ids"], row["positions"]
    part["input_ids"][:] = tokens
    if "position_ids" in part:
        part["position_ids"][:] = np.arange(len(tokens))
    else:
        part["attention_mask"][:] = 1
    part["captured"][positions] = True
    part["labels"][positions + 1] = tokens[positions + 1]
    for name in row.keys() - {"input_ids", "positions"}:
        part[name][positions] = row[name]


def _tensor(array: Any) -> Tensor:
    """Copy out of the file, ids as int64 and values as float32."""
    return torch.from_numpy(array.astype("int64" if array.dtype.kind in "iu" else "float32"))
