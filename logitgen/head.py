"""The teacher's output head as a value: from hidden states to logits, in the file once for all positions.

Shape letters: P positions, V vocabulary, D hidden size.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from logitgen.file.layout import STORED_DTYPES, Array, HeadForm, crc32

_BLOCK_ROWS = 2**14


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
        logits = logits if self.scale == 1 else logits * self.scale
        return self.soft_cap * torch.tanh(logits / self.soft_cap) if self.soft_cap else logits

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
