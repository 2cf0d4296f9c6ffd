"""One Zarr store that all ranks write into at once: every rank has a region of whole chunks of its own."""

import os
from pathlib import Path

import datasets
import numpy as np
import torch.distributed as dist
import zarr
from recipe import capture, id_dtype, parse_options, read_tokens, say_first_row
from transformers import AutoConfig

_CHUNK = 1024


def create(path: Path, tokens: datasets.Dataset, world_size: int, k: int, ids: str) -> None:
    """Create the store, with all that is known before the teacher runs."""
    lengths = np.array([len(input_ids) for input_ids in tokens["input_ids"]])
    starts, end = [], 0
    for rank in range(world_size):
        rows = tokens.shard(num_shards=world_size, index=rank)["row"]
        ends = end + np.cumsum(np.maximum(lengths[list(rows)] - 1, 0))
        starts += [end, *ends[:-1]]
        end = -(-int(ends[-1]) // _CHUNK) * _CHUNK  # so that no chunk has two writers
    store = zarr.create_group(path)
    input_ids = np.concatenate(tokens["input_ids"][:]).astype(ids)
    for name, values in {"num_tokens": lengths, "position_starts": np.array(starts), "input_ids": input_ids}.items():
        store.create_array(name, data=values)
    fields = {"kept_ids": ((k,), ids), "kept_logprobs": ((k,), "float16")}
    fields |= {"logsumexp": ((), "float32"), "target_logprob": ((), "float32")}
    for name, (entry, dtype) in fields.items():
        store.create_array(name, shape=(end, *entry), chunks=(_CHUNK, *entry), dtype=dtype)


def main() -> None:
    """Capture this rank's part of the split."""
    options = parse_options()
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo")
    path = Path(options.output) / "store.zarr"
    if rank == 0:
        vocab_size = AutoConfig.from_pretrained(options.teacher).vocab_size
        create(path, read_tokens(options), world_size, options.top_k, id_dtype(vocab_size))
    dist.barrier()
    store = zarr.open_group(path, mode="r+")
    starts = store["position_starts"][:]
    for fields in capture(options, rank, world_size):
        start = int(starts[fields["row"][0]])
        for name in ("kept_ids", "kept_logprobs", "logsumexp", "target_logprob"):
            store[name][start : start + len(fields[name])] = fields[name]
        say_first_row()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
