"""What a person sees: the progress display as a terminal would show it, log records, numbers with units."""

import io
import logging
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tqdm
from rich.console import Console
from rich.text import Text

from logitgen import UsageError, console
from logitgen.console import (
    PLAIN_SECONDS,
    format_bytes,
    format_seconds,
    print_error,
    print_result,
    printable,
    redrawn,
    silence_stdout,
    start_logging,
)
from logitgen.leader import progress as progress_module
from logitgen.leader.progress import BUSY_SHARE, WAITED_SHARE, Progress

REDRAW = re.compile(r"(?:\r|\x1b\[2K|\x1b\[\d+A)+")
ESCAPES = re.compile(r"\x1b\[[\d;?]*[A-Za-z]")


class Clock:
    """A clock the test sets. It never shows one time twice, unless it is told to stand still."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.tick = 1e-6

    def __call__(self) -> float:
        self.now += self.tick
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(progress_module, "time", SimpleNamespace(monotonic=made))
    return made


Terminal = Callable[[int, int], io.StringIO]


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    def make(width: int, height: int) -> io.StringIO:
        screen = io.StringIO()
        drawn = Console(file=screen, force_terminal=True, width=width, height=height)
        monkeypatch.setattr(console, "messages", drawn)
        return screen

    return make


@pytest.fixture
def messages(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """What is printed to standard error where that is not a terminal."""
    output = io.StringIO()
    monkeypatch.setattr(console, "messages", Console(file=output, force_terminal=False, width=80))
    return output


def frames(screen: io.StringIO) -> list[list[str]]:
    """Every picture the display has drawn, as lines of plain text."""
    drawn = [ESCAPES.sub("", picture) for picture in REDRAW.split(screen.getvalue())]
    return [picture.rstrip("\n").split("\n") for picture in drawn if picture.strip()]


def in_turns(batches: Sequence[int], num_streams: int) -> list[np.ndarray]:
    return [np.array(batches[stream::num_streams], dtype=np.int64) for stream in range(num_streams)]


def make_progress(
    num_batches: int, rows: int, tokens: int, written_bytes: int, num_streams: int, batches: Sequence[int] | None = None
) -> Progress:
    """Make the display of a run of equal batches, of which all are to be computed, or some, by the ranks in turns."""
    numbers = (np.full(num_batches, value) for value in (rows, tokens, written_bytes))
    return Progress(*numbers, in_turns(range(num_batches) if batches is None else batches, num_streams))


def run_progress(clock: Clock, num_streams: int, seconds: float = 10.0) -> None:
    """Draw 128 batches of 3 rows, 500 tokens and 1 MB, of which each stream has finished as many as its number."""
    progress = make_progress(128, 3, 500, 1_000_000, num_streams)
    with progress:
        clock.now += seconds
        for stream in range(num_streams):
            for batch in range(stream, 128, num_streams)[:stream]:
                progress.written(batch, 0.0)


@pytest.mark.parametrize("width", [80, 40])
def test_the_display_shows_everything_at_any_width(terminal: Terminal, clock: Clock, width: int) -> None:
    screen = terminal(width, 24)
    run_progress(clock, num_streams=4)  # 0 + 1 + 2 + 3 batches in 10 s
    pictures = frames(screen)
    assert pictures
    assert all(len(line) <= width for picture in pictures for line in picture)
    shown = " ".join(" ".join(pictures[-1]).split())
    for words in (
        "18/384 rows",
        "3,000/64,000 tokens",
        "300 tok/s",
        "ETA 3:23",
        "6.0 MB written",
        "bottleneck forward",
    ):
        assert words in shown
    assert [line[:6] for line in pictures[-1] if line.startswith("rank")] == [f"rank {stream}" for stream in range(4)]
    rates = [line.split()[-2:] for line in pictures[-1] if line.startswith("rank")]
    assert rates == [["0", "tok/s"], ["50", "tok/s"], ["100", "tok/s"], ["150", "tok/s"]]
    shares = re.findall(r"rank \d.*? (\d+%)", shown)
    assert shares == ["0%", "3%", "6%", "9%"]


def test_large_numbers_are_shown_whole(terminal: Terminal, clock: Clock) -> None:
    screen = terminal(80, 24)
    progress = make_progress(8, 1_250_000, 1_250_000_000, 330_000_000_000, 8)
    with progress:
        clock.now += 10_000
        for batch in range(7):
            progress.written(batch, 0.0)
    pictures = frames(screen)
    assert all(len(line) <= 80 for picture in pictures for line in picture)
    shown = " ".join(" ".join(pictures[-1]).split())
    numbers = "8,750,000/10,000,000 rows", "8,750,000,000/10,000,000,000 tokens", "875,000 tok/s", "2.3 TB written"
    for words in (*numbers, "ETA 23:48"):
        assert words in shown


@pytest.mark.parametrize("width", [80, 40])
@pytest.mark.parametrize("height", [24, 10])
def test_many_ranks_fit_the_screen_and_the_slowest_are_shown(
    terminal: Terminal, clock: Clock, width: int, height: int
) -> None:
    screen = terminal(width, height)
    # Ranks 0 and 1 have done all, 0 and 1 of their two batches, and the others two.
    progress = make_progress(128, 3, 500, 1000, 64)
    with progress:
        clock.now += 1
        for batch in range(128):
            if batch not in (40, 104, 41):
                progress.written(batch, 0.0)
    pictures = frames(screen)
    assert pictures
    assert all(len(picture) <= height and all(len(line) <= width for line in picture) for picture in pictures)
    ranks = [int(line.split()[1]) for line in pictures[-1] if line.startswith("rank")]
    assert {40, 41} <= set(ranks)
    assert ranks == sorted(ranks)
    assert len(ranks) >= height // 3
    assert f"and {64 - len(ranks)} faster ranks" in pictures[-1][-1]


def test_a_rank_without_batches_is_not_the_slowest(terminal: Terminal, clock: Clock) -> None:
    screen = terminal(80, 24)
    with make_progress(1, 1, 10, 100, 2):
        clock.now += 1
    shares = [line.split()[-3] for line in frames(screen)[-1] if line.startswith("rank")]
    assert shares == ["0%", "100%"]


def test_the_display_can_be_drawn_in_the_instant_it_starts(terminal: Terminal, clock: Clock) -> None:
    screen = terminal(80, 24)
    clock.tick = 0.0  # where the clock is coarse, no time has passed yet
    progress = make_progress(1, 3, 500, 1000, 1)
    with progress:
        progress.written(0, 0.0)
    assert "3/3 rows" in frames(screen)[-1][0]


def test_the_display_leaves_no_trace_on_the_screen(terminal: Terminal, clock: Clock) -> None:
    screen = terminal(80, 24)
    run_progress(clock, num_streams=2)
    height = len(frames(screen)[-1])
    assert screen.getvalue().endswith("\r" + height * "\x1b[1A\x1b[2K")


def test_time_is_counted_from_the_start_of_the_display(messages: io.StringIO, clock: Clock) -> None:
    progress = make_progress(1, 1, 10, 100, 1)
    clock.now += 500
    with progress:
        clock.now += 30
        assert progress.seconds == pytest.approx(30, abs=0.01)


def test_without_a_terminal_a_plain_line_comes_now_and_then(
    messages: io.StringIO, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "logitgen")
    progress = make_progress(100, 30, 5000, 1_000_000, 2)
    written_at = []
    with progress:
        for batch in range(50):
            clock.now += PLAIN_SECONDS / 4
            before = len(caplog.messages)
            progress.written(batch, 0.0)
            if len(caplog.messages) > before:
                written_at.append(clock.now)
    assert len(written_at) == len(caplog.messages) == 12
    gaps = np.diff([1000.0, *written_at])
    assert (gaps >= PLAIN_SECONDS).all()
    assert (gaps < 1.5 * PLAIN_SECONDS).all()
    assert "capture" not in messages.getvalue()  # the picture for a terminal


def test_the_plain_line_says_how_far_the_run_is(
    messages: io.StringIO, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "logitgen")
    progress = make_progress(100, 30, 5000, 1_000_000, 2)
    with progress:
        for batch in (0, 2, 1, 4):
            progress.written(batch, 0.0)
        clock.now += 20
        progress.written(6, 0.0)
    assert caplog.messages == [
        "150/3,000 rows, 25,000/500,000 tokens, 1,250 tok/s, ETA 6:20, 5.0 MB written, bottleneck forward, "
        "slowest rank 1 at 2%"
    ]


def test_the_plain_line_of_one_rank_names_no_slowest(
    messages: io.StringIO, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "logitgen")
    progress = make_progress(2, 1500, 1_000_000, 250, 1)
    with progress:
        clock.now += 3700
        progress.written(1, 0.0)
    assert caplog.messages == [
        "1,500/3,000 rows, 1,000,000/2,000,000 tokens, 270 tok/s, ETA 1:01:40, 250 B written, bottleneck forward"
    ]


def test_a_run_that_goes_on_counts_what_is_in_the_file_but_not_for_its_speed(
    messages: io.StringIO, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "logitgen")
    progress = make_progress(100, 30, 5000, 1_000_000, 2, batches=[10, 20, 30, 41, 51, 99])
    with progress:
        clock.now += 10
        progress.written(99, 0.0)
        clock.now += 10
        progress.written(20, 0.0)
    # 94 batches were there; the shares are 10, 30, 51 and 20, 41, 99, and nothing of the first is done.
    counts = [(2850, 475_000, 500, "0:50", 95), (2880, 480_000, 500, "0:40", 96)]
    assert caplog.messages == [
        f"{rows:,}/3,000 rows, {tokens:,}/500,000 tokens, {rate} tok/s, ETA {eta}, {size}.0 MB written, "
        "bottleneck forward, slowest rank 0 at 0%"
        for rows, tokens, rate, eta, size in counts
    ]


def test_the_display_of_a_run_that_goes_on_starts_where_the_last_one_ended(terminal: Terminal, clock: Clock) -> None:
    screen = terminal(80, 24)
    with make_progress(10, 3, 500, 1_000_000, 2, batches=[7, 9, 4]) as progress:
        clock.now += 10
        progress.written(9, 0.0)
    shown = " ".join(" ".join(frames(screen)[-1]).split())
    for words in ("24/30 rows", "4,000/5,000 tokens", "50 tok/s", "8.0 MB written", "80%", "ETA 0:20"):
        assert words in shown
    assert re.findall(r"rank \d.*? (\d+%)", shown) == ["0%", "100%"]


def test_rows_that_need_no_forward_pass_are_no_part_of_the_speed(
    messages: io.StringIO, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "logitgen")
    with Progress(np.array([1, 2]), np.array([7, 13]), np.array([100, 200]), [np.array([1])]) as progress:
        clock.now += 13
        progress.written(1, 0.0)
    assert caplog.messages == ["3/3 rows, 20/20 tokens, 1 tok/s, ETA 0:00, 300 B written, bottleneck forward"]


def test_a_snapshot_tells_the_progress_of_every_stream_and_the_recent_rate(clock: Clock) -> None:
    clock.tick = 0.0
    progress = make_progress(8, 1, 100, 1000, 2, batches=range(2, 8))  # two are in the file already
    with progress:
        clock.now += 20
        progress.written(2, 0.0)
        assert progress.snapshot().recent_rate == 5
        clock.now += 20
        progress.written(3, 0.0)
        clock.now += 5
    assert asdict(progress.snapshot()) == {
        "seconds": 45,
        "recent_rate": 4,  # the second batch, over the 25 s since the first
        "tokens_before": 200,
        "stream_tokens": [100, 100],
        "stream_totals": [300, 300],
        "ranks_of_stream": 1,
    }
    assert replace(progress.snapshot(), ranks_of_stream=4).slowest == ", slowest rank 0 at 33%"
    assert replace(progress.snapshot(), ranks_of_stream=4).name(1) == "rank 4"
    assert (progress.snapshot().tokens, progress.snapshot().total) == (400, 800)
    assert progress.snapshot().eta_seconds == pytest.approx(90)


def test_a_terminal_gets_no_plain_lines(terminal: Terminal, clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    terminal(80, 24)
    caplog.set_level(logging.INFO, "logitgen")
    run_progress(clock, num_streams=2, seconds=5 * PLAIN_SECONDS)
    assert caplog.messages == []


def test_a_ranks_bar_is_as_long_as_its_share(terminal: Terminal, clock: Clock) -> None:
    screen = terminal(80, 24)
    tokens = np.array([400, 300, 200, 100, 50])
    shares = [np.array([0]), np.array([4, 1, 3]), np.array([], dtype=np.int64)]  # batch 2 is in the file already
    with Progress(np.ones(5, int), tokens, np.full(5, 1000), shares) as progress:
        clock.now += 10
        for batch in (3, 4):
            progress.written(batch, 0.0)
    shown = " ".join(" ".join(frames(screen)[-1]).split())
    assert "3/5 rows, 350/1,050 tokens, 15 tok/s" in shown
    assert re.findall(r"rank \d.*? (\d+%)", shown) == ["0%", "33%", "100%"]
    assert re.findall(r"(\d+) tok/s", shown)[1:] == ["0", "15", "0"]


def test_the_first_rows_are_announced_once_in_the_log_file(
    messages: io.StringIO, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "logitgen")
    with make_progress(10, 30, 5000, 1_000_000, 2, batches=[3, 5, 8]) as progress:
        assert caplog.record_tuples == []
        for batch in (5, 3, 8):
            progress.written(batch, 0.0)
    assert caplog.record_tuples == [("logitgen.leader.progress", logging.DEBUG, "First rows are in the file.")]


# What a run takes its time for.


def waiting(clock: Clock, waited: Sequence[float], writer_seconds: float, seconds: float = 8.0) -> Progress:
    """A run of so many seconds, in which ranks have waited and the writer has been busy."""
    progress = make_progress(100, 3, 500, 1000, len(waited))
    clock.now += 500  # nothing has begun yet
    with progress:
        clock.now += seconds
        for stream, wait in enumerate(waited):
            progress.waited(stream, wait / 2)
            progress.waited(stream, wait)  # so far, not since then
        progress.written(0, writer_seconds)
    return progress


@pytest.mark.parametrize(
    ("waited", "writer_seconds", "bottleneck"),
    [
        # Of two ranks' 16 s 5 % are 0.8 s; of the writer's 8 s half are 4.
        ([0.0, 0.0], 0.0, "forward"),
        ([0.0, 0.0], 8.0, "forward"),  # a busy disk that nobody waits for
        ([0.3, 0.4], 8.0, "forward"),
        ([0.5, 0.4], 3.9, "transport"),
        ([0.5, 0.4], 4.1, "disk"),
        ([0.0, 0.9], 4.1, "disk"),
        ([0.9, 0.0], 3.9, "transport"),
        ([8.0, 8.0], 0.0, "transport"),
        ([8.0, 8.0], 8.0, "disk"),
        # Of one rank's 8 s.
        ([0.3], 8.0, "forward"),
        ([0.5], 1.0, "transport"),
        ([0.5], 5.0, "disk"),
    ],
)
def test_what_a_run_takes_its_time_for_worked_by_hand(
    messages: io.StringIO, clock: Clock, waited: list[float], writer_seconds: float, bottleneck: str
) -> None:
    assert (WAITED_SHARE, BUSY_SHARE) == (0.05, 0.5)
    progress = waiting(clock, waited, writer_seconds)
    assert progress.bottleneck == bottleneck
    assert progress.waited_share == pytest.approx(sum(waited) / len(waited) / 8, abs=1e-4)


def test_in_the_instant_it_starts_a_run_takes_its_time_for_forward_passes(messages: io.StringIO, clock: Clock) -> None:
    clock.tick = 0.0
    with make_progress(2, 3, 500, 1000, 2) as progress:
        assert progress.bottleneck == "forward"
        assert progress.waited_share == 0


@pytest.mark.parametrize(("writer_seconds", "bottleneck"), [(3.0, "transport"), (7.0, "disk")])
def test_both_displays_name_what_the_run_waits_for(
    terminal: Terminal,
    clock: Clock,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    writer_seconds: float,
    bottleneck: str,
) -> None:
    caplog.set_level(logging.INFO, "logitgen")
    screen = terminal(80, 24)
    waiting(clock, [4.0, 4.0], writer_seconds)
    assert f"1.0 kB written, bottleneck {bottleneck}" in " ".join(" ".join(frames(screen)[-1]).split())
    monkeypatch.setattr(console, "messages", Console(file=io.StringIO(), force_terminal=False, width=80))
    waiting(clock, [4.0, 4.0], 2 * writer_seconds, seconds=2 * PLAIN_SECONDS)
    (line,) = caplog.messages
    assert f"1.0 kB written, bottleneck {bottleneck}, slowest" in line


def bottlenecks(clock: Clock, phases: Sequence[tuple[int, float, float]]) -> list[str]:
    """What the run takes its time for at every second: phases of seconds, of waiting and of writing in each."""
    found, waited, written = [], 0.0, 0.0
    total = sum(seconds for seconds, _, _ in phases)
    with make_progress(total, 3, 500, 1000, 2) as progress:
        for seconds, waiting_share, writing_share in phases:
            for _ in range(seconds):
                clock.now += 1
                waited += waiting_share
                written += writing_share
                for stream in range(2):
                    progress.waited(stream, waited)
                progress.written(len(found), written)
                found.append(progress.bottleneck)
    return found


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (("disk", 0.5, 0.9), ("forward", 0.0, 0.1)),
        (("forward", 0.0, 0.1), ("disk", 0.5, 0.9)),
        (("transport", 0.5, 0.1), ("disk", 0.5, 0.9)),
        (("disk", 0.5, 0.9), ("transport", 0.5, 0.1)),
        (("transport", 0.5, 0.1), ("forward", 0.0, 0.1)),
    ],
    ids=lambda phase: phase[0],
)
def test_what_a_run_takes_its_time_for_is_what_it_was_of_late(
    messages: io.StringIO, clock: Clock, before: tuple[str, float, float], after: tuple[str, float, float]
) -> None:
    found = bottlenecks(clock, [(1000, *before[1:]), (60, *after[1:])])
    assert set(found[:1000]) == {before[0]}
    assert set(found[1020:]) == {after[0]}  # what is looked at are the last 20 s at most
    changes = [second for second, pair in enumerate(pairwise(found), start=1) if pair[0] != pair[1]]
    assert 1000 < changes[0] <= changes[-1] <= 1020
    assert len(changes) == 1 or {before[0], after[0]} == {"forward", "disk"}  # between those two it may be transport


LOGGING_OF = ("", "logitgen", "py.warnings", "transformers", "datasets", "huggingface_hub", "accelerate")


@pytest.fixture
def logging_restored(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Give pytest and the other tests back the logging and the progress bars they had."""
    for name in ("__init__", "display", "monitor_interval"):
        monkeypatch.setattr(tqdm.tqdm, name, vars(tqdm.tqdm)[name])
    loggers = [logging.getLogger(name) for name in LOGGING_OF]
    before = [(logger, list(logger.handlers), logger.level, logger.propagate) for logger in loggers]
    root = logging.getLogger()
    for handler in list(root.handlers):  # start_logging closes those it finds
        root.removeHandler(handler)
    yield
    logging.captureWarnings(False)
    for handler in root.handlers:
        handler.close()
    for logger, handlers, level, propagate in before:
        logger.handlers[:] = handlers
        logger.setLevel(level)
        logger.propagate = propagate


