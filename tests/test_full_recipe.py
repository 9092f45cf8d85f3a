"""The whole recipe: two true steps at full size, and the same at debug size through loop and checkpoints.

Frozen encoders have random weights here, of the true size at full size; nothing of this says how well anything learns.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from tokenizer import train
from tokenizer.common.checkpoint import CheckpointStore, read_model, save_model
from tokenizer.common.config import load_config, to_dict
from tokenizer.common.device import slow_precision
from tokenizer.common.errors import UserError
from tokenizer.data.loader import ClipBatch
from tokenizer.presets import load_tokenizer
from tokenizer.router.model import Router, RouterConfig
from tokenizer.train import TokenizerTrainConfig, TokenizerTraining
from tokenizer.training.train_step import Values

pytest.importorskip("transformers")

ROOT = Path(__file__).parents[1]
PROXY, FINAL = (ROOT / f"configs/debug/full/{name}.yaml" for name in ("proxy", "final"))
NO_ROUTER = ("policy.kind=random", 'policy.router_ckpt=""', 'policy.router_config=""')


def training(config: Path, folder: Path, *overrides: str) -> TokenizerTraining:
    settings = [f"run.dir={folder}", "run.device=cpu", "run.num_threads=1", *overrides]
    return TokenizerTraining(load_config(TokenizerTrainConfig, config, settings))


def without_gradient(module: nn.Module) -> list[str]:
    """Trainable parameters that got no gradient, or one that is not finite."""
    return [
        name
        for name, p in module.named_parameters()
        if p.requires_grad and (p.grad is None or not p.grad.isfinite().all() or not p.grad.any())
    ]


# --- full size ------------------------------------------------------------------------------------------------------


def test_two_true_steps_of_the_final_recipe_at_full_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """S-B, VideoMAE-B and V-JEPA 2-L at batch 1 on real clips. Cheaper than the recipe: one frame for LPIPS, on the
    VGG that comes as a package; the codebook starts from one clip. Without warm-up, so that every weight moves. In the
    recipe's bf16 where the CPU has it; in software this takes more than a quarter of an hour."""
    name = "configs/vq/VQ_SB_final_with_router_w_lpips_1.2.yaml"
    torch.manual_seed(0)
    router = Router(RouterConfig())
    nn.init.normal_(router.head.weight)
    save_model(tmp_path / "router.safetensors", router.state_dict(), {"model": to_dict(router.config)})
    monkeypatch.setattr(train, "_START_BATCHES", 1)
    precision = "none" if slow_precision(torch.device("cpu"), "bf16") else "bf16"
    run = training(
        ROOT / name,
        tmp_path / "run",
        "run.batch_size=1",
        "run.num_workers=0",
        f"run.precision={precision}",
        "data.sources=[bundled:train]",
        "val_data.sources=[bundled:heldout]",
        f"policy.router_ckpt={tmp_path}/router.safetensors",
        'policy.router_config=""',
        "loss.perceptual_net=stlpips_vgg",
        "loss.perceptual_frames=1",
        "discriminator.videomae.encoder.random_for_tests=full",
        f"discriminator.videomae.encoder.precision={precision}",
        "alignment.encoder.random_for_tests=full",
        f"alignment.encoder.precision={precision}",
        "optim.warmup_steps=0",
    )
    assert run.random_encoders == ["V-JEPA 2", "VideoMAE"]
    assert run.gan is not None and run.alignment is not None
    run.state.train_mode(True)
    source = run.batches(0)
    before = {name: p.detach().clone() for name, p in run.model.named_parameters()}
    for step in range(2):
        values = run.train_step(next(source))
        assert all(torch.tensor(value).isfinite().all() for value in values.values()), values
        terms = {"l1", "perceptual", "gan", "align", "codebook", "commitment", "entropy"}
        assert terms <= values.keys() and values["random_frozen_encoders"] == 2.0
        assert ("discriminator/loss" in values) == (step == 0)  # the discriminator learns at every fifth step
        if step == 0:  # branches that add nothing yet get a gradient in their last map alone
            # in bf16 the real and the fake side of a last bias may cancel to 0
            assert all(name.endswith("to_logit.bias") for name in without_gradient(run.gan.module))
        else:
            assert without_gradient(run.model) == [] and without_gradient(run.alignment.head) == []
    assert all(not torch.equal(before[name], p) for name, p in run.model.named_parameters())


# --- debug size -----------------------------------------------------------------------------------------------------


