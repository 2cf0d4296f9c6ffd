"""VarOpt sampling: of all ways to keep k ids of a position, the one whose unbiased estimate has the least variance.

The level tau is where min(1, p / tau), summed over all ids, is the number to draw. Ids of a larger probability p than
tau are certain: they are kept, with p as their weight. Each of the others is drawn with probability p / tau, and then
weighs tau. So an id weighs p on average, exactly that many are kept, and their weights always sum to 1.

For the draw, the others lie on a line in the order of their ids, each as long as its p. Marks stand on it tau apart,
the first at a random place below tau. The ids under them are drawn: no id is longer than tau, so no mark falls on an
id that has one. A position therefore needs a single random number, and of the line only the lengths of groups of
neighbours. The ids of a group are looked at where it has a mark, or an id that is certain.

Probabilities stand here relative to the likeliest id's: p is exp(logit - largest).

How many are drawn of a position may depend on its probabilities: a packed record holds more where fewer are certain. It
must not depend on the random number, or the weights would be biased.

Shape letters: C positions of a chunk, S ids of a shard of the vocabulary, G groups of them, M members of a group, K
ids that can be certain, W ids that can be drawn.

*Source*: E. Cohen, N. Duffield, H. Kaplan, C. Lund, M. Thorup, Stream sampling for variance-optimal estimation of
subset sums, SODA 2009 (level and weights); W. G. Madow, On the theory of systematic sampling, 1949 (the draw).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property

import torch
from torch import Tensor
from torch.nn.functional import pad

from logitgen.teacher.noise import uniform
from logitgen.teacher.shard import WHOLE, VocabShard

GROUP_SIZE = 32
"""Ids of a group: neighbours, so that the line has the same order however the vocabulary is cut among ranks."""

_ROUNDING = 2.0**-16
"""Ids shorter than tau by a smaller part are certain too: a length's rounding must not bring two marks to one id."""

_NOTHING = 2.0**-100
"""A level below it is 0: nothing but the likeliest ids has a probability, and all of them are certain."""


@dataclass(frozen=True)
class Draw:
    """The ids drawn of some positions.

    Attributes:
        ids_CW: The ids, int64, distinct, the certain ones first. Ids without a probability fill up.
        logits_CW: Their logits, float32, -inf for what fills up.
        num_certain_C: How many were certain, int64. Ids without a probability count if there are too few others.
        logsumexp_C: The log-sum-exp of all logits, float32.
        rest_logprob_C: Log of the probability of all ids that were not certain, float32.
    """

    ids_CW: Tensor
    logits_CW: Tensor
    num_certain_C: Tensor
    logsumexp_C: Tensor
    rest_logprob_C: Tensor