def log_of_everything(folder: Path, rank: int, num_ranks: int = 2) -> str:
    """Log as logitgen and as others do, in a rank of its own; return the rank's log file."""
    start_logging(folder, rank, num_ranks)
    ours, others = logging.getLogger("logitgen.some.part"), logging.getLogger("transformers.models")
    ours.debug("our detail")
    others.debug("their detail")
    ours.info("our %s with [bold] in it", "information")
    ours.warning("our warning")
    ours.error("our error")
    others.warning("their warning")
    others.error("their error")
    logging.getLogger("logitgenerator").error("a stranger's error")
    warnings.warn("a Python warning", UserWarning, stacklevel=1)
    return (folder / f"rank_{rank}.log").read_text(encoding="utf-8")


RECORDS = {
    "our detail": "DEBUG logitgen.some.part",
    "our information with [bold] in it": "INFO logitgen.some.part",
    "our warning": "WARNING logitgen.some.part",
    "our error": "ERROR logitgen.some.part",
    "their warning": "WARNING transformers.models",
    "their error": "ERROR transformers.models",
    "a stranger's error": "ERROR logitgenerator",
}


@pytest.mark.usefixtures("logging_restored")
@pytest.mark.parametrize("rank", [0, 1, 12])
def test_every_record_is_in_the_ranks_own_file_with_its_rank(
    tmp_path: Path, messages: io.StringIO, recwarn: pytest.WarningsRecorder, rank: int
) -> None:
    folder = tmp_path / "new" / "logs"
    logged = log_of_everything(folder, rank, num_ranks=13)
    assert [path.name for path in folder.iterdir()] == [f"rank_{rank}.log"]
    lines = [line for line in logged.splitlines() if re.match(r"\d{4}-\d\d-\d\d ", line)]
    for message, origin in RECORDS.items():
        (line,) = [line for line in lines if line.endswith(f": {message}")]
        assert f" rank {rank} {origin}: " in line
    assert "their detail" not in logged


