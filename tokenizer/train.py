"""Stages 1 and 4: train a tokenizer.

    python -m tokenizer.train configs/vq/VQ_SB_proxy_3fps.yaml                          # stage 1, random assignments
    python -m tokenizer.train configs/mini/final.yaml run.steps=500 optim.lr=2e-4       # stage 4, the router's

The config's `policy` chooses the lengths: fixed, random (stage 1), or by a frozen router (stage 4). Rerun the same
command to resume; the result is the same. `--dry-run` runs a few steps and prints the cost of the run.
"""

from __future__ import annotations

from tokenizer.common.cli import answer_help, training_parser

ABOUT = "Stages 1 and 4: train a tokenizer."


if __name__ == "__main__":
    answer_help(lambda: training_parser(ABOUT).parse_intermixed_args())  # before torch is imported

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from tokenizer.assignment import AssignmentSpace, pack
from tokenizer.blocks.bottlenecks import code_usage
from tokenizer.common import distributed
from tokenizer.common.checkpoint import init_from
from tokenizer.common.clip_shape import check_same_shape
from tokenizer.common.device import generator_for
from tokenizer.common.distributed import BatchShard
from tokenizer.common.errors import UserError, run_cli
from tokenizer.common.hub import parameters_by_part
from tokenizer.common.image_quality import psnr
from tokenizer.data.clips import DataConfig, build_dataset, check_used
from tokenizer.data.loader import ClipBatch, batches
from tokenizer.frozen.encoders import marked
from tokenizer.losses.gan import DiscriminatorConfig, Gan, frozen, generator_loss
from tokenizer.losses.objective import Alignment, AlignmentConfig, LossConfig, tokenizer_loss
from tokenizer.losses.perceptual import PerceptualDistance, check_frames_fit, load_perceptual
from tokenizer.model import TokenizerConfig, VideoTokenizer
from tokenizer.training.cli import parse_training_arguments, rehearse
from tokenizer.training.optim import OptimConfig
from tokenizer.training.train_state import RunConfig, Trainable, TrainState
from tokenizer.training.train_step import Tally, Terms, Update, Values, commit, split
from tokenizer.training.trainer import fit, portion, resumes, start_run


class Policy(Protocol):
    """Clips -> their lengths, int64 [B, N] on the CPU. Draws only from the generator.

    shard: the rows of the clips in the global batch; None if they are the whole batch.
    """

    def __call__(self, video_BCTHW: Tensor, generator: torch.Generator, shard: BatchShard | None = None) -> Tensor: ...


_OF_ROUTER = ("router_ckpt", "router_config", "router_sha256")


@dataclass
class PolicyConfig:
    kind: str = "random"  # "random": uniform over all rows, per clip; "fixed": `lengths`; "router": its argmax
    lengths: list[int] = field(default_factory=list)  # for kind "fixed": tokens of each block
    router_config: str = ""  # for kind "router": its YAML, checked against the weights (may be empty)
    router_ckpt: str = ""  # for kind "router": .safetensors file or run folder of stage 3
    router_sha256: str = ""  # of its weights; a run fills it in, so that it never resumes with another router

    def __post_init__(self) -> None:
        if self.kind not in ("random", "fixed", "router"):
            raise UserError(f"policy.kind = {self.kind!r}: choose 'random', 'fixed' or 'router'")
        if self.kind == "fixed" and not self.lengths:
            raise UserError("policy.kind = 'fixed' needs policy.lengths, e.g. [256, 256, 256, 256]")
        if self.kind == "router" and not self.router_ckpt:
            raise UserError("policy.kind = 'router' needs policy.router_ckpt, the result of stage 3")
        for name, belongs_to in (("lengths", "fixed"), *((name, "router") for name in _OF_ROUTER)):
            if getattr(self, name) and self.kind != belongs_to:
                raise UserError(f"policy.{name} is set, but policy.kind = {self.kind!r} does not read it")


def build_policy(config: PolicyConfig, tokenizer: TokenizerConfig, device: torch.device) -> Policy:
    """Build the policy of a config and fill in the router's sha256.

    Raises UserError if lengths or router do not fit the tokenizer, or if the config names another router's sha256.
    """
    space = AssignmentSpace(tuple(tokenizer.levels), tokenizer.num_blocks)
    if config.kind == "random":
        return partial(_random, space)
    if config.kind == "fixed":
        length_N = torch.tensor(config.lengths)
        space.rows_of(length_N)
        return lambda video_BCTHW, generator, shard=None: length_N.expand(len(video_BCTHW), -1)
    from tokenizer.router.predict import check_router_fits, load_router  # stage 4 alone needs the router's code

    router = load_router(config.router_ckpt, device, config.router_config or None)
    check_router_fits(router, tokenizer)
    if config.router_sha256 not in ("", router.sha256):
        raise UserError(
            f"policy.router_sha256={config.router_sha256} is not that of {config.router_ckpt}, {router.sha256}"
        )
    config.router_sha256 = router.sha256
    return lambda video_BCTHW, generator, shard=None: router.assign(video_BCTHW, together=device.type == "cuda")


