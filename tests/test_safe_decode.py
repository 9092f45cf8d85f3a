"""A file that crashes or hangs the decoder costs one VideoError: decoding in another process."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from tokenizer.common.errors import UserError
from tokenizer.data import safe_decode, video_io
from tokenizer.data.files import bundled_videos
from tokenizer.data.safe_decode import decode_clip_at, decode_clips
from tokenizer.data.video_io import VideoError

# A decoder that dies or sleeps as native code does: no Python exception, signals held back.
STAND_IN = """
import os, signal, time
cpu = lambda index: None
def VideoReader(source, ctx, num_threads):
    if source.endswith("hang.mp4"):
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT, signal.SIGTERM])
        time.sleep(600)
    os.kill(os.getpid(), signal.SIGSEGV)
"""


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("safe") / "two words.mp4"
    video_io.write_video(path, np.random.default_rng(0).integers(0, 256, (40, 32, 48, 3), np.uint8), fps=10)
    return path


@pytest.fixture
def stand_in_decord(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Processes started in here find the stand-in under the name decord."""
    (tmp_path / "decord.py").write_text(STAND_IN)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    safe_decode.stop_idle_workers()
    yield
    safe_decode.stop_idle_workers()


def idle_pids() -> list[int]:
    return [worker.pid for worker in safe_decode._idle.get(os.getpid(), [])]


def test_the_same_clips_as_in_this_process_by_one_reused_worker(video: Path) -> None:
    idle_before = len(idle_pids())  # left by other tests
    for path, options in ((video, {"all_clips": True}), (bundled_videos("train")[0].path, {"fps": 3.0, "size": 64})):
        ours, theirs = list(video_io.iter_clips(path, **options)), list(decode_clips(path, **options))
        assert len(ours) == len(theirs) > 0
        for one, other in zip(ours, theirs, strict=True):
            assert (one.start, one.num_padded, one.fps) == (other.start, other.num_padded, other.fps)
            np.testing.assert_array_equal(one.frames_THWC, other.frames_THWC)
            assert other.frames_THWC.flags.writeable
    one, other = video_io.read_clip_at(video, 0.5, 8), decode_clip_at(video, 0.5, 8)
    np.testing.assert_array_equal(one.frames_THWC, other.frames_THWC)
    assert len(idle_pids()) == max(1, idle_before)


def test_a_reader_left_in_the_middle_and_two_at_once_do_not_mix(video: Path) -> None:
    with contextlib.closing(decode_clips(video, 8, 32, all_clips=True)) as left:
        next(left)
    pairs = zip(decode_clips(video, 8, 32, all_clips=True), decode_clips(video, 8, 32, all_clips=True), strict=True)
    assert [(a.start, b.start) for a, b in pairs] == [(s, s) for s in range(0, 40, 8)]


def test_errors_come_across_with_file_and_reason(video: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.mp4").touch()
    with pytest.raises(VideoError, match=r"empty.mp4: is empty \(zero bytes\)") as caught:
        list(decode_clips(tmp_path / "empty.mp4"))
    assert caught.value.path == tmp_path / "empty.mp4"
    with pytest.raises(UserError, match="choose one of pyav, decord") as caught_too:
        list(decode_clips(video, backend="gstreamer"))
    assert not isinstance(caught_too.value, VideoError)
    raw_name = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.mp4"))
    raw_name.write_bytes(video.read_bytes())
    assert next(decode_clips(raw_name, 16, 32)).num_padded == 0


@pytest.mark.usefixtures("stand_in_decord")
def test_crash_and_hang_end_only_the_worker(tmp_path: Path, video: Path) -> None:
    for name in ("crash.mp4", "hang.mp4"):
        (tmp_path / name).write_bytes(video.read_bytes())
    with pytest.raises(VideoError, match="crash.mp4: the decoder crashed on it .signal SIGSEGV."):
        list(decode_clips(tmp_path / "crash.mp4", backend="decord"))
    assert idle_pids() == []
    next(decode_clips(video))  # the next worker, warm, so that the limit below is all for decoding
    (before,) = idle_pids()
    with pytest.raises(VideoError, match=r"hang.mp4: the decoder hangs \(no picture within 1.5 s\)"):
        decode_clip_at(tmp_path / "hang.mp4", 0.0, backend="decord", time_limit_s=1.5)
    with pytest.raises(ProcessLookupError):
        os.kill(before, 0)
    assert next(decode_clips(video, 16, 32)).start == 0


SLOW = """
import time
import numpy as np
cpu = lambda index: None
class Frame:
    def asnumpy(self):
        return np.zeros((16, 16, 3), np.uint8)
class VideoReader:
    def __init__(self, *args, **kwargs): pass
    def __len__(self): return 8
    def get_avg_fps(self): return 10.0
    def get_frame_timestamp(self, indices): return np.arange(8)[:, None] / 10
    def __getitem__(self, index):
        time.sleep(0.7)
        return Frame()
"""


@pytest.mark.parametrize(
    ("states", "polls", "expected"),
    [
        ([(True, 1.0), (True, 1.1), (True, 1.2)], [False, False, True], True),  # others have the CPU
        ([(True, 1.0), (False, 1.0)], [False], False),  # it waits: a disk that does not answer
        ([(True, 1.0), (True, 61.0)], [False], False),  # it computes and comes to nothing
        ([(True, 1.0)] * 99, [False] * 99, False),
    ],
)
def test_a_machine_that_is_busy_makes_no_hang(
    monkeypatch: pytest.MonkeyPatch, states: list[tuple[bool, float]], polls: list[bool], expected: bool
) -> None:
    seen, answers = iter(states), iter(polls)
    monkeypatch.setattr(safe_decode, "_ready_and_seconds", lambda pid: next(seen))
    worker = SimpleNamespace(pid=1, _connection=SimpleNamespace(poll=lambda limit: next(answers)))
    assert safe_decode._Worker._has_answer(worker, 60.0) is expected


def test_a_slow_file_is_no_hang(tmp_path: Path, video: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """8 pictures of 0.7 s each within a limit of 3 s: the limit is for one picture."""
    (tmp_path / "decord.py").write_text(SLOW)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    safe_decode.stop_idle_workers()
    next(decode_clips(video))  # a warm worker
    (clip,) = decode_clips(video, 8, 16, backend="decord", time_limit_s=3.0)
    assert clip.frames_THWC.shape == (8, 16, 16, 3)
    safe_decode.stop_idle_workers()


def test_a_defect_of_the_program_is_not_blamed_on_the_file(
    tmp_path: Path, video: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "decord.py").write_text(
        "def VideoReader(*args, **kwargs): raise TypeError('an unknown keyword')\ncpu = int"
    )
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    safe_decode.stop_idle_workers()
    with pytest.raises(RuntimeError, match="defect in the decoding process(?s:.*)an unknown keyword"):
        list(decode_clips(video, backend="decord"))
    safe_decode.stop_idle_workers()
    monkeypatch.setattr("tokenizer.data.readers.PyAvReader.pictures", lambda self, first=0: self.no_such_method())
    with pytest.raises(AttributeError, match="no_such_method"):
        next(video_io.iter_clips(video))


def test_the_worker_imports_nothing_from_the_current_folder_and_no_torch(
    tmp_path: Path, video: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("random.py", "tokenizer.py", "torch.py", "av.py"):
        (tmp_path / name).write_text("raise SystemExit('shadowed')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", "")
    safe_decode.stop_idle_workers()
    assert next(decode_clips(video, 16, 32)).num_padded == 0
    (pid,) = idle_pids()
    assert "libtorch" not in Path(f"/proc/{pid}/maps").read_text()
