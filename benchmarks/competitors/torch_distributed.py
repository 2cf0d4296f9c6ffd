"""torch.distributed by hand: a shard per rank, padded blocks gathered on rank 0, which writes in the loop."""

from contextlib import nullcontext
from pathlib import Path

import h5py
import torch
import torch.distributed as dist
from flat import append
from recipe import BATCH_ROWS, keep_top_k, load_teacher, own_device, pad, parse_options, read_tokens, unpad
from torch import Tensor
from torch.nn.functional import pad as pad_tensor

_NO_ROW = {"row": -1, "input_ids": [0, 0]}


def gather_padded(block: dict[str, Tensor]) -> dict[str, Tensor]:
    """Gather the blocks of all ranks on rank 0, padded to the longest row of any of them; nothing elsewhere."""
    mine = block["input_ids"].shape[1]
    longest = torch.tensor(mine, device=block["row"].device)
    dist.all_reduce(longest, dist.ReduceOp.MAX)
    gathered = {}
    for name, values in block.items():
        if values.ndim > 1:
            values = pad_tensor(values, (0, 0) * (values.ndim - 2) + (0, int(longest) - mine))
        values = values.contiguous()
        parts = [torch.empty_like(values) for _ in range(dist.get_world_size())] if dist.get_rank() == 0 else None
        dist.gather(values, parts, dst=0)
        if parts:
            gathered[name] = torch.cat(parts)
    return {name: values[gathered["row"] >= 0] for name, values in gathered.items()}


def main() -> None:
    """Capture the split, on every rank of the launch."""
    options = parse_options()
    device = own_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    rank, world_size = dist.get_rank(), dist.get_world_size()
    if rank == 0:
        read_tokens(options)  # the others find it in the cache
    dist.barrier()
    tokens = read_tokens(options)
    shard = tokens.shard(num_shards=world_size, index=rank)
    teacher = load_teacher(options, device)

    with h5py.File(Path(options.output) / "torch_distributed.h5", "w") if rank == 0 else nullcontext() as file:
        most_rows = -(-len(tokens) // world_size)
        for start in range(0, most_rows, BATCH_ROWS):  # as many steps on every rank: each one gathers
            rows = [shard[row] for row in range(start, min(start + BATCH_ROWS, len(shard)))]
            rows += [_NO_ROW] * (BATCH_ROWS - len(rows))
            block = gather_padded(keep_top_k(teacher, pad(rows), options.top_k))
            if block:
                append(file, unpad(block, teacher.config.vocab_size))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
