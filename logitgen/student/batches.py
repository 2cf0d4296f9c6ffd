"""The rows of every training batch, from their lengths alone: nearly no padding, the same on every rank."""

from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from functools import partial

import numpy as np
import numpy.typing as npt
from torch.utils.data import Sampler

from logitgen.errors import UsageError

MOST_PADDING = 0.02
"""Padding at which a batch ends early, as a share of its budget. It matters where a split makes few batches: the demo's
1,564 rows make 45 batches of 4,096 tokens with 2 % of padding, or else 27 with 7 % (benchmarks/padding.py). A limit in
shares of the batch itself would leave batches of 10 tokens where rows are short.
"""

Rows = npt.NDArray[np.int64]
"""Row numbers of a batch."""


class TokenBatches(Sampler[list[int]]):
    """Shuffled batches within a budget of tokens, as `batch_sampler` of a `DataLoader`.

    Every row that has tokens comes once per epoch, on one rank. Rows of similar length share a batch, so that little
    padding is needed. With `padding_free` none is, and rows of any length share one. The batches follow from the
    arguments and the epoch alone.

    Accelerate's `skip_first_batches` resumes an epoch, and `set_epoch` does so without Accelerate.
    """

    def __init__(
        self,
        lengths: npt.ArrayLike,
        max_tokens: int,
        *,
        seed: int = 0,
        padding_free: bool = False,
        num_replicas: int = 1,
        rank: int | None = None,
    ) -> None:
        """Plan the batches of the first epoch.

        Args:
            lengths: Tokens of each row, [N]: `lengths` of a `LogitsDataset`.
            max_tokens: Upper bound of a batch's tokens, padding included. A longer row is a batch of its own.
            seed: Together with the epoch, it decides the order.
            padding_free: The batches are for `collate(..., padding_free=True)`.
            num_replicas: Ranks that share the batches. Each gets as many: large batches are halved until it does. Where
                all batches are single rows, a few come twice instead.
            rank: The rank whose batches to yield. None yields those of all ranks in turns, which is what a loader
                prepared by Accelerate needs: it picks every rank's own.

        Raises:
            UsageError: `max_tokens` is below 1, there is no such rank, or there are fewer rows than ranks.
        """
        self.lengths = np.asarray(lengths, dtype=np.int64)
        self.max_tokens = max_tokens
        self.seed = seed
        self.padding_free = padding_free
        self.num_replicas = num_replicas
        self.rank = rank
        self._check()
        self.set_epoch(0)

    def set_epoch(self, epoch: int, skip: int = 0) -> None:
        """Plan the batches of an epoch, in a new order.

        Args:
            epoch: Number of the epoch.
            skip: Batches to leave out at the start, because this rank has trained on them.
        """
        generator = np.random.default_rng((self.seed, epoch))
        batches = self._evened(self._cut(generator.permutation(np.flatnonzero(self.lengths))))
        order = generator.permutation(len(batches))
        self._batches = [batches[number] for number in order[self.rank or 0 :: self._stride]][skip:]

    def __len__(self) -> int:
        """Number of batches of this epoch, which may differ a little from those of other epochs."""
        return len(self._batches)

    def __iter__(self) -> Iterator[list[int]]:
        for batch in self._batches:
            yield batch.tolist()

    @property
    def _stride(self) -> int:
        return 1 if self.rank is None else self.num_replicas

    def _cut(self, rows: Rows) -> list[Rows]:
        """Cut shuffled rows into batches, each as large as its budget allows."""
        if not self.padding_free:
            rows = rows[np.argsort(self.lengths[rows], kind="stable")]  # rows of equal length stay shuffled
        lengths = self.lengths[rows]
        before = np.concatenate([[0], lengths.cumsum()])
        batches, start = [], 0
        while start < len(rows):
            most_rows = bisect_right(before, before[start] + self.max_tokens) - 1 - start
            if not self.padding_free:
                too_large = partial(self._is_too_large, lengths, before, start)
                most_rows = bisect_left(range(1, most_rows + 1), True, key=too_large)
            batches.append(rows[start : start + max(1, most_rows)])
            start += len(batches[-1])
        return batches

    def _is_too_large(self, lengths: Rows, before: Rows, start: int, num_rows: int) -> bool:
        """Whether so many sorted rows exceed the budget of a batch, or that of its padding."""
        end = start + num_rows
        num_tokens = num_rows * lengths[end - 1]
        padding = num_tokens - (before[end] - before[start])
        return bool(num_tokens > self.max_tokens or padding > MOST_PADDING * self.max_tokens)

    def _evened(self, batches: list[Rows]) -> list[Rows]:
        """Halve batches, those of most rows first, until every rank gets as many."""
        while missing := -len(batches) % self.num_replicas:
            batches = sorted(batches, key=len)
            if len(batches[-1]) == 1:
                return batches + batches[:missing]
            halves = [half for batch in batches[-missing:] for half in np.array_split(batch, 2)]
            batches = batches[:-missing] + [half for half in halves if len(half)]
        return batches

    def _check(self) -> None:
        if self.max_tokens < 1:
            raise UsageError(f"max_tokens must be at least 1, got {self.max_tokens}. Give the tokens of a batch.")
        if self.rank is not None and not 0 <= self.rank < self.num_replicas:
            raise UsageError(
                f"rank must be between 0 and {self.num_replicas - 1}, got {self.rank}. Count ranks from 0."
            )
        num_rows = np.count_nonzero(self.lengths)
        if num_rows < self.num_replicas:
            raise UsageError(
                f"Every rank needs a row, got {num_rows} rows for {self.num_replicas} ranks. Use fewer ranks."
            )
