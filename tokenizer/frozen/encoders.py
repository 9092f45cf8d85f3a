"""The two frozen encoders, and their preprocessing.

VideoMAE is the trunk of the semantic discriminator; gradients pass through it to the frames. V-JEPA 2 gives the
targets of the decoder's alignment loss and an optional stem of the router.

Preprocessing follows the library's processors: antialiased bilinear resize of the short side, ImageNet statistics.
Clips are square and used whole, without a centre crop, so that every place of the clip has its own feature.

Letters: B clips, C T H W, S places of a clip (time slots x rows x columns), E width of a feature.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from tokenizer.common.errors import UserError
from tokenizer.frozen.weights import Family, FrozenConfig, load_weights

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
    mean, std = (torch.tensor(numbers).view(3, 1, 1).to(frame_FCHW) for numbers in (IMAGENET_MEAN, IMAGENET_STD))
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
        """Raises UserError where library or weights are absent."""
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
        """Raises UserError where library or weights are absent."""
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
        """UserError where clips of so many frames, or these taps, are not for this encoder."""
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
