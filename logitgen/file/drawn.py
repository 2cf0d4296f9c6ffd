r"""Packed draws: a record of fixed size that holds as many drawn tokens as fit.

Only a certain token needs a value. Whatever was drawn weighs the same, what the certain ones leave over the number of
others. So a record has room for K certain tokens, and where fewer are certain, more are drawn.

    gap      5 bits, of the tokens that are not certain: code c says that their mean log-prob is 10 (c/31)^2 nats below
             the level, the log of their weight
    ids      `elias_fano` code of 2 id + c below 2V, ascending, where c is 1 if the token was certain, with
             L = floor(log2(V / K)) + 1: the high parts, a zero more than (2V - 1) >> L among them, then the low bits
    values   from the record's end backwards: log of the rest, the probability of all tokens that are not certain, then
             the log-probs of the certain ones in the order of their ids; float16, or 8 bits of `scale`

The last zero of the high parts shows how many ids there are. The rest has a value of its own, because 1 minus the sum
of rounded probabilities would be far off where it is small. The mean is what the value of a KL divergence needs of the
drawn tokens: their common weight times each log-prob adds up to the same. Bytes of a record, root mean squared error of
the probabilities, and ids on average, without rounding (2,048 positions of prose, SmolLM2-135M, sizes of V = 151,936),
against records of K ids with a value each:

    K                    4       8       12      24      64      128
    K values, bytes      13      25      36      68      170     323
              error      0.319   0.191   0.140   0.082   0.037   0.021
    as many   bytes      15      27      39      73      179     341
    as fit    error      0.259   0.153   0.109   0.063   0.028   0.015
              ids        5.1     10.4    15.9    32.1    85.9    173.5

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

_GAP_BITS = 5
_GAP_CODES = np.arange(2**_GAP_BITS)
_GAPS = (10 * np.square(_GAP_CODES / _GAP_CODES[-1])).clip(min=1e-3).astype(np.float32)
"""The distance of each code, in nats; never 0, so that no drawn token looks certain."""
_MARGIN = 1e-3
"""Part of the least certain token by which the level is below it, so that rounding does not confuse them."""
_LARGE_REST = 0.5
"""Rest from which the certain tokens themselves give it better than its value does."""
_LEAST_KNOWN = -13.0
"""Log-prob from which it is sure which tokens were certain. The rest of less likely ones is lost in rounding."""


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
        """Ids that fit into a record, by the number of certain ids among them, from 0 to k.

        With k certain there are no others: all that are as likely as the last of them could be certain, too.
        """
        left = 8 * self.record_bytes - self._id_bits(0) - self.value_bits * np.arange(1, self.k + 1)
        return (*np.minimum(left // self._bits_per_id, self.num_ids).tolist(), self.k)

    def pack(
        self, ids_CW: "Tensor", logprobs_CW: "Tensor", num_certain_C: "Tensor", rest_logprob_C: "Tensor"
    ) -> "Tensor":
        """Pack the draws of some positions, on their own device.

        Args:
            ids_CW: The drawn ids, int64, distinct within a position, those that were certain first.
            logprobs_CW: Their log-probs in nats, float32, at most 0. Ids without a probability are left out.
            num_certain_C: How many were certain, int64.
            rest_logprob_C: Log of the probability of all ids that were not certain, in nats, float32.

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
        low_start = self._id_bits(0) + is_there_CW.sum(-1, keepdim=True)
        records = self._code.write(
            numbers_CW, is_there_CW, self.record_bytes, high_start=_GAP_BITS, low_start=low_start
        )

        rest_C1, is_stored = rest_logprob_C[:, None], torch.nn.functional.pad(is_certain_CW, (1, 0), value=True)
        stored = scale.packed(torch.cat([rest_C1, values_CW], dim=1), self.value_bits)
        place = self.record_bytes - self._value_bytes * is_stored.cumsum(-1)
        byte_B = torch.arange(self._value_bytes, device=ids_CW.device)
        places = (place[..., None] + byte_B).flatten(1)
        records.scatter_add_(1, places, (stored * is_stored[..., None]).flatten(1).long())
        records[:, 0] += _gap_codes(values_CW, is_there_CW ^ is_certain_CW, rest_logprob_C)
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
            high_start=_GAP_BITS,
            num_high=self.num_columns + self._code.num_zeros + 1,
            low_start=lambda num_P: self._id_bits(0) + num_P,
        )
        is_certain_E = numbers_E % 2 == 1
        num_certain_P = np.bincount(position_E, is_certain_E, len(num_P)).astype(np.int64)
        most_P = np.array(self.room).take(num_certain_P, mode="clip")
        if ((num_P == 0) | (num_P > most_P) | (num_certain_P > self.k)).any():
            raise ValueError("a packed record does not hold the ids of a draw")
        values_E = self._values(records_PR, position_E, is_certain_E, num_certain_P)
        if not (values_E <= 0).all():
            raise ValueError("a packed record holds a log-prob that is none")
        gap_P = _GAPS.take(records_PR[:, 0] & _GAP_CODES[-1])
        ids_PW = np.zeros((len(num_P), self.num_columns), np.int64)
        logprobs_PW = np.full(ids_PW.shape, -np.inf, np.float32)
        ids_PW[position_E, slot_E] = numbers_E >> 1
        logprobs_PW[position_E, slot_E] = _logprobs(values_E, is_certain_E, position_E, num_P, gap_P)
        if np.isnan(logprobs_PW).any():
            raise ValueError("a packed record holds more than all of the probability")
        order_PW = np.argsort(-logprobs_PW, axis=1, kind="stable")
        return np.take_along_axis(ids_PW, order_PW, axis=1), np.take_along_axis(logprobs_PW, order_PW, axis=1)

    def _values(self, records_PR: Array, position_E: Array, is_certain_E: Array, num_certain_P: Array) -> Array:
        """Read the value of each certain token, and that of the rest for each other, [E]."""
        first_byte = self.record_bytes - self._value_bytes * (self.k + 1)
        values_PV = scale.logprobs_of(scale.codes(records_PR[:, first_byte:], self.value_bits))
        number_E = is_certain_E.cumsum() - (num_certain_P.cumsum() - num_certain_P)[position_E]
        column_E = self.k - np.where(is_certain_E, number_E, 0)
        return np.asarray(values_PV.ravel().take(position_E * (self.k + 1) + column_E))

    def rounding(self, logprobs_PW: Array) -> Array:
        """Return the largest error in nats of the log-probs of certain tokens. It is infinity for others."""
        known_PW, bits = is_certain(logprobs_PW), self.value_bits
        own_PW = np.where(known_PW, logprobs_PW, -np.inf)
        certain_P1 = np.exp(own_PW, dtype=np.float64).sum(1, keepdims=True)
        rest_P1 = (1 - certain_P1).clip(min=np.exp(scale.LEAST))
        of_rest_P1 = np.log1p(
            rest_P1 * np.expm1(scale.half_step(np.log(rest_P1), bits)) / np.where(certain_P1, certain_P1, 1)
        )
        least_P1 = own_PW.min(1, keepdims=True, initial=0, where=known_PW)
        at_most_PW = np.where(known_PW | np.isneginf(logprobs_PW), own_PW, least_P1)
        of_own_P1, of_most_P1 = (scale.error_of_sum(values_PW, bits) for values_PW in (own_PW, at_most_PW))
        factor_P1 = np.maximum(of_own_P1 + of_rest_P1, of_most_P1) + _MARGIN
        return np.where(known_PW, scale.rounding(logprobs_PW, factor_P1, bits), np.inf)

    @cached_property
    def _code(self) -> EliasFano:
        return EliasFano(end=2 * self.vocab_size, low_bits=(self.vocab_size // self.k).bit_length())

    @property
    def _bits_per_id(self) -> int:
        return self._code.low_bits + 1

    def _id_bits(self, num_ids: int) -> int:
        """Bits of so many ids, and of the gap before them."""
        return _GAP_BITS + self._code.num_zeros + 1 + num_ids * self._bits_per_id

    @property
    def _value_bytes(self) -> int:
        return self.value_bits // 8


def _gap_codes(values_CW: "Tensor", is_drawn_CW: "Tensor", rest_logprob_C: "Tensor") -> "Tensor":
    """Encode how far the mean log-prob of the drawn tokens is below the level, int64[C], 0 if there are none."""
    num_drawn_C = is_drawn_CW.sum(-1)
    mean_C = values_CW.where(is_drawn_CW, 0).sum(-1) / num_drawn_C.clamp(min=1)
    gap_C = (rest_logprob_C - num_drawn_C.log() - mean_C).where(num_drawn_C > 0, 0).nan_to_num(0)
    code_C: Tensor = ((gap_C.clamp(0, 10) / 10).sqrt() * (2**_GAP_BITS - 1)).round().long()
    return code_C


def _logprobs(values_E: Array, is_certain_E: Array, position_E: Array, num_P: Array, gap_P: Array) -> Array:
    """Turn the values of certain tokens, and of the rest for every other, into log-probs.

    The certain tokens are scaled to what the rest leaves, and leave nothing if there are no others. None of them is
    below the level, the share of each other token in the rest.
    """
    if not len(num_P):
        return values_E
    starts_P, num_drawn_P = num_P.cumsum() - num_P, np.bincount(position_E, ~is_certain_E, len(num_P))
    probs_E = np.exp(values_E, dtype=np.float64).clip(min=np.finfo(np.float32).smallest_subnormal)
    certain_P = np.bincount(position_E, probs_E * is_certain_E, len(num_P))
    least_P = np.minimum.reduceat(np.where(is_certain_E, probs_E, np.inf), starts_P)
    rest_P = np.maximum.reduceat(np.where(is_certain_E, 0, probs_E), starts_P)
    rest_P = np.where(rest_P < _LARGE_REST, rest_P, 1 - certain_P)
    shares_P = np.minimum(num_drawn_P * least_P, np.finfo(np.float64).max)  # of the others, at the highest level
    rest_P = np.minimum(rest_P, shares_P / (certain_P + shares_P) * (1 - _MARGIN))
    rest_P = np.where(num_drawn_P, rest_P, -_MARGIN * least_P)  # above 1 together, however they are rounded
    factor_P = (1 - rest_P) / np.where(certain_P, certain_P, 1)
    with np.errstate(divide="ignore", invalid="ignore"):  # where there are no certain tokens, or no others
        level_P = np.log(rest_P / num_drawn_P)
        certain_E = np.log(probs_E * factor_P[position_E])
    return np.where(is_certain_E, certain_E, (level_P - gap_P)[position_E]).clip(max=0)


def is_certain(logprobs_PW: Array) -> Array:
    """Tell which of the unpacked log-probs are those of certain tokens, bool[P, W], and not of too unlikely ones.

    The others are one mean or fill up. It is the rule of the loss, in numpy: certain tokens are not below the least
    share of what those before leave.
    """
    probs_PW = np.exp(logprobs_PW, dtype=np.float64)
    num_left_PW = np.isfinite(logprobs_PW).sum(1, keepdims=True) - np.arange(probs_PW.shape[1])
    left_PW = 1 - (probs_PW.cumsum(1) - probs_PW)
    share_PW = np.where(num_left_PW > 0, left_PW / num_left_PW.clip(min=1), np.inf)
    return np.asarray((probs_PW >= share_PW.min(1, keepdims=True, initial=np.inf)) & (logprobs_PW > _LEAST_KNOWN))
