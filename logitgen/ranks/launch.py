"""The launch: from a process's first step among the ranks to its last."""

import logging
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from logitgen.errors import UsageError
from logitgen.ranks.agree import Ranks
from logitgen.ranks.ending import STOP_SIGNALS, Stopped, end_run, interrupt_main, raise_stopped
from logitgen.ranks.environment import LOOK_SECONDS, ranks_of_machine

logger = logging.getLogger(__name__)


@contextmanager
def launched() -> Iterator[Ranks]:
    """Yield the ranks of this launch. When a rank fails in the block, end all with one message and status."""
    for number in STOP_SIGNALS:
        if number == signal.SIGINT or signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores SIGHUP this way
            signal.signal(number, raise_stopped)
    if _started_by_launcher():
        threading.Thread(target=_stop_with, args=(os.getppid(),), name="launcher watch", daemon=True).start()
    thread_failures: list[BaseException] = []
    try:
        _check_gpus()
        yield Ranks(thread_failures)
    except SystemExit:
        raise
    except BaseException as error:
        try:
            end_run(error, thread_failures)
        except Stopped:  # at the very last moment; there is no second signal
            end_run(error, thread_failures)
    if dist.is_initialized():
        dist.destroy_process_group()


def _started_by_launcher() -> bool:
    """Tell whether this process is a child of `accelerate launch`, with one rank or several."""
    return "TORCHELASTIC_RUN_ID" in os.environ or "ACCELERATE_MIXED_PRECISION" in os.environ


def _stop_with(launcher: int) -> None:
    """Stop this rank when its launcher is gone: a killed launcher cannot stop its ranks itself."""
    while os.getppid() == launcher:
        time.sleep(LOOK_SECONDS)
    logger.warning("The launcher ended, so its ranks stop.")
    interrupt_main(signal.SIGTERM)


def _check_gpus() -> None:
    local_ranks = ranks_of_machine()
    if torch.cuda.is_available() and local_ranks > torch.cuda.device_count():
        raise UsageError(
            f"The launcher started {local_ranks} ranks on a machine with {torch.cuda.device_count()} GPUs. "
            f"Start one per GPU: accelerate launch --num_processes {torch.cuda.device_count()} ..."
        )
