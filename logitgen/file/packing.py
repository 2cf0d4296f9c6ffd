r"""Packed records: the kept ids and log-probs of a position as one short string of bytes, exact in the ids.

A record of K ids below V, ascending, and of their log-probs in that order:

    ids      Elias-Fano code: the lowest L = floor(log2(V / K)) bits of each id, then K + ((V - 1) >> L) bits of which
             the (i + (id >> L))-th is set for the i-th id; lowest bit first, filled up to whole bytes
    values   K times float16, or K times 8 bits and, of the largest, 8 bits for the tail

An id takes little more than log2(V / K) + 2 bits, half a bit more than the least possible for any code for sets.

Code c of 8 bits is the probability (1 - c/256)^4: a scale that spends its levels where the divergence from the true
distribution arises. The rest of the divergence is mostly the tail's. As 1 minus the sum of rounded probabilities, a
small tail would be far off. Therefore it has a code of its own. Where the tail is below a half, the kept probabilities
are read back scaled to the rest it leaves. Mean divergence in nats of the values read from the values kept, the tail as
one token (2,523 positions of prose, SmolLM2-135M, V = 49,152):

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

Shape letters: C positions of a chunk, P positions, K kept, L low bits of an id, H bits of the high parts, R bytes of a
record.

*Source*: P. Elias, Efficient storage and retrieval by content and address of static files, J. ACM 21 (1974), for the
ids; the scale and the tail are measured.
"""

from dataclasses import dataclass
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
_END = float(_LOGPROBS[-2:].mean())
"""End of the scale: log-probs below it have the last code, however far below."""
_LARGE_TAIL = 0.5
"""Tail from which the kept probabilities themselves give the tail better than its code does."""


