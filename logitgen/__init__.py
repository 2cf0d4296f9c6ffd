"""logitgen captures a teacher's logits over a dataset once, so that students can be trained from the file."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from logitgen.errors import CaptureError, FormatError, LogitgenError, UsageError
from logitgen.file.reader import LogitsFile

if TYPE_CHECKING:
    from logitgen.student.batches import TokenBatches
    from logitgen.student.collate import collate
    from logitgen.student.dataset import LogitsDataset
    from logitgen.student.distil import distil
    from logitgen.student.losses import DistillationLoss
    from logitgen.student.measure import Measured, measures

__version__ = "0.1.0"
__all__ = [
    "CaptureError",
    "DistillationLoss",
    "FormatError",
    "LogitgenError",
    "LogitsDataset",
    "LogitsFile",
    "Measured",
    "TokenBatches",
    "UsageError",
    "collate",
    "distil",
    "measures",
]


_NEEDING_TORCH = {
    "DistillationLoss": "losses",
    "LogitsDataset": "dataset",
    "Measured": "measure",
    "TokenBatches": "batches",
    "collate": "collate",
    "distil": "distil",
    "measures": "measure",
}


def __getattr__(name: str) -> Any:
    """Import modules that need torch only on request: a look into a file does not."""
    if name in _NEEDING_TORCH:
        return getattr(import_module(f"logitgen.student.{_NEEDING_TORCH[name]}"), name)
    raise AttributeError(f"module 'logitgen' has no attribute '{name}'")
