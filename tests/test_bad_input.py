"""Bad input of every kind: one clear line, exit status 2, nothing expensive done before, nothing lost or left behind.

The tables hold one bad input a line: what it is called, the words added to a good command, what is put into the working
folder first, and what the message must say. In the working folder are `teacher`, `rows.jsonl` and `good.h5`.
"""

import contextlib
import fcntl
import io
import json
import os
import re
import resource
import shutil
import signal
import stat
import sys
from collections import namedtuple
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import datasets
import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import SENTENCES, enlarge_weights, make_llama, save_teacher, write_jsonl
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertLMHeadModel, CLIPConfig, T5Config

from logitgen import FormatError, LogitsDataset, LogitsFile, generate
from logitgen.__main__ import main
from logitgen.console import print_error
from logitgen.errors import LogitgenError
from logitgen.file import header
from logitgen.ranks.agree import Ranks
from logitgen.split.plan import Plan

DEADLINE_SECONDS = 20
MOST_CHARACTERS = 700
"""Of a message, long values that were given not counted."""
STEPS = ["describe_teacher", "load_tokenizer", "load_split", "tokenize", "load_model", "capture_batch"]
"""What a run does one after the other, cheap things first."""

Prepare = Callable[[], object]


@dataclass(frozen=True)
class Bad:
    """A bad input: words of a command, what to put into the working folder before, what the message must match."""

    name: str
    words: str | list[str]
    message: str
    prepare: Prepare = lambda: None

    @property
    def arguments(self) -> list[str]:
        return self.words.split() if isinstance(self.words, str) else self.words


def table(*cases: Bad) -> pytest.MarkDecorator:
    assert len({case.name for case in cases}) == len(cases)
    return pytest.mark.parametrize("case", cases, ids=[case.name for case in cases])


# The working folder, and what every refusal has in common.


@pytest.fixture(autouse=True)
def deadline() -> Iterator[None]:
    def too_late(number: int, frame: object) -> None:
        pytest.fail(f"not refused within {DEADLINE_SECONDS} s")  # no Exception, so nobody can swallow it

    before = signal.signal(signal.SIGALRM, too_late)
    signal.setitimer(signal.ITIMER_REAL, DEADLINE_SECONDS)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory, teacher: Path) -> Path:
    """A folder with a teacher, rows of text and a complete file made from both."""
    folder = tmp_path_factory.mktemp("originals")
    shutil.copytree(teacher, folder / "teacher")
    write_jsonl(folder / "rows.jsonl", [{"text": sentence[:60]} for sentence in ["", "e", *SENTENCES[:6]]])
    before = Path.cwd()
    os.chdir(folder)
    generate.capture(Ranks([]), [*GOOD, "--output=good.h5", f"--log_dir={folder.parent / 'logs'}"])
    os.chdir(before)
    return folder


@pytest.fixture(scope="module")
def good(originals: Path) -> bytes:
    """The bytes of a good file."""
    return (originals / "good.h5").read_bytes()


