"""What stays true of the tokenizer, whatever the assignment: properties (a), (c), (d), (f), streaming, images, sizes.

The model is small and untrained; every clip is noise, so that nothing is alike by chance. Lengths never go below 16
tokens a clip: matrix products of a handful of rows take another path in BLAS, which rounds differently.
"""

import itertools
import json
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tokenizer import presets
from tokenizer.assignment import pack
from tokenizer.blocks.attention import Attention
from tokenizer.blocks.patches import patchify, pooling_pyramid
from tokenizer.common.errors import UserError
from tokenizer.common.hub import parameters_by_part
from tokenizer.common.image_quality import psnr
from tokenizer.data.clips import DataConfig, build_dataset
from tokenizer.model import TokenizerConfig, TokenizerOutput, TransformerConfig, VideoTokenizer
from tokenizer.presets import PRESETS, build_tokenizer
from tokenizer.streaming import reconstruct_streaming

TINY = TokenizerConfig(
    size=32,
    levels=[4, 8, 16, 32],
    codebook_size=64,
    bottleneck_width=16,
    encoder=TransformerConfig(layers=2, width=32, heads=2),
    decoder=TransformerConfig(layers=2, width=48, heads=4),
    init="random",  # where all branches are heard; the structured start is silent in most of them
)
LENGTHS = torch.tensor([[4, 32, 8, 16], [16, 16, 16, 16], [32, 4, 4, 8]])


@pytest.fixture(scope="module")
def model() -> VideoTokenizer:
    torch.manual_seed(0)
    return VideoTokenizer(TINY).eval()


@pytest.fixture(scope="module")
def video() -> Tensor:
    return torch.rand(3, 3, 16, 32, 32, generator=torch.Generator().manual_seed(1))


def largest_difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


def run(model: VideoTokenizer, video_BCTHW: Tensor, length_BN: Tensor) -> tuple[Tensor, list[list[Tensor]]]:
    """Frames and, for each clip and block, the codes, by the packed forward."""
    with torch.no_grad():
        output = model(video_BCTHW, length_BN)
    return output.video_BCTHW, pack(length_BN).unpack(output.quantized.code_L)


# --- (a) neighbours, (c) codes are all, (d) causality, (f) packing --------------------------------------------------


def test_a_clip_does_not_depend_on_its_neighbours(model: VideoTokenizer, video: Tensor) -> None:
    frames, codes = run(model, video, LENGTHS)
    for order in ([0], [1], [2], [2, 0], [1, 2, 0], [0, 0, 1, 2]):
        some_frames, some_codes = run(model, video[order], LENGTHS[order])
        for place, clip in enumerate(order):
            assert all(map(torch.equal, some_codes[place], codes[clip]))
            torch.testing.assert_close(some_frames[place], frames[clip], rtol=1e-5, atol=1e-6)


def test_codes_and_lengths_alone_give_the_forwards_reconstruction(model: VideoTokenizer, video: Tensor) -> None:
    frames, codes = run(model, video, LENGTHS)
    tokens = model.encode(video, LENGTHS)
    assert torch.equal(tokens.code_L, torch.cat([block for blocks in codes for block in blocks]))
    assert torch.equal(tokens.length_BN, LENGTHS)
    assert torch.equal(model.decode(tokens), frames.clamp(0, 1))


@pytest.mark.parametrize("t", [0, 1, 2])
def test_later_frames_change_nothing_before_them(
    model: VideoTokenizer, video: Tensor, t: int, record_property: Callable[[str, object], None]
) -> None:
    """Bit for bit, and not even NaN gets through."""
    frames, codes = run(model, video, LENGTHS)
    seen = (t + 1) * TINY.patch_frames
    for poison in (torch.nan, torch.inf, 0.3):
        other = video.clone()
        other[:, :, seen:] = poison
        other_frames, other_codes = run(model, other, LENGTHS)
        record_property("largest_difference", largest_difference(other_frames[:, :, :seen], frames[:, :, :seen]))
        assert torch.equal(other_frames[:, :, :seen], frames[:, :, :seen])
        assert not torch.equal(other_frames[:, :, seen:], frames[:, :, seen:])
        for clip, other_clip in zip(codes, other_codes, strict=True):
            assert all(map(torch.equal, clip[: t + 1], other_clip[: t + 1]))