def _random(
    space: AssignmentSpace, video_BCTHW: Tensor, generator: torch.Generator, shard: BatchShard | None = None
) -> Tensor:
    """Drawn for the whole global batch, so that a clip's lengths do not depend on the number of processes."""
    if shard is None:
        return space.lengths_of(space.draw_rows(len(video_BCTHW), generator))
    return space.lengths_of(shard.pick(space.draw_rows(shard.total, generator)))


_PICTURED = 6  # clips in the picture of a validation
_START_BATCHES = 64  # most batches that are encoded to initialise the codebook


@dataclass
class TokenizerTrainConfig:
    """Everything a YAML of stage 1 or 4 may set."""

    run: RunConfig = field(default_factory=RunConfig)
    model: TokenizerConfig = field(default_factory=TokenizerConfig)
    data: DataConfig = field(default_factory=DataConfig)
    val_data: DataConfig = field(default_factory=lambda: DataConfig(sources=["bundled:heldout"], augment=False))
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    discriminator: DiscriminatorConfig = field(  # with loss.gan
        default_factory=DiscriminatorConfig, metadata={"renamed_from": "adversary"}
    )
    alignment: AlignmentConfig = field(default_factory=AlignmentConfig)  # with loss.align
    optim: OptimConfig = field(default_factory=OptimConfig)
    init_from: str = ""  # another tokenizer to start from, of the same shape: .safetensors file or run folder
    bf16_stream: bool = False  # with run.precision=bf16: residual streams in bf16 too, less memory and less exact
    val_clips: int = 64  # held-out clips that a validation looks at, spread evenly over val_data

    def __post_init__(self) -> None:
        for name in ("data", "val_data"):
            check_same_shape(getattr(self, name), name, self.model, "the model")
        check_used(self.data, self.val_data)
        check_frames_fit(self.loss.perceptual_net, self.model.size)
        if not isinstance(self.model.size, int) and (self.loss.align > 0 or self.discriminator.net == "videomae"):
            raise UserError(
                f"V-JEPA 2 and VideoMAE read square clips, but model.size = {self.model.size}: set loss.align=0 and "
                "discriminator.net=patch or none"
            )
        if self.bf16_stream and self.run.precision == "none":
            raise UserError("bf16_stream = true, but run.precision = none does not use it: set run.precision=bf16")
        if (self.loss.gan > 0) != (self.discriminator.net != "none"):
            raise UserError(
                f"loss.gan = {self.loss.gan} and discriminator.net = {self.discriminator.net!r} clash: a weight above "
                "0 needs patch or videomae, and loss.gan=0 goes with none"
            )
        if self.discriminator.net == "none" and self.discriminator != DiscriminatorConfig():
            raise UserError("the section discriminator is set, but discriminator.net = 'none' does not read it")
        if self.loss.align == 0 and self.alignment != AlignmentConfig():
            raise UserError("the section alignment is set, but loss.align = 0 does not read it: set loss.align=0.7")


