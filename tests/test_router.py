"""The router: its size, that it looks at each clip alone, that it learns what is visible, and its door."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tokenizer.common.checkpoint import read_model, save_model
from tokenizer.common.config import dump_yaml, load_config, to_dict
from tokenizer.common.errors import UserError
from tokenizer.data.clips import ClipSample, DataConfig, build_dataset
from tokenizer.data.loader import ClipBatch
from tokenizer.data.video_io import VideoError
from tokenizer.frozen.encoders import VJEPA2, FrozenConfig, FrozenVJEPA2
from tokenizer.model import TokenizerConfig
from tokenizer.router.model import Router, RouterConfig, VJEPA2StemConfig, frequency_filters
from tokenizer.router.predict import TrainedRouter, check_router_fits, load_router
from tokenizer.router.reward import QualityTable, reward, stats_of, table_stats
from tokenizer.router.train import WITHIN_WEIGHT, RouterTrainConfig, RouterTraining, TableClips, measure, quality_loss
from tokenizer.training.optim import OptimConfig
from tokenizer.training.train_state import RunConfig

TINY = RouterConfig(num_frames=8, size=16, levels=[2, 4, 8], layers=1, width=32, heads=2)  # 2 blocks, 9 rows


def random_clips(num_clips: int, config: RouterConfig = TINY) -> torch.Tensor:
    shape = (num_clips, 3, config.num_frames, config.size, config.size)
    return torch.rand(shape, generator=torch.Generator().manual_seed(0))


def trained_looking(config: RouterConfig = TINY) -> Router:
    """A router whose head is not the zeros it starts with."""
    torch.manual_seed(0)
    model = Router(config)
    torch.nn.init.normal_(model.head.weight)
    return model


def motion_table(data: DataConfig) -> QualityTable:
    """A toy truth: a moving block loses quality with few tokens, a still one does not."""
    clips = build_dataset(data)
    video_BCTHW = torch.stack([clips.get(i).video_CTHW for i in range(len(clips))])
    change_BN = video_BCTHW.unflatten(2, (2, 4)).diff(dim=3).abs().mean(dim=(1, 3, 4, 5))
    need_BN = (change_BN * 20).clamp(max=1)
    lpips_BA = (need_BN[:, None] / TINY.space.table_AN).mean(dim=2)
    return QualityTable(lpips_BA, 1 - lpips_BA, lpips_BA**2, clips.names, tuple(TINY.levels), TINY.num_blocks)


def toy_config(folder: Path, labels: str = "soft", steps: int = 500) -> RouterTrainConfig:
    """A config whose two tables are written into `folder`."""
    sources = {"table": "synthetic:train:400", "val_table": "synthetic:heldout:24"}
    data = {name: DataConfig([source], 8, 16, augment=False) for name, source in sources.items()}
    for name, each in data.items():
        if not (folder / name).exists():
            motion_table(each).save(folder / name)
    return RouterTrainConfig(
        RunConfig(str(folder / labels), steps, batch_size=8, device="cpu", validate_every=steps),
        TINY,
        DataConfig([sources["table"]], 8, 16, augment=True),
        data["val_table"],
        OptimConfig(lr=2e-3, warmup_steps=5),
        str(folder / "table"),
        str(folder / "val_table"),
        labels=labels,
    )


def test_full_size_is_the_papers() -> None:
    with torch.device("meta"):
        model = Router(RouterConfig())
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(19.9e6, rel=0.01)
    assert model.space.num_rows == model.head.out_features == 625


@pytest.mark.parametrize("init", ["structured", "random"])
def test_a_fresh_router_prefers_no_row_and_passes_gradients_everywhere(init: str) -> None:
    config = RouterConfig(num_frames=8, size=16, levels=[2, 4, 8], layers=1, width=32, heads=2, init=init)
    model = Router(config)
    assert model(random_clips(2)).abs().max() == 0
    torch.nn.init.normal_(model.head.weight)
    model(random_clips(2)).square().sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_a_row_is_the_sum_of_its_prefixes(tmp_path: Path) -> None:
    config = replace(TINY, num_frames=12, head="prefixes")  # 3 blocks: 3 + 9 + 27 prefixes
    router, x_BD = trained_looking(config), torch.randn(2, config.width)
    number_BJ = torch.nn.functional.linear(x_BD, router.head.weight, router.head.bias)
    starts = (0, 3, 12)
    for row, places in enumerate(config.space.places_of(torch.arange(27)).tolist()):
        prefixes = [sum(place * 3 ** (t - i) for i, place in enumerate(places[: t + 1])) for t in range(3)]
        wanted_B = sum(number_BJ[:, start + prefix] for start, prefix in zip(starts, prefixes, strict=True))
        torch.testing.assert_close(router.head(x_BD)[:, row], wanted_B)
    with pytest.raises(UserError, match="leave it"):
        replace(config, kind="blockwise")
    save_model(tmp_path / "prefixes.safetensors", router.state_dict(), {"model": to_dict(config)})
    assert load_router(tmp_path / "prefixes.safetensors").scores(random_clips(1, config)).shape == (1, 27)


def test_the_paper_s_router_reads_vjepa2() -> None:
    """With its 1024 numbers a place, and 8 slots in time, the count is the published 19.9M to the digit."""
    with torch.device("meta"):
        model = Router(RouterConfig(stem="vjepa2"))
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(19.9e6, rel=1e-3)


def test_frequency_filters_are_orthogonal_and_the_first_sees_brightness_alone() -> None:
    filter_PP = frequency_filters(2, 4)
    gram = filter_PP @ filter_PP.T
    assert torch.allclose(gram, gram.diag().diag(), atol=1e-4)
    assert torch.allclose(filter_PP[0], filter_PP[0, 0].expand(96), atol=1e-6)
    assert filter_PP[1:].sum(dim=1).abs().max() < 1e-3


def test_unseen_patches_do_not_matter_and_seeing_all_is_seeing_the_clip() -> None:
    config, router, clip = TINY, trained_looking(), random_clips(1)
    patches = torch.arange(config.num_places)[None]
    assert torch.allclose(router(clip, patches.flip(1)), router(clip), atol=1e-5)
    other = clip.clone()
    other[..., config.patch_size :, :] = 0  # all but the first row of patches of every block
    first_row = patches.view(config.num_blocks, *config.grid)[:, 0].reshape(1, -1)
    assert torch.equal(router(clip, first_row), router(other, first_row))
    assert not torch.allclose(router(clip), router(other))


def test_it_learns_visible_motion_better_than_any_uniform(tmp_path: Path) -> None:
    config = toy_config(tmp_path)
    training = RouterTraining(config)
    training.fit()
    lines = [json.loads(line) for line in (tmp_path / "soft" / "metrics.jsonl").read_text().splitlines()]
    val = next(line for line in lines if "val/percentile" in line)
    assert val["val/percentile"] > max(0.9, val["val/best_uniform"])
    assert val["val/top1"] <= val["val/top5"] <= 1
    router = load_router(tmp_path / "soft")
    score_SA = torch.cat(
        [router.scores(training.val_clips.get(i).video_CTHW[None]) for i in range(len(training.val_clips))]
    )
    again = measure(score_SA, training.val_reward_SA, router.space)
    assert again["percentile"] == pytest.approx(val["val/percentile"], abs=1e-3)


def test_a_stopped_run_ends_with_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(toy_config(tmp_path, steps=4), turns=True, colours=True, seen_patches=0.5)
    RouterTraining(config).fit()
    config.run.dir, config.run.checkpoint_every = str(tmp_path / "again"), 1
    stopped = RouterTraining(config)
    real_loss = stopped.loss

    def breaks_at_3(batch: ClipBatch, step: int) -> tuple[torch.Tensor, dict[str, float]]:
        loss, terms = real_loss(batch, step)
        return loss * (torch.nan if step == 3 else 1), terms

    monkeypatch.setattr(stopped, "loss", breaks_at_3)
    with pytest.raises(UserError, match="step 3"):
        stopped.fit()
    RouterTraining(config).fit()
    one, other = (read_model(tmp_path / name).tensors for name in ("soft", "again"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def random_vjepa2_config(folder: Path, steps: int = 4) -> RouterTrainConfig:
    """The toy router on a tiny V-JEPA 2 with random weights: 4 slots of 8 x 8 places."""
    config = toy_config(folder, steps=steps)
    encoder = FrozenConfig(random_for_tests="tiny", precision="none")
    config.model = replace(TINY, stem="vjepa2", vjepa2=VJEPA2StemConfig(4, 8, 32, encoder))
    config.data.augment = False
    config.feature_cache = str(folder / "features")
    return config


def test_the_vjepa2_stem_trains_from_its_cache_and_is_marked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    config = random_vjepa2_config(tmp_path)
    RouterTraining(config).fit()
    lines = [json.loads(line) for line in (tmp_path / "soft" / "metrics.jsonl").read_text().splitlines()]
    assert all(1.0 in (line.get("random_frozen_encoders"), line.get("val/random_frozen_encoders")) for line in lines)
    assert "RANDOM weights of V-JEPA 2" in read_model(tmp_path / "soft").card["kind"]

    # a second run finds every feature of those batches on the disk, and ends the same
    computed = []
    real = FrozenVJEPA2.features
    monkeypatch.setattr(FrozenVJEPA2, "features", lambda self, clips: computed.append(len(clips)) or real(self, clips))
    config.run.dir = str(tmp_path / "again")
    RouterTraining(config).fit()
    one, other = (read_model(tmp_path / name).tensors for name in ("soft", "again"))
    assert computed == [] and all(torch.equal(one[name], other[name]) for name in one)

    # a damaged file is made again
    file = next((tmp_path / "features").rglob("*.safetensors"))
    file.write_bytes(b"not a tensor")
    config.run.dir = str(tmp_path / "third")
    RouterTraining(config).fit()
    assert computed == [1] and file.stat().st_size > 1000


def test_a_router_never_meets_the_features_of_other_weights(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = random_vjepa2_config(tmp_path, steps=1)
    RouterTraining(config).fit()
    router = load_router(tmp_path / "soft")
    assert router.assign(random_clips(2), "tokens:6").shape == (2, 2)
    (tmp_path / "here.yaml").write_text(dump_yaml(to_dict(config)))
    assert load_router(tmp_path / "soft", config_path=tmp_path / "here.yaml").config == router.config

    torch.manual_seed(5)  # the same shapes, other numbers, in a folder
    transformers.VJEPA2Model(transformers.VJEPA2Config(**VJEPA2.tiny)).save_pretrained(tmp_path / "other")
    config.model.vjepa2.encoder = FrozenConfig(str(tmp_path / "other"))
    (tmp_path / "other.yaml").write_text(dump_yaml(to_dict(config)))
    with pytest.raises(UserError, match="learned from V-JEPA 2 weights"):
        load_router(tmp_path / "soft", config_path=tmp_path / "other.yaml")
    config.model.vjepa2.width = 48
    with pytest.raises(UserError, match=r"model\.vjepa2\.width=32"):
        RouterTraining(config)


def test_threshold_labels_train(tmp_path: Path) -> None:
    config = toy_config(tmp_path, "hard", steps=2)
    config = replace(config, labels="threshold", threshold=0.1, run=replace(config.run, dir=str(tmp_path / "run")))
    training = RouterTraining(config)
    training.fit()
    table = QualityTable.load(config.table)
    chosen = training._labels(list(range(len(table))))
    lpips_S = table.lpips_BA.gather(1, chosen[:, None])[:, 0]
    assert ((lpips_S <= 0.1) | (chosen == TINY.space.num_rows - 1)).all()
    with pytest.raises(UserError, match="goes with labels"):
        replace(config, labels="hard")


def test_unreadable_clips_of_a_validation_are_named_and_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    training = RouterTraining(toy_config(tmp_path, steps=2))
    clips, lost = training.val_clips, {3}

    def read(index: int, epoch: int, unreadable: dict[str, str]) -> ClipSample:
        if index in lost:
            raise VideoError("clip.mp4", "cut short")
        return TableClips._read(clips, index, epoch, unreadable)

    monkeypatch.setattr(clips, "_read", read)
    for step in (1, 2):
        assert training.validate(step)["unreadable"] == 1
    assert [record.args[0] for record in caplog.records] == [clips.names[3]]  # once
    lost |= set(range(len(clips)))
    with pytest.raises(UserError, match="not one of"):
        training.validate(3)


def test_one_quality_router_serves_every_weight_and_needs_no_whole_rows(tmp_path: Path) -> None:
    """Two thirds of the table are hidden from it; at each weight it is nearer to the best rows than any one row."""
    config = toy_config(tmp_path, "quality", steps=700)
    table = QualityTable.load(config.table)
    hidden_SA = torch.rand(table.lpips_BA.shape, generator=torch.Generator().manual_seed(1)) < 2 / 3
    hidden_SA[:, 0] &= ~hidden_SA.all(dim=1)
    partial = replace(table, lpips_BA=table.lpips_BA.masked_fill(hidden_SA, torch.nan))
    partial.save(tmp_path / "partial")
    config = replace(config, table=str(tmp_path / "partial"), quality_weight=1.2)
    assert not partial.is_whole and stats_of(partial).lpips_std == pytest.approx(stats_of(table).lpips_std, rel=0.1)
    with pytest.raises(UserError, match="lacks assignments"):
        RouterTraining(replace(config, labels="soft"))
    training = RouterTraining(config)
    training.fit()
    router, val = load_router(config.run.dir), training.val_clips
    video_BCTHW = torch.stack([val.get(i).video_CTHW for i in range(len(val))])
    truth, space = QualityTable.load(config.val_table), TINY.space
    assert router.quality_weight == 1.2
    for weight in (1.0, 1.2, 1.5):
        router = load_router(config.run.dir, quality_weight=weight)
        reward_SA = reward(truth.lpips_BA, space.tokens_A, weight, stats_of(partial))
        best_single = reward_SA.mean(dim=0).max()
        chosen = reward_SA.gather(1, space.best_row(router.scores(video_BCTHW))[:, None]).mean()
        assert chosen > best_single + 0.25 * (reward_SA.amax(dim=1).mean() - best_single)
    check_distances_and_floors(load_router(config.run.dir), partial, truth, video_BCTHW)
    with pytest.raises(UserError, match="one trade-off"):
        load_router("ckpts/mini/router.safetensors", quality_weight=1.0)
    with pytest.raises(UserError, match=r"within \[0, 2\]"):
        load_router(config.run.dir, quality_weight=2.5)
    with pytest.raises(UserError, match="labels=quality"):
        load_router("ckpts/mini/router.safetensors").assign(torch.zeros(1, 3, 16, 128, 128), "quality:0.1")


def check_distances_and_floors(
    router: TrainedRouter, table: QualityTable, truth: QualityTable, video_BCTHW: torch.Tensor
) -> None:
    """Predicted distances are in the table's units; quality:Q keeps Q by prediction, and mostly in truth."""
    assert router.stats is not None and router.stats == table_stats(table)
    distance_SA, space = router.distances(video_BCTHW), router.space
    score_SA = router.scores(video_BCTHW)
    torch.testing.assert_close(
        score_SA.double(), reward(distance_SA, space.tokens_A, 1.2, router.stats), rtol=1e-4, atol=1e-4
    )
    gap_SA = distance_SA - truth.lpips_BA
    assert gap_SA.abs().mean() < 0.8 * (truth.lpips_BA - truth.lpips_BA.mean()).abs().mean()
    middle = router.stats.lpips_mean
    length_SN = router.assign(video_BCTHW, f"quality:{middle}")
    row_S = space.rows_of(length_SN)
    chosen_S, least_S = distance_SA.gather(1, row_S[:, None])[:, 0], distance_SA.amin(dim=1)
    kept_S = least_S <= middle  # a clip without such a row gets that of the least distance
    assert kept_S.any() and (chosen_S[kept_S] <= middle).all() and torch.equal(chosen_S[~kept_S], least_S[~kept_S])
    cheaper_SA = (space.tokens_A < length_SN.sum(dim=1)[:, None]) & kept_S[:, None]
    assert (distance_SA[cheaper_SA] > middle).all()
    for outside in (router.stats.lpips_min - 0.01, router.stats.lpips_max * 2):
        with pytest.raises(UserError, match=rf"from {router.stats.lpips_min:.4g} to {router.stats.lpips_max:.4g}"):
            router.assign(video_BCTHW, f"quality:{outside}")
    hard = distance_SA.amin(dim=1).max().item() - 1e-6  # by prediction at least one clip never keeps it
    if router.stats.lpips_min <= hard:
        with pytest.warns(UserWarning, match=f"of {len(video_BCTHW)} clips"):
            router.assign(video_BCTHW, f"quality:{hard}")
    router.stats = None  # a file of before
    with pytest.raises(UserError, match="train stage 3 again"):
        router.distances(video_BCTHW)


