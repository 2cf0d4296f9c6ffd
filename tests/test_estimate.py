"""What a dry run says, against the run itself and against cases worked by hand; and that it leaves no trace."""

import json
import mmap
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import psutil
import pytest
import torch
from conftest import interrupted, make_llama, save_teacher, write_jsonl
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from logitgen import UsageError, generate
from logitgen import estimate as estimate_module
from logitgen.config import Config
from logitgen.estimate import NUM_PILOTS, PROBE_TOKENS, Estimate, Pilot, estimate, fitting_batch_tokens
from logitgen.file.layout import Layout
from logitgen.leader import output as output_module
from logitgen.provenance import package_versions
from logitgen.split.job import Job
from logitgen.split.plan import Plan
from logitgen.split.rows import Rows
from logitgen.teacher import mass as mass_module
from logitgen.teacher.capture import capture_batch
from logitgen.teacher.model import Teacher

Capture = Callable[..., Path]

LENGTHS = [5, 3, 9, 0, 1]
"""With --max_length 6: four tokens of row 2 are not in a row, or in one of their own."""


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "rows.jsonl", [{"input_ids": list(range(length))} for length in LENGTHS])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "outputs").mkdir()
    return tmp_path / "outputs"


@pytest.fixture
def estimates(monkeypatch: pytest.MonkeyPatch) -> list[Estimate]:
    """Every estimate a dry run has shown."""
    shown: list[Estimate] = []

    def watched(*arguments: Any) -> Estimate:
        shown.append(estimate(*arguments))
        return shown[-1]

    monkeypatch.setattr(generate, "estimate", watched)
    return shown


