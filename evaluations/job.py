"""Shared by the three evaluation commands: flags, the stream of clips from list to shards, and the results.

A process scores one stream: clips are read ahead by `--num-workers` readers, the system draws them as it needs them,
and frames are decoded and scored in a thread beside it. Batches have a fixed size and
are cut from the list, so no figure depends on shards or processes.

Letters: T frames, H W rows and columns, C colours, F numbers in a feature.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from evaluations.clip_list import ClipList, list_clips
from evaluations.given_clips import GivenClips
from evaluations.protocols import Protocol, card_of, card_text, find_protocol
from evaluations.scoring import Scorer, load_scorer, trained_as
from evaluations.shards import RealCache, Record, Scored, ShardFolder
from evaluations.summary import per_clip_table, pick_shown, result_lines, summarise
from evaluations.system import Draft, Made, Source, System, in_batches
from tokenizer.common.clip_shape import check_same_shape, size_text
from tokenizer.common.device import batches_at_once, float32_mode, pick_device
from tokenizer.common.distributed import several_processes
from tokenizer.common.errors import UserError
from tokenizer.common.work_units import map_ahead, progress_bar
from tokenizer.data.video_io import VideoError
from tokenizer.model import VideoTokenizer
from tokenizer.router.results import versions
from tokenizer.viz.frames import filmstrip

_MOST_UNSCORED = 9  # batches that are scored or wait for it


class Evaluation:
    """One protocol, one system, one folder."""

    def __init__(self, args: argparse.Namespace, task: str) -> None:
        """Raises UserError if protocol, data or the weights of a metric are missing."""
        fields = {
            name: getattr(args, name) for name in ("extractor", "perceptual", "count", "draws", "num_frames", "size")
        }
        self.protocol: Protocol = find_protocol(args.protocol, task).change(**fields)
        self.args, self.device = args, pick_device(args.device)
        if args.overwrite and several_processes():
            raise UserError("--overwrite with several processes: remove the folder yourself, then start them")
        self.cache = Path(args.cache)
        self.clips: ClipList = list_clips(self.protocol, args.data, self.cache, args.num_workers)
        batch_size = args.batch_size or (1 if self.device.type == "cpu" else 8)  # more is no faster on a CPU
        self.scorer: Scorer = load_scorer(self.protocol, args, self.device, batch_size)
        self.folder = ShardFolder(args.out, len(self.clips.clips))

    def run(self, system: System, settle: Callable[[Path], None] | None = None) -> None:
        """Score clips until no shard is free; the process that completes the last one writes the results.

        settle: computes what the whole set decides, and keeps it in the folder for other processes and later runs.
        """
        which = {"list_sha256": self.clips.sha256, "files_sha256": self.clips.files_sha256}
        facts = {"protocol_hash": self.protocol.hash, **which, **self.scorer.facts()}
        self.folder.start({**facts, "system": system.facts()}, self.args.overwrite)
        if settle is not None:
            settle(self.folder.folder)
        card = card_of(
            self.protocol,
            list=self.clips.facts(),
            **self.scorer.facts(),
            system=system.facts(),
            trained_as=self._trained_as(),
            device=str(self.device),
            float32=float32_mode(),
            code=code_version(),
        )
        print(card_text(card), flush=True)
        kept = self._real_cache()
        known = kept.load()
        done, total = self.folder.num_scored(), len(self.clips.clips)
        with progress_bar(desc="scoring", initial=done, total=total, unit="clip") as bar:

            def score(places: Iterator[int]) -> Iterator[Scored]:
                batches = in_batches(self._drafts(system, places, known), self.scorer.batch_size, total)
                threads = batches_at_once(self.device)
                found = map_ahead(lambda batch: self._score(system, batch, known), batches, threads, _MOST_UNSCORED)
                with closing(found):
                    for scored in itertools.chain.from_iterable(found):
                        yield scored
                        bar.update()

            def finish() -> None:
                bar.update(total - bar.n)
                bar.close()
                self._finish(system, card, kept)

            if not self.folder.work(score, finish):
                bar.close()
                print(f"no shard is free; others are at work in {self.folder.folder}, the last writes the results")

    def run_ours(self) -> bool:
        """Score the clips of --ours, if it is given. UserError if a model is given too."""
        if self.args.ours is None:
            return False
        for name in ("vq_ckpt", "tok_config", "router_ckpt", "router_config", "gpt_ckpt", "gpt_model"):
            if vars(self.args).get(name) is not None:
                flag = name.replace("_", "-")
                raise UserError(f"--ours scores existing clips: leave out --{flag} or --ours")
        self.run(GivenClips(self.args.ours, self.clips, self.protocol, self.args.force))
        return True

    def _trained_as(self) -> dict[str, Any]:
        """Which training runs made the weights, read from the weights themselves; nothing for given clips."""
        given = {"tokenizer": self.args.vq_ckpt, "gpt": vars(self.args).get("gpt_ckpt")}
        return {name: trained_as(path) for name, path in given.items() if path}

    def _drafts(self, system: System, places: Iterable[int], known: dict[int, Tensor]) -> Iterator[Draft]:
        """The system's drafts, in any order; a clip that cannot be read bypasses the system."""
        failed: list[Draft] = []

        def readable(sources: Iterable[Source]) -> Iterator[Source]:
            for source in sources:
                if source.error is None:
                    yield source
                else:
                    failed.append(Draft(source, skipped=source.error))

        sources = map_ahead(lambda place: self._read(place, known), places, self.args.num_workers)
        for draft in system.stream(readable(sources)):
            yield draft
            while failed:
                yield failed.pop()
        yield from failed

    def _read(self, place: int, known: dict[int, Tensor]) -> Source:
        """A clip with its own frames, if anything is made from them or compared with them."""
        clip = self.clips.clips[place]
        if not self.protocol.paired and (place in known or self.scorer.extractor is None):
            return Source(clip)
        try:
            return Source(clip, clip.read())
        except VideoError as error:
            return Source(clip, error=error.reason)

    @torch.inference_mode()
    def _score(self, system: System, drafts: Sequence[Draft], known: dict[int, Tensor]) -> list[Scored]:
        """The records and features of a batch. Runs in the scoring thread."""
        finished = system.finish([draft for draft in drafts if draft.skipped is None])
        made = {each.source.clip.index: each for each in finished}
        good = [each for each in finished if each.ours_THWC is not None]
        records = {draft.source.clip.index: _record(draft, made) for draft in drafts}
        features: dict[int, dict[str, Tensor]] = {index: {} for index in records}
        ours = [each.ours_THWC for each in good if each.ours_THWC is not None]
        if self.protocol.paired:
            reals = [each.source.real.frames_THWC for each in good if each.source.real]
            for each, scores in zip(good, self.scorer.qualities(reals, ours) if good else [], strict=True):
                records[each.source.clip.index] |= scores
        if self.scorer.extractor:
            unknown = [e.source for e in good if e.source.clip.index not in known]
            reals = [source.real.frames_THWC for source in unknown if source.real]
            for source, feature_F in zip(unknown, self.scorer.features(reals), strict=True):
                features[source.clip.index]["real"] = feature_F
            for each, feature_F in zip(good, self.scorer.features(ours), strict=True):
                index = each.source.clip.index
                features[index]["ours"] = feature_F
                if index in known:
                    features[index]["real"] = known[index]
        return [Scored(records[index], features[index]) for index in records]

    def _finish(self, system: System, card: dict[str, Any], kept: RealCache) -> None:
        records, features = self.folder.read()
        ours, real = features["ours"], features["real"]
        if all("skipped" in record for record in records):
            raise UserError(f"none of the {len(records)} clips could be scored; {records[0]['skipped']}")
        summary = summarise(self.protocol, records, ours, real, self.args.force, self.scorer.extractor)
        summary["notes"] = [*self.protocol.notes, *self.clips.notes, *summary["notes"]]
        self.folder.put("card.json", json.dumps(card, indent=1).encode())
        self.folder.put("card.txt", (card_text(card) + "\n").encode())
        self.folder.put("metrics.json", json.dumps({"card": card, **summary}, indent=1, allow_nan=False).encode())
        self.folder.put("per_clip.csv", per_clip_table(records))
        if len(real[0]):
            kept.save(*real)
        self._draw(system, pick_shown(self.protocol, records, ours, real[1]))
        print("\n".join(result_lines(summary)))
        print(f"results: {self.folder.folder / 'metrics.json'}")

    def _draw(self, system: System, shown: dict[str, int]) -> None:
        """Frames of the best, the median and the worst clip, the real ones above."""
        pictures = self.folder.folder / "pictures"
        pictures.mkdir(exist_ok=True)
        drafts = [draft for draft in self._drafts(system, set(shown.values()), {}) if draft.skipped is None]
        for made in (each for draft in drafts for each in system.finish([draft])):
            clip = made.source.clip
            if made.ours_THWC is None:
                continue
            try:
                real = made.source.real or clip.read()
            except VideoError as error:
                print(f"no picture of {clip.name}: {error.reason}", file=sys.stderr)
                continue
            for place in (place for place, index in shown.items() if index == clip.index):
                filmstrip(real.frames_THWC, made.ours_THWC).save(pictures / f"{place}_{clip.index:06d}.png")

    def _real_cache(self) -> RealCache:
        """The features of the real clips, keyed by the content of the clips and all that affects a feature."""
        extractor, clips = self.scorer.extractor, self.clips
        weights = extractor and [extractor.sha256, self.scorer.batch_size]
        key = json.dumps([self.protocol.real_side_hash, clips.sha256, clips.files_sha256, weights])
        return RealCache(self.cache / f"real-{hashlib.sha256(key.encode()).hexdigest()[:16]}.safetensors")


