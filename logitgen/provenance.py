"""The attributes that name a file's origin. None of them differs between two equal runs."""

import functools
import json
from importlib.metadata import version

from torch import get_num_threads

from logitgen.config import Config
from logitgen.file.header import Attributes
from logitgen.file.layout import FORMAT_NAME, FORMAT_VERSION, HEAD_ATTRIBUTES, WITH_KEPT_IDS, Layout
from logitgen.head import dtype_name
from logitgen.split.rows import Rows
from logitgen.split.template import ChatTemplate
from logitgen.teacher.describe import TeacherInfo
from logitgen.teacher.model import Teacher

_PACKAGES = ("torch", "transformers", "tokenizers", "datasets", "numpy", "h5py")


@functools.cache
def package_versions() -> dict[str, str]:
    """Return the versions of the packages that can change a file's bytes."""
    return {name: version(name) for name in _PACKAGES}


def facts_of_launch(config: Config) -> dict[str, str]:
    """Collect the facts that must be equal on all ranks for the file to fit its attributes. Paths may differ."""
    paths = ("teacher", "adapter", "dataset")
    options = {f"--{name}": str(value) for name, value in config.settings.items() if name not in paths}
    options["--max_bytes"] = str(config.max_bytes)
    threads = {"number of CPU threads": str(get_num_threads())}
    return options | threads | {f"version of {name}": number for name, number in package_versions().items()}


def facts_of_teacher(info: TeacherInfo) -> dict[str, str]:
    """Collect the facts that must be equal on all ranks before the weights are loaded."""
    return {f"{name} of the teacher's configuration": json.dumps(value) for name, value in info.config.items()} | {
        "quantization of the teacher": info.quantization
    }


def settings_attributes(config: Config) -> Attributes:
    """Collect the attributes known before anything is loaded."""
    return {
        "format": FORMAT_NAME,
        "version": FORMAT_VERSION,
        "capture": config.capture,
        "encoding": config.encoding,
        "settings": config.settings_json(),
        "packages": json.dumps(package_versions()),
    }


def teacher_attributes(teacher: Teacher) -> Attributes:
    """Collect the attributes that only a loaded teacher tells."""
    found: Attributes = {
        "teacher_dtype": dtype_name(teacher.dtype),
        "teacher_fingerprint": teacher.fingerprint,
        "computation": json.dumps(teacher.computation, sort_keys=True),
    }
    if head := teacher.head:
        found |= {"head_scale": head.scale, "head_soft_cap": head.soft_cap, "head_crc32": head.checksum}
    return found


def attributes(
    config: Config,
    info: TeacherInfo,
    rows: Rows,
    layout: Layout,
    of_tokenizer: str,
    template: ChatTemplate | None,
) -> Attributes:
    """Collect the attributes known before the teacher is loaded.

    Args:
        config: The run's options.
        info: The teacher's configuration.
        rows: The tokenised split.
        layout: The file's sizes.
        of_tokenizer: The fingerprint of the teacher's tokenizer, empty if it has none.
        template: The chat template, or None where the rows are no messages.
    """
    return settings_attributes(config) | {
        "top_k": layout.top_k,
        "vocab_size": layout.vocab_size,
        "tokenizer_size": layout.tokenizer_size,
        "teacher": config.teacher,
        "teacher_config": json.dumps(info.config, sort_keys=True),
        "quantization": info.quantization,
        "commit": info.commit,
        "tokenizer_fingerprint": of_tokenizer,
        "chat_template_fingerprint": template.fingerprint if template else "",
        "chat_template_date": template.date if template else "",
        "dataset_fingerprint": rows.fingerprint,
    }


def attributes_with(layout: Layout, attributes: Attributes) -> Attributes:
    """Return the attributes of a file that keeps other values."""
    changes = {"capture": layout.capture, "encoding": layout.encoding}
    settings = json.loads(str(attributes["settings"])) | changes
    if layout.capture != "hidden":
        settings["layers"] = None
    if layout.capture in WITH_KEPT_IDS:
        settings["top_k"] = layout.top_k
    return {name: value for name, value in attributes.items() if name not in HEAD_ATTRIBUTES} | {
        **changes,
        "top_k": layout.top_k,
        "settings": json.dumps(settings, sort_keys=True),
    }
