"""The teacher's identity: all that can change its numbers, as text that is equal for equal teachers.

The hash of a weight is a sum over its parts. Ranks that share a weight therefore hash their own parts in place.

Shape letters: R rows of a weight (all dimensions but the last), C columns.
"""

import functools
import hashlib
import json
import math
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from accelerate.utils import align_module_device
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.utils.weak import WeakTensorKeyDictionary
from transformers import PreTrainedConfig, PreTrainedModel

from logitgen.teacher.noise import mixed

_WITHOUT_EFFECT = {"transformers_version", "_commit_hash", "auto_map", "architectures", "dtype", "torch_dtype"}
_WITHOUT_EFFECT |= {"id2label", "label2id", "num_labels", "problem_type", "use_cache", "return_dict"}
_WITHOUT_EFFECT |= {"output_attentions", "output_hidden_states", "quantization_config"}
"""Configuration entries without effect on the logits. Precision and quantisation are attributes of their own."""

_LONGEST_VALUE = 1000
"""Characters. Longer values of a configuration are stored as their SHA-256, because HDF5 limits their size."""

_AT_ONCE = 2**16
_AT_ONCE_GPU = 2**26
"""Words hashed at a time. Each takes some 40 bytes of temporary memory."""

_WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_ODD = -0x61C8864680B583EB  # 2**64 divided by the golden ratio, as torch's int64 reads it


def describe_config(config: PreTrainedConfig) -> dict[str, Any]:
    """Return the configuration entries that can change the logits: all but names, versions and entries without effect.

    Values are those of JSON. Their hash replaces long values.
    """
    plain = json.loads(json.dumps(_essential(config.to_dict()), sort_keys=True, default=str))
    return {name: _shortened(value) for name, value in plain.items()}


def describe_computation(model: PreTrainedModel) -> dict[str, Any]:
    """Return the parts of a loaded model's computation that its configuration leaves open."""
    found = {
        "attention": getattr(model.config, "_attn_implementation", None),
        "experts": getattr(model.config, "_experts_implementation", None),
        "float32 products": torch.get_float32_matmul_precision(),
    }
    return {name: value for name, value in found.items() if value is not None}


def describe_adapters(model: PreTrainedModel) -> str:
    """Return the configuration of a model's adapters as JSON; empty if it has none."""
    adapters = getattr(model, "peft_config", None) or {}
    plain = {name: _essential(adapter.to_dict()) for name, adapter in adapters.items()}
    return json.dumps(plain, sort_keys=True, default=_by_name) if plain else ""


def _by_name(value: object) -> object:
    return sorted(map(str, value)) if isinstance(value, set) else str(value)


def _essential(values: Any) -> Any:
    if not isinstance(values, dict):
        return values
    return {
        str(name): _essential(value)
        for name, value in values.items()
        if name not in _WITHOUT_EFFECT and not str(name).endswith("name_or_path")
    }


def _shortened(value: Any) -> Any:
    text = json.dumps(value, sort_keys=True)
    return value if len(text) <= _LONGEST_VALUE else f"SHA-256 {hashlib.sha256(text.encode()).hexdigest()}"


@torch.no_grad()
def fingerprint(weights: Iterable[tuple[str, Tensor]], adapters: str = "") -> str:
    """Return the SHA-256 over adapters and the name, shape, dtype and hash of every weight, in this order.

    Every bit counts, and its place. Ranks that share the weights get the same hash as a rank that has them all.
    """
    digest = hashlib.sha256(adapters.encode())
    hashes = WeakTensorKeyDictionary()  # a tied weight comes twice
    for name, tensor in weights:
        if tensor not in hashes:
            hashes[tensor] = _hash(tensor)
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} {hashes[tensor] % 2**64:016x}\n".encode())
    return digest.hexdigest()


def _hash(tensor: Tensor) -> int:
    """Hash a weight to 64 bits."""
    if not isinstance(tensor, DTensor):
        return int(_hash_of_part(tensor, tuple(tensor.shape), (0,) * tensor.dim()))
    mesh, placements = tensor.device_mesh, tensor.placements
    if any(type(placement) not in (Shard, Replicate) for placement in placements):
        return _hash(tensor.full_tensor())
    last = tensor.dim() - 1
    num_cuts = math.prod(mesh.size(axis) for axis, each in enumerate(placements) if each == Shard(last))
    if num_cuts > 1 and tensor.shape[-1] * tensor.element_size() % (8 * num_cuts):  # through the middle of a word
        return _hash(tensor.full_tensor())
    _, offsets = compute_local_shape_and_global_offset(tensor.shape, mesh, placements)
    part = _hash_of_part(tensor.to_local(), tuple(tensor.shape), tuple(offsets))
    parts = [Partial() if isinstance(placement, Shard) else Replicate() for placement in placements]
    return int(DTensor.from_local(part, mesh, parts, run_check=False).full_tensor())


