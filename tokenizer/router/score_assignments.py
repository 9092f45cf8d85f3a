"""Perceptual distance, PSNR and MSE of clips under all assignments: as a prefix tree, and by brute force.

Everything up to block t depends only on (a_1 .. a_t), because every attention is block-causal. So the assignments are
the leaves of a tree, each node is one block under one prefix, and 625 assignments take 780 block steps instead of
2500. The clips of a batch go in lockstep, so all shapes are equal; real frames pass the perceptual network once.

Letters: B clips, A assignments (rows), F images.
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor

from tokenizer.common.image_quality import psnr_of_mse
from tokenizer.losses.perceptual import PerceptualDistance
from tokenizer.model import VideoTokenizer
from tokenizer.streaming import ClipPatches, Past, read_patches, step_block

Scores = tuple[Tensor, Tensor, Tensor]
"""(perceptual distance, PSNR in dB, MSE), float32 [B, A] each, on the CPU."""


class Scorer:
    def __init__(self, tokenizer: VideoTokenizer, perceptual: PerceptualDistance, frames_per_block: int = 0) -> None:
        self.tokenizer, self.perceptual, self.space = tokenizer, perceptual, tokenizer.space
        in_block = tokenizer.config.patch_frames
        wanted = min(frames_per_block or in_block, in_block)
        self.seen_frames = [(2 * i + 1) * in_block // (2 * wanted) for i in range(wanted)]  # inside each block

    @torch.inference_mode()
    def tree(self, video_BCTHW: Tensor) -> Scores:
        """All assignments by a depth-first walk over their common prefixes."""
        blocks = video_BCTHW.chunk(self.space.num_blocks, dim=2)
        real = [self.perceptual.features(self._images(block)) for block in blocks]
        patches = read_patches(self.tokenizer, video_BCTHW)
        leaves: list[tuple[Tensor, Tensor]] = []  # in lexicographic order, which is the order of the table's rows

        def walk(t: int, past: Past, distance_B: Tensor, mse_B: Tensor) -> None:
            if t == self.space.num_blocks:
                leaves.append((distance_B / t, mse_B / t))
                return
            for length in self.space.levels:
                frames, after = self._step(patches, t, length, past)
                ours = self.perceptual.features(self._images(frames))
                here_B = self.perceptual.distance(ours, real[t]).view(len(frames), -1).mean(dim=1)
                walk(t + 1, after, distance_B + here_B, mse_B + _mse(frames, blocks[t]))

        nothing_B = torch.zeros(len(video_BCTHW), device=video_BCTHW.device)
        walk(0, Past.empty(self.tokenizer), nothing_B, nothing_B)
        return _collect(leaves)

    @torch.inference_mode()
    def brute_force(self, video_BCTHW: Tensor) -> Scores:
        """Each assignment on its own, by the tokenizer's ordinary forward: the oracle for `tree`."""
        leaves = []
        for length_N in self.space.table_AN:
            ours = self.tokenizer(video_BCTHW, length_N.expand(len(video_BCTHW), -1)).video_BCTHW.clamp(0, 1)
            pairs = zip(*(x.chunk(self.space.num_blocks, dim=2) for x in (ours, video_BCTHW)), strict=True)
            per_block = [
                self.perceptual(self._images(a), self._images(b)).view(len(a), -1).mean(dim=1) for a, b in pairs
            ]
            leaves.append((torch.stack(per_block).mean(dim=0), _mse(ours, video_BCTHW)))
        return _collect(leaves)

    def _step(self, patches: ClipPatches, t: int, length: int, past: Past) -> tuple[Tensor, Past]:
        _, frames, after = step_block(self.tokenizer, patches, t, length, past)
        return frames, after

    def _images(self, block_BCTHW: Tensor) -> Tensor:
        """The frames of one block that the perceptual network looks at, [F, C, H, W]."""
        return rearrange(block_BCTHW[:, :, self.seen_frames], "B C T H W -> (B T) C H W")


def _mse(ours: Tensor, real: Tensor) -> Tensor:
    return (ours - real).square().flatten(1).mean(dim=1)


def _collect(leaves: list[tuple[Tensor, Tensor]]) -> Scores:
    distance_BA, mse_BA = (torch.stack(column, dim=1).float().cpu() for column in zip(*leaves, strict=True))
    return distance_BA, psnr_of_mse(mse_BA), mse_BA
