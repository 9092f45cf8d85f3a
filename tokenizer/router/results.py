"""The results folder of the main job, clip after clip, so that a stopped run loses nothing; the summary of its clips.

    settings.json       what affects a clip's result; a run with other settings is refused
    clips.jsonl         one line per finished clip, appended once its folder is complete
    clips/<name>/       original.mp4  reconstruction.mp4  side_by_side.mp4  film.jpg  tokens.safetensors
    scores.safetensors  --budget average:N: the router's scores of all clips, and the price they lead to
    metrics.json  skipped.json  report.html      written at the end, also after Ctrl-C

A folder under clips/ is written aside and renamed, so it is complete or absent. One job at a time writes here.

Letters: S clips of the whole set, V codebook size, A assignments (rows).
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from scipy.stats import spearmanr
from torch import Tensor

from tokenizer.common.checkpoint import atomic_write
from tokenizer.common.config import differences
from tokenizer.common.errors import UserError
from tokenizer.common.schema import check_fields, child, parse_json, read_json, remove_child
from tokenizer.common.work_units import only_job_in
from tokenizer.data.clip_stream import Skipped, SourceClip
from tokenizer.data.video_io import DecodedClip, write_video
from tokenizer.model import VideoTokenizer
from tokenizer.presets import PRESETS
from tokenizer.tokens import VideoTokens
from tokenizer.viz.frames import error_map, filmstrip, side_by_side

_TOKENS = "tokens.safetensors"
_VIDEOS = ("original.mp4", "reconstruction.mp4", "side_by_side.mp4")
_FILES = (*_VIDEOS, "film.jpg", _TOKENS)
_WRITING = ".writing-"
_WAY_OUT = "give another --save_dir"
_START_AGAIN = "start again with --overwrite"
_SCORES = "evatok.router_scores"

_RECORD = {  # a line of clips.jsonl
    "file": str,
    "start": int,
    "name": str,
    "assignment": list[int],
    "tokens": int,
    "psnr": float,
    "ssim": float,
    "lpips": float | None,
    "motion": float,
    "block_motion": list[float],
    "num_padded": int,
    "fps": float,
    "fingerprint": str,
    "digest": str,  # of all other fields
}


@dataclass(frozen=True)
class Reconstruction:
    """One reconstructed clip: its frames (uint8), its tokens, and the figures of its record."""

    frames_THWC: np.ndarray
    tokens: VideoTokens
    figures: dict[str, Any]
    uniform_THWC: np.ndarray | None = None  # the clip at about as many tokens, the same in every block


class ResultsFolder:
    """The finished clips, and the one place that writes files of the job."""

    def __init__(self, folder: str | Path, videos: bool = True) -> None:
        """Look at a folder, new or of an earlier run; nothing is written before `start`. videos: write mp4 files."""
        self.folder = Path(folder)
        self.clips = self.folder / "clips"
        self.records: dict[str, dict[str, Any]] = {}
        self._files = _FILES if videos else tuple(file for file in _FILES if file not in _VIDEOS)
        self._settings = self.folder / "settings.json"
        self._journal = self.folder / "clips.jsonl"
        self._scores = self.folder / "scores.safetensors"
        if self.folder.exists() and not self.folder.is_dir():
            raise UserError(f"{self.folder}: is a file; --save_dir must be a folder")

    def holds(self, path: Path) -> bool:
        """Whether `path` is a video that this job wrote here."""
        folder = Path(os.path.realpath(path)).parent  # Path.resolve fails on a link to itself
        return folder.parent == Path(os.path.realpath(self.clips)) and (folder / _TOKENS).is_file()

    @contextmanager
    def start(self, settings: Mapping[str, Any], overwrite: bool) -> Iterator[None]:
        """Make the folder ready and keep other jobs out of it. `overwrite` removes what an earlier run wrote, no more.

        Raises UserError if earlier results have other settings.
        """
        try:
            self.clips.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{self.clips}: cannot be made ({error.strerror}); {_WAY_OUT}") from error
        with only_job_in(self.folder, _WAY_OUT):
            for leftover in self.clips.glob(f"{_WRITING}*"):  # of a run that was killed
                shutil.rmtree(leftover)
            if overwrite:
                self._clear()
            self.records = {record["name"]: record for record in self._read_journal()}
            if not self.records:
                self._settings.unlink(missing_ok=True)
            self._agree(settings)
            yield

    def is_done(self, name: str, fingerprint: str) -> bool:
        """Whether this clip of this very file is finished and its files are present."""
        record = self.records.get(name)
        if record is None or record["fingerprint"] != fingerprint:
            return False
        return all((self.clips / name / file).is_file() for file in self._files)

    def write(self, clip: SourceClip, decoded: DecodedClip, result: Reconstruction, longest: int) -> dict[str, Any]:
        """Write one clip's folder and return its record for `add`. Several threads may write at once.

        longest: the largest level, a full bar in the pictures. Raises OSError on a full disk.
        """
        target = child(self.clips, clip.name, str(self.folder), _START_AGAIN)
        aside = self.clips / f"{_WRITING}{clip.name}-{os.getpid()}"
        aside.mkdir()
        real, ours, lengths = decoded.frames_THWC, result.frames_THWC, result.figures["assignment"]
        if set(_VIDEOS) <= set(self._files):
            write_video(aside / "original.mp4", real, decoded.fps)
            write_video(aside / "reconstruction.mp4", ours, decoded.fps)
            both = side_by_side(real, ours, lengths, longest)
            write_video(aside / "side_by_side.mp4", both, decoded.fps, preset="veryfast")
        uniform = [] if result.uniform_THWC is None else [result.uniform_THWC]
        filmstrip(real, ours, *uniform, error_map(real, ours)).save(aside / "film.jpg", quality=90, subsampling=0)
        result.tokens.save(aside / _TOKENS)
        remove_child(self.clips, clip.name)  # of a file that has since been replaced
        os.replace(aside, target)
        record = {"file": clip.source.file, "start": clip.start, "name": clip.name, **result.figures}
        record |= {"num_padded": decoded.num_padded, "fps": decoded.fps, "fingerprint": clip.fingerprint}
        return record | ({"notes": list(decoded.notes)} if decoded.notes else {})  # unsupported features of the file

    def add(self, record: Mapping[str, Any]) -> None:
        """Enter a clip that `write` has finished into the journal."""
        with open(self._journal, "ab") as journal:
            journal.write(json.dumps({**record, "digest": _digest(record)}, allow_nan=False).encode() + b"\n")
        self.records[record["name"]] = dict(record)

    def token_files(self, names: Iterable[str]) -> Iterable[Path]:
        return (child(self.clips, name, str(self._journal), _START_AGAIN) / _TOKENS for name in names)

    def write_skipped(self, skipped: Iterable[Skipped]) -> None:
        """skipped.json: the files that could not be read and why; an empty list if all could."""
        rows = [{"file": each.source.file, "reason": each.reason} for each in skipped]
        atomic_write(self.folder / "skipped.json", _json(rows))

    def write_metrics(self, metrics: Mapping[str, Any]) -> None:
        """metrics.json: the records of this run's clips and their summary."""
        atomic_write(self.folder / "metrics.json", _json(metrics))

    def save_scores(self, made_from: str, price: float, names: Sequence[str], score_SA: Tensor) -> None:
        """Keep the router's scores of a whole set, and the price per token that `average:N` got from them."""
        facts = {"made_from": made_from, "price": price, "names": list(names)}
        atomic_write(self._scores, save({"score_SA": score_SA}, metadata={_SCORES: json.dumps(facts)}))

    def load_scores(self, made_from: str) -> tuple[float, dict[str, Tensor]] | None:
        """(price, clip name -> score_A) of an earlier pass over the same videos; None if there was none.

        made_from: identifies videos, router and budget. UserError if finished clips got the price of other videos.
        """
        if not self._scores.is_file():
            return None
        try:
            with safe_open(str(self._scores), framework="pt") as file:
                facts = parse_json((file.metadata() or {}).get(_SCORES, ""), str(self._scores), _START_AGAIN)
                score_SA = file.get_tensor("score_SA")
        except SafetensorError as error:
            raise UserError(f"{self._scores}: is damaged ({error}); {_START_AGAIN}") from error
        fields = {"made_from": str, "price": float, "names": list[str]}
        check_fields(facts, fields, str(self._scores), _START_AGAIN)
        if score_SA.ndim < 2 or len(score_SA) != len(facts["names"]) or not score_SA.isfinite().all():
            raise UserError(
                f"{self._scores}: is damaged: scores do not fit its {len(facts['names'])} clips; {_START_AGAIN}"
            )
        if facts["made_from"] == made_from:
            return facts["price"], dict(zip(facts["names"], score_SA, strict=True))
        if self.records:
            raise UserError(
                f"{self.folder}: --budget average:N sets one price for all videos, and the videos have changed since; "
                f"{_WAY_OUT}, or --overwrite"
            )
        return None

    def _agree(self, settings: Mapping[str, Any]) -> None:
        """Remember the settings. UserError if earlier results here have others."""
        known = read_json(self._settings, {}, _START_AGAIN) if self._settings.is_file() else {}
        shared = known.keys() & settings.keys()
        if different := differences({key: known[key] for key in shared}, {key: settings[key] for key in shared}):
            raise UserError(
                f"{self.folder}: holds results made with other settings (there / now: {'; '.join(different)}); "
                f"{_WAY_OUT}, or --overwrite"
            )
        atomic_write(self._settings, _json({**known, **settings}))

    def _read_journal(self) -> list[dict[str, Any]]:
        """The finished clips; a last line that a kill cut short is dropped, from the file too."""
        if not self._journal.is_file():
            if self._journal.exists():  # appending to a pipe would block
                raise UserError(f"{self._journal}: not a regular file; {_START_AGAIN}")
            return []
        lines = self._journal.read_bytes().splitlines(keepends=True)
        if lines and not lines[-1].endswith(b"\n"):
            lines.pop()
            atomic_write(self._journal, b"".join(lines))
        return [_read_record(line, f"{self._journal}, line {i}") for i, line in enumerate(lines, start=1)]

    def _clear(self) -> None:
        """Remove the folders of clips and the files of an earlier run; foreign names and folders stay."""
        for path in self.clips.iterdir():
            if not path.is_symlink() and (path / _TOKENS).is_file():
                remove_child(self.clips, path.name)
        written = (self._settings, self._journal, self._scores)
        for file in (*written, *(self.folder / name for name in ("metrics.json", "skipped.json", "report.html"))):
            file.unlink(missing_ok=True)


