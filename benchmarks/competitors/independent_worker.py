"""One of several independent processes: its part of the split goes into a file of its own."""

from pathlib import Path

import h5py
from flat import append
from recipe import capture, parse_options


def main() -> None:
    """Capture this worker's part."""
    options = parse_options(worker_id=int, total_workers=int)
    with h5py.File(Path(options.output) / f"worker_{options.worker_id:03}.h5", "w") as file:
        for fields in capture(options, options.worker_id, options.total_workers):
            append(file, fields)


if __name__ == "__main__":
    main()
