"""The values kept of a chunk of logits: pure tensor functions, computed in float32 on the device.

Ranks of a tensor-parallel teacher have a shard of the vocabulary each. They all return the same values.

Shape letters: C positions of a chunk, S ids of a shard of the vocabulary, K kept, G groups of ids, D hidden size.
"""

import functools
import logging
from collections.abc import Mapping, Sequence
from types import ModuleType

import torch
from torch import Tensor

from logitgen.errors import first_line
from logitgen.file import states
from logitgen.file.layout import FLOAT16_MAX, Encoding
from logitgen.head import stored
from logitgen.teacher.draw import GROUP_SIZE, Line, draw, finite
from logitgen.teacher.shard import WHOLE, VocabShard

logger = logging.getLogger(__name__)

_GROUP_SIZE = 8

_LEAST_GROUPS = 4
"""Groups per kept logit below which `torch.topk` is as fast."""

_CACHED_LOGITS = 2**19
"""Logits that stay in a core's second-level cache: 2 MiB as float32."""

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
    scalars = _scalars(logits_CS, target_C, shard.logsumexp(logsumexp_C), shard)
    kept_CK, ids_CK = shard.merge(k, candidates_CK, places_CK)
    return scalars | {"kept_ids": ids_CK, "kept_logprobs": (kept_CK - scalars["logsumexp"][:, None]).clamp(max=0)}


def sample(
    logits_CS: Tensor,
    target_C: Tensor,
    room: Sequence[int],
    key_C: Tensor,
    num_ids: int,
    shard: VocabShard = WHOLE,
) -> dict[str, Tensor]:
    """Draw distinct tokens of each position, as `draw` says: the likeliest for certain, others by their probability.

    Args:
        logits_CS: The logits, float32 or in the dtype the teacher computes in.
        target_C: The actual next token, int64.
        room: How many tokens to draw, by the number of certain ones, from 0 to k; never more for a larger number.
        key_C: Key of each position's random number, int64.
        num_ids: Ids from here on have no token, and no part of the probability.
        shard: The ids of these logits.

    Returns:
        The values of `top_k` for the drawn tokens, [C, W] with the most that are drawn, and how many were certain and
        what they leave: `num_certain` int64[C], `rest_logprob` float32[C]. If fewer are drawn, ids with a log-prob of
        -inf fill up.
    """
    k, width = len(room) - 1, max(0, min(num_ids - shard.start, logits_CS.shape[-1]))
    drawable_CS = logits_CS[:, :width] if width else logits_CS.new_full((len(logits_CS), 1), -torch.inf)
    drawn = draw(_line(drawable_CS, k, min(k, width), shard), key_C, room)
    logprobs_CW = (drawn.logits_CW - drawn.logsumexp_C[:, None]).clamp(max=0)
    logprobs_CW, order_CW = logprobs_CW.sort(stable=True, descending=True)
    return _scalars(logits_CS, target_C, drawn.logsumexp_C, shard) | {
        "kept_ids": drawn.ids_CW.gather(1, order_CW),
        "kept_logprobs": logprobs_CW,
        "num_certain": drawn.num_certain_C,
        "rest_logprob": drawn.rest_logprob_C,
    }


def full(logits_CS: Tensor, target_C: Tensor, shard: VocabShard = WHOLE) -> dict[str, Tensor]:
    """Keep every logit of each position, with the same scalars as `top_k`."""
    return _scalars(logits_CS, target_C, shard.logsumexp(_logsumexp(logits_CS)), shard) | {
        "logits": shard.whole(logits_CS).float()
    }


def hidden_states(
    logits_CS: Tensor, target_C: Tensor, hidden: Mapping[str, Tensor], encoding: Encoding, shard: VocabShard = WHOLE
) -> dict[str, Tensor]:
    """Keep the hidden states of each position, [C, D] by name, with the same scalars as `top_k`."""
    kept = _scalars(logits_CS, target_C, shard.logsumexp(_logsumexp(logits_CS)), shard)
    for name, states_CD in hidden.items():
        if encoding == "plain":
            kept[name] = stored(states_CD)
        else:
            kept[name], scale_CG = states.pack(states_CD)
            kept[f"{name}_scale"] = stored(scale_CG)
    return kept


def _scalars(logits_CS: Tensor, target_C: Tensor, logsumexp_C: Tensor, shard: VocabShard) -> dict[str, Tensor]:
    """Compute the scalars of each position. `capture.seal` refuses the NaN of one whose log-sum-exp is not finite."""
    target_logprob_C = (shard.pick(logits_CS, target_C).float() - logsumexp_C).clamp(min=-FLOAT16_MAX, max=0)
    return {
        "logsumexp": logsumexp_C,
        "target_logprob": target_logprob_C.where(logsumexp_C.isfinite(), torch.nan),
    }