class TokenizerTraining:
    """One run: its state, data, losses and policy."""

    def __init__(self, config: TokenizerTrainConfig) -> None:
        self.config, run = config, config.run
        self.device = start_run(run)
        self.data = build_dataset(config.data, run.seed)
        self.val_data = build_dataset(config.val_data, run.seed)
        self.perceptual, self.judge = perceptual_pair(config.loss.perceptual_net, run.precision, self.device)
        self.policy = build_policy(config.policy, config.model, self.device)
        self.model = VideoTokenizer(config.model).to(self.device)
        self.model.bf16_stream = config.bf16_stream
        self.model.quantizer.has_entropy = config.loss.entropy != 0
        self.counts_codes = config.model.is_discrete
        shape = (config.model.num_frames, config.model.size)
        self.source_sha256 = ""
        self.gan = Gan(config.discriminator, *shape, run.seed, self.device) if config.loss.gan > 0 else None
        self.alignment = Alignment(config.alignment, config.model, self.device) if config.loss.align > 0 else None
        encoders = {
            "V-JEPA 2": self.alignment.encoder if self.alignment else None,
            "VideoMAE": self.gan.encoder if self.gan else None,
        }
        self.random_encoders = [name for name, encoder in encoders.items() if encoder is not None and encoder.is_random]
        # on every log line of a run with random encoders
        self.mark = {"random_frozen_encoders": float(len(self.random_encoders))} if self.random_encoders else {}
        if config.init_from:
            self.source_sha256 = init_from(self.model, config.init_from)
        elif not resumes(run):  # a resumed run has its codebook already
            self.start_codebook()
        head = self.alignment.head if self.alignment else None
        discriminator = None
        if self.gan is not None:
            optim, every = config.discriminator.optim, config.discriminator.every
            discriminator = Trainable("discriminator", self.gan.module, optim, run, self.device, every)
        kind = marked("tokenizer", self.random_encoders)
        self.state = TrainState.start(self.model, run, config.optim, kind, head, discriminator)

    def batches(self, start_step: int) -> Iterator[ClipBatch]:
        run, costs = self.config.run, self.costs if self.config.policy.kind == "random" else None
        return batches(
            self.data,
            run.batch_size,
            run.seed,
            start_step,
            run.num_workers,
            accumulate=run.accumulate,
            costs=costs,
            pinned=self.device.type == "cuda",
        )

    def costs(self, step: int) -> list[float]:
        """Cost of each clip of a step's global batch: its tokens, known in advance for random assignments only."""
        run = self.config.run
        drawn = self.policy(torch.empty(run.batch_size), generator_for(run.seed, "loss", step))
        return drawn.sum(dim=1).tolist()

    def train_step(self, batch: ClipBatch) -> Values:
        """One training step of the tokenizer and, every few steps, of its discriminator (arXiv 2603.12267, section 3).

        First compute the gradients of both networks; then `commit` applies both updates, or neither if any number is
        not finite. With run.accumulate the batch is computed in parts.
        """
        run, gan, step = self.config.run, self.gan, self.state.step
        parts = split(batch, run.accumulate)
        generator = Update(self.state.main, run, step)
        updates, fakes = [generator], []

        # generator: losses of reconstruction, quantizer and alignment, and the GAN loss that raises the logits of fakes
        for number, part in enumerate(parts):
            with generator.forward(number, len(parts)):
                fake_BCTHW, loss, terms = self.reconstruct(part, step)
                if gan is not None and gan.started(step):
                    with frozen(gan.module):
                        logits_BK = gan.judge(fake_BCTHW, "generator", step, part.shard)
                    gan_loss = generator_loss(gan.config.loss, logits_BK)
                    loss = loss + self.config.loss.gan * gan_loss
                    terms = {**terms, "gan": gan_loss.detach()}
            generator.backward(loss, terms)
            fakes.append(fake_BCTHW.detach())

        # discriminator, every few steps: real clips against the detached reconstructions of this step
        if gan is not None and self.state.discriminator is not None and gan.learns(step):
            discriminator = Update(self.state.discriminator, run, step)
            for number, (part, fake_BCTHW) in enumerate(zip(parts, fakes, strict=True)):
                with discriminator.forward(number, len(parts)):
                    real_BK = gan.judge(part.video(self.device), "real", step, part.shard)
                    fake_BK = gan.judge(fake_BCTHW, "fake", step, part.shard)
                    loss, terms = gan.loss(real_BK, fake_BK, step, part.shard)
                discriminator.backward(loss, terms)
            updates.append(discriminator)

        return commit(run, self.state, updates)

    def reconstruct(self, batch: ClipBatch, step: int) -> tuple[Tensor, Tensor, Terms]:
        """Clips -> their reconstructions [B, C, T, H, W], the loss without its GAN term, and the figures to log."""
        generator = generator_for(self.config.run.seed, "loss", step)
        video_BCTHW = batch.video(self.device)
        length_BN = self.policy(video_BCTHW, generator, batch.shard)
        output = self.model(video_BCTHW, length_BN, self.alignment.layer if self.alignment else 0, generator)
        align = None
        if self.alignment is not None and output.feature_BMD is not None:
            align = self.alignment.term(output.feature_BMD, video_BCTHW)
        loss, terms = tokenizer_loss(self.config.loss, output, video_BCTHW, self.perceptual, generator, align)
        code_L, num_codes = output.quantized.code_L, self.config.model.codebook_size
        level_K = torch.tensor(self.config.model.levels)
        figures: Terms = {
            **terms,
            "tokens_per_clip": float(length_BN.sum()) / len(length_BN),
            # [m], number of blocks at each level
            "tokens_histogram": (length_BN.flatten()[:, None] == level_K).sum(dim=0),
        }
        if self.counts_codes:
            figures = {**figures, "codes": Tally(torch.bincount(code_L.flatten(), minlength=num_codes), code_usage)}
        return output.video_BCTHW, loss, {**figures, **self.mark}

    @torch.no_grad()
    def start_codebook(self) -> None:
        """Initialise every code with a latent of a training clip, so that no code is dead at the start.

        Encodes as many batches as the codebook needs, shared among the processes.
        """
        if self.config.model.bottleneck != "vq":
            return
        run = self.config.run
        needed = 4 * self.config.model.codebook_size  # a sample of many clips: one batch has few kinds of latents
        generator = generator_for(run.seed, "codebook")
        latents: list[Tensor] = []
        found = step = 0
        while found < needed and step < _START_BATCHES:
            # the first batch shows how many latents a batch gives
            num = 1 if step == 0 else min(-(-(needed - found) * step // found), _START_BATCHES - step)
            for batch in batches(self.data, run.batch_size, run.seed, step, run.num_workers, steps=num):
                video_BCTHW = batch.video(self.device)
                length_BN = self.policy(video_BCTHW, generator, batch.shard)
                latents.append(distributed.rows_of_all(self.model.encode_latents(video_BCTHW, pack(length_BN))))
            found, step = sum(map(len, latents)), step + num
        self.model.quantizer.start(torch.cat(latents), generator)

    def validate(self, step: int) -> dict[str, float]:
        """PSNR and perceptual distance of held-out clips at each uniform level and under the run's own policy.

        Every process measures its part of the clips; rank 0 draws the picture.
        """
        config, at_once = self.config, portion(self.config.run)
        chosen, measured = self._validation_clips(), defaultdict[str, list[Tensor]](list)
        own = distributed.own_part(len(chosen))
        for start in range(own.start, own.stop, at_once):
            shard = BatchShard(list(range(start, min(start + at_once, own.stop))), len(chosen))
            real = torch.stack([self.val_data.get(chosen[row]).video_CTHW for row in shard.rows]).to(self.device)
            shape, generator = (len(real), config.model.num_blocks), generator_for(config.run.seed, "validate")
            assignments = {f"at_{level}": torch.full(shape, level) for level in config.model.levels}
            assignments["policy"] = self.policy(real, generator, shard)
            for name, length_BN in assignments.items():
                ours = self.model(real, length_BN).video_BCTHW.clamp(0, 1)
                measured[f"psnr_{name}"].append(psnr(ours, real))
                if self.judge is not None:
                    measured[f"{self.judge.name}_{name}"].append(self.judge.clip_distance(ours, real))
            measured["tokens_policy"].append(length_BN.sum(dim=1).float())
            if start == 0:  # `ours` and `length_BN` are those of the policy, the last assignment above
                from tokenizer.viz.frames import save_comparison

                picture, seen = Path(config.run.dir) / "samples" / f"{step:08d}.png", slice(_PICTURED)
                save_comparison(picture, real[seen], ours[seen], length_BN[seen], config.model.levels[-1])
        names = distributed.from_main(list(measured))  # a process may have no clip; rank 0 has the first
        rows = (torch.cat(measured[name]) if measured[name] else torch.zeros(0) for name in names)
        return {
            name: float(distributed.rows_of_all(row).mean()) for name, row in zip(names, rows, strict=True)
        } | self.mark

    def fit(self) -> None:
        """Train up to `run.steps`, resuming from `run.dir`."""
        config = self.config
        noted = {"init_from_sha256": self.source_sha256} if self.source_sha256 else {}
        fit(config.run, config, self.state, self.batches, self.train_step, self.validate, noted=noted)

    def rehearse(self) -> None:
        config, parts = self.config, parameters_by_part(self.model)
        beside = {
            "alignment head": self.alignment.head if self.alignment else None,
            "discriminator": self.gan.module if self.gan else None,
        }
        parts |= {name: sum(p.numel() for p in part.parameters()) for name, part in beside.items() if part is not None}
        rehearse(config.run, self.state, self.batches, self.train_step, parts)

    def _validation_clips(self) -> list[int]:
        """Indices spread evenly over the held-out set, shuffled so that the picture shows a mix."""
        num = min(self.config.val_clips, len(self.val_data))
        indices = torch.arange(num) * len(self.val_data) // num
        return indices[torch.randperm(num, generator=generator_for(0, "validation order"))].tolist()


def perceptual_pair(
    name: str, precision: str, device: torch.device
) -> tuple[PerceptualDistance | None, PerceptualDistance | None]:
    """The distance of the loss, in bf16 if the run is, and the distance of validations, always in fp32."""
    if name == "none":
        return None, None
    judge = load_perceptual(name).to(device)
    return load_perceptual(name, dtype=torch.bfloat16).to(device) if precision == "bf16" else judge, judge


def main() -> None:
    config, dry = parse_training_arguments(TokenizerTrainConfig, "vq", ABOUT)
    training = TokenizerTraining(config)
    training.rehearse() if dry else training.fit()


if __name__ == "__main__":
    run_cli(main)
