"""What a student is trained on: how far it is from the teacher's distribution, and which gradient it gives.

A target is all ids' probabilities, float32[P, V], or only some: `Kept`.

Shape letters: P positions, V vocabulary, K kept.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

LEAST_TAIL = 1e-6
"""Mass a tail has at least: rounded probabilities can add up to more than 1. The same as DistillKit's."""


@dataclass(frozen=True, eq=False)
class Kept:
    """A target of some ids."""

    ids: Tensor  # int64[P, K]; those of weight 0 fill up short records, and may repeat others unless there is a tail
    weights: Tensor  # float64[P, K]: probabilities, or weights whose mean they are
    has_tail: bool  # if not, the loss is the cross-entropy to the weights; else the mass missing to 1 is a token more

    @property
    def is_kept(self) -> Tensor:
        """Which entries are more than padding."""
        return self.weights > 0

    @property
    def tail(self) -> Tensor:
        """Mass of the tail, float64[P]; 0 where there is none."""
        return (1 - self.weights.sum(-1)).clamp(min=LEAST_TAIL) * self.has_tail


Target = Kept | Tensor


def dense(target: Target, vocab_size: int) -> Tensor:
    """Write a target's probabilities out, its tail spread evenly, float32[P, V]."""
    if isinstance(target, Tensor):
        return target
    evenly_P1 = (target.tail / (vocab_size - target.is_kept.sum(-1)))[:, None].float()
    probs_PV = evenly_P1.repeat(1, vocab_size)
    wanted_PK = torch.where(target.is_kept, target.weights.float() - evenly_P1, 0.0)
    return probs_PV.scatter_add_(-1, target.ids, wanted_PK)


def events(target: Target, true_PV: Tensor) -> tuple[Tensor, Tensor]:
    """Probabilities of what the loss tells apart, of the teacher and of the target: all of the tail is one token."""
    if isinstance(target, Tensor):
        return true_PV, target
    true_PK = true_PV.gather(-1, target.ids).double() * target.is_kept
    rest_P1 = (1 - true_PK.sum(-1, keepdim=True)).clamp(min=0)
    return torch.cat([true_PK, rest_P1], dim=-1), torch.cat([target.weights, target.tail[:, None]], dim=-1)


def divergence(target: Target, true_PV: Tensor) -> Tensor:
    """KL divergence of the teacher's distribution from the target's, all of the tail as one token; nats, float64[P].

    It is infinite where the target gives no probability to what has some.
    """
    true_PE, found_PE = events(target, true_PV)
    return (torch.xlogy(true_PE, true_PE) - torch.xlogy(true_PE, found_PE)).double().sum(-1)


def gradient(target: Target, student_PV: Tensor) -> Tensor:
    """Gradient of a target's loss by the student's logits, float32[P, V], given the student's probabilities s.

    All ids known, it is s - p. With a tail it is s - t for a kept id, and (1 - tail of t / tail of s) s for another: as
    if the student's tail had the right shape. Without a tail it is (sum of t) s - t.
    """
    if isinstance(target, Tensor):
        return student_PV - target
    weights_PK = target.weights.float()
    if not target.has_tail:
        return (student_PV * weights_PK.sum(-1, keepdim=True)).scatter_add_(-1, target.ids, -weights_PK)
    kept_PK = student_PV.gather(-1, target.ids)
    student_tail_P = (1 - (kept_PK * target.is_kept).double().sum(-1)).clamp(min=LEAST_TAIL)
    share_P1 = (1 - target.tail / student_tail_P).float()[:, None]
    wanted_PK = torch.where(target.is_kept, kept_PK - weights_PK, kept_PK * share_P1)
    return (student_PV * share_P1).scatter_(-1, target.ids, wanted_PK)


def top_ids(target: Target) -> Tensor:
    """The likeliest id of each position, int64[P]."""
    if isinstance(target, Tensor):
        return target.argmax(-1)
    return target.ids.gather(-1, target.weights.argmax(-1, keepdim=True))[:, 0]


def angle(found_XN: Tensor, wanted_XN: Tensor) -> Tensor:
    """Angle between vectors, in degrees, float32[X]: exact for small ones, too, where a cosine is all but 1."""
    directions_XN = wanted_XN / wanted_XN.norm(dim=-1, keepdim=True)
    along_X = (found_XN * directions_XN).sum(-1)
    across_X = torch.addcmul(found_XN, directions_XN, along_X[:, None], value=-1).norm(dim=-1)
    return torch.atan2(across_X, along_X) * (180 / math.pi)
