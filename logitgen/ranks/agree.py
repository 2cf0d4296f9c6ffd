"""The ranks of a run: how they agree, how payloads reach the leader, how they end together.

The plan is the protocol. The leader knows from it who sends which batch and how large it is, so payloads travel as
plain bytes, without headers, padding or barriers, over a gloo group of their own: the same code for CPU and GPU.
Measured on 2 CPU cores with 8 MB blocks: send/recv 950-2,480 MB/s, `dist.gather` 500-760, `accelerator.gather`
(an all-gather) 130-320.
"""

import _thread
import functools
import json
import logging
import math
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from dataclasses import astuple, dataclass
from datetime import timedelta
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, NoReturn, TypeVar, cast

import numpy as np
import psutil
import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor

from logitgen.console import print_error
from logitgen.errors import CaptureError, LogitgenError, UsageError, first_line
from logitgen.file.layout import Array

logger = logging.getLogger(__name__)

T = TypeVar("T")
Wait = Callable[[], object]
Submit = Callable[[int, Array], Future[None]]
OnWaited = Callable[[int, float], None]

NUM_BUFFERS = 2
"""Payloads a rank may have on their way, and the leader per rank: one travels while the next one is filled."""

_WAITED_BYTES = 8
"""After every payload travels, as a float64, how many seconds its rank has waited for a free buffer so far."""

_NO_TIMEOUT = timedelta(days=365)
"""A rank that dies closes its connections, which ends every wait at once; that one hangs is seen from outside gloo."""

_SILENT_SECONDS = 120.0
"""A machine that dies closes nothing. When its kernel has not answered for so long, its connections are given up."""

UNLIMITED = math.inf
"""Patience for what may take hours on one rank while the others wait."""

_LOOK_SECONDS = 1.0
"""How often a rank that waits looks whether the others still move."""

_GRACE_SECONDS = 3.0
"""By how much longer the other ranks wait than the leader, which knows best who hangs."""

_HUNG = "{} has not moved for {:,.0f} s (--rank_timeout). It hangs, or its machine is gone."
_GONE = "{} ended without a word: it was killed, or its machine or connection was lost."
_MOVES = "moves"

_RUN_ME_AGAIN = 75
"""Exit status EX_TEMPFAIL of sysexits.h: the same command may succeed later."""

_TRAINING_ENGINES = ("FSDP", "DEEPSPEED", "MEGATRON_LM", "PARALLELISM_CONFIG")

_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else []))
_NOTICE_SECONDS = 0.5
"""When a rank dies the launcher stops the others by signal; in this time the leader notices who died, and says so."""

_STORE_TIMEOUT = timedelta(seconds=10)
_JOIN_TIMEOUT = timedelta(minutes=30)

_INTERFACE = "GLOO_SOCKET_IFNAME"


