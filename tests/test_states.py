"""Packed hidden states: the nearest of 255 values per group, whatever the size of the values, in every dtype."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from logitgen.file.states import HeadForm, from_bfloat16, pack, unpack

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def packed(states: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Codes, and scales as they are stored."""
    codes, scales = pack(states)
    assert (codes.dtype, scales.dtype) == (torch.int8, torch.bfloat16)
    return codes.numpy(), scales.view(torch.uint16).numpy()


def random_states(positions: int, width: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """States as models have them: a few channels are far larger than the others."""
    generator = torch.Generator().manual_seed(seed)
    size_D = torch.exp(torch.randn(width, generator=generator) * 1.5)
    return (torch.randn((positions, width), generator=generator) * size_D).to(dtype)


def test_codes_and_scales_are_those_worked_out_by_hand() -> None:
    """A group of 32 with scale 2, and a last group of 3 with scale 1: 2 * 64^2 / 127^2 = 0.5079, and so on."""
    first = [2.0, -2.0, 0.0, 2 * 64**2 / 127**2, -2 * 3**2 / 127**2] + [0.0] * 27
    codes, scales = packed(torch.tensor([[*first, -1.0, 0.25, 1 / 127**2]]))
    assert codes[0, :5].tolist() == [127, -127, 0, 64, -3]
    assert codes[0, 32:].tolist() == [-127, 63, 1]  # 63.5 squared is 0.25 * 127 squared, and 63 is nearer
    assert scales.tolist() == [[0x4000, 0x3F80]]  # 2 and 1 as bfloat16
    values = unpack(codes, scales)
    assert values.dtype == np.float32
    np.testing.assert_allclose(values[0, :5], first[:5], rtol=1e-6)
    np.testing.assert_allclose(values[0, 32:], [-1, 63**2 / 127**2, 1 / 127**2], rtol=1e-6)


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 3), st.integers(1, 100), st.integers(0, 2**32), st.sampled_from(DTYPES), st.data())
def test_every_value_gets_the_nearest_code_of_its_group(
    positions: int, width: int, seed: int, dtype: torch.dtype, data: st.DataObject
) -> None:
    scale = data.draw(st.sampled_from([1e-3, 1.0, 50.0] + ([] if dtype == torch.float16 else [1e-30, 1e30])))
    states = (random_states(positions, width, seed).double() * scale).to(dtype)
    codes, scales = packed(states)
    values = unpack(codes, scales).astype(np.float64)
    exact = states.double().numpy()
    steps = np.arange(-127, 128)
    for start in range(0, width, 32):
        of_group = slice(start, start + 32)
        largest = np.abs(exact[:, of_group]).max(1)
        found = from_bfloat16(scales[:, start // 32]).astype(np.float64)
        np.testing.assert_allclose(found, largest, rtol=2**-8)
        if dtype == torch.bfloat16:
            assert (found == largest).all()
        choices = found[:, None] * steps * np.abs(steps) / 127**2
        least = np.abs(exact[:, of_group, None] - choices[:, None]).min(-1)
        error = np.abs(exact[:, of_group] - values[:, of_group])
        np.testing.assert_allclose(error, least, atol=1e-6 * largest.max())
        half_a_step = (np.abs(codes[:, of_group].astype(int)) + 0.5) * found[:, None] / 127**2
        assert (error <= half_a_step * (1 + 1e-6) + 1e-6 * largest.max()).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_group_of_zeros_stays_zeros(dtype: torch.dtype) -> None:
    states = torch.zeros((2, 70), dtype=dtype)
    states[1, 40] = -3
    values = unpack(*packed(states))
    np.testing.assert_array_equal(values, states.float().numpy())


@pytest.mark.parametrize("value", [torch.finfo(torch.bfloat16).max, 65_504.0, torch.finfo(torch.bfloat16).tiny])
def test_the_largest_and_the_smallest_numbers_of_a_dtype_are_held(value: float) -> None:
    dtype = torch.float16 if value == 65_504 else torch.bfloat16
    states = torch.tensor([[value, -value / 2]], dtype=dtype)
    np.testing.assert_allclose(unpack(*packed(states)), states.double().numpy(), rtol=0.01)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_state_that_is_not_finite_is_not_read_as_one_that_is(value: float) -> None:
    states = torch.ones((2, 33))
    states[1, 3] = value
    assert np.isfinite(unpack(*packed(states))).all(1).tolist() == [True, False]


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_largest_numbers_stay_numbers_of_their_dtype(dtype: torch.dtype) -> None:
    most = torch.finfo(dtype).max
    states = torch.tensor([[most, -most, 1.0], [most * 0.9999, 1.0, 0.0]], dtype=dtype)
    restored = torch.from_numpy(unpack(*packed(states))).to(dtype)
    assert restored.isfinite().all()
    np.testing.assert_allclose(restored[:, 0].double(), states[:, 0].double(), rtol=2**-8)


def test_a_state_is_packed_alike_whatever_it_is_packed_with() -> None:
    states = random_states(50, 576, seed=1)
    codes, scales = packed(states)
    order = torch.randperm(50, generator=torch.Generator().manual_seed(2))
    moved_codes, moved_scales = packed(states[order][:7])
    assert (moved_codes == codes[order][:7]).all()
    assert (moved_scales == scales[order][:7]).all()


def test_the_error_is_a_small_part_of_that_of_linear_codes() -> None:
    """They have the same bytes: the reason for squares."""
    states = random_states(200, 576, seed=3)
    groups = states.unflatten(-1, (-1, 32))
    scale = groups.abs().amax(-1, keepdim=True) / 127
    linear = ((groups / scale).round() * scale).flatten(1)
    errors = [(found - states).square().mean().item() for found in (linear, torch.tensor(unpack(*packed(states))))]
    assert errors[1] < errors[0] / 2


@pytest.mark.parametrize(("width", "num_bytes"), [(1, 3), (32, 34), (33, 37), (576, 612), (4096, 4352)])
def test_a_state_takes_its_values_and_two_bytes_per_group(width: int, num_bytes: int) -> None:
    form = HeadForm(hidden_size=width, dtype=np.dtype("<f2"), has_bias=False)
    found = form.fields(packed=True)
    assert list(found) == ["hidden_scale", "hidden"]  # the wider dtype first
    assert sum(np.empty(shape, dtype).nbytes for shape, dtype in found.values()) == num_bytes
    assert form.fields(packed=False) == {"hidden": ((width,), np.dtype("<f2"))}
