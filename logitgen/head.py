"""The teacher's output head as a value: from hidden states to logits, in the file once for all positions.

Shape letters: P positions, V vocabulary, D hidden size.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from logitgen.file.layout import STORED_DTYPES, Array, crc32
from logitgen.file.states import HeadForm

_BLOCK_ROWS = 2**14

_SCALE_ERROR = 1e-5
"""Largest relative error of float32 in a scale and a soft-cap."""


@dataclass(frozen=True, kw_only=True)
class Head:
    """The step of a causal language model from its last hidden states to logits.

    Attributes:
        weight_VD: The output embeddings.
        bias_V: Added to the logits, if there is any.
        scale: Factor of the logits after that.
        soft_cap: Bound c of the logits after that: c * tanh(logits / c), or 0 for none.
    """

    weight_VD: Tensor
    bias_V: Tensor | None
    scale: float
    soft_cap: float

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> "Head":
        """Return the same head elsewhere: float32 is exact, the teacher's own dtype as fast as the teacher."""
        bias_V = None if self.bias_V is None else self.bias_V.to(device, dtype)
        weight_VD = self.weight_VD.to(device, dtype)
        return Head(weight_VD=weight_VD, bias_V=bias_V, scale=self.scale, soft_cap=self.soft_cap)

    def __call__(self, hidden_PD: Tensor) -> Tensor:
        """Turn hidden states into logits, float32[P, V]. The product is computed in the weights' dtype."""
        hidden_PD = hidden_PD.to(self.weight_VD.dtype)
        return self.after_product(torch.nn.functional.linear(hidden_PD, self.weight_VD, self.bias_V).float())

    def after_product(self, logits: Tensor) -> Tensor:
        """Scale and cap the logits."""
        return scaled_and_capped(logits, self.scale, self.soft_cap)

    @property
    def form(self) -> HeadForm:
        """Sizes of the head, and its storage dtype."""
        dtype = STORED_DTYPES[dtype_name(self.weight_VD.dtype)]
        return HeadForm(hidden_size=self.weight_VD.shape[1], dtype=dtype, has_bias=self.bias_V is not None)

    def blocks(self) -> Iterator[tuple[str, int, Array]]:
        """Yield the stored weights, a part at a time: the dataset, the part's first row and the part."""
        for start in range(0, len(self.weight_VD), _BLOCK_ROWS):
            yield "head_weight", start, _on_host(self.weight_VD[start : start + _BLOCK_ROWS])
        if self.bias_V is not None:
            yield "head_bias", 0, _on_host(self.bias_V)

    @property
    def checksum(self) -> int:
        """CRC-32 of the weights as they are stored."""
        return crc32(block for _, _, block in self.blocks())


def scaled_and_capped(logits: Tensor, scale: float, soft_cap: float) -> Tensor:
    """Do what a family does to its logits after the product."""
    logits = logits if scale == 1 else logits * scale
    return soft_cap * torch.tanh(logits / soft_cap) if soft_cap else logits


def probe_values(vocab_size: int, device: torch.device) -> Tensor:
    """Make numbers to stand for a product, float32[V]: both signs, from 2**-10 to 2**20, which no scale rounds."""
    id_V = torch.arange(vocab_size, device=device)
    return (1 - 2 * (id_V % 2)) * 2.0 ** (id_V // 2 % 31 - 10)


def scale_and_cap(probe_V: Tensor, answer_V: Tensor) -> tuple[float, float] | None:
    """Read off a model's answer to `probe_values` what it does to a product.

    The scale follows from the smallest probe, the first, and the cap from the largest.

    Returns:
        Scale and soft-cap as `Head` has them, or None if the model does anything else.
    """
    scale, soft_cap = float(answer_V[0] / probe_V[0]), 0.0
    largest = int(probe_V.argmax())
    if abs(answer_V[largest]) <= abs(scale * probe_V[largest]) / 2:
        soft_cap = float(abs(answer_V[largest]))
        scale = 1.0 if abs(scale - 1) < _SCALE_ERROR else scale  # tanh rounds small numbers
    expected_V = scaled_and_capped(probe_V, scale, soft_cap)
    return (scale, soft_cap) if torch.allclose(expected_V, answer_V, rtol=_SCALE_ERROR, atol=0) else None


@contextmanager
def forward_replaced(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Give a module another forward for a while. What is hooked to the module still runs."""
    before = module.__dict__.get("forward")  # accelerate's hooks and torch.compile put their own there
    module.forward = forward
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before


def dtype_name(dtype: torch.dtype) -> str:
    """Name a dtype as the file does."""
    return str(dtype).removeprefix("torch.")


def stored(values: Tensor) -> Tensor:
    """Return the same bits in a dtype that numpy and HDF5 have too: bfloat16 as uint16."""
    return values.view(torch.uint16) if values.dtype == torch.bfloat16 else values


def restored(values: Array, dtype: str) -> Tensor:
    """Copy values that `stored` made, given the name of their original dtype."""
    tensor = torch.tensor(values)  # not numpy's memory, whose address could change the rounding of a product
    return tensor.view(torch.bfloat16) if dtype == "bfloat16" else tensor


def _on_host(values: Tensor) -> Array:
    return stored(values.detach().contiguous()).cpu().numpy()
