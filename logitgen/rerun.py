"""A second run of the teacher over some rows of a file, to compare its log-probs with the stored values.

Shape letters: P captured positions of a row, C positions of a chunk, K kept per position, V vocabulary.
"""

import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from logitgen.config import Config
from logitgen.errors import UsageError
from logitgen.file import states
from logitgen.file.drawn import DrawnPacking, is_certain
from logitgen.file.layout import FLOAT16_MAX, Array, Layout
from logitgen.file.reader import LogitsFile
from logitgen.head import stored
from logitgen.split.batch import Pass
from logitgen.split.tokens import load_tokenizer
from logitgen.student.dataset import head_of
from logitgen.teacher.adapter import with_base
from logitgen.teacher.describe import TeacherInfo, describe_teacher
from logitgen.teacher.model import Teacher, load_model
from logitgen.tokenizer import tokenizer_fingerprint

logger = logging.getLogger(__name__)

TOLERANCES = {"float64": (0.002, 0.99), "float32": (0.002, 0.99), "float16": (0.02, 0.98), "bfloat16": (0.1, 0.95)}
"""Largest mean difference in nats beyond rounding, and least top-1 agreement, by the teacher's dtype.

They allow for other batch shapes and other hardware.
"""

_CPU = torch.device("cpu")
_LEAST_CHANNEL = 1e-3
"""Part of the usual square below which a channel of hidden states is taken to be of that size: it may be all zeros."""


@dataclass(frozen=True)
class Rerun:
    """The distance of a teacher from a file.

    Attributes:
        num_positions: Positions compared.
        largest: Largest difference of a stored log-prob, in nats, beyond its rounding.
        mean: Mean of these differences, in nats.
        top1_agreement: Share of the positions with the same likeliest token.
        max_mean: Largest mean difference the teacher's dtype explains.
        min_agreement: Least agreement it explains.
        layers: Largest distance of a layer's hidden states, relative to the size of each channel; 0 without layers.
    """

    num_positions: int
    largest: float
    mean: float
    top1_agreement: float
    max_mean: float
    min_agreement: float
    layers: float = 0.0

    @property
    def problems(self) -> list[str]:
        """Differences that the teacher's dtype does not explain."""
        near = self.mean <= self.max_mean and self.top1_agreement >= self.min_agreement
        found = [] if near else ["the teacher's log-probs differ from the stored ones"]
        same = self.layers <= self.max_mean
        return found if same else [*found, "the teacher's hidden states of other layers differ from the stored ones"]


def sample_rows(file: LogitsFile, num_rows: int, seed: int = 0) -> Array:
    """Draw at most `num_rows` rows that have captured positions, ascending."""
    filled = np.flatnonzero(np.diff(file.arrays["position_offsets"]))
    return np.sort(np.random.default_rng(seed).choice(filled, min(num_rows, len(filled)), replace=False))


def load_teacher_of(file: LogitsFile, name: str | None, trust_remote_code: bool) -> tuple[Teacher, list[str]]:
    """Load a teacher as the file's was loaded, and compare it with the file's attributes.

    Args:
        file: The file.
        name: Hub id or folder; the file's own teacher if None.
        trust_remote_code: Run code that comes with the teacher, if the file was made with it.

    Returns:
        The teacher, and its differences.

    Raises:
        UsageError: It cannot be loaded, or its vocabulary is not the file's.
    """
    attributes, settings = file.attributes, file.attributes["settings"]
    if settings.get("trust_remote_code") and not trust_remote_code:
        raise UsageError("The file's teacher needs its own code. Add --trust_remote_code if you trust it.")
    config = _config_of(file, name)
    info = describe_teacher(config)
    if info.vocab_size != file.layout.vocab_size:
        raise UsageError(
            f"--teacher {config.teacher} must have the file's vocabulary of {file.layout.vocab_size} tokens, got "
            f"{info.vocab_size}. Give the file's teacher."
        )
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    teacher = Teacher(load_model(config, device or _CPU), info.vocab_size, layers=file.layout.layer_numbers)
    tokenizer = tokenizer_fingerprint(load_tokenizer(config))
    differs = {
        "the teacher's weights differ from the file's": teacher.fingerprint != attributes["teacher_fingerprint"],
        "the teacher's tokenizer differs from the file's": tokenizer != attributes["tokenizer_fingerprint"],
    }
    if not attributes["teacher_config"]:
        logger.warning(
            "An older logitgen wrote the file, with another fingerprint of the weights. They are not compared."
        )
        return teacher, [line for line, true in list(differs.items())[1:] if true]
    return teacher, [
        *_other_values(attributes["teacher_config"], info),
        *(line for line, true in differs.items() if true),
    ]


