"""What is kept, against the definition in float64; and what happens where memory or numbers run out."""

import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from batches import batch_of, captured, layout_of
from conftest import make_llama
from hypothesis import given, settings
from hypothesis import strategies as st

from logitgen import CaptureError, LogitsFile
from logitgen.file.drawn import is_certain
from logitgen.file.layout import HeadForm
from logitgen.split.batch import Pass
from logitgen.teacher import keep
from logitgen.teacher import model as teacher_module
from logitgen.teacher.capture import capture_batch, seal
from logitgen.teacher.keep import _largest, full, hidden_states, top_k
from logitgen.teacher.model import Teacher


@given(st.integers(0, 2**32), st.integers(1, 6), st.integers(2, 50), st.floats(0.1, 30), st.data())
def test_the_largest_logprobs_are_kept_in_order(
    seed: int, positions: int, vocab_size: int, scale: float, data: st.DataObject
) -> None:
    k = data.draw(st.integers(1, vocab_size))
    generator = np.random.default_rng(seed)
    logits = generator.normal(scale=scale, size=(positions, vocab_size)).astype(np.float32)
    targets = generator.integers(vocab_size, size=positions)
    kept = top_k(torch.from_numpy(logits), torch.from_numpy(targets), k)
    exact = logits.astype(np.float64)
    logsumexp = np.log(np.exp(exact - exact.max(1, keepdims=True)).sum(1)) + exact.max(1)
    logprobs = exact - logsumexp[:, None]
    np.testing.assert_allclose(kept["logsumexp"], logsumexp, atol=1e-4)
    np.testing.assert_allclose(kept["target_logprob"], logprobs[np.arange(positions), targets], atol=1e-4)
    np.testing.assert_allclose(kept["kept_logprobs"], -np.sort(-logprobs, axis=1)[:, :k], atol=1e-4)
    np.testing.assert_allclose(
        np.take_along_axis(logprobs, kept["kept_ids"].numpy(), 1), kept["kept_logprobs"], atol=1e-4
    )
    assert all(len(set(ids.tolist())) == k for ids in kept["kept_ids"])


