"""The captured values of a batch: pure tensor functions, in float32 on the device, packed before they travel.

Each rank of a tensor-parallel teacher has the logits of a shard of the vocabulary. All get the same captured values.

Shape letters: B rows of a batch, P captured positions of a batch, U distinct ones, C positions of a chunk, S ids of a
shard of the vocabulary, K kept, D hidden size.
"""

import logging

import numpy as np
import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from torch import Tensor

from logitgen.console import format_bytes
from logitgen.errors import CaptureError
from logitgen.file.layout import FLOAT16_MAX, Array, Layout, row_crc32
from logitgen.split.batch import Batch
from logitgen.teacher.keep import full, hidden_states, sample, top_k
from logitgen.teacher.model import Teacher, on_device
from logitgen.teacher.noise import position_keys
from logitgen.teacher.shard import VocabShard

logger = logging.getLogger(__name__)

_CACHED_KEPT = 2**13
_GPU_PASS_KEPT = 2**19
"""Kept ids packed at a time. Each takes some 200 bytes of temporary memory."""

_TORCH_DTYPES = {
    np.dtype("i1"): torch.int8,
    np.dtype("u1"): torch.uint8,
    np.dtype("<u2"): torch.uint16,
    np.dtype("<u4"): torch.uint32,
    np.dtype("<f2"): torch.float16,
    np.dtype("<f4"): torch.float32,
}


@torch.no_grad()
def capture_batch(teacher: Teacher, batch: Batch, layout: Layout) -> Tensor:
    """Run the teacher over a batch and pack the captured values. Halve a batch too large for the memory.

    Returns:
        uint8 payload on the teacher's device, laid out as `Layout.payload_slices`. `seal` adds the checksums.

    Raises:
        CaptureError: The device has not enough memory for a single row.
    """
    num_positions = len(batch.positions)
    slices = layout.payload_slices(len(batch.rows), num_positions)
    size_bytes = slices[next(reversed(slices))].stop
    try:
        payload = torch.zeros(size_bytes, dtype=torch.uint8, device=teacher.device)
    except RuntimeError as error:
        if not should_reduce_batch_size(error):
            raise
        raise CaptureError(
            f"What is kept of a batch, {format_bytes(size_bytes)}, does not fit into the memory of {teacher.device}. "
            "Lower --batch_tokens."
        ) from error
    packed = {
        name: payload[slices[name]].view(_TORCH_DTYPES[dtype]).view(num_positions, *entry)
        for name, (entry, dtype) in layout.captured.items()
    }
    _fill(packed, teacher, batch, layout)
    return payload


def _fill(packed: dict[str, Tensor], teacher: Teacher, batch: Batch, layout: Layout) -> None:
    """Compute the captured values of a batch, into tensors of [P, ...] each."""
    try:
        _run(packed, teacher, batch, layout)
    except RuntimeError as error:
        if not should_reduce_batch_size(error):
            raise
        rows, length = len(batch.rows), int(batch.lengths.max())
        if rows == 1:
            raise CaptureError(
                f"Row {batch.rows[0]} does not fit into the memory of {teacher.device}: {length} tokens. "
                "Lower --max_length, or free memory."
            ) from error
        if teacher.is_shared:
            raise CaptureError(
                f"{rows} rows of {length} tokens do not fit into the memory of {teacher.device}, and the ranks that "
                "share a teacher cannot each choose to compute them in halves. Lower --batch_tokens."
            ) from error
    else:
        return
    # Here, where the error no longer holds on to the tensors of the forward pass.
    clear_device_cache(garbage_collection=True)
    logger.warning(
        f"{rows} rows of {length} tokens do not fit into the memory of {teacher.device}: they are computed in halves. "
        "A lower --batch_tokens would save the attempt."
    )
    start = 0
    for half in batch.halves():
        end = start + len(half.positions)
        _fill({name: values[start:end] for name, values in packed.items()}, teacher, half, layout)
        start = end


