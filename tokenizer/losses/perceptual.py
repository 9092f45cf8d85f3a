"""Perceptual distance between frames: LPIPS and its shift-tolerant variant, from weights already on the machine.

One module is the training loss, the metric, and the score of curation, in which the real side is computed once:

    lpips = load_perceptual("stlpips_alex")
    real = lpips.features(frames_FCHW)
    distance_F = lpips.distance(lpips.features(recon_FCHW), real)

| name         | trunk                              | weights are read from                            |
|--------------|------------------------------------|--------------------------------------------------|
| stlpips_alex | AlexNet, blurred before halving    | package stlpips_pytorch, trunk and heads         |
| stlpips_vgg  | VGG16, blurred before halving      | package stlpips_pytorch, trunk and heads         |
| lpips_alex   | AlexNet of torchvision             | heads: package lpips; trunk: a file of a folder  |
| lpips_vgg    | VGG16 of torchvision (the paper's) | heads: package lpips; trunk: a file of a folder  |

`lpips` also brings the trunks' layers; stlpips_pytorch is read as files only. All weights are checked by sha256 and
loaded with weights_only. Numbers under different names must not be compared.

Letters: F frames, C channels, H height, W width, B clips, T frames of a clip.
"""

import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.grad import conv2d_input

from tokenizer.common.checkpoint import file_sha256
from tokenizer.common.clip_shape import Size, sides, size_text
from tokenizer.common.errors import UserError

Stages = list[list[nn.Module]]


