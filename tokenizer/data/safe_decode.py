"""Decode files that nobody vouches for: in a process of its own, with a time limit, so that only that process can die.

A native decoder can crash or hang where no Python exception or time-out reaches it. Here that is one more VideoError.
The process is long-lived and reused from file to file (starting one takes seconds, a clip some milliseconds); it is an
ordinary subprocess, so it works in scripts without a `__main__` guard and inside the workers of a DataLoader.

Work on a long stream with a few threads, in order, with a bounded number of items in flight.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing.connection import Connection
from typing import Any, TypeVar

import numpy as np

from tokenizer.common.errors import UserError
from tokenizer.data.readers import VideoError
from tokenizer.data.video_io import DecodedClip

A = TypeVar("A")
B = TypeVar("B")


def map_ahead(work: Callable[[A], B], items: Iterable[A], num_threads: int) -> Iterator[B]:
    """`work(item)` of every item, in their order; `num_threads` run at once and twice as many wait at most.

    Threads are enough where the work waits for another process or for a codec. An exception ends the stream.
    """
    with ThreadPoolExecutor(num_threads) as pool:
        waiting: deque[Future[B]] = deque()
        try:
            for item in items:
                waiting.append(pool.submit(work, item))
                if len(waiting) >= 2 * num_threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


TIME_LIMIT_S = 60.0  # for one clip
_START_LIMIT_S = 300.0  # importing torch on a busy machine


def decode_clips(
    path: str | os.PathLike[str],
    num_frames: int = 16,
    size: int | None = 128,
    fps: float | None = None,
    all_clips: bool = False,
    backend: str = "pyav",
    time_limit_s: float = TIME_LIMIT_S,
) -> Generator[DecodedClip, None, int]:
    """`video_io.iter_clips` in another process. A crash, or a clip that takes longer than the limit: VideoError."""
    arguments = {"num_frames": num_frames, "size": size, "fps": fps, "all_clips": all_clips, "backend": backend}
    return _stream("iter_clips", path, arguments, time_limit_s)


def decode_clip_at(
    path: str | os.PathLike[str],
    position: float,
    num_frames: int = 16,
    size: int | None = None,
    fps: float | None = None,
    backend: str = "pyav",
    time_limit_s: float = TIME_LIMIT_S,
) -> DecodedClip:
    """`video_io.read_clip_at` in another process. A crash, or longer than the limit: VideoError."""
    arguments = {"position": position, "num_frames": num_frames, "size": size, "fps": fps, "backend": backend}
    clips = _stream("read_clip_at", path, arguments, time_limit_s)
    with contextlib.closing(clips):
        return next(clips)


def _stream(
    reader: str, path: str | os.PathLike[str], arguments: dict[str, Any], time_limit_s: float
) -> Generator[DecodedClip, None, int]:
    worker = _take_worker()
    request: list[Any] = ["open", reader, os.fspath(path), arguments, time_limit_s]
    try:
        while True:
            answer = worker.ask(path, request, time_limit_s)
            if isinstance(answer, int):
                return answer
            yield answer
            request = ["next", time_limit_s]
    finally:
        if worker.alive:  # a reader that was left in the middle is dropped by the next "open"
            _idle.setdefault(os.getpid(), []).append(worker)


class _Worker:
    """One decoding process and our end of the line to it."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tokenizer.data.decode_worker", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
            )
        self._connection = Connection(ours.detach())
        self.pid = self._process.pid
        self.alive = True
        try:
            started = self._connection.poll(_START_LIMIT_S) and self._connection.recv_bytes() == b"ready"
        except (EOFError, OSError):
            started = False
        if not started:
            code = self.stop(kill=True)
            raise UserError(f"the decoding process did not start (exit code {code}); its own message is above")

    def ask(self, path: str | os.PathLike[str], request: list[Any], time_limit_s: float) -> DecodedClip | int:
        """Send one request and wait for its clip; at the end of the file, the frames that were too few for another."""
        try:
            self._connection.send_bytes(json.dumps(request).encode())
            if not self._connection.poll(time_limit_s):
                raise VideoError(path, f"the decoder hangs (no clip within {time_limit_s:g} s); it was ended")
            answer = json.loads(self._connection.recv_bytes())
            if "clip" in answer:
                shape = answer["clip"].pop("shape")
                frames_THWC = np.frombuffer(bytearray(self._connection.recv_bytes()), np.uint8).reshape(shape)
                return DecodedClip(frames_THWC=frames_THWC, **answer["clip"])
        except (EOFError, OSError) as error:
            raise VideoError(path, f"the decoder crashed on it ({_how_it_ended(self.stop(kill=True))})") from error
        except BaseException:  # interrupted in the middle of an exchange: the line is out of step, nobody may reuse it
            self.stop(kill=True)
            raise
        if "error" in answer:
            raise VideoError(path, answer["error"]) if answer["file"] else UserError(answer["error"])
        return int(answer["end"])

    def stop(self, kill: bool = False) -> int:
        """Hang up (the process then leaves by itself) or kill; returns the exit code."""
        self.alive = False
        self._connection.close()
        if kill:
            with contextlib.suppress(subprocess.TimeoutExpired):  # a crash keeps its own exit code if it is quick
                return self._process.wait(timeout=1)
            self._process.kill()
        return self._process.wait()


# Idle workers by process id: a forked DataLoader worker inherits the dict but must not talk on its parent's line.
_idle: dict[int, list[_Worker]] = {}


def _take_worker() -> _Worker:
    idle = _idle.get(os.getpid())
    return idle.pop() if idle else _Worker()


@atexit.register
def stop_idle_workers() -> None:
    """End the waiting processes of this one; the next file starts a new one."""
    for worker in _idle.pop(os.getpid(), []):
        worker.stop()


def _how_it_ended(code: int) -> str:
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
