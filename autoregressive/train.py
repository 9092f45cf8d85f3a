"""Stage 5b: train a GPT on tokens, for class-to-video or for frame prediction (arXiv 2603.12267).

    python -m autoregressive.train configs/ar/GPT_B_c2v_VQ_SB_with_router_w_lpips_1.2.yaml
    python -m autoregressive.train configs/mini/gpt_fp.yaml run.steps=500 optim.lr=2e-4

The archive of stage 5a decides which of the two. Rerun the same command to resume, to the same result. `--dry-run`
builds everything, runs a few steps and prints what the run would cost.

Letters: L packed ids, W predicted ones among them, V ids of the head.
"""

from __future__ import annotations

from tokenizer.common.cli import answer_help, training_parser

ABOUT = "Stage 5b: train a GPT on tokens."


if __name__ == "__main__":
    answer_help(lambda: training_parser(ABOUT).parse_intermixed_args())  # before torch is imported

import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from autoregressive.batches import BatchRule, TokenBatch, token_batches
from autoregressive.model import GPT, GPTConfig
from autoregressive.presets import check_vocabulary, init_weights_from, load_gpt
from autoregressive.sequence import PackedSequences, SequenceLayout, length_rule, pack_sequences
from autoregressive.token_archive import ArchiveFacts, TokenArchive
from tokenizer.common import distributed
from tokenizer.common.device import send
from tokenizer.common.errors import UserError, run_cli
from tokenizer.common.hub import parameters_by_part
from tokenizer.model import VideoTokenizer
from tokenizer.presets import load_tokenizer
from tokenizer.training.cli import parse_training_arguments, rehearse
from tokenizer.training.optim import OptimConfig
from tokenizer.training.train_state import RunConfig, TrainState
from tokenizer.training.train_step import Summed, Values, train_step
from tokenizer.training.trainer import fit, portion, start_run

_CLASS_DROPOUT = 0.1


@dataclass
class TokenFacts(ArchiveFacts):
    """Of the archive that a GPT learns from, stored with its weights."""

    archive_sha256: str = ""


@dataclass
class GPTTrainConfig:
    """Everything a YAML of stage 5b may set."""

    run: RunConfig = field(default_factory=RunConfig)
    model: GPTConfig = field(default_factory=GPTConfig)
    optim: OptimConfig = field(
        default_factory=lambda: OptimConfig(lr=1e-4, min_lr=0.0, weight_decay=0.05, schedule="wsd")
    )
    tokenizer: str = ""  # the one that made the tokens: .safetensors file or run folder
    archive: str = ""  # the tokens, from stage 5a
    val_archive: str = ""  # those of held-out clips
    init_from: str = ""  # another GPT to begin with, of the same tokenizer and size: .safetensors file or run folder
    val_clips: int = 512  # clips that a validation looks at, spread evenly over val_archive
    samples: int = 8  # clips that a validation samples, for the picture in samples/; 0: none
    batch_ids: int = 0  # ids a step at most, on each process; 0: run.batch_size clips a step, on all together
    class_dropout: float = _CLASS_DROPOUT  # part of the clips whose class is hidden, so that sampling can be guided

    def __post_init__(self) -> None:
        for name in ("tokenizer", "archive", "val_archive"):
            if not getattr(self, name):
                raise UserError(f"{name} is empty: give the result of stage {'4' if name == 'tokenizer' else '5a'}")
        if not 0 <= self.class_dropout < 1:
            raise UserError(f"class_dropout = {self.class_dropout}: must lie in [0, 1)")
        if not self.model.num_classes and self.class_dropout not in (0, _CLASS_DROPOUT):
            raise UserError(f"class_dropout = {self.class_dropout} is read by no model without classes; leave it out")
        if min(self.batch_ids, self.samples) < 0 or self.val_clips < 1:
            raise UserError(
                f"batch_ids = {self.batch_ids} and samples = {self.samples} must be >= 0, val_clips = {self.val_clips} "
                "at least 1"
            )
        if self.run.num_workers:
            raise UserError(f"run.num_workers = {self.run.num_workers}: tokens are read in place; leave it at 0")


