"""The options of a run: one frozen, validated value, from the command line and, if given, a YAML file."""

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NoReturn

import yaml
from transformers import HfArgumentParser

from logitgen.errors import UsageError
from logitgen.file.layout import WITH_KEPT_IDS, CaptureKind, Encoding

_NOT_SETTINGS = ("output", "overwrite", "dry_run", "rank_timeout", "log_dir", "device_map", "fsdp_size")
"""Options for the run and its places, without effect on the computed values: they do not go into the file.

`tp_size` is not among them: the ranks of a tensor-parallel teacher add up parts of sums, which rounds otherwise.
"""

# In characters.
_LONGEST_VALUE = 4096
_LARGEST_OPTIONS_FILE = 2**16

_DESCRIPTION = """\
Capture a teacher's logits over a dataset into one HDF5 file. The same command
again resumes a run that was stopped. Dashes and underscores both work."""

_EXAMPLE = r"""example:
  accelerate launch --config_file accelerate_configs/multi_gpu.yaml \
      generate.py --teacher Qwen/Qwen2.5-7B-Instruct \
      --dataset HuggingFaceH4/ultrachat_200k --split train_sft \
      --max_length 4096 --output ultrachat.h5"""


class TokenBudget(int):
    """A number of tokens. The word `auto` is stored as the largest number, for as many as fit."""

    def __new__(cls, text: str) -> "TokenBudget":
        """Read the value of the option.

        Raises:
            ArgumentTypeError: It is neither a whole number nor `auto`.
        """
        try:
            return super().__new__(cls, sys.maxsize if text == "auto" else text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"expected a whole number or auto, got '{text}'") from error

    @property
    def is_auto(self) -> bool:
        """True if the number is still to be found."""
        return self == sys.maxsize


def _option(group: str, help: str, default: Any = dataclasses.MISSING) -> Any:
    return field(default=default, metadata={"group": group, "help": help})


