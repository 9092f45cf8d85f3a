"""One batch of the main job: assign, encode, decode, measure.

All figures come from the models' arrays, floats in [0, 1], not from a written video: H.264 at its usual quality leaves
even the original at about 33 dB.

Letters: B clips, C T H W, N temporal blocks, A assignments (rows).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tokenizer.budget import Budget, choose_rows, keeps_quality
from tokenizer.common.clip_shape import Size
from tokenizer.common.errors import UserError
from tokenizer.common.image_quality import motion, psnr, ssim
from tokenizer.data.video_io import DecodedClip, to_model_range, to_uint8
from tokenizer.losses.perceptual import PerceptualDistance, check_frames_fit, load_perceptual
from tokenizer.model import VideoTokenizer
from tokenizer.router.predict import TrainedRouter
from tokenizer.tokens import VideoTokens

PERCEPTUAL_ORDER = ("lpips_vgg", "stlpips_alex")  # of `auto`: the paper's network, then one that pip installs
PSNR_OF_EQUAL = 100.0  # dB; an exact copy has infinite PSNR, which JSON cannot hold


@dataclass(frozen=True)
class Reconstruction:
    """One reconstructed clip: its frames (uint8), its tokens, and the figures of its record."""

    frames_THWC: np.ndarray
    tokens: VideoTokens
    figures: dict[str, Any]
    uniform_THWC: np.ndarray | None = None  # the clip at about as many tokens, the same in every block


@dataclass
class Reconstructor:
    """The models and the budget. A clip's result does not depend on the other clips of its batch."""

    tokenizer: VideoTokenizer
    router: TrainedRouter | None
    budget: Budget
    price: float | None  # of `average:N`, for the whole set; None for the other budgets
    perceptual: PerceptualDistance | None
    compare_uniform: bool = False  # reconstruct every clip a second time, at the nearest uniform assignment

    @torch.inference_mode()
    def __call__(self, clips: Sequence[DecodedClip], score_BA: Tensor | None = None) -> list[Reconstruction]:
        """Clips of the tokenizer's size, uint8 -> their reconstructions, in order.

        score_BA: what the router's `rate` gave for these clips if it is known; else the router is run.
        """
        if not clips:
            return []
        space = self.tokenizer.space
        video_BCTHW = torch.stack([to_model_range(clip.frames_THWC) for clip in clips])  # float32 in [0, 1]
        if score_BA is None and self.router:
            score_BA = self.router.rate(video_BCTHW, self.budget)  # [B, A]
        row_B = choose_rows(self.budget, score_BA, space, self.price, num_clips=len(clips))  # [B]
        tokens = self.tokenizer.encode(video_BCTHW, space.lengths_of(row_B))  # lengths [B, N] -> codes [L]
        ours_BCTHW = self.tokenizer.decode(tokens)  # float32 in [0, 1]
        measured = self._measure(ours_BCTHW, video_BCTHW.to(ours_BCTHW.device))  # key -> [B]
        uniform_BCTHW: Tensor | None = None
        uniform_figures: list[dict[str, Any]] = [{} for _ in clips]
        if self.compare_uniform:
            uniform_BCTHW, uniform_figures = self._at_uniform(video_BCTHW, space.tokens_A[row_B])
        results = []
        for b, clip in enumerate(clips):
            figures: dict[str, Any] = {
                "assignment": tokens.length_BN[b].tolist(),
                "tokens": int(space.tokens_A[row_B[b]]),
            }
            figures |= {key: None if value_B is None else float(value_B[b]) for key, value_B in measured.items()}
            figures |= motion_figures(clip.frames_THWC, space.num_blocks) | uniform_figures[b]
            if score_BA is not None:
                figures |= self._router_figures(score_BA[b], int(row_B[b]))
            uniform_THWC = None if uniform_BCTHW is None else to_uint8(uniform_BCTHW[b])
            results.append(Reconstruction(to_uint8(ours_BCTHW[b]), tokens.clip(b), figures, uniform_THWC))
        return results

    def _at_uniform(self, video_BCTHW: Tensor, tokens_B: Tensor) -> tuple[Tensor, list[dict[str, Any]]]:
        """Each clip at the uniform assignment whose tokens are nearest to `tokens_B`, and what that gives."""
        space = self.tokenizer.space
        level_B = [min(space.levels, key=lambda k: abs(k * space.num_blocks - int(tokens))) for tokens in tokens_B]
        row_B = torch.tensor([space.uniform_row(level) for level in level_B])  # [B]
        uniform_BCTHW = self.tokenizer.decode(self.tokenizer.encode(video_BCTHW, space.lengths_of(row_B)))
        measured = self._measure(uniform_BCTHW, video_BCTHW.to(uniform_BCTHW.device))
        figures = [
            {f"uniform_{key}": None if value_B is None else float(value_B[b]) for key, value_B in measured.items()}
            | {"uniform_tokens": level * space.num_blocks}
            for b, level in enumerate(level_B)
        ]
        return uniform_BCTHW, figures

    def _measure(self, ours_BCTHW: Tensor, real_BCTHW: Tensor) -> dict[str, Tensor | None]:
        return {
            "psnr": psnr(ours_BCTHW, real_BCTHW).clamp(max=PSNR_OF_EQUAL).cpu(),
            "ssim": ssim(ours_BCTHW, real_BCTHW).cpu(),
            "lpips": None if self.perceptual is None else self.perceptual.clip_distance(ours_BCTHW, real_BCTHW).cpu(),
        }

    def _router_figures(self, score_A: Tensor, row: int) -> dict[str, Any]:
        """Tokens of the router's own choice, and by how much its score beats the best uniform row allowed.

        The gap compares what the budget compares: score minus price times tokens. Under quality:Q instead: the
        predicted distance, and whether it keeps Q.
        """
        space = self.tokenizer.space
        if self.budget.max_distance is not None:
            kept = keeps_quality(self.budget, score_A[None], torch.tensor([row]))
            return {"predicted_distance": -float(score_A[row]), "keeps_quality": bool(kept)}
        price = self.budget.price if self.price is None else self.price
        value_A = score_A.double() - price * space.tokens_A.double()  # [A], logits
        limit = self.budget.max_tokens or space.max_tokens
        uniform = {level: space.uniform_row(level) for level in space.levels if level * space.num_blocks <= limit}
        best_level = max(uniform, key=lambda level: float(value_A[uniform[level]]))
        return {
            "router_tokens": int(space.tokens_A[space.best_row(score_A)]),
            "best_uniform": best_level,
            "score_gap": float(value_A[row] - value_A[uniform[best_level]]),
        }


def motion_figures(frames_THWC: np.ndarray, num_blocks: int) -> dict[str, Any]:
    """Motion of the clip and of each temporal block; a block's first frame is compared with the one before it."""
    in_block = len(frames_THWC) // num_blocks
    blocks = [frames_THWC[max(0, t * in_block - 1) : (t + 1) * in_block] for t in range(num_blocks)]
    return {"motion": motion(frames_THWC), "block_motion": [motion(block) for block in blocks]}


def pick_perceptual(name: str, device: torch.device, size: Size) -> tuple[PerceptualDistance | None, str | None]:
    """Load `auto` (the first of PERCEPTUAL_ORDER with weights on this machine), `none`, or a name of `load_perceptual`.

    Returns the distance, or None and the reason. UserError if a named network lacks weights or frames of this `size`
    are too small for it.
    """
    if name == "none":
        return None, "not asked for (--perceptual none)"
    if name != "auto":
        check_frames_fit(name, size)
        return load_perceptual(name).to(device), None
    reasons = []
    for candidate in PERCEPTUAL_ORDER:
        try:
            check_frames_fit(candidate, size)
            return load_perceptual(candidate).to(device), None
        except UserError as error:
            reasons.append(str(error))
    return None, "; ".join(reasons)
