"""The identity of a tokenizer, which a capture stores and a student's tokenizer is compared with."""

import hashlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def tokenizer_fingerprint(tokenizer: "PreTrainedTokenizerBase | None", *, with_padding: bool = True) -> str:
    """Hash all that decides the tokens of a text, SHA-256; empty without a tokenizer.

    The token that it pads with is hashed too, unless `with_padding` is false.
    """
    if tokenizer is None:
        return ""
    ids = tokenizer.get_vocab()
    # Each token as a tuple prints itself. So many tuples at a time set off the garbage collector.
    vocab = ", ".join(f"({token!r}, {ids[token]!r})" for token in sorted(ids))
    parts: list[Any] = [str(tokenizer.chat_template)]
    if tokenizer.is_fast:
        parts.append(_serialised(tokenizer.backend_tokenizer))
    special = tokenizer.special_tokens_map.items()
    parts.append(sorted((name, str(token)) for name, token in special if with_padding or name != "pad_token"))
    if tokenizer.split_special_tokens:
        parts.append("split_special_tokens")
    return hashlib.sha256(f"[[{vocab}], {repr(parts)[1:]}".encode()).hexdigest()


def is_or_was(tokenizer: "PreTrainedTokenizerBase", fingerprint: str) -> bool:
    """Tell whether a tokenizer has a fingerprint, or had it before someone gave it a token to pad with."""
    return any(tokenizer_fingerprint(tokenizer, with_padding=known) == fingerprint for known in (True, False))


def _serialised(backend: Any) -> str:
    """Return a backend as JSON, without the padding and truncation that it keeps from its last call."""
    padding, truncation = backend.padding, backend.truncation
    backend.no_padding()
    backend.no_truncation()
    try:
        return str(backend.to_str())
    finally:
        if padding:
            backend.enable_padding(**padding)
        if truncation:
            backend.enable_truncation(**truncation)