def _run(packed: dict[str, Tensor], teacher: Teacher, batch: Batch, layout: Layout) -> None:
    device, is_drawn = teacher.device, layout.capture == "sample"
    distinct = batch.distinct(of_each_row=is_drawn)
    target_U = on_device(batch.targets[distinct.index], device)
    key_U = target_U  # a placeholder: only draws read the keys
    if is_drawn:
        row_U, position_U = batch.rows[batch.row_of_position[distinct.index]], batch.positions[distinct.index]
        key_U = position_keys(batch.seed, on_device(row_U, device), on_device(position_U, device))
    into = dict(packed)
    if layout.packing:
        into["kept_ids"] = target_U.new_empty((len(batch.positions), layout.packing.num_columns))
        into["kept_logprobs"] = into["kept_ids"].new_empty(into["kept_ids"].shape, dtype=torch.float32)
    if is_drawn and layout.packing:
        into["num_certain"] = target_U.new_empty(len(batch.positions))
        into["rest_logprob"] = target_U.new_empty(len(batch.positions), dtype=torch.float32)
    for span, logits_CS, hidden in teacher.logits(batch.passes, batch.slots[distinct.index]):
        kept = _kept(logits_CS, hidden, target_U[span], key_U[span], teacher.shard, layout)
        for name in kept.keys() & into:
            stored = _storable(kept[name], into[name].dtype)
            if distinct.copies is None:
                into[name][span] = stored
            else:
                places, sources = (on_device(array, device) for array in distinct.of_span(span))
                _indexable(into[name])[places] = _indexable(stored)[sources]
        del logits_CS, hidden, kept, stored  # otherwise they live until the next chunk is computed
    if layout.packing:
        # All chunks at once: packing takes a GPU little time, and the host many launches.
        at_once = _CACHED_KEPT if teacher.device.type == "cpu" else _GPU_PASS_KEPT
        step = max(1, at_once // layout.packing.num_columns)
        names = [name for name in ("kept", "kept_ids", "kept_logprobs", "num_certain", "rest_logprob") if name in into]
        for kept_PR, *values in zip(*(into[name].split(step) for name in names), strict=True):
            kept_PR.copy_(layout.packing.pack(*values))


def _kept(
    logits_CS: Tensor, hidden: dict[str, Tensor], target_C: Tensor, key_C: Tensor, shard: VocabShard, layout: Layout
) -> dict[str, Tensor]:
    """Choose the values to keep of a chunk."""
    if layout.capture == "full":
        return full(logits_CS, target_C, shard)
    if layout.capture == "hidden":
        return hidden_states(logits_CS, target_C, hidden, layout.encoding, shard)
    if layout.capture == "sample":
        return sample(logits_CS, target_C, layout.room, key_C, layout.num_ids, shard)
    return top_k(logits_CS, target_C, layout.top_k, shard)


def seal(payload: Array, batch: Batch, layout: Layout, dtype: torch.dtype) -> None:
    """Check a payload that has arrived in host memory, and checksum its rows in place.

    Args:
        payload: uint8, as `capture_batch` packed it.
        batch: The batch it was captured from.
        layout: Sizes and dtypes.
        dtype: Precision of the teacher's computation.

    Raises:
        CaptureError: The teacher returned NaN or infinity.
    """
    slices = layout.payload_slices(len(batch.rows), len(batch.positions))
    captured = {
        name: payload[slices[name]].view(dtype).reshape(-1, *entry) for name, (entry, dtype) in layout.captured.items()
    }
    is_finite_P = np.isfinite(captured["target_logprob"])
    if not is_finite_P.all():
        at = int(np.argmin(is_finite_P))
        remedy = {
            torch.float16: "Its range is small: try --dtype bfloat16 or float32.",
            torch.bfloat16: "Try --dtype float32; if that does not help, the weights are damaged.",
        }.get(dtype, "The weights are damaged, or the row is one the teacher cannot read.")
        raise CaptureError(
            f"The teacher's logits are not finite at row {batch.rows[batch.row_of_position[at]]}, position "
            f"{batch.positions[at]}, in {str(dtype).removeprefix('torch.')}. {remedy}"
        )
    checksums = payload[slices["crc32"]].view("<u4")
    file_dtypes = [layout.datasets["input_ids"][1], layout.datasets["positions"][1]]
    start = 0
    for index, (row, count) in enumerate(zip(batch.rows, batch.num_positions, strict=True)):
        span = slice(start, start + count)
        known = [batch.tokens[index], batch.positions[span]]
        arrays = [array.astype(dtype) for array, dtype in zip(known, file_dtypes, strict=True)]
        checksums[index] = row_crc32(
            row, batch.source_rows[index], arrays + [values[span] for values in captured.values()]
        )
        start += count


def _indexable(values: Tensor) -> Tensor:
    """Return the same bits in a dtype that torch can index: it cannot index most unsigned ones."""
    return values.view({torch.uint16: torch.int16, torch.uint32: torch.int32}.get(values.dtype, values.dtype))


def _storable(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Convert to the stored dtype. Values beyond float16, such as the logit of a masked token, become its limit."""
    if dtype == torch.float16 and values.dtype != dtype:
        values = values.float().clamp(-FLOAT16_MAX, FLOAT16_MAX)  # bfloat16 would round the limit up
    return values.to(dtype)
