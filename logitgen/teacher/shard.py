"""The vocabulary, cut among the ranks of a tensor-parallel teacher: each has the logits of some ids.

The kept ids of a position come from the candidates of every shard. No rank holds the logits of all ids, unless `full`
keeps them.

Shape letters: C positions of a chunk, V vocabulary, S ids of a shard, K candidates, W shards.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class VocabShard:
    """The ids whose logits this rank has, cut as `torch.chunk` cuts: only the last shards may be narrower.

    Attributes:
        group: The ranks that have a shard each, or None if this rank has all ids.
        vocab_size: Number of ids in all, V.
    """

    group: dist.ProcessGroup | None
    vocab_size: int

    @property
    def index(self) -> int:
        """Number of the shard, in the order of ids."""
        return self.group.rank() if self.group else 0

    @property
    def start(self) -> int:
        """The first id."""
        return min(self.index * self._width, self.vocab_size)

    @property
    def size(self) -> int:
        """Number of ids in the shard, S."""
        return min(self._width, self.vocab_size - self.start)

    @property
    def _width(self) -> int:
        return -(-self.vocab_size // self.group.size()) if self.group else self.vocab_size

    def whole(self, logits_CS: Tensor) -> Tensor:
        """Join the logits of all shards: [C, S] to [C, V], or any other leading dimensions."""
        if self.group is None:
            return logits_CS
        return self._gathered(_widened(logits_CS, self._width, 0.0))[..., : self.vocab_size]

    def logsumexp(self, logsumexp_C: Tensor) -> Tensor:
        """Combine the log-sum-exps of all shards."""
        return logsumexp_C if self.group is None else self._gathered(logsumexp_C[:, None]).logsumexp(-1)

    def pick(self, logits_CS: Tensor, ids_C: Tensor) -> Tensor:
        """Take one logit of each position, [C], from the shard that has it."""
        if self.group is None:
            return logits_CS.gather(-1, ids_C[:, None])[:, 0]
        size = logits_CS.shape[-1]
        places_C = ids_C - self.start
        elsewhere_C = (places_C < 0) | (places_C >= size)
        picked_C = logits_CS.gather(-1, places_C.clamp(0, size - 1)[:, None])[:, 0]
        return self.most(picked_C.masked_fill(elsewhere_C, -torch.inf)[:, None])[:, 0]

    def beside(self, values_C1: Tensor) -> Tensor:
        """Put the values of all shards beside one another, [C, W], in the order of ids."""
        return values_C1 if self.group is None else self._gathered(values_C1)

    def most(self, values_CK: Tensor) -> Tensor:
        """Take the largest of all shards' values, [C, K]."""
        if self.group is None:
            return values_CK
        return torch.stack(self._gathered(values_CK).split(values_CK.shape[-1], dim=-1)).amax(0)

    def merge(self, k: int, values_CK: Tensor, places_CK: Tensor) -> tuple[Tensor, Tensor]:
        """Find the k largest among the candidates of all shards.

        Args:
            k: Number of values to find.
            values_CK: The largest values of this shard, descending, at most k of each position.
            places_CK: Their places in the shard, int64.

        Returns:
            The k largest values, descending, and their ids, [C, k] each.
        """
        if self.group is None:
            return values_CK, places_CK
        # A masked token, of -inf, goes before what only fills up.
        values_CK = values_CK.clamp(min=torch.finfo(values_CK.dtype).min)
        all_values = self._gathered(_widened(values_CK, k, -torch.inf))
        all_ids = self._gathered(_widened(places_CK + self.start, k, 0))
        largest_CK, chosen_CK = torch.topk(all_values, k)
        return largest_CK, all_ids.gather(1, chosen_CK)

    def _gathered(self, values: Tensor) -> Tensor:
        """Put the equally shaped values of all shards beside one another."""
        assert self.group is not None
        parts = [torch.empty_like(values) for _ in range(self.group.size())]
        dist.all_gather(parts, values.contiguous(), group=self.group)
        return torch.cat(parts, dim=-1)


WHOLE = VocabShard(None, 0)
"""All ids on one rank, for any vocabulary size."""


def _widened(values: Tensor, width: int, filler: float) -> Tensor:
    """Fill up the last dimension."""
    return torch.nn.functional.pad(values, (0, width - values.shape[-1]), value=filler)
