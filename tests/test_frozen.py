"""Frozen encoders: preprocessing as the library's own processors do it, weights from a folder, refusals in one line.

No published weights are to be had here: every encoder of these tests has random ones.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tokenizer.common.checkpoint import file_sha256
from tokenizer.common.errors import UserError
from tokenizer.frozen import download
from tokenizer.frozen.encoders import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    VIDEOMAE,
    VJEPA2,
    Family,
    FeatureShape,
    FrozenConfig,
    FrozenVideoMAE,
    FrozenVJEPA2,
    prepare_frames,
)

transformers = pytest.importorskip("transformers")

TINY = FrozenConfig(random_for_tests="tiny", precision="none")


def clips(side: int, num_clips: int = 2) -> torch.Tensor:
    return torch.rand(num_clips, 3, 16, side, side, generator=torch.Generator().manual_seed(3))


def saved(folder: Path, family: Family, model_class: str = "") -> Path:
    """Random weights as the hub has them: config.json and model.safetensors."""
    torch.manual_seed(1)
    config = getattr(transformers, family.config_class)(**family.tiny)
    getattr(transformers, model_class or family.model_class)(config).save_pretrained(folder)
    return folder


# --- preprocessing --------------------------------------------------------------------------------------------------


def test_vjepa2_frames_are_those_of_its_processor() -> None:
    """With the margin off (it resizes to 292 and cuts 256): all of the clip has its cell."""
    processor = transformers.VJEPA2VideoProcessor()
    assert processor.crop_size["height"] == 256
    video_BCTHW = clips(128)
    whole = {"size": {"shortest_edge": 256}, "return_tensors": "pt"}
    frames = list(video_BCTHW.transpose(1, 2))
    theirs = processor(frames, do_rescale=False, **whole)["pixel_values_videos"]
    assert torch.allclose(prepare_frames(video_BCTHW, 256), theirs, atol=1e-5)
    # from bytes it rounds once more, after resizing
    bytes_BTCHW = [(clip * 255).round().to(torch.uint8) for clip in frames]
    theirs = processor(bytes_BTCHW, **whole)["pixel_values_videos"]
    ours = prepare_frames(torch.stack(bytes_BTCHW).transpose(1, 2) / 255, 256)
    assert (ours - theirs).abs().max() < 1.01 / 255 / min(IMAGENET_STD)


@pytest.mark.parametrize("side", [128, 320])  # up and down: antialiasing counts when frames shrink
def test_videomae_frames_are_those_of_its_processor(side: int) -> None:
    """With the statistics of its published configuration, which are ImageNet's."""
    processor = transformers.VideoMAEImageProcessor(image_mean=IMAGENET_MEAN, image_std=IMAGENET_STD)
    video_BCTHW = clips(side, 1)
    frames = [list(clip.numpy()) for clip in video_BCTHW.transpose(1, 2)]
    theirs = processor(frames, do_rescale=False, input_data_format="channels_first", return_tensors="pt")
    assert np.allclose(prepare_frames(video_BCTHW, 224), theirs["pixel_values"], atol=1e-5)


def test_clips_that_are_not_square_are_refused() -> None:
    with pytest.raises(UserError, match="32x48"):
        prepare_frames(torch.rand(1, 3, 16, 32, 48), 64)


# --- features -------------------------------------------------------------------------------------------------------


def test_vjepa2_features_are_the_librarys() -> None:
    encoder = FrozenVJEPA2(TINY)
    assert encoder.shape_of(16) == FeatureShape(8, 8, 32) and encoder.shape_of(1) == FeatureShape(1, 8, 32)
    video_BCTHW = clips(32)
    feature_BSE = encoder.features(video_BCTHW)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        whole = transformers.VJEPA2Model(transformers.VJEPA2Config(**VJEPA2.tiny)).eval()
    with torch.no_grad():
        wanted = whole(prepare_frames(video_BCTHW, 128), skip_predictor=True).last_hidden_state
    assert torch.allclose(feature_BSE, wanted, atol=1e-6)
    assert not feature_BSE.is_inference()  # a loss may keep it for its backward
    with pytest.raises(UserError, match="15 frames"):
        encoder.shape_of(15)


def test_a_place_of_the_features_is_a_place_of_the_clip() -> None:
    """Order (slot, row, column): what changes in frames 4, 5 at the lower left shows most in its own features."""
    encoder = FrozenVJEPA2(TINY)
    before = clips(32, 1)
    after = before.clone()
    after[:, :, 4:6, 24:, :8] = 1 - before[:, :, 4:6, 24:, :8]
    change_S = (encoder.features(after) - encoder.features(before)).norm(dim=-1)[0]
    assert set(change_S.topk(4).indices.tolist()) == {2 * 64 + row * 8 + column for row in (6, 7) for column in (0, 1)}


