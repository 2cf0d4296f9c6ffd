"""The values kept of a chunk of logits: pure tensor functions, computed in float32 on the device.

Ranks of a tensor-parallel teacher have a shard of the vocabulary each. They all return the same values.

Shape letters: C positions of a chunk, S ids of a shard of the vocabulary, K kept, G groups of ids, D hidden size.
"""

import functools
import logging
from collections.abc import Callable

import torch
from torch import Tensor

from logitgen.errors import first_line
from logitgen.file.layout import FLOAT16_MAX
from logitgen.head import stored
from logitgen.teacher.noise import gumbel
from logitgen.teacher.shard import WHOLE, VocabShard

logger = logging.getLogger(__name__)

_GROUP_SIZE = 8

_LEAST_GROUPS = 4
"""Groups per kept logit below which `torch.topk` is as fast."""

_CACHED_LOGITS = 2**19
"""Logits that stay in a core's second-level cache: 2 MiB as float32."""

_NEIGHBOURS = 32
"""Ids of a group on a GPU, where a kernel finds the largest of each."""

_GPU_PASS_LOGITS = 2**26
"""Logits copied to float32 at a time on a GPU without that kernel."""


def top_k(logits_CS: Tensor, target_C: Tensor, k: int, shard: VocabShard = WHOLE) -> dict[str, Tensor]:
    """Keep the k largest log-probs of each position.

    Args:
        logits_CS: The logits, float32 or in the dtype the teacher computes in.
        target_C: The actual next token, int64.
        k: Number of tokens to keep.
        shard: The ids of these logits.

    Returns:
        `kept_ids` int64[C, K] and `kept_logprobs` float32[C, K] (nats, descending), `logsumexp` and `target_logprob`
        float32[C]. The mass of the tail is 1 minus the sum of the kept probabilities.
    """
    candidates_CK, places_CK, logsumexp_C = _largest_and_logsumexp(logits_CS, min(k, logits_CS.shape[-1]))
    scalars = _scalars(logits_CS, target_C, logsumexp_C, shard)
    kept_CK, ids_CK = shard.merge(k, candidates_CK, places_CK)
    return scalars | {"kept_ids": ids_CK, "kept_logprobs": (kept_CK - scalars["logsumexp"][:, None]).clamp(max=0)}


def sample(
    logits_CS: Tensor, target_C: Tensor, k: int, key_C: Tensor, num_drawable: int, shard: VocabShard = WHOLE
) -> dict[str, Tensor]:
    """Draw k distinct tokens of each position without replacement, likely tokens more often.

    With kappa the threshold, token i is drawn with probability q_i = 1 - exp(-exp(log p_i - kappa)) given all others'
    noise. A weight of p_i / q_i is therefore p_i on average, for any k.

    Args:
        logits_CS: The logits, float32 or in the dtype the teacher computes in.
        target_C: The actual next token, int64.
        k: Number of tokens to draw.
        key_C: Key of each position's noise, int64.
        num_drawable: Ids from here on are never drawn.
        shard: The ids of these logits.

    Returns:
        The values of `top_k` for the drawn tokens, and `threshold` float32[C], the (k+1)-th largest log-prob plus
        noise.

    *Source*: T. Vieira, Gumbel-max trick and weighted reservoir sampling, 2014, and Estimating means in a finite
    universe, 2017; W. Kool, H. van Hoof, M. Welling, Stochastic beams and where to find them, ICML 2019, section 4.2.
    """
    scalars = _scalars(logits_CS, target_C, _logsumexp(logits_CS), shard)
    logprobs_CS = logits_CS[:, : max(0, num_drawable - shard.start)].float() - scalars["logsumexp"][:, None]
    size = logprobs_CS.shape[-1]
    noise_CS = gumbel(key_C, size, shard.start)
    perturbed_CK, places_CK = _largest(noise_CS.add_(logprobs_CS), min(k + 1, size))
    perturbed_CK, ids_CK, logprobs_CK = shard.merge(k + 1, perturbed_CK, places_CK, logprobs_CS.gather(1, places_CK))
    kept_CK, order_CK = logprobs_CK[:, :k].sort(-1, descending=True)
    return scalars | {
        "threshold": perturbed_CK[:, k].clamp(min=-FLOAT16_MAX),
        "kept_ids": ids_CK.gather(1, order_CK),
        "kept_logprobs": kept_CK.clamp(min=-FLOAT16_MAX, max=0),
    }


def full(logits_CS: Tensor, target_C: Tensor, shard: VocabShard = WHOLE) -> dict[str, Tensor]:
    """Keep every logit of each position, with the same scalars as `top_k`."""
    return _scalars(logits_CS, target_C, _logsumexp(logits_CS), shard) | {"logits": shard.whole(logits_CS).float()}


def hidden(logits_CS: Tensor, target_C: Tensor, hidden_CD: Tensor, shard: VocabShard = WHOLE) -> dict[str, Tensor]:
    """Keep the last hidden state of each position, with the same scalars as `top_k`."""
    return _scalars(logits_CS, target_C, _logsumexp(logits_CS), shard) | {"hidden": stored(hidden_CD)}


def _scalars(logits_CS: Tensor, target_C: Tensor, logsumexp_C: Tensor, shard: VocabShard) -> dict[str, Tensor]:
    logsumexp_C = shard.logsumexp(logsumexp_C)
    target_logprob_C = shard.pick(logits_CS, target_C).float() - logsumexp_C
    return {"logsumexp": logsumexp_C, "target_logprob": target_logprob_C.clamp(min=-FLOAT16_MAX, max=0)}


