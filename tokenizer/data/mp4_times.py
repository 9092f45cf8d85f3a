"""The table of an MP4 file that says how much later than decoded each picture is shown ('ctts', ISO/IEC 14496-12).

FFmpeg applies it packet by packet but does not hand it out, so that a file would have to be read whole for it.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

from tokenizer.data.files import Span

_MOST_BYTES = 64 << 20  # of the header


def composition_shifts(path: Path, span: Span | None, track: int) -> np.ndarray | None:
    """int64 [T] in ticks, in the order of decoding, of the track with this number; None if there is no such table."""
    with open(path, "rb") as file:
        begin, end = (span.offset, span.offset + span.size) if span else (0, path.stat().st_size)
        for kind, start, stop in _boxes(file, begin, end):
            if kind == b"moov" and stop - start <= _MOST_BYTES:
                for name, *trak in _boxes(file, start, stop):
                    if name == b"trak" and _track_number(file, *trak) == track:
                        return _shifts(file, *trak)
    return None


def _boxes(file: BinaryIO, begin: int, end: int) -> Iterator[tuple[bytes, int, int]]:
    """(kind, first and last byte of its contents) of the boxes that lie one after the other in a part of the file."""
    while begin + 8 <= end:
        file.seek(begin)
        size, kind = struct.unpack(">I4s", file.read(8))
        header = 8
        if size == 1:
            size, header = int.from_bytes(file.read(8), "big"), 16
        size = size or end - begin
        if size < header or begin + size > end:
            return
        yield kind, begin + header, begin + size
        begin += size


def _track_number(file: BinaryIO, begin: int, end: int) -> int | None:
    for kind, start, stop in _boxes(file, begin, end):
        if kind == b"tkhd" and stop - start >= 24:
            file.seek(start)
            head = file.read(24)
            return int.from_bytes(head[20:24] if head[0] == 1 else head[12:16], "big")
    return None


def _shifts(file: BinaryIO, begin: int, end: int) -> np.ndarray | None:
    for kind, start, stop in _boxes(file, begin, end):
        if kind in (b"mdia", b"minf", b"stbl") and (found := _shifts(file, start, stop)) is not None:
            return found
        if kind == b"ctts":
            file.seek(start + 4)
            num_rows = int.from_bytes(file.read(4), "big")
            table = np.frombuffer(file.read(min(8 * num_rows, stop - start - 8)), ">i4")
            repeats, shifts = table[: len(table) // 2 * 2].reshape(-1, 2).astype(np.int64).T
            is_sane = len(repeats) == num_rows and (repeats >= 0).all() and repeats.sum() <= _MOST_BYTES
            return np.repeat(shifts, repeats) if is_sane else None
    return None
