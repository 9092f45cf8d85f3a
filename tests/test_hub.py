"""Models by name: a folder and back bit for bit, what goes to the hub and comes from it, its absence in one line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch

from autoregressive.model import GPT
from autoregressive.presets import PRESETS as GPTS
from autoregressive.presets import load_gpt
from tokenizer.common.checkpoint import save_model
from tokenizer.common.config import to_dict
from tokenizer.common.errors import UserError
from tokenizer.model import VideoTokenizer
from tokenizer.presets import build_tokenizer, load_tokenizer
from tokenizer.router.model import Router, RouterConfig
from tokenizer.router.predict import load_router

VIDEO = torch.rand(1, 3, 16, 32, 32, generator=torch.Generator().manual_seed(0))
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    model, path = build_tokenizer("VQ_debug"), tmp_path / "run.safetensors"
    config = {"model": to_dict(model.config), "run": {"steps": 7}}
    save_model(path, model.state_dict(), config, {"kind": "tokenizer", "step": "7"})
    return path


def test_a_card_is_text_in_its_model_card(trained: Path, tmp_path: Path) -> None:
    model = load_tokenizer(trained)
    model.card = {"kind": "tokenizer", "n": "<img src=x>\n## b \\| c ![d](https://e)"}
    model.save_pretrained(tmp_path / "shared")
    page = (tmp_path / "shared/README.md").read_text()
    assert r"| n | &lt;img src=x&gt; ## b \\\| c ![d]\(https://e) |" in page.splitlines()


def test_a_folder_gives_back_the_same_bytes(trained: Path, tmp_path: Path) -> None:
    model, folder = load_tokenizer(trained), tmp_path / "shared"
    sha256 = model.save_pretrained(folder, figures={"psnr": {"uniform 8": 20.123456}})
    assert (folder / "model.safetensors").read_bytes() == trained.read_bytes() and sha256 == model.sha256
    card = (folder / "README.md").read_text()
    assert "| psnr.uniform 8 | 20.12 |" in card and f"| sha256 | {sha256} |" in card and "| step | 7 |" in card
    assert "from tokenizer.model import VideoTokenizer" in card
    tokens = model.encode(VIDEO, budget="uniform:4")
    for again in (VideoTokenizer.from_pretrained(folder), load_tokenizer(folder), load_tokenizer(str(folder))):
        assert torch.equal(again.decode(tokens), model.decode(tokens)) and not again.training
    with open(folder / "model.safetensors", "r+b") as file:  # the card's sha256 is checked
        file.seek(-1, 2)
        file.write(b"\xff")
    with pytest.raises(UserError, match="damaged: sha256"):
        load_tokenizer(folder)


def test_changed_weights_are_written_anew(trained: Path, tmp_path: Path) -> None:
    model = load_tokenizer(trained)
    with torch.no_grad():
        model.to_pixels.bias += 1
    assert model.save_pretrained(tmp_path / "changed") != model.sha256
    again = load_tokenizer(tmp_path / "changed")
    assert torch.equal(again.to_pixels.bias, model.to_pixels.bias) and again.file_config["run"] == {"steps": 7}


def test_router_and_gpt_keep_what_their_files_have_beside_weights(tmp_path: Path) -> None:
    router = Router(RouterConfig(size=32, levels=[2, 4, 8], layers=1, width=32, heads=2))
    router.save_pretrained(tmp_path / "r")
    assert load_router(tmp_path / "r").config == router.config
    gpt, tokens = GPT(GPTS["GPT-debug"]), {"class_names": ["a", "b"], "tokenizer_sha256": "f00"}
    save_model(tmp_path / "g.safetensors", gpt.state_dict(), {"model": to_dict(gpt.config), "tokens": tokens}, {})
    GPT.from_pretrained(tmp_path / "g.safetensors").save_pretrained(tmp_path / "g")
    again = load_gpt(tmp_path / "g")
    assert (tmp_path / "g" / "model.safetensors").read_bytes() == (tmp_path / "g.safetensors").read_bytes()
    assert (again.class_names, again.tokenizer_sha256) == (("a", "b"), "f00")
    with pytest.raises(UserError, match="not a tokenizer"):
        VideoTokenizer.from_pretrained(tmp_path / "g")


def test_there_and_back_through_a_stand_in_of_the_hub(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cache, asked = tmp_path / "cache" / "snapshots" / COMMIT, []

    class Api:
        def __init__(self, token: str | None) -> None: ...

        def create_repo(self, repo_id: str, private: bool | None, exist_ok: bool) -> SimpleNamespace:
            return SimpleNamespace(repo_id=repo_id)

        def upload_folder(self, *, folder_path: str, **facts: object) -> str:
            shutil.copytree(folder_path, cache)
            return f"{facts['repo_id']} {facts['revision']}"

    def download(repo_id: str, **facts: object) -> str:
        asked.append((repo_id, facts["revision"], facts["local_files_only"]))
        return str(cache)

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    (tmp_path / "figures.json").write_text(json.dumps({"lpips": 0.1}))
    model = load_tokenizer(trained)
    assert model.push_to_hub("me/mini", figures=tmp_path / "figures.json", revision="v1") == "me/mini v1"
    assert sorted(path.name for path in cache.iterdir()) == ["README.md", "SHA256SUMS", "model.safetensors"]
    assert load_tokenizer("me/mini").sha256 == model.sha256
    assert f"note: me/mini is commit {COMMIT}; pin it: me/mini@{COMMIT}" in capsys.readouterr().err
    load_tokenizer("me/mini@v1")
    VideoTokenizer.from_pretrained("me/mini", revision=COMMIT, local_files_only=True)
    assert asked == [("me/mini", None, False), ("me/mini", "v1", False), ("me/mini", COMMIT, True)]
    assert capsys.readouterr().err == ""
    (cache / "model.safetensors").unlink()
    with pytest.raises(UserError, match="this repository has no model.safetensors"):
        load_tokenizer("me/mini@v1")


def test_without_network_the_message_tells_which_folder_works() -> None:
    with pytest.raises(UserError) as refusal:  # the tests are offline
        load_tokenizer("nobody/nothing")
    text = str(refusal.value)
    assert "nobody/nothing: no such file or folder here, and the hub gives none" in text and "\n" not in text
    assert "a folder of save_pretrained with model.safetensors inside" in text
    for name in ("absent.safetensors", "owner/absent.safetensors", "a/b/c"):  # no names of repositories
        with pytest.raises(UserError, match="no such model file or run folder"):
            load_tokenizer(name)
