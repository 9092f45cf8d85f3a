"""Features of clips on disk, each computed once: for a router that sees the same clips in every epoch.

    <folder>/<weights' sha256>-<precision>/<first two letters>/<sha256 of the clip's pixels>.safetensors

The name of a file says what is in it, so any number of runs and machines may share a folder; nothing in it goes stale.
Of V-JEPA 2-L a clip takes 4 MiB in bf16.

Letters: B clips, C T H W, S places of a clip, E width of a feature.
"""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from tokenizer.common.checkpoint import atomic_write
from tokenizer.frozen.vjepa2 import FrozenVJEPA2

logger = logging.getLogger(__name__)


class FeatureCache:
    """Stands where a FrozenVJEPA2 stands: `features`, from the disk where they are there."""

    def __init__(self, encoder: FrozenVJEPA2, folder: str | Path) -> None:
        self.encoder = encoder
        self.folder = Path(folder) / f"{encoder.sha256}-{str(encoder.dtype).removeprefix('torch.')}"

    def features(self, video_BCTHW: Tensor) -> Tensor:
        """As FrozenVJEPA2.features of each clip by itself: no file may depend, in its last bit, on a batch."""
        return torch.stack([self._of_clip(clip) for clip in video_BCTHW]).to(video_BCTHW.device)

    def _of_clip(self, video_CTHW: Tensor) -> Tensor:
        path = self.path_of(video_CTHW)
        feature_SE = _read(path)
        if feature_SE is None:
            feature_SE = self.encoder.features(video_CTHW[None])[0].cpu()
            path.parent.mkdir(parents=True, exist_ok=True)
            # in the encoder's precision: the features have no more digits than that
            atomic_write(path, save({"feature_SE": feature_SE.to(self.encoder.dtype)}))
        return feature_SE

    def path_of(self, video_CTHW: Tensor) -> Path:
        """Where the features of this very clip lie."""
        pixels = video_CTHW.detach().float().cpu().contiguous()
        name = hashlib.sha256(repr(tuple(pixels.shape)).encode() + pixels.numpy().tobytes()).hexdigest()
        return self.folder / name[:2] / f"{name}.safetensors"


def _read(path: Path) -> Tensor | None:
    if not path.is_file():
        return None
    try:
        return load_file(path)["feature_SE"].float()
    except SafetensorError as error:
        logger.warning("%s is damaged (%s) and made again", path, error)
        return None
