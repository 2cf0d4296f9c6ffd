"""The student's head and loss: from whole logits, against chunk by chunk, in peak memory and time.

    python -m benchmarks.student

Each way runs forward and backward over random hidden states and the kept tokens, or the whole distributions, of a
made-up teacher. Memory is that of all tensors alive at once, without what all ways are given (hidden states, weights,
the teacher's values) and without the gradients that they return.

Where `liger_kernel` and `axolotl` can be imported, their fused losses take part: Liger's from the teacher's hidden
states, axolotl's from kept tokens, which it renormalises. Both are as their trainers call them, compiled.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear
from torch.profiler import ProfilerActivity, profile

from benchmarks.harness import Spread, in_turns, parse, write_report
from logitgen import DistillationLoss
from logitgen.head import Head
from logitgen.student.chunked import loss_of_hidden
from logitgen.student.measure import Meter

HEADS = {"SmolLM2-135M": (49_152, 576), "Qwen3-0.6B": (151_936, 1024)}
"""Vocabulary and hidden size of some heads."""

Batch = dict[str, Tensor]
Way = Callable[[DistillationLoss, Head, Tensor, Batch], Tensor]


def make_batch(num_positions: int, vocab_size: int, k: int) -> Batch:
    """Make up one row whose positions all have k kept tokens, as `collate` hands it over."""
    shape = (1, num_positions, k)
    return {
        "captured": torch.ones(1, num_positions, dtype=torch.bool),
        "labels": torch.randint(vocab_size, (1, num_positions)),
        "kept_ids": torch.rand(num_positions, vocab_size).topk(k).indices.view(shape),
        "kept_logprobs": torch.randn(shape).log_softmax(-1) - 0.1,
    }


def plain(loss: DistillationLoss, head: Head, hidden_BTD: Tensor, batch: Batch) -> Tensor:
    """Compute the loss from whole logits."""
    return loss(linear(hidden_BTD, head.weight_VD), batch)


def measured(loss: DistillationLoss, head: Head, hidden_BTD: Tensor, batch: Batch) -> Tensor:
    """Compute the loss chunk by chunk, and all that `distil(..., measure=True)` measures."""
    return loss_of_hidden(loss, head, hidden_BTD, batch, watch=partial(Meter(loss).add, training=True))


WAYS: dict[str, Way] = {"plain": plain, "chunked": loss_of_hidden, "measured": measured}


def liger() -> Way | None:
    """Liger's fused Jensen-Shannon divergence, the forward KL at its end."""
    try:
        from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss
    except ImportError:
        return None
    fused = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.0)

    def way(loss: DistillationLoss, head: Head, hidden_BTD: Tensor, batch: Batch) -> Tensor:
        teacher = loss.dataset.head.weight_VD
        value: Tensor = fused(hidden_BTD[0], head.weight_VD, batch["hidden"][0], teacher, batch["labels"][0])
        return value

    return way


def axolotl() -> Way | None:
    """Axolotl's fused loss from kept tokens, made to sum to 1 on both sides."""
    try:
        from axolotl.integrations.kd.kernels.liger import LigerFusedLinearKLTopKLogprobLoss
    except ImportError:
        return None
    fused = LigerFusedLinearKLTopKLogprobLoss(0.0, 1.0, 1.0, 0.0, compute_ce_loss=False, normalize_topk=True)

    def way(loss: DistillationLoss, head: Head, hidden_BTD: Tensor, batch: Batch) -> Tensor:
        targets = batch["kept_logprobs"].log_softmax(-1)
        mask = torch.ones_like(batch["kept_ids"])
        value: Tensor = fused(head.weight_VD, hidden_BTD, batch["kept_ids"], targets, mask, true_labels=batch["labels"])
        return value / hidden_BTD.shape[1]

    return way


@dataclass(frozen=True)
class Contest:
    """Ways to one loss, and what they are given."""

    kept: str
    ways: dict[str, Way]
    loss: DistillationLoss
    batch: Batch


