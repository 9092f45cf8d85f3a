"""The decoding kernels of a CPU against torch: equal up to rounding, and a row's result is its own to the bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from autoregressive import cpu_kernel
from autoregressive.attention import KVCache

needs_compiler = pytest.mark.skipif(cpu_kernel.library() is None, reason="no C++ compiler here, torch is used")
DTYPES = [torch.float32, torch.bfloat16]


def filled_cache(dtype: torch.dtype, width: int) -> KVCache:
    cache = KVCache(1, heads=3, head_width=width, slots=4, streams=2, places=300, dtype=dtype)
    generator = torch.Generator().manual_seed(0)
    for x_SGhQe in (*cache.k_SGhQe, *cache.v_SGhQe):
        x_SGhQe.copy_(torch.randn(x_SGhQe.shape, generator=generator))
    return cache


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [16, 32, 64, 128])
def test_attention_equals_torch(dtype: torch.dtype, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    num, position_S = [1, 0, 300, 77], torch.tensor([0, 0, 299, 76])
    generator = torch.Generator().manual_seed(1)
    q, k, v = torch.randn(8, 3, 3, width, generator=generator).to(dtype).unbind(dim=1)  # parts of one projection
    ours, torchs = filled_cache(dtype, width), filled_cache(dtype, width)
    mixed = ours.step(0, q, k, v, position_S, num)
    with monkeypatch.context() as patch:
        patch.setattr(cpu_kernel, "library", lambda: None)
        wanted = torchs.step(0, q, k, v, position_S, num)
    torch.testing.assert_close(mixed, wanted, atol=2e-6 if dtype == torch.float32 else 2e-2, rtol=0)
    busy = [0, 2, 3]
    assert torch.equal(ours.k_SGhQe[0][busy], torchs.k_SGhQe[0][busy]), "new keys are written where torch writes them"
    assert torch.equal(ours.v_SGhQe[0][busy], torchs.v_SGhQe[0][busy])
    assert mixed[2:4].eq(0).all(), "an idle slot gives 0"

    alone = filled_cache(dtype, width).step(0, q, k, v, position_S, [0, 0, 0, 77])
    assert torch.equal(alone[6:], mixed[6:]), "whatever the neighbours do"


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("outputs", "inputs"), [(101, 64), (16, 32), (48, 96)])
@torch.no_grad()
def test_products_of_few_rows_equal_torch(dtype: torch.dtype, outputs: int, inputs: int) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(inputs, outputs, bias=False).to(dtype)
    x_RD = torch.randn(cpu_kernel.MOST_ROWS + 1, inputs).to(dtype)
    for rows in range(1, len(x_RD) + 1):
        y_RN, exact = cpu_kernel.linear(layer, x_RD[:rows]), x_RD[:rows].double() @ layer.weight.double().T
        torch.testing.assert_close(y_RN.double(), exact, atol=1e-6 if dtype == torch.float32 else 2e-2, rtol=0)
        if 1 < rows <= cpu_kernel.MOST_ROWS and (dtype == torch.float32 or cpu_kernel._has_tiles()):
            pair = cpu_kernel.linear(layer, x_RD[[rows - 1, 0]])
            assert torch.equal(pair[0], y_RN[-1]), "independent of the number of rows and of its place among them"


@needs_compiler
def test_what_the_kernel_does_not_take_is_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    x_RD = torch.randn(4, 32)
    biased, odd = nn.Linear(32, 32), nn.Linear(20, 32, bias=False)
    with torch.no_grad():
        assert torch.equal(cpu_kernel.linear(biased, x_RD), biased(x_RD))
        assert torch.equal(cpu_kernel.linear(odd, x_RD[:, :20]), odd(x_RD[:, :20]))
    layer = nn.Linear(32, 32, bias=False)
    assert cpu_kernel.linear(layer, x_RD).requires_grad, "training goes through torch"
    assert not cpu_kernel.takes_cache(torch.zeros(1, 1, 1, 4, 24))


def test_without_a_compiler_there_is_no_kernel(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    find = cpu_kernel.library.__wrapped__
    monkeypatch.setenv("CXX", str(tmp_path / "nothing"))
    assert find() is None
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\necho no >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert find() is None