class GPTTraining:
    """One run: the state, and what its steps and validations need."""

    def __init__(self, config: GPTTrainConfig) -> None:
        self.config, self.layout = config, config.model.layout
        self.device = start_run(config.run)
        self.tokenizer = load_tokenizer(config.tokenizer, self.device)
        self.archive, self.val_archive = open_archives(config, self.tokenizer)
        self.model = GPT(config.model)
        self.source_sha256 = self._init_from(config.init_from) if config.init_from else ""
        self.state = TrainState.start(self.model, config.run, config.optim, kind="gpt")

    def batches(self, start_step: int) -> Iterator[TokenBatch]:
        c = self.config
        dropout = c.class_dropout if c.model.num_classes else 0.0
        rule = BatchRule(
            c.run.seed,
            c.run.batch_size,
            c.batch_ids,
            dropout,
            distributed.rank(),
            distributed.num_ranks(),
            c.run.accumulate,
        )
        return token_batches(self.archive, self.layout, c.model.width, rule, start_step)

    def train_step(self, batch: TokenBatch) -> Values:
        """One step, see `tokenizer.training.train_step`."""
        return train_step(self.config.run, self.state, batch, self.loss)

    def loss(self, batch: TokenBatch, step: int) -> tuple[Summed, dict[str, Tensor | float]]:
        """See `gpt_loss`."""
        return gpt_loss(self.model, batch)

    def validate(self, step: int) -> dict[str, float]:
        """Loss, perplexity and how often the most probable length is the true one, on held-out clips."""
        sums: dict[str, Any] = defaultdict(lambda: [0.0, 0.0])
        for packed in self._validation_batches():
            logits_WV, target_W = read(self.model, packed)
            measured = by_kind(cross_entropy(logits_WV, target_W), target_W, self.layout)
            measured["length_accuracy"] = right_lengths(logits_WV, target_W, self.layout)
            for name, (total, num) in measured.items():
                sums[name][0] += float(total)
                sums[name][1] += float(num)
        # over tokens of all processes, never a mean of means
        names = (*KINDS, "length_accuracy")
        total_K2 = distributed.sum_over_ranks(torch.tensor([sums[name] for name in names], dtype=torch.float64))
        sums = dict(zip(names, total_K2.tolist(), strict=True))
        loss = sum(sums[kind][0] for kind in KINDS) / sum(sums[kind][1] for kind in KINDS)
        perplexity = float(torch.tensor(loss).exp())  # inf; Python would raise
        self._sample(step)
        return {"loss": loss, "perplexity": perplexity, **{name: total / num for name, (total, num) in sums.items()}}

    def fit(self) -> None:
        """Train to the end of `run.steps`, from the newest checkpoint in `run.dir` if there is one."""
        c = self.config
        noted: dict[str, Any] = {"tokens": self.token_facts()}
        if c.batch_ids:  # a step has so many ids on each process: how many there are decides what it sees
            noted["processes"] = distributed.num_ranks()
        if self.source_sha256:
            noted["init_from_sha256"] = self.source_sha256
        fit(c.run, c, self.state, self.batches, self.train_step, self.validate, noted=noted)

    def rehearse(self) -> None:
        """`--dry-run`: a few steps, nothing written."""
        config, parts = self.config, parameters_by_part(self.model)
        rehearse(config.run, self.state, self.batches, self.train_step, parts)

    def token_facts(self) -> TokenFacts:
        """Facts of the tokens for the weights file: their tokenizer, the names of the classes."""
        return TokenFacts(**vars(self.archive.facts), archive_sha256=self.archive.sha256)

    def _init_from(self, path: str) -> str:
        """Take up the weights of another GPT -> its sha256. A run that resumes replaces them by its own."""
        source = load_gpt(path)
        done = init_weights_from(self.model, self.archive.facts.class_names, self.tokenizer.sha256, source)
        if distributed.is_main():
            print(done, file=sys.stderr, flush=True)
        return source.sha256

    def _sample(self, step: int) -> None:
        """samples/<step>.png: a clip of each of some held-out clips' classes, or of their given frames."""
        num = min(self.config.samples, len(self.val_archive))
        if num == 0 or not distributed.is_main():
            return
        from autoregressive.sample_grid import sample_grid
        from autoregressive.sampler import Request, SamplingConfig

        clips = [self.val_archive.clip(i * len(self.val_archive) // num) for i in range(num)]
        rule = length_rule(self.layout)
        requests = [Request((i,), clip.label, clip.condition_L, rule) for i, clip in enumerate(clips)]
        path = Path(self.config.run.dir) / "samples" / f"{step:08d}.png"
        sample_grid(path, self.model, self.tokenizer, requests, SamplingConfig(slots=num))

    def _validation_batches(self) -> Iterator[PackedSequences]:
        num = min(self.config.val_clips, len(self.val_archive))
        chosen = [i * len(self.val_archive) // num for i in range(num)]
        at_once, own = portion(self.config.run), distributed.own_part(num)
        for start in range(own.start, own.stop, at_once):
            clips = [self.val_archive.clip(i) for i in chosen[start : min(start + at_once, own.stop)]]
            yield pack_sequences(self.layout, [self.layout.encode(clip) for clip in clips])


KINDS = ("loss_length", "loss_code")


def gpt_loss(model: GPT, batch: TokenBatch) -> tuple[Summed, dict[str, Tensor | float]]:
    """Cross-entropy summed over all predicted ids; the loop divides by their number on all processes."""
    packed = batch.packed
    id_L, target_W = (send(x, model.device) for x in (packed.id_L, packed.target_W))
    total, each_W = model.loss(id_L, packed.lengths, target_W, packed.given)
    kinds = by_kind(each_W, target_W, batch.layout)
    terms: dict[str, Tensor | float] = {name: total / num for name, (total, num) in kinds.items()}
    terms["ids_per_clip"] = len(packed.id_L) / len(batch.sequences)
    return Summed(total, batch.num_targets), terms


def read(model: torch.nn.Module, packed: PackedSequences) -> tuple[Tensor, Tensor]:
    """Packed sequences through the model -> logits, float32 [W, V], and targets [W], on its device."""
    device = next(model.parameters()).device
    return model(packed.id_L.to(device), packed.lengths, packed.given).float(), packed.target_W.to(device)


def cross_entropy(logits_WV: Tensor, target_W: Tensor) -> Tensor:
    """Of each id by itself, [W]."""
    return F.cross_entropy(logits_WV, target_W, reduction="none")


def by_kind(each_W: Tensor, target_W: Tensor, layout: SequenceLayout) -> dict[str, tuple[Tensor, Tensor]]:
    """(sum, number) of the losses of length tokens and of codes."""
    is_length_W = target_W >= layout.codebook_size
    # not each_W[at], whose size the host would have to ask a GPU for
    return {name: ((each_W * at).sum(), at.sum()) for name, at in zip(KINDS, (is_length_W, ~is_length_W), strict=True)}


def right_lengths(logits_WV: Tensor, target_W: Tensor, layout: SequenceLayout) -> tuple[Tensor, Tensor]:
    """How often the most probable length is the true one, and of how many; lengths that are given are not counted."""
    at_W = target_W >= layout.codebook_size
    guess = logits_WV[at_W, layout.codebook_size :].argmax(dim=1) + layout.codebook_size
    right_BN = (guess == target_W[at_W]).unflatten(0, (-1, layout.num_blocks))[:, len(layout.condition_lengths) :]
    return right_BN.sum(), torch.tensor(right_BN.numel())


def open_archives(config: GPTTrainConfig, tokenizer: VideoTokenizer) -> tuple[TokenArchive, TokenArchive]:
    """The two archives of a run. Raises UserError if they, the tokenizer and the model do not belong together."""
    check_vocabulary(config.model, tokenizer.config, "model")
    archive, val_archive = TokenArchive(config.archive), TokenArchive(config.val_archive)
    for each in (archive, val_archive):
        _check_archive(each, config, tokenizer)
    if archive.facts.class_names != val_archive.facts.class_names:
        raise UserError(f"{config.archive} and {config.val_archive} name other classes; extract one again")
    return archive, val_archive


def _check_archive(each: TokenArchive, config: GPTTrainConfig, tokenizer: VideoTokenizer) -> None:
    facts = each.facts
    if facts.tokenizer_sha256 != tokenizer.sha256:
        raise UserError(
            f"{each.folder} was made by tokenizer {facts.tokenizer_sha256[:12]}.., but {config.tokenizer} is "
            f"{tokenizer.sha256[:12]}..: give the tokenizer that made it, or extract the codes again"
        )
    if facts.condition_lengths != config.model.condition_lengths:
        raise UserError(
            f"{each.folder} has condition_lengths = {facts.condition_lengths}, but model.condition_lengths = "
            f"{config.model.condition_lengths}; use an archive for this task"
        )
    if len(facts.class_names) != config.model.num_classes:
        raise UserError(
            f"{each.folder} has {len(facts.class_names)} classes, but model.num_classes = "
            f"{config.model.num_classes}: set model.num_classes={len(facts.class_names)}"
        )
    if len(each) == 0:
        raise UserError(f"{each.folder} holds no clip; see its skipped.json")


def main() -> None:
    config, dry = parse_training_arguments(GPTTrainConfig, "gpt", ABOUT)
    training = GPTTraining(config)
    training.rehearse() if dry else training.fit()


if __name__ == "__main__":
    run_cli(main)
