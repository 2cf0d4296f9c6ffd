"""What a dry run says, against the run itself and against cases worked by hand; and that it leaves no trace."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from conftest import write_jsonl

import generate
from logitgen import CaptureError, UsageError
from logitgen import estimate as estimate_module
from logitgen import output as output_module
from logitgen.config import Config
from logitgen.estimate import NUM_PILOTS, Estimate, Pilot, estimate
from logitgen.plan import Plan
from logitgen.provenance import package_versions
from logitgen.rows import Rows
from logitgen.schema import Layout

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
def forward_batches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many rows every batch had that a pilot computed."""
    computed: list[int] = []
    compute = estimate_module.capture_batch

    def watched(teacher: Any, batch: Any, layout: Layout) -> torch.Tensor:
        computed.append(len(batch.rows))
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
    [{"top_k": 1}, {"top_k": 7}, {"top_k": 384}, {"capture": "full"}, {"packing": True, "max_length": 16}],
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
    assert list(sizes) == ["top 8", "top 16", "top 32", "top 64", "top 128", "top 256", "all logits"]
    for kept, options in (("top 8", {"top_k": 8}), ("top 256", {"top_k": 256}), ("all logits", {"capture": "full"})):
        assert capture(teacher=teacher, dataset=ragged, overwrite=True, **options).stat().st_size == sizes[kept]
    capture(teacher=teacher, dataset=ragged, capture="full", overwrite=True, dry_run=True)
    assert estimates[1].other_sizes == sizes
    assert estimates[1].size_bytes == sizes["all logits"]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        # Read are 4, 2 and 5 tokens, and none of the last two rows. 5 goes alone, 4 and 2 together: 5 + 2 * 4.
        ({"max_length": 6}, {"rows": 5, "tokens": 15, "positions": 11, "cut": 1, "dropped": 3, "padding": 2 / 13}),
        # Row 2 becomes two of 6 and 3 tokens. 5 goes alone, 4 and 2 together, 2 alone.
        (
            {"max_length": 6, "overflow": "split"},
            {"rows": 6, "tokens": 18, "positions": 13, "cut": 1, "dropped": 0, "padding": 2 / 15},
        ),
        # 18 tokens are four blocks of 4, of which 3 each are read, two at a time.
        (
            {"max_length": 4, "packing": True},
            {"rows": 4, "tokens": 16, "positions": 12, "cut": 0, "dropped": 2, "padding": 0},
        ),
        ({}, {"rows": 5, "tokens": 18, "positions": 14, "cut": 0, "dropped": 0, "padding": 2 / 16}),
    ],
    ids=["truncated", "split", "packed", "as they are"],
)
def test_rows_tokens_and_padding_worked_by_hand(
    options: dict[str, Any],
    expected: dict[str, float],
    capture: Capture,
    teacher: Path,
    data: Path,
    estimates: list[Estimate],
    capsys: pytest.CaptureFixture[str],
) -> None:
    capture(teacher=teacher, dataset=data, batch_tokens=8, dry_run=True, **options)
    (found,) = estimates
    assert {
        "rows": found.num_rows,
        "tokens": found.num_tokens,
        "positions": found.num_positions,
        "cut": found.num_cut,
        "dropped": found.num_dropped_tokens,
        "padding": pytest.approx(found.padding_share),
    } == expected
    out = printed(capsys)
    assert f"rows {expected['rows']}, {expected['cut']} of the split were too long" in out
    assert f"{expected['tokens']}, {expected['positions']} positions captured, {expected['dropped']} tokens" in out
    assert f"batches {found.num_batches}, {expected['padding']:.1%} padding" in out


def hand_worked(pilots: list[Pilot], capture: str = "topk", attributes: dict[str, Any] | None = None) -> Estimate:
    """The first case above, two tokens kept: batches of 5 positions, and of two rows with 4 and 2."""
    ids = [list(range(length)) for length in LENGTHS]
    features = datasets.Features({"input_ids": datasets.List(datasets.Value("int32"))})
    rows = Rows(
        datasets.Dataset.from_dict({"input_ids": ids}, features=features),
        Config(teacher="t", dataset="d", output="o"),
        max_length=6,
    )
    layout = Layout(
        capture=capture,
        num_rows=5,
        num_tokens=15,
        num_positions=11,
        vocab_size=40,
        top_k=2 if capture == "topk" else 0,
    )
    return estimate(rows, Plan(rows.forward_lengths, batch_tokens=8), layout, attributes or {"settings": "{}"}, pilots)


