"""What a student's loss does not show: its parts, and how often student and teacher agree.

Sums are kept on the student's device. They become means over positions, of all batches and ranks, only when read.

Shape letters: B rows of a batch, T tokens, C captured positions of a chunk, V columns of the student's logits, K kept
per position.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, distributed, nn

from logitgen.errors import UsageError
from logitgen.student.chunks import positions_at_once
from logitgen.student.dataset import IGNORED_LABEL
from logitgen.student.events import exact_dtype, logprobs_at
from logitgen.student.losses import DistillationLoss, like_student, wide_dtype

_SUMS = ("positions", "targets", "loss", "divergence", "cross_entropy", "agreement", "tail", "teacher_tail")
_ALWAYS = ("loss", "divergence", "cross_entropy")
_MEASURES = {
    "topk": (*_ALWAYS, "agreement", "tail", "teacher_tail"),
    "sample": _ALWAYS,
    "hidden": (*_ALWAYS, "agreement"),
    "full": (*_ALWAYS, "agreement"),
}
"""Measures by kind of capture. Drawn tokens do not tell which token is the likeliest, nor of what the tail consists."""

Parts = tuple[Tensor, Tensor | None]


class Meter:
    """Sums of a student's measures, in training and in evaluation apart."""

    def __init__(self, loss: DistillationLoss) -> None:
        """Start with nothing seen.

        Args:
            loss: The student's loss.
        """
        self.loss = loss
        self._sums: dict[bool, Tensor] = {}

    @torch.no_grad()
    def add(self, student_CV: Tensor, values: Mapping[str, Tensor], parts: Parts, training: bool) -> None:
        """Add captured positions, given what `loss.parts_over` takes and what it gives for them."""
        sums = sums_of(self.loss, student_CV.detach(), values, parts)
        self._sums[training] = sums + self._sums.get(training, 0)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    @torch.no_grad()
    def add_logits(self, logits_BTV: Tensor, batch: Mapping[str, Tensor], training: bool) -> None:
        """Add a batch of `collate`, a chunk of its captured positions at a time."""
        logits_PV, values = logits_BTV.flatten(0, 1), self.loss.values_of(batch)
        captured_P = batch["captured"].flatten().nonzero()[:, 0]
        with torch.autocast(logits_BTV.device.type, enabled=False):
            for chunk_C in captured_P.split(positions_at_once(logits_BTV.device, logits_BTV.shape[-1])):
                student_CV = logits_PV[chunk_C.to(logits_PV.device)].to(wide_dtype(logits_PV.dtype))
                known = {name: tensor[chunk_C.to(tensor.device)] for name, tensor in values.items()}
                self.add(student_CV, known, self.loss.parts_over(student_CV, known), training)

    def means(self, training: bool, device: torch.device) -> dict[str, float]:
        """Take the means over all ranks, and begin anew. Empty if no rank has seen a position."""
        sums = self._sums.pop(training, torch.zeros(len(_SUMS), dtype=exact_dtype(device), device=device))
        if distributed.is_available() and distributed.is_initialized():
            distributed.all_reduce(sums)
        return means_of(sums, str(self.loss.dataset.attributes["capture"]))


def sums_of(loss: DistillationLoss, student_CV: Tensor, values: Mapping[str, Tensor], parts: Parts) -> Tensor:
    """Sum every measure over captured positions, [8], in float64 where the device has it."""
    known = {name: like_student(student_CV, tensor) for name, tensor in values.items()}
    kept_CK = known.get("kept_ids", known["labels"][:, None][:, :0])
    came_C = known["labels"] != IGNORED_LABEL
    ids_CE = torch.cat([kept_CK, known["labels"].clamp(min=0)[:, None]], dim=-1)
    logprobs_CE = logprobs_at(student_CV, ids_CE.clamp(max=student_CV.shape[-1] - 1))
    tails = torch.zeros(2, device=student_CV.device)
    if "kept_logprobs" in known:
        of_student_CK = logprobs_CE[:, :-1].exp() * (kept_CK < student_CV.shape[-1])
        masses = of_student_CK, known["kept_logprobs"].exp()
        tails = torch.stack([(1 - mass_CK.sum(-1)).clamp(min=0).sum() for mass_CK in masses])
    found = (
        torch.ones_like(came_C).sum(),
        came_C.sum(),
        loss.joined(*parts),
        parts[0],
        -logprobs_CE[:, -1][came_C].sum(),
        _same_top(loss, student_CV, known).sum(),
        *tails,
    )
    return torch.stack([each.detach().to(exact_dtype(student_CV.device)) for each in found])


def means_of(sums: Tensor, capture: str) -> dict[str, float]:
    """Divide sums by the positions, or by those whose next token is known, and name what the kind of capture tells."""
    found = dict(zip(_SUMS, sums.tolist(), strict=True))
    if not found["positions"]:
        return {}
    count = {"cross_entropy": max(1.0, found["targets"])}
    return {name: found[name] / count.get(name, found["positions"]) for name in _MEASURES[capture]}


def _same_top(loss: DistillationLoss, student_CV: Tensor, known: Mapping[str, Tensor]) -> Tensor:
    """Tell where the student's likeliest token is one of the teacher's likeliest, bool[C]."""
    top_C1 = student_CV.argmax(-1, keepdim=True)
    if "kept_ids" in known:
        ids, values = known["kept_ids"], known["kept_logprobs"]
    else:
        values = loss.teacher_logits(known)
        ids = torch.arange(values.shape[-1], device=values.device).expand_as(values)
    return ((ids == top_C1) & (values == values.amax(-1, keepdim=True))).any(-1)


def measures(student: nn.Module) -> dict[str, float]:
    """Read what a student of `distil(..., measure=True)` has measured since the last call, and begin anew.

    Training and evaluation are measured apart: the student's present mode, `student.training`, is read. Where there are
    several ranks, all must call.

    Args:
        student: The student, or what wraps it.

    Returns:
        Means over all positions of all ranks. In nats: `loss`, `divergence` as it is trained, and `cross_entropy` with
        the tokens that came. `agreement` is the share of positions at which student and teacher have the same likeliest
        token. For top k, `tail` is the student's probability of the tokens that the teacher did not keep, and
        `teacher_tail` the teacher's. A file of drawn tokens has only the first three. Empty if no position came.

    Raises:
        UsageError: The student does not measure.
    """
    for module in student.modules():
        if meter := vars(module).get("meter"):
            return meter.means(student.training, next(module.parameters()).device)  # type: ignore[no-any-return]
    raise UsageError("The student must measure, got one that does not. Make it with distil(..., measure=True).")


class Measured:
    """Has transformers' `Trainer`, or a trainer made from it, log the measures of its student.

        class MeasuredTrainer(Measured, Trainer): ...

    In evaluation they have the prefix of the loss. `loss` and `eval_loss` become means over positions too: `Trainer`
    takes those of batches instead.
    """

    model: nn.Module

    def log(self, logs: dict[str, float], *args: Any) -> None:
        """Add the measures to what is logged. `Trainer` calls this on all ranks."""
        losses = [name for name in logs if name.endswith("loss") and name != "train_loss"]
        if losses:
            prefix = min(losses, key=len).removesuffix("loss")
            logs.update({prefix + name: value for name, value in measures(self.model).items()})
        super().log(logs, *args)  # type: ignore[misc]
