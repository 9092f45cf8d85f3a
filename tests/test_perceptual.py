"""The perceptual distance equals the published packages, is safe to train with, and orders real damage rightly."""

import dataclasses
import sys
import types
from itertools import pairwise
from pathlib import Path

import av
import numpy as np
import pytest
import torch
import torchvision
from torch.nn import functional as F

from tokenizer.common.checkpoint import file_sha256
from tokenizer.common.errors import UserError
from tokenizer.losses import perceptual
from tokenizer.losses.perceptual import PerceptualDistance, load_perceptual

BUNDLED = Path(perceptual.__file__).parents[1] / "data" / "bundled"
ALEX = "stlpips_alex"


@pytest.fixture(scope="module")
def alex() -> PerceptualDistance:
    return load_perceptual(ALEX)


@pytest.fixture(scope="module")
def clip_BCTHW() -> torch.Tensor:
    """Four frames of a real clip, 64x64, in [0, 1]."""
    with av.open(str(sorted(BUNDLED.glob("bunny_*.mp4"))[0])) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)][:4]
    video_TCHW = torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2).float() / 255
    return F.avg_pool2d(video_TCHW, 2).transpose(0, 1)[None]


@pytest.fixture(scope="module")
def frames_FCHW(clip_BCTHW: torch.Tensor) -> torch.Tensor:
    return clip_BCTHW[0].transpose(0, 1)


def add_noise(x: torch.Tensor, deviation: float) -> torch.Tensor:
    return (x + deviation * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))).clamp(0, 1)


