"""The results folder of the main job: one finished clip after the other, so that a stopped run loses nothing.

    settings.json      what decides a clip's result; a run with other settings is refused
    clips.jsonl        one line for each finished clip, appended when its folder is complete
    clips/<name>/      original.mp4  reconstruction.mp4  side_by_side.mp4  film.jpg  tokens.safetensors
    metrics.json  skipped.json  report.html      written at the end, also after Ctrl-C

A folder under clips/ is written aside and renamed, so it is there entirely or not at all.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tokenizer.common.checkpoint import atomic_write
from tokenizer.common.config import differences
from tokenizer.common.errors import UserError
from tokenizer.data.clip_stream import Skipped, SourceClip
from tokenizer.data.video_io import DecodedClip, write_video
from tokenizer.router.reconstruct import Reconstruction
from tokenizer.viz.frames import error_map, filmstrip, side_by_side

_TOKENS = "tokens.safetensors"
_FILES = ("original.mp4", "reconstruction.mp4", "side_by_side.mp4", "film.jpg", _TOKENS)
_WRITING = ".writing-"


class ResultsFolder:
    """What is done so far, and the one place where files of the job are written."""

    def __init__(self, folder: str | Path) -> None:
        """Look at a folder, new or of an earlier run; nothing is written before `start`."""
        self.folder = Path(folder)
        self.clips = self.folder / "clips"
        self._settings = self.folder / "settings.json"
        self._journal = self.folder / "clips.jsonl"
        if self.folder.exists() and not self.folder.is_dir():
            raise UserError(f"{self.folder}: is a file; --save_dir must be a folder")
        self.records = {record["name"]: record for record in self._read_journal()}

    def holds(self, path: Path) -> bool:
        """Whether `path` is a video that this job wrote here."""
        folder = path.resolve().parent
        return folder.parent == self.clips.resolve() and (folder / _TOKENS).is_file()

    def start(self, settings: Mapping[str, Any], overwrite: bool) -> None:
        """Make the folder ready. `overwrite` removes what an earlier run wrote, and only that; else see `agree`."""
        try:
            self.clips.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{self.clips}: cannot be made ({error.strerror}); give another --save_dir") from error
        if overwrite:
            self._clear()
        if not self.records:
            self._settings.unlink(missing_ok=True)
        self.agree(settings)
        for leftover in self.clips.glob(f"{_WRITING}*"):
            shutil.rmtree(leftover)

    def agree(self, settings: Mapping[str, Any]) -> None:
        """Remember settings that decide the results. Raises UserError where earlier results here had others."""
        known = json.loads(self._settings.read_text(encoding="utf-8")) if self._settings.is_file() else {}
        shared = known.keys() & settings.keys()
        if different := differences({key: known[key] for key in shared}, {key: settings[key] for key in shared}):
            raise UserError(
                f"{self.folder}: holds results made with other settings (there / now: {'; '.join(different)}); "
                "give another --save_dir, or --overwrite"
            )
        atomic_write(self._settings, _json({**known, **settings}))

    def is_done(self, name: str, fingerprint: str) -> bool:
        """Whether this clip of this very file is finished and still here."""
        record = self.records.get(name)
        if record is None or record["fingerprint"] != fingerprint:
            return False
        return all((self.clips / name / file).is_file() for file in _FILES)

    def add(self, clip: SourceClip, decoded: DecodedClip, result: Reconstruction, longest: int) -> None:
        """Write one clip. `longest`: the largest level, a full bar in the pictures. Raises OSError on a full disk."""
        aside, target = self.clips / f"{_WRITING}{clip.name}", self.clips / clip.name
        aside.mkdir(exist_ok=True)
        real, ours, lengths = decoded.frames_THWC, result.frames_THWC, result.figures["assignment"]
        write_video(aside / "original.mp4", real, decoded.fps)
        write_video(aside / "reconstruction.mp4", ours, decoded.fps)
        write_video(aside / "side_by_side.mp4", side_by_side(real, ours, lengths, longest), decoded.fps)
        filmstrip(real, ours, error_map(real, ours)).save(aside / "film.jpg", quality=90, subsampling=0)
        result.tokens.save(aside / _TOKENS)
        if target.exists():  # of a file that has since been replaced
            shutil.rmtree(target)
        os.replace(aside, target)
        record = {"file": clip.source.file, "start": clip.start, "name": clip.name, **result.figures}
        record |= {"num_padded": decoded.num_padded, "fps": decoded.fps, "fingerprint": clip.fingerprint}
        if decoded.notes:
            record["notes"] = list(decoded.notes)  # what of the file is not handled
        with open(self._journal, "ab") as journal:
            journal.write(json.dumps(record, allow_nan=False).encode() + b"\n")
        self.records[clip.name] = record

    def token_files(self, names: Iterable[str]) -> Iterable[Path]:
        """Where the tokens of these clips are."""
        return (self.clips / name / _TOKENS for name in names)

    def write_skipped(self, skipped: Iterable[Skipped]) -> None:
        """skipped.json: what could not be read and why, an empty list where all could."""
        rows = [{"file": each.source.file, "reason": each.reason} for each in skipped]
        atomic_write(self.folder / "skipped.json", _json(rows))

    def write_metrics(self, metrics: Mapping[str, Any]) -> None:
        """metrics.json: the records of this run's clips and what sums them up."""
        atomic_write(self.folder / "metrics.json", _json(metrics))

    def _read_journal(self) -> list[dict[str, Any]]:
        """The finished clips; a last line that a kill cut short is dropped, from the file too."""
        if not self._journal.is_file():
            return []
        lines = self._journal.read_bytes().splitlines(keepends=True)
        if lines and not lines[-1].endswith(b"\n"):
            lines.pop()
            atomic_write(self._journal, b"".join(lines))
        try:
            return [json.loads(line) for line in lines]
        except ValueError as error:
            raise UserError(f"{self._journal}: is damaged ({error}); start again with --overwrite") from error

    def _clear(self) -> None:
        for name in self.records:
            shutil.rmtree(self.clips / name, ignore_errors=True)
        for name in (self._settings.name, self._journal.name, "metrics.json", "skipped.json", "report.html"):
            (self.folder / name).unlink(missing_ok=True)
        self.records = {}


def _json(data: Any) -> bytes:
    return json.dumps(data, indent=1, allow_nan=False).encode()