@given(st.integers(0, 2**32), st.sampled_from([0.1, 3.0, 50.0, 1e3, 1e6]), st.integers(2, 40))
def test_no_logprob_is_above_0(seed: int, scale: float, vocab_size: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits_CV = torch.randn((8, vocab_size), generator=generator) * scale
    likeliest_C = logits_CV.argmax(-1)
    kept = top_k(logits_CV, likeliest_C, 2)
    assert (kept["kept_logprobs"] <= 0).all()
    assert (kept["target_logprob"] <= 0).all()
    assert (full(logits_CV, likeliest_C)["target_logprob"] <= 0).all()


def test_a_certain_token_has_logprob_0_if_the_logsumexp_was_rounded_down(monkeypatch: pytest.MonkeyPatch) -> None:
    rounded_down = torch.tensor([90.0 * (1 - 2**-20)])
    monkeypatch.setattr(keep, "_logsumexp_in_passes", lambda *arguments: rounded_down)
    logits_CV = torch.tensor([[90.0, 1.0, 2.0]])
    kept = top_k(logits_CV, torch.tensor([0]), 2)
    assert kept["logsumexp"].item() < 90
    assert kept["kept_logprobs"][0, 0].item() == 0
    assert kept["target_logprob"].item() == 0
    assert full(logits_CV, torch.tensor([0]))["target_logprob"].item() == 0


# The largest logits, and the log-sum-exp, against torch and float64.

GROUPED = 8 * 4
"""Logits per kept one from which on the largest are looked for in groups."""


@st.composite
def heads(draw: st.DrawFn) -> tuple[torch.Tensor, int]:
    """Logits of any shape that matters, with ties and masked tokens, and how many to keep."""
    k = draw(st.one_of(st.integers(1, 6), st.sampled_from([1, 2, 64])))
    vocab_size = draw(
        st.one_of(
            st.integers(k, k + 20),  # few
            st.integers(GROUPED * k - 9, GROUPED * k + 9),  # about as many as are taken in groups
            st.integers(8 * GROUPED * k - 70, 8 * GROUPED * k + 70),  # and about as many as in groups of groups
            st.just(k),
        )
    )
    num_positions = draw(st.integers(1, 5))
    generator = np.random.default_rng(draw(st.integers(0, 2**32)))
    logits = generator.normal(scale=draw(st.sampled_from([0.1, 3.0, 30.0])), size=(num_positions, vocab_size))
    if draw(st.booleans()):
        logits -= draw(st.sampled_from([-1e4, 1e4]))  # an offset changes no probability
    logits_CV = torch.from_numpy(logits.astype(np.float32))
    if draw(st.booleans()):
        logits_CV = logits_CV.to(torch.bfloat16).float()
    if draw(st.booleans()):
        logits_CV = (logits_CV / 4).round()  # a handful of values
    if draw(st.booleans()):
        masked = torch.from_numpy(generator.random(logits.shape) < draw(st.sampled_from([0.1, 0.9, 0.999])))
        masked[:, generator.integers(vocab_size)] = False
        logits_CV = logits_CV.masked_fill(masked, -torch.inf)
    return logits_CV, k


def assert_kept_are_the_largest(logits_CV: torch.Tensor, k: int, values_CK: torch.Tensor, ids_CK: torch.Tensor) -> None:
    assert values_CK.shape == ids_CK.shape == (len(logits_CV), k)
    expected_CK = np.sort(logits_CV.numpy(), axis=1)[:, ::-1][:, :k]
    np.testing.assert_array_equal(values_CK.numpy(), expected_CK)
    np.testing.assert_array_equal(np.take_along_axis(logits_CV.numpy(), ids_CK.numpy(), 1), expected_CK)
    assert all(len(set(ids)) == k for ids in ids_CK.tolist())


@settings(max_examples=300, deadline=None)
@given(heads())
def test_the_largest_logits_are_those_of_torch_whatever_the_shape(head: tuple[torch.Tensor, int]) -> None:
    logits_CV, k = head
    before = logits_CV.clone()
    values_CK, ids_CK = _largest(logits_CV, k)
    assert_kept_are_the_largest(logits_CV, k, values_CK, ids_CK)
    torch_values_CK, torch_ids_CK = torch.topk(logits_CV, k)
    assert torch.equal(values_CK, torch_values_CK)
    # Where no other logit has the value of one that is kept, there is but one right answer.
    once_CK = (logits_CV[:, None, :] == values_CK[:, :, None]).sum(-1) == 1
    assert torch.equal(ids_CK[once_CK], torch_ids_CK[once_CK])
    assert torch.equal(logits_CV, before)


@settings(max_examples=200, deadline=None)
@given(heads(), st.sampled_from([1, 100, 1000, 2**19]))
def test_the_logsumexp_is_that_of_float64_in_any_passes(head: tuple[torch.Tensor, int], cached_logits: int) -> None:
    logits_CV, k = head
    before = logits_CV.clone()
    exact = logits_CV.double().numpy()
    largest = exact.max(1)
    expected = np.log(np.exp(exact - largest[:, None]).sum(1)) + largest
    targets_C = torch.arange(len(logits_CV)) % logits_CV.shape[1]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(keep, "_CACHED_LOGITS", cached_logits)
        kept, everything = top_k(logits_CV, targets_C, k), full(logits_CV, targets_C)
    for scalars in (kept, everything):
        np.testing.assert_allclose(scalars["logsumexp"], expected, rtol=2e-7, atol=2e-6)
        target_logprob = np.maximum(exact[np.arange(len(exact)), targets_C] - expected, -65504)
        np.testing.assert_allclose(scalars["target_logprob"], target_logprob, rtol=1e-6, atol=2e-3)
    logprobs = np.take_along_axis(exact, kept["kept_ids"].numpy(), 1) - expected[:, None]
    np.testing.assert_allclose(kept["kept_logprobs"], logprobs, rtol=1e-6, atol=2e-3)
    assert torch.equal(logits_CV, before)


@pytest.mark.parametrize("vocab_size", [49_152, 50_257, 151_936, 128_256 + 7])
@pytest.mark.parametrize("k", [1, 64, 1000])
def test_the_vocabularies_that_teachers_have_are_searched_as_torch_does(vocab_size: int, k: int) -> None:
    generator = torch.Generator().manual_seed(vocab_size + k)
    logits_CV = torch.randn((3, vocab_size), generator=generator) * 4
    logits_CV[0, -5:] = 100 + torch.arange(5)  # the last ids are in no group where 8 does not divide the vocabulary
    logits_CV[1] = logits_CV[1].to(torch.bfloat16).float()
    logits_CV[2] = -torch.arange(vocab_size) / 64  # all the largest are neighbours
    kept = top_k(logits_CV, torch.tensor([7, 8, vocab_size - 1]), k)
    assert_kept_are_the_largest(logits_CV, k, *_largest(logits_CV, k))
    expected_CK = torch.log_softmax(logits_CV.double(), -1).topk(k)
    np.testing.assert_allclose(kept["kept_logprobs"], expected_CK.values, atol=1e-5)
    for position in (0, 2):
        assert torch.equal(kept["kept_ids"][position], expected_CK.indices[position])
    np.testing.assert_allclose(kept["logsumexp"], logits_CV.double().logsumexp(-1), atol=1e-5)


@pytest.mark.parametrize("place", [0, 7, 1000, 2055, 2056, 2058])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_logit_that_is_not_finite_makes_the_scalars_not_finite(place: int, value: float) -> None:
    """Those of the target too, whichever token it is: a packed file has no other."""
    logits_CV = torch.randn((3, 2059), generator=torch.Generator().manual_seed(0))
    logits_CV[1, place] = value
    for kept in of_kinds(logits_CV, torch.tensor([5, 5, 5])):
        assert kept["logsumexp"].isfinite().tolist() == [True, False, True]
        assert kept["target_logprob"].isfinite().tolist() == [True, False, True]


def test_the_target_is_nan_wherever_the_logsumexp_is_not_finite() -> None:
    """Clamped, the difference to infinity would be a number like that of a masked token."""
    logsumexp_C = torch.tensor([torch.nan, torch.inf, -torch.inf, 2.0])
    scalars = keep._scalars(torch.zeros((4, 3)), torch.tensor([0, 0, 0, 0]), logsumexp_C, keep.WHOLE)
    assert scalars["target_logprob"].isnan().tolist() == [True, True, True, False]
    assert scalars["target_logprob"][3].item() == -2


def of_kinds(logits_CV: torch.Tensor, target_C: torch.Tensor) -> list[dict[str, torch.Tensor]]:
    """What is kept of logits by every kind of capture but `sample`, which is in test_draw."""
    states_CD = torch.zeros((len(logits_CV), 1))
    return [
        top_k(logits_CV, target_C, 4),
        full(logits_CV, target_C),
        hidden_states(logits_CV, target_C, {"hidden": states_CD}, "plain"),
    ]


def test_a_position_of_which_every_token_is_masked_is_not_finite() -> None:
    logits_CV = torch.full((2, 2059), -torch.inf)
    logits_CV[1, 3] = 5.0
    for kept in of_kinds(logits_CV, torch.tensor([5, 3])):
        assert kept["logsumexp"].isfinite().tolist() == [False, True]
        assert kept["target_logprob"].isfinite().tolist() == [False, True]
        assert kept["logsumexp"][1].item() == 5.0
        assert kept["target_logprob"][1].item() == 0


def test_a_shard_of_which_every_token_is_masked_adds_nothing() -> None:
    logits_CV = torch.randn((3, 8), generator=torch.Generator().manual_seed(0))
    logits_CV[:, :4] = -torch.inf
    parts = torch.stack([keep._logsumexp(logits_CV[:, :4]), keep._logsumexp(logits_CV[:, 4:])])
    assert parts[0].tolist() == [-torch.inf] * 3
    np.testing.assert_allclose(parts.logsumexp(0), logits_CV.double().logsumexp(-1), atol=1e-6)


def test_full_keeps_the_logits_themselves() -> None:
    logits_CV = torch.tensor([[0.0, 1.0, 2.0]])
    kept = full(logits_CV, torch.tensor([1]))
    assert kept["logits"].tolist() == [[0, 1, 2]]
    assert kept["logsumexp"].item() == pytest.approx(np.log(1 + np.e + np.e**2))
    assert kept["target_logprob"].item() == pytest.approx(1 - np.log(1 + np.e + np.e**2))


@pytest.mark.parametrize("encoding", ["plain", "packed"])
def test_what_is_drawn_depends_on_the_place_alone(encoding: str) -> None:
    kept = {"capture": "sample", "top_k": 4, "encoding": encoding}
    model, tokens = make_llama(50), [[1, 2, 3, 4], [1, 2, 3, 4], [9, 8, 7]]
    together = captured(batch_of(tokens), layout_of(batch_of(tokens), **kept), model)
    names = ["kept"] if encoding == "packed" else ["kept_ids", "kept_logprobs"]
    for name in names:
        one, other, last = np.split(together[name].reshape(8, -1), [3, 6])
        assert one.tolist() != other.tolist()  # the same tokens in another row
        alone = captured(batch_of(tokens[1:2], 1), layout_of(batch_of(tokens[1:2]), **kept), model)
        assert alone[name].reshape(3, -1).tolist() == other.tolist()
        moved = captured(batch_of(tokens[2:], 0), layout_of(batch_of(tokens[2:]), **kept), model)
        assert moved[name].reshape(2, -1).tolist() != last.tolist()


def test_packed_records_hold_what_is_kept_unpacked() -> None:
    """Ids exactly; log-probs as test_packing has them."""
    batch = batch_of([[1, 2, 3, 4, 5, 6], [9, 8, 7]])
    plain = captured(batch, layout_of(batch, top_k=7))
    layout = layout_of(batch, top_k=7, encoding="packed")
    assert layout.packing
    ids, logprobs = layout.packing.unpack(captured(batch, layout)["kept"].reshape(7, -1))
    assert [set(row) for row in ids.tolist()] == [set(row) for row in plain["kept_ids"].reshape(7, 7).tolist()]
    np.testing.assert_allclose(np.exp(logprobs), np.exp(plain["kept_logprobs"].reshape(7, 7)), atol=0.02)


@pytest.mark.parametrize("encoding", ["packed", "packed16"])
def test_packed_draws_are_of_the_models_own_distribution(encoding: str) -> None:
    """The certain ones are the likeliest, with their log-probs, the others have the mean of theirs."""
    batch, model = batch_of([[1, 2, 3, 4, 5, 6]]), make_llama(50)
    logprobs_CV = model(torch.tensor([[1, 2, 3, 4, 5, 6]])).logits[0, :-1].detach().double().log_softmax(-1).numpy()
    layout = layout_of(batch, capture="sample", top_k=7, encoding=encoding)
    assert layout.packing
    ids, logprobs = layout.packing.unpack(captured(batch, layout, model)["kept"].reshape(5, -1))
    atol = 0.06 if encoding == "packed" else 0.005
    for ids_W, logprobs_W, logprobs_V, certain_W in zip(ids, logprobs, logprobs_CV, is_certain(logprobs), strict=True):
        there_W = np.isfinite(logprobs_W)
        assert 7 <= there_W.sum() == len(set(ids_W[there_W].tolist()))
        own_W = logprobs_V[ids_W]
        np.testing.assert_allclose(logprobs_W[certain_W], own_W[certain_W], atol=atol)
        assert set(ids_W[certain_W].tolist()) == set(np.argsort(-logprobs_V)[: certain_W.sum()].tolist())
        drawn_W = there_W & ~certain_W
        np.testing.assert_allclose(logprobs_W[drawn_W], own_W[drawn_W].mean(), atol=0.3)  # half a step of the gap


@pytest.mark.parametrize("capture", ["topk", "sample"])
def test_a_packed_position_has_its_record_and_its_target_in_float16(capture: str) -> None:
    batch, model = batch_of([[1, 2, 3, 4, 5, 6]]), make_llama(50)
    logits_TV = model(torch.tensor([[1, 2, 3, 4, 5, 6]])).logits[0, :-1].detach()
    expected = logits_TV.double().log_softmax(-1)[range(5), [2, 3, 4, 5, 6]].numpy()
    for encoding in ("packed", "packed16"):
        arrays = captured(batch, layout_of(batch, capture=capture, top_k=7, encoding=encoding), model)
        assert arrays.keys() == {"target_logprob", "kept", "crc32"}
        assert arrays["target_logprob"].dtype == np.float16
        np.testing.assert_allclose(arrays["target_logprob"], expected, rtol=2**-11, atol=1e-5)


@pytest.mark.parametrize("encoding", ["plain", "packed16"])
def test_a_masked_token_is_stored_as_a_finite_number(encoding: str) -> None:
    model = make_llama(50)
    model.lm_head.register_forward_hook(
        lambda module, inputs, output: output.index_fill(-1, torch.tensor([7]), -torch.inf)
    )
    batch = batch_of([[1, 2, 7]])
    arrays = captured(batch, layout_of(batch, top_k=50, encoding=encoding), model)
    assert arrays["target_logprob"].tolist()[1] == -65504
    assert np.isfinite(arrays["target_logprob"]).all()
    if encoding != "plain":
        return
    assert np.isfinite(arrays["kept_logprobs"]).all()
    assert arrays["kept_ids"].reshape(2, 50)[:, -1].tolist() == [7, 7]
    assert np.exp(arrays["kept_logprobs"].astype(np.float64)).sum() == pytest.approx(2, rel=1e-3)


@pytest.mark.parametrize(
    "kind",
    [
        {},
        {"encoding": "packed"},
        {"encoding": "packed16"},
        {"capture": "sample"},
        {"capture": "sample", "encoding": "packed"},
        {"capture": "hidden", "top_k": 0, "head": HeadForm(hidden_size=32, dtype=np.dtype("<f4"), has_bias=False)},
        {"capture": "full", "top_k": 0},
    ],
    ids=lambda kind: "-".join(str(kind.get(name, "")) for name in ("capture", "encoding")),
)
@pytest.mark.parametrize("ids", [[3], [0], list(range(50))], ids=["another", "the target", "all"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_logits_that_are_not_finite_are_found_in_every_kind_of_file(
    value: float, ids: list[int], kind: dict[str, Any]
) -> None:
    """At position 1 of the second row, which predicts token 0. A few masked tokens are no fault."""
    model, masked = make_llama(50), value == -torch.inf and len(ids) < 50
    teacher = Teacher(model, 50)

    def change(module: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        output = output.clone()
        output.view(-1, 50)[3, ids] = value
        return output

    model.lm_head.register_forward_hook(change)
    batch = batch_of([[1, 2, 3], [4, 5, 0]], first_row=6)
    layout = layout_of(batch, **kind)
    payload = capture_batch(teacher, batch, layout).numpy()
    if masked:
        seal(payload, batch, layout, torch.float32)
        return
    with pytest.raises(CaptureError, match=r"^The teacher's logits are not finite at row 7, position 1, in float32\. "):
        seal(payload, batch, layout, torch.float32)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize(
    ("dtype", "remedy"),
    [
        (torch.float16, "Its range is small: try --dtype bfloat16 or float32."),
        (torch.bfloat16, "Try --dtype float32; if that does not help, the weights are damaged."),
        (torch.float32, "The weights are damaged, or the row is one the teacher cannot read."),
    ],
)
def test_logits_that_are_not_finite_are_reported_with_a_remedy(value: float, dtype: torch.dtype, remedy: str) -> None:
    model = make_llama(50)
    teacher = Teacher(model, 50)
    model.lm_head.register_forward_hook(lambda module, inputs, output: output.index_fill(1, torch.tensor([3]), value))
    batch = batch_of([[1, 2, 3], [4, 5, 6]], first_row=6)  # positions 0 1 | 0 1: the fourth is row 7, position 1
    payload = capture_batch(teacher, batch, layout_of(batch)).numpy()
    name = str(dtype).removeprefix("torch.")
    message = rf"not finite at row 7, position 1, in {name}\. {remedy}$"
    with pytest.raises(CaptureError, match=message):
        seal(payload, batch, layout_of(batch), dtype)


OUT_OF_MEMORY = "CUDA out of memory. Tried to allocate 2 GiB."
RAGGED = [[1, 2, 3, 4, 5, 6], [7, 8, 9, 10], [11, 12, 13, 14], [15, 16, 17], [18, 19]]


def limit_memory(monkeypatch: pytest.MonkeyPatch, most_rows: int, chunks_before: int = 0) -> list[int]:
    """Let the teacher run out of memory over more rows than this, after so many chunks; returns what was tried."""
    logits, tried = Teacher.logits, []

    def limited(self: Teacher, passes: list[Pass], slots: Any) -> Iterator[Any]:
        num_rows = sum(len(each.input_ids) for each in passes if not each.is_trunk)
        tried.append(num_rows)
        for index, chunk in enumerate(logits(self, passes, slots)):
            if num_rows > most_rows and index >= chunks_before:
                raise torch.OutOfMemoryError(OUT_OF_MEMORY)
            yield chunk

    monkeypatch.setattr(Teacher, "logits", limited)
    return tried


@pytest.mark.parametrize(
    ("most_rows", "chunks_before", "expected", "kept"),
    [
        (4, 0, [5, 2, 3], {"top_k": 5}),
        (2, 0, [5, 2, 3, 1, 2], {"capture": "full", "top_k": 0}),
        (2, 1, [5, 2, 3, 1, 2], {"top_k": 5}),  # when a part of the batch had been stored already
        (1, 0, [5, 2, 1, 1, 3, 1, 2, 1, 1], {"top_k": 5}),
    ],
)
def test_a_batch_that_does_not_fit_into_memory_is_halved_until_it_does(
    most_rows: int,
    chunks_before: int,
    expected: list[int],
    kept: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    batch, model = batch_of(RAGGED), make_llama(50)
    whole = captured(batch, layout_of(batch, **kept), model)
    monkeypatch.setattr(teacher_module, "CHUNK_LOGITS", 3 * 50)
    tried = limit_memory(monkeypatch, most_rows, chunks_before)
    halved = captured(batch, layout_of(batch, **kept), model)
    assert tried == expected
    assert halved.keys() == whole.keys()
    for name in whole.keys() - {"crc32"}:  # another shape may round the last bit differently
        np.testing.assert_allclose(halved[name], whole[name], rtol=2**-10, atol=1e-5)
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    parts = [(5, 5), (2, 5), (3, 3), (2, 2)]  # rows, and tokens of the longest, in the order in which they are tried
    assert warnings == [
        f"{rows} rows of {length} tokens do not fit into the memory of cpu: they are computed in halves. "
        "A lower --batch_tokens would save the attempt."
        for rows, length in parts
        if rows > most_rows
    ]


def test_a_run_short_of_memory_gives_the_same_file(
    capture: Callable[..., Path], teacher: Path, ragged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"teacher": teacher, "dataset": ragged, "top_k": 5, "packing": True, "max_length": 24, "limit": 42}
    whole = LogitsFile(capture(**options))
    tried = limit_memory(monkeypatch, most_rows=15)
    halved = LogitsFile(capture(**options, output=tmp_path / "halved.h5"))
    assert len(whole) == 60
    assert tried == [60, 30, 15, 15, 30, 15, 15]
    for name, values in whole.arrays.items():
        if name != "crc32":
            np.testing.assert_allclose(halved.arrays[name], values, rtol=2**-10, atol=1e-5)


def test_a_row_that_does_not_fit_into_memory_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = limit_memory(monkeypatch, most_rows=0)
    batch = batch_of([[1, 2, 3], [4, 5, 6]], first_row=6)
    message = r"^Row 6 does not fit into the memory of cpu: 2 tokens\. Lower --max_length, or free memory\.$"
    with pytest.raises(CaptureError, match=message):
        capture_batch(Teacher(make_llama(50), 50), batch, layout_of(batch))
    assert tried == [2, 1]


def test_ranks_that_share_a_teacher_do_not_halve_a_batch_each_for_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """They run the teacher equally often, or wait for one another for ever."""
    tried = limit_memory(monkeypatch, most_rows=1)
    teacher = Teacher(make_llama(50), 50)
    teacher.is_shared = True
    batch = batch_of([[1, 2, 3], [4, 5, 6]])
    message = r"^2 rows of 2 tokens do not fit into the memory of cpu, and .* Lower --batch_tokens\.$"
    with pytest.raises(CaptureError, match=message):
        capture_batch(teacher, batch, layout_of(batch))
    assert tried == [2]


@pytest.mark.parametrize("message", ["expected scalar type Float but found Half", "CUDA error: device-side assert"])
def test_another_error_of_the_teacher_is_not_taken_for_a_lack_of_memory(message: str) -> None:
    model, tried = make_llama(50), []
    teacher = Teacher(model, 50)

    def fail(module: Any, inputs: Any) -> None:
        tried.append(1)
        raise RuntimeError(message)

    model.lm_head.register_forward_pre_hook(fail)
    batch = batch_of([[1, 2, 3], [4, 5, 6]])
    with pytest.raises(RuntimeError, match=f"^{message}$"):
        capture_batch(teacher, batch, layout_of(batch))
    assert tried == [1]


def test_a_rows_checksum_is_the_crc32_of_all_that_is_known_of_it() -> None:
    batch = batch_of([[1, 2, 3], [4, 5]], first_row=6)
    arrays = captured(batch, layout_of(batch))
    second = [np.array([7, 107], "<i8"), np.array([4, 5], "<u2"), np.array([0], "<i4")]
    second += [arrays[name][2:] for name in ("logsumexp", "target_logprob")]
    second += [arrays[name][2 * 3 :] for name in ("kept_ids", "kept_logprobs")]
    assert arrays["crc32"][1] == zlib.crc32(b"".join(array.tobytes() for array in second))


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2), st.integers(0, 5))
def test_a_rows_checksum_covers_its_number_tokens_and_what_was_captured(row: int, bit: int) -> None:
    tokens = [[1, 2, 3, 4], [5, 6, 7], [8, 9]]
    batch, layout = batch_of(tokens), layout_of(batch_of(tokens))
    before = captured(batch, layout)["crc32"].tolist()
    assert len(set(before)) == 3
    tokens[row][0] ^= 1 << bit if tokens[row][0] ^ 1 << bit < 50 else 0
    changed = captured(batch_of(tokens), layout)["crc32"].tolist()
    same_input = tokens[row][0] == [1, 5, 8][row]
    assert [left == right for left, right in zip(before, changed, strict=True)] == [
        index != row or same_input for index in range(3)
    ]
    moved = captured(batch_of([[1, 2, 3, 4]], first_row=1), layout_of(batch_of([[1, 2, 3, 4]])))["crc32"]
    assert moved[0] != before[0]
