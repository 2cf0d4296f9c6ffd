"""Elias-Fano codes: ascending numbers below an end in little more than log2(end / K) + 2 bits each.

The lowest L bits of each number stand one after another, lowest bit first. The high parts are a string of bits of its
own: bit i + (number >> L) is set for the i-th number. Its zeros count from one high part to the next.

Shape letters: C positions of a chunk, P positions, R bytes of a record, K numbers, E numbers of all positions.

*Source*: P. Elias, Efficient storage and retrieval by content and address of static files, J. ACM 21 (1974).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:  # reading a file needs no torch
    from torch import Tensor

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class EliasFano:
    """A code for ascending numbers.

    Attributes:
        end: All numbers are below.
        low_bits: L, best the whole part of log2(end / K).
    """

    end: int
    low_bits: int

    @property
    def num_zeros(self) -> int:
        """Zeros before the last high part that a number can have."""
        return (self.end - 1) >> self.low_bits

    def write(
        self,
        numbers_CK: "Tensor",
        is_there_CK: "Tensor",
        num_bytes: int,
        *,
        high_start: int,
        low_start: "Tensor | int",
    ) -> "Tensor":
        """Encode the numbers of some positions.

        Args:
            numbers_CK: The numbers, int64, ascending, up to the end.
            is_there_CK: False for those that are left out, the last ones.
            num_bytes: Bytes to fill, R.
            high_start: First bit of the high parts.
            low_start: First of the low bits, or int64[C, 1].

        Returns:
            The bytes, int64[C, R].
        """
        import torch

        slot_K = torch.arange(numbers_CK.shape[1], device=numbers_CK.device)
        byte_S = torch.arange((self.low_bits + 14) // 8, device=numbers_CK.device)  # the low bits can touch so many
        high_CK = (numbers_CK >> self.low_bits) + slot_K + high_start
        first_CK = (slot_K * self.low_bits + low_start).expand_as(numbers_CK)
        low_CK = (numbers_CK & (2**self.low_bits - 1)) << (first_CK & 7)
        places = torch.cat([(high_CK >> 3)[..., None], (first_CK >> 3)[..., None] + byte_S], dim=-1)
        parts = torch.cat([(1 << (high_CK & 7))[..., None], (low_CK[..., None] >> 8 * byte_S) & 255], dim=-1)
        bytes_CR = numbers_CK.new_zeros((len(numbers_CK), num_bytes + len(byte_S)))
        bytes_CR.scatter_add_(1, places.flatten(1), (parts * is_there_CK[..., None]).flatten(1))
        return bytes_CR[:, :num_bytes]

    def read(
        self, bytes_PR: Array, *, high_start: int, num_high: int, low_start: Callable[[Array], Array | int]
    ) -> tuple[Array, Array, Array, Array]:
        """Decode the numbers of some positions.

        Args:
            bytes_PR: uint8.
            high_start: First bit of the high parts.
            num_high: Their number of bits. What comes after the last zero that can be is not read.
            low_start: First of the low bits, given how many numbers each position has, int64[P].

        Returns:
            How many numbers each position has, int64[P]; and of all numbers, [E] each, the position, the place among
            its numbers and the number itself.
        """
        first, skipped = divmod(high_start, 8)
        high_PB = bytes_PR[:, first : -(-(high_start + num_high) // 8)]
        bits_PH = np.unpackbits(high_PB, axis=1, bitorder="little")[:, skipped : skipped + num_high].view(np.bool_)
        zeros_PH = (~bits_PH).cumsum(axis=1, dtype=np.int64)
        is_number_PH = bits_PH & (zeros_PH <= self.num_zeros)
        num_P, place_E = is_number_PH.sum(axis=1), np.flatnonzero(is_number_PH)
        position_E = np.repeat(np.arange(len(num_P)), num_P)
        high_E = zeros_PH.ravel().take(place_E)
        slot_E = place_E - position_E * num_high - high_E
        first_E = np.broadcast_to(low_start(num_P), num_P.shape).take(position_E) + slot_E * self.low_bits
        return num_P, position_E, slot_E, high_E << self.low_bits | self._low(bytes_PR, position_E, first_E)

    def _low(self, bytes_PR: Array, position_E: Array, first_E: Array) -> Array:
        """Read the low bits of numbers, given the first of each. Whole arrays at once: to index them takes longer."""
        padded_PR = np.pad(bytes_PR, ((0, 1), (0, 8)))
        words = np.ndarray(padded_PR.size - 7, "<u8", padded_PR, strides=(1,))  # from every byte on
        byte_E = position_E * padded_PR.shape[1] + (first_E >> 3)
        word_E = words.take(byte_E, mode="clip").astype(np.int64)
        return np.asarray((word_E >> (first_E & 7)) & (2**self.low_bits - 1))
