"""Models by name: a file, a folder, or a repository on the Hugging Face hub; `from_pretrained` and the way back.

A repository, or a folder of `save_pretrained`, holds model.safetensors with the config inside, SHA256SUMS, which is
checked, and README.md, the model card. huggingface_hub's own ModelHubMixin is not inherited: it takes a second to
import, and asks the network for a config.json that our files do not need.
"""

from __future__ import annotations

import re
import sys
import tempfile
from collections.abc import Iterable, Mapping
from html import escape
from pathlib import Path
from typing import Any, ClassVar, Self, cast

import torch
from torch import nn

from tokenizer.common.checkpoint import (
    atomic_write,
    file_sha256,
    load_strict,
    read_model,
    save_model,
    without_init,
)
from tokenizer.common.config import flat, from_dict, to_dict
from tokenizer.common.errors import UserError, one_line
from tokenizer.common.schema import read_json

_PAPER = "https://arxiv.org/abs/2603.12267"


class HubModel:
    """Base of the models that are shared: `from_pretrained`, `save_pretrained`, `push_to_hub`.

    A class gives `kind`, its config's dataclass, and `config_key`, which only its own configs have.
    """

    kind: ClassVar[str]
    config_class: ClassVar[type]
    config_key: ClassVar[str]

    sha256: str = ""  # of the weights file; empty for a model that was not loaded from one
    file_config: Mapping[str, Any] = {}  # all of the file's config; its `model` section built the module
    card: Mapping[str, str] = {}
    file_path: Path | None = None  # the weights file

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        *,
        revision: str | None = None,
        device: str | torch.device = "cpu",
        local_files_only: bool = False,
    ) -> Self:
        """A trained model in eval mode, strictly loaded.

        name: a .safetensors file, a folder of `save_pretrained`, a run folder, or "owner/name" on the hub.
        revision: branch, tag or commit of the repository; "owner/name@revision" does the same. local_files_only: take
        only files downloaded before. Raises UserError for weights that are not there, damaged, or of another kind.
        """
        path = local_copy(name, revision, local_files_only)
        file = read_model(path)
        if cls.config_key not in file.config.get("model", {}):
            raise UserError(f"{name}: these weights are {file.card.get('kind', 'something')!r}, not a {cls.kind}")
        config: Any = from_dict(cls.config_class, file.config["model"], f"{name} (config inside)")
        module = without_init(lambda: cast("nn.Module", cls.build(config)))
        load_strict(module, file.tensors, str(name))
        model = cast("Self", module.eval().to(device))
        model.sha256, model.file_config, model.card = file.sha256, file.config, file.card
        model.file_path = path / "final" / "model.safetensors" if path.is_dir() else path
        return model

    @classmethod
    def build(cls, config: Any) -> HubModel:
        """The untrained model of a config; a class with several kinds chooses here."""
        return cls(config)  # type: ignore[call-arg]

    def save_pretrained(self, folder: str | Path, *, figures: Mapping[str, Any] | str | Path | None = None) -> str:
        """Write model.safetensors, SHA256SUMS and README.md into `folder`; returns the sha256 of the weights.

        A model that was loaded and not changed gives the bytes of its file, so tokens that it made stay its own.
        figures: numbers for the card, nested, or the JSON file that holds them.
        """
        folder = Path(folder)
        path = folder / "model.safetensors"
        if self._is_unchanged():
            folder.mkdir(parents=True, exist_ok=True)
            atomic_write(path, cast("Path", self.file_path).read_bytes())
        else:
            config = {**self.file_config, "model": to_dict(self.config)}  # type: ignore[attr-defined]
            save_model(path, cast("nn.Module", self).state_dict(), config, self.card or {"kind": self.kind})
        sha256 = file_sha256(path)
        atomic_write(folder / "SHA256SUMS", f"{sha256}  {path.name}\n".encode())
        if isinstance(figures, str | Path):
            numbers: Mapping[str, Any] = read_json(Path(figures), {}, "give a JSON file of numbers")
        else:
            numbers = figures or {}
        atomic_write(folder / "README.md", self._card(sha256, numbers).encode())
        return sha256

    def push_to_hub(
        self,
        repo_id: str,
        *,
        figures: Mapping[str, Any] | str | Path | None = None,
        private: bool | None = None,
        revision: str | None = None,
        token: str | None = None,
        message: str = "Weights and card",
    ) -> str:
        """Upload what `save_pretrained` writes to "owner/name", created if absent; returns the commit's address."""
        from huggingface_hub import HfApi

        api = HfApi(token=token)
        try:
            repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
            with tempfile.TemporaryDirectory() as folder:
                self.save_pretrained(folder, figures=figures)
                more: Any = {"commit_message": message, "revision": revision}
                return str(api.upload_folder(repo_id=repo_id, folder_path=folder, **more))
        except UserError:
            raise
        except Exception as error:
            raise UserError(f"{repo_id}: cannot be pushed to the hub ({one_line(error)})") from error

    def _is_unchanged(self) -> bool:
        """Whether the file that the model was loaded from still holds these very weights and this config."""
        if self.file_path is None or not self.file_path.is_file() or file_sha256(self.file_path) != self.sha256:
            return False
        file, own = read_model(self.file_path), cast("nn.Module", self).state_dict()
        config: Any = from_dict(self.config_class, file.config["model"], str(self.file_path))
        same = all(torch.equal(own[name].cpu(), tensor.to(own[name].dtype)) for name, tensor in file.tensors.items())
        return same and config == self.config  # type: ignore[attr-defined]

    def _card(self, sha256: str, figures: Mapping[str, Any]) -> str:
        """Markdown: what the hub reads at the top, how to load, the config, the figures."""
        name = type(self).__name__
        module = type(self).__module__
        rows = {"sha256": sha256, "parameters": sum(p.numel() for p in cast("nn.Module", self).parameters())}
        rows |= {key: value for key, value in self.card.items() if key != "kind"}
        rows |= _listed(to_dict(self.config))  # type: ignore[attr-defined]
        lines = [
            "---", "library_name: evatok", "license: apache-2.0", f"tags: [video, {self.kind}]", "---", "",
            f"# {self.kind}", "", f"Adaptive-length video tokenization, [EVATok]({_PAPER}), reimplemented.", "",
            "```python", f"from {module} import {name}", "", f'model = {name}.from_pretrained("owner/name")', "```", "",
            *_table(rows.items()),
        ]  # fmt: skip
        if figures:
            numbers = ((key, f"{x:.4g}" if isinstance(x, float) else x) for key, x in _listed(figures).items())
            lines += ["", "## Figures", "", *_table(numbers)]
        return "\n".join(lines) + "\n"


