"""The kernel for GPUs, run by Triton's interpreter on a CPU, and what is done without it."""

import importlib.util
import subprocess
import sys
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from conftest import ROOT

from logitgen.teacher import keep
from logitgen.teacher.keep import _largest_in_groups, _logsumexp_in_passes, sample, top_k
from logitgen.teacher.noise import position_keys

needs_triton = pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="needs Triton")

HEADS = [
    (3, 1, torch.float32),
    (5, 1000, torch.float32),
    (4, 4096, torch.bfloat16),
    (7, 13_001, torch.bfloat16),
    (2, 40_000, torch.float16),
]
"""Positions, vocabulary and dtype."""

# The interpreter must be chosen before Triton is imported.
COMPARE = """
import torch
from logitgen.teacher import fused

torch.manual_seed(0)
for num_positions, num_ids, dtype in {heads}:
    logits = (torch.randn(num_positions, num_ids) * 5).to(dtype)
    logits[1:2] = -torch.inf
    logits[2:3, : num_ids // 2] = -torch.inf
    strided = torch.cat([logits, logits], dim=1)[:, :num_ids]
    for given in (logits, strided):
        logsumexp, group_largest = fused.scan(given, 32)
        torch.testing.assert_close(logsumexp.double(), given.double().logsumexp(-1), rtol=0, atol=4e-6)
        groups = given[:, : num_ids // 32 * 32].unflatten(-1, (-1, 32))
        assert torch.equal(group_largest, groups.amax(-1)) if groups.numel() else not group_largest.numel()
        largest, again, sums = fused.scan_groups(given, 32)
        assert torch.equal(again, group_largest)
        assert torch.equal(largest[:, 0], given.float().amax(-1).clamp(min=torch.finfo(torch.float32).min))
        filled = torch.nn.functional.pad(given.double(), (0, -num_ids % 32), value=-torch.inf)
        expected = (filled - largest).exp().unflatten(-1, (-1, 32)).sum(-1)
        torch.testing.assert_close(sums.double(), expected, rtol=2e-6, atol=1e-30)
for value in (torch.nan, torch.inf):
    for place in (0, 4999):
        logits = torch.randn(3, 5000)
        logits[1, place] = value
        assert fused.scan(logits, 32)[0].isfinite().tolist() == [True, False, True]
        assert fused.scan_groups(logits, 32)[2].sum(-1).isfinite().tolist() == [True, False, True]
print("compared")
"""


@needs_triton
def test_the_kernel_finds_the_logsumexp_and_the_largest_of_each_group() -> None:
    code = COMPARE.format(heads=HEADS)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        cwd=ROOT,
        env={"TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.stdout == "compared\n", done.stderr


def scanned(logits_CS: torch.Tensor, group_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What the kernel returns."""
    grouped = logits_CS.shape[-1] // group_size * group_size
    return logits_CS.double().logsumexp(-1).float(), logits_CS[:, :grouped].unflatten(-1, (-1, group_size)).amax(-1)


@pytest.mark.parametrize(("num_ids", "k"), [(9000, 64), (13_001, 50), (40_000, 128), (4096, 1), (70, 5), (13_001, 0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_largest_logits_lie_in_the_groups_with_the_largest(num_ids: int, k: int, dtype: torch.dtype) -> None:
    torch.manual_seed(num_ids)
    logits_CV = (torch.randn(4, num_ids) * 5).to(dtype)
    logits_CV[1, 100:] = -torch.inf
    logits_CV[2, :-20] -= 50  # so that the largest are those that fill no group
    values_CK, ids_CK = _largest_in_groups(logits_CV, k, scanned(logits_CV, 32)[1])
    assert torch.equal(values_CK, torch.topk(logits_CV, k).values)
    assert torch.equal(logits_CV.gather(1, ids_CK), values_CK)
    assert all(len(set(ids)) == k for ids in ids_CK.tolist())


def scanned_groups(logits_CS: torch.Tensor, group_size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What the kernel returns with the sums of groups."""
    largest_C1 = logits_CS.float().amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).min)
    filled = torch.nn.functional.pad(logits_CS.double(), (0, -logits_CS.shape[1] % group_size), value=-torch.inf)
    sums_CG = (filled - largest_C1).exp().unflatten(-1, (-1, group_size)).sum(-1).float()
    return largest_C1, scanned(logits_CS, group_size)[1], sums_CG


KERNEL = SimpleNamespace(scan=scanned, scan_groups=scanned_groups)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_with_the_kernel_the_same_is_kept_as_without(dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    logits_CV, target_C = (torch.randn(6, 12_345) * 4).to(dtype), torch.randint(12_345, (6,))
    without = top_k(logits_CV, target_C, 40)
    with mock.patch.object(keep, "_gpu_kernel", return_value=KERNEL):
        found = top_k(logits_CV, target_C, 40)
    assert {name: values.dtype for name, values in found.items()} == {n: v.dtype for n, v in without.items()}
    for name in ("logsumexp", "target_logprob", "kept_logprobs"):
        torch.testing.assert_close(found[name], without[name], rtol=0, atol=2e-6)
    expected_CV = logits_CV.double().log_softmax(-1)
    torch.testing.assert_close(
        expected_CV.gather(1, found["kept_ids"]).float(), found["kept_logprobs"], rtol=0, atol=2e-6
    )


@pytest.mark.parametrize(("num_ids", "drawable"), [(12_345, 12_300), (12_345, 12_320), (50, 40), (30, 30)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_with_the_kernel_the_same_is_drawn_as_without(num_ids: int, drawable: int, dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    logits_CV, target_C = (torch.randn(6, num_ids) * 4).to(dtype), torch.randint(drawable, (6,))
    logits_CV[3, 2:] = -torch.inf
    key_C = position_keys(0, torch.zeros(6, dtype=torch.int64), torch.arange(6))
    room = [*range(29, 19, -1), *[20] * 11]
    without = sample(logits_CV, target_C, room, key_C, drawable)
    with mock.patch.object(keep, "_gpu_kernel", return_value=KERNEL):
        found = sample(logits_CV, target_C, room, key_C, drawable)
    usual = torch.tensor([0, 1, 2, 4, 5])  # any of the masked tokens of the other may fill it up
    assert torch.equal(found["kept_ids"].sort(-1).values[usual], without["kept_ids"].sort(-1).values[usual])
    for name in ("logsumexp", "target_logprob", "kept_logprobs"):
        torch.testing.assert_close(found[name], without[name], rtol=0, atol=2e-6)


def test_without_triton_a_gpu_warns_once_and_reads_logits_several_times(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "logitgen.teacher.fused", None)
    keep._gpu_kernel.cache_clear()
    assert keep._gpu_kernel(torch.device("cuda")) is None
    assert keep._gpu_kernel(torch.device("cuda")) is None
    keep._gpu_kernel.cache_clear()
    assert [record.getMessage().partition(",")[0] for record in caplog.records] == ["Triton cannot be used"]
    logits_CV = torch.randn(5, 300)
    torch.testing.assert_close(_logsumexp_in_passes(logits_CV, logits_CV.amax(-1)), logits_CV.logsumexp(-1))
