"""The GPT: the published sizes, causality, packing, the cache, and what does not belong together."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from autoregressive.attention import (
    attend_by_length,
    attend_by_slot,
    attend_to_longest,
    attend_varlen,
    check_memory,
    free_bytes,
)
from autoregressive.model import GPT, GPTConfig
from autoregressive.presets import (
    FRAME_PREDICTION,
    PRESETS,
    TrainedGPT,
    check_tokenizer_fits,
    init_weights_from,
    load_gpt,
)
from autoregressive.sequence import BlockPositions, ClipCodes
from tokenizer.common.checkpoint import save_model
from tokenizer.common.config import to_dict
from tokenizer.common.errors import UserError
from tokenizer.common.hub import parameters_by_part
from tokenizer.presets import build_tokenizer

DEBUG = PRESETS["GPT-debug"]


@pytest.fixture(scope="module")
def gpt() -> GPT:
    """A random model whose head is not the zeros it starts with."""
    torch.manual_seed(0)
    model = GPT(DEBUG).eval()
    torch.nn.init.normal_(model.head.weight)
    return model


def random_ids(num: int, seed: int = 0) -> Tensor:
    return torch.randint(DEBUG.layout.num_input_ids, (num,), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("name", "millions"), [("GPT-B", 99.2), ("GPT-L", 327.3), ("GPT-LP", 633.3)])
def test_parameters_are_those_of_the_paper(name: str, millions: float) -> None:
    with torch.device("meta"):
        for listing in (PRESETS, FRAME_PREDICTION):
            found = [config for key, config in listing.items() if key.split(" ")[0] == name]
            for config in found:
                total = sum(parameters_by_part(GPT(config)).values())
                assert total / 1e6 == pytest.approx(millions, rel=0.005)


def test_presets_are_listed_for_machines() -> None:
    command = [sys.executable, "-m", "autoregressive.presets", "--json"]
    listing = json.loads(subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout)
    assert set(PRESETS) <= set(listing)
    for entry in listing.values():
        assert entry["total"] == sum(entry["parts"].values())


def test_two_miniatures_fit_into_20_mb() -> None:
    with torch.device("meta"):
        bytes_each = torch.bfloat16.itemsize  # as they are shipped
        assert 2 * bytes_each * sum(parameters_by_part(GPT(PRESETS["GPT-mini"])).values()) < 20e6


def test_training_starts_from_equal_probabilities() -> None:
    model = GPT(DEBUG)
    logits_LV = model(random_ids(9), [9])
    assert torch.equal(logits_LV, torch.zeros(9, DEBUG.layout.num_ids))


def test_changing_a_token_changes_nothing_before_it(gpt: GPT) -> None:
    id_L, place = random_ids(20), 12
    changed = id_L.clone()
    changed[place] = (changed[place] + 1) % DEBUG.layout.num_input_ids
    before, after = gpt(id_L, [20]), gpt(changed, [20])
    assert torch.equal(before[:place], after[:place])
    assert (before[place:] != after[place:]).any(dim=1).all()


def test_a_sequence_does_not_see_its_neighbours(gpt: GPT) -> None:
    """Forward and gradients: packed equals one sequence at a time."""
    lengths = [3, 7, 7, 12]
    parts = [random_ids(length, seed) for seed, length in enumerate(lengths)]
    weight = torch.randn(DEBUG.layout.num_ids, generator=torch.Generator().manual_seed(9))

    def gradient(packed: bool) -> tuple[Tensor, Tensor]:
        gpt.zero_grad()
        logits = gpt(torch.cat(parts), lengths) if packed else torch.cat([gpt(p, [len(p)]) for p in parts])
        (logits * weight).square().mean().backward()
        return logits.detach(), torch.cat([p.grad.flatten() for p in gpt.parameters() if p.grad is not None])

    for ours, reference in zip(gradient(True), gradient(False), strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-4, atol=1e-5)


def test_the_varlen_call_equals_the_reference() -> None:
    """A kernel with torch's signature, in plain operations: the plan is what is tested on a machine without a GPU."""

    def kernel(q, k, v, ends_q, ends_k, longest_q, longest_k, causal):
        assert torch.equal(ends_q, ends_k) and longest_q == longest_k == 7 and causal
        parts = [[x[a:b].transpose(0, 1) for x in (q, k, v)] for a, b in zip(ends_q[:-1], ends_q[1:], strict=True)]
        mixed = [F.scaled_dot_product_attention(*part, is_causal=True).transpose(0, 1) for part in parts]
        return torch.cat(mixed)

    lengths = [3, 7, 7]
    q, k, v = torch.randn(3, sum(lengths), 2, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(attend_varlen(q, k, v, lengths, kernel), attend_by_length(q, k, v, lengths))


def test_the_kernel_over_the_live_cache_equals_the_reference() -> None:
    """In Triton's interpreter, which must be asked for before the kernel is defined; on a GPU see test_gpu.py."""
    pytest.importorskip("triton")
    code = """
import torch
from autoregressive.attention import KVCache
live, position_S = [1, 64, 65, 131], torch.tensor([0, 63, 64, 130])
ours, reference = (KVCache(1, 2, 24, slots=4, streams=2, places=131) for _ in range(2))
q_Rhe, k_Rhe, v_Rhe = torch.randn(8, 3, 2, 24).unbind(1)  # parts of one projection
for cache in (ours, reference):
    torch.manual_seed(1)
    cache.k_SGhQe[0].normal_(), cache.v_SGhQe[0].normal_()
for s, num in enumerate(live):
    ours.k_SGhQe[0][s, :, :, num:] = ours.v_SGhQe[0][s, :, :, num:] = torch.nan  # what nobody may read
mixed, wanted = (c.step(0, q_Rhe, k_Rhe, v_Rhe, position_S, n) for c, n in ((ours, None), (reference, live)))
torch.testing.assert_close(mixed, wanted)
for s, num in enumerate(live):
    assert torch.equal(ours.k_SGhQe[0][s, :, :, :num], reference.k_SGhQe[0][s, :, :, :num])
    assert torch.equal(ours.v_SGhQe[0][s, :, :, :num], reference.v_SGhQe[0][s, :, :, :num])
"""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=120)
    if "only 0-dimensional arrays can be converted" in result.stderr:
        pytest.skip("Triton's interpreter is older than this NumPy")
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("streams", [1, 2])
def test_cached_decoding_equals_uncached(gpt: GPT, streams: int) -> None:
    """Two slots at different positions, one of them idle at first and prefilled later."""
    first, second = random_ids(15, 1), random_ids(14, 2)
    wanted = [gpt(first, [15]), gpt(second, [14])]
    cache = gpt.new_cache(slots=2, streams=streams)
    assert cache.num_bytes == 2 * gpt.cache_bytes_per_slot(streams)
    with torch.no_grad():
        for t in range(15):
            if t == 5:
                gpt.prefill(second[:4], 1, cache)
            live = [t + 1, t if t >= 5 else 0]  # slot 1 decodes its place 4 at t = 5
            position_S = torch.tensor([max(0, num - 1) for num in live])
            id_S = torch.stack([first[t], second[t - 1]])
            logits_SGV = gpt.step(id_S.repeat_interleave(streams), position_S, live, cache).unflatten(0, (2, streams))
            for s, num in enumerate(live):
                if num:
                    expected = wanted[s][num - 1].expand(streams, -1)
                    torch.testing.assert_close(logits_SGV[s], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("changes", [{}, {"num_classes": 0, "condition_lengths": [8, 2]}])
def test_positions_in_blocks_are_the_same_cached_and_uncached(changes: dict[str, Any]) -> None:
    """What a prefill and single steps are told of a block is what a packed sequence says of itself, and it matters."""
    torch.manual_seed(0)
    model = GPT(replace(DEBUG, block_positions=True, **changes)).eval()
    torch.nn.init.normal_(model.head.weight)
    layout, lengths = model.layout, (8, 2, 4, 2)
    codes_L = torch.randint(layout.codebook_size, (16,))
    condition_L = torch.randint(layout.codebook_size, (layout.condition_tokens,))
    id_Q = layout.encode(ClipCodes(codes_L, lengths, 3 if layout.num_classes else None, condition_L))
    wanted_QV = model(id_Q, [len(id_Q)])
    cache, positions = model.new_cache(slots=1, streams=1), BlockPositions(layout, model.device)
    with torch.no_grad():
        if len(condition_L):
            model.prefill(condition_L, 0, cache)
        inner_1 = torch.zeros(1, dtype=torch.long)
        for place in range(len(condition_L), len(id_Q)):
            if place > len(condition_L):
                inner_1 = positions.after(inner_1, id_Q[place : place + 1])
            found_1V = model.step(id_Q[place : place + 1], torch.tensor([place]), [place + 1], cache, inner_1)
            torch.testing.assert_close(found_1V[0], wanted_QV[place], rtol=1e-4, atol=1e-4)
        model.block_positions[3] += 1.0  # of the second code of four
        assert not torch.equal(model(id_Q, [len(id_Q)]), wanted_QV)


def test_attention_in_one_call_equals_slot_by_slot() -> None:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(3, 2, 2, 8, generator=generator)
    k, v = torch.randn(2, 3, 2, 2, 20, 8, generator=generator)
    for live in ([5, 1, 20], [1, 9, 3], [1, 1, 1]):
        ours = attend_to_longest(q, k, v, torch.tensor(live) - 1, longest=max(live))
        torch.testing.assert_close(ours, attend_by_slot(q, k, v, live))


def test_a_row_reads_nothing_past_what_lives() -> None:
    q, k, v = torch.randn(1, 1, 2, 8), torch.randn(1, 1, 2, 20, 8), torch.randn(1, 1, 2, 20, 8)
    before = attend_by_slot(q, k, v, [6])
    k[..., 6:, :] = v[..., 6:, :] = torch.nan
    assert torch.equal(attend_by_slot(q, k, v, [6]), before)


def test_too_many_slots_are_refused_with_the_number_that_fits() -> None:
    cpu = torch.device("cpu")
    check_memory(1, 1, cpu)
    tenth = free_bytes(cpu) // 10
    with pytest.raises(UserError, match=r"1000 slots need .* GiB .* slots would fit"):
        check_memory(1000, tenth, cpu)


def test_loading_is_strict_and_knows_the_size(gpt: GPT, tmp_path: Path) -> None:
    path = tmp_path / "gpt.safetensors"
    tokens = {"tokenizer_sha256": "ab" * 32, "class_names": ["a", "b"]}
    save_model(path, gpt.state_dict(), {"model": to_dict(DEBUG), "tokens": tokens}, {"kind": "gpt"})
    trained = load_gpt(path, size="GPT-debug")
    assert (trained.class_names, trained.tokenizer_sha256) == (("a", "b"), "ab" * 32)
    assert torch.equal(trained.model(random_ids(5), [5]), gpt(random_ids(5), [5]))
    with pytest.raises(UserError, match="but GPT-L is 24x1024x16; use --gpt-model GPT-debug"):
        load_gpt(path, size="GPT-L")
    with pytest.raises(UserError, match="no GPT size 'GPT-XL'"):
        load_gpt(path, size="GPT-XL")
    save_model(path, {}, {"model": {"encoder": {}}}, {"kind": "tokenizer"})
    with pytest.raises(UserError, match="'tokenizer', not a GPT"):
        load_gpt(path)


def test_a_gpt_for_another_tokenizer_is_refused(gpt: GPT) -> None:
    tokenizer = build_tokenizer("VQ_debug")
    check_tokenizer_fits(TrainedGPT(gpt, (), "", "", "gpt"), tokenizer)
    with pytest.raises(UserError, match="levels = \\[2, 4, 8\\], but the tokenizer's is \\[2, 4\\]"):
        check_tokenizer_fits(TrainedGPT(gpt, (), "", "", "gpt"), build_tokenizer("VQ_debug", levels=[2, 4]))
    tokenizer.sha256 = "cd" * 32
    with pytest.raises(UserError, match=r"tokenizer abababababab\.\., this one is cdcdcdcdcdcd"):
        check_tokenizer_fits(TrainedGPT(gpt, (), "ab" * 32, "", "gpt"), tokenizer)


def test_a_gpt_begins_from_one_with_other_conditions(gpt: GPT) -> None:
    """Classes by name, a new one as the open condition; positions counted from the condition on."""
    source = TrainedGPT(gpt, tuple("abcdefghijk"), "ab" * 32, "cd" * 32, "source")
    ours = GPT(replace(DEBUG, num_classes=3)).eval()
    done = init_weights_from(ours, ("k", "new", "b"), "ab" * 32, source)
    assert done.endswith("37 of 37 positions, 2 of 3 classes, everything else")
    length, codes = DEBUG.layout.length_id(2), [5, 3]
    for label, number in ((0, 10), (1, None), (2, 1), (None, None)):
        begun, known = (
            model(torch.tensor([model.layout.condition_id(of), length, *codes]), [4])
            for model, of in ((ours, label), (gpt, number))
        )
        assert torch.equal(begun, known)

    frames = GPT(replace(DEBUG, num_classes=0, condition_lengths=[4, 2]))
    before = frames.positions.detach().clone()
    given = 6
    done = init_weights_from(frames, (), "ab" * 32, source)
    assert done.endswith(f"{len(before) - given} of {len(before)} positions, 0 of 0 classes, everything else")
    assert torch.equal(frames.positions[:given], before[:given])
    assert torch.equal(frames.positions[given:], gpt.positions[: len(before) - given])
    assert torch.equal(frames.embedding.weight[frames.layout.open_id], gpt.embedding.weight[gpt.layout.open_id])
    back = GPT(DEBUG)
    init_weights_from(back, source.class_names, "ab" * 32, TrainedGPT(frames, (), "ab" * 32, "", "frames"))
    assert torch.equal(back.positions[: len(before) - given], gpt.positions[: len(before) - given])


@pytest.mark.parametrize(
    ("changes", "tokenizer_sha256", "words"),
    [
        ({"width": 64}, "ab" * 32, r"init_from=source has width = 32, but model.width = 64"),
        ({"levels": [2, 4]}, "ab" * 32, r"has levels = \[2, 4, 8\], but model.levels = \[2, 4\]"),
        ({}, "cd" * 32, r"codes of tokenizer abababababab\.\., this run has those of cdcdcdcdcdcd\.\."),
    ],
)
def test_a_gpt_does_not_begin_from_what_does_not_fit(
    gpt: GPT, changes: dict[str, Any], tokenizer_sha256: str, words: str
) -> None:
    source = TrainedGPT(gpt, (), "ab" * 32, "", "source")
    with pytest.raises(UserError, match=words):
        init_weights_from(GPT(replace(DEBUG, **changes)), (), tokenizer_sha256, source)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"heads": 5}, "multiple of heads = 5"),
        ({"dropout": 1.0}, "dropout = 1.0"),
        ({"condition_lengths": [3]}, "length 3 is none of the levels"),
    ],
)
def test_impossible_shapes_are_refused(changes: dict, words: str) -> None:
    with pytest.raises(UserError, match=words):
        GPTConfig(**changes)


def test_the_padded_head_is_made_once_for_the_same_weights(gpt: GPT) -> None:
    with torch.no_grad():
        padded = gpt.padded_head()
        assert len(padded) % 8 == 0 and torch.equal(padded[: gpt.layout.num_ids], gpt.head.weight)
        assert not padded[gpt.layout.num_ids :].any() and gpt.padded_head() is padded
        gpt.head.weight.mul_(2)
        assert torch.equal(gpt.padded_head()[: gpt.layout.num_ids], gpt.head.weight)
        gpt.head.weight.div_(2)
    assert gpt.padded_head().requires_grad