def _hash_of_part(part: Tensor, shape: tuple[int, ...], offsets: tuple[int, ...]) -> Tensor:
    """Hash a part of a weight, given the weight's shape and the part's offsets.

    The hash is the sum over r, c of mix(word) * key(r) * key(c). Words are 8 bytes of a row where that leaves no rest,
    single values otherwise. Keys are odd, so one changed word always changes the sum. The mixing keeps sign bits from
    cancelling out.
    """
    if part.is_complex():
        part, shape, offsets = torch.view_as_real(part), (*shape, 2), (*offsets, 0)
    if not shape:
        part, shape, offsets = part[None], (1,), (0,)
    total = torch.zeros((), dtype=torch.int64, device=part.device)
    if not part.numel():
        return total
    value_bytes = part.element_size()
    word_bytes = 8 if shape[-1] * value_bytes % 8 == 0 else value_bytes
    words_RC = part.contiguous().view(_WORDS[word_bytes])
    first_column, num_columns = offsets[-1] * value_bytes // word_bytes, words_RC.shape[-1]
    words_RC = words_RC.reshape(-1, num_columns)
    key_R = _row_keys(tuple(part.shape[:-1]), shape[:-1], offsets[:-1], part.device)
    key_C = _column_keys(first_column, num_columns, part.device)
    step = max(1, (_AT_ONCE if part.device.type == "cpu" else _AT_ONCE_GPU) // num_columns)
    for words, keys in zip(words_RC.split(step), key_R.split(step), strict=True):
        total += _sum_on_cpu(words, keys, key_C) if part.device.type == "cpu" else _sum(words, keys, key_C)
    return total


@functools.lru_cache(maxsize=16)  # most weights of a model have few shapes
def _row_keys(size: tuple[int, ...], shape: tuple[int, ...], offsets: tuple[int, ...], device: torch.device) -> Tensor:
    """Return the keys of a part's rows, [R], given the part's size and the weight's shape without their columns."""
    row_R = torch.zeros((), dtype=torch.int64, device=device)
    for dimension, (length, offset) in enumerate(zip(size, offsets, strict=True)):
        index = torch.arange(offset, offset + length, device=device) * math.prod(shape[dimension + 1 :])
        row_R = (row_R[..., None] + index).flatten()
    return mixed(row_R.reshape(-1)) | 1


@functools.lru_cache(maxsize=16)
def _column_keys(first: int, num_columns: int, device: torch.device) -> Tensor:
    """Return the keys of columns from `first` on, [C]."""
    return mixed(~torch.arange(first, first + num_columns, device=device)) | 1


def _sum(words_RC: Tensor, key_R: Tensor, key_C: Tensor) -> Tensor:
    """Return the sum over r, c of mix(word) * key(r) * key(c), on any device."""
    values_RC = words_RC.to(torch.int64) * _ODD  # not in place: `to` does not copy int64
    values_RC ^= values_RC >> 32
    return (values_RC.mul_(key_C).sum(-1) * key_R).sum()


def _sum_on_cpu(words_RC: Tensor, key_R: Tensor, key_C: Tensor) -> int:
    """Return the same in two thirds of the time: numpy multiplies int64 faster than torch 2.13."""
    values_RC = words_RC.numpy() * np.int64(_ODD)
    values_RC ^= values_RC >> 32
    return int(values_RC @ key_C.numpy() @ key_R.numpy())


def weights_of(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """Yield every weight, one at a time, wherever it or its parts are."""
    for module_name, module in sorted(model.named_modules()):
        of_children = tuple(f"{name}." for name, _ in module.named_children())
        with align_module_device(module):
            for name, tensor in sorted(module.state_dict(keep_vars=True).items()):  # tied weights are one object
                if not name.startswith(of_children):
                    yield f"{module_name}.{name}", tensor
