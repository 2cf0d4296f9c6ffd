"""The way of payloads to the leader, without any rank: buffers that are used again, and the times that travel along."""

from collections.abc import Callable
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from logitgen.ranks import deliver
from logitgen.ranks.deliver import Inbox, Outbox

CPU = torch.device("cpu")
SIZES = np.array([3, 5, 1, 4, 2])
PAYLOADS = [torch.full((size,), 10 + batch, dtype=torch.uint8) for batch, size in enumerate(SIZES.tolist())]
Seen = list[tuple[int, list[int]]]
EXPECTED: Seen = [(batch, payload.tolist()) for batch, payload in enumerate(PAYLOADS)]


class ReadLate(Future[None]):
    """The write of a payload by a writer so slow that it reads the payload only when somebody waits for it."""

    def __init__(self, read: Callable[[], object]) -> None:
        super().__init__()
        self._read = read

    def result(self, timeout: float | None = None) -> None:
        self._read()


def inbox_of(submit: Any, on_waited: Any = lambda *_: None) -> Inbox:
    return Inbox(None, submit, on_waited, SIZES, 1.0, "Rank {}", [])


def test_a_buffer_is_filled_again_only_once_it_is_free() -> None:
    freed: Seen = []

    def hand_over(batch: int, message: torch.Tensor) -> Callable[[], object]:
        return lambda: freed.append((batch, message[:-8].tolist()))

    with Outbox(int(SIZES.max()), hand_over, CPU) as outbox:
        for batch, payload in enumerate(PAYLOADS):
            outbox.put(batch, payload, lambda _: None)
    assert sorted(freed) == EXPECTED


def test_a_payload_is_finished_before_it_is_handed_over() -> None:
    handed: Seen = []

    def hand_over(batch: int, message: torch.Tensor) -> Callable[[], object]:
        handed.append((batch, message[:-8].tolist()))
        return lambda: None

    with Outbox(int(SIZES.max()), hand_over, CPU) as outbox:
        for batch, payload in enumerate(PAYLOADS):
            outbox.put(batch, payload, lambda array: np.add(array, 1, out=array))
    assert handed == [(batch, [value + 1 for value in values]) for batch, values in EXPECTED]


def test_the_leader_receives_into_a_buffer_only_once_it_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    sent = iter(PAYLOADS)
    written: Seen = []

    def recv(message: torch.Tensor, **_: Any) -> None:
        message[:-8] = next(sent)
        message[-8:] = 0

    def submit(batch: int, payload: np.ndarray) -> Future[None]:
        return ReadLate(lambda: written.append((batch, payload.tolist())))

    monkeypatch.setattr(deliver, "dist", SimpleNamespace(recv=recv))
    inbox = inbox_of(submit)
    inbox.start({1: np.arange(len(SIZES))}, ranks_of_stream=1)
    inbox.join()
    assert sorted(written) == EXPECTED


def test_the_leader_is_told_how_long_a_stream_has_waited_so_far(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that is asked before and after each wait: 1.5 seconds, then 2 more, then none."""
    ticks = iter([0.0, 1.5, 10.0, 12.0, 20.0, 20.0])
    monkeypatch.setattr(deliver, "time", SimpleNamespace(monotonic=lambda: next(ticks)))
    told: list[tuple[int, float]] = []

    def submit(batch: int, payload: np.ndarray) -> Future[None]:
        return ReadLate(lambda: None)

    inbox = inbox_of(submit, lambda stream, seconds: told.append((stream, seconds)))
    with Outbox(int(SIZES.max()), lambda batch, message: inbox.take(4, batch, message), CPU) as outbox:
        for batch, payload in enumerate(PAYLOADS[:3]):
            outbox.put(batch, payload, lambda _: None)
    assert told == [(4, 1.5), (4, 3.5), (4, 3.5)]
