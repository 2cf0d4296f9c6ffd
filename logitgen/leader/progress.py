"""The progress of a run: counted, judged and drawn by the leader."""

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType

import numpy as np
from rich.console import Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from logitgen import console
from logitgen.console import PLAIN_SECONDS, format_bytes, format_seconds
from logitgen.file.layout import Array

logger = logging.getLogger(__name__)

WAITED_SHARE = 0.05
"""Share of the ranks' time spent waiting below which the forward passes are the bottleneck."""

BUSY_SHARE = 0.5
"""Share of the writer's time above which the disk is the bottleneck of waiting ranks."""


@dataclass(frozen=True)
class Snapshot:
    """The progress of a run, in tokens that go through the teacher.

    Attributes:
        seconds: Since this run's first forward pass.
        recent_rate: Recent tokens per second, over the last ten to twenty seconds.
        tokens_before: Tokens that were in the file when this run began.
        stream_tokens: Tokens of each stream that this run has added to the file.
        stream_totals: Tokens of each stream in all, of this run.
        ranks_of_stream: Number of ranks that compute one stream together.
    """

    seconds: float
    recent_rate: float
    tokens_before: int
    stream_tokens: list[int]
    stream_totals: list[int]
    ranks_of_stream: int = 1

    @property
    def tokens(self) -> int:
        """Tokens that are in the file."""
        return self.tokens_before + sum(self.stream_tokens)

    @property
    def total(self) -> int:
        """Tokens in all."""
        return self.tokens_before + sum(self.stream_totals)

    @property
    def rate(self) -> float:
        """Tokens per second of this run."""
        return sum(self.stream_tokens) / self.seconds

    @property
    def speed(self) -> str:
        """Tokens and their rate, in words."""
        return f"{self.tokens:,}/{self.total:,} tokens, {self.rate:,.0f} tok/s"

    @property
    def eta_seconds(self) -> float | None:
        """Time left, or None before the first tokens are in the file."""
        return (self.total - self.tokens) / self.rate if self.rate else None

    @property
    def eta(self) -> str:
        """Time left, in words."""
        return "ETA -:--" if self.eta_seconds is None else f"ETA {format_seconds(self.eta_seconds)}"

    def share(self, stream: int) -> float:
        """Share of its tokens that a stream has done, 0 to 1."""
        return self.stream_tokens[stream] / self.stream_totals[stream] if self.stream_totals[stream] else 1.0

    @property
    def slowest(self) -> str:
        """The end of a sentence that names the stream with the least of its share done. Empty if there is only one."""
        slowest = min(range(len(self.stream_totals)), key=self.share)
        return f", slowest {self.name(slowest)} at {self.share(slowest):.0%}" if len(self.stream_totals) > 1 else ""

    def name(self, stream: int) -> str:
        """Name of a stream: the rank that sends its payloads."""
        return f"rank {stream * self.ranks_of_stream}"


@dataclass(frozen=True)
class Speed:
    """The speed of a run.

    Attributes:
        num_tokens: Tokens of rows that the teacher had to read, without padding.
        seconds: Time from the first forward pass to the last row written.
        padding_share: Share of padding among all that went through the teacher.
        saved_share: Share of the rows' tokens that did not go through it, because rows share prefixes.
        waited_share: Share of the ranks' time in which they waited for transport or disk.
    """

    num_tokens: int
    seconds: float
    padding_share: float
    saved_share: float
    waited_share: float


def bars(known: Snapshot, eta: str, max_streams: int) -> RenderableType:
    """Draw a bar for the whole and one for each stream, or only for the slowest if there are too many."""
    table = Table.grid(padding=(0, 1), expand=True)
    for ratio in (0, 1, 0, 0):
        table.add_column(ratio=ratio or None, no_wrap=True)
    table.add_row("capture", ProgressBar(known.total, known.tokens), f"{known.tokens / known.total:4.0%}", eta)
    num_streams = len(known.stream_totals)
    for stream in sorted(sorted(range(num_streams), key=known.share)[:max_streams]):
        done, goal = known.stream_tokens[stream], known.stream_totals[stream]
        table.add_row(
            known.name(stream),
            ProgressBar(max(goal, 1), done if goal else 1),
            f"{known.share(stream):4.0%}",
            f"{done / known.seconds:,.0f} tok/s",
        )
    hidden = num_streams - max_streams
    return Group(table, Text(f"and {hidden} faster ranks", style="dim")) if hidden > 0 else table


