"""The router that decides block by block: causal to the bit, exact searches, stages 2 and 3 by their commands."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from test_curate import heldout_scenes, lively_tokenizer
from test_stages import HELD_OUT, ROOT, run_here

from autoregressive.token_archive import TokenArchive
from tokenizer.budget import choose_rows, find_price, parse_budget
from tokenizer.common.checkpoint import save_model
from tokenizer.common.config import to_dict
from tokenizer.common.errors import UserError
from tokenizer.presets import load_tokenizer
from tokenizer.router import curate, train
from tokenizer.router.blockwise import Rule, block_targets, draw_rows, search, worth_of
from tokenizer.router.model import BlockwiseRouter, Router, RouterConfig
from tokenizer.router.predict import TrainedBlockwise, load_router

TINY = RouterConfig("blockwise", 16, 16, levels=[2, 4, 8], layers=2, width=32, heads=2)  # 4 blocks, 81 rows


def random_router(weight: float | None = None, seed: int = 0) -> TrainedBlockwise:
    """With a head that has opinions."""
    torch.manual_seed(seed)
    model = Router.build(TINY)
    assert isinstance(model, BlockwiseRouter)
    for table in (model.block_head.rate.weight, model.block_head.chosen_NmD):
        torch.nn.init.normal_(table)
    return TrainedBlockwise(model, "", "a router", weight)


def random_clips(num: int) -> torch.Tensor:
    return torch.rand((num, 3, 16, 16, 16), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("budget", ["router", "price:0.3", "tokens:14"])
@pytest.mark.parametrize("weight", [None, 1.2])
def test_a_block_is_decided_without_the_frames_after_it(budget: str, weight: float | None) -> None:
    router, clips = random_router(weight), random_clips(6)
    parsed = parse_budget(budget, router.space)
    new_clip = router.live(budget)
    assert new_clip is not None
    for b, clip in enumerate(clips.split(1)):
        other = torch.cat([clip[:, :, :8], 1 - clip[:, :, 8:]], dim=2)
        one, two = (router.predict(x) for x in (clip, other))
        assert torch.equal(one[:, :2], two[:, :2]) and not torch.equal(one[:, 2:], two[:, 2:])
        mine, its = (
            [choose(block) for block in x.split(4, dim=2)] for x, choose in ((clip, new_clip()), (other, new_clip()))
        )
        assert mine[:2] == its[:2]
        if budget != "tokens:14":  # which looks ahead in a whole clip
            assert mine == router.assign(clips, budget)[b].tolist(), "a stream and a batch must choose the same"
        assert sum(mine) <= (parsed.max_tokens or 32)
    assert len({*map(tuple, router.assign(clips, budget).tolist())}) > 1, "or the test shows nothing"


@pytest.mark.parametrize("weight", [None, 1.2])
def test_a_beam_of_full_width_finds_the_best_of_all_assignments(weight: float | None) -> None:
    router, clips = random_router(weight), random_clips(5)
    head, space, state_BND = router._head, router.space, router.predict(clips)
    every_BA = torch.arange(81).expand(5, -1)
    for price, limit, prefix in ((0.0, None, ()), (0.2, None, ()), (-0.1, 13, ()), (0.0, 20, (8, 2))):
        rule = Rule(space, weight, price, limit, prefix)
        value_BA = worth_of(state_BND, head, rule, every_BA)
        begins_A = (space.table_AN[:, : len(prefix)] == torch.tensor(prefix)).all(dim=1)
        allowed_A = begins_A & (space.tokens_A <= (limit or 99))
        value_BA[:, ~allowed_A] = -torch.inf
        row_BW = search(state_BND, head, rule, width=27)
        assert torch.equal(row_BW[:, 0], value_BA.argmax(dim=1))
        assert torch.equal(router.values_of(state_BND, row_BW[:, :1], price)[:, 0], value_BA.amax(dim=1))
    if weight is None:
        value_BA = worth_of(state_BND, head, Rule(space), every_BA)
        torch.testing.assert_close(value_BA.exp().sum(dim=1), torch.ones(5).double())  # probabilities of assignments


def test_budgets_are_kept() -> None:
    router, clips = random_router(), random_clips(20)
    space, state_BND = router.space, router.predict(clips)
    for limit in (8, 11, 19):
        assert router.assign(clips, f"tokens:{limit}").sum(dim=1).max() <= limit
    for average in (8, 12.5, 20, 31, 32):
        price = find_price(state_BND, space, average, router.search)
        mean = router.assign(clips, f"average:{average}", price).sum(dim=1).double().mean().item()
        assert average - 1.5 <= mean <= average
    rows_B = choose_rows(parse_budget("router", space), state_BND, space, search=router.search, prefix=(4, 8))
    assert (space.lengths_of(rows_B)[:, :2] == torch.tensor([4, 8])).all()
    with pytest.raises(UserError, match=r"begins with \[8, 8\] is that short"):
        router.assign(clips, "tokens:15", prefix=(8, 8))
    with pytest.raises(UserError, match=r"decides block by block.*model\.kind=table"):
        router.assign(clips, "quality:0.2")
    with pytest.raises(UserError, match="whole assignments"):
        router.scores(clips)
    with pytest.raises(UserError, match="stem=raw"):
        RouterConfig("blockwise", stem="vjepa2")
    assert RouterConfig("blockwise", num_frames=64).space.num_rows == 5**16  # no table, no limit


def test_targets_are_the_best_the_soft_and_the_mean_continuation() -> None:
    space, generator = TINY.space, torch.Generator().manual_seed(0)
    value_BR = torch.randn(2, 81, generator=generator).double()
    place_BRN = space.places_of(torch.arange(81)).expand(2, -1, -1)
    value_BR[1, :27] = torch.nan  # clip 1 was measured under 54 assignments
    index_BG = draw_rows(~value_BR.isnan(), 7, torch.rand(2, 81, generator=generator))
    assert index_BG[1].min() >= 27 and index_BG[0].unique().numel() == 7
    for reduce, brute in (("max", torch.amax), ("logsumexp", torch.logsumexp), ("mean", torch.mean)):
        target_BGNm = block_targets(value_BR, place_BRN, index_BG, 3, reduce)
        for b, g, t, k in ((0, 3, 0, 1), (0, 2, 2, 2), (1, 6, 3, 0), (1, 1, 1, 1)):
            drawn_N = place_BRN[b, index_BG[b, g]]
            like = (place_BRN[b, :, :t] == drawn_N[:t]).all(dim=1) & (place_BRN[b, :, t] == k) & ~value_BR[b].isnan()
            assert target_BGNm[b, g, t, k] == pytest.approx(brute(value_BR[b, like], dim=0).item())
        absent = target_BGNm[1, :, 0, 0]  # nothing of clip 1 begins with the lowest level
        assert absent.isnan().all() if reduce == "mean" else (absent == -torch.inf).all()


def test_stages_2_and_3_by_their_commands_then_a_live_stream(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A beam, a router that learns from it, and a stream whose tokens are those of whole clips."""
    proxy = lively_tokenizer()
    save_model(tmp_path / "proxy.safetensors", proxy.state_dict(), {"model": to_dict(proxy.config)})
    data = "{sources: ['synthetic:%s'], size: 32, augment: false}"
    beam = "proxy: %s\nperceptual_net: stlpips_alex\nframes_per_block: 1\nclips_per_unit: 4\nmethod: beam\nbeam: 2\n"
    for name, sources in (("table", "train:8"), ("val", "heldout:4")):
        text = f"dir: {tmp_path / name}\n" + beam % (tmp_path / "proxy.safetensors") + f"data: {data % sources}\n"
        (tmp_path / f"{name}.yaml").write_text(text + "quality_weight: 1.6\n")
        command(monkeypatch, curate.main, tmp_path / f"{name}.yaml")
    (tmp_path / "router.yaml").write_text(
        f"run: {{dir: {tmp_path / 'run'}, steps: 30, batch_size: 8, log_every: 10, device: cpu}}\n"
        "model: {kind: blockwise, size: 32, levels: [2, 4], layers: 1, width: 32, heads: 2}\n"
        f"data: {data % 'train:8'}\nval_data: {data % 'heldout:4'}\n".replace(
            "augment: false}\nval", "augment: true}\nval"
        )
        + f"table: {tmp_path}/table/table.safetensors\nval_table: {tmp_path}/val/table.safetensors\n"
        "labels: soft\ntemperature: 0.1\nquality_weight: 1.6\noptim: {lr: 3.0e-3, warmup_steps: 2}\n"
    )
    train_it = partial(command, monkeypatch, train.main, tmp_path / "router.yaml")
    train_it()
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert losses[-1] < 0.8 * losses[0], losses
    assert {"val/top1", "val/same_blocks", "val/mean_tokens"} <= {key for line in lines for key in line}
    for change, words in (
        ("quality_weight=1.2", "at quality_weight = 1.6, not 1.2"),
        ("labels=quality", "method=beam"),
    ):
        with pytest.raises(UserError, match=words):
            train_it(change, f"run.dir={tmp_path / 'other'}")

    tokenizer, router = load_tokenizer(tmp_path / "proxy.safetensors"), load_router(tmp_path / "run")
    assert isinstance(router, TrainedBlockwise)
    film = heldout_scenes(2)
    read: list[int] = []
    frames = (read.append(k) or frame for k, frame in enumerate(film.transpose(1, 2).flatten(0, 1)))
    blocks = [(block, len(read)) for block in tokenizer.stream(frames, router=router)]
    assert [num_read for _, num_read in blocks] == [4 * (t + 1) for t in range(8)]  # each as soon as it is there
    tokens = tokenizer.encode(film, router=router)
    assert [len(block.code_K) for block, _ in blocks] == tokens.length_BN.flatten().tolist()
    assert torch.equal(torch.cat([block.code_K for block, _ in blocks]), tokens.code_L)
    use_in_every_later_stage(tmp_path)


