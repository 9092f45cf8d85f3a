"""Stages 1 and 4 with the debug configs, end to end: the run folder, resume to the bit, policies, refusals."""

import json
import multiprocessing
import os
import re
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

from tokenizer import train
from tokenizer.assignment import pack
from tokenizer.common.checkpoint import read_model, save_model
from tokenizer.common.config import load_config, to_dict
from tokenizer.common.device import autocast, generator_for
from tokenizer.common.errors import UserError
from tokenizer.data.clips import ClipDataset
from tokenizer.data.loader import ClipBatch
from tokenizer.losses.objective import LossConfig
from tokenizer.model import VideoTokenizer
from tokenizer.presets import PRESETS, load_tokenizer
from tokenizer.router.model import Router, RouterConfig
from tokenizer.train import PolicyConfig, TokenizerTrainConfig, TokenizerTraining, build_policy
from tokenizer.training.train_step import Values

DEBUG = Path(__file__).parents[1] / "configs" / "debug"
CPU = torch.device("cpu")


def training(folder: Path, *overrides: str, config: str = "proxy.yaml") -> TokenizerTraining:
    return TokenizerTraining(
        load_config(TokenizerTrainConfig, DEBUG / config, [f"run.dir={folder}", "run.device=cpu", *overrides])
    )


def lines(folder: Path) -> list[dict]:
    """metrics.jsonl without the clock's fields."""
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    clock = ("seconds", "data_wait")
    return [{k: v for k, v in line.items() if k not in clock and not k.startswith("perf/")} for line in found]


def final_bits(folder: Path) -> list[bytes]:
    names = ("model.safetensors", "model.raw.safetensors")
    return [t.numpy().tobytes() for n in names for _, t in sorted(read_model(folder / "final" / n).tensors.items())]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed run."""
    folder = tmp_path_factory.mktemp("whole")
    training(folder).fit()
    return folder


@pytest.fixture(scope="module")
def router_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained router for the debug tokenizer."""
    torch.manual_seed(0)
    config = RouterConfig(size=32, levels=[2, 4, 8], layers=1, width=32, heads=2)
    path = tmp_path_factory.mktemp("router") / "router.safetensors"
    save_model(path, Router(config).state_dict(), {"model": to_dict(config)}, {"kind": "router"})
    return path


def test_a_run_leaves_everything_in_its_folder(whole: Path) -> None:
    assert yaml.safe_load((whole / "config.yaml").read_text())["model"] == to_dict(PRESETS["VQ_debug"])
    log = lines(whole)
    steps = [line for line in log if "loss" in line]
    assert [line["step"] for line in steps] == [1, 2, 3, 4, 5, 6]
    terms = {"l1", "perceptual", "codebook", "commitment", "entropy"}
    assert terms | {"loss", "lr", "grad_norm", "code_usage", "perplexity", "tokens_per_clip"} <= steps[0].keys()
    weights = LossConfig()
    wanted = sum(getattr(weights, name) * steps[0][name] for name in terms)
    assert steps[0]["loss"] == pytest.approx(wanted, rel=1e-5)

    validations = [line for line in log if "val/psnr_policy" in line]
    assert [line["step"] for line in validations] == [3, 6]
    for name in ("at_2", "at_4", "at_8", "policy"):  # every uniform level, and the run's own assignments
        assert {f"val/psnr_{name}", f"val/stlpips_alex_{name}"} <= validations[0].keys()
    for step in (3, 6):
        with Image.open(whole / "samples" / f"{step:08d}.png") as picture:
            assert picture.size[0] == 4 * 32  # one frame of each block
            assert picture.size[1] > 2 * 2 * 32  # two clips: real above ours, and the bars of tokens
            assert picture.convert("L").getextrema()[0] < 100  # not blank

    model = load_tokenizer(whole)
    tokens = model.encode(torch.rand(1, 3, 16, 32, 32), budget="uniform:4")
    assert model.decode(tokens).shape == (1, 3, 16, 32, 32)