class Stopped(KeyboardInterrupt):
    """The run was told to stop from outside: by Ctrl-C, SIGTERM, or a terminal that was closed (SIGHUP)."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signal_number).name}")
        self.exit_status = 128 + signal_number if signal_number == signal.SIGINT else _RUN_ME_AGAIN


class LostRankError(CaptureError):
    """Another rank ended without saying why."""


class Ranks:
    """The processes of a launch.

    Attributes:
        rank: Number of this process, 0 to `num_ranks` - 1.
        num_ranks: How many there are.
        is_leader: Whether this is rank 0, the one that writes the file.
        device: Where this rank computes.
        num_replicas: How many copies of the teacher the ranks hold together.
        replica: Which of them this rank holds, or a part of.
        stream: Which of the streams of batches this rank computes; several ranks compute one together if the teacher is
            tensor parallel, and the first of them sends what is kept.
        ranks_of_machine: How many ranks share this rank's machine.
    """

    def __init__(self, thread_failures: list[BaseException]) -> None:
        """Join the other ranks.

        Args:
            thread_failures: Where other threads leave why they failed, before they interrupt the main one.
        """
        # The launcher does not hand a profile's use_cpu on to several ranks (accelerate 1.15): without a GPU in sight
        # they would not even find each other. The CPU profile hides the GPUs, and what is in sight decides; Apple's
        # serves a single rank only.
        found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        cpu = found is None or (found.type == "mps" and _launched_ranks() > 1)
        if _on_several_machines() and _INTERFACE not in os.environ:
            _use_interface_to(os.environ["MASTER_ADDR"])
        if _launched_ranks() > 1 and not dist.is_initialized():
            # Not left to Accelerate: with its static rendezvous ranks that were restarted find the addresses of the
            # dead ones in the launcher's store (torch 2.13).
            dist.init_process_group(store=_store(_JOIN_TIMEOUT), rank=_launched_rank(), world_size=_launched_ranks())
        try:
            accelerator = Accelerator(cpu=cpu)
        except (ValueError, ImportError) as error:  # what a profile or ACCELERATE_... asks for is not to be had here
            raise UsageError(
                f"The launch profile does not fit this machine: {first_line(error)} Use one from accelerate_configs/."
            ) from error
        self.rank = accelerator.process_index
        self.num_ranks = accelerator.num_processes
        self.is_leader = accelerator.is_main_process
        self.device = accelerator.device
        self.num_replicas = self.num_ranks
        self.replica = self.stream = self.rank
        self._ranks_of_stream = self._ranks_of_replica = 1
        self.ranks_of_machine = _ranks_of_machine()
        self._first_of_machine = accelerator.is_local_main_process
        self._failures = thread_failures
        self._group = dist.new_group(backend="gloo", timeout=_NO_TIMEOUT) if self.num_ranks > 1 else None
        self.patience_seconds = UNLIMITED
        self._waiting = ThreadPoolExecutor(max_workers=1, thread_name_prefix="wait")
        self._num_met = 0

    @property
    def patience_seconds(self) -> float:
        """How long this rank waits for others of which none moves."""
        return self._patience_seconds

    @patience_seconds.setter
    def patience_seconds(self, seconds: float) -> None:
        self._patience_seconds = seconds
        if _on_several_machines():
            _give_up_silent_machines(min(seconds, _SILENT_SECONDS))

    def check_launch(self) -> None:
        """Refuse a launch whose processes do not see each other: each would believe to be the leader.

        Raises:
            UsageError: The launcher started another number of processes than this one sees, or has Accelerate shard
                models, which it only does for training.
        """
        for engine in _TRAINING_ENGINES:
            if os.environ.get(f"ACCELERATE_USE_{engine}", "false") == "true":
                raise UsageError(
                    f"The launch profile turns on {engine}, with which Accelerate trains. For teachers larger than a "
                    "GPU use accelerate_configs/tensor_parallel.yaml or fsdp.yaml."
                )
        if _launched_ranks() != self.num_ranks:
            raise UsageError(
                f"The launcher started {_launched_ranks()} processes, but they do not see each other "
                f"(Accelerate reports {self.num_ranks}). Use a profile from accelerate_configs/ that fits this machine."
            )

    def form_replicas(self, tp_size: int, fsdp_size: int, device_map: str | None = None) -> None:
        """Have ranks next to one another hold one teacher together.

        Args:
            tp_size: Ranks that compute a batch together.
            fsdp_size: How many such groups share the weights.
            device_map: How the teacher of a single rank is spread over all devices of the machine, if it is.

        Raises:
            UsageError: They do not fit the number of ranks.
        """
        if device_map and self.num_ranks > 1:
            raise UsageError(
                f"--device_map has one rank use all GPUs of the machine, the launcher started {self.num_ranks} ranks. "
                "Use accelerate_configs/single_gpu.yaml; for several ranks there are --tp_size and --fsdp_size."
            )
        size = tp_size * fsdp_size
        if self.num_ranks % size:
            raise UsageError(
                f"--tp_size {tp_size} and --fsdp_size {fsdp_size} make replicas of {size} ranks, the launcher started "
                f"{self.num_ranks}. Start a multiple of {size}: accelerate launch --num_processes {size} ..."
            )
        self.num_replicas, self.replica = self.num_ranks // size, self.rank // size
        self.stream, self._ranks_of_stream, self._ranks_of_replica = self.rank // tp_size, tp_size, size

    def together(
        self, work: Callable[[], T], *, machine_by_machine: bool = False, patience_seconds: float | None = None
    ) -> T:
        """Do something on every rank; if it fails on any, raise that rank's error on all.

        Args:
            work: What to do. Every rank must call `together` for it.
            machine_by_machine: Let the first rank of every machine finish before its other ranks start, so that
                these find a filled cache.
            patience_seconds: How long the others may be waited for; `self.patience_seconds` if not given.

        Raises:
            LogitgenError: The lowest failing rank's error.
        """
        turns = (True, False) if machine_by_machine else (self._first_of_machine,)
        for turn in turns:
            error = None
            if turn == self._first_of_machine:
                try:
                    result = work()
                except LogitgenError as raised:
                    error = raised
            for found in self.gathered(error, patience_seconds):
                if found is not None:
                    raise found from error
        return result

    def on_leader(self, work: Callable[[], T], patience_seconds: float | None = None) -> T | None:
        """Do something on the leader alone; if it fails, raise its error on every rank. None on the other ranks."""
        return self.together(lambda: work() if self.is_leader else None, patience_seconds=patience_seconds)

    def same(self, facts: Mapping[str, str]) -> None:
        """Check that all ranks see the same.

        Args:
            facts: What each fact is called and this rank's value of it.

        Raises:
            UsageError: A rank's value differs from the leader's.
        """
        all_facts = self.gathered(facts)
        for rank, theirs in enumerate(all_facts):
            for name in sorted(theirs.keys() | all_facts[0]):
                value, expected = (found.get(name, "none") for found in (theirs, all_facts[0]))
                if value != expected:
                    raise UsageError(
                        f"Rank {rank} has another {name} than the leader: {value[:64]}, not {expected[:64]}. "
                        "Give every rank the same command, packages and files."
                    )

    def from_leader(self, work: Callable[[], T]) -> T:
        """Do something on the leader alone, and hand what it returns to every rank; its error is raised on all."""
        values = [self.on_leader(work)]
        self._meet(lambda: dist.broadcast_object_list(values, src=0, group=self._group))
        return cast(T, values[0])

    def in_step(self, work: Callable[[], T]) -> T:
        """Do something on every rank in which those that share a teacher wait for one another.

        If it fails on one of them, the others cannot be asked any more: that rank ends, and so does the run.
        """
        if self._ranks_of_replica == 1:
            return self.together(work)
        with self.watched():
            return work()

    @contextmanager
    def watched(self) -> Iterator[None]:
        """End this rank if those that share its teacher stop moving in the block, where nothing can interrupt them."""
        if self._ranks_of_replica == 1:
            yield
            return
        ended = threading.Event()

        def watch() -> None:
            try:
                self._until(ended.wait, lambda: "A rank that shares the teacher", self.patience_seconds)
            except LostRankError as error:
                self._failures.append(error)
                _first_failure(_Failure.of(error))
                _interrupt_main()
                if not ended.wait(_GRACE_SECONDS):  # the main thread is out of reach
                    _leave(error)

        threading.Thread(target=watch, name="shared teacher watch", daemon=True).start()
        try:
            yield
        finally:
            ended.set()

    def gathered(self, value: T, patience_seconds: float | None = None) -> list[T]:
        """Hand every rank the values of all, by rank; see `_wait` for the patience."""
        values: list[T] = [value] * self.num_ranks
        self._meet(lambda: dist.all_gather_object(values, value, group=self._group), patience_seconds)
        return values

    def _meet(self, work: Callable[[], object], patience_seconds: float | None = None) -> None:
        """Run a collective, unless this rank is alone."""
        if self._group is None:
            return
        self._num_met += 1
        _count(f"met/{self.rank}", 1)
        _count(_MOVES, 1)

        def absent() -> str:
            late = [rank for rank in range(self.num_ranks) if _count(f"met/{rank}") < self._num_met]
            return f"Rank {', '.join(map(str, late))}" if late else "Another rank"

        self._wait(work, "Another rank", absent, patience_seconds)

    def _wait(
        self,
        work: Callable[[], object],
        who: str,
        late: Callable[[], str],
        patience_seconds: float | None = None,
    ) -> None:
        """Do what needs another rank, in a thread: so a signal ends the wait, or ranks that have stopped moving.

        Args:
            work: What to do.
            who: Who it was if a connection breaks.
            late: Who it was if nothing moves any more.
            patience_seconds: How long nothing may move; `self.patience_seconds` if not given.
        """

        def run() -> None:
            try:
                with _lost_connection_means(who):
                    work()
            except LostRankError as error:
                self._failures.append(error)  # even if the launcher's signal reaches the main thread first
                raise

        future = self._waiting.submit(run)
        self._until(lambda seconds: wait([future], seconds).done, late, patience_seconds or self.patience_seconds)
        future.result()

    def _until(self, ended: Callable[[float], object], late: Callable[[], str], patience_seconds: float) -> None:
        """Wait until something has ended, as long as any rank moves.

        Args:
            ended: Waits so many seconds at most; whether it has ended by then.
            late: Who it was if nothing moves any more.
            patience_seconds: How long nothing may move.
        """
        # Looks are counted, not seconds: a run that is suspended as a whole does not look.
        most_looks = (patience_seconds + (0 if self.is_leader else _GRACE_SECONDS)) / _LOOK_SECONDS
        moves, num_looks = 0, 0
        while not ended(_LOOK_SECONDS):
            num_looks += 1
            if (now := _count(_MOVES)) != moves:
                moves, num_looks = now, 0
            elif num_looks > most_looks:
                raise LostRankError(_HUNG.format(late(), patience_seconds))

    @contextmanager
    def deliver(
        self, shares: Sequence[Array], payload_bytes: Array, submit: Submit | None, on_waited: OnWaited
    ) -> Iterator["Outbox"]:
        """Open the way of payloads into the file, for as long as the block runs.

        Args:
            shares: Numbers of the batches of each stream, in the order in which they are computed.
            payload_bytes: Size of the payload of every batch of the plan, [num_batches].
            submit: Has the writer write a batch's payload, on the leader; None elsewhere.
            on_waited: Called on the leader with a stream and how many seconds it has waited for a free buffer so far.

        Yields:
            Where this rank puts its payloads. When the block ends, all of them have been written or, on a rank other
            than the leader, handed over.

        Raises:
            CaptureError: The writer failed, or a rank was lost.
        """
        largest = int(payload_bytes[shares[self.stream]].max(initial=0))
        if submit is None:
            first_of_stream = self.rank % self._ranks_of_stream == 0
            with Outbox(largest, self._send if first_of_stream else None, self.device) as outbox:
                yield outbox
            return
        late = "Rank {}" if self._ranks_of_replica == 1 else "Rank {} or one that shares its teacher"
        inbox = _Inbox(self._group, submit, on_waited, payload_bytes, self.patience_seconds, late, self._failures)
        inbox.start(dict(enumerate(shares[1:], start=1)), self._ranks_of_stream)
        with Outbox(largest, lambda batch, message: inbox.take(0, batch, message), self.device) as outbox:
            yield outbox
        inbox.join()

    def _send(self, batch: int, message: Tensor) -> Wait:
        with _lost_connection_means("The leader"):
            work = cast(dist.Work, dist.isend(message, dst=0, group=self._group))
        return lambda: self._wait(work.wait, "The leader", lambda: "Rank 0")


@contextmanager
def launched() -> Iterator[Ranks]:
    """Yield the ranks of this launch; as soon as one fails in the block, end all with one message and status."""
    for number in _STOP_SIGNALS:
        if number == signal.SIGINT or signal.getsignal(number) != signal.SIG_IGN:  # as nohup sets it for SIGHUP
            signal.signal(number, _raise_stopped)
    if _started_by_launcher():
        threading.Thread(target=_end_with, args=(os.getppid(),), name="launcher watch", daemon=True).start()
    thread_failures: list[BaseException] = []
    try:
        _check_gpus()
        yield Ranks(thread_failures)
    except SystemExit:
        raise
    except BaseException as error:
        try:
            _end(error, thread_failures)
        except Stopped:  # at the very last moment; there is no second one
            _end(error, thread_failures)
    if dist.is_initialized():
        dist.destroy_process_group()


def _started_by_launcher() -> bool:
    """Whether this process is a child of `accelerate launch`, with one rank or several."""
    return "TORCHELASTIC_RUN_ID" in os.environ or "ACCELERATE_MIXED_PRECISION" in os.environ


def _end_with(launcher: int) -> None:
    """Stop this rank when its launcher is gone: one that is killed cannot stop its ranks itself."""
    while os.getppid() == launcher:
        time.sleep(_LOOK_SECONDS)
    logger.warning("The launcher is gone; its ranks stop too.")
    _interrupt_main(signal.SIGTERM)


def _check_gpus() -> None:
    local_ranks = _ranks_of_machine()
    if torch.cuda.is_available() and local_ranks > torch.cuda.device_count():
        raise UsageError(
            f"The launcher started {local_ranks} ranks on a machine with {torch.cuda.device_count()} GPUs. "
            f"Start one per GPU: accelerate launch --num_processes {torch.cuda.device_count()} ..."
        )


def _end(error: BaseException, thread_failures: list[BaseException]) -> NoReturn:
    _ignore_signals()
    if isinstance(error, Stopped):
        dead = _dead_neighbours()
        if not thread_failures:
            time.sleep(_NOTICE_SECONDS)
        if thread_failures:
            error = thread_failures[0]
        elif dead:
            error = LostRankError(_GONE.format(f"Rank {', '.join(map(str, dead))}"))
    _leave(error)


def _leave(error: BaseException) -> NoReturn:
    """End this process, with one line if it is the first of the launch to fail."""
    logger.debug("This rank ends.", exc_info=error)
    if not logging.root.handlers and not isinstance(error, LogitgenError | Stopped):
        traceback.print_exception(error)
    mine = _Failure.of(error)
    first = _first_failure(mine) if _launched_ranks() > 1 else mine
    try:
        if first.rank == mine.rank:
            print_error(first.message)
        first.tell_launcher()
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        # Threads may be waiting inside gloo for ranks that are gone; they cannot be joined.
        os._exit(first.exit_status)


def _dead_neighbours() -> list[int]:
    """Ranks of this machine that had ended when the launcher's signal came: then that is why it came.

    A rank that ends because of the signal itself may be among them; but it has said so to the launch's store by then.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return []
    first = _launched_rank() - int(os.environ.get("LOCAL_RANK", "0"))
    living = set()
    with suppress(psutil.Error):
        for process in psutil.Process(os.getppid()).children():
            with suppress(psutil.Error):
                if process.status() != psutil.STATUS_ZOMBIE:
                    living.add(process.environ().get("RANK"))
        return [rank for rank in range(first, first + _ranks_of_machine()) if str(rank) not in living]
    return []


