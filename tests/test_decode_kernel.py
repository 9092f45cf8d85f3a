"""The GPU's decoding kernel, run on the CPU by Triton's interpreter, against the attention that a CPU uses."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tokenizer.common.device import has_triton

ROOT = Path(__file__).parents[1]

CODE = """
import torch
from autoregressive import decode_kernel
from autoregressive.attention import attend_by_slot

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
"""


@pytest.mark.skipif(not has_triton(), reason="triton is not installed")
def test_split_attention_equals_the_reference() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    result = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, cwd=ROOT, env=environment)
    assert result.returncode == 0, result.stderr