@dataclass(frozen=True, kw_only=True)
class Packing:
    """The packing of a file's records.

    Attributes:
        vocab_size: V, the upper bound of all ids.
        k: Ids in a record.
        value_bits: 8, or 16 for float16.
        has_tail: True if the ids are the likeliest, so that the mass of all others is a value too (8 bits only).
    """

    vocab_size: int
    k: int
    value_bits: int
    has_tail: bool

    @property
    def record_bytes(self) -> int:
        """Bytes of a record, R."""
        return self._id_bytes + self.k * self.value_bits // 8 + self.has_tail

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
        if self.has_tail:
            precise = torch.float32 if values_CK.device.type == "mps" else torch.float64  # Apple's GPUs lack float64
            tail_C = torch.log1p(-values_CK.to(precise).exp().sum(-1).clamp(max=1)).float()
            values_CK = torch.cat([values_CK, tail_C[:, None]], dim=1)
        if self.value_bits == 16:
            stored_CK = values_CK.clamp(min=torch.finfo(torch.float16).min).half().view(torch.uint8)
        else:
            stored_CK = (_LEVELS - (values_CK / _ROOT).exp() * _LEVELS).round().clamp(max=_LEVELS - 1).to(torch.uint8)
        return torch.cat([self._packed_ids(ids_CK), stored_CK], dim=1)

    def _packed_ids(self, ids_CK: "Tensor") -> "Tensor":
        import torch

        def arange(end: int) -> "Tensor":
            return torch.arange(end, device=ids_CK.device)

        low_CKL = (ids_CK[..., None] >> arange(self._low_bits)) & 1
        high_CH = ids_CK.new_zeros((len(ids_CK), self._high_bits))
        high_CH.scatter_(1, (ids_CK >> self._low_bits) + arange(self.k), 1)
        bits = torch.cat([low_CKL.flatten(1), high_CH], dim=1)
        bits = torch.nn.functional.pad(bits, (0, 8 * self._id_bytes - bits.shape[1])).unflatten(1, (self._id_bytes, 8))
        packed_CR: Tensor = (bits << arange(8)).sum(-1).to(torch.uint8)
        return packed_CR

    def unpack(self, records_PR: Array) -> tuple[Array, Array]:
        """Unpack records.

        Args:
            records_PR: uint8.

        Returns:
            Ids uint32[P, K] and log-probs in nats, descending, float32[P, K], or float16 if they are stored as such. If
            log-probs are equal, the smaller id comes first.

        Raises:
            ValueError: `pack` makes no such record.
        """
        ids_PK = self._unpacked_ids(records_PR[:, : self._id_bytes])
        stored_PK = np.ascontiguousarray(records_PR[:, self._id_bytes :]).view("u1" if self.value_bits == 8 else "<u2")
        codes_PK = stored_PK[:, : self.k]
        order_PK = np.argsort(codes_PK, axis=1, kind="stable")  # a larger code is a lower log-prob, in float16 too
        codes_PK = np.take_along_axis(codes_PK, order_PK, axis=1)
        logprobs_PK = codes_PK.view("<f2") if self.value_bits == 16 else _LOGPROBS[codes_PK]
        if self.has_tail:
            tail_P = np.exp(_LOGPROBS[stored_PK[:, -1]], dtype=np.float64)
            kept_P = np.exp(logprobs_PK, dtype=np.float64).sum(1)
            factor_P = np.where(tail_P < _LARGE_TAIL, (1 - tail_P) / kept_P, 1)
            logprobs_PK = (logprobs_PK + np.log(factor_P)[:, None]).astype(np.float32).clip(max=0)
        return np.take_along_axis(ids_PK, order_PK, axis=1), logprobs_PK

    def _unpacked_ids(self, bytes_PR: Array) -> Array:
        num_positions, num_low = len(bytes_PR), self.k * self._low_bits
        bits = np.unpackbits(bytes_PR, axis=1, bitorder="little")
        position, place = np.nonzero(bits[:, num_low : num_low + self._high_bits])
        if (np.bincount(position, minlength=num_positions) != self.k).any():
            raise ValueError(f"a packed record does not hold {self.k} ids")
        high_PK = (place.reshape(num_positions, self.k) - np.arange(self.k)).astype(np.uint32)
        low_PKL = bits[:, :num_low].reshape(num_positions, self.k, self._low_bits)
        low_PK = low_PKL @ (1 << np.arange(self._low_bits, dtype=np.uint32))
        return np.asarray((high_PK << self._low_bits) | low_PK)

    def rounding(self, logprobs_PK: Array) -> Array:
        """Return the largest error in nats of log-probs stored with 8 bits, or infinity at the scale's end."""
        off_PK = _half_step(logprobs_PK)
        if self.has_tail:  # its rounding, and that of all others, is in the factor of the kept
            probs_PK = np.exp(logprobs_PK, dtype=np.float64)
            kept_P1 = probs_PK.sum(1, keepdims=True)
            tail_P1 = (1 - kept_P1).clip(min=np.exp(_LOGPROBS[-1]))
            factor_P1 = np.log((probs_PK * np.exp(off_PK)).sum(1, keepdims=True) / kept_P1)
            factor_P1 += np.log1p(tail_P1 * np.expm1(_half_step(np.log(tail_P1))) / kept_P1)
            factor_P1[kept_P1 < 1 - _LARGE_TAIL] = 0
            off_PK = _half_step(logprobs_PK - factor_P1) + factor_P1
        return np.where(logprobs_PK > _END, off_PK, np.inf)

    @property
    def _low_bits(self) -> int:
        return (self.vocab_size // self.k).bit_length() - 1

    @property
    def _high_bits(self) -> int:
        return self.k + ((self.vocab_size - 1) >> self._low_bits)

    @property
    def _id_bytes(self) -> int:
        return -(-(self.k * self._low_bits + self._high_bits) // 8)


def _half_step(logprobs: Array) -> Array:
    """Return half a step of the 8-bit scale around log-probs, in nats."""
    root = np.exp(logprobs / _ROOT, dtype=np.float64).clip(min=1 / _LEVELS)
    return np.asarray(-_ROOT * np.log1p(-0.5 / _LEVELS / root))
