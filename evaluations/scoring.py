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

from evaluations.metrics.clip_scores import score_clip
from evaluations.metrics.extractors import Extractor, load_extractor
from evaluations.protocols import Protocol
from tokenizer.common.checkpoint import read_model
from tokenizer.data.video_io import resize, to_model_range
from tokenizer.losses.perceptual import PerceptualDistance, load_perceptual


@dataclass(frozen=True)
class Scorer:
    """The networks that judge, None where nothing is asked of them.

    size: both sides are resized to it first. first_frame: of those whose quality counts; given frames may be left out.
    """

    perceptual: PerceptualDistance | None
    extractor: Extractor | None
    size: int | None = None
    first_frame: int = 0

    def quality(self, real_THWC: np.ndarray, ours_THWC: np.ndarray) -> dict[str, float]:
        """mse, psnr, ssim and the perceptual distance under its own name."""
        real_THWC, ours_THWC = (self._sized(frames_THWC)[self.first_frame :] for frames_THWC in (real_THWC, ours_THWC))
        return score_clip(real_THWC, ours_THWC, self.perceptual)

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
        return frames_THWC if self.size is None else resize(frames_THWC, self.size, self.size)


def load_scorer(protocol: Protocol, args: argparse.Namespace, device: torch.device) -> Scorer:
    """Only what judges something. Raises UserError at the start, before any work, where weights are not at hand."""
    judged = protocol.paired and protocol.perceptual != "none"
    perceptual = load_perceptual(protocol.perceptual).to(device) if judged else None
    extractor = None
    if protocol.extractor != "none":
        extractor = load_extractor(protocol.extractor, args.extractor_weights, args.extractor_sha256, device)
    first = 0 if protocol.condition_scored else protocol.condition_frames
    return Scorer(perceptual, extractor, protocol.score_size, first)


def trained_as(weights: str) -> dict[str, Any]:
    """Name of the training run and its step, from the config inside the weights; a run is named after its config."""
    file = read_model(weights)
    folder = file.config.get("run", {}).get("dir")
    step = file.card.get("step")
    return {"run": Path(folder).name if folder else None, "step": None if step is None else int(step)}