@dataclass(frozen=True, kw_only=True)
class Config:
    """The options of a run: the teacher, its rows, the values to keep and the file."""

    teacher: str = _option("required", "Hub id or folder of a causal language model.")
    dataset: str = _option(
        "required", "Hub id, .json/.jsonl/.parquet/.csv/.txt/.arrow file, folder of such files, or save_to_disk folder."
    )
    output: str = _option("required", "The HDF5 file to write.")
    revision: str | None = _option("teacher", "Branch, tag or commit of the teacher on the hub.", None)
    teacher_gguf: str | None = _option(
        "teacher", "Name of a GGUF file inside the teacher's folder or repository.", None
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = _option(
        "teacher", "Precision of the teacher's forward pass; auto takes the one it was saved in.", "auto"
    )
    attn_implementation: str | None = _option("teacher", "Attention as transformers names it: sdpa, eager, ...", None)
    device_map: Literal["auto"] | None = _option(
        "teacher",
        "auto spreads the teacher over all GPUs of the machine, then over its memory: for a single rank.",
        None,
    )
    tp_size: int = _option(
        "ranks",
        "Ranks that compute one teacher together, a part of every layer each (tensor parallel).",
        1,
    )
    fsdp_size: int = _option(
        "ranks",
        "Ranks that keep one teacher's weights together, and gather them layer by layer (FSDP2).",
        1,
    )
    dataset_config: str | None = _option("rows", "Configuration of a hub dataset that has several.", None)
    split: str = _option("rows", "Split, or a slice of one: train[:1%%], validation[100:200].", "train")
    text_column: str | None = _option(
        "rows",
        "Column of plain text. Without it the first of input_ids, messages, prompt + completion, text is taken.",
        None,
    )
    max_length: int | None = _option("rows", "Longest row in tokens; the teacher's context length if not given.", None)
    overflow: Literal["truncate", "split", "error"] = _option("rows", "What happens to a longer row.", "truncate")
    packing: bool = _option("rows", "Join the rows and cut them into blocks of exactly max_length tokens.", False)
    completion_only: bool = _option("rows", "Capture only the positions that predict a token of a completion.", False)
    limit: int | None = _option("rows", "Take only the first rows of the split.", None)
    capture: CaptureKind = _option(
        "what to keep",
        "What to keep per position: the top k log-probs, k that are drawn (unbiased), the last hidden state (exact, "
        "with the output head once), or all logits.",
        "topk",
    )
    top_k: int = _option("what to keep", "How many tokens to keep per position with --capture topk or sample.", 64)
    encoding: Encoding = _option(
        "what to keep", "How kept tokens are stored: as they are, or packed, with 8 or 16 bits for a log-prob.", "plain"
    )
    batch_tokens: TokenBudget = _option(
        "run",
        "Tokens per forward pass, padding included; auto takes as many as fit into free memory.",
        TokenBudget("8192"),
    )
    overwrite: bool = _option("run", "Replace a complete output by a new one, and what another run left of one.", False)
    dry_run: bool = _option("run", "Write no output; say what the run would take in disk, memory and time.", False)
    trust_remote_code: bool = _option("run", "Run code that comes with the teacher.", False)
    rank_timeout: int = _option("run", "Seconds a rank may keep the others waiting without a sign of progress.", 1800)
    log_dir: str = _option("run", "Folder for one log file per rank.", "logs")
    seed: int = _option("run", "Seed of anything random.", 0)

    def __post_init__(self) -> None:
        for name, least in (
            ("max_length", 2),
            ("limit", 1),
            ("top_k", 1),
            ("batch_tokens", 1),
            ("rank_timeout", 1),
            ("tp_size", 1),
            ("fsdp_size", 1),
            ("seed", 0),
        ):
            value = getattr(self, name)
            if value is not None and value < least:
                raise UsageError(f"--{name} must be at least {least}, got {value}.")
        if self.seed >= 2**32:
            raise UsageError(f"--seed must be below {2**32}, got {self.seed}.")
        for name, value in dataclasses.asdict(self).items():
            if value == "":
                raise UsageError(f"--{name} must not be empty.")
            if isinstance(value, str) and len(value) > _LONGEST_VALUE:
                raise UsageError(f"--{name} must have at most {_LONGEST_VALUE} characters, got {len(value)}.")
            if isinstance(value, str) and "\0" in value:
                raise UsageError(f"--{name} must not hold a null character.")
        if self.device_map and self.replica_size > 1:
            raise UsageError(
                "--device_map is for one rank that has the whole teacher, --tp_size and --fsdp_size are for several. "
                "Leave one of the two out."
            )
        if self.packing and self.overflow != "truncate":
            raise UsageError(
                f"--packing leaves no row longer than a block, so --overflow {self.overflow} has no meaning with it. "
                "Leave one of the two out."
            )
        if self.encoding != "plain" and self.capture not in WITH_KEPT_IDS:
            raise UsageError(
                f"--encoding {self.encoding} is for --capture {' and '.join(WITH_KEPT_IDS)}, got --capture "
                f"{self.capture}. Leave one of the two out."
            )

    @property
    def replica_size(self) -> int:
        """Ranks that hold one copy of the teacher."""
        return self.tp_size * self.fsdp_size

    @property
    def kept(self) -> int:
        """Entries kept per position by choice of `top_k`, or 0 where `capture` does not choose."""
        return self.top_k if self.capture in WITH_KEPT_IDS else 0

    @property
    def settings(self) -> dict[str, Any]:
        """The options that decide the content of the file, by name."""
        return {name: value for name, value in dataclasses.asdict(self).items() if name not in _NOT_SETTINGS}

    def with_batch_tokens(self, batch_tokens: int) -> "Config":
        """Return the same options with this token budget."""
        return dataclasses.replace(self, batch_tokens=TokenBudget(str(batch_tokens)))

    def settings_json(self) -> str:
        """Return the settings as text that is equal for equal settings."""
        return json.dumps(self.settings, sort_keys=True)


class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Help with one spelling of each option, one short word for its value, and its default where it has one."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        spellings = ", ".join(word for word in action.option_strings if "-" not in word[2:])
        if action.nargs in (0, "?"):  # a switch needs no value
            return spellings
        return f"{spellings} {self._format_args(action, 'N' if action.type in (int, TokenBudget) else 'NAME')}"

    def _get_help_string(self, action: argparse.Action) -> str | None:
        has_default = action.default is not None and action.default is not False
        return super()._get_help_string(action) if has_default else action.help


class _Parser(HfArgumentParser):
    def __init__(self, *types: Any, **options: Any) -> None:
        self._groups: dict[str, argparse._ArgumentGroup] = {}
        super().__init__(*types, **options, allow_abbrev=False, formatter_class=_Help)

    def add_argument(self, *names: str, group: str | None = None, **options: Any) -> argparse.Action:
        """Add an option, with a `group` under that heading. A field's metadata arrive here unchanged."""
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
    return config


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
            text = json.dumps(json.loads(text))
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
        if not isinstance(value, yaml.ScalarNode):
            raise UsageError(f"--config {path}: '{key.value}' must be a single value, got {_kind(value)}.")
        words[name] = "" if value.tag.endswith(":null") else f"--{name}={value.value}"
    return [word for word in words.values() if word]


def _kind(node: yaml.Node | None) -> str:
    return f"a {node.id}" if node else "nothing"  # type: ignore[attr-defined]
