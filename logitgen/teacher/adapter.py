"""Adapters, LoRA above all: found beside or apart from their base, and merged into its weights by peft.

Adapter and base give the same logits before and after the merge, or the adapter is refused.
"""

import json
import logging
import os
import warnings
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_INDEX_NAME, WEIGHTS_NAME
from transformers.utils.import_utils import is_peft_available
from transformers.utils.peft_utils import find_adapter_config_file

from logitgen.config import Config
from logitgen.errors import UsageError, cause_of

logger = logging.getLogger(__name__)

_MERGE_ERROR = 8
"""Largest difference between logits before and after a merge, relative to their size, in steps of the dtype. Measured
on small models: 5 in float32 and 2.3 in bfloat16, whose weights are rounded once more."""

_WEIGHTS = (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_NAME, WEIGHTS_INDEX_NAME)

_LEAST_ERROR = 1e-3
"""The same for any dtype, as a share."""


def with_base(config: Config) -> Config:
    """Return options that name adapter and base apart, if the teacher's folder or repository holds an adapter.

    Raises:
        UsageError: The teacher has an adapter besides `--adapter`, or an adapter whose base cannot be told.
    """
    said = _adapter_config(config.teacher, config.revision)
    if said is None:
        return config
    if config.adapter not in (None, config.teacher):
        raise UsageError(
            f"--teacher {config.teacher} has an adapter of its own, besides --adapter {config.adapter}. Give the base "
            "without an adapter, or leave --adapter out."
        )
    if _has_weights(config.teacher, config.teacher_gguf):
        return replace(config, adapter=config.teacher)
    base = said.get("base_model_name_or_path")
    remedy = "Give the base as --teacher and the adapter as --adapter."
    if not base or not isinstance(base, str):
        raise UsageError(f"--teacher {config.teacher} is an adapter that does not name its base. {remedy}")
    if config.revision:
        raise UsageError(f"--revision is for whole teachers, {config.teacher} is an adapter. Download it. {remedy}")
    if os.path.isabs(base) and not os.path.isdir(base):  # noqa: PTH112, PTH117 (Path.is_dir raises for long names)
        raise UsageError(f"--teacher {config.teacher} is an adapter, and its base {base} is not there. {remedy}")
    if base != config.teacher and not _has_weights(base, None) and _adapter_config(base, None) is not None:
        raise UsageError(
            f"--teacher {config.teacher} is an adapter for {base}, an adapter itself. Merge that into its base first."
        )
    revision = None if os.path.isdir(base) else said.get("revision")  # noqa: PTH112
    return replace(config, teacher=base, adapter=config.teacher, revision=revision)


def check_adapter(config: Config) -> None:
    """Refuse an adapter that cannot be merged, as far as this is known without its weights.

    Raises:
        UsageError: There is no such adapter, it is none for a causal language model, or peft is missing or too old.
    """
    if not config.adapter:
        return
    said = _adapter_config(config.adapter, None)
    if said is None:
        raise UsageError(
            f"--adapter {config.adapter} is not there, or has no adapter_config.json. Give a hub id or folder of an "
            "adapter."
        )
    if not is_peft_available():
        raise UsageError(
            f"The adapter {config.adapter} needs peft. Install it (pip install peft), or give a teacher without an "
            "adapter_config.json."
        )
    if config.replica_size > 1:
        raise _unusable(config, "with --tp_size and --fsdp_size no rank has whole weights")
    adapter = _read_peft_config(config.adapter)
    _check_kind(config, adapter, said)
    logger.info(f"The adapter {config.adapter} changes the teacher {config.teacher}.")
    base = adapter.base_model_name_or_path
    if base and Path(base).name != Path(config.teacher).name:
        logger.warning(f"The adapter {config.adapter} was trained on {base}, the teacher is {config.teacher}.")


def _check_kind(config: Config, adapter: Any, said: dict[str, Any]) -> None:
    """Refuse an adapter whose configuration tells that it cannot be honoured, or that lacks its weights."""
    known = {field.name for field in fields(adapter)} | {"runtime_config"}
    if unknown := sorted(name for name, value in said.items() if value and name not in known):
        raise UsageError(
            f"The adapter {config.adapter} sets {unknown[0]}, which this peft does not know. Upgrade peft."
        )
    if adapter.is_prompt_learning:
        raise _unusable(config, f"{adapter.peft_type.value} puts tokens of its own before every row")
    if adapter.task_type not in (None, "CAUSAL_LM"):
        raise _unusable(config, f"it is for {adapter.task_type}, not for a causal language model")
    folder, names = Path(cast(str, config.adapter)), ("adapter_model.safetensors", "adapter_model.bin")
    if os.path.isdir(folder) and not any((folder / name).is_file() for name in names):  # noqa: PTH112
        raise UsageError(
            f"The adapter {config.adapter} has an adapter_config.json, but no {names[0]}. Complete it, or take the "
            "adapter_config.json away if its weights are merged already."
        )


