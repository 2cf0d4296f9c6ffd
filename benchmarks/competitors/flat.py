"""An HDF5 file of flat datasets that grow: rows one after the other, in the order in which they are written."""

from pathlib import Path

import h5py
import numpy as np
from recipe import id_dtype, say_first_row

_CHUNK = 1024


def create(path: Path, k: int, vocab_size: int) -> h5py.File:
    """Create a file without rows."""
    file = h5py.File(path, "w")
    ids = id_dtype(vocab_size)
    fields = {"row": ((), "int64"), "num_tokens": ((), "int64"), "input_ids": ((), ids)}
    fields |= {"kept_ids": ((k,), ids), "kept_logprobs": ((k,), "float16")}
    fields |= {"logsumexp": ((), "float32"), "target_logprob": ((), "float32")}
    for name, (entry, dtype) in fields.items():
        file.create_dataset(name, (0, *entry), dtype, maxshape=(None, *entry), chunks=(_CHUNK, *entry))
    return file


def append(file: h5py.File, fields: dict[str, np.ndarray]) -> None:
    """Write the fields of some rows behind those that are there."""
    for name, values in fields.items():
        dataset = file[name]
        start = len(dataset)
        dataset.resize(start + len(values), axis=0)
        dataset[start:] = values
    say_first_row()
