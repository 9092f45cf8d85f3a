"""The two frozen encoders: their weights and their preprocessing.

VideoMAE is the trunk of the semantic discriminator; gradients pass through it to the frames. V-JEPA 2 gives the
targets of the decoder's alignment loss and an optional stem of the router.

Preprocessing follows the library's processors: antialiased bilinear resize of the short side, ImageNet statistics.
Clips are square and used whole, without a centre crop, so that every place of the clip has its own feature.

Training never reaches for the network: `python -m tokenizer.frozen.download` fetches the weights once, on a machine
with internet access. Random weights exist for tests; a config asks for them by name, and every log line and checkpoint
of such a run is marked.

Letters: B clips, C T H W, S places of a clip (time slots x rows x columns), E width of a feature.
"""

from __future__ import annotations

import hashlib
import importlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from tokenizer.common.checkpoint import file_sha256
from tokenizer.common.device import pick_dtype, send
from tokenizer.common.errors import UserError
from tokenizer.common.schema import read_json

logger = logging.getLogger(__name__)

CONFIG_FILE, WEIGHTS_FILE = "config.json", "model.safetensors"  # a pickle beside them is never opened
RANDOM_SIZES = ("tiny", "full")


@dataclass
class FrozenConfig:
    """Which weights a frozen encoder has, and how it computes."""

    weights: str = ""  # a folder, or a name on the Hugging Face hub that is in the cache; empty: the published ones
    random_for_tests: str = ""  # "tiny" or "full": random weights of that size. They mean nothing; for tests alone
    precision: str = "bf16"  # of the encoder, whatever the run's own: none (fp32) | bf16 | fp16

    def __post_init__(self) -> None:
        if self.random_for_tests not in ("", *RANDOM_SIZES):
            raise UserError(f"random_for_tests = {self.random_for_tests!r}: must be empty, or one of {RANDOM_SIZES}")
        if self.random_for_tests and self.weights:
            raise UserError(f"random_for_tests = {self.random_for_tests!r} does not read weights = {self.weights!r}")
        pick_dtype(self.precision)


@dataclass(frozen=True)
class Family:
    """A kind of encoder in the library `transformers`, and its published weights."""

    name: str  # as people call it
    key: str  # as our commands and the library's config.json call it
    hub_name: str
    model_class: str
    config_class: str
    tiny: dict[str, Any]  # the config of the tiny random one


@dataclass(frozen=True)
class FrozenWeights:
    """A frozen module of the library, with the source of its numbers."""

    model: Any  # the library's nn.Module
    sha256: str  # of the weights file; of random weights, of their description
    is_random: bool


def load_weights(family: Family, config: FrozenConfig) -> FrozenWeights:
    """The encoder, in eval mode, without gradients of its own, in the precision of `config`.

    Raises UserError if the library or the weights are absent, or the weights are of another kind.
    """
    transformers = _library(family)
    if config.random_for_tests:
        model, sha256 = _random_model(transformers, family, config.random_for_tests)
        logger.warning(
            "%s has RANDOM weights (random_for_tests): nothing that is trained here means a thing", family.name
        )
    else:
        folder = find_folder(family, config.weights)
        model, sha256 = _read_model(transformers, family, folder), file_sha256(folder / WEIGHTS_FILE)
        logger.info("%s: %s, sha256 %s", family.name, folder, sha256[:12])
    model = model.to(pick_dtype(config.precision)).requires_grad_(False).eval()
    return FrozenWeights(model, sha256, bool(config.random_for_tests))


def marked(kind: str, random: Sequence[str]) -> str:
    """What weights are called on their card, `random` being the encoders of the run that had random weights."""
    return f"{kind} (trained with RANDOM weights of {' and '.join(random)}, for tests)" if random else kind


