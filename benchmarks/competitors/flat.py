"""An HDF5 file of flat datasets that grow: rows one after the other, in the order in which they are written."""

import h5py
import numpy as np
from recipe import say_first_row

_CHUNK = 1024


def append(file: h5py.File, fields: dict[str, np.ndarray]) -> None:
    """Write the fields of some rows behind those that are there."""
    for name, values in fields.items():
        if name not in file:
            entry = values.shape[1:]
            file.create_dataset(name, (0, *entry), values.dtype, maxshape=(None, *entry), chunks=(_CHUNK, *entry))
        dataset = file[name]
        start = len(dataset)
        dataset.resize(start + len(values), axis=0)
        dataset[start:] = values
    say_first_row()
