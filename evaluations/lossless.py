"""Frames that are scored come from arrays or from lossless video. An ordinary mp4 leaves even the original at 33 dB.

Letters: T frames, H W rows and columns, C colours.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import av
import numpy as np

from tokenizer.common.errors import UserError
from tokenizer.data.video_io import VIDEO_SUFFIXES, VideoError, display_name, read_clip

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
