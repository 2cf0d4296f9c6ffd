"""The head of a file: HDF5's own structures and the attributes, written once and never changed again.

A file begins with 512 bytes of plain text, which HDF5 programs skip. They give the size of the head and its SHA-256.
HDF5 puts its structures in one block after it, then the datasets back to back. A damaged head is therefore found before
HDF5 reads it: of 150 files with random bytes changed in the head, 3 had HDF5 in an endless loop.
"""

import errno
import hashlib
import json
import math
import os
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import h5py
import numpy as np

from logitgen.errors import FormatError
from logitgen.file.layout import (
    ATTRIBUTES,
    ENCODINGS,
    FORMAT_NAME,
    FORMAT_VERSION,
    HEAD_ATTRIBUTES,
    JSON_ATTRIBUTES,
    LATER_ATTRIBUTES,
    PARTIAL_SUFFIX,
    SETTINGS_READ,
    STATUS_BYTES,
    STORED_DTYPES,
    TEACHER_DTYPES,
    WITH_KEPT_IDS,
    CaptureKind,
    Field,
    Layout,
    nbytes,
)
from logitgen.file.states import HeadForm, layers_among, name_of

Attributes = dict[str, str | int | float]
Places = Mapping[str, int]  # the byte at which each dataset starts
_TEXT_BYTES = 512
_TEXT = "logitgen file, format version {version}\nHDF5 from byte 512 on\nhead_bytes {size}\nhead_sha256 {digest}\n"
_TEXT_PATTERN = re.compile(_TEXT.format(version=r"(\d{1,9})", size=r"(\d{1,9})", digest="[0-9a-f]{64}"))
_METADATA_BYTES = 2**13
"""Room for HDF5's structures, and unit of the room for the attributes: so HDF5 never takes a second block."""
_DTYPE_KINDS = {str: "S", int: "i", float: "f"}
_MAX_HEAD_BYTES = 2**20
_H5PY_ERRORS = (OSError, RuntimeError, KeyError, TypeError, ValueError)
"""Errors of h5py over garbled structures."""


@dataclass(frozen=True)
class Header:
    """The contents of a file's head.

    Attributes:
        attributes: The file's attributes, `settings` and `packages` as dictionaries.
        layout: The file's sizes.
        places: The byte at which each dataset starts.
    """

    attributes: dict[str, Any]
    layout: Layout
    places: Places

    @property
    def size_bytes(self) -> int:
        """Size of the complete file."""
        return min(self.places.values()) + self.layout.data_bytes


def create(path: Path, layout: Layout, attributes: Attributes) -> Places:
    """Create a file with its head and all its datasets, their values unset. Return the byte at which each starts.

    Raises:
        OSError: The system refuses it.
    """
    try:
        places = _create(path, layout, attributes)
    except RuntimeError as error:  # h5py raises it for a file that cannot be made as large
        number = re.search(r"errno = (\d+)", str(error))
        raise OSError(int(number[1]) if number else errno.EIO, str(error)) from error
    with path.open("r+b") as plain:
        head_bytes = min(places.values())
        head = plain.read(head_bytes)[_TEXT_BYTES:]
        plain.seek(0)
        plain.write(_text(head_bytes, head))
    return places


def _create(path: Path, layout: Layout, attributes: Attributes) -> Places:
    creation = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    creation.set_layout(h5py.h5d.CONTIGUOUS)
    creation.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    creation.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    creation.set_obj_track_times(False)
    units = 2 + sum(len(str(value).encode()) for value in attributes.values()) // _METADATA_BYTES
    sizes = {"userblock_size": _TEXT_BYTES, "meta_block_size": units * _METADATA_BYTES}
    places = {}
    with h5py.File(path, "w", locking=False, **sizes) as file:
        for name, value in attributes.items():  # text of a fixed length: HDF5 crashes over a forged heap of other text
            file.attrs[name] = np.bytes_(value.encode()) if isinstance(value, str) else value
        for name, (shape, dtype) in layout.datasets.items():
            space = h5py.h5s.create_simple(shape)
            dataset = h5py.h5d.create(file.id, name.encode(), h5py.h5t.py_create(dtype), space, creation)
            places[name] = dataset.get_offset()
    return places


def file_bytes(layout: Layout, attributes: Attributes) -> int:
    """Return the exact size of a file with these sizes and attributes, by creating its head."""
    smallest = replace(layout, num_rows=1, num_tokens=1, num_positions=1)  # HDF5's structures do not grow with them
    with tempfile.TemporaryDirectory() as folder:
        head_bytes = min(create(Path(folder) / "head", smallest, attributes).values())
    return head_bytes + layout.data_bytes


