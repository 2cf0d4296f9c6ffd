"""The options: what there is, where they come from and what is refused."""

import dataclasses
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT

from logitgen.config import Config
from logitgen.errors import UsageError
from logitgen.options import parse_config

REQUIRED = ["--teacher=m", "--dataset=d", "--output=o.h5"]
DEFAULTS: dict[str, Any] = {
    "teacher": "m",
    "dataset": "d",
    "output": "o.h5",
    "revision": None,
    "teacher_gguf": None,
    "adapter": None,
    "dtype": "auto",
    "attn_implementation": None,
    "device_map": None,
    "tp_size": 1,
    "fsdp_size": 1,
    "dataset_config": None,
    "split": "train",
    "text_column": None,
    "messages_column": None,
    "chat_template": None,
    "chat_template_kwargs": None,
    "chat_template_date": None,
    "add_special_tokens": True,
    "append_eos": False,
    "max_length": None,
    "overflow": "truncate",
    "packing": False,
    "completion_only": False,
    "limit": None,
    "capture": "topk",
    "top_k": 64,
    "encoding": "plain",
    "layers": None,
    "max_bytes": None,
    "batch_tokens": 8192,
    "share_prefixes": True,
    "overwrite": False,
    "dry_run": False,
    "trust_remote_code": False,
    "rank_timeout": 1800,
    "log_dir": "logs",
    "seed": 0,
}
OTHERS: dict[str, Any] = {
    "teacher": "org/model",
    "dataset": "some/folder",
    "output": "else.h5",
    "revision": "main",
    "teacher_gguf": "q4.gguf",
    "adapter": "org/lora",
    "dtype": "bfloat16",
    "attn_implementation": "eager",
    "tp_size": 2,
    "fsdp_size": 4,
    "dataset_config": "en",
    "split": "train[:10%]",
    "text_column": "body",
    "chat_template": "chat.jinja",
    "chat_template_kwargs": '{"a": [1], "b": false}',
    "chat_template_date": "2026-01-31",
    "add_special_tokens": False,
    "append_eos": True,
    "max_length": 128,
    "overflow": "split",
    "completion_only": True,
    "limit": 10,
    "capture": "sample",
    "top_k": 5,
    "encoding": "packed16",
    "batch_tokens": 100,
    "share_prefixes": False,
    "overwrite": True,
    "dry_run": True,
    "trust_remote_code": True,
    "rank_timeout": 60,
    "log_dir": "my logs",
    "seed": 7,
}
"""Another value than the default for all but `messages_column`, `packing`, `device_map`, `layers` and `max_bytes`,
which others exclude."""


def options_file(folder: Path, content: str, name: str = "options.yaml") -> str:
    path = folder / name
    path.write_text(content, encoding="utf-8")
    return f"--config={path}"


