"""What the two sampling commands share: flags, models, and the loop from requests to finished files.

Letters: T H W C: frames of a clip.
"""

from __future__ import annotations

import argparse
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from autoregressive.flags import parse_lengths
from autoregressive.presets import TrainedGPT, check_tokenizer_fits, load_gpt, size_name
from autoregressive.sample_folder import SampleFolder
from autoregressive.sample_grid import tokens_of
from autoregressive.sampler import Request, Sample, Sampler, SamplingConfig, cost_of_fp8_cache
from autoregressive.sequence import length_rule, longest_sequence
from tokenizer.common.device import pick_device, pick_dtype
from tokenizer.common.distributed import adopt_slurm
from tokenizer.common.errors import UserError
from tokenizer.common.hub import parameters_by_part
from tokenizer.common.work_units import progress_bar
from tokenizer.data.video_io import display_name, to_uint8
from tokenizer.model import VideoTokenizer
from tokenizer.presets import load_tokenizer
from tokenizer.viz.frames import ShownClip

MOST_IN_GRID = 64  # clips; more are still written, one by one
_MOST_UNWRITTEN = 8  # clips that wait for the disk


@dataclass(frozen=True)
class Wanted:
    """A clip to sample: its name among the results, and the facts for its record."""

    name: str
    request: Request
    record: dict[str, Any]
    fps: float
    real_THWC: np.ndarray | None = None  # uint8 frames to show next to the sample
    num_given: int = 0


@dataclass(frozen=True)
class Process:
    """Which of how many processes this is (RANK, WORLD_SIZE): it makes every `world`-th sample."""

    rank: int = 0
    world: int = 1

    @staticmethod
    def from_environment() -> Process:
        adopt_slurm(os.environ)
        rank, world = (_whole_number(name, default) for name, default in (("RANK", "0"), ("WORLD_SIZE", "1")))
        if rank >= world:
            raise UserError(f"RANK={rank} must be below WORLD_SIZE={world}")
        return Process(rank, world)


class SamplingModels:
    """GPT, tokenizer, and how ids are drawn, from the flags of a command that samples."""

    def __init__(self, args: argparse.Namespace, device: torch.device, guidance: tuple[float, ...]) -> None:
        """Raises UserError if weights are missing or do not belong together, and for lengths that nothing enforces."""
        self.tokenizer: VideoTokenizer = load_tokenizer(args.vq_ckpt, device, args.tok_config)
        self.gpt: TrainedGPT = load_gpt(args.gpt_ckpt, device, args.gpt_model)
        check_tokenizer_fits(self.gpt, self.tokenizer)
        self.gpt.model.to(pick_dtype(args.precision))
        self.layout = self.gpt.model.layout
        if (args.tokens_per_block or args.max_tokens) is not None and not args.check_special_token_mask:
            raise UserError("--tokens-per-block and --max-tokens need --check-special-token-mask, which enforces them")
        forced = parse_lengths("--tokens-per-block", args.tokens_per_block or "")
        self.rule = length_rule(self.layout, forced, args.max_tokens)
        self.config = SamplingConfig(
            args.per_proc_batch_size, args.seed, guidance, args.temperature, args.top_k, args.top_p,
            args.check_special_token_mask, args.compile, not args.no_fused_draw, args.fp8_cache,
        )  # fmt: skip
        if args.fp8_cache:
            print(cost_of_fp8_cache(self.gpt.model), flush=True)


