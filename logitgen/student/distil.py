"""A student whose own forward takes batches of a file and returns their loss.

So the loss runs inside of all that wraps a model: data parallelism, sharding, adapters, compilation. The student stays
the model that it was, with its own class, weights and `save_pretrained`. Without captured values its forward is the
plain one, so it also generates.

Shape letters: B rows of a batch, T tokens, V vocabulary, D hidden size.
"""

import inspect
import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from inspect import Parameter, Signature
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from logitgen.errors import first_line
from logitgen.head import Head, forward_replaced, probe_values, scale_and_cap, scaled_and_capped
from logitgen.student.chunked import loss_of_hidden
from logitgen.student.dataset import LogitsDataset, check_ids
from logitgen.student.losses import DistillationLoss
from logitgen.student.measure import Meter

logger = logging.getLogger(__name__)

_BESIDE_ROWS = ("captured", "labels")
"""Entries of a batch that no row has, and that only the loss reads."""

_FOR_STUDENT = ("input_ids",)
"""Entries of a row that the student reads."""

Student = TypeVar("Student", bound=nn.Module)


def distil(student: Student, dataset: LogitsDataset, *, measure: bool = False, **options: Any) -> Student:
    """Have a student's forward take batches of `collate` and return an output with their `loss`.

    The loss is that of `DistillationLoss`, computed from the last hidden states a chunk of positions at a time. The
    output has no logits. A student whose logits are not a product of its hidden states and its head, scaled or
    soft-capped at most, has its logits computed as a whole, and the log says so.

    The forward also takes `num_items_in_batch`, the captured positions of a step over all ranks and accumulated
    batches, as transformers' `Trainer` passes it. Without it the loss is the mean over the batch.

    Args:
        student: A causal language model of transformers, or a PEFT model of one. It is changed in place.
        dataset: The dataset of the batches.
        measure: Have it keep what `measures` reads, at the cost of another look at the logits of each chunk.
        options: Arguments of `DistillationLoss`.

    Returns:
        The student.

    Raises:
        UsageError: An option is out of its range, or does not fit the file's capture, or the rows have tokens that the
            student does not know.
    """
    loss = DistillationLoss(dataset, **options)
    model: Any = student.get_base_model() if hasattr(student, "get_base_model") else student  # type: ignore[operator]
    if num_ids := getattr(model.get_input_embeddings(), "num_embeddings", None):
        check_ids(dataset, num_ids)
    names = {*(dataset[0] if len(dataset) else ()), *_BESIDE_ROWS}.difference(_FOR_STUDENT)
    model.meter = Meter(loss) if measure else None
    model.forward = _Forward(model, model.forward, loss, frozenset(names), _steps_after_product(model))
    model.accepts_loss_kwargs = True  # Trainer then passes num_items_in_batch
    return student


