"""Files of one process alone: locked, reserved on the disk, renamed durably."""

import errno
import logging
import os
from pathlib import Path
from typing import BinaryIO

from logitgen.errors import UsageError
from logitgen.file.layout import STATUS_BYTES

logger = logging.getLogger(__name__)

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_CANNOT_LOCK = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK)

_UNLOCKED = "%s cannot be locked here. Start only one run at a time with this --output."


def locked(path: Path, flags: int) -> BinaryIO:
    """Open a file for this process alone, until the returned file is closed.

    On Windows, which has no such lock, the returned file is closed: Windows neither renames nor removes an open file.

    Raises:
        UsageError: Another process has it.
    """
    file = os.fdopen(os.open(path, flags | getattr(os, "O_NOFOLLOW", 0), 0o666), "r+b")
    if fcntl is None:
        file.close()
        logger.warning(_UNLOCKED, path)
        return file
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        taken = not path.exists() or not os.path.samestat(os.fstat(file.fileno()), path.stat())  # renamed meanwhile
    except BlockingIOError:
        taken = True
    except OSError as error:
        if error.errno not in _CANNOT_LOCK:
            raise
        logger.warning(_UNLOCKED, path)
        taken = False
    if taken:
        raise UsageError(f"Another run is writing {path}. Wait for it, or choose another --output.")
    return file


def reserve(descriptor: int) -> None:
    """Have the file system reserve the file's blocks, so that the disk cannot be full later."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, os.fstat(descriptor).st_size + STATUS_BYTES)


def sync_folder(folder: Path) -> None:
    """Make a rename in a folder durable, where folders can be synced."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