def _config_of(file: LogitsFile, name: str | None) -> Config:
    """Return the options that load the file's teacher as it was loaded, or another teacher by its name."""
    attributes, settings = file.attributes, file.attributes["settings"]
    same_name = name in (None, settings["teacher"])
    config = with_base(
        Config(
            teacher=name or settings["teacher"],
            dataset=settings["dataset"],
            output=str(file.path),
            revision=settings["revision"] if same_name else None,
            teacher_gguf=settings["teacher_gguf"],
            dtype=attributes["teacher_dtype"],
            attn_implementation=settings["attn_implementation"],
            trust_remote_code=bool(settings.get("trust_remote_code")),
            top_k=1,
            device_map="auto",
        )
    )
    return config if config.adapter else replace(config, adapter=settings.get("adapter"))


def _other_values(there: dict[str, Any], info: TeacherInfo) -> Iterator[str]:
    """Name the differences between a teacher's configuration and a file's."""
    for name in sorted(there.keys() | info.config):
        if there.get(name) != info.config.get(name):
            yield f"the teacher's {name} is {info.config.get(name)}, in the file {there.get(name)}"


def rerun(file: LogitsFile, teacher: Teacher, rows: Array) -> Rerun:
    """Run a teacher of the file's vocabulary over some rows, each alone and unpadded, and compare log-probs."""
    own_head, layers, is_packed = head_of(file), _Layers(), file.layout.encoding == "packed"
    head = own_head.to(teacher.device) if own_head else None
    largest, total, num_values, num_same, num_positions = 0.0, 0.0, 0, 0, 0
    for row in rows:
        data = file.row(row)
        positions, input_ids = (data[name].astype(np.int64) for name in ("positions", "input_ids"))
        for span, logits_CV, hidden in teacher.logits([Pass(input_ids[None])], positions):
            known = {name: values[span] for name, values in data.items()}
            known["target"] = input_ids[positions[span] + 1]
            if head:
                own_CV = head(_restored(known["hidden"], teacher.device))
                known["logits"] = own_CV.cpu().numpy()
                known.setdefault("logsumexp", own_CV.logsumexp(-1).cpu().numpy())  # packed files have none
                if is_packed and "hidden" in hidden and hidden["hidden"].shape == known["hidden"].shape:
                    change_CV = head(_packed(hidden["hidden"])) - head(hidden["hidden"])
                    logits_CV = logits_CV + change_CV.where(change_CV.isfinite(), 0)  # masked tokens stay so
                layers.add(known, hidden, is_packed)
            now_CV = logits_CV[:, : file.layout.num_ids].float().log_softmax(-1).cpu()
            difference, same_C = _compare(known, now_CV, file.layout)
            if not len(difference):
                continue
            largest = max(largest, float(difference.max()))
            total += float(difference.sum(dtype=torch.float64))
            num_values += len(difference)
            num_same += int(same_C.sum())
            num_positions += len(same_C)
    max_mean, min_agreement = TOLERANCES[file.attributes["teacher_dtype"]]
    mean, agreement = (total / num_values, num_same / num_positions) if num_values else (math.nan, 0.0)
    return Rerun(num_positions, largest, mean, agreement, max_mean, min_agreement, layers.largest)


def _restored(hidden_CD: Array, device: torch.device) -> Tensor:
    return torch.tensor(hidden_CD, dtype=torch.float32, device=device)


def _packed(hidden_CD: Tensor) -> Tensor:
    """Pack a teacher's hidden states and unpack them, float32[C, D], to compare it by the states that it would store.

    A bound on rounding would have to add up the worst of all D values, and would let every other teacher pass too.
    """
    codes_CD, scale_CG = states.pack(hidden_CD)
    return _restored(states.unpack(codes_CD.cpu().numpy(), stored(scale_CG).cpu().numpy()), hidden_CD.device)


