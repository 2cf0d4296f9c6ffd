"""The teacher: any causal language model of transformers, its logits handed out chunk by chunk.

A teacher may be spread over the devices of a machine (`device_map`), or over ranks: tensor parallel, where they compute
a batch together, or fully sharded (FSDP2), where each computes batches of its own with weights that are gathered layer
by layer. transformers does all of it; what is left to do here is to keep the vocabulary apart and the ranks in step.

Shape letters: B rows of a batch, T positions of a row, P captured positions, C positions of a chunk, V vocabulary,
S ids of a shard of it, D hidden size.
"""

import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.utils import align_module_device
from logitgen.teacher.identity import describe_adapters, describe_computation, describe_config, fingerprint
from logitgen.teacher.shard import VocabShard
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, masking_utils
from transformers.distributed.configuration_utils import DistributedConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from logitgen.config import Config
from logitgen.errors import UsageError, first_line
from logitgen.file.layout import STORED_DTYPES, HeadForm
from logitgen.head import Head, dtype_name

logger = logging.getLogger(__name__)

CHUNK_LOGITS = 2**24
"""Logits that exist at a time on a CPU: 64 MiB as float32. It fixes the shapes of the head's matrix products, and so
bits. Smaller chunks read the head's weights too often, larger ones gain nothing (1 thread, SmolLM2-135M: 2**22 costs
20 % more, 2**25 the same)."""

GPU_CHUNK_LOGITS = 2**29
"""The same on a GPU: 1 GiB in bfloat16. Each chunk costs the host some forty launches of kernels, for which a GPU that
is done with the one before waits."""

_SCALE_ERROR = 1e-5
"""What float32 may make of a scale and a soft-cap, relatively."""
_PRODUCT_ERROR = 1e-5
"""What float32 may make of two ways to compute the product with the head, of its largest result."""

_ALIGNMENT = 64
"""Bytes: where torch's own tensors begin on a CPU, and a cache line."""


@dataclass(frozen=True)
class TeacherInfo:
    """What is known of a teacher before its weights are loaded.

    Attributes:
        vocab_size: Rows of the output head, V.
        max_length: Longest row the run allows, in tokens; None where neither options nor teacher set a limit.
        length_switch: Row length in tokens above which the whole row is computed differently (the long factors of
            LongRoPE, chosen by the longest row of a batch); None for most.
        commit: The hub's commit hash; empty for a folder.
        quantization: How its checkpoint is quantised, as JSON; empty if it is not.
        config: What of its configuration can change its logits, see `identity.describe_config`.
    """

    vocab_size: int
    max_length: int | None
    length_switch: int | None
    commit: str
    quantization: str
    config: dict[str, Any]