def test_the_options_are_exactly_these(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        parse_config(["--help"])
    assert stopped.value.code == 0
    shown = re.findall(r"^  (?:-h, )?--([a-z_]+)", capsys.readouterr().out, re.MULTILINE)
    assert shown == [
        "help", "teacher", "dataset", "output", "revision", "teacher_gguf", "adapter", "dtype", "attn_implementation",
        "device_map", "tp_size", "fsdp_size", "dataset_config", "split", "text_column", "messages_column",
        "chat_template", "chat_template_kwargs", "chat_template_date", "add_special_tokens", "append_eos",
        "max_length", "overflow", "packing", "completion_only", "limit", "capture", "top_k", "encoding",
        "layers", "max_bytes", "batch_tokens", "share_prefixes", "overwrite", "dry_run", "trust_remote_code",
        "rank_timeout", "log_dir", "seed", "config",
    ]  # fmt: skip


def test_help_shows_the_percent_sign_of_a_slice(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_config(["--help"])
    assert "train[:1%]" in capsys.readouterr().out


@pytest.fixture(params=[80, 120])
def help_screen(request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> list[str]:
    """The lines of --help in a terminal of so many columns, none of which is longer."""
    monkeypatch.setenv("COLUMNS", str(request.param))
    with pytest.raises(SystemExit):
        parse_config(["--help"])
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= request.param
    return lines


def test_help_shows_the_options_in_groups(help_screen: list[str]) -> None:
    groups = list(dict.fromkeys(option.metadata["group"] for option in dataclasses.fields(Config)))
    assert groups == ["required", "teacher", "ranks", "rows", "what to keep", "run"]
    assert [line[:-1] for line in help_screen if re.match(r"\w.*:$", line)] == ["options", *groups, "example"]


def test_help_spells_an_option_once_and_shows_only_real_defaults(help_screen: list[str]) -> None:
    shown = " ".join(" ".join(help_screen).split())
    for option in dataclasses.fields(Config):
        assert shown.count(f" --{option.name} ") >= 1
        if "_" in option.name:
            assert f"--{option.name.replace('_', '-')}" not in shown
    assert "(default: None)" not in shown
    assert "(default: False)" not in shown
    values = [option.default for option in dataclasses.fields(Config) if not isinstance(option.default, bool)]
    defaults = [str(value) for value in values if value not in (None, dataclasses.MISSING)]
    assert re.findall(r"\(default: (.*?)\)", shown) == defaults


def test_the_example_of_help_is_a_command_that_parses(help_screen: list[str]) -> None:
    words = " ".join(help_screen[help_screen.index("example:") + 1 :]).replace("\\", "").split()
    assert words[:2] == ["accelerate", "launch"]
    assert (ROOT / words[words.index("--config_file") + 1]).is_file()
    assert parse_config(words[words.index("generate.py") + 1 :]).output == "ultrachat.h5"


def test_what_is_not_given_has_its_default() -> None:
    assert dataclasses.asdict(parse_config(REQUIRED)) == DEFAULTS


def test_every_option_is_taken_from_the_command_line_with_underscores() -> None:
    words = [f"--{name}={value}" for name, value in OTHERS.items()]
    assert dataclasses.asdict(parse_config(words)) == DEFAULTS | OTHERS


def test_every_option_is_taken_from_the_command_line_with_dashes() -> None:
    words = [word for name, value in OTHERS.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    assert dataclasses.asdict(parse_config(words)) == DEFAULTS | OTHERS


def test_every_option_is_taken_from_a_yaml_file(tmp_path: Path) -> None:
    assert dataclasses.asdict(parse_config([options_file(tmp_path, yaml.safe_dump(OTHERS))])) == DEFAULTS | OTHERS


@pytest.mark.parametrize("indent", [None, 2, "\t"])
def test_every_option_is_taken_from_a_json_file(tmp_path: Path, indent: int | str | None) -> None:
    words = [options_file(tmp_path, json.dumps(OTHERS, indent=indent), "options.json")]
    assert dataclasses.asdict(parse_config(words)) == DEFAULTS | OTHERS


def test_a_null_character_is_refused() -> None:
    with pytest.raises(UsageError, match="--log_dir must not hold a null character"):
        parse_config([*REQUIRED, "--log_dir=a\0b"])


@pytest.mark.parametrize("name", ["foo", "limit=3", "help", "config", "1"])
def test_an_options_file_may_only_name_options(tmp_path: Path, name: str) -> None:
    (tmp_path / "options.yaml").write_text(f'"{name}": 1\n')
    with pytest.raises(UsageError, match=rf"options.yaml: there is no option '{name}'"):
        parse_config([*REQUIRED, f"--config={tmp_path / 'options.yaml'}"])


def test_an_options_file_may_spell_names_with_dashes(tmp_path: Path) -> None:
    config = parse_config([*REQUIRED, options_file(tmp_path, "batch-tokens: 77\ncompletion-only: true\n")])
    assert (config.batch_tokens, config.completion_only) == (77, True)


def test_the_command_line_wins_over_the_file_wherever_it_stands(tmp_path: Path) -> None:
    file = options_file(tmp_path, "top_k: 5\nlimit: 3\npacking: true\nsplit: test\n")
    for words in (["--top-k=9", "--packing=false", file], [file, "--top_k", "9", "--packing", "no"]):
        config = parse_config([*REQUIRED, *words])
        assert (config.top_k, config.limit, config.packing, config.split) == (9, 3, False, "test")


def test_the_options_file_can_be_given_in_two_words(tmp_path: Path) -> None:
    path = options_file(tmp_path, "top_k: 5\n").removeprefix("--config=")
    assert parse_config(["--config", path, *REQUIRED]).top_k == 5


@pytest.mark.parametrize(
    ("written", "expected"),
    [("true", True), ("yes", True), ("Y", True), ("'1'", True), ("false", False), ("no", False), ("'false'", False)],
)
def test_a_switch_in_a_yaml_file_means_what_it_says(tmp_path: Path, written: str, expected: bool) -> None:
    assert parse_config([*REQUIRED, options_file(tmp_path, f"packing: {written}\n")]).packing is expected


def test_a_switch_on_the_command_line_needs_no_value() -> None:
    config = parse_config(["--packing", "--overwrite", *REQUIRED])
    assert (config.packing, config.overwrite, config.completion_only) == (True, True, False)


@pytest.mark.parametrize("suffix", ["yaml", "json"])
def test_variables_of_the_chat_template_may_be_an_object_in_a_file(tmp_path: Path, suffix: str) -> None:
    content = '{"chat_template_kwargs": {"enable_thinking": false, "a": [1, "x"]}}'
    words = [*REQUIRED, options_file(tmp_path, content, f"options.{suffix}")]
    found = parse_config(words).chat_template_kwargs
    assert (
        found
        == parse_config(
            [*REQUIRED, '--chat_template_kwargs={"a": [1, "x"], "enable_thinking": false}']
        ).chat_template_kwargs
    )
    assert found == '{"a": [1, "x"], "enable_thinking": false}'


def test_an_object_that_json_has_no_words_for_is_refused(tmp_path: Path) -> None:
    file = options_file(tmp_path, "chat_template_kwargs:\n  day: 2026-01-31\n")
    with pytest.raises(UsageError, match=r"'chat_template_kwargs' must be an object as in JSON: .*date"):
        parse_config([*REQUIRED, file])


def test_null_in_a_file_leaves_the_default(tmp_path: Path) -> None:
    config = parse_config([*REQUIRED, options_file(tmp_path, "text_column: null\noverflow:\ntop_k: ~\n")])
    assert dataclasses.asdict(config) == DEFAULTS


@pytest.mark.parametrize("value", ["a b", "--x", "a=b", "train[:10%]+test", "two\nlines", "Grüße/模型"])
def test_a_text_arrives_from_a_file_as_it_stands_there(tmp_path: Path, value: str) -> None:
    words = [*REQUIRED, options_file(tmp_path, yaml.safe_dump({"split": value}))]
    assert parse_config(words).split == value


def test_an_unknown_option_on_the_command_line_is_named() -> None:
    with pytest.raises(UsageError, match="--nope"):
        parse_config([*REQUIRED, "--nope", "1"])


def test_a_stray_word_on_the_command_line_is_named() -> None:
    with pytest.raises(UsageError, match="stray"):
        parse_config([*REQUIRED, "stray"])


def test_an_abbreviated_option_is_refused_instead_of_guessed() -> None:
    with pytest.raises(UsageError, match="--batch"):
        parse_config([*REQUIRED, "--batch=3"])


def test_an_unknown_option_in_a_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="temperature"):
        parse_config([*REQUIRED, options_file(tmp_path, "temperature: 2\n")])


def test_missing_options_are_all_named() -> None:
    with pytest.raises(UsageError, match=r"required: --dataset, --output\. See --help for the options\.$"):
        parse_config(["--teacher=m"])


def test_options_that_are_in_the_file_are_not_missing(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"required: --output\. See --help"):
        parse_config([options_file(tmp_path, "teacher: m\ndataset: d\n")])


NOT_WHOLE = ["many", "3.5", "1e3", ""]


@pytest.mark.parametrize("name", ["max_length", "limit", "top_k", "rank_timeout", "seed"])
@pytest.mark.parametrize("value", NOT_WHOLE)
def test_a_number_must_be_a_whole_number(name: str, value: str) -> None:
    with pytest.raises(UsageError, match=f"--{name}.*: invalid int value: '{value}'. See --help"):
        parse_config([*REQUIRED, f"--{name}={value}"])


@pytest.mark.parametrize("value", [*NOT_WHOLE, "AUTO", " auto", "automatic", "nan", "inf"])
def test_a_token_budget_that_is_no_number_is_told_both_things_it_may_be(value: str) -> None:
    message = (
        rf"^Argument --batch_tokens/--batch-tokens: expected a whole number or auto, got '{re.escape(value)}'\. "
        r"See --help for the options\.$"
    )
    with pytest.raises(UsageError, match=message):
        parse_config([*REQUIRED, f"--batch_tokens={value}"])


@pytest.mark.parametrize("value", ["1" * 5000, "x" * 5000, "two\nlines"])
def test_a_token_budget_that_was_mistyped_gets_a_short_message(value: str) -> None:
    with pytest.raises(UsageError, match=r"--batch_tokens.*: expected a whole number or auto, got '") as raised:
        parse_config([*REQUIRED, f"--batch_tokens={value}"])
    assert len(str(raised.value)) < 400


@pytest.mark.parametrize("value", [0, -5, -sys.maxsize])
@pytest.mark.parametrize("in_a_file", [False, True])
def test_a_token_budget_below_1_is_refused(tmp_path: Path, value: int, in_a_file: bool) -> None:
    word = options_file(tmp_path, f"batch_tokens: {value}\n") if in_a_file else f"--batch_tokens={value}"
    with pytest.raises(UsageError, match=rf"^--batch_tokens must be at least 1, got {value}\.$"):
        parse_config([*REQUIRED, word])


@pytest.mark.parametrize("value", [1, 2048, 10**12])
def test_a_token_budget_that_is_a_number_is_that_number(value: int) -> None:
    config = parse_config([*REQUIRED, f"--batch-tokens={value}"])
    assert config.batch_tokens == value
    assert not config.batch_tokens.is_auto
    assert json.loads(config.settings_json())["batch_tokens"] == value


@pytest.mark.parametrize("written", ["batch_tokens: auto\n", 'batch-tokens: "auto"\n', "--batch_tokens=auto"])
def test_a_token_budget_may_be_left_to_the_memory_there_is(tmp_path: Path, written: str) -> None:
    word = written if written.startswith("--") else options_file(tmp_path, written)
    assert parse_config([*REQUIRED, word]).batch_tokens.is_auto
    assert not parse_config([*REQUIRED, word, "--batch_tokens=300"]).batch_tokens.is_auto


def test_a_budget_that_was_found_gives_the_settings_of_one_that_was_typed() -> None:
    words = [*REQUIRED, "--top_k=5"]
    auto, typed = (parse_config([*words, f"--batch_tokens={value}"]) for value in ("auto", "512"))
    found = auto.with_found({"batch_tokens": 512})
    assert found == typed
    assert found.settings_json() == typed.settings_json()
    assert not found.batch_tokens.is_auto
    assert auto.batch_tokens.is_auto  # as it was


@pytest.mark.parametrize(
    ("written", "size_bytes"),
    [
        ("200GB", 200 * 10**9),
        ("1.5TB", 1_500_000_000_000),
        ("800MiB", 800 * 1_048_576),
        ("0.5 kb", 500),
        ("2KiB", 2048),
        ("3GiB", 3 * 2**30),
        ("1TiB", 2**40),
        ("7B", 7),
        ("123456789", 123_456_789),
        ("1.1TB", 1_100_000_000_000),
    ],
)
@pytest.mark.parametrize("in_a_file", [False, True])
def test_a_size_is_read_as_people_write_it(tmp_path: Path, written: str, size_bytes: int, in_a_file: bool) -> None:
    word = options_file(tmp_path, f"max_bytes: {written}\n") if in_a_file else f"--max-bytes={written}"
    config = parse_config([*REQUIRED, word])
    assert config.max_bytes == size_bytes
    assert config.encoding == "packed"
    assert "max_bytes" not in config.settings
    assert config.open_settings == ("top_k",)


@pytest.mark.parametrize("value", ["200G", "many", "-5GB", "1e9", "1,000", "5 PB", "GB", "1.GB", "", "5GBB", "x" * 999])
def test_a_size_without_a_clear_meaning_is_refused_in_one_line(value: str) -> None:
    message = r"^Argument --max_bytes/--max-bytes: expected a size such as 200GB, 800MiB or plain bytes, got '.*'\. See"
    with pytest.raises(UsageError, match=message) as raised:
        parse_config([*REQUIRED, f"--max_bytes={value}"])
    assert len(str(raised.value)) < 400


def test_a_size_of_nothing_is_refused() -> None:
    with pytest.raises(UsageError, match=r"^--max_bytes must be at least 1, got 0\.$"):
        parse_config([*REQUIRED, "--max_bytes=0.3B"])


@pytest.mark.parametrize("word", ["--top_k=64", "--top-k=3", "file"])
def test_a_size_and_a_k_exclude_each_other(tmp_path: Path, word: str) -> None:
    word = options_file(tmp_path, "top_k: 64\n") if word == "file" else word
    message = r"^--max_bytes finds the largest --top_k that fits\. Leave one of the two out\.$"
    with pytest.raises(UsageError, match=message):
        parse_config([*REQUIRED, word, "--max_bytes=1GB"])
    with pytest.raises(UsageError, match=message):
        parse_config([*REQUIRED, "--max_bytes", "1GB", "--top_k", "64"])


@pytest.mark.parametrize("capture", ["sample", "hidden", "full"])
def test_a_size_chooses_no_other_capture_than_the_top_k(capture: str) -> None:
    message = rf"^--max_bytes chooses the k of --capture topk, got --capture {capture}\. Leave one of the two out\.$"
    with pytest.raises(UsageError, match=message):
        parse_config([*REQUIRED, f"--capture={capture}", "--max_bytes=1GB"])


@pytest.mark.parametrize("encoding", ["plain", "packed", "packed16"])
def test_an_encoding_that_was_typed_stays_beside_a_size(encoding: str) -> None:
    assert parse_config([*REQUIRED, "--max_bytes=1GB", f"--encoding={encoding}"]).encoding == encoding


def test_a_k_that_was_found_gives_the_settings_of_one_that_was_typed() -> None:
    found = parse_config([*REQUIRED, "--max_bytes=1GB"]).with_found({"top_k": 37})
    typed = parse_config([*REQUIRED, "--top_k=37", "--encoding=packed"])
    assert found.settings_json() == typed.settings_json()
    assert typed.open_settings == ()


def test_a_number_in_a_file_must_be_a_whole_number_too(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"--top_k.*: invalid int value: '3\.5'"):
        parse_config([*REQUIRED, options_file(tmp_path, "top_k: 3.5\n")])


@pytest.mark.parametrize("name", ["packing", "completion_only", "overwrite", "dry_run", "trust_remote_code"])
def test_a_switch_takes_only_yes_or_no(name: str) -> None:
    with pytest.raises(UsageError, match=f"--{name}.*got maybe but expected one of yes/no, true/false"):
        parse_config([*REQUIRED, f"--{name}=maybe"])


@pytest.mark.parametrize(
    ("name", "choices"),
    [
        ("dtype", ["auto", "float32", "bfloat16", "float16"]),
        ("overflow", ["truncate", "split", "error"]),
        ("capture", ["topk", "full"]),
    ],
)
def test_a_wrong_choice_is_told_what_there_is(name: str, choices: list[str]) -> None:
    for choice in choices:
        assert getattr(parse_config([*REQUIRED, f"--{name}={choice}"]), name) == choice
    with pytest.raises(UsageError, match=rf"--{name}: invalid choice: 'other'.*{'.*'.join(choices)}"):
        parse_config([*REQUIRED, f"--{name}=other"])


@pytest.mark.parametrize(
    ("name", "least"),
    [("max_length", 2), ("limit", 1), ("top_k", 1), ("batch_tokens", 1), ("rank_timeout", 1), ("seed", 0)],
)
def test_a_number_below_its_bound_is_refused_with_the_bound(name: str, least: int) -> None:
    assert getattr(parse_config([*REQUIRED, f"--{name}={least}"]), name) == least
    with pytest.raises(UsageError, match=rf"^--{name} must be at least {least}, got {least - 1}\.$"):
        parse_config([*REQUIRED, f"--{name}={least - 1}"])


def test_a_seed_that_numpy_cannot_take_is_refused() -> None:
    assert parse_config([*REQUIRED, f"--seed={2**32 - 1}"]).seed == 2**32 - 1
    with pytest.raises(UsageError, match=r"--seed.*4294967296"):
        parse_config([*REQUIRED, f"--seed={2**32}"])


@pytest.mark.parametrize("name", ["teacher", "dataset", "output", "split", "log_dir"])
def test_an_empty_text_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match=f"^--{name} must not be empty"):
        parse_config([*REQUIRED, f"--{name}="])


@pytest.mark.parametrize("overflow", ["split", "error"])
def test_packing_excludes_another_overflow_than_the_default(overflow: str) -> None:
    message = rf"^--packing .* --overflow {overflow} has no meaning with it\. Leave one of the two out\.$"
    with pytest.raises(UsageError, match=message):
        parse_config([*REQUIRED, "--packing", f"--overflow={overflow}"])
    assert parse_config([*REQUIRED, "--packing", "--overflow=truncate"]).packing


def test_an_options_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"--config .*none\.yaml cannot be read: .*No such file"):
        parse_config([*REQUIRED, f"--config={tmp_path / 'none.yaml'}"])


def test_a_folder_is_no_options_file(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"--config .* cannot be read: .*Is a directory"):
        parse_config([*REQUIRED, f"--config={tmp_path}"])


def test_an_options_file_that_is_not_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "options.yaml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match=r"--config .*options\.yaml cannot be read: .*can't decode byte 0xff"):
        parse_config([*REQUIRED, f"--config={path}"])


def test_broken_yaml_is_refused_in_one_line_that_says_where(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"--config .* cannot be read: .*line 2, column 9") as raised:
        parse_config([*REQUIRED, options_file(tmp_path, "top_k: 5\nsplit: a: b\n")])
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("content", "kind"),
    [("- top_k\n- 5\n", "a sequence"), ("top_k\n", "a scalar"), ("", "nothing"), ("5\n", "a scalar")],
)
def test_an_options_file_must_hold_names_and_values(tmp_path: Path, content: str, kind: str) -> None:
    with pytest.raises(UsageError, match=f"--config .* must hold options as 'name: value' lines, got {kind}"):
        parse_config([*REQUIRED, options_file(tmp_path, content)])