def _launched_rank() -> int:
    return int(os.environ.get("RANK", "0"))


def _ranks_of_machine() -> int:
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def _launched_ranks() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def _on_several_machines() -> bool:
    return _launched_ranks() > _ranks_of_machine()


def _use_interface_to(host: str) -> None:
    """Have gloo use the network interface that leads to a host.

    By itself it takes the one with the address of this machine's own name, often a loopback no other machine reaches.
    """
    family, kind, _, _, address = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(address)  # which sends nothing
        own = probe.getsockname()[0]
    for name, addresses in psutil.net_if_addrs().items():
        if any(found.address.partition("%")[0] == own for found in addresses):
            os.environ[_INTERFACE] = name


def _give_up_silent_machines(seconds: float) -> None:
    """Have the system break connections to a machine that answers nothing for so long; gloo and torch do not ask it to.

    A machine whose ranks hang still answers. Only on Linux.
    """
    if not hasattr(socket, "TCP_USER_TIMEOUT"):
        return
    step = max(1, int(seconds) // 5)
    for connection in psutil.Process().net_connections("tcp"):
        with socket.fromfd(connection.fd, connection.family, connection.type) as ours:
            ours.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            ours.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, step)
            ours.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, step)
            ours.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 4)
            # Ranks that wait ask the store. On payloads this would also count a leader that is slow to take them.
            if connection.raddr and connection.raddr.port == int(os.environ["MASTER_PORT"]):
                ours.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(seconds * 1000))


