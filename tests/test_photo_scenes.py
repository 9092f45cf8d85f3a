"""Camera moves over a folder of photographs, as a data source."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tokenizer.common.errors import UserError
from tokenizer.data.clips import DataConfig, build_dataset
from tokenizer.data.video_io import to_uint8

SMALL: dict[str, Any] = {"num_frames": 8, "size": 24}


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    random = np.random.default_rng(0)
    for name, size in (("a.png", (300, 210)), ("deeper/b.JPG", (205, 1400))):
        path = tmp_path / "photos" / name
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(random.integers(0, 255, (*size, 3), np.uint8)).save(path)
    return tmp_path / "photos"


def test_scenes_repeat_move_as_named_and_start_afresh_in_training(photos: Path) -> None:
    plain = build_dataset(DataConfig([f"photos:{photos}:8"], augment=False, **SMALL))
    assert plain.names == [f"photos/photos/{number:06d}" for number in range(8)]
    clips = [plain.get(number) for number in range(8)]
    assert [clip.kind for clip in clips] == ["still", "slow", "medium", "fast"] * 2
    frames = [to_uint8(clip.video_CTHW).astype(int) for clip in clips]
    moves = [float(np.abs(np.diff(clip, axis=0)).mean()) for clip in frames]
    assert max(moves[1::4] + moves[2::4] + moves[3::4]) > 1
    again = build_dataset(DataConfig([f"photos:{photos}:2-5"], augment=False, **SMALL))
    assert again.names == plain.names[2:5]
    assert (again.get(1).video_CTHW == clips[3].video_CTHW).all()
    drawn = build_dataset(DataConfig([f"photos:{photos}:8"], **SMALL))
    first, second = drawn.get(3, epoch=0), drawn.get(3, epoch=1)
    assert first.kind == second.kind == "fast" and not (first.video_CTHW == second.video_CTHW).all()


@pytest.mark.parametrize(
    ("source", "message"),
    [("photos:{}", "expected photos:FOLDER:N"), ("photos:{}:0", "expected"), ("photos:{}/none:3", "is not a folder")],
)
def test_a_misspelt_source_is_refused(photos: Path, source: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_dataset(DataConfig([source.format(photos)], **SMALL))


def test_a_folder_without_photographs_and_a_damaged_one_are_named(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no photograph"):
        build_dataset(DataConfig([f"photos:{tmp_path / 'empty'}:1"], **SMALL)).get(0)
    (photos / "c.png").write_bytes(b"not a picture")
    with pytest.raises(UserError, match="c.png: cannot be read"):
        build_dataset(DataConfig([f"photos:{photos}:1"], **SMALL)).get(0)
