"""Decode untrusted files in a separate process with a time limit, so a crash or a hang costs one clip.

A native decoder can crash or hang beyond the reach of Python's exceptions and time-outs; here that is a VideoError. The
time limit is for one picture, not for a clip: a slow file is no hang. The process is long-lived and reused from file to
file; it is an ordinary subprocess, so it works in scripts without a `__main__` guard and inside the workers of a
DataLoader. `work_units.map_ahead` keeps several of them busy.
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
from collections.abc import Generator, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from tokenizer.common.clip_shape import Size
from tokenizer.common.errors import UserError
from tokenizer.data.cutting import ClipEvents, ClipFacts, Event, Place, Shown, StreamEnd, Timing
from tokenizer.data.display import Image
from tokenizer.data.files import Span, VideoError
from tokenizer.data.video_io import DecodedClip, assemble

TIME_LIMIT_S = 60.0  # without a sign of progress
_RESPITES = 10  # limits in a row that pass while other processes have the CPU
_START_LIMIT_S = 120.0  # a busy machine
_ROOT = str(Path(__file__).parents[2])
# -P: the current folder is not searched, where a file `random.py` of the user's would take the place of Python's own
_START = """
import sys
sys.path.insert(0, sys.argv[1])
from tokenizer.data.decode_worker import main
main(int(sys.argv[2]))
"""


def decode_clips(
    path: str | os.PathLike[str],
    num_frames: int = 16,
    size: Size | None = 128,
    fps: float | None = None,
    all_clips: bool = False,
    backend: str = "pyav",
    time_limit_s: float = TIME_LIMIT_S,
) -> Generator[DecodedClip, None, StreamEnd]:
    """`video_io.iter_clips` in another process. A crash, or no picture within the limit: VideoError."""
    arguments = {"num_frames": num_frames, "fps": fps, "all_clips": all_clips, "backend": backend}
    return assemble(path, _events("clips", path, arguments, time_limit_s), num_frames, size)


def decode_video(
    path: str | os.PathLike[str],
    num_frames: int = 16,
    size: Size | None = 128,
    fps: float | None = None,
    backend: str = "pyav",
    skip: int = 0,
    time_limit_s: float = TIME_LIMIT_S,
) -> Generator[DecodedClip, None, StreamEnd]:
    """`video_io.iter_video` in another process. A crash, or no picture within the limit: VideoError."""
    arguments = {"num_frames": num_frames, "fps": fps, "backend": backend, "skip": skip}
    return assemble(path, _events("video", path, arguments, time_limit_s), num_frames, size)


def decode_clip_at(
    path: str | os.PathLike[str],
    position: float,
    num_frames: int = 16,
    size: Size | None = None,
    fps: float | None = None,
    backend: str = "pyav",
    time_limit_s: float = TIME_LIMIT_S,
    any_phase: bool = False,
    span: Span | None = None,
    start: int | None = None,
) -> DecodedClip:
    """`video_io.read_clip_at`, or with a start `read_clip`, in another process.

    A crash, or no picture within the limit: VideoError.
    """
    place = Place(start, position, any_phase)
    arguments = {"place": place, "num_frames": num_frames, "fps": fps, "backend": backend, "span": span}
    clips = assemble(path, _events("clip_at", path, arguments, time_limit_s), num_frames, size)
    with contextlib.closing(clips):
        return next(clips)


def fingerprint_of(path: str | os.PathLike[str], span: Span | None = None) -> str:
    """`files.fingerprint` in another process: a disk that does not answer costs one file. VideoError if it fails."""
    return _ask("fingerprint", path, {"span": span})


def timing_of(path: str | os.PathLike[str]) -> Timing | None:
    """`cutting.picture_timing` in another process."""
    answer = _ask("timing", path, {})
    return None if answer is None else Timing(tuple(answer[0]), tuple(answer[1]), answer[2])


def _ask(verb: str, path: str | os.PathLike[str], arguments: dict[str, Any]) -> Any:
    """The answer to one question about a file."""
    worker = _take_worker()
    try:
        worker.send(path, ["open", verb, os.fspath(path), arguments, TIME_LIMIT_S])
        answer = worker.receive(path, TIME_LIMIT_S)
        return answer["value"]
    finally:
        _give_back(worker)


def _events(verb: str, path: str | os.PathLike[str], arguments: dict[str, Any], time_limit_s: float) -> ClipEvents:
    """The events of `cutting.py` from another process."""
    worker = _take_worker()
    request: list[Any] = ["open", verb, os.fspath(path), arguments, time_limit_s]
    between_clips = True
    try:
        while True:
            if between_clips:
                worker.send(path, request)
                between_clips, request = False, ["next", time_limit_s]
            answer = worker.receive(path, time_limit_s)
            if "end" in answer:
                between_clips = True
                num_left, notes = answer["end"]
                return StreamEnd(num_left, tuple(notes))
            event: Event
            if "clip" in answer:
                start, fps, notes, seconds = answer["clip"]
                event, between_clips = ClipFacts(start, fps, tuple(notes), tuple(seconds)), True
            else:
                event = Shown(Image(answer["rgb"], *answer["shown"]), answer["times"])
            yield event
    except UserError:
        between_clips = True  # an error ends the answer
        raise
    finally:
        if worker.alive and not between_clips:  # left in the middle: the line is out of step, nobody may reuse it
            worker.stop(kill=True)
        _give_back(worker)


class _Worker:
    """One decoding process and our end of the line to it."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        path = os.pathsep.join(p for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p not in ("", "."))
        one_thread = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": path}
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-c", _START, _ROOT, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                env={**os.environ, **one_thread},
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

    def send(self, path: str | os.PathLike[str], request: list[Any]) -> None:
        with self._guarded(path):
            self._connection.send_bytes(json.dumps(request).encode())

    def receive(self, path: str | os.PathLike[str], time_limit_s: float) -> dict[str, Any]:
        """The next message but beats; a picture has its pixels as "rgb", uint8 [H, W, C]."""
        with self._guarded(path):
            answer = {"beat": True}
            while "beat" in answer:
                if not self._has_answer(time_limit_s):
                    raise TimeoutError(f"{time_limit_s:g} s")
                answer = json.loads(self._connection.recv_bytes())
            if "picture" in answer:
                rgb_HWC = np.empty(answer["picture"], np.uint8)
                self._connection.recv_bytes_into(rgb_HWC.reshape(-1).data)
                return {**answer, "rgb": rgb_HWC}
        if "error" in answer:
            raise VideoError(path, str(answer["error"])) if answer["file"] else UserError(answer["error"])
        if "bug" in answer:
            raise RuntimeError(f"defect in the decoding process, not in {os.fspath(path)!r}:\n{answer['bug']}")
        return answer

    def _has_answer(self, time_limit_s: float) -> bool:
        """Whether an answer comes within the limit, in which a process that others keep from computing has a respite.

        Such a one is ready to run and has used less CPU time than the limit; a decoder that hangs waits or has used it.
        """
        before = _ready_and_seconds(self.pid)[1]
        for _ in range(_RESPITES):
            if self._connection.poll(time_limit_s):
                return True
            is_ready, seconds = _ready_and_seconds(self.pid)
            if not is_ready or seconds - before >= time_limit_s / 2:
                return False
        return False

    @contextlib.contextmanager
    def _guarded(self, path: str | os.PathLike[str]) -> Iterator[None]:
        """Whatever goes wrong with the line ends the process."""
        try:
            yield
        except TimeoutError as limit:
            self.stop(kill=True)
            reason = f"the decoder hangs (no picture within {limit}); it was ended"
            raise VideoError(path, reason) from limit
        except (EOFError, OSError) as error:
            code = self.stop(kill=True)
            end = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
            raise VideoError(path, f"the decoder crashed on it ({end})") from error
        except BaseException:  # interrupted in the middle of an exchange: the line is out of step, nobody may reuse it
            self.stop(kill=True)
            raise

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


def _give_back(worker: _Worker) -> None:
    """Keep a worker for the next file; a reader that was left between clips is dropped by the next "open"."""
    if worker.alive:
        _idle.setdefault(os.getpid(), []).append(worker)


@atexit.register
def stop_idle_workers() -> None:
    """End the waiting processes of this one; the next file starts a new one."""
    for worker in _idle.pop(os.getpid(), []):
        worker.stop()


def _ready_and_seconds(pid: int) -> tuple[bool, float]:
    """Whether a process computes or is ready to, and its CPU seconds so far; (False, 0) without /proc."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as stat:
            fields = stat.read().rpartition(")")[2].split()
    except OSError:
        return False, 0.0
    return fields[0] == "R", (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
