"""The tokens of a set of clips: codes, lengths, and the sha256 of their tokenizer. Saved as safetensors."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from tokenizer.assignment import Packing, pack
from tokenizer.common.checkpoint import atomic_write
from tokenizer.common.clip_shape import plain_size
from tokenizer.common.errors import UserError
from tokenizer.common.schema import check_fields, parse_json

_KIND = "evatok.tokens"
_FACTS = {"num_frames": int, "size": int | list[int], "codebook_size": int, "tokenizer_sha256": str}
_WAY_OUT = "tokenize the video again"


@dataclass(frozen=True, eq=False)
class VideoTokens:
    """The tokens of B clips, packed clip by clip, block by block.

    code_L: int64 [L], 0 .. codebook_size - 1. length_BN: int64 [B, N], tokens of each temporal block; sum = L.
    tokenizer_sha256: of the weights that made them; empty for a tokenizer that was never saved.
    """

    code_L: Tensor
    length_BN: Tensor
    num_frames: int
    size: int | list[int]  # pixels: of a square, or [height, width]
    codebook_size: int
    tokenizer_sha256: str = ""

    def __post_init__(self) -> None:
        plain_size(self.size, "size")
        if int(self.length_BN.sum()) != len(self.code_L):
            raise UserError(f"{len(self.code_L)} codes do not fit lengths that add up to {int(self.length_BN.sum())}")
        if len(self.code_L) and not 0 <= int(self.code_L.min()) <= int(self.code_L.max()) < self.codebook_size:
            raise UserError(f"codes must be in 0 .. {self.codebook_size - 1}, the codebook's size minus one")

    def __len__(self) -> int:
        return len(self.length_BN)

    @property
    def packing(self) -> Packing:
        return pack(self.length_BN)

    def clip(self, index: int) -> VideoTokens:
        """The tokens of one clip, as a set of one."""
        code_L = self.code_L.split(self.length_BN.sum(dim=1).tolist())[index]
        return VideoTokens(
            code_L, self.length_BN[index][None], self.num_frames, self.size, self.codebook_size, self.tokenizer_sha256
        )

    def save(self, path: str | Path) -> None:
        """Write one .safetensors file (written aside, then renamed)."""
        # One metadata key: safetensors writes several in random order, and equal tokens shall give equal bytes.
        facts = {name: getattr(self, name) for name in _FACTS}
        tensors = {"codes": self.code_L.cpu().to(torch.int32), "lengths": self.length_BN.cpu().to(torch.int32)}
        meta = {_KIND: json.dumps(facts | {"sha256": digest(facts, map(_bytes_of, tensors.values()))})}
        atomic_write(Path(path), save(tensors, metadata=meta))

    @staticmethod
    def load(path: str | Path) -> VideoTokens:
        """Read what `save` wrote. Raises UserError in one line for a missing, damaged or foreign file."""
        if Path(path).exists() and not Path(path).is_file():
            raise UserError(f"{path}: is not a regular file")
        try:
            with safe_open(str(path), framework="pt") as file:
                meta = file.metadata() or {}
                if _KIND not in meta:
                    raise UserError(f"{path}: not a file of video tokens")
                codes, lengths = file.get_tensor("codes"), file.get_tensor("lengths")
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path}: cannot be read as video tokens: {error}") from error
        if (
            codes.dtype not in (torch.int16, torch.int32)
            or lengths.dtype != torch.int32
            or codes.ndim != 1
            or lengths.ndim != 2
        ):
            raise UserError(
                f"{path}: is damaged: codes are {_form(codes)}, lengths {_form(lengths)}, "
                "not int16 or int32 [L], int32 [B, N]"
            )
        if lengths.numel() == 0 or int(lengths.min()) < 1:
            raise UserError(f"{path}: is damaged: a block has fewer than 1 token")
        found = check_fields(parse_json(meta[_KIND], str(path), _WAY_OUT), _FACTS, str(path), _WAY_OUT)
        facts = {name: found[name] for name in _FACTS}
        if found.get("sha256", "") not in ("", digest(facts, map(_bytes_of, (codes, lengths)))):  # "": older files
            raise UserError(f"{path}: is damaged: its tokens differ from their sha256; {_WAY_OUT}")
        try:
            return VideoTokens(codes.long(), lengths.long(), **facts)
        except UserError as error:
            raise UserError(f"{path}: is damaged: {error}") from error


def digest(facts: Mapping[str, Any], parts: Iterable[bytes]) -> str:
    """sha256 of what a file says and holds."""
    found = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for part in parts:
        found.update(part)
    return found.hexdigest()


def _bytes_of(tensor: Tensor) -> bytes:
    return tensor.numpy().tobytes()


def _form(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