@dataclass(frozen=True)
class Line:
    """Ids as lengths on a line: what a rank knows of some positions.

    Attributes:
        logits_CS: Logits of the ids that can be drawn, one at least.
        kept_CK: The k largest logits of each position, of all shards, float32, descending.
        ids_CK: Their ids, int64.
        sums_CG: Sum of each group's lengths, float32; the last group may be narrower.
        shard: The ids of these logits.
    """

    logits_CS: Tensor
    kept_CK: Tensor
    ids_CK: Tensor
    sums_CG: Tensor
    shard: VocabShard = WHOLE

    @property
    def largest_C1(self) -> Tensor:  # noqa: N802
        """The largest logit of each position, finite."""
        return finite(self.kept_CK[:, :1])

    def below(self, bound_C1: Tensor) -> Tensor:
        """Sum the lengths of each group's ids below a logit, float32[C, G]: none but the largest are not below it."""
        groups_CK, logits_CKM, lengths_CKM = self._with_largest
        sums_CK = lengths_CKM.where(logits_CKM < bound_C1[..., None], 0).sum(-1)
        return self.sums_CG.scatter(1, groups_CK, sums_CK)

    @cached_property
    def _with_largest(self) -> tuple[Tensor, Tensor, Tensor]:
        """The groups that have the largest logits, [C, K], the logits and the lengths of their members, [C, K, M]."""
        groups_CK = ((self.ids_CK - self.shard.start) // GROUP_SIZE).clamp(0, self.sums_CG.shape[1] - 1)
        return groups_CK, *self._members(groups_CK)

    def _members(self, groups_CK: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logits of the ids of some groups, float32[C, K, M], -inf beyond the last id, and their lengths."""
        num_full = self.logits_CS.shape[1] // GROUP_SIZE
        full_CX, rest_CX = self.logits_CS.tensor_split((num_full * GROUP_SIZE,), dim=1)
        rest_C1M = pad(rest_CX, (0, GROUP_SIZE - rest_CX.shape[1]), value=-torch.inf)[:, None]
        if num_full:
            logits_CKM = _pick(full_CX.unflatten(1, (num_full, GROUP_SIZE)), groups_CK.clamp(max=num_full - 1))
        else:
            logits_CKM = rest_C1M
        if rest_CX.shape[1]:
            logits_CKM = logits_CKM.where((groups_CK < num_full)[..., None], rest_C1M)
        logits_CKM = logits_CKM.float()
        return logits_CKM, (logits_CKM - self.largest_C1[..., None]).exp_()

    def ids_at(self, marks_CK: Tensor, sums_CG: Tensor, ends_CG: Tensor, bound_C1: Tensor) -> tuple[Tensor, Tensor]:
        """Find the ids below a logit under some marks, and their logits, [C, K], given the groups' sums and ends."""
        marks_CK = marks_CK.minimum(_before(ends_CG[:, -1:])).clamp(min=0)
        groups_CK = torch.searchsorted(ends_CG, marks_CK, right=True).clamp(max=ends_CG.shape[1] - 1)
        sum_CK = sums_CG.gather(1, groups_CK)
        share_CK = ((marks_CK - (ends_CG.gather(1, groups_CK) - sum_CK)) / sum_CK).clamp(0, 1).float()
        logits_CKM, lengths_CKM = self._members(groups_CK)
        ends_CKM = lengths_CKM.where(logits_CKM < bound_C1[..., None], 0).cumsum(-1)
        end_CK1 = ends_CKM[..., -1:]  # rounded otherwise than the group's length; so the share counts
        inside_CK1 = (share_CK[..., None] * end_CK1).minimum(_before(end_CK1))
        places_CK1 = torch.searchsorted(ends_CKM, inside_CK1, right=True).clamp(max=GROUP_SIZE - 1)
        ids_CK = groups_CK * GROUP_SIZE + places_CK1[..., 0]
        return ids_CK.clamp(max=self.logits_CS.shape[1] - 1), logits_CKM.gather(-1, places_CK1)[..., 0]


def draw(line: Line, key_C: Tensor, room: Sequence[int]) -> Draw:
    """Draw ids of each position: as many as its record has room for.

    Args:
        line: The logits.
        key_C: The key of each position's random number, int64.
        room: How many ids fit, by the number of certain ids among them, from 0 to k; never more for a larger number.
    """
    num_C1, certain_CK, logsumexp_C = _certain(line, room)
    wider = (0, room[0] - certain_CK.shape[1])
    kept_CW = pad(line.kept_CK, wider, value=-torch.inf)
    ids_CW, certain_CW = pad(line.ids_CK, wider), pad(certain_CK, wider)
    bound_C1 = _least(kept_CW, certain_CW)
    sums_CG = line.below(bound_C1)
    ends_CG = sums_CG.cumsum(-1, dtype=_wide(key_C.device))
    ends_CS = line.shard.beside(ends_CG[:, -1:]).cumsum(-1)
    marks_CW = _marks(ends_CS[:, -1:], certain_CW, num_C1, key_C)
    start_C1, end_C1 = pad(ends_CS, (1, 0))[:, line.shard.index :][:, :2].split(1, dim=1)
    here_CW = (marks_CW >= start_C1) & (marks_CW < end_C1)
    drawn_CW, logits_CW = line.ids_at(marks_CW - start_C1, sums_CG, ends_CG, bound_C1)
    drawn_CW = line.shard.most((drawn_CW + line.shard.start).where(here_CW, -1))
    logits_CW = line.shard.most(logits_CW.where(here_CW, -torch.inf))
    # Logits that are not finite, which `capture.seal` refuses, leave marks that no shard has.
    as_kept_CW = certain_CW | (drawn_CW < 0)
    return Draw(
        ids_CW=ids_CW.where(as_kept_CW, drawn_CW),
        logits_CW=kept_CW.where(as_kept_CW, logits_CW),
        num_certain_C=certain_CW.sum(-1),
        logsumexp_C=logsumexp_C,
        rest_logprob_C=(ends_CS[:, -1].log().float() + line.largest_C1[:, 0] - logsumexp_C).clamp(max=0),
    )


def _certain(line: Line, room: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Tell how many ids are drawn, [C, 1], which of the k largest are certain, bool[C, K], and the log-sum-exp, [C].

    No sum is a difference: the little that is left of much would be mostly rounding.
    """
    kept_CK = line.kept_CK
    above_CK = kept_CK > kept_CK[:, -1:]
    wide = _wide(kept_CK.device)
    lengths_CK = (kept_CK - line.largest_C1).exp().to(wide)
    above_sums_CK = lengths_CK.where(above_CK, 0).flip(-1).cumsum(-1).flip(-1)
    rest_C1 = line.below(_least(kept_CK, above_CK)).sum(-1, keepdim=True, dtype=wide)
    left_CK = line.shard.beside(rest_C1).sum(-1, keepdim=True) + above_sums_CK
    room_K = _on_device(tuple(room), kept_CK.device)
    num_C1 = _most_drawn(lengths_CK, left_CK, above_CK, room_K)
    if room[0] > room[-1]:  # rounding, where ids are about as long as the level, must not overfill a record
        num_C1 = num_C1.minimum(room_K[_above_level(lengths_CK, left_CK, num_C1).sum(-1, keepdim=True)])
    certain_CK = _above_level(lengths_CK, left_CK, num_C1)
    return num_C1, certain_CK, left_CK[:, 0].log().float() + line.largest_C1[:, 0]


@cache
def _on_device(room: tuple[int, ...], device: torch.device) -> Tensor:
    """Copy to the device once: a GPU would wait for every copy."""
    return torch.tensor(room, device=device)


def _most_drawn(lengths_CK: Tensor, left_CK: Tensor, above_CK: Tensor, room_K: Tensor) -> Tensor:
    """Find the most ids that can be drawn, [C, 1].

    With i certain, as many as there is room for then, and fewer than make the next certain too: that is one as long as
    the level, its length times the number of those drawn from it on as much as they are long together.
    """
    place_CK = torch.arange(lengths_CK.shape[1], device=lengths_CK.device).minimum(above_CK.sum(-1, keepdim=True))
    below_next_CK = ((left_CK * (1 - _ROUNDING) / lengths_CK + place_CK).ceil() - 1).nan_to_num(nan=torch.inf)
    return pad(below_next_CK, (0, 1), value=torch.inf).minimum(room_K).amax(-1, keepdim=True).long()


def _above_level(lengths_CK: Tensor, left_CK: Tensor, num_C1: Tensor) -> Tensor:
    """Tell which of the largest are certain if so many ids are drawn, bool[C, K]."""
    num_left_CK = num_C1 - torch.arange(lengths_CK.shape[1], device=lengths_CK.device)
    level_C1 = (left_CK / num_left_CK).amin(-1, keepdim=True)
    return lengths_CK >= level_C1.where(level_C1 > _NOTHING, 0) * (1 - _ROUNDING)


def _marks(end_C1: Tensor, certain_CW: Tensor, num_C1: Tensor, key_C: Tensor) -> Tensor:
    """Set a mark for every id that is drawn, but not certain, on a line of some length, [C, W]; -1 for the others."""
    num_certain_C1 = certain_CW.sum(-1, keepdim=True)
    step_C1 = end_C1 / (num_C1 - num_certain_C1).clamp(min=1)
    place_W = torch.arange(certain_CW.shape[1], device=key_C.device)
    marks_CW = ((place_W - num_certain_C1 + uniform(key_C, step_C1.dtype)[:, None]) * step_C1).minimum(_before(end_C1))
    return marks_CW.where(place_W < num_C1, -1)


def _pick(values_CGM: Tensor, groups_CK: Tensor) -> Tensor:
    """Pick some groups of each position, [C, K, M].

    A CPU copies whole groups if they are the rows of one matrix, here of all that start anywhere. Measured in turns,
    1 thread, C = 341, G = 1,536, K = 64: a third of the time that two indices take.
    """
    num_positions, num_groups, width = values_CGM.shape
    position_C1 = torch.arange(num_positions, device=groups_CK.device)[:, None]
    if values_CGM.device.type != "cpu":
        return values_CGM[position_C1, groups_CK]
    by_position, by_group, by_member = values_CGM.stride()
    num_starts = max(0, (num_positions - 1) * by_position + (num_groups - 1) * by_group + 1)
    starts_XM = values_CGM.as_strided((num_starts, width), (1, by_member))
    start_CK = position_C1 * by_position + groups_CK * by_group
    return starts_XM.index_select(0, start_CK.flatten()).view(*start_CK.shape, width)


def finite(logits: Tensor) -> Tensor:
    """Replace -inf by the least number, so that differences of two are not NaN."""
    return logits.clamp(min=torch.finfo(logits.dtype).min)


def _wide(device: torch.device) -> torch.dtype:
    """Return the dtype of sums over the vocabulary. Apple's GPUs lack float64."""
    return torch.float32 if device.type == "mps" else torch.float64


def _least(kept_CK: Tensor, chosen_CK: Tensor) -> Tensor:
    """Return the smallest of the chosen logits, [C, 1], or infinity."""
    return kept_CK.where(chosen_CK, torch.inf).amin(-1, keepdim=True)


def _before(end: Tensor) -> Tensor:
    """Return the largest number below the end of a line."""
    return end.nextafter(torch.zeros_like(end))
