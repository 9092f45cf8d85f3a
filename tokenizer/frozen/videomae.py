"""VideoMAE, frozen: the eyes of the semantic discriminator (paper.md section 3).

Gradients pass through it to its input: that is how the tokenizer learns what the discriminator sees.

Letters: B clips, C T H W, S places of a clip (time slots x rows x columns), E width of a feature.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tokenizer.common.errors import UserError
from tokenizer.frozen.preprocess import prepare_frames
from tokenizer.frozen.weights import Family, FrozenConfig, load_weights

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
