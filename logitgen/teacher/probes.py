"""Probes: they run a loaded model to find ways to run its body, head and vocabulary apart.

Shape letters: B rows of a batch, T positions of a row, P positions, C positions of a chunk, V vocabulary, S ids of a
shard of it, D hidden size.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, cast

import torch
from accelerate.utils import align_module_device
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from logitgen.errors import UsageError, first_line
from logitgen.file.layout import STORED_DTYPES
from logitgen.head import Head, dtype_name, forward_replaced, probe_values, scale_and_cap
from logitgen.teacher.shard import VocabShard

logger = logging.getLogger(__name__)

_PRODUCT_ERROR = 1e-5
"""Largest difference in float32 between two ways to compute the head's product, relative to its largest result."""


@dataclass(frozen=True)
class Anatomy:
    """The parts of a model that are run apart.

    Attributes:
        device: Device the logits come out on.
        shard: The ids whose logits this rank gets.
        decoder: The body, or None where it cannot be run without the head.
        head: The output head, if it is to be stored.
        layers: Numbers of the layers whose hidden states are to be stored too, each with its D.
    """

    device: torch.device
    shard: VocabShard
    decoder: nn.Module | None
    head: Head | None
    layers: tuple[tuple[int, int], ...]


def probe(model: PreTrainedModel, vocab_size: int, with_head: bool, layers: Sequence[int] = ()) -> Anatomy:
    """Find the parts of a model that can be run apart, by running it on a few tokens.

    Raises:
        UsageError: It is no causal language model, has another number of logits, its head cannot be stored, or it has
            no such hidden states.
    """
    device = _device_of_logits(model)
    shard = _find_shard(model, vocab_size, device)
    decoder = _separable_decoder(model, shard, device)
    head = _find_head(model, decoder, shard, device) if with_head else None
    widths = _layer_widths(model, decoder, layers, _some_ids(vocab_size, device)) if layers else {}
    return Anatomy(device, shard, decoder, head, tuple(widths.items()))


def _device_of_logits(model: PreTrainedModel) -> torch.device:
    """Return the device a model's logits come out on. Its weights may be elsewhere until they are needed."""
    hook = getattr(model.get_output_embeddings(), "_hf_hook", None)
    return torch.device(hook.execution_device) if hook else model.device


@torch.no_grad()
def _find_shard(model: PreTrainedModel, vocab_size: int, device: torch.device) -> VocabShard:
    """Have a tensor-parallel model leave its vocabulary apart, if the steps after its head allow for that.

    Its own plan joins the logits of all ranks right after the head. That gives the logits to compare with.
    """
    whole = VocabShard(None, vocab_size)
    mesh, head = model._device_mesh, model.get_output_embeddings()
    if mesh is None or mesh["tp"].size() == 1 or "forward" not in vars(head):
        return whole
    group = mesh["tp"].get_group()
    shard = VocabShard(group, vocab_size)
    input_ids_BT = _some_ids(vocab_size, device)
    try:
        expected_BTV = model(input_ids=input_ids_BT, use_cache=False).logits
    except RuntimeError as error:
        raise UsageError(
            f"--tp_size {group.size()} does not fit the teacher: {first_line(error)}. Choose one that divides its "
            "key-value heads, or share it with --fsdp_size."
        ) from error
    from transformers.distributed.parallel_utils import ALL_PARALLEL_STYLES  # older versions, without it, got no mesh

    joining = head.forward
    del head.forward
    ALL_PARALLEL_STYLES["colwise"].install_forward(head, mesh["tp"])
    try:
        logits_BTV = shard.whole(model(input_ids=input_ids_BT, use_cache=False).logits)
    except Exception as error:  # the steps after the head may need all of it
        reason = f"running it on a part of the vocabulary fails: {first_line(error)}"
    else:
        if close(logits_BTV, expected_BTV, relative=4 * torch.finfo(expected_BTV.dtype).eps):
            return shard
        reason = "its logits differ otherwise"
    head.forward = joining
    logger.warning("The teacher's vocabulary is joined on every rank: %s.", reason)
    return whole


def _some_ids(vocab_size: int, device: torch.device) -> Tensor:
    """Return two lines of tokens that differ in the last one, [B=2, T=8]."""
    ids_BT = torch.arange(8, device=device).repeat(2, 1)
    ids_BT[1, -1] += 1
    return ids_BT % vocab_size


