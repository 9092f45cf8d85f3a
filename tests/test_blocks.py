"""The parts of the tokenizer on their own: attention, patches, pooled queries, positions."""

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from tokenizer.assignment import Packing, pack, pack_uniform
from tokenizer.blocks.attention import attend_by_clip, attend_varlen, block_causal_attention
from tokenizer.blocks.patches import (
    level_cells,
    level_rows,
    most_queries,
    packed_queries,
    patchify,
    pooling_pyramid,
    sincos_3d,
    unpatchify,
    waves_3d,
)

UNEQUAL = pack(torch.tensor([[3, 1, 2], [1, 4, 1], [2, 2, 2]]))
EQUAL = pack(torch.tensor([[3, 1, 2]] * 3))
PATCHES = pack_uniform(3, 3, 4)
PAIRS = {  # queries, keys: the four attentions of the tokenizer, for equal and for unequal assignments
    "encoder self": (UNEQUAL, UNEQUAL),
    "encoder cross": (UNEQUAL, PATCHES),
    "decoder self": (PATCHES, PATCHES),
    "decoder cross": (PATCHES, UNEQUAL),
    "encoder self, equal": (EQUAL, EQUAL),
    "decoder cross, equal": (PATCHES, EQUAL),
}


def tensors(query: Packing, key: Packing, heads: int = 2, width: int = 8) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    counts = (query.num_tokens, key.num_tokens, key.num_tokens)
    return [torch.randn(n, heads, width, generator=generator).requires_grad_() for n in counts]


def attend_masked(q_Lhe: Tensor, k_She: Tensor, v_She: Tensor, query: Packing, key: Packing) -> Tensor:
    """What block-causal means, written down as a dense mask over the whole batch."""
    same_clip = query.clip_L[:, None] == key.clip_L[None, :]
    not_later = query.block_L[:, None] >= key.block_L[None, :]
    q, k, v = (x.transpose(0, 1) for x in (q_Lhe, k_She, v_She))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=same_clip & not_later).transpose(0, 1)


def reference_kernel(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, causal: bool
) -> Tensor:
    """What a variable-length kernel computes, in a loop on any device."""
    assert not causal
    assert cu_q.dtype == cu_k.dtype == torch.int32
    assert (int(cu_q.diff().max()), int(cu_k.diff().max())) <= (max_q, max_k)
    assert (int(cu_q[-1]), int(cu_k[-1])) == (len(q), len(k))
    mixed = []
    for q_from, q_to, k_from, k_to in zip(cu_q[:-1], cu_q[1:], cu_k[:-1], cu_k[1:], strict=True):
        one = [x.transpose(0, 1) for x in (q[q_from:q_to], k[k_from:k_to], v[k_from:k_to])]
        mixed.append(F.scaled_dot_product_attention(*one).transpose(0, 1))
    return torch.cat(mixed)


def assert_same(ours: Callable[..., Tensor], wanted: Callable[..., Tensor], query: Packing, key: Packing) -> float:
    """Same output and same gradients; the largest difference of the output."""
    results = []
    for attend in (ours, wanted):
        q, k, v = tensors(query, key)
        mixed = attend(q, k, v, query, key)
        mixed.pow(3).sum().backward()
        results.append((mixed, q.grad, k.grad, v.grad))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    return float((results[0][0] - results[1][0]).abs().max())


@pytest.mark.parametrize("which", PAIRS)
def test_the_loop_is_block_causal_attention(which: str, record_property: Callable[[str, object], None]) -> None:
    record_property("largest_difference", assert_same(attend_by_clip, attend_masked, *PAIRS[which]))


@pytest.mark.parametrize("which", PAIRS)
def test_the_path_taken_equals_the_loop(which: str) -> None:
    """With gradients that is a backward per clip; without, for equal assignments, one batched call per block."""
    assert_same(block_causal_attention, attend_by_clip, *PAIRS[which])
    with torch.no_grad():
        inputs = tensors(*PAIRS[which])
        mixed = [attend(*inputs, *PAIRS[which]) for attend in (block_causal_attention, attend_by_clip)]
        torch.testing.assert_close(*mixed)


@pytest.mark.parametrize("which", PAIRS)
def test_variable_length_attention_equals_the_loop(which: str) -> None:
    def attend(*args: Any) -> Tensor:
        return attend_varlen(*args, kernel=reference_kernel)

    assert_same(attend, attend_by_clip, *PAIRS[which])


def test_half_precision_on_a_cpu_keeps_its_type_and_its_gradients() -> None:
    query, key = pack(torch.tensor([[8, 2, 16, 1], [4, 4, 8, 32]])), pack_uniform(2, 4, 16)
    torch.manual_seed(0)
    half = [torch.randn(p.num_tokens, 2, 8, dtype=torch.bfloat16, requires_grad=True) for p in (query, key, key)]
    exact = [x.detach().double().requires_grad_() for x in half]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed_Lhe = block_causal_attention(*half, query, key)
    assert mixed_Lhe.dtype == torch.bfloat16
    ours = torch.autograd.grad(mixed_Lhe.float().square().sum(), half)
    theirs = torch.autograd.grad(attend_by_clip(*exact, query, key).square().sum(), exact)
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).norm() < 0.01 * b.norm()


