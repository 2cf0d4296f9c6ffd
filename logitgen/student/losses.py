"""The distance of a student from its teacher's captured values: one loss for every kind of capture.

Any capture becomes the log-probs of the same E events on both sides: all tokens, or the kept tokens and one more for
the tail. A divergence compares the two. Only drawn tokens are weighted instead.

Shape letters: B rows of a batch, T tokens, C captured positions of a chunk, V columns of the student's logits, W rows
of the teacher's head, K kept per position, E events, D hidden size.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import Any, Literal, Protocol, get_args

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.checkpoint import checkpoint

from logitgen.errors import UsageError
from logitgen.student.chunks import positions_at_once
from logitgen.student.dataset import IGNORED_LABEL, source_of
from logitgen.student.events import (
    certain_tokens,
    common_columns,
    cross_entropy_sum,
    kept_events,
    kl_sum,
    normalised,
    sampled_forward_kl,
)

MAX_PADDED_ROWS = 1024
"""Rows by which heads of one tokenizer may differ, as some are padded for speed: phi-2's by 905."""


Divergence = Literal["forward_kl", "reverse_kl", "jsd"]
Tail = Literal["drawn", "ghost", "ignore"]

_KEPT = ("kept_ids", "kept_logprobs")
_CAPTURED = {"topk": _KEPT, "sample": _KEPT, "hidden": ("hidden",), "full": ("logits",)}
"""Values of a batch at captured positions, by kind of capture."""


class TeacherHead(Protocol):
    """The teacher's output head, as a file of hidden states holds it."""

    @property
    def weight_VD(self) -> Tensor: ...  # noqa: D102, N802

    def to(self, device: torch.device, dtype: torch.dtype) -> "TeacherHead": ...  # noqa: D102

    def __call__(self, hidden_PD: Tensor) -> Tensor: ...  # noqa: D102


class CapturedDataset(Protocol):
    """The part of a `LogitsDataset` that the loss needs, the head only for captured hidden states."""

    @property
    def attributes(self) -> Mapping[str, Any]: ...  # noqa: D102

    @property
    def head(self) -> TeacherHead | None: ...  # noqa: D102


