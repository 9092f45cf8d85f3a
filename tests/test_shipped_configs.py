"""Every config of stages 1 to 4 can be built: its networks stand on the meta device, in true size, and fit together.

(That each one loads and tells its story is in test_config.py.) Frozen encoders are random here, and so marked.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

from tokenizer.common.config import load_config, load_section
from tokenizer.frozen.encoders import FeatureShape, FrozenConfig, FrozenVideoMAE, FrozenVJEPA2
from tokenizer.losses.gan import Gan
from tokenizer.losses.objective import Alignment, LossConfig
from tokenizer.model import TokenizerConfig, VideoTokenizer
from tokenizer.router.curate import CurateConfig
from tokenizer.router.model import Router, RouterConfig, VJEPA2StemConfig
from tokenizer.router.train import RouterTrainConfig
from tokenizer.train import TokenizerTrainConfig
from tokenizer.training.logger import read_curve

pytest.importorskip("transformers")

ROOT = Path(__file__).parents[1]
CONFIGS = [path.relative_to(ROOT).as_posix() for path in sorted((ROOT / "configs").rglob("*.yaml"))]
ROUTERS = [name for name in CONFIGS if Path(name).name.startswith("router")]
CURATIONS = [name for name in CONFIGS if Path(name).name.startswith("curate")]
TOKENIZERS = [name for name in CONFIGS if name.startswith("configs/vq/")] + [
    name for name in CONFIGS if Path(name).name in ("proxy.yaml", "final.yaml")
]
META = torch.device("meta")


def test_no_config_of_stages_1_to_4_is_left_out() -> None:
    others = [name for name in CONFIGS if Path(name).name.lower().startswith(("gpt", "extract"))]
    assert sorted(ROUTERS + CURATIONS + TOKENIZERS) == [name for name in CONFIGS if name not in others]


def test_reference_curves_are_those_that_configs_name() -> None:
    """Each has a loss for every line that the run logs."""
    named = {}
    for name in CONFIGS:
        run = yaml.safe_load((ROOT / name).read_text()).get("run", {})
        if "reference" in run:
            named[run["reference"]] = list(range(run["log_every"], run["steps"] + 1, run["log_every"]))
    there = {path.relative_to(ROOT).as_posix(): path for path in (ROOT / "configs").rglob("*.jsonl")}
    assert {name: [step for step, _ in read_curve(path, "loss")] for name, path in there.items()} == named


def unpublished(config: FrozenConfig) -> FrozenConfig:
    """The same size with random weights: no published ones are to be had here."""
    return config if config.random_for_tests else FrozenConfig(random_for_tests="full", precision=config.precision)


@pytest.fixture(scope="module", autouse=True)
def each_encoder_once() -> pytest.MonkeyPatch:
    """They are frozen and on the meta device: all tests of this file may share one of each size."""
    patch = pytest.MonkeyPatch()
    for module, kind in (("gan", FrozenVideoMAE), ("objective", FrozenVJEPA2)):
        build = lru_cache(lambda size, precision, kind=kind: kind(FrozenConfig("", size, precision)))
        patch.setattr(
            f"tokenizer.losses.{module}.{kind.__name__}",
            lambda config, build=build: build(config.random_for_tests, config.precision),
        )
    yield patch
    patch.undo()


def millions(module: nn.Module) -> float:
    return sum(p.numel() for p in module.parameters()) / 1e6


@pytest.mark.parametrize("name", TOKENIZERS)
def test_tokenizer_configs_build(name: str) -> None:
    config = load_config(TokenizerTrainConfig, ROOT / name)
    with META:
        model = VideoTokenizer(config.model)
        if name.startswith("configs/vq/"):
            size = 435 if "VQ_SL" in name else 144 if config.model.num_frames == 16 else 141
            assert millions(model) == pytest.approx(size, abs=1.0)
        if config.loss.gan > 0:
            chosen = config.discriminator
            if chosen.net == "videomae":
                seen = replace(chosen.videomae, encoder=unpublished(chosen.videomae.encoder))
                chosen = replace(chosen, videomae=seen)
            discriminator = Gan(chosen, config.model.num_frames, config.model.size, 0, META)
            if name.startswith("configs/vq/"):
                assert millions(discriminator.module) == pytest.approx(
                    29.6 if chosen.net == "videomae" else 38.2, abs=0.7
                )
        if config.loss.align > 0:
            chosen_alignment = replace(config.alignment, encoder=unpublished(config.alignment.encoder))
            Alignment(chosen_alignment, config.model, META)
    if config.policy.kind == "router":
        router = load_section(RouterConfig, ROOT / config.policy.router_config, "model")
        same = ("num_frames", "size", "levels", "patch_frames")
        assert [getattr(router, key) for key in same] == [getattr(config.model, key) for key in same]


@pytest.mark.parametrize("name", ROUTERS)
def test_router_configs_build(name: str) -> None:
    config = load_config(RouterTrainConfig, ROOT / name)
    with META:
        model = Router(config.model)
        if config.model.stem == "vjepa2":
            encoder = FrozenVJEPA2(unpublished(config.model.vjepa2.encoder))
            stem, found = config.model.vjepa2, encoder.shape_of(config.model.num_frames)
            assert found == FeatureShape(stem.slots, stem.grid, stem.width)
    if name.startswith("configs/router/") and config.model.num_frames == 16:
        assert millions(model) == pytest.approx(19.9, abs=0.2)


@pytest.mark.parametrize("name", CURATIONS)
def test_curation_configs_load(name: str) -> None:
    assert load_config(CurateConfig, ROOT / name).proxy


@pytest.mark.parametrize("size", ["debug", "mini"])
def test_the_full_recipe_is_rehearsed_on_the_same_models(size: str) -> None:
    """configs/<size>/full: the networks of configs/<size>, both discriminators, alignment, a router on V-JEPA 2."""
    plain = ROOT / "configs" / size
    full = {name: load_config(TokenizerTrainConfig, plain / "full" / f"{name}.yaml") for name in ("proxy", "final")}
    for name, config in full.items():
        assert config.model == load_section(TokenizerConfig, plain / f"{name}.yaml", "model")
        assert (config.loss.gan, config.loss.align) == (0.3, 0.7)
        assert config.alignment.encoder.random_for_tests == "tiny"
    assert [full[name].discriminator.net for name in ("proxy", "final")] == ["patch", "videomae"]
    router = load_section(RouterConfig, plain / "full" / "router.yaml", "model")
    assert router.stem == "vjepa2"
    assert replace(router, stem="raw", vjepa2=VJEPA2StemConfig()) == load_section(
        RouterConfig, plain / "router.yaml", "model"
    )


def test_the_papers_recipe_is_what_the_final_configs_say() -> None:
    """l1 + perceptual + 0.3 GAN + codebook + 0.25 commitment + 0.02 entropy + 0.7 alignment."""
    for name in ("", "_3fps_webvid"):
        config = load_config(TokenizerTrainConfig, ROOT / f"configs/vq/VQ_SB_final_with_router_w_lpips_1.2{name}.yaml")
        assert config.loss == LossConfig(gan=0.3, align=0.7)
        assert (config.discriminator.net, config.discriminator.every, config.discriminator.augment) == (
            "videomae",
            5,
            True,
        )
        optim = config.discriminator.optim
        assert (optim.lr, optim.betas, optim.weight_decay) == (2e-5, [0.5, 0.9], 0.0)
        assert (config.alignment.layer, config.run.batch_size, config.optim.lr) == (3, 128, 1e-4)
    base = load_config(TokenizerTrainConfig, ROOT / "configs/vq/VQ_SB_proxy_3fps.yaml")
    assert (base.discriminator.net, base.discriminator.optim.lr, base.discriminator.lecam) == ("patch", 3e-5, 0.001)