def test_the_quality_loss_by_hand() -> None:
    """Gaps 1 and 3 of the measured rows: mean 2, deviations -1 and 1."""
    wanted_BA = torch.tensor([[1.0, torch.nan, 2.0]])
    quality_BA = torch.tensor([[2.0, 100.0, 5.0]], requires_grad=True)
    loss = quality_loss(quality_BA, wanted_BA)
    assert loss.item() == pytest.approx(WITHIN_WEIGHT * 1 + 4)
    loss.backward()
    assert quality_BA.grad.isfinite().all() and quality_BA.grad[0, 1] == 0


def test_hard_labels_train_and_the_config_survives_yaml(tmp_path: Path) -> None:
    config = toy_config(tmp_path, "hard", steps=2)
    (tmp_path / "router.yaml").write_text(dump_yaml(to_dict(config)))
    again = load_config(RouterTrainConfig, tmp_path / "router.yaml", ["quality_weight=0.8"])
    assert again.quality_weight == 0.8 and to_dict(again.model) == to_dict(TINY)
    RouterTraining(again).fit()
    assert load_router(tmp_path / "hard", config_path=tmp_path / "router.yaml").space == TINY.space


def test_tables_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    config = toy_config(tmp_path)
    table = QualityTable.load(config.table)
    with pytest.raises(UserError, match="388 of its 400 clips"):
        TableClips(DataConfig(["synthetic:train:12"], 8, 16), 0, table, config.table)
    config.model = RouterConfig(num_frames=8, size=16, levels=[2, 4], layers=1, width=32, heads=2)
    with pytest.raises(UserError, match=r"\[2, 4, 8\].*\[2, 4\]"):
        RouterTraining(config)
    with pytest.raises(UserError, match="pixels"):
        RouterTrainConfig(model=TINY, table="t", val_table="v")