@dataclass(frozen=True, eq=False)
class DistillationLoss:
    """The mean divergence of a student from the teacher over a batch's captured positions, in nats.

    It computes in float32 (float64 if the student's logits are), a chunk of positions at a time, and again for the
    gradient. No such tensor of a whole batch ever exists.

    From `hidden` and `full` the distributions are exact, over the columns that teacher and student share. From `topk`
    they are those of the kept tokens and the tail. From `sample` the loss is the weighted forward KL. Its value and
    gradient are right on average over the draws, but a single position's value may be negative. Or it is that of the
    tokens that were certain to be drawn and the tail, as from `topk`.

    Attributes:
        dataset: Dataset of the batches, or a `Subset` or `ConcatDataset` of torch made from it.
        divergence: `forward_kl`, KL(teacher || student); `reverse_kl`, KL(student || teacher); or `jsd`, the
            generalised Jensen-Shannon divergence: beta KL(teacher || m) + (1 - beta) KL(student || m) with the mixture
            m = beta teacher + (1 - beta) student. Divided by beta it becomes the forward KL as beta goes to 0, divided
            by 1 - beta the reverse KL as beta goes to 1. It is not divided here, so it shrinks towards both ends.
        beta: The teacher's share in `jsd`, between 0 and 1.
        tail: Treatment of the tokens that `topk` did not keep, or that `sample` was not certain to draw. `drawn`, the
            default for `sample`, lets those that were drawn stand for all of them. `ghost`, the default for `topk`,
            makes them one more token, so that the student learns their mass. `ignore` renormalises both sides over the
            other tokens, which is biased: the student may put any mass on these. The other kinds have no tail.
        temperature: Divisor of both sides' log-probs before they are normalised again. The divergence is multiplied by
            its square, which keeps the size of the gradients.
        cross_entropy_weight: w in (1 - w) divergence + w cross-entropy with the actual next tokens.

    Source: Hinton et al. 2015, section 2 (temperature and its square); Agarwal et al. 2024, "On-Policy Distillation of
    Language Models", section 2 (generalised JSD).
    """

    dataset: CapturedDataset
    _: KW_ONLY
    divergence: Divergence = "forward_kl"
    beta: float = 0.5
    tail: Tail | None = None
    temperature: float = 1.0
    cross_entropy_weight: float = 0.0
    _heads: dict[torch.device, TeacherHead] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        """Check the options.

        Raises:
            UsageError: An option is out of its range, or does not fit the file's capture.
            FormatError: The parts of a `ConcatDataset` were not captured in the same way.
        """
        object.__setattr__(self, "dataset", source_of(self.dataset))
        _check_choice("divergence", self.divergence, get_args(Divergence))
        object.__setattr__(self, "tail", self.tail or ("drawn" if self._capture == "sample" else "ghost"))
        _check_choice("tail", str(self.tail), get_args(Tail))
        if not 0 < self.beta < 1:
            raise UsageError(
                f"beta must be between 0 and 1, both excluded, got {self.beta}. "
                "For the ends, use divergence='forward_kl' or 'reverse_kl'."
            )
        if not 0 < self.temperature < math.inf:
            raise UsageError(f"temperature must be a number above 0, got {self.temperature}. 1 leaves it as it is.")
        if not 0 <= self.cross_entropy_weight <= 1:
            raise UsageError(
                f"cross_entropy_weight must be between 0 and 1, got {self.cross_entropy_weight}. 0 leaves it out."
            )
        if self.tail == "drawn" and self._capture != "sample":
            raise UsageError(f"tail='drawn' needs a file of --capture sample, got {self._capture}. Leave it out.")
        if self.tail == "drawn" and (self.divergence, self.temperature) != ("forward_kl", 1):
            raise UsageError(
                "Drawn tokens give an unbiased loss only for divergence='forward_kl' and temperature=1, got "
                f"{self.divergence!r} and {self.temperature}. Leave them out, or choose tail='ghost'."
            )

    def __call__(
        self, logits_BTV: Tensor, batch: Mapping[str, Tensor], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Compare the student's logits for a batch with the teacher's.

        Args:
            logits_BTV: The student's, in any floating dtype. At position t they predict token t+1, as the file's do.
            batch: A batch of `collate`. It may be on another device than the logits.
            num_items_in_batch: Divisor of the sum: the captured positions of a whole step, where several batches or
                ranks make up one. None stands for those of this batch.

        Returns:
            A scalar, float32 or float64; 0 with gradients of 0 if the batch has no captured position.

        Raises:
            UsageError: The logits do not fit the batch, or the vocabularies differ.
        """
        self.check_fits(logits_BTV.shape, batch)
        values, captured = self.values_of(batch), batch["captured"].flatten().cpu()
        num_captured = int(captured.sum())
        if not num_captured:
            return logits_BTV[:0].sum(dtype=wide_dtype(logits_BTV.dtype))  # an empty sum, but with a gradient
        step = positions_at_once(logits_BTV.device, logits_BTV.shape[-1])
        chunks = [tensor.split(step) for tensor in (logits_BTV.flatten(0, 1), captured, *values.values())]
        sums = [
            checkpoint(
                self._masked_sum,
                logits,
                mask,
                dict(zip(values, parts, strict=True)),
                use_reentrant=False,
                preserve_rng_state=False,
            )
            for logits, mask, *parts in zip(*chunks, strict=True)
            if mask.any()
        ]
        return mean_of(torch.stack(sums).sum(), num_captured, num_items_in_batch)

    def _masked_sum(self, logits: Tensor, mask: Tensor, values: Mapping[str, Tensor]) -> Tensor:
        with torch.autocast(logits.device.type, enabled=False):
            student_CV = logits[mask].to(wide_dtype(logits.dtype))
            return self.sum_over(student_CV, {name: tensor[mask] for name, tensor in values.items()})

    def values_of(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Take out of a batch the values that the loss reads, [B*T, ...], moved to the positions they belong to."""
        names = _CAPTURED[self._capture]
        return {name: batch[name].flatten(0, 1) for name in names} | {"labels": _next_labels(batch["labels"])}

    def sum_over(self, student_CV: Tensor, values: Mapping[str, Tensor]) -> Tensor:
        """Sum the loss over captured positions, given the student's logits in float32 or float64, and the values."""
        return self.joined(*self.parts_over(student_CV, values))

    def parts_over(self, student_CV: Tensor, values: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        """Sum the two parts of the loss: the divergence, and the cross-entropy unless its weight is 0."""
        known = {name: like_student(student_CV, tensor) for name, tensor in values.items()}
        total = self._divergence_sum(student_CV, known)
        return total, cross_entropy_sum(student_CV, known["labels"]) if self.cross_entropy_weight else None

    def joined(self, divergence: Tensor, cross_entropy: Tensor | None) -> Tensor:
        """Weigh the parts of the loss."""
        weight = self.cross_entropy_weight
        return divergence if cross_entropy is None else (1 - weight) * divergence + weight * cross_entropy

    def _divergence_sum(self, student_CV: Tensor, known: Mapping[str, Tensor]) -> Tensor:
        if self.tail == "drawn":
            return sampled_forward_kl(student_CV, known["kept_ids"], known["kept_logprobs"]).sum()
        if self._capture in ("hidden", "full"):
            events = common_columns(student_CV, self.teacher_logits(known))
        else:
            ids_CK, logprobs_CK = known["kept_ids"], known["kept_logprobs"]
            certain_CK = certain_tokens(logprobs_CK) if self._capture == "sample" else None
            events = kept_events(student_CV, ids_CK, logprobs_CK, certain_CK, ghost=self.tail == "ghost")
        teacher_CE, student_CE = (normalised(logprobs / self.temperature) for logprobs in events)
        return self.temperature**2 * self._divergence(teacher_CE, student_CE)

    def _divergence(self, teacher_CE: Tensor, student_CE: Tensor) -> Tensor:
        if self.divergence == "forward_kl":
            return kl_sum(teacher_CE, student_CE)
        if self.divergence == "reverse_kl":
            return kl_sum(student_CE, teacher_CE)
        mixture_CE = torch.logaddexp(teacher_CE + math.log(self.beta), student_CE + math.log(1 - self.beta))
        return self.beta * kl_sum(teacher_CE, mixture_CE) + (1 - self.beta) * kl_sum(student_CE, mixture_CE)

    def teacher_logits(self, known: Mapping[str, Tensor]) -> Tensor:
        """Return the teacher's logits [C, W]. Hidden states go through the head in the teacher's own dtype."""
        if self._capture == "full":
            return known["logits"]
        hidden_CD = known["hidden"]
        head = self._head(hidden_CD.device)
        return head(hidden_CD.to(head.weight_VD.dtype)).to(hidden_CD.dtype)

    def _head(self, device: torch.device) -> TeacherHead:
        if device not in self._heads:
            head = self.dataset.head
            if head is None:
                raise UsageError("A loss from hidden states needs the teacher's head, but the dataset has none.")
            self._heads[device] = head.to(device, head.weight_VD.dtype)
        return self._heads[device]

    @property
    def _capture(self) -> str:
        return str(self.dataset.attributes["capture"])

    def check_fits(self, shape: Sequence[int], batch: Mapping[str, Tensor]) -> None:
        """Compare the shape of the student's logits with a batch and with the teacher's vocabulary.

        Raises:
            UsageError: They do not fit.
        """
        captured_BT = batch["captured"]
        if (*shape[:-1],) != captured_BT.shape:
            raise UsageError(
                f"The student's logits must have the shape {[*captured_BT.shape, 'vocabulary']}, as the batch has, got "
                f"{list(shape)}. Run the student on the batch's input_ids, and pass all its logits."
            )
        self.check_vocabulary(shape[-1])

    def check_vocabulary(self, num_columns: int) -> None:
        """Compare the columns of a student's logits with the teacher's vocabulary.

        Raises:
            UsageError: There are too few or too many.
        """
        vocab_size, tokenizer_size = (self.dataset.attributes[name] for name in ("vocab_size", "tokenizer_size"))
        least = min(vocab_size, tokenizer_size or vocab_size)
        most = max(vocab_size, tokenizer_size) + MAX_PADDED_ROWS
        if not least <= num_columns <= most:
            raise UsageError(
                f"The student's logits must have {least} to {most} columns to fit the teacher's vocabulary of "
                f"{vocab_size} and its tokenizer of {tokenizer_size or 'unknown'} size, got {num_columns}. "
                "Train a student with the teacher's tokenizer."
            )


def _next_labels(labels_BT: Tensor) -> Tensor:
    """Move the labels to the positions that predict them, [B*T]."""
    return pad(labels_BT[:, 1:], (0, 1), value=IGNORED_LABEL).flatten()


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype to compute in: never below float32."""
    return torch.promote_types(dtype, torch.float32)


def mean_of(total: Tensor, num_captured: int, num_items_in_batch: Tensor | int | None) -> Tensor:
    """Divide a batch's sum by the captured positions of the step, or of the batch if that is all."""
    if num_items_in_batch is None:
        return total / max(1, num_captured)
    return total / torch.as_tensor(num_items_in_batch, device=total.device).clamp(min=1)


def like_student(student_CV: Tensor, values: Tensor) -> Tensor:
    """Move the teacher's values to the student's device, and all but ids to its dtype."""
    dtype = student_CV.dtype if values.is_floating_point() else values.dtype
    return values.to(student_CV.device, dtype, non_blocking=True)


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise UsageError(f"{name} must be one of {', '.join(choices)}, got {value!r}.")