class Progress:
    """The leader's live display: totals, and a line for each stream that exposes a straggler.

    Without a terminal it logs one plain line now and then.
    """

    def __init__(
        self, rows: Array, tokens: Array, written_bytes: Array, shares: Sequence[Array], ranks_of_stream: int = 1
    ) -> None:
        """Prepare the display.

        Args:
            rows: Rows of every batch of the plan, [num_batches].
            tokens: Tokens of every batch that go through the teacher.
            written_bytes: Bytes that every batch adds to the file.
            shares: Numbers of the batches of each stream. The others are in the file already.
            ranks_of_stream: Number of ranks that compute one stream together.
        """
        self._batches = rows, tokens, written_bytes
        self._ranks_of_stream = ranks_of_stream
        self._stream_of = np.zeros(len(rows), dtype=np.int32)
        for stream, share in enumerate(shares):
            self._stream_of[share] = stream
        pending = np.concatenate(shares)
        self._num_rows = int(rows.sum())
        self._tokens_before = int(tokens.sum() - tokens[pending].sum())
        self._stream_totals = [int(tokens[share].sum()) for share in shares]
        self._stream_tokens = [0] * len(shares)
        self._rows = self._num_rows - int(rows[pending].sum())
        self._written_bytes = int(written_bytes.sum() - written_bytes[pending].sum())
        self._waited_seconds = [0.0] * len(shares)
        self._writer_seconds = 0.0
        self._start = self._last_line = time.monotonic()
        self._marks = [(self._start, 0.0, 0.0, 0)] * 2
        self._live = Live(get_renderable=self._render, console=console.messages, transient=True, refresh_per_second=4)

    def __enter__(self) -> "Progress":
        self._start = self._last_line = time.monotonic()
        self._marks = [(self._start, 0.0, 0.0, 0)] * 2
        if console.messages.is_terminal:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop()

    def written(self, batch: int, writer_seconds: float) -> None:
        """Count a batch that is in the file.

        Args:
            batch: Its number in the plan.
            writer_seconds: Seconds the writer has been busy so far.
        """
        if not any(self._stream_tokens):
            logger.debug("First rows are in the file.")
        rows, tokens, written_bytes = (int(values[batch]) for values in self._batches)
        self._rows += rows
        self._stream_tokens[self._stream_of[batch]] += tokens
        self._written_bytes += written_bytes
        self._writer_seconds = writer_seconds
        now = time.monotonic()
        if now - self._marks[1][0] > PLAIN_SECONDS:
            waited, tokens = sum(self._waited_seconds), sum(self._stream_tokens)
            self._marks = [self._marks[1], (now, waited, writer_seconds, tokens)]
        if not console.messages.is_terminal and now - self._last_line > PLAIN_SECONDS:
            self._last_line = now
            logger.info("%s", self._plain())

    def waited(self, stream: int, seconds: float) -> None:
        """Record the seconds a stream has waited so far for a free buffer."""
        self._waited_seconds[stream] = seconds

    @property
    def waited_share(self) -> float:
        """Share of their time that the streams have spent waiting so far, 0 to 1."""
        return sum(self._waited_seconds) / (self.seconds * len(self._waited_seconds))

    @property
    def bottleneck(self) -> str:
        """The bottleneck of the last seconds: forward, transport or disk."""
        since, waited_before, writer_before, _ = self._marks[0]
        seconds = max(time.monotonic() - since, 1e-9)
        waited = (sum(self._waited_seconds) - waited_before) / (seconds * len(self._waited_seconds))
        if waited < WAITED_SHARE:
            return "forward"
        return "disk" if self._writer_seconds - writer_before > BUSY_SHARE * seconds else "transport"

    @property
    def seconds(self) -> float:
        """Time since the display started."""
        return max(time.monotonic() - self._start, 1e-9)  # a coarse clock stands still at first

    def snapshot(self) -> Snapshot:
        """Take a snapshot of the progress."""
        since, _, _, tokens_before = self._marks[0]
        return Snapshot(
            seconds=self.seconds,
            recent_rate=(sum(self._stream_tokens) - tokens_before) / max(time.monotonic() - since, 1e-9),
            tokens_before=self._tokens_before,
            stream_tokens=list(self._stream_tokens),
            stream_totals=self._stream_totals,
            ranks_of_stream=self._ranks_of_stream,
        )

    def _plain(self) -> str:
        known = self.snapshot()
        return f"{self._numbers(known)}, {known.eta}, {self._disk_numbers()}{known.slowest}"

    def _numbers(self, known: Snapshot) -> str:
        return f"{self._rows:,}/{self._num_rows:,} rows, {known.speed}"

    def _disk_numbers(self) -> str:
        return f"{format_bytes(self._written_bytes)} written, bottleneck {self.bottleneck}"

    def _render(self) -> RenderableType:
        known = self.snapshot()
        lines = max(1, console.messages.height - 3 - -(-120 // console.messages.width))  # the numbers may wrap
        return Group(Text(f"{self._numbers(known)}, {self._disk_numbers()}"), bars(known, known.eta, lines))
