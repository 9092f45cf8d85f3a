"""The decoding process that `safe_decode.py` starts. It imports no torch, so it starts in a fraction of a second.

A request is JSON: ["open", verb, path, arguments, seconds] or ["next", seconds]. The answer to either is a row of JSON
messages, each a sign of progress:

    {"beat": true}                        a packet was read or a picture decoded; at most one a second
    {"picture": shape, "shown": [H, W], "times": n}   and then the raw RGB of one picture of the clip
    {"clip": facts}                       the clip is complete; ["next", seconds] asks for another
    {"end": facts}  {"value": any}        the file is at its end; the answer to a question about it
    {"error": reason, "file": bool}       a UserError, and whether it is about the file
    {"bug": traceback}                    a defect of the program, never of the file

Nothing is pickled, so a decoder that a hostile file has taken over cannot reach the caller's process that way.
"""

from __future__ import annotations

import json
import signal
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from tokenizer.common.errors import UserError
from tokenizer.data.cutting import ClipEvents, Place, Shown, clip_at_events, clip_events, picture_timing, video_events
from tokenizer.data.files import Span, VideoError, fingerprint

_BEAT_EVERY_S = 0.5


class _Server:
    """Answers the requests that come over one connection."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._seconds, self._last = 60.0, 0.0
        self._events: ClipEvents | None = None

    def serve(self) -> None:
        """Answer until the other end is closed."""
        self._connection.send_bytes(b"ready")
        while True:
            try:
                verb, *rest = json.loads(self._connection.recv_bytes())
            except EOFError:
                return
            self._seconds = rest[-1]
            self._rearm()
            try:
                if verb == "open":
                    self._open(*rest[:-1])
                self._answer()
            except VideoError as error:
                self._send({"error": error.reason, "file": True})
            except UserError as error:
                self._send({"error": str(error), "file": False})
            except Exception:
                self._send({"bug": traceback.format_exc()})
            signal.setitimer(signal.ITIMER_REAL, 0)

    def _open(self, verb: str, path: str, arguments: dict[str, Any]) -> None:
        if self._events is not None:
            self._events.close()
            self._events = None
        span = Span(*arguments["span"]) if arguments.get("span") else None
        if verb == "clips":
            self._events = clip_events(path, **{**arguments, "span": span}, beat=self._beat)
        elif verb == "video":
            self._events = video_events(path, **arguments, beat=self._beat)
        elif verb == "clip_at":
            place = Place(*arguments["place"])
            self._events = clip_at_events(path, **{**arguments, "span": span, "place": place}, beat=self._beat)
        else:
            questions: dict[str, Callable[[], Any]] = {
                "fingerprint": lambda: fingerprint(path, span),
                "timing": lambda: picture_timing(path, self._beat),
            }
            self._send({"value": questions[verb]()})

    def _answer(self) -> None:
        """Send events up to the end of a clip or of the file."""
        while self._events is not None:
            try:
                event = next(self._events)
            except StopIteration as end:
                self._send({"end": end.value})
                return
            if not isinstance(event, Shown):
                self._send({"clip": event})
                return
            image_HWC, height, width = event.image
            self._send({"picture": image_HWC.shape, "shown": [height, width], "times": event.times})
            self._connection.send_bytes(image_HWC.reshape(-1).data)

    def _beat(self) -> None:
        if time.monotonic() - self._last > _BEAT_EVERY_S:
            self._send({"beat": True})

    def _send(self, answer: dict[str, Any]) -> None:
        self._rearm()
        self._connection.send_bytes(json.dumps(answer).encode())
        self._last = time.monotonic()

    def _rearm(self) -> None:
        # If the caller is killed while a decoder hangs, the kernel ends this process: nothing is left behind.
        signal.setitimer(signal.ITIMER_REAL, 2 * self._seconds)


def main(descriptor: int) -> None:
    """Serve over the given end of a socket pair."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the caller
    _Server(Connection(descriptor)).serve()
