"""The GPU's decoding and drawing kernels, run on the CPU by Triton's interpreter, against what a CPU uses."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tokenizer.common.device import has_triton

ROOT = Path(__file__).parents[1]

DECODE = """
import torch
from autoregressive import decode_kernel
from autoregressive.attention import FP8, KVCache, attend_by_slot

decode_kernel.KEYS_PER_SPLIT, decode_kernel.KEYS_AT_ONCE = 16, 8  # small, so that rows have many splits
torch.manual_seed(0)
for width, dtype in ((24, torch.float32), (16, torch.bfloat16)):
    slots, streams, heads, places = 5, 2, 1, 40
    k, v = torch.randn(2, slots, streams, heads, places, width).to(dtype)
    q_new, k_new, v_new = torch.randn(slots * streams, 3, heads, width).to(dtype).unbind(1)  # parts of one projection
    position = torch.tensor([0, 15, 16, 35, 39])  # one key; a full split; one key more; three splits; the last place
    ours_k, ours_v = k.clone(), v.clone()
    mixed = decode_kernel.attend_decode(q_new, k_new, v_new, ours_k, ours_v, position)
    each = torch.arange(slots)
    k[each, :, :, position] = k_new.unflatten(0, (slots, streams))
    v[each, :, :, position] = v_new.unflatten(0, (slots, streams))
    assert torch.equal(ours_k, k) and torch.equal(ours_v, v), "the new token is written, nothing else"
    wanted = attend_by_slot(q_new.unflatten(0, (slots, streams)).float(), k.float(), v.float(), (position + 1).tolist())
    gap = (mixed.float() - wanted.flatten(0, 1)).abs().max().item()
    assert gap < (1e-6 if dtype == torch.float32 else 8e-3), (width, dtype, gap)

    position[[0, 1, 2, 4]] = torch.tensor([20, 3, 32, 17])  # other neighbours
    again = decode_kernel.attend_decode(q_new, k_new, v_new, ours_k, ours_v, position)
    assert torch.equal(again[6:8], mixed[6:8]), "a row's result is its own, to the bit"

    exact, fp8 = (KVCache(1, heads, width, slots, streams, places, kind) for kind in (FP8, FP8))
    for cache in (exact, fp8):
        cache.k_SGhQe[0].copy_(k.float().to(FP8)), cache.v_SGhQe[0].copy_(v.float().to(FP8))
    k_new, v_new = (x.to(FP8).to(dtype) for x in (k_new, v_new))  # the interpreter rounds 0.49 to 0.25, a GPU does not
    k_new[0] = 1e4  # beyond the range
    wanted = exact.step(0, q_new.float(), k_new.float(), v_new.float(), position, (position + 1).tolist())
    mixed = decode_kernel.attend_decode(q_new, k_new, v_new, fp8.k_SGhQe[0], fp8.v_SGhQe[0], position)
    for ours, theirs in ((fp8.k_SGhQe[0], exact.k_SGhQe[0]), (fp8.v_SGhQe[0], exact.v_SGhQe[0])):
        assert torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8)) and ours.float().isfinite().all()
    gap = (mixed.float() - wanted).abs().max().item()
    assert gap < (1e-6 if dtype == torch.float32 else 8e-3), (width, dtype, gap)
"""

DRAW = """
import torch
from autoregressive.draw_kernel import draw_fused
from autoregressive.logits import draw_ids, guide, gumbel, id_words

torch.manual_seed(0)
slots, num_ids = 5, 150
key_S2, position_S = torch.randint(2**32, (slots, 2)), torch.arange(slots) * 300
scale_S, drawn = torch.tensor([1.0, 2.25, 0.5, 0.0, 3.0]), set()
cuts = ((1.0, 0, 1.0), (0.7, 5, 1.0), (1.3, 1, 1.0), (1.0, 0, 0.8), (1.1, 20, 0.6), (1.0, 0, 1e-6))
for streams, dtype in ((1, torch.float32), (2, torch.bfloat16)):
    padded_SGV = (2 * torch.randn(slots, streams, num_ids + 2)).to(dtype)
    padded_SGV[2] = padded_SGV[2].round()  # many ties
    logits_SGV = padded_SGV[:, :, :num_ids]  # rows lie apart, as those of the padded head
    bias_SV = torch.zeros(slots, num_ids).masked_fill(torch.rand(slots, num_ids) < 0.3, -torch.inf)
    bias_SV[3] = torch.where(torch.arange(num_ids) < 140, -torch.inf, 0)  # few ids are allowed
    noise_SV = gumbel(key_S2, position_S, id_words(num_ids))
    for cut in cuts:
        wanted_S = draw_ids(guide(logits_SGV, scale_S), bias_SV, noise_SV, *cut)
        ours_S = draw_fused(logits_SGV, scale_S, bias_SV, key_S2, position_S, *cut)
        assert torch.equal(ours_S, wanted_S), (streams, cut, ours_S, wanted_S)
        drawn.add(tuple(ours_S.tolist()))
assert len(drawn) > 7, "cuts change what is drawn"
"""


@pytest.mark.skipif(not has_triton(), reason="triton is not installed")
@pytest.mark.parametrize("code", [DECODE, DRAW], ids=["split attention", "fused draw"])
def test_a_kernel_equals_the_reference(code: str) -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=environment)
    assert result.returncode == 0, result.stderr


@pytest.mark.skipif(not has_triton(), reason="triton is not installed")
def test_kernels_build_for_a_gpu_that_is_not_here() -> None:
    """sm_90: the interpreter accepts what the compiler does not. The cache in 8 bits, and a draw that cuts nothing."""
    import triton
    from triton.backends.compiler import GPUTarget

    from autoregressive import decode_kernel, draw_kernel

    kinds = {"q": "*bf16", "k": "*bf16", "v": "*bf16", "cached_k": "*fp8e4nv", "cached_v": "*fp8e4nv", "scale": "fp32"}
    kinds |= dict.fromkeys(("part_mixed", "part_top", "part_total"), "*fp32") | {"position": "*i64"}
    sizes = {"width": 64, "padded_width": 64, "keys_at_once": 64, "keys_per_split": 256}
    build(triton, decode_kernel._attend_split, kinds, sizes, GPUTarget("cuda", 90, 32))
    kinds = {"logits": "*bf16", "scale": "*fp32", "bias": "*fp32", "temperature": "fp32", "top_p": "fp32"}
    kinds |= dict.fromkeys(("key", "position", "drawn"), "*i64")
    sizes = {"streams": 2, "block": 1024, "cuts_k": False, "cuts_p": False}
    build(triton, draw_kernel._draw, kinds, sizes, GPUTarget("cuda", 90, 32))


def build(triton: Any, kernel: Any, kinds: dict[str, str], sizes: dict[str, int], target: Any) -> None:
    """kinds: of the arguments that are no int32."""
    signature = {name: "constexpr" if name in sizes else kinds.get(name, "i32") for name in kernel.arg_names}
    source = triton.compiler.ASTSource(fn=kernel, signature=signature, constexprs=sizes)
    assert triton.compile(source, target=target, options={"num_warps": 4}).asm["cubin"]
