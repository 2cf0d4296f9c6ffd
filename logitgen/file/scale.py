"""Packed log-probs: 8 bits each on a scale made for probabilities, or float16.

Code c of 8 bits is the probability (1 - c/256)^4, from 0 down to -22.2 nats: a scale that spends its levels where the
divergence from the true distribution arises. `packing` has the figures.
"""

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:  # reading a file needs no torch
    from torch import Tensor

Array = npt.NDArray[Any]

_LEVELS = 256
_ROOT = 4
_LOGPROBS = (_ROOT * np.log1p(-np.arange(_LEVELS) / _LEVELS)).astype(np.float32)
"""The log-prob of each 8-bit code, in nats, from 0 down to -22.2."""

_FLOAT16_MIN = float(np.finfo(np.float16).min)

END = float(_LOGPROBS[-2:].mean())
"""End of the scale: log-probs below it have the last code, however far below."""
LEAST = float(_LOGPROBS[-1])
"""The log-prob of the last code."""


def packed(logprobs_CK: "Tensor", value_bits: int) -> "Tensor":
    """Pack log-probs in nats, at most 0, into uint8[C, K, value_bits / 8]."""
    import torch

    if value_bits == 16:
        stored_CK = logprobs_CK.clamp(min=torch.finfo(torch.float16).min).half()
        return stored_CK[..., None].view(torch.uint8)
    codes_CK = (_LEVELS - (logprobs_CK / _ROOT).exp() * _LEVELS).round().clamp(max=_LEVELS - 1)
    return codes_CK.to(torch.uint8)[..., None]


def codes(bytes_PB: Array, value_bits: int) -> Array:
    """Take packed values for numbers, [P, K]: uint8, or uint16. A larger one is a lower log-prob."""
    return np.ascontiguousarray(bytes_PB).view("u1" if value_bits == 8 else "<u2")


def logprobs_of(codes_PK: Array) -> Array:
    """Return the log-probs in nats of such numbers, float32 or float16[P, K]."""
    return codes_PK.view("<f2") if codes_PK.dtype.itemsize == 2 else _LOGPROBS[codes_PK]


def rounding(logprobs_PK: Array, factor_P1: Array, value_bits: int = 8) -> Array:
    """Return the largest error in nats of stored log-probs, float64[P, K], infinity at the end of the scale.

    Args:
        logprobs_PK: The log-probs as they are read.
        factor_P1: The largest error in nats of a common factor, by which they were scaled.
        value_bits: 8, or 16 for float16.
    """
    off_PK = half_step(logprobs_PK - factor_P1, value_bits) + factor_P1
    return np.where(logprobs_PK > END, off_PK, np.inf) if value_bits == 8 else off_PK


def error_of_sum(logprobs_PK: Array, value_bits: int = 8) -> Array:
    """Return the largest error in nats of the probabilities' sum, float64[P, 1], by the rounding of each; 0 if none."""
    probs_PK, off_PK = np.exp(logprobs_PK, dtype=np.float64), half_step(logprobs_PK, value_bits)
    sum_P1 = probs_PK.sum(1, keepdims=True)
    return np.asarray(np.log1p((probs_PK * np.expm1(off_PK)).sum(1, keepdims=True) / np.where(sum_P1, sum_P1, 1)))


def half_step(logprobs: Array, value_bits: int = 8) -> Array:
    """Return half a step of the 8-bit scale around log-probs, or of float16, in nats."""
    if value_bits == 16:
        return np.asarray(np.abs(logprobs.clip(min=_FLOAT16_MIN)) * 2.0**-11)
    root = np.exp(logprobs / _ROOT, dtype=np.float64).clip(min=1 / _LEVELS)
    return np.asarray(-_ROOT * np.log1p(-0.5 / _LEVELS / root))
