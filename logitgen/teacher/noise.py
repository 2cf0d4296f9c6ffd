"""Random numbers that depend only on their purpose: the run's seed, the row, the position and the token.

A position's draws are therefore the same on any rank, in any batch, on any device, before or after a kill. A generator
with a state could not give that. Here every number is a hash of its place.

The row is the row of the file: rows that were cut from one row of the split must not share their draws.

Shape letters: P captured positions, C positions of a chunk, V token ids.

*Source*: for the keys splitmix64 (G. Steele, D. Lea, C. Flood, Fast splittable pseudorandom number generators, OOPSLA
2014); for the tokens lowbias32 (C. Wellons, Prospecting for hash functions, 2018), keyed at start and middle.
"""

import torch
from torch import Tensor

_GAMMA = 0x9E3779B97F4A7C15
_MIX = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
_SPREAD = 0x9E3779B9
_BIAS = (0x7FEB352D, 0x846CA68B)

_UNIT = 2.0**-31 * (1 - 2.0**-23)
"""Factor that turns 31 bits, in float32, into a number below 1."""

_CACHED = 2**18
"""Numbers drawn at a time on a CPU, so that they stay in a core's cache."""


def position_keys(seed: int, row_P: Tensor, position_P: Tensor) -> Tensor:
    """Return a key for the draws of each position, int64[P].

    Args:
        seed: The run's seed.
        row_P: Row of the file, int64.
        position_P: Position in that row, int64.
    """
    return mixed(mixed(mixed(torch.full_like(row_P, seed)) + row_P) + position_P)


def gumbel(key_C: Tensor, num_ids: int, first_id: int = 0) -> Tensor:
    """Draw a standard Gumbel number for every token at every position, float32[C, V], between -2.8 and 22.2.

    It is -log(-log(1 - u)) of a u from 31 bits that is precise near 0, where the large numbers come from.

    Args:
        key_C: A key per position, int64.
        num_ids: V.
        first_id: The first id.
    """
    id_V = torch.arange(first_id, first_id + num_ids, dtype=torch.int32, device=key_C.device)
    token_V = id_V * _signed(_SPREAD, 32)
    noise_CV = torch.empty((len(key_C), num_ids), device=key_C.device)
    step = max(1, _CACHED // max(1, num_ids)) if key_C.device.type == "cpu" else len(key_C)
    for key, noise in zip(key_C.split(step), noise_CV.split(step), strict=True):
        noise.copy_(_hashed(key, token_V)).add_(0.5).mul_(-_UNIT).log1p_().neg_().log_().neg_()
    return noise_CV


def _hashed(key_C: Tensor, token_V: Tensor) -> Tensor:
    """Hash every token under every key to 31 bits, int32[C, V]."""
    start_C, middle_C = (key_C >> 32).to(torch.int32), key_C.to(torch.int32)
    bits_CV = token_V ^ start_C[:, None]
    bits_CV ^= (bits_CV >> 16) & 0xFFFF  # the mask drops the sign that the shift repeats
    bits_CV *= _signed(_BIAS[0], 32)
    bits_CV ^= (bits_CV >> 15) & 0x1FFFF
    bits_CV ^= middle_C[:, None]
    bits_CV *= _signed(_BIAS[1], 32)
    bits_CV ^= (bits_CV >> 16) & 0xFFFF
    return bits_CV.bitwise_and_(0x7FFFFFFF)


def mixed(state: Tensor) -> Tensor:
    """Take one step of splitmix64, int64 taken as 64 bits."""
    state = state + _signed(_GAMMA, 64)
    state = (state ^ ((state >> 30) & (2**34 - 1))) * _signed(_MIX[0], 64)
    state = (state ^ ((state >> 27) & (2**37 - 1))) * _signed(_MIX[1], 64)
    return state ^ ((state >> 31) & (2**33 - 1))


def _signed(bits: int, width: int) -> int:
    """Read a bit pattern as torch's integers of that width do."""
    return bits - 2**width if bits >= 2 ** (width - 1) else bits
