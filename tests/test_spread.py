"""The spread of a file's distributions, against the teacher's own and cases worked by hand; and how it is drawn."""

import io
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import write_jsonl
from files import ARRAYS, FULL, write_file
from rich.console import Console
from transformers import AutoModelForCausalLM

from logitgen import LogitsFile, spread
from logitgen.__main__ import main
from logitgen.histogram import spread_view

Capture = Callable[..., Path]
ROWS = [[(7 * row + 3 * index * index) % 384 for index in range(20 + row)] for row in range(20)]


@pytest.fixture(scope="module")
def direct_pv(teacher: Path) -> torch.Tensor:
    """The teacher's distributions at all positions of `ROWS`, by a plain forward pass per row."""
    model = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32)
    with torch.no_grad():
        parts = [model(torch.tensor([ids])).logits[0, :-1].double().log_softmax(-1) for ids in ROWS]
    return torch.cat(parts)


def spread_of(run: Capture, teacher: Path, folder: Path, **options: Any) -> dict[str, Any]:
    data = write_jsonl(folder / "rows.jsonl", [{"input_ids": ids} for ids in ROWS])
    return spread.spread(LogitsFile(run(teacher=teacher, dataset=data, **options)))


@pytest.mark.parametrize(("encoding", "near"), [("plain", 1e-3), ("packed16", 1e-3), ("packed", 0.02)])
def test_the_spread_of_a_top_k_is_that_of_the_teacher(
    capture: Capture, teacher: Path, tmp_path: Path, direct_pv: torch.Tensor, encoding: str, near: float
) -> None:
    found = spread_of(capture, teacher, tmp_path, top_k=20, encoding=encoding)
    probs_PV = direct_pv.exp().sort(-1, descending=True).values.numpy()
    mass_P = probs_PV[:, :20].sum(1)
    assert found["positions"] == len(mass_P)
    assert found["mass"]["mean"] == pytest.approx(mass_P.mean(), abs=near)
    assert found["mass"]["tenth"] == pytest.approx(np.quantile(mass_P, 0.1), abs=near)
    grouped_PE = np.column_stack([probs_PV[:, :20], 1 - mass_P])  # the tail as one token
    grouped = -(grouped_PE * np.log(grouped_PE)).sum(1).mean()
    whole = float(-(direct_pv.exp() * direct_pv).sum(-1).mean())
    assert found["entropy"]["mean"] == pytest.approx(grouped, abs=near)
    assert found["entropy"]["lower_bound"]
    assert found["entropy"]["mean"] < whole - 0.1


def test_the_spread_of_all_logits_is_exact(
    capture: Capture, teacher: Path, tmp_path: Path, direct_pv: torch.Tensor
) -> None:
    found = spread_of(capture, teacher, tmp_path, capture="full")
    entropy = float(-(direct_pv.exp() * direct_pv).sum(-1).mean())
    assert found["entropy"]["mean"] == pytest.approx(entropy, abs=1e-3)
    assert not found["entropy"]["lower_bound"]
    assert "mass" not in found


@pytest.mark.parametrize("kind", ["topk", "sample", "hidden", "full"])
def test_every_kind_tells_the_perplexity_of_the_actual_tokens(
    capture: Capture, teacher: Path, tmp_path: Path, direct_pv: torch.Tensor, kind: str
) -> None:
    found = spread_of(capture, teacher, tmp_path, capture=kind)
    targets = torch.tensor([token for ids in ROWS for token in ids[1:]])
    surprise = -direct_pv[torch.arange(len(targets)), targets].mean()
    assert found["perplexity"]["mean"] == pytest.approx(math.exp(surprise), rel=1e-4)
    own = {"topk": {"mass", "entropy"}, "full": {"entropy"}}.get(kind, set())
    assert found.keys() == {"positions", "stretches", "perplexity"} | own


