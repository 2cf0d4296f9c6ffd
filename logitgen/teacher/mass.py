"""The probability mass that the top k of a teacher keep, measured while batches are captured.

Shape letters: C positions of a chunk, S ids of a shard of the vocabulary, P positions, K kept.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from logitgen.file.layout import Array
from logitgen.split.batch import Batch, Pass
from logitgen.teacher.keep import top_k
from logitgen.teacher.model import Teacher, on_device

_AT_ONCE = 64
"""Positions measured at a time: a copy of their logits takes little memory."""


@dataclass(frozen=True)
class KeptMass:
    """The probability mass that each top k keeps.

    Attributes:
        num_positions: Positions at which it was measured.
        of_k: The mean over these positions and the 10th percentile: nine of ten positions keep at least as much.
    """

    num_positions: int
    of_k: dict[int, tuple[float, float]]


class MeasuredTeacher(Teacher):
    """A loaded teacher that also measures the mass of its top k, at some positions of every batch drawn at random.

    Each position of a batch counts, also where rows share a prefix. A batch too large for the memory is measured as far
    as it was computed before that showed. Ranks of a tensor-parallel teacher all measure the same.

    Attributes:
        seconds: Time the measurements have taken.
    """

    def __init__(self, teacher: Teacher, ks: Sequence[int], share: float) -> None:
        """Take over a teacher.

        Args:
            teacher: The loaded teacher.
            ks: The numbers of kept tokens, ascending.
            share: Chance of a captured position to be measured.
        """
        vars(self).update(vars(teacher))
        self.seconds = 0.0
        self._ks, self._share = list(ks), share
        self._passes: Sequence[Pass] = ()
        self._wanted: Array = np.empty(0, np.int64)
        self._measured: list[Array] = []
        self._found: dict[int, list[Array]] = {}

    def expect(self, number: int, batch: Batch) -> None:
        """Name the next batch. One that comes again is measured again, at the same positions on all ranks."""
        drawn = np.random.default_rng(number).random(len(batch.slots)) < self._share
        self._passes, self._wanted = batch.passes, np.sort(batch.slots[drawn])
        self._measured = self._found[number] = []

    def logits(self, passes: Sequence[Pass], slots: Array) -> Iterator[tuple[slice, Tensor, dict[str, Tensor]]]:
        """Yield the logits as `Teacher.logits` does."""
        places = np.searchsorted(slots, self._wanted) if passes is self._passes else np.empty(0, np.int64)
        for span, logits_CS, hidden in super().logits(passes, slots):
            here = places[(places >= span.start) & (places < span.stop)] - span.start
            start = self._now()
            for first in range(0, len(here), _AT_ONCE):
                self._measure(logits_CS[on_device(here[first : first + _AT_ONCE], logits_CS.device)])
            self.seconds += self._now() - start
            yield span, logits_CS, hidden

    def _measure(self, logits_CS: Tensor) -> None:
        no_target_C = torch.zeros(len(logits_CS), dtype=torch.int64, device=logits_CS.device)
        kept = top_k(logits_CS, no_target_C, self._ks[-1], self.shard)
        mass_CK = kept["kept_logprobs"].exp().cumsum(-1)[:, [k - 1 for k in self._ks]]
        self._measured.append(mass_CK.clamp(max=1).cpu().numpy())

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    @property
    def kept_mass(self) -> KeptMass:
        """The measurements so far, over all batches."""
        parts = [part for measured in self._found.values() for part in measured]
        if not parts:
            return KeptMass(0, {})
        mass_PK = np.concatenate(parts).astype(np.float64)
        pairs = zip(mass_PK.mean(0).tolist(), np.quantile(mass_PK, 0.1, axis=0).tolist(), strict=True)
        return KeptMass(len(mass_PK), dict(zip(self._ks, pairs, strict=True)))