class StopsAt(TokenizerTraining):
    """Breaks off just before the update of `moment`."""

    moment = 5

    def train_step(self, batch: ClipBatch) -> Values:
        if self.state.step == self.moment:
            raise UserError("stopped here")
        return super().train_step(batch)


@pytest.mark.parametrize("config", [PROXY, FINAL], ids=["patch", "videomae"])
def test_a_run_with_the_full_recipe(config: Path, tmp_path: Path) -> None:
    """Both networks in the log and in the checkpoint, marked as random; the shipped weights are the tokenizer's alone;
    a stopped run ends with the same bits."""
    overrides = NO_ROUTER if config == FINAL else ()
    whole = training(config, tmp_path / "whole", *overrides)
    whole.fit()
    log = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    mark = float(len(whole.random_encoders))
    assert all(mark in (line.get("random_frozen_encoders"), line.get("val/random_frozen_encoders")) for line in log)
    steps = {line["step"]: line for line in log if "loss" in line}
    start, every = whole.config.discriminator.start_step, whole.config.discriminator.every
    for number, line in steps.items():
        assert ("gan" in line) == (number > start) and -1 <= line["align"] <= 1
        judged = (
            "discriminator/loss" in line
            and 0 <= line["discriminator/accuracy"] <= 1
            and "discriminator/logit_gap" in line
        )
        assert judged == (number > start and (number - 1 - start) % every == 0)
        terms = ("l1", "perceptual", "codebook", "commitment", "entropy", "gan", "align")
        weighted = sum(getattr(whole.config.loss, name) * line[name] for name in terms if name in line)
        assert line["loss"] == pytest.approx(weighted, rel=1e-4)

    file = read_model(tmp_path / "whole")
    assert "RANDOM" in file.card["kind"] and load_tokenizer(tmp_path / "whole").sha256
    newest = CheckpointStore(tmp_path / "whole" / "checkpoints").load_latest()
    assert newest is not None and "RANDOM" in newest.state["card"]["kind"]
    assert {"head", "discriminator", "discriminator_optimizer"} <= newest.groups.keys()

    stopped = StopsAt(
        load_config(TokenizerTrainConfig, config, [f"run.dir={tmp_path}/torn", "run.device=cpu", *overrides])
    )
    with pytest.raises(UserError, match="stopped here"):
        stopped.fit()
    training(config, tmp_path / "torn", *overrides).fit()
    for part in ("model", "ema", "head", "discriminator", "discriminator_optimizer"):
        one, other = (
            load_file(tmp_path / run / f"checkpoints/00000006/{part}.safetensors") for run in ("whole", "torn")
        )
        assert all(torch.equal(one[name], other[name]) for name in one), part


def test_images_are_clips_of_one_block(tmp_path: Path) -> None:
    """As in configs/vq/VQ_SB_image_*: a manifest of pictures, one frame, one block, with both added terms."""
    for number in range(3):
        pixels = torch.randint(0, 256, (40, 48, 3), generator=torch.Generator().manual_seed(number), dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(tmp_path / f"{number}.png")
    (tmp_path / "images.csv").write_text("path\n0.png\n1.png\n2.png\n")
    one = [f"{section}.num_frames=1" for section in ("model", "data", "val_data")]
    sources = [f"{section}.sources=[{tmp_path}/images.csv]" for section in ("data", "val_data")]
    shape = ("model.patch_frames=1", "discriminator.patch.patch_frames=1")
    run = training(PROXY, tmp_path / "run", *one, *sources, *shape, "run.steps=2")
    run.fit()
    model = load_tokenizer(tmp_path / "run")
    assert model.space.num_rows == 3
    tokens = model.encode(torch.rand(1, 3, 1, 32, 32), budget="uniform:4")
    assert len(tokens.code_L) == 4 and model.decode(tokens).shape == (1, 3, 1, 32, 32)


def test_a_rehearsal_counts_what_trains_beside_the_tokenizer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    training(PROXY, tmp_path / "run").rehearse()
    said = capsys.readouterr().out
    assert "alignment head 0.01M" in said and "discriminator 0.04M" in said and "gan" in said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (("loss.gan=0",), "loss.gan = 0"),
        (("loss.align=0",), "loss.align = 0 does not read it"),
        (("discriminator.net=videomae",), "discriminator.patch is set"),
        (("alignment.layer=9",), "the decoder has 2 layers"),
        (('alignment.encoder.random_for_tests=""',), "python -m tokenizer.frozen.download vjepa2"),
    ],
)
def test_what_does_not_fit_stops_before_the_first_step(overrides: tuple[str, ...], words: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=words):
        training(PROXY, tmp_path, *overrides)