def test_times_and_buffers_worked_by_hand() -> None:
    found = hand_worked([Pilot(2.0, 100, 0), Pilot(4.0, 300, 7)])
    assert found.num_batches == 2
    assert found.tokens_per_second == pytest.approx(11 / 2 / 3)
    assert found.seconds == {1: 6, 2: 3, 4: 3, 8: 3, 16: 3, 32: 3, 64: 3}
    # A payload has 4 bytes a row, and a position two float32, two ids and two float16: 16 bytes.
    assert found.buffer_bytes == 2 * 2 * max(1 * 4 + 5 * 16, 2 * 4 + 6 * 16)
    assert list(found.other_sizes) == ["top 8", "top 16", "top 32", "all logits"]
    assert found.other_sizes["top 16"] - found.other_sizes["top 8"] == 11 * 8 * 4
    assert found.other_sizes["all logits"] - found.other_sizes["top 8"] == 11 * (40 * 2 - 8 * 4)
    assert found.other_sizes["top 8"] - found.size_bytes == 11 * 6 * 4


def test_more_than_64_ranks_are_not_needed_for_two_batches() -> None:
    found = hand_worked([Pilot(1.5, 1, 0)], capture="full")
    assert max(found.seconds) == 64
    assert found.buffer_bytes == 2 * max(1 * 4 + 5 * 88, 2 * 4 + 6 * 88)


def test_a_pilot_is_a_few_batches_and_the_largest_one_first(
    capture: Capture, teacher: Path, ragged: Path, forward_batches: list[int], estimates: list[Estimate]
) -> None:
    capture(teacher=teacher, dataset=ragged, batch_tokens=60, top_k=4, dry_run=True)
    assert estimates[0].num_batches > 2 * NUM_PILOTS
    assert len(forward_batches) == NUM_PILOTS + 1
    assert forward_batches[:2] == [1, 1]  # the longest row is a batch of its own, once to warm up
    assert forward_batches[-1] > 1
    (pilot,) = estimates[0].pilots
    assert pilot.seconds_per_batch > 0
    assert pilot.host_bytes > 10**7  # Python and torch alone take more
    assert (pilot.device_bytes > 0) == torch.cuda.is_available()


def test_a_slow_pilot_ends_after_the_first_batch(
    capture: Capture,
    teacher: Path,
    ragged: Path,
    forward_batches: list[int],
    estimates: list[Estimate],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(estimate_module, "PILOT_SECONDS", 0.0)
    capture(teacher=teacher, dataset=ragged, batch_tokens=60, top_k=4, dry_run=True)
    assert len(forward_batches) == 1
    assert estimates[0].tokens_per_second > 0


def test_a_single_batch_is_enough(
    capture: Capture, teacher: Path, data: Path, forward_batches: list[int], estimates: list[Estimate]
) -> None:
    capture(teacher=teacher, dataset=data, dry_run=True)
    assert estimates[0].num_batches == 1
    assert forward_batches == [3, 3]
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


def interrupted(capture: Capture, monkeypatch: pytest.MonkeyPatch, **options: Any) -> None:
    """A run that fails after its second batch."""
    compute, numbers = generate.capture_batch, iter(range(99))

    def fail_third(*arguments: Any) -> torch.Tensor:
        if next(numbers) == 2:
            raise CaptureError("The power is gone.")
        return compute(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(generate, "capture_batch", fail_third)
        with pytest.raises(CaptureError, match="The power is gone"):
            capture(**options)


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
    assert estimates[0].size_bytes == len(before["out.h5.partial"][0])
    assert capture(**options).exists()  # and it can still be gone on with


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
    assert "is of another run. There and here differ: --top_k 4 and 5. A run without" in warnings[-1]
    assert contents(folder) == before


def test_an_output_that_cannot_be_written_is_refused_in_a_dry_run_too(
    capture: Capture, teacher: Path, data: Path, folder: Path, forward_batches: list[int]
) -> None:
    with pytest.raises(UsageError, match=r"--output .*: the folder .*nowhere does not exist. Create it."):
        capture(teacher=teacher, dataset=data, output=folder / "nowhere" / "out.h5", dry_run=True)
    with pytest.raises(UsageError, match=r"--output .*: .*outputs is not a plain file. Give the name of one."):
        capture(teacher=teacher, dataset=data, output=folder, dry_run=True)
    (folder / "out.h5").write_text("precious")
    with pytest.raises(UsageError, match=r"out.h5 exists and is no file of logitgen, so it is not touched"):
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