def test_the_losses_are_those_of_the_reference_curve(whole: Path) -> None:
    """A change that means to leave the mathematics alone leaves these numbers alone; another commits a new curve."""
    reference = [json.loads(line) for line in (DEBUG / "reference" / "proxy.jsonl").read_text().splitlines()]
    found = [line for line in lines(whole) if "loss" in line]
    for ours, theirs in zip(found, reference, strict=True):
        assert {name: ours[name] for name in theirs} == pytest.approx(theirs, rel=1e-3, abs=1e-6)
    assert sum(found[0]["tokens_histogram"]) == 2 * 4  # every block of both clips has one of the levels


class KilledAt(TokenizerTraining):
    """Dies like a machine without power, just before the update of `moment`."""

    moment = 0

    def train_step(self, batch: ClipBatch) -> Values:
        if self.state.step == self.moment:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().train_step(batch)


def test_a_killed_run_ends_with_the_same_bits(
    whole: Path, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    config = load_config(TokenizerTrainConfig, DEBUG / "proxy.yaml", [f"run.dir={tmp_path}", "run.device=cpu"])

    def killed(moment: int) -> None:
        run = KilledAt(config)
        run.moment = moment
        run.fit()

    for moment in (1, 3, 5):  # before the first checkpoint, and between two
        child = multiprocessing.get_context("fork").Process(target=killed, args=(moment,))
        child.start()
        child.join(60)
        assert child.exitcode == -signal.SIGKILL
    assert len(lines(tmp_path)) < len(lines(whole))
    TokenizerTraining(config).fit()
    assert lines(tmp_path) == lines(whole)
    different = sum(a != b for a, b in zip(final_bits(tmp_path), final_bits(whole), strict=True))
    record_property("largest_difference", different)  # tensors that differ
    assert different == 0


def test_a_worker_that_loads_data_changes_nothing(whole: Path, tmp_path: Path) -> None:
    training(tmp_path, "run.num_workers=1").fit()
    assert final_bits(tmp_path) == final_bits(whole)


def test_nan_stops_the_run_and_names_step_and_term(tmp_path: Path) -> None:
    run = training(tmp_path)
    with torch.no_grad():
        run.model.to_pixels.bias[0] = torch.nan
    with pytest.raises(UserError, match="step 0: l1 is nan; the run stopped before this update"):
        run.fit()
    assert not (tmp_path / "final").exists()


def test_it_learns(tmp_path: Path) -> None:
    """Not much, in 40 steps, but more than the codec it starts from, which is where a random start ends."""
    run = training(
        tmp_path,
        "data.sources=[synthetic:train:4]",
        "data.augment=false",
        "data.crop_scale=1",
        "loss.perceptual=0",
        "loss.perceptual_net=none",
        "run.steps=40",
        "run.validate_every=100",
        "run.checkpoint_every=100",
        "val_clips=0",
        "optim.lr=3e-3",
    )
    run.fit()
    l1 = [line["l1"] for line in lines(tmp_path) if "l1" in line]
    assert sum(l1[-4:]) < 0.85 * sum(l1[:4])


def test_the_codebook_starts_from_latents_of_training_clips(tmp_path: Path) -> None:
    fresh = training(tmp_path)
    figures = fresh.train_step(next(fresh.batches(0)))
    assert figures["codebook"] < 0.01  # the latents of the first batch lie on or near codes


# --- the command line -----------------------------------------------------------------------------------------------


def command(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr("sys.argv", ["train", *arguments])
    train.main()


def test_a_dry_run_says_what_the_run_would_cost_and_writes_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    command(
        monkeypatch, str(DEBUG / "proxy.yaml"), "--dry-run", f"run.dir={folder}", "run.steps=5000", "run.device=cpu"
    )
    said = capsys.readouterr().out
    for word in (
        "parameters  0.18M",
        "encoder",
        "perceptual",
        "s a step of 2 clips on cpu",
        "5000 steps",
        "nothing was",
    ):
        assert word in said
    assert str(folder) in said and not folder.exists()


def test_the_run_is_called_after_the_whole_name_of_its_config(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A dot in the name cuts nothing off."""
    seen = []
    monkeypatch.setattr(TokenizerTraining, "__init__", lambda self, config: seen.append(config.run.dir))
    monkeypatch.setattr(TokenizerTraining, "fit", lambda self: None)
    for name in ("final_w_lpips_1.2", "final_w_lpips_1.2_3fps_webvid"):
        (tmp_path / f"{name}.yaml").write_text("run: {steps: 1}\n")
        command(monkeypatch, str(tmp_path / f"{name}.yaml"))
    assert seen == ["results/vq/final_w_lpips_1.2", "results/vq/final_w_lpips_1.2_3fps_webvid"]


# --- where the lengths come from ------------------------------------------------------------------------------------


def test_stage_4_trains_with_the_routers_assignments(router_file: Path, tmp_path: Path) -> None:
    chosen = (f"policy.router_ckpt={router_file}", 'policy.router_config=""', "run.steps=2")
    run = training(tmp_path, *chosen, config="final.yaml")
    run.fit()
    router = build_policy(run.config.policy, run.config.model, CPU)
    batch = next(run.batches(0))
    wanted = router(batch.video_BCTHW, torch.Generator()).sum() / len(batch.video_BCTHW)
    assert lines(tmp_path)[0]["tokens_per_clip"] == float(wanted)
    assert load_tokenizer(tmp_path).sha256


def test_the_other_policies() -> None:
    model = PRESETS["VQ_debug"]
    video_BCTHW = torch.rand(6, 3, 16, 32, 32)
    fixed = build_policy(PolicyConfig("fixed", [8, 4, 2, 2]), model, CPU)
    assert fixed(video_BCTHW, torch.Generator()).tolist() == [[8, 4, 2, 2]] * 6
    random = build_policy(PolicyConfig("random"), model, CPU)
    drawn = [random(video_BCTHW, torch.Generator().manual_seed(seed)).tolist() for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert len({tuple(lengths) for lengths in drawn[0]}) > 1  # each clip its own


def test_only_a_loss_in_bf16_sees_in_bf16() -> None:
    loss, judge = train.perceptual_pair("stlpips_alex", "bf16", CPU)
    assert loss is not None and judge is not None and (loss.dtype, judge.dtype) == (torch.bfloat16, torch.float32)
    loss, judge = train.perceptual_pair("stlpips_alex", "none", CPU)
    assert loss is judge and loss is not None and loss.dtype == torch.float32
    assert train.perceptual_pair("none", "bf16", CPU) == (None, None)


def test_policies_that_do_not_fit_are_refused(router_file: Path) -> None:
    model = PRESETS["VQ_debug"]
    refused = {
        "length 5 is none of the levels": PolicyConfig("fixed", [5, 4, 2, 2]),
        "4 lengths, one per block; got 3": PolicyConfig("fixed", [4, 4, 4]),
    }
    for words, config in refused.items():
        with pytest.raises(UserError, match=words):
            build_policy(config, model, CPU)
    with pytest.raises(UserError, match=r"levels \[2, 4, 8\] for 4 blocks, but the tokenizer"):
        build_policy(PolicyConfig("router", router_ckpt=str(router_file)), PRESETS["VQ_mini"], CPU)


def test_the_old_name_of_a_section_names_the_new_one() -> None:
    with pytest.raises(UserError, match="unknown key 'adversary'; did you mean 'discriminator'"):
        load_config(TokenizerTrainConfig, DEBUG / "proxy.yaml", ["adversary.net=patch"])


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("data.augment=false", "data.crop_scale=0.5 is not used if data.augment=false: set data.crop_scale=1"),
        ("val_data.crop_scale=0.5", "val_data.crop_scale=0.5 is not used if val_data.augment=false"),
        ("val_data.fps=3", "val_data.fps=3.0 is not data.fps=None"),
        ("loss.l1=-1", "loss.l1 = -1.0: a weight must be >= 0"),
        ("optim.decay_fraction=0.5", "optim.decay_fraction=0.5 is not used by optim.schedule='cosine'"),
        ("bf16_stream=true", "bf16_stream = true, but run.precision = none does not use it"),
    ],
)
def test_settings_that_nothing_uses_are_refused(override: str, words: str) -> None:
    with pytest.raises(UserError, match=re.escape(words)):
        load_config(TokenizerTrainConfig, DEBUG / "proxy.yaml", [override])


def test_a_run_starts_from_the_weights_of_another(whole: Path, tmp_path: Path) -> None:
    """All weights, the codebook among them; the run folder knows their sha256; other shapes are named."""
    source = read_model(whole)
    begun = training(tmp_path / "run", f"init_from={whole}", "run.steps=1")
    assert all(torch.equal(tensor, source.tensors[name]) for name, tensor in begun.model.state_dict().items())
    begun.fit()
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["init_from_sha256"] == source.sha256
    with pytest.raises(
        UserError, match=r"init_from=.*quantizer\.codebook\.weight is \(64, 8\), the model has \(32, 8\)"
    ):
        training(tmp_path / "other", f"init_from={whole}", "model.codebook_size=32")


def test_a_resumed_run_does_not_start_its_codebook_again(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[int] = []
    monkeypatch.setattr(TokenizerTraining, "start_codebook", lambda self: started.append(1))
    training(whole)
    assert not started
    training(tmp_path / "fresh")
    assert started == [1]


def test_the_codebook_start_reads_no_more_than_it_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four latents for each of 64 codes, 2 clips a batch of at least 8 tokens: a few steps of clips, each read once."""
    read: list[int] = []
    get = ClipDataset.get
    monkeypatch.setattr(ClipDataset, "get", lambda self, index, epoch=0: read.append(index) or get(self, index, epoch))
    run = training(tmp_path)
    tokens = run.policy(torch.zeros(2, 1), generator_for(run.config.run.seed, "codebook")).sum()
    assert len(read) <= 2 * (1 + -(-4 * 64 // 16)) and len(set(read)) == len(read) and tokens > 0


def test_loading_skips_the_start_of_the_weights(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(VideoTokenizer, "init_weights", lambda self: pytest.fail("computed and thrown away"))
    model = load_tokenizer(whole)
    assert all(torch.equal(tensor, read_model(whole).tensors[name]) for name, tensor in model.state_dict().items())


def test_residual_streams_are_fp32_under_bf16_autocast(whole: Path) -> None:
    """Gradients are nearer to those of fp32 than with streams in bf16."""
    model, video = (
        load_tokenizer(whole).train(),
        torch.rand(4, 3, 16, 32, 32, generator=torch.Generator().manual_seed(0)),
    )

    def gradient(precision: str, bf16_stream: bool = False) -> torch.Tensor:
        model.bf16_stream = bf16_stream
        model.zero_grad()
        kinds: list[torch.dtype] = []
        hooks = [layer.register_forward_hook(lambda _, inputs, out: kinds.append(out.dtype)) for layer in model.encoder]
        with autocast(CPU, precision):
            latent_LE = model.quantizer.decode(torch.arange(32))
            output = model.decode_latents(latent_LE, pack(torch.full((4, 4), 2)))
            model.encode_latents(video, pack(torch.full((4, 4), 2)))
            output.square().mean().backward()
        assert set(kinds) == {torch.bfloat16 if bf16_stream else torch.float32}
        for hook in hooks:
            hook.remove()
        return torch.cat([p.grad.flatten() for p in model.decoder.parameters() if p.grad is not None])

    exact, fp32, bf16 = gradient("none"), gradient("bf16"), gradient("bf16", bf16_stream=True)
    assert (fp32 - exact).norm() < (bf16 - exact).norm()