def _record(draft: Draft, made: dict[int, Made]) -> Record:
    """A clip before it is scored."""
    clip, real = draft.source.clip, draft.source.real
    record: Record = {"index": clip.index, "name": clip.name, "label": clip.label, "start": clip.start}
    found = made.get(clip.index)
    if found is None or found.ours_THWC is None:
        return {**record, "skipped": draft.skipped or (found and found.skipped) or "nothing was made"}
    notes = {"file_notes": list(real.notes)} if real and real.notes else {}
    return record | found.figures | ({"num_padded": real.num_padded} if real and real.num_padded else {}) | notes


def code_version() -> str:
    """The commit of this repository, marked if files differ from it, and the versions of packages."""
    root = Path(__file__).parents[1]
    words = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        found = subprocess.run(words, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        found = "unknown commit"
    return f"{found}, " + ", ".join(f"{name} {version}" for name, version in versions().items())


def token_figures(lengths: Sequence[int]) -> dict[str, Any]:
    return {"lengths": list(lengths), "tokens": sum(lengths), "tokens_with_length_tokens": sum(lengths) + len(lengths)}


def require(args: argparse.Namespace, *names: str) -> None:
    """UserError for flags that are needed if no folder of clips is given."""
    missing = [f"--{name.replace('_', '-')}" for name in names if getattr(args, name) is None]
    if missing:
        raise UserError(f"{', '.join(missing)} missing: give the models, or --ours DIR with lossless clips")


def check_tokenizer(protocol: Protocol, tokenizer: VideoTokenizer) -> None:
    """Raises UserError if the tokenizer reads clips of another shape than the protocol's."""
    name, c = f"protocol {protocol.name}", tokenizer.config
    way_out = (
        f"choose a protocol of its size; evaluations take --num-frames {c.num_frames} --size {size_text(c.size)} too"
    )
    check_same_shape(protocol, name, c, "the tokenizer", way_out)
