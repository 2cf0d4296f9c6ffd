"""The command line and the file of options, read into one `Config`."""

import argparse
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml
from transformers import HfArgumentParser

from logitgen.config import Config
from logitgen.errors import UsageError, first_line
from logitgen.values import FileSize, Layers, TokenBudget

_LARGEST_OPTIONS_FILE = 2**16
"""In characters."""

_OBJECTS = ("chat_template_kwargs",)
"""Options whose value is an object, which a file may also give as such."""

_DESCRIPTION = """\
Capture a teacher's logits over a dataset into one HDF5 file. The same command
again resumes a run that was stopped. Dashes and underscores both work."""

_EXAMPLE = r"""example:
  accelerate launch --config_file accelerate_configs/multi_gpu.yaml \
      generate.py --teacher Qwen/Qwen2.5-7B-Instruct \
      --dataset HuggingFaceH4/ultrachat_200k --split train_sft \
      --max_length 4096 --output ultrachat.h5"""


class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Help with one spelling of each option, one short word for its value, and its default where it has one."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        spellings = ", ".join(word for word in action.option_strings if "-" not in word[2:])
        if action.nargs in (0, "?"):  # a switch needs no value
            return spellings
        value = {int: "N", TokenBudget: "N", FileSize: "SIZE", Layers: "N,N"}.get(action.type, "NAME")  # type: ignore[call-overload]
        return f"{spellings} {self._format_args(action, value)}"

    def _get_help_string(self, action: argparse.Action) -> str | None:
        has_default = action.default is not None and not isinstance(action.default, bool)
        return super()._get_help_string(action) if has_default else action.help


class _Parser(HfArgumentParser):
    def __init__(self, *types: Any, **options: Any) -> None:
        self._groups: dict[str, argparse._ArgumentGroup] = {}
        super().__init__(*types, **options, allow_abbrev=False, formatter_class=_Help)

    def add_argument(self, *names: str, group: str | None = None, **options: Any) -> argparse.Action:
        """Add an option, with a `group` under that heading. A field's metadata arrive here unchanged."""
        if names[0].startswith("--no_"):  # from HfArgumentParser, for a switch that is on: `--name false` turns it off
            options["help"] = argparse.SUPPRESS
        if group is None:
            return super().add_argument(*names, **options)
        if group not in self._groups:
            self._groups[group] = self.add_argument_group(group)
        return self._groups[group].add_argument(*names, **options)

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message[0].upper()}{message[1:300].rstrip('.')}. See --help for the options.")


def parse_config(arguments: Sequence[str]) -> Config:
    """Read the options of a run.

    Args:
        arguments: Command-line words without the program's name. `--config FILE` names a YAML or JSON file with any
            of the options. The command line wins over it.

    Raises:
        UsageError: An option is unknown, missing, of the wrong type or out of range.
    """
    parser = _Parser(
        [Config],
        prog="generate.py",
        usage="%(prog)s --teacher NAME --dataset NAME --output NAME [options]",
        description=_DESCRIPTION,
        epilog=_EXAMPLE,
    )
    parser.add_argument(
        "--config",
        group="run",
        metavar="FILE",
        help="YAML or JSON file with any of these options; the command line wins over it.",
    )
    words = list(arguments)
    if (path := _config_path(words)) is not None:
        words = _file_words(Path(path)) + words
    config, _, unknown = parser.parse_args_into_dataclasses(
        words, return_remaining_strings=True, look_for_args_file=False
    )
    if unknown:
        raise UsageError(f"There is no option {unknown[0]}. See --help for the options.")
    return config if config.max_bytes is None else _sized(config, words)


def _sized(config: Config, words: list[str]) -> Config:
    """Leave k open, at its smallest value, for a run whose file has a largest size."""
    given = {word.partition("=")[0].replace("-", "_") for word in words}
    if "__top_k" in given:
        raise UsageError("--max_bytes finds the largest --top_k that fits. Leave one of the two out.")
    return dataclasses.replace(config, top_k=1, encoding=config.encoding if "__encoding" in given else "packed")


def _config_path(words: list[str]) -> str | None:
    """Find the value of --config before the options are parsed: the file may hold required options."""
    finder = _Parser(add_help=False)
    finder.add_argument("--config", action="append", default=[])
    found, _ = finder.parse_known_args(words)
    if len(found.config) > 1:
        raise UsageError(f"--config can be given once, got {' and '.join(found.config)}. Join the files.")
    return found.config[0] if found.config else None


def _file_words(path: Path) -> list[str]:
    """Turn an options file into command-line words, so that both go through the same checks."""
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(_LARGEST_OPTIONS_FILE + 1)
        if len(text) > _LARGEST_OPTIONS_FILE:
            raise ValueError("it is too large for a file of options")
        if path.suffix == ".json":
            text = json.dumps(json.loads(text), ensure_ascii=False)
        # Only composed, not constructed: a value stays as typed.
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise UsageError(f"--config {path} cannot be read: {reason}") from error
    if not isinstance(root, yaml.MappingNode):
        raise UsageError(f"--config {path} must hold options as 'name: value' lines, got {_kind(root)}.")
    names = {option.name for option in dataclasses.fields(Config)}
    words: dict[str, str] = {}
    for key, value in root.value:
        if not isinstance(key, yaml.ScalarNode):
            raise UsageError(f"--config {path}: the name of an option must be a word, got {_kind(key)}.")
        name = key.value.replace("-", "_")
        if name not in names:
            raise UsageError(f"--config {path}: there is no option '{key.value:.80}'. See --help for the options.")
        if name in words:
            raise UsageError(f"--config {path}: '{key.value}' is there twice. Leave one out.")
        words[name] = _word(name, value, path)
    return [word for word in words.values() if word]


def _word(name: str, value: yaml.Node, path: Path) -> str:
    """Turn an option of a file into a command-line word, or into no text where it is left at its default."""
    if name in _OBJECTS and isinstance(value, yaml.MappingNode):
        try:
            return f"--{name}={json.dumps(yaml.safe_load(yaml.serialize(value)))}"
        except (TypeError, ValueError, KeyError, AttributeError, yaml.YAMLError) as error:
            raise UsageError(f"--config {path}: '{name}' must be an object as in JSON: {first_line(error)}") from error
    if not isinstance(value, yaml.ScalarNode):
        raise UsageError(f"--config {path}: '{name}' must be a single value, got {_kind(value)}.")
    return "" if value.tag.endswith(":null") else f"--{name}={value.value}"


def _kind(node: yaml.Node | None) -> str:
    return f"a {node.id}" if node else "nothing"  # type: ignore[attr-defined]
