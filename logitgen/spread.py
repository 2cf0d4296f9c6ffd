"""The spread of a file's distributions, over all positions or a fair sample of them.

Shape letters: P positions of a stretch, K kept, V vocabulary.
"""

from typing import Any

import numpy as np

from logitgen.errors import FormatError
from logitgen.file.layout import Array
from logitgen.file.reader import LogitsFile

_NUM_STRETCHES = 64
_MOST_POSITIONS = 2**15
_MOST_BYTES = 2**25
"""Of captured values read, so that a file of any size takes about a second."""

_MASS = (0, 0.5, 0.8, 0.9, 0.95, 0.99, 0.999, 1)
_ENTROPY = (0, 0.5, 1, 2, 3, 4, 6, None)
_PERPLEXITY = (1, 4, 16, 64, 256, 1024, 4096, None)
"""Bounds of the bins. The last bin may have no end."""


def spread(file: LogitsFile) -> dict[str, Any]:
    """Sum up the distributions of a file.

    Args:
        file: The file. All its positions are read if they are few, else stretches of them at equal distances.

    Returns:
        `positions` read and `stretches` they lie in, and for each measure its `mean` and its `bins`:

        `perplexity`: 1 / p of the actual next token. Its mean is the geometric one.
        `mass`: probability mass of the kept tokens, for `topk`, with the 10th percentile as `tenth`.
        `entropy`: in nats. For `topk`, the tail counts as one token, so each value is a lower bound. For `full` it is
        that of the stored logits. Other kinds have none: draws are no distribution, and hidden states need the head.

    Raises:
        FormatError: The file is damaged there.
    """
    stretches = _stretches(file)
    parts = [_measured(file, stretch) for stretch in stretches]
    values = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    surprise = values["surprise"]
    known: dict[str, Any] = {"positions": len(surprise), "stretches": len(stretches)}
    if "mass" in values:
        tenth = float(np.quantile(values["mass"], 0.1))
        known["mass"] = {"mean": float(values["mass"].mean()), "tenth": tenth, "bins": _bins(values["mass"], _MASS)}
    if "entropy" in values:
        is_bound = file.layout.capture == "topk"
        mean = float(values["entropy"].mean())
        known["entropy"] = {"mean": mean, "lower_bound": is_bound, "bins": _bins(values["entropy"], _ENTROPY)}
    with np.errstate(over="ignore"):  # of a token that the teacher holds impossible
        known["perplexity"] = {"mean": float(np.exp(surprise.mean())), "bins": _bins(np.exp(surprise), _PERPLEXITY)}
    return known


def _stretches(file: LogitsFile) -> list[slice]:
    """Choose the positions to read: every one is as likely as any other, but for the file's ends."""
    num_positions, layout = file.layout.num_positions, file.layout
    most = min(_MOST_POSITIONS, max(_NUM_STRETCHES, _MOST_BYTES // layout.bytes_per_position))
    if num_positions <= most:
        return [slice(0, num_positions)]
    length = most // _NUM_STRETCHES
    starts = np.linspace(0, num_positions - length, _NUM_STRETCHES).astype(np.int64)
    return [slice(start, start + length) for start in starts.tolist()]


def _measured(file: LogitsFile, stretch: slice) -> dict[str, Array]:
    """Measure every position of a stretch, float64[P] each."""
    values = {"surprise": -_checked(file, file.arrays["target_logprob"][stretch])}
    if file.layout.capture == "topk":
        logprobs_PK = _kept_logprobs(file, stretch)
        probs_PK = np.exp(logprobs_PK)
        values["mass"] = probs_PK.sum(1).clip(max=1)
        tail_P = 1 - values["mass"]
        values["entropy"] = -(probs_PK * logprobs_PK).sum(1) - tail_P * np.log(np.where(tail_P > 0, tail_P, 1))
    elif file.layout.capture == "full":
        logits_PV = file.arrays["logits"][stretch].astype(np.float32)
        logits_PV = _checked(file, logits_PV - logits_PV.max(1, keepdims=True))
        weights_PV = np.exp(logits_PV)
        total_P = weights_PV.sum(1)
        values["entropy"] = np.log(total_P) - (weights_PV * logits_PV).sum(1) / total_P
    return values


def _kept_logprobs(file: LogitsFile, stretch: slice) -> Array:
    """Read the kept log-probs of a stretch, float64[P, K]."""
    if not file.layout.packing:
        return _checked(file, file.arrays["kept_logprobs"][stretch])
    try:
        return _checked(file, file.layout.packing.unpack(file.arrays["kept"][stretch])[1])
    except ValueError as error:
        raise FormatError(f"{file.path} is damaged: {error}. Copy it again.") from error


def _checked(file: LogitsFile, logprobs: Array) -> Array:
    """Return log-probs as float64, or refuse values that are none."""
    if not (np.isfinite(logprobs) & (logprobs <= 0)).all():
        raise FormatError(f"{file.path} is damaged: it holds a log-prob that is not a number up to 0. Copy it again.")
    return np.asarray(logprobs.astype(np.float64))


def _bins(values: Array, bounds: tuple[float | None, ...]) -> list[dict[str, Any]]:
    """Count the values from each bound to the next. A value below the first bound, by rounding, is in the first bin."""
    places = np.searchsorted(np.array(bounds[1:-1], float), values, side="right")
    counts = np.bincount(places, minlength=len(bounds) - 1).tolist()
    return [
        {"from": start, "to": end, "positions": count}
        for start, end, count in zip(bounds, bounds[1:], counts, strict=False)
    ]
