"""Merge the files of independent workers into one, in split order: worker after worker, as the split was cut."""

import sys
from pathlib import Path

import h5py
import numpy as np


def main() -> None:
    """Merge the files in a folder."""
    folder = Path(sys.argv[1])
    parts = [h5py.File(path) for path in sorted(folder.glob("worker_*.h5"))]
    with h5py.File(folder / "merged.h5", "w") as merged:
        for name in parts[0]:
            merged[name] = np.concatenate([part[name][:] for part in parts])
            print("first row", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
