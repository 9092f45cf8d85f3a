"""The token archive: what goes in comes out, in any order; every kind of damage is seen."""

from __future__ import annotations

import json
import random
import re
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import save_file

from autoregressive.sequence import ClipCodes
from autoregressive.token_archive import ArchivedClip, ArchiveFacts, TokenArchive, main, save_archive, save_shard
from tokenizer.common.errors import UserError

FACTS = ArchiveFacts(
    codebook_size=1 << 16, levels=[2, 4, 8], num_blocks=4, num_frames=16, size=32, tokenizer_sha256="ab" * 32,
    class_names=["a", "b"], condition_lengths=[8, 2], condition_frames=5,
)  # fmt: skip


def random_clip(seed: int, facts: ArchiveFacts = FACTS) -> ArchivedClip:
    generator = torch.Generator().manual_seed(seed)
    rows = facts.space.rows_with_prefix(facts.condition_lengths)
    lengths = tuple(facts.space.lengths_of(rows[seed % len(rows)]).tolist())
    draw = torch.randint(facts.codebook_size, (facts.condition_tokens + sum(lengths),), generator=generator)
    codes = ClipCodes(draw[facts.condition_tokens :], lengths, [0, 1, None][seed % 3], draw[: facts.condition_tokens])
    return ArchivedClip(codes, f"videos/ü{seed}.mp4", seed % 2)


def write(folder: Path, clips: list[ArchivedClip], facts: ArchiveFacts = FACTS, per_shard: int = 4) -> TokenArchive:
    paths = []
    for number, start in enumerate(range(0, len(clips), per_shard)):
        paths.append(folder / "shards" / f"{number:06d}.safetensors")
        save_shard(paths[-1], clips[start : start + per_shard], facts)
    paths.append(folder / "shards" / "empty.safetensors")
    save_shard(paths[-1], [], facts)
    save_archive(folder, facts, paths)
    return TokenArchive(folder)


def test_any_clip_comes_back_as_it_was(tmp_path: Path) -> None:
    clips = [random_clip(seed) for seed in range(11)]
    clips[3].codes.code_L[0], clips[3].codes.code_L[1] = 0, (1 << 16) - 1  # all that uint16 can say
    archive = write(tmp_path, clips)
    assert len(archive) == 11 and archive.facts == FACTS
    for index in (10, 0, 3, 4, 7, 7):
        ours, wanted = archive.clip(index), clips[index].codes
        assert torch.equal(ours.code_L, wanted.code_L) and torch.equal(ours.condition_L, wanted.condition_L)
        assert (ours.lengths, ours.label) == (wanted.lengths, wanted.label)
        assert archive.source(index) == (clips[index].name, clips[index].view)
    assert archive.length_SN.tolist() == [list(clip.codes.lengths) for clip in clips]
    assert archive.label_S.tolist() == [-1 if c.codes.label is None else c.codes.label for c in clips]
    assert list(archive.check()) == []
    with pytest.raises(IndexError, match="clip 11 of 11"):
        archive.clip(11)