def test_table_clips_are_the_rated_ones_at_every_reading(tmp_path: Path) -> None:
    config = toy_config(tmp_path)
    clips = TableClips(config.data, 0, QualityTable.load(config.table), config.table)
    plain = build_dataset(DataConfig(config.data.sources, 8, 16, augment=False))
    for epoch in (0, 1):
        assert torch.equal(clips.get(5, epoch).video_CTHW, plain.get(5).video_CTHW)


@pytest.fixture
def router_file(tmp_path: Path) -> Path:
    path = tmp_path / "router.safetensors"
    save_model(path, trained_looking().state_dict(), {"model": to_dict(TINY)})
    return path


@pytest.mark.parametrize("budget", ["router", "tokens:9", "price:0.3", "average:8", "uniform:4"])
def test_a_clip_never_depends_on_its_batch_mates(router_file: Path, budget: str) -> None:
    router, clips = load_router(router_file), random_clips(6)
    together = router.scores(clips)
    assert torch.equal(together, torch.cat([router.scores(clip) for clip in clips.split(1)]))
    assert torch.equal(together.flip(0), router.scores(clips.flip(0)))
    torch.testing.assert_close(router.scores(clips, together=True), together, rtol=1e-4, atol=1e-4)
    assert torch.allclose(together, router.model(clips), atol=1e-4)
    length_BN = router.assign(clips, budget, price=0.1)
    assert length_BN.shape == (6, 2) and length_BN.dtype == torch.int64
    assert torch.equal(length_BN[2:4], router.assign(clips[2:4], budget, price=0.1))


