"""The agreement of ranks: the steps all take together, the values they exchange, and their timeouts."""

import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar, cast

import torch.distributed as dist
from torch import Tensor

from logitgen.errors import LogitgenError, LostRankError, UsageError
from logitgen.file.layout import Array
from logitgen.ranks.deliver import Inbox, OnWaited, Outbox, Submit, Wait
from logitgen.ranks.ending import HUNG, Failure, first_failure, interrupt_main, leave, lost_connection_means
from logitgen.ranks.environment import (
    LOOK_SECONDS,
    MOVES,
    SILENT_SECONDS,
    check_replicas,
    counter,
    give_up_silent_machines,
    join,
    on_several_machines,
    ranks_of_machine,
)

T = TypeVar("T")

_NO_TIMEOUT = timedelta(days=365)
"""A dead rank closes its connections, which ends every wait at once. A hanging rank is detected outside gloo."""

UNLIMITED = math.inf
"""Timeout for steps that may take hours on one rank while the others wait."""

_GRACE_SECONDS = 3.0
"""Extra time the other ranks wait after the leader, which knows best who hangs."""


class Ranks:
    """The processes of a launch.

    Attributes:
        rank: Number of this process, 0 to `num_ranks` - 1.
        num_ranks: Number of processes.
        is_leader: True for rank 0, which writes the file.
        device: Device this rank computes on.
        num_replicas: Copies of the teacher that the ranks hold together.
        replica: Number of the copy that this rank holds, or holds a part of.
        stream: Number of the stream of batches that this rank computes. The ranks of a tensor-parallel teacher compute
            one stream together, and the first of them sends the captured values.
        ranks_of_machine: Number of ranks on this rank's machine.
    """

    def __init__(self, thread_failures: list[BaseException]) -> None:
        """Join the other ranks.

        Args:
            thread_failures: List to which other threads append their errors before they interrupt the main thread.
        """
        accelerator = join()
        self.rank = accelerator.process_index
        self.num_ranks = accelerator.num_processes
        self.is_leader = accelerator.is_main_process
        self.device = accelerator.device
        self.num_replicas = self.num_ranks
        self.replica = self.stream = self.rank
        self._ranks_of_stream = self._ranks_of_replica = 1
        self.ranks_of_machine = ranks_of_machine()
        self._first_of_machine = accelerator.is_local_main_process
        self._failures = thread_failures
        self._group = dist.new_group(backend="gloo", timeout=_NO_TIMEOUT) if self.num_ranks > 1 else None
        self.patience_seconds = UNLIMITED
        self._waiting = ThreadPoolExecutor(max_workers=1, thread_name_prefix="wait")
        self._num_met = 0

    @property
    def patience_seconds(self) -> float:
        """Seconds this rank waits for others while no rank moves."""
        return self._patience_seconds

    @patience_seconds.setter
    def patience_seconds(self, seconds: float) -> None:
        self._patience_seconds = seconds
        if on_several_machines():
            give_up_silent_machines(min(seconds, SILENT_SECONDS))

    def form_replicas(self, tp_size: int, fsdp_size: int, device_map: str | None = None) -> None:
        """Group neighbouring ranks so that each group holds one teacher.

        Args:
            tp_size: Ranks that compute a batch together.
            fsdp_size: Number of such groups that share the weights.
            device_map: How a single rank spreads its teacher over all devices of the machine, if it does.

        Raises:
            UsageError: The sizes do not fit the number of ranks.
        """
        check_replicas(self.num_ranks, tp_size, fsdp_size, device_map)
        size = tp_size * fsdp_size
        self.num_replicas, self.replica = self.num_ranks // size, self.rank // size
        self.stream, self._ranks_of_stream, self._ranks_of_replica = self.rank // tp_size, tp_size, size

    @contextmanager
    def together(self, patience_seconds: float | None = None) -> Iterator[None]:
        """Have every rank run a block. At its end, raise the error of any rank on all of them.

        Args:
            patience_seconds: Timeout of the wait for the others; `self.patience_seconds` if not given.

        Raises:
            LogitgenError: The lowest failing rank's error.
        """
        error = None
        try:
            yield
        except LogitgenError as raised:
            error = raised
        self._agree(error, patience_seconds)

    @contextmanager
    def machine_by_machine(self, patience_seconds: float | None = None) -> Iterator[None]:
        """Run a block as `together` does, first on one rank of every machine: the others find a filled cache."""
        if not self._first_of_machine:
            self._agree(None, patience_seconds)
        with self.together(patience_seconds):
            yield
        if self._first_of_machine:
            self._agree(None, patience_seconds)

    def _agree(self, error: LogitgenError | None, patience_seconds: float | None) -> None:
        for found in self.gathered(error, patience_seconds):
            if found is not None:
                raise found from error

    def same(self, facts: Mapping[str, str]) -> None:
        """Check that all ranks see the same.

        Args:
            facts: Name of each fact and this rank's value of it.

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

    def from_leader(self, value: T) -> T:
        """Hand the leader's value to every rank, and ignore the values of the others."""
        values = [value]
        self._meet(lambda: dist.broadcast_object_list(values, src=0, group=self._group))
        return values[0]

    @contextmanager
    def in_step(self) -> Iterator[None]:
        """Have every rank run a block in which the ranks of a shared teacher wait for one another.

        If the block fails on one of them, the others cannot be asked any more. That rank ends, and so does the run.
        """
        with self.together() if self._ranks_of_replica == 1 else self.watched():
            yield

    @contextmanager
    def watched(self) -> Iterator[None]:
        """End this rank if the ranks that share its teacher hang in the block, where nothing can interrupt them."""
        if self._ranks_of_replica == 1:
            yield
            return
        ended = threading.Event()

        def watch() -> None:
            try:
                self._until(ended.wait, lambda: "A rank that shares the teacher", self.patience_seconds)
            except LostRankError as error:
                self._failures.append(error)
                first_failure(Failure.of(error))
                interrupt_main()
                if not ended.wait(_GRACE_SECONDS):  # the main thread is out of reach
                    leave(error)

        threading.Thread(target=watch, name="shared teacher watch", daemon=True).start()
        try:
            yield
        finally:
            ended.set()

    def gathered(self, value: T, patience_seconds: float | None = None) -> list[T]:
        """Hand every rank the values of all, in rank order. See `_wait` for the timeout."""
        values: list[T] = [value] * self.num_ranks
        self._meet(lambda: dist.all_gather_object(values, value, group=self._group), patience_seconds)
        return values

    def _meet(self, work: Callable[[], object], patience_seconds: float | None = None) -> None:
        """Run a collective, unless this rank is alone."""
        if self._group is None:
            return
        self._num_met += 1
        counter(f"met/{self.rank}", 1)
        counter(MOVES, 1)

        def absent() -> str:
            late = [rank for rank in range(self.num_ranks) if counter(f"met/{rank}") < self._num_met]
            return f"Rank {', '.join(map(str, late))}" if late else "Another rank"

        self._wait(work, "Another rank", absent, patience_seconds)

    def _wait(
        self,
        work: Callable[[], object],
        who: str,
        late: Callable[[], str],
        patience_seconds: float | None = None,
    ) -> None:
        """Run work that needs another rank, in a thread: a signal or a timeout can then end the wait.

        Args:
            work: The work to run.
            who: Culprit to name if a connection breaks.
            late: Returns the culprit to name if nothing moves any more.
            patience_seconds: Seconds without a move before the timeout; `self.patience_seconds` if not given.
        """

        def run() -> None:
            try:
                with lost_connection_means(who):
                    work()
            except LostRankError as error:
                self._failures.append(error)  # kept even if the launcher's signal reaches the main thread first
                raise

        future = self._waiting.submit(run)
        self._until(lambda seconds: wait([future], seconds).done, late, patience_seconds or self.patience_seconds)
        future.result()

    def _until(self, ended: Callable[[float], object], late: Callable[[], str], patience_seconds: float) -> None:
        """Wait until something has ended, as long as any rank moves.

        Args:
            ended: Waits at most the given number of seconds, and returns true if it has ended by then.
            late: Returns the culprit to name if nothing moves any more.
            patience_seconds: Seconds without a move before the timeout.
        """
        # Looks are counted, not seconds: a run that is suspended as a whole does not look.
        most_looks = (patience_seconds + (0 if self.is_leader else _GRACE_SECONDS)) / LOOK_SECONDS
        moves, num_looks = 0, 0
        while not ended(LOOK_SECONDS):
            num_looks += 1
            if (now := counter(MOVES)) != moves:
                moves, num_looks = now, 0
            elif num_looks > most_looks:
                raise LostRankError(HUNG.format(late(), patience_seconds))

    @contextmanager
    def deliver(
        self, shares: Sequence[Array], payload_bytes: Array, submit: Submit | None, on_waited: OnWaited
    ) -> Iterator["Outbox"]:
        """Open the way of payloads into the file for the duration of the block.

        Args:
            shares: Numbers of the batches of each stream, in the order of computation.
            payload_bytes: Size of the payload of every batch of the plan, [num_batches].
            submit: Has the writer write a batch's payload, on the leader, or None elsewhere.
            on_waited: Called on the leader with a stream and the seconds it has waited for a free buffer so far.

        Yields:
            The outbox of this rank. When the block ends, its payloads have been written on the leader, or handed over
            on any other rank.

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
        inbox = Inbox(self._group, submit, on_waited, payload_bytes, self.patience_seconds, late, self._failures)
        inbox.start(dict(enumerate(shares[1:], start=1)), self._ranks_of_stream)
        with Outbox(largest, lambda batch, message: inbox.take(0, batch, message), self.device) as outbox:
            yield outbox
        inbox.join()

    def _send(self, batch: int, message: Tensor) -> Wait:
        with lost_connection_means("The leader"):
            work = cast(dist.Work, dist.isend(message, dst=0, group=self._group))
        return lambda: self._wait(work.wait, "The leader", lambda: "Rank 0")