def _largest_and_logsumexp(logits_CS: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Find the k largest logits of each position, float32, descending, their ids, and the log-sum-exp of all."""
    if scan := _gpu_scan(logits_CS.device):
        logsumexp_C, group_largest_CG = scan(logits_CS, _NEIGHBOURS)
        largest_CK, places_CK = _largest_in_groups(logits_CS, k, group_largest_CG)
    else:
        largest_CK, places_CK = _largest(logits_CS, k)
        logsumexp_C = _logsumexp_in_passes(logits_CS, largest_CK[:, 0])
    return largest_CK.float(), places_CK, logsumexp_C


def _logsumexp(logits_CS: Tensor) -> Tensor:
    """Compute the log-sum-exp of each position, float32."""
    scan = _gpu_scan(logits_CS.device)
    return scan(logits_CS, _NEIGHBOURS)[0] if scan else _logsumexp_in_passes(logits_CS, logits_CS.amax(-1))


@functools.cache
def _gpu_scan(device: torch.device) -> Callable[[Tensor, int], tuple[Tensor, Tensor]] | None:
    """Return `fused.scan` where it runs: tried once, because Triton compiles on the spot and needs a C compiler."""
    if device.type != "cuda":
        return None
    try:
        from logitgen.teacher import fused

        fused.scan(torch.zeros((1, 1), device=device), _NEIGHBOURS)
    except Exception as error:  # Triton, the compiler or the driver may lack anything
        logger.warning("Triton cannot be used, %s; the logits are read several times.", first_line(error))
        return None
    return fused.scan


def _largest(logits_CS: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Find the k largest logits of each position, descending, and their ids: `torch.topk` in one pass over them.

    The k largest lie in the k groups with the largest maxima, and a recursive call finds these groups. Any of
    several equal logits may be kept, as with `torch.topk`. Measured, 1 thread, V = 49,152, k=64: 41 to 54 us a
    position, `torch.topk` 89 to 109.
    """
    num_ids = logits_CS.shape[-1]
    if k == 0 or num_ids < _GROUP_SIZE * _LEAST_GROUPS * k:
        return torch.topk(logits_CS, k)
    num_groups = num_ids // _GROUP_SIZE
    grouped = num_groups * _GROUP_SIZE
    # A group's members are far apart, so the maximum over all groups reads whole lines of memory.
    group_largest = logits_CS[:, :grouped].unflatten(-1, (_GROUP_SIZE, num_groups)).amax(1)
    _, groups_CK = _largest(group_largest, k)
    firsts = torch.arange(0, grouped, num_groups, device=logits_CS.device)
    rest = torch.arange(grouped, num_ids, device=logits_CS.device).expand(len(logits_CS), -1)
    candidates = torch.cat([(groups_CK[:, None, :] + firsts[:, None]).flatten(1), rest], dim=1)
    kept_CK, places_CK = torch.topk(logits_CS.gather(1, candidates), k)
    return kept_CK, candidates.gather(1, places_CK)


def _largest_in_groups(logits_CS: Tensor, k: int, group_largest_CG: Tensor) -> tuple[Tensor, Tensor]:
    """Find the k largest logits, given the largest logit of every group of neighbours."""
    num_ids, grouped = logits_CS.shape[-1], group_largest_CG.shape[-1] * _NEIGHBOURS
    if k == 0 or num_ids < _NEIGHBOURS * _LEAST_GROUPS * k:
        return torch.topk(logits_CS, k)
    groups_CK = torch.topk(group_largest_CG, k, sorted=False).indices
    members = groups_CK[..., None].expand(-1, -1, _NEIGHBOURS)
    candidates = logits_CS[:, :grouped].unflatten(-1, (-1, _NEIGHBOURS)).gather(1, members).flatten(1)
    if grouped < num_ids:  # the rest, too few for a group
        candidates = torch.cat([candidates, logits_CS[:, grouped:]], dim=1)
    kept_CK, places_CK = torch.topk(candidates, k)
    ids_CK = groups_CK.gather(1, (places_CK // _NEIGHBOURS).clamp(max=k - 1)) * _NEIGHBOURS + places_CK % _NEIGHBOURS
    rest_CK = places_CK + (grouped - k * _NEIGHBOURS)
    return kept_CK, torch.where(places_CK < k * _NEIGHBOURS, ids_CK, rest_CK)


def _logsumexp_in_passes(logits_CS: Tensor, largest_C: Tensor) -> Tensor:
    """Compute the log-sum-exp of each position from its largest logit. A CPU takes a few positions at a time, in cache.

    A shard whose tokens are all masked has -inf, not the difference of two infinities.

    Measured, 1 thread, V = 49,152: 55 us a position, `torch.logsumexp` 154.
    """
    largest_C = largest_C.float().clamp(min=torch.finfo(torch.float32).min)
    at_once = _CACHED_LOGITS if logits_CS.device.type == "cpu" else _GPU_PASS_LOGITS
    step = max(1, at_once // logits_CS.shape[-1])
    sums = [
        (part.float() - largest[:, None]).exp_().sum(-1)
        for part, largest in zip(logits_CS.split(step), largest_C.split(step), strict=True)
    ]
    return torch.cat(sums).log_() + largest_C
