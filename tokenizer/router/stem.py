"""What a router looks at: the pixels themselves, or what a frozen V-JEPA 2 sees in them (paper.md section 4).

    look = build_stem(config, device)
    logits_BA = router(look(video_BCTHW))

Letters: B clips, C T H W, S places of a clip, E width of a feature, A assignments.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tokenizer.common.errors import UserError
from tokenizer.frozen.cache import FeatureCache
from tokenizer.frozen.vjepa2 import FrozenVJEPA2
from tokenizer.router.model import Router, RouterConfig


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
