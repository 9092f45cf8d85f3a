"""Kinetics-600 on disk: the annotation list against the files that could be downloaded. They never agree.

The list is a .csv with the columns youtube_id, time_start, time_end and label; a clip is a file called
`<id>_<start>_<end>` with six digits each (or `<id>` alone), in one folder or in class folders.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from tokenizer.common.errors import UserError
from tokenizer.data.manifest_table import read_table
from tokenizer.data.video_io import display_name, list_videos


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
