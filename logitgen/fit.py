"""The largest k whose file has a given size."""

import logging
from bisect import bisect_right
from dataclasses import replace

from logitgen.config import Config
from logitgen.console import format_bytes
from logitgen.errors import UsageError
from logitgen.file.header import Attributes, file_bytes
from logitgen.file.layout import Layout
from logitgen.provenance import settings_attributes
from logitgen.values import TokenBudget

logger = logging.getLogger(__name__)

_OF_TEACHER: Attributes = {"teacher_dtype": "." * 8, "teacher_fingerprint": "." * 64, "computation": "." * 256}
"""The attributes of a loaded teacher, at least as long. They change the size only where HDF5 needs one more block."""


def fitted(config: Config, layout: Layout, about: Attributes) -> tuple[Config, Layout, Attributes]:
    """Take the largest k whose file fits into `max_bytes`, if that is given. A file's size is known to the byte.

    Args:
        config: The run's options.
        layout: The file's sizes. Only k is still open.
        about: The attributes known before the teacher is loaded.

    Returns:
        The same values with that k.

    Raises:
        UsageError: Even a single kept token takes more.
    """
    if config.max_bytes is None:
        return config, layout, about

    def size_bytes(k: int) -> int:
        longest = replace(config, top_k=k, batch_tokens=TokenBudget("auto"))  # a resumed run knows more
        return file_bytes(replace(layout, top_k=k), about | _of_settings(longest) | _OF_TEACHER)

    k = bisect_right(range(1, layout.vocab_size + 1), int(config.max_bytes), key=size_bytes)
    needed = size_bytes(max(k, 1))
    if k == 0:
        raise UsageError(
            f"--max_bytes must be at least {needed:,} ({format_bytes(needed)}) to keep one token per position, got "
            f"{config.max_bytes:,}. Raise it, or take fewer rows (--limit)."
        )
    logger.info(
        f"The largest file within --max_bytes {config.max_bytes:,}: --top_k {k} --encoding {config.encoding}, at most "
        f"{needed:,} bytes."
    )
    config = replace(config, top_k=k)
    return config, replace(layout, top_k=k), about | _of_settings(config)


def _of_settings(config: Config) -> Attributes:
    return settings_attributes(config) | {"top_k": config.top_k}
