"""The distance of a student from the teacher of a file, over the file's rows.

Shape letters: B rows of a batch, T tokens, P captured positions, C positions of a chunk, V vocabulary.
"""

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from logitgen.config import Config
from logitgen.errors import UsageError
from logitgen.file.layout import Array
from logitgen.file.reader import LogitsFile, perplexity_of
from logitgen.rerun import sample_rows
from logitgen.split.batch import Pass
from logitgen.split.tokens import load_tokenizer
from logitgen.student.batches import TokenBatches
from logitgen.student.collate import collate
from logitgen.student.dataset import LogitsDataset, check_ids
from logitgen.student.losses import DistillationLoss
from logitgen.student.measure import Meter
from logitgen.teacher.adapter import with_base
from logitgen.teacher.describe import describe_teacher
from logitgen.teacher.model import Teacher, load_model
from logitgen.tokenizer import is_or_was, tokenizer_fingerprint

logger = logging.getLogger(__name__)

_MAX_TOKENS = 4096
"""Of a batch, padding included."""


def evaluate(
    name: str, file: LogitsFile, num_rows: int | None, other_tokenizer: bool = False, trust_remote_code: bool = False
) -> dict[str, Any]:
    """Run a student over rows of a file, and compare its distributions with the teacher's.

    Args:
        name: Hub id or folder of the student, or of an adapter of it.
        file: The file.
        num_rows: Number of rows, drawn at random. None stands for all.
        other_tokenizer: True to take a student whose tokenizer is not the teacher's.
        trust_remote_code: Run code that comes with the student.

    Returns:
        The student's distance as plain values: divergences and cross-entropies in nats per position, perplexities,
        shares of positions, and probabilities. What the kind of capture does not tell is None.

    Raises:
        UsageError: The student cannot be loaded, or has another vocabulary or tokenizer.
    """
    rows = sample_rows(file, num_rows or len(file))
    config = Config(teacher=name, dataset="none", output="none", trust_remote_code=trust_remote_code, top_k=1)
    with _called_student():
        config = with_base(config)
        info = describe_teacher(config)
        dataset = LogitsDataset(file.path, max_length=info.max_length).select(rows)
        DistillationLoss(dataset).check_vocabulary(info.vocab_size)
        check_ids(dataset, info.vocab_size)
        _check_tokenizer(config, dataset, other_tokenizer)
        device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        student = Teacher(load_model(config, device or torch.device("cpu")), info.vocab_size)
    _say_what_is_cut(file, rows, info.max_length)
    measured = _measured(student, dataset)
    if measured["cross_entropy"] > math.log(info.vocab_size):
        logger.warning(
            "The student predicts the tokens worse than by chance: it may have been trained with another tokenizer."
        )
    return {"student": name, "path": str(file.path), "rows": len(rows), "rows_of_file": len(file)} | measured


def _say_what_is_cut(file: LogitsFile, rows: Array, max_length: int | None) -> None:
    if max_length and np.diff(file.arrays["offsets"])[rows].max() > max_length:
        logger.warning(f"Rows are cut at {max_length:,} tokens, the student's context.")


@torch.no_grad()
def _measured(student: Teacher, dataset: LogitsDataset) -> dict[str, Any]:
    """Measure a student over all rows of a dataset."""
    attributes = dataset.attributes
    forward = DistillationLoss(dataset)
    exact = attributes["capture"] != "sample"
    meters = {"forward_kl": Meter(forward)}
    if exact:
        meters["reverse_kl"] = Meter(DistillationLoss(dataset, divergence="reverse_kl"))
    of_teacher, num_positions = 0.0, 0
    batches = TokenBatches(dataset.lengths, _MAX_TOKENS)
    for batch in DataLoader(dataset, batch_sampler=batches, collate_fn=collate):
        captured_P = batch["captured"].flatten()
        slots = captured_P.nonzero()[:, 0].numpy()
        values = {key: tensor[captured_P] for key, tensor in forward.values_of(batch).items()}
        of_teacher -= batch["target_logprob"].flatten()[captured_P].sum(dtype=torch.float64).item()
        num_positions += len(slots)
        for span, logits_CV, _ in student.logits([Pass(batch["input_ids"].numpy())], slots):
            student_CV, known = logits_CV.float(), {key: tensor[span] for key, tensor in values.items()}
            for meter in meters.values():
                meter.add(student_CV, known, meter.loss.parts_over(student_CV, known), training=False)
    means = {divergence: meter.means(False, student.device) for divergence, meter in meters.items()}
    found = means["forward_kl"]
    teacher_cross_entropy = of_teacher / num_positions
    return {
        "capture": attributes["capture"],
        "teacher": attributes["teacher"],
        "positions": num_positions,
        "forward_kl": found["divergence"],
        "reverse_kl": means["reverse_kl"]["divergence"] if exact else None,
        "cross_entropy": found["cross_entropy"],
        "teacher_cross_entropy": teacher_cross_entropy,
        "perplexity": perplexity_of(found["cross_entropy"]),
        "teacher_perplexity": perplexity_of(teacher_cross_entropy),
        **{name: found.get(name) for name in ("agreement", "tail", "teacher_tail")},
    }


def _check_tokenizer(config: Config, dataset: LogitsDataset, other_tokenizer: bool) -> None:
    """Refuse a student of another tokenizer, as far as both are known."""
    attributes = dataset.attributes
    expected, tokenizer = attributes["tokenizer_fingerprint"], load_tokenizer(config)
    if not expected or tokenizer is None:
        whose = "student" if expected else "file"
        logger.warning(f"The {whose} has no tokenizer to compare. Make sure that it is the teacher's.")
    elif not other_tokenizer and not is_or_was(tokenizer, expected):
        found = tokenizer_fingerprint(tokenizer)
        raise UsageError(
            f"The student's tokenizer must be that of the teacher {attributes['teacher']}, fingerprint {expected[:8]}, "
            f"got fingerprint {found[:8]}. Give a student of the teacher's tokenizer, or add --other_tokenizer if only "
            "chat template or special tokens differ."
        )


@contextmanager
def _called_student() -> Iterator[None]:
    """Call a student so in messages about models that are loaded as teachers are."""
    try:
        yield
    except UsageError as error:
        raise UsageError(str(error).replace("--teacher ", "The student ")) from error
