"""Stages 1 and 4: train a tokenizer. The config's `policy` says where the lengths come from (paper.md section 3).

    python -m tokenizer.train configs/vq/VQ_SB_proxy_3fps.yaml                          # stage 1, random assignments
    python -m tokenizer.train configs/mini/final.yaml run.steps=500 optim.lr=2e-4       # stage 4, the router's

Started again with the same run.dir it resumes by itself, to the same result. `--dry-run` builds everything, runs two
steps and says what the run would cost.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from tokenizer.assignment import pack
from tokenizer.blocks.quantizer import code_usage
from tokenizer.common.config import to_dict
from tokenizer.common.entry import parse_training_arguments, rehearse
from tokenizer.common.errors import UserError, run_cli
from tokenizer.common.image_quality import psnr
from tokenizer.common.loop import RunConfig, TrainState, fit, start_run
from tokenizer.common.optim import OptimConfig
from tokenizer.common.picture import save_comparison
from tokenizer.common.runtime import generator_for
from tokenizer.data.clips import DataConfig, build_dataset
from tokenizer.data.loader import ClipBatch, batches
from tokenizer.losses.objective import LossConfig, tokenizer_loss
from tokenizer.losses.perceptual import load_perceptual
from tokenizer.model import TokenizerConfig, VideoTokenizer, parameters_by_part
from tokenizer.policy import PolicyConfig, build_policy

_PICTURED = 6  # clips in the picture of a validation
_START_BATCHES = 64  # at most so many batches are encoded to start the codebook


@dataclass
class TokenizerTrainConfig:
    """Everything a YAML of stage 1 or 4 may set."""

    run: RunConfig = field(default_factory=RunConfig)
    model: TokenizerConfig = field(default_factory=TokenizerConfig)
    data: DataConfig = field(default_factory=DataConfig)
    val_data: DataConfig = field(default_factory=lambda: DataConfig(sources=["bundled:heldout"], augment=False))
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    val_clips: int = 64  # held-out clips that a validation looks at, spread evenly over val_data

    def __post_init__(self) -> None:
        for section, name in itertools.product(("data", "val_data"), ("num_frames", "size")):
            wanted, found = getattr(self.model, name), getattr(getattr(self, section), name)
            if found != wanted:
                raise UserError(
                    f"{section}.{name} = {found} but model.{name} = {wanted}: set {section}.{name}={wanted}"
                )


class TokenizerTraining:
    """One run: the state, and what its steps and validations need."""

    def __init__(self, config: TokenizerTrainConfig) -> None:
        self.config, run = config, config.run
        self.device = start_run(run)
        self.data = build_dataset(config.data, run.seed)
        self.val_data = build_dataset(config.val_data, run.seed)
        needs_net = config.loss.perceptual_net != "none"
        self.perceptual = load_perceptual(config.loss.perceptual_net).to(self.device) if needs_net else None
        self.policy = build_policy(config.policy, config.model, self.device)
        self.model = VideoTokenizer(config.model).to(self.device)
        self.start_codebook()
        self.state = TrainState.start(self.model, run, config.optim, kind="tokenizer")

    def batches(self, start_step: int) -> Iterator[ClipBatch]:
        run, costs = self.config.run, self.costs if self.config.policy.kind == "random" else None
        return batches(
            self.data, run.batch_size, run.seed, start_step, run.num_workers, accumulate=run.accumulate, costs=costs
        )

    def costs(self, step: int) -> list[float]:
        """What each clip of a step's global batch will cost: about its tokens. Known only of random assignments."""
        run = self.config.run
        drawn = self.policy(torch.empty(run.batch_size), generator_for(run.seed, "loss", step))
        return drawn.sum(dim=1).tolist()

    def loss(self, batch: ClipBatch, step: int) -> tuple[Tensor, dict[str, Tensor | float]]:
        """One batch -> the loss, and everything worth a log line."""
        generator = generator_for(self.config.run.seed, "loss", step)
        video_BCTHW = batch.video_BCTHW.to(self.device)
        length_BN = self.policy(video_BCTHW, generator, batch.places)
        output = self.model(video_BCTHW, length_BN)
        loss, terms = tokenizer_loss(self.config.loss, output, video_BCTHW, self.perceptual, generator)
        usage = code_usage(output.quantized.code_L, self.config.model.codebook_size)
        usage["dead_codes"] = round((1 - usage["code_usage"]) * self.config.model.codebook_size)
        level_K = torch.tensor(self.config.model.levels)
        tokens = {"tokens_per_clip": float(length_BN.sum()) / len(length_BN)}
        # how many blocks got each level
        histogram_K = (length_BN.flatten()[:, None] == level_K).sum(dim=0)
        return loss, {**terms, **usage, **tokens, "tokens_histogram": histogram_K}

    @torch.no_grad()
    def start_codebook(self) -> None:
        """Begin the codes at latents of training clips, so that none is dead from the start (paper.md section 2)."""
        generator = generator_for(self.config.run.seed, "codebook")
        latents: list[Tensor] = []
        run = self.config.run
        everything = batches(self.data, run.batch_size, run.seed, 0, run.num_workers, whole=True)
        for batch in itertools.islice(everything, _START_BATCHES):
            video_BCTHW = batch.video_BCTHW.to(self.device)
            length_BN = self.policy(video_BCTHW, generator)
            latents.append(self.model.encode_latents(video_BCTHW, pack(length_BN)))
            if sum(map(len, latents)) >= self.config.model.codebook_size:
                break
        self.model.quantizer.start_from(torch.cat(latents), generator)

    def validate(self, step: int) -> dict[str, float]:
        """PSNR and perceptual distance of held-out clips at each uniform level and under the run's own policy."""
        config, measured = self.config, defaultdict[str, list[Tensor]](list)
        generator = generator_for(config.run.seed, "validate")
        chosen = self._validation_clips()
        for start in range(0, len(chosen), config.run.batch_size):
            some = chosen[start : start + config.run.batch_size]
            real = torch.stack([self.val_data.get(i).video_CTHW for i in some]).to(self.device)
            shape = (len(some), config.model.num_blocks)
            assignments = {f"at_{level}": torch.full(shape, level) for level in config.model.levels}
            assignments["policy"] = self.policy(real, generator)
            for name, length_BN in assignments.items():
                ours = self.model(real, length_BN).video_BCTHW.clamp(0, 1)
                measured[f"psnr_{name}"].append(psnr(ours, real))
                if self.perceptual is not None:
                    measured[f"{self.perceptual.name}_{name}"].append(self.perceptual.clip_distance(ours, real))
            measured["tokens_policy"].append(length_BN.sum(dim=1).float())
            if start == 0:  # `ours` and `length_BN` are those of the policy, the last assignment above
                picture, seen = Path(config.run.dir) / "samples" / f"{step:08d}.png", slice(_PICTURED)
                save_comparison(picture, real[seen], ours[seen], length_BN[seen], config.model.levels[-1])
        return {name: float(torch.cat(values).mean()) for name, values in measured.items()}

    def fit(self) -> None:
        """Train to the end of `run.steps`, from wherever `run.dir` stands."""
        config = self.config
        fit(config.run, config.optim, to_dict(config), self.state, self.batches, self.loss, self.validate)

    def rehearse(self) -> None:
        """`--dry-run`: two steps, nothing written."""
        config, parts = self.config, parameters_by_part(self.model)
        rehearse(config.run, config.optim, self.state, self.batches, self.loss, parts)

    def _validation_clips(self) -> list[int]:
        """Indices spread evenly over the held-out set, in an order that mixes the first picture's clips."""
        num = min(self.config.val_clips, len(self.val_data))
        indices = torch.arange(num) * len(self.val_data) // num
        return indices[torch.randperm(num, generator=generator_for(0, "validation order"))].tolist()


def main() -> None:
    config, dry = parse_training_arguments(TokenizerTrainConfig, "vq", "Stages 1 and 4: train a tokenizer.")
    training = TokenizerTraining(config)
    training.rehearse() if dry else training.fit()


if __name__ == "__main__":
    run_cli(main)
