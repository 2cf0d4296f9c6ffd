"""The writer: one thread that puts payloads into their places in the file.

HDF5 has created the file and is closed. Writing a row only overwrites bytes at fixed places, which a plain file does
without HDF5's bookkeeping. The metadata never changes, so a killed writer cannot damage it. Measured on 2 cores, rows
of 100 positions with k=64 in random order: 0.9 to 2.2 million positions a second this way, 0.12 to 0.15 million
through h5py.

The order is: rows, fsync, and only then their `done` flags. A row that is marked done is never written again. A second
thread only syncs, so rows are written meanwhile: 300 MB with k=64 reach the disk at 1,330 to 1,500 MB/s, with one sync
at the end at 950 to 1,070.
"""

import logging
import os
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from types import TracebackType

import numpy as np

from logitgen.errors import CaptureError, reason
from logitgen.file.header import Header
from logitgen.file.layout import Array
from logitgen.leader.places import Arrays, offsets_of, write_at
from logitgen.leader.progress import Snapshot
from logitgen.leader.status import encode
from logitgen.split.job import Job

logger = logging.getLogger(__name__)

COMMIT_SECONDS = 5.0
"""Longest time until written rows are committed. A kill or a power cut costs at most twice that."""

COMMIT_BYTES = 32 * 2**20
"""Unsynced bytes that start an earlier commit, if the sync before has ended."""


OnWritten = Callable[[int, float], None]
Work = Callable[[], None]


