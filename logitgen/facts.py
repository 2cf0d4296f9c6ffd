"""Facts about a file, a row and a run, as `--json` prints them."""

from typing import Any, Protocol

import numpy as np

from logitgen.errors import UsageError
from logitgen.file.drawn import DrawnPacking, is_certain
from logitgen.file.layout import Array
from logitgen.file.reader import LogitsFile
from logitgen.file.verify import sound_row
from logitgen.leader.status import Status

NUM_GUESSES = 5


class Decoder(Protocol):
    """The part of a tokenizer needed to show text."""

    def decode(self, token_ids: list[int]) -> str:
        """Turn tokens into text."""


def facts(file: LogitsFile) -> dict[str, Any]:
    """Collect the facts of a whole file: sizes in bytes, perplexity of the teacher on the captured positions."""
    layout = file.layout
    size_bytes = file.path.stat().st_size
    lengths = np.diff(file.arrays["offsets"])
    return {
        "path": str(file.path),
        "size_bytes": size_bytes,
        "rows": layout.num_rows,
        "tokens": layout.num_tokens,
        "positions": layout.num_positions,
        "shortest_row": int(lengths.min()),
        "longest_row": int(lengths.max()),
        "kept": layout.kept,
        "bytes_per_position": layout.bytes_per_position,
        "bytes_per_token": size_bytes / layout.num_tokens,
        "perplexity": file.perplexity(),
        **file.attributes,
    }


def row_facts(file: LogitsFile, row: int, decoder: Decoder | None) -> dict[str, Any]:
    """Collect the facts of a row by position: the actual next token, its probability, the teacher's best guesses.

    Args:
        file: The file.
        row: Row number. A negative number counts from the end.
        decoder: The teacher's tokenizer; without it tokens are shown as ids.

    Raises:
        UsageError: There is no such row.
        FormatError: The row is damaged.
    """
    if not -len(file) <= row < len(file):
        raise UsageError(f"--row must be between 0 and {len(file) - 1}, got {row}.")
    data = sound_row(file, row % len(file))
    ids = data["input_ids"]
    ids_PK, logprobs_PK = _guesses(data | _logits(file, data))
    if isinstance(file.layout.packing, DrawnPacking):  # of the others only their mean is known
        logprobs_PK = np.where(is_certain(data["kept_logprobs"])[:, :NUM_GUESSES], logprobs_PK, -np.inf)
    positions = [
        {
            "position": int(position),
            "token": _text(decoder, ids[position]),
            "next": _text(decoder, ids[position + 1]),
            "probability": float(np.exp(float(target_logprob))),
            "guesses": _named(decoder, guesses, logprobs),
        }
        for position, target_logprob, guesses, logprobs in zip(
            data["positions"], data["target_logprob"], ids_PK, logprobs_PK, strict=True
        )
    ]
    return {
        "row": row % len(file),
        "source_row": int(file.arrays["source_row"][row]),
        "tokens": len(ids),
        "text": decoder.decode(ids.tolist()) if decoder else None,
        "positions": positions,
    }


def _logits(file: LogitsFile, data: dict[str, Array]) -> dict[str, Array]:
    """Turn hidden states into logits and their log-sum-exp, if there are any."""
    if "hidden" not in data:
        return {}
    import torch  # takes seconds

    from logitgen.student.dataset import head_of

    head = head_of(file)
    if not head:
        return {}
    logits_PV = head(torch.tensor(data["hidden"], dtype=torch.float32))
    return {"logits": logits_PV.numpy(), "logsumexp": logits_PV.logsumexp(-1).numpy()}  # packed files have none


def _guesses(data: dict[str, Array]) -> tuple[Array, Array]:
    """Return the likeliest ids and their log-probs, [P, up to NUM_GUESSES] each."""
    if "kept_ids" in data:
        return data["kept_ids"][:, :NUM_GUESSES], data["kept_logprobs"][:, :NUM_GUESSES]
    logprobs_PV = data["logits"].astype(np.float32) - data["logsumexp"][:, None]
    ids_PK = np.argsort(-logprobs_PV, axis=1, kind="stable")[:, :NUM_GUESSES]
    return ids_PK, np.take_along_axis(logprobs_PV, ids_PK, axis=1)


def _named(decoder: Decoder | None, ids_K: Array, logprobs_K: Array) -> list[dict[str, Any]]:
    """Name some ids with their probabilities. Those with a log-prob of -inf are left out."""
    known = zip(ids_K, logprobs_K.astype(np.float32), strict=True)
    return [
        {"token": _text(decoder, token), "probability": float(np.exp(logprob))}
        for token, logprob in known
        if logprob > -np.inf
    ]


def _text(decoder: Decoder | None, token: int) -> str:
    return decoder.decode([int(token)]) if decoder else str(int(token))


def status_facts(status: Status) -> dict[str, Any]:
    """Collect the facts of a run's status. Times are in seconds, unknown values None."""
    known = status.snapshot
    ranks = zip(known.stream_tokens, known.stream_totals, strict=True) if known else ()
    return {
        "path": str(status.path),
        "state": status.state,
        "rows_done": status.num_done,
        "rows": status.num_rows,
        "seconds_since_write": status.idle_seconds,
        "seconds": known.seconds if known else None,
        "tokens_done": known.tokens if known else None,
        "tokens": known.total if known else None,
        "tokens_per_second": known.rate if known else None,
        "recent_tokens_per_second": known.recent_rate if known else None,
        "eta_seconds": known.eta_seconds if known else None,
        "ranks": [{"tokens_done": done, "tokens": goal} for done, goal in ranks],
    }