@pytest.mark.usefixtures("logging_restored")
def test_python_warnings_go_into_the_file_and_not_onto_the_console(tmp_path: Path, messages: io.StringIO) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        logged = log_of_everything(tmp_path, 0)
        logging.captureWarnings(False)  # before catch_warnings puts back what it found
    assert "rank 0 WARNING py.warnings: " in logged
    assert "a Python warning" in logged
    assert "a Python warning" not in messages.getvalue()


@pytest.mark.usefixtures("logging_restored")
def test_the_leaders_records_are_on_the_console(tmp_path: Path, messages: io.StringIO) -> None:
    log_of_everything(tmp_path, 0)
    lines = messages.getvalue().splitlines()
    assert lines == ["our information with [bold] in it", "warning: our warning", "error: our error"]


@pytest.mark.usefixtures("logging_restored")
def test_the_other_ranks_show_only_warnings_with_their_number(tmp_path: Path, messages: io.StringIO) -> None:
    log_of_everything(tmp_path, 3, num_ranks=4)
    assert messages.getvalue().splitlines() == ["warning: rank 3: our warning", "error: rank 3: our error"]


@pytest.mark.usefixtures("logging_restored")
def test_a_long_record_stays_one_line(tmp_path: Path, messages: io.StringIO) -> None:
    start_logging(tmp_path, 0, 1)
    logging.getLogger("logitgen").warning("word " * 50)
    assert messages.getvalue().strip() == "warning: " + ("word " * 50).strip()


