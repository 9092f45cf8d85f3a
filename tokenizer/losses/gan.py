"""The GAN loss of the tokenizer (arXiv 2603.12267, section 3): two discriminators, both losses, LeCam, augmentation.

    discriminator   high logits ("real") for training clips, low ones ("fake") for reconstructions
    generator       the tokenizer: its reconstructions should get high logits

The training step itself is `TokenizerTraining.train_step` in tokenizer/train.py. A discriminator gives a logit for
each of many places of a clip, and all places count alike: "patch", a transformer over spatio-temporal patches, or
"videomae", small trainable heads on features of a frozen VideoMAE. The losses run in float32.

Letters: B clips, C T H W, M patches of a clip, D width, S places of VideoMAE, E width of a feature, K places of a clip
that get a logit (M, or taps x S).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from tokenizer.blocks.patches import grid_of, patchify, sincos_3d
from tokenizer.blocks.transformer import ViTLayer
from tokenizer.common.clip_shape import Size, sides, size_text
from tokenizer.common.device import generator_for, send
from tokenizer.common.distributed import BatchShard, mean_over_ranks
from tokenizer.common.errors import UserError
from tokenizer.frozen.encoders import FrozenConfig, FrozenVideoMAE
from tokenizer.training.optim import OptimConfig


@dataclass
class PatchDiscriminatorConfig:
    """Size of the patch discriminator; the defaults are the paper's (38M parameters)."""

    layers: int = 12
    width: int = 512
    heads: int = 8
    mlp_ratio: float = 4.0
    patch_frames: int = 4
    patch_size: int = 8

    def __post_init__(self) -> None:
        if min(self.layers, self.heads, self.patch_frames, self.patch_size) < 1 or self.mlp_ratio <= 0:
            raise UserError("the patch discriminator's layers, heads, patch_frames, patch_size, mlp_ratio must be > 0")
        if self.width % self.heads or self.width % 8:
            raise UserError(f"patch.width = {self.width} must be a multiple of 8 and of patch.heads = {self.heads}")


class PatchDiscriminator(nn.Module):
    """Clips of `num_frames` frames of `size` (a side, or height and width) -> one logit for each patch."""

    position_MD: Tensor

    def __init__(self, config: PatchDiscriminatorConfig, num_frames: int, size: Size) -> None:
        """Raises UserError if the clips are no whole number of patches."""
        super().__init__()
        if num_frames % config.patch_frames or any(side % config.patch_size for side in sides(size)):
            raise UserError(
                f"clips of {num_frames} frames of {size_text(size)} pixels are no whole number of the discriminator's "
                f"patches: patch.patch_frames = {config.patch_frames}, patch.patch_size = {config.patch_size}"
            )
        self.config = config
        num_blocks, grid = num_frames // config.patch_frames, grid_of(size, config.patch_size)
        self.embed = nn.Linear(3 * config.patch_frames * config.patch_size**2, config.width)
        self.register_buffer("position_MD", sincos_3d(num_blocks, grid, config.width), persistent=False)
        self.layers = nn.ModuleList(
            ViTLayer(config.width, config.heads, config.mlp_ratio) for _ in range(config.layers)
        )
        self.norm = nn.LayerNorm(config.width)
        self.head = nn.Linear(config.width, 1)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Matrices: Xavier uniform. Biases: 0. Head: N(0, 0.02), so that at first it has hardly an opinion."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.normal_(self.head.weight, std=0.02)

    def forward(self, video_BCTHW: Tensor) -> Tensor:
        """Pixels around [0, 1] -> logits [B, M], one for each patch; high = real."""
        x_BMD = self.embed(patchify(2 * video_BCTHW - 1, self.config.patch_frames, self.config.patch_size))
        x_BMD = x_BMD + self.position_MD
        for layer in self.layers:
            x_BMD = layer(x_BMD)
        return self.head(self.norm(x_BMD))[..., 0]


_SLOPE = 0.2  # of LeakyReLU below 0
_VIRTUAL_BATCH = 8


@dataclass
class SemanticDiscriminatorConfig:
    """Heads on VideoMAE-B; the defaults are the paper's (29.6M trainable parameters)."""

    taps: list[int] = field(default_factory=lambda: [0, 3, 6, 9, 12])  # after so many blocks; 0 is the embedding
    kernel: int = 9  # neighbouring places that a head looks at together, odd
    encoder: FrozenConfig = field(default_factory=FrozenConfig)  # VideoMAE

    def __post_init__(self) -> None:
        if self.kernel < 1 or self.kernel % 2 == 0:
            raise UserError(f"videomae.kernel = {self.kernel}: must be odd and at least 1")
        if len(set(self.taps)) != len(self.taps):
            raise UserError(f"videomae.taps = {self.taps}: each once")