def local_copy(name: str | Path, revision: str | None = None, local_files_only: bool = False) -> Path:
    """Where the weights of `name` are on this machine; those of "owner/name" on the hub are fetched first.

    A path that exists is taken before the hub is asked. Without a revision the newest commit is taken, and named in a
    note. Raises UserError if the hub cannot be reached or has no such repository.
    """
    path = Path(name)
    if path.exists():
        saved = path / "model.safetensors"
        return saved if saved.is_file() else path
    found = re.fullmatch(r"([A-Za-z0-9][\w.-]*/[\w.-]+?)(?:@([\w./-]+))?", str(name))
    if not found or path.suffix in (".safetensors", ".pt", ".pth", ".bin", ".ckpt"):
        return path
    repo_id, revision = found[1], revision or found[2]
    from huggingface_hub import snapshot_download

    try:
        folder = Path(
            snapshot_download(
                repo_id,
                revision=revision,
                allow_patterns=["model.safetensors", "SHA256SUMS"],
                local_files_only=local_files_only,
            )
        )
    except Exception as error:  # no network, no such repository, offline by environment: many types, one meaning
        raise UserError(
            f"{name}: no such file or folder here, and the hub gives none ({one_line(error)}); give "
            "FILE.safetensors, a folder of save_pretrained with model.safetensors inside, or a run folder"
        ) from error
    if not (folder / "model.safetensors").is_file():
        raise UserError(f"{name}: this repository has no model.safetensors; push_to_hub writes one")
    if revision is None:
        print(f"note: {repo_id} is commit {folder.name}; pin it: {repo_id}@{folder.name}", file=sys.stderr)
    return folder / "model.safetensors"


def _table(rows: Iterable[tuple[str, Any]]) -> list[str]:
    """Markdown in which no text of a card ends its cell, becomes HTML or a link."""

    def cell(value: Any) -> str:
        return re.sub(r"[\\|]|(?<=\])\(", r"\\\g<0>", " ".join(escape(str(value), quote=False).split()))

    cells = (" | ".join(map(cell, row)) for row in rows)
    return ["| | |", "|---|---|", *(f"| {cell} |" for cell in cells)]


def _listed(data: Mapping[str, Any]) -> dict[str, Any]:
    """Values by dotted key; lists of numbers stay together, other lists are left out."""
    return {
        k: v for k, v in flat(data).items() if not isinstance(v, list) or all(isinstance(x, int | float) for x in v)
    }


def parameters_by_part(model: nn.Module) -> dict[str, int]:
    """Number of parameters of each direct child (and of the position tables together)."""
    parts: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        part = "positions" if "." not in name else name.split(".")[0]
        parts[part] = parts.get(part, 0) + parameter.numel()
    return parts