def _read_record(line: bytes, origin: str) -> dict[str, Any]:
    """A line of the journal as `add` wrote it."""
    record = check_fields(parse_json(line, origin, _START_AGAIN), _RECORD, origin, _START_AGAIN)
    if record.pop("digest") != _digest(record):
        raise UserError(f"{origin}: damaged: changed after it was written; {_START_AGAIN}")
    child(Path("clips"), record["name"], origin, _START_AGAIN)
    return record


def _digest(record: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()[:16]


def _json(data: Any) -> bytes:
    return json.dumps(data, indent=1, allow_nan=False).encode()


# --- the summary of a set of finished clips -----------------------------------------------------------------------

MEASURES = ("tokens", "psnr", "ssim", "lpips", "motion")
UNIFORM_MEASURES = ("uniform_tokens", "uniform_psnr", "uniform_ssim", "uniform_lpips")  # with --compare-uniform
CURVE_POINTS = 129
PACKAGES = ("evatok", "torch", "av", "numpy")


def means(records: Sequence[Mapping[str, Any]], measures: Sequence[str] = MEASURES) -> dict[str, Any]:
    """Mean of every measure over the clips; None if a clip lacks it (lpips without weights)."""
    columns = {key: [record[key] for record in records] for key in measures}  # [S] each
    return {key: None if None in column else float(np.mean(column)) for key, column in columns.items()}


def floor_use(
    records: Sequence[Mapping[str, Any]], floor: Mapping[str, Any], lpips_backbone: str | None
) -> dict[str, Any]:
    """How quality:Q was kept: clips that no assignment keeps it for by prediction, and the measured ones that do.

    Measured: LPIPS at most Q; None unless it is the network's whose distance was predicted.
    """
    num_kept = None
    if lpips_backbone is not None and lpips_backbone == floor["perceptual_net"]:
        num_kept = sum(record["lpips"] <= floor["distance"] for record in records)
    return {"num_not_predicted": sum(not r["keeps_quality"] for r in records), "num_kept_measured": num_kept}


def assignment_use(records: Sequence[Mapping[str, Any]], num_possible: int) -> dict[str, Any]:
    """The number of distinct assignments, of `num_possible`; the commonest one and its share of the clips, 0 to 1."""
    ranked = Counter(tuple(record["assignment"]) for record in records).most_common()
    commonest, count = min(ranked, key=lambda item: (-item[1], sum(item[0]), item[0]))  # a tie goes to the cheaper
    return {
        "num_distinct": len(ranked),
        "num_possible": num_possible,
        "commonest": list(commonest),
        "commonest_share": count / len(records),
    }


def tokens_by_motion(records: Sequence[Mapping[str, Any]], num_groups: int = 3) -> list[dict[str, Any]]:
    """Mean motion and mean tokens of the stillest third of the clips, the middle third, and the liveliest third."""
    ranked = sorted(records, key=lambda record: record["motion"])
    groups = [ranked[i * len(ranked) // num_groups : (i + 1) * len(ranked) // num_groups] for i in range(num_groups)]
    return [
        {"num_clips": len(group)} | {key: float(np.mean([r[key] for r in group])) for key in ("motion", "tokens")}
        for group in groups
        if group
    ]


def padding(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Clips whose last frame is repeated, how many such frames there are, and the means of the other clips or None."""
    padded = [record["num_padded"] for record in records if record["num_padded"]]
    whole = [record for record in records if not record["num_padded"]]
    return {
        "num_clips": len(padded),
        "num_frames": sum(padded),
        "mean_without": means(whole) if whole else None,
    }


def rank_correlation(x_S: Sequence[float], y_S: Sequence[float]) -> float | None:
    """Spearman's coefficient, -1 to 1, equal values sharing their mean rank. None if all values of a side are equal."""
    if len(set(x_S)) < 2 or len(set(y_S)) < 2:
        return None
    return float(spearmanr(x_S, y_S).statistic)  # ties get mean ranks


def codebook_use(token_files: Iterable[Path], codebook_size: int) -> dict[str, Any]:
    """How evenly the codes are used, read from saved tokens one file at a time.

    `share_used` of the codebook, `perplexity` (1 .. V; V when all codes are equally frequent), `num_drawn` codes in
    all, and `curve`: frequencies from the commonest code down, at evenly spaced ranks, relative to an even use.
    """
    count_V = np.zeros(codebook_size, np.int64)
    for path in token_files:
        count_V += np.bincount(VideoTokens.load(path).code_L.numpy(), minlength=codebook_size)
    share_V = np.sort(count_V / max(1, count_V.sum()))[::-1]  # commonest first
    used = share_V[share_V > 0]
    at = np.linspace(0, codebook_size - 1, min(CURVE_POINTS, codebook_size)).round().astype(int)
    return {
        "size": codebook_size,
        "num_drawn": int(count_V.sum()),
        "share_used": len(used) / codebook_size,
        "perplexity": float(np.exp(-(used * np.log(used)).sum())),  # exp of the entropy in nats
        "curve": (share_V[at] * codebook_size).tolist(),
    }


def tokenizer_facts(tokenizer: VideoTokenizer) -> dict[str, Any]:
    """The tokenizer's shape and sha256. `paper_size`: whether it has the shape of the paper's S-B."""
    config, paper = tokenizer.config, PRESETS["VQ_SB"]
    return {
        "sha256": tokenizer.sha256,
        "num_parameters": sum(parameter.numel() for parameter in tokenizer.parameters()),
        "num_frames": config.num_frames,
        "size": config.size,
        "num_blocks": config.num_blocks,
        "levels": list(config.levels),
        "codebook_size": config.codebook_size,
        "paper_size": replace(config, codebook_size=paper.codebook_size, init=paper.init) == paper,
    }


def versions() -> dict[str, str]:
    """Python and the packages that can change a figure."""
    return {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"  # the repository itself, run in place