@pytest.mark.parametrize(("value", "kind"), [("[1, 2]", "a sequence"), ("{a: 1}", "a mapping")])
def test_a_nested_value_in_a_file_is_refused_by_name(tmp_path: Path, value: str, kind: str) -> None:
    with pytest.raises(UsageError, match=rf"--config .*: 'top_k' must be a single value, got {kind}\."):
        parse_config([*REQUIRED, options_file(tmp_path, f"top_k: {value}\n")])


@pytest.mark.parametrize("value", ["0123", "1_000", "2024-01-01", "1e3", "on", "0x10", "12:30:45", "~user"])
def test_a_text_in_a_yaml_file_is_not_taken_for_something_else(tmp_path: Path, value: str) -> None:
    assert parse_config([*REQUIRED, options_file(tmp_path, f"revision: {value}\n")]).revision == value


def test_a_switch_in_a_yaml_file_takes_only_yes_or_no(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"--packing: .*got on but expected one of yes/no, true/false"):
        parse_config([*REQUIRED, options_file(tmp_path, "packing: on\n")])


@pytest.mark.parametrize("again", ["top_k: 6", "top-k: 6", "top_k: null"])
def test_an_option_that_is_in_a_file_twice_is_refused(tmp_path: Path, again: str) -> None:
    name = again.partition(":")[0]
    with pytest.raises(UsageError, match=rf"--config .*options\.yaml: '{name}' is there twice\. Leave one out\.$"):
        parse_config([*REQUIRED, options_file(tmp_path, f"top_k: 5\n{again}\n")])