class Writer:
    """Writes payloads into the file, in any order, each missing row exactly once.

    Use it as a context manager: if the block fails, the written rows are kept.
    """

    def __init__(
        self,
        partial: Path,
        header: Header,
        job: Job,
        done: Array,
        on_written: OnWritten = lambda *_: None,
        snapshot: Callable[[], Snapshot] | None = None,
    ) -> None:
        """Start the thread.

        Args:
            partial: The file, with all that is known of its rows.
            header: The file's head.
            job: The rows, the plan and the layout of the file.
            done: Flags of the rows that are in the file already, bool[N].
            on_written: Called in the writer's thread with the number of every written batch, and the seconds that
                writing and syncing have taken so far.
            snapshot: Returns the progress of the run for watchers. Called at the start, and after every commit.
        """
        self._partial = partial
        self._job = job
        self._header = header
        self._file = open(partial, "r+b", buffering=0)
        self._datasets = Arrays(self._file, header.layout, header.places)
        self._position_offsets = offsets_of(job.rows.num_positions)
        self._on_written, self._snapshot = on_written, snapshot
        self._times_written = done.astype(np.uint8)
        self._done = done
        self._unsynced, self._unsynced_bytes = list[Array](), 0
        self._syncing = list[Array]()
        self._sync: Future[None] | None = None
        self._last_sync = time.monotonic()
        self._syncer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="sync")
        self._busy_seconds = 0.0
        self._error: BaseException | None = None  # after an error nothing more goes into the file
        self._work: queue.SimpleQueue[tuple[Work, Future[None]] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="writer", daemon=True)
        self._store_snapshot()
        self._thread.start()

    def __enter__(self) -> "Writer":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error:
            self._submit(self._commit_all).exception()
            num_done, num_rows = int(np.count_nonzero(self._done)), len(self._done)
            logger.info(
                f"{num_done:,} of {num_rows:,} rows are safe in {self._partial}. Run the same command again to resume."
            )
        self._work.put(None)
        self._thread.join()
        self._syncer.shutdown()
        if error and self._snapshot:
            self._put_line(b"\0")  # the run is no longer under way
        self._file.close()

    @property
    def num_duplicates(self) -> int:
        """Rows written more than once."""
        return int(np.count_nonzero(self._times_written > 1))

    def submit(self, batch: int, payload: Array) -> Future[None]:
        """Have a batch's payload written. It must not change until the returned future is done."""
        return self._submit(lambda: self._write_batch(batch, payload))

    def finish(self) -> None:
        """Wait until all submitted payloads are on the disk.

        Raises:
            CaptureError: A row is missing or was written twice, or the disk failed.
        """
        self._submit(self._commit_all).result()
        missing = int(np.count_nonzero(self._times_written == 0))
        if missing or self.num_duplicates:
            raise CaptureError(
                f"{missing} rows are missing and {self.num_duplicates} are duplicates. "
                f"All written rows are in {self._partial}."
            )

    def _submit(self, work: Work) -> Future[None]:
        future: Future[None] = Future()
        self._work.put((work, future))
        return future

    def _run(self) -> None:
        while (task := self._next()) is not None:
            work, future = task
            try:
                if self._error:
                    raise self._error
                self._do(work)
                future.set_result(None)
            except BaseException as error:  # otherwise the waiting thread would wait for ever
                self._error = error
                future.set_exception(error)

    def _do(self, work: Work) -> None:
        try:
            work()
        except OSError as error:
            raise CaptureError(f"{self._partial} cannot be written: {reason(error)}.") from error

    def _next(self) -> tuple[Work, Future[None]] | None:
        """Wait for work. A due commit comes first, even if there is nothing else to do."""
        while self._unsynced and not self._error:
            left = self._last_sync + COMMIT_SECONDS - time.monotonic()
            if left <= 0 or (self._unsynced_bytes >= COMMIT_BYTES and not self._sync):
                return self._begin_commit, Future()
            with suppress(queue.Empty):
                return self._work.get(timeout=left)
        return self._work.get()

    def _write_batch(self, batch: int, payload: Array) -> None:
        start = time.monotonic()
        all_rows = self._job.plan.rows(batch)
        ends = np.cumsum(self._job.rows.num_positions[all_rows], dtype=np.int64)
        slices = self._header.layout.payload_slices(len(all_rows), int(ends[-1]))
        missing = np.flatnonzero(~self._done[all_rows])
        rows = all_rows[missing]
        starts = (ends - self._job.rows.num_positions[all_rows])[missing]
        of_rows = list(zip(missing.tolist(), (missing + 1).tolist(), rows.tolist(), strict=True))
        places = self._position_offsets[rows].tolist()
        of_positions = list(zip(starts.tolist(), ends[missing].tolist(), places, strict=True))
        self._datasets.put_parts("crc32", payload[slices["crc32"]], of_rows)
        for name in self._header.layout.captured:
            self._datasets.put_parts(name, payload[slices[name]], of_positions)
        self._times_written[rows] += 1
        self._unsynced.append(rows)
        self._unsynced_bytes += len(payload)
        self._busy_seconds += time.monotonic() - start
        self._on_written(batch, self._busy_seconds)

    def _begin_commit(self) -> None:
        """Start to sync all written rows, while more are written. The commit before ends first."""
        self._end_commit(self._sync)
        self._syncing, self._unsynced, self._unsynced_bytes = self._unsynced, [], 0
        self._last_sync = time.monotonic()
        self._sync = self._syncer.submit(os.fsync, self._file.fileno())
        self._sync.add_done_callback(lambda sync: self._submit(lambda: self._end_commit(sync)))

    def _end_commit(self, sync: Future[None] | None) -> None:
        """Mark rows as done, once their data is on the disk."""
        if sync is None or sync is not self._sync:  # it has been waited for before
            return
        start = time.monotonic()
        sync.result()
        for rows in self._syncing:
            self._datasets.put_parts("done", np.ones(1, np.uint8), ((0, 1, row) for row in rows.tolist()))
            self._done[rows] = True
        self._sync = None
        self._busy_seconds += time.monotonic() - start
        self._store_snapshot()

    def _store_snapshot(self) -> None:
        """Store the progress for watchers of the run."""
        if self._snapshot:
            self._put_line(encode(self._snapshot()))

    def _put_line(self, line: bytes) -> None:
        """Overwrite the line behind the data. No row depends on it, so the disk may refuse it."""
        with suppress(OSError):
            write_at(self._file, self._header.size_bytes, memoryview(line))

    def _commit_all(self) -> None:
        """Commit, and sync even the `done` flags."""
        self._begin_commit()
        self._end_commit(self._sync)
        os.fsync(self._file.fileno())
