"""The loss against whole-vocabulary formulas in float64, its limits, and what it refuses.

Shape letters: B rows, T tokens, P captured positions, V columns of the student, W rows of the teacher's head, K kept.
"""

import weakref
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from files import FULL, write_file
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from logitgen import DistillationLoss, LogitsDataset, UsageError, collate
from logitgen.student import chunks
from logitgen.student.events import sample_weights

WORDS, HIDDEN, KEPT = 11, 3, 4
LENGTHS = (6, 2, 5)
KINDS = ("topk", "sample", "hidden", "full")
DIVERGENCES = ("forward_kl", "reverse_kl", "jsd")
TAILS = ("ghost", "ignore")


@dataclass(frozen=True)
class Head:
    """The interface of a file's head, and a record of where it was moved to."""

    weight_VD: Tensor
    bias_V: Tensor | None = None
    scale: float = 1.0
    soft_cap: float = 0.0
    moves: list[tuple[torch.device, torch.dtype]] = field(default_factory=list)

    def to(self, device: torch.device, dtype: torch.dtype) -> "Head":
        self.moves.append((device, dtype))
        bias = None if self.bias_V is None else self.bias_V.to(device, dtype)
        return replace(self, weight_VD=self.weight_VD.to(device, dtype), bias_V=bias)

    def __call__(self, hidden_PD: Tensor) -> Tensor:
        logits = hidden_PD @ self.weight_VD.T + (0 if self.bias_V is None else self.bias_V)
        logits = self.scale * logits
        return self.soft_cap * (logits / self.soft_cap).tanh() if self.soft_cap else logits


@dataclass
class Captured:
    """What the loss asks of a dataset."""

    attributes: dict[str, Any]
    head: Head | None = None


def captured(kind: str, head: Head | None = None, words: int = WORDS, tokenizer_size: int = 0) -> Captured:
    return Captured({"capture": kind, "vocab_size": words, "tokenizer_size": tokenizer_size}, head)


@dataclass
class Case:
    """A batch of some kind, and the teacher's logits float64[W] at each captured (row, position)."""

    dataset: Captured
    batch: dict[str, Tensor]
    teacher: dict[tuple[int, int], Tensor]


def drawn_by_varopt(probs: Tensor, count: int, offset: float) -> tuple[Tensor, float]:
    """Ids of `count` tokens, likeliest first, and the level, in plain Python."""
    order = probs.argsort(descending=True).tolist()
    rests = [probs[order[certain:]].sum().item() / (count - certain) for certain in range(count)]
    num_certain = next(i for i, level in enumerate(rests) if probs[order[i]] <= level)
    level, ids, end = rests[num_certain], order[:num_certain], 0.0
    for token in sorted(order[num_certain:]):
        end += probs[token].item()
        if end > (len(ids) - num_certain + offset) * level:
            ids.append(token)
    return torch.tensor(sorted(ids, key=order.index)), level