def describe_teacher(config: Config) -> TeacherInfo:
    """Read a teacher's configuration, without its weights.

    Raises:
        UsageError: There is no such teacher, it is no causal language model, or the options ask for more tokens than
            it can read or knows.
    """
    folder = Path(config.teacher)
    is_folder = os.path.isdir(folder)  # noqa: PTH112 (Path.is_dir raises for names too long)
    is_path = folder.is_absolute() or config.teacher.startswith(".") or len(folder.parts) > 2
    if is_path and not is_folder:
        wrong = "is not a folder" if os.path.lexists(folder) else "does not exist"
        raise UsageError(f"--teacher {config.teacher} {wrong}. Give a folder or a hub id.")
    if config.revision and is_folder:
        raise UsageError(f"--revision is for teachers on the hub, {config.teacher} is a folder. Leave it out.")
    if is_folder and not config.teacher_gguf and not (folder / "config.json").is_file():
        raise UsageError(f"--teacher {config.teacher} has no config.json. Give the folder of a transformers model.")
    gguf = {"gguf_file": config.teacher_gguf} if config.teacher_gguf else {}
    try:
        teacher_config = AutoConfig.from_pretrained(
            config.teacher, revision=config.revision, trust_remote_code=config.trust_remote_code, **gguf
        )
    except Exception as error:
        if "trust_remote_code" in str(error) and not config.trust_remote_code:
            raise UsageError(
                f"--teacher {config.teacher} comes with code of its own. Add --trust_remote_code if you trust it."
            ) from error
        raise UsageError(f"--teacher {config.teacher} cannot be loaded: {_cause(error)}") from error
    text_config = teacher_config.get_text_config()
    own_code = "AutoModelForCausalLM" in (getattr(teacher_config, "auto_map", None) or {})
    known = type(teacher_config) in AutoModelForCausalLM._model_mapping
    if known and own_code and not config.trust_remote_code:
        logger.warning("The teacher comes with code of its own, which is not run; transformers' own is.")
    if not known and not (own_code and config.trust_remote_code):
        raise UsageError(
            f"--teacher {config.teacher} is a {teacher_config.model_type} model, which has no causal language model "
            "in transformers. Give a model that predicts the next token."
        )
    context_length = getattr(text_config, "max_position_embeddings", None)
    _check(config, text_config.vocab_size, context_length)
    return TeacherInfo(
        vocab_size=text_config.vocab_size,
        max_length=config.max_length or context_length,
        length_switch=_length_switch(text_config),
        commit=getattr(teacher_config, "_commit_hash", None) or "",
        quantization=_quantization(teacher_config),
        config=describe_config(teacher_config),
    )


def _length_switch(text_config: PreTrainedConfig) -> int | None:
    rope = getattr(text_config, "rope_parameters", None) or {}
    if rope.get("rope_type") != "longrope":
        return None
    return rope.get("original_max_position_embeddings") or getattr(
        text_config, "original_max_position_embeddings", None
    )


def _quantization(teacher_config: PreTrainedConfig) -> str:
    found = getattr(teacher_config, "quantization_config", None)
    if not found:
        return ""
    return json.dumps(found if isinstance(found, dict) else found.to_dict(), sort_keys=True, default=str)


def _check(config: Config, vocab_size: int, context_length: int | None) -> None:
    if vocab_size < 1:
        raise UsageError(f"--teacher {config.teacher} has a vocab_size of {vocab_size} in its config.json. Correct it.")
    attentions = ("eager", *ALL_ATTENTION_FUNCTIONS.valid_keys())
    name = config.attn_implementation
    if name and name not in attentions and "/" not in name:  # a name with a slash is a kernel on the hub
        raise UsageError(f"--attn_implementation must be one of {', '.join(sorted(attentions))}, got {name}.")
    if config.kept > vocab_size:  # of those that are drawn, `Layout.check` knows the number
        raise UsageError(
            f"--top_k must be between 1 and the vocabulary size {vocab_size}, got {config.top_k}. "
            "Lower it, or keep every token with --capture full."
        )
    if config.max_length and context_length and config.max_length > context_length:
        raise UsageError(
            f"--max_length must be at most the teacher's context length {context_length}, got {config.max_length}. "
            "Lower it."
        )