@dataclass(frozen=True, eq=False)
class _Forward:
    """The forward of a distilled student.

    Attributes:
        model: The student.
        plain: Its own forward.
        loss: The loss of a batch.
        names: Entries of rows and batches that the loss alone reads.
        steps: Scale and soft-cap of its logits, or None if they must be computed as a whole.
    """

    model: Any
    plain: Callable[..., Any]
    loss: DistillationLoss
    names: frozenset[str]
    steps: tuple[float, float] | None

    def __call__(self, *args: Any, num_items_in_batch: Tensor | int | None = None, **inputs: Any) -> Any:
        """Run the student, over a batch with captured values for its loss."""
        if inputs.get("captured") is None:
            passed = {} if num_items_in_batch is None else {"num_items_in_batch": num_items_in_batch}
            return self.plain(*args, **inputs, **passed)
        batch = {name: inputs.pop(name) for name in self.names & inputs.keys()}
        head = self.model.get_output_embeddings()
        if self.steps and _is_product(head):
            output, value = self._run_chunked(head, batch, num_items_in_batch, args, inputs)
        else:
            if self.steps:
                _warn_once(f"its head is now a {type(head).__name__}")
            output = self.plain(*args, **inputs)
            value = self.loss(output.logits, batch, num_items_in_batch)
            if self.model.meter:
                self.model.meter.add_logits(output.logits, batch, self.model.training)
        return type(output)(**{**output, "loss": value, "logits": None})

    def _run_chunked(
        self, head: nn.Linear, batch: dict[str, Tensor], num_items: Tensor | int | None, args: Any, inputs: Any
    ) -> tuple[Any, Tensor]:
        """Run the student with a head that computes the loss, and returns logits of no tokens."""
        scale, soft_cap = cast(tuple[float, float], self.steps)
        found: list[Tensor] = []
        meter = self.model.meter
        watch = partial(meter.add, training=self.model.training) if meter else None

        @torch.compiler.disable  # type: ignore[untyped-decorator]
        def lose(hidden_BTD: Tensor) -> Tensor:
            form = Head(weight_VD=head.weight, bias_V=head.bias, scale=scale, soft_cap=soft_cap)
            found.append(loss_of_hidden(self.loss, form, hidden_BTD, batch, num_items, watch))
            return hidden_BTD.new_empty((*hidden_BTD.shape[:-1], 0))

        with forward_replaced(head, lose):
            output = self.plain(*args, **inputs)
        return output, found[0]

    @property
    def __signature__(self) -> Signature:
        """The plain forward's, and all that rows and batches hold, so that `Trainer` drops none of it as unused."""
        plain = inspect.signature(self.plain).parameters
        kinds = Parameter.KEYWORD_ONLY, Parameter.VAR_KEYWORD
        more = sorted(self.names.difference(plain))
        added = [Parameter(name, Parameter.KEYWORD_ONLY, default=None) for name in [*more, "num_items_in_batch"]]
        before = [parameter for parameter in plain.values() if parameter.kind not in kinds]
        after = [parameter for parameter in plain.values() if parameter.kind in kinds]
        return Signature([*before, *added, *after])


def _is_product(head: nn.Module | None) -> bool:
    """Whether a head is a matrix product and nothing else: neither quantised, nor adapted, nor elsewhere."""
    return isinstance(head, nn.Linear) and type(head).forward is nn.Linear.forward and "forward" not in vars(head)


@torch.no_grad()
def _steps_after_product(model: Any) -> tuple[float, float] | None:
    """Find scale and soft-cap of a student's logits, by running it on two tokens; None if they are no such product.

    As with the teacher, there is no list of families: the head answers numbers of all sizes, and the logits show what
    the model does to them.
    """
    head, training = model.get_output_embeddings(), model.training
    if not _is_product(head):
        return _warn_once(f"its head is a {type(head).__name__}")
    hidden: list[Tensor] = []
    probe_V = probe_values(len(head.weight), head.weight.device)

    def answer(hidden_BTD: Tensor) -> Tensor:
        hidden.append(hidden_BTD)
        return probe_V.repeat(*hidden_BTD.shape[:-1], 1)

    ids_BT = torch.tensor([[0, 1]], device=model.device)
    model.eval()
    try:
        with forward_replaced(head, answer):
            answer_V = model(input_ids=ids_BT).logits[0, -1].float()
        own_BTV = model(input_ids=ids_BT).logits.float()
        (hidden_BTD,) = hidden
        found = scale_and_cap(probe_V, answer_V)
        expected_BTV = scaled_and_capped(head(hidden_BTD).float(), *(found or (1.0, 0.0)))
    except Exception as error:  # an unusual student raises errors of any type; the plain way remains
        return _warn_once(f"running it with another head fails: {first_line(error)}")
    finally:
        model.train(training)
    rounding = 4 * torch.finfo(head.weight.dtype).eps * own_BTV.abs().max().item()
    if not found or not torch.allclose(expected_BTV, own_BTV, rtol=0, atol=rounding):
        return _warn_once("they are not a product of its last hidden states and its head")
    return found


@cache
def _warn_once(reason: str) -> None:
    """Say why the student's logits are computed as a whole."""
    logger.warning("The student's logits are computed as a whole, which takes more memory: %s.", reason)
