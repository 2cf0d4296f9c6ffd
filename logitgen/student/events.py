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
from logitgen.student.dataset import IGNORED_LABEL

MIN_LOGPROB = -FLOAT16_MAX
"""Log-prob of impossible tokens: finite, so that 0 times it is 0, and as the file stores it."""


def exact_dtype(device: torch.device) -> torch.dtype:
    """Return the dtype of sums that must be exact. Apple's GPUs lack float64."""
    return torch.float32 if device.type == "mps" else torch.float64


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


def kept_events(
    student_CV: Tensor, ids_CK: Tensor, logprobs_CK: Tensor, known_CK: Tensor | None = None, *, ghost: bool
) -> tuple[Tensor, Tensor]:
    """Describe both sides by the kept tokens, and with `ghost` by one more event: any other token comes.

    Args:
        student_CV: Logits.
        ids_CK: The teacher's kept ids. Ids without a column in the student's logits, a padded head's, fall to the tail.
        logprobs_CK: Their log-probs.
        known_CK: False for kept ids that fall to the tail as well. None stands for none.
        ghost: True to make the tail an event.

    Returns:
        The teacher's and the student's log-probs, [C, K] or [C, K+1].
    """
    num_columns = student_CV.shape[-1]
    both = logprobs_CK, logprobs_at(student_CV, ids_CK.clamp(max=num_columns - 1))
    here_CK = ids_CK < num_columns if known_CK is None else known_CK & (ids_CK < num_columns)
    kept = [torch.where(here_CK, logprobs, MIN_LOGPROB).clamp(min=MIN_LOGPROB) for logprobs in both]
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


def sample_level(logprobs_CK: Tensor) -> Tensor:
    """Find the level of drawn tokens, [C, 1]: raised to it, their probabilities sum to 1.

    Tokens from the level on are certain. Any other was drawn with a probability of its own divided by the level.

    Args:
        logprobs_CK: Log-probs of the drawn tokens, descending, -inf behind the last of a position.

    Returns:
        float64 where the device has it: little may be left of 1.

    *Source*: Cohen et al. 2009, "Stream sampling for variance-optimal estimation of subset sums", section 2. With the
    i likeliest certain, the k - i others share the rest of the probability; the least such share is the level. It is
    the teacher's: of the tokens that it was found from, those from it on are all kept.
    """
    probs_CK = _probs(logprobs_CK)
    rest_CK = 1 - (probs_CK.cumsum(-1) - probs_CK)
    num_C1 = (logprobs_CK > -torch.inf).sum(-1, keepdim=True)
    num_others_CK = num_C1 - torch.arange(probs_CK.shape[-1], device=probs_CK.device)
    share_CK = (rest_CK / num_others_CK.clamp(min=1)).where(num_others_CK > 0, torch.inf)
    return share_CK.amin(-1, keepdim=True).clamp(min=0)


def _probs(logprobs_CK: Tensor) -> Tensor:
    return logprobs_CK.to(exact_dtype(logprobs_CK.device)).exp()


def certain_tokens(logprobs_CK: Tensor) -> Tensor:
    """Tell which tokens of a draw were certain to be in it, bool[C, K]. No other token is likelier than one of them."""
    return (_probs(logprobs_CK) >= sample_level(logprobs_CK)) & (logprobs_CK > -torch.inf)


def sample_weights(logprobs_CK: Tensor) -> Tensor:
    """Weigh drawn tokens, [C, K]: averaged over the draws, each token of the vocabulary has its probability.

    The weights of a position sum to 1. A masked token, of probability 0, is kept where there is nothing else, and
    weighs nothing, whatever rounding leaves to the level.
    """
    weights_CK = _probs(logprobs_CK).maximum(sample_level(logprobs_CK)).to(logprobs_CK.dtype)
    return weights_CK.where(logprobs_CK > MIN_LOGPROB, 0)


def sampled_forward_kl(student_CV: Tensor, ids_CK: Tensor, logprobs_CK: Tensor) -> Tensor:
    """Estimate KL(teacher || student) from drawn tokens, without bias in value and gradient, [C]."""
    teacher_CK, student_CK = kept_events(student_CV, ids_CK, logprobs_CK, ghost=False)
    return (sample_weights(logprobs_CK) * (teacher_CK - student_CK)).sum(-1)


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


def cross_entropy_sum(student_CV: Tensor, labels_C: Tensor) -> Tensor:
    """Sum the student's cross-entropy with the tokens that came."""
    came_C = labels_C != IGNORED_LABEL
    return -logprobs_at(student_CV, labels_C.clamp(min=0)[:, None])[:, 0][came_C].sum()