class _Layers:
    """The distances of a teacher's hidden states of other layers from a file's.

    Attributes:
        squares: Sums of the squared differences and of the squared states, by name, float64[2, D].
    """

    def __init__(self) -> None:
        self.squares: dict[str, Array] = {}

    def add(self, known: dict[str, Array], hidden: dict[str, Tensor], is_packed: bool) -> None:
        """Compare the states of some positions. Those of another size are infinitely far."""
        for name in hidden.keys() - {"hidden"}:
            now_CD = (_packed(hidden[name]) if is_packed else hidden[name]).cpu().double().numpy()
            off_CD = known[name] - now_CD if known[name].shape == now_CD.shape else np.full_like(now_CD, np.inf)
            squares = np.square([off_CD, now_CD]).sum(1)
            self.squares[name] = self.squares.get(name, np.zeros_like(squares)) + squares

    @property
    def largest(self) -> float:
        """Largest distance of a layer, 0 without layers: the root mean square of its channels' relative differences.

        Each channel counts alike: a few of them are thousands of times as large as the others (SmolLM2-135M, layer 16).
        """
        return max((_relative(*squares) for squares in self.squares.values()), default=0.0)


def _relative(off_D: Array, size_D: Array) -> float:
    size_D = size_D.clip(min=max(_LEAST_CHANNEL * float(np.median(size_D)), np.finfo(float).tiny))
    return float(np.sqrt((off_D / size_D).mean()))


def _compare(data: dict[str, Array], now_CV: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    """Compare the stored values of some positions with new log-probs.

    Returns:
        The distances of stored log-probs from the new ones beyond rounding, and flags bool[C]: true if the likeliest
        token now is the likeliest as stored. Only drawn tokens compete, if any were drawn. Any of equal tokens counts.
    """
    if "logits" in data:
        ids_CK = torch.arange(now_CV.shape[1]).expand_as(now_CV)
        values, offset_C1 = data["logits"], torch.from_numpy(data["logsumexp"].copy())[:, None]
    else:
        ids_CK = torch.from_numpy(data["kept_ids"].astype(np.int64))
        values, offset_C1 = data["kept_logprobs"], torch.zeros(len(now_CV), 1)
    stored_CK = torch.from_numpy(values.astype(np.float32))
    now_CK = now_CV.gather(-1, ids_CK).clamp(min=-FLOAT16_MAX)
    usual_CK = stored_CK.abs() < FLOAT16_MAX  # masked tokens, and logits beyond float16
    if isinstance(layout.packing, DrawnPacking):  # only certain tokens have their own log-prob
        usual_CK = torch.from_numpy(is_certain(stored_CK.numpy()))
        now_CK = now_CK.where(usual_CK, -torch.inf)
    off_CK = (stored_CK - offset_C1 - now_CK).abs() - torch.from_numpy(layout.rounding(stored_CK.numpy()))
    likeliest_CK = stored_CK == stored_CK.amax(-1, keepdim=True)
    drawn_C1 = ids_CK.gather(-1, now_CK.argmax(-1, keepdim=True))
    now_C1 = drawn_C1 if layout.capture == "sample" else now_CV.argmax(-1, keepdim=True)
    same_C = (likeliest_CK & (ids_CK == now_C1)).any(-1)
    off = off_CK[usual_CK]
    if isinstance(layout.packing, DrawnPacking):  # where none was certain, the next token is all that is known
        off = torch.cat([off, _off_target(data, now_CV)])
    return off.clamp(min=0), same_C


def _off_target(data: dict[str, Array], now_CV: Tensor) -> Tensor:
    """Return the distances of the next tokens' stored log-probs from new ones beyond rounding, but for masked ones."""
    stored_C, target_C1 = torch.tensor(data["target_logprob"]), torch.from_numpy(data["target"])[:, None]
    off_C = (stored_C.float() - now_CV.gather(-1, target_C1)[:, 0]).abs()
    rounding_C = stored_C.float().abs() * torch.finfo(stored_C.dtype).eps / 2
    return (off_C - rounding_C)[stored_C > -FLOAT16_MAX]