def find_folder(family: Family, weights: str) -> Path:
    """The folder that holds config.json and model.safetensors. UserError if this machine lacks it."""
    name = weights or family.hub_name
    if Path(name).is_dir():
        missing = [file for file in (CONFIG_FILE, WEIGHTS_FILE) if not (Path(name) / file).is_file()]
        if missing:
            raise UserError(f"{name}: {' and '.join(missing)} of {family.name} not found in this folder")
        return Path(name)
    try:
        return fetch(family, name, local_files_only=True)
    except OSError as error:
        raise UserError(
            f"the weights of {family.name}, {name!r}, are not on this machine: run `python -m "
            f"tokenizer.frozen.download {family.key}` where there is internet, or set `weights` to a folder that holds "
            f"{CONFIG_FILE} and {WEIGHTS_FILE}"
        ) from error


def fetch(family: Family, name: str, local_files_only: bool) -> Path:
    """The folder of a hub model in the library's cache, downloaded into it if that is allowed; OSError if absent."""
    cached_file = _library(family).utils.hub.cached_file
    files = [cached_file(name, file, local_files_only=local_files_only) for file in (CONFIG_FILE, WEIGHTS_FILE)]
    return Path(files[0]).parent


def _library(family: Family) -> Any:
    try:
        return importlib.import_module("transformers")
    except ImportError as error:
        raise UserError(
            f"{family.name} needs the package transformers, which is not installed: run `pip install -e .[semantic]`"
        ) from error


def _random_model(transformers: Any, family: Family, size: str) -> tuple[nn.Module, str]:
    """The same weights at every call, without a trace in the global generator."""
    settings = getattr(transformers, family.config_class)(**(family.tiny if size == "tiny" else {}))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = getattr(transformers, family.model_class)(settings)
    return model, hashlib.sha256(f"random {family.key} {size}".encode()).hexdigest()


def _read_model(transformers: Any, family: Family, folder: Path) -> nn.Module:
    kind = read_json(folder / CONFIG_FILE, {}, "fetch it again").get("model_type")
    if kind != family.key:
        raise UserError(f"{folder}: holds weights of {kind!r}, not of {family.key!r} ({family.name})")
    model_class = getattr(transformers, family.model_class)
    model, report = model_class.from_pretrained(
        folder, local_files_only=True, use_safetensors=True, output_loading_info=True
    )
    if report["missing_keys"]:  # the library would leave them random and only warn
        missing = sorted(report["missing_keys"])
        raise UserError(f"{folder}: {len(missing)} tensors of {family.name} are missing, {missing[0]} first")
    return model


IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def prepare_frames(video_BCTHW: Tensor, side: int) -> Tensor:
    """Square clips in [0, 1] -> standardised float32 [B, T, C, side, side]; gradients flow to the pixels."""
    num_clips, height, width = len(video_BCTHW), *video_BCTHW.shape[-2:]
    if height != width:
        raise UserError(f"a frozen encoder reads square clips, got frames of {height}x{width}")
    frame_FCHW = rearrange(video_BCTHW.float(), "B C T H W -> (B T) C H W")
    if side != height:
        frame_FCHW = F.interpolate(frame_FCHW, (side, side), mode="bilinear", antialias=True)
    mean, std = (send(torch.tensor(x), frame_FCHW.device).view(3, 1, 1) for x in (IMAGENET_MEAN, IMAGENET_STD))
    return rearrange((frame_FCHW - mean) / std, "(B T) C H W -> B T C H W", B=num_clips)


VJEPA2 = Family(
    name="V-JEPA 2",
    key="vjepa2",
    hub_name="facebook/vjepa2-vitl-fpc64-256",
    model_class="VJEPA2Model",
    config_class="VJEPA2Config",
    tiny={
        "crop_size": 128,
        "hidden_size": 32,
        "num_attention_heads": 2,
        "num_hidden_layers": 2,
        "pred_hidden_size": 24,
        "pred_num_attention_heads": 2,
        "pred_num_hidden_layers": 1,
    },
)


@dataclass(frozen=True)
class FeatureShape:
    """Features of a clip: `slots` in time, `grid` x `grid` in space, numbers in each."""

    slots: int
    grid: int
    width: int


