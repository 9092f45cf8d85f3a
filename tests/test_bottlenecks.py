"""Each bottleneck against answers by hand, with its gradients; each trains; a continuous one is refused for tokens."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from autoregressive.presets import PRESETS as GPTS
from autoregressive.presets import check_vocabulary
from tokenizer.blocks.bottlenecks import Bottleneck, FiniteScalarQuantizer, KLBottleneck, NoBottleneck, VectorQuantizer
from tokenizer.common.config import load_config
from tokenizer.common.errors import UserError
from tokenizer.model import TokenizerConfig
from tokenizer.presets import build_tokenizer
from tokenizer.streaming import reconstruct_streaming
from tokenizer.train import TokenizerTrainConfig, TokenizerTraining

CHOICES = {
    "vq": {"codebook_size": 64, "code_width": 8},
    "fsq": {"bottleneck": "fsq", "fsq_levels": [4, 5, 3], "codebook_size": 60, "code_width": 3},
    "kl": {"bottleneck": "kl"},
    "none": {"bottleneck": "none"},
}
Z = torch.randn(50, 3, generator=torch.Generator().manual_seed(0))


def test_finite_scalars_by_hand() -> None:
    fsq = FiniteScalarQuantizer([3, 4])
    values = fsq.decode(torch.arange(12)).tolist()  # 3 values of the first number, then 4 of the second
    assert values == [[a, b] for b in (-1.0, -0.5, 0.0, 0.5) for a in (-1.0, 0.0, 1.0)]
    assert fsq.bits == math.log2(12)
    ends = fsq.encode(torch.tensor([[-9.0, -9.0], [0.0, 0.0], [9.0, 9.0], [0.3, 9.0], [2.0, 0.0]]))
    assert ends.tolist() == [0, 7, 11, 10, 8]
    assert set(FiniteScalarQuantizer([4, 5, 3]).encode(30 * torch.randn(2000, 3)).tolist()) <= set(range(60))


@pytest.mark.parametrize("name", CHOICES)
def test_tokens_decode_to_what_forward_gives(name: str) -> None:
    bottleneck: Bottleneck = {
        "vq": VectorQuantizer(16, 3),
        "fsq": FiniteScalarQuantizer([4, 5, 3]),
        "kl": KLBottleneck(3),
        "none": NoBottleneck(),
    }[name]
    with torch.no_grad():
        out = bottleneck(Z)
    token = bottleneck.encode(Z)
    torch.testing.assert_close(bottleneck.decode(token), out.latent_LE, rtol=0, atol=0)
    assert bottleneck.is_discrete == (token.dtype == torch.long) == math.isfinite(bottleneck.bits)
    assert torch.equal(bottleneck.encode(Z.view(5, 10, 3)).flatten(0, 1), token)


def test_gradients_of_finite_scalars_pass_the_rounding() -> None:
    z_LE = Z.clone().requires_grad_()
    fsq = FiniteScalarQuantizer([5, 5, 5])
    fsq(z_LE).latent_LE.sum().backward()
    # d/dz of tanh(z) * 2 * 0.999 / 2, as if nothing were rounded
    torch.testing.assert_close(z_LE.grad, 0.999 * (1 - Z.tanh().square()))


def test_gaussian_by_hand() -> None:
    kl, z_LE = KLBottleneck(3), Z.clone().requires_grad_()
    out = kl(z_LE, torch.Generator().manual_seed(1))
    assert torch.equal(out.latent_LE, kl(z_LE, torch.Generator().manual_seed(1)).latent_LE)
    noise = torch.randn(50, 3, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(out.latent_LE, Z + math.exp(-3) * noise)
    wanted = 0.5 * (Z.square() + math.exp(-6) - 1 + 6).sum(dim=1).mean()
    torch.testing.assert_close(out.terms["kl"], wanted)
    out.terms["kl"].backward()
    torch.testing.assert_close(z_LE.grad, Z / len(Z))
    bias = kl.to_moments.bias.grad
    assert bias is not None
    torch.testing.assert_close(bias[3:], torch.full((3,), 0.5 * (math.exp(-6) - 1)))


def test_no_bottleneck_is_the_identity() -> None:
    z_LE = Z.clone().requires_grad_()
    out = NoBottleneck()(z_LE)
    (out.latent_LE * Z).sum().backward()
    assert torch.equal(out.latent_LE, Z) and torch.equal(z_LE.grad, Z) and out.terms == {}  # type: ignore[arg-type]


@pytest.mark.parametrize("name", CHOICES)
def test_each_trains_with_the_debug_config(name: str, tmp_path: Path) -> None:
    settings = [f"model.{key}={value}" for key, value in CHOICES[name].items()]
    run = ["run.reference=''", "run.steps=2", "run.validate_every=2", f"run.dir={tmp_path}", "val_clips=1"]
    training = TokenizerTraining(load_config(TokenizerTrainConfig, "configs/debug/proxy.yaml", [*settings, *run]))
    before = {key: tensor.clone() for key, tensor in training.model.state_dict().items()}
    training.fit()
    after = training.model.state_dict()
    assert all(not torch.equal(before[key], after[key]) for key in before if "to_latent" in key)  # gradients arrive
    if name == "kl":
        assert not torch.equal(before["quantizer.to_moments.weight"], after["quantizer.to_moments.weight"])
    logged = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert any("perplexity" in line for line in logged) == (name in ("vq", "fsq"))
    assert any("kl" in line for line in logged) == (name == "kl")


@pytest.mark.parametrize("name", CHOICES)
def test_whole_and_block_by_block_are_equal(name: str) -> None:
    torch.manual_seed(0)
    model = build_tokenizer("VQ_debug", **CHOICES[name]).eval()
    video = torch.rand(2, 3, 16, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        whole = model(video, torch.tensor([[2, 8, 4, 4]] * 2)).video_BCTHW.clamp(0, 1)
    frames, _ = reconstruct_streaming(model, video, [2, 8, 4, 4])
    torch.testing.assert_close(frames, whole, rtol=1e-4, atol=1e-5)
    if model.config.is_discrete:
        tokens = model.encode(video, budget="fixed:2,8,4,4")
        torch.testing.assert_close(model.decode(tokens), whole, rtol=1e-4, atol=1e-5)
    else:
        with pytest.raises(UserError, match="has continuous latents, no codes"):
            model.encode(video, budget="uniform:2")
        with pytest.raises(UserError, match="reads codes, but a tokenizer with model.bottleneck"):
            check_vocabulary(GPTS["GPT-debug"], model.config, "gpt.safetensors")


def test_settings_that_clash_are_one_line() -> None:
    with pytest.raises(UserError, match="choose 'vq', 'fsq', 'kl' or 'none'"):
        TokenizerConfig(bottleneck="lfq")
    with pytest.raises(UserError, match="'fsq' needs levels"):
        TokenizerConfig(bottleneck="fsq")
    with pytest.raises(UserError, match="no other reads them"):
        TokenizerConfig(fsq_levels=[8, 8])
    with pytest.raises(UserError, match="model.codebook_size=2560 model.code_width=4"):
        TokenizerConfig(bottleneck="fsq", fsq_levels=[8, 8, 8, 5])
