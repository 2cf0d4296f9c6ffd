"""The number of positions whose logits the loss has in float32 at a time."""

import torch

CHUNK_LOGITS = 2**23
"""Logits of a chunk on a CPU, 32 MiB in float32. The forward KL has three such tensors at its peak, seven if the
teacher's distribution is whole. Measured, 1 thread, V = 49,152, 512 positions, with the gradient: 2**24 costs 30 to
50 % more for whole distributions, 2**22 nothing less, 2**20 reads the teacher's head too often.
"""

GPU_CHUNK_LOGITS = 2**27
"""The same on a GPU, 512 MiB: it waits while the host launches some sixty kernels for every chunk. Measured, H200,
V = 151,936, 8,192 positions, with the gradient: 46 ms for the top 64, 159 ms with 2**24, 42 ms with 2**28.
"""


def positions_at_once(device: torch.device, vocab_size: int, share: int = 1) -> int:
    """Return the positions of a chunk, or of a fraction of one."""
    logits = CHUNK_LOGITS if device.type == "cpu" else GPU_CHUNK_LOGITS
    return max(1, logits // share // vocab_size)
