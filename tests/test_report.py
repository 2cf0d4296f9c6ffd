"""What `python -m logitgen inspect` and the end of a run say about a file."""

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT, write_jsonl
from files import ARRAYS, ATTRIBUTES, FULL, write_file
from launches import drawn
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from logitgen import FormatError, LogitsFile, UsageError, console
from logitgen.__main__ import main
from logitgen.costs import estimate_view, summary
from logitgen.estimate import Estimate, Pilot
from logitgen.facts import facts, row_facts
from logitgen.leader.progress import Speed
from logitgen.report import overview, row_view, verdict_view
from logitgen.rerun import Rerun

Capture = Callable[..., Path]
SETTINGS = {
    "teacher": "no/such-teacher",
    "revision": None,
    "teacher_gguf": None,
    "attn_implementation": None,
    "dataset": "some/text",
    "dataset_config": "en",
    "split": "train[:5]",
    "packing": False,
    "completion_only": True,
    "limit": None,
    "top_k": 2,
    "seed": 0,
}
KNOWN = {
    "rows": 3,
    "tokens": 9,
    "positions": 4,
    "shortest_row": 1,
    "longest_row": 5,
    "kept": "top 2",
    "bytes_per_position": 16,  # two float32, two uint16, two float16
    "perplexity": pytest.approx(math.e),
}


class Letters:
    """A tokenizer whose token 1 is the letter b."""

    def decode(self, token_ids: list[int]) -> str:
        assert all(type(token) is int for token in token_ids)
        return "".join("abcdefghij"[token] for token in token_ids)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write_file(tmp_path / "out.h5", settings=SETTINGS)