@pytest.mark.parametrize(("name", "kind"), [("[top_k, limit]", "a sequence"), ("{a: 1}", "a mapping")])
def test_a_name_in_a_file_must_be_a_word(tmp_path: Path, name: str, kind: str) -> None:
    message = rf"--config .*options\.yaml: the name of an option must be a word, got {kind}\.$"
    with pytest.raises(UsageError, match=message):
        parse_config([*REQUIRED, options_file(tmp_path, f"? {name}\n: 5\n")])


def test_yaml_that_would_make_an_object_makes_none(tmp_path: Path) -> None:
    words = [*REQUIRED, options_file(tmp_path, f"split: !!python/object/apply:os.mkdir [{tmp_path / 'made'}]\n")]
    with pytest.raises(UsageError, match=r"'split' must be a single value, got a sequence\."):
        parse_config(words)
    assert not (tmp_path / "made").exists()


def test_an_endless_options_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"--config .* cannot be read: it is too large for a file of options$"):
        parse_config([*REQUIRED, options_file(tmp_path, "# " + "x" * 70_000)])


def test_only_one_options_file_can_be_given(tmp_path: Path) -> None:
    first, second = options_file(tmp_path, "top_k: 5\n"), options_file(tmp_path, "limit: 5\n", "more.yaml")
    message = r"^--config can be given once, got .*/options\.yaml and .*/more\.yaml\. Join the files\.$"
    with pytest.raises(UsageError, match=message):
        parse_config([*REQUIRED, first, second])


