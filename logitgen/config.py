"""The options of a run: one frozen, validated value."""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import date
from typing import Any, Literal

from logitgen.errors import UsageError
from logitgen.file.layout import ENCODINGS, WITH_KEPT_IDS, CaptureKind, Encoding
from logitgen.values import FileSize, JsonObject, Layers, TokenBudget

_NOT_SETTINGS = (
    "output",
    "overwrite",
    "dry_run",
    "rank_timeout",
    "log_dir",
    "max_bytes",
    "device_map",
    "fsdp_size",
    "chat_template",
    "chat_template_date",
)
"""Options for the run and its places, without effect on the computed values: they do not go into the file.

The chat template and its date do so as attributes of their own, because the path and the day alone mean nothing.
`max_bytes` decides the value of `top_k`, which does.
`tp_size` is not among them: the ranks of a tensor-parallel teacher add up parts of sums, which rounds otherwise.
"""

_LONGEST_VALUE = 4096
"""In characters."""

_OTHER_ENCODINGS = {
    "hidden": "Hidden states have no log-probs to keep 16 bits of: leave it out, or choose --encoding packed.",
    "full": "Leave one of the two out.",
}
"""Remedies by the kind of capture, where an encoding is not for it."""


def _option(group: str, help: str, default: Any = dataclasses.MISSING) -> Any:
    return field(default=default, metadata={"group": group, "help": help})


@dataclass(frozen=True, kw_only=True)
class Config:
    """The options of a run: the teacher, its rows, the values to keep and the file."""

    teacher: str = _option("required", "Hub id or folder of a causal language model, or of an adapter.")
    dataset: str = _option(
        "required",
        "Hub id, .json/.jsonl/.csv/.tsv/.txt (or with .gz/.zst), .parquet or .arrow file, pattern such as "
        "'data/*.jsonl', folder of such files, or save_to_disk folder.",
    )
    output: str = _option("required", "The HDF5 file to write.")
    revision: str | None = _option("teacher", "Branch, tag or commit of the teacher on the hub.", None)
    teacher_gguf: str | None = _option(
        "teacher", "Name of a GGUF file inside the teacher's folder or repository.", None
    )
    adapter: str | None = _option("teacher", "Hub id or folder of an adapter (LoRA), merged into the teacher.", None)
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
    messages_column: str | None = _option(
        "rows", "Column of conversations, if it is not called messages or conversations.", None
    )
    chat_template: str | None = _option(
        "rows", "File of a chat template, or the name of one where the tokenizer has several.", None
    )
    chat_template_kwargs: JsonObject | None = _option(
        "rows", "Variables for the chat template as a JSON object, such as '{\"enable_thinking\": false}'.", None
    )
    chat_template_date: str | None = _option(
        "rows", "Date that the chat template prints as today's, as YYYY-MM-DD; the day of the run's first start.", None
    )
    add_special_tokens: bool = _option(
        "rows", "false: the tokenizer adds none of its special tokens to rows of text.", True
    )
    append_eos: bool = _option("rows", "End texts and completions with the end-of-text token.", False)
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
        "what to keep",
        "How kept values are stored: as they are, or packed, with 8 bits for a log-prob or a value of a hidden state, "
        "or 16 for a log-prob.",
        "plain",
    )
    layers: Layers | None = _option(
        "what to keep",
        "With --capture hidden: numbers of other layers whose hidden states are kept too, such as 2,16,30; 0 is the "
        "embeddings, and i the state after i layers.",
        None,
    )
    max_bytes: FileSize | None = _option(
        "what to keep",
        "In place of --top_k: the size that the file may have (200GB, 1.5TB, 800MiB). It gets the largest k that "
        "fits, packed unless --encoding is given.",
        None,
    )
    batch_tokens: TokenBudget = _option(
        "run",
        "Tokens per forward pass, padding included; auto takes as many as fit into free memory.",
        TokenBudget("8192"),
    )
    share_prefixes: bool = _option(
        "run", "Read the tokens that several rows begin with once; false: once in every row.", True
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
            ("max_bytes", 1),
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
        if self.chat_template_date is not None:
            try:
                date.fromisoformat(self.chat_template_date)
            except ValueError as error:
                raise UsageError(
                    f"--chat_template_date must be a date such as 2026-01-31, got {self.chat_template_date}."
                ) from error
        self._check_together()

    def _check_together(self) -> None:
        """Refuse options that exclude one another."""
        if self.device_map and self.replica_size > 1:
            raise UsageError(
                "--device_map is for one rank that has the whole teacher, --tp_size and --fsdp_size are for several. "
                "Leave one of the two out."
            )
        if self.text_column is not None and self.messages_column is not None:
            raise UsageError(
                "--text_column and --messages_column name different shapes of rows. Leave one of them out."
            )
        if self.packing and self.overflow != "truncate":
            raise UsageError(
                f"--packing leaves no row longer than a block, so --overflow {self.overflow} has no meaning with it. "
                "Leave one of the two out."
            )
        if self.max_bytes is not None and self.capture != "topk":
            raise UsageError(
                f"--max_bytes chooses the k of --capture topk, got --capture {self.capture}. Leave one of the two out."
            )
        if self.layers is not None and self.capture != "hidden":
            raise UsageError(
                f"--layers keeps more hidden states with --capture hidden, got --capture {self.capture}. Leave one of "
                "the two out."
            )
        if self.encoding not in ENCODINGS[self.capture]:
            kinds = [kind for kind, encodings in ENCODINGS.items() if self.encoding in encodings]
            raise UsageError(
                f"--encoding {self.encoding} is for --capture {', '.join(kinds[:-1])} and {kinds[-1]}, got --capture "
                f"{self.capture}. {_OTHER_ENCODINGS[self.capture]}"
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
    def layer_numbers(self) -> tuple[int, ...]:
        """The layers whose hidden states are kept beside the last, ascending."""
        return tuple(map(int, self.layers.split(","))) if self.layers else ()

    @property
    def settings(self) -> dict[str, Any]:
        """The options that decide the content of the file, by name."""
        return {name: value for name, value in dataclasses.asdict(self).items() if name not in _NOT_SETTINGS}

    @property
    def open_settings(self) -> tuple[str, ...]:
        """Names of the settings that the run finds out. A resumed run takes those of its file."""
        is_open = {"batch_tokens": self.batch_tokens.is_auto, "top_k": self.max_bytes is not None}
        return tuple(name for name, value in is_open.items() if value)

    def with_found(self, found: Mapping[str, int]) -> "Config":
        """Return the same options with these values for some of `open_settings`."""
        return dataclasses.replace(self, **{name: type(getattr(self, name))(value) for name, value in found.items()})

    def settings_json(self) -> str:
        """Return the settings as text that is equal for equal settings."""
        return json.dumps(self.settings, sort_keys=True)
