"""The results folder of a sampling command and its report: filled clip by clip, by any number of processes.

    settings.json      what affects a clip; a run with other settings is refused
    samples/<name>/    sample.mp4  frames.npy (uint8 THWC, lossless, for scoring)  tokens.safetensors  record.json
                       and if frames were given: original.mp4  original.npy  side_by_side.mp4
    grids/<title>.mp4  .png      all clips of a class together
    samples.json       the records of all clips and their summary
    report.html        the first clips of every class as films, with the tokens of each block

A folder under samples/ is written aside and renamed, so it is complete or absent, and each belongs to one process.
Rerun the same command to resume.
"""

from __future__ import annotations

import io
import itertools
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
from einops import rearrange
from PIL import Image

from tokenizer.common.config import differences
from tokenizer.common.errors import UserError
from tokenizer.common.schema import check_fields, read_json
from tokenizer.data.video_io import write_video
from tokenizer.tokens import VideoTokens
from tokenizer.viz.frames import ShownClip, clip_video, contact_sheet, grid_video
from tokenizer.viz.page import film_sheet, render

MOST_FILMS = 60  # 60 films of 128x128 clips are about 8 MB


@dataclass(frozen=True)
class Card:
    """A clip on the page: the heading of its group, and the text below it."""

    heading: str
    text: str
    clip: ShownClip


def sample_page(summary: Mapping[str, Any], cards: Sequence[Card], longest: int) -> str:
    """report.html. `summary`: what samples.json holds. `cards`: at least one. `longest`: tokens of a full bar."""
    first = cards[0].clip
    films = {f"c{i}": _film(card.clip) for i, card in enumerate(cards)}
    shown = [
        {"key": f"c{i}", "heading": card.heading, "text": card.text, "lengths": card.clip.lengths}
        for i, card in enumerate(cards)
    ]
    return render(
        "samples.html",
        title=f"{summary['num_samples']} sampled clips",
        lede=_lede(summary, len(cards)),
        figures=[
            ("clips", summary["num_samples"], "sampled"),
            ("tokens a clip", f"{summary['mean_tokens']:.1f}", "mean, without length tokens"),
            ("broken", summary["num_broken"], "sequences that violate the grammar"),
        ],
        groups=[(heading, list(group)) for heading, group in itertools.groupby(shown, itemgetter("heading"))],
        captions=["sampled"] if first.real_THWC is None else ["original", "sampled"],
        longest=longest,
        films=film_sheet(films, len(first.frames_THWC), len(first.rows)),
        facts=_facts(summary),
    )


def _lede(summary: Mapping[str, Any], num_shown: int) -> str:
    given = "Given frames have a blue border. " if summary["settings"].get("given_frames") else ""
    num_good = summary["num_samples"] - summary["num_broken"]
    less = f"{num_shown} of {num_good} clips are shown. " if num_shown < num_good else ""
    return f"{given}{less}The bars show the tokens that the model gave each temporal block."


def _film(clip: ShownClip) -> bytes:
    """All frames in one JPEG: the original, if there is one, above the sampled clip."""
    picture = io.BytesIO()
    film = rearrange(np.stack(clip.rows), "R T H W C -> (R H) (T W) C")
    Image.fromarray(film).save(picture, format="JPEG", quality=90, subsampling=0)
    return picture.getvalue()


def _facts(summary: Mapping[str, Any]) -> dict[str, str]:
    facts = {"model": f"{summary['gpt_model']}, {summary['gpt']}", "tokenizer": summary["tokenizer"]}
    return facts | {key.replace("_", " "): str(value) for key, value in summary["settings"].items()}


_RECORD = "record.json"
_SKIPPED = {"file": str, "skipped": str}
_SAMPLED = {
    "assignment": list[int],
    "tokens": int,
    "tokens_with_length_tokens": int,
    "given_frames": int,
    "broken": str | None,
}
_AGAIN = "remove the folder it lies in and run the same command again"
_WRITING = ".writing-"


