"""The step from rows to tokens. A cache keeps the result."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
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
from logitgen.errors import UsageError, first_line
from logitgen.split.cache import cached, remedy
from logitgen.split.encoded import FEATURES
from logitgen.split.shapes import columns_read, encoder, template_of
from logitgen.tokenizer import tokenizer_fingerprint

logger = logging.getLogger(__name__)

_OPTIONS = ("text_column", "messages_column", "completion_only", "packing", "add_special_tokens", "append_eos")
"""Options that decide the tokens of a row."""

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


def tokenize(
    split: datasets.Dataset, tokenizer: PreTrainedTokenizerBase | None, config: Config, of_tokenizer: str = ""
) -> datasets.Dataset:
    """Turn the rows of a split into tokens, once: the result is kept in the `datasets` cache and memory-mapped.

    A row of the split becomes one row or several. `of_tokenizer` is the tokenizer's fingerprint, where it is known.

    Returns:
        A dataset with `input_ids`, `source_row`, `notes` and, with `completion_only`, `completion_mask`.

    Raises:
        UsageError: The columns have no supported shape, or a row's value has the wrong type.
    """
    encode = encoder(split, tokenizer, config)
    names = [name for name in FEATURES if config.completion_only or name != "completion_mask"]
    fingerprint = _fingerprint(split, tokenizer, config, of_tokenizer or tokenizer_fingerprint(tokenizer))
    cache = Path(datasets.config.HF_DATASETS_CACHE) / "logitgen" / f"{fingerprint}.arrow"
    needed = _needed(split, config)

    def encoded(rows: dict[str, list[Any]], indices: list[int]) -> dict[str, list[Any]]:
        return encode(rows, indices).columns(names)

    def make() -> datasets.Dataset:
        return needed.map(
            encoded,
            batched=True,
            with_indices=True,
            desc="Tokenising rows",
            remove_columns=needed.column_names,
            features=datasets.Features({name: FEATURES[name] for name in names}),
            new_fingerprint=fingerprint,
            cache_file_name=os.fspath(cache),
        )

    with _refused(split, config):
        return cached(cache, len(split), make)


@contextmanager
def _refused(split: datasets.Dataset, config: Config) -> Iterator[None]:
    """Turn errors of reading the rows into errors of the user's input."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise UsageError(f"--dataset {config.dataset} holds text that is not UTF-8: {error}. Convert it.") from error
    except (pa.ArrowInvalid, pa.ArrowIndexError, OSError) as error:
        copies = [found["filename"] for found in split.cache_files]
        raise UsageError(
            f"--dataset {config.dataset} cannot be read: {first_line(error).rstrip('.')}.{remedy(error, copies)}"
        ) from error


def _fingerprint(
    split: datasets.Dataset, tokenizer: PreTrainedTokenizerBase | None, config: Config, of_tokenizer: str
) -> str:
    """Hash all that decides the tokens of the rows."""
    options = [getattr(config, name) for name in _OPTIONS]
    template = template_of(split, tokenizer, config)
    known = (options, template and template.fingerprint, of_tokenizer)
    return str(Hasher.hash(("logitgen 5", transformers.__version__, split._fingerprint, known)))


def _needed(split: datasets.Dataset, config: Config) -> datasets.Dataset:
    """Leave the columns out that are not read, and name them: images and audio would take long to decode."""
    names = columns_read(split.features, config)
    if unused := [name for name in split.column_names if name not in names]:
        logger.info(f"Columns not used: {', '.join(unused)}.")
    return split.with_format(None).select_columns(names)  # rows saved for torch or pandas come as plain lists