def far_enough(seconds: float, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Walk through a bar, the first step at once, each of the others so many seconds later."""
    clock = iter(range(1000))
    bar = tqdm.tqdm([1, 2, 3], desc="Loading weights")
    monkeypatch.setattr(bar, "_time", lambda: bar.start_t + seconds * next(clock), raising=False)
    return list(bar)


@pytest.mark.usefixtures("logging_restored")
def test_only_the_leader_shows_the_progress_of_other_libraries(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    start_logging(tmp_path, 1, 2)
    assert far_enough(60, monkeypatch) == [1, 2, 3]
    assert capsys.readouterr().err == ""


@pytest.mark.usefixtures("logging_restored")
@pytest.mark.parametrize(("seconds", "lines"), [(0.1, []), (8, [3]), (60, [2, 3])])
def test_without_a_terminal_progress_is_a_line_now_and_then(
    tmp_path: Path, messages: io.StringIO, monkeypatch: pytest.MonkeyPatch, seconds: float, lines: list[int]
) -> None:
    start_logging(tmp_path, 0, 2)
    assert far_enough(seconds, monkeypatch) == [1, 2, 3]
    assert messages.getvalue().splitlines() == [f"Loading weights: {done} of 3." for done in lines]


@pytest.mark.usefixtures("logging_restored")
def test_in_a_terminal_progress_is_a_bar_that_goes_when_it_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    screen = io.StringIO()
    monkeypatch.setattr(console, "messages", Console(file=screen, force_terminal=True, width=80))
    start_logging(tmp_path, 0, 2)
    assert far_enough(2, monkeypatch) == [1, 2, 3]
    assert "Loading weights:  67%" in screen.getvalue()
    assert screen.getvalue().endswith("\r")


@pytest.mark.usefixtures("logging_restored")
def test_a_log_folder_that_cannot_be_made_is_a_usage_error(tmp_path: Path) -> None:
    (tmp_path / "logs").write_text("a file")
    with pytest.raises(UsageError, match=r"--log_dir .*logs"):
        start_logging(tmp_path / "logs", 0, 1)


def test_an_error_is_one_line_whatever_is_in_it(messages: io.StringIO) -> None:
    message = "--output [bold]x[/bold].h5 exists. " + "Choose another name. " * 10
    print_error(message)
    assert messages.getvalue() == f"error: {message}\n"


def test_a_result_goes_to_standard_output_without_escape_codes(capsys: pytest.CaptureFixture[str]) -> None:
    print_result(Text("a result", style="bold red"))
    captured = capsys.readouterr()
    assert captured.out == "a result\n"
    assert captured.err == ""


def test_a_view_leaves_room_for_what_the_terminal_writes_behind_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A ^C behind a line as wide as the terminal would wrap, and the view could not be drawn over."""
    for name, value in {"FORCE_COLOR": "1", "COLUMNS": "40", "LINES": "20", "TERM": "xterm"}.items():
        monkeypatch.setenv(name, value)
    with redrawn() as draw:
        draw(Text("x" * 100), "")
    assert max(map(len, re.findall("x+", ESCAPES.sub("", capsys.readouterr().out)))) == 38


def test_silenced_processes_print_nothing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "stdout", sys.stdout)  # what follows is undone at the end
    silence_stdout()
    print("from a rank that has nothing to say")  # noqa: T201
    sys.stdout.close()
    assert capsys.readouterr().out == ""


def test_what_would_move_a_cursor_is_not_printed_as_it_is(messages: io.StringIO) -> None:
    assert printable("a\tb\nc\x1b[31m\x07\x9b\rd\x00") == "a\tb\nc\ufffd[31m\ufffd\ufffd\ufffdd\ufffd"
    print_error("one\x1b[2J\ntwo\rthree")
    assert messages.getvalue() == "error: one\ufffd[2J two\ufffdthree\n"


@pytest.mark.parametrize(
    ("seconds", "clock_text"),
    [(0, "0:00"), (9.99, "0:09"), (61, "1:01"), (3599, "59:59"), (3600, "1:00:00"), (90_061, "25:01:01")],
)
def test_durations_are_written_as_a_clock_does(seconds: float, clock_text: str) -> None:
    assert format_seconds(seconds) == clock_text


@pytest.mark.parametrize(
    ("size_bytes", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (1_550_000, "1.6 MB"),
        (2_340_000_000, "2.3 GB"),
        (35e12, "35.0 TB"),
        (4.2e15, "4,200.0 TB"),
    ],
)
def test_sizes_are_written_with_the_unit_that_suits_them(size_bytes: float, text: str) -> None:
    assert format_bytes(size_bytes) == text