class LocalBatchNorm(nn.Module):
    """Batch norm over eight clips at a time, always by their own statistics: real and fake clips never share them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x_BES: Tensor) -> Tensor:
        groups = [
            F.batch_norm(group, None, None, self.weight, self.bias, training=True)
            for group in x_BES.split(_VIRTUAL_BATCH)
        ]
        return torch.cat(groups)


class _Block(nn.Module):
    """Convolution over the row of places, which closes to a ring; local batch norm; LeakyReLU."""

    def __init__(self, width: int, kernel: int) -> None:
        super().__init__()
        conv = nn.Conv1d(width, width, kernel, padding=kernel // 2, padding_mode="circular", bias=False)
        self.conv = spectral_norm(conv)  # no bias: the norm would take it away again
        self.norm = LocalBatchNorm(width)

    def forward(self, x_BES: Tensor) -> Tensor:
        return F.leaky_relu(self.norm(self.conv(x_BES)), _SLOPE)


class Head(nn.Module):
    """Features of one tap -> a logit for each place, logits_BS."""

    def __init__(self, width: int, kernel: int) -> None:
        super().__init__()
        self.first = _Block(width, 1)
        self.second = _Block(width, kernel)
        self.to_logit = spectral_norm(nn.Conv1d(width, 1, 1))

    def forward(self, feature_BSE: Tensor) -> Tensor:
        x_BES = self.first(feature_BSE.transpose(1, 2))
        x_BES = (x_BES + self.second(x_BES)) * math.sqrt(0.5)
        return self.to_logit(x_BES)[:, 0]


class SemanticDiscriminator(nn.Module):
    """Clips -> one logit for each place at each tap. Trainable and saved are the heads alone."""

    def __init__(self, config: SemanticDiscriminatorConfig, encoder: FrozenVideoMAE, num_frames: int) -> None:
        """Raises UserError for taps or clips that VideoMAE does not have."""
        super().__init__()
        encoder.check(num_frames, config.taps)
        self.taps = config.taps
        self.encoder = encoder
        self.heads = nn.ModuleList(Head(encoder.width, config.kernel) for _ in config.taps)

    def forward(self, video_BCTHW: Tensor) -> Tensor:
        """Pixels around [0, 1] -> logits_BK; high = real."""
        features = self.encoder.features(video_BCTHW, self.taps)
        return torch.cat([head(feature) for head, feature in zip(self.heads, features, strict=True)], dim=1)


LOSSES = ("non_saturating", "hinge")
_LECAM_DECAY = 0.999


def discriminator_loss(
    kind: str,
    real_BK: Tensor,
    fake_BK: Tensor,
    label_noise: float,
    generator: torch.Generator,
    shard: BatchShard | None = None,
) -> Tensor:
    """The discriminator's loss, a scalar: the mean of its losses on real clips and on reconstructions.

    non_saturating: binary cross-entropy against noisy labels, drawn for every place from [1 - label_noise, 1] for
    real clips and from [0, label_noise] for reconstructions.
    hinge: relu(1 - real) and relu(1 + fake), without labels; draws nothing.
    shard: the rows of the clips in the global batch, if they are not all of it.
    """
    real_BK, fake_BK = real_BK.float(), fake_BK.float()
    if kind == "hinge":
        return (F.relu(1 - real_BK).mean() + F.relu(1 + fake_BK).mean()) / 2
    shard = shard or BatchShard(list(range(len(real_BK))), len(real_BK))
    shape = (2, shard.total, real_BK.shape[1])  # drawn for all clips, so that processes draw what one would
    noise_2BK = torch.rand(shape, generator=generator) * label_noise
    real_noise_BK, fake_noise_BK = (send(shard.pick(noise_BK), real_BK.device) for noise_BK in noise_2BK)
    real = F.binary_cross_entropy_with_logits(real_BK, 1 - real_noise_BK)
    return (real + F.binary_cross_entropy_with_logits(fake_BK, fake_noise_BK)) / 2


def generator_loss(kind: str, fake_BK: Tensor) -> Tensor:
    """The tokenizer's GAN loss, a scalar: -log sigmoid(fake), or with hinge -fake. Its labels are never noisy."""
    fake_BK = fake_BK.float()
    return -fake_BK.mean() if kind == "hinge" else F.softplus(-fake_BK).mean()


