"""logitgen captures a teacher's logits over a dataset once, so that students can be trained from the file."""

from typing import TYPE_CHECKING, Any

from logitgen.errors import CaptureError, FormatError, LogitgenError, UsageError
from logitgen.file.reader import LogitsFile

if TYPE_CHECKING:
    from logitgen.student.dataset import LogitsDataset, collate
    from logitgen.student.distil import distil
    from logitgen.student.losses import DistillationLoss

__version__ = "0.1.0"
__all__ = [
    "CaptureError",
    "DistillationLoss",
    "FormatError",
    "LogitgenError",
    "LogitsDataset",
    "LogitsFile",
    "UsageError",
    "collate",
    "distil",
]


def __getattr__(name: str) -> Any:
    """Import modules that need torch only on request: a look into a file does not."""
    if name in ("LogitsDataset", "collate"):
        from logitgen.student import dataset

        return getattr(dataset, name)
    if name == "DistillationLoss":
        from logitgen.student.losses import DistillationLoss

        return DistillationLoss
    if name == "distil":
        from logitgen.student.distil import distil

        return distil
    raise AttributeError(f"module 'logitgen' has no attribute '{name}'")
