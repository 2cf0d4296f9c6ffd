"""The plan: which rows form a batch. A pure function of the row lengths and the token budget.

The number of ranks plays no part in it, so a batch is always computed in the same shape, whoever computes it, and the
file comes out the same. The plan is also the transport's protocol: it tells the leader who sends which batch and how
large it is.
"""

import numpy as np
import numpy.typing as npt


class Plan:
    """Rows sorted by length, longest first, cut into batches that stay within a budget of tokens, padding included.

    Longest first, because a batch that does not fit into memory then fails in the first seconds; sorted, because
    neighbours of nearly equal length need almost no padding.
    """

    def __init__(self, lengths: npt.NDArray[np.integer], batch_tokens: int, length_switch: int | None = None) -> None:
        """Plan one forward pass over every row that needs one.

        Args:
            lengths: Tokens the teacher must read of each row, [N]; rows of length 0 get no batch.
            batch_tokens: Upper bound of rows x longest row of a batch. A single longer row is a batch of its own.
            length_switch: Rows longer than this never share a batch with rows that are not.
        """
        needed = np.flatnonzero(lengths)
        self._rows = needed[np.argsort(-lengths[needed].astype(np.int64), kind="stable")]
        self._starts = _batch_starts(lengths[self._rows], batch_tokens, length_switch or 0)
        longest = lengths[self._rows[self._starts[:-1]]].astype(np.int64)
        self.num_tokens = int(lengths[needed].sum(dtype=np.int64))
        self.num_padded_tokens = int((longest * np.diff(self._starts)).sum())

    @property
    def num_batches(self) -> int:
        """Number of batches."""
        return len(self._starts) - 1

    @property
    def padding_share(self) -> float:
        """Share of the tokens that go through the teacher only to fill up a batch, 0 to 1."""
        return 1 - self.num_tokens / self.num_padded_tokens if self.num_padded_tokens else 0.0

    def rows(self, batch: int) -> npt.NDArray[np.int64]:
        """Row numbers of a batch, longest row first."""
        return self._rows[self._starts[batch] : self._starts[batch + 1]]

    def sums(self, values: npt.NDArray[np.integer | np.bool_]) -> npt.NDArray[np.int64]:
        """Sum a per-row number, [N], over the rows of every batch: [num_batches]."""
        return np.add.reduceat(values[self._rows].astype(np.int64), self._starts[:-1])

    @property
    def num_rows(self) -> npt.NDArray[np.int64]:
        """Rows of every batch, [num_batches]."""
        return np.diff(self._starts)

    def pending(self, done: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
        """Return the batches with a row that is not done, [N] flags, in the order in which they are computed."""
        return np.flatnonzero(self.sums(~done))


def _batch_starts(
    sorted_lengths: npt.NDArray[np.integer], batch_tokens: int, length_switch: int
) -> npt.NDArray[np.int64]:
    num_longer = int((sorted_lengths > length_switch).sum())
    starts, start = [0], 0
    while start < len(sorted_lengths):
        end = num_longer if start < num_longer else len(sorted_lengths)
        start = min(start + max(1, batch_tokens // int(sorted_lengths[start])), end)
        starts.append(start)
    return np.array(starts, dtype=np.int64)
