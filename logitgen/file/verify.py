"""The proof that a file is right, row by row, from the file alone.

Shape letters: T tokens of a row, P its captured positions, K kept per position, V vocabulary.
"""

from collections.abc import Iterator

import numpy as np

from logitgen.errors import FormatError
from logitgen.file.drawn import DrawnPacking, is_certain
from logitgen.file.layout import FLOAT16_MAX, Array, Layout, crc32, row_crc32
from logitgen.file.reader import LogitsFile

_CHUNK_LOGITS = 2**24
_NATS_ERROR = 1e-3
"""Error limit for float32 sums over a vocabulary, with room to spare."""

Row = dict[str, Array]


def problems(file: LogitsFile) -> Iterator[str]:
    """Find the faults of a file, one line each. No line is the proof.

    The checks cover the offsets, the output head's checksum, the `done` flags, and every row's checksum (over its
    number, source row, tokens, positions and all captured values). They also cover the values: ids below the
    vocabulary, positions that have a next token, log-probs finite, at most 0 and descending, no more probability than
    1. Hidden states are only checked to be finite. `rerun` shows that they give the log-probs.
    """
    descending = [name for name in ("offsets", "position_offsets") if (np.diff(file.arrays[name]) < 0).any()]
    yield from (f"{name} is not ascending" for name in descending)
    if descending:
        return
    checksum, written = crc32(file.arrays[name] for name in file.layout.of_head), file.attributes.get("head_crc32", 0)
    if checksum != written:
        yield f"the head has checksum {checksum:08x}, expected {written:08x}"
    for row in range(len(file)):
        yield from (f"row {row} {problem}" for problem in row_problems(file, row))


def sound_row(file: LogitsFile, row: int) -> Row:
    """Read one row as `LogitsFile.row` does, but only if nothing is wrong with it.

    Raises:
        FormatError: The row is damaged.
    """
    for problem in row_problems(file, row):
        raise FormatError(f"{file.path} is damaged: row {row} {problem}. Copy it again.")
    return file.row(row)


def row_problems(file: LogitsFile, row: int) -> Iterator[str]:
    """Find the faults of one row, given by its number from 0 on."""
    done = file.arrays["done"][row]
    if done != 1:
        yield f"has a done flag of {done}" if done else "is missing"
        return
    arrays = file.stored(row).values()
    checksum, written = row_crc32(row, file.arrays["source_row"][row], arrays), file.arrays["crc32"][row]
    if checksum != written:
        yield f"has checksum {checksum:08x}, expected {written:08x}"
        return
    try:
        data = file.row(row)
    except FormatError:
        yield "has packed records that cannot be unpacked"
        return
    yield from _value_problems(data, file.layout)


def _value_problems(data: Row, layout: Layout) -> Iterator[str]:
    vocab_size = layout.vocab_size
    ids, positions, target_logprob = (data[name] for name in ("input_ids", "positions", "target_logprob"))
    if (ids >= vocab_size).any():
        yield f"has token {ids.max()}, expected at most {vocab_size - 1}"
    if len(positions) and (positions[0] < 0 or positions[-1] > len(ids) - 2 or (np.diff(positions) < 1).any()):
        yield f"has positions that are not ascending between 0 and {len(ids) - 2}"
        return
    if "logsumexp" in data and not np.isfinite(data["logsumexp"]).all():
        yield "has a logsumexp that is not finite"
        return
    if not (np.isfinite(target_logprob).all() and (target_logprob <= 0).all()):
        yield "has a target_logprob that is not finite or above 0"
    if layout.capture == "hidden":
        if not all(np.isfinite(data[name]).all() for name in (layout.head.widths if layout.head else ())):
            yield "has hidden states that are not finite"
    elif layout.capture == "full":
        yield from _logits_problems(data, layout)
    else:
        yield from _kept_problems(data, layout)


def _kept_problems(data: Row, layout: Layout) -> Iterator[str]:
    ids_PK, logprobs_PK = data["kept_ids"], data["kept_logprobs"].astype(np.float32)
    is_there_PK = is_own_PK = np.ones_like(ids_PK, np.bool_)
    if isinstance(layout.packing, DrawnPacking):
        is_there_PK, is_own_PK = ~np.isneginf(logprobs_PK), is_certain(logprobs_PK)
    fillers_K = layout.vocab_size + np.arange(ids_PK.shape[1])
    each_PK = np.sort(np.where(is_there_PK, ids_PK, fillers_K), axis=1)
    if (ids_PK >= layout.num_ids).any() or (each_PK[:, 1:] == each_PK[:, :-1]).any():
        yield f"has kept_ids that repeat or exceed {layout.num_ids - 1}"
    is_descending = (logprobs_PK[:, 1:] <= logprobs_PK[:, :-1]).all()
    if not (np.isfinite(logprobs_PK[is_there_PK]).all() and (logprobs_PK <= 0).all() and is_descending):
        yield "has kept_logprobs that are not finite, above 0 or not descending"
        return
    rounding_PK = layout.rounding(logprobs_PK)
    if (np.exp(logprobs_PK - rounding_PK).sum(1) > 1 + _NATS_ERROR).any():
        yield "has a position whose probabilities sum to more than 1"
    is_target_PK = is_own_PK & (ids_PK == data["input_ids"][data["positions"] + 1][:, None])
    target_P = data["target_logprob"].astype(np.float32)
    half_step_P = np.abs(target_P) * np.finfo(data["target_logprob"].dtype).eps / 2
    allowed_PK = rounding_PK + half_step_P[:, None] + _NATS_ERROR
    if (np.abs(logprobs_PK - target_P[:, None]) > allowed_PK)[is_target_PK].any():
        yield "has a target_logprob that differs from kept_logprobs"
    if layout.capture == "sample":
        return
    if ((target_P > logprobs_PK[:, -1] + allowed_PK[:, -1]) & ~is_target_PK.any(1)).any():
        yield "has a target that is likelier than a kept token, but is not kept"


def _logits_problems(data: Row, layout: Layout) -> Iterator[str]:
    num_positions, vocab_size = data["logits"].shape
    step = max(1, _CHUNK_LOGITS // vocab_size)
    target_P = data["input_ids"][data["positions"] + 1].astype(np.int64)
    for start in range(0, num_positions, step):
        span = slice(start, start + step)
        logits_CV = data["logits"][span].astype(np.float32)
        if not np.isfinite(logits_CV).all():
            yield "has logits that are not finite"
            return
        # Logits beyond float16 were stored as its largest value: their positions cannot be checked.
        usual_C = logits_CV.max(1) < FLOAT16_MAX
        logits_CV, logsumexp_C = logits_CV[usual_C], data["logsumexp"][span][usual_C]
        largest_C = logits_CV.max(1, initial=-np.inf)
        sum_C = np.exp(logits_CV - largest_C[:, None]).sum(1)
        rounding_C = layout.rounding(largest_C) + _NATS_ERROR
        if (np.abs(largest_C + np.log(sum_C) - logsumexp_C) > 2 * rounding_C).any():
            yield "has a logsumexp that differs from its logits"
            return
        logit_C = np.take_along_axis(logits_CV, target_P[span][usual_C][:, None], axis=1)[:, 0]
        off_C = np.abs(logit_C - logsumexp_C - data["target_logprob"][span][usual_C])
        if (off_C > layout.rounding(logit_C) + _NATS_ERROR)[logit_C > -FLOAT16_MAX].any():
            yield "has a target_logprob that differs from its logits"
            return
