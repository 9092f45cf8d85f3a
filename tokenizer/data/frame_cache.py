"""Decoded clips kept in one file, so that a training which sees the same clips in every epoch decodes them once.

The file is sparse and fills as clips are decoded; all processes of a machine, and later runs, read it through the page
cache. Each clip has a checksum: one that was half written when a run was killed is decoded again.
Letters: N clips; a clip is uint8 [C, T, H, W].
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

log = logging.getLogger(__name__)


class FrameCache:
    """`num_clips` places for clips of `shape` in `folder`. facts: what decides the pixels; others get another file."""

    def __init__(self, folder: Path, num_clips: int, shape: tuple[int, ...], facts: Mapping[str, Any]) -> None:
        known = json.dumps([num_clips, shape, dict(facts)], sort_keys=True)
        name = hashlib.sha256(known.encode("utf-8", "surrogateescape")).hexdigest()[:16]
        self.path = folder / f"frames-{name}.u8"
        self._num_clips, self._shape = num_clips, shape
        self._bytes = int(np.prod(shape))
        self._is_full = False

    def get(self, index: int) -> np.ndarray | None:
        """Clip `index`, a copy; None if it is not here."""
        try:
            with open(self.path, "rb") as file:
                file.seek(index * 4)
                (checksum,) = np.frombuffer(file.read(4), np.uint32)
                if not checksum:
                    return None
                file.seek(self._start(index))
                clip = np.fromfile(file, np.uint8, self._bytes)
        except (FileNotFoundError, ValueError):  # not begun, or shorter than its table of checksums
            return None
        return clip.reshape(self._shape) if len(clip) == self._bytes and _checksum(clip) == checksum else None

    def put(self, index: int, clip: np.ndarray) -> None:
        """Keep a clip. On a full disk nothing more is kept, which is logged once."""
        if self._is_full:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                os.pwrite(descriptor, np.ascontiguousarray(clip).data.cast("B"), self._start(index))
                os.pwrite(descriptor, np.uint32(_checksum(clip)).tobytes(), index * 4)
            finally:
                os.close(descriptor)
        except OSError as error:
            self._is_full = True
            log.warning("%s: decoded clips are no longer kept (%s); they are decoded in every epoch", self.path, error)

    def _start(self, index: int) -> int:
        """Offset of a clip: behind the checksums, 4 bytes each, 0 for a missing clip."""
        return self._num_clips * 4 + index * self._bytes


def _checksum(clip: np.ndarray) -> int:
    """Never 0."""
    return zlib.crc32(np.ascontiguousarray(clip).data.cast("B")) or 1
