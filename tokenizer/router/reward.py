"""The quality table of stage 2, the reward of an assignment, and the labels that a router learns from.

    R(x, a) = w_q * Q(x, a) - w_l * L(a),      w_l = 2 - w_q
    Q = (mean LPIPS - LPIPS(x, a)) / std LPIPS,      L = (tokens(a) - mean tokens) / std tokens

This is arXiv 2603.12267, eq. 6, with the sign that rewards good quality. The table holds how well the proxy
reconstructs each clip under each assignment; rewards and labels are made from it when they are needed, so one table
serves every w_q.

Letters: B clips, A assignments (rows).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from tokenizer.assignment import AssignmentSpace
from tokenizer.common.checkpoint import atomic_write
from tokenizer.common.config import from_dict
from tokenizer.common.errors import UserError
from tokenizer.common.schema import check_fields, parse_json
from tokenizer.data.clips import RENDERED
from tokenizer.data.sources import SCENES

TOTAL_WEIGHT = 2.0  # w_q + w_l
_FIELDS = {"names": list[str], "levels": list[int], "num_blocks": int}


@dataclass(frozen=True)
class RewardStats:
    """Means and (population) standard deviations over random clips and uniformly random assignments."""

    lpips_mean: float
    lpips_std: float
    tokens_mean: float
    tokens_std: float


@dataclass(frozen=True)
class TableStats(RewardStats):
    """What a router with a quality head keeps of its training table, to turn qualities back into distances."""

    lpips_min: float  # the best and the worst of all measured pairs
    lpips_max: float
    perceptual_net: str  # that measured the distances


def table_stats(table: QualityTable) -> TableStats:
    """`stats_of` with the range of the distances and the name of the network."""
    lpips = table.lpips_BA[table.lpips_BA.isfinite()].double()
    reached = {"lpips_min": lpips.min().item(), "lpips_max": lpips.max().item()}
    return TableStats(**asdict(stats_of(table)), **reached, perceptual_net=str(table.meta.get("perceptual_net", "")))


def stats_of(table: QualityTable) -> RewardStats:
    """The statistics of a table over all measured pairs of clip and assignment. UserError if LPIPS has no spread.

    A table of a beam holds good assignments only; it carries the statistics that its beam was steered by.
    """
    if table.row_BR is not None:
        return from_dict(RewardStats, table.meta.get("reward_stats", {}), "a table of a beam (reward_stats)")
    return stats_of_sample(table.lpips_BA[table.lpips_BA.isfinite()], table.space)  # NaN: not measured


def stats_of_sample(lpips: Tensor, space: AssignmentSpace) -> RewardStats:
    """The statistics from distances of random clips under rows drawn uniformly, in any shape; the tokens' are exact."""
    lpips = lpips.double()
    stats = RewardStats(lpips.mean().item(), lpips.std(correction=0).item(), space.tokens_mean, space.tokens_std)
    if not (stats.lpips_std > 0 and stats.tokens_std > 0):
        raise UserError(
            f"{lpips.numel()} measured pairs of clip and assignment have an LPIPS deviation of {stats.lpips_std:g} and "
            f"a token deviation of {stats.tokens_std:g}; a reward needs both above 0"
        )
    return stats


def reward(lpips_BA: Tensor, tokens_A: Tensor, quality_weight: float, stats: RewardStats) -> Tensor:
    """reward_BA, float64. A lower LPIPS never lowers it, a longer assignment never raises it.

    quality_weight: w_q within [0, 2]; UserError otherwise.
    """
    return _weigh(quality(lpips_BA, stats), (tokens_A.double() - stats.tokens_mean) / stats.tokens_std, quality_weight)


def quality(lpips_BA: Tensor, stats: RewardStats) -> Tensor:
    """The first half of the reward: LPIPS in standard deviations below its mean, float64; NaN stays NaN."""
    return (stats.lpips_mean - lpips_BA.double()) / stats.lpips_std


def distance(quality_BA: Tensor, stats: RewardStats) -> Tensor:
    """The distance of a quality, float64: the inverse of `quality`."""
    return stats.lpips_mean - quality_BA.double() * stats.lpips_std


