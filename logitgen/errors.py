"""The errors a person meets, each one line: what was expected, what came, what to do."""

import os


class LogitgenError(Exception):
    """Base of every error that is shown as one line instead of a traceback."""

    exit_status = 1


class UsageError(LogitgenError):
    """Something the user gave is wrong: an option, a teacher, a dataset, a path or the launch."""

    exit_status = 2


class FormatError(LogitgenError):
    """A file is not a complete logitgen file this version can read."""

    exit_status = 2


class CaptureError(LogitgenError):
    """A run that had started cannot go on: a rank, the teacher or the disk failed."""


def first_line(error: BaseException) -> str:
    """Return the first line of an error that says something, or its type where it says nothing."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def reason(error: OSError) -> str:
    """Say what the system says; h5py puts a page of its own where that should be."""
    return os.strerror(error.errno) if error.errno else str(error)


class LostRankError(CaptureError):
    """Another rank ended without saying why."""
