"""The process that decodes for `safe_decode.py`, which starts it: `python -m tokenizer.data.decode_worker FD`.

FD is its end of a socket pair. A request is JSON: ["open", reader, path, arguments, seconds] or ["next", seconds]. The
answer is JSON: {"clip": facts} followed by the raw frames, {"end": frames of the rest}, or {"error": why, "file": is it
the file}.
Nothing is pickled, so a decoder that a hostile file has taken over cannot reach the caller's process that way.
"""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any

import torch

from tokenizer.common.errors import UserError
from tokenizer.data.video_io import DecodedClip, VideoError, iter_clips, read_clip_at


def _one_clip(*args: Any, **kwargs: Any) -> Iterator[DecodedClip]:
    yield read_clip_at(*args, **kwargs)


_READERS: dict[str, Callable[..., Iterator[DecodedClip]]] = {"iter_clips": iter_clips, "read_clip_at": _one_clip}


def serve(connection: Connection) -> None:
    """Answer requests until the other end is closed."""
    clips: Iterator[DecodedClip] = iter(())
    connection.send_bytes(b"ready")
    while True:
        try:
            verb, *rest = json.loads(connection.recv_bytes())
        except EOFError:
            return
        if verb == "open":
            name, path, arguments = rest[:3]
            clips = _READERS[name](path, **arguments)
        # Should the caller be killed while a decoder hangs, the kernel ends this process: nothing is left behind.
        signal.setitimer(signal.ITIMER_REAL, 2 * rest[-1])
        _answer(connection, clips)
        signal.setitimer(signal.ITIMER_REAL, 0)


def _answer(connection: Connection, clips: Iterator[DecodedClip]) -> None:
    try:
        clip = next(clips)
    except StopIteration as end:
        return _send(connection, {"end": end.value or 0})
    except VideoError as error:
        return _send(connection, {"error": error.reason, "file": True})
    except UserError as error:
        return _send(connection, {"error": str(error), "file": False})
    facts = {"start": clip.start, "num_padded": clip.num_padded, "fps": clip.fps, "shape": clip.frames_THWC.shape}
    _send(connection, {"clip": facts})
    connection.send_bytes(clip.frames_THWC.tobytes())


def _send(connection: Connection, answer: dict[str, Any]) -> None:
    connection.send_bytes(json.dumps(answer).encode())


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the caller
    torch.set_num_threads(1)
    serve(Connection(int(sys.argv[1])))
