"""The reader: opens a file anywhere, with numpy and h5py alone, and returns rows by number.

HDF5 gives the place of each dataset. From then on the file is mapped into memory: a row costs one page fault or two,
and forked processes may use an open file.
"""

from pathlib import Path

import numpy as np

from logitgen.errors import FormatError
from logitgen.file import states
from logitgen.file.header import read
from logitgen.file.layout import Array, id_dtype

_BLOCK_POSITIONS = 2**22


class LogitsFile:
    """A file, mapped into memory.

    Attributes:
        path: Path of the file.
        layout: Its sizes.
        attributes: Its attributes, `settings` and `packages` as dictionaries.
        arrays: Every dataset by name, read-only. See `layout` for shapes and dtypes.
    """

    def __init__(self, path: str | Path, *, partial: bool = False) -> None:
        """Open a file.

        Args:
            path: Path of the file.
            partial: Open it even if rows are missing; `arrays["done"]` tells which are there.

        Raises:
            FormatError: It does not exist, is not a logitgen file, is of a newer version, is damaged or not complete.
        """
        self.path = Path(path)
        header = read(self.path)
        self.layout, self.attributes = header.layout, header.attributes
        self.arrays: dict[str, Array] = {
            name: np.memmap(self.path, dtype, "r", header.places[name], shape)
            for name, (shape, dtype) in self.layout.datasets.items()
        }
        for name, end in (("offsets", self.layout.num_tokens), ("position_offsets", self.layout.num_positions)):
            if (self.arrays[name][0], self.arrays[name][-1]) != (0, end):
                raise FormatError(f"{self.path} is damaged: {name} must run from 0 to {end}. Copy it again.")
        missing = len(self) - int(np.count_nonzero(self.arrays["done"] == 1))
        if missing and not partial:
            raise FormatError(
                f"{self.path} is not complete: {missing} of {len(self)} rows are missing. Finish the run."
            )

    def __len__(self) -> int:
        return self.layout.num_rows

    def row(self, row: int) -> dict[str, Array]:
        """Read one row, unpacked if it is stored packed, bfloat16 as float32.

        Args:
            row: Row number. A negative number counts from the end.

        Returns:
            `input_ids` [T], and for its P captured positions `positions` [P], `target_logprob` [P], `logsumexp` [P] if
            the encoding is plain, and the kept values: `kept_ids` and `kept_logprobs` [P, K], `hidden` [P, D] and those
            of other layers, or `logits` [P, V]. Dtypes as in the file; packed values of 8 bits are float32. Packed
            draws are float32: -inf where a position has fewer tokens than columns, and the mean for those tokens that
            were not certain.

        Raises:
            IndexError: There is no such row.
            FormatError: It is damaged.
        """
        data = self.stored(row)
        if self.layout.packing:
            try:
                ids_PK, logprobs_PK = self.layout.packing.unpack(data.pop("kept"))
            except ValueError as error:
                raise FormatError(f"{self.path} is damaged: {error} in row {row}. Copy it again.") from error
            data |= {"kept_ids": ids_PK.astype(id_dtype(self.layout.vocab_size)), "kept_logprobs": logprobs_PK}
        for name in self.layout.head.widths if self.layout.head else ():
            if self.layout.encoding == "packed":
                data[name] = states.unpack(data[name], data.pop(f"{name}_scale"))
            elif self.attributes["teacher_dtype"] == "bfloat16":
                data[name] = states.from_bfloat16(data[name])
        return data

    def stored(self, row: int) -> dict[str, Array]:
        """Read one row as it is stored: the arrays its checksum covers, after its number and its source row."""
        number = row + len(self) if row < 0 else row
        if not 0 <= number < len(self):
            raise IndexError(f"Row must be between 0 and {len(self) - 1}, got {row}.")
        tokens = slice(*self.arrays["offsets"][number : number + 2])
        positions = slice(*self.arrays["position_offsets"][number : number + 2])
        names = ["positions", *self.layout.captured]
        return {"input_ids": self.arrays["input_ids"][tokens]} | {name: self.arrays[name][positions] for name in names}

    def perplexity(self) -> float:
        """Return the teacher's perplexity over all captured positions: exp of the mean of -`target_logprob`, or inf."""
        target_logprob = self.arrays["target_logprob"]
        blocks = range(0, len(target_logprob), _BLOCK_POSITIONS)
        total = sum(float(target_logprob[start : start + _BLOCK_POSITIONS].sum(dtype=np.float64)) for start in blocks)
        return perplexity_of(-total / len(target_logprob))


def perplexity_of(cross_entropy: float) -> float:
    """Return exp of a cross-entropy in nats: inf where masked targets make it larger than any number."""
    with np.errstate(over="ignore"):
        return float(np.exp(cross_entropy))
