"""The description of a teacher from its configuration, before its weights are loaded."""

import json
import logging
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    PreTrainedConfig,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from logitgen.config import Config
from logitgen.errors import UsageError, cause_of
from logitgen.teacher.adapter import check_adapter
from logitgen.teacher.identity import describe_config

logger = logging.getLogger(__name__)

_LOADERS = (AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM)
"""The ways to load a model that reads text and predicts the next token. The first that knows a family loads it."""

_ADAPTED_TO_SOUND = ("granite_speech", "granite_speech_plus")
"""Families whose adapter transformers turns off where they read text alone."""

_OTHER_HEAD = re.compile(r"For(?!CausalLM|ConditionalGeneration|PreTraining|\w*Text2Text|[a-z])|Reward")
"""Found in names of classes whose head does not predict tokens, such as LlamaForSequenceClassification."""


@dataclass(frozen=True)
class TeacherInfo:
    """The facts of a teacher before its weights are loaded.

    Attributes:
        vocab_size: Rows of the output head, V.
        max_length: Longest row the run allows, in tokens, or None where neither options nor teacher set a limit.
        length_switch: Row length in tokens above which the whole row is computed differently (the long factors of
            LongRoPE, chosen by the longest row of a batch), or None for most.
        commit: The hub's commit hash; empty for a folder.
        quantization: Quantisation of its checkpoint, as JSON; empty if there is none.
        config: The part of its configuration that can change its logits, see `identity.describe_config`.
    """

    vocab_size: int
    max_length: int | None
    length_switch: int | None
    commit: str
    quantization: str
    config: dict[str, Any]


def describe_teacher(config: Config) -> TeacherInfo:
    """Read a teacher's configuration, without its weights.

    Raises:
        UsageError: There is no such teacher, it is no causal language model, or the options ask for more tokens than
            it can read or knows.
    """
    check_adapter(config)
    teacher_config = read_config(config)
    if config.adapter == config.teacher and teacher_config.model_type in _ADAPTED_TO_SOUND:
        raise UsageError(
            f"--teacher {config.teacher} has an adapter for sound, which text does not pass. Give a copy of the folder "
            "without its adapter_config.json."
        )
    own_code = loader(config, teacher_config).__name__ in (getattr(teacher_config, "auto_map", None) or {})
    if own_code and not config.trust_remote_code:
        logger.warning("The teacher comes with code of its own, which is not run; transformers' own is.")
    _check_head(config, teacher_config)
    text_config = teacher_config.get_text_config()
    context_length = getattr(text_config, "max_position_embeddings", None)
    vocab_size = getattr(text_config, "vocab_size", 0)
    _check(config, vocab_size, context_length)
    _check_layers(config, getattr(text_config, "num_hidden_layers", None))
    return TeacherInfo(
        vocab_size=vocab_size,
        max_length=config.max_length or context_length,
        length_switch=_length_switch(text_config),
        commit=getattr(teacher_config, "_commit_hash", None) or "",
        quantization=_quantization(teacher_config),
        config=describe_config(teacher_config),
    )


def loader(config: Config, teacher_config: PreTrainedConfig) -> Any:
    """Return the class of transformers that loads a teacher of this configuration, for text alone if need be.

    Raises:
        UsageError: transformers knows no such class.
    """
    own_code = getattr(teacher_config, "auto_map", None) or {}
    parts = (teacher_config, getattr(teacher_config, "text_config", None))
    one_stack = not any(getattr(part, "is_encoder_decoder", False) for part in parts)
    for each in _LOADERS if one_stack else _LOADERS[:1]:
        if type(teacher_config) in each._model_mapping or (config.trust_remote_code and each.__name__ in own_code):
            return each
    raise UsageError(
        f"--teacher {config.teacher} is a {teacher_config.model_type} model, which has no causal language model "
        "in transformers. Give a model that predicts the next token."
    )


