"""Stage 5b: batches are a function of the step, the loss a sum over ids, resume exact; foreign tokens are refused."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from resuming import assert_same_weights, fit_and_die
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from autoregressive.batches import BatchRule, TokenBatch, fill_bins, token_batches
from autoregressive.model import GPT, GPTConfig, linear_cross_entropy
from autoregressive.presets import PRESETS, load_gpt
from autoregressive.sequence import ClipCodes
from autoregressive.token_archive import ArchivedClip, ArchiveFacts, TokenArchive, save_archive, save_shard
from autoregressive.train import GPTTrainConfig, GPTTraining, cross_entropy, gpt_loss, read, right_lengths
from tokenizer.common.checkpoint import read_model, save_model
from tokenizer.common.config import from_dict, to_dict
from tokenizer.common.device import autocast
from tokenizer.common.distributed import balanced_partition
from tokenizer.common.errors import UserError
from tokenizer.presets import PRESETS as TOKENIZERS
from tokenizer.presets import build_tokenizer, load_tokenizer
from tokenizer.training.optim import OptimConfig
from tokenizer.training.train_state import RunConfig

MODEL = replace(PRESETS["GPT-debug"], num_classes=2)
FRAMES = replace(PRESETS["GPT-debug"], num_classes=0, condition_lengths=[8, 2])


def write_archive(folder: Path, tokenizer: str, model: GPTConfig = MODEL, num: int = 20) -> TokenArchive:
    """Random tokens, but the class says the lengths: (2, 2, 2, 2) or (8, 8, 8, 8)."""
    facts = ArchiveFacts(
        64, [2, 4, 8], 4, 16, 32, load_tokenizer(tokenizer).sha256, class_names=["still", "fast"][: model.num_classes],
        condition_lengths=model.condition_lengths, condition_frames=5 if model.condition_lengths else 0,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    clips = []
    for i in range(num):
        lengths = (*model.condition_lengths, *((2, 2, 2, 2), (8, 8, 8, 8))[i % 2])[:4]
        draw_L = torch.randint(64, (sum(lengths) + facts.condition_tokens,), generator=generator)
        condition_L, code_L = draw_L.tensor_split([facts.condition_tokens])
        clips.append(
            ArchivedClip(ClipCodes(code_L, lengths, i % 2 if model.num_classes else None, condition_L), f"{i}")
        )
    save_shard(folder / "0.safetensors", clips, facts)
    save_archive(folder, facts, [folder / "0.safetensors"])
    return TokenArchive(folder)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.safetensors"
    torch.manual_seed(0)
    save_model(path, build_tokenizer("VQ_debug").state_dict(), {"model": to_dict(TOKENIZERS["VQ_debug"])})
    return str(path)


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory, tokenizer: str) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("archives")
    write_archive(folder / "train", tokenizer)
    write_archive(folder / "val", tokenizer, num=6)
    return {"archive": str(folder / "train"), "val_archive": str(folder / "val"), "tokenizer": tokenizer}


def training(
    archives: dict[str, str], folder: Path, model: GPTConfig = MODEL, precision: str = "none", **changes
) -> GPTTraining:
    run = RunConfig(
        dir=str(folder), steps=6, batch_size=4, log_every=1, validate_every=3, checkpoint_every=2, ema_decay=0.5,
        device="cpu", precision=precision,
    )  # fmt: skip
    optim = OptimConfig(lr=1e-2, min_lr=0.0, warmup_steps=1, schedule="wsd")
    return GPTTraining(GPTTrainConfig(run=run, model=model, optim=optim, **{**archives, **changes}))


# --- the loss ---------------------------------------------------------------------------------------------------------


class LargestTensor(TorchDispatchMode):
    """Numbers in the largest tensor that is made inside the `with`."""

    most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        self.most = max(self.most, made.numel() if isinstance(made, Tensor) else 0)
        return made


@pytest.mark.parametrize("precision", ["none", "bf16"])
def test_the_head_a_few_rows_at_a_time_gives_loss_and_gradients(
    precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against logits of all tokens at once in float64; in bf16 it is as near to them as torch's cross-entropy is."""
    torch.manual_seed(0)
    monkeypatch.setattr("autoregressive.model._ENTRIES", (16 * 203,) * 2)
    x_WD, head_VD, target_W = torch.randn(100, 16), 3 * torch.randn(203, 16), torch.randint(203, (100,))

    def results(loss, dtype: torch.dtype = torch.float32) -> list[Tensor]:
        leaves = [x.to(dtype, copy=True).requires_grad_() for x in (x_WD, head_VD)]
        with autocast(torch.device("cpu"), precision if dtype == torch.float32 else "none"):
            total, each_W = loss(*leaves, target_W)
        (total * 0.3).backward()
        return [total.detach(), each_W, *(leaf.grad for leaf in leaves)]

    def plain(x_WD: Tensor, head_VD: Tensor, target_W: Tensor) -> tuple[Tensor, Tensor]:
        logits_WV = x_WD @ head_VD.T
        each_W = cross_entropy(logits_WV.double() if x_WD.dtype == torch.float64 else logits_WV.float(), target_W)
        return each_W.sum(), each_W.detach()

    with LargestTensor() as count:
        ours = results(linear_cross_entropy)
    assert count.most <= 16 * 203 < 100 * 203
    for mine, torchs, exact in zip(ours, results(plain), results(plain, torch.float64), strict=True):
        error, usual = (float((x.double() - exact).norm() / exact.norm()) for x in (mine, torchs))
        assert error < max(1e-6, 1.1 * usual)