def use_in_every_later_stage(folder: Path) -> None:
    """Stage 4 with its assignments, tokens, files of whole videos, the main job, an evaluation."""
    data, pair = folder / "data.yaml", ["--router_ckpt", folder / "run", "--vq_ckpt", folder / "final"]
    data.write_text((ROOT / "configs/debug/final.yaml").read_text().replace("[2, 4, 8]", "[2, 4]"))
    policy = [f"policy.router_config={folder}/router.yaml", f"policy.router_ckpt={folder}/run", "run.steps=1"]
    run_here("tokenizer.train", data, f"run.dir={folder}/final", *policy)
    extract = [f"dir={folder}/codes", f"tokenizer={folder}/final", f"router={folder}/run", "budget=tokens:12"]
    extract += ["data.sources=[synthetic:train:2]", "labels=[known]"]
    run_here("autoregressive.extract_codes", "configs/debug/extract_c2v.yaml", *extract)
    archive = TokenArchive(folder / "codes")
    assert archive.facts.budget == "tokens:12" and len(archive) == 4  # two views of two clips

    whole, main_job = "tokenizer.tokenize", "tokenizer.router.reconstruction_qual_with_router"
    for module, video, flag in ((whole, [HELD_OUT], "--out"), (main_job, ["--vid_path", HELD_OUT], "--save_dir")):
        job = [*video, flag, folder / module, *pair, "--device", "cpu"]
        run_here(module, *job, "--budget", "tokens:12")
        with pytest.raises(UserError, match="decides block by block"):
            run_here(module, *job, "--budget", "quality:0.3")
    flags = ["--protocol", "folder-recon", "--extractor", "none", "--draws", "20", "--count", "1", "--size", "32"]
    flags += ["--perceptual", "stlpips_alex", "--data", HELD_OUT, "--out", folder / "eval", "--cache", folder / "cache"]
    run_here("evaluations.reconstruction", *flags, *(str(x).replace("_ckpt", "-ckpt") for x in pair))
    assert json.loads((folder / "eval/metrics.json").read_text())["num_clips"] == 1


def command(monkeypatch: pytest.MonkeyPatch, main, config: Path, *changes: str) -> None:
    monkeypatch.setattr("sys.argv", ["command", str(config), *changes])
    main()