class FrozenVJEPA2:
    """Clips -> features. Not an nn.Module, so that no model that uses it counts or saves its weights."""

    def __init__(self, config: FrozenConfig) -> None:
        """Raises UserError if library or weights are absent."""
        weights = load_weights(VJEPA2, config)
        self.sha256, self.is_random = weights.sha256, weights.is_random
        settings = weights.model.config
        self.side: int = settings.crop_size  # the only one that its positions are made for
        self.patch: int = settings.patch_size
        self.tubelet: int = settings.tubelet_size
        self.width: int = settings.hidden_size
        self.dtype: torch.dtype = weights.model.dtype
        self._encoder = weights.model.encoder  # the predictor is for pre-training

    def to(self, device: torch.device | str) -> FrozenVJEPA2:
        self._encoder.to(device)
        return self

    def shape_of(self, num_frames: int) -> FeatureShape:
        """Shape of the features of clips of `num_frames` frames; a single frame fills a time slot by itself."""
        if num_frames > 1 and num_frames % self.tubelet:
            raise UserError(f"V-JEPA 2 reads {self.tubelet} frames at a time: {num_frames} frames do not divide")
        return FeatureShape(max(1, num_frames // self.tubelet), self.side // self.patch, self.width)

    def features(self, video_BCTHW: Tensor) -> Tensor:
        """Clips in [0, 1] -> feature_BSE, float32, in the order (time slot, row, column). No gradients."""
        with torch.inference_mode(), torch.autocast(video_BCTHW.device.type, enabled=False):
            pixel_BTCHW = prepare_frames(video_BCTHW, self.side)
            if pixel_BTCHW.shape[1] == 1:
                pixel_BTCHW = pixel_BTCHW.expand(-1, self.tubelet, -1, -1, -1)
            feature_BSE = self._encoder(pixel_values_videos=pixel_BTCHW).last_hidden_state
        return feature_BSE.to(torch.float32, copy=True)  # outside: an ordinary tensor, which a loss may keep


VIDEOMAE = Family(
    name="VideoMAE",
    key="videomae",
    hub_name="MCG-NJU/videomae-base",
    model_class="VideoMAEModel",
    config_class="VideoMAEConfig",
    tiny={"image_size": 64, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64},
)


class FrozenVideoMAE:
    """Clips -> features after chosen blocks. Not an nn.Module, so that no model that uses it saves its weights."""

    def __init__(self, config: FrozenConfig) -> None:
        """Raises UserError if library or weights are absent."""
        weights = load_weights(VIDEOMAE, config)
        self.sha256, self.is_random = weights.sha256, weights.is_random
        settings = weights.model.config
        self.side: int = settings.image_size
        self.num_frames: int = settings.num_frames
        self.num_blocks: int = settings.num_hidden_layers
        self.width: int = settings.hidden_size
        self._model = weights.model

    def to(self, device: torch.device | str) -> FrozenVideoMAE:
        self._model.to(device)
        return self

    def check(self, num_frames: int, taps: Sequence[int]) -> None:
        """Raises UserError if this encoder takes no clips of so many frames, or has no such taps."""
        if num_frames != self.num_frames:
            raise UserError(f"VideoMAE reads clips of {self.num_frames} frames, not of {num_frames}")
        if not taps or min(taps) < 0 or max(taps) > self.num_blocks:
            raise UserError(f"taps = {list(taps)}: VideoMAE has features after 0 to {self.num_blocks} blocks")

    def features(self, video_BCTHW: Tensor, taps: Sequence[int]) -> list[Tensor]:
        """Pixels around [0, 1] -> for each tap feature_BSE, float32: after that many blocks, 0 being the embedding."""
        tapped: dict[int, Tensor] = {}
        with torch.autocast(video_BCTHW.device.type, enabled=False):
            pixel_BTCHW = prepare_frames(video_BCTHW, self.side)
            x_BSE = self._model.embeddings(pixel_BTCHW.to(self._model.dtype), None)
            for block in range(max(taps) + 1):
                if block > 0:
                    out = self._model.encoder.layer[block - 1](x_BSE)
                    x_BSE = out[0] if isinstance(out, tuple) else out  # a tuple before transformers 5
                if block in taps:
                    tapped[block] = x_BSE.float()
        return [tapped[tap] for tap in taps]
