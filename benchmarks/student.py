"""The student's head and loss: from whole logits, against chunk by chunk, in peak memory and time.

    python -m benchmarks.student

Each way runs forward and backward over random hidden states and the kept tokens of a made-up teacher. Memory is that of
all tensors alive at once, without what both ways are given (hidden states, weight, the teacher's values) and without
the gradients that both return.
"""

import time
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

HEADS = {"SmolLM2-135M": (49_152, 576), "Qwen3-0.6B": (151_936, 1024)}
"""Vocabulary and hidden size of some heads."""

Batch = dict[str, Tensor]


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


WAYS = {"plain": plain, "chunked": loss_of_hidden}


def seconds_of(way: Any, *arguments: Any) -> float:
    """Time a forward and backward pass."""
    start = time.monotonic()
    way(*arguments).backward()
    return time.monotonic() - start


def peak_bytes_of(way: Any, *arguments: Any) -> int:
    """Add up all allocations of a forward and backward pass, and return the most at once."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        way(*arguments).backward()
    changes = sorted((event.start_ns(), event.nbytes()) for event in memory_events(seen))
    now = peak = 0
    for _, nbytes in changes:
        now += nbytes
        peak = max(peak, now)
    return peak


def memory_events(seen: Any) -> list[Any]:
    """All allocations and releases that a profile saw."""
    return [event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]


def main() -> None:
    """Measure both ways in turns, for every head."""
    options = parse(__doc__, positions=2048, top_k=64, rounds=3)
    table = []
    for name, (vocab_size, hidden_size) in HEADS.items():
        torch.manual_seed(0)
        attributes = {"capture": "topk", "vocab_size": vocab_size, "tokenizer_size": vocab_size}
        loss = DistillationLoss(SimpleNamespace(attributes=attributes, head=None))
        weight_VD = (torch.randn(vocab_size, hidden_size) / hidden_size**0.5).requires_grad_()
        hidden_BTD = torch.randn(1, options.positions, hidden_size, requires_grad=True)
        head = Head(weight_VD=weight_VD, bias_V=None, scale=1.0, soft_cap=0.0)
        arguments = loss, head, hidden_BTD, make_batch(options.positions, vocab_size, options.top_k)

        def fresh(way: Any, measure: Any, arguments: Any = arguments) -> float:
            _, of, hidden, _ = arguments
            of.weight_VD.grad = hidden.grad = None
            return float(measure(way, *arguments))

        gradient_bytes = 4 * (weight_VD.numel() + hidden_BTD.numel())
        peaks = {way: fresh(call, peak_bytes_of) - gradient_bytes for way, call in WAYS.items()}
        found = in_turns({way: lambda call=call: fresh(call, seconds_of) for way, call in WAYS.items()}, options.rounds)
        table += [
            {
                "head": f"{name}, V = {vocab_size:,}",
                "way": way,
                "peak memory, MB": peaks[way] / 1e6,
                "seconds": Spread.of(seconds),
                "time, plain = 1": Spread.of(seconds, found["plain"]),
            }
            for way, seconds in found.items()
        ]
    write_report(options.output, "student", table, {"seconds": ".1f", "time, plain = 1": ".2f"})


if __name__ == "__main__":
    main()
