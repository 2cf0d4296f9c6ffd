r"""Packed top k: ids and log-probs of a position as one short string of bytes, exact in the ids.

A record of K ids below V, ascending, and of their log-probs in that order:

    ids      `elias_fano` code with L = floor(log2(V / K)): the low bits, then K + ((V - 1) >> L) bits of high parts,
             filled up to whole bytes
    values   K times float16, or K times 8 bits of `scale` and 8 bits for the tail

An id takes half a bit more than the least possible for any code for sets.

Most of the divergence of 8-bit values is the tail's. As 1 minus the sum of rounded probabilities, a small tail would be
far off. Therefore it has a code of its own. Where the tail is below a half, the kept probabilities are read back scaled
to the rest it leaves. Mean divergence in nats of the values read from the values kept, the tail as one token (2,523
positions of prose, SmolLM2-135M, V = 49,152):

    8-bit scale                         K = 12     50         64         128
    cube root of nats, 0 to 24          5.4e-4     1.3e-3     1.4e-3     2.3e-3
    square root, 0 to the K-th, + 4 B   4.0e-5     1.2e-4     1.6e-4     2.1e-4
    p^(1/4), without the tail           7.4e-4     1.2e-3     1.4e-3     1.8e-3
    p^(1/3), with the tail              2.3e-5     4.7e-5     5.4e-5     7.9e-5
    p^(1/4), with the tail              2.3e-5     3.9e-5     4.3e-5     5.5e-5
    p^(1/5), with the tail              3.0e-5     4.2e-5     4.4e-5     5.3e-5
    float16, for comparison             2.7e-7     1.5e-6     1.5e-6     2.7e-6

At equal divergence, fewer bits for small values gain 6 to 8 % of the bytes from K = 64 on, 3 % at K = 24 and none at
K = 12. So all values have 8. Tried were two records, the m likeliest ids with 8 bits each, the others with b bits from
the least to the m-th. Bytes of a position at V = 151,936, divergence, and angle of the gradient as in
`benchmarks/fidelity.py`, over two batches of 512 positions:

    K = 64                                      K = 128
    8 bits each          173  4.2e-5  1.671     8 bits each          326  5.4e-5  1.070
    m = 16, b = 5        163  3.8e-5  1.671     m = 24, b = 5        299  4.8e-5  1.069
    m = 8, b = 4         151  2.5e-4  1.681     m = 16, b = 4        280  2.1e-4  1.070
    6 bits each          157  6.0e-4  1.708

A code for sets at the least possible would gain 6 % at K = 8, and 3 % from 24 on.

Shape letters: C positions of a chunk, P positions, K kept, R bytes of a record.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from logitgen.file import scale
from logitgen.file.elias_fano import EliasFano

if TYPE_CHECKING:  # reading a file needs no torch
    from torch import Tensor

Array = npt.NDArray[Any]

_LARGE_TAIL = 0.5
"""Tail from which the kept probabilities themselves give the tail better than its code does."""


@dataclass(frozen=True, kw_only=True)
class Packing:
    """The packing of a file's records.

    Attributes:
        vocab_size: V, the upper bound of all ids.
        k: Ids in a record.
        value_bits: 8, or 16 for float16.
    """

    vocab_size: int
    k: int
    value_bits: int

    @property
    def num_columns(self) -> int:
        """Ids that come back."""
        return self.k

    @property
    def record_bytes(self) -> int:
        """Bytes of a record, R."""
        return self._id_bytes + self.k * self.value_bits // 8 + self._has_tail

    @property
    def _has_tail(self) -> bool:
        """True if the mass of all other ids is a value too."""
        return self.value_bits == 8

    def pack(self, ids_CK: "Tensor", logprobs_CK: "Tensor") -> "Tensor":
        """Pack the kept values of some positions, on their own device.

        Args:
            ids_CK: The kept ids, int64, distinct within a position, in any order.
            logprobs_CK: Their log-probs in nats, float32, at most 0.

        Returns:
            The records, uint8[C, R].
        """
        import torch

        ids_CK, order_CK = ids_CK.sort(-1)
        values_CK = logprobs_CK.gather(-1, order_CK)
        if self._has_tail:
            precise = torch.float32 if values_CK.device.type == "mps" else torch.float64  # Apple's GPUs lack float64
            tail_C = torch.log1p(-values_CK.to(precise).exp().sum(-1).clamp(max=1)).float()
            values_CK = torch.cat([values_CK, tail_C[:, None]], dim=1)
        is_there_CK = torch.ones_like(ids_CK)
        id_bytes = self._ids.write(
            ids_CK, is_there_CK, self._id_bytes, high_start=self.k * self._ids.low_bits, low_start=0
        )
        stored = scale.packed(values_CK, self.value_bits)
        return torch.cat([id_bytes.to(torch.uint8), stored.flatten(1)], dim=1)

    def unpack(self, records_PR: Array) -> tuple[Array, Array]:
        """Unpack records.

        Args:
            records_PR: uint8.

        Returns:
            Ids int64[P, K] and log-probs in nats, descending, float32[P, K], or float16 if they are stored as such. If
            log-probs are equal, the smaller id comes first.

        Raises:
            ValueError: `pack` makes no such record.
        """
        num_P, _, _, numbers_E = self._ids.read(
            records_PR[:, : self._id_bytes],
            high_start=self.k * self._ids.low_bits,
            num_high=self.k + self._ids.num_zeros,
            low_start=lambda _: 0,
        )
        if (num_P != self.k).any():
            raise ValueError(f"a packed record does not hold {self.k} ids")
        ids_PK = numbers_E.reshape(len(records_PR), self.k)
        stored_PK = scale.codes(records_PR[:, self._id_bytes :], self.value_bits)
        codes_PK = stored_PK[:, : self.k]
        order_PK = np.argsort(codes_PK, axis=1, kind="stable")
        logprobs_PK = scale.logprobs_of(np.take_along_axis(codes_PK, order_PK, axis=1))
        if self._has_tail:
            tail_P = np.exp(scale.logprobs_of(stored_PK[:, -1]), dtype=np.float64)
            kept_P = np.exp(logprobs_PK, dtype=np.float64).sum(1)
            factor_P = np.where(tail_P < _LARGE_TAIL, (1 - tail_P) / kept_P, 1)
            logprobs_PK = (logprobs_PK + np.log(factor_P)[:, None]).astype(np.float32).clip(max=0)
        return np.take_along_axis(ids_PK, order_PK, axis=1), logprobs_PK

    def rounding(self, logprobs_PK: Array) -> Array:
        """Return the largest error in nats of log-probs stored with 8 bits, or infinity at the scale's end."""
        kept_P1 = np.exp(logprobs_PK, dtype=np.float64).sum(1, keepdims=True)
        tail_P1 = (1 - kept_P1).clip(min=np.exp(scale.LEAST))
        of_tail_P1 = np.log1p(tail_P1 * np.expm1(scale.half_step(np.log(tail_P1))) / kept_P1)
        factor_P1 = scale.error_of_sum(logprobs_PK) + of_tail_P1
        return scale.rounding(logprobs_PK, np.where(kept_P1 < 1 - _LARGE_TAIL, 0, factor_P1))

    @cached_property
    def _ids(self) -> EliasFano:
        return EliasFano(end=self.vocab_size, low_bits=(self.vocab_size // self.k).bit_length() - 1)

    @property
    def _id_bytes(self) -> int:
        return -(-(self.k * (self._ids.low_bits + 1) + self._ids.num_zeros) // 8)
