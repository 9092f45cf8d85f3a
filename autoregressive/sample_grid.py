"""A grid of samples while a model is being trained: sampled, decoded, and written as one picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from autoregressive.model import GPT
from autoregressive.sampler import Request, Sample, Sampler, SamplingConfig
from autoregressive.sequence import SequenceLayout
from tokenizer.data.video_io import to_uint8
from tokenizer.model import VideoTokenizer
from tokenizer.tokens import VideoTokens
from tokenizer.viz.frames import ShownClip, contact_sheet


def sample_grid(
    path: str | Path, model: GPT, tokenizer: VideoTokenizer, requests: Sequence[Request], config: SamplingConfig
) -> list[Sample]:
    """Sample `requests` and write a PNG of them, with the tokens of each block -> the samples, in that order.

    The model may be in training mode; it comes back in the mode it had. Broken sequences have no place in the picture,
    and if all are broken there is none. The same seed and keys give the same noise at every validation.
    """
    was_training = model.training
    model.eval()
    try:
        by_key = {sample.request.key: sample for sample in Sampler(model, config).run(requests)}
    finally:
        model.train(was_training)
    samples = [by_key[request.key] for request in requests]
    good = [sample for sample in samples if sample.broken is None]
    if good:
        video_BCTHW = tokenizer.decode(tokens_of(good, model.layout, tokenizer))
        clips = [ShownClip(to_uint8(video), s.lengths) for video, s in zip(video_BCTHW, good, strict=True)]
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        contact_sheet(clips, model.layout.levels[-1]).save(path)
    return samples


def tokens_of(samples: Sequence[Sample], layout: SequenceLayout, tokenizer: VideoTokenizer) -> VideoTokens:
    """Sampled clips, none of them broken, as what the tokenizer decodes."""
    code_L = torch.cat([sample.codes(layout).code_L for sample in samples])
    length_BN = torch.tensor([sample.lengths for sample in samples])
    c = tokenizer.config
    return VideoTokens(code_L, length_BN, c.num_frames, c.size, c.codebook_size, tokenizer.sha256)