class Outbox:
    """A ring of buffers in host memory, from which a rank's payloads leave while it computes the next ones.

    To be used as a context manager: at its end, all that was put has been handed over.

    A thread of its own finishes them and hands them over, for the one that feeds a GPU would keep it waiting meanwhile
    (H200, hidden states of 1.5 billion parameters: 24 % of the time).

    Attributes:
        waited_seconds: How long `put` has waited for a free buffer so far.
    """

    def __init__(self, size_bytes: int, hand_over: Callable[[int, Tensor], Wait] | None, device: torch.device) -> None:
        """Allocate the ring.

        Args:
            size_bytes: Largest payload.
            hand_over: Starts to move a batch's message on, the payload and what follows it; returns how to wait until
                its buffer is free again. None drops them all: another rank has the same ones.
            device: Where payloads come from.
        """
        self._hand_over = hand_over
        self._on_gpu = device.type == "cuda"
        self._buffers = [
            torch.empty(size_bytes + _WAITED_BYTES, dtype=torch.uint8, pin_memory=self._on_gpu)
            for _ in range(NUM_BUFFERS)
        ]
        self._arrivals: list[Wait] = [lambda: None] * NUM_BUFFERS
        self._waits: list[Wait] = [lambda: None] * NUM_BUFFERS
        self._leaving = ThreadPoolExecutor(max_workers=1, thread_name_prefix="outbox")
        self._num_put = 0
        self.waited_seconds = 0.0

    def __enter__(self) -> "Outbox":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._leaving.shutdown()  # what was put is handed over, also if the block fails
        if error is None:
            self.flush()

    def put(self, batch: int, payload: Tensor, finish: Callable[[Array], None]) -> None:
        """Send a payload on its way.

        Args:
            batch: Number of the batch in the plan.
            payload: uint8, on this rank's device.
            finish: Called with the payload once it is in host memory, before it travels.
        """
        if self._hand_over is None:
            return
        slot = self._num_put % NUM_BUFFERS
        self._num_put += 1
        self._arrivals[slot]()  # a rank that is ahead of its GPU does not wait for a buffer
        start = time.monotonic()
        self._waits[slot]()
        self.waited_seconds += time.monotonic() - start
        message = self._buffers[slot][: len(payload) + _WAITED_BYTES]
        message[:-_WAITED_BYTES].copy_(payload, non_blocking=self._on_gpu)
        if self._on_gpu:
            arrived = torch.cuda.Event()
            arrived.record(torch.cuda.current_stream(payload.device))
            self._arrivals[slot] = arrived.synchronize
        left = self._leaving.submit(self._leave, batch, message, self._arrivals[slot], finish, self.waited_seconds)
        self._waits[slot] = lambda: left.result()()

    def flush(self) -> None:
        """Wait until everything has been handed over."""
        for freed in self._waits:
            freed()

    def _leave(
        self, batch: int, message: Tensor, arrived: Wait, finish: Callable[[Array], None], waited_seconds: float
    ) -> Wait:
        assert self._hand_over is not None
        arrived()
        finish(message.numpy()[:-_WAITED_BYTES])
        message.numpy()[-_WAITED_BYTES:] = np.array([waited_seconds], "<f8").view(np.uint8)
        return self._hand_over(batch, message)