def merged(model: PreTrainedModel, config: Config) -> PreTrainedModel:
    """Merge the adapter of the options into a model's weights. A quantised model keeps it apart instead.

    Raises:
        UsageError: The adapter does not fit the model, or merging it gives other logits.
    """
    if any(parameter.is_meta for parameter in model.parameters()):
        raise _unusable(config, "the base does not fit onto the GPUs with --device_map auto")
    from peft import PeftModel

    try:
        adapted: Any = PeftModel(model, _read_peft_config(cast(str, config.adapter)))
        mapping = getattr(model, "_checkpoint_conversion_mapping", {})
        found = adapted.load_adapter(config.adapter, "default", key_mapping=mapping)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # peft raises errors of any type for a base that is not the adapter's
        raise _unusable(config, f"it does not fit {config.teacher}: {cause_of(error).rstrip('.')}") from error
    if missing := sorted(found.missing_keys):
        raise _unusable(config, f"it lacks {len(missing)} of its weights, {missing[0]} the first")
    if unknown := sorted(found.unexpected_keys):
        raise _unusable(config, f"{config.teacher} has no place for {len(unknown)} weights, {unknown[0]} the first")
    adapted.eval()
    if getattr(model, "hf_quantizer", None):
        logger.info("The adapter is not merged, because the teacher's weights are quantised.")
        return cast(PreTrainedModel, adapted.get_base_model())
    return _merged(adapted, config)


def _merged(adapted: Any, config: Config) -> PreTrainedModel:
    try:
        _untie_changed_embeddings(adapted.get_base_model())
        expected_BTV = _logits(adapted)
        model = cast(PreTrainedModel, adapted.merge_and_unload(safe_merge=True))
    except (AttributeError, NotImplementedError, ValueError, TypeError, RuntimeError) as error:
        raise _unusable(
            config, f"{adapted.active_peft_config.peft_type.value}: {cause_of(error).rstrip('.')}"
        ) from error
    most = max(_LEAST_ERROR, _MERGE_ERROR * torch.finfo(model.dtype).eps)
    if not (_logits(model) - expected_BTV).norm() <= most * expected_BTV.norm():
        raise _unusable(config, "the logits change with the merge")
    return model


def _untie_changed_embeddings(model: PreTrainedModel) -> None:
    """Give a head that is tied to embeddings a weight of its own if the adapter changes one: peft would change both."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    ends: list[Any] = [model.get_input_embeddings(), model.get_output_embeddings()]
    bases = [cast(Any, each).get_base_layer() if isinstance(each, BaseTunerLayer) else each for each in ends]
    if bases != ends and getattr(bases[0], "weight", None) is getattr(bases[1], "weight", 0):
        bases[1].weight = nn.Parameter(bases[1].weight.detach().clone(), requires_grad=False)


@torch.no_grad()
def _logits(model: Any) -> Tensor:
    """Return the logits of a few tokens in float32, so that small differences count."""
    device = model.get_input_embeddings().weight.device
    output = model(input_ids=torch.arange(16, device=device).view(2, 8), use_cache=False)
    return cast(Tensor, output.logits.float())


def _read_peft_config(name: str) -> Any:
    from peft import PeftConfig

    warnings.filterwarnings("ignore", module="peft")  # of what is refused here, or put right
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)  # peft asks transformers for it
    try:
        return PeftConfig.from_pretrained(name)
    except Exception as error:
        raise UsageError(f"The adapter {name} is none that this peft can read: {cause_of(error)}") from error


def _adapter_config(name: str, revision: str | None) -> dict[str, Any] | None:
    """Read the configuration of an adapter, or return None where there is none."""
    try:
        path = find_adapter_config_file(name, revision=revision)
    except Exception:  # a name that is no hub id, a lack of network: `describe` names it
        return None
    if path is None:
        return None
    try:
        said = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{path} of the adapter cannot be read: {cause_of(error)}") from error
    if not isinstance(said, dict) or "peft_type" not in said:
        raise UsageError(f"{path} is not the adapter configuration of peft: it has no peft_type. Take it away.")
    return said


def _has_weights(name: str, gguf: str | None) -> bool:
    """Tell whether a folder holds a model's weights, and not only those of an adapter."""
    if not os.path.isdir(name):  # noqa: PTH112
        return False
    return any((Path(name) / file).is_file() for file in (*_WEIGHTS, gguf) if file)


def _unusable(config: Config, reason: str) -> UsageError:
    return UsageError(
        f"The adapter {config.adapter} cannot be merged: {reason}. Merge it with the tools that trained it, and give "
        "the merged folder as --teacher."
    )