@pytest.fixture(autouse=True)
def plain_output(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have no setting of this machine's colour or width the output."""
    for name in ("COLUMNS", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(console, "messages", Console(stderr=True))


@pytest.fixture
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have room for every line."""
    monkeypatch.setenv("COLUMNS", "1000")


def definitions(lines: list[str]) -> dict[str, str]:
    """The lines of an overview: a name, two spaces or more, a text."""
    return {name: text.strip() for name, _, text in (line.partition("  ") for line in lines)}


def words(text: str) -> str:
    return " ".join(text.split())


def test_facts_are_what_is_in_the_file(path: Path) -> None:
    size_bytes = path.stat().st_size
    expected = {"path": str(path), "size_bytes": size_bytes, "bytes_per_token": pytest.approx(size_bytes / 9)}
    assert facts(LogitsFile(path)) == expected | KNOWN | ATTRIBUTES | {"settings": SETTINGS}


def test_a_row_is_shown_position_by_position(path: Path) -> None:
    assert row_facts(LogitsFile(path), 2, Letters()) == {
        "row": 2,
        "source_row": 5,
        "tokens": 5,
        "text": "fghij",
        "positions": [
            {
                "position": 1,
                "token": "g",
                "next": "h",
                "probability": pytest.approx(math.exp(-0.5)),
                "guesses": [
                    {"token": "h", "probability": pytest.approx(math.exp(-0.5))},
                    {"token": "a", "probability": pytest.approx(math.exp(-3))},
                ],
            },
            {
                "position": 3,
                "token": "i",
                "next": "j",
                "probability": pytest.approx(math.exp(-0.5)),
                "guesses": [
                    {"token": "j", "probability": pytest.approx(math.exp(-0.5))},
                    {"token": "b", "probability": pytest.approx(math.exp(-1.25))},
                ],
            },
        ],
    }


def test_a_row_counted_from_the_end_is_the_same_row(path: Path) -> None:
    file = LogitsFile(path)
    assert row_facts(file, -3, Letters()) == row_facts(file, 0, Letters())
    assert row_facts(file, -1, Letters())["row"] == 2


def test_a_row_without_positions_has_only_its_text(path: Path) -> None:
    expected = {"row": 1, "source_row": 1, "tokens": 1, "text": "e", "positions": []}
    assert row_facts(LogitsFile(path), 1, Letters()) == expected


def test_without_a_tokenizer_tokens_are_numbers(path: Path) -> None:
    found = row_facts(LogitsFile(path), 2, None)
    assert found["text"] is None
    assert [(position["token"], position["next"]) for position in found["positions"]] == [("6", "7"), ("8", "9")]
    assert [guess["token"] for guess in found["positions"][0]["guesses"]] == ["7", "0"]


@pytest.mark.parametrize(
    "options",
    [{"capture": "topk", "top_k": 7}, {"capture": "topk", "top_k": 2}, {"capture": "hidden"}, {"capture": "full"}],
)
def test_guesses_are_those_of_a_direct_forward_pass(
    capture: Capture, teacher: Path, ragged: Path, options: dict[str, Any]
) -> None:
    file = LogitsFile(capture(teacher=teacher, dataset=ragged, limit=9, **options))
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    found = row_facts(file, 8, tokenizer)
    text = json.loads(ragged.read_text().splitlines()[8])["text"]
    ids = tokenizer(text)["input_ids"]
    with torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32)
        probabilities_TV = model(torch.tensor([ids])).logits[0].softmax(-1)
    assert (found["text"], found["tokens"], found["source_row"]) == (text, len(ids), 8)
    assert [position["position"] for position in found["positions"]] == list(range(len(ids) - 1))
    for index, position in enumerate(found["positions"]):
        assert position["token"] == tokenizer.decode([ids[index]])
        assert position["next"] == tokenizer.decode([ids[index + 1]])
        assert position["probability"] == pytest.approx(probabilities_TV[index, ids[index + 1]].item(), rel=1e-3)
        best, best_ids = probabilities_TV[index].topk(min(5, options.get("top_k", 5)))
        probabilities = [guess["probability"] for guess in position["guesses"]]
        assert probabilities == pytest.approx(best.tolist(), rel=0.02)  # a logit near 20 has float16 steps of 1/64
        if options["capture"] == "topk":
            expected = [tokenizer.decode([token]) for token in best_ids.tolist()]
            assert [guess["token"] for guess in position["guesses"]] == expected


@pytest.mark.parametrize("row", [3, -4])
def test_a_row_that_does_not_exist_is_refused(path: Path, row: int) -> None:
    with pytest.raises(UsageError, match=rf"--row must be between 0 and 2, got {row}\."):
        row_facts(LogitsFile(path), row, None)


def test_the_overview_says_what_the_file_is(path: Path) -> None:
    lines = definitions(drawn(overview(facts(LogitsFile(path)))))
    assert lines["file"].startswith(str(path))
    assert lines["file"].endswith(f"{path.stat().st_size / 1000:.1f} kB, format version 1")
    assert lines["teacher"].split() == ["some/teacher", "bfloat16,", "c0ffee"]
    assert lines["dataset"] == "some/text en train[:5]"
    assert words(lines["rows"]) == "3, all complete 1 to 5 tokens each"
    assert words(lines["tokens"]) == "9 4 positions captured"
    assert words(lines["kept"]) == "top 2 of 10 16 bytes per position"
    assert lines["bytes per token"].startswith(f"{path.stat().st_size / 9:,.1f}")
    assert lines["perplexity"].startswith("2.718")
    assert lines["fingerprints"] == "teacher aaaaaaaaaaaa, tokenizer bbbbbbbbbbbb, dataset cccccccccccc"
    assert lines["packages"] == "torch 2.13.0"


def test_the_overview_names_every_setting_that_is_on(path: Path) -> None:
    settings = definitions(drawn(overview(facts(LogitsFile(path)))))["settings"].split(", ")
    on = {name: value for name, value in SETTINGS.items() if value is not None and value is not False}
    assert settings == [f"{name} {value}" for name, value in on.items()]


def test_the_overview_of_a_full_capture_says_so(tmp_path: Path) -> None:
    path = write_file(tmp_path / "out.h5", FULL, capture="full", top_k=0, commit="")
    lines = definitions(drawn(overview(facts(LogitsFile(path)))))
    assert words(lines["kept"]) == "all logits of 10 28 bytes per position"
    assert lines["teacher"].split() == ["some/teacher", "bfloat16"]


def test_the_view_of_a_row_shows_what_came_and_what_was_expected(path: Path) -> None:
    lines = drawn(row_view(row_facts(LogitsFile(path), 2, Letters())))
    assert lines[:2] == ["row 2 (row 5 of the split), 5 tokens", "fghij"]
    assert lines[2].split() == ["pos", "token", "next", "p", "the", "teacher", "expected"]
    assert [line.split() for line in lines[3:]] == [
        ["1", "'g'", "'h'", "0.61", "'h'", "0.61", "'a'", "0.05"],
        ["3", "'i'", "'j'", "0.61", "'j'", "0.61", "'b'", "0.29"],
    ]


def test_the_view_of_a_row_can_be_cut_short(path: Path) -> None:
    known = row_facts(LogitsFile(path), 2, Letters())
    lines = drawn(row_view(known, 1))
    assert [line.split()[0] for line in lines] == ["row", "pos", "1", "and"]
    assert lines[-1].startswith("and 1 more position")
    assert not any("more position" in line for line in drawn(row_view(known, 2)))


def test_the_end_of_a_run_is_summed_up(path: Path) -> None:
    shown = summary(LogitsFile(path), 0, Speed(1000, 65.2, padding_share=0.25, saved_share=0, waited_share=0.0731))
    assert definitions(drawn(shown)) == {
        "rows": "3 expected, 3 present, 0 missing, 0 duplicates",
        "tokens": "9, 4 positions captured",
        "speed": "15 tokens/s over 1:05, 25.0% padding, 7.3% waiting",
        "size": f"{path.stat().st_size / 1000:.1f} kB, {path.stat().st_size / 9:,.1f} bytes per token",
        "teacher perplexity": "2.718",
        "file": str(path),
    }


def make_estimate(**changes: Any) -> Estimate:
    known = {
        "num_rows": 1_000,
        "num_tokens": 50_000,
        "num_positions": 49_000,
        "num_cut": 12,
        "num_dropped_tokens": 3_400,
        "num_batches": 77,
        "padding_share": 0.125,
        "saved_share": 0.0,
        "tokens_per_second": 2_500.0,
        "seconds": {1: 7_260.0, 2: 3_630.0},
        "pilots": [Pilot(0.5, 900_000_000, 0), Pilot(0.75, 1_100_000_000, 0)],
        "size_bytes": 13_000_000,
        "other_sizes": {"top 8": 2_000_000, "all logits": 32_000_000_000},
        "buffer_bytes": 5_600_000,
        "kept": "top 8",
        "masses": {},
        "num_measured": 0,
    }
    return Estimate(**known | changes)


def test_an_estimate_says_what_a_run_would_take() -> None:
    lines = drawn(estimate_view(make_estimate(), 450_000_000_000))
    blank = lines.index("")
    assert definitions(lines[:blank]) == {
        "rows": "1,000, 12 of the split were too long",
        "tokens": "50,000, 49,000 positions captured, 3,400 tokens dropped",
        "batches": "77, 12.5% padding",
        "file": "13,000,000 bytes, 260.0 per token; 450.0 GB free",
        "memory per rank": "1.1 GB, and 5.6 MB of buffers on the leader",
        "speed": "2,500 tokens/s per rank, 2 measured at once",
    }
    assert [words(line).split(" ") for line in lines[blank + 1 :]] == [
        ["kept", "file", "per", "token", "ranks", "time"],
        ["top", "8", "2.0", "MB", "40.0", "B", "1", "2:01:00"],
        ["all", "logits", "32.0", "GB", "640,000.0", "B", "2", "1:00:30"],
    ]


def test_an_estimate_says_what_mass_is_kept_and_never_too_much() -> None:
    masses = {"top 8": (0.75, 0.5), "top 9": (0.99996, 0.29), "all logits": (1.0, 1.0)}
    sizes = {"top 8": 2_000_000, "12 drawn": 2_000_000, "top 9": 3_000_000, "all logits": 32_000_000_000}
    known = make_estimate(other_sizes=sizes, masses=masses, num_measured=4_096)
    lines = drawn(estimate_view(known, 1))
    blank = lines.index("")
    assert definitions(lines[:blank])["mass kept"] == (
        "top 8 keep 75.00%, and at least 50.00% at 9 of 10 positions; measured at 4,096 positions of the pilot"
    )
    assert [words(line).split(" ")[-6:] for line in lines[blank + 1 :]] == [
        ["mass", "9", "of", "10", "ranks", "time"],
        ["40.0", "B", "75.00%", "50.00%", "1", "2:01:00"],
        ["2.0", "MB", "40.0", "B", "2", "1:00:30"],
        ["3.0", "MB", "60.0", "B", "99.99%", "29.00%"],
        ["32.0", "GB", "640,000.0", "B", "100.00%", "100.00%"],
    ]
    drawn_ones = make_estimate(kept="12 drawn", other_sizes=sizes, masses=masses, num_measured=4_096)
    assert definitions(drawn(estimate_view(drawn_ones, 1)))["mass kept"] == "measured at 4,096 positions of the pilot"


def test_an_estimate_of_gpus_names_the_memory_of_the_largest() -> None:
    pilots = [Pilot(0.5, 900_000_000, 7_000_000_000), Pilot(0.75, 800_000_000, 9_000_000_000)]
    lines = drawn(estimate_view(make_estimate(pilots=pilots), 1))
    assert definitions(lines)["memory per rank"].startswith("900.0 MB and 9.0 GB on the GPU, and 5.6 MB of buffers")


def test_an_estimate_does_not_make_up_memory_that_the_system_does_not_tell() -> None:
    lines = drawn(estimate_view(make_estimate(pilots=[Pilot(0.5, 0, 0)]), 1))
    assert definitions(lines)["memory per rank"] == "unknown on this system, and 5.6 MB of buffers on the leader"


def test_a_verdict_is_one_line_if_nothing_is_wrong(path: Path) -> None:
    assert definitions(drawn(verdict_view(LogitsFile(path), [], False, None))) == {
        "file": str(path),
        "rows": "3 expected, 3 present",
        "verdict": "verified: every row is present once, with the right checksum and values",
    }


def test_a_verdict_names_every_problem_and_no_markup_is_read_into_them(tmp_path: Path) -> None:
    path = write_file(tmp_path / "[red]out.h5", ARRAYS | {"done": np.array([1, 0, 1], "u1")}, settings=SETTINGS)
    found = ["row 1 is missing", "row [bold]2[/bold] is odd"]
    lines = drawn(verdict_view(LogitsFile(path, partial=True), found, False, None))
    assert lines[-2:] == ["  row 1 is missing", "  row [bold]2[/bold] is odd"]
    known = definitions(lines[:-2])
    assert known["file"] == str(path)
    assert known["rows"] == "3 expected, 2 present"
    assert known["verdict"] == "NOT verified, 2 problems"


@pytest.mark.parametrize(
    ("found", "more", "verdict"),
    [
        (["one"], False, "NOT verified, 1 problem"),
        (["one"], True, "NOT verified, at least 1 problem"),
        (["one", "two", "three"], True, "NOT verified, at least 3 problems"),
    ],
)
def test_a_verdict_counts_the_problems(path: Path, found: list[str], more: bool, verdict: str) -> None:
    assert definitions(drawn(verdict_view(LogitsFile(path), found, more, None)))["verdict"] == verdict


def test_a_verdict_says_how_far_the_teacher_is(path: Path) -> None:
    compared = Rerun(
        num_positions=4_321, largest=0.0213, mean=0.00123, top1_agreement=0.9951, max_mean=0.005, min_agreement=0.99
    )
    assert definitions(drawn(verdict_view(LogitsFile(path), [], False, compared)))["teacher"] == (
        "over 4,321 positions largest difference 0.0213 nats beyond rounding, mean 0.00123 (at most 0.005), "
        "top-1 agreement 99.51% (at least 99%)"
    )


def test_a_damaged_row_is_not_shown(tmp_path: Path) -> None:
    wrong = ARRAYS["input_ids"].copy()
    wrong[7] = 0
    path = write_file(tmp_path / "out.h5", ARRAYS | {"input_ids": wrong})
    file = LogitsFile(path)
    for row in (2, -1):
        message = r"out\.h5 is damaged: row 2 has checksum [0-9a-f]{8}, expected [0-9a-f]{8}\. Copy it again\.$"
        with pytest.raises(FormatError, match=message):
            row_facts(file, row, Letters())
    assert row_facts(file, 0, Letters())["tokens"] == 3


@pytest.mark.usefixtures("wide")
def test_inspect_prints_the_overview_as_plain_text(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(path)]) == 0
    captured = capsys.readouterr()
    lines, about = [line.rstrip() for line in captured.out.splitlines()], drawn(overview(facts(LogitsFile(path))))
    assert lines[: len(about) + 1] == [*about, ""]
    assert lines[len(about) + 1] == "measured    4 positions, all"
    assert "\x1b" not in captured.out
    assert captured.err == ""


@pytest.mark.parametrize("arguments", [[], ["--row", "2"], ["--row=-1", "--positions=1"]])
def test_nothing_is_wider_than_80_columns(path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    assert main(["inspect", str(path), *arguments]) == 0
    printed = capsys.readouterr().out
    assert printed
    assert all(len(line) <= 80 for line in printed.splitlines())
    assert "\x1b" not in printed


def test_json_holds_everything(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(path), "--json"]) == 0
    size_bytes = path.stat().st_size
    expected = {"path": str(path), "size_bytes": size_bytes, "bytes_per_token": pytest.approx(size_bytes / 9)}
    found = json.loads(capsys.readouterr().out)
    assert found.pop("spread")["positions"] == 4
    assert found == expected | KNOWN | ATTRIBUTES | {"settings": SETTINGS}


def test_json_of_a_row_holds_every_position(path: Path, teacher: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(path), "--row", "2", "--json", "--tokenizer", str(teacher)]) == 0
    found = json.loads(capsys.readouterr().out)
    decode = AutoTokenizer.from_pretrained(teacher).decode
    assert found["text"] == decode([5, 6, 7, 8, 9])
    assert [(position["token"], position["next"]) for position in found["positions"]] == [
        (decode([6]), decode([7])),
        (decode([8]), decode([9])),
    ]
    assert [[guess["token"] for guess in position["guesses"]] for position in found["positions"]] == [
        [decode([7]), decode([0])],
        [decode([9]), decode([1])],
    ]


@pytest.mark.usefixtures("wide")
def test_a_row_is_shown_in_the_teachers_own_words(
    capture: Capture, teacher: Path, ragged: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = capture(teacher=teacher, dataset=ragged)
    text = json.loads(ragged.read_text().splitlines()[20])["text"]
    capsys.readouterr()
    assert main(["inspect", str(path), "--row", "20"]) == 0
    lines = capsys.readouterr().out.splitlines()
    tokens = AutoTokenizer.from_pretrained(teacher)(text)["input_ids"]
    assert lines[0] == f"row 20 (row 20 of the split), {len(tokens)} tokens"
    assert lines[1].rstrip() == text.rstrip()
    assert len(lines) == 3 + len(tokens) - 1


@pytest.mark.usefixtures("wide")
def test_positions_limits_what_is_shown_of_a_row(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(path), "--row", "2", "--positions", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["row", "pos", "1", "and"]


def test_fewer_positions_than_none_are_refused(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(path), "--row", "2", "--positions", "-1"]) == 2
    assert capsys.readouterr().err.startswith("error: --positions must be at least ")


@pytest.mark.usefixtures("wide")
def test_a_teacher_that_is_elsewhere_leaves_the_ids(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(path), "--row", "2"]) == 0
    title, _, *lines = capsys.readouterr().out.splitlines()
    assert title == "row 2 (row 5 of the split), 5 tokens"
    assert [line.split() for line in lines] == [
        ["1", "'6'", "'7'", "0.61", "'7'", "0.61", "'0'", "0.05"],
        ["3", "'8'", "'9'", "0.61", "'9'", "0.61", "'1'", "0.29"],
    ]


@pytest.mark.usefixtures("wide")
def test_a_full_capture_is_shown_like_any_other(
    capture: Capture, teacher: Path, ragged: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = capture(teacher=teacher, dataset=ragged, capture="full", limit=9)
    capsys.readouterr()
    assert main(["inspect", str(path)]) == 0
    assert definitions(capsys.readouterr().out.splitlines())["kept"].startswith("all logits of 384")
    assert main(["inspect", str(path), "--row", "8"]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert len(shown) == 3 + len(LogitsFile(path).row(8)["positions"])


@pytest.mark.usefixtures("wide")
def test_what_looks_like_markup_is_shown_as_it_is(
    capture: Capture, teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = "[bold]x[/bold] [/] [red]:smile:"
    data = write_jsonl(tmp_path / "d.jsonl", [{"text": text}])
    path = capture(teacher=teacher, dataset=data, output=tmp_path / "[bold]out[blue].h5")
    assert "[bold]out[blue].h5" in capsys.readouterr().out
    assert main(["inspect", str(path)]) == 0
    assert definitions(capsys.readouterr().out.splitlines())["file"].startswith(str(path))
    assert main(["inspect", str(path), "--row", "0"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].rstrip() == text
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    tokens = [repr(tokenizer.decode([token])) for token in tokenizer(text)["input_ids"]]
    for line, token, came in zip(lines[3:], tokens[:-1], tokens[1:], strict=True):
        assert line.split(maxsplit=1)[1].startswith(token)
        assert f" {came} " in line
    assert main(["inspect", str(tmp_path / "[bold]missing[/].h5")]) == 2
    assert "[bold]missing[/].h5 is not a file." in capsys.readouterr().err


@pytest.mark.usefixtures("wide")
def test_escape_codes_in_the_data_do_not_reach_the_terminal(
    capture: Capture, teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_jsonl(tmp_path / "d.jsonl", [{"text": "red \x1b[31m and a bell \x07"}])
    path = capture(teacher=teacher, dataset=data)
    capsys.readouterr()
    assert main(["inspect", str(path), "--row", "0"]) == 0
    printed = capsys.readouterr().out
    assert "red" in printed
    assert "\x1b" not in printed
    assert "\x07" not in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--row", "3"], "--row must be between 0 and 2, got 3."),
        (["--row=-4"], "--row must be between 0 and 2, got -4."),
        (["--row", "first"], "Argument --row: invalid int value: 'first'. See --help."),
        (["--nonsense"], "Unrecognized arguments: --nonsense. See --help."),
        (
            ["--row", "0", "--tokenizer", "no-such-folder"],
            "--tokenizer no-such-folder cannot be loaded. Give the teacher's folder or hub id.",
        ),
    ],
)
def test_a_wrong_option_is_one_line_and_status_2(
    path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main(["inspect", str(path), *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.err == f"error: {message}\n"
    assert captured.out == ""


def test_a_missing_command_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert capsys.readouterr().err == "error: The following arguments are required: COMMAND. See --help.\n"


def test_an_incomplete_file_is_one_line_and_status_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_file(tmp_path / "out.h5", ARRAYS | {"done": np.zeros(3, "u1")})
    assert main(["inspect", str(path)]) == 2
    message = f"error: {path} is not complete: 3 of 3 rows are missing. Finish the run.\n"
    assert capsys.readouterr().err == message


def test_help_lists_the_options(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["inspect", "--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert all(option in shown for option in ("--row", "--positions", "--tokenizer", "--json"))


def test_the_command_ends_with_its_status(path: Path) -> None:
    def inspect(*arguments: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "logitgen", "inspect", *map(str, arguments)]
        return subprocess.run(command, cwd=ROOT, env=dict(os.environ), capture_output=True, text=True, check=False)

    good, bad = inspect(path, "--json"), inspect(path.parent / "missing.h5")
    assert (good.returncode, good.stderr) == (0, "")
    assert json.loads(good.stdout)["rows"] == 3
    assert (bad.returncode, bad.stdout) == (2, "")
    assert bad.stderr == f"error: {path.parent / 'missing.h5'} is not a file.\n"
