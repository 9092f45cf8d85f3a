"""V-JEPA 2, frozen: what the decoder's features are aligned to, and the second stem of the router (paper.md section 3).

Letters: B clips, C T H W, S places of a clip (time slots x rows x columns), E width of a feature.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tokenizer.common.errors import UserError
from tokenizer.frozen.preprocess import prepare_frames
from tokenizer.frozen.weights import Family, FrozenConfig, load_weights

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
