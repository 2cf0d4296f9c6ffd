"""A process per rank and one that writes: an HDF5 group per row, its datasets compressed with gzip."""

import argparse
import os
from multiprocessing.queues import Queue
from pathlib import Path
from queue import Empty

import h5py
import numpy as np
import torch.multiprocessing as mp
from recipe import capture, parse_options, say_first_row

_MOST_WAITING = 5
_GZIP_LEVEL = 6


def work(rank: int, options: argparse.Namespace, queue: Queue) -> None:
    """Capture a part of the split, batch by batch into the queue."""
    os.environ["LOCAL_RANK"] = str(rank)
    for fields in capture(options, rank, options.num_ranks):
        queue.put(fields)
    queue.put(None)


def write(file: h5py.File, fields: dict[str, np.ndarray]) -> None:
    """Write a group for every row of a batch."""
    token_ends = np.cumsum(fields["num_tokens"])[:-1]
    position_ends = np.cumsum(np.maximum(fields["num_tokens"] - 1, 0))[:-1]
    groups = [file.create_group(f"row_{row}") for row in fields["row"]]
    for name in ("input_ids", "kept_ids", "kept_logprobs", "logsumexp", "target_logprob"):
        ends = token_ends if name == "input_ids" else position_ends
        for group, values in zip(groups, np.split(fields[name], ends), strict=True):
            compression = {"compression": "gzip", "compression_opts": _GZIP_LEVEL} if len(values) else {}
            group.create_dataset(name, data=values, **compression)
    say_first_row()


def main() -> None:
    """Start the ranks, and write what they yield."""
    options = parse_options(num_ranks=int)
    queue = mp.get_context("spawn").Queue(_MOST_WAITING)
    ranks = mp.spawn(work, (options, queue), nprocs=options.num_ranks, join=False)
    num_running = options.num_ranks
    with h5py.File(Path(options.output) / "groups.h5", "w") as file:
        while num_running:
            try:
                fields = queue.get(timeout=1)
            except Empty:
                ranks.join(timeout=0)  # raises what a rank raised
                continue
            if fields is None:
                num_running -= 1
            else:
                write(file, fields)
    ranks.join()


if __name__ == "__main__":
    main()
