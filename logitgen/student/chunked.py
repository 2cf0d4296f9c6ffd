"""The loss from the student's last hidden states and its head, chunk by chunk: the logits of a batch never exist.

A chunk's logits are made, compared with the teacher, and turned into gradients before the next chunk's. So the forward
pass computes the gradients too, and the backward pass has only to scale them.

Shape letters: B rows of a batch, T tokens, P captured positions, C of them in a chunk, V rows of the student's head, D
hidden size.

Source: Hsu et al. 2024, "Liger Kernel", section 3.2, fused linear cross-entropy.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from logitgen.head import Head
from logitgen.student.chunks import positions_at_once
from logitgen.student.losses import DistillationLoss, mean_of, wide_dtype

_WHOLE_SHARE = 4
"""Whole distributions take eight tensors of a chunk's size at their peak, kept tokens two: so the former get a quarter
of the positions, and both take no more than two chunks."""

Watch = Callable[[Tensor, Mapping[str, Tensor], tuple[Tensor, Tensor | None]], None]
"""Takes the student's logits of a chunk [C, V], the values at its positions, and the parts of its loss."""


def loss_of_hidden(
    loss: DistillationLoss,
    head: Head,
    hidden_BTD: Tensor,
    batch: Mapping[str, Tensor],
    num_items_in_batch: Tensor | int | None = None,
    watch: Watch | None = None,
) -> Tensor:
    """Compute the same as `loss(logits, batch, num_items_in_batch)` from the hidden states that the head reads.

    The products have the dtype of autocast, or else of the hidden states. All else has float32, or float64 if they do.
    The gradients for hidden states, weight and bias are summed in float32. `watch` is called for every chunk.

    Returns:
        A scalar, float32 or float64. It has one backward pass.

    Raises:
        UsageError: The hidden states do not fit the batch, or the vocabularies differ.
    """
    loss.check_fits((*hidden_BTD.shape[:-1], len(head.weight_VD)), batch)
    captured_P = batch["captured"].flatten().nonzero()[:, 0]
    values = loss.values_of(batch)

    def sum_of(logits_CV: Tensor, chunk: slice) -> Tensor:
        at = {name: captured_P[chunk].to(tensor.device) for name, tensor in values.items()}
        student_CV, known = head.after_product(logits_CV), {name: values[name][at[name]] for name in values}
        parts = loss.parts_over(student_CV, known)
        if watch:
            watch(student_CV, known, parts)
        return loss.joined(*parts)

    hidden_PD = hidden_BTD.flatten(0, 1)[captured_P.to(hidden_BTD.device)]
    device_type = hidden_BTD.device.type
    dtype = torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else hidden_PD.dtype
    step = positions_at_once(hidden_BTD.device, len(head.weight_VD), 1 if "kept_ids" in values else _WHOLE_SHARE)
    task = _Task(sum_of, dtype, step, torch.is_grad_enabled())
    with torch.autocast(device_type, enabled=False):
        total: Tensor = _HeadSum.apply(task, hidden_PD, head.weight_VD, head.bias_V)  # type: ignore[no-untyped-call]
    return mean_of(total, len(captured_P), num_items_in_batch)


@dataclass(frozen=True)
class _Task:
    """How to sum the loss over all chunks.

    Attributes:
        sum_of: From the logits of a chunk, in `wide`, and its slice of the captured positions to the sum of its loss.
        dtype: Of the products.
        step: Positions of a chunk.
        with_gradient: False if nothing will be differentiated.
    """

    sum_of: Callable[[Tensor, slice], Tensor]
    dtype: torch.dtype
    step: int
    with_gradient: bool

    def slope(self, product_CV: Tensor, chunk: slice) -> tuple[Tensor, Tensor | None]:
        """Sum the loss of a chunk, and differentiate it by the product of hidden states and weight."""
        if not self.with_gradient:
            return self.sum_of(product_CV, chunk), None
        with torch.enable_grad():
            value = self.sum_of(product_CV.requires_grad_(), chunk)
        return value.detach(), torch.autograd.grad(value, product_CV)[0]


class _HeadSum(torch.autograd.Function):
    """The summed loss; `backward` scales gradients that `forward` has computed."""

    @staticmethod
    def forward(ctx: Any, task: _Task, hidden_PD: Tensor, weight_VD: Tensor, bias_V: Tensor | None) -> Tensor:
        wide = wide_dtype(task.dtype)
        inputs = hidden_PD, weight_VD, bias_V
        needed = [task.with_gradient and need for need in ctx.needs_input_grad[1:]]
        slopes = [
            torch.zeros_like(tensor, dtype=wide) if tensor is not None and need else None
            for tensor, need in zip(inputs, needed, strict=True)
        ]
        of_hidden_PD, of_weight_VD, of_bias_V = slopes
        weight = weight_VD.to(task.dtype)  # once for all chunks
        bias = None if bias_V is None else bias_V.to(task.dtype)
        total = torch.zeros((), dtype=wide, device=hidden_PD.device)
        for start in range(0, len(hidden_PD), task.step):
            chunk = slice(start, start + task.step)
            hidden_CD = hidden_PD[chunk].to(task.dtype)
            value, slope_CV = task.slope(linear(hidden_CD, weight, bias).to(wide), chunk)
            total += value
            if slope_CV is None:
                continue
            if of_bias_V is not None:
                of_bias_V += slope_CV.sum(0)
            slope_CV = slope_CV.to(task.dtype)
            if of_hidden_PD is not None:
                of_hidden_PD[chunk] = slope_CV @ weight
            if of_weight_VD is not None:
                _add_product(of_weight_VD, slope_CV.T, hidden_CD)
            del slope_CV  # before the next chunk's logits
        ctx.slopes = [
            None if tensor is None or slope is None else slope.to(tensor.dtype)
            for slope, tensor in zip(slopes, inputs, strict=True)
        ]
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.slopes is None:
            raise RuntimeError("The gradients of a distilled student's loss are used up. Compute the loss again.")
        slopes, ctx.slopes = ctx.slopes, None
        return None, *(None if tensor is None else tensor.mul_(slope) for tensor in slopes)


def _add_product(total_VD: Tensor, slope_VC: Tensor, hidden_CD: Tensor) -> None:
    """Add a product to a sum in place. Only of equal dtypes it needs no tensor of its own."""
    if total_VD.dtype == hidden_CD.dtype:
        total_VD.addmm_(slope_VC, hidden_CD)
    else:
        total_VD += slope_VC @ hidden_CD
