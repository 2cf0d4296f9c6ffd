"""The teacher run once more over some rows of a file, to compare what it says now with what was stored.

Shape letters: P captured positions of a row, C positions of a chunk, K kept per position, V vocabulary.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from logitgen.config import Config
from logitgen.dataset import Row, row_tensors
from logitgen.errors import UsageError
from logitgen.reader import LogitsFile
from logitgen.schema import Array
from logitgen.teacher import Teacher, describe_teacher, load_teacher
from logitgen.tokens import load_tokenizer, tokenizer_fingerprint

_STORED_LEAST = float(torch.finfo(torch.float16).min)

TOLERANCES = {"float64": (0.005, 0.99), "float32": (0.005, 0.99), "float16": (0.02, 0.98), "bfloat16": (0.1, 0.95)}
"""By the teacher's dtype: largest mean difference in nats, least top-1 agreement.

Storage as float16 alone makes a mean of up to 0.004 at 16 nats; the rest is left to other batch shapes and hardware.
"""


@dataclass(frozen=True)
class Rerun:
    """How far a teacher is from a file.

    Attributes:
        num_positions: Positions compared.
        largest: Largest difference of a stored log-prob, in nats.
        mean: Mean difference of the stored log-probs, in nats.
        top1_agreement: Share of the positions whose likeliest token is the same.
        most_mean: Largest mean difference the teacher's dtype explains.
        least_agreement: Least agreement it explains.
    """

    num_positions: int
    largest: float
    mean: float
    top1_agreement: float
    most_mean: float
    least_agreement: float

    @property
    def problems(self) -> list[str]:
        """What is beyond the teacher's dtype."""
        if self.mean <= self.most_mean and self.top1_agreement >= self.least_agreement:
            return []
        return ["the teacher says something else than what is stored"]


def sample_rows(file: LogitsFile, num_rows: int, seed: int = 0) -> Array:
    """Draw rows that have captured positions, at most so many, ascending."""
    filled = np.flatnonzero(np.diff(file.arrays["position_offsets"]))
    return np.sort(np.random.default_rng(seed).choice(filled, min(num_rows, len(filled)), replace=False))


def load_teacher_of(file: LogitsFile, name: str | None, trust_remote_code: bool) -> tuple[Teacher, list[str]]:
    """Load a teacher as the file's was loaded, and compare what it is with what the file says.

    Args:
        file: The file.
        name: Hub id or folder; the one the file names if None.
        trust_remote_code: Run code that comes with the teacher.

    Returns:
        The teacher, and what differs.

    Raises:
        UsageError: It cannot be loaded, or its vocabulary is not the file's.
    """
    said, settings = file.attributes, file.attributes["settings"]
    same_name = name in (None, settings["teacher"])
    config = Config(
        teacher=name or settings["teacher"],
        dataset=settings["dataset"],
        output=str(file.path),
        revision=settings["revision"] if same_name else None,
        teacher_gguf=settings["teacher_gguf"],
        dtype=said["teacher_dtype"],
        attn_implementation=settings["attn_implementation"],
        trust_remote_code=trust_remote_code,
        top_k=1,
    )
    info = describe_teacher(config)
    if info.vocab_size != file.layout.vocab_size:
        raise UsageError(
            f"--teacher {config.teacher} has a vocabulary of {info.vocab_size}, the file's teacher one of "
            f"{file.layout.vocab_size}. Give the teacher of the file."
        )
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    teacher = load_teacher(config, info, device or torch.device("cpu"))
    tokenizer = tokenizer_fingerprint(load_tokenizer(config))
    differs = {
        "the teacher's weights are not those of the file": teacher.fingerprint != said["teacher_fingerprint"],
        "the teacher's tokenizer is not that of the file": tokenizer != said["tokenizer_fingerprint"],
    }
    return teacher, [line for line, true in differs.items() if true]


def rerun(file: LogitsFile, teacher: Teacher, rows: Array) -> Rerun:
    """Run a teacher of the file's vocabulary over some rows, each alone and unpadded, and compare log-probs."""
    differences, agreements = [], []
    for row in rows:
        data = row_tensors(file, row)
        positions_P = data["positions"].to(teacher.device)
        input_ids_T = data["input_ids"].to(teacher.device)
        for span, logits_CV in teacher.logits(input_ids_T[None], torch.zeros_like(positions_P), positions_P):
            now_CV = logits_CV.log_softmax(-1).cpu()
            stored, now, stored_top_C = _pair(data, span, now_CV)
            differences.append((stored - now.clamp(min=_STORED_LEAST)).abs().flatten())
            agreements.append(stored_top_C == now_CV.argmax(-1))
    difference = torch.cat(differences)
    most_mean, least_agreement = TOLERANCES[file.attributes["teacher_dtype"]]
    return Rerun(
        num_positions=sum(map(len, agreements)),
        largest=float(difference.max()),
        mean=float(difference.mean(dtype=torch.float64)),
        top1_agreement=float(torch.cat(agreements).double().mean()),
        most_mean=most_mean,
        least_agreement=least_agreement,
    )


def _pair(data: Row, span: slice, now_CV: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return log-probs as stored, the same ones as they are now, and the likeliest ids as stored, [C]."""
    if "logits" in data:
        stored_CV = data["logits"][span] - data["logsumexp"][span][:, None]
        return stored_CV.clamp(min=_STORED_LEAST), now_CV, stored_CV.argmax(-1)
    ids_CK = data["kept_ids"][span]
    return data["kept_logprobs"][span], now_CV.gather(-1, ids_CK), ids_CK[:, 0]