class SampleFolder:
    """The samples so far, and the only writer of files. `longest`: the largest level."""

    def __init__(self, folder: str | Path, longest: int) -> None:
        self.folder, self.longest = Path(folder), longest
        self.samples, self.grids = self.folder / "samples", self.folder / "grids"
        if self.folder.exists() and not self.folder.is_dir():
            raise UserError(f"{self.folder}: is a file; --sample-dir must be a folder")

    def start(self, settings: Mapping[str, Any], overwrite: bool = False) -> None:
        """Make the folder ready. Raises UserError if earlier samples in it were made with other settings."""
        try:
            self.samples.mkdir(parents=True, exist_ok=True)
            self.grids.mkdir(exist_ok=True)
        except OSError as error:
            raise UserError(f"{self.folder}: cannot be made ({error.strerror}); give another --sample-dir") from error
        file = self.folder / "settings.json"
        if overwrite:
            for name in ("samples", "grids"):
                shutil.rmtree(self.folder / name)
                (self.folder / name).mkdir()
            file.unlink(missing_ok=True)
        if file.is_file() and any(self.samples.iterdir()):
            known = read_json(file, {}, _AGAIN)
            if different := differences(known, dict(settings)):
                raise UserError(
                    f"{self.folder}: holds samples made with other settings (there / now: {'; '.join(different)}); "
                    "give another --sample-dir, or --overwrite"
                )
        _put(file, _json(settings))

    def record(self, name: str) -> dict[str, Any] | None:
        """The record of a finished sample; None if it is still to be made.

        Raises UserError for a record that is damaged or contradicts itself.
        """
        file = self.samples / name / _RECORD
        if not file.exists():
            return None
        record = read_json(file, {}, _AGAIN)
        check_fields(record, _SKIPPED if "skipped" in record else _SAMPLED, str(file), _AGAIN)
        if "skipped" not in record and record["tokens"] != sum(record["assignment"]):
            raise UserError(
                f"{file}: tokens = {record['tokens']} is not the sum of assignment = {record['assignment']}; {_AGAIN}"
            )
        return record

    def is_done(self, name: str, fingerprint: str) -> bool:
        """Whether the sample that continues this very file is there."""
        record = self.record(name)
        return record is not None and record.get("fingerprint") == fingerprint

    def add(
        self, name: str, record: Mapping[str, Any], clip: ShownClip | None, tokens: VideoTokens | None, fps: float
    ) -> None:
        """Write one sample; without a clip only its record is kept (of a broken sequence). OSError on a full disk."""
        aside, target = self.samples / f"{_WRITING}{name}", self.samples / name
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir()
        if clip is not None and tokens is not None:
            np.save(aside / "frames.npy", clip.frames_THWC)
            write_video(aside / "sample.mp4", clip.frames_THWC, fps)
            tokens.save(aside / "tokens.safetensors")
            if clip.real_THWC is not None:
                np.save(aside / "original.npy", clip.real_THWC)
                write_video(aside / "original.mp4", clip.real_THWC, fps)
                write_video(aside / "side_by_side.mp4", clip_video(clip, self.longest), fps)
        (aside / _RECORD).write_bytes(_json({"name": name, **record}))
        if target.exists():  # of a source file that has since been replaced
            shutil.rmtree(target)
        os.replace(aside, target)

    def add_skipped(self, name: str, file: str, reason: str) -> None:
        """Remember that a video could not be used; it is tried again by the next run."""
        self.add(name, {"file": file, "skipped": reason}, None, None, 0)

    def write_grid(self, title: str, names: Sequence[str], fps: float) -> None:
        """A grid of finished samples as a video and as a sheet of frames; broken ones have no place in it."""
        clips = [self._shown(name, record) for name, record in self._records(names) if _is_good(record)]
        if clips:
            write_video(self.grids / f"{title}.mp4", grid_video(clips, self.longest), fps)
            picture = io.BytesIO()
            contact_sheet(clips, self.longest).save(picture, format="PNG")
            _put(self.grids / f"{title}.png", picture.getvalue())

    def write_page(self, summary: Mapping[str, Any], groups: Mapping[str, Sequence[str]]) -> None:
        """report.html: of every group the first clips, as many as the page has room for; no page if all are broken."""
        each = max(1, MOST_FILMS // max(1, len(groups)))
        cards = []
        for title, names in groups.items():
            good = ((name, record) for name, record in self._records(names) if _is_good(record))
            for name, record in itertools.islice(good, each):
                heading, text = record.get("class_name") or title.replace("_", " "), record.get("file") or name
                cards.append(Card(heading, text, self._shown(name, record)))
        if cards:
            page = sample_page(summary, cards[:MOST_FILMS], self.longest)
            _put(self.folder / "report.html", page.encode())

    def _shown(self, name: str, record: Mapping[str, Any]) -> ShownClip:
        """A finished sample as `add` got it."""
        frames_THWC, real = _frames(self.samples / name / "frames.npy"), self.samples / name / "original.npy"
        real_THWC = _frames(real) if real.exists() else None
        return ShownClip(frames_THWC, tuple(record["assignment"]), real_THWC, record["given_frames"])

    def write_summary(self, names: Sequence[str], facts: Mapping[str, Any]) -> dict[str, Any]:
        """samples.json over the finished ones of `names`; returns it."""
        all_records = [record for _, record in self._records(names)]
        records = [record for record in all_records if "skipped" not in record]
        good = [record for record in records if _is_good(record)]
        summary = {
            "complete": len(all_records) == len(names),
            "num_samples": len(records),
            "num_broken": len(records) - len(good),
            **{
                f"mean_{key}": _mean([record[key] for record in good])
                for key in ("tokens", "tokens_with_length_tokens")
            },
            **facts,
            "samples": records,
            "skipped": [{"file": r["file"], "reason": r["skipped"]} for r in all_records if "skipped" in r],
        }
        _put(self.folder / "samples.json", _json(summary))
        return summary

    def _records(self, names: Sequence[str]) -> list[tuple[str, dict[str, Any]]]:
        return [(name, record) for name in names if (record := self.record(name))]


def _frames(path: Path) -> np.ndarray:
    """uint8 THWC, from a file that `SampleFolder.add` wrote. Raises UserError for any other."""
    try:
        frames_THWC = np.load(path, mmap_mode="r", allow_pickle=False) if path.is_file() else None
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{path}: damaged ({error}); {_AGAIN}") from error
    if not isinstance(frames_THWC, np.ndarray) or frames_THWC.dtype != np.uint8 or frames_THWC.ndim != 4:
        raise UserError(f"{path}: holds no uint8 frames; {_AGAIN}")
    return np.array(frames_THWC)


def _is_good(record: Mapping[str, Any]) -> bool:
    return "skipped" not in record and record["broken"] is None


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _put(path: Path, data: bytes) -> None:
    """Replace a file that several processes may write at the same time, each with the same contents."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    aside.write_bytes(data)
    os.replace(aside, path)


def _json(data: Any) -> bytes:
    return json.dumps(data, indent=1, allow_nan=False).encode()
