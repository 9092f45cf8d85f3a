"""Reading clips: prepared copies against source videos, the time that training waits, and ten million videos.

    python scripts/bench/data.py [--quick] [--only prepared,read,wait,index]

prepared  a random clip of 16x128x128 from a source mp4 (10 s of 1280x720 at 30 frames a second, x264 defaults) over the
          same from the copy that `tokenizer.data.prepare` makes. CPU time of the thread. Goal: 10.
read      the bytes of the source mp4 over those that one random clip of it reads. Goal: 3.
wait      share of its time that a shortened run of configs/mini/proxy.yaml waits for batches, 2 workers on prepared
          clips, by the run's own log, without the first steps. Wall time: on a busy machine an upper bound.
          Goal: at most 0.02.
index     a manifest of 10 million videos (paths of 38 bytes, 600 classes), opened twice: the first process builds the
          index beside it, later ones map it. A forked worker then looks up name, label and file of 100,000 clips in
          the order of an epoch. 854 bytes, which one object a video took, over the bytes a video takes. Goal: 12.
"""

from __future__ import annotations

import json
import multiprocessing
import pickle
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from timeit import timeit

import numpy as np
import torch
from _bench import Part, run_parts, thread_seconds

from tokenizer.common.config import load_config
from tokenizer.common.device import epoch_order
from tokenizer.data.clips import ClipDataset, DataConfig, build_dataset
from tokenizer.data.files import bundled_videos
from tokenizer.data.prepare import PrepareRule, prepare, prepare_video
from tokenizer.data.video_io import iter_clips, read_clip_at, resize, write_video
from tokenizer.data.video_table import ManifestRow, write_rows
from tokenizer.train import TokenizerTrainConfig, TokenizerTraining

HEIGHT, WIDTH, FPS, NUM_CLIPS = 720, 1280, 30, 19  # 304 frames: ten seconds
WORKERS, WARM_UP = 2, 3
BYTES_OF_AN_OBJECT, LOOKED_UP = 854, 100_000
CONFIG = Path(__file__).parents[2] / "configs" / "mini" / "proxy.yaml"


def main() -> None:
    parts = {"prepared": prepared, "read": read, "wait": wait, "index": index}
    run_parts("reading clips", "Prepared against source videos; waiting for data; many videos.", parts)


def prepared(quick: bool) -> Part:
    num_draws, num_rounds = (4, 2) if quick else (16, 3)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        source, copy = Path(folder, "source.mp4"), Path(folder, "copy.mp4")
        _write_source(source)
        prepare_video(source, copy, PrepareRule())
        positions = np.random.default_rng(0).random(num_draws)
        rounds = [[_clip_ms(path, positions) for path in (source, copy)] for _ in range(num_rounds)]
        sizes = [path.stat().st_size for path in (source, copy)]
    source_ms, copy_ms = np.min(rounds, axis=0)
    facts = {
        "source_ms": round(source_ms, 2),
        "prepared_ms": round(copy_ms, 2),
        "source_bytes": sizes[0],
        "prepared_bytes": sizes[1],
    }
    return Part(float(source_ms / copy_ms), 10.0, facts=facts)


def _write_source(path: Path) -> None:
    """One video of many scenes, enlarged from the bundled clips."""
    videos = bundled_videos("train")[:NUM_CLIPS]
    clips = [next(iter_clips(video.path, size=None)).frames_THWC for video in videos]
    write_video(path, np.concatenate([resize(clip[:, :72], HEIGHT, WIDTH) for clip in clips]), FPS)


def _clip_ms(path: Path, positions: np.ndarray) -> float:
    """Mean CPU milliseconds of one random clip."""
    return thread_seconds(lambda: [read_clip_at(path, at, size=128) for at in positions]) / len(positions) * 1000


def read(quick: bool) -> Part:
    num_draws = 4 if quick else 16
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "source.mp4")
        _write_source(source)
        size, before = source.stat().st_size, _bytes_read()
        for position in np.random.default_rng(0).random(num_draws):
            read_clip_at(source, position, size=128)
        a_clip = (_bytes_read() - before) / num_draws
    return Part(size / a_clip, 3.0, facts={"file_bytes": size, "bytes_a_clip": round(a_clip)})


def _bytes_read() -> int:
    """By this process so far, from the disk or the page cache."""
    return int(Path("/proc/self/io").read_text().split("rchar:")[1].split()[0])


