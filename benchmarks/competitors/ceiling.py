"""The most there is to gain: the teacher's forward passes over perfectly packed tokens, nothing kept of them."""

import os
import sys

import numpy as np
import torch
from recipe import load_teacher, own_device, parse_options, read_tokens


@torch.inference_mode()
def main() -> None:
    """Run the teacher over this rank's part of the tokens."""
    options = parse_options(batch_tokens=int)
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    # The last token of a row predicts nothing that is in the row.
    read = [input_ids[:-1] for input_ids in read_tokens(options)["input_ids"] if len(input_ids) > 1]
    stream = np.concatenate(read).astype(np.int64)
    length = round(len(stream) / len(read))
    teacher = load_teacher(options, own_device())
    mine = torch.from_numpy(np.array_split(stream, world_size)[rank])
    num_packed = len(mine) // length * length
    blocks = mine[:num_packed].view(-1, length).split(max(1, options.batch_tokens // length))
    rest = [mine[num_packed:][None]] if num_packed < len(mine) else []
    for input_ids_BT in [*blocks, *rest]:
        teacher(input_ids=input_ids_BT.to(teacher.device), use_cache=False).logits  # noqa: B018
    if teacher.device.type == "cuda":
        torch.cuda.synchronize()
    print(f"tokens {len(mine)}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
