"""Batches made by hand, and what is captured of them."""

from typing import Any

import numpy as np
import torch
from conftest import make_llama

from logitgen.file.layout import Layout
from logitgen.split.batch import Batch
from logitgen.split.tree import PassCost
from logitgen.teacher.capture import capture_batch, seal
from logitgen.teacher.model import Teacher

FREE = PassCost(extra=0, least=0)


def batch_of(
    tokens: list[list[int]],
    first_row: int = 0,
    shared: list[int] | None = None,
    batch_tokens: int = 0,
    pass_cost: PassCost = FREE,
) -> Batch:
    arrays = [np.array(ids, dtype=np.int32) for ids in tokens]
    return Batch(
        rows=np.arange(first_row, first_row + len(tokens)),
        source_rows=np.arange(first_row, first_row + len(tokens)) + 100,
        tokens=arrays,
        lengths=np.array([len(ids) - 1 for ids in tokens]),
        shared=np.array(shared or [0] * len(tokens)),
        batch_tokens=batch_tokens,
        pass_cost=pass_cost,
        num_positions=np.array([len(ids) - 1 for ids in tokens]),
        row_of_position=np.repeat(np.arange(len(tokens)), [len(ids) - 1 for ids in tokens]),
        positions=np.concatenate([np.arange(len(ids) - 1) for ids in tokens]),
        targets=np.concatenate([ids[1:] for ids in arrays]).astype(np.int64),
        seed=5,
    )


def layout_of(batch: Batch, **changes: Any) -> Layout:
    sizes = {"num_rows": 10, "num_tokens": 99, "num_positions": len(batch.positions), "vocab_size": 50}
    return Layout(**{"capture": "topk", "top_k": 3, **sizes, **changes})


def captured(batch: Batch, layout: Layout, model: Any = None) -> dict[str, np.ndarray]:
    payload = capture_batch(Teacher(model or make_llama(50), 50), batch, layout).numpy()
    seal(payload, batch, layout, torch.float32)
    slices = layout.payload_slices(len(batch.rows), len(batch.positions))
    arrays = {name: payload[slices[name]].view(dtype) for name, (_, dtype) in layout.captured.items()}
    return arrays | {"crc32": payload[slices["crc32"]].view("<u4")}
