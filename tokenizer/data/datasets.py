"""The layouts of UCF-101, Kinetics-600 and WebVid on disk: which videos their lists name, and which of them are there.

UCF-101: the official `classInd.txt` counts from 1 and sorts without regard to case; the class numbers of generation
models count from 0 and sort by ASCII. The two orders swap HammerThrow with Hammering and JumpRope with JumpingJack. The
class folder is HandstandPushups, but its files are called v_HandStandPushups_*: names are matched without regard to
case, and without their suffix, so that transcoded copies are found too.

Kinetics-600: a .csv with the columns youtube_id, time_start, time_end and label. A clip is `<id>_<start>_<end>` with
six digits each, or `<id>` alone, in one folder or in class folders. Many of the listed videos are no longer available.

WebVid: a .csv of video ids against files `<page_dir>/<videoid>.mp4` or `<videoid>.mp4`. WebVid-10M is no longer
distributed; other sets of this layout work too.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from tokenizer.common.errors import UserError
from tokenizer.data.video_io import display_name, list_videos
from tokenizer.data.video_table import read_table

_CLASSES = """
ApplyEyeMakeup ApplyLipstick Archery BabyCrawling BalanceBeam BandMarching BaseballPitch Basketball BasketballDunk
BenchPress Biking Billiards BlowDryHair BlowingCandles BodyWeightSquats Bowling BoxingPunchingBag BoxingSpeedBag
BreastStroke BrushingTeeth CleanAndJerk CliffDiving CricketBowling CricketShot CuttingInKitchen Diving Drumming
Fencing FieldHockeyPenalty FloorGymnastics FrisbeeCatch FrontCrawl GolfSwing Haircut Hammering HammerThrow
HandstandPushups HandstandWalking HeadMassage HighJump HorseRace HorseRiding HulaHoop IceDancing JavelinThrow
JugglingBalls JumpingJack JumpRope Kayaking Knitting LongJump Lunges MilitaryParade Mixing MoppingFloor Nunchucks
ParallelBars PizzaTossing PlayingCello PlayingDaf PlayingDhol PlayingFlute PlayingGuitar PlayingPiano PlayingSitar
PlayingTabla PlayingViolin PoleVault PommelHorse PullUps Punch PushUps Rafting RockClimbingIndoor RopeClimbing
Rowing SalsaSpin ShavingBeard Shotput SkateBoarding Skiing Skijet SkyDiving SoccerJuggling SoccerPenalty StillRings
SumoWrestling Surfing Swing TableTennisShot TaiChi TennisSwing ThrowDiscus TrampolineJumping Typing UnevenBars
VolleyballSpiking WalkingWithDog WallPushups WritingOnBoard YoYo
"""
OFFICIAL_ORDER = tuple(_CLASSES.split())
ASCII_ORDER = tuple(sorted(OFFICIAL_ORDER))
SPLITS = ("train", "test", "all")

_BY_LOWER = {name.lower(): name for name in OFFICIAL_ORDER}
_FILE = re.compile(r"v_(?P<label>\w+)_g\d+_c\d+", re.IGNORECASE)


def find_ucf101(
    root: Path, split: str = "train", fold: int = 1, list_file: Path | None = None
) -> Iterator[tuple[str, Path | None, str]]:
    """(name in the list, its file below `root` or None, class name) of a split, in the order of the official list.

    split: train, test, or all (every file below root; needs no list). The list is `list_file`, or `trainlist01.txt`
    and so on somewhere below `root`. Raises UserError if the list is missing or a name in it is no UCF-101 file.
    """
    videos = {video.stem.lower(): video for video in list_videos(root) if _FILE.fullmatch(video.stem)}
    if split == "all" and list_file is None:
        for video in sorted(videos.values()):
            yield video.name, video, class_of(video.stem)
        return
    for name in _listed(list_file or _split_file(root, split, fold)):
        stem = Path(name).stem
        yield name, videos.get(stem.lower()), class_of(stem)


def class_of(stem: str) -> str:
    """`v_HandStandPushups_g01_c02` -> HandstandPushups, as the class list spells it. UserError for other names."""
    match = _FILE.fullmatch(stem)
    if match is None or match["label"].lower() not in _BY_LOWER:
        raise UserError(f"{stem!r} is not the name of a UCF-101 video (v_Class_gNN_cNN)")
    return _BY_LOWER[match["label"].lower()]


def _split_file(root: Path, split: str, fold: int) -> Path:
    if split not in SPLITS or fold not in (1, 2, 3):
        raise UserError(f"split {split!r}, fold {fold}: choose train, test or all, and 1, 2 or 3")
    name = f"{split}list{fold:02d}.txt"
    found = sorted(root.rglob(name)) + sorted(root.parent.glob(f"ucfTrainTestlist/{name}"))
    if not found:
        raise UserError(
            f"{display_name(root)}: no {name} below it; unpack UCF101TrainTestSplits-RecognitionTask.zip there, or "
            "give --list"
        )
    return found[0]


def _listed(file: Path) -> Iterator[str]:
    """`Class/v_Class_g01_c01.avi 1`: the number is there in train lists only."""
    if not file.is_file():
        raise UserError(f"{display_name(file)}: no such list")
    for line in file.read_text(encoding="utf-8-sig").splitlines():
        if line.strip():
            yield line.split()[0]


def find_kinetics(root: Path, list_file: Path) -> Iterator[tuple[str, Path | None, str]]:
    """(name of the clip, its file below `root` or None, label), in the order of the list.

    Raises UserError for a list without the column youtube_id and for times that are no whole numbers.
    """
    videos = {video.stem: video for video in list_videos(root)}
    for cells in read_table(list_file, "youtube_id"):
        video_id = cells["youtube_id"]
        name = video_id
        if cells.get("time_start"):
            start, end = (_seconds(list_file, cells.get(key, "")) for key in ("time_start", "time_end"))
            name = f"{video_id}_{start:06d}_{end:06d}"
        yield name, videos.get(name) or videos.get(video_id), cells.get("label", "")


def _seconds(list_file: Path, cell: str) -> int:
    try:
        return round(float(cell))
    except ValueError:
        raise UserError(f"{display_name(list_file)}: {cell!r} is not a time in seconds") from None


def find_webvid(root: Path, list_file: Path) -> Iterator[tuple[str, Path | None, str]]:
    """(video id, its file below `root` or None, no label), in the order of the list, which is never held in memory.

    Raises UserError for a list without the column videoid, or if `root` is no folder.
    """
    if not root.is_dir():
        raise UserError(f"{display_name(root)}: no such folder")
    for cells in read_table(list_file, "videoid"):
        name = f"{cells['videoid']}.mp4"
        places = [root / cells.get("page_dir", "") / name, root / name]
        yield cells["videoid"], next((place for place in places if place.is_file()), None), ""
