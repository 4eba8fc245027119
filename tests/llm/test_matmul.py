"""Products by oneDNN: the same numbers, and only where they pay."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from llm import matmul

AMD, INTEL = "vendor_id\t: AuthenticAMD\n", "vendor_id\t: GenuineIntel\n"


@pytest.fixture
def overridden(monkeypatch) -> Iterator[list[bool]]:
    """Products of this process by oneDNN, and for each whether it paid."""
    paid: list[bool] = []
    pays = matmul._pays
    monkeypatch.setattr(matmul, "_pays", lambda *factors: paid.append(pays(*factors)) or paid[-1])
    library = matmul._override()
    yield paid
    library._destroy()
    matmul._override.cache_clear()


def test_a_layer_computes_the_same_forward_and_backward(overridden):
    layer, rows = torch.nn.Linear(256, 384, bias=False), torch.randn(4, 256, 256, requires_grad=True)
    layer(rows).square().sum().backward()
    assert sorted(overridden) == [False, True, True]  # the weight's gradient has a transposed left factor
    exact, weight = rows.detach().double().requires_grad_(), layer.weight.detach().double().requires_grad_()
    torch.nn.functional.linear(exact, weight).square().sum().backward()
    torch.testing.assert_close(rows.grad.double(), exact.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(layer.weight.grad.double(), weight.grad, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    ("left", "right"),
    [
        (torch.randn(8, 8), torch.randn(8, 8)),
        (torch.randn(512, 512).bfloat16(), torch.randn(512, 512).bfloat16()),
        (torch.randn(512, 1024)[:, ::2], torch.randn(512, 512)),
        (torch.randn(512, 512), torch.randn(512, 1024)[:, ::2]),
        (torch.randn(0, 512), torch.randn(512, 512)),
        (torch.randint(0, 9, (300, 300)), torch.randint(0, 9, (300, 300))),
        (torch.randn(512, 512).double(), torch.randn(512, 512).double()),
    ],
    ids=["small", "bf16", "strided left", "strided right", "empty", "integers", "fp64"],
)
def test_other_products_are_torchs_own(overridden, left, right):
    expected = (left.double() @ right.double()).to(left.dtype)
    overridden.clear()
    got = torch.mm(left, right)
    assert overridden == [False]
    assert got.dtype == left.dtype
    tolerance = 1e-1 if left.dtype == torch.bfloat16 else 1e-4
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


def test_products_are_bit_equal_from_one_time_to_the_next(overridden):
    left, right = torch.randn(700, 300), torch.randn(300, 500)
    assert torch.equal(left @ right, left @ right)
    assert overridden == [True, True]


@pytest.mark.parametrize(
    ("cpuinfo", "capability", "slow"),
    [(AMD, "AVX512", True), (AMD, "AVX2", False), (INTEL, "AVX512", False), (None, "AVX512", False)],
)
def test_only_amds_with_avx_512_need_it(tmp_path, monkeypatch, cpuinfo, capability, slow):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    if cpuinfo:
        (tmp_path / "cpuinfo").write_text(cpuinfo)
    assert matmul._mkl_is_slow(tmp_path / "cpuinfo") is slow
