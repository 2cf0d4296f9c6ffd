"""Every way to keep a position that is compared in `benchmarks/fidelity.py`: our own and others'.

Shape letters: P positions of a batch, V vocabulary, D hidden size, K kept.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from benchmarks import rivals
from benchmarks.targets import Kept, Target, gradient
from logitgen.file import states
from logitgen.file.layout import FLOAT16_MAX, STORED_DTYPES, Encoding, Layout, id_dtype, nbytes
from logitgen.file.states import HeadForm
from logitgen.head import Head, dtype_name
from logitgen.student.events import certain_tokens, sample_weights
from logitgen.teacher.keep import sample, top_k
from logitgen.teacher.noise import position_keys

LARGE_VOCAB = 151_936
"""Qwen's, at which others give their sizes."""

KEPT = (4, 5, 6, 8, 10, 12, 16, 24, 32, 40, 50, 64, 96, 128, 192, 256)
DRAWS = (12, 25, 50, 100, 400, 1600)
"""RS-KD's own choice is 50."""

TRIMMED = ((0.8, 100), (0.9, 100), (0.95, 100), (0.98, 100), (0.9, 256), (0.95, 256), (0.98, 256))
"""Mass, and the most ids; 0.95 of 100 is what a study of such choices for GLM took."""

ENCODINGS: tuple[Encoding, ...] = ("plain", "packed", "packed16")

SCALARS = ("logsumexp", "target_logprob")
"""What our files can hold of a position beside its record."""


@dataclass(eq=False)
class Batch:
    """Positions that are trained on together."""

    head: Head
    student_head: Head
    hidden: Tensor  # the teacher's last hidden states, float32[P, D]
    student_hidden: Tensor  # the student's
    target: Tensor  # the tokens that really came, int64[P]
    row: Tensor  # row of each position, int64[P]
    position: Tensor  # which position of that row it is, int64[P]
    _kept: dict[tuple[Any, int | None], dict[str, Tensor]] = field(init=False, default_factory=dict)

    @cached_property
    def logits(self) -> Tensor:
        """The teacher's, float32[P, V]."""
        return self.head(self.hidden)

    @cached_property
    def probs(self) -> Tensor:
        """The teacher's probabilities, float32[P, V]."""
        return self.logits.softmax(-1)

    @cached_property
    def student(self) -> Tensor:
        """The student's probabilities, float32[P, V]."""
        return self.student_head(self.student_hidden).softmax(-1)

    @property
    def exact(self) -> Tensor:
        """Gradient of the exact KL divergence by the student's logits, float32[P, V]."""
        return gradient(self.probs, self.student)

    @cached_property
    def exact_of_head(self) -> Tensor:
        """The same by the weights of the student's output head, float32[V, D]."""
        return self.of_head(self.exact)

    def of_head(self, gradient_PV: Tensor) -> Tensor:
        """Turn a gradient by the logits into one by the weights of the student's output head, [V, D]."""
        return gradient_PV.T @ self.student_hidden

    def kept(self, layout: Layout, seed: int) -> dict[str, Tensor]:
        """What a capture of `topk` or `sample` keeps: each is computed once, for all encodings that keep the same."""
        of_kind = (layout.room, seed) if layout.capture == "sample" else (layout.top_k, None)
        if of_kind not in self._kept and layout.capture == "topk":
            self._kept[of_kind] = top_k(self.logits, self.target, layout.top_k)
        elif of_kind not in self._kept:
            keys_P = position_keys(seed, self.row, self.position)
            self._kept[of_kind] = sample(self.logits, self.target, layout.room, keys_P, self.logits.shape[-1])
        return self._kept[of_kind]

    def top(self, k: int) -> tuple[Tensor, Tensor]:
        """Ids and log-probs of the top k, [P, K]."""
        kept = self.kept(layout_of(self.logits.shape[-1], capture="topk", top_k=k), 0)
        return kept["kept_ids"], kept["kept_logprobs"]


@dataclass(frozen=True)
class Method:
    """A way to keep a position."""

    name: str
    family: str  # which line of the plot it is on
    target: Callable[[Batch, int], Target]  # what a student is trained on, given a batch and a seed
    total_bytes: Callable[[float, int], float]  # of a position that holds so many ids on the average, by vocabulary
    scalar_bytes: int = 0  # how many of them are log-sum-exp, target's log-prob and alike
    is_ours: bool = False
    is_random: bool = False  # whether the seed matters


def layout_of(vocab_size: int, **kind: Any) -> Layout:
    """Layout of a file of one position."""
    return Layout(num_rows=1, num_tokens=2, num_positions=1, vocab_size=vocab_size, **({"top_k": 0} | kind))