class LeCam(nn.Module):
    """LeCam regularisation: keeps the logits of each side near a moving average of the *other* side's.

    The averages have decay 0.999, ramping up from 0.1 as (1 + n) / (10 + n), because they start from zero.
    """

    real_mean: Tensor
    fake_mean: Tensor
    num_updates: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("real_mean", "fake_mean", "num_updates"):
            self.register_buffer(name, torch.zeros(()))

    @torch.no_grad()
    def update(self, real_BK: Tensor, fake_BK: Tensor) -> None:
        """Add one batch, of all processes together, to the means. A skipped step restores them, see `Update`."""
        new = 1 - torch.clamp((1 + self.num_updates) / (10 + self.num_updates), max=_LECAM_DECAY)
        self.real_mean.lerp_(mean_over_ranks(real_BK.float().mean()), new)
        self.fake_mean.lerp_(mean_over_ranks(fake_BK.float().mean()), new)
        self.num_updates += 1

    def forward(self, real_BK: Tensor, fake_BK: Tensor) -> Tensor:
        """Mean square of relu(real - mean fake), plus that of relu(mean real - fake): a scalar, before its weight."""
        above_BK = F.relu(real_BK.float() - self.fake_mean)
        below_BK = F.relu(self.real_mean - fake_BK.float())
        return above_BK.square().mean() + below_BK.square().mean()


SHIFT = 1 / 8  # of the side, the farthest that a clip moves
CUTOUT = 0.2  # of the side, the side of the hole
_BRIGHTNESS = 0.25  # of the pixel range, the most that is added or taken


def augment_clips(video_BCTHW: Tensor, generator: torch.Generator, shard: BatchShard | None = None) -> Tensor:
    """Pixels around [0, 1] -> the same clips altered, each by its own draw; gradients flow to the pixels.

    Pixels that a shift or a hole leaves empty are grey (0.5). Draws come from `generator`, on the CPU, seven for each
    clip of the global batch. shard: the rows of these clips in it, if they are not all of it.
    """
    shard = shard or BatchShard(list(range(len(video_BCTHW))), len(video_BCTHW))
    draw_B7 = shard.pick(torch.rand(shard.total, 7, generator=generator))
    x = video_BCTHW - 0.5  # grey is 0
    x = _cut_hole(_shift(_recolour(x, draw_B7[:, :3]), draw_B7[:, 3:5]), draw_B7[:, 5:])
    return x + 0.5


def _recolour(x_BCTHW: Tensor, draw_B3: Tensor) -> Tensor:
    """Brightness -0.25 .. 0.25 added; saturation 0 .. 2 times around the grey of each pixel; contrast 0.5 .. 1.5 times
    around the mean of the clip."""
    draw_3B = send(draw_B3.T[..., None, None, None, None], x_BCTHW.device).to(x_BCTHW)
    x_BCTHW = x_BCTHW + (2 * draw_3B[0] - 1) * _BRIGHTNESS
    grey = x_BCTHW.mean(dim=1, keepdim=True)
    x_BCTHW = grey + (x_BCTHW - grey) * (2 * draw_3B[1])
    mean = x_BCTHW.mean(dim=(1, 2, 3, 4), keepdim=True)
    return mean + (x_BCTHW - mean) * (draw_3B[2] + 0.5)


def _shift(x_BCTHW: Tensor, draw_B2: Tensor) -> Tensor:
    """Moved by whole pixels, up to an eighth of the side."""
    height, width = x_BCTHW.shape[-2:]
    far = round(max(height, width) * SHIFT)
    start_B2 = (draw_B2 * (2 * far + 1)).long().tolist()
    padded = F.pad(x_BCTHW, (far, far, far, far))
    return torch.stack(
        [clip[..., y : y + height, x : x + width] for clip, (y, x) in zip(padded, start_B2, strict=True)]
    )


def _cut_hole(x_BCTHW: Tensor, draw_B2: Tensor) -> Tensor:
    """A hole of a fifth of the height and of the width, centred anywhere in the frame, is made grey."""
    height, width = x_BCTHW.shape[-2:]
    centre_2B1 = draw_B2.T[..., None]
    row_BH, column_BW = (
        (torch.arange(side) + 0.5 - side * centre_B1).abs() <= side * CUTOUT / 2
        for side, centre_B1 in zip((height, width), centre_2B1, strict=True)
    )
    hole_BHW = row_BH[:, :, None] & column_BW[:, None, :]
    return x_BCTHW.masked_fill(send(hole_BHW[:, None, None], x_BCTHW.device), 0.0)


NETS = ("none", "patch", "videomae")


