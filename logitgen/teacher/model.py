"""The teacher: any causal language model of transformers, its logits handed out chunk by chunk.

A teacher may be spread over the devices of a machine (`device_map`), or over ranks. Tensor-parallel ranks compute a
batch together. Fully sharded ranks (FSDP2) each compute batches of their own, with weights gathered layer by layer.
transformers does all of it. This module keeps the vocabulary apart and the ranks in step.

Shape letters: L lines of a pass, T tokens of a line, P captured positions, C positions of a chunk, V vocabulary, S ids
of a shard of it, D hidden size.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import version
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel, masking_utils
from transformers.cache_utils import Cache
from transformers.distributed.configuration_utils import DistributedConfig

from logitgen.config import Config
from logitgen.errors import UsageError, cause_of, first_line
from logitgen.file.layout import Array
from logitgen.file.states import HeadForm, name_of
from logitgen.split.batch import Pass
from logitgen.teacher.adapter import merged
from logitgen.teacher.describe import loader, read_config
from logitgen.teacher.identity import describe_adapters, describe_computation, fingerprint, weights_of
from logitgen.teacher.prefix import cache_of, continued, reads_on, small_tree
from logitgen.teacher.probes import probe, run_head

logger = logging.getLogger(__name__)

CHUNK_LOGITS = 2**24
"""Logits that exist at a time on a CPU: 64 MiB as float32. It fixes the shapes of the head's matrix products, and so
bits. Smaller chunks read the head's weights too often, larger chunks gain nothing (1 thread, SmolLM2-135M: 2**22 costs
20 % more, 2**25 the same).
"""

GPU_CHUNK_LOGITS = 2**29
"""The same on a GPU: 1 GiB in bfloat16. Each chunk costs the host some forty kernel launches, and a GPU that is
done with the chunk before waits for them.
"""

_ALIGNMENT = 64
"""Bytes: the alignment of torch's own tensors on a CPU, and a cache line."""