def counts(measure: dict[str, Any]) -> list[int]:
    return [each["positions"] for each in measure["bins"]]


def test_bins_worked_by_hand(tmp_path: Path) -> None:
    found = spread.spread(LogitsFile(write_file(tmp_path / "out.h5")))
    # Kept are e^-1 + e^-1.25 = 0.654, e^-0.25 + e^-2 = 0.914, e^-0.5 + e^-3 = 0.656 and e^-0.5 + e^-1.25 = 0.893.
    assert counts(found["mass"]) == [0, 2, 1, 1, 0, 0, 0]
    # The tokens' probabilities are e^-1, e^-2 and twice e^-0.5.
    assert counts(found["perplexity"]) == [3, 1, 0, 0, 0, 0, 0]
    # With tails of 0.346, 0.086, 0.344 and 0.107: 1.09, 0.68, 0.82 and 0.90 nats.
    assert counts(found["entropy"]) == [0, 3, 1, 0, 0, 0, 0]
    assert found["entropy"]["mean"] == pytest.approx((1.0935 + 0.6761 + 0.8197 + 0.9003) / 4, abs=2e-3)


def test_a_value_on_a_bound_belongs_to_the_bin_above_and_all_of_it_to_the_last() -> None:
    bins = spread._bins(np.array([-1e-9, 0, 0.5, 0.8, 0.999, 1.0]), spread._MASS)
    assert [each["positions"] for each in bins] == [2, 1, 1, 0, 0, 0, 2]


def test_a_distribution_without_a_tail_has_an_entropy(tmp_path: Path) -> None:
    certain = ARRAYS | {"kept_logprobs": np.tile(np.array([0, -65504], "<f2"), (4, 1))}
    found = spread.spread(LogitsFile(write_file(tmp_path / "out.h5", certain)))
    assert (found["entropy"]["mean"], found["mass"]["mean"]) == (0, 1)


def long_file(folder: Path, target_logprob: np.ndarray) -> LogitsFile:
    """A single long row."""
    size = len(target_logprob)
    arrays = {
        "done": np.ones(1, "u1"),
        "crc32": np.zeros(1, "<u4"),
        "source_row": np.zeros(1, "<i8"),
        "offsets": np.array([0, size + 1], "<i8"),
        "position_offsets": np.array([0, size], "<i8"),
        "input_ids": np.zeros(size + 1, "<u2"),
        "positions": np.arange(size, dtype="<i4"),
        "logsumexp": np.zeros(size, "<f4"),
        "target_logprob": target_logprob.astype("<f4"),
        "kept_ids": np.tile(np.array([0, 1], "<u2"), (size, 1)),
        "kept_logprobs": np.tile(np.array([-1, -1], "<f2"), (size, 1)),
    }
    return LogitsFile(write_file(folder / "long.h5", arrays))


def shown(known: dict[str, Any], num_positions: int, width: int, encoding: str = "utf-8") -> list[str]:
    screen = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    Console(file=screen, width=width).print(spread_view(known, num_positions))
    screen.seek(0)
    return [line.rstrip() for line in screen.read().splitlines()]


def test_a_large_file_is_sampled_fairly_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spread, "_MOST_POSITIONS", 640)
    file = long_file(tmp_path, np.repeat([-0.1, -2.0, -5.0, -7.0], 2500))
    found = spread.spread(file)
    assert found["positions"] == 640
    shares = np.array(counts(found["perplexity"])) / 640  # e^0.1, e^2, e^5 and e^7, each a quarter
    assert shares == pytest.approx([0.25, 0.25, 0, 0.25, 0, 0.25, 0], abs=2 / 64)
    lines = shown(found, 10_000, 120)
    assert lines[0] == "measured    640 positions of 10,000, a sample in 64 stretches at equal distances"