def ours(hidden_size: int) -> Iterator[Method]:
    """Every kind of capture, in every encoding."""

    def method(
        name: str, family: str, target: Callable[[Batch, int], Target], is_random: bool = False, **kind: Any
    ) -> Method:
        def total_bytes(_: float, vocab_size: int) -> int:
            return layout_of(vocab_size, **kind).bytes_per_position

        captured = layout_of(LARGE_VOCAB, **kind).captured
        scalar_bytes = sum(nbytes(captured[scalar]) for scalar in SCALARS if scalar in captured)
        return Method(name, family, target, total_bytes, scalar_bytes, is_ours=True, is_random=is_random)

    for capture in ("topk", "sample"):
        for encoding in ENCODINGS:
            for k in KEPT:
                kind = {"capture": capture, "top_k": k, "encoding": encoding}
                name, target = f"{capture} {k}, {encoding}", partial(stored, kind)
                yield method(name, f"{capture}, {encoding}", target, capture == "sample", **kind)
    for k in KEPT:
        kind = {"capture": "sample", "top_k": k, "encoding": "packed"}
        yield method(f"sample {k}, packed, ghost", "sample, ghost", partial(certain, kind), **kind)
    for dtype in (torch.float16, torch.float32):
        form = HeadForm(hidden_size=hidden_size, dtype=STORED_DTYPES[dtype_name(dtype)], has_bias=False)
        name = f"hidden, {dtype_name(dtype)}"
        yield method(name, "hidden", partial(hidden_target, dtype), capture="hidden", head=form)
        if dtype == torch.float16:
            yield method("hidden, packed", "hidden", packed_target, capture="hidden", head=form, encoding="packed")
    yield method("full, float16", "full", full_target, capture="full")


def stored(kind: dict[str, Any], batch: Batch, seed: int) -> Kept:
    """What the loss makes of a kind by default: the top k and a ghost token, or drawn tokens and their weights."""
    ids_PK, logprobs_PK = read_back(kind, batch, seed)
    if kind["capture"] == "sample":
        return Kept(ids_PK, sample_weights(logprobs_PK), has_tail=False)
    return Kept(ids_PK, logprobs_PK.exp(), has_tail=True)


def certain(kind: dict[str, Any], batch: Batch, seed: int) -> Kept:
    """What `tail="ghost"` makes of a sample: the tokens that were certain to be drawn, and a ghost token."""
    ids_PK, logprobs_PK = read_back(kind, batch, seed)
    return Kept(ids_PK, logprobs_PK.exp().where(certain_tokens(logprobs_PK), 0), has_tail=True)


def read_back(kind: dict[str, Any], batch: Batch, seed: int) -> tuple[Tensor, Tensor]:
    """Ids int64[P, K] and log-probs float64[P, K] of what was kept, after it was written and read back."""
    layout = layout_of(batch.logits.shape[-1], **kind)
    kept = batch.kept(layout, seed)
    values = [kept[name] for name in ("kept_ids", "kept_logprobs", "num_certain", "rest_logprob") if name in kept]
    if layout.packing:
        ids, logprobs = layout.packing.unpack(layout.packing.pack(*values).numpy())
        return torch.from_numpy(ids.astype("int64")), torch.from_numpy(logprobs).double()
    return values[0], values[1].half().double()


def hidden_target(dtype: torch.dtype, batch: Batch, _: int) -> Tensor:
    """Hidden states and head, both rounded to a dtype and computed with in float32."""
    head = batch.head.to("cpu", dtype).to("cpu", torch.float32)
    return head(batch.hidden.to(dtype).float()).softmax(-1)


def packed_target(batch: Batch, _: int) -> Tensor:
    """Packed hidden states, and the head rounded to float16."""
    codes_PD, scale_PG = states.pack(batch.hidden)
    hidden_PD = torch.from_numpy(states.unpack(codes_PD.numpy(), scale_PG.view(torch.uint16).numpy()))
    return batch.head.to("cpu", torch.float16).to("cpu", torch.float32)(hidden_PD).softmax(-1)


def full_target(batch: Batch, _: int) -> Tensor:
    """All logits, in float16."""
    return batch.logits.clamp(-FLOAT16_MAX, FLOAT16_MAX).half().float().softmax(-1)


def others() -> Iterator[Method]:
    """What others keep."""
    for k in KEPT:
        yield Method(
            f"renormalised top {k}",
            "renormalised top k",
            lambda batch, _, k=k: rivals.renormalised(*batch.top(k)),
            lambda _, vocab_size, k=k: k * (id_dtype(vocab_size).itemsize + 2),
        )
    for num_draws in DRAWS:
        size = partial(rivals.drawn_bytes, num_draws=num_draws)

        def draw(batch: Batch, seed: int, num_draws: int = num_draws) -> Kept:
            return rivals.with_replacement(batch.probs, num_draws, seed)

        yield Method(f"RS-KD, {num_draws} draws", "RS-KD", draw, size, is_random=True)
    for record in (rivals.BUDGET, rivals.RECOMMENDED):
        yield Method(
            f"DistillKit {record.k}, tail",
            "DistillKit, tail",
            lambda batch, _, record=record: record.target(*batch.top(record.k)),
            lambda _, vocab_size, record=record: record.size_bytes(vocab_size),
        )
    for top_p, k in TRIMMED:
        yield Method(
            f"top-p {top_p}, top {k}",
            f"top-p, then top {k}",
            lambda batch, _, top_p=top_p, k=k: rivals.nucleus(*batch.top(k), top_p),
            rivals.nucleus_bytes,
        )
