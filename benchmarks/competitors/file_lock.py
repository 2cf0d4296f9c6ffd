"""One HDF5 file that every process writes into: under a lock each opens it, adds its batch, and closes it."""

import fcntl
import os
from pathlib import Path

import h5py
from flat import append
from recipe import capture, parse_options


def main() -> None:
    """Capture this process's part of the split."""
    options = parse_options()
    path = Path(options.output) / "locked.h5"
    for fields in capture(options, int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])):
        with path.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            with h5py.File(path, "a") as file:
                append(file, fields)


if __name__ == "__main__":
    main()