@pytest.fixture
def work(tmp_path: Path, originals: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "work"
    shutil.copytree(originals, folder)
    monkeypatch.chdir(folder)
    return folder


GOOD = ["--teacher=teacher", "--dataset=rows.jsonl", "--output=out.h5", "--top_k=3"]


def snapshot(folder: Path) -> dict[str, object]:
    """Everything in a folder: files with their bytes, links with where they lead."""

    def content(path: Path) -> object:
        mode = path.lstat().st_mode
        if stat.S_ISLNK(mode):
            return path.readlink()
        return path.read_bytes() if stat.S_ISREG(mode) else stat.S_IFMT(mode)

    return {str(path.relative_to(folder)): content(path) for path in sorted(folder.rglob("*"))}


def check_message(message: str, pattern: str, words: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    """What a person sees is one line, not too long a one, that says what it must."""
    capfd.readouterr()
    print_error(message)
    line = capfd.readouterr().err.removeprefix("error: ").removesuffix("\n")
    assert "\n" not in line
    assert re.search(pattern, line), line
    for value in sorted({word.partition("=")[2] for word in words} | set(words), key=len):
        line = line.replace(value, "") if len(value) > 100 else line
    assert len(line) <= MOST_CHARACTERS, line


def refuse(
    arguments: list[str], message: str, before: str, work: Path, monkeypatch: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    """Run the job with bad input, and check all that a refusal promises; `before` names the first step not taken."""
    taken = []
    for step in STEPS:
        monkeypatch.setattr(generate, step, spy(getattr(generate, step), step, taken))
    found = snapshot(work)
    with pytest.raises(LogitgenError) as raised:
        generate.capture(Ranks([]), arguments)
    shown = capfd.readouterr().err
    assert raised.value.exit_status == 2, raised.value
    assert not set(taken) & set(STEPS[STEPS.index(before) :]), f"{taken} were taken before: {raised.value}"
    assert snapshot(work) == found
    assert "Traceback" not in shown
    assert "HDF5-DIAG" not in shown
    check_message(str(raised.value), message, arguments, capfd)


def spy(function: Callable[..., Any], name: str, taken: list[str]) -> Callable[..., Any]:
    def call(*args: Any, **options: Any) -> Any:
        taken.append(name)
        return function(*args, **options)

    return call


def with_logs_elsewhere(case: Bad, work: Path) -> list[str]:
    return [*GOOD, f"--log_dir={work.parent / 'logs'}", *case.arguments]


def test_the_good_command_is_good(work: Path) -> None:
    generate.capture(Ranks([]), [*GOOD, f"--log_dir={work.parent / 'logs'}"])
    assert (work / "out.h5").read_bytes() == (work / "good.h5").read_bytes()


# Options.

SEE_HELP = r"See --help for the options\.$"
INVALID_INT = rf"invalid int value: .*{SEE_HELP}"
INVALID_BUDGET = rf"^Argument --batch_tokens/--batch-tokens: expected a whole number or auto, got '.*'\. {SEE_HELP}"


@table(
    Bad("unknown", "--nope=1", rf"^There is no option --nope=1\. {SEE_HELP}"),
    Bad("unknown, without a value", "--nope", rf"no option --nope\. {SEE_HELP}"),
    Bad("one dash", "-k 3", rf"no option -k\. {SEE_HELP}"),
    Bad("capital letters", "--TOP_K=3", rf"no option --TOP_K=3\. {SEE_HELP}"),
    Bad("abbreviated", "--batch=3", rf"no option --batch=3\. {SEE_HELP}"),
    Bad("a word too many", "stray", rf"no option stray\. {SEE_HELP}"),
    Bad("a word too many after --", "-- stray", rf"no option (--|stray)\. {SEE_HELP}"),
    Bad("without its value", "--limit", rf"Argument --limit: expected one argument\. {SEE_HELP}"),
    Bad("text for a number", "--limit=many", INVALID_INT),
    Bad("a fraction", "--top_k=3.5", INVALID_INT),
    Bad("an exponent", "--top_k=1e3", INVALID_INT),
    Bad("not a number", "--max_length=nan", INVALID_INT),
    Bad("infinite", "--rank_timeout=inf", INVALID_INT),
    Bad("hexadecimal", "--seed=0x10", INVALID_INT),
    Bad("an empty number", "--limit=", INVALID_INT),
    Bad("a number of 10,000 digits", ["--limit=" + "9" * 10_000], INVALID_INT),
    Bad("no limit", "--limit=0", r"^--limit must be at least 1, got 0\.$"),
    Bad("a negative limit", "--limit=-5", r"^--limit must be at least 1, got -5\.$"),
    Bad("nothing kept", "--top_k=0", r"^--top_k must be at least 1, got 0\.$"),
    Bad("a token budget in words", "--batch_tokens=many", INVALID_BUDGET),
    Bad("an empty token budget", "--batch_tokens=", INVALID_BUDGET),
    Bad("a fraction of tokens", "--batch_tokens=3.5", INVALID_BUDGET),
    Bad("a token budget of 10,000 digits", ["--batch_tokens=" + "9" * 10_000], INVALID_BUDGET.split(", got")[0]),
    Bad("no tokens in a batch", "--batch_tokens=0", r"^--batch_tokens must be at least 1, got 0\.$"),
    Bad("fewer tokens than none in a batch", "--batch_tokens=-5", r"^--batch_tokens must be at least 1, got -5\.$"),
    Bad("a size in words", "--max_bytes=many", rf"--max_bytes.*: expected a size such .*got 'many'\. {SEE_HELP}"),
    Bad("a size of half a unit", "--max_bytes=200G", rf"--max_bytes.*: expected a size .*got '200G'\. {SEE_HELP}"),
    Bad("a size and a k", "--max_bytes=1GB --top_k=5", r"^--max_bytes finds the largest --top_k .* Leave one"),
    Bad("a size of draws", "--max_bytes=1GB --capture=sample", r"^--max_bytes chooses the k of --capture topk, got"),
    Bad("a layer in words", "--capture=hidden --layers=last", rf"--layers: expected numbers .*got 'last'\. {SEE_HELP}"),
    Bad("a layer counted from the end", "--capture=hidden --layers=-1", rf"--layers: expected .*got '-1'\. {SEE_HELP}"),
    Bad("a layer twice", "--capture=hidden --layers=2,1,2", rf"--layers: expected every layer once.* {SEE_HELP}"),
    Bad("layers of a top k", "--layers=2", r"^--layers keeps more hidden states with --capture hidden, got"),
    Bad("rows of one token", "--max_length=1", r"^--max_length must be at least 2, got 1\.$"),
    Bad("no time", "--rank_timeout=0", r"^--rank_timeout must be at least 1, got 0\.$"),
    Bad("a negative seed", "--seed=-1", r"^--seed must be at least 0, got -1\.$"),
    Bad("a seed of 33 bits", f"--seed={2**32}", r"^--seed must be below 4294967296, got 4294967296\.$"),
    Bad("another dtype", "--dtype=int8", rf"--dtype: invalid choice: 'int8'.*float32.*{SEE_HELP}"),
    Bad("another capture", "--capture=some", rf"--capture: invalid choice: 'some'.*topk.*full.*{SEE_HELP}"),
    Bad("another overflow", "--overflow=drop", rf"--overflow: invalid choice: 'drop'.*split.*error.*{SEE_HELP}"),
    Bad("neither yes nor no", "--packing=maybe", rf"--packing.*got maybe but expected one of yes/no.*{SEE_HELP}"),
    Bad("an empty switch", "--overwrite=", rf"--overwrite.*got  ?but expected one of yes/no.*{SEE_HELP}"),
    Bad("an empty teacher", "--teacher=", r"^--teacher must not be empty\.$"),
    Bad("an empty dataset", "--dataset=", r"^--dataset must not be empty\.$"),
    Bad("an empty output", "--output=", r"^--output must not be empty\.$"),
    Bad("an empty split", "--split=", r"^--split must not be empty\.$"),
    Bad("an empty log_dir", "--log_dir=", r"^--log_dir must not be empty\.$"),
    Bad("packing and splitting", "--packing --overflow=split", r"--overflow split has no meaning.*Leave one"),
    Bad("packing and refusing", "--packing --overflow=error", r"--overflow error has no meaning.*Leave one"),
    Bad("a null character", ["--split=a\0b"], r"^--split must not hold a null character\.$"),
    Bad("a null character in the output", ["--output=a\0b.h5"], r"^--output must not hold a null character\.$"),
    Bad("a null character in --config", ["--config=a\0b"], r"^--config .* cannot be read: embedded null byte"),
    Bad("a log_dir that is a file", "--log_dir=rows.jsonl", r"^--log_dir rows\.jsonl cannot be written to: File"),
    Bad("a log_dir in a file", "--log_dir=rows.jsonl/a", r"cannot be written to: Not a directory\. Choose another\."),
    Bad("a log_dir nobody may make", "--log_dir=/proc/logs", r"^--log_dir /proc/logs cannot be written to: .*Choose"),
    Bad("a log_dir of a long name", [f"--log_dir={'x' * 300}"], r"^--log_dir x+ cannot be written to: File name too"),
)  # fmt: skip
def test_bad_options(case: Bad, work: Path, monkeypatch: Any, capfd: Any) -> None:
    refuse(with_logs_elsewhere(case, work), case.message, "describe_teacher", work, monkeypatch, capfd)


@pytest.mark.parametrize(
    ("words", "missing"),
    [
        ([], "--teacher, --dataset, --output"),
        (["--teacher=teacher"], "--dataset, --output"),
        (["--dataset=rows.jsonl", "--output=out.h5"], "--teacher"),
        (["--config=options.yaml"], "--output"),
    ],
)
def test_missing_options(words: list[str], missing: str, work: Path, monkeypatch: Any, capfd: Any) -> None:
    (work / "options.yaml").write_text("teacher: teacher\ndataset: rows.jsonl\n")
    message = rf"required: {missing}\. {SEE_HELP}"
    refuse(words, message, "describe_teacher", work, monkeypatch, capfd)


# Options files.


def writes(name: str, content: str | bytes | Callable[[], str | bytes]) -> Prepare:
    def prepare() -> None:
        made = content() if callable(content) else content
        Path(name).write_bytes(made.encode() if isinstance(made, str) else made)

    return prepare


LAUGHS = 'a0: &a0 "ha"\n' + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 12))
CANNOT_BE_READ = r"^--config options\.\w+ cannot be read: "
NO_OPTIONS = r"^--config options\.\w+ must hold options as 'name: value' lines, got (a \w+|nothing)\.$"
NO_SINGLE_VALUE = r"^--config options\.yaml: '%s' must be a single value, got a %s\.$"


def in_file(name: str, content: str | bytes | Callable[[], str | bytes], message: str, file: str = "yaml") -> Bad:
    return Bad(name, f"--config=options.{file}", message, writes(f"options.{file}", content))


@table(
    Bad("missing", "--config=none.yaml", r"^--config none\.yaml cannot be read: .*No such file"),
    Bad("a folder", "--config=teacher", r"^--config teacher cannot be read: .*Is a directory"),
    Bad("without its value", "--config", rf"--config: expected one argument\. {SEE_HELP}"),
    Bad("an empty name", "--config=", r"^--config (must not be empty|\S* cannot be read)"),
    Bad("two of them", "--config=a.yaml --config=b.yaml", r"--config .*(once|twice|only one)", writes("b.yaml", "{}")),
    in_file("no YAML", "split: a: b\n", CANNOT_BE_READ + ".*line 1, column 9"),
    in_file("cut off JSON", '{"top_k": 3', CANNOT_BE_READ + ".*line 1 column 12", "json"),
    in_file("empty", "", NO_OPTIONS),
    in_file("empty JSON", "", CANNOT_BE_READ + ".*line 1 column 1", "json"),
    in_file("a list", "- top_k\n- 3\n", NO_OPTIONS),
    in_file("a list in JSON", '["top_k", 3]', NO_OPTIONS, "json"),
    in_file("a word", "top_k", NO_OPTIONS),
    in_file("a list as a value", "top_k: [1, 2]\n", NO_SINGLE_VALUE % ("top_k", "sequence")),
    in_file("options in groups", "top_k: {least: 1}\n", NO_SINGLE_VALUE % ("top_k", "mapping")),
    in_file("unknown", "temperature: 2\n", rf"options\.yaml: there is no option 'temperature'\. {SEE_HELP}"),
    in_file("a number as a name", "3: 2\n", rf"there is no option '3'\. {SEE_HELP}"),
    in_file("nothing as a name", "~: 2\n", rf"there is no option '~'\. {SEE_HELP}"),
    in_file("a name with a newline", '"a\\nb": 2\n', rf"there is no option .*\. {SEE_HELP}"),
    in_file("an options file in itself", "config: options.yaml\n", r"there is no option 'config'"),
    in_file("a fraction", "top_k: 3.5\n", INVALID_INT),
    in_file("a token budget in words", "batch_tokens: many\n", INVALID_BUDGET),
    in_file("a switch for a number", "limit: true\n", INVALID_INT),
    in_file("out of range", "limit: 0\n", r"^--limit must be at least 1, got 0\.$"),
    in_file("an empty text", 'split: ""\n', r"^--split must not be empty\.$"),
    in_file("a null character", '{"split": "a\\u0000b"}', r"^--split must not hold a null character\.$", "json"),
    in_file("the same name twice", "top_k: 3\ntop_k: 2\n", r"options\.yaml: .*top_k.* twice"),
    in_file("the same name spelt twice", "top_k: 3\ntop-k: 2\n", r"options\.yaml: .*top.k.* twice"),
    in_file("a time of day for a number", "limit: 1:30\n", r"limit.*'1:30'"),
    in_file("no UTF-8", b"split: \xff\xfe\n", CANNOT_BE_READ + ".*can't decode byte 0xff"),
    in_file("binary", bytes(range(256)) * 4, CANNOT_BE_READ),
    in_file("the HDF5 file", lambda: Path("good.h5").read_bytes(), CANNOT_BE_READ),
    in_file("a billion laughs", LAUGHS, r"there is no option 'a0'"),
    in_file("a billion laughs as a value", LAUGHS + "split: *a11\n", r"there is no option 'a0'"),
    in_file("a thousand brackets", "split: " + "[" * 1500, CANNOT_BE_READ + ".*recursion"),
    in_file("60,000 brackets in JSON", "[" * 60_000, CANNOT_BE_READ + ".*recursion", "json"),
    in_file("a number of 10,000 digits", "limit: " + "9" * 10_000, INVALID_INT),
    in_file("a Python object", "split: !!python/object/apply:os.getcwd []\n", NO_SINGLE_VALUE % ("split", "sequence")),
    in_file("megabytes", lambda: "#" + "x" * 3_000_000, r"^--config options\.yaml .*(MB|large|big)"),
)  # fmt: skip
def test_bad_options_files(case: Bad, work: Path, monkeypatch: Any, capfd: Any) -> None:
    case.prepare()
    refuse(with_logs_elsewhere(case, work), case.message, "describe_teacher", work, monkeypatch, capfd)


# Datasets. The rows of a broken file are found out before the weights are loaded.

CANNOT_BE_LOADED = r"^--dataset \S+ cannot be loaded with --split \S+: "
NO_ROWS = r"^--split \S+ of \S+ has no rows\.$"


def in_rows(name: str, rows: list[dict[str, Any]], message: str, words: str = "") -> Bad:
    return Bad(name, words, message, lambda: write_jsonl(Path("rows.jsonl"), rows))


def file_of(name: str, file: str, content: str | bytes | Callable[[], str | bytes], message: str) -> Bad:
    return Bad(name, f"--dataset={file}", message, writes(file, content))


def parquet() -> bytes:
    written = io.BytesIO()
    pq.write_table(pa.table({"text": SENTENCES}), written)
    return written.getvalue()


def arrow() -> bytes:
    written = io.BytesIO()
    batch = pa.table({"text": SENTENCES})
    with pa.ipc.new_stream(written, batch.schema) as writer:
        writer.write_table(batch)
    return written.getvalue()


def saved(change: Callable[[Path], object]) -> Prepare:
    def prepare() -> None:
        rows = datasets.Dataset.from_list([{"text": text} for text in SENTENCES])
        datasets.DatasetDict(train=rows).save_to_disk("saved")
        change(Path("saved"))

    return prepare


def cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


def columns(**values: Any) -> bytes:
    written = io.BytesIO()
    pq.write_table(pa.table(values), written)
    return written.getvalue()


def chat(*messages: Any) -> dict[str, Any]:
    return {"messages": list(messages)}


USER = {"role": "user", "content": "hi"}
SPLIT = "--split="
NO_FILE_NOR_FOLDER = r"^--dataset %s is neither a file nor a folder\. Give one of them, or a hub id\.$"
ID_IS_NONE = r"^Row \d+: 'input_ids' must be a list of token ids, .* is none\."


@table(
    # Where it is.
    Bad("no such file", "--dataset=none.jsonl", r"^--dataset none\.jsonl does not exist\. Give a file, a folder or"),
    Bad("no such folder", "--dataset=./none/data", r"^--dataset \./none/data does not exist\. Give"),
    Bad("no such absolute path", "--dataset=/none", r"^--dataset /none does not exist\. Give"),
    Bad("a long name", [f"--dataset={'x' * 5000}.jsonl"],
        r"^--dataset must have at most 4096 characters, got 5006\."),
    Bad("a long path", [f"--dataset=/{'x' * 5000}"], r"^--dataset must have at most 4096 characters, got 5001\."),
    Bad("Unicode", ["--dataset=Ünï/模型/🦙.jsonl"], r"^--dataset Ünï/模型/🦙\.jsonl does not exist\. Give"),
    Bad("bytes that are no UTF-8", ["--dataset=\udcff.jsonl"], r"^--dataset .*\.jsonl does not exist\. Give"),
    Bad("not on the hub", "--dataset=nobody/nothing", CANNOT_BE_LOADED + r"\S.*"),
    Bad("an empty folder", "--dataset=data", CANNOT_BE_LOADED + r"\S.*", lambda: Path("data").mkdir()),
    Bad("the teacher's folder", "--dataset=teacher", r"^--dataset teacher has files with different columns: "),
    Bad("a device", "--dataset=/dev/null", NO_FILE_NOR_FOLDER % "/dev/null"),
    Bad("a pipe", "--dataset=pipe.jsonl", NO_FILE_NOR_FOLDER % r"pipe\.jsonl",
        lambda: os.mkfifo("pipe.jsonl")),
    Bad("a folder named like a file", "--dataset=data.jsonl", CANNOT_BE_LOADED + r"\S.*",
        lambda: Path("data.jsonl").mkdir()),
    Bad("a link to itself", "--dataset=loop.jsonl", r"^--dataset loop\.jsonl (does not exist|cannot be loaded)",
        lambda: Path("loop.jsonl").symlink_to("loop.jsonl")),
    # What kind of file.
    file_of("a spreadsheet", "rows.xlsx", "PK",
        r"^--dataset rows\.xlsx must end in one of .*\.jsonl.*, got '\.xlsx'\."),
    file_of("no ending", "rows", "{}", r"^--dataset rows must end in one of .*, got ''\."),
    file_of("an empty file", "rows.jsonl", "", NO_ROWS),
    file_of("an empty parquet file", "rows.parquet", "", NO_ROWS),
    file_of("blank lines", "rows.jsonl", "\n\n\n", NO_ROWS + "|" + CANNOT_BE_LOADED + r"\S.*"),
    file_of("garbage as JSON", "rows.jsonl", os.urandom(2000), CANNOT_BE_LOADED + r"\S.*"),
    file_of("text as JSON", "rows.jsonl", "Hello,\nworld\n", CANNOT_BE_LOADED + r"\S.*"),
    file_of("JSON cut off", "rows.jsonl", '{"text": "a"}\n{"text": "b', CANNOT_BE_LOADED + r"\S.*"),
    file_of("a JSON number", "rows.json", "5", r"^Row 0: 'text' must be a string, got int 5\.$"),
    file_of("a list of JSON numbers", "rows.json", "[1, 2, 3]", rf"{CANNOT_BE_LOADED}\S.*|^R(ow 0:|ows need) \S.*"),
    file_of("rows of two kinds", "rows.jsonl", '{"text": "a"}\n{"text": {"b": 1}}\n',
        r"^Row 1: 'text' must be a string, got dict"),
    file_of("garbage as Parquet", "rows.parquet", os.urandom(2000), CANNOT_BE_LOADED + r"\S.*"),
    file_of("Parquet cut off", "rows.parquet", lambda: parquet()[:-100], CANNOT_BE_LOADED + r"\S.*"),
    file_of("Parquet garbled", "rows.parquet", lambda: b"PAR1" + bytes(200) + parquet()[204:], CANNOT_BE_LOADED),
    file_of("garbage as Arrow", "rows.arrow", os.urandom(2000), CANNOT_BE_LOADED + r"\S.*"),
    file_of("Arrow cut off", "rows.arrow", lambda: arrow()[:-2000], CANNOT_BE_LOADED + r"\S.*"),
    file_of("garbage as CSV", "rows.csv", os.urandom(2000), CANNOT_BE_LOADED + r"\S.*"),
    file_of("uneven CSV", "rows.csv", "text\na\nb,c,d\n", CANNOT_BE_LOADED + r"\S.*"),
    file_of("CSV of a header only", "rows.csv", "text\n", NO_ROWS),
    file_of("Parquet without rows", "rows.parquet", lambda: columns(text=pa.array([], "string")), NO_ROWS),
    file_of("Latin-1 as text", "rows.txt", "Grüße\n".encode("latin-1"), r"^--dataset rows\.txt .*(utf-8|UTF-8)"),
    file_of("Latin-1 as JSON", "rows.jsonl", '{"text": "Grüße"}\n'.encode("latin-1"),
        r"^--dataset rows\.jsonl .*(utf-8|UTF-8)"),
    file_of("Latin-1 as CSV", "rows.csv", "text\nGrüße\n".encode("latin-1"), r"^--dataset rows\.csv .*(utf-8|UTF-8)"),
    # A saved folder that is damaged.
    Bad("saved, rows missing", "--dataset=saved", CANNOT_BE_LOADED + r"\S.*",
        saved(lambda folder: next(folder.rglob("*.arrow")).unlink())),
    Bad("saved, rows cut off", "--dataset=saved", CANNOT_BE_LOADED + r"\S.*",
        saved(lambda folder: cut(next(folder.rglob("*.arrow")), 500))),
    Bad("saved, rows garbled", "--dataset=saved", CANNOT_BE_LOADED + r"\S.*",
        saved(lambda folder: next(folder.rglob("*.arrow")).write_bytes(os.urandom(2000)))),
    Bad("saved, state empty", "--dataset=saved", CANNOT_BE_LOADED + r"\S.*",
        saved(lambda folder: (folder / "train/state.json").write_text(""))),
    Bad("saved, state a list", "--dataset=saved", CANNOT_BE_LOADED + r"\S.*",
        saved(lambda folder: (folder / "train/state.json").write_text("[]"))),
    Bad("saved, info garbled", "--dataset=saved", CANNOT_BE_LOADED + r"\S.*",
        saved(lambda folder: (folder / "train/dataset_info.json").write_text("{"))),
    Bad("saved, split missing", "--dataset=saved", CANNOT_BE_LOADED + r"\S.*",
        saved(lambda folder: shutil.rmtree(folder / "train"))),
    Bad("saved, another split named", "--dataset=saved", CANNOT_BE_LOADED + r"\S.*",
        saved(lambda folder: (folder / "dataset_dict.json").write_text('{"splits": ["test"]}'))),
    # Splits.
    Bad("another split", f"{SPLIT}test", CANNOT_BE_LOADED + r".*train"),
    Bad("a split of odd characters", [f"{SPLIT}train; rm -rf"], r"cannot be loaded with --split train; rm -rf: \S.*"),
    Bad("a slice that does not end", f"{SPLIT}train[", CANNOT_BE_LOADED + r"\S.*"),
    Bad("a slice of letters", f"{SPLIT}train[a:b]", CANNOT_BE_LOADED + r"\S.*"),
    Bad("a slice of 200 per cent", f"{SPLIT}train[:200%]", CANNOT_BE_LOADED + r"\S.*"),
    Bad("a slice of fractions", f"{SPLIT}train[:0.5]", CANNOT_BE_LOADED + r"\S.*"),
    Bad("a slice of 100 digits", f"{SPLIT}train[{'9' * 100}:]", NO_ROWS),
    Bad("a slice backwards", f"{SPLIT}train[5:2]", NO_ROWS),
    Bad("a slice beyond the end", f"{SPLIT}train[100:]", NO_ROWS),
    Bad("a slice of nothing", f"{SPLIT}train[:0]", NO_ROWS),
    Bad("a sum with a split that is not there", f"{SPLIT}train+test", CANNOT_BE_LOADED + r"\S.*"),
    Bad("only a plus", f"{SPLIT}+", CANNOT_BE_LOADED + r"\S.*"),
    Bad("a configuration of a file", "--dataset_config=en", r"^--dataset_config is for datasets .*Leave it out\."),
    # Columns.
    in_rows("other columns", [{"body": "a"}], r"^Rows need input_ids, .* or text; the split has columns body\. Name"),
    in_rows("half a pair", [{"prompt": "a"}], r"^Rows need input_ids, .*; the split has columns prompt\. Name"),
    in_rows("a column that is not there", [{"text": "a"}], r"^--text_column body is not a column; the split has "
            r"columns text\. Name one of them\.", "--text_column=body"),
    in_rows("a column of messages that is not there", [{"text": "a"}],
        r"^--messages_column talk is not a column; the split has columns text\. Name one", "--messages_column=talk"),
    in_rows("a column of text and one of messages", [{"text": "a"}], r"^--text_column and --messages_column name",
        "--text_column=text --messages_column=text"),
    in_rows("a template that is not there", [chat(USER)], r"^--chat_template no\.jinja is not a file\.",
        "--chat_template=no.jinja"),
    in_rows("variables that are no JSON", [{"text": "a"}], r"^Argument --chat_template_kwargs.*: expected a JSON",
        "--chat_template_kwargs={"),
    in_rows("variables that are no object", [{"text": "a"}], r"^Argument --chat_template_kwargs.*: expected a JSON",
        "--chat_template_kwargs=[1]"),
    in_rows("a day that is none", [{"text": "a"}], r"^--chat_template_date must be a date such as .*, got 2026-02-30",
        "--chat_template_date=2026-02-30"),
    Bad("a column called no in YAML", "--config=options.yaml", r"^--text_column no is not a column; .* Name one",
        writes("options.yaml", "text_column: no\n")),
    in_rows("completions of plain text", [{"text": "a b"}], r"^--completion_only needs rows that", "--completion_only"),
    in_rows("completions of bare ids", [{"input_ids": [1, 2]}], r"^--completion_only with ready input_ids needs a comp",
            "--completion_only"),
    # Values.
    in_rows("no text", [{"text": "a b"}, {"text": None}], r"^Row 1: 'text' must be a string, got nothing\."),
    in_rows("numbers as text", [{"text": 5}], r"^Row 0: 'text' must be a string, got int 5\."),
    in_rows("lists as text", [{"text": ["a"]}], r"^Row 0: 'text' must be a string, got a list of 1 \('a', \.\.\.\)\."),
    in_rows("no completion", [{"prompt": "a", "completion": None}], r"^Row 0: 'completion' must be a string, got noth"),
    in_rows("empty texts", [{"text": ""}] * 3, r"^The split has no position to capture: every row is empty or"),
    in_rows("ids of one token", [{"input_ids": [1]}] * 3, r"^The split has no position to capture"),
    in_rows("negative ids", [{"input_ids": [1, 2]}, {"input_ids": [3, -1]}], r"^Row 1: 'input_ids' .* -1 is none\."),
    in_rows("ids of 32 bits", [{"input_ids": [1, 2**31]}], rf"^Row 0: 'input_ids' .* {2**31} is none\."),
    in_rows("ids of 64 bits", [{"input_ids": [1, 2**63]}], ID_IS_NONE + "|" + CANNOT_BE_LOADED),
    in_rows("ids beyond the vocabulary", [{"input_ids": [1, 2]}, {"input_ids": [1, 384]}],
            r"^Row 1 of the split has token id 384, but the teacher's vocabulary is 0 to 383\. Use the teacher's own"),
    in_rows("fractions as ids", [{"input_ids": [1, 2.5]}], r"^Row 0: 'input_ids' .* is none\."),
    in_rows("switches as ids", [{"input_ids": [True, False]}], r"^Row 0: 'input_ids' .* True is none\."),
    in_rows("words as ids", [{"input_ids": ["a", "b"]}], r"^Row 0: 'input_ids' .* 'a' is none\."),
    in_rows("nested ids", [{"input_ids": [[1, 2], [3]]}], r"^Row 0: 'input_ids' .* \[1, 2\] is none\."),
    in_rows("no ids", [{"input_ids": [1, 2]}, {"input_ids": None}], r"^Row 1: 'input_ids' must .* got nothing\."),
    in_rows("an id missing", [{"input_ids": [1, None, 2]}], r"^Row 0: 'input_ids' .* None is none\."),
    in_rows("a number as ids", [{"input_ids": 7}], r"^Row 0: 'input_ids' must .* got int 7\."),
    in_rows("a mask too short", [{"input_ids": [1, 2], "completion_mask": [1]}],
            r"^Row 0: 'completion_mask' must be 2 zeros and ones, .* got a list of 1 \(1, \.\.\.\)\.",
            "--completion_only"),
    in_rows("a mask of twos", [{"input_ids": [1, 2], "completion_mask": [0, 2]}], r"^Row 0: 'completion_mask' must be",
            "--completion_only"),
    in_rows("no mask", [{"input_ids": [1, 2], "completion_mask": None}], r"^Row 0: 'completion_mask' .* got nothing",
            "--completion_only"),
    in_rows("a mask of nothing", [{"input_ids": [1, 2], "completion_mask": [0, 0]}], r"^The split has no position to",
            "--completion_only"),
    in_rows("messages without a template", [chat(USER)],
        r"^The rows are messages, .* no chat template\. Give one with"),
    in_rows("a row too long", [{"text": "abc" * 50}], r"^Row 0 of the split has \d+ tokens, --max_length is 5\. Raise",
            "--max_length=5 --overflow=error"),
    in_rows("too few tokens to pack", [{"text": "ab"}], r"^--packing with --max_length 99 needs at least that many",
            "--packing --max_length=99"),
)  # fmt: skip
def test_bad_datasets(case: Bad, work: Path, monkeypatch: Any, capfd: Any) -> None:
    case.prepare()
    refuse(with_logs_elsewhere(case, work), case.message, "load_model", work, monkeypatch, capfd)


# Teachers.


def change_json(path: str, **changes: Any) -> Prepare:
    def prepare() -> None:
        file = Path("teacher") / path
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return prepare


def in_teacher(name: str, content: str | bytes) -> Prepare:
    return writes(f"teacher/{name}", content)


def without(*names: str) -> Prepare:
    return lambda: [(Path("teacher") / name).unlink() for name in names]


def chat_with(template: str | None) -> Prepare:
    def prepare() -> None:
        write_jsonl(Path("rows.jsonl"), [chat(USER, {"role": "assistant", "content": "ho"})])
        if template is not None:
            Path("teacher/chat_template.jinja").write_text(template)

    return prepare


def custom_code(body: str) -> Prepare:
    def prepare() -> None:
        auto_map = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
        Path("teacher/config.json").write_text(json.dumps({"model_type": "own", "vocab_size": 9, "auto_map": auto_map}))
        Path("teacher/own.py").write_text(body)

    return prepare


TEACHER_CANNOT = r"^--teacher \S+ cannot be loaded: (?=\S)"


@table(
    Bad("no such folder", "--teacher=./none", r"^--teacher \./none does not exist\. Give a folder or a hub id\.$"),
    Bad("no such absolute folder", "--teacher=/none", r"^--teacher /none does not exist\. Give"),
    Bad("a deep path", "--teacher=a/b/c", r"^--teacher a/b/c does not exist\. Give"),
    Bad("not on the hub", "--teacher=nobody/nothing", TEACHER_CANNOT),
    Bad("no hub id either", ["--teacher=what is this?"],
        r"^--teacher what is this\? (cannot be loaded|does not exist)"),
    Bad("a long name", [f"--teacher={'x' * 5000}"], r"^--teacher must have at most 4096 characters, got 5000\."),
    Bad("a long path", [f"--teacher=/{'x' * 5000}"], r"^--teacher must have at most 4096 characters, got 5001\."),
    Bad("bytes that are no UTF-8", ["--teacher=./\udcff"], r"^--teacher .* does not exist\. Give"),
    Bad("an empty folder", "--teacher=empty", r"^--teacher empty has no config\.json\. Give the folder of a transform",
        lambda: Path("empty").mkdir()),
    Bad("a file", "--teacher=good.h5", r"^--teacher good\.h5 (is not a folder|cannot be loaded)"),
    Bad("a weights file", "--teacher=teacher/model.safetensors", r"^--teacher \S+ (is not a folder|cannot be loaded)"),
    Bad("config garbled", "", TEACHER_CANNOT, in_teacher("config.json", os.urandom(200))),
    Bad("config empty", "", TEACHER_CANNOT, in_teacher("config.json", "")),
    Bad("config a list", "", TEACHER_CANNOT, in_teacher("config.json", "[]")),
    Bad("config without a type", "", TEACHER_CANNOT, in_teacher("config.json", "{}")),
    Bad("config of a type nobody knows", "", TEACHER_CANNOT, change_json("config.json", model_type="none")),
    Bad("an encoder and a decoder", "", r"is a t5 model, which has no causal language model in transformers\. Give a",
        lambda: T5Config().save_pretrained("teacher")),
    Bad("a model of images", "", r"is a clip model, which has no causal language model in transformers\. Give a",
        lambda: CLIPConfig().save_pretrained("teacher")),
    Bad("a vocabulary in words", "", r"^--teacher teacher .*vocab_size", change_json("config.json", vocab_size="many")),
    Bad("no vocabulary", "", r"^--teacher teacher .*vocab_size", change_json("config.json", vocab_size=0)),
    Bad("a negative vocabulary", "", r"^--teacher teacher .*vocab_size", change_json("config.json", vocab_size=-3)),
    Bad("a vocabulary of null", "", r"^--teacher teacher .*vocab_size", change_json("config.json", vocab_size=None)),
    Bad("a layer too many", "--capture=hidden --layers=0,2", r"^--layers must be below the teacher's number of layers"),
    Bad("a context length in words", "--max_length=9", r"^--teacher teacher .*max_position_embeddings",
        change_json("config.json", max_position_embeddings="long")),
    Bad("custom code", "", r"^--teacher teacher .*--?trust_remote_code", custom_code("raise SystemExit('ran')")),
    Bad("custom code that raises", "--trust_remote_code", TEACHER_CANNOT + "own fault",
        custom_code("raise ValueError('own fault')")),
    Bad("more kept than there is", "--top_k=385",
        r"^--top_k must be between 1 and the vocabulary size 384, got 385\. L"),
    Bad("longer than the context", "--max_length=257",
        r"^--max_length must be at most the teacher's context length 25"),
    Bad("no such GGUF file", "--teacher_gguf=q4.gguf", r"^--teacher(_gguf)? .*q4\.gguf"),
    Bad("garbage as a GGUF file", "--teacher_gguf=q4.gguf", r"^--teacher(_gguf)? .*q4\.gguf",
        in_teacher("q4.gguf", os.urandom(500))),
    Bad("a revision of a folder", "--revision=v2", r"^--revision .*(hub|folder)"),
)  # fmt: skip
def test_bad_teachers(case: Bad, work: Path, monkeypatch: Any, capfd: Any) -> None:
    case.prepare()
    refuse(with_logs_elsewhere(case, work), case.message, "load_tokenizer", work, monkeypatch, capfd)


@table(
    Bad("no tokenizer", "", r"^--teacher teacher has no tokenizer that can be loaded, and the rows are text\. Add",
        without("tokenizer.json", "tokenizer_config.json")),
    Bad("tokenizer garbled", "", r"^--teacher teacher has no tokenizer that can be loaded",
        in_teacher("tokenizer.json", os.urandom(200))),
    Bad("tokenizer of another kind", "", r"^--teacher teacher has no tokenizer that can be loaded",
        in_teacher("tokenizer.json", "{}")),
    Bad("tokenizer too large for the teacher", "", r"^Row \d+ of the split has token id \d+, but .* 0 to 99\. Use the",
        change_json("config.json", vocab_size=100)),
    Bad("no template", "", r"^The rows are messages, but .* no chat template\. Give one with --chat_template",
        chat_with(None)),
    Bad("a template that raises", "", r"^Row 0: the chat template refuses the messages: no such role",
        chat_with("{{ raise_exception('no such role') }}")),
    Bad("a template that is none", "", r"^Row 0: the chat template refuses the messages: \S.*", chat_with("{% if %}")),
    Bad("a template that divides by zero", "", r"^Row 0: the chat template refuses the messages: .*zero",
        chat_with("{{ 1 / 0 }}")),
    Bad("a template that reaches out", "", r"^Row 0: the chat template refuses the messages: \S.*",
        chat_with("{{ messages.__class__.__mro__[1].__subclasses__() }}")),
    Bad("a template that forgets", "--completion_only",
        r"^Row 0, message 1: the chat template renders the messages before it differently",
        chat_with("{% for m in messages %}{{ m.content ~ loop.length }}{% endfor %}")),
)  # fmt: skip
def test_bad_tokenizers(case: Bad, work: Path, monkeypatch: Any, capfd: Any) -> None:
    case.prepare()
    refuse(with_logs_elsewhere(case, work), case.message, "load_model", work, monkeypatch, capfd)


@pytest.mark.parametrize(
    ("chats", "got"),
    [
        ([{"messages": None}, chat(USER)], ": 'messages' must be a list of messages, got nothing"),
        ([{"messages": "hi"}], ": 'messages' must be a list of messages, got str 'hi'"),
        ([{"messages": ["hi"]}], ", message 0: it must be an object with role and content, got str 'hi'"),
        ([chat({"role": "user"})], ", message 0: 'content' must be a string, got nothing"),
        ([chat({"content": "hi"})], ", message 0: 'role' must be a string, got nothing"),
        ([chat({"role": "user", "content": None})], ", message 0: 'content' must be a string, got nothing"),
        ([chat({"role": "user", "content": ["a", "b"]})], ", message 0: a part of 'content' is str 'a'"),
        ([chat({"role": 1, "content": "a"})], ", message 0: 'role' must be a string, got int 1"),
    ],
)
def test_bad_messages(chats: list[dict[str, Any]], got: str, work: Path, monkeypatch: Any, capfd: Any) -> None:
    Path("teacher/chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    write_jsonl(Path("rows.jsonl"), chats)
    message = f"^Row 0{got}"
    refuse([*GOOD, f"--log_dir={work.parent / 'logs'}"], message, "load_model", work, monkeypatch, capfd)


def change_weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Prepare:
    def prepare() -> None:
        weights = load_file("teacher/model.safetensors")
        change(weights)
        save_file(weights, "teacher/model.safetensors", {"format": "pt"})

    return prepare


def bidirectional() -> None:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    model = BertLMHeadModel(BertConfig(vocab_size=384, **sizes))
    save_teacher(Path("teacher"), enlarge_weights(model), None)


def fill(value: float) -> Callable[[dict[str, torch.Tensor]], object]:
    return lambda weights: [tensor.fill_(value) for tensor in weights.values()]


@table(
    Bad("weights missing", "", TEACHER_CANNOT, without("model.safetensors")),
    Bad("weights empty", "", TEACHER_CANNOT, in_teacher("model.safetensors", "")),
    Bad("weights garbled", "", TEACHER_CANNOT, in_teacher("model.safetensors", os.urandom(5000))),
    Bad("weights cut off", "", TEACHER_CANNOT, lambda: cut(Path("teacher/model.safetensors"), 5000)),
    Bad("weights of a header of 2**63 bytes", "", TEACHER_CANNOT,
        in_teacher("model.safetensors", (2**63).to_bytes(8, "little") + b"{}")),
    Bad("a layer missing", "", r"^--teacher teacher lacks \d+ weights, model\.layers\.0\.\S+ the first: they would be",
        change_weights(lambda weights: [weights.pop(name) for name in list(weights) if ".layers.0." in name])),
    Bad("weights of another shape", "", r"^--teacher teacher .*(norm\.weight|shape)",
        change_weights(lambda weights: weights.update({"model.norm.weight": torch.ones(7)}))),
    Bad("another vocabulary than the config's", "", r"^--teacher teacher .*(vocab|shape|weight)",
        change_json("config.json", vocab_size=400)),
    Bad("weights that are not numbers", "", r"(?i)^(--teacher teacher|The teacher's logits).*(finite|nan)",
        change_weights(fill(float("nan")))),
    Bad("weights in an unsafe pickle", "", TEACHER_CANNOT,
        lambda: (without("model.safetensors")(), in_teacher("pytorch_model.bin", b"cos\nsystem\n(S'touch x'\ntR.")())),
    Bad("an index without its metadata", "", TEACHER_CANNOT + r"KeyError 'metadata'\.$",
        lambda: (without("model.safetensors")(),
                 in_teacher("model.safetensors.index.json", '{"weight_map": {"a": "b.safetensors"}}')())),
    Bad("no layers but heads", "", TEACHER_CANNOT, change_json("config.json", num_attention_heads=0)),
    Bad("a quantisation whose package is not there", "", TEACHER_CANNOT,
        change_json("config.json", quantization_config={"quant_method": "gptq"})),
    Bad("an activation nobody knows", "", TEACHER_CANNOT + r"KeyError 'none'\.$",
        change_json("config.json", hidden_act="none")),
    Bad("both directions", "", r"^The teacher's logits depend on later tokens: it is no causal language model",
        bidirectional),
    Bad("another attention", "--attn_implementation=none", r"^--(teacher|attn_implementation) .*none"),
)  # fmt: skip
def test_bad_weights(case: Bad, work: Path, monkeypatch: Any, capfd: Any) -> None:
    case.prepare()
    refuse(with_logs_elsewhere(case, work), case.message, "capture_batch", work, monkeypatch, capfd)


def test_a_bad_attention_is_refused_before_the_split_is_tokenized(work: Path, monkeypatch: Any, capfd: Any) -> None:
    words = [*GOOD, f"--log_dir={work.parent / 'logs'}", "--attn_implementation=none"]
    refuse(words, r"^--(teacher|attn_implementation) .*none", "tokenize", work, monkeypatch, capfd)


# Outputs.

LONG = "x" * 300 + ".h5"


def copies(*names: str) -> Prepare:
    return lambda: [shutil.copy("good.h5", name) for name in names]


def both(*prepares: Prepare) -> Prepare:
    return lambda: [prepare() for prepare in prepares]


NOT_PLAIN = r"^--output \S+: \S+ is not a regular file\. Choose another name\.$"
NOT_OUR_OUTPUT = r"^--output \S+: %s exists and is not a logitgen file\. Choose another name, or remove it\.$"
UNUSABLE = r" exists but is unusable: .* (Choose another --output|or replace it)"
OF_ANOTHER_RUN = (
    r"^\S+ belongs to another run\. Its values and this run's differ: .*%s.* Choose another --output, or replace it"
)
CANNOT_BE = r"^--output \S+ cannot be (written|created): %s\. Choose another place\.$"


@table(
    Bad("no such folder", "--output=none/out.h5",
        r"^--output none/out\.h5: the folder none does not exist\. Create it\."),
    Bad("a folder that is a file", "--output=rows.jsonl/out.h5",
        r"^--output \S+: the folder rows\.jsonl (does not|is not)"),
    Bad("a folder", "--output=teacher", NOT_PLAIN),
    Bad("this folder", "--output=.", r"^--output \. .*|" + NOT_PLAIN),
    Bad("the folder above", "--output=..", NOT_PLAIN),
    Bad("the root", "--output=/", r"^--output / .*|" + NOT_PLAIN),
    Bad("the null device", "--output=/dev/null", NOT_PLAIN),
    Bad("a full device", "--output=/dev/full", NOT_PLAIN),
    Bad("a pipe", "--output=pipe", NOT_PLAIN, lambda: os.mkfifo("pipe")),
    Bad("a link", "--output=link.h5", NOT_PLAIN, lambda: Path("link.h5").symlink_to("rows.jsonl")),
    Bad("a link to overwrite", "--output=link.h5 --overwrite", NOT_PLAIN,
        lambda: Path("link.h5").symlink_to("good.h5")),
    Bad("a link to nowhere", "--output=link.h5", NOT_PLAIN, lambda: Path("link.h5").symlink_to("nowhere")),
    Bad("a link to itself", "--output=link.h5", NOT_PLAIN, lambda: Path("link.h5").symlink_to("link.h5")),
    Bad("a place nobody may write to", "--output=/proc/out.h5", CANNOT_BE % r"\S.*"),
    Bad("a long name", f"--output={LONG}", CANNOT_BE % "File name too long"),
    Bad("a name too long for .partial", f"--output={LONG[50:]}", CANNOT_BE % "File name too long"),
    Bad("a name too long for .partial.new", f"--output={LONG[57:]}", CANNOT_BE % "File name too long"),
    Bad("a long path", f"--output={'x/' * 300}out.h5", r"^--output \S+( cannot be|: the folder)"),
    # Only a logitgen file is ever replaced.
    Bad("the dataset", "--output=rows.jsonl", NOT_OUR_OUTPUT % r"rows\.jsonl"),
    Bad("the dataset to overwrite", "--output=rows.jsonl --overwrite", NOT_OUR_OUTPUT % r"rows\.jsonl"),
    Bad("the weights", "--output=teacher/model.safetensors", NOT_OUR_OUTPUT % r"teacher/model\.safetensors"),
    Bad("the weights to overwrite", "--output=teacher/model.safetensors --overwrite",
        NOT_OUR_OUTPUT % r"teacher/model\.safetensors"),
    Bad("an empty file", "", NOT_OUR_OUTPUT % r"out\.h5", writes("out.h5", "")),
    Bad("an empty file to overwrite", "--overwrite", NOT_OUR_OUTPUT % r"out\.h5", writes("out.h5", "")),
    Bad("a text file", "", NOT_OUR_OUTPUT % r"out\.h5", writes("out.h5", "precious")),
    Bad("a text file to overwrite", "--overwrite", NOT_OUR_OUTPUT % r"out\.h5", writes("out.h5", "precious")),
    Bad("another HDF5 file", "", NOT_OUR_OUTPUT % r"out\.h5", lambda: h5py.File("out.h5", "w").close()),
    Bad("another HDF5 file to overwrite", "--overwrite", NOT_OUR_OUTPUT % r"out\.h5",
        lambda: h5py.File("out.h5", "w").close()),
    Bad("a partial of garbage", "", NOT_OUR_OUTPUT % r"out\.h5\.partial", writes("out.h5.partial", os.urandom(999))),
    Bad("a partial of garbage to overwrite", "--overwrite", NOT_OUR_OUTPUT % r"out\.h5\.partial",
        writes("out.h5.partial", os.urandom(999))),
    Bad("an empty partial", "", NOT_OUR_OUTPUT % r"out\.h5\.partial", writes("out.h5.partial", "")),
    Bad("an empty partial to overwrite", "--overwrite", NOT_OUR_OUTPUT % r"out\.h5\.partial",
        writes("out.h5.partial", "")),
    Bad("a good file beside a partial of garbage", "", NOT_OUR_OUTPUT % r"out\.h5\.partial",
        both(copies("out.h5"), writes("out.h5.partial", "precious"))),
    # What is one, is replaced with --overwrite only.
    Bad("a file cut off", "", r"^out\.h5" + UNUSABLE,
        both(copies("out.h5"), lambda: cut(Path("out.h5"), 9000))),
    Bad("of another k", "--top_k=4", OF_ANOTHER_RUN % "--top_k 3 and 4", copies("out.h5")),
    Bad("of another split", "--split=train[:3]", OF_ANOTHER_RUN % r"--split train and train\[:3\]", copies("out.h5")),
    Bad("of another capture", "--capture=full", OF_ANOTHER_RUN % "capture topk and full", copies("out.h5")),
    Bad("a partial of another seed", "--seed=1", OF_ANOTHER_RUN % "--seed 0 and 1", copies("out.h5.partial")),
    Bad("a partial cut off", "", r"^out\.h5\.partial" + UNUSABLE,
        both(copies("out.h5.partial"), lambda: cut(Path("out.h5.partial"), 9000))),
    Bad("a partial that is a folder", "", NOT_PLAIN, lambda: Path("out.h5.partial").mkdir()),
    Bad("a partial that is a link", "", NOT_PLAIN, lambda: Path("out.h5.partial").symlink_to("good.h5")),
    Bad("a new one that is a folder", "", NOT_PLAIN, lambda: Path("out.h5.partial.new").mkdir()),
    Bad("a new one that is a link", "", NOT_PLAIN, lambda: Path("out.h5.partial.new").symlink_to("rows.jsonl")),
    Bad("a new one that is a link to nowhere", "", NOT_PLAIN,
        lambda: Path("out.h5.partial.new").symlink_to("precious")),
    Bad("a new one that is a pipe", "", NOT_PLAIN, lambda: os.mkfifo("out.h5.partial.new")),
)  # fmt: skip
def test_bad_outputs(case: Bad, work: Path, monkeypatch: Any, capfd: Any) -> None:
    case.prepare()
    refuse(with_logs_elsewhere(case, work), case.message, "describe_teacher", work, monkeypatch, capfd)


def change_first_row() -> None:
    write_jsonl(Path("rows.jsonl"), [{"text": "other words than before"}])
    shutil.copy("good.h5", "out.h5")


@table(
    Bad("of other rows", "", OF_ANOTHER_RUN % "the tokens of the rows", change_first_row),
    Bad("of another tokenizer", "", OF_ANOTHER_RUN % "the tokenizer",
        both(copies("out.h5"), in_teacher("chat_template.jinja", "{{ 1 }}"))),
)  # fmt: skip
def test_outputs_of_other_rows(case: Bad, work: Path, monkeypatch: Any, capfd: Any) -> None:
    case.prepare()
    refuse(with_logs_elsewhere(case, work), case.message, "load_model", work, monkeypatch, capfd)


def test_an_unfinished_output_of_other_weights(work: Path, monkeypatch: Any, capfd: Any) -> None:
    shutil.copy("good.h5", "out.h5.partial")
    done = header.read(Path("good.h5")).places["done"]
    with open("out.h5.partial", "r+b") as file:
        file.seek(done + 3)
        file.write(b"\0")
    make_llama().save_pretrained("teacher")
    change_weights(lambda weights: weights["lm_head.weight"].add_(1))()
    words = [*GOOD, f"--log_dir={work.parent / 'logs'}"]
    refuse(words, OF_ANOTHER_RUN % "the teacher's weights", "capture_batch", work, monkeypatch, capfd)


def test_a_folder_that_may_not_be_written_to(work: Path, monkeypatch: Any, capfd: Any) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may write everywhere; see /proc above")
    Path("closed").mkdir(mode=0o500)
    words = [*GOOD, f"--log_dir={work.parent / 'logs'}", "--output=closed/out.h5"]
    refuse(words, CANNOT_BE % "Permission denied", "describe_teacher", work, monkeypatch, capfd)


@pytest.mark.parametrize("name", ["out.h5.partial", "out.h5.partial.new"])
def test_an_output_another_run_writes(name: str, work: Path, monkeypatch: Any, capfd: Any) -> None:
    shutil.copy("good.h5", name)
    with open(name, "r+b") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        words = [*GOOD, f"--log_dir={work.parent / 'logs'}"]
        message = rf"^Another run is writing {re.escape(name)}\. Wait for it, or choose another --output\.$"
        refuse(words, message, "describe_teacher", work, monkeypatch, capfd)


def test_a_disk_that_is_too_small(work: Path, monkeypatch: Any, capfd: Any) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(1000, 0, 1000))
    message = r"^--output out\.h5 needs .* has 1(\.0)? ?k?.*B free\. Free some space, or keep less"
    refuse([*GOOD, f"--log_dir={work.parent / 'logs'}"], message, "load_model", work, monkeypatch, capfd)


# Files given to the reader, to inspect and to verify.

TRUNCATED = r"is truncated\. Copy it again\.|is not a logitgen file|lies outside the file"
NOT_OURS = r"^file\.h5 is not a logitgen file: it has another signature\. Give the original"


def seal(path: Path) -> None:
    """Make the text block fit to a head that was changed."""
    content = path.read_bytes()
    size = header._check_head(Path("good.h5"))
    text = header._text(size, content[512:size])
    path.write_bytes(text + content[len(text) :])


def rewrite(change: Callable[[h5py.File], object]) -> Prepare:
    """Change a good file with h5py, and have its text block say that it is right."""

    def prepare() -> None:
        shutil.copy("good.h5", "file.h5")
        with h5py.File("file.h5", "r+", locking=False) as file:
            change(file)
        seal(Path("file.h5"))

    return prepare


def patched(place: int, new: bytes) -> Prepare:
    def prepare() -> None:
        content = bytearray(Path("good.h5").read_bytes())
        content[place : place + len(new)] = new
        Path("file.h5").write_bytes(content)

    return prepare


def replaced(old: bytes, new: bytes) -> Prepare:
    def prepare() -> None:
        content = Path("good.h5").read_bytes()
        assert content.count(old) >= 1
        Path("file.h5").write_bytes(content.replace(old, new, 1))

    return prepare


def without_attribute(name: str) -> Prepare:
    return rewrite(lambda file: file.attrs.__delitem__(name))


def set_attribute(name: str, value: Any) -> Prepare:
    """Set an attribute, text as the format has it: of a fixed length."""
    stored = np.bytes_(value.encode()) if isinstance(value, str) else value
    return rewrite(lambda file: file.attrs.update({name: stored}))


def set_variable_text(name: str, text: str) -> Prepare:
    """Set an attribute to the right text, stored as h5py does unless told otherwise."""
    return rewrite(lambda file: file.attrs.create(name, text, dtype=h5py.string_dtype()))


def with_head_bytes(number: bytes) -> Prepare:
    def prepare() -> None:
        content = Path("good.h5").read_bytes()
        text = re.sub(rb"head_bytes \d+", b"head_bytes " + number, content[:512].rstrip(b"\0"))
        Path("file.h5").write_bytes(text.ljust(512, b"\0") + content[512:])

    return prepare


def to_size(size: int) -> Prepare:
    return lambda: Path("file.h5").write_bytes(Path("good.h5").read_bytes()[:size])


def moved(name: str, make: Callable[[h5py.File], object]) -> Prepare:
    def change(file: h5py.File) -> None:
        del file[name]
        made = make(file)
        if made is not None:
            file[name] = made

    return rewrite(change)


FILES = [
    Bad("missing", "none.h5", r"^none\.h5 is not a file\.$"),
    Bad("missing, its partial there", "file.h5", r"^file\.h5 is not a file\. Its \.partial exists\. Finish that",
        copies("file.h5.partial")),
    Bad("a folder", "teacher", r"^teacher is not a file\.$"),
    Bad("an empty name", [""], r" is not a file\.$"),
    Bad("a null character", ["a\0b"], r" is not a file\.$"),
    Bad("a long name", [LONG], r" is not a file\.$"),
    Bad("bytes that are no UTF-8", ["\udcff.h5"], r" is not a file\.$"),
    Bad("a device", "/dev/zero", r"^/dev/zero is not a file\.$"),
    Bad("a pipe", "pipe", r"^pipe is not a file\.$", lambda: os.mkfifo("pipe")),
    Bad("a link to itself", "loop", r"^loop is not a file\.$", lambda: Path("loop").symlink_to("loop")),
    Bad("empty", "file.h5", NOT_OURS, writes("file.h5", "")),
    Bad("text", "rows.jsonl", r"^rows\.jsonl is not a logitgen file"),
    Bad("a HDF5 file", "file.h5", NOT_OURS, lambda: h5py.File("file.h5", "w").close()),
    Bad("a HDF5 file with a user block", "file.h5", NOT_OURS,
        lambda: h5py.File("file.h5", "w", userblock_size=512).close()),
    Bad("a HDF5 copy of a good one", "file.h5", NOT_OURS, lambda: h5py.File("file.h5", "w").copy(
        h5py.File("good.h5", "r", locking=False)["done"], "done")),
    Bad("of the future", "file.h5", r"has format version 9, this logitgen reads versions up to 1\. Update logitgen\.",
        replaced(b"version 1\n", b"version 9\n")),
    Bad("of the far future", "file.h5", rf"has format version {'9' * 9}|is not a logitgen file",
        lambda: patched(0, Path("good.h5").read_bytes()[:512].replace(b"n 1\n", b"n 999999999\n")[:512])()),
    Bad("of version 0", "file.h5", r"^file\.h5 (is damaged|has format version 0|is not a logitgen file)",
        replaced(b"version 1\n", b"version 0\n")),
    Bad("with another checksum", "file.h5", r"is damaged: its head does not match its checksum\. Copy",
        lambda: patched(Path("good.h5").read_bytes().index(b"head_sha256 ") + 12, b"0123456789")()),
    Bad("with a head of a gigabyte", "file.h5", r"^file\.h5 is (truncated|damaged)",
        with_head_bytes(b"999999999")),
    Bad("with a head of nothing", "file.h5", r"^file\.h5 is (truncated|damaged|not a logitgen file)",
        with_head_bytes(b"0")),
    # Made by someone who knows how, the checksum right.
    Bad("an attribute missing", "file.h5", r"damaged: attribute teacher is missing or not str",
        without_attribute("teacher")),
    Bad("an attribute of another kind", "file.h5", r"damaged: attribute vocab_size is missing or not int",
        set_attribute("vocab_size", 1.5)),
    Bad("an attribute of variable length", "file.h5", r"damaged: attribute format is missing or not str",
        set_variable_text("format", "logitgen")),
    Bad("an attribute that is no UTF-8", "file.h5", r"damaged: .*can't decode byte 0xff.*\. Copy it again\.$",
        set_attribute("teacher", np.bytes_(b"\xff"))),
    Bad("an attribute too many", "file.h5", r"damaged: the format has no attribute 'more'",
        set_attribute("more", 1)),
    Bad("another format", "file.h5", r"damaged: attributes format and version do not match",
        set_attribute("format", "other")),
    Bad("another version", "file.h5", r"damaged: attributes format and version do not match",
        set_attribute("version", 2)),
    Bad("another capture", "file.h5", r"damaged: attributes capture, vocab_size and top_k",
        set_attribute("capture", "no")),
    Bad("more kept than there is", "file.h5", r"damaged: attributes capture, vocab_size", set_attribute("top_k", 999)),
    Bad("another number kept", "file.h5", r"damaged: kept_ids is uint16\[\d+, 3\], expected",
        set_attribute("top_k", 4)),
    Bad("a huge vocabulary", "file.h5", r"damaged: .*expected uint32", set_attribute("vocab_size", 2**62)),
    Bad("settings cut off", "file.h5", r"damaged: attribute settings is not a JSON object",
        set_attribute("settings", "{")),
    Bad("settings in a list", "file.h5", r"damaged: attribute settings is not a JSON object",
        set_attribute("settings", "[1]")),
    Bad("settings without names", "file.h5", r"damaged: its settings lack teacher\.$",
        set_attribute("settings", "{}")),
    Bad("settings nested deep", "file.h5", r"damaged: attribute settings is not a JSON object",
        set_attribute("settings", "[" * 9000)),
    Bad("a dtype nobody knows", "file.h5", r"damaged: .*teacher_dtype", set_attribute("teacher_dtype", "int3")),
    Bad("a dataset missing", "file.h5", r"damaged: dataset crc32 is missing", moved("crc32", lambda file: None)),
    Bad("a dataset that is a group", "file.h5", r"damaged: dataset done is missing",
        moved("done", lambda file: (file.create_group("done"), None)[1])),
    Bad("a dataset in another file", "file.h5", r"damaged: dataset done is missing",
        moved("done", lambda file: h5py.ExternalLink("good.h5", "done"))),
    Bad("a dataset that is a soft link", "file.h5", r"damaged: dataset done is missing",
        moved("done", lambda file: h5py.SoftLink("/crc32"))),
    Bad("a dataset of text", "file.h5", r"damaged: done is .*, expected uint8",
        moved("done", lambda file: (file.create_dataset("done", data=["a"] * 8), None)[1])),
    Bad("a dataset compressed", "file.h5", r"done is no longer contiguous\. Use the original\.|lies outside",
        moved("done", lambda file: (file.create_dataset("done", data=np.ones(8, "u1"), compression="gzip"), None)[1])),
    Bad("a dataset without rows", "file.h5", r"damaged: done is uint8\[0\], expected one axis, not empty",
        moved("done", lambda file: np.zeros(0, "u1"))),
    Bad("a dataset in another place", "file.h5", r"was rewritten by another program: done is no longer contiguous",
        moved("done", lambda file: (file.create_dataset("done", (8,), "u1", external="rows.jsonl"), None)[1])),
]  # fmt: skip
OPENERS: dict[str, Callable[[str], object]] = {
    "LogitsFile": LogitsFile,
    "LogitsDataset": LogitsDataset,
    "LogitsFile of a partial": lambda name: LogitsFile(name, partial=True),
}


@table(*FILES)
def test_bad_files(case: Bad, work: Path, capfd: Any) -> None:
    case.prepare()
    found, (name,) = snapshot(work), case.arguments
    for opener, opens in OPENERS.items():
        with pytest.raises(FormatError) as raised:
            pytest.fail(f"{opener} opened it: {opens(name)}")
        message = str(raised.value).replace(f"{work}/", "")  # a dataset's path is absolute
        assert raised.value.exit_status == 2
        check_message(message, case.message, [name], capfd)
    for command in ("inspect", "verify"):
        assert main([command, name]) == 2
        shown = capfd.readouterr()
        assert (shown.out, shown.err.count("\n")) == ("", 1), shown
    assert snapshot(work) == found


def status_and_errors(words: list[str]) -> tuple[int, str]:
    """Run `python -m logitgen` in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main(words)
    return status, err.getvalue()


def places_to_cut(size: int) -> list[int]:
    return sorted({0, 1, 16, 63, 511, 512, 513, 520, 600, 1000, 2048, *range(0, size, max(1, size // 60)), size - 1})


def test_a_good_file_cut_off_anywhere_is_refused(work: Path, good: bytes) -> None:
    for size in places_to_cut(len(good)):
        to_size(size)()
        with pytest.raises(FormatError, match=TRUNCATED):
            LogitsFile("file.h5", partial=True)
        for command in ("inspect", "verify"):
            status, errors = status_and_errors([command, "file.h5"])
            assert (status, errors.count("\n")) == (2, 1), (size, errors)


def test_a_byte_changed_anywhere_is_found(work: Path, good: bytes) -> None:
    rng = np.random.default_rng(0)
    for place in [*range(0, 512, 7), *rng.integers(512, len(good), 250)]:
        patched(int(place), bytes([good[place] ^ (1 + int(rng.integers(255)))]))()
        status, errors = status_and_errors(["verify", "file.h5"])
        assert status in (1, 2), place
        assert errors.count("\n") == (status == 2), (place, errors)


def test_a_damaged_row_can_be_looked_at_or_is_refused(work: Path, good: bytes) -> None:
    """Whatever stands in the rows, `inspect` shows it or says in one line that it is damaged."""
    file = LogitsFile("good.h5")
    rng = np.random.default_rng(1)
    places = header.read(Path("good.h5")).places
    for name, values in file.arrays.items():
        for _ in range(6):
            place = places[name] + int(rng.integers(values.nbytes))
            patched(place, bytes([int(rng.integers(256))]))()
            for words in ([], ["--row=3"], ["--row=4", "--json"]):
                status, errors = status_and_errors(["inspect", "file.h5", *words])
                assert status in (0, 2), (name, place, words)
                assert errors.count("\n") == (status == 2), (name, errors)


@table(
    Bad("no command", "", r"(?i)required: COMMAND\. See --help\."),
    Bad("an unknown command", "show good.h5", r"invalid choice: 'show'.*inspect.*verify.*See --help\."),
    Bad("no file", "inspect", r"required: file\. See --help\."),
    Bad("two files", "verify good.h5 good.h5", r"(?i)unrecognized arguments: good\.h5\. See --help\."),
    Bad("an unknown option", "inspect good.h5 --nope", r"(?i)unrecognized arguments: --nope\. See --help\."),
    Bad("an abbreviated option", "inspect good.h5 --pos=3", r"(?i)unrecognized arguments: --pos=3\. See --help\."),
    Bad("a row in words", "inspect good.h5 --row=first", r"--row: invalid int value: 'first'\. See --help\."),
    Bad("a row beyond the end", "inspect good.h5 --row=8", r"^--row must be between 0 and 7, got 8\.$"),
    Bad("a row before the start", "inspect good.h5 --row=-9", r"^--row must be between 0 and 7, got -9\.$"),
    Bad("a row of 30 digits", f"inspect good.h5 --row={10**30}", rf"^--row must be between 0 and 7, got {10**30}\.$"),
    Bad("positions without a row", "inspect good.h5 --positions=3", r"^--positions and --tokenizer need --row"),
    Bad("no positions", "inspect good.h5 --row=3 --positions=0", r"^--positions must be at least 1, got 0\.$"),
    Bad("negative positions", "inspect good.h5 --row=3 --positions=-2", r"^--positions must be at least 1, got -2\.$"),
    Bad("a tokenizer without a row", "inspect good.h5 --tokenizer=teacher", r"^--positions and --tokenizer need --row"),
    Bad("no such tokenizer", "inspect good.h5 --row=3 --tokenizer=./none",
        r"^--tokenizer \./none cannot be loaded\. Give"),
    Bad("a tokenizer without a name", "inspect good.h5 --row=3 --tokenizer=",
        r"^--tokenizer .*(empty|cannot be loaded)"),
    Bad("rows without a teacher", "verify good.h5 --rows=3",
        r"^--rows and --trust_remote_code need --teacher"),
    Bad("trust without a teacher", "verify good.h5 --trust_remote_code",
        r"^--rows and --trust_remote_code need --teacher"),
    Bad("no rows", "verify good.h5 --teacher=teacher --rows=0", r"^--rows must be at least 1, got 0\.$"),
    Bad("negative rows", "verify good.h5 --teacher=teacher --rows=-1", r"^--rows must be at least 1, got -1\.$"),
    Bad("rows in words", "verify good.h5 --teacher --rows=all", r"--rows: invalid int value: 'all'\. See --help\."),
    Bad("no such teacher", "verify good.h5 --teacher=./none",
        r"^--teacher \./none does not exist\. Give a folder or a"),
    Bad("the file as teacher", "verify good.h5 --teacher=good.h5",
        r"^--teacher good\.h5 (cannot be loaded|is not a folder)"),
    Bad("the file's teacher moved", "verify good.h5 --teacher", r"^--teacher teacher (cannot be loaded|does not exist)",
        lambda: shutil.move("teacher", "moved")),
    Bad("the file's weights lost", "verify good.h5 --teacher", TEACHER_CANNOT, without("model.safetensors")),
    Bad("a teacher of another vocabulary", "verify good.h5 --teacher=teacher",
        r"^--teacher teacher must have the file's vocabulary of 384 tokens, got 9\. "
        r"Give the file's teacher\.", change_json("config.json", vocab_size=9)),
    Bad("a partial to inspect", "inspect file.h5",
        r"^file\.h5 is not complete: 1 of 8 rows are missing\. Finish the run\.",
        lambda: patched(header.read(Path("good.h5")).places["done"] + 2, b"\0")()),
)  # fmt: skip
def test_bad_commands(case: Bad, work: Path, capfd: Any) -> None:
    case.prepare()
    found = snapshot(work)
    assert main(case.arguments) == 2
    shown = capfd.readouterr()
    line = shown.err.removeprefix("error: ").removesuffix("\n")
    assert shown.err.count("\n") == 1, shown.err
    assert shown.out == ""
    assert snapshot(work) == found
    check_message(line, case.message, case.arguments, capfd)


# Any bytes at all.

MOST_MEGABYTES = 100
bytes_and_places = st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=8)


def memory_megabytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // (1024 if sys.platform == "linux" else 2**20)


@pytest.fixture
def memory() -> Iterator[None]:
    before = memory_megabytes()
    yield
    assert memory_megabytes() - before < MOST_MEGABYTES


def open_and_verify(content: bytes, folder: Path) -> int:
    """Give bytes to the reader and to `verify`, and return the exit status of the latter."""
    path = folder / "any.h5"
    path.write_bytes(content)
    try:
        LogitsFile(path, partial=True)
        refused = ""
    except FormatError as error:
        refused = str(error)
    status, errors = status_and_errors(["verify", str(path)])
    assert (status == 2) == bool(refused)
    assert errors == (f"error: {refused}\n" if refused else "")
    return status


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("any")


@pytest.mark.usefixtures("memory")
def test_any_bytes_are_refused(folder: Path) -> None:
    @settings(max_examples=60, deadline=60_000)
    @given(st.binary(max_size=2000))
    @example(
        b"logitgen file, format version 1\nHDF5 from byte 512 on\nhead_bytes 512\nhead_sha256 " + b"0" * 64 + b"\n"
    )
    @example(b"\x89HDF\r\n\x1a\n" + bytes(2000))
    def check(content: bytes) -> None:
        assert open_and_verify(content, folder) == 2

    check()


@pytest.mark.usefixtures("memory")
def test_any_first_bytes_before_a_good_rest_are_refused_or_are_the_good_ones(folder: Path, good: bytes) -> None:
    numbers = st.integers(0, 10**9).map(str) | st.sampled_from(["1", "512", "0", "01", "-1", "\u0661"])

    @settings(max_examples=60, deadline=60_000)
    @given(numbers, numbers, st.text("0123456789abcdef", min_size=64, max_size=64))
    def check(version: str, size: str, digest: str) -> None:
        text = header._TEXT.format(version=version, size=size, digest=digest).encode()
        assert open_and_verify(text.ljust(512, b"\0") + good[512:], folder) == 2

    check()


@pytest.mark.usefixtures("memory")
def test_any_change_of_a_good_file_is_found(folder: Path, good: bytes) -> None:
    @settings(max_examples=100, deadline=60_000)
    @given(bytes_and_places)
    def check(changes: list[tuple[float, int]]) -> None:
        content = bytearray(good)
        for place, value in changes:
            content[int(place * len(good))] = value
        assert (open_and_verify(bytes(content), folder) == 0) == (content == good)

    check()


@pytest.mark.usefixtures("memory")
def test_any_piece_taken_out_of_a_good_file_or_put_into_it_is_found(folder: Path, good: bytes) -> None:
    @settings(max_examples=60, deadline=60_000)
    @given(st.floats(0, 1, exclude_max=True), st.integers(1, 3000), st.binary(max_size=1))
    def check(place: float, size: int, filler: bytes) -> None:
        at = int(place * len(good))
        content = good[:at] + filler * size + (good[at:] if filler else good[at + size :])
        assert (open_and_verify(content, folder) == 0) == (content == good)

    check()


# The plan, for rows, budgets and ranks of any kind.

row_lengths = st.lists(st.integers(0, 60) | st.integers(0, 2**31 - 1), min_size=1, max_size=60).filter(any)
budgets = st.integers(1, 250) | st.integers(1, 2**40)
switches = st.none() | st.integers(1, 80)


@settings(max_examples=150, deadline=None)
@given(row_lengths, budgets, switches, st.data())
def test_any_plan_covers_what_is_not_done_once_and_within_the_budget(
    lengths: list[int], batch_tokens: int, switch: int | None, data: st.DataObject
) -> None:
    plan = Plan(np.array(lengths, dtype=np.int32), batch_tokens, switch)
    rows = [plan.rows(batch).tolist() for batch in range(plan.num_batches)]
    assert sorted(chain.from_iterable(rows)) == [row for row, length in enumerate(lengths) if length]
    for batch in rows:
        longest = max(lengths[row] for row in batch)
        assert len(batch) == 1 or len(batch) * longest <= batch_tokens
        assert switch is None or len({lengths[row] > switch for row in batch}) == 1
    done = data.draw(st.lists(st.booleans(), min_size=len(lengths), max_size=len(lengths)))
    pending = plan.pending(np.array(done)).tolist()
    assert pending == [number for number, batch in enumerate(rows) if not all(done[row] for row in batch)]


@settings(max_examples=100, deadline=None)
@given(row_lengths, budgets, st.integers(1, 100))
def test_the_shares_of_any_number_of_ranks_partition_the_batches(
    lengths: list[int], batch_tokens: int, num_ranks: int
) -> None:
    plan = Plan(np.array(lengths, dtype=np.int32), batch_tokens)
    shares = [share.tolist() for share in plan.shares(np.arange(plan.num_batches), num_ranks)]
    assert len(shares) == num_ranks
    assert sorted(chain.from_iterable(shares)) == list(range(plan.num_batches))
    assert all(part == sorted(part) for part in shares)
    loads = [sum(int(plan.padded_tokens[batch]) for batch in part) for part in shares]
    assert max(loads) - min(loads) <= plan.padded_tokens.max()