@pytest.mark.parametrize("t", [0, 1, 2])
@pytest.mark.parametrize("level", TINY.levels)
def test_later_lengths_change_nothing_before_them(model: VideoTokenizer, video: Tensor, t: int, level: int) -> None:
    """Bit for bit, also where the change makes the whole batch regular, so that attention takes its other path."""
    seen = (t + 1) * TINY.patch_frames
    for length_BN in (LENGTHS, LENGTHS[1].expand(3, -1)):
        frames, codes = run(model, video, length_BN)
        other = length_BN.clone()
        other[:, t + 1 :] = level
        other_frames, other_codes = run(model, video, other)
        assert torch.equal(other_frames[:, :, :seen], frames[:, :, :seen])
        for clip, other_clip in zip(codes, other_codes, strict=True):
            assert all(map(torch.equal, clip[: t + 1], other_clip[: t + 1]))


def test_packed_equals_one_clip_at_a_time_forward_and_gradients(model: VideoTokenizer, video: Tensor) -> None:
    aim = torch.randn(video.shape, generator=torch.Generator().manual_seed(2))

    def objective(output: TokenizerOutput, aim_BCTHW: Tensor) -> Tensor:
        """A sum over clips, so that the gradients of single clips add up to the batch's."""
        return (output.video_BCTHW * aim_BCTHW).sum() + output.quantized.latent_LE.pow(3).sum()

    def gradients() -> dict[str, Tensor]:
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    model.zero_grad()
    packed = model(video, LENGTHS)
    objective(packed, aim).backward()
    packed_grads = gradients()

    model.zero_grad()
    single = [model(video[b : b + 1], LENGTHS[b : b + 1]) for b in range(3)]
    for b, output in enumerate(single):
        objective(output, aim[b : b + 1]).backward()
    torch.testing.assert_close(packed.video_BCTHW, torch.cat([output.video_BCTHW for output in single]))
    assert torch.equal(packed.quantized.code_L, torch.cat([output.quantized.code_L for output in single]))
    single_grads = gradients()
    model.zero_grad()
    assert (
        packed_grads.keys()
        == single_grads.keys()
        == dict(model.named_parameters()).keys()
        - {
            "quantizer.codebook.weight"  # straight-through: only the loss terms move the codes
        }
    )
    largest = max(float(grad.abs().max()) for grad in packed_grads.values())
    for name, grad in packed_grads.items():  # those of the keys' biases are zero but for rounding, so atol is common
        torch.testing.assert_close(grad, single_grads[name], rtol=1e-4, atol=1e-6 * largest, msg=name)


# --- streaming, images, sizes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("lengths", [[4, 32, 8, 16], [32, 4, 4, 4], [16, 16, 16, 16]])
def test_streaming_equals_forward(
    model: VideoTokenizer, video: Tensor, lengths: list[int], record_property: Callable[[str, object], None]
) -> None:
    frames, codes = run(model, video, torch.tensor(lengths).expand(3, -1))
    stream_frames, stream_codes = reconstruct_streaming(model, video, lengths)
    assert torch.equal(stream_codes, torch.stack([torch.cat(blocks) for blocks in codes]))
    torch.testing.assert_close(stream_frames, frames.clamp(0, 1), rtol=1e-4, atol=1e-5)
    record_property("largest_difference", largest_difference(stream_frames, frames.clamp(0, 1)))