def has_signature(path: Path, *, unfinished: bool = False) -> bool:
    """Tell whether a file begins with logitgen's text, damaged or not. An unfinished file may still lack it."""
    with path.open("rb") as file:
        text = file.read(_TEXT_BYTES)
    return text.startswith(_TEXT.partition("{")[0].encode()) or (unfinished and not text.strip(b"\0"))


def read(path: Path) -> Header:
    """Read the head of a file, complete or not, and trust no size before it is checked.

    Raises:
        FormatError: It does not exist, is no logitgen file, is of a newer version, or is damaged.
    """
    if "\0" in str(path) or not os.path.isfile(path):  # noqa: PTH113 (which is False for names too long)
        left = os.path.isfile(f"{path}{PARTIAL_SUFFIX}")  # noqa: PTH113
        hint = " Its .partial exists. Finish that capture first." if left else ""
        raise FormatError(f"{path} is not a file.{hint}")
    try:
        end = _check_head(path)
        with h5py.File(path, "r", locking=False) as file:
            attributes = _attributes(file, path)
            layout = _layout(file, attributes, path)
            places = {name: _place(file, name, field, path) for name, field in layout.datasets.items()}
    except _H5PY_ERRORS as error:
        if "truncated file" in str(error):
            raise _truncated(path) from error
        if isinstance(error, PermissionError):
            raise FormatError(f"{path} cannot be read: {error.strerror}.") from error
        raise FormatError(f"{path} is damaged: {error}. Copy it again.") from error
    for name, field in layout.datasets.items():
        if places[name] != end:
            raise FormatError(f"{path} is damaged: {name} starts at the wrong byte. Copy it again.")
        end += nbytes(field)
    most_bytes = end + STATUS_BYTES if path.suffix == PARTIAL_SUFFIX else end
    if not end <= path.stat().st_size <= most_bytes:
        raise FormatError(f"{path} must have {end:,} bytes, got {path.stat().st_size:,}. Copy it again.")
    return Header(attributes, layout, places)


def _text(head_bytes: int, head: bytes) -> bytes:
    return _TEXT.format(version=FORMAT_VERSION, size=head_bytes, digest=hashlib.sha256(head).hexdigest()).encode()


def _check_head(path: Path) -> int:
    """Compare the head with its checksum, and return its size in bytes."""
    with path.open("rb") as file:
        text = file.read(_TEXT_BYTES)
        found = _TEXT_PATTERN.match(text.decode("latin-1"))
        if not found:
            raise FormatError(
                f"{path} is not a logitgen file: it has another signature. "
                "Give the original, not a copy that another HDF5 program made."
            )
        version, head_bytes = int(found[1]), int(found[2])
        if version > FORMAT_VERSION:
            raise FormatError(
                f"{path} has format version {version}, this logitgen reads versions up to {FORMAT_VERSION}. "
                "Update logitgen."
            )
        if head_bytes <= _TEXT_BYTES:
            raise FormatError(f"{path} is damaged: its head cannot have {head_bytes} bytes. Copy it again.")
        head = file.read(min(head_bytes, _MAX_HEAD_BYTES) - _TEXT_BYTES)
    if len(head) < head_bytes - _TEXT_BYTES:
        raise _truncated(path)
    if _text(head_bytes, head).ljust(_TEXT_BYTES, b"\0") != text:
        raise FormatError(f"{path} is damaged: its head does not match its checksum. Copy it again.")
    return head_bytes


def _truncated(path: Path) -> FormatError:
    return FormatError(f"{path} is truncated. Copy it again.")


def _attributes(file: h5py.File, path: Path) -> dict[str, Any]:
    plain = _read_attributes(file, ATTRIBUTES, path)
    plain |= _read_attributes(file, HEAD_ATTRIBUTES if plain["capture"] == "hidden" else {}, path)
    if unknown := sorted(set(file.attrs) - set(plain)):
        raise FormatError(f"{path} is damaged: the format has no attribute {unknown[0]!r:.80}.")
    if plain["format"] != FORMAT_NAME or plain["version"] != FORMAT_VERSION:
        raise FormatError(f"{path} is damaged: attributes format and version do not match its first bytes.")
    _check_capture(plain, path)
    for name in JSON_ATTRIBUTES:
        try:
            plain[name] = json.loads(plain[name])
        except (ValueError, RecursionError):
            plain[name] = None
        if not isinstance(plain[name], dict):
            raise FormatError(f"{path} is damaged: attribute {name} is not a JSON object.")
    for name, absent in {**dict.fromkeys(SETTINGS_READ, False), "adapter": None}.items():
        if not isinstance(plain["settings"].get(name, absent), str | None):
            raise FormatError(f"{path} is damaged: its settings lack {name}.")
    return plain


