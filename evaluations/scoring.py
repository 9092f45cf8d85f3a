"""Clips scored: image quality against their originals, and the features of the Frechet distance.

Letters: B clips, T frames, H W rows and columns, C colours, F numbers in a feature.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from evaluations.metrics.clip_scores import score_clips
from evaluations.metrics.extractors import Extractor, load_extractor
from evaluations.protocols import Protocol
from tokenizer.common.checkpoint import read_card
from tokenizer.data.video_io import resize, to_model_range
from tokenizer.losses.perceptual import PerceptualDistance, load_perceptual


@dataclass(frozen=True)
class Scorer:
    """The networks that score; None for a metric that is left out.

    size: both sides are resized to it first. first_frame: of those whose quality counts; given frames may be left out.
    batch_size: clips that a network sees at a time; smaller batches are filled up.
    """

    perceptual: PerceptualDistance | None
    extractor: Extractor | None
    size: int | None = None
    first_frame: int = 0
    batch_size: int = 1

    def qualities(self, reals: Sequence[np.ndarray], ours: Sequence[np.ndarray]) -> list[dict[str, float]]:
        """mse, psnr, ssim and the perceptual distance under its own name, of each pair of clips."""
        reals, ours = ([self._sized(clip)[self.first_frame :] for clip in side] for side in (reals, ours))
        return score_clips(reals, ours, self.perceptual, self.batch_size)

    def features(self, clips: Sequence[np.ndarray]) -> list[Tensor]:
        """float32 [F] of each clip; empty without an extractor."""
        if self.extractor is None or not clips:
            return [torch.empty(0) for _ in clips]
        video_BCTHW = torch.stack([to_model_range(self._sized(clip)) for clip in clips])
        return list(self.extractor(video_BCTHW, self.batch_size))

    def facts(self) -> dict[str, Any]:
        return {
            "extractor": self.extractor
            and {
                "name": self.extractor.name,
                "distance": self.extractor.distance_name,
                "sha256": self.extractor.sha256,
                "input": self.extractor.input_rule,
            },
            "perceptual": self.perceptual and self.perceptual.name,
            "batch_size": self.batch_size,
        }

    def _sized(self, frames_THWC: np.ndarray) -> np.ndarray:
        return frames_THWC if self.size is None else resize(frames_THWC, self.size, self.size)


def load_scorer(protocol: Protocol, args: argparse.Namespace, device: torch.device, batch_size: int = 1) -> Scorer:
    """Only what judges something. Raises UserError at the start, before any work, if weights are missing."""
    judged = protocol.paired and protocol.perceptual != "none"
    perceptual = load_perceptual(protocol.perceptual).to(device) if judged else None
    extractor = None
    if protocol.extractor != "none":
        extractor = load_extractor(protocol.extractor, args.extractor_weights, args.extractor_sha256, device)
    first = 0 if protocol.condition_scored else protocol.condition_frames
    return Scorer(perceptual, extractor, protocol.score_size, first, batch_size)


def trained_as(weights: str) -> dict[str, Any]:
    """Name of the training run and its step, from the config inside the weights; a run is named after its config."""
    config, card = read_card(weights)
    folder, step = config.get("run", {}).get("dir"), card.get("step")
    return {"run": Path(folder).name if folder else None, "step": None if step is None else int(step)}
