"""Stage 5a: the archive holds what tokenizer and router say, however the work was shared, killed and resumed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from autoregressive.condition import encode_condition
from autoregressive.extract_codes import ExtractConfig, Extraction
from autoregressive.token_archive import TokenArchive
from tokenizer.common.checkpoint import save_model
from tokenizer.common.config import to_dict
from tokenizer.common.errors import UserError
from tokenizer.data.clips import DataConfig, build_dataset
from tokenizer.data.files import bundled_videos
from tokenizer.presets import build_tokenizer, load_tokenizer
from tokenizer.router.model import Router, RouterConfig
from tokenizer.router.predict import load_router

SCENES = DataConfig(sources=["classed:train:5", "synthetic:heldout:2"], size=32)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A random tokenizer and a random router whose choices differ from clip to clip."""
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(1)
    tokenizer = build_tokenizer("VQ_debug")
    router = Router(RouterConfig(size=32, levels=[2, 4, 8], layers=1, width=32, heads=2))
    for parameter in router.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    for name, model in (("tokenizer", tokenizer), ("router", router)):
        save_model(folder / f"{name}.safetensors", model.state_dict(), {"model": to_dict(model.config)})
    return {name: str(folder / f"{name}.safetensors") for name in ("tokenizer", "router")}


def extraction(weights: dict[str, str], folder: Path, **changes) -> Extraction:
    wanted = {"labels": ["a", "b"], "data": SCENES, "clips_per_shard": 3, "batch_size": 2, **weights, **changes}
    return Extraction(ExtractConfig(dir=str(folder), device="cpu", **wanted))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.suffix in (".json", ".safetensors")}


def test_tokens_are_those_of_tokenizer_and_router(weights: dict[str, str], tmp_path: Path) -> None:
    data = DataConfig(sources=SCENES.sources, size=32, augment=False)
    assert extraction(weights, tmp_path, data=data).run()
    archive = TokenArchive(tmp_path)
    tokenizer, router, clips = load_tokenizer(weights["tokenizer"]), load_router(weights["router"]), build_dataset(data)
    assert archive.facts.class_names == ["a", "b"] and archive.label_S.tolist() == [0] * 5 + [1] * 2
    assert (archive.facts.tokenizer_sha256, archive.facts.router_sha256) == (tokenizer.sha256, router.sha256)
    assert len(archive.length_SN.unique(dim=0)) > 1, "all assignments are equal: the test shows little"
    for index in range(7):
        tokens = tokenizer.encode(clips.get(index).video_CTHW, router=router)
        assert archive.source(index) == (clips.names[index], 0)
        assert tokens.length_BN.tolist() == [list(archive.clip(index).lengths)]
        assert (tokens.code_L == archive.clip(index).code_L).float().mean() > 0.95  # rounding of another batch size
    assert list(archive.check()) == []


