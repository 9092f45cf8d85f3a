"""What the three evaluation commands share: flags, the loop over shards, and the results at the end.

A command brings a maker: it takes the clips of a shard and gives what its system makes of each. Everything here goes
clip by clip, so no number depends on batches, shards or processes.

Letters: T frames, H W rows and columns, C colours, F numbers in a feature.

Frames that are scored come from arrays or from lossless video. An ordinary mp4 leaves even the original at 33 dB.

Letters: T frames, H W rows and columns, C colours.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from typing import Protocol as Interface

import av
import numpy as np
from torch import Tensor
from tqdm import tqdm

from evaluations.clip_list import ClipList, ListedClip, list_clips
from evaluations.metrics.frechet import NAMES
from evaluations.protocols import Protocol, card_of, card_text, find_protocol
from evaluations.scoring import Scorer, load_scorer, trained_as
from evaluations.shards import Features, RealCache, Record, ShardFolder, shard_size
from evaluations.summary import per_clip_table, pick_shown, result_lines, summarise
from tokenizer.common.cli import Parser, at_least
from tokenizer.common.device import pick_device
from tokenizer.common.distributed import several_processes
from tokenizer.common.errors import UserError
from tokenizer.data.video_io import VIDEO_SUFFIXES, DecodedClip, VideoError, display_name, read_clip
from tokenizer.model import VideoTokenizer
from tokenizer.router.summary import versions
from tokenizer.viz.frames import filmstrip

_LOSSLESS_CODECS = ("ffv1", "ffvhuff", "huffyuv", "utvideo", "rawvideo", "png", "qoi")
_X264_OPTIONS = re.compile(rb"x264 - core.*? options: ([^\0]*)")
_HEADER_BYTES = 1 << 16  # x264 writes its options into the first picture


def find_frames(folder: str | Path) -> list[Path]:
    """Clips in a folder, sorted by name: the samples of a sampling command, else its .npy and video files."""
    root = Path(folder)
    if not root.is_dir():
        raise UserError(f"{display_name(root)}: no such folder of clips")
    found = sorted(root.glob("samples/*/frames.npy"))
    if not found:
        found = sorted(p for p in root.iterdir() if p.suffix.lower() in (".npy", *VIDEO_SUFFIXES))
    if not found:
        raise UserError(f"{display_name(root)}: holds no .npy and no video; give a folder of lossless clips")
    return found


def sample_record(path: Path) -> dict[str, Any]:
    """What a sampling command wrote beside its frames; nothing for a clip from elsewhere."""
    file = path.with_name("record.json")
    return json.loads(file.read_text(encoding="utf-8")) if path.name == "frames.npy" and file.is_file() else {}


def read_frames(path: Path, num_frames: int, force: bool = False) -> np.ndarray:
    """uint8 [T, H, W, 3] of a .npy file or a lossless video.

    Raises UserError for another array, for a clip of another length, and for lossy video unless `force`.
    """
    if path.suffix.lower() == ".npy":
        try:
            frames_THWC = np.load(path, allow_pickle=False)
        except (ValueError, OSError, EOFError) as error:
            raise UserError(f"{display_name(path)}: cannot be read as an array ({error})") from error
    else:
        if not force and (why := why_lossy(path)):
            raise UserError(
                f"{display_name(path)}: is not lossless ({why}), so a score would measure the codec too; write "
                ".npy, FFV1 or write_video(lossless=True), or give --force"
            )
        clip = read_clip(path, 0, num_frames)
        frames_THWC = clip.frames_THWC[: num_frames - clip.num_padded]
    if frames_THWC.dtype != np.uint8 or frames_THWC.ndim != 4 or frames_THWC.shape[3] != 3:
        raise UserError(
            f"{display_name(path)}: holds {frames_THWC.dtype} {frames_THWC.shape}, not uint8 frames [T, H, W, 3]"
        )
    if len(frames_THWC) != num_frames:
        raise UserError(f"{display_name(path)}: holds {len(frames_THWC)} frames, the protocol scores {num_frames}")
    return frames_THWC


def why_lossy(path: Path) -> str | None:
    """Why a video cannot be taken for the frames that were written into it; None where it can."""
    try:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            codec, pixels = stream.codec_context.name, stream.codec_context.pix_fmt or "unknown"
            packet = next(iter(container.demux(stream)))
            head = (stream.codec_context.extradata or b"") + bytes(packet)[:_HEADER_BYTES]
    except (av.FFmpegError, IndexError, OSError, StopIteration) as error:
        raise VideoError(path, f"cannot be opened ({error})") from error
    if not (pixels.startswith(("gbr", "rgb", "bgr", "0rgb", "argb", "abgr"))):
        return f"its pixels are {pixels}, not RGB"
    if codec in _LOSSLESS_CODECS:
        return None
    options = _X264_OPTIONS.search(head)
    if codec == "h264" and options and re.search(rb"\brc=cqp\b.*\bqp=0\b", options[1]):
        return None
    return f"codec {codec} without a sign of quantiser 0"


@dataclass(frozen=True)
class Made:
    """What a system made of one clip: its frames and what goes into its record, or why there is nothing."""

    clip: ListedClip
    ours_THWC: np.ndarray | None
    figures: dict[str, Any] = field(default_factory=dict)
    real: DecodedClip | None = None  # where the maker has read it anyway
    skipped: str | None = None


class Maker(Interface):
    """A system under evaluation."""

    def facts(self) -> dict[str, Any]:
        """Weights by sha256 and every setting that decides what is made."""
        ...

    def make(self, clips: Sequence[ListedClip]) -> Iterator[Made]:
        """One for each clip, in any order."""
        ...


def add_common_flags(parser: Parser) -> None:
    """Flags of every evaluation command."""
    add = parser.add_argument
    add("--protocol", metavar="NAME", help="see python -m evaluations.protocols")
    add("--out", metavar="DIR", help="results folder; a stopped evaluation in it is continued")
    add("--data", metavar="PATH", help="manifest .csv or folder of videos (default: UCF_ROOT, K600_ROOT)")
    add("--ours", metavar="DIR", help="score these lossless clips (.npy, FFV1; a folder of samples) instead of a model")
    add("--tok-config", metavar="T.yaml", help="YAML of the tokenizer, checked against its weights")
    add("--vq-ckpt", metavar="T", help="weights of the tokenizer: .safetensors or a run folder")
    add("--extractor", choices=(*NAMES, "none"), help="another than the protocol's: the result is marked as changed")
    add("--extractor-weights", metavar="PATH", help="i3d: TorchScript file or address; videomae: folder")
    add("--extractor-sha256", metavar="HEX", help="what the extractor's weights must have; needed for an address")
    add("--perceptual", metavar="NAME", help="another LPIPS than the protocol's, or none: marked as changed")
    add("--count", type=at_least(1), metavar="N", help="another number of clips: marked as changed")
    add("--draws", type=at_least(1), metavar="N", help="draws of the bootstrap: marked as changed")
    add("--force", action="store_true", help="Frechet distance on fewer than 256 clips; lossy video in --ours")
    add("--cache", metavar="DIR", default="results/eval_cache", help="real-side features (default: results/eval_cache)")
    add("--device", default="auto", help="auto | cpu | cuda | cuda:N")
    add("--num-workers", type=at_least(1), default=1, metavar="N", help="processes that count frames (default: 1)")
    add("--overwrite", action="store_true", help="remove the earlier results in --out and start again")


def parse(parser: Parser) -> argparse.Namespace:
    """Parse the command line; unknown flags are named before missing ones."""
    args = parser.parse_args()
    missing = [f"--{name}" for name in ("protocol", "out") if getattr(args, name) is None]
    if missing:
        raise UserError(f"missing: {', '.join(missing)} (see --help)")
    return args


class Evaluation:
    """One protocol, one system, one folder."""

    def __init__(self, args: argparse.Namespace, task: str) -> None:
        """Raises UserError where protocol, data or the weights that judge are not at hand."""
        fields = {name: getattr(args, name) for name in ("extractor", "perceptual", "count", "draws")}
        self.protocol: Protocol = find_protocol(args.protocol, task).change(**fields)
        self.args, self.device = args, pick_device(args.device)
        if args.overwrite and several_processes():
            raise UserError("--overwrite with several processes: remove the folder yourself, then start them")
        self.cache = Path(args.cache)
        self.clips: ClipList = list_clips(self.protocol, args.data, self.cache, args.num_workers)
        self.scorer: Scorer = load_scorer(self.protocol, args, self.device)
        num_clips, slots = len(self.clips.clips), vars(args).get("per_proc_batch_size") or 0
        self.folder = ShardFolder(args.out, num_clips, shard_size(num_clips, slots))

    def run(self, maker: Maker) -> None:
        """Score clips until no shard is free; the process that finds all there writes the results."""
        which = {"list_sha256": self.clips.sha256, "files_sha256": self.clips.files_sha256}
        facts = {"protocol_hash": self.protocol.hash, **which, **self.scorer.facts()}
        self.folder.start({**facts, "system": maker.facts()}, self.args.overwrite)
        card = card_of(
            self.protocol,
            list=self.clips.facts(),
            **self.scorer.facts(),
            system=maker.facts(),
            trained_as=self._trained_as(),
            device=str(self.device),
            code=code_version(),
        )
        print(card_text(card), flush=True)
        kept = self._real_cache()
        known = kept.load()
        calm = 1 if sys.stderr.isatty() else 30  # seconds between two states of the bar; a log file needs few
        done, total = self.folder.num_scored(), len(self.clips.clips)
        with tqdm(desc="scoring", initial=done, total=total, unit="clip", mininterval=calm) as bar:

            def score(members: range) -> tuple[list[Record], Features]:
                bar.update(max(0, self.folder.num_scored() - bar.n))  # what other processes have done counts too
                return self._score(members, maker, known, bar)

            def finish() -> None:
                bar.close()
                self._finish(maker, card, kept)

            if not self.folder.work(score, finish):
                bar.close()
                print(f"no shard is free; others are at work in {self.folder.folder}, the last writes the results")

    def run_ours(self) -> bool:
        """Score the clips of --ours, where that is given. UserError where a model is given too."""
        if self.args.ours is None:
            return False
        for name in ("vq_ckpt", "tok_config", "router_ckpt", "router_config", "gpt_ckpt", "gpt_model"):
            if vars(self.args).get(name) is not None:
                flag = name.replace("_", "-")
                raise UserError(f"--ours scores clips that are there already; leave --{flag} out, or --ours")
        self.run(FolderMaker(self.args.ours, self.clips, self.protocol, self.args.force))
        return True

    def _trained_as(self) -> dict[str, Any]:
        """Which training runs made the weights, as the weights themselves say; nothing where clips were given."""
        given = {"tokenizer": self.args.vq_ckpt, "gpt": vars(self.args).get("gpt_ckpt")}
        return {name: trained_as(path) for name, path in given.items() if path}

    def _score(
        self, members: range, maker: Maker, known: dict[int, Tensor], bar: tqdm[Any]
    ) -> tuple[list[Record], Features]:
        records: list[Record] = []
        features: Features = {"ours": {}, "real": {}}
        for made in maker.make([self.clips.clips[i] for i in members]):
            records.append(self._record(made, known, features))
            bar.update()
        return records, features

    def _record(self, made: Made, known: dict[int, Tensor], features: Features) -> Record:
        """Score one clip: its record; its features are entered into `features`."""
        clip, real = made.clip, made.real
        record: Record = {"index": clip.index, "name": clip.name, "label": clip.label, "start": clip.start}
        if made.ours_THWC is None:
            return {**record, "skipped": made.skipped or "nothing was made"}
        try:
            if real is None and (self.protocol.paired or clip.index not in known):
                real = clip.read()
        except VideoError as error:
            return {**record, "skipped": error.reason}
        record |= made.figures | ({"num_padded": real.num_padded} if real is not None and real.num_padded else {})
        if self.protocol.paired and real is not None:
            record |= self.scorer.quality(real.frames_THWC, made.ours_THWC)
        if self.scorer.extractor:
            features["ours"][clip.index] = self.scorer.feature(made.ours_THWC)
            if clip.index in known:
                features["real"][clip.index] = known[clip.index]
            elif real is not None:
                features["real"][clip.index] = self.scorer.feature(real.frames_THWC)
        return record

    def _finish(self, maker: Maker, card: dict[str, Any], kept: RealCache) -> None:
        records = self.folder.records()
        ours, real = self.folder.features("ours"), self.folder.features("real")
        if all("skipped" in record for record in records):
            raise UserError(f"none of the {len(records)} clips could be scored; {records[0]['skipped']}")
        summary = summarise(self.protocol, records, ours, real, self.args.force)
        summary["notes"] = [*self.protocol.notes, *self.clips.notes, *summary["notes"]]
        self.folder.put("card.json", json.dumps(card, indent=1).encode())
        self.folder.put("card.txt", (card_text(card) + "\n").encode())
        self.folder.put("metrics.json", json.dumps({"card": card, **summary}, indent=1, allow_nan=False).encode())
        self.folder.put("per_clip.csv", per_clip_table(records).encode("utf-8", "surrogateescape"))
        if len(real[0]):
            kept.save(*real)
        self._draw(maker, pick_shown(self.protocol, records, ours, real[1]))
        print("\n".join(result_lines(summary)))
        print(f"results: {self.folder.folder / 'metrics.json'}")

    def _draw(self, maker: Maker, shown: dict[str, int]) -> None:
        """Frames of the best, the median and the worst clip, the real ones above."""
        pictures = self.folder.folder / "pictures"
        pictures.mkdir(exist_ok=True)
        for place, index in shown.items():
            clip = self.clips.clips[index]
            for made in maker.make([clip]):
                if made.ours_THWC is None:
                    continue
                try:
                    real = clip.read() if made.real is None else made.real
                except VideoError as error:
                    print(f"no picture of {clip.name}: {error.reason}", file=sys.stderr)
                    continue
                filmstrip(real.frames_THWC, made.ours_THWC).save(pictures / f"{place}_{index:06d}.png")

    def _real_cache(self) -> RealCache:
        extractor = self.scorer.extractor
        clips = self.clips
        key = json.dumps(
            [self.protocol.real_side_hash, clips.sha256, clips.files_sha256, extractor and extractor.sha256]
        )
        return RealCache(self.cache / f"real-{hashlib.sha256(key.encode()).hexdigest()[:16]}.safetensors")


class FolderMaker:
    """Clips that another program made: file i of the folder, by name, belongs to clip i of the list.

    Samples of our own commands say what they show. Where clips are compared one by one a sample of another clip is
    refused; else the class of each goes into its record.
    """

    def __init__(self, folder: str, clips: ClipList, protocol: Protocol, force: bool) -> None:
        self.files, self.num_frames, self.force = find_frames(folder), protocol.num_frames, force
        self.size = protocol.size
        if len(self.files) != len(clips.clips):
            raise UserError(
                f"{folder}: holds {len(self.files)} clips for the {len(clips.clips)} of the protocol; file i by name "
                "belongs to clip i (per_clip.csv of another evaluation names them in order)"
            )

        self.records = [sample_record(file) for file in self.files]
        for clip, record in zip(clips.clips, self.records, strict=True):
            if protocol.paired and record and not shows(record, clip):
                raise UserError(
                    f"{folder}: {record['name']} continues {record.get('file') or 'no clip'} from frame "
                    f"{record.get('start')}, but clip {clip.index} of the protocol is {clip.name}: evaluate the GPT "
                    "itself (--gpt-ckpt) under this protocol"
                )

    def facts(self) -> dict[str, Any]:
        """The folder by the names and sizes of its files."""
        listing = json.dumps([[str(file), file.stat().st_size] for file in self.files])
        return {"folder": hashlib.sha256(listing.encode()).hexdigest()[:16], "forced_lossy": self.force}

    def make(self, clips: Sequence[ListedClip]) -> Iterator[Made]:
        """Read them."""
        for clip in clips:
            sampled = self.records[clip.index].get("class_name")
            figures = {"sampled_class": sampled} if sampled else {}
            frames_THWC = read_frames(self.files[clip.index], self.num_frames, self.force)
            if frames_THWC.shape[1:3] != (self.size, self.size):
                height, width = frames_THWC.shape[1:3]
                raise UserError(
                    f"{self.files[clip.index]}: holds frames of {height}x{width} pixels, the protocol's have "
                    f"{self.size}x{self.size}"
                )
            yield Made(clip, frames_THWC, figures)


def shows(record: dict[str, Any], clip: ListedClip) -> bool:
    """Whether a sample of frame prediction continues this very clip."""
    name, start = clip.name.partition("@")[0], clip.start
    return Path(str(record.get("file"))).name == Path(name).name and record.get("start") == start


def code_version() -> str:
    """The commit of this repository, with a mark where files differ from it; else the package version."""
    root = Path(__file__).parents[1]
    words = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        found = subprocess.run(words, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        found = "unknown commit"
    return f"{found}, " + ", ".join(f"{name} {version}" for name, version in versions().items())


def token_figures(lengths: Sequence[int]) -> dict[str, Any]:
    """What a record says of a clip's tokens."""
    return {"lengths": list(lengths), "tokens": sum(lengths), "tokens_with_length_tokens": sum(lengths) + len(lengths)}


def require(args: argparse.Namespace, *names: str) -> None:
    """UserError for flags that are needed where no folder of clips is given."""
    missing = [f"--{name.replace('_', '-')}" for name in names if getattr(args, name) is None]
    if missing:
        raise UserError(f"{', '.join(missing)} missing: give the models, or --ours DIR with lossless clips")


def check_tokenizer(protocol: Protocol, tokenizer: VideoTokenizer) -> None:
    """Raises UserError where the tokenizer reads clips of another shape than the protocol's."""
    ours = (tokenizer.config.num_frames, tokenizer.config.size)
    if ours != (protocol.num_frames, protocol.size):
        raise UserError(
            f"protocol {protocol.name} has clips of {protocol.num_frames} frames of {protocol.size} pixels, the "
            f"tokenizer's have {ours[0]} frames of {ours[1]} pixels; choose a protocol of its size"
        )
