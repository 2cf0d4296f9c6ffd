"""The cache of shared prefixes: transformers' own, continued by any number of lines."""

import copy
import os
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

from logitgen.file.layout import Array
from logitgen.split.batch import Pass
from logitgen.teacher.probes import close

SHARED_ERROR = 1e-4
"""Largest difference of float32 logits read after a shared prefix, relative to the largest. The families of the tests
differ by 1e-6, and by 1e-5 with linear attention, which sums up blocks that begin elsewhere.
"""

_MOST_OF_EFFECT = 0.25
"""Largest difference relative to that which another prefix makes, both as root mean squares. Rounding to bfloat16 is
0.09 for SmolLM2-135M, a state that is not continued 0.9 and more (Mamba, Falcon Mamba), however small the weights are.
"""

_NAMES = ("past_key_values", "cache_params")
"""The second is that of state space models."""

_OF_ATTENTION = (DynamicLayer, DynamicSlidingWindowLayer)


def small_tree(vocab_size: int) -> list[tuple[list[Pass], Array]]:
    """Make three small rows of two nested prefixes: the passes that read them, and the places of their last tokens.

    Returns:
        Both with prefixes read once, with whole rows, and with whole rows that begin otherwise.
    """
    token = np.arange(35) % vocab_size
    root, branches, ends = token[None, :8], token[8:20].reshape(2, 6), token[20:].reshape(3, 5)
    parents = np.array([1, 0, 1])
    shared = [Pass(root, is_trunk=True), Pass(branches, np.array([0, 0]), is_trunk=True), Pass(ends, parents)]
    whole = np.concatenate([root.repeat(3, axis=0), branches[parents], ends], axis=1)
    other = whole.copy()
    other[:, : root.size] = (root + 1) % vocab_size
    last = np.arange(whole.size).reshape(whole.shape)[:, -ends.shape[1] :].flatten()
    return [(shared, token.size - ends.size + np.arange(ends.size)), ([Pass(whole)], last), ([Pass(other)], last)]


def reads_on(shared_PV: Tensor, whole_PV: Tensor, other_PV: Tensor) -> bool:
    """Tell whether logits after a shared prefix are those of whole rows, by far more than those of other rows are."""
    usual = whole_PV.isfinite() & other_PV.isfinite() & (whole_PV.abs() < torch.finfo(whole_PV.dtype).max / 2)
    error, effect = ((values.float() - whole_PV.float())[usual].square().mean() for values in (shared_PV, other_PV))
    relative = max(16 * torch.finfo(whole_PV.dtype).eps, SHARED_ERROR)
    return close(shared_PV, whole_PV, relative) and bool(error <= _MOST_OF_EFFECT**2 * effect)


def cache_of(output: Any) -> dict[str, Cache]:
    """Return the cache that a pass filled, by the name that the model takes it back by.

    Raises:
        RuntimeError: The model returned none.
    """
    for name in _NAMES:
        if output.get(name) is not None:
            return {name: output[name]}
    raise RuntimeError("it returns no cache that could be continued")


def continued(cache: Cache, line_L: Tensor, for_trunk: bool) -> Cache:
    """Return a cache for lines that continue lines of another, which stays as it is.

    Args:
        cache: The cache of the shared prefixes.
        line_L: Its line that each new line continues, int64[L].
        for_trunk: True to keep the new tokens too. Otherwise the prefixes' keys and values are copied for one layer
            at a time, while it is computed.
    """
    if line_L.device.type == "cpu":  # transformers then copies no keys for heads that share them; a GPU loses by it
        os.environ.setdefault("TRANSFORMERS_SDPA_FORCE_GQA", "1")
    selected = copy.copy(cache)
    selected.layers = [
        _selected(layer, line_L) if for_trunk or type(layer) not in _OF_ATTENTION else _for_once(layer, line_L)
        for layer in cache.layers
    ]
    return selected


def _selected(layer: Any, line_L: Tensor) -> Any:
    """Copy some lines of a layer. States of linear attention are kept in lists, and are changed in place."""
    selected = copy.copy(layer)
    for name, value in vars(layer).items():
        if isinstance(value, (list, dict)):
            setattr(selected, name, copy.copy(value))
    selected.reorder_cache(line_L)
    return selected


def _for_once(layer: Any, line_L: Tensor) -> Any:
    """Return a layer that copies some lines of another when they are needed, and forgets them."""

    def update(key: Tensor, value: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        return _appended(layer.keys, line_L, key), _appended(layer.values, line_L, value)

    once = copy.copy(layer)
    once.update = update
    return once


def _appended(past: Tensor, line_L: Tensor, new: Tensor) -> Tensor:
    """Append new keys or values to some lines of earlier ones, in a single copy."""
    length = past.shape[-2]
    both = new.new_empty((*new.shape[:-2], length + new.shape[-2], new.shape[-1]))
    torch.index_select(past, 0, line_L.to(past.device), out=both[..., :length, :])
    both[..., length:, :] = new
    return both