def test_torchs_kernels_are_called_as_they_want() -> None:
    """They run on CUDA alone (tests/test_gpu.py); elsewhere their arguments are what can be checked."""
    names = list(inspect.signature(varlen_attn).parameters)
    assert names[:7] == ["query", "key", "value", "cu_seq_q", "cu_seq_k", "max_q", "max_k"] and "window_size" in names
    arguments = torch.ops.aten._efficient_attention_forward.default._schema.arguments
    names = [argument.name for argument in arguments]
    assert names[3:6] == ["bias", "cu_seqlens_q", "cu_seqlens_k"]
    assert names[6:11] == ["max_seqlen_q", "max_seqlen_k", "dropout_p", "custom_mask_type", "compute_log_sumexp"]


def test_patches_go_and_come_back() -> None:
    video_BCTHW = torch.rand(2, 3, 8, 32, 32)
    patch_BMP = patchify(video_BCTHW, patch_frames=4, patch_size=8)
    assert patch_BMP.shape == (2, 2 * 4 * 4, 4 * 8 * 8 * 3)
    assert torch.equal(unpatchify(patch_BMP, 4, 8, grid=(4, 4)), video_BCTHW)
    # order (block, row, column): patch 16 + 4 + 2 is block 1, row 1, column 2
    cut = video_BCTHW[:, :, 4:8, 8:16, 16:24]
    assert torch.equal(patch_BMP[:, 16 + 4 + 2].unflatten(1, (4, 8, 8, 3)), cut.permute(0, 2, 3, 4, 1))


def test_the_pyramid_goes_from_the_mean_to_single_patches() -> None:
    patch_RMD = torch.arange(16.0).view(1, 16, 1)  # a 4x4 grid, row by row
    cells = pooling_pyramid(patch_RMD, grid=(4, 4)).flatten().tolist()
    assert len(cells) == most_queries((4, 4)) == 32
    assert cells[:2] == [7.5, 7.5]
    assert cells[2:4] == [3.5, 11.5]  # rows grow first: upper and lower half
    assert cells[4:8] == [2.5, 4.5, 10.5, 12.5]  # quarters
    assert cells[8:16] == [0.5, 2.5, 4.5, 6.5, 8.5, 10.5, 12.5, 14.5]  # 4 rows x 2 columns
    assert cells[16:] == list(range(16))


def test_a_longer_assignment_begins_with_the_queries_of_a_shorter_one() -> None:
    assert all(level_cells(2**n).tolist() == list(range(2**n)) for n in range(10))
    assert level_cells(6).tolist() == [0, 1, 2, 3, 4, 6]  # whole groups, then every second cell of the next
    assert level_rows(4, finest=8).tolist() == [4, 5, 6, 7]  # one whole group
    assert level_rows(6, finest=8).tolist() == [4, 5, 6, 7, 8, 12]  # and every fourth cell of the next
    assert level_rows(12, finest=8).tolist() == [*range(8, 16), 16, 18, 20, 22]  # second tokens have rows of their own
    assert level_cells(12, finest=8).tolist() == [*range(8, 16), 8, 10, 12, 14]
    for length in range(1, 65):
        cells = level_cells(length)
        assert len(cells.unique()) == len(cells) == length
        assert int(cells.max()) < 2 ** (length - 1).bit_length()


def test_each_query_starts_from_its_own_block() -> None:
    patch_BMD = torch.arange(3.0 * 3 * 4).view(3, 12, 1)  # 3 clips x 3 blocks of a 2x2 grid
    packing = pack(torch.tensor([[1, 8, 2], [8, 1, 4], [2, 2, 2]]))
    queries = packing.unpack(packed_queries(patch_BMD, packing, grid=(2, 2)))
    for b, blocks in enumerate(queries):
        for t, block_KD in enumerate(blocks):
            wanted = pooling_pyramid(patch_BMD[b : b + 1, 4 * t : 4 * t + 4], (2, 2))[0, level_cells(len(block_KD))]
            assert torch.equal(block_KD, wanted)


def test_positions_tell_all_places_apart() -> None:
    for width in (8, 48, 128):
        table = sincos_3d(num_blocks=4, grid=(4, 4), width=width)
        assert table.shape == (64, width) and table.abs().max() <= 1
        distance = torch.cdist(table, table) + torch.eye(64) * 9
        assert distance.min() > 0.1
        waves = [table[:, wave] for axis in waves_3d(width) for wave in axis]  # sine and cosine
        assert len(waves) > width // 4
        torch.testing.assert_close(torch.stack(waves).square().sum(dim=2), torch.ones(len(waves), 64))
    table = sincos_3d(4, (4, 4), 48).view(4, 4, 4, 48)
    near, far = (table[0, 0, 0] - table[0, 0, 1]).norm(), (table[0, 0, 0] - table[3, 3, 3]).norm()
    assert near < far
