"""`preview` shows the rows as a run reads them, and needs no weights of the teacher."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import CHAT_TEMPLATE, make_llama, make_tokenizer, save_teacher, write_jsonl

from logitgen import LogitsFile
from logitgen.__main__ import main

Row = dict[str, Any]
ROWS = [
    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo\nman"}], "id": 7},
    {"messages": [{"role": "user", "content": "More " * 40}, {"role": "assistant", "content": "Sure"}], "id": 8},
]


@pytest.fixture(scope="module")
def chatting(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher with a chat template."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    return save_teacher(tmp_path_factory.mktemp("preview") / "teacher", make_llama(), tokenizer)


@pytest.fixture
def words(chatting: Path, tmp_path: Path) -> list[str]:
    """Options of a run whose teacher has lost its weights."""
    bare = shutil.copytree(chatting, tmp_path / "bare", ignore=shutil.ignore_patterns("*.safetensors"))
    return [f"--teacher={bare}", f"--dataset={write_jsonl(tmp_path / 'd.jsonl', ROWS)}", "--completion_only"]


def shown(capsys: pytest.CaptureFixture[str], *words: str) -> Row:
    capsys.readouterr()
    assert main(["preview", "--json", *words]) == 0
    found: Row = json.loads(capsys.readouterr().out)
    return found


def test_the_preview_shows_the_tokens_and_positions_of_the_file(
    chatting: Path, words: list[str], capture: Any, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = LogitsFile(capture(teacher=chatting, dataset=tmp_path / "d.jsonl", completion_only=True, max_length=60))
    known = shown(capsys, *words, "--max_length", "60")
    assert (known["rows"], known["tokens"], known["positions"]) == (
        len(file),
        file.layout.num_tokens,
        file.layout.num_positions,
    )
    for row, drawn in enumerate(known["shown"]):
        expected = file.row(row)
        assert [token["id"] for token in drawn["tokens"]] == expected["input_ids"].tolist()
        captured = [place for place, token in enumerate(drawn["tokens"]) if token["captured"]]
        np.testing.assert_array_equal(captured, expected["positions"] + 1)
        assert drawn["source_row"] == row


def test_the_preview_counts_what_was_cut_lost_and_left_aside(words: list[str], capsys: Any) -> None:
    known = shown(capsys, *words, "--max_length", "20")
    assert known["columns_read"] == ["messages"]
    assert known["columns_not_used"] == ["id"]
    assert (known["rows_of_split"], known["rows_cut"], known["rows_emptied"]) == (2, 1, 1)
    assert known["longest_row"] == 20
    assert known["tokens_dropped"] == shown(capsys, *words)["tokens"] - known["tokens"]


def test_the_preview_is_a_picture_with_the_captured_tokens_in_brackets(words: list[str], capsys: Any) -> None:
    assert main(["preview", *words, "--row", "0"]) == 0
    lines = capsys.readouterr().out.splitlines()
    (start,) = [number for number, line in enumerate(lines) if line.startswith("row 0 (row 0 of the split), ")]
    text = "\n".join(lines[start + 1 :]).replace("│", "")
    assert text == "<|user|>Hi<|end|><|assistant|>⟦Yo↵\nman<|end|>⟧"


def test_a_row_of_the_split_is_shown_with_all_its_rows(words: list[str], capsys: Any) -> None:
    known = shown(capsys, *words, "--max_length", "30", "--overflow", "split", "--row", "1")
    assert len(known["shown"]) > 1
    assert {row["source_row"] for row in known["shown"]} == {1}


def test_the_preview_warns_as_a_run_does(chatting: Path, tmp_path: Path, capsys: Any) -> None:
    rows = [{"messages": [{"role": "user", "content": "Hi", "reasoning_content": "hm"}]}]
    words = [f"--teacher={chatting}", f"--dataset={write_jsonl(tmp_path / 'd.jsonl', rows)}"]
    assert shown(capsys, *words)["warnings"] == [
        "1 row (row 0): the chat template leaves out the reasoning of a message."
    ]
    assert main(["preview", *words]) == 0
    assert "leaves out the reasoning" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--row", "2"], "--row must be between 0 and 1, got 2."),
        (["--row", "-1"], "--row must be between 0 and 1, got -1."),
        (["--texts"], "There is no option --texts."),
        (["--max_length", "1"], "--max_length must be at least 2, got 1."),
    ],
)
def test_a_preview_of_bad_input_ends_in_one_line(words: list[str], more: list[str], message: str, capsys: Any) -> None:
    assert main(["preview", *words, *more]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert message in line


def test_an_option_that_another_command_lacks_is_refused(tmp_path: Path, capsys: Any) -> None:
    assert main(["inspect", str(tmp_path / "out.h5"), "--teacher=m"]) == 2
    assert "error: Unrecognized arguments: --teacher=m. See --help." in capsys.readouterr().err