def test_one_block_makes_an_image_tokenizer() -> None:
    """The paper's image levels on its 16x16 grid; 96, 192 and 384 are no powers of two."""
    torch.manual_seed(0)
    config = TokenizerConfig(
        num_frames=1,
        patch_frames=1,
        size=32,
        patch_size=2,
        levels=[32, 64, 96, 128, 192, 256, 384, 512],
        codebook_size=32,
        bottleneck_width=8,
        encoder=TransformerConfig(layers=1, width=16, heads=2),
        decoder=TransformerConfig(layers=1, width=16, heads=2),
    )
    model = VideoTokenizer(config)
    assert model.space.num_rows == 8
    image = torch.rand(8, 3, 1, 32, 32)
    tokens = model.encode(image, model.space.table_AN)
    assert tokens.length_BN.flatten().tolist() == config.levels
    assert model.decode(tokens).shape == image.shape
    for b, level in enumerate(config.levels):
        alone = model.encode(image[b], budget=f"uniform:{level}")
        assert torch.equal(alone.code_L, tokens.clip(b).code_L)
        _, streamed = reconstruct_streaming(model, image[b : b + 1], [level])
        assert torch.equal(streamed[0], alone.code_L)
    model(image, model.space.table_AN).video_BCTHW.square().sum().backward()
    assert all(
        p.grad is not None and bool(p.grad.isfinite().all()) for n, p in model.named_parameters() if "code" not in n
    )


def test_number_of_parameters_by_part() -> None:
    with torch.device("meta"):
        small_base, mini = (parameters_by_part(VideoTokenizer(PRESETS[name])) for name in ("VQ_SB", "VQ_mini"))
    assert 144e6 < sum(small_base.values()) < 146e6
    # 6 layers of 512 and 12 of 768: 16 D^2 of matrices a layer, and the vectors
    assert small_base["encoder"] == 6 * (16 * 512**2 + 19 * 512)
    assert small_base["decoder"] == 12 * (16 * 768**2 + 19 * 768)
    assert small_base["positions"] == (1024 + 4 * 512) * (512 + 768)
    assert small_base["quantizer"] == 16384 * 8
    assert 1.4e6 < sum(mini.values()) < 1.5e6


def test_the_list_of_presets(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["presets", "--json"])
    presets.main()
    listing = json.loads(capsys.readouterr().out)
    assert listing.keys() == PRESETS.keys() | {"router", "router_vjepa2"}
    assert round(listing["router_vjepa2"]["total"] / 1e6, 1) == 19.9
    assert all(entry["total"] == sum(entry["parts"].values()) for entry in listing.values())
    monkeypatch.setattr("sys.argv", ["presets"])
    presets.main()
    assert f"VQ_SB: {listing['VQ_SB']['total'] / 1e6:.2f}M" in capsys.readouterr().out


# --- how it begins --------------------------------------------------------------------------------------------------


def test_positions_and_attention_start_near() -> None:
    fresh = build_tokenizer(replace(TINY, init="structured"))
    for module in fresh.modules():
        if isinstance(module, Attention):
            assert torch.equal(module.to_k.weight, module.to_q.weight)
    patch_pos, token_pos = (pos.unflatten(0, (4, -1)) for pos in (fresh.encoder_patch_pos, fresh.encoder_token_pos))
    torch.testing.assert_close(token_pos[:, :2], patch_pos.mean(dim=1, keepdim=True).expand(-1, 2, -1))
    torch.testing.assert_close(token_pos[:, 16:], patch_pos)  # the last group is one query a patch
    torch.testing.assert_close(token_pos, pooling_pyramid(patch_pos, (4, 4)))


@pytest.mark.parametrize("heads", [1, 4])
def test_every_head_of_the_decoder_looks_first_at_the_token_of_its_own_place(heads: int) -> None:
    """Whatever patches and tokens hold: at the start, content is not among what queries and keys read."""
    config = TokenizerConfig(size=64, levels=[8, 128], decoder=TransformerConfig(3, 128, heads))
    fresh = build_tokenizer(config)
    packing, content = pack(torch.full((1, 4), 128)), torch.zeros(128)
    content[[*range(config.code_width - 1), -2, -1]] = 5.0
    with torch.no_grad():
        for layer in fresh.decoder:
            own_MD = layer.norm_cross(content) + fresh.decoder_patch_pos
            q_Mhe = layer.cross_attention.queries(own_MD)
            token_LD = -3 * content + fresh.decoder_token_pos[fresh._token_rows(packing)]
            k_Lhe, _ = layer.cross_attention.keys_values(token_LD, token_LD)
            score_hMNK = torch.einsum("mhe,lhe->hml", q_Mhe, k_Lhe).unflatten(2, (4, 128))
            finest_hMN = score_hMNK[..., 64:].flatten(2).argmax(dim=2)  # the last half is one token a patch
            assert torch.equal(finest_hMN, torch.arange(256).expand(heads, -1))