def _read_attributes(file: h5py.File, kinds: Mapping[str, type], path: Path) -> dict[str, Any]:
    """Read attributes after a check of their types: HDF5 does not survive every forged attribute."""
    plain: dict[str, Any] = {}
    for name, kind in kinds.items():
        if name in LATER_ATTRIBUTES and name not in file.attrs:
            plain[name] = LATER_ATTRIBUTES[name]
            continue
        known = file.attrs.get_id(name) if name in file.attrs else None
        if known is None or known.shape != () or known.dtype.kind != _DTYPE_KINDS[kind]:
            raise FormatError(f"{path} is damaged: attribute {name} is missing or not {kind.__name__}.")
        value = file.attrs[name]
        plain[name] = value.decode() if kind is str else kind(value)
    return plain


def _check_capture(plain: dict[str, Any], path: Path) -> None:
    """Check the attributes on the capture of the logits."""
    capture, vocab_size = plain["capture"], plain["vocab_size"]
    num_ids = min(plain["tokenizer_size"] or vocab_size, vocab_size) if capture == "sample" else vocab_size
    least, most = (1, num_ids) if capture in WITH_KEPT_IDS else (0, 0)
    if capture not in get_args(CaptureKind) or vocab_size < 1 or not least <= plain["top_k"] <= most:
        raise FormatError(f"{path} is damaged: attributes capture, vocab_size and top_k contradict one another.")
    dtypes = STORED_DTYPES if capture == "hidden" else TEACHER_DTYPES
    for name, allowed in (("encoding", ENCODINGS[capture]), ("teacher_dtype", dtypes)):
        if plain[name] not in allowed:
            raise FormatError(f"{path} is damaged: {name} must be one of {', '.join(allowed)}.")
    if not (math.isfinite(plain.get("head_scale", 1)) and 0 <= plain.get("head_soft_cap", 0) < math.inf):
        raise FormatError(f"{path} is damaged: head_scale must be finite, and head_soft_cap finite and at least 0.")


def _dataset(file: h5py.File, name: str, path: Path) -> h5py.Dataset:
    # A link could lead out of the file, to any other file.
    found = file[name] if isinstance(file.get(name, getlink=True), h5py.HardLink) else None
    if not isinstance(found, h5py.Dataset):
        raise FormatError(f"{path} is damaged: dataset {name} is missing.")
    return found


def _layout(file: h5py.File, attributes: dict[str, Any], path: Path) -> Layout:
    datasets = {"num_rows": "done", "num_tokens": "input_ids", "num_positions": "positions"}
    layout = Layout(
        **{size: _last_size(file, name, 1, path) for size, name in datasets.items()},
        capture=attributes["capture"],
        vocab_size=attributes["vocab_size"],
        top_k=attributes["top_k"],
        encoding=attributes["encoding"],
        tokenizer_size=attributes["tokenizer_size"],
        head=_head_form(file, attributes, path) if attributes["capture"] == "hidden" else None,
    )
    is_short = layout.packing and "kept" in file and _last_size(file, "kept", 2, path) < layout.packing.record_bytes
    if "threshold" in file or ("kept" in file and "logsumexp" in file) or is_short:
        raise FormatError(f"{path} was written by an older logitgen, in another form. Capture it again.")
    return layout


def _head_form(file: h5py.File, attributes: dict[str, Any], path: Path) -> HeadForm:
    return HeadForm(
        hidden_size=_last_size(file, "head_weight", 2, path),
        dtype=STORED_DTYPES[attributes["teacher_dtype"]],
        has_bias="head_bias" in file,
        layers=tuple((layer, _last_size(file, name_of(layer), 2, path)) for layer in layers_among(file)),
    )


def _last_size(file: h5py.File, name: str, num_axes: int, path: Path) -> int:
    """Return the size of a dataset's last axis, after a check of the number of axes."""
    dataset = _dataset(file, name, path)
    if dataset.ndim != num_axes or not dataset.size:
        found, axes = f"{dataset.dtype}{list(dataset.shape)}", ("one axis", "two axes")[num_axes - 1]
        raise FormatError(f"{path} is damaged: {name} is {found}, expected {axes}, not empty.")
    return int(dataset.shape[-1])


def _place(file: h5py.File, name: str, field: Field, path: Path) -> int:
    """Return the byte at which a dataset starts, after a check that it fits the format."""
    dataset = _dataset(file, name, path)
    if (dataset.shape, dataset.dtype) != field:
        raise FormatError(
            f"{path} is damaged: {name} is {dataset.dtype}{list(dataset.shape)}, expected {field[1]}{list(field[0])}."
        )
    if (place := dataset.id.get_offset()) is None or dataset.external:
        raise FormatError(f"{path} was rewritten by another program: {name} is no longer contiguous. Use the original.")
    return int(place)
