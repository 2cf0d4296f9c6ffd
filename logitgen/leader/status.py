"""The status of a run, seen from another process: it reads the run's files, and neither locks nor writes them.

An unfinished file has room for one line of text behind its data. At every commit the writer stores the progress of
each rank there. The line is cut off before the file gets its final name, so a complete file holds none of it. A
separate status file would outlive a killed run, and would not move along with the output.
"""

import json
import math
import re
import time
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from logitgen.errors import FormatError, UsageError, reason
from logitgen.file import header
from logitgen.file.header import Header
from logitgen.file.layout import PARTIAL_SUFFIX, STATUS_BYTES
from logitgen.leader.output import Output
from logitgen.leader.progress import Snapshot

State = Literal["not started", "being created", "running", "stalled", "stopped", "complete"]

_LINE = re.compile(rb"logitgen status ([0-9a-f]{8}) (.*)\n")

_STALLED_SECONDS = 60.0
_STALLED_BATCHES = 3
"""A run is stalled after this many seconds without a write, if each rank could have computed this many batches."""

_FIRST_BATCH_SECONDS = 600.0
"""Limit for the first batch, before the time per batch is known."""


@dataclass(frozen=True, kw_only=True)
class Status:
    """The status of a run.

    Attributes:
        path: Name of its complete file.
        state: Stalled means that nothing has been written for long, as after a kill. A stopped run has said so, or its
            first forward pass is still to come.
        num_rows: Rows of the file, or None if there is no file yet.
        num_done: Rows that are in it.
        idle_seconds: Seconds since the last write, or None if nothing will write to it.
        snapshot: The progress of each rank, or None if the run is not under way.
    """

    path: Path
    state: State
    num_rows: int | None = None
    num_done: int | None = None
    idle_seconds: float | None = None
    snapshot: Snapshot | None = None


def encode(snapshot: Snapshot) -> bytes:
    """Turn a snapshot into the line behind the data, or into no bytes if it has too many ranks to fit."""
    text = json.dumps(asdict(snapshot), separators=(",", ":")).encode()
    line = b"logitgen status %08x %b\n" % (zlib.crc32(text), text)
    return line if len(line) <= STATUS_BYTES else b""


def decode(data: bytes) -> Snapshot | None:
    """Turn the line behind the data back into a snapshot, or None if the line is absent or torn."""
    line = _LINE.match(data)
    if line is None or zlib.crc32(line[2]) != int(line[1], 16):
        return None
    try:
        snapshot = Snapshot(**json.loads(line[2]))
        numbers = [snapshot.recent_rate, snapshot.tokens_before, *snapshot.stream_tokens, *snapshot.stream_totals]
        pairs = zip(snapshot.stream_tokens, snapshot.stream_totals, strict=True)
        numbers.append(snapshot.ranks_of_stream)
        sane = 0 < snapshot.seconds < 2**63 and snapshot.total > 0 and all(done <= goal for done, goal in pairs)
        return snapshot if sane and all(0 <= number < 2**63 for number in numbers) else None
    except (TypeError, ValueError, RecursionError):  # of another version, or forged
        return None


class Watch:
    """Looks at an output whenever it is asked to.

    The clock of the file's machine may differ from the local clock. Only the first look believes both. Later looks
    count from the moment they see a change.
    """

    def __init__(self, path: Path) -> None:
        """Name an output, by its own name or that of its `.partial`. Nothing is read yet."""
        self._output = Output(path.parent / path.name.removesuffix(PARTIAL_SUFFIX), overwrite=False)
        self._looked = -math.inf
        self._written = 0.0
        self._mtime = math.nan

    def look(self) -> Status:
        """Read the head of the file, one byte per row and the line behind the data.

        Raises:
            UsageError: The folder does not exist, or a file in it cannot be read.
            FormatError: The file is not of logitgen, is damaged, or has its final name but lacks rows.
        """
        output = self._output
        try:
            found = next((path for path in (output.new, output.partial, output.path) if path.exists()), None)
            if found is None and not output.path.parent.is_dir():
                raise UsageError(f"The folder {output.path.parent} does not exist. Give the run's --output.")
            try:
                return self._look(found)
            except (FormatError, OSError):
                if found and found.exists():
                    raise
                return self.look()  # the file got its next name meanwhile
        except OSError as error:
            raise UsageError(f"{output.path} cannot be read: {reason(error)}.") from error

    def _look(self, found: Path | None) -> Status:
        path = self._output.path
        if found is None:
            return Status(path=path, state="not started")
        if found == self._output.new:
            if not (found.is_file() and header.has_signature(found, unfinished=True)):
                raise FormatError(f"{found} is not a logitgen file. Give the run's --output.")
            return Status(path=path, state="being created", idle_seconds=self._idle_seconds(found))
        head = header.read(found)
        num_rows, num_done = head.layout.num_rows, _num_done(found, head)
        if found == path:
            if num_done < num_rows:
                raise FormatError(f"{path} has the name of a complete file, but lacks {num_rows - num_done:,} rows.")
            return Status(path=path, state="complete", num_rows=num_rows, num_done=num_done)
        with found.open("rb") as file:
            file.seek(head.size_bytes)
            snapshot = decode(file.read(STATUS_BYTES))
        idle_seconds = self._idle_seconds(found)
        return Status(
            path=path,
            state=_state(snapshot, num_done == num_rows, head, idle_seconds),
            num_rows=num_rows,
            num_done=num_done,
            idle_seconds=idle_seconds,
            snapshot=snapshot,
        )

    def _idle_seconds(self, path: Path) -> float:
        """Return the seconds since the last write to a file."""
        now, mtime = time.monotonic(), path.stat().st_mtime
        if mtime != self._mtime:
            self._mtime = mtime
            self._written = now - min(max(time.time() - mtime, 0.0), now - self._looked)
        self._looked = now
        return now - self._written


def _state(snapshot: Snapshot | None, is_full: bool, head: Header, idle_seconds: float) -> State:
    if snapshot is None and not is_full:  # a full file has lost its line, and is about to get its final name
        return "stopped"
    patience = _FIRST_BATCH_SECONDS
    batch_tokens = head.attributes["settings"].get("batch_tokens")
    if snapshot and snapshot.rate and isinstance(batch_tokens, int):
        batch_seconds = batch_tokens * len(snapshot.stream_totals) / snapshot.rate
        patience = max(_STALLED_SECONDS, _STALLED_BATCHES * batch_seconds)
    return "stalled" if idle_seconds > patience else "running"


def _num_done(path: Path, head: Header) -> int:
    done = np.fromfile(path, "u1", head.layout.num_rows, offset=head.places["done"])
    return int(np.count_nonzero(done == 1))
