"""A file, or several, as a `torch.utils.data.Dataset`.

Shape letters: N rows, T tokens, P captured positions, K kept per position, V vocabulary, D hidden size.
"""

from bisect import bisect_right
from collections.abc import Sequence
from copy import copy
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset, Subset

from logitgen.errors import FormatError, UsageError
from logitgen.file.layout import Array
from logitgen.file.reader import LogitsFile
from logitgen.head import Head, restored
from logitgen.tokenizer import is_or_was, tokenizer_fingerprint

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

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
    "layers",
)
"""Attributes and settings that must be equal in files read as one dataset."""

Row = dict[str, Tensor]


class LogitsDataset(Dataset[Row]):
    """The rows of a file in split order, or of several files one after another, with random access.

    It needs only torch and h5py. DataLoader workers may be forked or spawned.

    Attributes:
        attributes: The first file's attributes: `teacher`, `capture`, `top_k`, `vocab_size`, `settings`, ...
        settings: The options of the run that made it.
        max_length: Tokens at which rows are cut, or None.
    """

    def __init__(
        self,
        path: str | Path | Sequence[str | Path],
        *,
        tokenizer: "PreTrainedTokenizerBase | None" = None,
        max_length: int | None = None,
    ) -> None:
        """Open a file, or several files that hold one teacher's logits, captured in the same way.

        Args:
            path: Path of the file, or of several.
            tokenizer: The student's, to be compared with the teacher's.
            max_length: Tokens to cut longer rows at, for a student of a shorter context. A cut row loses the positions
                whose next token it loses.

        Raises:
            FormatError: A file is missing, foreign, of a newer version, not complete, or does not fit the first.
            UsageError: `max_length` is below 1, or the tokenizer is not the teacher's.
        """
        paths = [path] if isinstance(path, str | Path) else list(path)
        if not paths:
            raise FormatError("A dataset needs at least one file, got none. Give a path.")
        if max_length is not None and max_length < 1:
            raise UsageError(f"max_length must be at least 1, got {max_length}. None leaves rows as they are.")
        self._paths = [Path(name).absolute() for name in paths]  # a worker may be started in another folder
        self._files = [LogitsFile(name) for name in self._paths]
        for file in self._files[1:]:
            _check_fits(file, self._files[0])
        if tokenizer is not None:
            _check_tokenizer(tokenizer, self._files[0])
        self._ends = list(accumulate(map(len, self._files)))
        self._rows: Sequence[int] | npt.NDArray[np.int64] = range(self._ends[-1])
        self.max_length = max_length
        self.attributes: dict[str, Any] = self._files[0].attributes
        self.settings: dict[str, Any] = self.attributes["settings"]

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Tokens of each row, [N], without reading a row."""
        lengths = np.concatenate([np.diff(file.arrays["offsets"]) for file in self._files])[self._rows]
        return lengths if self.max_length is None else lengths.clip(max=self.max_length)

    @overload
    def __getitem__(self, row: int) -> Row: ...

    @overload
    def __getitem__(self, row: slice) -> "LogitsDataset": ...

    def __getitem__(self, row: int | slice) -> "Row | LogitsDataset":
        """Read one row, or take a slice of the rows as a dataset.

        Returns:
            `input_ids` int64[T] and `positions` int64[P]. At these positions, predicting the token after,
            `target_logprob` float32[P], `logsumexp` float32[P] if the encoding is plain, and the captured values:
            `kept_ids` int64[P, K] with `kept_logprobs` float32[P, K] (nats, descending), or `hidden` float32[P, D],
            which `head` turns into logits, with the states of other layers, `hidden_2` float32[P, D] and so on, or
            `logits` float32[P, V]. Packed draws have more columns than K, -inf where a position has fewer tokens, and
            one mean for those that were not certain.

        Raises:
            IndexError: There is no such row.
        """
        if isinstance(row, slice):
            return self._view(self._rows[row])
        if not -len(self) <= row < len(self):
            raise IndexError(f"Row must be between 0 and {len(self) - 1}, got {row}.")
        number = int(self._rows[row])
        index = bisect_right(self._ends, number)
        found = self._files[index].row(number - self._ends[index] + len(self._files[index]))
        return {name: _tensor(array) for name, array in self._cut(found).items()}

    def select(self, indices: npt.ArrayLike) -> "LogitsDataset":
        """Take some rows as a dataset, in the order of their numbers.

        Args:
            indices: Row numbers, [M]. Negative numbers count from the end.

        Raises:
            IndexError: There is no such row.
        """
        numbers = np.asarray(indices, dtype=np.int64)
        for number in numbers[(numbers < -len(self)) | (numbers >= len(self))][:1]:
            raise IndexError(f"Row must be between 0 and {len(self) - 1}, got {number}.")
        return self._view(np.asarray(self._rows)[numbers])

    def split(self, share: float, seed: int = 0) -> "tuple[LogitsDataset, LogitsDataset]":
        """Divide the rows at random: a share of them, and the others, both in the order they have here.

        Args:
            share: Share of the first part, between 0 and 1.
            seed: It alone decides which rows go where.

        Raises:
            UsageError: The share is not between 0 and 1.
        """
        if not 0 <= share <= 1:
            raise UsageError(
                f"share must be between 0 and 1, got {share}. 0.9 puts 90 % of the rows into the first part."
            )
        order = np.random.default_rng(seed).permutation(len(self))
        first, second = np.split(order, [round(share * len(self))])
        return self.select(np.sort(first)), self.select(np.sort(second))

    def largest_id(self) -> int:
        """Return the largest token id of these rows, or -1. It reads their tokens and nothing else."""
        largest = -1
        for number in self._rows:
            index = bisect_right(self._ends, number)
            file = self._files[index]
            row = number - self._ends[index] + len(file)
            ids = file.arrays["input_ids"][slice(*file.arrays["offsets"][row : row + 2])][: self.max_length]
            largest = max(largest, int(ids.max(initial=0)) if len(ids) else -1)
        return largest

    def _view(self, rows: Sequence[int] | npt.NDArray[np.int64]) -> "LogitsDataset":
        view = copy(self)
        view._rows = rows
        return view

    def _cut(self, row: dict[str, Array]) -> dict[str, Array]:
        """Cut a row at `max_length` tokens."""
        if self.max_length is None or len(row["input_ids"]) <= self.max_length:
            return row
        num_positions = np.searchsorted(row["positions"], self.max_length - 1)
        return {
            name: values[: self.max_length if name == "input_ids" else num_positions] for name, values in row.items()
        }

    @property
    def head(self) -> Head | None:
        """The teacher's output head in its own dtype, read anew each time. None unless hidden states were captured."""
        return head_of(self._files[0])

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self._paths, "max_length": self.max_length, "rows": self._rows}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["path"], max_length=state["max_length"])  # type: ignore[misc]
        self._rows = state["rows"]


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
        value, expected = (each.attributes.get(name, each.attributes["settings"].get(name)) for each in (file, first))
        if value == expected:
            continue
        if isinstance(value, dict):
            key = min(key for key in value.keys() | expected if value.get(key) != expected.get(key))
            name, value, expected = f"{key} ({name})", value.get(key), expected.get(key)
        raise FormatError(
            f"{file.path} must have the {name} of {first.path}: expected {expected}, got {value}. "
            "Capture all files of a dataset in the same way."
        )