def test_a_very_long_mistake_is_not_repeated_whole() -> None:
    with pytest.raises(UsageError, match=r"^Argument --top_k/--top-k: invalid int value: 'xxx.*See --help") as caught:
        parse_config([*REQUIRED, "--top_k=" + "x" * 5_000])
    assert len(str(caught.value)) < 400


def test_config_without_a_file_is_refused() -> None:
    with pytest.raises(UsageError, match="--config: expected one argument"):
        parse_config([*REQUIRED, "--config"])


def test_the_options_cannot_be_changed_later() -> None:
    config = parse_config(REQUIRED)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.top_k = 3  # type: ignore[misc]


def test_only_top_k_capture_keeps_a_choice_of_tokens() -> None:
    assert parse_config([*REQUIRED, "--top_k=5"]).kept == 5
    assert parse_config([*REQUIRED, "--top_k=5", "--capture=sample"]).kept == 5
    assert parse_config([*REQUIRED, "--top_k=5", "--capture=full"]).kept == 0


@pytest.mark.parametrize("encoding", ["packed", "packed16"])
def test_what_has_no_kept_ids_cannot_be_packed(encoding: str) -> None:
    assert parse_config([*REQUIRED, f"--encoding={encoding}"]).encoding == encoding
    kinds = {"packed": "topk, sample and hidden", "packed16": "topk and sample"}[encoding]
    message = rf"^--encoding {encoding} is for --capture {kinds}, got --capture full\. Leave one of the two out\.$"
    with pytest.raises(UsageError, match=message):
        parse_config([*REQUIRED, f"--encoding={encoding}", "--capture=full"])