def test_equal_clips_give_equal_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write(tmp_path / name, [random_clip(seed) for seed in range(6)])
    for file in ("archive.json", "shards/000000.safetensors", "shards/000001.safetensors"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_damage_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path, [random_clip(seed) for seed in range(8)])
    monkeypatch.setattr(sys, "argv", ["token_archive", "check", str(tmp_path)])
    assert main() == 0
    shard = tmp_path / "shards" / "000001.safetensors"
    whole = shard.read_bytes()

    shard.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))  # one bit
    assert main() == 1
    assert "shards/000001.safetensors: differs from its sha256" in capsys.readouterr().out

    shard.write_bytes(whole[:-3])
    with pytest.raises(UserError, match=r"000001.safetensors: damaged"):
        TokenArchive(tmp_path)
    shard.unlink()
    with pytest.raises(UserError, match=r"000001.safetensors: this shard of the archive is missing"):
        TokenArchive(tmp_path)
    (tmp_path / "archive.json").write_text("{")
    with pytest.raises(UserError, match=r"archive.json: damaged"):
        TokenArchive(tmp_path)
    (tmp_path / "archive.json").unlink()
    with pytest.raises(UserError, match="no finished token archive"):
        TokenArchive(tmp_path)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"codebook_size": 64}, "codes that are not below the codebook's size 64"),
        ({"levels": [2, 8]}, "lengths that are none of the levels"),
        ({"class_names": ["a"]}, "labels outside the 1 classes"),
        ({"condition_lengths": [8]}, "do not fit together"),
    ],
)
def test_tokens_that_contradict_their_facts_are_named(tmp_path: Path, changes: dict, words: str) -> None:
    clips = [random_clip(seed) for seed in range(4)]
    save_shard(tmp_path / "0.safetensors", clips, FACTS)
    save_archive(tmp_path, ArchiveFacts(**{**vars(FACTS), **changes}), [tmp_path / "0.safetensors"])
    if "codebook_size" in changes:  # only a check reads all codes
        (problem,) = TokenArchive(tmp_path).check()
        assert words in problem
        return
    with pytest.raises(UserError, match=words):
        TokenArchive(tmp_path)


def test_no_flipped_bit_reaches_a_clip(tmp_path: Path) -> None:
    """Training opens an archive and reads its clips: wherever a bit of a file flips, one of the two refuses."""
    write(tmp_path, [random_clip(seed) for seed in range(4)])
    rng = random.Random(0)
    for path in (tmp_path / "shards" / "000000.safetensors", tmp_path / "archive.json"):
        whole = path.read_bytes()
        for _ in range(50):
            place = rng.randrange(len(whole))
            path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << rng.randrange(8)]) + whole[place + 1 :])
            with pytest.raises(UserError, match=path.name):
                TokenArchive(tmp_path).clip(0)
        path.write_bytes(whole)
    TokenArchive(tmp_path).clip(0)


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda body: body["shards"][0].update(num_clips=4.0), "num_clips = 4.0 is not int"),
        (lambda body: body["shards"][0].update(num_clips=True), "num_clips = True is not int"),
        (lambda body: body["shards"][0].update(file="../0.safetensors"), "'../0.safetensors' is not a path inside"),
        (lambda body: body["shards"].__setitem__(0, "x"), "expected an object, found 'x'"),
        (lambda body: body.update(shards={}), "shards = {} is not list"),
        (lambda body: body["facts"].update(num_blocks=4.0), "num_blocks"),
        (lambda body: body["facts"].pop("levels"), "levels"),
    ],
)
def test_an_edited_list_of_shards_is_refused(tmp_path: Path, edit: Callable[[dict], None], words: str) -> None:
    write(tmp_path, [random_clip(seed) for seed in range(4)])
    path = tmp_path / "archive.json"
    body = json.loads(path.read_text())
    del body["sha256"]
    edit(body)
    path.write_text(json.dumps(body))
    with pytest.raises(UserError, match=re.escape(words)):
        TokenArchive(tmp_path)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("code_L", lambda x: x.astype(np.float32)),
        ("code_L", lambda x: x > 5),
        ("code_L", lambda x: x.astype(np.int64)),
        ("label_S", lambda x: x.astype(np.float64)),
        ("length_SN", lambda x: x.astype(bool)),
        ("offset_S", lambda x: x[None]),
    ],
)
def test_no_other_type_is_cast_to_codes(tmp_path: Path, name: str, change: Callable[[np.ndarray], np.ndarray]) -> None:
    write(tmp_path, [random_clip(seed) for seed in range(4)])
    path = tmp_path / "shards" / "000000.safetensors"
    with safe_open(path, "np") as file:
        metadata, tensors = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    tensors[name] = change(tensors[name])
    save_file(tensors, path, metadata)
    with pytest.raises(UserError, match=rf"000000.safetensors: {name} holds"):
        TokenArchive(tmp_path)


def test_a_codebook_that_does_not_fit_is_refused() -> None:
    with pytest.raises(UserError, match="codebook_size = 65537"):
        ArchiveFacts(**{**vars(FACTS), "codebook_size": 65537})