def _check_tokenizer(tokenizer: "PreTrainedTokenizerBase", file: LogitsFile) -> None:
    expected = file.attributes["tokenizer_fingerprint"]
    if not expected:
        raise UsageError(f"{file.path} was captured without a tokenizer to compare with. Leave tokenizer out.")
    if not is_or_was(tokenizer, expected):
        found = tokenizer_fingerprint(tokenizer)
        raise UsageError(
            f"The tokenizer must be that of the teacher {file.attributes['teacher']}, fingerprint {expected[:8]}, got "
            f"{tokenizer.name_or_path or 'one without a name'}, fingerprint {found[:8]}. Train a student with the "
            "teacher's tokenizer, or leave tokenizer out if only chat template or special tokens differ."
        )


def source_of(dataset: Any) -> Any:
    """Return the dataset whose rows torch's `Subset` or `ConcatDataset` hands out, or the dataset itself.

    Raises:
        FormatError: The parts of a `ConcatDataset` do not fit each other.
    """
    if isinstance(dataset, Subset):
        return source_of(dataset.dataset)
    if isinstance(dataset, ConcatDataset):
        first, *others = map(source_of, dataset.datasets)
        for other in others:
            _check_fits(other._files[0], first._files[0])
        return first
    return dataset


def check_ids(dataset: Any, vocab_size: int) -> None:
    """Refuse rows with tokens that a student's vocabulary does not have.

    Tokens are read only where the vocabulary is smaller than the teacher's.

    Raises:
        UsageError: A row has such a token.
    """
    if isinstance(dataset, ConcatDataset):
        for part in dataset.datasets:
            check_ids(part, vocab_size)
    elif isinstance(dataset, Subset):
        inner = dataset.dataset
        check_ids(inner.select(dataset.indices) if isinstance(inner, LogitsDataset) else inner, vocab_size)
    elif isinstance(dataset, LogitsDataset):
        known = max(dataset.attributes["vocab_size"], dataset.attributes["tokenizer_size"])
        if vocab_size < known and (largest := dataset.largest_id()) >= vocab_size:
            raise UsageError(
                f"The rows must have tokens below the student's {vocab_size}, got {largest}. Enlarge the student's "
                "embeddings to the teacher's tokenizer, or leave the rows out with dataset.select."
            )


def _tensor(array: Any) -> Tensor:
    """Copy out of the file, ids as int64 and values as float32."""
    return torch.from_numpy(array.astype("int64" if array.dtype.kind in "iu" else "float32"))