class _Inbox:
    """The leader's receivers: a thread for each other stream, so that a slow rank holds nobody up.

    One more thread looks whether one of them waits for too long, and tells the other ranks that the run goes on.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | None,
        submit: Submit,
        on_waited: OnWaited,
        sizes: Array,
        patience_seconds: float,
        late: str,
        failures: list[BaseException],
    ) -> None:
        self._group = group
        self._submit = submit
        self._on_waited = on_waited
        self._sizes = sizes
        self._patience_seconds = patience_seconds
        self._late = late
        self._failures = failures
        self._threads: list[threading.Thread] = []
        self._waiting_since: dict[int, int | None] = {}  # in looks; a receiver writes its own entry only
        self._num_looks = 0
        self._num_written = 0
        self._received = threading.Event()

    def take(self, stream: int, batch: int, message: Tensor) -> Wait:
        """Have a stream's payload written, and count it once it is; return how to wait for that."""
        payload, waited = message.numpy()[:-_WAITED_BYTES], message.numpy()[-_WAITED_BYTES:]
        self._on_waited(stream, float(waited.copy().view("<f8")[0]))
        future = self._submit(batch, payload)
        future.add_done_callback(self._count_written)
        return future.result

    def _count_written(self, future: Future[None]) -> None:
        self._num_written += 1

    def start(self, shares: Mapping[int, Array], ranks_of_stream: int) -> None:
        for stream, share in shares.items():
            peer = stream * ranks_of_stream
            thread = threading.Thread(target=self._run, args=(stream, peer, share), name=f"receive {peer}", daemon=True)
            self._threads.append(thread)
            thread.start()
        if self._group:
            threading.Thread(target=self._watch, name="receive watch", daemon=True).start()

    def join(self) -> None:
        for thread in self._threads:
            while thread.is_alive():
                thread.join(_LOOK_SECONDS)  # where no signal ends a wait, it is seen between two
        self._received.set()
        if self._failures:
            raise self._failures[0]

    def _run(self, stream: int, peer: int, share: Array) -> None:
        try:
            self._receive(stream, peer, share)
        except Exception as error:
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        self._failures.append(error)
        _first_failure(_Failure.of(error))  # now: the launcher may end this rank before the main thread can
        _interrupt_main()  # it may be deep in a forward pass, or wait for another rank

    def _watch(self) -> None:
        told = 0
        while not self._received.wait(_LOOK_SECONDS):
            if self._num_written != told:
                told = self._num_written
                with suppress(LostRankError):  # the main thread finds out itself
                    _count(_MOVES, 1)
            self._num_looks += 1
            for peer, since in list(self._waiting_since.items()):
                if since is not None and (self._num_looks - since) * _LOOK_SECONDS > self._patience_seconds:
                    self._fail(LostRankError(_HUNG.format(self._late.format(peer), self._patience_seconds)))
                    return

    def _receive(self, stream: int, peer: int, share: Array) -> None:
        largest = int(self._sizes[share].max(initial=0)) + _WAITED_BYTES
        buffers = [torch.empty(largest, dtype=torch.uint8) for _ in range(NUM_BUFFERS)]
        waits: list[Wait] = [lambda: None] * NUM_BUFFERS
        for number, batch in enumerate(share):
            slot = number % NUM_BUFFERS
            waits[slot]()
            message = buffers[slot][: int(self._sizes[batch]) + _WAITED_BYTES]
            self._waiting_since[peer] = self._num_looks
            with _lost_connection_means(f"Rank {peer}"):
                dist.recv(message, src=peer, group=self._group)
            self._waiting_since[peer] = None
            waits[slot] = self.take(stream, int(batch), message)
        for freed in waits:
            freed()