def wait(quick: bool) -> Part:
    num_steps, num_videos = (8, 8) if quick else (30, 32)
    with tempfile.TemporaryDirectory() as folder:
        manifest = _prepared_manifest(Path(folder), num_videos)
        steps = _logged_steps(Path(folder, "run"), manifest, WARM_UP + num_steps)[WARM_UP:]
    whole = sum(step["seconds"] for step in steps)
    waited = [step["seconds"] * step["data_wait"] for step in steps]
    facts = {
        "step_seconds": round(whole / num_steps, 4),
        "longest_wait_seconds": round(max(waited), 4),
        "num_steps": num_steps,
    }
    return Part(sum(waited) / whole, 0.02, at_least=False, facts=facts)


def _prepared_manifest(folder: Path, num_videos: int) -> Path:
    """The manifest of prepared copies of the first bundled training clips."""
    source = folder / "source.csv"
    write_rows(source, (ManifestRow(str(video.path), "") for video in bundled_videos("train")[:num_videos]))
    prepare(source, folder / "prepared", PrepareRule(), WORKERS)
    return folder / "prepared" / "manifest.csv"


def _logged_steps(folder: Path, manifest: Path, num_steps: int) -> list[dict[str, float]]:
    """Run so many steps; the log lines of the steps, without the final validation."""
    settings = [f"data.sources=[{manifest}]", "data.repeat=[]", f"run.num_workers={WORKERS}", "run.num_threads=1"]
    settings += ["val_data.sources=[bundled:heldout]", "val_clips=1", f"run.dir={folder}", f"run.steps={num_steps}"]
    settings += ["run.device=cpu", "run.reference=''", "run.log_every=1"]
    settings += ["run.validate_every=100000", "run.checkpoint_every=100000"]
    TokenizerTraining(load_config(TokenizerTrainConfig, CONFIG, settings)).fit()
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [line for line in lines if "data_wait" in line]


def index(quick: bool) -> Part:
    num_rows = 1_000_000 if quick else 10_000_000
    with tempfile.TemporaryDirectory() as folder:
        manifest = Path(folder, "videos.csv")
        with open(manifest, "w", encoding="utf-8") as file:
            file.write("path,label\n")
            file.writelines(
                f"train/class_{i % 600:03d}/clip_{i:08d}_{i:05d}.mp4,class {i % 600}\n" for i in range(num_rows)
            )
        build_s = timeit(lambda: build_dataset(DataConfig([str(manifest)])), number=1)
        start_s = timeit(lambda: build_dataset(DataConfig([str(manifest)])), number=1)
        num_bytes = sum(file.stat().st_size for file in Path(folder).glob(".videos.csv.index-*/*.npy"))
        dataset = build_dataset(DataConfig([str(manifest)]))
        order = epoch_order(num_rows, seed=0, epoch=0)
        context = multiprocessing.get_context("fork")
        ours, theirs = context.Pipe()
        worker = context.Process(target=_look_up, args=(dataset, order[:LOOKED_UP], theirs))
        worker.start()
        private_bytes, seconds = ours.recv()
        worker.join()
    facts = {
        "rows": num_rows,
        "bytes_a_row": round(num_bytes / num_rows, 1),
        "first_start_s": round(build_s, 2),
        "later_start_s": round(start_s, 3),
        "order_bytes_a_row": order.itemsize,
        "pickled_bytes": len(pickle.dumps(dataset)),
        "worker_private_mib": round(private_bytes / 2**20, 1),
        "lookup_us": round(seconds / LOOKED_UP * 1e6, 1),
    }
    return Part(BYTES_OF_AN_OBJECT / (num_bytes / num_rows), 12.0, facts=facts)


def _look_up(dataset: ClipDataset, order: np.ndarray, line: Connection) -> None:
    """Send by how many bytes the private memory of this process grows, and the seconds that all clips took."""
    names, labels, before, begin = dataset.names, dataset.labels, _private_bytes(), time.perf_counter()
    for number in order.tolist():
        assert names[number] and labels[number] and dataset.file(number)
    line.send((_private_bytes() - before, time.perf_counter() - begin))


def _private_bytes() -> int:
    return int(Path("/proc/self/smaps_rollup").read_text().split("Private_Dirty:")[1].split()[0]) * 1024


if __name__ == "__main__":
    main()
