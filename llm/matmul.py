"""Matrix products in fp32 by oneDNN where torch's own are slow.

torch multiplies matrices in fp32 by MKL, which makes less of AMD's processors: at the shapes of a transformer 90 to
170 GFLOP/s on two cores that reach 180 to 200 by oneDNN, which torch brings along (tests/bench/LOG.md).
"""

from __future__ import annotations

import warnings
from functools import cache
from pathlib import Path

import torch
from torch import library as kernels

LEAST_FLOPS = 2**25  # of a product; below it the detour through Python costs more than oneDNN saves


def use_the_fastest() -> None:
    """From now on products in this process are by oneDNN, where the processor is one on which that is faster."""
    if _mkl_is_slow(Path("/proc/cpuinfo")):
        _override()


def _mkl_is_slow(cpuinfo: Path) -> bool:
    if not torch.backends.mkl.is_available() or "AVX512" not in torch.backends.cpu.get_cpu_capability():
        return False
    return cpuinfo.exists() and "AuthenticAMD" in cpuinfo.read_text()


@cache
def _override() -> kernels.Library:
    """Put `product` in the place of aten::mm on CPUs: what linear layers come to, forward and backward."""
    library = kernels.Library("aten", "IMPL")
    with warnings.catch_warnings(action="ignore", category=UserWarning):  # that a kernel is replaced
        library.impl("mm", product, "CPU")
    return library


def product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """The matrix product, (M, K) by (K, N)."""
    if _pays(left, right):
        return torch.ops.mkldnn._linear_pointwise(left, right.t(), None, "none", [], "")
    return torch.mm(left, right, out=left.new_empty(left.shape[0], right.shape[1]))


def _pays(left: torch.Tensor, right: torch.Tensor) -> bool:
    """oneDNN first copies a transposed left factor, by which it loses what it has gained."""
    if left.dtype != torch.float32 or not left.is_contiguous():
        return False
    flops = 2 * left.shape[0] * left.shape[1] * right.shape[1]
    return flops >= LEAST_FLOPS and (right.is_contiguous() or right.t().is_contiguous())
