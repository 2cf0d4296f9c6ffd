"""What a student is trained on: how far it is from the teacher's distribution, and which gradient it gives.

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
    """A target of some ids.

    Attributes:
        ids: int64[P, K]. Those of weight 0 fill up short records, and may repeat others unless there is a tail.
        weights: float64[P, K]: probabilities, or weights whose mean they are.
        has_tail: Whether the mass missing to 1 is one more token of the loss. If not, the loss is the cross-entropy
            to the weights as they are.
    """

    ids: Tensor
    weights: Tensor
    has_tail: bool

    @property
    def is_kept(self) -> Tensor:
        """Which entries are more than padding."""
        return self.weights > 0

    @property
    def tail(self) -> Tensor:
        """Mass of the tail, float64[P]; 0 where there is none."""
        return (1 - self.weights.sum(-1)).clamp(min=LEAST_TAIL) * self.has_tail


@dataclass(frozen=True, eq=False)
class Whole:
    """A target of all ids: their probabilities, float32[P, V]."""

    probs: Tensor


Target = Kept | Whole


class Truth:
    """The teacher's distribution.

    Attributes:
        probs: float32[P, V].
        squares: Sum of the squared probabilities, float64[P].
        negentropy: Sum of p log p, float64[P].
    """

    def __init__(self, logits_PV: Tensor) -> None:
        """Take it from float32 logits."""
        self.probs = logits_PV.softmax(-1)
        self.squares = torch.stack([row.double().square().sum() for row in self.probs])
        self.negentropy = torch.stack([torch.xlogy(row.double(), row.double()).sum() for row in self.probs])

    def at(self, target: Kept) -> Tensor:
        """Probabilities of the kept ids, float64[P, K], 0 at padding."""
        return self.probs.gather(-1, target.ids).double() * target.is_kept


def squared_error(target: Target, truth: Truth) -> Tensor:
    """Squared distance between the target's probabilities and the teacher's, its tail spread evenly; float64[P]."""
    if isinstance(target, Whole):
        return (target.probs - truth.probs).double().square().sum(-1)
    true_PK, evenly_P, num_tail_P = truth.at(target), *_spread(target, truth)
    kept_P = (target.weights - true_PK).square().sum(-1)
    tail_mass_P, tail_square_P = 1 - true_PK.sum(-1), truth.squares - true_PK.square().sum(-1)
    return kept_P + tail_square_P - 2 * evenly_P * tail_mass_P + num_tail_P * evenly_P.square()


def divergence(target: Target, truth: Truth) -> tuple[Tensor, Tensor]:
    """KL divergence of the teacher's distribution from the target's, in nats, float64[P] each.

    Returns:
        With all of the tail as one token, which is what the loss sees; and token by token, the tail spread evenly.
        Both are infinite where the target gives no probability to what has some.
    """
    if isinstance(target, Whole):
        true_PV, found_PV = truth.probs, target.probs
        whole_P = (torch.xlogy(true_PV, true_PV) - torch.xlogy(true_PV, found_PV)).double().sum(-1)
        return whole_P, whole_P
    true_PK, (evenly_P, _) = truth.at(target), _spread(target, truth)
    true_log_PK = torch.xlogy(true_PK, true_PK)
    kept_P = (true_log_PK - torch.xlogy(true_PK, target.weights)).sum(-1)
    tail_mass_P = (1 - true_PK.sum(-1)).clamp(min=0)
    as_one_P = torch.xlogy(tail_mass_P, tail_mass_P) - torch.xlogy(tail_mass_P, target.tail)
    evenly_spread_P = truth.negentropy - true_log_PK.sum(-1) - torch.xlogy(tail_mass_P, evenly_P)
    return kept_P + as_one_P, kept_P + evenly_spread_P


def _spread(target: Kept, truth: Truth) -> tuple[Tensor, Tensor]:
    """Probability of each id of the tail, if all have the same, and how many there are."""
    num_tail_P = truth.probs.shape[-1] - target.is_kept.sum(-1)
    return target.tail / num_tail_P, num_tail_P


def gradient(target: Target, student_PV: Tensor) -> Tensor:
    """Gradient of a target's loss by the student's logits, float32[P, V], given the student's probabilities s.

    All ids known, it is s - p. With a tail it is s - t for a kept id, and (1 - tail of t / tail of s) s for another: as
    if the student's tail had the right shape. Without a tail it is (sum of t) s - t.
    """
    if isinstance(target, Whole):
        return student_PV - target.probs
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
    if isinstance(target, Whole):
        return target.probs.argmax(-1)
    return target.ids.gather(-1, target.weights.argmax(-1, keepdim=True))[:, 0]


def angle(found_XN: Tensor, wanted_XN: Tensor) -> Tensor:
    """Angle between vectors, in degrees, float32[X]: exact for small ones, too, where a cosine is all but 1."""
    directions_XN = wanted_XN / wanted_XN.norm(dim=-1, keepdim=True)
    along_X = (found_XN * directions_XN).sum(-1)
    across_X = torch.addcmul(found_XN, directions_XN, along_X[:, None], value=-1).norm(dim=-1)
    return torch.atan2(across_X, along_X) * (180 / math.pi)