@pytest.fixture
def forward_batches(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """How many rows every batch had that was computed, and how many tokens the longest."""
    computed: list[tuple[int, int]] = []
    compute = estimate_module.capture_batch

    def watched(teacher: Any, batch: Any, layout: Layout) -> torch.Tensor:
        computed.append(batch.passes[0].input_ids.shape)
        return compute(teacher, batch, layout)

    monkeypatch.setattr(estimate_module, "capture_batch", watched)
    return computed


def contents(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Every file of a folder: its bytes and when they were last written."""
    return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()}


def printed(capsys: pytest.CaptureFixture[str]) -> str:
    return " ".join(capsys.readouterr().out.split())


def test_a_dry_run_leaves_nothing_in_the_output_folder(
    capture: Capture, teacher: Path, data: Path, folder: Path, estimates: list[Estimate]
) -> None:
    capture(teacher=teacher, dataset=data, output=folder / "out.h5", dry_run=True)
    assert len(estimates) == 1
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize(
    "options",
    [
        {"top_k": 1},
        {"top_k": 7},
        {"top_k": 384},
        {"capture": "full"},
        {"capture": "hidden"},
        {"capture": "hidden", "encoding": "packed"},
        {"capture": "hidden", "layers": "0,1"},
        {"packing": True, "max_length": 16},
    ],
    ids=lambda options: " ".join(f"{name} {value}" for name, value in options.items()),
)
def test_the_size_is_exact(
    options: dict[str, Any],
    capture: Capture,
    teacher: Path,
    ragged: Path,
    estimates: list[Estimate],
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = capture(teacher=teacher, dataset=ragged, dry_run=True, **options)
    out = printed(capsys)
    assert not path.exists()
    size_bytes = os.path.getsize(capture(teacher=teacher, dataset=ragged, **options))  # noqa: PTH202
    assert estimates[0].size_bytes == size_bytes
    assert f"file {size_bytes:,} bytes, " in out


def test_the_size_is_exact_where_only_completions_are_captured(
    capture: Capture, teacher: Path, tmp_path: Path, estimates: list[Estimate]
) -> None:
    rows = [
        {"prompt": "Who wrote it? ", "completion": "Nobody knows."},
        {"prompt": "No answer", "completion": ""},
        {"prompt": "", "completion": "No question"},
    ]
    options = {"dataset": write_jsonl(tmp_path / "d.jsonl", rows), "completion_only": True, "top_k": 5}
    capture(teacher=teacher, dry_run=True, **options)
    path = capture(teacher=teacher, **options)
    assert estimates[0].size_bytes == path.stat().st_size
    assert estimates[0].num_rows == 3


def test_the_sizes_with_other_things_kept_are_exact(
    capture: Capture, teacher: Path, ragged: Path, estimates: list[Estimate]
) -> None:
    capture(teacher=teacher, dataset=ragged, top_k=3, dry_run=True)
    sizes = estimates[0].other_sizes
    plain = ["top 8", "top 16", "top 32", "top 64", "top 128", "top 256"]
    assert list(sizes) == [*plain, *(f"{name}, packed" for name in (*plain, "12+ drawn")), "all logits"]
    kinds: dict[str, dict[str, Any]] = {
        "top 8": {"top_k": 8},
        "top 256": {"top_k": 256},
        "top 64, packed": {"encoding": "packed"},
        "12+ drawn, packed": {"capture": "sample", "top_k": 12, "encoding": "packed"},
        "all logits": {"capture": "full"},
    }
    for kept, options in kinds.items():
        assert capture(teacher=teacher, dataset=ragged, overwrite=True, **options).stat().st_size == sizes[kept]
    capture(teacher=teacher, dataset=ragged, capture="full", overwrite=True, dry_run=True)
    assert estimates[1].other_sizes == sizes
    assert estimates[1].size_bytes == sizes["all logits"]
    capture(teacher=teacher, dataset=ragged, capture="hidden", overwrite=True, dry_run=True)
    packed = capture(teacher=teacher, dataset=ragged, capture="hidden", encoding="packed", overwrite=True)
    of_hidden = {"hidden states": estimates[2].size_bytes, "hidden states, packed": packed.stat().st_size}
    assert estimates[2].other_sizes == sizes | of_hidden


@pytest.mark.parametrize(
    ("options", "lengths", "expected"),
    [
        # Read are 4, 2 and 5 tokens, and none of the last two rows. 5 goes alone, and so do 4 and 2: 2 * 4 tokens would
        # be within the budget, but 2 of 13 padding.
        (
            {"max_length": 6},
            LENGTHS,
            {"rows": 5, "tokens": 15, "positions": 11, "cut": 1, "dropped": 3, "batches": 3, "padding": 0},
        ),
        # Row 2 becomes two of 6 and 3 tokens. 5 and 4 go alone, 2 and 2 together.
        (
            {"max_length": 6, "overflow": "split"},
            LENGTHS,
            {"rows": 6, "tokens": 18, "positions": 13, "cut": 1, "dropped": 0, "batches": 3, "padding": 0},
        ),
        # 18 tokens are four blocks of 4, of which 3 each are read, two at a time.
        (
            {"max_length": 4, "packing": True},
            LENGTHS,
            {"rows": 4, "tokens": 16, "positions": 12, "cut": 0, "dropped": 2, "batches": 2, "padding": 0},
        ),
        # 51 and 50 go together, 1 of 102 tokens is padding; with 40 it were 12 of 153.
        (
            {"batch_tokens": 160},
            [41, 52, 51],
            {"rows": 3, "tokens": 144, "positions": 141, "cut": 0, "dropped": 0, "batches": 2, "padding": 1 / 142},
        ),
    ],
    ids=["truncated", "split", "packed", "as they are"],
)
def test_rows_tokens_and_padding_worked_by_hand(
    options: dict[str, Any],
    lengths: list[int],
    expected: dict[str, float],
    capture: Capture,
    teacher: Path,
    tmp_path: Path,
    estimates: list[Estimate],
    capsys: pytest.CaptureFixture[str],
) -> None:
    data = write_jsonl(tmp_path / "rows.jsonl", [{"input_ids": list(range(length))} for length in lengths])
    capture(teacher=teacher, dataset=data, dry_run=True, share_prefixes=False, **{"batch_tokens": 8} | options)
    (found,) = estimates
    assert {
        "rows": found.num_rows,
        "tokens": found.num_tokens,
        "positions": found.num_positions,
        "cut": found.num_cut,
        "dropped": found.num_dropped_tokens,
        "batches": found.num_batches,
        "padding": pytest.approx(found.padding_share),
    } == expected
    out = printed(capsys)
    assert f"rows {expected['rows']}, {expected['cut']} of the split were too long" in out
    assert f"{expected['tokens']}, {expected['positions']} positions captured, {expected['dropped']} tokens" in out
    assert f"batches {expected['batches']}, {expected['padding']:.1%} padding" in out


def rows_of(lengths: list[int]) -> Rows:
    features = datasets.Features({"input_ids": datasets.List(datasets.Value("int32"))})
    ids = [list(range(length)) for length in lengths]
    split = datasets.Dataset.from_dict({"input_ids": ids}, features=features)
    return Rows(split, Config(teacher="t", dataset="d", output="o"), max_length=None)


def hand_worked(pilots: list[Pilot], capture: str = "topk", attributes: dict[str, Any] | None = None) -> Estimate:
    """Batches of 51 and 50 positions, of 40 and of 30, of which two tokens are kept."""
    rows = rows_of([41, 52, 0, 51, 31])
    layout = Layout(
        capture=capture,
        num_rows=5,
        num_tokens=175,
        num_positions=171,
        vocab_size=40,
        top_k=2 if capture == "topk" else 0,
    )
    plan = Plan(rows.forward_lengths, batch_tokens=110)
    return estimate(Job(rows, plan, layout), attributes or {"settings": "{}"}, pilots)


def test_times_and_buffers_worked_by_hand() -> None:
    found = hand_worked([Pilot(2.0, 100, 0), Pilot(4.0, 300, 7)])
    assert found.num_batches == 3
    # 3 s a token. Through the teacher go 102, 40 and 30, of which 1 is padding. Two ranks compute 102 and 40 + 30.
    assert found.tokens_per_second == pytest.approx(171 / 172 / 3)
    assert found.seconds == {1: 3 * 172, 2: 3 * 102, 4: 3 * 102, 8: 3 * 102, 16: 3 * 102, 32: 3 * 102, 64: 3 * 102}
    # A payload has 4 bytes a row, and a position two float32, two ids and two float16: 16 bytes.
    assert found.buffer_bytes == 2 * 2 * (2 * 4 + 101 * 16)
    plain = ["top 8", "top 16", "top 32"]
    packed = [f"{name}, packed" for name in (*plain, "12+ drawn")]
    assert list(found.other_sizes) == [*plain, *packed, "all logits"]
    assert found.other_sizes["12+ drawn, packed"] - found.other_sizes["top 8"] == 171 * (2 + 8 + 13 - 8 - 8 * 4)
    assert found.other_sizes["top 8, packed"] - found.other_sizes["top 8"] == 171 * (2 + 5 + 8 + 1 - 8 - 8 * 4)
    assert found.other_sizes["top 16"] - found.other_sizes["top 8"] == 171 * 8 * 4
    assert found.other_sizes["all logits"] - found.other_sizes["top 8"] == 171 * (40 * 2 - 8 * 4)
    assert found.other_sizes["top 8"] - found.size_bytes == 171 * 6 * 4


def test_more_than_64_ranks_are_not_needed_for_three_batches() -> None:
    found = hand_worked([Pilot(1.5, 1, 0)], capture="full")
    assert list(found.seconds) == [1, 2, 4, 8, 16, 32, 64]
    assert found.buffer_bytes == 2 * (2 * 4 + 101 * 88)


def test_the_time_is_that_of_the_rank_with_the_most_tokens() -> None:
    rows = rows_of([11, 10, 9, 8, 7, 6, 5, 4])
    layout = Layout(capture="topk", num_rows=8, num_tokens=60, num_positions=52, vocab_size=40, top_k=2)
    found = estimate(Job(rows, Plan(rows.forward_lengths, 1), layout), {"settings": "{}"}, [Pilot(0.5, 1, 0)])
    # 10 9 8 7 6 5 4 3, each to who has least. Two ranks: 10 7 6 3 and 9 8 5 4. Four: 10 3, 9 4, 8 5, 7 6.
    assert found.seconds == {1: 26, 2: 13, 4: 6.5, 8: 5, 16: 5, 32: 5, 64: 5}


@pytest.mark.parametrize(
    ("sizes", "num_streams", "seconds"),
    [
        ({"tp_size": 2}, 2, {2: 26, 4: 13, 8: 6.5, 16: 5, 32: 5, 64: 5}),  # two ranks do what one did
        ({"fsdp_size": 2}, 4, {2: 14, 4: 8, 8: 5, 16: 5, 32: 5, 64: 5}),  # 10 8 6 4; then 10 6, 7 3 and 9 5, 8 4
        ({"tp_size": 2, "fsdp_size": 2}, 2, {4: 14, 8: 8, 16: 5, 32: 5, 64: 5}),
    ],
)
def test_ranks_that_share_a_teacher_take_longer_worked_by_hand(
    sizes: dict[str, int], num_streams: int, seconds: dict[int, float]
) -> None:
    rows = rows_of([11, 10, 9, 8, 7, 6, 5, 4])
    layout = Layout(capture="topk", num_rows=8, num_tokens=60, num_positions=52, vocab_size=40, top_k=2)
    job = Job(rows, Plan(rows.forward_lengths, 1), layout)
    found = estimate(job, {"settings": "{}"}, [Pilot(0.5, 1, 0)] * 4, **sizes)
    assert found.seconds == seconds
    assert found.buffer_bytes == 2 * num_streams * (4 + 10 * 16)


def test_a_pilot_is_a_few_batches_and_the_largest_one_first(
    capture: Capture, teacher: Path, ragged: Path, forward_batches: list[tuple[int, int]], estimates: list[Estimate]
) -> None:
    capture(teacher=teacher, dataset=ragged, batch_tokens=60, top_k=4, dry_run=True)
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    texts = [json.loads(line)["text"] for line in ragged.read_text().splitlines()]
    read = [len(tokenizer(text)["input_ids"]) - 1 for text in texts]
    assert estimates[0].num_batches > 2 * NUM_PILOTS
    assert len(forward_batches) == NUM_PILOTS + 1
    assert forward_batches[0] == forward_batches[1]  # once to warm up
    longest = [length for _, length in forward_batches[1:]]
    assert longest == sorted(set(longest), reverse=True)
    assert (longest[0], longest[-1]) == (max(read), min(length for length in read if length > 0))
    (pilot,) = estimates[0].pilots
    assert pilot.seconds_per_token > 0
    assert pilot.host_bytes > 10**7  # Python and torch alone take more
    assert (pilot.device_bytes > 0) == torch.cuda.is_available()


def test_the_pilots_time_is_divided_by_its_tokens_with_padding(
    capture: Capture, teacher: Path, tmp_path: Path, estimates: list[Estimate], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a clock on which the first batch takes 7 s more, and every batch 1 s and a fourth of a second per token."""
    seconds, compute = [0.0], estimate_module.capture_batch

    def watched(teacher: Any, batch: Any, layout: Layout) -> torch.Tensor:
        seconds[0] += (7 if seconds[0] == 0 else 0) + 1 + batch.passes[0].input_ids.size / 4
        return compute(teacher, batch, layout)

    monkeypatch.setattr(estimate_module, "capture_batch", watched)
    clock = SimpleNamespace(perf_counter=lambda: seconds[0])
    monkeypatch.setattr(estimate_module, "time", clock)
    monkeypatch.setattr(mass_module, "time", clock)
    monkeypatch.setattr(estimate_module, "PILOT_SECONDS", 1e9)
    lengths = [41, 52, 51]  # batches of 2 * 51 and 40 tokens
    data = write_jsonl(tmp_path / "rows.jsonl", [{"input_ids": list(range(length))} for length in lengths])
    capture(teacher=teacher, dataset=data, batch_tokens=110, top_k=4, dry_run=True, share_prefixes=False)
    (pilot,) = estimates[0].pilots
    assert pilot.seconds_per_token == pytest.approx((2 + 142 / 4) / 142)
    assert seconds[0] == pytest.approx(7 + 1 + 102 / 4 + 2 + 142 / 4)


def test_a_slow_pilot_ends_after_the_first_batch(
    capture: Capture,
    teacher: Path,
    ragged: Path,
    forward_batches: list[tuple[int, int]],
    estimates: list[Estimate],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(estimate_module, "PILOT_SECONDS", 0.0)
    capture(teacher=teacher, dataset=ragged, batch_tokens=60, top_k=4, dry_run=True)
    assert len(forward_batches) == 1
    assert estimates[0].tokens_per_second > 0


def test_a_single_batch_is_enough(
    capture: Capture, teacher: Path, tmp_path: Path, forward_batches: list[tuple[int, int]], estimates: list[Estimate]
) -> None:
    data = write_jsonl(tmp_path / "rows.jsonl", [{"input_ids": list(range(length))} for length in (9, 9, 0, 9)])
    capture(teacher=teacher, dataset=data, dry_run=True)
    assert estimates[0].num_batches == 1
    assert forward_batches == [(3, 8), (3, 8)]
    assert len(set(estimates[0].seconds.values())) == 1


def test_what_a_dry_run_prints(
    capture: Capture, teacher: Path, ragged: Path, estimates: list[Estimate], capsys: pytest.CaptureFixture[str]
) -> None:
    capture(teacher=teacher, dataset=ragged, top_k=4, dry_run=True)
    out = printed(capsys)
    (found,) = estimates
    assert f"rows 53, {found.num_cut} of the split were too long" in out
    assert f"tokens {found.num_tokens:,}, {found.num_positions:,} positions captured, 0 tokens dropped" in out
    assert f"file {found.size_bytes:,} bytes, {found.size_bytes / found.num_tokens:,.1f} per token; " in out
    assert f"speed {found.tokens_per_second:,.0f} tokens/s per rank, 1 measured at once" in out
    assert "memory per rank " in out
    for name, size_bytes in found.other_sizes.items():
        size = f"{size_bytes / 1e3:,.1f} kB" if size_bytes < 1e6 else f"{size_bytes / 1e6:,.1f} MB"
        assert f"{name} {size} {size_bytes / found.num_tokens:,.1f} B" in out
    for number in found.seconds:
        assert f" {number} 0:00" in out


def test_the_pilots_time_leaves_out_that_of_the_measured_mass(
    capture: Capture, teacher: Path, tmp_path: Path, estimates: list[Estimate], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a clock on which only top k takes time: a batch of the pilot computes it once more than the run does."""
    seconds = [0.0]
    compute = mass_module.top_k

    def slow(*arguments: Any) -> Any:
        seconds[0] += 100
        return compute(*arguments)

    clock = SimpleNamespace(perf_counter=lambda: seconds[0])
    monkeypatch.setattr(mass_module, "top_k", slow)
    for module in (estimate_module, mass_module):
        monkeypatch.setattr(module, "time", clock)
    monkeypatch.setattr(estimate_module, "time", SimpleNamespace(perf_counter=lambda: seconds[0] + next(ticks)))
    ticks = iter(range(100))
    data = write_jsonl(tmp_path / "rows.jsonl", [{"input_ids": list(range(9))}])
    capture(teacher=teacher, dataset=data, top_k=4, dry_run=True)
    assert seconds[0] == 200
    assert estimates[0].pilots[0].seconds_per_token == 1 / 8


def direct_masses(teacher: Path, rows: list[list[int]], skip: int = 0) -> np.ndarray:
    """The mass of every top k at every position that has a next token, by a plain forward pass per row, [P, V]."""
    model = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32)
    with torch.no_grad():
        probs = [model(torch.tensor([ids])).logits[0, skip:-1].double().softmax(-1) for ids in rows if len(ids) > 1]
    return np.asarray(torch.cat(probs).sort(-1, descending=True).values.cumsum(-1))


MASS_ROWS = [[(7 * row + 3 * index * index) % 384 for index in range(20 + 4 * (row // 6))] for row in range(30)]
"""Rows of five lengths, so that a pilot computes all their batches."""
KINDS: dict[str, dict[str, Any]] = {
    "topk": {"top_k": 5},
    "packed topk": {"top_k": 300, "encoding": "packed"},
    "sample": {"capture": "sample", "top_k": 12},
    "hidden": {"capture": "hidden"},
    "full": {"capture": "full"},
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_kept_mass_is_that_of_the_teachers_distributions(
    kind: str, capture: Capture, teacher: Path, tmp_path: Path, estimates: list[Estimate]
) -> None:
    data = write_jsonl(tmp_path / "rows.jsonl", [{"input_ids": ids} for ids in MASS_ROWS])
    capture(teacher=teacher, dataset=data, dry_run=True, **KINDS[kind])
    expected_PV = direct_masses(teacher, MASS_ROWS)
    (found,) = estimates
    assert found.num_measured == len(expected_PV) == found.num_positions
    kept = {f"top {k}": k for k in (8, 16, 32, 64, 128, 256)}
    kept |= {f"{name}, packed": k for name, k in kept.items()}
    kept |= {"topk": {"top 5": 5}, "packed topk": {"top 300, packed": 300}}.get(kind, {})
    for name, k in kept.items():
        mass_P = expected_PV[:, k - 1]
        assert found.masses[name] == pytest.approx((mass_P.mean(), np.quantile(mass_P, 0.1)), abs=1e-5), name
    rest = {name: found.masses[name] for name in found.masses.keys() - kept.keys()}
    of_hidden = ["hidden states", "hidden states, packed"] if kind == "hidden" else []
    assert rest == dict.fromkeys(["all logits", *of_hidden], (1, 1))


def test_every_row_counts_where_a_prefix_is_read_once(
    capture: Capture, teacher: Path, tmp_path: Path, estimates: list[Estimate]
) -> None:
    prompt = [(11 * index * index) % 384 for index in range(96)]
    rows = [prompt + [(5 * row + index) % 384 for index in range(8)] for row in range(12)]
    data = write_jsonl(tmp_path / "rows.jsonl", [{"input_ids": ids} for ids in rows])
    capture(teacher=teacher, dataset=data, dry_run=True, top_k=8)
    (found,) = estimates
    assert found.saved_share > 0.5
    expected_P = direct_masses(teacher, rows)[:, 7]
    assert found.num_measured == len(expected_P)
    assert found.masses["top 8"] == pytest.approx((expected_P.mean(), np.quantile(expected_P, 0.1)), abs=1e-4)


def test_only_some_positions_of_a_large_pilot_are_measured(
    capture: Capture, teacher: Path, tmp_path: Path, estimates: list[Estimate], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(estimate_module, "NUM_MEASURED", 300)
    data = write_jsonl(tmp_path / "rows.jsonl", [{"input_ids": ids} for ids in MASS_ROWS])
    capture(teacher=teacher, dataset=data, dry_run=True, batch_tokens=150)
    (found,) = estimates
    assert 225 < found.num_measured < 375  # six standard deviations of a draw around 300
    expected_P = direct_masses(teacher, MASS_ROWS)[:, 7]
    assert abs(found.masses["top 8"][0] - expected_P.mean()) < 6 * expected_P.std() / 300**0.5


def test_a_small_vocabulary_is_measured_too(
    capture: Capture, tmp_path: Path, estimates: list[Estimate], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = save_teacher(tmp_path / "small", make_llama(6), None)
    data = write_jsonl(tmp_path / "rows.jsonl", [{"input_ids": [0, 1, 2, 3]}])
    capture(teacher=folder, dataset=data, dry_run=True, capture="full")
    assert estimates[0].masses == {"all logits": (1, 1)}
    capture(teacher=folder, dataset=data, dry_run=True, top_k=2)
    expected_P = direct_masses(folder, [[0, 1, 2, 3]])[:, 1]
    assert estimates[1].masses["top 2"] == pytest.approx((expected_P.mean(), np.quantile(expected_P, 0.1)), abs=1e-5)
    assert "; measured at 3 positions of the pilot" in printed(capsys)


def test_what_an_interrupted_run_has_left_stays_as_it_is(
    capture: Capture,
    teacher: Path,
    ragged: Path,
    folder: Path,
    estimates: list[Estimate],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    options = {"teacher": teacher, "dataset": ragged, "top_k": 4, "batch_tokens": 300, "output": folder / "out.h5"}
    interrupted(capture, monkeypatch, **options)
    before = contents(folder)
    assert list(before) == ["out.h5.partial"]
    capture(dry_run=True, **options)
    assert contents(folder) == before
    assert capture(**options).stat().st_size == estimates[0].size_bytes  # and it can still be gone on with


def test_a_file_that_only_lacks_its_name_does_not_get_it_from_a_dry_run(
    capture: Capture, teacher: Path, data: Path, folder: Path
) -> None:
    options = {"teacher": teacher, "dataset": data, "top_k": 4, "output": folder / "out.h5"}
    capture(**options).rename(folder / "out.h5.partial")
    before = contents(folder)
    capture(dry_run=True, **options)
    assert contents(folder) == before


def test_a_complete_output_stays_as_it_is(
    capture: Capture, teacher: Path, data: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    warnings: list[str] = []
    monkeypatch.setattr(output_module.logger, "warning", lambda text, *words: warnings.append(text % words))
    options = {"teacher": teacher, "dataset": data, "output": folder / "out.h5"}
    capture(top_k=4, **options)
    before = contents(folder)
    capture(top_k=4, dry_run=True, **options)
    capture(top_k=5, dry_run=True, overwrite=True, **options)
    capture(top_k=5, dry_run=True, **options)  # to compare is what it is for
    assert "belongs to another run. Its values and this run's differ: --top_k 4 and 5. Without" in warnings[-1]
    assert contents(folder) == before


def test_an_output_that_cannot_be_written_is_refused_in_a_dry_run_too(
    capture: Capture, teacher: Path, data: Path, folder: Path, forward_batches: list[tuple[int, int]]
) -> None:
    with pytest.raises(UsageError, match=r"--output .*: the folder .*nowhere does not exist. Create it."):
        capture(teacher=teacher, dataset=data, output=folder / "nowhere" / "out.h5", dry_run=True)
    with pytest.raises(UsageError, match=r"--output .*: .*outputs is not a regular file. Choose another name."):
        capture(teacher=teacher, dataset=data, output=folder, dry_run=True)
    (folder / "out.h5").write_text("precious")
    with pytest.raises(UsageError, match=r"out.h5 exists and is not a logitgen file"):
        capture(teacher=teacher, dataset=data, output=folder / "out.h5", dry_run=True)
    with pytest.raises(UsageError, match=r"--output .* cannot be written: File name too long. Choose another place."):
        capture(teacher=teacher, dataset=data, output=folder / ("x" * 300), dry_run=True)
    assert (folder / "out.h5").read_text() == "precious"
    assert len(list(folder.iterdir())) == 1
    assert forward_batches == []


def test_the_head_of_long_settings_is_counted() -> None:
    packages = str(package_versions())
    short, longer = (
        hand_worked([Pilot(1.0, 1, 0)], attributes={"settings": json.dumps({"dataset": name}), "packages": packages})
        for name in ("s" * 300, "s" * 9_000)
    )
    assert np.sign(longer.size_bytes - short.size_bytes) == 1
    assert longer.other_sizes["top 8"] - longer.size_bytes == short.other_sizes["top 8"] - short.size_bytes


# As many tokens as fit.


def layout_of(lengths: list[int]) -> Layout:
    num_tokens, num_positions = sum(lengths), sum(lengths) - len(lengths)
    sizes = {"num_rows": len(lengths), "num_tokens": num_tokens, "num_positions": num_positions}
    return Layout(capture="topk", vocab_size=50, top_k=2, **sizes)


class Memory:
    """What is free, and what a batch takes of it, as the test says; and the batches that were computed to find out."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.free = self.taken = 1
        self.order: list[Any] = []
        monkeypatch.setattr(estimate_module, "_free_bytes", lambda device: self.free)
        monkeypatch.setattr(estimate_module, "_taken_bytes", self._measure)
        monkeypatch.setattr(
            estimate_module, "capture_batch", lambda teacher, batch, layout: self.order.append(batch.rows.tolist())
        )

    def _measure(self, device: torch.device, work: Callable[[], object]) -> int:
        self.order.append("measure")
        work()
        self.order.append("measured")
        return self.taken

    def fitting(
        self,
        lengths: list[int],
        free: int,
        taken: int,
        device: str = "cpu",
        num_ranks: int = 1,
        switch: int | None = None,
    ) -> int:
        self.free, self.taken, self.order = free, taken, []
        teacher: Any = SimpleNamespace(device=torch.device(device))
        rows = rows_of(lengths)
        job = Job(rows, Plan(rows.forward_lengths, PROBE_TOKENS, switch), layout_of(lengths))
        return fitting_batch_tokens(teacher, job, num_ranks)


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> Memory:
    return Memory(monkeypatch)


PROBE = [33] * 100
"""Rows of 32 tokens to read; the probe takes 64 of them, which are 2,048 tokens."""


@pytest.mark.parametrize(
    ("free", "taken", "device", "num_ranks", "fitting"),
    [
        # Of 1,000 free bytes 700 may be taken, and a token takes one: 700 tokens, of which 512 are a power of two.
        (1_000, 2_048, "cpu", 1, 512),
        (1_000, 2_048, "cuda", 1, 512),
        (1_000, 4_096, "cpu", 1, 256),
        (1_000, 1_024, "cpu", 1, 1_024),
        (2_000, 2_048, "cpu", 1, 1_024),
        # 70 % of 732 bytes are 512.4, and of 730 just 511.
        (732, 2_048, "cpu", 1, 512),
        (730, 2_048, "cpu", 1, 256),
        # Ranks of one machine share its memory, and each has a GPU to itself.
        (1_000, 2_048, "cpu", 2, 256),
        (1_000, 2_048, "cpu", 8, 64),
        (1_000, 2_048, "cuda", 8, 512),
        # More than this takes more memory and no less time.
        (5_852, 2_048, "cpu", 1, 4_096),
        (5_850, 2_048, "cpu", 1, 2_048),
        (10**12, 2_048, "cpu", 1, 4_096),
        (10**12, 2_048, "cuda", 1, 32_768),
        (23_410, 2_048, "cuda", 1, 16_384),
        # Where not even one token seems to fit, that is tried.
        (1, 2_048, "cpu", 1, 1),
        (1, 10**12, "cuda", 1, 1),
        # Where the system does not tell.
        (0, 2_048, "cpu", 1, 4_096),
        (0, 2_048, "cuda", 1, 32_768),
        (1_000, 0, "cpu", 1, 4_096),
        (1_000, 0, "cuda", 4, 32_768),
        (0, 0, "cpu", 3, 4_096),
        (0, 0, "mps", 1, 4_096),
    ],
)
def test_fitting_tokens_worked_by_hand(
    memory: Memory, free: int, taken: int, device: str, num_ranks: int, fitting: int
) -> None:
    assert memory.fitting(PROBE, free, taken, device, num_ranks) == fitting


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(2, 2**45), st.integers(1, 2**45), st.sampled_from(["cpu", "cuda"]), st.integers(1, 64))
def test_tokens_that_fit_take_a_third_to_two_thirds_of_memory(
    memory: Memory, free: int, taken: int, device: str, num_ranks: int
) -> None:
    fitting = memory.fitting(PROBE, free, taken, device, num_ranks)
    assert fitting.bit_count() == 1
    assert fitting <= (4_096 if device == "cpu" else 32_768)
    share = fitting * (taken / 2_048) / (free / (num_ranks if device == "cpu" else 1))
    assert share <= 0.7000001 or fitting == 1
    assert share > 0.3499999 or fitting == (4_096 if device == "cpu" else 32_768)
    assert memory.fitting(PROBE, free // 2, taken, device, num_ranks) <= fitting
    assert memory.fitting(PROBE, free, 2 * taken, device, num_ranks) <= fitting


def test_a_batchs_memory_is_measured_after_a_pass_over_the_longest_rows(memory: Memory) -> None:
    memory.fitting([33] * 10 + [65] * 40, 1_000, 2_048)
    longest = list(range(10, 42))  # 32 rows of 64 tokens
    assert memory.order == [longest, "measure", longest, "measured"]


def test_a_single_row_longer_than_the_probe_is_counted_as_long_as_it_is(memory: Memory) -> None:
    # 70 % of 4,096 bytes, of which one row of 5,000 tokens takes 10,000: 1,433 tokens.
    assert memory.fitting([11, 5_001, 11], 4_096, 10_000) == 1_024
    assert memory.order[0] == [1]


def test_the_probe_holds_to_the_length_switch(memory: Memory) -> None:
    memory.fitting([101, 100], 1_000, 2_048)
    assert memory.order[0] == [0, 1]
    memory.fitting([101, 100], 1_000, 2_048, switch=99)
    assert memory.order[0] == [0]


linux_only = pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells how much memory there is and was")


@linux_only
def test_tokens_that_fit_on_this_machine_are_a_power_of_two() -> None:
    teacher = Teacher(make_llama(50), 50)
    rows, layout = rows_of(PROBE), layout_of(PROBE)
    batch = rows.batch(np.arange(5))
    before = capture_batch(teacher, batch, layout)
    job = Job(rows, Plan(rows.forward_lengths, PROBE_TOKENS), layout)
    fitting = fitting_batch_tokens(teacher, job, ranks_of_machine=1)
    assert fitting in [2**power for power in range(13)]
    assert fitting >= 256  # the tests need far more memory than that takes
    assert torch.equal(capture_batch(teacher, batch, layout), before)


@linux_only
def test_the_free_memory_is_what_can_be_had_without_swapping(monkeypatch: pytest.MonkeyPatch) -> None:
    free = estimate_module._free_bytes(torch.device("cpu"))
    assert free == pytest.approx(psutil.virtual_memory().available, rel=0.2)
    told = {("/proc/meminfo", "MemTotal"): 9, ("/proc/meminfo", "MemFree"): 2, ("/proc/meminfo", "MemAvailable"): 5}
    monkeypatch.setattr(estimate_module, "_proc_bytes", lambda path, name: told[path, name])
    assert estimate_module._free_bytes(torch.device("cpu")) == 5


def touch(size_bytes: int) -> None:
    """Take so much memory, and give it back to the system."""
    with mmap.mmap(-1, size_bytes) as taken:
        for page in range(0, size_bytes, mmap.PAGESIZE):
            taken[page] = 1


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="this system forgets no peak")
def test_what_some_work_takes_is_its_own_peak_and_not_that_of_earlier_work() -> None:
    device = torch.device("cpu")
    assert estimate_module._taken_bytes(device, lambda: touch(300_000_000)) == pytest.approx(300e6, abs=30e6)
    assert estimate_module._taken_bytes(device, lambda: touch(80_000_000)) == pytest.approx(80e6, abs=20e6)
    assert estimate_module._taken_bytes(device, lambda: None) == pytest.approx(0, abs=20e6)


def test_a_size_that_the_system_does_not_tell_is_0(tmp_path: Path) -> None:
    told = tmp_path / "meminfo"
    told.write_text("MemTotal:       2000 kB\nMemAvailable:    512 kB\nHugePages_Total:       7\n")
    assert estimate_module._proc_bytes(str(told), "MemAvailable") == 512 * 1024
    assert estimate_module._proc_bytes(str(told), "MemTotal") == 2000 * 1024
    assert estimate_module._proc_bytes(str(told), "Mem") == 0
    assert estimate_module._proc_bytes(str(tmp_path / "nowhere"), "MemTotal") == 0