@dataclass
class DiscriminatorConfig:
    """Used if loss.gan is above 0. Defaults are those of the patch discriminator."""

    net: str = "none"  # none | patch (on pixels) | videomae (on features of a frozen VideoMAE)
    loss: str = "non_saturating"  # or "hinge"
    start_step: int = 0  # step at which GAN training starts, for both networks
    every: int = 5  # steps from one update of the discriminator to the next
    label_noise: float = 0.3  # non_saturating: labels are drawn from [1 - noise, 1] and [0, noise]
    lecam: float = 0.001  # weight of LeCam in the discriminator's loss
    augment: bool = False  # differentiable augmentation of everything it sees
    patch: PatchDiscriminatorConfig = field(default_factory=PatchDiscriminatorConfig)
    videomae: SemanticDiscriminatorConfig = field(default_factory=SemanticDiscriminatorConfig)
    optim: OptimConfig = field(
        default_factory=lambda: OptimConfig(lr=3e-5, betas=[0.5, 0.9], weight_decay=0.0, warmup_steps=0)
    )

    def __post_init__(self) -> None:
        if self.net not in NETS or self.loss not in LOSSES:
            raise UserError(
                f"discriminator.net = {self.net!r} is one of {NETS}, discriminator.loss = {self.loss!r} of {LOSSES}"
            )
        if self.start_step < 0 or self.every < 1 or self.lecam < 0:
            raise UserError(
                f"discriminator.start_step = {self.start_step} and discriminator.lecam = {self.lecam} must be >= 0, "
                f"discriminator.every = {self.every} at least 1"
            )
        if not 0 <= self.label_noise < 0.5:
            raise UserError(f"discriminator.label_noise = {self.label_noise}: must lie in [0, 0.5)")
        for net, section in (("patch", self.patch), ("videomae", self.videomae)):
            if self.net != net and section != type(section)():
                raise UserError(f"discriminator.{net} is set, but discriminator.net = {self.net!r} does not read it")
        if self.loss == "hinge" and self.label_noise:
            raise UserError("discriminator.loss = 'hinge' has no labels: set discriminator.label_noise=0")


class Gan:
    """The discriminator with its LeCam averages, and the steps at which it is used and updated."""

    def __init__(
        self, config: DiscriminatorConfig, num_frames: int, size: Size, seed: int, device: torch.device
    ) -> None:
        """Raises UserError if weights are missing or the clips do not fit."""
        self.config, self.seed = config, seed
        self.encoder = FrozenVideoMAE(config.videomae.encoder).to(device) if config.net == "videomae" else None
        self.discriminator, self.lecam = self._build(num_frames, size), LeCam()
        # everything that its optimiser trains and that a checkpoint holds
        self.module: nn.Module = nn.ModuleDict({"discriminator": self.discriminator, "lecam": self.lecam}).to(device)

    def started(self, step: int) -> bool:
        """Whether the tokenizer's loss has the GAN term at this step."""
        return step >= self.config.start_step

    def learns(self, step: int) -> bool:
        """Whether the discriminator is updated at this step."""
        return self.started(step) and (step - self.config.start_step) % self.config.every == 0

    def judge(self, video_BCTHW: Tensor, side: str, step: int, shard: BatchShard | None = None) -> Tensor:
        """Pixels around [0, 1] -> logits_BK, high for real clips. Augments first if config.augment.

        side: "generator", "real" or "fake"; each draws on its own. shard: rows of the clips in the global
        batch, if they are not all of it; draws do not depend on the number of processes.
        """
        if self.config.augment:
            video_BCTHW = augment_clips(video_BCTHW, generator_for(self.seed, "augment", side, step), shard)
        return self.discriminator(video_BCTHW)

    def loss(
        self, real_BK: Tensor, fake_BK: Tensor, step: int, shard: BatchShard | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The discriminator's loss with LeCam, and what to log.

        accuracy: share of places judged rightly (0.5 = guessing); logit_gap: mean real minus mean fake.
        """
        config, labels = self.config, generator_for(self.seed, "labels", step)
        total = discriminator_loss(config.loss, real_BK, fake_BK, config.label_noise, labels, shard)
        terms = {"gan": total.detach()}
        if config.lecam > 0:
            self.lecam.update(real_BK, fake_BK)
            penalty = self.lecam(real_BK, fake_BK)
            total = total + config.lecam * penalty
            terms["lecam"] = penalty.detach()
        real_BK, fake_BK = real_BK.detach().float(), fake_BK.detach().float()
        right = ((real_BK > 0).float().mean() + (fake_BK < 0).float().mean()) / 2
        return total, terms | {"accuracy": right, "logit_gap": real_BK.mean() - fake_BK.mean()}

    def _build(self, num_frames: int, size: Size) -> nn.Module:
        if self.encoder is not None:
            return SemanticDiscriminator(self.config.videomae, self.encoder, num_frames)
        return PatchDiscriminator(self.config.patch, num_frames, size)


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Inside the `with`, weights get no gradients and buffers do not move: eval mode keeps spectral norm as it is."""
    trainable, was_training = [p for p in module.parameters() if p.requires_grad], module.training
    module.requires_grad_(False).eval()
    try:
        yield
    finally:
        module.train(was_training)
        for parameter in trainable:
            parameter.requires_grad_(True)