class Teacher:
    """A loaded teacher.

    Attributes:
        device: Where its logits come out.
        dtype: In which precision it computes.
        is_shared: Whether it is spread over several ranks, which must then run it equally often.
        shard: The ids whose logits this rank gets.
        fingerprint: SHA-256 over all weights, see `identity.fingerprint`.
        computation: How it computes, see `identity.describe_computation`.
        head: Its output head, if it was asked for.
    """

    def __init__(self, model: PreTrainedModel, vocab_size: int, with_head: bool = False) -> None:
        """Wrap a model in evaluation mode, and find out how it can be run.

        Args:
            model: As `load_model` loads it.
            vocab_size: How many logits it should have, V.
            with_head: Whether its head is to be stored.

        Raises:
            UsageError: It is no causal language model, has another number of logits, or its head cannot be stored.
        """
        # cuDNN's attention plans every new shape of a batch for some 50 ms, and almost every batch has a new one
        # (modelscope/FunASR #3704, pytorch/pytorch #191576). It is the likely reason for the 65 ms a batch that 8 small
        # layers took on an H200; the gain of leaving it out has not been measured.
        torch.backends.cuda.enable_cudnn_sdp(False)
        self._model = model
        self.device = _device_of_logits(model)
        self.dtype = model.dtype
        self.is_shared = model._device_mesh is not None
        self.fingerprint = fingerprint(_weights(model), describe_adapters(model))
        self.computation = describe_computation(model)
        self.shard = _find_shard(model, vocab_size, self.device)
        self._decoder = _separable_decoder(model, self.shard, self.device)
        self.head = _find_head(model, self._decoder, self.shard, self.device) if with_head else None

    @property
    def head_form(self) -> HeadForm | None:
        """Sizes of the output head, if it was asked for."""
        return self.head.form if self.head else None

    def logits(self, input_ids_BT: Tensor, row_P: Tensor, position_P: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Yield the logits at some positions of a right-padded batch, a chunk of positions at a time.

        The body runs once; the head runs over chunks of the hidden states that are wanted, so no tensor of the size
        positions x vocabulary ever exists.

        Args:
            input_ids_BT: int64[B, T] on the teacher's device.
            row_P: Batch row of each wanted position, int64[P].
            position_P: Position in that row, int64[P].

        Yields:
            Which of the P positions these are, their logits [C, S] and their last hidden states [C, D], in the dtype
            the teacher computes in; the latter are empty where the teacher is run whole.
        """
        step = max(1, (CHUNK_LOGITS if self.device.type == "cpu" else GPU_CHUNK_LOGITS) // self.shard.size)
        output = self._body(input_ids_BT)
        if self._decoder is None:
            output_BTS = output.logits
            for start in range(0, len(row_P), step):
                span = slice(start, min(start + step, len(row_P)))
                logits_CS = output_BTS[row_P[span], position_P[span]]
                yield span, logits_CS, logits_CS[:, :0]
            return
        hidden_PD = output.last_hidden_state.to(self.device)[row_P, position_P]
        for start in range(0, len(row_P), step):
            span = slice(start, min(start + step, len(row_P)))
            yield span, _head(self._model, self._decoder, output, hidden_PD[span]), hidden_PD[span]

    def keep_step(self) -> None:
        """Run once for nothing, because another rank that shares the teacher runs it once more."""
        self._body(torch.zeros((1, 1), dtype=torch.int64, device=self.device))

    @torch.no_grad()
    def _body(self, input_ids_BT: Tensor) -> Any:
        """Run all but the head; the head too where it cannot be run apart."""
        with _rows_not_packed():
            return (self._decoder or self._model)(input_ids=input_ids_BT, use_cache=False)


def load_model(config: Config, info: TeacherInfo, device: torch.device, num_replicas: int = 1) -> PreTrainedModel:
    """Load a teacher's weights straight to where they are used: no rank ever holds more of them than its part.

    Ranks that share it do not wait for one another here; they do whenever they use it.

    Args:
        config: The run's options.
        info: The teacher's configuration.
        device: This rank's device.
        num_replicas: How many copies of the teacher the ranks hold together.

    Raises:
        UsageError: The weights cannot be loaded, or some of them are missing from the checkpoint.
    """
    gguf = {"gguf_file": config.teacher_gguf} if config.teacher_gguf else {}
    attention = {"attn_implementation": config.attn_implementation} if config.attn_implementation else {}
    placement = _placement(config, device, num_replicas)
    try:
        loaded = AutoModelForCausalLM.from_pretrained(
            config.teacher,
            revision=config.revision,
            dtype=config.dtype if config.dtype == "auto" else getattr(torch, config.dtype),
            trust_remote_code=config.trust_remote_code,
            output_loading_info=True,
            **placement,
            **gguf,
            **attention,
        )
    except torch.OutOfMemoryError as error:
        raise UsageError(
            f"--teacher {config.teacher} does not fit into the memory of {device}. {first_line(error)}"
        ) from error
    except Exception as error:
        if "has no `tp_plan`" in str(error):
            raise UsageError(
                f"--tp_size: transformers does not know how to cut {config.teacher}. Share it with --fsdp_size."
            ) from error
        raise UsageError(f"--teacher {config.teacher} cannot be loaded: {_cause(error)}") from error
    model, loading = cast(tuple[PreTrainedModel, dict[str, Any]], loaded)
    if missing := sorted(loading["missing_keys"]):
        raise UsageError(
            f"--teacher {config.teacher} lacks {len(missing)} weights, {missing[0]} the first: they would be random. "
            "Give a complete causal language model."
        )
    if unused := sorted(loading["unexpected_keys"]):
        logger.warning(
            f"The teacher's checkpoint has {len(unused)} weights its configuration has no use for: {unused[0]}"
        )
    if config.fsdp_size == 1:
        _align_weights(model)
    model.config.return_dict = True  # some checkpoints ask for tuples
    return cast(PreTrainedModel, model.eval())


def _placement(config: Config, device: torch.device, num_replicas: int) -> dict[str, Any]:
    """Say to transformers where the weights belong."""
    if config.replica_size == 1:
        return {"device_map": config.device_map or {"": device}}
    try:
        mesh = DistributedConfig(tp_size=config.tp_size, fsdp_size=config.fsdp_size, dp_replicate_size=num_replicas)
    except TypeError as error:
        raise UsageError(
            f"--tp_size and --fsdp_size need transformers 5.23 or later, this is {version('transformers')}. Upgrade "
            "it, or spread the teacher over the GPUs of one rank with --device_map auto."
        ) from error
    return {"distributed_config": mesh}


def _align_weights(model: PreTrainedModel) -> None:
    """Copy the weights in host memory whose addresses a product may round by, one after another.

    transformers maps safetensors files where it can, so weights begin wherever the file's header happens to end. Some
    processors (AMD EPYC, MKL) round the products of a single row by that: 4.8e-7 nats, with all of 12 offsets tried.
    Fully sharded weights are gathered into torch's own memory before each product.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        local = tensor._local_tensor if isinstance(tensor, DTensor) else tensor
        if local.device.type == "cpu" and local.data_ptr() % _ALIGNMENT:
            local.data = local.data.clone()


def _device_of_logits(model: PreTrainedModel) -> torch.device:
    """Return where a model's logits come out; its weights may be elsewhere until they are needed."""
    hook = getattr(model.get_output_embeddings(), "_hf_hook", None)
    return torch.device(hook.execution_device) if hook else model.device


@torch.no_grad()
def _find_shard(model: PreTrainedModel, vocab_size: int, device: torch.device) -> VocabShard:
    """Have a tensor-parallel model leave its vocabulary apart, if whatever it does after the head allows for that.

    Its own plan joins the logits of all ranks right after the head. So what it makes of them is there to compare with.
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
    from transformers.distributed.parallel_utils import ALL_PARALLEL_STYLES  # older ones, which lack it, got no mesh

    joining = head.forward
    del head.forward
    ALL_PARALLEL_STYLES["colwise"].install_forward(head, mesh["tp"])
    try:
        logits_BTV = shard.whole(model(input_ids=input_ids_BT, use_cache=False).logits)
    except Exception as error:  # what follows the head may want all of it
        reason = f"running it on a part of the vocabulary fails: {first_line(error)}"
    else:
        if _close(logits_BTV, expected_BTV, relative=4 * torch.finfo(expected_BTV.dtype).eps):
            return shard
        reason = "its logits differ otherwise"
    head.forward = joining
    logger.warning("The teacher's vocabulary is joined on every rank: %s.", reason)
    return whole


def _some_ids(vocab_size: int, device: torch.device) -> Tensor:
    return torch.arange(16, device=device).view(2, 8) % vocab_size


@torch.no_grad()
def _separable_decoder(model: PreTrainedModel, shard: VocabShard, device: torch.device) -> nn.Module | None:
    """Return the model's body if body and head apart give the plain forward's logits, else None.

    Raises:
        UsageError: The logits are not as wide as the teacher's configuration says, or depend on later tokens.
    """
    vocab_size = shard.vocab_size
    input_ids_BT = _some_ids(vocab_size, device)
    plain_BTS = model(input_ids=input_ids_BT, use_cache=False).logits
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
    other_last_BT = input_ids_BT.clone()
    other_last_BT[:, -1] = (other_last_BT[:, -1] + 1) % vocab_size
    changed_BTS = model(input_ids=other_last_BT, use_cache=False).logits
    # Quantised to 8 bits, a token's numbers are rounded together with those of the others.
    noise = 0.1 if getattr(model, "hf_quantizer", None) else max(16 * torch.finfo(plain_BTS.dtype).eps, 0.01)
    if not _close(changed_BTS[:, :-1], plain_BTS[:, :-1], relative=noise):
        raise UsageError(
            "The teacher's logits depend on later tokens: it is no causal language model, or is not set up as one "
            "(is_decoder in its config.json)."
        )
    try:
        decoder = cast(nn.Module, model.get_decoder())
        output = decoder(input_ids=input_ids_BT, use_cache=False)
        chunked_CS = _head(model, decoder, output, output.last_hidden_state.to(device).flatten(0, 1))
    except Exception as error:  # a body that works otherwise raises whatever it likes; the plain path is left
        reason = f"running it apart fails: {first_line(error)}"
    else:
        if _close(chunked_CS, plain_BTS.flatten(0, 1), relative=4 * torch.finfo(plain_BTS.dtype).eps):
            return decoder
        reason = "its logits differ from a plain forward"
    logger.warning("The teacher's head cannot be run in chunks, %s; memory holds a batch's full logits.", reason)
    return None


def _close(logits: Tensor, expected: Tensor, relative: float) -> bool:
    """Compare logits by the largest one; masked tokens must be masked in both, and do not count as large."""
    usual = expected.isfinite() & (expected.abs() < torch.finfo(expected.dtype).max / 2)
    if not torch.equal(logits.isfinite(), expected.isfinite()):
        return False
    difference, size = (logits - expected)[usual].abs(), expected[usual].abs()
    return not len(size) or bool(difference.max() <= relative * size.max())


@torch.no_grad()  # here, not on `Teacher.logits`: around a generator it holds on to a chunk while the next is computed
def _head(model: PreTrainedModel, decoder: nn.Module, output: Any, hidden_CD: Tensor) -> Tensor:
    """Let the model's own forward turn hidden states into logits, [C, V], without running its body.

    The body's forward is replaced by one that hands back its own output with these hidden states in it. So whatever a
    family does after the head (soft-cap, scaling) happens as in a plain forward, without a list of families. Tested on
    21 small models of 18 families, all exact (tests/test_teacher.py).
    """
    ready = type(output)(**{**output, "last_hidden_state": hidden_CD[None]})
    any_ids_CT = torch.zeros((1, len(hidden_CD)), dtype=torch.int64, device=hidden_CD.device)
    with _forward_returns(decoder, ready):
        return cast(Tensor, model(input_ids=any_ids_CT, use_cache=False).logits[0])


@torch.no_grad()
def _find_head(model: PreTrainedModel, decoder: nn.Module | None, shard: VocabShard, device: torch.device) -> Head:
    """Take a model's output head out of it, and prove that it gives the model's own logits.

    What a family does after the product is found without a list of families: the model's own forward is given numbers
    of all sizes in the product's place, and scale and soft-cap are read off what becomes of them, in float32.

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
    # Of both signs, from 2**-10 to 2**20: powers of two, which no scale rounds.
    id_V = torch.arange(vocab_size, device=device)
    probe_V = (1 - 2 * (id_V % 2)) * 2.0 ** (id_V // 2 % 31 - 10)
    probe_S = probe_V[shard.start : shard.start + shard.size]
    with _forward_returns(cast(nn.Module, module), probe_S.repeat(1, len(hidden_PD), 1)):
        answer_V = shard.whole(_head(model, decoder, output, hidden_PD)[-1].float())
    scale, soft_cap = _scale_and_cap(probe_V, answer_V)
    head = Head(weight_VD=weight_VD, bias_V=bias_V, scale=scale, soft_cap=soft_cap)
    if not torch.allclose(head.after_product(probe_V), answer_V, rtol=_SCALE_ERROR, atol=0):
        raise _no_head("something else is done to the logits after the product")
    own_PV = shard.whole(_head(model, decoder, output, hidden_PD))
    relative = max(4 * torch.finfo(own_PV.dtype).eps, _PRODUCT_ERROR)
    if not _close(head.to(device, torch.float32)(hidden_PD), own_PV.float(), relative):
        raise _no_head("something is done to the hidden states before the product")
    return head


def _scale_and_cap(probe_V: Tensor, answer_V: Tensor) -> tuple[float, float]:
    """Read off what becomes of small numbers, the first, and of large ones; a soft-cap of 0 is none."""
    scale = float(answer_V[0] / probe_V[0])
    largest = int(probe_V.argmax())
    if abs(answer_V[largest]) > abs(scale * probe_V[largest]) / 2:
        return scale, 0.0
    return 1.0 if abs(scale - 1) < _SCALE_ERROR else scale, float(abs(answer_V[largest]))  # a tanh rounds the small


def _no_head(reason: str) -> UsageError:
    return UsageError(
        "--capture hidden needs a teacher whose logits are a product of its last hidden states and its output "
        f"embeddings, scaled or soft-capped at most; with this one {reason}. Use another --capture."
    )


@contextmanager
def _rows_not_packed() -> Iterator[None]:
    """Spare transformers the look at position ids whether several rows are packed into one: ours never are.

    Its answer comes from the GPU, so each forward pass would wait there until the one before has ended. On an H200
    with batches of 8,192 tokens, that costs 8 % of the speed for 0.5 billion parameters, 2 % for 1.5 and 1 % for 8.
    """
    before = masking_utils.find_packed_sequence_indices
    masking_utils.find_packed_sequence_indices = lambda position_ids: None
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = before


@contextmanager
def _forward_returns(module: nn.Module, output: object) -> Iterator[None]:
    """Let a module's forward return a ready output."""
    before = module.__dict__.get("forward")  # accelerate's hooks and torch.compile put one there
    module.forward = lambda *args, **kwargs: output
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before


def _weights(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """Yield every weight, one at a time, wherever it or its parts are."""
    for module_name, module in sorted(model.named_modules()):
        of_children = tuple(f"{name}." for name, _ in module.named_children())
        with align_module_device(module):
            for name, tensor in sorted(module.state_dict().items()):
                if not name.startswith(of_children):
                    yield f"{module_name}.{name}", tensor


def _whole(tensor: Tensor) -> Tensor:
    """Join the parts of a weight that is spread over ranks."""
    return tensor.full_tensor().detach() if isinstance(tensor, DTensor) else tensor


def _cause(error: Exception) -> str:
    """Say in one line why transformers or the hub could not load something."""
    if "ignore_mismatched_sizes" in str(error):
        return "its weights have other shapes than its config.json says."
    text = " ".join(str(error).split())
    if isinstance(error, KeyError):
        text = f"KeyError {text}"
    sentences = text.split(". ")
    return sentences[0][:300].rstrip(".") + "." if sentences[0] else type(error).__name__