def test_the_loss_of_a_gpt_is_that_of_its_logits() -> None:
    for config in (MODEL, FRAMES):
        model, layout = GPT(config).eval(), config.layout
        torch.nn.init.normal_(model.head.weight)
        num = layout.condition_tokens
        clips = [
            ClipCodes(torch.arange(22), (8, 2, 4, 8), 0 if config.num_classes else None, torch.arange(num)),
            ClipCodes(torch.arange(16), (8, 2, 2, 4), 1 if config.num_classes else None, torch.arange(num)),
        ]
        batch = TokenBatch(layout, [layout.encode(clip) for clip in clips], config.width)
        logits_WV, target_W = read(model, batch.packed)
        (total, weight), terms = gpt_loss(model, batch)
        each_W = cross_entropy(logits_WV, target_W)
        assert weight == len(each_W) and float(total.detach()) == pytest.approx(float(each_W.detach().sum()), rel=1e-6)
        assert float(terms["loss_length"]) == pytest.approx(float(each_W.detach()[target_W >= 64].mean()), rel=1e-6)
        assert float(terms["loss_code"]) == pytest.approx(float(each_W.detach()[target_W < 64].mean()), rel=1e-6)


# --- batches ----------------------------------------------------------------------------------------------------------


def ids(batches: Iterator[TokenBatch], num: int) -> list[list[list[int]]]:
    return [[id_Q.tolist() for id_Q in batch.sequences] for batch in itertools.islice(batches, num)]


@pytest.mark.parametrize("rule", [BatchRule(3, clips=6, class_dropout=0.3), BatchRule(3, 6, 60, 0.3)])
def test_batches_are_a_function_of_the_step(archives: dict[str, str], rule: BatchRule) -> None:
    archive = TokenArchive(archives["archive"])

    def batches(start: int = 0, **changes) -> Iterator[TokenBatch]:
        return token_batches(archive, MODEL.layout, MODEL.width, replace(rule, **changes), start)

    assert ids(batches(), 12)[5:] == ids(batches(5), 7) != ids(batches(5, seed=4), 7)
    if rule.most_ids:
        assert all(sum(map(len, step)) - len(step) <= rule.most_ids for step in ids(batches(), 40))


def test_an_epoch_sees_every_clip_once_and_hides_some_classes(archives: dict[str, str]) -> None:
    archive, layout = TokenArchive(archives["archive"]), MODEL.layout
    batches = token_batches(archive, layout, MODEL.width, BatchRule(0, clips=5, class_dropout=0.25))
    seen = [id_Q for batch in itertools.islice(batches, 40) for id_Q in batch.sequences]  # ten epochs of 20 clips
    codes = sorted(layout.decode(id_Q).code_L.tolist() for id_Q in seen[:20])
    assert codes == sorted(archive.clip(i).code_L.tolist() for i in range(20))
    hidden = sum(int(id_Q[0]) == layout.open_id for id_Q in seen)
    assert 30 < hidden < 70  # 50 expected of 200


def test_ranks_share_the_clips_of_one_process(archives: dict[str, str]) -> None:
    """The union over ranks is what one process would see, classes hidden alike, and the work is shared fairly."""
    archive, rule = TokenArchive(archives["archive"]), BatchRule(1, clips=8, class_dropout=0.3)

    def step(**place) -> list[list[int]]:
        return ids(token_batches(archive, MODEL.layout, MODEL.width, replace(rule, **place), 3), 1)[0]

    parts = [step(rank=rank, num_ranks=3) for rank in range(3)]
    assert sorted(itertools.chain(*parts)) == sorted(step())
    loads = [sum(map(len, part)) for part in parts]
    assert max(loads) - min(loads) <= 37, "no more than the longest sequence apart"
    with pytest.raises(UserError, match="run.batch_size=8 clips for 9 processes"):
        step(rank=0, num_ranks=9)