def _check_head(config: Config, teacher_config: PreTrainedConfig) -> None:
    """Refuse a checkpoint saved with another head. Tied weights would give it a head that nobody trained."""
    names = teacher_config.architectures or []
    if names and all(_OTHER_HEAD.search(name) for name in names):
        raise UsageError(
            f"--teacher {config.teacher} is a {names[0]} by its config.json, whose head does not predict tokens. Give "
            "a model that predicts the next token."
        )


def read_config(config: Config) -> PreTrainedConfig:
    """Read a teacher's configuration from its folder or the hub."""
    folder = Path(config.teacher)
    is_folder = os.path.isdir(folder)  # noqa: PTH112 (Path.is_dir raises for names too long)
    is_path = folder.is_absolute() or config.teacher.startswith(".") or len(folder.parts) > 2
    if is_path and not is_folder:
        wrong = "is not a folder" if os.path.lexists(folder) else "does not exist"
        raise UsageError(f"--teacher {config.teacher} {wrong}. Give a folder or a hub id.")
    if config.revision and is_folder:
        raise UsageError(f"--revision is for teachers on the hub, {config.teacher} is a folder. Leave it out.")
    if is_folder and not config.teacher_gguf and not (folder / "config.json").is_file():
        raise UsageError(f"--teacher {config.teacher} has no config.json. Give the folder of a transformers model.")
    gguf = {"gguf_file": config.teacher_gguf} if config.teacher_gguf else {}
    try:
        found = AutoConfig.from_pretrained(
            config.teacher, revision=config.revision, trust_remote_code=config.trust_remote_code, **gguf
        )
        return cast(PreTrainedConfig, found)
    except Exception as error:
        if "trust_remote_code" in str(error) and not config.trust_remote_code:
            raise UsageError(
                f"--teacher {config.teacher} comes with code of its own. Add --trust_remote_code if you trust it."
            ) from error
        raise UsageError(f"--teacher {config.teacher} cannot be loaded: {cause_of(error)}") from error


def _length_switch(text_config: PreTrainedConfig) -> int | None:
    rope = getattr(text_config, "rope_parameters", None) or {}
    if rope.get("rope_type") != "longrope":
        return None
    return rope.get("original_max_position_embeddings") or getattr(
        text_config, "original_max_position_embeddings", None
    )


def _quantization(teacher_config: PreTrainedConfig) -> str:
    found = getattr(teacher_config, "quantization_config", None)
    if not found:
        return ""
    return json.dumps(found if isinstance(found, dict) else found.to_dict(), sort_keys=True, default=str)


def _check_layers(config: Config, num_layers: object) -> None:
    if isinstance(num_layers, int) and max(config.layer_numbers, default=-1) >= num_layers:
        raise UsageError(
            f"--layers must be below the teacher's number of layers {num_layers}, got {config.layer_numbers[-1]}. The "
            "state after the last one is kept without being named, behind the final norm."
        )


def _check(config: Config, vocab_size: int, context_length: int | None) -> None:
    if vocab_size < 1:
        raise UsageError(f"--teacher {config.teacher} has a vocab_size of {vocab_size} in its config.json. Correct it.")
    attentions = ("eager", *ALL_ATTENTION_FUNCTIONS.valid_keys())
    name = config.attn_implementation
    if name and name not in attentions and "/" not in name:  # a name with a slash is a kernel on the hub
        raise UsageError(f"--attn_implementation must be one of {', '.join(sorted(attentions))}, got {name}.")
    if config.kept > vocab_size:  # `Layout.check` knows the limit for draws
        raise UsageError(
            f"--top_k must be between 1 and the vocabulary size {vocab_size}, got {config.top_k}. "
            "Lower it, or keep every token with --capture full."
        )
    if config.max_length and context_length and config.max_length > context_length:
        raise UsageError(
            f"--max_length must be at most the teacher's context length {context_length}, got {config.max_length}. "
            "Lower it."
        )