@dataclass(frozen=True)
class _Failure:
    """Why a rank ends."""

    rank: int
    exit_status: int
    message: str

    @classmethod
    def of(cls, error: BaseException) -> "_Failure":
        # Accelerate may not have spoken yet, or may be wrong: here the launcher's word counts.
        rank = _launched_rank()
        where = f"Rank {rank}: " if _launched_ranks() > 1 else ""
        match error:
            case Stopped():
                return cls(rank, error.exit_status, f"The run was {error}.")
            case UsageError():
                return cls(rank, error.exit_status, str(error))
            case LogitgenError():
                return cls(rank, error.exit_status, where + str(error))
        if (isinstance(error, RuntimeError) and "gloo" in str(error)) or isinstance(error, dist.DistError):
            return cls(rank, 1, f"{where}{_GONE.format('Another rank')}")
        more = " (traceback in this rank's log file)" if logging.root.handlers else ""
        return cls(rank, 1, f"{where}{type(error).__name__}: {first_line(error)}{more}")

    def tell_launcher(self) -> None:
        """Put the message where torch's launcher looks for it, so that its own report names the cause."""
        if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
            report = {"message": self.message, "timestamp": int(time.time())}
            Path(path).write_text(json.dumps(report), encoding="utf-8")


def _first_failure(mine: _Failure) -> _Failure:
    """Ask the launch's store which rank failed first: only that one speaks."""
    claims: list[bytes] = []

    def claim() -> None:
        with suppress(Exception):  # out of reach: this rank speaks for itself
            claims.append(_store().compare_set("failure", "", json.dumps(astuple(mine))))

    # In a thread, because the store's own time-out does not end a call to a machine that is gone (torch 2.13).
    thread = threading.Thread(target=claim, daemon=True)
    thread.start()
    thread.join(_STORE_TIMEOUT.total_seconds())
    return _Failure(*json.loads(claims[0])) if claims else mine