def _largest_and_logsumexp(logits_CS: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Find the k largest logits of each position, float32, descending, their ids, and the log-sum-exp of all."""
    if kernel := _gpu_kernel(logits_CS.device):
        logsumexp_C, group_largest_CG = kernel.scan(logits_CS, GROUP_SIZE)
        largest_CK, places_CK = _largest_in_groups(logits_CS, k, group_largest_CG)
    else:
        largest_CK, places_CK = _largest(logits_CS, k)
        logsumexp_C = _logsumexp_in_passes(logits_CS, largest_CK[:, 0])
    return largest_CK.float(), places_CK, logsumexp_C


def _line(logits_CS: Tensor, k: int, num_candidates: int, shard: VocabShard) -> Line:
    """Find all that a draw of k ids needs; so many of this shard's logits may be among the k largest."""
    kernel = _gpu_kernel(logits_CS.device)
    if kernel:
        own_largest_C1, group_largest_CG, sums_CG = kernel.scan_groups(logits_CS, GROUP_SIZE)
        candidates_CK, places_CK = _largest_in_groups(logits_CS, num_candidates, group_largest_CG)
    else:
        candidates_CK, places_CK = _largest(logits_CS, num_candidates)
    kept_CK, ids_CK = shard.merge(k, candidates_CK.float(), places_CK)
    largest_C1 = finite(kept_CK[:, :1])
    sums_CG = sums_CG * (own_largest_C1 - largest_C1).exp() if kernel else _sums_in_passes(logits_CS, largest_C1)
    return Line(logits_CS, kept_CK, ids_CK, sums_CG, shard)


def _logsumexp(logits_CS: Tensor) -> Tensor:
    """Compute the log-sum-exp of each position, float32."""
    kernel = _gpu_kernel(logits_CS.device)
    return kernel.scan(logits_CS, GROUP_SIZE)[0] if kernel else _logsumexp_in_passes(logits_CS, logits_CS.amax(-1))


@functools.cache
def _gpu_kernel(device: torch.device) -> ModuleType | None:
    """Return `fused` where its kernel runs: tried once, because Triton compiles on the spot and needs a C compiler."""
    if device.type != "cuda":
        return None
    try:
        from logitgen.teacher import fused

        fused.scan(torch.zeros((1, 1), device=device), GROUP_SIZE)
    except Exception as error:  # Triton, the compiler or the driver may lack anything
        logger.warning("Triton cannot be used, %s; the logits are read several times.", first_line(error))
        return None
    return fused


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
    num_ids, grouped = logits_CS.shape[-1], group_largest_CG.shape[-1] * GROUP_SIZE
    if k == 0 or num_ids < GROUP_SIZE * _LEAST_GROUPS * k:
        return torch.topk(logits_CS, k)
    groups_CK = torch.topk(group_largest_CG, k, sorted=False).indices
    members = groups_CK[..., None].expand(-1, -1, GROUP_SIZE)
    candidates = logits_CS[:, :grouped].unflatten(-1, (-1, GROUP_SIZE)).gather(1, members).flatten(1)
    if grouped < num_ids:  # the rest, too few for a group
        candidates = torch.cat([candidates, logits_CS[:, grouped:]], dim=1)
    kept_CK, places_CK = torch.topk(candidates, k)
    ids_CK = groups_CK.gather(1, (places_CK // GROUP_SIZE).clamp(max=k - 1)) * GROUP_SIZE + places_CK % GROUP_SIZE
    rest_CK = places_CK + (grouped - k * GROUP_SIZE)
    return kept_CK, torch.where(places_CK < k * GROUP_SIZE, ids_CK, rest_CK)


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


def _sums_in_passes(logits_CS: Tensor, largest_C1: Tensor) -> Tensor:
    """Sum the exponentials of each group's logits, less the largest logit, float32[C, G]; a few positions at a time.

    Measured, 1 thread, V = 49,152: 10 us a position more than their sum.
    """
    num_positions, num_ids = logits_CS.shape
    sums_CG = largest_C1.new_empty((num_positions, -(-num_ids // GROUP_SIZE)))
    at_once = _CACHED_LOGITS if logits_CS.device.type == "cpu" else _GPU_PASS_LOGITS
    step = max(1, at_once // num_ids)
    exps_CS = largest_C1.new_zeros((min(step, num_positions), sums_CG.shape[1] * GROUP_SIZE))
    for part, largest, sums in zip(logits_CS.split(step), largest_C1.split(step), sums_CG.split(step), strict=True):
        exps = exps_CS[: len(part)]
        torch.sub(part, largest, out=exps[:, :num_ids]).exp_()
        torch.sum(exps.unflatten(-1, (-1, GROUP_SIZE)), -1, out=sums)
    return sums_CG