class Teacher:
    """A loaded teacher.

    Attributes:
        device: Device its logits come out on.
        dtype: Precision of its computation.
        is_shared: True if it is spread over several ranks, which must then run it equally often.
        shard: The ids whose logits this rank gets.
        fingerprint: SHA-256 over all weights, see `identity.fingerprint`.
        computation: Description of its computation, see `identity.describe_computation`.
        head: Its output head, if it was asked for.
        layers: Numbers of the other layers whose hidden states were asked for, each with its D.
    """

    def __init__(
        self, model: PreTrainedModel, vocab_size: int, with_head: bool = False, layers: Sequence[int] = ()
    ) -> None:
        """Wrap a model in evaluation mode, and probe the ways to run it.

        Args:
            model: A model that `load_model` returned.
            vocab_size: Number of logits it should have, V.
            with_head: True to keep its head for the file.
            layers: Numbers of the layers whose hidden states are handed out beside the last.

        Raises:
            UsageError: It is no causal language model, has another number of logits, or lacks such a head or layer.
        """
        # cuDNN's attention plans every new shape of a batch for some 50 ms, and almost every batch has a new shape
        # (modelscope/FunASR #3704, pytorch/pytorch #191576). It is the likely reason for the 65 ms a batch that 8 small
        # layers took on an H200. The gain without it has not been measured.
        torch.backends.cuda.enable_cudnn_sdp(False)
        self._model = model
        self.dtype = model.dtype
        self.is_shared = model._device_mesh is not None
        self.fingerprint = fingerprint(weights_of(model), describe_adapters(model))
        self.computation = describe_computation(model)
        anatomy = probe(model, vocab_size, with_head, layers)
        self.device, self.shard, self.head = anatomy.device, anatomy.shard, anatomy.head
        self._decoder, self.layers = anatomy.decoder, anatomy.layers

    @property
    def head_form(self) -> HeadForm | None:
        """Sizes of the output head and hidden states, if they were asked for."""
        return replace(self.head.form, layers=self.layers) if self.head else None

    def logits(self, passes: Sequence[Pass], slots: Array) -> Iterator[tuple[slice, Tensor, dict[str, Tensor]]]:
        """Yield the logits at some places of a batch, a chunk of places at a time.

        The body runs once per pass. The head runs over chunks of the wanted hidden states, so no tensor of the size
        positions x vocabulary ever exists.

        Args:
            passes: The forward passes of the batch. Several only where `shares_prefixes`.
            slots: Wanted places among the tokens of all passes, one line after another, padding included, int64[P],
                ascending.

        Yields:
            The slice of the P places, their logits [C, S] and their hidden states [C, D] by their names in the file,
            in the dtype the teacher computes in. There are no hidden states where the teacher is run whole.
        """
        step = max(1, (CHUNK_LOGITS if self.device.type == "cpu" else GPU_CHUNK_LOGITS) // self.shard.size)
        spans = [slice(start, min(start + step, len(slots))) for start in range(0, len(slots), step)]
        if self._decoder is None:
            (only,) = passes
            logits_LTS = self._body(on_device(only.input_ids, self.device)).logits
            slot_P = on_device(slots, self.device)
            for span in spans:
                logits_CS = logits_LTS.flatten(0, 1)[slot_P[span]]
                yield span, logits_CS, {}
            return
        output, hidden = self._hidden(passes, slots)
        for span in spans:
            of_span = {name: states_PD[span] for name, states_PD in hidden.items()}
            yield span, run_head(self._model, self._decoder, output, of_span["hidden"]), of_span

    @torch.no_grad()
    def share_prefixes(self) -> bool:
        """Find out, with a few tokens, whether prefixes may be read once for several rows. Log the reason if not.

        `computation` names it, because it rounds otherwise.
        """
        ways = small_tree(self.shard.vocab_size)
        try:
            if self._decoder is None:
                raise RuntimeError("its body cannot be run apart")
            found = [self.shard.whole(torch.cat([chunk for _, chunk, _ in self.logits(*way)])) for way in ways]
        except Exception as error:  # families without such a cache raise errors of any type
            reason = first_line(error)
        else:
            if reads_on(*found):
                self.computation["prefixes"] = "read once"
                return True
            reason = "the logits differ"
        logger.warning("The tokens that several rows begin with are read again in every row: %s.", reason)
        return False

    def _hidden(self, passes: Sequence[Pass], slots: Array) -> tuple[Any, dict[str, Tensor]]:
        """Run the body over all passes. Return the last output, and hidden states [P, D] at some places, by name."""
        trunk, found, before = dict[str, Cache](), dict[str, list[Tensor]](), 0
        for each in passes:
            past = {}
            if each.parents is not None:
                line_L = on_device(each.parents, self.device)
                past = {name: continued(cache, line_L, for_trunk=each.is_trunk) for name, cache in trunk.items()}
            output = self._body(on_device(each.input_ids, self.device), use_cache=each.is_trunk, **past)
            if each.is_trunk:
                trunk = cache_of(output)
            start, end = np.searchsorted(slots, (before, before + each.input_ids.size))
            slot_P = on_device(slots[start:end] - before, self.device)
            for name, states_LTD in self._states(output).items():
                found.setdefault(name, []).append(states_LTD.to(self.device).flatten(0, 1)[slot_P])
            before += each.input_ids.size
        return output, {name: parts[0] if len(parts) == 1 else torch.cat(parts) for name, parts in found.items()}

    def _states(self, output: Any) -> dict[str, Tensor]:
        """Return the hidden states of a pass by name, [L, T, D]. Some families add up their layers in float32."""
        more = {name_of(layer): output.hidden_states[layer].to(self.dtype) for layer, _ in self.layers}
        return {"hidden": output.last_hidden_state} | more

    def keep_step(self) -> None:
        """Run once for nothing, because another rank that shares the teacher runs it once more."""
        self._body(torch.zeros((1, 1), dtype=torch.int64, device=self.device))

    @torch.no_grad()
    def _body(self, input_ids_LT: Tensor, use_cache: bool = False, **past: Cache) -> Any:
        """Run all but the head; the head too where it cannot be run apart."""
        kinds = {"output_hidden_states": [layer for layer, _ in self.layers]} if self.layers else {}
        use_cache = use_cache or bool(past)
        with _rows_not_packed():
            return (self._decoder or self._model)(input_ids=input_ids_LT, use_cache=use_cache, **kinds, **past)


def on_device(array: Array, device: torch.device) -> Tensor:
    """Copy to a device, from pinned memory, so that a GPU need not wait for it."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def load_model(config: Config, device: torch.device, num_replicas: int = 1) -> PreTrainedModel:
    """Load a teacher's weights straight to their devices: no rank ever holds more than its part.

    Ranks that share it do not wait for one another here. They do so whenever they use it.

    Args:
        config: The run's options.
        device: This rank's device.
        num_replicas: Copies of the teacher that the ranks hold together.

    Raises:
        UsageError: The weights cannot be loaded, or some of them are missing from the checkpoint.
    """
    model, loading = _load(config, device, num_replicas)
    if missing := sorted(loading["missing_keys"]):
        raise UsageError(
            f"--teacher {config.teacher} lacks {len(missing)} weights, {missing[0]} the first: they would be random. "
            "Give a complete causal language model."
        )
    if unused := sorted(loading["unexpected_keys"]):
        logger.warning(
            f"The teacher's checkpoint has {len(unused)} weights its configuration has no use for: {unused[0]}"
        )
    if config.adapter:
        model = merged(model, config)
    if config.fsdp_size == 1:
        _own_weights(model)
    model.config.return_dict = True  # some checkpoints ask for tuples
    return cast(PreTrainedModel, model.eval())


def _load(config: Config, device: torch.device, num_replicas: int) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Have transformers load a model; return it and the report on the checkpoint."""
    gguf = {"gguf_file": config.teacher_gguf} if config.teacher_gguf else {}
    attention = {"attn_implementation": config.attn_implementation} if config.attn_implementation else {}
    # An adapter beside the base is merged later: transformers would look for one in the folder of this name.
    apart = {"adapter_kwargs": {"subfolder": "none"}} if config.adapter else {}
    teacher_config = read_config(config)
    try:
        loaded = loader(config, teacher_config).from_pretrained(
            config.teacher,
            revision=config.revision,
            dtype=config.dtype if config.dtype == "auto" else getattr(torch, config.dtype),
            trust_remote_code=config.trust_remote_code,
            output_loading_info=True,
            **_placement(config, device, num_replicas),
            **gguf,
            **attention,
            **apart,
        )
    except UsageError:
        raise
    except torch.OutOfMemoryError as error:
        raise UsageError(
            f"--teacher {config.teacher} does not fit into the memory of {device}. {first_line(error)}"
        ) from error
    except Exception as error:
        if "has no `tp_plan`" in str(error):
            raise UsageError(
                f"--tp_size: transformers does not know how to cut {config.teacher}. Share it with --fsdp_size."
            ) from error
        why = cause_of(error)
        if config.replica_size > 1 and "ignore_mismatched_sizes" in str(error):
            why = f"{why[:-1]}, or transformers cannot cut them for --tp_size and --fsdp_size. Try --device_map auto."
        raise UsageError(f"--teacher {config.teacher} cannot be loaded: {why}") from error
    return cast(tuple[PreTrainedModel, dict[str, Any]], loaded)


def _placement(config: Config, device: torch.device, num_replicas: int) -> dict[str, Any]:
    """Tell transformers the place of the weights."""
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


def _own_weights(model: PreTrainedModel) -> None:
    """Copy those weights in host memory, one after another, that torch did not allocate, or not at an aligned address.

    transformers maps safetensors files where it can. A mapped weight changes when its file does, and begins wherever
    the file's header happens to end. Some processors (AMD EPYC, MKL) round the products of a single row by that: 4.8e-7
    nats, with all of 12 offsets tried. Fully sharded weights are gathered into torch's own memory before each product.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        local = tensor._local_tensor if isinstance(tensor, DTensor) else tensor
        if local.device.type == "cpu" and (not local.untyped_storage().resizable() or local.data_ptr() % _ALIGNMENT):
            local.data = local.data.clone()


@contextmanager
def _rows_not_packed() -> Iterator[None]:
    """Keep transformers from searching the position ids for packed rows: the rows here are never packed that way.

    Its answer comes from the GPU, so each forward pass would wait there until the pass before has ended. On an H200
    with batches of 8,192 tokens, that costs 8 % of the speed for 0.5 billion parameters, 2 % for 1.5 and 1 % for 8.
    """
    before = masking_utils.find_packed_sequence_indices
    masking_utils.find_packed_sequence_indices = lambda position_ids: None
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = before
