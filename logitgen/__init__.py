"""logitgen captures a teacher's logits over a dataset once, so that students can be trained from the file."""

from typing import TYPE_CHECKING, Any

from logitgen.errors import CaptureError, FormatError, LogitgenError, UsageError
from logitgen.reader import LogitsFile

if TYPE_CHECKING:
    from logitgen.dataset import LogitsDataset, collate
    from logitgen.losses import DistillationLoss

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
]


def __getattr__(name: str) -> Any:
    """Import what needs torch only when it is asked for: looking into a file does not."""
    if name in ("LogitsDataset", "collate"):
        from logitgen import dataset

        return getattr(dataset, name)
    if name == "DistillationLoss":
        from logitgen.losses import DistillationLoss

        return DistillationLoss
    raise AttributeError(f"module 'logitgen' has no attribute '{name}'")