class PerceptualDistance(nn.Module):
    """Frozen network whose distance grows with the visible difference; 0 for equal frames (arXiv 1801.03924).

    Frames are in [0, 1]; inside they are mapped to [-1, 1] and then standardised per channel as ImageNet was. Values
    outside [0, 1] (a raw reconstruction) are not clamped. Weights never receive gradients, and autocast is off inside:
    the precision is that of `load_perceptual`, wherever it is called from.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, name: str, stages: list[nn.Sequential], heads: list[Tensor], dtype: torch.dtype) -> None:
        """Compare the outputs of `stages`, run in `dtype`, weighted per channel by `heads` of shape [1, C_i, 1, 1]."""
        super().__init__()
        self.name = name
        self.dtype = dtype
        # float32: rounding the filters and pixels of the first layer makes most of the error of bfloat16
        self.first = stages[0][0].float()
        # channels_last: 1.4 times faster on a CPU, since max-pooling and the blur run over contiguous channels
        self.stages = nn.ModuleList([stages[0][1:], *stages[1:]]).to(dtype)
        self.to(memory_format=torch.channels_last)
        self.heads = nn.ParameterList(heads)
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1))
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1))
        self.requires_grad_(False).eval()

    def features(self, image_FCHW: Tensor) -> list[Tensor]:
        """Five float32 maps [F, C_i, H_i, W_i] of RGB frames in [0, 1], each position of unit length over channels.

        Differentiable in the frames; call it under `torch.no_grad()` for the real side. Frames too small for the
        network raise UserError.
        """
        check_frames_fit(self.name, image_FCHW.shape[-2:])
        maps = []
        with torch.autocast(image_FCHW.device.type, enabled=False):
            x = ((2 * image_FCHW.float() - 1) - self.shift) / self.scale  # [F, 3, H, W]
            x = x.to(memory_format=torch.channels_last)
            x = self.first(x) if self.dtype == torch.float32 else _RoughBackward.apply(x, self.first, self.dtype)
            for stage in self.stages:
                x = stage(x.to(self.dtype))  # [F, C_i, H_i, W_i]
                maps.append(_to_unit_length(x.float()))  # float32: differences of unit vectors are small
        return maps

    def distance(self, feats_x: list[Tensor], feats_y: list[Tensor]) -> Tensor:
        """Distances [F] between two lists made by `features`.

        `feats_y` may hold fewer frames, F / K of them: each serves K times, in order, so that K reconstructions share
        the features of one original without copies.
        """
        total_F = feats_x[0].new_zeros(len(feats_x[0]))
        for head, x, y in zip(self.heads, feats_x, feats_y, strict=True):
            gap = (x.unflatten(0, (-1, len(y))) - y).flatten(0, 1).square()  # [F, C_i, H_i, W_i]
            with torch.autocast(gap.device.type, enabled=False):
                # One after the other: the rounding of a sum over a stacked axis would depend on the number of frames.
                total_F = total_F + F.conv2d(gap, head).mean(dim=(1, 2, 3))
        return total_F

    def forward(self, x_FCHW: Tensor, y_FCHW: Tensor) -> Tensor:
        """Distances [F] between frames in [0, 1]; gradients flow to `x_FCHW` only."""
        with torch.no_grad():
            feats_y = self.features(y_FCHW)
        return self.distance(self.features(x_FCHW), feats_y)

    def clip_distance(self, x_BCTHW: Tensor, y_BCTHW: Tensor) -> Tensor:
        """Distances [B] between clips in [0, 1], each the mean over its frames; gradients flow to `x_BCTHW` only."""
        frames = "b c t h w -> (b t) c h w"
        distance_F = self(rearrange(x_BCTHW, frames), rearrange(y_BCTHW, frames))
        return rearrange(distance_F, "(b t) -> b t", b=len(x_BCTHW)).mean(dim=1)


def load_perceptual(
    name: str, trunk_dir: str | Path | None = None, dtype: torch.dtype = torch.float32
) -> PerceptualDistance:
    """The distance `name` of the table on top, on the CPU, frozen.

    Nothing is downloaded. The trunk of lpips_* comes from `trunk_dir`, else from the folder in the environment variable
    LPIPS_TRUNK_DIR, else from the cache of torch hub. float32 is exact. bfloat16 takes about 0.6 of the
    time and moves the distance of a real clip by less than 1e-3 (scripts/bench/training.py measures both): enough
    for a loss, too little to rank reconstructions that nearly tie.

    Raises UserError for an unknown name and for weights that are absent or are not the published ones (sha256).
    """
    if name not in _RECIPES:
        raise UserError(f"unknown perceptual distance {name!r}: choose one of {', '.join(_RECIPES)}")
    recipe = _RECIPES[name]
    weights = _read_weights(_package_file(name, recipe), recipe.sha256_start)
    heads = [weights[f"lin{index}.model.1.weight"] for index in range(5)]
    if recipe.trunk_file:
        file = _trunk_path(name, recipe.trunk_file, trunk_dir)  # vgg16-397923af.pth: its sha256 begins so
        weights = _read_weights(file, file.stem.rpartition("-")[2])

    with torch.device("meta"):  # the file brings the numbers
        stages = [nn.Sequential(*stage) for stage in recipe.build()]
    # Both kinds of file list their tensors layer by layer, as the stages do, under other numbers.
    trunk = [tensor for key, tensor in weights.items() if key.startswith(("net.", "features."))]
    network = nn.ModuleList(stages)
    network.load_state_dict(dict(zip(network.state_dict(), trunk, strict=True)), assign=True)
    return PerceptualDistance(name, stages, heads, dtype)


class _RoughBackward(torch.autograd.Function):
    """`conv(x)` in float32, but its gradient in `dtype`: on a CPU with AMX in a ninth of the time."""

    @staticmethod
    def forward(ctx: Any, x_FCHW: Tensor, conv: nn.Conv2d, dtype: torch.dtype) -> Tensor:
        ctx.shape, ctx.conv, ctx.dtype = x_FCHW.shape, conv, dtype
        return conv(x_FCHW)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        conv = ctx.conv
        inputs = ctx.shape, conv.weight.to(ctx.dtype), grad.to(ctx.dtype)
        return conv2d_input(*inputs, conv.stride, conv.padding).to(grad.dtype), None, None


def _to_unit_length(x_FCHW: Tensor) -> Tensor:
    square_sum = x_FCHW.square().sum(dim=1, keepdim=True)
    # If every channel is 0 the root has no slope: the clamp gives 0 there instead of NaN, and changes no value.
    return x_FCHW / (square_sum.clamp_min(1e-38).sqrt() + 1e-10)


class _BlurredHalving(nn.Module):
    """Keeps every second pixel after a 3x3 blur, so that a shift by one pixel changes little."""

    kernel: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("kernel", torch.empty(width, 1, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(x, (2, 2, 2, 2), mode="reflect")
        if x.is_cpu:  # torch's backward of this in bf16 takes 7 times as long as in float32
            return F.conv2d(x.float(), self.kernel.float(), stride=2, groups=x.shape[1]).to(x.dtype)
        return F.conv2d(x, self.kernel, stride=2, groups=x.shape[1])


def _blurred_pool(window: int, width: int) -> list[nn.Module]:
    return [nn.MaxPool2d(window, stride=1), _BlurredHalving(width)]


def _blurred_alexnet() -> Stages:
    stages: Stages = [[nn.Conv2d(3, 64, 11, padding=2), _BlurredHalving(64), nn.ReLU(inplace=True)]]
    width = 64
    for out, kernel, halved in ((192, 5, True), (384, 3, True), (256, 3, False), (256, 3, False)):
        pool = _blurred_pool(3, width) if halved else []
        stages.append([*pool, nn.Conv2d(width, out, kernel, padding=kernel // 2), nn.ReLU(inplace=True)])
        width = out
    return stages


def _blurred_vgg16() -> Stages:
    stages: Stages = []
    width = 3
    for out, num_convs in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
        stage = _blurred_pool(2, width) if stages else []
        for _ in range(num_convs):
            stage += [nn.Conv2d(width, out, 3, padding=1), nn.ReLU(inplace=True)]
            width = out
        stages.append(stage)
    return stages


def _stages_of_lpips(net: str) -> Stages:
    """The trunk as the package `lpips` cuts it into five stages."""
    import lpips

    with warnings.catch_warnings():  # of torchvision, about the name of an argument
        warnings.simplefilter("ignore")
        trunk = lpips.LPIPS(net=net, pretrained=False, pnet_rand=True, verbose=False).net
    return [list(getattr(trunk, f"slice{i}")) for i in range(1, 6)]


@dataclass(frozen=True)
class _Recipe:
    """How one distance is built, and its weights."""

    build: Callable[[], Stages]
    min_side: int
    package: str
    install: str
    file: str
    sha256_start: str
    trunk_file: str | None = None  # None: the trunk is in `file` too


_STLPIPS = ("stlpips_pytorch", "pip install -e .[offline]")
_LPIPS = ("lpips", "pip install -e .")
_RECIPES = {
    "stlpips_alex": _Recipe(
        _blurred_alexnet, 21, *_STLPIPS, "stlpips_pytorch/weights/vST0.0/alex_shift_tolerant.pth", "b356b382"
    ),
    "stlpips_vgg": _Recipe(
        _blurred_vgg16, 18, *_STLPIPS, "stlpips_pytorch/weights/vST0.0/vgg_shift_tolerant.pth", "44597da6"
    ),
    "lpips_alex": _Recipe(
        partial(_stages_of_lpips, "alex"),
        31,
        *_LPIPS,
        "lpips/weights/v0.1/alex.pth",
        "df73285e",
        "alexnet-owt-7be5be79.pth",
    ),
    "lpips_vgg": _Recipe(
        partial(_stages_of_lpips, "vgg"), 16, *_LPIPS, "lpips/weights/v0.1/vgg.pth", "a78928a0", "vgg16-397923af.pth"
    ),
}
PERCEPTUAL_NAMES = tuple(_RECIPES)


def check_frames_fit(name: str, size: Size) -> None:
    """UserError if frames of this size are too small for a network; other names are for `load_perceptual` to refuse."""
    if name in _RECIPES and min(sides(size)) < (least := _RECIPES[name].min_side):
        raise UserError(f"{name} needs frames of at least {least} pixels a side, got {size_text(size)}")


def _package_file(name: str, recipe: _Recipe) -> Path:
    try:
        files = metadata.files(recipe.package) or []
    except metadata.PackageNotFoundError:
        files = []
    for file in files:
        if file.as_posix() == recipe.file:
            return Path(file.locate())
    raise UserError(
        f"{name} needs {recipe.file} of the package {recipe.package}, which is not installed: run `{recipe.install}`"
    )


def _trunk_path(name: str, file_name: str, trunk_dir: str | Path | None) -> Path:
    folder = trunk_dir or os.environ.get("LPIPS_TRUNK_DIR") or Path(torch.hub.get_dir()) / "checkpoints"
    path = Path(folder) / file_name
    if not path.is_file():
        raise UserError(
            f"{name} needs the ImageNet weights {path}, which are not there: put "
            f"https://download.pytorch.org/models/{file_name} there, or set LPIPS_TRUNK_DIR to the folder "
            f"that holds it, or use st{name}, which needs no download"
        )
    return path


def _read_weights(path: Path, sha256_start: str) -> dict[str, Tensor]:
    sha256 = file_sha256(path)
    if not sha256.startswith(sha256_start):
        raise UserError(
            f"{path} is damaged or another version: its sha256 begins with {sha256[:8]}, not "
            f"{sha256_start}; fetch it again"
        )
    return torch.load(path, map_location="cpu", weights_only=True)
