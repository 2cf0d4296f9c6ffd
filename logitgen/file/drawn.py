r"""Packed draws: a record of fixed size that holds as many drawn tokens as fit.

Only a certain token needs a value. Whatever was drawn weighs the same, what the certain ones leave over the number of
others. So a record has room for K certain tokens, and where fewer are certain, more are drawn.

    ids      `elias_fano` code of 2 id + c below 2V, ascending, where c is 1 if the token was certain, with
             L = floor(log2(V / K)) + 1: the high parts, a zero more than (2V - 1) >> L among them, then the low bits
    values   from the record's end backwards: the mean log-prob of the tokens that are not certain, then the log-probs
             of the certain ones in the order of their ids; float16, or 8 bits of `scale`

The last zero of the high parts shows how many ids there are. The mean is what the value of a KL divergence needs of the
drawn tokens: their common weight times each log-prob adds up to the same. Bytes of a record, root mean squared error of
the probabilities, and ids on average, without rounding (2,048 positions of prose, SmolLM2-135M, sizes of V = 151,936),
against records of K ids with a value each:

    K                    4       8       12      24      64      128
    K values, bytes      13      25      36      68      170     323
              error      0.319   0.191   0.140   0.082   0.037   0.021
    as many   bytes      15      27      38      72      179     340
    as fit    error      0.259   0.153   0.111   0.063   0.028   0.015
              ids        5.1     10.4    15.6    32.0    86.2    173.2

Shape letters: C positions of a chunk, P positions, W ids that come back, the most that fit, R bytes of a record, E ids
of all positions.
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

_MARGIN = 1e-3
"""Distance of the level to certain tokens and to the mean of the others, so that rounding does not confuse them."""


@dataclass(frozen=True, kw_only=True)
class DrawnPacking:
    """The packing of a file's draws.

    Attributes:
        vocab_size: V, the upper bound of all ids.
        num_ids: Ids that can be drawn.
        k: Certain ids that a record has room for, at most `num_ids`.
        value_bits: 8, or 16 for float16.
    """

    vocab_size: int
    num_ids: int
    k: int
    value_bits: int

    @property
    def num_columns(self) -> int:
        """Ids that come back, W: as many as fit into a record if none is certain."""
        return self.room[0]

    @property
    def record_bytes(self) -> int:
        """Bytes of a record, R."""
        return -(-self._id_bits(self.k) // 8) + self._value_bytes * (self.k + 1)

    @cached_property
    def room(self) -> tuple[int, ...]:
        """Ids that fit into a record, by the number of certain ids among them, from 0 to k."""
        left = (8 * (self.record_bytes - self._value_bytes * (certain + 1)) for certain in range(self.k + 1))
        return tuple(min(self.num_ids, (bits - self._id_bits(0)) // self._bits_per_id) for bits in left)

    def pack(self, ids_CW: "Tensor", logprobs_CW: "Tensor", num_certain_C: "Tensor") -> "Tensor":
        """Pack the draws of some positions, on their own device.

        Args:
            ids_CW: The drawn ids, int64, distinct within a position, those that were certain first.
            logprobs_CW: Their log-probs in nats, float32, at most 0. Ids without a probability are left out.
            num_certain_C: How many were certain, int64.

        Returns:
            The records, uint8[C, R].
        """
        import torch

        slot_W = torch.arange(ids_CW.shape[1], device=ids_CW.device)
        is_certain_CW = slot_W < num_certain_C[:, None]
        numbers_CW = (2 * ids_CW + is_certain_CW).where(logprobs_CW.exp() > 0, self._code.end)
        numbers_CW, order_CW = numbers_CW.sort(-1)
        values_CW = logprobs_CW.gather(-1, order_CW)
        is_there_CW = numbers_CW < self._code.end
        is_certain_CW = is_there_CW & (numbers_CW % 2 == 1)
        low_start = is_there_CW.sum(-1, keepdim=True) + self._code.num_zeros + 1
        records = self._code.write(numbers_CW, is_there_CW, self.record_bytes, high_start=0, low_start=low_start)

        is_drawn_CW = is_there_CW ^ is_certain_CW
        num_drawn_C1 = is_drawn_CW.sum(-1, keepdim=True).clamp(min=1)
        mean_C1 = values_CW.where(is_drawn_CW, 0).sum(-1, keepdim=True) / num_drawn_C1
        stored = scale.packed(torch.cat([mean_C1, values_CW], dim=1), self.value_bits)
        is_stored = torch.nn.functional.pad(is_certain_CW, (1, 0), value=True)
        place = self.record_bytes - self._value_bytes * is_stored.cumsum(-1)
        byte_B = torch.arange(self._value_bytes, device=ids_CW.device)
        places = (place[..., None] + byte_B).flatten(1)
        records.scatter_add_(1, places, (stored * is_stored[..., None]).flatten(1).long())
        return records.to(torch.uint8)

    def unpack(self, records_PR: Array) -> tuple[Array, Array]:
        """Unpack records.

        Args:
            records_PR: uint8.

        Returns:
            Ids int64[P, W] and log-probs in nats, descending, float32[P, W]. Tokens that were not certain all have
            their mean log-prob. Places that a record does not fill have id 0 and -inf. If log-probs are equal, the
            smaller id comes first.

        Raises:
            ValueError: `pack` makes no such record.
        """
        num_P, position_E, slot_E, numbers_E = self._code.read(
            records_PR,
            high_start=0,
            num_high=self.num_columns + self._code.num_zeros + 1,
            low_start=lambda num_P: num_P + self._code.num_zeros + 1,
        )
        is_certain_E = numbers_E % 2 == 1
        num_certain_P = np.bincount(position_E, is_certain_E, len(num_P)).astype(np.int64)
        most_P = np.array(self.room).take(num_certain_P, mode="clip")
        if ((num_P == 0) | (num_P > most_P) | (num_certain_P > self.k)).any():
            raise ValueError("a packed record does not hold the ids of a draw")
        first_value = self.record_bytes - self._value_bytes * (self.k + 1)
        codes_PV = scale.codes(records_PR[:, first_value:], self.value_bits)
        number_E = is_certain_E.cumsum() - np.repeat(num_certain_P.cumsum() - num_certain_P, num_P)
        column_E = self.k - np.where(is_certain_E, number_E, 0)
        values_E = scale.logprobs_of(codes_PV.ravel().take(position_E * (self.k + 1) + column_E)).astype(np.float32)
        if not (values_E <= 0).all():
            raise ValueError("a packed record holds a log-prob that is none")
        if len(num_P):
            values_E -= np.log(_total(values_E, is_certain_E, num_P, num_certain_P)).astype(np.float32)[position_E]
        ids_PW = np.zeros((len(num_P), self.num_columns), np.int64)
        logprobs_PW = np.full(ids_PW.shape, -np.inf, np.float32)
        ids_PW[position_E, slot_E], logprobs_PW[position_E, slot_E] = numbers_E >> 1, values_E.clip(max=0)
        order_PW = np.argsort(-logprobs_PW, axis=1, kind="stable")
        return np.take_along_axis(ids_PW, order_PW, axis=1), np.take_along_axis(logprobs_PW, order_PW, axis=1)

    def rounding(self, logprobs_PW: Array) -> Array:
        """Return the largest error in nats of log-probs stored with 8 bits, or infinity at the scale's end."""
        least_P1 = logprobs_PW.min(1, keepdims=True, initial=0, where=is_certain(logprobs_PW))
        at_most_PW = np.where(is_certain(logprobs_PW) | np.isneginf(logprobs_PW), logprobs_PW, least_P1)
        of_sum_P1 = np.maximum(scale.error_of_sum(logprobs_PW), scale.error_of_sum(at_most_PW))
        return scale.rounding(logprobs_PW, of_sum_P1 + _MARGIN)

    @cached_property
    def _code(self) -> EliasFano:
        return EliasFano(end=2 * self.vocab_size, low_bits=(self.vocab_size // self.k).bit_length())

    @property
    def _bits_per_id(self) -> int:
        return self._code.low_bits + 1

    def _id_bits(self, num_ids: int) -> int:
        """Bits of the ids of a record."""
        return num_ids * self._bits_per_id + self._code.num_zeros + 1

    @property
    def _value_bytes(self) -> int:
        return self.value_bits // 8


def is_certain(logprobs_PW: Array) -> Array:
    """Tell which log-probs of unpacked draws are a token's own, bool[P, W]: no mean of several, and no filler."""
    least_P1 = logprobs_PW.min(1, keepdims=True, initial=0, where=logprobs_PW > -np.inf)
    is_least_PW = logprobs_PW == least_P1
    return np.asarray((logprobs_PW > -np.inf) & ~(is_least_PW & (is_least_PW.sum(1, keepdims=True) > 1)))


def _total(logprobs_E: Array, is_certain_E: Array, num_P: Array, num_certain_P: Array) -> Array:
    """Return what the probabilities of each position were rounded to together instead of 1, as far as that shows, [P].

    The certain tokens leave to the others a level each, which is above the mean of these and below every certain token.
    They leave nothing if there are no others.
    """
    starts_P, num_drawn_P = num_P.cumsum() - num_P, num_P - num_certain_P
    probs_E = np.exp(logprobs_E, dtype=np.float64).clip(min=np.finfo(np.float32).smallest_subnormal)
    certain_P = np.add.reduceat(probs_E * is_certain_E, starts_P)
    least_certain_P = np.minimum.reduceat(np.where(is_certain_E, probs_E, 1), starts_P)
    mean_P = np.minimum.reduceat(np.where(is_certain_E, 1, probs_E), starts_P)
    most_P = certain_P + (num_drawn_P - _MARGIN) * least_certain_P
    least_P = certain_P + num_drawn_P * (1 + _MARGIN) * mean_P
    return np.where(num_drawn_P, np.maximum(least_P, np.minimum(1, most_P)), most_P)