@torch.no_grad()
def _separable_decoder(model: PreTrainedModel, shard: VocabShard, device: torch.device) -> nn.Module | None:
    """Return the model's body if body and head apart give the plain forward's logits, else None.

    Raises:
        UsageError: The logits are not as wide as the teacher's configuration says, or depend on later tokens.
    """
    input_ids_BT = _some_ids(shard.vocab_size, device)
    plain_BTS = _causal_logits(model, shard, input_ids_BT)
    for body in (model.base_model, model.get_decoder()):
        try:
            output = body(input_ids=input_ids_BT, use_cache=False)
            chunked_CS = run_head(model, body, output, output.last_hidden_state.to(device).flatten(0, 1))
        except Exception as error:  # an unusual body raises errors of any type; the plain path remains
            reason = f"running it apart fails: {first_line(error)}"
        else:
            if close(chunked_CS, plain_BTS.flatten(0, 1), relative=4 * torch.finfo(plain_BTS.dtype).eps):
                return cast(nn.Module, body)
            reason = "its logits differ from a plain forward"
    logger.warning("The teacher's head cannot be run in chunks, %s; memory holds a batch's full logits.", reason)
    return None


def _causal_logits(model: PreTrainedModel, shard: VocabShard, input_ids_BT: Tensor) -> Tensor:
    """Return the plain forward's logits [B, T, S], once they are as wide as expected, finite and causal."""
    vocab_size = shard.vocab_size
    try:
        plain_BTS = model(input_ids=input_ids_BT, use_cache=False).logits
    except (TypeError, ValueError, LookupError, AttributeError) as error:
        raise UsageError(
            f"The teacher cannot be run on text alone: {first_line(error)}. Give a model that predicts the next token."
        ) from error
    if plain_BTS.shape[-1] != shard.size:
        raise UsageError(
            f"The teacher's logits are {plain_BTS.shape[-1]} wide, its configuration says {vocab_size}. "
            "Correct vocab_size in its config.json."
        )
    if not plain_BTS.logsumexp(-1).isfinite().all():
        raise UsageError(
            f"The teacher's logits are not finite in {str(model.dtype).removeprefix('torch.')}, whatever it reads. "
            "Try another --dtype; if that does not help, its weights are damaged."
        )
    # Under quantisation to 8 bits, a token's numbers are rounded together with those of the others.
    noise = 0.1 if getattr(model, "hf_quantizer", None) else max(16 * torch.finfo(plain_BTS.dtype).eps, 0.01)
    if not close(plain_BTS[1, :-1], plain_BTS[0, :-1], relative=noise):
        raise UsageError(
            "The teacher's logits depend on later tokens: it is no causal language model, or is not set up as one "
            "(is_decoder in its config.json)."
        )
    return cast(Tensor, plain_BTS)


def close(logits: Tensor, expected: Tensor, relative: float) -> bool:
    """Compare logits relative to the largest. Masked tokens must be masked in both, and do not count as large."""
    if not torch.equal(logits.isfinite(), expected.isfinite()):
        return False
    masked = ~(expected.abs() < torch.finfo(expected.dtype).max / 2)  # infinity and NaN too
    difference, size = (values.abs().masked_fill_(masked, 0).max() for values in (logits - expected, expected))
    return bool(difference <= relative * size)


@torch.no_grad()  # here, not on `Teacher.logits`: around a generator it holds on to a chunk while the next is computed
def run_head(model: PreTrainedModel, decoder: nn.Module, output: Any, hidden_CD: Tensor) -> Tensor:
    """Have the model's own forward turn hidden states into logits, [C, V], without running its body.

    The body's forward is replaced by a function that returns the body's output with these hidden states in it. Any step
    of a family after the head (soft-cap, scaling) then happens as in a plain forward, without a list of families.
    Tested on 40 small models of 36 families, all exact (tests/test_teacher.py).
    """
    ready = type(output)(**{**output, "last_hidden_state": hidden_CD[None]})
    any_ids_CT = torch.zeros((1, len(hidden_CD)), dtype=torch.int64, device=hidden_CD.device)
    with forward_replaced(decoder, lambda *_, **__: ready):
        return cast(Tensor, model(input_ids=any_ids_CT, use_cache=False).logits[0])