class SampleJob(SamplingModels):
    """Models, settings and results folder of one command."""

    def __init__(self, args: argparse.Namespace, guidance: tuple[float, ...] = (1.0,)) -> None:
        self.process = Process.from_environment()
        if args.overwrite and self.process.world > 1:
            raise UserError("--overwrite with several processes: remove the folder yourself, then start them")
        super().__init__(args, pick_device(args.device), guidance)
        self.folder = SampleFolder(args.sample_dir, self.layout.levels[-1])
        self._args = args

    def start(self, **more_settings: Any) -> None:
        """Make the results folder ready; settings that decide a clip must be those of the clips that are there."""
        decisive = {key: value for key, value in self.config.facts().items() if key != "slots"}
        self.settings = {
            "tokenizer_sha256": self.tokenizer.sha256,
            "gpt_sha256": self.gpt.sha256,
            "precision": self._args.precision,
            "forced_lengths": list(self.rule.forced),
            "max_tokens": self.rule.max_tokens,
            **decisive,
            **more_settings,
        }
        self.folder.start(self.settings, self._args.overwrite)

    def make(self, wanted: Iterable[Wanted], num_clips: int) -> None:
        """Sample, decode and write the clips, with a progress bar; `wanted` is drawn from as slots become free.

        Videos are coded and written in a thread, so that the sampler does not wait for the disk.
        """
        sampler = self._sampler(num_clips)
        asked: dict[tuple, Wanted] = {}

        def requests() -> Iterator[Request]:
            for each in wanted:
                asked[each.request.key] = each
                yield each.request

        try:
            with (
                progress_bar(desc="sampling", total=num_clips, unit="clip", smoothing=0) as bar,
                ThreadPoolExecutor(max_workers=1) as disk,  # what is decoded is written even after Ctrl-C
            ):
                written: deque[Future[None]] = deque()
                for sample in sampler.run(requests()):
                    written.append(disk.submit(self._write(asked.pop(sample.request.key), sample)))
                    while len(written) > _MOST_UNWRITTEN:
                        written.popleft().result()  # raises its error, such as a full disk
                    speed = sampler.counts.tokens / max(1e-9, bar.format_dict["elapsed"])
                    bar.set_postfix_str(f"{speed:.0f} tokens/s", refresh=False)
                    bar.update()
                while written:
                    written.popleft().result()
        except KeyboardInterrupt:
            raise KeyboardInterrupt(
                f"interrupted after {sampler.counts.clips} clips; rerun the same command to resume"
            ) from None
        except torch.OutOfMemoryError as error:
            slots = self.config.slots
            raise UserError(
                f"{self.gpt.model.device} is out of memory with --per-proc-batch-size {slots} and "
                f"{sampler.cache_bytes / 2**30:.2f} GiB of keys and values; try {max(1, slots // 2)}"
            ) from error

    def finish(self, groups: Mapping[str, Sequence[str]], fps: float) -> None:
        """Write samples.json and, once every clip is there, grids and report.html; print one line.

        groups: title of a grid -> names of its clips. Of several processes the last to end finds all of them.
        """
        names = [name for group in groups.values() for name in group]
        summary = self.folder.write_summary(names, self._facts())
        if summary["complete"]:
            for title, group in groups.items():
                self.folder.write_grid(title, group[:MOST_IN_GRID], fps)
            self.folder.write_page(summary, groups)
        self._say_result(names, summary)

    def _say_result(self, names: Sequence[str], summary: dict[str, Any]) -> None:
        if not summary["complete"]:
            print(f"{summary['num_samples']} of {len(names)} samples are in {self.folder.folder}; the rest is to come")
            return
        if not summary["num_samples"]:
            first = summary["skipped"][0]
            raise UserError(f"none of the {len(names)} videos could be used; {first['file']}: {first['reason']}")
        tokens = ""
        if summary["mean_tokens"] is not None:
            with_lengths = summary["mean_tokens_with_length_tokens"]
            tokens = f", {summary['mean_tokens']:.1f} tokens each ({with_lengths:.1f} with length tokens)"
        num_broken, hint = summary["num_broken"], "" if self.config.check_grammar else " (--check-special-token-mask)"
        broken = f"; {num_broken} broke the grammar and have no video{hint}" if num_broken else ""
        print(f"{summary['num_samples']} samples{tokens}{broken}; see {self.folder.folder}/report.html")

    def _facts(self) -> dict[str, Any]:
        names = {"gpt": display_name(self._args.gpt_ckpt), "tokenizer": display_name(self._args.vq_ckpt)}
        return {**names, "gpt_model": size_name(self.gpt.model.config), "settings": self.settings}

    def _sampler(self, num_clips: int) -> Sampler:
        """Says what the keys and values take before anything is allocated."""
        model, config = self.gpt.model, self.config
        places = longest_sequence(self.layout, self.rule)
        size = config.slots * model.cache_bytes_per_slot(config.streams, places)
        weights = sum(parameters_by_part(model).values())
        name = size_name(model.config)
        print(
            f"{name} ({weights / 1e6:.1f}M) on {model.device}, {num_clips} clips to sample; keys and "
            f"values: {config.slots} slots x {config.streams} streams x {places} places = {size / 2**20:.1f} MiB"
            + ("; the first steps wait until they are compiled" if config.compile else "")
        )
        return Sampler(model, config, places)

    def _write(self, wanted: Wanted, sample: Sample) -> Callable[[], None]:
        """Decode one clip. Returns the function that writes it."""
        lengths, broken = sample.lengths, sample.broken
        record = {
            **wanted.record,
            "seed": self.config.seed,
            "assignment": list(lengths),
            "tokens": sum(lengths),
            "tokens_with_length_tokens": sum(lengths) + len(lengths),
            "given_frames": wanted.num_given,
            "broken": broken,
        }
        if broken is not None:
            return partial(self.folder.add, wanted.name, record, None, None, wanted.fps)
        tokens = tokens_of([sample], self.layout, self.tokenizer)
        frames_THWC = to_uint8(self.tokenizer.decode(tokens)[0])
        clip = ShownClip(frames_THWC, lengths, wanted.real_THWC, wanted.num_given)
        return partial(self.folder.add, wanted.name, record, clip, tokens, wanted.fps)


def _whole_number(name: str, default: str) -> int:
    text = os.environ.get(name, default)
    if not text.isdecimal():
        raise UserError(f"{name}={text!r} in the environment: must be a whole number")
    return int(text)
