"""Stage 2: the prefix tree equals brute force; any number of killed and restarted workers give the same bytes."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from tokenizer.assignment import pack
from tokenizer.common.checkpoint import save_model
from tokenizer.common.config import to_dict
from tokenizer.common.errors import UserError
from tokenizer.data.clips import DataConfig, build_dataset
from tokenizer.data.files import bundled_videos
from tokenizer.data.sources import SCENES
from tokenizer.losses.perceptual import load_perceptual
from tokenizer.model import VideoTokenizer
from tokenizer.presets import build_tokenizer
from tokenizer.router import reward as table_module
from tokenizer.router.curate import CurateConfig, Curation, Scorer
from tokenizer.router.reward import QualityTable, stats_of, stats_of_sample


def heldout_scenes(num: int) -> torch.Tensor:
    clips = build_dataset(DataConfig(sources=[f"synthetic:heldout:{num}"], size=32, augment=False))
    return torch.stack([clips.get(i).video_CTHW for i in range(num)])


def lively_tokenizer() -> VideoTokenizer:
    """Random weights, but codes taken from latents of real clips, so that clips and assignments differ."""
    torch.manual_seed(0)
    model = build_tokenizer("VQ_debug", levels=[2, 4], init="random").eval()
    torch.nn.init.normal_(model.to_pixels.weight, std=0.1)
    video = heldout_scenes(6)
    packing = pack(model.space.lengths_of(torch.full((6,), model.space.num_rows - 1)))
    model.quantizer.start(model.encode_latents(video, packing), torch.Generator().manual_seed(0))
    return model


@pytest.fixture(scope="module")
def proxy(tmp_path_factory) -> Path:
    model = lively_tokenizer()
    path = tmp_path_factory.mktemp("proxy") / "proxy.safetensors"
    save_model(path, model.state_dict(), {"model": to_dict(model.config)})
    return path


def curate(proxy: Path, folder: Path, **changes) -> Curation:
    data = DataConfig(sources=["synthetic:heldout:5"], size=32, augment=False)
    config = {"perceptual_net": "stlpips_alex", "clips_per_unit": 2, "data": data, "frames_per_block": 1, **changes}
    return Curation(CurateConfig(dir=str(folder), proxy=str(proxy), **config))


def test_tree_equals_brute_force(record_property: Callable[[str, object], None]) -> None:
    video = heldout_scenes(2)
    scorer = Scorer(lively_tokenizer(), load_perceptual("stlpips_alex"))
    tree, brute = scorer.tree(video), scorer.brute_force(video)
    for fast, slow in zip(tree, brute, strict=True):
        assert fast.shape == (2, 16)
        assert slow.std(dim=1).min() > 0, "assignments must differ, or the test shows nothing"
        torch.testing.assert_close(fast, slow, rtol=1e-4, atol=1e-5)
    record_property("largest_difference", float((tree[0] - brute[0]).abs().max()))  # of perceptual distances
    assert torch.equal(tree[0].argmin(dim=1), brute[0].argmin(dim=1))


def test_a_thinned_tree_measures_some_rows_of_the_whole_one(proxy: Path, tmp_path: Path) -> None:
    """Half the levels at each of 4 nodes: one row of 16 for each clip, with the value that the whole tree gives."""
    whole, thin = curate(proxy, tmp_path / "whole"), curate(proxy, tmp_path / "thin", children=1)
    assert whole.run() and thin.run()
    some, every = (QualityTable.load(work.table_path) for work in (thin, whole))
    there_BA = ~some.lpips_BA.isnan()
    assert every.is_whole and not some.is_whole
    assert there_BA.sum(dim=1).tolist() == [1] * 5
    assert len({tuple(row) for row in there_BA.int().tolist()}) == 3, "each of the 3 units draws its own"
    for name in ("lpips_BA", "psnr_BA", "mse_BA"):
        assert torch.equal(getattr(some, name)[there_BA], getattr(every, name)[there_BA])
    again = curate(proxy, tmp_path / "again", children=1)
    assert again.run() and again.table_path.read_bytes() == thin.table_path.read_bytes()
    with pytest.raises(UserError, match="children"):
        curate(proxy, tmp_path / "brute", children=1, method="brute_force")


def test_a_beam_of_full_width_is_the_whole_tree_and_a_narrow_one_keeps_the_best_prefixes(
    proxy: Path, tmp_path: Path
) -> None:
    video = heldout_scenes(3)
    scorer = Scorer(lively_tokenizer(), load_perceptual("stlpips_alex"), 1)
    tree, space = scorer.tree(video), scorer.space
    stats = stats_of_sample(tree[0], space)
    row_BR, wide = scorer.beam(video, width=8, quality_weight=1.2, stats=stats)
    assert torch.equal(row_BR, torch.arange(16).expand(3, -1))
    for ours, exact in zip(wide, tree, strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-4, atol=1e-5)
    narrow_BR, narrow = scorer.beam(video, width=2, quality_weight=1.2, stats=stats)
    assert narrow_BR.shape == (3, 4) and (narrow_BR.diff(dim=1) > 0).all()
    torch.testing.assert_close(narrow[0], tree[0].gather(1, narrow_BR), rtol=1e-4, atol=1e-5)
    alone = [scorer.beam(clip[None], 2, 1.2, stats)[0][0] for clip in video]  # a clip's beam is its own
    assert torch.equal(torch.stack(alone), narrow_BR)


def test_a_table_of_a_beam_carries_the_statistics_of_a_sample(proxy: Path, tmp_path: Path) -> None:
    whole, beam = curate(proxy, tmp_path / "whole"), curate(proxy, tmp_path / "beam", method="beam", beam=2)
    assert whole.run() and beam.run()
    with pytest.raises(UserError, match="method=beam"):
        QualityTable.load(beam.table_path)
    every, table = QualityTable.load(whole.table_path), QualityTable.load(beam.table_path, beam=True)
    assert table.lpips_BA.shape == (5, 4) and not table.is_whole
    torch.testing.assert_close(table.lpips_BA, every.lpips_BA.gather(1, table.rows()), rtol=1e-4, atol=1e-5)
    exact, sampled = stats_of(every), stats_of(table)
    assert sampled.tokens_mean == exact.tokens_mean == 12 and sampled.tokens_std == exact.tokens_std
    assert sampled.lpips_mean == pytest.approx(exact.lpips_mean, rel=0.2)
    again = curate(proxy, tmp_path / "again", method="beam", beam=2, stats=str(whole.table_path))
    assert again.run() and stats_of(QualityTable.load(again.table_path, beam=True)) == exact
    for wrong in ({"beam": 0}, {"quality_weight": 2.1}):
        with pytest.raises(UserError, match="must be at least 1, and quality_weight"):
            curate(proxy, tmp_path / "wrong", method="beam", **wrong)
    with pytest.raises(UserError, match="by method = 'beam' alone"):
        curate(proxy, tmp_path / "wrong", beam=4)


def test_shared_and_killed_work_gives_the_bytes_of_a_serial_run(proxy: Path, tmp_path: Path) -> None:
    serial = curate(proxy, tmp_path / "serial")
    assert serial.run()
    config = tmp_path / "curate.yaml"
    config.write_text(
        f"dir: {tmp_path / 'shared'}\nproxy: {proxy}\nperceptual_net: stlpips_alex\nframes_per_block: 1\n"
        "clips_per_unit: 2\nnum_threads: 1\ndata: {sources: ['synthetic:heldout:5'], size: 32, augment: false}\n"
    )
    command = [sys.executable, "-m", "tokenizer.router.curate", str(config)]
    victim = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    units = tmp_path / "shared" / "units"
    deadline = time.monotonic() + 60
    while not list(units.glob("*.safetensors")) and time.monotonic() < deadline and victim.poll() is None:
        time.sleep(0.01)
    os.kill(victim.pid, signal.SIGKILL)
    victim.wait()
    (units / "000000.safetensors.partial").write_bytes(b"half a unit")
    workers = [subprocess.Popen(command, stderr=subprocess.DEVNULL) for _ in range(2)]
    assert [worker.wait(timeout=100) for worker in workers] == [0, 0]
    shared = tmp_path / "shared" / "table.safetensors"
    assert shared.read_bytes() == serial.table_path.read_bytes()


def test_the_table_names_its_clips_and_counts_what_it_skipped(proxy: Path, tmp_path: Path) -> None:
    videos = tmp_path / "videos"
    videos.mkdir()
    (videos / "a.mp4").write_bytes(bundled_videos("heldout")[0].path.read_bytes())
    (videos / "b.mp4").write_bytes(b"not a video")
    (videos / "c.mp4").write_bytes(bundled_videos("heldout")[1].path.read_bytes())
    work = curate(proxy, tmp_path / "out", data=DataConfig(sources=[str(videos)], size=32, augment=False))
    assert work.run()
    table = QualityTable.load(work.table_path)
    assert table.names == ["videos/a.mp4", "videos/c.mp4"]
    assert "videos/b.mp4" in (tmp_path / "out" / "skipped.json").read_text()
    assert table.meta["perceptual_net"] == "stlpips_alex"


def test_work_of_another_proxy_or_metric_is_not_mixed(proxy: Path, tmp_path: Path) -> None:
    curate(proxy, tmp_path / "out")
    with pytest.raises(UserError, match="frames_per_block"):
        curate(proxy, tmp_path / "out", frames_per_block=2)


def test_a_table_of_scenes_that_look_otherwise_now_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only rendered clips change with the code; their names stay."""
    path, rows = tmp_path / "table.safetensors", torch.rand(3, 1, 9)
    for name, scenes, refused in (
        ("synthetic/train/000000", SCENES, False),
        ("synthetic/train/000000", SCENES - 1, True),
        ("classed/heldout/000001", SCENES - 1, True),
        ("films/a.mp4", SCENES - 1, False),
    ):
        with monkeypatch.context() as then:
            then.setattr(table_module, "SCENES", scenes)
            QualityTable(*rows, [name], (2, 4, 8), 2).save(path)
        words = f"scenes of version {scenes}, and this code renders version {SCENES}"
        with pytest.raises(UserError, match=words) if refused else nullcontext():
            QualityTable.load(path)


