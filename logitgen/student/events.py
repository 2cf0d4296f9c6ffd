"""Events whose log-probs compare teacher and student: all tokens, or the kept tokens and one event for the tail.

Shape letters: C captured positions of a chunk, V columns of the student's logits, W rows of the teacher's head, K kept
per position, E events.
"""

from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import kl_div

from logitgen.file.layout import FLOAT16_MAX

MIN_LOGPROB = -FLOAT16_MAX
"""Log-prob of impossible tokens: finite, so that 0 times it is 0, and as the file stores it."""


class _LogprobsAt(torch.autograd.Function):
    """Log-probs of some ids. Beside the logits there is one more tensor of their size, autograd would hold three."""

    @staticmethod
    def forward(ctx: Any, logits_CV: Tensor, ids_CK: Tensor) -> Tensor:
        largest_C1 = logits_CV.amax(-1, keepdim=True)
        log_sum_C1 = (logits_CV - largest_C1).exp_().sum(-1, keepdim=True).log()
        ctx.save_for_backward(logits_CV, ids_CK, largest_C1, log_sum_C1)
        return logits_CV.gather(-1, ids_CK) - largest_C1 - log_sum_C1

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope_CK: Tensor) -> tuple[Tensor, None]:
        logits_CV, ids_CK, largest_C1, log_sum_C1 = ctx.saved_tensors
        slope_CV = (logits_CV - largest_C1).sub_(log_sum_C1).exp_().mul_(-slope_CK.sum(-1, keepdim=True))
        return slope_CV.scatter_add_(-1, ids_CK, slope_CK), None


def logprobs_at(logits_CV: Tensor, ids_CK: Tensor) -> Tensor:
    """Return the log-probs of some ids among all V, [C, K], in the dtype of the logits."""
    return cast(Tensor, _LogprobsAt.apply(logits_CV, ids_CK))  # type: ignore[no-untyped-call]


def kept_events(student_CV: Tensor, ids_CK: Tensor, logprobs_CK: Tensor, *, ghost: bool) -> tuple[Tensor, Tensor]:
    """Describe both sides by the kept tokens, and with `ghost` by one more event: any other token comes.

    Args:
        student_CV: Logits.
        ids_CK: The teacher's kept ids. Ids without a column in the student's logits, a padded head's, fall to the tail.
        logprobs_CK: Their log-probs.
        ghost: True to make the tail an event.

    Returns:
        The teacher's and the student's log-probs, [C, K] or [C, K+1].
    """
    num_columns = student_CV.shape[-1]
    both = logprobs_CK, logprobs_at(student_CV, ids_CK.clamp(max=num_columns - 1))
    known_CK = ids_CK < num_columns
    kept = [torch.where(known_CK, logprobs, MIN_LOGPROB).clamp(min=MIN_LOGPROB) for logprobs in both]
    if ghost:
        kept = [torch.cat([logprobs, _tail_logprob(logprobs)], dim=-1) for logprobs in kept]
    return kept[0], kept[1]


def _tail_logprob(kept_CK: Tensor) -> Tensor:
    """Return the log of 1 minus the kept probabilities, [C, 1].

    Rounding can make their sum exceed 1. A tail is never less than the dtype can tell from 0, on both sides, so that it
    cancels.
    """
    kept_mass = kept_CK.logsumexp(-1, keepdim=True).clamp(max=-torch.finfo(kept_CK.dtype).eps)
    return (-torch.expm1(kept_mass)).log()


def sample_weights(logprobs_CK: Tensor, threshold_C: Tensor) -> Tensor:
    """Weigh sampled tokens: averaged over the draws, each token of the vocabulary has its probability.

    Args:
        logprobs_CK: Log-probs p of the kept tokens, drawn without replacement by Gumbel-top-k.
        threshold_C: kappa, the (K+1)-th perturbed log-prob.

    Returns:
        [C, K]: exp(p) divided by the probability that the token's perturbed log-prob exceeds kappa.

    Source: Vieira 2017, "Estimating means in a finite universe"; Kool et al. 2019, "Stochastic Beams and Where to Find
    Them", section 4.
    """
    logprobs_CK = logprobs_CK.clamp(min=MIN_LOGPROB)
    inclusion_CK = -torch.expm1(-(logprobs_CK - threshold_C[:, None]).exp())
    # A masked token, of probability 0, is kept where there is nothing else, and has an inclusion of 0 too.
    return logprobs_CK.exp() / inclusion_CK.clamp(min=torch.finfo(inclusion_CK.dtype).tiny)


def sampled_forward_kl(student_CV: Tensor, ids_CK: Tensor, logprobs_CK: Tensor, threshold_C: Tensor) -> Tensor:
    """Estimate KL(teacher || student) from sampled tokens, without bias in value and gradient, [C].

    The weights are not made to sum to 1: that would bring a bias back.
    """
    teacher_CK, student_CK = kept_events(student_CV, ids_CK, logprobs_CK, ghost=False)
    return (sample_weights(teacher_CK, threshold_C) * (teacher_CK - student_CK)).sum(-1)


def common_columns(student_CV: Tensor, teacher_CW: Tensor) -> tuple[Tensor, Tensor]:
    """Cut both sides' logits to the columns they share."""
    num_common = min(student_CV.shape[-1], teacher_CW.shape[-1])
    return teacher_CW[:, :num_common], student_CV[:, :num_common]


def normalised(logits_CE: Tensor) -> Tensor:
    """Turn logits into finite log-probs."""
    return logits_CE.log_softmax(-1).clamp(min=MIN_LOGPROB)


def kl_sum(of_CE: Tensor, from_CE: Tensor) -> Tensor:
    """Compute KL(of || from), both log-probs, summed over positions."""
    return kl_div(from_CE, of_CE, reduction="sum", log_target=True)
