"""What a router looks at: the pixels themselves, or what a frozen V-JEPA 2 sees in them (paper.md section 4).

    look = build_stem(config, device)
    logits_BA = router(look(video_BCTHW))

Letters: B clips, C T H W, S places of a clip, E width of a feature, A assignments.

Features of clips on disk, each computed once: for a router that sees the same clips in every epoch.

    <folder>/<weights' sha256>-<precision>/<first two letters>/<sha256 of the clip's pixels>.safetensors

The name of a file says what is in it, so any number of runs and machines may share a folder; nothing in it goes stale.
Of V-JEPA 2-L a clip takes 4 MiB in bf16.

Letters: B clips, C T H W, S places of a clip, E width of a feature.
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
from tokenizer.frozen.encoders import FrozenVJEPA2
from tokenizer.router.model import Router, RouterConfig

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


@dataclass(frozen=True)
class Stem:
    """Clips in [0, 1] -> the input of a router; of V-JEPA 2 also the sha256 of its weights."""

    look: Callable[[Tensor], Tensor]
    sha256: str = ""
    is_random: bool = False

    def __call__(self, video_BCTHW: Tensor) -> Tensor:
        return self.look(video_BCTHW)

    def sign(self, router: Router) -> None:
        """Write into the router whose features it learns from."""
        if self.sha256:
            router.encoder_sha256.copy_(_digest(self.sha256))

    def check(self, router: Router, origin: str) -> None:
        """UserError where the router learned from the features of other weights."""
        if self.sha256 and not torch.equal(router.encoder_sha256.cpu(), _digest(self.sha256)):
            learned = bytes(router.encoder_sha256.tolist()).hex()
            raise UserError(
                f"{origin}: learned from V-JEPA 2 weights {learned[:12]}, but those at hand are {self.sha256[:12]}: "
                "point model.vjepa2.encoder.weights of its config at the right ones"
            )


def build_stem(config: RouterConfig, device: torch.device | str, cache: str = "") -> Stem:
    """The stem of a config. `cache`: a folder for features, for clips that come again unchanged.

    Raises UserError where weights are absent or give features of another shape than the config says.
    """
    if config.stem == "raw":
        return Stem(lambda video_BCTHW: video_BCTHW)
    encoder = FrozenVJEPA2(config.vjepa2.encoder).to(device)
    wanted, found = config.input_shape, encoder.shape_of(config.num_frames)
    if found != wanted:
        keys = ", ".join(f"model.vjepa2.{name}={value}" for name, value in vars(found).items())
        raise UserError(f"V-JEPA 2 gives features of {found}, the router reads {wanted}: set {keys}")
    features = FeatureCache(encoder, cache).features if cache else encoder.features
    return Stem(features, encoder.sha256, encoder.is_random)


def _digest(sha256: str) -> Tensor:
    return torch.tensor(list(bytes.fromhex(sha256)), dtype=torch.uint8)
