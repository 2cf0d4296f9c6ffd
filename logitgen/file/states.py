r"""Hidden states: their datasets, and how they are packed.

Packed, a value takes 8 bits, and each group of 32 neighbouring values a scale. Code c of -127 to 127 in a
group of scale s stands for

    s * c * |c| / 127^2

The scale is the group's largest absolute value, rounded to bfloat16, which has the range of every dtype that a teacher
computes in. It is stored as its bits in uint16. A few channels of hidden states are far larger than the others. Groups
keep most values away from them, and squares leave finer steps to the small values beside them. Mean divergence in nats
of the distribution from the unpacked states from the exact one, and bytes of a state (1,024 positions of prose,
SmolLM2-135M in float32, V = 49,152, D = 576, which takes 1,152 bytes in float16):

    codes                        one group     128           64            32            16
    c                            1.2e-2, 578   4.2e-3, 586   2.4e-3, 594   1.2e-3, 612   6.6e-4, 648
    c, from the least value on   6.3e-3, 580   1.5e-3, 596   8.3e-4, 612   3.9e-4, 648   2.0e-4, 720
    c |c|                        1.5e-3, 578   7.7e-4, 586   5.5e-4, 594   3.0e-4, 612   2.0e-4, 648
    c |c|, 4 bits                                            1.7e-1, 306   9.1e-2, 324   6.0e-2, 360

A scale in float32 gains 7 % for twice its bytes. Linear codes of values that were rotated (Hadamard, 64 at a time) have
2.0e-4 at 594 bytes, but no program could read them without the rotation. For comparison, rounding to bfloat16 has
2.7e-5 at 1,152 bytes, and the whole teacher computed in bfloat16 1.5e-3. Codes of 4 bits are left out: at 324 bytes the
gradient of a near student is 12 degrees off, that of the packed top 128 1.4 degrees at 297 (over 2,048 positions).

Shape letters: C positions of a chunk, P positions, D hidden size, G groups, W values of a group.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:  # reading a file needs no torch
    from torch import Tensor

Array = npt.NDArray[Any]

GROUP_SIZE = 32
"""Values that share a scale, W. The last group of a state may have fewer."""
_TOP = 127
_MOST_FLOAT16 = 65_280.0
"""The largest value that bfloat16 and float16 both have."""
_NAME = re.compile(r"hidden_(\d{1,6})")


def name_of(layer: int) -> str:
    """Name the dataset of a layer other than the last."""
    return f"hidden_{layer}"


def layers_among(names: Iterable[str]) -> list[int]:
    """Return the numbers of the layers that have a dataset among these, ascending."""
    return sorted(int(found[1]) for name in names if (found := _NAME.fullmatch(name)))


@dataclass(frozen=True, kw_only=True)
class HeadForm:
    """Sizes of the hidden states and of the output head in a file.

    Attributes:
        hidden_size: D of the last hidden states, which the head reads.
        dtype: Storage dtype of the head and of plain hidden states.
        has_bias: True if there is a bias.
        layers: Numbers of the other layers whose states are there, ascending, each with its D.
    """

    hidden_size: int
    dtype: np.dtype
    has_bias: bool
    layers: tuple[tuple[int, int], ...] = ()

    @property
    def widths(self) -> dict[str, int]:
        """D of each kind of hidden state, by its name."""
        return {"hidden": self.hidden_size} | {name_of(layer): width for layer, width in self.layers}

    def fields(self, packed: bool) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        """Return the shape and dtype of one position's entry in each dataset, the widest dtype first."""
        if not packed:
            return {name: ((width,), self.dtype) for name, width in self.widths.items()}
        scales = {f"{name}_scale": ((_num_scales(width),), np.dtype("<u2")) for name, width in self.widths.items()}
        return scales | {name: ((width,), np.dtype("i1")) for name, width in self.widths.items()}

    @property
    def words(self) -> str:
        """The hidden states in words."""
        numbers = [str(layer) for layer, _ in self.layers]
        return f"hidden states (layers {', '.join(numbers)}, last)" if numbers else "hidden states"


def _num_scales(width: int) -> int:
    return -(-width // GROUP_SIZE)


def pack(states_CD: "Tensor") -> tuple["Tensor", "Tensor"]:
    """Pack hidden states, on their own device. Each value gets the nearest code.

    Args:
        states_CD: Hidden states in any floating dtype.

    Returns:
        The codes int8[C, D] and the scales bfloat16[C, G].
    """
    import torch

    width = states_CD.shape[-1]
    padded = torch.nn.functional.pad(states_CD.float(), (0, _num_scales(width) * GROUP_SIZE - width))
    values_CGW = padded.unflatten(-1, (-1, GROUP_SIZE))
    largest_CG = values_CGW.abs().amax(-1)
    scale_CG = largest_CG.to(torch.bfloat16)
    # Not rounded up to infinity, here or in the teacher's dtype. What is infinite already stays so.
    most = _MOST_FLOAT16 if states_CD.dtype == torch.float16 else torch.finfo(torch.bfloat16).max
    scale_CG = scale_CG.clamp(max=most).where(largest_CG.isfinite(), scale_CG)
    divisor_CG1 = scale_CG.float().clamp(min=torch.finfo(torch.float32).tiny)[..., None]
    squares_CGW = values_CGW.abs() / divisor_CG1 * _TOP**2
    # c^2 + c + 1/2 is half-way from c^2 to the next square, and (c + 1/2)^2 + 1/4.
    codes_CGW = (squares_CGW - 0.25).clamp(min=0).sqrt().round().clamp(max=_TOP).copysign(values_CGW)
    return codes_CGW.flatten(1)[:, :width].to(torch.int8), scale_CG


def unpack(codes_PD: Array, scale_PG: Array) -> Array:
    """Unpack hidden states.

    Args:
        codes_PD: int8.
        scale_PG: The scales as they are stored, uint16.

    Returns:
        float32[P, D].
    """
    codes_PD = codes_PD.astype(np.float32)
    scale_PG = from_bfloat16(scale_PG) / np.float32(_TOP**2)
    with np.errstate(invalid="ignore"):  # values of a damaged scale are not finite either
        return np.asarray(codes_PD * np.abs(codes_PD) * scale_PG.repeat(GROUP_SIZE, axis=1)[:, : codes_PD.shape[1]])


def from_bfloat16(bits: Array) -> Array:
    """Return the values whose bfloat16 bits are in uint16, float32 of any shape."""
    return np.asarray((bits.astype("<u4") << 16).view("<f4"))
