"""The input of a router: pixels, or the features of a frozen V-JEPA 2 (arXiv 2603.12267).

    look = build_stem(config, device)
    logits_BA = router(look(video_BCTHW))

A FeatureCache keeps features on disk, for a router that sees the same clips in every epoch:

    <folder>/<weights' sha256>-<precision>/<first two letters>/<sha256 of the clip's pixels>.safetensors

A file's name identifies its content, so runs and machines may share a folder and nothing in it goes stale. A clip takes
4 MiB with V-JEPA 2-L in bf16.

Letters: B clips, C T H W, S places of a clip, E width of a feature, A assignments.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from tokenizer.common.checkpoint import atomic_write
from tokenizer.common.errors import UserError
from tokenizer.frozen.encoders import FeatureShape, FrozenVJEPA2
from tokenizer.router.model import Router, RouterConfig

logger = logging.getLogger(__name__)


class FeatureCache:
    """The `features` of a FrozenVJEPA2, read from disk if they were computed before."""

    def __init__(self, encoder: FrozenVJEPA2, folder: str | Path) -> None:
        self.encoder = encoder
        self.folder = Path(folder) / f"{encoder.sha256}-{str(encoder.dtype).removeprefix('torch.')}"

    def features(self, video_BCTHW: Tensor) -> Tensor:
        """feature_BSE, as FrozenVJEPA2.features of each clip alone: no file may depend on a batch in its last bit."""
        return torch.stack([self._of_clip(clip) for clip in video_BCTHW]).to(video_BCTHW.device)  # [B, S, E]

    def _of_clip(self, video_CTHW: Tensor) -> Tensor:
        path = self.path_of(video_CTHW)
        feature_SE = _read(path)
        if feature_SE is None:
            feature_SE = self.encoder.features(video_CTHW[None])[0].cpu()  # [1, C, T, H, W] -> [S, E]
            path.parent.mkdir(parents=True, exist_ok=True)
            # in the encoder's precision: the features have no more digits than that
            atomic_write(path, save({"feature_SE": feature_SE.to(self.encoder.dtype)}))
        return feature_SE

    def path_of(self, video_CTHW: Tensor) -> Path:
        """The file of the features of exactly these pixels."""
        pixels = video_CTHW.detach().float().cpu().contiguous()  # shape is hashed too: equal bytes, other clips
        name = hashlib.sha256(repr(tuple(pixels.shape)).encode() + pixels.numpy().tobytes()).hexdigest()
        return self.folder / name[:2] / f"{name}.safetensors"


def _read(path: Path) -> Tensor | None:
    if not path.is_file():
        return None
    try:
        return load_file(path)["feature_SE"].float()
    except (SafetensorError, KeyError) as error:
        logger.warning("%s is damaged (%s) and is computed again", path, error)
        return None


@dataclass(frozen=True)
class Stem:
    """Clips in [0, 1] -> the input of a router; `sha256` of the V-JEPA 2 weights, empty for pixels."""

    look: Callable[[Tensor], Tensor]
    sha256: str = ""
    is_random: bool = False

    def __call__(self, video_BCTHW: Tensor) -> Tensor:
        return self.look(video_BCTHW)

    def sign(self, router: Router) -> None:
        """Write into the router which weights made the features it learns from."""
        if self.sha256:
            router.encoder_sha256.copy_(_digest(self.sha256))

    def check(self, router: Router, origin: str) -> None:
        """UserError if the router learned from the features of other weights."""
        if self.sha256 and not torch.equal(router.encoder_sha256.cpu(), _digest(self.sha256)):
            learned = bytes(router.encoder_sha256.tolist()).hex()
            raise UserError(
                f"{origin}: learned from V-JEPA 2 weights {learned[:12]}, but those found are {self.sha256[:12]}: "
                "set model.vjepa2.encoder.weights of its config to the right ones"
            )


def build_stem(config: RouterConfig, device: torch.device | str, cache: str = "") -> Stem:
    """The stem of a config. `cache`: a folder for the features of clips that come again unchanged.

    Raises UserError if weights are absent or give features of another shape than the config has.
    """
    if config.stem == "raw":
        return Stem(lambda video_BCTHW: video_BCTHW)  # the router patchifies pixels itself
    encoder = FrozenVJEPA2(config.vjepa2.encoder).to(device)
    c, found = config.vjepa2, encoder.shape_of(config.num_frames)
    if found != (wanted := FeatureShape(c.slots, c.grid, c.width)):
        keys = ", ".join(f"model.vjepa2.{name}={value}" for name, value in vars(found).items())
        raise UserError(f"V-JEPA 2 gives features of {found}, the router reads {wanted}: set {keys}")
    features = FeatureCache(encoder, cache).features if cache else encoder.features
    return Stem(features, encoder.sha256, encoder.is_random)


def _digest(sha256: str) -> Tensor:
    return torch.tensor(list(bytes.fromhex(sha256)), dtype=torch.uint8)
