"""Random numbers that depend only on their purpose: the run's seed, the row and the position.

A position's draw is therefore the same on any rank, in any batch, on any device, before or after a kill. A generator
with a state could not give that. Here every number is a hash of its place.

The row is the row of the file: rows that were cut from one row of the split must not share their draws.

Shape letters: P captured positions, C positions of a chunk.

*Source*: splitmix64 (G. Steele, D. Lea, C. Flood, Fast splittable pseudorandom number generators, OOPSLA 2014).
"""

import torch
from torch import Tensor

_GAMMA = 0x9E3779B97F4A7C15
_MIX = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)


def position_keys(seed: int, row_P: Tensor, position_P: Tensor) -> Tensor:
    """Return a key for the draw of each position, int64[P].

    Args:
        seed: The run's seed.
        row_P: Row of the file, int64.
        position_P: Position in that row, int64.
    """
    return mixed(mixed(mixed(torch.full_like(row_P, seed)) + row_P) + position_P)


def uniform(key_C: Tensor, dtype: torch.dtype) -> Tensor:
    """Turn keys into numbers between 0 and 1, [C], from their upper 32 bits."""
    return (((key_C >> 32) & 0xFFFFFFFF).to(dtype) + 0.5) * 2.0**-32


def mixed(state: Tensor) -> Tensor:
    """Take one step of splitmix64, int64 taken as 64 bits."""
    state = state + _signed(_GAMMA, 64)
    state = (state ^ ((state >> 30) & (2**34 - 1))) * _signed(_MIX[0], 64)
    state = (state ^ ((state >> 27) & (2**37 - 1))) * _signed(_MIX[1], 64)
    return state ^ ((state >> 31) & (2**33 - 1))


def _signed(bits: int, width: int) -> int:
    """Read a bit pattern as torch's integers of that width do."""
    return bits - 2**width if bits >= 2 ** (width - 1) else bits
