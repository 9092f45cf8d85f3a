"""One clip scored: image quality against its original, and the features of the Frechet distance.

Letters: T frames, H W rows and columns, C colours, F numbers in a feature.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from evaluations.metrics.extractors import Extractor, load_extractor
from evaluations.metrics.image_quality import score_clip
from evaluations.protocols import Protocol
from tokenizer.common.checkpoint import read_model
from tokenizer.data.transforms import resize
from tokenizer.data.video_io import to_model_range
from tokenizer.losses.perceptual import PerceptualDistance, load_perceptual


@dataclass(frozen=True)
class Scorer:
    """The networks that judge, as the protocol names them; None where it names none."""

    protocol: Protocol
    perceptual: PerceptualDistance | None
    extractor: Extractor | None

    def quality(self, real_THWC: np.ndarray, ours_THWC: np.ndarray) -> dict[str, float]:
        """mse, psnr, ssim and the perceptual distance under its own name; frames that were given may be left out."""
        first = 0 if self.protocol.condition_scored else self.protocol.condition_frames
        return score_clip(self._sized(real_THWC)[first:], self._sized(ours_THWC)[first:], self.perceptual)

    def feature(self, frames_THWC: np.ndarray) -> Tensor:
        """float32 [F]; empty without an extractor."""
        if self.extractor is None:
            return torch.empty(0)
        return self.extractor(to_model_range(self._sized(frames_THWC))[None])[0]

    def facts(self) -> dict[str, Any]:
        """For the protocol card: names and hashes."""
        return {
            "extractor": self.extractor
            and {"name": self.extractor.name, "sha256": self.extractor.sha256, "input": self.extractor.input_rule},
            "perceptual": self.perceptual and self.perceptual.name,
        }

    def _sized(self, frames_THWC: np.ndarray) -> np.ndarray:
        size = self.protocol.score_size
        return frames_THWC if size is None else resize(frames_THWC, size, size)


def load_scorer(protocol: Protocol, args: argparse.Namespace, device: torch.device) -> Scorer:
    """Raises UserError at the start, before any work, where weights are not at hand."""
    perceptual = None if protocol.perceptual == "none" else load_perceptual(protocol.perceptual).to(device)
    extractor = None
    if protocol.extractor != "none":
        extractor = load_extractor(protocol.extractor, args.extractor_weights, args.extractor_sha256, device)
    return Scorer(protocol, perceptual, extractor)


def trained_as(weights: str) -> dict[str, Any]:
    """Name of the training run and its step, from the config inside the weights; a run is named after its config."""
    file = read_model(weights)
    folder = file.config.get("run", {}).get("dir")
    step = file.card.get("step")
    return {"run": Path(folder).name if folder else None, "step": None if step is None else int(step)}
