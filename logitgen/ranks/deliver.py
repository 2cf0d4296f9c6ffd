"""The way of payloads to the leader.

The plan is the protocol. It tells the leader the sender and the size of every batch, so payloads travel as plain
bytes, without headers, padding or barriers. They use a gloo group of their own: the same code for CPU and GPU.
Measured on 2 CPU cores with 8 MB blocks: send/recv 950-2,480 MB/s, `dist.gather` 500-760, `accelerator.gather`
(an all-gather) 130-320.
"""

import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from types import TracebackType

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from logitgen.errors import LostRankError
from logitgen.file.layout import Array
from logitgen.ranks.ending import (
    HUNG,
    Failure,
    first_failure,
    interrupt_main,
    lost_connection_means,
)
from logitgen.ranks.environment import (
    LOOK_SECONDS,
    MOVES,
    counter,
)

Wait = Callable[[], object]


Submit = Callable[[int, Array], Future[None]]


OnWaited = Callable[[int, float], None]

NUM_BUFFERS = 2
"""Payloads in flight per rank, on the rank and on the leader: one travels while the next is filled."""

_WAITED_BYTES = 8
"""Size of the float64 after every payload: the seconds its rank has waited for a free buffer so far."""


class Outbox:
    """A ring of buffers in host memory, from which a rank's payloads leave while it computes the next batches.

    Use it as a context manager: at its end, every payload has been handed over.

    A thread of its own finishes payloads and hands them over. On the thread that feeds a GPU, this work would keep the
    GPU waiting (H200, hidden states of 1.5 billion parameters: 24 % of the time).

    Attributes:
        waited_seconds: Seconds `put` has waited for a free buffer so far.
    """

    def __init__(self, size_bytes: int, hand_over: Callable[[int, Tensor], Wait] | None, device: torch.device) -> None:
        """Allocate the ring.

        Args:
            size_bytes: Largest payload.
            hand_over: Starts to move a batch's message on: the payload and the waited seconds behind it. Returns a
                function that waits until its buffer is free again. None drops all payloads: another rank has the same.
            device: Device the payloads come from.
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
        self._leaving.shutdown()  # payloads already put are handed over even if the block fails
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


class Inbox:
    """The leader's receivers: a thread for each other stream, so that a slow rank delays nobody.

    One more thread checks their timeouts, and tells the other ranks that the run goes on.
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
        self._waiting_since: dict[int, int | None] = {}  # in looks; a receiver writes only its own entry
        self._num_looks = 0
        self._num_written = 0
        self._received = threading.Event()

    def take(self, stream: int, batch: int, message: Tensor) -> Wait:
        """Have a stream's payload written, and count it once written. Return a function that waits for that."""
        payload, waited = message.numpy()[:-_WAITED_BYTES], message.numpy()[-_WAITED_BYTES:]
        self._on_waited(stream, float(waited.copy().view("<f8")[0]))
        future = self._submit(batch, payload)
        future.add_done_callback(self._count_written)
        return future.result

    def _count_written(self, future: Future[None]) -> None:
        self._num_written += 1

    def start(self, shares: Mapping[int, Array], ranks_of_stream: int) -> None:
        """Receive the payloads of other streams, each in a thread of its own.

        Args:
            shares: Numbers of each stream's batches, in the order of arrival.
            ranks_of_stream: Number of ranks that compute a stream. The first of them sends.
        """
        for stream, share in shares.items():
            peer = stream * ranks_of_stream
            thread = threading.Thread(target=self._run, args=(stream, peer, share), name=f"receive {peer}", daemon=True)
            self._threads.append(thread)
            thread.start()
        if self._group:
            threading.Thread(target=self._watch, name="receive watch", daemon=True).start()

    def join(self) -> None:
        """Wait until every stream's payloads have been written. Raise the first error of a thread."""
        for thread in self._threads:
            while thread.is_alive():
                thread.join(LOOK_SECONDS)  # where a signal cannot end a wait, Python sees it between two waits
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
        first_failure(Failure.of(error))  # now: the launcher may end this rank before the main thread can
        interrupt_main()  # it may be deep in a forward pass, or wait for another rank

    def _watch(self) -> None:
        told = 0
        while not self._received.wait(LOOK_SECONDS):
            if self._num_written != told:
                told = self._num_written
                with suppress(LostRankError):  # the main thread notices the loss itself
                    counter(MOVES, 1)
            self._num_looks += 1
            for peer, since in list(self._waiting_since.items()):
                if since is not None and (self._num_looks - since) * LOOK_SECONDS > self._patience_seconds:
                    self._fail(LostRankError(HUNG.format(self._late.format(peer), self._patience_seconds)))
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
            with lost_connection_means(f"Rank {peer}"):
                dist.recv(message, src=peer, group=self._group)
            self._waiting_since[peer] = None
            waits[slot] = self.take(stream, int(batch), message)
        for freed in waits:
            freed()