def test_the_door_refuses_what_does_not_belong_together(router_file: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.yaml"
    other.write_text("model: {num_frames: 8, size: 16, levels: [2, 4, 8], layers: 3, width: 32, heads: 2}\n")
    with pytest.raises(UserError, match="layers: 3 / 1") as caught:
        load_router(router_file, config_path=other)
    assert str(other) in str(caught.value) and str(router_file) in str(caught.value)

    router = load_router(router_file)
    fitting = {"num_frames": 8, "size": 16, "levels": [2, 4, 8]}
    check_router_fits(router, TokenizerConfig(**fitting))
    with pytest.raises(UserError, match=r"\[2, 4, 8\].*\[2, 4\]"):
        check_router_fits(router, TokenizerConfig(**{**fitting, "levels": [2, 4]}))
    with pytest.raises(UserError, match="32 pixels"):
        check_router_fits(router, TokenizerConfig(**{**fitting, "size": 32}))
    with pytest.raises(UserError, match="shape"):
        router.scores(random_clips(1)[..., :8])

    save_model(tmp_path / "vq.safetensors", {"a": torch.zeros(1)}, {"model": {"encoder": {}}})
    with pytest.raises(UserError, match="not a router"):
        load_router(tmp_path / "vq.safetensors")


@pytest.mark.parametrize("wrong", [{"size": 20}, {"width": 30, "heads": 4}, {"stem": "clip"}, {"init": "xavier"}])
def test_impossible_models_are_refused(wrong: dict) -> None:
    with pytest.raises(UserError):
        RouterConfig(**wrong)
