"""The step from rows to tokens. A cache keeps the result."""

import hashlib
import logging
import os
import time
from pathlib import Path
from typing import Any, cast

import datasets
import pyarrow as pa
import transformers
from datasets.fingerprint import Hasher
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.tokenization_utils_base import TOKENIZER_CONFIG_FILE
from transformers.utils.hub import cached_file

from logitgen.config import Config
from logitgen.console import PLAIN_SECONDS
from logitgen.errors import UsageError, first_line
from logitgen.split.cache import cached, remedy
from logitgen.split.chats import Tokens
from logitgen.split.shapes import Encode, columns_read, encoder

logger = logging.getLogger(__name__)

_FEATURES = datasets.Features(
    {"input_ids": datasets.List(datasets.Value("int32")), "completion_mask": datasets.List(datasets.Value("uint8"))}
)

_IF_THERE = dict.fromkeys(
    (f"_raise_exceptions_for_{what}" for what in ("gated_repo", "missing_entries", "connection_errors")), False
)
"""Options of `cached_file`: None instead of an error where there is no such file."""


def load_tokenizer(config: Config) -> PreTrainedTokenizerBase | None:
    """Load the tokenizer of the adapter or else of the teacher, or return None where there is none."""
    source = {"revision": config.revision, "gguf_file": config.teacher_gguf}
    if own := config.adapter and cached_file(config.adapter, TOKENIZER_CONFIG_FILE, **_IF_THERE):
        logger.info(f"The tokenizer is that of the adapter: {own}")
        source = {}
    try:
        return cast(
            PreTrainedTokenizerBase,
            AutoTokenizer.from_pretrained(
                config.adapter if own else config.teacher, trust_remote_code=config.trust_remote_code, **source
            ),
        )
    except Exception as error:  # transformers says "no tokenizer" in many ways; only rows of text need it
        logger.info(f"No tokenizer could be loaded: {first_line(error)}")
        return None


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase | None) -> str:
    """Hash all that decides the tokens of a text, SHA-256; empty without a tokenizer."""
    if tokenizer is None:
        return ""
    parts: list[Any] = [sorted(tokenizer.get_vocab().items()), str(tokenizer.chat_template)]
    if tokenizer.is_fast:
        parts.append(tokenizer.backend_tokenizer.to_str())
    parts.append(sorted((name, str(token)) for name, token in tokenizer.special_tokens_map.items()))
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def tokenize(split: datasets.Dataset, tokenizer: PreTrainedTokenizerBase | None, config: Config) -> datasets.Dataset:
    """Turn the rows of a split into tokens, once: the result is kept in the `datasets` cache and memory-mapped.

    The tokenizer adds its usual special tokens. With packing, a text without an end-of-text token gets one at its end.

    Returns:
        A dataset with `input_ids` and, with `completion_only`, `completion_mask`, one row per row of the split.

    Raises:
        UsageError: The columns have no supported shape, or a row's value has the wrong type.
    """
    encode = _telling(encoder(split, tokenizer, config), len(split))
    features = _FEATURES if config.completion_only else datasets.Features(input_ids=_FEATURES["input_ids"])
    settings = (config.text_column, config.completion_only, config.packing, tokenizer_fingerprint(tokenizer))
    fingerprint = Hasher.hash(("logitgen 2", transformers.__version__, split._fingerprint, settings))
    cache = Path(datasets.config.HF_DATASETS_CACHE) / "logitgen" / f"{fingerprint}.arrow"
    needed = _needed(split, config)

    def make() -> datasets.Dataset:
        return needed.map(
            encode,
            batched=True,
            with_indices=True,
            remove_columns=needed.column_names,
            features=features,
            new_fingerprint=fingerprint,
            cache_file_name=os.fspath(cache),
        )

    try:
        return cached(cache, len(split), make)
    except UnicodeDecodeError as error:
        raise UsageError(f"--dataset {config.dataset} holds text that is not UTF-8: {error}. Convert it.") from error
    except (pa.ArrowInvalid, pa.ArrowIndexError, OSError) as error:
        copies = [found["filename"] for found in split.cache_files]
        raise UsageError(
            f"--dataset {config.dataset} cannot be read: {first_line(error).rstrip('.')}.{remedy(error, copies)}"
        ) from error


def _needed(split: datasets.Dataset, config: Config) -> datasets.Dataset:
    """Leave the columns out that are not read, and name them: images and audio would take long to decode."""
    names = columns_read(split.features, config)
    if unused := [name for name in split.column_names if name not in names]:
        logger.info(f"Columns not used: {', '.join(unused)}.")
    return split.select_columns(names)


def _telling(encode: Encode, num_rows: int) -> Encode:
    """Log the progress now and then: a large split takes minutes."""
    last_told = time.monotonic()

    def run(rows: dict[str, list[Any]], indices: list[int]) -> Tokens:
        nonlocal last_told
        if time.monotonic() - last_told > PLAIN_SECONDS:
            last_told = time.monotonic()
            logger.info(f"Tokenised {indices[0]:,} of {num_rows:,} rows.")
        return encode(rows, indices)

    return run
