"""How others keep a position, written anew from what they document and from how their code is known to work.

Shape letters: P positions, V vocabulary, K kept, N draws, R values that are fitted, M terms of the fit.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.targets import Kept

FLOAT16_BITS = 16


def id_bits(vocab_size: int) -> int:
    """Bits of a token id."""
    return math.ceil(math.log2(vocab_size))


def renormalised(ids_PK: Tensor, logprobs_PK: Tensor) -> Kept:
    """Top-k as most keep it: the kept log-probs, float16, and a softmax over them alone."""
    return Kept(ids_PK, logprobs_PK.half().double().softmax(-1), has_tail=False)


def nucleus(ids_PK: Tensor, logprobs_PK: Tensor, top_p: float) -> Kept:
    """Trim a top-k to the fewest ids that hold so much mass, one at least; the rest is the tail, one more token.

    Source: Megatron-LM, `LogitsSaverHooks._apply_topp_truncation` and `topk_kl_div`: an id stays if those before it
    hold less than top_p; log-probs are of the whole softmax, in float16.
    """
    probs_PK = logprobs_PK.double().exp()
    stays_PK = probs_PK.cumsum(-1) - probs_PK < top_p
    return Kept(ids_PK, logprobs_PK.half().double().exp() * stays_PK, has_tail=True)


def nucleus_bytes(mean_kept: float, vocab_size: int) -> float:
    """Bytes of a trimmed position if nothing but id and float16 is kept of each id.

    That is kinder than Megatron-LM, which fills up to the longest position of its batch and then compresses.
    """
    return mean_kept * (id_bits(vocab_size) + FLOAT16_BITS) / 8


def with_replacement(probs_PV: Tensor, num_draws: int, seed: int) -> Kept:
    """Draw ids from the teacher's distribution; each draw adds the same share to the weight of its id.

    Source: RS-KD, "Sparse Logit Sampling" (arXiv 2503.16870).
    """
    generator = torch.Generator().manual_seed(seed)
    drawn_PN = torch.multinomial(probs_PV, num_draws, replacement=True, generator=generator).sort(-1).values
    is_new_PN = torch.ones_like(drawn_PN, dtype=torch.bool)
    is_new_PN[:, 1:] = drawn_PN[:, 1:] != drawn_PN[:, :-1]
    place_PN = is_new_PN.cumsum(-1) - 1
    ids_PN = torch.zeros_like(drawn_PN).scatter_(-1, place_PN, drawn_PN)
    share_PN = torch.full_like(drawn_PN, 1 / num_draws, dtype=torch.float64)
    return Kept(ids_PN, torch.zeros_like(share_PN).scatter_add_(-1, place_PN, share_PN), has_tail=False)


def drawn_bytes(mean_kept: float, vocab_size: int, num_draws: int) -> float:
    """Bytes of a position of RS-KD: 24 bits for each distinct id and its count, more where those do not suffice.

    17 + 7 bits in the paper; a vocabulary of 151,936 leaves 6 bits, counts to 63.
    """
    return mean_kept * max(3, math.ceil((id_bits(vocab_size) + num_draws.bit_length()) / 8))


@dataclass(frozen=True)
class Polynomial:
    """A record of DistillKit: the largest log-probs exactly, the others as a curve over their rank.

    Source: the two configurations its README recommends, and `distillkit/compression/monotonic_logprobs.py`: a
    least-squares fit over 0, 1, 2, ... by singular values, those below 1e-5 left out, in float32.
    """

    k: int
    exact: int  # log-probs that are kept as bfloat16
    powers: tuple[float, ...]  # exponents of the curve's terms, whose coefficients are float32

    def approximate(self, logprobs_PK: Tensor) -> Tensor:
        """Log-probs as they come out of a record, float32[P, K], of such in descending order."""
        ranks_R = torch.arange(self.k - self.exact, dtype=torch.float32)
        terms_RM = torch.stack([ranks_R**power for power in self.powers], dim=-1)
        fitted_PR = logprobs_PK[:, self.exact : self.k].float()
        coefficients_PM = fitted_PR @ torch.linalg.pinv(terms_RM, atol=1e-5, rtol=0).T
        return torch.cat([logprobs_PK[:, : self.exact].bfloat16().float(), coefficients_PM @ terms_RM.T], dim=-1)

    def target(self, ids_PK: Tensor, logprobs_PK: Tensor) -> Kept:
        """What a student is trained on with a tail, `symmetric_uniform`."""
        return Kept(ids_PK[:, : self.k], self.approximate(logprobs_PK).double().exp(), has_tail=True)

    def size_bytes(self, vocab_size: int) -> int:
        """Bytes of a record."""
        return math.ceil(self.k * id_bits(vocab_size) / 8) + 2 * self.exact + 4 * len(self.powers)


BUDGET = Polynomial(50, 1, (0, 1, 0.5))
RECOMMENDED = Polynomial(128, 16, (0, 1, 2, 3, 4, 0.5))