def test_hidden_states_are_packed_with_8_bits_alone() -> None:
    assert parse_config([*REQUIRED, "--encoding=packed", "--capture=hidden"]).encoding == "packed"
    message = (
        r"^--encoding packed16 is for --capture topk and sample, got --capture hidden\. Hidden states have no "
        r"log-probs to keep 16 bits of: leave it out, or choose --encoding packed\.$"
    )
    with pytest.raises(UsageError, match=message):
        parse_config([*REQUIRED, "--encoding=packed16", "--capture=hidden"])


HIDDEN = [*REQUIRED, "--capture=hidden"]


@pytest.mark.parametrize(
    ("text", "expected", "numbers"),
    [("2,16,30", "2,16,30", (2, 16, 30)), (" 30 , 2", "2,30", (2, 30)), ("0", "0", (0,)), ("07", "7", (7,))],
)
def test_layers_are_numbers_in_ascending_order(text: str, expected: str, numbers: tuple[int, ...]) -> None:
    config = parse_config([*HIDDEN, f"--layers={text}"])
    assert config.layers == expected
    assert config.layer_numbers == numbers
    assert parse_config(HIDDEN).layer_numbers == ()


@pytest.mark.parametrize("text", ["", "two", "1,", ",1", "-1", "1.5", "1 2", "²", "1;2", "1234567"])
def test_layers_that_are_no_numbers_are_refused(text: str) -> None:
    message = rf"^Argument --layers: expected numbers of layers from 0 on, such as 2,16,30, got '{re.escape(text)}'\."
    with pytest.raises(UsageError, match=message):
        parse_config([*HIDDEN, f"--layers={text}"])


