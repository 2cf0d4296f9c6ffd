"""The errors shown to the user, each in one line: the expected value, the actual value, the remedy."""

import os


class LogitgenError(Exception):
    """Base of every error that is shown as one line instead of a traceback."""

    exit_status = 1


class UsageError(LogitgenError):
    """An input of the user is wrong: an option, a teacher, a dataset, a path or the launch."""

    exit_status = 2


class FormatError(LogitgenError):
    """A file is not a complete logitgen file this version can read."""

    exit_status = 2


class CaptureError(LogitgenError):
    """A run cannot go on after its start: a rank, the teacher or the disk failed."""


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its type if the message is empty."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def reason(error: OSError) -> str:
    """Return the system's words for an error, because h5py puts a page of its own there."""
    return os.strerror(error.errno) if error.errno else str(error)


def cause_of(error: Exception) -> str:
    """Return one line on the reason why transformers or the hub could not load something."""
    if "ignore_mismatched_sizes" in str(error):
        return "its weights have other shapes than its config.json says."
    text = " ".join(str(error).split())
    if isinstance(error, KeyError):
        text = f"KeyError {text}"
    sentences = text.split(". ")
    return sentences[0][:300].rstrip(".") + "." if sentences[0] else type(error).__name__


class LostRankError(CaptureError):
    """Another rank ended without saying why."""
