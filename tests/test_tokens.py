"""Tokens on disk, and tokenizers on disk: round trips, and what is refused in one line."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save

from tokenizer.common.checkpoint import save_model
from tokenizer.common.config import to_dict
from tokenizer.common.errors import UserError
from tokenizer.model import VideoTokenizer
from tokenizer.presets import PRESETS, build_tokenizer, load_tokenizer
from tokenizer.tokens import VideoTokens

LENGTHS = torch.tensor([[2, 8, 4, 4], [8, 2, 2, 4]])
VIDEO = torch.rand(2, 3, 16, 32, 32, generator=torch.Generator().manual_seed(0))


def save_tokenizer(model: VideoTokenizer, folder: Path) -> Path:
    path = folder / "tokenizer.safetensors"
    save_model(path, model.state_dict(), {"model": to_dict(model.config)}, {"kind": "tokenizer"})
    return path


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    return save_tokenizer(build_tokenizer("VQ_debug"), tmp_path)


def test_three_lines_of_python(saved: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(saved)
    tokens = tokenizer.encode(VIDEO, LENGTHS)
    video = tokenizer.decode(tokens)
    assert video.shape == VIDEO.shape and 0 <= video.min() <= video.max() <= 1

    tokens.save(tmp_path / "tokens.safetensors")
    back = VideoTokens.load(tmp_path / "tokens.safetensors")
    assert torch.equal(back.code_L, tokens.code_L) and torch.equal(back.length_BN, tokens.length_BN)
    assert back.tokenizer_sha256 == tokenizer.sha256 != ""
    assert torch.equal(tokenizer.decode(back), video)
    assert len(back) == 2 and (back.clip(1).code_L.tolist(), len(back.clip(1))) == (tokens.code_L[18:].tolist(), 1)


def test_what_encode_gives_can_be_trained_on(saved: Path) -> None:
    """A language model embeds the codes and a loss compares with the frames: neither may be inference-only tensors."""
    tokenizer = load_tokenizer(saved)
    tokens = tokenizer.encode(VIDEO, LENGTHS)
    table = torch.nn.Embedding(tokens.codebook_size, 4)
    (table(tokens.code_L).sum() * tokenizer.decode(tokens).mean()).backward()
    assert table.weight.grad is not None


def test_tokens_that_cannot_be_are_refused(tmp_path: Path) -> None:
    facts = {"num_frames": 16, "size": 32, "codebook_size": 64}
    with pytest.raises(UserError, match="17 codes do not fit lengths that add up to 18"):
        VideoTokens(torch.zeros(17, dtype=torch.long), LENGTHS[:1], **facts)
    for code in (-1, 64):
        with pytest.raises(UserError, match="codes must be in 0 .. 63"):
            VideoTokens(torch.full((18,), code), LENGTHS[:1], **facts)


def test_files_that_are_no_tokens_are_named(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a file of video tokens"):
        VideoTokens.load(saved)
    with pytest.raises(UserError, match="absent.safetensors: cannot be read"):
        VideoTokens.load(tmp_path / "absent.safetensors")
    (tmp_path / "cut.safetensors").write_bytes(saved.read_bytes()[:100])
    with pytest.raises(UserError, match="cut.safetensors: cannot be read"):
        VideoTokens.load(tmp_path / "cut.safetensors")


def test_a_flipped_code_and_another_fact_show(tmp_path: Path) -> None:
    VideoTokens(torch.full((18,), 5), LENGTHS[:1], 16, 32, 64, "abc").save(tmp_path / "whole.safetensors")
    whole = (tmp_path / "whole.safetensors").read_bytes()
    assert len(VideoTokens.load(tmp_path / "whole.safetensors")) == 1
    flipped = bytearray(whole)
    flipped[whole.rindex(b"\x05")] ^= 1
    for data in (bytes(flipped), whole.replace(b"abc", b"abd")):
        (tmp_path / "x.safetensors").write_bytes(data)
        with pytest.raises(UserError, match="damaged: its tokens differ from their sha256"):
            VideoTokens.load(tmp_path / "x.safetensors")


def test_tokens_are_checked_before_they_are_used(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    good = {"codes": torch.zeros(18, dtype=torch.int32), "lengths": LENGTHS[:1].int()}
    facts = {"num_frames": 16, "size": 32, "codebook_size": 64, "tokenizer_sha256": ""}

    def refusal(tensors: dict[str, torch.Tensor], facts: object = facts) -> str:
        text = facts if isinstance(facts, str) else json.dumps(facts)
        meta = {"evatok.tokens": text}
        path.write_bytes(save({**good, **tensors}, metadata=meta))
        with pytest.raises(UserError) as refused:
            VideoTokens.load(path)
        assert str(refused.value).startswith(str(path)) and "\n" not in str(refused.value)
        return str(refused.value)

    assert "codes are float32 [18]" in refusal({"codes": torch.full((18,), 1.5)})
    assert "codes are bool [18]" in refusal({"codes": torch.ones(18, dtype=torch.bool)})
    assert "lengths float32 [1, 4]" in refusal({"lengths": LENGTHS[:1].float()})
    assert "lengths int32 [4]" in refusal({"lengths": LENGTHS[0].int()})
    assert "fewer than 1 token" in refusal({"lengths": torch.tensor([[-2, 12, 4, 4]], dtype=torch.int32)})
    assert "17 codes do not fit" in refusal({"codes": torch.zeros(17, dtype=torch.int32)})
    assert "codes must be in 0 .. 63" in refusal({"codes": torch.full((18,), 64, dtype=torch.int32)})
    assert "size = True is not int" in refusal({}, {**facts, "size": True})
    assert "size = 32.5 is not int" in refusal({}, {**facts, "size": 32.5})
    assert "lacks 'size'" in refusal({}, {"num_frames": 16, "codebook_size": 64})
    assert "RecursionError" in refusal({}, "[" * 100_000)


def test_tokens_of_another_tokenizer_are_refused(saved: Path, tmp_path: Path) -> None:
    tokens = load_tokenizer(saved).encode(VIDEO, LENGTHS)
    (tmp_path / "other").mkdir()
    other = load_tokenizer(save_tokenizer(build_tokenizer("VQ_debug"), tmp_path / "other"))
    with pytest.raises(UserError, match=f"made by tokenizer {tokens.tokenizer_sha256[:12]} cannot be read by"):
        other.decode(tokens)
    with pytest.raises(UserError, match="do not fit this tokenizer's"):
        build_tokenizer("VQ_debug", codebook_size=32).decode(tokens)
    with pytest.raises(UserError, match="is none of the levels"):
        build_tokenizer("VQ_debug", levels=[4, 8]).decode(tokens)


def test_a_config_that_does_not_belong_to_the_weights_is_named_with_its_differences(
    saved: Path, tmp_path: Path
) -> None:
    (tmp_path / "same.yaml").write_text(yaml.safe_dump({"model": to_dict(PRESETS["VQ_debug"])}))
    assert load_tokenizer(saved, config_path=tmp_path / "same.yaml").sha256
    (tmp_path / "other.yaml").write_text("model: {size: 32, levels: [2, 4, 8], codebook_size: 64}\n")
    with pytest.raises(UserError) as refusal:
        load_tokenizer(saved, config_path=tmp_path / "other.yaml")
    message = str(refusal.value)
    assert "other.yaml" in message and saved.name in message and "\n" not in message
    assert "encoder.layers: 6 / 2" in message and "codebook_size" not in message


def test_other_weights_and_names_are_refused(tmp_path: Path) -> None:
    save_model(tmp_path / "r.safetensors", {"w": torch.zeros(1)}, {"model": {"stem": "raw"}}, {"kind": "router"})
    with pytest.raises(UserError, match="these weights are 'router', not a tokenizer"):
        load_tokenizer(tmp_path / "r.safetensors")
    with pytest.raises(UserError, match="no tokenizer preset 'VQ_XL'; there are VQ_SB"):
        build_tokenizer("VQ_XL")