def test_layers_that_are_named_twice_are_refused() -> None:
    with pytest.raises(UsageError, match=r"^Argument --layers: expected every layer once, got '3,2,03'\."):
        parse_config([*HIDDEN, "--layers=3,2,03"])


@pytest.mark.parametrize("capture", ["topk", "sample", "full"])
def test_layers_are_for_hidden_states_alone(capture: str) -> None:
    message = rf"^--layers keeps more hidden states with --capture hidden, got --capture {capture}\. Leave one of the"
    with pytest.raises(UsageError, match=message):
        parse_config([*REQUIRED, f"--capture={capture}", "--layers=2"])


HOW_TO_RUN = (
    "output",
    "overwrite",
    "dry_run",
    "rank_timeout",
    "log_dir",
    "fsdp_size",
    "chat_template",
    "chat_template_date",
)


def test_the_settings_leave_out_how_to_run_and_where_to_leave_things() -> None:
    expected = {name: value for name, value in OTHERS.items() if name not in HOW_TO_RUN}
    assert "device_map" not in parse_config([*REQUIRED, "--device_map=auto"]).settings
    assert Config(**OTHERS).settings == expected | {"packing": False, "messages_column": None, "layers": None}


def test_settings_are_equal_text_if_and_only_if_they_are_equal() -> None:
    first = parse_config(["--top_k=5", *REQUIRED])
    same = parse_config(["--output=p.h5", "--dataset=d", "--teacher=m", "--top-k=5", "--overwrite", "--log_dir=x"])
    assert first.settings_json() == same.settings_json()
    for name in HOW_TO_RUN:
        config = parse_config(["--top_k=5", *REQUIRED, f"--{name}={OTHERS[name]}"])
        assert getattr(config, name) == OTHERS[name]
        assert config.settings_json() == first.settings_json()
    assert json.loads(first.settings_json()) == first.settings
    for word in ("--top_k=6", "--split=test", "--seed=1", "--packing", "--text_column=body"):
        assert parse_config(["--top_k=5", *REQUIRED, word]).settings_json() != first.settings_json()
