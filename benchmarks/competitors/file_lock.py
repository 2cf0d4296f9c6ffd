"""One HDF5 file that every process writes into: under a lock each opens it, adds its batch, and closes it."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import h5py
from flat import append, create
from recipe import batches, keep_top_k, load_teacher, own_device, parse_options, read_tokens, unpad


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock of a file, alone among all processes of the machine."""
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def main() -> None:
    """Capture this process's part of the split."""
    options = parse_options()
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    tokens = read_tokens(options).shard(num_shards=world_size, index=rank)
    teacher = load_teacher(options, own_device())
    path = Path(options.output) / "locked.h5"
    with locked(path):
        if not path.exists():
            create(path, options.top_k, teacher.config.vocab_size).close()
    for batch in batches(tokens):
        fields = unpad(keep_top_k(teacher, batch, options.top_k))
        with locked(path), h5py.File(path, "r+") as file:
            append(file, fields)


if __name__ == "__main__":
    main()
