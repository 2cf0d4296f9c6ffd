"""The identity of a tokenizer, which a capture stores and a student's tokenizer is compared with."""

import hashlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def tokenizer_fingerprint(tokenizer: "PreTrainedTokenizerBase | None") -> str:
    """Hash all that decides the tokens of a text, SHA-256; empty without a tokenizer."""
    if tokenizer is None:
        return ""
    ids = tokenizer.get_vocab()
    # Each token as a tuple prints itself. So many tuples at a time set off the garbage collector.
    vocab = ", ".join(f"({token!r}, {ids[token]!r})" for token in sorted(ids))
    parts: list[Any] = [str(tokenizer.chat_template)]
    if tokenizer.is_fast:
        parts.append(tokenizer.backend_tokenizer.to_str())
    parts.append(sorted((name, str(token)) for name, token in tokenizer.special_tokens_map.items()))
    return hashlib.sha256(f"[[{vocab}], {repr(parts)[1:]}".encode()).hexdigest()