def reward_of_quality(quality_BA: Tensor, space: AssignmentSpace, quality_weight: float) -> Tensor:
    """reward_BA, float64, of a predicted quality, for routers trained with labels=quality."""
    tokens_A = space.tokens_A.double().to(quality_BA.device)
    return _weigh(quality_BA.double(), (tokens_A - space.tokens_mean) / space.tokens_std, quality_weight)


def _weigh(quality_BA: Tensor, length_A: Tensor, quality_weight: float) -> Tensor:
    if not 0.0 <= quality_weight <= TOTAL_WEIGHT:
        raise UserError(f"quality_weight is {quality_weight}; it must lie within [0, {TOTAL_WEIGHT:g}]")
    return quality_weight * quality_BA - (TOTAL_WEIGHT - quality_weight) * length_A  # [B, A]; w_l = 2 - w_q


def reward_percentile(reward_BA: Tensor, chosen_row_B: Tensor) -> float:
    """Position of the chosen rows between each clip's worst row (0) and its best (1), of the means over clips.

    (E R(chosen) - E R(worst)) / (E R(best) - E R(worst)), arXiv 2603.12267, table 8; 1 if best and worst are equal.
    """
    chosen = reward_BA.gather(1, chosen_row_B[:, None]).mean()  # [B, A] -> [B, 1] -> scalar
    # A ratio of means, not a mean of ratios: a clip whose rows are all alike must not count as much as the others.
    worst, best = reward_BA.amin(dim=1).mean(), reward_BA.amax(dim=1).mean()
    if best == worst:
        return 1.0
    return ((chosen - worst) / (best - worst)).item()


def best_uniform(reward_BA: Tensor, space: AssignmentSpace) -> tuple[int, float]:
    """(level, percentile) of the level with the highest reward percentile if every block of every clip gets it."""
    num_clips = len(reward_BA)
    percentiles = {
        level: reward_percentile(reward_BA, torch.full((num_clips,), space.uniform_row(level), device=reward_BA.device))
        for level in space.levels
    }
    level = max(percentiles, key=percentiles.__getitem__)
    return level, percentiles[level]


_KIND = "evatok.quality_table"