def known_of(kind: str, teacher_PW: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
    logprobs = teacher_PW - teacher_PW.exp().sum(-1, keepdim=True).log()
    if kind == "full":
        return {"logits": teacher_PW}
    if kind == "topk":
        kept, ids = logprobs.topk(KEPT)
        return {"kept_ids": ids, "kept_logprobs": kept}
    ids = torch.zeros((len(logprobs), KEPT), dtype=torch.int64)
    for position, offset in enumerate(torch.rand(len(logprobs), generator=generator).tolist()):
        ids[position] = drawn_by_varopt(logprobs[position].exp(), KEPT, offset)[0]
    return {"kept_ids": ids, "kept_logprobs": logprobs.gather(-1, ids)}


def make_case(kind: str, seed: int = 0, words: int = WORDS, tokenizer_size: int = 0) -> Case:
    generator = torch.Generator().manual_seed(seed)
    head = Head(
        torch.randn(words, HIDDEN, generator=generator).double(),
        torch.randn(words, generator=generator).double(),
        scale=1.5,
        soft_cap=4.0,
    )
    rows, teacher = [], {}
    for row, length in enumerate(LENGTHS):
        positions = torch.arange(length - 1)[row % 2 :]
        hidden_PD = torch.randn(len(positions), HIDDEN, generator=generator).double()
        teacher_PW = 4 * torch.tanh(1.5 * (hidden_PD @ head.weight_VD.T + head.bias_V) / 4)
        known = {"hidden": hidden_PD} if kind == "hidden" else known_of(kind, teacher_PW, generator)
        tokens = torch.randint(WORDS - 2, (length,), generator=generator)
        rows.append({"input_ids": tokens, "positions": positions} | known)
        teacher |= {(row, int(at)): logits for at, logits in zip(positions, teacher_PW, strict=True)}
    dataset = captured(kind, head if kind == "hidden" else None, words, tokenizer_size)
    return Case(dataset, collate(rows), teacher)


def student_logits(columns: int = WORDS, dtype: torch.dtype = torch.float64, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(len(LENGTHS), max(LENGTHS), columns, generator=generator)
    return logits.to(dtype).requires_grad_()


def softmax(logits: Tensor) -> Tensor:
    return logits.exp() / logits.exp().sum()


def events_of(case: Case, at: tuple[int, int], student: Tensor, tail: str, temperature: float) -> tuple[Tensor, Tensor]:
    """Probabilities of the teacher and of the student that are to be compared at a position."""
    teacher = case.teacher[at]
    if case.dataset.attributes["capture"] in ("hidden", "full"):
        common = min(len(teacher), len(student))
        return softmax(teacher[:common] / temperature), softmax(student[:common] / temperature)
    ids = [i for i in case.batch["kept_ids"][at].tolist() if i < len(student)]
    if case.dataset.attributes["capture"] == "sample":
        _, level = drawn_by_varopt(softmax(teacher), KEPT, 0)
        ids = [i for i in ids if softmax(teacher)[i] > level]
    sides = []
    for probs in (softmax(teacher), softmax(student)):
        kept = probs[ids]
        events = torch.cat([kept, 1 - kept.sum()[None]]) if tail == "ghost" else kept
        tempered = events ** (1 / temperature)
        sides.append(tempered / tempered.sum())
    return sides[0], sides[1]


def kl(p: Tensor, q: Tensor) -> Tensor:
    return (p * (p / q).log()).sum()


def divergence_of(name: str, beta: float, p: Tensor, q: Tensor) -> Tensor:
    mixture = beta * p + (1 - beta) * q
    return {
        "forward_kl": lambda: kl(p, q),
        "reverse_kl": lambda: kl(q, p),
        "jsd": lambda: beta * kl(p, mixture) + (1 - beta) * kl(q, mixture),
    }[name]()


def sampled_of(case: Case, at: tuple[int, int], student: Tensor) -> Tensor:
    p, q, total = softmax(case.teacher[at]), softmax(student), torch.zeros(()).double()
    _, level = drawn_by_varopt(p, KEPT, 0)
    for i in case.batch["kept_ids"][at].tolist():
        if i < len(student):
            inclusion = min(1, p[i].item() / level)
            total = total + p[i] / inclusion * (p[i] / q[i]).log()
    return total


def reference(
    case: Case,
    logits_BTV: Tensor,
    divergence: str = "forward_kl",
    beta: float = 0.5,
    tail: str | None = None,
    temperature: float = 1.0,
    cross_entropy_weight: float = 0.0,
) -> Tensor:
    """The loss by plain formulas, a position at a time."""
    values = []
    for row, position in case.teacher:
        student = logits_BTV[row, position]
        if case.dataset.attributes["capture"] == "sample" and tail is None:
            value = sampled_of(case, (row, position), student)
        else:
            events = events_of(case, (row, position), student, tail or "ghost", temperature)
            value = temperature**2 * divergence_of(divergence, beta, *events)
        came = case.batch["input_ids"][row, position + 1]
        surprise = -softmax(student)[came].log()
        values.append((1 - cross_entropy_weight) * value + cross_entropy_weight * surprise)
    return torch.stack(values).mean()


def with_gradient(value: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    return value.detach(), torch.autograd.grad(value, logits)[0]


OPTIONS = [
    pytest.param(kind, {"divergence": divergence, "tail": tail, "temperature": temperature}, id=f"{kind}-{number}")
    for number, (kind, divergence, tail, temperature) in enumerate(
        [
            ("topk", divergence, tail, temperature)
            for divergence in DIVERGENCES
            for tail in TAILS
            for temperature in (1, 3)
        ]
        + [(kind, divergence, "ghost", 0.7) for kind in ("hidden", "full") for divergence in DIVERGENCES]
        + [("sample", "forward_kl", None, 1)]
        + [("sample", divergence, "ghost", temperature) for divergence in DIVERGENCES for temperature in (1, 3)]
        + [("sample", "forward_kl", "ignore", 1)]
    )
]


@pytest.mark.parametrize("columns", [WORDS - 2, WORDS, WORDS + 3])
@pytest.mark.parametrize(("kind", "options"), OPTIONS)
def test_value_and_gradient_are_those_of_whole_vocabulary_formulas(
    kind: str, options: dict[str, Any], columns: int
) -> None:
    case = make_case(kind, tokenizer_size=WORDS - 2)
    logits = student_logits(columns)
    loss = DistillationLoss(case.dataset, **options, beta=0.3, cross_entropy_weight=0.25)
    value, gradient = with_gradient(loss(logits, case.batch), logits)
    expected, expected_gradient = with_gradient(
        reference(case, logits, **options, beta=0.3, cross_entropy_weight=0.25), logits
    )
    torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-9, atol=1e-9)


def test_some_kept_ids_are_beyond_the_smallest_student_above() -> None:
    for kind in ("topk", "sample"):
        case = make_case(kind)
        assert (case.batch["kept_ids"][case.batch["captured"]] >= WORDS - 2).any()


@pytest.mark.parametrize(("kind", "options"), OPTIONS)
def test_gradient_is_that_of_finite_differences(kind: str, options: dict[str, Any]) -> None:
    case = make_case(kind, seed=3)
    loss = DistillationLoss(case.dataset, **options, cross_entropy_weight=0.1)
    assert torch.autograd.gradcheck(lambda logits: loss(logits, case.batch), student_logits(seed=4))


def test_a_hand_worked_case() -> None:
    """The teacher kept 1/2 and 1/4 and has 1/4 left; the student gives 1/4, 1/4 and, to two tokens together, 1/2."""
    rows = [
        {
            "input_ids": torch.tensor([0, 1]),
            "positions": torch.tensor([0]),
            "kept_ids": torch.tensor([[2, 0]]),
            "kept_logprobs": torch.tensor([[0.5, 0.25]]).log(),
        }
    ]
    loss = DistillationLoss(captured("topk", words=4))
    value = loss(torch.zeros(1, 2, 4), collate(rows))
    assert value.item() == pytest.approx(0.5 * np.log(2) + 0 + 0.25 * np.log(0.5), abs=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_chunks_change_nothing(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case, logits = make_case(kind), student_logits()
    loss = DistillationLoss(case.dataset)
    whole = with_gradient(loss(logits, case.batch), logits)
    for positions in (1, 4):
        monkeypatch.setattr(chunks, "CHUNK_LOGITS", positions * WORDS)
        torch.testing.assert_close(with_gradient(loss(logits, case.batch), logits), whole, rtol=1e-12, atol=1e-12)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    kept=st.integers(1, 7),
    divergence=st.sampled_from(DIVERGENCES),
    tail=st.sampled_from(TAILS),
    temperature=st.floats(0.5, 5),
    shift=st.floats(-20, 20),
)
def test_only_the_teacher_itself_has_no_loss_and_no_gradient(
    seed: int, kept: int, divergence: Any, tail: Any, temperature: float, shift: float
) -> None:
    teacher = torch.randn(1, 2, 7, generator=torch.Generator().manual_seed(seed)).double()
    largest, ids = teacher.log_softmax(-1)[0, :1].topk(kept)
    row = {"input_ids": torch.tensor([0, 1]), "positions": torch.tensor([0])}
    batch = collate([row | {"kept_ids": ids, "kept_logprobs": largest}])
    loss = DistillationLoss(captured("topk", words=7), divergence=divergence, tail=tail, temperature=temperature)
    equal = (teacher + shift).requires_grad_()
    value, gradient = with_gradient(loss(equal, batch), equal)
    assert abs(value.item()) < 1e-12
    assert gradient.abs().max() < 1e-7
    if kept > 1:
        other = teacher.clone()
        other[0, 0, ids[0, 0]] -= 1
        assert loss(other, batch) > 1e-9


@pytest.mark.parametrize("biased", [False, True])
def test_loss_of_drawn_tokens_is_on_average_that_of_the_whole_distribution(biased: bool) -> None:
    """Averaged over evenly spread random numbers; with half of the drawn tokens' weights it is not."""
    draws, words, kept = 4000, 12, 4
    generator = torch.Generator().manual_seed(5)
    teacher_W = (2.5 * torch.randn(words, generator=generator)).double().log_softmax(-1)
    student_V = torch.randn(words, generator=generator).double().requires_grad_()
    ids = torch.stack([drawn_by_varopt(teacher_W.exp(), kept, (number + 0.5) / draws)[0] for number in range(draws)])
    logprobs = teacher_W[ids]
    if biased:
        logprobs[:, :1] = (0.9 * logprobs[:, :1].exp()).log()
    batch = {
        "captured": torch.ones(1, draws, dtype=torch.bool),
        "labels": torch.zeros(1, draws, dtype=torch.int64),
        "kept_ids": ids[None],
        "kept_logprobs": logprobs[None],
    }
    logits = student_V.detach().expand(1, draws, -1).clone().requires_grad_()
    value = DistillationLoss(captured("sample", words=words))(logits, batch)
    mean_V = torch.autograd.grad(value, logits)[0][0].sum(0)
    error = (mean_V - (softmax(student_V) - teacher_W.exp())).abs().max().item()
    assert (error < 1e-3) is not biased
    if not biased:
        assert value.item() == pytest.approx(kl(teacher_W.exp(), softmax(student_V)).item(), abs=5e-3)


def test_weights_are_the_larger_of_probability_and_level() -> None:
    """Worked out by hand: 0.6 is certain, of the other two each stands for half of the rest."""
    weights = sample_weights(torch.tensor([[0.6, 0.15, 0.05]]).log())
    torch.testing.assert_close(weights, torch.tensor([[0.6, 0.2, 0.2]]))


@pytest.mark.parametrize("excess", [0.0, 1e-3, -1e-3])
def test_weights_are_probabilities_where_nothing_was_left_out(excess: float) -> None:
    """As far as float16 has rounded them; what has none never gets the rest."""
    logprobs = torch.tensor([[0.7 + excess, 0.3, 0.0]]).log()
    weights = sample_weights(logprobs.clamp(min=-65504.0))
    torch.testing.assert_close(weights, torch.tensor([[0.7 + excess, 0.3, 0.0]]))


MASKED = [(kind, name) for kind in KINDS for name in (DIVERGENCES if kind != "sample" else ("forward_kl",))]
MASKED += [("sample, ghost", name) for name in DIVERGENCES]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("kind", "divergence"), MASKED)
def test_masked_tokens_on_either_side_leave_all_finite(kind: str, divergence: Any, dtype: torch.dtype) -> None:
    kind, _, tail = kind.partition(", ")
    case = make_case(kind)
    if "kept_logprobs" in case.batch:
        case.batch["kept_logprobs"][..., -2:] = -65504
    elif kind == "full":
        case.batch["logits"][..., 1:4] = -65504
    else:
        bias = case.dataset.head.bias_V.index_fill(0, torch.tensor([1, 2]), -torch.inf)
        case.dataset.head = replace(case.dataset.head, bias_V=bias, soft_cap=0.0)
    batch = {name: values.float() if values.is_floating_point() else values for name, values in case.batch.items()}
    with torch.no_grad():
        logits = student_logits(dtype=dtype)
        logits[..., 2] = -torch.inf
        logits[..., 5] = torch.finfo(dtype).min
        logits[..., 6] = -1e5
        logits[0, 0] = -torch.inf
        logits[0, 0, 4] = 0
    loss = DistillationLoss(case.dataset, divergence=divergence, tail=tail or None)
    value, gradient = with_gradient(loss(logits, batch), logits)
    assert value.isfinite()
    assert gradient.isfinite().all()
    assert gradient.count_nonzero() > 0


@pytest.mark.parametrize("tail", [None, "ghost"])
def test_a_drawn_token_the_teacher_cannot_say_counts_nothing(tail: Any) -> None:
    """It is kept where fewer than K tokens have a probability at all."""
    row = {"input_ids": torch.tensor([0, 1]), "positions": torch.tensor([0])}
    kept = {"kept_ids": torch.tensor([[4, 2, 0, 1]]), "kept_logprobs": torch.tensor([[-0.2, -1.7, -65504, -65504]])}
    few = {name: values[:, :2] for name, values in kept.items()}
    logits = student_logits()[:1, :2].detach().requires_grad_()
    loss = DistillationLoss(captured("sample"), tail=tail)
    found, expected = (with_gradient(loss(logits, collate([row | values])), logits) for values in (kept, few))
    torch.testing.assert_close(found, expected, rtol=5e-3, atol=5e-3)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("excess", [-1e-4, -1e-8, 0.0, 1e-3])
def test_a_tail_of_almost_nothing_is_stable(divergence: Any, excess: float) -> None:
    """As float16 rounds the kept log-probs, they may sum to a little less or more than 1."""
    kept = (torch.tensor([[0.9, 0.1]]).double() * (1 + excess)).log().float()
    row = {"input_ids": torch.tensor([0, 1]), "positions": torch.tensor([0])}
    batch = collate([row | {"kept_ids": torch.tensor([[0, 1]]), "kept_logprobs": kept}])
    for gap in (0.0, 8.0, 30.0, 200.0):
        logits = torch.tensor([[0.9, 0.1, 0.5, 0.5]]).log() - torch.tensor([0, 0, gap, gap])
        logits = logits.expand(1, 2, 4).clone().requires_grad_()
        loss = DistillationLoss(captured("topk", words=4), divergence=divergence)
        value, gradient = with_gradient(loss(logits, batch), logits)
        assert -1e-6 < value < 20
        assert gradient.abs().max() < 20
        if gap >= 30:
            assert value < 2e-3
            assert gradient.abs().max() < 2e-3


def test_a_student_in_bfloat16_is_compared_in_float32() -> None:
    case, logits = make_case("topk"), student_logits(dtype=torch.bfloat16)
    loss = DistillationLoss(case.dataset)
    value, gradient = with_gradient(loss(logits, case.batch), logits)
    wide = logits.detach().float().requires_grad_()
    expected, expected_gradient = with_gradient(loss(wide, case.batch), wide)
    assert value.dtype == torch.float32
    assert torch.equal(value, expected)
    assert torch.equal(gradient, expected_gradient.bfloat16())


@pytest.mark.parametrize("kind", KINDS)
def test_a_student_in_float32_is_compared_in_float32_and_nothing_less(kind: str) -> None:
    case, logits = make_case(kind), student_logits(dtype=torch.float32)
    exact = DistillationLoss(case.dataset)(logits.double(), case.batch)
    if case.dataset.head:
        case.dataset.head = case.dataset.head.to(torch.device("cpu"), torch.float32)
    found = DistillationLoss(case.dataset)(logits, case.batch)
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_autocast_does_not_lower_the_precision(kind: str) -> None:
    case, logits = make_case(kind), student_logits(dtype=torch.float32)
    if case.dataset.head:
        case.dataset.head = case.dataset.head.to(torch.device("cpu"), torch.float32)
    loss = DistillationLoss(case.dataset)
    expected = with_gradient(loss(logits, case.batch), logits)
    with torch.autocast("cpu", torch.bfloat16):
        got = with_gradient(loss(logits, case.batch), logits)
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


class LiveMemory(TorchDispatchMode):
    """Counts the float32 bytes alive of what was made under it: the most at once, and the largest tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[int, int] = {}
        self.peak_bytes = self.largest_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {tensor.untyped_storage().data_ptr() for tensor in tree_leaves(args) if isinstance(tensor, Tensor)}
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.dtype == torch.float32:
                self._count(tensor.untyped_storage(), known)
        return result

    def _count(self, storage: torch.UntypedStorage, known: set[int]) -> None:
        key = storage._cdata
        if key in self.seen or storage.data_ptr() in known:
            return
        self.seen[key] = storage.nbytes()
        weakref.finalize(storage, self.seen.pop, key)
        self.peak_bytes = max(self.peak_bytes, sum(self.seen.values()))
        self.largest_bytes = max(self.largest_bytes, storage.nbytes())


def random_batch(kind: str, num_rows: int, length: int, words: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Rows of so many tokens, with random values of a capture at all positions but the last."""
    rows = []
    for _ in range(num_rows):
        teacher_PW = torch.randn(length - 1, words, generator=generator)
        known = {"hidden": teacher_PW[:, :HIDDEN]} if kind == "hidden" else known_of(kind, teacher_PW, generator)
        rows.append({"input_ids": torch.arange(length), "positions": torch.arange(length - 1)} | known)
    return collate(rows)


def memory_of(kind: str, num_rows: int) -> LiveMemory:
    """Memory of loss and gradient for rows of 8 tokens, one of which is a chunk, of a student in bfloat16."""
    words, length = 1000, 9
    generator = torch.Generator().manual_seed(0)
    batch = random_batch(kind, num_rows, length, words, generator)
    head = Head(torch.randn(words, HIDDEN, generator=generator))
    loss = DistillationLoss(captured(kind, head, words))
    logits = torch.zeros(num_rows, length, words, dtype=torch.bfloat16, requires_grad=True)
    with LiveMemory() as memory:
        loss(logits, batch).backward()
    return memory


@pytest.mark.parametrize("kind", KINDS)
def test_float32_memory_is_that_of_a_chunk_and_does_not_grow_with_the_batch(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    chunk = 8000
    monkeypatch.setattr(chunks, "CHUNK_LOGITS", chunk)
    few, many = memory_of(kind, 4), memory_of(kind, 32)
    assert few.largest_bytes == many.largest_bytes == 4 * chunk
    assert 4 * chunk < few.peak_bytes < 12 * 4 * chunk
    assert many.peak_bytes < 1.2 * few.peak_bytes
    monkeypatch.setattr(chunks, "CHUNK_LOGITS", 10**9)  # without chunks the measurement sees the whole batch
    assert memory_of(kind, 32).peak_bytes > 4 * many.peak_bytes


@pytest.mark.parametrize("kind", KINDS)
def test_positions_that_were_not_captured_do_not_matter(kind: str) -> None:
    case, logits = make_case(kind), student_logits()
    loss = DistillationLoss(case.dataset, cross_entropy_weight=0.5)
    expected = with_gradient(loss(logits, case.batch), logits)
    with torch.no_grad():
        logits[~case.batch["captured"]] = torch.nan
    torch.testing.assert_close(with_gradient(loss(logits, case.batch), logits), expected, rtol=0, atol=0)
    assert not expected[1][~case.batch["captured"]].any()


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_without_a_captured_position_gives_zero(kind: str) -> None:
    case = make_case(kind)
    case.batch["captured"][:] = False
    logits = torch.full((len(LENGTHS), max(LENGTHS), WORDS), torch.inf, dtype=torch.bfloat16, requires_grad=True)
    value, gradient = with_gradient(DistillationLoss(case.dataset)(logits, case.batch), logits)
    assert value.dtype == torch.float32
    assert value.item() == 0
    assert not gradient.any()


def test_labels_that_a_trainer_masked_leave_the_cross_entropy() -> None:
    case, logits = make_case("topk"), student_logits()
    loss = DistillationLoss(case.dataset, cross_entropy_weight=1)
    case.batch["labels"][:] = -100
    assert loss(logits, case.batch).item() == 0


def test_the_head_is_moved_once_and_keeps_the_teachers_dtype() -> None:
    case = make_case("hidden")
    head = case.dataset.head = replace(case.dataset.head, weight_VD=case.dataset.head.weight_VD.bfloat16())
    case.dataset.head = replace(head, bias_V=None)
    loss = DistillationLoss(case.dataset)
    for _ in range(3):
        loss(student_logits(), case.batch)
    assert head.moves == [(torch.device("cpu"), torch.bfloat16)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"divergence": "kl"}, "divergence must be one of forward_kl, reverse_kl, jsd, got 'kl'"),
        ({"tail": "drop"}, "tail must be one of drawn, ghost, ignore, got 'drop'"),
        ({"beta": 1.0}, r"beta must be between 0 and 1, both excluded, got 1.0"),
        ({"temperature": 0.0}, "temperature must be a number above 0, got 0.0"),
        ({"temperature": float("nan")}, "temperature must be a number above 0, got nan"),
        ({"cross_entropy_weight": -0.1}, "cross_entropy_weight must be between 0 and 1, got -0.1"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        DistillationLoss(captured("topk"), **options)


@pytest.mark.parametrize("options", [{"divergence": "jsd"}, {"divergence": "reverse_kl"}, {"temperature": 2.0}])
def test_drawn_tokens_are_refused_what_would_be_biased(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=r"only for divergence='forward_kl' and temperature=1, got .* tail='ghost'"):
        DistillationLoss(captured("sample"), **options)
    DistillationLoss(captured("sample"), tail="ghost", **options)
    DistillationLoss(captured("topk"), **options)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "sample"])
def test_without_drawn_tokens_none_can_stand_for_the_tail(kind: str) -> None:
    with pytest.raises(UsageError, match=f"tail='drawn' needs a file of --capture sample, got {kind}"):
        DistillationLoss(captured(kind), tail="drawn")


@pytest.mark.parametrize(
    ("words", "tokenizer_size", "columns", "fits"),
    [
        (51_200, 50_295, 50_295, True),  # phi-2's head is padded by 905
        (51_200, 50_295, 50_294, False),
        (50_295, 50_295, 51_200, True),
        (50_295, 50_295, 51_320, False),
        (32_000, 0, 32_000, True),
        (32_000, 0, 31_999, False),
        (32_000, 32_001, 32_000, True),  # a padding token the teacher was never resized for
    ],
)
def test_vocabularies_may_differ_by_padding_only(words: int, tokenizer_size: int, columns: int, fits: bool) -> None:
    row = {"input_ids": torch.tensor([0, 1]), "positions": torch.tensor([0]), "kept_ids": torch.tensor([[words - 1]])}
    batch = collate([row | {"kept_logprobs": torch.tensor([[-1.0]])}])
    loss = DistillationLoss(captured("topk", words=words, tokenizer_size=tokenizer_size))
    logits = torch.zeros(1, 2, columns)
    if fits:
        assert loss(logits, batch).isfinite()
    else:
        with pytest.raises(UsageError, match=f"to fit the teacher's vocabulary of {words} .*, got {columns}\\."):
            loss(logits, batch)


def test_logits_of_another_shape_than_the_batch_are_refused() -> None:
    case = make_case("topk")
    with pytest.raises(UsageError, match=r"must have the shape \[3, 6, 'vocabulary'\].*got \[3, 5, 11\]"):
        DistillationLoss(case.dataset)(student_logits()[:, :-1], case.batch)


def test_hidden_states_without_a_head_are_refused() -> None:
    case = make_case("hidden")
    with pytest.raises(UsageError, match="needs the teacher's head"):
        DistillationLoss(captured("hidden"))(student_logits(), case.batch)


def test_a_file_is_enough(tmp_path: Path) -> None:
    """Row 0 of the file has all logits at positions 0 and 1: 0 to 9 and 10 to 19, the same distribution twice."""
    dataset = LogitsDataset(write_file(tmp_path / "out.h5", FULL, capture="full", top_k=0))
    loss = DistillationLoss(dataset)
    batch = collate([dataset[0]])
    teacher = softmax(torch.arange(10).double())
    expected = kl(teacher, torch.full((10,), 0.1).double())
    assert loss(torch.zeros(1, 3, 10), batch).item() == pytest.approx(expected.item(), rel=1e-6)
    assert loss(torch.arange(10.0).expand(1, 3, 10), batch).item() == pytest.approx(0, abs=1e-6)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_may_stay_on_the_cpu(kind: str) -> None:
    case, logits = make_case(kind), student_logits()
    loss = DistillationLoss(case.dataset)
    expected = with_gradient(loss(logits, case.batch), logits)
    there = logits.detach().cuda().requires_grad_()
    for batch in (case.batch, {name: values.cuda() for name, values in case.batch.items()}):
        value, gradient = with_gradient(loss(there, batch), there)
        torch.testing.assert_close((value.cpu(), gradient.cpu()), expected)
