"""Rows as an ArrayRecord file, each a `tf.train.Example`: names and flat lists of numbers.

The message is a few nested parts, so it is written here, without TensorFlow or protobuf. A part is its field's number,
its length in bytes and its content. Lists of numbers are packed: floats as they are, integers as varints.

Source: tensorflow/core/example/feature.proto (the numbers of the fields), and protobuf's "Encoding" page.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from logitgen.errors import UsageError
from logitgen.file.layout import Array

_SHIFTS = np.arange(0, 35, 7, dtype=np.uint64)
"""Of a varint's groups of seven bits: five hold every token id, and every length that a row has."""

_VALUES, _KEY, _VALUE, _FEATURE, _FEATURES = 1, 1, 2, 1, 1
_FLOAT_LIST, _INT64_LIST = 2, 3


def write_records(rows: Iterable[Mapping[str, Array]], path: Path) -> int:
    """Write the rows one by one, each as a group of its own, so that any row is read alone.

    Returns:
        The number of rows.

    Raises:
        UsageError: The package array_record is missing.
        OSError: The file cannot be written.
    """
    try:
        from array_record.python.array_record_module import ArrayRecordWriter
    except ImportError as error:
        raise UsageError(
            "The export for maxtext needs array_record. Install it (pip install array_record), or choose another "
            "--format."
        ) from error
    try:
        writer = ArrayRecordWriter(str(path), "group_size:1")
        num_rows = 0
        for row in rows:
            writer.write(tf_example(row))
            num_rows += 1
        writer.close()
    except RuntimeError as error:  # "write() failed: No space left on device; writing ...; at byte 0; ..."
        raise OSError(str(error).split(";")[0]) from error
    return num_rows


def tf_example(features: Mapping[str, Array]) -> bytes:
    """Serialise arrays of any shape, flattened: floats as float32, integers of 0 to 2**35 - 1 as int64."""
    entries = (_part(_KEY, name.encode()) + _part(_VALUE, _feature(array)) for name, array in features.items())
    return _part(_FEATURES, b"".join(_part(_FEATURE, entry) for entry in entries))


def _feature(array: Array) -> bytes:
    if array.dtype.kind == "f":
        return _part(_FLOAT_LIST, _part(_VALUES, array.astype("<f4").tobytes()))
    return _part(_INT64_LIST, _part(_VALUES, _varints(array)))


def _part(field: int, content: bytes) -> bytes:
    """Give a content its field's number, its wire type, which is 2, and its length."""
    return bytes([field << 3 | 2]) + _varints(np.array(len(content))) + content


def _varints(numbers: Array) -> bytes:
    """Encode numbers seven bits a byte, the lowest first, with the high bit set where more bytes follow."""
    groups_NG = numbers.astype(np.uint64).reshape(-1, 1) >> _SHIFTS
    more_NG = groups_NG >= 128
    is_used_NG = np.hstack([np.ones((len(groups_NG), 1), bool), more_NG[:, :-1]])
    bytes_NG = (groups_NG & np.uint64(127)) + more_NG * np.uint64(128)
    return bytes(bytes_NG[is_used_NG].astype(np.uint8))
