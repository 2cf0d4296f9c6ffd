"""The end of a failed run: one line from one rank, one exit status on all."""

import _thread
import json
import logging
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import astuple, dataclass
from pathlib import Path
from types import FrameType
from typing import NoReturn, cast

import psutil
import torch.distributed as dist

from logitgen.console import print_error
from logitgen.errors import LogitgenError, LostRankError, UsageError, first_line
from logitgen.ranks.environment import (
    _STORE_TIMEOUT,
    launch_store,
    launched_rank,
    launched_ranks,
    ranks_of_machine,
)

logger = logging.getLogger(__name__)

HUNG = "{} made no progress for {:,.0f} s (--rank_timeout). It hangs, or its machine is down."

GONE = "{} ended without an error message: it was killed, or its machine or connection failed."

_EX_TEMPFAIL = 75
"""Exit status of sysexits.h: the same command may succeed later."""

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else []))

_NOTICE_SECONDS = 0.5
"""When a rank dies, the launcher stops the others by signal.

In this time the leader notices and names the dead rank.
"""


class Stopped(KeyboardInterrupt):
    """A request from outside to stop the run: Ctrl-C, SIGTERM, or a closed terminal (SIGHUP)."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signal_number).name}")
        self.exit_status = 128 + signal_number if signal_number == signal.SIGINT else _EX_TEMPFAIL


def end_run(error: BaseException, thread_failures: list[BaseException]) -> NoReturn:
    """End this process for an error, or for its cause in a thread or in another rank.

    Args:
        error: The error the main thread raised.
        thread_failures: List to which other threads append their errors before they interrupt the main thread.
    """
    ignore_signals()
    if isinstance(error, Stopped):
        dead = _dead_neighbours()
        if not thread_failures:
            time.sleep(_NOTICE_SECONDS)
        if thread_failures:
            error = thread_failures[0]
        elif dead:
            error = LostRankError(GONE.format("The leader" if dead == [0] else f"Rank {', '.join(map(str, dead))}"))
    leave(error)


def leave(error: BaseException) -> NoReturn:
    """End this process. Print one line if it is the first of the launch to fail."""
    logger.debug("This rank ends.", exc_info=error)
    if not logging.root.handlers and not isinstance(error, LogitgenError | Stopped):
        traceback.print_exception(error)
    mine = Failure.of(error)
    first = first_failure(mine) if launched_ranks() > 1 else mine
    try:
        if first.rank == mine.rank:
            print_error(first.message)
        first.tell_launcher()
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        # Threads may be waiting inside gloo for ranks that are gone. They cannot be joined.
        os._exit(first.exit_status)


def _dead_neighbours() -> list[int]:
    """List the ranks of this machine that ended before the launcher's signal: they are its cause.

    The list may hold a rank that ended because of the signal itself. That rank has told the launch's store by then.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return []
    first = launched_rank() - int(os.environ.get("LOCAL_RANK", "0"))
    living = set()
    with suppress(psutil.Error):
        for process in psutil.Process(os.getppid()).children():
            with suppress(psutil.Error):
                if process.status() != psutil.STATUS_ZOMBIE:
                    living.add(process.environ().get("RANK"))
        return [rank for rank in range(first, first + ranks_of_machine()) if str(rank) not in living]
    return []


@dataclass(frozen=True)
class Failure:
    """The reason why a rank ends."""

    rank: int
    exit_status: int
    message: str

    @classmethod
    def of(cls, error: BaseException) -> "Failure":
        """Put an error of this rank into words."""
        # Accelerate may not have spoken yet, or may be wrong: here the launcher's word counts.
        rank = launched_rank()
        where = f"Rank {rank}: " if launched_ranks() > 1 else ""
        match error:
            case Stopped():
                return cls(rank, error.exit_status, f"The run was {error}.")
            case UsageError():
                return cls(rank, error.exit_status, str(error))
            case LogitgenError():
                return cls(rank, error.exit_status, where + str(error))
        if (isinstance(error, RuntimeError) and "gloo" in str(error)) or isinstance(error, dist.DistError):
            return cls(rank, 1, f"{where}{GONE.format('Another rank')}")
        more = " (traceback in this rank's log file)" if logging.root.handlers else ""
        return cls(rank, 1, f"{where}{type(error).__name__}: {first_line(error)}{more}")

    def tell_launcher(self) -> None:
        """Write the message to the place torch's launcher reads, so that its own report names the cause."""
        if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
            report = {"message": self.message, "timestamp": int(time.time())}
            Path(path).write_text(json.dumps(report), encoding="utf-8")


def first_failure(mine: Failure) -> Failure:
    """Ask the launch's store which rank failed first: only that rank prints its error."""
    claims: list[bytes] = []

    def claim() -> None:
        with suppress(Exception):  # out of reach: this rank speaks for itself
            claims.append(launch_store().compare_set("failure", "", json.dumps(astuple(mine))))

    # In a thread, because the store's own timeout does not end a call to a machine that is gone (torch 2.13).
    thread = threading.Thread(target=claim, daemon=True)
    thread.start()
    thread.join(_STORE_TIMEOUT.total_seconds())
    return Failure(*json.loads(claims[0])) if claims else mine


@contextmanager
def lost_connection_means(who: str) -> Iterator[None]:
    """Turn gloo's error over a closed connection into an error that names the other end."""
    try:
        yield
    except RuntimeError as error:
        raise LostRankError(GONE.format(who)) from error


def raise_stopped(number: int, frame: FrameType | None) -> NoReturn:
    """Handle a signal: have the main thread raise `Stopped`, once."""
    ignore_signals()
    raise Stopped(number)


def ignore_signals() -> None:
    """Make signals do nothing from here on. Not SIG_IGN: Python complains about a signal that came just before."""
    for number in STOP_SIGNALS:
        signal.signal(number, lambda number, frame: None)


def interrupt_main(number: signal.Signals = signal.SIGINT) -> None:
    """Send the main thread a signal, from another thread."""
    if hasattr(signal, "pthread_kill"):
        signal.pthread_kill(cast(int, threading.main_thread().ident), number)  # also ends a wait for a lock
    else:
        _thread.interrupt_main(number)