def test_heads_without_coefficients_see_their_surroundings_and_learn() -> None:
    """A softmax that picks one key passes no gradient to queries and keys; heads would stay where they start."""
    config = TokenizerConfig(size=64, levels=[8, 128], decoder=TransformerConfig(3, 128, 4))
    fresh = build_tokenizer(config)
    packing = pack(torch.full((1, 4), 128))
    for layer in fresh.decoder:
        for attention, wide in ((layer.self_attention, range(4)), (layer.cross_attention, range(1, 4))):
            key_pos = fresh.decoder_patch_pos if attention is layer.self_attention else fresh.decoder_token_pos
            keys = key_pos if attention is layer.self_attention else key_pos[fresh._token_rows(packing)]
            q_Mhe = attention.queries(fresh.decoder_patch_pos)
            k_Lhe, _ = attention.keys_values(keys, keys)
            share_hML = (torch.einsum("mhe,lhe->hml", q_Mhe, k_Lhe) / q_Mhe.shape[-1] ** 0.5).softmax(dim=-1)
            seen_h = (-(share_hML * share_hML.log()).sum(dim=-1)).mean(dim=1).exp()  # keys, by entropy
            assert all(seen_h[head] > 4 for head in wide), seen_h


def test_an_untrained_tokenizer_already_is_a_coarse_codec() -> None:
    config = TokenizerConfig(
        size=64, levels=[8, 32, 128], encoder=TransformerConfig(2, 96, 4), decoder=TransformerConfig(3, 128, 4)
    )
    torch.manual_seed(0)
    fresh = build_tokenizer(config)
    clips = build_dataset(DataConfig(["bundled:heldout"], size=64, augment=False))
    real = torch.stack([clips.get(i).video_CTHW for i in (0, 12, 25)])
    reached = [psnr(real.mean(dim=(2, 3, 4), keepdim=True).expand_as(real), real).mean()]
    with torch.no_grad():
        for level in config.levels:
            packing = pack(torch.full((3, 4), level))
            latent_LE = F.normalize(fresh.encode_latents(real, packing), dim=-1)  # what quantising keeps
            reached.append(psnr(fresh.decode_latents(latent_LE, packing).clamp(0, 1), real).mean())
    assert all(after > before + 0.5 for before, after in itertools.pairwise(reached)), reached
    assert reached[-1] > reached[0] + 6, reached


def test_tokens_of_one_grid_show_more_than_those_of_a_pyramid() -> None:
    """Half of a pyramid's tokens repeat the others. Second tokens of a cell add finer coefficients."""
    clips = build_dataset(DataConfig(["bundled:heldout"], size=64, augment=False))
    real = torch.stack([clips.get(i).video_CTHW for i in (0, 12, 25)])
    reached: dict[str, list[float]] = {}
    for queries in ("pyramid", "grid"):
        config = TokenizerConfig(
            size=64, levels=[8, 32, 64, 128], encoder=TransformerConfig(2, 96, 4), decoder=TransformerConfig(3, 128, 4)
        )
        torch.manual_seed(0)
        fresh = build_tokenizer(replace(config, queries=queries))
        with torch.no_grad():
            for level in config.levels:
                packing = pack(torch.full((3, 4), level))
                latent_LE = F.normalize(fresh.encode_latents(real, packing), dim=-1)
                shown = fresh.decode_latents(latent_LE, packing).clamp(0, 1)
                reached.setdefault(queries, []).append(psnr(shown, real).mean().item())
    assert all(grid > pyramid + 0.5 for grid, pyramid in zip(reached["grid"], reached["pyramid"], strict=True)), reached
    assert reached["grid"][3] > reached["grid"][2] + 0.5, reached