@torch.no_grad()
def _find_head(model: PreTrainedModel, decoder: nn.Module | None, shard: VocabShard, device: torch.device) -> Head:
    """Take a model's output head out of it, and prove that it gives the model's own logits.

    The steps of a family after the product are found without a list of families. The model's own forward gets numbers
    of all sizes in the product's place, and scale and soft-cap are read off its answer, in float32.

    Raises:
        UsageError: Its logits are not soft_cap * tanh(scale * (hidden @ weight.T + bias) / soft_cap).
    """
    module = model.get_output_embeddings()
    if decoder is None or getattr(module, "weight", None) is None:
        raise _no_head("body and head cannot be run apart")
    with align_module_device(module):
        weight_VD = _whole(module.weight)
        bias_V = None if getattr(module, "bias", None) is None else _whole(module.bias)
    vocab_size = shard.vocab_size
    output = decoder(input_ids=_some_ids(vocab_size, device), use_cache=False)
    hidden_PD = output.last_hidden_state.to(device).flatten(0, 1)
    dtypes = {tensor.dtype for tensor in (hidden_PD, weight_VD, bias_V) if tensor is not None}
    if dtypes != {model.dtype} or dtype_name(model.dtype) not in STORED_DTYPES:
        names = " and ".join(sorted(map(dtype_name, dtypes | {model.dtype})))
        raise _no_head(
            f"its weights and hidden states are {names}, expected one of {', '.join(STORED_DTYPES)} (see --dtype)"
        )
    probe_V = probe_values(vocab_size, device)
    probe_S = probe_V[shard.start : shard.start + shard.size].repeat(1, len(hidden_PD), 1)
    with forward_replaced(cast(nn.Module, module), lambda *_, **__: probe_S):
        answer_V = shard.whole(run_head(model, decoder, output, hidden_PD)[-1].float())
    if not (found := scale_and_cap(probe_V, answer_V)):
        raise _no_head("something else is done to the logits after the product")
    head = Head(weight_VD=weight_VD, bias_V=bias_V, scale=found[0], soft_cap=found[1])
    own_PV = shard.whole(run_head(model, decoder, output, hidden_PD))
    relative = max(4 * torch.finfo(own_PV.dtype).eps, _PRODUCT_ERROR)
    if not close(head.to(device, torch.float32)(hidden_PD), own_PV.float(), relative):
        raise _no_head("something is done to the hidden states before the product")
    return head


def _no_head(reason: str) -> UsageError:
    return UsageError(
        "--capture hidden needs a teacher whose logits are a product of its last hidden states and its output "
        f"embeddings, scaled or soft-capped at most; with this one {reason}. Use another --capture."
    )


def _is_same(states: Tensor, expected: Tensor) -> bool:
    return close(states, expected, relative=4 * torch.finfo(states.dtype).eps)


@torch.no_grad()
def _layer_widths(
    model: PreTrainedModel, decoder: nn.Module | None, layers: Sequence[int], input_ids_BT: Tensor
) -> dict[int, int]:
    """Find D of the hidden states of some layers, and prove that the body alone gives the states of the whole model.

    The body is asked for the wanted layers only. Families that know no such choice return those of all layers.

    Raises:
        UsageError: It does not give them.
    """
    inputs: dict[str, Any] = {"input_ids": input_ids_BT, "use_cache": False}
    expected = model(**inputs, output_hidden_states=True).hidden_states or ()
    found = (decoder(**inputs, output_hidden_states=list(layers)).hidden_states if decoder else None) or ()
    widths = {}
    for layer in layers:
        states = found[layer] if layer < min(len(found), len(expected) - 1) else None
        if states is None or states.shape[:-1] != input_ids_BT.shape or not _is_same(states, expected[layer]):
            raise UsageError(
                f"The teacher's body does not return the hidden states of layer {layer}, one per token, with "
                f"transformers {version('transformers')}. Leave the layer out of --layers, or use transformers 5.23."
            )
        widths[layer] = states.shape[-1]
    return widths


def _whole(tensor: Tensor) -> Tensor:
    """Join the parts of a weight that is spread over ranks."""
    return tensor.full_tensor().detach() if isinstance(tensor, DTensor) else tensor