def contests(num_positions: int, top_k: int, vocab_size: int, hidden_size: int) -> list[Contest]:
    """Make up a teacher's kept tokens, and its hidden states with a head."""
    sizes = {"vocab_size": vocab_size, "tokenizer_size": vocab_size}
    kept = SimpleNamespace(attributes={"capture": "topk", **sizes}, head=None)
    teacher = Head(weight_VD=random_head(vocab_size, hidden_size), bias_V=None, scale=1.0, soft_cap=0.0)
    whole = SimpleNamespace(attributes={"capture": "hidden", **sizes}, head=teacher)
    batch = make_batch(num_positions, vocab_size, top_k)
    hidden = {name: batch[name] for name in ("captured", "labels")}
    hidden["hidden"] = torch.randn(1, num_positions, hidden_size)
    found = [Contest(f"top {top_k}", WAYS, DistillationLoss(kept), batch)]
    if fused := axolotl():
        without_tail = {"plain": plain, "chunked": loss_of_hidden, "axolotl": fused}
        found.append(Contest(f"top {top_k}, no tail", without_tail, DistillationLoss(kept, tail="ignore"), batch))
    others = {"liger": fused} if (fused := liger()) else {}
    return [*found, Contest("hidden states", WAYS | others, DistillationLoss(whole), hidden)]


def random_head(vocab_size: int, hidden_size: int) -> Tensor:
    return torch.randn(vocab_size, hidden_size) / hidden_size**0.5


def seconds_of(way: Any, *arguments: Any) -> float:
    """Time a forward and backward pass."""
    start = time.monotonic()
    way(*arguments).backward()
    return time.monotonic() - start


def peak_bytes_of(way: Any, *arguments: Any) -> tuple[int, float]:
    """Add up all allocations of a forward and backward pass, and return the most at once, and the loss."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        value = way(*arguments)
        value.backward()
    changes = sorted((event.start_ns(), event.nbytes()) for event in memory_events(seen))
    now = peak = 0
    for _, nbytes in changes:
        now += nbytes
        peak = max(peak, now)
    return peak, value.item()


def memory_events(seen: Any) -> list[Any]:
    """All allocations and releases that a profile saw."""
    return [event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]


def main() -> None:
    """Measure all ways in turns, for every head and every kind of values."""
    options = parse(__doc__, positions=2048, top_k=64, rounds=3, heads=list(HEADS))
    table = []
    for name in options.heads:
        vocab_size, hidden_size = HEADS[name]
        torch.manual_seed(0)
        head = Head(
            weight_VD=random_head(vocab_size, hidden_size).requires_grad_(), bias_V=None, scale=1.0, soft_cap=0.0
        )
        hidden_BTD = torch.randn(1, options.positions, hidden_size, requires_grad=True)
        for contest in contests(options.positions, options.top_k, vocab_size, hidden_size):
            rows = compare(contest, head, hidden_BTD, options.rounds)
            table += [{"head": f"{name}, V = {vocab_size:,}", "from": contest.kept} | row for row in rows]
    formats = {"seconds": ".1f", "time, plain = 1": ".2f", "loss": ".6f"}
    write_report(options.output, "student", table, formats)


def compare(contest: Contest, head: Head, hidden_BTD: Tensor, rounds: int) -> list[dict[str, Any]]:
    """Measure every way's memory, then their times in turns."""

    def fresh(measure: Callable[..., Any], way: Way) -> Any:
        head.weight_VD.grad = hidden_BTD.grad = None
        return measure(way, contest.loss, head, hidden_BTD, contest.batch)

    gradient_bytes = 4 * (head.weight_VD.numel() + hidden_BTD.numel())
    first = {name: fresh(peak_bytes_of, way) for name, way in contest.ways.items()}  # what compiles, compiles here
    found = in_turns({name: partial(fresh, seconds_of, way) for name, way in contest.ways.items()}, rounds)
    return [
        {
            "way": name,
            "peak memory, MB": (first[name][0] - gradient_bytes) / 1e6,
            "seconds": Spread.of(seconds),
            "time, plain = 1": Spread.of(seconds, found["plain"]),
            "loss": first[name][1],
        }
        for name, seconds in found.items()
    ]


if __name__ == "__main__":
    main()
