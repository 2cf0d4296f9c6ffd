"""Merge the files of independent workers into one, in split order: worker after worker, as the split was cut."""

import argparse
import sys
from pathlib import Path

import h5py

_BLOCK = 2**14


def main() -> None:
    """Merge the files in a folder, and remove them."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("total_workers", type=int)
    options = parser.parse_args()
    paths = [options.folder / f"worker_{worker_id:03}.h5" for worker_id in range(options.total_workers)]
    parts = [h5py.File(path) for path in paths]
    with h5py.File(options.folder / "merged.h5", "w") as merged:
        for name, first in parts[0].items():
            num_entries = sum(len(part[name]) for part in parts)
            merged.create_dataset(name, (num_entries, *first.shape[1:]), first.dtype)
        print("first row", file=sys.stderr, flush=True)
        for name, values in merged.items():
            start = 0
            for part in parts:
                for begin in range(0, len(part[name]), _BLOCK):
                    block = part[name][begin : begin + _BLOCK]
                    values[start : start + len(block)] = block
                    start += len(block)
    for part, path in zip(parts, paths, strict=True):
        part.close()
        path.unlink()


if __name__ == "__main__":
    main()
