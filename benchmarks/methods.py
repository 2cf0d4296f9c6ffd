"""Every way to keep a position that is compared in `benchmarks/fidelity.py`: our own and others'.

Shape letters: P positions of a batch, V vocabulary, D hidden size, K kept.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from benchmarks import rivals
from benchmarks.targets import Kept, Target, Truth, Whole, divergence, gradient
from logitgen.file.layout import FLOAT16_MAX, STORED_DTYPES, CaptureKind, Encoding, HeadForm, Layout, id_dtype, nbytes
from logitgen.head import Head, dtype_name
from logitgen.student.events import sample_weights
from logitgen.teacher.keep import sample, top_k
from logitgen.teacher.noise import position_keys

LARGE_VOCAB = 151_936
"""Qwen's, at which others give their sizes."""

KEPT = (8, 12, 16, 32, 50, 64, 128, 256)
DRAWS = (12, 25, 50, 100, 400, 1600)
"""RS-KD's own choice is 50."""

TRIMMED = ((0.8, 100), (0.9, 100), (0.95, 100), (0.98, 100), (0.9, 256), (0.95, 256), (0.98, 256))
"""Mass, and the most ids; 0.95 of 100 is what a study of such choices for GLM took."""

ENCODINGS: tuple[Encoding, ...] = ("plain", "packed", "packed16")

SCALARS = ("logsumexp", "target_logprob", "threshold")
"""What our files hold of a position beside its record."""

Stored = tuple[Tensor, Tensor]
"""Ids int64[P, K] and log-probs float32[P, K], as they come back from a record."""


@dataclass(eq=False, kw_only=True)
class Batch:
    """Positions that are trained on together.

    Attributes:
        logits: The teacher's, float32[P, V].
        hidden: Its last hidden states, float32[P, D].
        head: Its output head.
        target: The tokens that really came, int64[P].
        row: Row of each position, int64[P].
        position: Which position of that row it is, int64[P].
        student: The student's probabilities, float32[P, V].
        student_hidden: The student's last hidden states, float32[P, D].
        truth: The teacher's distribution.
        exact_of_head: Gradient of the exact KL divergence by the weights of the student's output head, float32[V, D].
    """

    logits: Tensor
    hidden: Tensor
    head: Head
    target: Tensor
    row: Tensor
    position: Tensor
    student: Tensor
    student_hidden: Tensor
    truth: Truth = field(init=False)
    exact_of_head: Tensor = field(init=False)
    _kept: dict[tuple[int, int | None], dict[str, Tensor]] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        """Work out what every method is compared with."""
        self.truth = Truth(self.logits)
        self.exact_of_head = self.of_head(self.exact)

    @property
    def vocab_size(self) -> int:
        """V."""
        return self.logits.shape[-1]

    @property
    def exact(self) -> Tensor:
        """Gradient of the exact KL divergence by the student's logits, float32[P, V]."""
        return gradient(Whole(self.truth.probs), self.student)

    def student_divergence(self) -> float:
        """Mean KL divergence of the student from the teacher, in nats."""
        return divergence(Whole(self.student), self.truth)[0].mean().item()

    def of_head(self, gradient_PV: Tensor) -> Tensor:
        """Gradient by the weights of the student's output head, [V, D]."""
        return gradient_PV.T @ self.student_hidden

    def kept(self, k: int, seed: int | None = None) -> dict[str, Tensor]:
        """What a capture of `topk` keeps, or of `sample` with a seed: each is computed once, for all encodings."""
        if (k, seed) not in self._kept:
            if seed is None:
                self._kept[k, seed] = top_k(self.logits, self.target, k)
            else:
                key_P = position_keys(seed, self.row, self.position)
                self._kept[k, seed] = sample(self.logits, self.target, k, key_P, self.vocab_size)
        return self._kept[k, seed]

    def stored(self, encoding: Encoding, k: int, seed: int | None = None) -> Stored:
        """The same after it was written and read back."""
        kept = self.kept(k, seed)
        ids_PK, logprobs_PK = kept["kept_ids"], kept["kept_logprobs"]
        packing = layout_of("topk" if seed is None else "sample", self.vocab_size, k=k, encoding=encoding).packing
        if not packing:
            return ids_PK, logprobs_PK.half().float()
        ids, logprobs = packing.unpack(packing.pack(ids_PK, logprobs_PK).numpy())
        return torch.from_numpy(ids.astype("int64")), torch.from_numpy(logprobs).float()


@dataclass(frozen=True, kw_only=True)
class Method:
    """A way to keep a position.

    Attributes:
        name: What the table calls it.
        family: Which line of the plot it is on.
        is_ours: Whether logitgen does it.
        target: What a student is trained on, given a batch and a seed.
        total_bytes: Bytes of a position, given how many ids it holds on the average, and the vocabulary's size.
        scalar_bytes: How many of them are log-sum-exp, target's log-prob and alike.
        is_random: Whether the seed matters.
    """

    name: str
    family: str
    is_ours: bool = False
    target: Callable[[Batch, int], Target]
    total_bytes: Callable[[float, int], float]
    scalar_bytes: int = 0
    is_random: bool = False


def layout_of(
    capture: CaptureKind, vocab_size: int, *, k: int = 0, encoding: Encoding = "plain", head: HeadForm | None = None
) -> Layout:
    """Layout of a file of one position."""
    sizes = {"num_rows": 1, "num_tokens": 2, "num_positions": 1, "vocab_size": vocab_size, "top_k": k}
    return Layout(capture=capture, encoding=encoding, head=head, **sizes)


