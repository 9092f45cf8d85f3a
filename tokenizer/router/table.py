"""The quality table of stage 2: how well the proxy reconstructs each clip under each assignment (paper.md section 1).

One table serves every trade-off, because the weights of quality and length are applied afterwards (reward.py).
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from tokenizer.assignment import AssignmentSpace
from tokenizer.common.checkpoint import atomic_write
from tokenizer.common.errors import UserError
from tokenizer.data.clips import RENDERED
from tokenizer.data.synthetic import SCENES

_KIND = "evatok.quality_table"


@dataclass(frozen=True, eq=False)
class QualityTable:
    """float32 [B, A] each: perceptual distance (lower is better), PSNR in dB and MSE of pixels in [0, 1].

    B clips, named; A rows of the assignment space in its own order. `meta` says what made it: sha256 of the
    tokenizer, name of the perceptual network.
    """

    lpips_BA: Tensor
    psnr_BA: Tensor
    mse_BA: Tensor
    names: list[str]
    levels: tuple[int, ...]
    num_blocks: int
    meta: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        want = (len(self.names), self.space.num_rows)
        for name in ("lpips_BA", "psnr_BA", "mse_BA"):
            if tuple(getattr(self, name).shape) != want:
                raise UserError(f"quality table: {name} is {list(getattr(self, name).shape)}, not {list(want)}")

    def __len__(self) -> int:
        return len(self.names)

    @property
    def space(self) -> AssignmentSpace:
        return AssignmentSpace(tuple(self.levels), self.num_blocks)

    def save(self, path: str | Path) -> None:
        """One .safetensors file, written aside and renamed; equal tables give equal bytes."""
        facts = {"levels": list(self.levels), "num_blocks": self.num_blocks, "names": self.names, "meta": self.meta}
        facts["scenes"] = SCENES
        tensors = {"lpips": self.lpips_BA, "psnr": self.psnr_BA, "mse": self.mse_BA}
        # one metadata key: safetensors writes several in random order, and equal tables would differ in their bytes
        header = {_KIND: json.dumps(facts, sort_keys=True)}
        atomic_write(Path(path), save({k: v.contiguous() for k, v in tensors.items()}, metadata=header))

    @staticmethod
    def load(path: str | Path) -> QualityTable:
        """Read what `save` wrote.

        Raises UserError for a missing, damaged or foreign file, and for one of rendered scenes that look otherwise now.
        """
        if not Path(path).is_file():
            raise UserError(f"{path}: no such quality table; scripts/train/2_curate_router_data.sh makes it")
        try:
            with safe_open(str(path), framework="pt") as file:
                header = file.metadata() or {}
                if _KIND not in header:
                    raise UserError(f"{path}: not a quality table; it holds {', '.join(header) or 'bare tensors'}")
                lpips, psnr, mse = (file.get_tensor(name) for name in ("lpips", "psnr", "mse"))
        except SafetensorError as error:
            raise UserError(f"{path}: damaged quality table: {error}") from error
        facts = json.loads(header[_KIND])
        facts["levels"] = tuple(facts["levels"])
        scenes = facts.pop("scenes", "unknown")
        if scenes != SCENES and any(name.startswith(RENDERED) for name in facts["names"]):
            raise UserError(
                f"{path} rates rendered scenes of version {scenes}, and this code renders version {SCENES} under the "
                "same names: make the table again (scripts/train/2_curate_router_data.sh)"
            )
        return QualityTable(lpips, psnr, mse, **facts)
