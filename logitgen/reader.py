"""The reader: opens a file anywhere, with numpy and h5py alone, and hands out rows by number.

HDF5 is asked where each dataset lies; from then on the file is mapped into memory. So a row costs one page fault or
two, and an open file may be used in forked processes.
"""

import json
import os
from pathlib import Path
from typing import Any, get_args

import h5py
import numpy as np

from logitgen.errors import FormatError
from logitgen.schema import ATTRIBUTES, FORMAT_NAME, FORMAT_VERSION, PARTIAL_SUFFIX, Array, CaptureKind, Layout, nbytes

_BLOCK_POSITIONS = 2**22


class LogitsFile:
    """A complete file, mapped into memory.

    Attributes:
        path: Where it is.
        layout: Its sizes.
        attributes: What it says about itself, `settings` and `packages` as dictionaries.
        arrays: Every dataset by name, read-only; see `schema` for shapes and dtypes.
    """

    def __init__(self, path: str | Path) -> None:
        """Open a file.

        Raises:
            FormatError: It does not exist, is not a logitgen file, is of a newer version, or is not complete.
        """
        self.path = Path(path)
        if "\0" in str(path) or not os.path.isfile(path):  # noqa: PTH113 (which is False for names too long)
            hint = (
                " A capture that has not finished left its .partial; finish it first." if self._partial_exists() else ""
            )
            raise FormatError(f"{self.path} is not a file.{hint}")
        try:
            with h5py.File(self.path, "r") as file:
                self.attributes = _attributes(file, self.path)
                self.layout = _layout(file, self.attributes, self.path)
                places = {name: _place(file, name, field, self.path) for name, field in self.layout.datasets.items()}
        except OSError as error:
            if "truncated file" in str(error):
                raise FormatError(f"{self.path} is cut off: its end is missing. Copy it again.") from error
            raise FormatError(f"{self.path} cannot be read as HDF5: {error}.") from error
        except RuntimeError as error:  # what h5py raises over garbled structures
            raise FormatError(f"{self.path} is damaged: {error}. Copy it again.") from error
        self.arrays: dict[str, Array] = {
            name: np.memmap(self.path, dtype, "r", places[name], shape)
            if nbytes((shape, dtype))
            else np.empty(shape, dtype)
            for name, (shape, dtype) in self.layout.datasets.items()
        }
        for name, end in (("offsets", self.layout.num_tokens), ("position_offsets", self.layout.num_positions)):
            if (self.arrays[name][0], self.arrays[name][-1]) != (0, end):
                raise FormatError(f"{self.path} is damaged: {name} must run from 0 to {end}.")
        if missing := len(self) - int(np.count_nonzero(self.arrays["done"])):
            raise FormatError(
                f"{self.path} is not complete: {missing} of {len(self)} rows are missing. Finish the run."
            )

    def _partial_exists(self) -> bool:
        return os.path.isfile(f"{self.path}{PARTIAL_SUFFIX}")  # noqa: PTH113

    def __len__(self) -> int:
        return self.layout.num_rows

    def row(self, row: int) -> dict[str, Array]:
        """Read one row.

        Args:
            row: Row number; negative counts from the end.

        Returns:
            `input_ids` [T], and for its P captured positions `positions` [P], `logsumexp` [P], `target_logprob` [P]
            and what was kept: `kept_ids` and `kept_logprobs` [P, K], or `logits` [P, V]. Dtypes as in the file.

        Raises:
            IndexError: There is no such row.
        """
        number = row + len(self) if row < 0 else row
        if not 0 <= number < len(self):
            raise IndexError(f"Row must be between 0 and {len(self) - 1}, got {row}.")
        tokens = slice(*self.arrays["offsets"][number : number + 2])
        positions = slice(*self.arrays["position_offsets"][number : number + 2])
        names = ["positions", *self.layout.captured]
        return {"input_ids": self.arrays["input_ids"][tokens]} | {name: self.arrays[name][positions] for name in names}

    def perplexity(self) -> float:
        """The teacher's perplexity over all captured positions: exp of the mean of -`target_logprob`."""
        target_logprob = self.arrays["target_logprob"]
        blocks = range(0, len(target_logprob), _BLOCK_POSITIONS)
        total = sum(float(target_logprob[start : start + _BLOCK_POSITIONS].sum(dtype=np.float64)) for start in blocks)
        return float(np.exp(-total / len(target_logprob)))


def _attributes(file: h5py.File, path: Path) -> dict[str, Any]:
    attributes = dict(file.attrs)
    if attributes.get("format") != FORMAT_NAME:
        raise FormatError(
            f"{path} is an HDF5 file, but not one of logitgen: its format attribute is missing or foreign."
        )
    version = attributes.get("version")
    if isinstance(version, np.integer) and version > FORMAT_VERSION:
        raise FormatError(
            f"{path} has format version {version}, this logitgen reads up to {FORMAT_VERSION}. Update logitgen."
        )
    plain = {name: value.item() if isinstance(value, np.generic) else value for name, value in attributes.items()}
    for name, kind in ATTRIBUTES.items():
        if not isinstance(plain.get(name), kind):
            raise FormatError(f"{path} is damaged: attribute {name} is missing or not {kind.__name__}.")
    if plain["capture"] not in get_args(CaptureKind) or plain["vocab_size"] < 1 or plain["top_k"] < 0:
        raise FormatError(f"{path} is damaged: attributes capture, vocab_size and top_k do not fit together.")
    for name in ("settings", "packages"):
        try:
            plain[name] = dict(json.loads(plain[name]))
        except (ValueError, TypeError, RecursionError) as error:
            raise FormatError(f"{path} is damaged: attribute {name} is not a JSON object.") from error
    return plain


def _layout(file: h5py.File, attributes: dict[str, Any], path: Path) -> Layout:
    sizes = {}
    for name in ("done", "input_ids", "positions"):
        dataset = file.get(name)
        if not isinstance(dataset, h5py.Dataset):
            raise FormatError(f"{path} is damaged: dataset {name} is missing.")
        if dataset.ndim != 1:
            raise FormatError(f"{path} is damaged: {name} is {dataset.dtype}{list(dataset.shape)}, expected one axis.")
        sizes[name] = dataset.shape[0]
    return Layout(
        capture=attributes["capture"],
        num_rows=sizes["done"],
        num_tokens=sizes["input_ids"],
        num_positions=sizes["positions"],
        vocab_size=attributes["vocab_size"],
        top_k=attributes["top_k"],
    )


def _place(file: h5py.File, name: str, field: tuple[tuple[int, ...], np.dtype], path: Path) -> int:
    """Return the byte at which a dataset starts, after checking that it is what the format says."""
    dataset = file.get(name)
    if not isinstance(dataset, h5py.Dataset):
        raise FormatError(f"{path} is damaged: dataset {name} is missing.")
    if (dataset.shape, dataset.dtype) != field:
        raise FormatError(
            f"{path} is damaged: {name} is {dataset.dtype}{list(dataset.shape)}, expected {field[1]}{list(field[0])}."
        )
    place = dataset.id.get_offset()
    if nbytes(field) and place is None:
        raise FormatError(f"{path} was rewritten by another program: {name} is no longer contiguous. Use the original.")
    return place or 0
