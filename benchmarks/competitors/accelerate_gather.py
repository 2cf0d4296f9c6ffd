"""Accelerate from end to end: a prepared DataLoader, the top k gathered on all ranks, rank 0 writes in the loop."""

from contextlib import nullcontext
from pathlib import Path

import h5py
import torch
from accelerate import Accelerator
from flat import append
from recipe import BATCH_ROWS, keep_top_k, load_teacher, pad, parse_options, read_tokens, unpad
from torch.utils.data import DataLoader


def main() -> None:
    """Capture the split, on every rank of the launch."""
    options = parse_options()
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    with accelerator.main_process_first():
        tokens = read_tokens(options)
    teacher = load_teacher(options, accelerator.device)
    loader = accelerator.prepare(DataLoader(tokens, batch_size=BATCH_ROWS, collate_fn=pad))

    is_writer = accelerator.is_main_process
    with h5py.File(Path(options.output) / "accelerate.h5", "w") if is_writer else nullcontext() as file:
        for batch in loader:
            block = keep_top_k(teacher, batch, options.top_k)
            block = accelerator.gather_for_metrics(accelerator.pad_across_processes(block, dim=1))
            if is_writer:
                append(file, unpad(block, teacher.config.vocab_size))
    accelerator.end_training()


if __name__ == "__main__":
    main()
