"""One Zarr store that all ranks write into at once: every rank has a region of whole chunks of its own."""

import os
from pathlib import Path

import datasets
import numpy as np
import torch.distributed as dist
import zarr
from recipe import (
    batches,
    id_dtype,
    keep_top_k,
    load_teacher,
    own_device,
    parse_options,
    read_tokens,
    say_first_row,
    unpad,
)

_CHUNK = 1024
_OF_ROWS = ("row", "num_tokens", "input_ids")


def place_rows(tokens: datasets.Dataset, world_size: int) -> tuple[np.ndarray, np.ndarray, int]:
    """Lengths of the rows, the position at which each one starts, and how many positions there are in all."""
    lengths = np.array([len(input_ids) for input_ids in tokens["input_ids"]])
    starts, end = [], 0
    for rank in range(world_size):
        rows = tokens.shard(num_shards=world_size, index=rank)["row"]
        ends = end + np.cumsum(np.maximum(lengths[list(rows)] - 1, 0))
        starts += [end, *ends[:-1]]
        end = -(-int(ends[-1]) // _CHUNK) * _CHUNK  # so that no chunk has two writers
    return lengths, np.array(starts), end


def create(path: Path, tokens: datasets.Dataset, world_size: int, k: int, vocab_size: int) -> None:
    """Create the store, with all that is known before the teacher runs."""
    lengths, starts, num_positions = place_rows(tokens, world_size)
    store = zarr.create_group(path)
    input_ids = np.concatenate(tokens["input_ids"][:]).astype(id_dtype(vocab_size))
    for name, values in {"num_tokens": lengths, "position_starts": starts, "input_ids": input_ids}.items():
        store.create_array(name, data=values)
    fields = {"kept_ids": ((k,), id_dtype(vocab_size)), "kept_logprobs": ((k,), "float16")}
    fields |= {"logsumexp": ((), "float32"), "target_logprob": ((), "float32")}
    for name, (entry, dtype) in fields.items():
        store.create_array(name, shape=(num_positions, *entry), chunks=(_CHUNK, *entry), dtype=dtype)


def main() -> None:
    """Capture this rank's part of the split."""
    options = parse_options()
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo")
    tokens = read_tokens(options)
    teacher = load_teacher(options, own_device())
    path = Path(options.output) / "store.zarr"
    if rank == 0:
        create(path, tokens, world_size, options.top_k, teacher.config.vocab_size)
    dist.barrier()
    store = zarr.open_group(path, mode="r+")
    starts = store["position_starts"][:]
    for batch in batches(tokens.shard(num_shards=world_size, index=rank)):
        fields = unpad(keep_top_k(teacher, batch, options.top_k))
        start = int(starts[fields["row"][0]])
        for name, values in fields.items():
            if name not in _OF_ROWS:
                store[name][start : start + len(values)] = values
        say_first_row()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