@pytest.mark.parametrize("levels", [[2, 4, 8], [4, 8, 16, 32]])
def test_queries_of_one_grid_stream_as_they_encode_and_leave_neighbours_alone(levels: list[int]) -> None:
    model = build_tokenizer(replace(TINY, queries="grid", levels=levels, init="structured")).eval()
    assert (model.second_embed is not None) == (levels[-1] > 16)  # 4x4 patches
    clips = torch.rand(2, 3, 16, 32, 32)
    lengths = torch.tensor(
        [[levels[-1], levels[0], levels[1], levels[2]], [levels[0], levels[-1], levels[2], levels[1]]]
    )
    with torch.no_grad():
        both = model.decode(model.encode(clips, lengths))
        alone = model.decode(model.encode(clips[:1], lengths[:1]))
        torch.testing.assert_close(both[:1], alone, atol=1e-5, rtol=0)
        frames, _ = reconstruct_streaming(model, clips[:1], lengths[0].tolist())
    torch.testing.assert_close(frames, alone, atol=1e-4, rtol=0)


def test_the_random_start_is_the_ablation() -> None:
    fresh = build_tokenizer(TINY)
    assert fresh.encoder_patch_pos.std().item() == pytest.approx(32**-0.5, rel=0.1)
    attention = next(module for module in fresh.modules() if isinstance(module, Attention))
    assert not torch.allclose(attention.to_k.weight, attention.to_q.weight)


def test_the_random_start_is_grey(video: Tensor) -> None:
    frames, _ = run(build_tokenizer(TINY), video, LENGTHS)
    assert (frames - 0.5).abs().mean() < 0.2
    assert frames.shape == video.shape and frames.dtype == torch.float32


# --- what users call ------------------------------------------------------------------------------------------------


class _Chooser:
    """Stands in for a router."""

    def assign(self, video_BCTHW: Tensor, budget: str = "router", price: float | None = None) -> Tensor:
        return torch.full((len(video_BCTHW), 4), {"router": 8, "tokens:64": 16}[budget])


def test_encode_takes_lengths_a_budget_or_a_router(model: VideoTokenizer, video: Tensor) -> None:
    assert model.encode(video, LENGTHS).length_BN.tolist() == LENGTHS.tolist()
    assert model.encode(video, budget="uniform:16").length_BN.tolist() == [[16] * 4] * 3
    assert model.encode(video[0], budget="fixed:4,8,16,32").length_BN.tolist() == [[4, 8, 16, 32]]
    assert model.encode(video, router=_Chooser()).length_BN.tolist() == [[8] * 4] * 3
    assert model.encode(video, router=_Chooser(), budget="tokens:64").length_BN.tolist() == [[16] * 4] * 3


def test_encode_says_what_does_not_fit(model: VideoTokenizer, video: Tensor) -> None:
    with pytest.raises(UserError, match=r"a clip must be \[3, 16, 32, 32\].*got \[3, 8, 32, 32\]"):
        model.encode(video[:, :, :8], LENGTHS)
    with pytest.raises(UserError, match="floats in .0, 1., got torch.uint8"):
        model.encode((video * 255).byte(), LENGTHS)
    with pytest.raises(UserError, match="3 clips but lengths for 2"):
        model.encode(video, LENGTHS[:2])
    with pytest.raises(UserError, match=r"length 5 is none of the levels \[4, 8, 16, 32\]"):
        model.encode(video, LENGTHS + 1)
    with pytest.raises(UserError, match="needs a router"):
        model.encode(video, budget="tokens:64")
    with pytest.raises(UserError, match="give length_BN, or router"):
        model.encode(video)


def test_a_clip_of_one_colour_is_embedded_like_another_of_its_shape(model: VideoTokenizer) -> None:
    """Pixels are centred on the way in: grey is zero, so its embedding is the bias alone."""
    grey = torch.full((1, 3, 16, 32, 32), 0.5)
    assert not patchify(grey - 0.5, 4, 8).any()
    torch.testing.assert_close(model.embed_patches(grey)[0, 0], model.patch_embed.bias)