def test_wide_positions_are_sampled_more_thinly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spread, "_MOST_BYTES", 16 * 128)  # a position has two float32, two uint16, two float16
    assert spread.spread(long_file(tmp_path, np.full(10_000, -1)))["positions"] == 128


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 0.5])
@pytest.mark.parametrize("name", ["target_logprob", "kept_logprobs"])
def test_damaged_values_are_refused_in_one_line(
    tmp_path: Path, name: str, value: float, capsys: pytest.CaptureFixture[str]
) -> None:
    values = ARRAYS[name].copy()
    values[1] = value
    path = write_file(tmp_path / "out.h5", ARRAYS | {name: values})
    assert main(["inspect", str(path)]) == 2
    message = " ".join(capsys.readouterr().err.split())
    assert message == f"error: {path} is damaged: it holds a log-prob that is not a number up to 0. Copy it again."


def test_a_narrow_terminal_stacks_the_histograms_and_a_wide_one_puts_them_side_by_side(tmp_path: Path) -> None:
    found = spread.spread(LogitsFile(write_file(tmp_path / "out.h5")))
    narrow, wide = shown(found, 4, 60), shown(found, 4, 120)
    assert max(map(len, narrow)) <= 60
    titles = ["mass kept", "entropy, nats", "perplexity"]
    assert [line for line in narrow if line in titles] == titles
    assert any(line.split("   ")[0] == titles[0] and all(title in line for title in titles) for line in wide)
    assert len(wide) < len(narrow) - 12


def test_the_longest_bar_is_the_largest_bin_and_others_are_in_proportion(tmp_path: Path) -> None:
    lines = shown(spread.spread(LogitsFile(write_file(tmp_path / "out.h5"))), 4, 60)
    assert "   50-80%  ██████████████  50.0%" in lines
    assert "   80-90%  ███████         25.0%" in lines
    assert "99.9-100%                   0.0%" in lines


def test_a_pipe_without_block_characters_gets_others(tmp_path: Path) -> None:
    lines = shown(spread.spread(LogitsFile(write_file(tmp_path / "out.h5"))), 4, 60, "ascii")
    assert "   50-80%  ##############  50.0%" in lines
    assert "   80-90%  #######         25.0%" in lines


def test_json_has_the_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_file(tmp_path / "out.h5")
    assert main(["inspect", str(path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)["spread"]
    assert found["perplexity"]["mean"] == pytest.approx(math.e)
    assert found["perplexity"]["bins"][0] == {"from": 1, "to": 4, "positions": 3}
    assert found["perplexity"]["bins"][-1] == {"from": 4096, "to": None, "positions": 0}


@pytest.mark.parametrize("arrays", [ARRAYS, FULL], ids=["topk", "full"])
def test_a_picture_is_drawn(tmp_path: Path, arrays: dict[str, np.ndarray], capsys: pytest.CaptureFixture[str]) -> None:
    kind = {"capture": "full", "top_k": 0} if arrays is FULL else {}
    path = write_file(tmp_path / "out.h5", arrays, **kind)
    picture = tmp_path / "spread.png"
    assert main(["inspect", str(path), "--plot", str(picture)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "perplexity" in capsys.readouterr().out


def test_a_picture_that_cannot_be_drawn_is_refused_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = str(write_file(tmp_path / "out.h5"))

    def refused(*words: str) -> str:
        assert main(["inspect", path, *words]) == 2
        ended = capsys.readouterr()
        assert ended.out == ""
        assert ended.err.count("\n") == 1
        return ended.err

    assert "error: --plot draws the whole file, --row shows one row." in refused("--row=0", "--plot=a.png")
    assert "a.xyz cannot be written: Format 'xyz' is not supported" in refused(f"--plot={tmp_path / 'a.xyz'}")
    assert "nowhere/a.png cannot be written: " in refused(f"--plot={tmp_path / 'nowhere' / 'a.png'}")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    message = "error: --plot needs matplotlib. Install it with `pip install matplotlib`.\n"
    assert refused("--plot=a.png") == message