@functools.cache
def _store(timeout: timedelta = _STORE_TIMEOUT) -> Any:
    """Return the launch's store, kept by the launcher or else by rank 0; restarted ranks find an empty one."""
    of_launcher = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == str(True)
    store = dist.TCPStore(  # type: ignore[attr-defined]
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=_launched_rank() == 0 and not of_launcher,
        wait_for_workers=False,
        multi_tenant=True,
        timeout=timeout,
    )
    return dist.PrefixStore(  # type: ignore[attr-defined]
        f"logitgen/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store
    )


def _count(key: str, more: int = 0) -> int:
    """Add to one of the launch's counters, and return where it stands."""
    try:
        return int(_store().add(key, more))
    except RuntimeError as error:
        raise LostRankError(
            "The leader's launcher is out of reach: it has ended, or its machine or the network to it is down."
        ) from error


@contextmanager
def _lost_connection_means(who: str) -> Iterator[None]:
    """Turn gloo's error over a closed connection into one that says whose it was."""
    try:
        yield
    except RuntimeError as error:
        raise LostRankError(_GONE.format(who)) from error


def _raise_stopped(number: int, frame: FrameType | None) -> NoReturn:
    _ignore_signals()
    raise Stopped(number)


def _ignore_signals() -> None:
    """From here on a signal does nothing. Not SIG_IGN: Python complains about one that came just before."""
    for number in _STOP_SIGNALS:
        signal.signal(number, lambda number, frame: None)


def _interrupt_main(number: signal.Signals = signal.SIGINT) -> None:
    if hasattr(signal, "pthread_kill"):
        signal.pthread_kill(cast(int, threading.main_thread().ident), number)  # also ends a wait for a lock
    else:
        _thread.interrupt_main(number)
