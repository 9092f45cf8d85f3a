"""WebVid-style sets on disk: a .csv of video ids against files called `<page_dir>/<videoid>.mp4` or `<videoid>.mp4`.

WebVid-10M is no longer distributed; whoever has it, or a set of the same layout, lists it with this.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from tokenizer.common.errors import UserError
from tokenizer.data.manifest_table import read_table
from tokenizer.data.video_io import display_name


def find_webvid(root: Path, list_file: Path) -> Iterator[tuple[str, Path | None, str]]:
    """(video id, its file below `root` or None, no label), in the order of the list, which is never held in memory.

    Raises UserError for a list without the column videoid, or where `root` is no folder.
    """
    if not root.is_dir():
        raise UserError(f"{display_name(root)}: no such folder")
    for cells in read_table(list_file, "videoid"):
        name = f"{cells['videoid']}.mp4"
        places = [root / cells.get("page_dir", "") / name, root / name]
        yield cells["videoid"], next((place for place in places if place.is_file()), None), ""