@dataclass(frozen=True, eq=False)
class QualityTable:
    """float32 [B, A] each: perceptual distance (lower is better), PSNR in dB and MSE of pixels in [0, 1].

    B clips, named; A rows of the assignment space in its own order, or in a table of a beam the R rows of `row_BR`.
    `meta`: its origin, such as the sha256 of the tokenizer and the name of the perceptual network.
    """

    lpips_BA: Tensor
    psnr_BA: Tensor
    mse_BA: Tensor
    names: list[str]
    levels: tuple[int, ...]
    num_blocks: int
    meta: dict[str, Any] = field(default_factory=dict)
    files: list[str] = field(
        default_factory=list
    )  # fingerprint of each clip's file, "" for clips without a file; may be empty
    row_BR: Tensor | None = None  # int64: the assignments that a beam measured, for each clip its own; None: all

    def __post_init__(self) -> None:
        want = (len(self.names), self.space.num_rows if self.row_BR is None else self.row_BR.shape[1])
        if self.files and len(self.files) != len(self.names):
            raise UserError(f"quality table: {len(self.files)} fingerprints for {len(self.names)} clips")
        for name in ("lpips_BA", "psnr_BA", "mse_BA"):
            if tuple(getattr(self, name).shape) != want:
                raise UserError(f"quality table: {name} is {list(getattr(self, name).shape)}, not {list(want)}")

    def __len__(self) -> int:
        return len(self.names)

    @property
    def space(self) -> AssignmentSpace:
        return AssignmentSpace(tuple(self.levels), self.num_blocks)

    @property
    def is_whole(self) -> bool:
        """Whether every assignment of every clip was measured; see `children` of stage 2."""
        return self.row_BR is None and not bool(self.lpips_BA.isnan().any())

    def rows(self) -> Tensor:
        """int64 [B, A or R]: the assignment of each measurement."""
        if self.row_BR is not None:
            return self.row_BR
        return torch.arange(self.space.num_rows).expand(len(self), -1)

    def save(self, path: str | Path) -> None:
        """Write one .safetensors file, complete or not at all; equal tables give equal bytes."""
        facts = {"levels": list(self.levels), "num_blocks": self.num_blocks, "meta": self.meta}
        facts["names"] = list(self.names)
        if any(self.files):
            facts["files"] = self.files
        facts["scenes"] = SCENES
        tensors = {"lpips": self.lpips_BA, "psnr": self.psnr_BA, "mse": self.mse_BA}
        if self.row_BR is not None:
            tensors["row"] = self.row_BR
        tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
        facts["tensors_sha256"] = _digest(tensors)
        # one metadata key: safetensors writes several in random order, and equal tables would differ in their bytes
        header = {_KIND: json.dumps(facts, sort_keys=True)}
        atomic_write(Path(path), save(tensors, metadata=header))

    @staticmethod
    def load(path: str | Path, beam: bool = False) -> QualityTable:
        """Read what `save` wrote; a table of a beam only if `beam`.

        Raises UserError for a missing, damaged or foreign file, and for scenes that are now rendered differently.
        """
        if not Path(path).is_file():
            raise UserError(f"{path}: no such quality table; scripts/train/2_curate_router_data.sh makes it")
        try:
            with safe_open(str(path), framework="pt") as file:
                header = file.metadata() or {}
                if _KIND not in header:
                    raise UserError(f"{path}: not a quality table; it holds {', '.join(header) or 'bare tensors'}")
                wanted = ["lpips", "psnr", "mse", *({"row"} & {*file.keys()})]
                tensors = {name: file.get_tensor(name) for name in wanted}
        except SafetensorError as error:
            raise UserError(f"{path}: damaged quality table: {error}") from error
        again = "scripts/train/2_curate_router_data.sh makes it again"
        facts = check_fields(parse_json(header[_KIND], str(path), again), _FIELDS, str(path), again)
        if facts.pop("tensors_sha256", None) not in (None, _digest(tensors)):
            raise UserError(f"{path}: damaged: its tensors differ from their sha256; {again}")
        if strange := sorted(facts.keys() - {field.name for field in fields(QualityTable)} - {"scenes"}):
            raise UserError(f"{path}: damaged, or of another version: holds {strange[0]!r}; {again}")
        facts["levels"] = tuple(facts["levels"])
        scenes = facts.pop("scenes", "unknown")
        if scenes != SCENES and any(name.startswith(RENDERED) for name in facts["names"]):
            raise UserError(
                f"{path} rates rendered scenes of version {scenes}, and this code renders version {SCENES} under the "
                "same names: make the table again (scripts/train/2_curate_router_data.sh)"
            )
        if "row" in tensors and not beam:
            raise UserError(f"{path} holds what a beam measured (method=beam), not whole rows: stage 3 alone reads it")
        return QualityTable(tensors["lpips"], tensors["psnr"], tensors["mse"], **facts, row_BR=tensors.get("row"))


def _digest(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(tensors[name].numpy().tobytes())
    return digest.hexdigest()


def hard_labels(reward_BA: Tensor) -> Tensor:
    """row_B: the best row of each clip, the first of equals (the paper's classification target)."""
    return reward_BA.argmax(dim=1)


def threshold_labels(lpips_BA: Tensor, tokens_A: Tensor, threshold: float) -> Tensor:
    """row_B: the fewest tokens with an LPIPS of at most `threshold` (ties: lowest LPIPS), else the longest row.

    A baseline of arXiv 2603.12267.
    """
    fits_BA = lpips_BA <= threshold  # bool
    fewest_B1 = tokens_A.where(fits_BA, int(tokens_A.max()) + 1).amin(dim=1, keepdim=True)  # no row fits: too many
    best_B = lpips_BA.where(fits_BA & (tokens_A == fewest_B1), torch.inf).argmin(dim=1)
    return best_B.where(fits_BA.any(dim=1), int(tokens_A.argmax()))  # no row fits: the longest


def soft_labels(reward_BA: Tensor, temperature: float) -> Tensor:
    """prob_BA = softmax(reward / temperature): rows nearly as good as the best share its label.

    Cross-entropy is minimal if the router's logits are reward / temperature plus a constant per clip: every row
    of the table teaches, not only the best one. Not in the paper. UserError unless the temperature is above 0.
    """
    if not temperature > 0:
        raise UserError(f"temperature is {temperature}; it must be above 0")
    return (reward_BA / temperature).softmax(dim=1)