def test_killed_and_resumed_work_gives_the_bytes_of_a_serial_run(
    weights: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several processes at once are in test_stages.py."""
    assert extraction(weights, tmp_path / "serial", views=2).run()
    killed = extraction(weights, tmp_path / "resumed", views=2)
    done, tokenize = [], killed._tokenize

    def stop_in_the_second_shard(batch):
        done.extend(batch)
        if len(done) > 4:
            raise KeyboardInterrupt
        return tokenize(batch)

    monkeypatch.setattr(killed, "_tokenize", stop_in_the_second_shard)
    with pytest.raises(KeyboardInterrupt):
        killed.run()
    assert killed.units.num_done() == 1 and not (tmp_path / "resumed" / "archive.json").exists()
    assert extraction(weights, tmp_path / "resumed", views=2).run()
    assert contents(tmp_path / "serial") == contents(tmp_path / "resumed")

    archive = TokenArchive(tmp_path / "serial")  # the second view is another draw of the same clips
    assert len(archive) == 14 and archive.source(0)[0] == archive.source(7)[0]
    assert not torch.equal(archive.clip(0).code_L, archive.clip(7).code_L)
    with pytest.raises(UserError, match="work made from another seed"):
        extraction(weights, tmp_path / "serial", views=2, seed=1).run()


def test_frame_prediction_takes_the_best_assignment_with_the_prefix(weights: dict[str, str], tmp_path: Path) -> None:
    data = DataConfig(sources=["synthetic:train:4"], size=32, augment=False)
    extraction(weights, tmp_path, data=data, labels=[], condition_lengths=[8, 2], condition_frames=5).run()
    archive, clips = TokenArchive(tmp_path), build_dataset(data)
    router = load_router(weights["router"])
    rows = router.space.rows_with_prefix([8, 2])
    for index in range(4):
        video_BCTHW = clips.get(index).video_CTHW[None]
        best = rows[router.scores(video_BCTHW)[0, rows].argmax()]
        clip = archive.clip(index)
        assert clip.lengths == tuple(router.space.lengths_of(best).tolist()) and clip.label is None
        assert len(clip.condition_L) == 10


def test_the_condition_sees_the_given_frames_only(weights: dict[str, str]) -> None:
    tokenizer = load_tokenizer(weights["tokenizer"])
    video_BCTHW = torch.rand(2, 3, 16, 32, 32, generator=torch.Generator().manual_seed(0))
    code_BK = encode_condition(tokenizer, video_BCTHW, 5, [8, 2])
    changed = video_BCTHW.clone()
    changed[:, :, 5:] = 0
    assert torch.equal(encode_condition(tokenizer, changed[:, :, :5], 5, [8, 2]), code_BK)

    padded = torch.cat([video_BCTHW[:, :, :5], video_BCTHW[:, :, 4:5].expand(-1, -1, 11, -1, -1)], dim=2)
    whole = tokenizer.encode(padded, torch.tensor([[8, 2, 2, 2]] * 2)).code_L.view(2, 14)
    assert (whole[:, :10] == code_BK).float().mean() > 0.9  # other shapes of the products round differently
    with pytest.raises(UserError, match="4 frames, but the condition needs 5"):
        encode_condition(tokenizer, video_BCTHW[:, :, :4], 5, [8, 2])
    with pytest.raises(UserError, match="9 given frames do not fill 2 blocks"):
        encode_condition(tokenizer, video_BCTHW, 9, [8, 2])


def test_what_cannot_be_read_is_left_out_and_named(weights: dict[str, str], tmp_path: Path) -> None:
    videos = tmp_path / "videos"
    videos.mkdir()
    (videos / "a.mp4").write_bytes(bundled_videos("heldout")[0].path.read_bytes())
    (videos / "b.mp4").write_bytes(b"not a video")
    data = DataConfig(sources=[str(videos)], size=32, augment=False)
    assert extraction(weights, tmp_path / "out", data=data, labels=["x"], clips_per_shard=1).run()
    assert [TokenArchive(tmp_path / "out").source(0)] == [("videos/a.mp4", 0)]
    assert "videos/b.mp4" in (tmp_path / "out" / "skipped.json").read_text()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"views": 2, "data": DataConfig(sources=SCENES.sources, size=32, augment=False)}, "would be copies"),
        ({"labels": ["a"]}, "must hold one for each of 2 data.sources"),
        ({"data": DataConfig(sources=SCENES.sources, repeat=[1], size=32)}, "one for each of data.sources"),
        ({"labels": ["a", ""]}, "synthetic/heldout/000000 has no label"),
        ({"class_names": ["aa", "c"]}, "class_names has no 'a', the label of some clips; the nearest is 'aa'"),
        ({"budget": "average:9"}, "needs the whole set at once"),
        ({"budget": "uniform:4"}, "router is set, but budget = 'uniform:4' does not ask it"),
        ({"router": ""}, "needs a router"),
        ({"data": DataConfig(sources=SCENES.sources, size=64)}, "set data.num_frames=16 data.size=32"),
        ({"condition_lengths": [8, 2]}, "go together"),
        ({"labels": [], "condition_lengths": [8, 3], "condition_frames": 5}, "length 3 of the condition"),
    ],
)
def test_mistakes_are_named_before_any_work(weights: dict[str, str], tmp_path: Path, changes: dict, words: str) -> None:
    with pytest.raises(UserError, match=words):
        extraction(weights, tmp_path / "out", **changes)
    assert not (tmp_path / "out").exists()


def test_a_lower_precision_is_kept_in_the_facts(weights: dict[str, str], tmp_path: Path, capsys) -> None:
    """The lengths are the same, because the router stays in fp32."""
    archives, dtypes = [], []
    for precision in ("none", "bf16"):
        making = extraction(weights, tmp_path / precision, precision=precision)
        making.tokenizer.patch_embed.register_forward_hook(lambda *inputs_output: dtypes.append(inputs_output[2].dtype))
        assert making.run()
        archives.append(TokenArchive(tmp_path / precision))
    said = [line for line in capsys.readouterr().out.splitlines() if "against fp32" in line]
    assert len(said) == 1 and re.match(r"bf16 against fp32, first \d clips: \d+\.\d\d% of the codes are equal", said[0])
    assert list(dict.fromkeys(dtypes)) == [torch.float32, torch.bfloat16]
    exact, half = archives
    assert (exact.facts.precision, half.facts.precision) == ("none", "bf16")
    assert torch.equal(exact.length_SN, half.length_SN)
    with pytest.raises(UserError, match="precision='half'"):
        extraction(weights, tmp_path / "half", precision="half")