@pytest.mark.parametrize("net", ["alex", "vgg"])
def test_stlpips_equals_its_package(net: str, frames_FCHW: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    # The package imports two tools that it never uses and does not depend on.
    monkeypatch.setitem(sys.modules, "IPython", types.SimpleNamespace(embed=None))
    monkeypatch.setitem(sys.modules, "torchsummary", types.SimpleNamespace(summary=None))
    from stlpips_pytorch.stlpips import LPIPS

    theirs = LPIPS(net=net, variant="shift_tolerant", verbose=False)
    ours = load_perceptual(f"stlpips_{net}")
    assert_equal_to(theirs, ours, frames_FCHW)


@pytest.mark.parametrize("net", ["alex", "vgg"])
def test_lpips_equals_its_package(
    net: str, frames_FCHW: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a trunk of random numbers in torchvision's layout, read by the package's code and by ours."""
    builder, features = {
        "alex": ("alexnet", lambda: torchvision.models.alexnet(num_classes=1).features),
        "vgg": ("vgg16", lambda: torchvision.models.vgg.make_layers(torchvision.models.vgg.cfgs["D"])),
    }[net]
    trunk = features()
    place_trunk(
        f"lpips_{net}", {f"features.{key}": value for key, value in trunk.state_dict().items()}, tmp_path, monkeypatch
    )
    monkeypatch.setattr(torchvision.models, builder, lambda pretrained: types.SimpleNamespace(features=trunk))
    from lpips import LPIPS

    theirs = LPIPS(net=net, pnet_rand=True, verbose=False)
    ours = load_perceptual(f"lpips_{net}", trunk_dir=tmp_path)
    assert_equal_to(theirs, ours, frames_FCHW)


def place_trunk(name: str, trunk: dict, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Write a trunk file into `folder` under a name that carries its own hash, as torchvision's do."""
    path = folder / "trunk.pth"
    torch.save({**trunk, "classifier.weight": torch.zeros(1)}, path)
    path = path.rename(folder / f"trunk-{file_sha256(path)[:8]}.pth")
    recipe = dataclasses.replace(perceptual._RECIPES[name], trunk_file=path.name)
    monkeypatch.setitem(perceptual._RECIPES, name, recipe)
    return path


def assert_equal_to(theirs: torch.nn.Module, ours: PerceptualDistance, x: torch.Tensor) -> None:
    """Equal to the bit in the same memory layout, to rounding in the other."""
    y = add_noise(x, 0.1)
    with torch.no_grad():
        ours_F = ours(x, y)
        theirs_F, other_layout_F = (
            theirs(*(image.clone(memory_format=layout) for image in (x, y)), normalize=True).flatten()
            for layout in (torch.channels_last, torch.contiguous_format)
        )
    assert ours_F.shape == (4,) and (ours_F > 0).all()
    assert torch.equal(ours_F, theirs_F)
    torch.testing.assert_close(ours_F, other_layout_F, rtol=1e-5, atol=1e-6)


def test_equal_frames_are_at_distance_zero_and_order_does_not_matter(
    alex: PerceptualDistance, frames_FCHW: torch.Tensor
) -> None:
    y = add_noise(frames_FCHW, 0.1)
    assert torch.equal(alex(frames_FCHW, frames_FCHW), torch.zeros(4))
    assert torch.equal(alex(frames_FCHW, y), alex(y, frames_FCHW))


@pytest.mark.parametrize("name", [ALEX, "stlpips_vgg"])
def test_more_damage_is_farther(name: str, clip_BCTHW: torch.Tensor) -> None:
    distance = load_perceptual(name)
    noisy = [add_noise(clip_BCTHW, deviation) for deviation in (0.02, 0.05, 0.1, 0.2)]
    blurred = [F.avg_pool3d(clip_BCTHW, (1, k, k), 1, (0, k // 2, k // 2), count_include_pad=False) for k in (3, 5, 9)]
    for versions in (noisy, blurred):
        far = [distance.clip_distance(version, clip_BCTHW).item() for version in versions]
        assert all(near < farther for near, farther in pairwise([0.0, *far])), far


def test_gradient_reaches_x_only_and_is_the_slope(alex: PerceptualDistance, frames_FCHW: torch.Tensor) -> None:
    x = add_noise(frames_FCHW, 0.1).requires_grad_()
    y = frames_FCHW.clone().requires_grad_()
    alex(x, y).sum().backward()
    assert y.grad is None and all(weight.grad is None for weight in alex.parameters())

    towards_y = (y - x).detach()
    step = 1e-2
    with torch.no_grad():
        slope = (alex(x + step * towards_y, y).sum() - alex(x - step * towards_y, y).sum()) / (2 * step)
    assert slope < 0
    torch.testing.assert_close((x.grad * towards_y).sum(), slope, rtol=0.05, atol=0)


def test_gradient_is_finite_where_features_vanish(alex: PerceptualDistance) -> None:
    silent = torch.zeros(1, 8, 2, 2, requires_grad=True)
    perceptual._to_unit_length(silent).sum().backward()
    assert torch.isfinite(silent.grad).all()
    for grey in (0.0, 0.5, 1.0):
        x = torch.full((1, 3, 32, 32), grey, requires_grad=True)
        alex(x, torch.full((1, 3, 32, 32), 0.3)).sum().backward()
        assert torch.isfinite(x.grad).all()


def test_features_of_one_original_serve_many_reconstructions(
    alex: PerceptualDistance, frames_FCHW: torch.Tensor
) -> None:
    real = alex.features(frames_FCHW)
    versions = [add_noise(frames_FCHW, 0.05), add_noise(frames_FCHW, 0.2)]
    together = alex.distance(alex.features(torch.cat(versions)), real)
    assert torch.equal(together, torch.cat([alex(version, frames_FCHW) for version in versions]))


def test_clip_distance_is_the_mean_over_the_frames_of_each_clip(
    alex: PerceptualDistance, clip_BCTHW: torch.Tensor
) -> None:
    x = torch.cat([clip_BCTHW, add_noise(clip_BCTHW, 0.1)])
    y = torch.cat([clip_BCTHW, clip_BCTHW])
    by_hand = alex(x[1].transpose(0, 1), y[1].transpose(0, 1)).mean()
    torch.testing.assert_close(alex.clip_distance(x, y), torch.stack([torch.tensor(0.0), by_hand]))


def test_precision_is_the_one_asked_for_even_under_autocast(
    alex: PerceptualDistance, frames_FCHW: torch.Tensor
) -> None:
    y = add_noise(frames_FCHW, 0.1)
    plain = alex(frames_FCHW, y)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(alex(frames_FCHW, y), plain)
    half = load_perceptual(ALEX, dtype=torch.bfloat16)(frames_FCHW, y)
    assert half.dtype == torch.float32 and not torch.equal(half, plain)
    torch.testing.assert_close(half, plain, rtol=0, atol=1e-3)


@pytest.mark.parametrize("name", list(perceptual._RECIPES))
def test_smallest_frames(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = perceptual._RECIPES[name]
    if recipe.trunk_file:
        stages = recipe.build()
        trunk = torch.nn.ModuleList(torch.nn.Sequential(*stage) for stage in stages).state_dict()
        place_trunk(name, {f"features.{key}": value for key, value in trunk.items()}, tmp_path, monkeypatch)
    distance = load_perceptual(name, trunk_dir=tmp_path)
    side = recipe.min_side
    assert torch.isfinite(distance(torch.rand(1, 3, side, side), torch.rand(1, 3, side, side))).all()
    with pytest.raises(UserError, match=f"at least {side} pixels a side, got {side - 1}x64"):
        distance.features(torch.rand(1, 3, side - 1, 64))


def test_unknown_name_lists_the_known() -> None:
    with pytest.raises(UserError, match="'lpips_squeeze'.*stlpips_alex, stlpips_vgg, lpips_alex, lpips_vgg"):
        load_perceptual("lpips_squeeze")


def test_absent_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = dataclasses.replace(perceptual._RECIPES[ALEX], package="no_such_package_here")
    monkeypatch.setitem(perceptual._RECIPES, ALEX, recipe)
    with pytest.raises(UserError, match=r"no_such_package_here, which is not installed: run .*\[offline\]"):
        load_perceptual(ALEX)


def test_absent_trunk_says_where_it_was_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LPIPS_TRUNK_DIR", raising=False)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    with pytest.raises(UserError, match="hub/checkpoints/vgg16-397923af.pth.*LPIPS_TRUNK_DIR.*stlpips_vgg") as error:
        load_perceptual("lpips_vgg")
    assert "\n" not in str(error.value)
    monkeypatch.setenv("LPIPS_TRUNK_DIR", str(tmp_path / "environment"))
    with pytest.raises(UserError, match="environment/vgg16"):
        load_perceptual("lpips_vgg")
    with pytest.raises(UserError, match="argument/vgg16"):
        load_perceptual("lpips_vgg", trunk_dir=tmp_path / "argument")


def test_weights_that_are_not_the_published_ones_are_refused(tmp_path: Path) -> None:
    (tmp_path / "alexnet-owt-7be5be79.pth").write_bytes(b"half a download")
    with pytest.raises(UserError, match=r"alexnet-owt-7be5be79.pth is damaged or another version.*not 7be5be79"):
        load_perceptual("lpips_alex", trunk_dir=tmp_path)