@given(costs=st.lists(st.floats(0, 1e6), max_size=30), num_ranks=st.integers(1, 8))
@settings(max_examples=50, deadline=None)
def test_shares_are_fair(costs: list[float], num_ranks: int) -> None:
    shares = balanced_partition(costs, num_ranks)
    assert sorted(itertools.chain(*shares)) == list(range(len(costs)))
    sums = [sum(costs[i] for i in share) for share in shares]
    assert max(sums) - min(sums) <= max(costs, default=0) + 1e-3


@given(sizes=st.lists(st.integers(1, 20), max_size=80), room=st.integers(20, 50))
@settings(max_examples=50, deadline=None)
def test_bins_hold_what_has_room(sizes: list[int], room: int) -> None:
    bins = list(fill_bins(range(len(sizes)), sizes.__getitem__, room))
    held = list(itertools.chain(*bins))
    assert len(held) == len(set(held)) and all(sum(sizes[i] for i in b) <= room for b in bins)
    assert sum(sizes) - sum(sizes[i] for i in held) <= 8 * room  # the rest stands in open bins


def test_bins_are_nearly_full() -> None:
    length = torch.randint(36, 517, (3000,), generator=torch.Generator().manual_seed(0)).tolist()
    bins = list(fill_bins(range(3000), length.__getitem__, 8192))
    assert sum(length[i] for b in bins for i in b) / (8192 * len(bins)) > 0.98


def test_a_clip_longer_than_a_batch_is_refused(archives: dict[str, str]) -> None:
    archive = TokenArchive(archives["archive"])
    with pytest.raises(UserError, match="batch_ids=35 is less than the 36 ids of the longest clip"):
        next(token_batches(archive, MODEL.layout, MODEL.width, BatchRule(0, 4, 35)))


# --- the loss ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", [MODEL, FRAMES], ids=["classes", "frames"])
def test_packed_loss_equals_one_by_one(tmp_path: Path, tokenizer: str, model: GPTConfig) -> None:
    """Forward and gradients, also in parts: a sum over tokens, never a mean of means."""
    archive = write_archive(tmp_path, tokenizer, model)
    batch = next(token_batches(archive, model.layout, model.width, BatchRule(0, clips=7)))
    torch.manual_seed(0)
    gpt = GPT(replace(model, dropout=0.0))
    torch.nn.init.normal_(gpt.head.weight, std=0.1)

    def gradient(parts: list[TokenBatch]) -> tuple[Tensor, Tensor]:
        gpt.zero_grad()
        loss = sum((cross_entropy(*read(gpt, part.packed)).sum() for part in parts), torch.zeros(()))
        (loss / sum(part.num_targets for part in parts)).backward()
        return loss.detach(), torch.cat([p.grad.flatten() for p in gpt.parameters() if p.grad is not None])

    packed = gradient([batch])
    for parts in (batch.split(3), [TokenBatch(model.layout, [id_Q], model.width) for id_Q in batch.sequences]):
        for ours, reference in zip(packed, gradient(parts), strict=True):
            torch.testing.assert_close(ours, reference, rtol=1e-4, atol=1e-6)
    assert batch.num_targets == sum(len(id_Q) - 1 - model.layout.condition_tokens for id_Q in batch.sequences)

    whole, given = batch.packed, model.layout.condition_tokens
    logits_LV = gpt(whole.id_L, whole.lengths)
    said_WV = torch.cat([logits_QV[given:] for logits_QV in logits_LV.split(list(whole.lengths))])
    torch.testing.assert_close(read(gpt, whole)[0], said_WV)
    with pytest.raises(UserError, match="run.accumulate=8 parts, but a process has 7 clips"):
        batch.split(8)


def test_every_part_of_every_process_has_a_clip(archives: dict[str, str]) -> None:
    """However unequal the clips are: two processes of three parts share six clips."""
    archive = TokenArchive(archives["archive"])
    for step in range(4):
        parts = []
        for rank in range(2):
            rule = BatchRule(2, clips=6, rank=rank, num_ranks=2, num_parts=3)
            batch = next(token_batches(archive, MODEL.layout, MODEL.width, rule, step))
            assert batch.num_in_step == 6
            parts += [part.sequences for part in batch.split(3)]
        assert [len(part) for part in parts] == [1] * 6
        whole = next(token_batches(archive, MODEL.layout, MODEL.width, BatchRule(2, clips=6), step))
        assert sorted(part[0].tolist() for part in parts) == sorted(id_Q.tolist() for id_Q in whole.sequences)
    with pytest.raises(UserError, match=r"6 clips for 2 processes x run\.accumulate=4"):
        next(token_batches(archive, MODEL.layout, MODEL.width, BatchRule(2, clips=6, num_ranks=2, num_parts=4)))


def test_given_lengths_do_not_count_as_guessed() -> None:
    layout = FRAMES.layout
    target_L = torch.tensor([layout.length_id(n) for n in (8, 2, 4, 4)] + [5])
    logits_LV = torch.zeros(5, layout.num_ids)
    logits_LV[2, layout.length_id(4)] = logits_LV[3, layout.length_id(8)] = 1.0
    assert [int(x) for x in right_lengths(logits_LV, target_L, layout)] == [1, 2]


