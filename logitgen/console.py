"""The console: log records, the progress display, errors. Library code never prints."""

import logging
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partialmethod
from pathlib import Path
from typing import Any, TextIO, cast

from rich.console import Console, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text
from tqdm import tqdm

from logitgen.errors import UsageError, first_line

logger = logging.getLogger(__name__)

_draw = tqdm.display

PLAIN_SECONDS = 10.0
"""Time between two progress lines where there is no terminal to draw in."""


class _Stream:
    """A standard stream while somebody listens: a failed display cannot end a run."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        return getattr(getattr(sys, self._name), attribute)

    def write(self, text: str) -> int:
        stream = getattr(sys, self._name)
        try:
            return int(stream.write(text))
        except UnicodeEncodeError:
            return int(stream.write(text.encode(stream.encoding, "backslashreplace").decode(stream.encoding)))
        except OSError:
            return self._give_up(text)

    def flush(self) -> None:
        try:
            getattr(sys, self._name).flush()
        except OSError:
            self._give_up("")

    def _give_up(self, text: str) -> int:
        """Discard the rest: data left in a buffer would fail again as Python ends, and change its exit status."""
        with suppress(OSError, ValueError), open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), getattr(sys, self._name).fileno())
        logger.debug("The reader of %s has closed it.", self._name)
        return len(text)


_stdout = cast(TextIO, _Stream("stdout"))
messages = Console(file=cast(TextIO, _Stream("stderr")))

_CONTROL_CODES = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def printable(text: str) -> str:
    """Replace characters that move the cursor or change the colours of a terminal. Lines and tabs stay."""
    return _CONTROL_CODES.sub("\N{REPLACEMENT CHARACTER}", text)


def print_error(message: str) -> None:
    """Print the reason why the run ends, in one line."""
    line = " ".join(printable(message).splitlines())
    _print_line(Text.assemble(("error: ", "bold red"), line))


def _print_line(text: Text) -> None:
    """Print a line to standard error."""
    messages.print(text, soft_wrap=True)


def print_result(result: RenderableType) -> None:
    """Print the result of a command to standard output."""
    Console(file=_stdout).print(result, soft_wrap=isinstance(result, Text))


@contextmanager
def only_shows(what: str) -> Iterator[None]:
    """Keep errors of a block that only shows something from ending the run: they become a line in the log."""
    try:
        yield
    except Exception as error:
        logger.warning(f"{what} cannot be shown: {first_line(error)}")


@contextmanager
def redrawn(plain: bool = False) -> Iterator[Callable[[RenderableType, str], None]]:
    """Yield a function that draws a view over the last one. Without a terminal, or if `plain`, it prints a line."""
    console = Console(file=_stdout)
    if plain or not console.is_terminal:
        yield lambda _, line: console.print(Text(line), soft_wrap=True)
        return
    console.width -= len("^C")  # the terminal writes it behind the last line, which must not wrap
    with Live(console=console, auto_refresh=False) as live:
        yield lambda view, _: live.update(view, refresh=True)


def silence_stdout() -> None:
    """Discard all that this process prints to standard output: only the leader has something to say there."""
    sys.stdout = open(os.devnull, "w", encoding="utf-8")


def start_logging(log_dir: Path, rank: int, num_ranks: int) -> None:
    """Start a rank's log file and its messages on the console.

    The file gets every record, other libraries' too. The console gets logitgen's records from the leader, and its
    warnings and errors from every rank.
    """
    try:
        log_dir.mkdir(parents=True, exist_ok=True)
        file = logging.FileHandler(log_dir / f"rank_{rank}.log", encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        raise UsageError(f"--log_dir {log_dir} cannot be written to: {error.strerror}. Choose another.") from error
    file.setFormatter(logging.Formatter(f"%(asctime)s rank {rank} %(levelname)s %(name)s: %(message)s"))
    console = _ConsoleHandler(prefix=f"rank {rank}: " if num_ranks > 1 and rank else "")
    console.setLevel(logging.WARNING if rank else logging.INFO)
    console.addFilter(logging.Filter("logitgen"))
    if rank:  # all ranks read the same rows
        console.addFilter(lambda record: not record.name.startswith("logitgen.split"))
    logging.basicConfig(level=logging.INFO, handlers=[file, console], force=True)
    logging.getLogger("logitgen").setLevel(logging.DEBUG)
    logging.captureWarnings(True)
    quiet_libraries(bars=not rank)


def quiet_libraries(*, bars: bool = False) -> None:
    """Send messages of other libraries to the log file.

    Args:
        bars: Draw their progress bars in a terminal, and log their progress now and then elsewhere. Otherwise there are
            none.
    """
    import datasets  # they take seconds, and a look into a file needs none of them
    import transformers
    from huggingface_hub.utils.tqdm import disable_progress_bars

    _change_bars(bars)
    if not bars:
        transformers.utils.logging.disable_progress_bar()
        datasets.utils.logging.disable_progress_bar()
        disable_progress_bars()
    transformers.utils.logging.disable_default_handler()
    transformers.utils.logging.enable_propagation()
    datasets.utils.logging.enable_propagation()
    for name in ("transformers", "datasets", "huggingface_hub", "accelerate"):
        logging.getLogger(name).handlers.clear()


def _change_bars(shown: bool) -> None:
    """Set the defaults of all progress bars: some libraries have no switch for theirs, such as the GGUF loader."""
    as_lines = shown and not messages.is_terminal
    seconds = PLAIN_SECONDS if as_lines else 0.1
    options = {"disable": not shown, "file": messages.file, "leave": False, "mininterval": seconds, "miniters": 1}
    tqdm.monitor_interval = 0  # no thread of its own
    tqdm.display = _log_progress if as_lines else _draw
    tqdm.__init__ = partialmethod(vars(tqdm)["__init__"], delay=PLAIN_SECONDS if as_lines else 0, **options)


def _log_progress(bar: Any, msg: str | None = None, pos: int | None = None) -> bool:
    """Log how far a progress bar is, in place of `tqdm.display`. Return False, because nothing is drawn."""
    if msg is None:
        total = f" of {bar.total:,}" if bar.total else ""
        logger.info(f"{bar.desc.rstrip(': ') or 'Progress'}: {bar.n:,}{total}.")
    return False


class _ConsoleHandler(logging.Handler):
    def __init__(self, prefix: str) -> None:
        super().__init__()
        self._prefix = prefix

    def emit(self, record: logging.LogRecord) -> None:
        level = ("", "") if record.levelno < logging.WARNING else (f"{record.levelname.lower()}: ", "bold yellow")
        _print_line(Text.assemble(level, self._prefix + record.getMessage()))


def format_seconds(seconds: float) -> str:
    """Write a duration as a clock does."""
    minutes, second = divmod(int(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


def format_bytes(size_bytes: float) -> str:
    """Write a size with the unit that suits it."""
    for unit in ("B", "kB", "MB", "GB"):
        if size_bytes < 1000:
            return f"{size_bytes:,.0f} {unit}" if unit == "B" else f"{size_bytes:,.1f} {unit}"
        size_bytes /= 1000
    return f"{size_bytes:,.1f} TB"


def grid(*headings: str) -> Table:
    """Begin a table with these columns, the first of words and the others of numbers."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in headings:
        table.add_column(heading, justify="left" if heading == headings[0] else "right", no_wrap=True)
    return table


def definitions(lines: dict[str, str]) -> RenderableType:
    """Draw lines of a name and a text each."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, line in lines.items():
        table.add_row(name, Text(printable(line)))
    return table