def test_videomae_taps_are_the_librarys_and_pass_gradients_to_pixels_only() -> None:
    encoder = FrozenVideoMAE(TINY)
    video_BCTHW = clips(32).requires_grad_()
    embedded, last = encoder.features(video_BCTHW, [0, 12])
    with torch.no_grad():
        wanted = encoder._model(prepare_frames(video_BCTHW, 64)).last_hidden_state
    assert torch.allclose(last, wanted, atol=1e-6)  # the published one has no norm after its last block
    assert torch.equal(embedded, encoder.features(video_BCTHW, [0])[0])
    last.sum().backward()
    assert video_BCTHW.grad is not None and video_BCTHW.grad.abs().amin(dim=(1, 3, 4)).all()
    assert not any(p.requires_grad for p in encoder._model.parameters())
    for frames, taps in ((8, [0]), (16, [13]), (16, [])):
        with pytest.raises(UserError):
            encoder.check(frames, taps)


def test_bf16_is_near_fp32() -> None:
    exact, fast = (FrozenVJEPA2(FrozenConfig(random_for_tests="tiny", precision=p)) for p in ("none", "bf16"))
    video_BCTHW = clips(32)
    cosine = torch.nn.functional.cosine_similarity(exact.features(video_BCTHW), fast.features(video_BCTHW), dim=-1)
    assert cosine.min() > 0.999 and fast.features(video_BCTHW).dtype == torch.float32


# --- weights --------------------------------------------------------------------------------------------------------


def test_weights_come_from_a_folder(tmp_path: Path) -> None:
    """The published VideoMAE is a pre-training model: its encoder is taken, its decoder left."""
    videomae = saved(tmp_path / "videomae", VIDEOMAE, "VideoMAEForPreTraining")
    encoder = FrozenVideoMAE(FrozenConfig(str(videomae), precision="none"))
    assert encoder.sha256 == file_sha256(videomae / "model.safetensors") and not encoder.is_random
    inside = transformers.VideoMAEForPreTraining.from_pretrained(videomae).videomae.state_dict()
    assert all(torch.equal(value, inside[name]) for name, value in encoder._model.state_dict().items())
    vjepa2 = saved(tmp_path / "vjepa2", VJEPA2)
    assert FrozenVJEPA2(FrozenConfig(str(vjepa2))).width == 32


def test_absent_or_wrong_weights_are_one_sentence(tmp_path: Path) -> None:
    def refused(weights: str) -> str:
        with pytest.raises(UserError) as caught:
            FrozenVJEPA2(FrozenConfig(weights))
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "python -m tokenizer.frozen.download vjepa2" in refused("")
    assert "facebook/vjepa2-vitl-fpc64-256" in refused("")
    assert "config.json and model.safetensors of V-JEPA 2 not found" in refused(str(tmp_path))
    assert "'videomae', not of 'vjepa2'" in refused(str(saved(tmp_path / "other", VIDEOMAE)))
    folder = saved(tmp_path / "vjepa2", VJEPA2)
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"num_hidden_layers": 3}))
    assert "are missing" in refused(str(folder))


def test_without_the_library_it_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match=r"pip install -e .\[semantic\]"):
        FrozenVideoMAE(TINY)


def test_random_weights_are_asked_for_by_name_and_say_so(caplog: pytest.LogCaptureFixture) -> None:
    before = torch.get_rng_state()
    encoders = [FrozenVJEPA2(TINY) for _ in range(2)]
    assert torch.equal(torch.get_rng_state(), before)
    assert encoders[0].is_random and "RANDOM" in caplog.text
    video_BCTHW = clips(32)
    assert torch.equal(*(encoder.features(video_BCTHW) for encoder in encoders))
    with pytest.raises(UserError, match="does not read weights"):
        FrozenConfig("folder", random_for_tests="tiny")
    with pytest.raises(UserError, match="'large'"):
        FrozenConfig(random_for_tests="large")


def test_the_download_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    hub = {family.hub_name: saved(tmp_path / family.key, family) for family in (VJEPA2, VIDEOMAE)}
    monkeypatch.setattr(download, "fetch", lambda family, name, local_files_only: hub[name])
    monkeypatch.setattr("sys.argv", ["download", "--to", str(tmp_path / "out")])
    download.main()
    assert capsys.readouterr().out.count("sha256") == 2
    assert FrozenVideoMAE(FrozenConfig(str(tmp_path / "out" / "videomae"))).width == 32
    monkeypatch.undo()
    monkeypatch.setattr("sys.argv", ["download", "vjepa2", "--name", "nobody/nothing"])
    with pytest.raises(UserError, match="'nobody/nothing' cannot be fetched"):
        download.main()