def test_a_damaged_table_is_refused(tmp_path: Path) -> None:
    space_rows = 2**4
    table = QualityTable(*torch.rand(3, 1, space_rows), ["a"], (2, 4), 4)
    path = tmp_path / "table.safetensors"
    table.save(path)
    whole = path.read_bytes()
    length = 8 + int.from_bytes(whole[:8], "little")
    flipped = [whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :] for place in range(length, len(whole), 7)]
    renamed = [whole.replace(key, key[:-1] + b"z") for key in (b"levels", b"names", b"meta")]
    for damaged in (whole[:-3], *flipped, *renamed):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match="damaged"):
            QualityTable.load(path)
    with pytest.raises(UserError, match="no such quality table"):
        QualityTable.load(tmp_path / "other.safetensors")


def test_a_lower_precision_says_how_many_choices_stay(proxy: Path, tmp_path: Path, capsys) -> None:
    exact, half = curate(proxy, tmp_path / "none"), curate(proxy, tmp_path / "bf16", precision="bf16")
    assert exact.run() and "against fp32" not in capsys.readouterr().out
    assert half.run()
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "against fp32" in line]
    assert re.match(r"bf16 against fp32, first \d clips: equal best assignment .* for \d \(\d+%\)", line)
    tables = [QualityTable.load(curation.table_path) for curation in (exact, half)]
    gap = (tables[0].lpips_BA - tables[1].lpips_BA).abs().max()
    assert 0 < gap < 0.05, "computed in bf16, and near"
    assert tables[1].meta["precision"] == "bf16" and "precision" not in tables[0].meta
    with pytest.raises(UserError, match="precision"):
        curate(proxy, tmp_path / "none", precision="bf16")
    with pytest.raises(UserError, match="precision='half'"):
        curate(proxy, tmp_path / "half", precision="half")


def test_a_video_that_changed_since_it_was_scored_is_refused(proxy: Path, tmp_path: Path) -> None:
    (tmp_path / "videos").mkdir()
    for name, number in (("a", 0), ("b", 1)):
        (tmp_path / f"videos/{name}.mp4").write_bytes(bundled_videos("heldout")[number].path.read_bytes())
    data = DataConfig(sources=[str(tmp_path / "videos"), "synthetic:heldout:1"], size=32, augment=False)
    work = curate(proxy, tmp_path / "out", data=data)
    assert work.run()
    table = QualityTable.load(work.table_path)
    assert [bool(file) for file in table.files] == [True, True, False]
    (tmp_path / "videos/b.mp4").write_bytes(bundled_videos("heldout")[2].path.read_bytes())
    with pytest.raises(UserError, match="videos/b.mp4 has changed since it was scored"):
        work.merge()
