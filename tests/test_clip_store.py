"""Packed clips: raw ones are the pixels of their source, compressed ones near; names, labels and rest are kept."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import signal

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import save_file

from tokenizer.common.errors import UserError
from tokenizer.common.image_quality import psnr
from tokenizer.data import pack
from tokenizer.data.clip_store import ClipStore, compress, open_store
from tokenizer.data.clips import DataConfig, build_dataset
from tokenizer.data.pack import pack_clips

SOURCES = ["synthetic:train:6", "classed:heldout:3"]


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """The source set, and what its raw and its compressed file give."""
    folder = tmp_path_factory.mktemp("packed")
    source = build_dataset(DataConfig(SOURCES, size=40, augment=False))
    assert pack_clips(source, folder / "raw.safetensors") == 9
    assert pack_clips(build_dataset(_of(folder / "raw.safetensors")), folder / "small.safetensors", crf=15) == 9
    return source, folder / "raw.safetensors", folder / "small.safetensors"


def _of(path, part="", **more):
    return DataConfig([f"{path}{part}"], **{"size": 40, "augment": False, **more})


def test_a_write_limit_ends_packing_and_leaves_nothing(packed, tmp_path, monkeypatch):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(OSError, match="too large"):
            pack_clips(packed[0], tmp_path / "raw.safetensors")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    monkeypatch.setattr(pack, "write_raw", lambda *_: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        pack_clips(packed[0], tmp_path / "raw.safetensors")
    assert not list(tmp_path.iterdir())


def test_raw_is_exact_and_compressed_is_near(packed):
    source, *paths = packed
    raw, small = (build_dataset(_of(path)) for path in paths)
    for i in range(len(source)):
        ours, exact, near = (data.get(i) for data in (source, raw, small))
        assert (ours.name, ours.label, ours.kind) == (exact.name, exact.label, exact.kind)
        assert (ours.name, ours.label, ours.kind) == (near.name, near.label, near.kind)
        assert torch.equal(ours.video_CTHW, exact.video_CTHW)
        assert psnr(near.video_CTHW[None], ours.video_CTHW[None]) > 30
        resting = (ours.video_CTHW[:, 1:] == ours.video_CTHW[:, :-1]).flatten(2).all(2).all(0)
        assert torch.equal(near.video_CTHW[:, 1:][:, resting], near.video_CTHW[:, :-1][:, resting])
    assert paths[1].stat().st_size < paths[0].stat().st_size / 10
    for path in paths:
        assert open_store(str(path)).digest() == open_store(str(path)).sha256


def test_parts_crops_and_refusals(packed):
    _, raw, _ = packed
    assert [len(build_dataset(_of(raw, part))) for part in ("", ":4", ":2-9")] == [9, 4, 7]
    (raw.parent / "12:30.safetensors").symlink_to(raw)
    assert [len(build_dataset(_of(raw.parent / "12:30.safetensors", part))) for part in ("", ":4")] == [9, 4]
    assert build_dataset(_of(raw, ":2-9")).names[0] == "synthetic/train/000002"
    crop = build_dataset(_of(raw, size=32, augment=True, crop_scale=0.1, flip=False)).get(0).video_CTHW
    whole = build_dataset(_of(raw, size=32)).get(0).video_CTHW
    assert crop.shape == whole.shape == (3, 16, 32, 32) and not torch.equal(crop, whole)
    for part, more, words in (
        (":12", {}, "holds 9 clips"),
        ("", {"size": 64}, "--size 64"),
        ("", {"num_frames": 8}, "--num-frames 8"),
    ):
        with pytest.raises(UserError, match=words):
            build_dataset(_of(raw, part, **more))


def test_a_file_that_is_no_store_is_one_line(tmp_path):
    (tmp_path / "a.safetensors").write_bytes(b"not one")
    for name, words in (("a", "clip store"), ("missing", "does not exist")):
        with pytest.raises(UserError, match=words):
            build_dataset(_of(tmp_path / f"{name}.safetensors"))


def test_equal_frames_are_stored_once():
    frames_THWC = np.repeat(np.random.default_rng(0).integers(0, 255, (2, 16, 16, 3), np.uint8), [3, 2], axis=0)
    _, shown = compress(frames_THWC, 20)
    assert shown == [0, 0, 0, 1, 1]


def test_a_damaged_store_is_one_line(packed, tmp_path):
    """No traceback and no guess: cut files, other JSON in the header, a pipe."""
    whole = packed[1].read_bytes()
    path = tmp_path / "damaged.safetensors"
    length = int.from_bytes(whole[:8], "little")
    nested = b"[" * 100_000
    for data in (
        whole[:-1],
        whole[: 8 + length],
        whole[:20],
        b"",
        (2).to_bytes(8, "little") + b"[]" + bytes(99),
        len(nested).to_bytes(8, "little") + nested + bytes(99),
        whole.replace(b"data_offsets", b"data_offsetz"),
        whole.replace(rb"\"clips\"", rb"\"clipz\""),
    ):
        path.write_bytes(data)
        with pytest.raises(UserError, match="damaged.safetensors"):
            ClipStore(path)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(UserError, match="is not a regular file"):
        ClipStore(path)


@pytest.mark.parametrize("kind", [1, 2], ids=["raw", "compressed"])
def test_a_flipped_byte_is_found_when_its_clip_is_read(packed, tmp_path, kind):
    """A clip with another byte is skipped and named; another name in the header is refused at once."""
    whole, path = bytearray(packed[kind].read_bytes()), tmp_path / "flipped.safetensors"
    header = json.loads(whole[8 : 8 + int.from_bytes(whole[:8], "little")])
    start = 8 + int.from_bytes(whole[:8], "little")
    part = header["frames" if kind == 1 else "packets"]["data_offsets"]
    place = start + (part[0] + part[1]) // 2  # somewhere in the middle clip
    whole[place] ^= 4
    path.write_bytes(whole)
    data = build_dataset(_of(path))
    met = [number for number, _ in data.readable(range(len(data)))]
    assert len(met) == 8 and len(data.quarantine) == 1 and "is damaged" in next(iter(data.quarantine.values()))
    whole[place] ^= 4
    path.write_bytes(whole.replace(b"synthetic/train/000002", b"synthetic/train/000012"))
    with pytest.raises(UserError, match="damaged clip store .its header differs"):
        ClipStore(path)


def test_a_store_of_before_the_checksums_is_compared_whole(packed, tmp_path):
    path = tmp_path / "old.safetensors"
    with safe_open(packed[1], "np") as file:
        frames, known = file.get_tensor("frames"), json.loads(file.metadata()["clip_store"])
    del known["header_sha256"]
    known["sha256"] = hashlib.sha256(frames.tobytes()).hexdigest()
    for damaged in (False, True):
        frames[3, 1, 1, 1, 1] ^= damaged
        save_file({"frames": frames}, path, {"clip_store": json.dumps(known)})
        if damaged:
            with pytest.raises(UserError, match="its clips differ from their sha256"):
                ClipStore(path)
        else:
            assert len(ClipStore(path)) == 9
