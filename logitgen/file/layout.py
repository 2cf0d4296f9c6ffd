"""The file format: the datasets' names, dtypes and shapes, and the checksum of a row.

Writer and reader share this module and `header`, so both use the same format.

Shape letters: N rows of the file, T tokens, P captured positions, K kept per position, R bytes of a packed record, V
vocabulary (rows of the output head), D hidden size, G groups of its values.

Datasets (all contiguous, little-endian):

    row level       done uint8[N], crc32 uint32[N], source_row int64[N]
    token level     offsets int64[N+1], input_ids uint16|uint32[T]
    position level  position_offsets int64[N+1], positions int32[P], logsumexp float32[P], target_logprob float32[P];
                    packed: no logsumexp, and target_logprob float16[P]
      topk, sample  kept_ids uint16|uint32[P, K], kept_logprobs float16[P, K]; packed: kept uint8[P, R] instead, see
                    `packing` and `drawn`
      hidden        hidden [P, D] and, once, head_weight [V, D] and head_bias [V], if the head has one, in the teacher's
                    dtype: float32, float16, or uint16 with the bits of bfloat16; packed: hidden int8[P, D] and
                    hidden_scale uint16[P, G], see `states`; hidden_2, ... alike, states of other layers
      full          logits float16[P, V]
"""

import math
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from logitgen.errors import UsageError
from logitgen.file.drawn import DrawnPacking
from logitgen.file.packing import Packing
from logitgen.file.states import HeadForm

FORMAT_NAME = "logitgen"
FORMAT_VERSION = 1
PARTIAL_SUFFIX = ".partial"
STATUS_BYTES = 2**16
"""Room behind the data of an unfinished file for a line about the run. The complete file has none."""

CaptureKind = Literal["topk", "sample", "hidden", "full"]
Encoding = Literal["plain", "packed", "packed16"]
WITH_KEPT_IDS: tuple[CaptureKind, ...] = ("topk", "sample")
"""Capture kinds that keep some ids and their log-probs."""
ENCODINGS: dict[CaptureKind, tuple[Encoding, ...]] = dict.fromkeys(WITH_KEPT_IDS, get_args(Encoding))
ENCODINGS |= {"hidden": ("plain", "packed"), "full": ("plain",)}
"""Encodings of the kept values, by the kind of capture."""

ATTRIBUTES: dict[str, type] = {
    "format": str,
    "version": int,
    "capture": str,
    "encoding": str,
    "top_k": int,
    "vocab_size": int,
    "tokenizer_size": int,
    "teacher": str,
    "teacher_dtype": str,
    "teacher_config": str,
    "computation": str,
    "quantization": str,
    "commit": str,
    "teacher_fingerprint": str,
    "tokenizer_fingerprint": str,
    "chat_template_fingerprint": str,
    "chat_template_date": str,
    "dataset_fingerprint": str,
    "settings": str,
    "packages": str,
}
"""Attributes of a file.

Settings, packages, teacher_config, computation and quantization are JSON, fingerprints SHA-256.
"""
JSON_ATTRIBUTES = ("settings", "packages", "teacher_config", "computation")
"""Attributes that are always a JSON object."""
LATER_ATTRIBUTES = {
    "teacher_config": "{}",
    "computation": "{}",
    "chat_template_fingerprint": "",
    "chat_template_date": "",
}
"""Values of these attributes for an older file, which lacks them."""
HEAD_ATTRIBUTES: dict[str, type] = {"head_scale": float, "head_soft_cap": float, "head_crc32": int}
"""More attributes of a file of hidden states: the values for `head.Head`, and the CRC-32 of its weights."""
TEACHER_DTYPES = ("float64", "float32", "float16", "bfloat16")
STORED_DTYPES: dict[str, np.dtype] = {
    "float32": np.dtype("<f4"),
    "float16": np.dtype("<f2"),
    "bfloat16": np.dtype("<u2"),
}
"""Storage of hidden states and the head, by the teacher's dtype: numpy and HDF5 have no bfloat16."""
SETTINGS_READ = ("teacher", "teacher_gguf", "revision", "attn_implementation", "dataset", "dataset_config", "split")
"""Settings needed to show a file or to run its teacher again. An older file lacks `adapter`, which is one too."""
Array = npt.NDArray[Any]
Field = tuple[tuple[int, ...], np.dtype]
"""Shape and dtype of a dataset."""

