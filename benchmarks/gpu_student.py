"""A part of `python -m benchmarks.gpu`: the student's head and loss, from whole logits and chunk by chunk."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any
from unittest import mock

import torch

from benchmarks.gpu_bench import Bench
from benchmarks.harness import Row, Spread, in_turns
from benchmarks.head import seconds_of
from benchmarks.student import Contest, Way, contests, random_head
from logitgen.estimate import _taken_bytes
from logitgen.head import Head
from logitgen.student import chunks
from logitgen.student.losses import DistillationLoss

CHUNKS = (2**26, 2**27, 2**28)
WAYS = ("plain", "chunked", "liger")


def student(bench: Bench) -> Iterator[Row]:
    """Time the loss and its gradients in bfloat16, from kept tokens and from hidden states, by the size of a chunk."""
    vocab_size, hidden_size = bench.scale.student_head
    torch.manual_seed(0)
    with bench.device:
        weight_VD = random_head(vocab_size, hidden_size).bfloat16().requires_grad_()
        hidden_BTD = torch.randn(
            1, bench.scale.student_positions, hidden_size, dtype=torch.bfloat16, requires_grad=True
        )
        found = contests(bench.scale.student_positions, 64, vocab_size, hidden_size)
    head = Head(weight_VD=weight_VD, bias_V=None, scale=1.0, soft_cap=0.0)
    for contest in found:
        if contest.loss.dataset.head:
            contest.loss.dataset.head = contest.loss.dataset.head.to(bench.device, torch.bfloat16)
            contest.batch["hidden"] = contest.batch["hidden"].bfloat16()
        yield from _compare(bench, contest, head, hidden_BTD)


def _compare(bench: Bench, contest: Contest, head: Head, hidden_BTD: torch.Tensor) -> Iterator[Row]:
    def forget() -> None:
        head.weight_VD.grad = hidden_BTD.grad = None

    def run(way: Way) -> None:
        forget()
        way(contest.loss, head, hidden_BTD, contest.batch).backward()

    works: dict[str, Callable[[], Any]] = {}
    for name in WAYS:
        way = contest.ways.get(name)
        if way and name == "liger":
            works[name] = partial(run, way)
        elif way:
            for chunk in CHUNKS:
                sized = mock.patch.object(chunks, "GPU_CHUNK_LOGITS", chunk)
                works[f"{name}, {chunk:,} logits"] = sized(partial(run, way))
    compiled = mock.patch.object(DistillationLoss, "parts_over", torch.compile(DistillationLoss.parts_over))
    works["compiled"] = compiled(partial(run, contest.ways["chunked"]))
    for work in works.values():
        work()  # what compiles, compiles here
    gradient_bytes = 2 * (head.weight_VD.numel() + hidden_BTD.numel())
    taken = {}
    for name, work in works.items():
        forget()
        taken[name] = _taken_bytes(bench.device, work)
    seconds = in_turns({name: partial(seconds_of, work) for name, work in works.items()}, 4)
    for name, times in seconds.items():
        yield {
            "from, way": f"{contest.kept}, {name}",
            "peak memory, MB": f"{(taken[name] - gradient_bytes) / 1e6:,.0f}",
            "ms": 1e3 * Spread.of(times).median,
            "plain = 1": Spread.of(times, seconds[f"plain, {CHUNKS[-1]:,} logits"]),
        }