# --- a run ------------------------------------------------------------------------------------------------------------


def test_killed_and_resumed_ends_with_the_same_bits(archives: dict[str, str], tmp_path: Path) -> None:
    training(archives, tmp_path / "whole").fit()
    fit_and_die(training(archives, tmp_path / "killed"), 5)
    training(archives, tmp_path / "killed").fit()
    assert_same_weights(tmp_path / "killed", tmp_path / "whole")
    lines = [json.loads(line) for line in (tmp_path / "killed" / "metrics.jsonl").read_text().splitlines()]
    assert {"loss_length", "loss_code", "ids_per_clip"} <= set(lines[0])
    wanted = ("loss", "perplexity", "length_accuracy", "loss_length", "loss_code")
    assert {f"val/{name}" for name in wanted} <= set(lines[-1])


def test_a_run_begins_from_another_and_resumes_to_the_same_bits(
    archives: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = str(tmp_path / "source")
    training(archives, tmp_path / "source").fit()
    begun = training(archives, tmp_path / "whole", init_from=source)
    assert f"started from {source}" in capsys.readouterr().err
    learnt = load_gpt(source)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(
        begun.model.state_dict().values(), learnt.model.state_dict().values(), strict=True
    ))  # fmt: skip
    begun.fit()
    fit_and_die(training(archives, tmp_path / "killed", init_from=source), 5)
    training(archives, tmp_path / "killed", init_from=source).fit()
    assert_same_weights(tmp_path / "killed", tmp_path / "whole")
    assert read_model(tmp_path / "whole").config["init_from_sha256"] == learnt.sha256


def test_half_precision_trains_validates_and_samples(archives: dict[str, str], tmp_path: Path) -> None:
    training(archives, tmp_path, precision="bf16").fit()
    assert (tmp_path / "samples" / "00000006.png").is_file()


def test_the_weights_know_their_tokens_and_the_lengths_are_learnt(archives: dict[str, str], tmp_path: Path) -> None:
    """The class decides the lengths in these archives, so 80 steps must be enough to know all of them."""
    run = training(archives, tmp_path)
    run.config.run.steps, run.config.run.validate_every = 80, 100
    run.fit()
    measured = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    assert measured["val/length_accuracy"] == 1.0 and measured["val/loss_length"] < 0.7
    trained = load_gpt(tmp_path, size="GPT-debug")
    assert trained.class_names == ("still", "fast")
    assert trained.tokenizer_sha256 == load_tokenizer(archives["tokenizer"]).sha256


def test_tokens_of_another_tokenizer_are_refused(archives: dict[str, str], tmp_path: Path) -> None:
    other = tmp_path / "other.safetensors"
    save_model(other, build_tokenizer("VQ_debug").state_dict(), {"model": to_dict(TOKENIZERS["VQ_debug"])})
    mine, theirs = load_tokenizer(archives["tokenizer"]).sha256[:12], load_tokenizer(other).sha256[:12]
    with pytest.raises(UserError, match=f"was made by tokenizer {mine}.., but {other} is {theirs}.."):
        training(archives, tmp_path / "run", tokenizer=str(other))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (replace(MODEL, num_classes=11), "has 2 classes, but model.num_classes = 11"),
        (FRAMES, r"condition_lengths = \[\], but model.condition_lengths = \[8, 2\]"),
        (replace(MODEL, codebook_size=32), "codebook_size = 32, but the tokenizer's is 64"),
    ],
)
def test_a_model_that_does_not_fit_is_refused(
    archives: dict[str, str], tmp_path: Path, model: GPTConfig, words: str
) -> None:
    with pytest.raises(UserError, match=words):
        training(archives, tmp_path, model=model)


def test_settings_that_cannot_be_are_refused(archives: dict[str, str]) -> None:
    for changes, words in (
        ({"archive": ""}, "archive is empty"),
        ({"class_dropout": 1.0}, "class_dropout = 1.0"),
        ({"run": RunConfig(num_workers=2)}, "tokens are read in place"),
    ):
        with pytest.raises(UserError, match=words):
            GPTTrainConfig(**{**archives, **changes})


def test_the_recipe_is_kept_where_a_yaml_changes_one_number_of_it() -> None:
    """Sections are merged: `optim.lr` alone must not bring back the tokenizer's schedule."""
    needed = {"tokenizer": "t", "archive": "a", "val_archive": "v"}
    config = from_dict(GPTTrainConfig, {**needed, "optim": {"lr": 1e-3}}, "here")
    assert (config.optim.lr, config.optim.schedule, config.optim.weight_decay) == (1e-3, "wsd", 0.05)