def our_method(
    name: str, family: str, target: Callable[[Batch, int], Target], layout: Callable[[int], Layout]
) -> Method:
    """A method whose sizes are those of our files, given what the layout is for a vocabulary's size."""
    captured = layout(LARGE_VOCAB).captured
    return Method(
        name=name,
        family=family,
        is_ours=True,
        target=target,
        total_bytes=lambda _, vocab_size: layout(vocab_size).bytes_per_position,
        scalar_bytes=sum(nbytes(captured[scalar]) for scalar in SCALARS if scalar in captured),
        is_random="threshold" in captured,
    )


def ours() -> list[Method]:
    """Every kind of capture that keeps some ids, in every encoding."""
    kinds: dict[CaptureKind, Callable[..., Kept]] = {"topk": top_target, "sample": sampled_target}
    return [
        our_method(
            f"{kind} {k}, {encoding}",
            f"{kind}, {encoding}",
            partial(target, encoding, k),
            partial(layout_of, kind, k=k, encoding=encoding),
        )
        for kind, target in kinds.items()
        for encoding in ENCODINGS
        for k in KEPT
    ]


def top_target(encoding: Encoding, k: int, batch: Batch, _: int) -> Kept:
    """A top-k with a tail of the mass that is missing."""
    ids_PK, logprobs_PK = batch.stored(encoding, k)
    return Kept(ids_PK, logprobs_PK.double().exp(), has_tail=True)


def sampled_target(encoding: Encoding, k: int, batch: Batch, seed: int) -> Kept:
    """Drawn ids, weighted so that each token's weight is its probability on the average."""
    ids_PK, logprobs_PK = batch.stored(encoding, k, seed)
    threshold_P = batch.kept(k, seed)["threshold"]
    return Kept(ids_PK, sample_weights(logprobs_PK.double(), threshold_P.double()), has_tail=False)


def whole_methods(hidden_size: int) -> list[Method]:
    """What holds the whole distribution."""
    hidden = [
        our_method(
            f"hidden, {dtype_name(dtype)}",
            "hidden",
            partial(hidden_target, dtype),
            partial(layout_of, "hidden", head=form_of(hidden_size, dtype)),
        )
        for dtype in (torch.float16, torch.float32)
    ]
    return [*hidden, our_method("full, float16", "full", full_target, partial(layout_of, "full"))]


def form_of(hidden_size: int, dtype: torch.dtype) -> HeadForm:
    """Sizes of a head of that dtype."""
    return HeadForm(hidden_size=hidden_size, dtype=STORED_DTYPES[dtype_name(dtype)], has_bias=False)


def full_target(batch: Batch, _: int) -> Whole:
    """All logits, in float16."""
    return Whole(batch.logits.clamp(-FLOAT16_MAX, FLOAT16_MAX).half().float().softmax(-1))


def hidden_target(dtype: torch.dtype, batch: Batch, _: int) -> Whole:
    """Hidden states and head, both rounded to a dtype and computed with in float32."""
    head = batch.head.to("cpu", dtype).to("cpu", torch.float32)
    return Whole(head(batch.hidden.to(dtype).float()).softmax(-1))


def others() -> list[Method]:
    """What others keep."""
    methods = [
        Method(
            name=f"renormalised top {k}",
            family="renormalised top k",
            target=partial(renormalised_target, k),
            total_bytes=lambda _, vocab_size, k=k: k * (id_dtype(vocab_size).itemsize + 2),
        )
        for k in KEPT
    ]
    methods += [
        Method(
            name=f"RS-KD, {num_draws} draws",
            family="RS-KD",
            target=partial(drawn_target, num_draws),
            total_bytes=partial(rivals.drawn_bytes, num_draws=num_draws),
            is_random=True,
        )
        for num_draws in DRAWS
    ]
    methods += [
        Method(
            name=f"DistillKit {record.k}, {'tail' if has_tail else 'zero'}",
            family=f"DistillKit, {'tail' if has_tail else 'zero'}",
            target=partial(polynomial_target, record, has_tail),
            total_bytes=lambda _, vocab_size, record=record: record.size_bytes(vocab_size),
        )
        for has_tail in (True, False)
        for record in (rivals.BUDGET, rivals.RECOMMENDED)
    ]
    methods += [
        Method(
            name=f"top-p {top_p}, top {k}",
            family=f"top-p, then top {k}",
            target=partial(nucleus_target, top_p, k),
            total_bytes=rivals.nucleus_bytes,
        )
        for top_p, k in TRIMMED
    ]
    return methods


def renormalised_target(k: int, batch: Batch, _: int) -> Kept:
    """A top-k whose tail is forgotten."""
    kept = batch.kept(k)
    return rivals.renormalised(kept["kept_ids"], kept["kept_logprobs"])


def drawn_target(num_draws: int, batch: Batch, seed: int) -> Kept:
    """Draws with replacement."""
    generator = torch.Generator().manual_seed(seed)
    return rivals.with_replacement(batch.truth.probs, num_draws, generator)


def polynomial_target(record: rivals.Polynomial, has_tail: bool, batch: Batch, _: int) -> Kept:
    """A curve through the log-probs."""
    kept = batch.kept(record.k)
    return record.target(kept["kept_ids"], kept["kept_logprobs"], has_tail=has_tail)


def nucleus_target(top_p: float, k: int, batch: Batch, _: int) -> Kept:
    """A trimmed top-k."""
    kept = batch.kept(k)
    return rivals.nucleus(kept["kept_ids"], kept["kept_logprobs"], top_p)