FLOAT16_MAX = float(np.finfo(np.float16).max)
"""Stored value, or its negative, of a logit or log-prob beyond float16's range, such as a masked token's."""

FLOAT16_ERROR = 2.0**-11
"""Largest relative error of rounding to float16."""

_ROW_ITEM_BYTES = 4  # crc32


def id_dtype(vocab_size: int) -> np.dtype:
    """Return the smallest unsigned dtype that holds every token id of a vocabulary."""
    return np.dtype("<u2") if vocab_size <= 2**16 else np.dtype("<u4")


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The sizes that fix every dataset of a file.

    Attributes:
        capture: Kind of the values kept per position.
        num_rows: N.
        num_tokens: T, over all rows.
        num_positions: P, over all rows.
        vocab_size: V, the rows of the teacher's output head; padded rows count.
        top_k: K for `topk` and `sample`, 0 otherwise.
        encoding: Encoding of the kept values.
        tokenizer_size: Ids of the tokenizer; no others can be drawn. 0 if unknown.
        head: The output head, for `hidden`, or None for the others, and until the teacher is loaded.
    """

    capture: CaptureKind
    num_rows: int
    num_tokens: int
    num_positions: int
    vocab_size: int
    top_k: int
    encoding: Encoding = "plain"
    tokenizer_size: int = 0
    head: HeadForm | None = None

    @property
    def num_ids(self) -> int:
        """Ids that share a position's probability, from 0 on. None is drawn of the rows that may pad a head."""
        known = self.tokenizer_size if self.capture == "sample" else 0
        return min(known or self.vocab_size, self.vocab_size)

    def check(self) -> None:
        """Refuse to draw more ids than there are.

        Raises:
            UsageError: K is above the number of ids that can be drawn.
        """
        if self.capture == "sample" and self.top_k > self.num_ids:
            raise UsageError(
                f"--top_k must be at most the {self.num_ids} ids of the vocabulary with --capture sample, got "
                f"{self.top_k}. Lower it, or keep the likeliest with --capture topk."
            )

    @cached_property
    def packing(self) -> Packing | DrawnPacking | None:
        """Packing of kept ids and log-probs, or None where they are not packed."""
        if self.encoding == "plain" or self.capture not in WITH_KEPT_IDS:
            return None
        sizes = {"vocab_size": self.vocab_size, "k": self.top_k, "value_bits": 8 if self.encoding == "packed" else 16}
        return DrawnPacking(num_ids=self.num_ids, **sizes) if self.capture == "sample" else Packing(**sizes)

    @property
    def room(self) -> tuple[int, ...]:
        """Ids that are drawn, by the number of certain ones among them, from 0 to K."""
        return self.packing.room if isinstance(self.packing, DrawnPacking) else (self.top_k,) * (self.top_k + 1)

    @property
    def captured(self) -> dict[str, Field]:
        """Captured values of one position: shape of one entry and dtype, widest dtype first.

        The order is the order inside a transported payload. Widest first keeps every array in it aligned.
        """
        scalars: dict[str, Field] = {name: ((), np.dtype("<f4")) for name in ("logsumexp", "target_logprob")}
        if self.encoding != "plain":  # beside a packed record of 36 bytes, two of float32 would be a fifth more
            scalars = {"target_logprob": ((), np.dtype("<f2"))}
        return scalars | self._kept_fields

    @property
    def _kept_fields(self) -> dict[str, Field]:
        """Kept values of one position besides its scalars. Hidden states have none until the teacher is loaded."""
        if self.capture == "full":
            return {"logits": ((self.vocab_size,), np.dtype("<f2"))}
        if self.capture == "hidden":
            return self.head.fields(packed=self.encoding == "packed") if self.head else {}
        if self.packing:
            return {"kept": ((self.packing.record_bytes,), np.dtype("u1"))}
        return {
            "kept_ids": ((self.top_k,), id_dtype(self.vocab_size)),
            "kept_logprobs": ((self.top_k,), np.dtype("<f2")),
        }

    @property
    def layer_numbers(self) -> tuple[int, ...]:
        """Layers whose hidden states are kept beside the last."""
        return tuple(layer for layer, _ in self.head.layers) if self.head else ()

    @property
    def of_head(self) -> dict[str, Field]:
        """Full shape and dtype of the datasets that hold the output head."""
        if self.capture != "hidden" or self.head is None:
            return {}
        fields = {"head_weight": ((self.vocab_size, self.head.hidden_size), self.head.dtype)}
        return fields | ({"head_bias": ((self.vocab_size,), self.head.dtype)} if self.head.has_bias else {})

    @property
    def datasets(self) -> dict[str, Field]:
        """Full shape and dtype of every dataset, in file order."""
        rows, positions = self.num_rows, self.num_positions
        known: dict[str, Field] = {
            "done": ((rows,), np.dtype("u1")),
            "crc32": ((rows,), np.dtype("<u4")),
            "source_row": ((rows,), np.dtype("<i8")),
            "offsets": ((rows + 1,), np.dtype("<i8")),
            "position_offsets": ((rows + 1,), np.dtype("<i8")),
            "input_ids": ((self.num_tokens,), id_dtype(self.vocab_size)),
            "positions": ((positions,), np.dtype("<i4")),
        }
        captured = {name: ((positions, *entry), dtype) for name, (entry, dtype) in self.captured.items()}
        return known | self.of_head | captured

    @property
    def kept(self) -> str:
        """Kept values per position, in words."""
        words = {
            "topk": f"top {self.top_k}",
            "sample": f"{self.top_k}{'+' if self.packing else ''} drawn",
            "hidden": self.head.words if self.head else "hidden states",
            "full": "all logits",
        }[self.capture]
        return words if self.encoding == "plain" else f"{words}, {self.encoding}"

    def rounding(self, values: Array) -> Array:
        """Return the largest rounding error of stored logits or log-probs [P, ...]."""
        if self.capture == "hidden":
            return np.zeros_like(values)
        if isinstance(self.packing, DrawnPacking) or (self.packing and self.packing.value_bits == 8):
            return self.packing.rounding(values)
        return np.asarray(np.abs(values) * FLOAT16_ERROR)

    @property
    def bytes_per_position(self) -> int:
        """Bytes that travel and are stored for one captured position, scalars included."""
        return sum(nbytes(field) for field in self.captured.values())

    @property
    def data_bytes(self) -> int:
        """Bytes of all datasets together; before them lies the head."""
        return sum(nbytes(field) for field in self.datasets.values())

    def payload_bytes(self, num_rows: Array, num_positions: Array) -> Array:
        """Return the payload sizes of batches with these numbers of rows and captured positions, [num_batches] each."""
        return np.asarray(num_rows * _ROW_ITEM_BYTES + num_positions * self.bytes_per_position)

    def payload_slices(self, num_rows: int, num_positions: int) -> dict[str, slice]:
        """Return the place of each array in a batch's payload, in bytes: `crc32` per row, then the captured fields."""
        sizes = {"crc32": num_rows * _ROW_ITEM_BYTES} | {
            name: num_positions * nbytes(field) for name, field in self.captured.items()
        }
        slices, start = {}, 0
        for name, size in sizes.items():
            slices[name] = slice(start, start + size)
            start += size
        return slices


def nbytes(field: Field) -> int:
    """Return the size in bytes of an array of this shape and dtype."""
    shape, dtype = field
    return math.prod(shape) * dtype.itemsize


def row_crc32(row: int, source_row: int, arrays: Iterable[Array]) -> int:
    """Checksum one row: its number, its source row, its tokens, positions and all captured values.

    The row number goes in first, so two rows that changed places are found too.

    Args:
        row: Number of the row in the file.
        source_row: Row of the split it comes from.
        arrays: `input_ids`, `positions`, then the captured fields in the order of `Layout.captured`, each with the
            dtype it has in the file.
    """
    return crc32([np.array([row, source_row], "<i8"), *arrays])


def crc32(arrays: Iterable[Array]) -> int:
    """Checksum the bytes of arrays, one after another."""
    checksum = 0
    for array in arrays:
        checksum = zlib.crc32(np.ascontiguousarray(array).data, checksum)
    return checksum
