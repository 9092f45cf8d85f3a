"""A quarter of an hour on a GPU: every speed goal of the paper's sizes, and the first minutes of the true recipe.

    python scripts/bench/gpu.py [--clips FILE.safetensors] [--only PART,PART] [--minutes 8] [--out results/bench]
    python scripts/bench/gpu.py --rehearse        # every part at debug size, on any device

gpt        a training step of GPT-L on 48 packed clips of random assignments, bf16, as the loop makes it (loss,
           gradients, clipping, AdamW, moving average): share of the published dense bf16 peak. Goal: 0.45.
tokenizer  the same for VQ_SB and random assignments, without perceptual network and GAN. Goal: 0.30.
recipe     a step of the proxy recipe, with stlpips_vgg and the patch discriminator (every fifth step). No goal.
codec      encoding and decoding 64 clips at 160, 721 (here 704) and 2048 tokens, bf16: share of the peak. No goal.
curation   8 clips under all 625 assignments, bf16, with stlpips_vgg. Goal: 0.30.
extraction 64 clips in batches of 8, a router S and VQ_SB in bf16. Goal: 0.30.
sampler_l, sampler_lp
           GPT-L and GPT-LP with guidance, 8, 32 and 64 slots, compiled, forced random assignments: time of the bytes
           (weights of every step, live keys and values) at the speed of a copy. Goal for LP at 32 slots: 0.60.
loop       GPT-LP at 32 slots against what the ancestors do: batches run until 2052 ids are written, uncompiled, attend
           to the whole static cache under a mask, and wait for the device at every step; some are timed. Goal: 12x.
learn      configs/vq/VQ_SB_proxy.yaml for 4 minutes, or what is left of --minutes, on --clips: batches of 32, lr warmed
           up over 50 steps, cosine over the steps that fit, without alignment (no V-JEPA 2 at hand), stlpips_vgg for
           lpips_vgg. The curve goes to gpu.csv: losses of the steps, PSNR of the last 48 clips of the file.

`learn` wants a file of 128-pixel clips. At about 8 KB a clip this one has 50 MiB; a core makes five clips a second:

    python -m tokenizer.data.pack gpu_clips.safetensors --size 128 --crf 24 \\
        --sources doom:train:5000 synthetic:train:1500 bundled:train doom:validation:48

One JSON line a part; all of them, the measured roofs and the versions in OUT/gpu.json. A part that fails or would begin
after --minutes says so there, and the others go on. Random weights and noise but for `learn`; wall time between
synchronisations. Arithmetic as counted; of the GPT 6 operations a weight and id and 3 times the causal attention. The
last line is JSON; exit 1 if a goal is missed.
"""

from __future__ import annotations

import argparse
import csv
import json
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from _bench import Part, report
from packed import gpt_flops, random_sequences
from recipe import HELD_OUT, start_recipe, train_for
from sampler import drawn_requests, exhaust, pad_to_maximum
from torch import Tensor

from autoregressive.batches import TokenBatch
from autoregressive.model import GPT
from autoregressive.presets import PRESETS
from autoregressive.sampler import Request, Sampler, SamplerCounts, SamplingConfig
from autoregressive.sequence import length_rule
from autoregressive.train import gpt_loss
from tokenizer.common.checkpoint import atomic_write
from tokenizer.common.device import FlopCount, autocast, gemm_roof, generator_for, peak_memory, pick_device
from tokenizer.common.errors import UserError, run_cli
from tokenizer.data.clip_store import open_store
from tokenizer.losses.objective import LossConfig, tokenizer_loss
from tokenizer.losses.perceptual import load_perceptual
from tokenizer.model import VideoTokenizer
from tokenizer.presets import build_tokenizer
from tokenizer.router.curate import Scorer
from tokenizer.router.model import Router, RouterConfig
from tokenizer.train import TokenizerTraining
from tokenizer.training.optim import OptimConfig
from tokenizer.training.train_state import RunConfig, TrainState
from tokenizer.training.train_step import train_step
from tokenizer.training.trainer import start_run

DENSE_BF16 = {"H100": 989e12, "H200": 989e12, "A100": 312e12}  # published; of other devices the measured roof is taken
FEW_STEPS, REPEATS, LEARN_S = 5, 4, 240.0


@dataclass(frozen=True)
class Sizes:
    """What the parts run on."""

    tokenizer: str = "VQ_SB"
    gpts: tuple[str, str] = ("GPT-L", "GPT-LP")
    clips: int = 48  # of a training step
    codec_clips: int = 64
    lengths: tuple[tuple[int, ...], ...] = ((64, 32, 32, 32), (256, 256, 128, 64), (512, 512, 512, 512))
    curated: int = 8
    slots: tuple[int, ...] = (8, 32, 64)
    rounds: int = 3  # clips that each slot samples
    loop_steps: int = 40
    recipe: str = "configs/vq/VQ_SB_proxy.yaml"
    batch: int = 32
    workers: int = 12
    perceptual: str = "stlpips_vgg"
    router: RouterConfig = field(default_factory=RouterConfig)


REHEARSED = Sizes(
    "VQ_debug", ("GPT-debug", "GPT-debug"), 2, 4, ((4, 2, 2, 2), (8, 4, 4, 2), (8, 8, 8, 8)), 1, (1, 2), 1, 2,
    "configs/debug/proxy.yaml", 2, 0, "stlpips_alex",
    RouterConfig(size=32, levels=[2, 4, 8], layers=1, width=32, heads=2),
)  # fmt: skip


class Bench:
    """The device, its roofs, and the time that is left."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.rehearses = args, args.rehearse
        self.device = pick_device(args.device)
        if self.device.type == "cpu" and not self.rehearses:
            raise UserError("this bench is for a GPU; give --rehearse on a CPU")
        self.sizes = REHEARSED if self.rehearses else Sizes()
        self.ends = time.monotonic() + 60 * args.minutes
        self.gemm = gemm_roof(self.device, torch.float32 if self.device.type == "cpu" else torch.bfloat16)
        self.name = "cpu" if self.device.type == "cpu" else torch.cuda.get_device_name(self.device)
        self.peak = next((flops for part, flops in DENSE_BF16.items() if part in self.name), self.gemm)
        source = torch.empty(2**24 if self.rehearses else 2**31, dtype=torch.uint8, device=self.device).random_()
        target = torch.empty_like(source)
        self.copy = 2 * source.nbytes / self.fastest(lambda: target.copy_(source))  # bytes a second, read and written
        self.graphed = self.device.type == "cuda"  # and compiled

    def seconds(self, run: Callable[[], object]) -> float:
        """Wall time from one idle moment of the device to the next."""
        self.wait()
        start = time.perf_counter()
        run()
        self.wait()
        return time.perf_counter() - start

    def fastest(self, run: Callable[[], object]) -> float:
        return min(self.seconds(run) for _ in range(REPEATS))

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def share(self, flops: float, taken: float, goal: float = 0.0, **facts: Any) -> Part:
        """A part whose ratio is its share of the peak."""
        facts |= {"seconds": round(taken, 4), "tflops": round(flops / taken / 1e12, 2)}
        return Part(flops / taken / self.peak, goal, facts=facts)

    def tokenizer(self) -> VideoTokenizer:
        torch.manual_seed(0)
        return build_tokenizer(self.sizes.tokenizer).to(self.device)

    def start_recipe(self, folder: str, batch_size: int) -> tuple[TokenizerTraining, Iterator[Any]]:
        s, on = self.sizes, self.graphed
        return start_recipe(
            s.recipe, self.args.clips, f"run.dir={folder}", f"run.device={self.device}",
            f"run.batch_size={batch_size}", f"run.num_workers={s.workers}", f"run.compile={str(on).lower()}",
            f"run.precision={'bf16' if on else 'none'}", f"loss.perceptual_net={s.perceptual}",
            *(["val_clips=4"] if self.rehearses else []),
        )  # fmt: skip

    def noise(self, model: VideoTokenizer, clips: int) -> Tensor:
        c = model.config
        return torch.rand(clips, 3, c.num_frames, c.size, c.size, device=self.device)


# --- training ---------------------------------------------------------------------------------------------------------


def gpt(bench: Bench) -> Part:
    config, clips = PRESETS[bench.sizes.gpts[0]], bench.sizes.clips
    lengths = config.layout.space.lengths_of(config.layout.space.draw_rows(clips, generator_for(0, "bench gpt")))
    batch = TokenBatch(config.layout, random_sequences(config, lengths.tolist()), config.width)
    with bench.device:
        model = GPT(config)
    taken, _, facts = time_steps(bench, model, batch, lambda part, step: gpt_loss(model, part))
    return bench.share(3 * gpt_flops(config, batch.packed), taken, 0.45, ids=len(batch.packed.id_L), **facts)


def tokenizer(bench: Bench) -> Part:
    model, clips = bench.tokenizer(), bench.sizes.clips
    length_BN = model.space.lengths_of(model.space.draw_rows(clips, generator_for(0, "bench tokenizer")))
    config = LossConfig(perceptual=0.0, perceptual_net="none")

    def loss(video: Tensor, step: int) -> Any:
        return tokenizer_loss(config, model(video, length_BN), video, None, torch.Generator())

    taken, flops, facts = time_steps(bench, model, bench.noise(model, clips), loss)
    return bench.share(flops, taken, 0.30, tokens=int(length_BN.sum()), **facts)


def time_steps(bench: Bench, model: torch.nn.Module, batch: Any, loss: Any) -> tuple[float, int, dict[str, Any]]:
    """The loop's own steps on one batch: the fastest in seconds, the arithmetic of one, and facts."""
    precision = "bf16" if bench.graphed else "none"
    run = RunConfig(device=str(bench.device), precision=precision, batch_size=bench.sizes.clips, compile=bench.graphed)
    start_run(run)
    state = TrainState.start(model, run, OptimConfig())

    def step() -> None:
        train_step(run, state, batch, loss)

    with FlopCount() as count:
        step()
    with torch.compiler.set_stance("force_eager"):
        plain = bench.fastest(step)
    first = bench.seconds(step)
    taken = bench.fastest(step)
    facts = {"clips": bench.sizes.clips, "seconds_plain": round(plain, 4), "seconds_of_compiling": round(first, 1)}
    return taken, count.total, facts | {"gib": round(peak_memory(bench.device) / 2**30, 1)}


def recipe(bench: Bench) -> Part:
    with tempfile.TemporaryDirectory() as folder:
        training, source = bench.start_recipe(folder, bench.sizes.clips)
        batch, period = next(source), training.state.period

        def steps() -> None:
            for _ in range(period):
                training.train_step(batch)

        with FlopCount() as count:
            steps()
        steps()  # compiled by now
        taken = bench.seconds(steps) / period
    memory = round(peak_memory(bench.device) / 2**30, 1)
    return bench.share(count.total / period, taken, clips=bench.sizes.clips, gib=memory)


def learn(bench: Bench) -> Part:
    if not (bench.args.clips or bench.rehearses):
        raise UserError("learn needs --clips FILE.safetensors; the top of scripts/bench/gpu.py has the command")
    with tempfile.TemporaryDirectory() as folder:
        training, source = bench.start_recipe(folder, bench.sizes.batch)
        left = bench.ends - time.monotonic()
        rows = train_for(training, source, 2.0 if bench.rehearses else min(LEARN_S, left))
    names = list(dict.fromkeys(name for row in rows for name in row))
    with open(bench.args.out / "gpu.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(rows)
    curve = {row["seconds"]: round(row["psnr_policy"], 2) for row in rows if "psnr_policy" in row}  # random assignments
    facts = {"ratio_is": "dB gained", "steps": len(rows), "psnr_over_seconds": curve, "curve": "gpu.csv"}
    return Part(list(curve.values())[-1] - list(curve.values())[0], 0.0, facts=facts)


# --- the tokenizer in use ---------------------------------------------------------------------------------------------


@torch.inference_mode()
def codec(bench: Bench) -> Part:
    model, facts, worst = bench.tokenizer().eval(), {}, 1.0
    video_BCTHW = bench.noise(model, bench.sizes.codec_clips)
    for lengths in bench.sizes.lengths:
        length_BN = torch.tensor(lengths).expand(len(video_BCTHW), -1)

        def both(length_BN: Tensor = length_BN) -> None:
            with autocast(bench.device, "bf16"):
                model.decode(model.encode(video_BCTHW, length_BN))

        with FlopCount() as count:
            both()
        found = bench.share(count.total, bench.fastest(both))
        worst = min(worst, found.ratio)
        facts[str(sum(lengths))] = {"ratio": round(found.ratio, 4), **found.facts}
    return Part(worst, 0.0, facts={"clips": len(video_BCTHW), "by_tokens": facts})


def curation(bench: Bench) -> Part:
    model = bench.tokenizer().eval()
    scorer = Scorer(model, load_perceptual(bench.sizes.perceptual).to(bench.device))
    video_BCTHW = bench.noise(model, bench.sizes.curated)

    def tree(clips: Tensor) -> None:
        with autocast(bench.device, "bf16"):
            scorer.tree(clips)

    with FlopCount() as count:
        tree(video_BCTHW[:1])
    taken = bench.seconds(lambda: tree(video_BCTHW))
    facts = {"clips": len(video_BCTHW), "assignments": model.space.num_rows}
    return bench.share(count.total * len(video_BCTHW), taken, 0.30, **facts)


@torch.inference_mode()
def extraction(bench: Bench) -> Part:
    model, router = bench.tokenizer().eval(), Router(bench.sizes.router).to(bench.device).eval()
    parts = bench.noise(model, bench.sizes.codec_clips).split(8)

    def both() -> int:
        tokens = 0
        for part in parts:
            row_B = router(part).argmax(dim=1).cpu()  # fp32, as in stage 5a
            with autocast(bench.device, "bf16"):
                tokens += len(model.encode(part, model.space.lengths_of(row_B)).code_L)
        return tokens

    with FlopCount() as count:
        tokens = both()
    return bench.share(count.total, bench.fastest(both), 0.30, clips=bench.sizes.codec_clips, tokens=tokens)


# --- sampling ---------------------------------------------------------------------------------------------------------


def sampler(bench: Bench, which: int, goal: float) -> Part:
    """The share of the memory limit at each number of slots; the ratio is that of 32. which: 0 GPT-L, 1 GPT-LP."""
    model, facts, ratios = new_gpt(bench, bench.sizes.gpts[which]), {}, {}
    for slots in bench.sizes.slots:
        requests = drawn_requests(model, bench.sizes.rounds * slots)
        tokens = [sum(request.rule.forced) + model.layout.num_blocks for request in requests]
        taken, first, ours = time_sampler(bench, model, guided(bench, slots), requests)
        ratios[slots] = least_bytes(model, tokens, slots) / bench.copy / taken
        facts[slots] = {
            "ratio": round(ratios[slots], 4),
            "seconds": round(taken, 2),
            "clips_per_second": round(len(requests) / taken, 2),
            "tokens_per_second": round(sum(tokens) / taken),
            "seconds_before_the_first_clip": round(first, 1),
            "utilisation": round(ours.counts.utilisation(slots), 3),
            "cache_gib": round(ours.cache_bytes / 2**30, 2),
        }
    middle = bench.sizes.slots[1]
    return Part(ratios[middle], goal, facts={"by_slots": facts})


def loop(bench: Bench) -> Part:
    slots, model = bench.sizes.slots[1], new_gpt(bench, bench.sizes.gpts[1])
    requests = drawn_requests(model, bench.sizes.rounds * slots)
    config = guided(bench, slots)

    def few(places: int) -> float:  # what its start costs is in both times
        return bench.seconds(lambda: pad_to_maximum(model, config, requests[:slots], places))

    few(FEW_STEPS)  # kernels set themselves up
    step = (few(FEW_STEPS + bench.sizes.loop_steps) - few(FEW_STEPS)) / bench.sizes.loop_steps
    taken, _, _ = time_sampler(bench, model, config, requests)
    padded = step * (model.layout.max_length - 1) * bench.sizes.rounds
    return Part(
        padded / taken, 12.0, facts={"milliseconds_per_step": round(step * 1e3, 3), "seconds": round(padded, 2)}
    )


def guided(bench: Bench, slots: int) -> SamplingConfig:
    return SamplingConfig(slots, guidance=(2.25,), compile=bench.graphed)


def new_gpt(bench: Bench, preset: str) -> GPT:
    with bench.device:
        return GPT(PRESETS[preset]).eval().bfloat16()


def time_sampler(
    bench: Bench, model: GPT, config: SamplingConfig, requests: list[Request]
) -> tuple[float, float, Sampler]:
    """Seconds for all requests, and those that a first short clip took, which prepares everything."""
    ours = Sampler(model, config)
    short = replace(requests[0], rule=length_rule(model.layout, model.layout.levels[:1] * model.layout.num_blocks))
    first = bench.seconds(lambda: exhaust(ours, [short]))
    ours.counts = SamplerCounts()
    return bench.seconds(lambda: exhaust(ours, requests)), first, ours


def least_bytes(model: GPT, lengths: list[int], slots: int) -> float:
    """What must be read: all matrices once a step of full slots, and with guidance each token's past twice."""
    config, item = model.config, model.head.weight.element_size()
    read = [p for name, p in model.named_parameters() if p.ndim == 2 and name.startswith(("blocks", "head"))]
    past = 2 * config.layers * config.width * item * sum(length * (length + 1) / 2 for length in lengths)
    return sum(lengths) / slots * sum(p.nbytes for p in read) + 2 * past


# --- all of it --------------------------------------------------------------------------------------------------------

PARTS: dict[str, Callable[[Bench], Part]] = {
    "gpt": gpt,
    "tokenizer": tokenizer,
    "recipe": recipe,
    "codec": codec,
    "curation": curation,
    "extraction": extraction,
    "sampler_lp": lambda bench: sampler(bench, 1, 0.60),
    "loop": loop,
    "sampler_l": lambda bench: sampler(bench, 0, 0.0),
    "learn": learn,
}


def main() -> None:
    parser = argparse.ArgumentParser(description="The paper's sizes on one GPU.")
    parser.add_argument("--device", default="auto", help="cuda | cuda:N; cpu with --rehearse")
    parser.add_argument("--only", default=",".join(PARTS), help=f"some of {','.join(PARTS)} (default: all)")
    parser.add_argument("--clips", metavar="FILE", help="packed 128-pixel clips for `learn` and `recipe`")
    parser.add_argument("--minutes", type=float, default=8.0, help="no part begins later (default: 8)")
    parser.add_argument("--out", type=Path, default=Path("results/bench"), help="folder of gpu.json and gpu.csv")
    parser.add_argument("--rehearse", action="store_true", help="debug sizes, on any device")
    args = parser.parse_args()
    wanted = args.only.split(",")
    if strange := sorted(set(wanted) - set(PARTS)):
        raise UserError(f"--only {','.join(strange)}: choose from {', '.join(PARTS)}")
    if args.clips and len(open_store(args.clips)) <= HELD_OUT:
        raise UserError(f"{args.clips}: needs more than {HELD_OUT} clips, of which the last {HELD_OUT} are held out")
    args.out.mkdir(parents=True, exist_ok=True)
    bench = Bench(args)
    found: dict[str, dict[str, Any]] = {}
    for name in wanted:
        found[name] = run_part(bench, name)
        print(json.dumps({"part": name, **found[name]}), flush=True)
    facts = {
        "device": bench.name,
        "rehearsal": bench.rehearses,
        "torch": torch.__version__,
        "measured_gemm_tflops": round(bench.gemm / 1e12, 2),
        "peak_tflops": round(bench.peak / 1e12, 2),
        "measured_copy_gb_per_second": round(bench.copy / 1e9),
    }
    atomic_write(args.out / "gpu.json", json.dumps({**facts, "parts": found}, indent=1).encode())
    worst = min(found, key=lambda name: found[name].get("ratio", 0) / (found[name].get("goal") or 1))
    holds = all(values["holds"] for values in found.values())
    report("one GPU", found[worst].get("ratio", 0), found[worst].get("goal", 0), holds, of=worst, parts=found, **facts)


def run_part(bench: Bench, name: str) -> dict[str, Any]:
    """What one part measured; why not, if it did not."""
    start = time.monotonic()
    if start > bench.ends:
        return {"holds": False, "not_run": f"{bench.args.minutes:g} minutes were over"}
    try:
        done = PARTS[name](bench)
    except Exception as error:  # a rented quarter of an hour: the other parts go on
        traceback.print_exc()
        return {"holds": False, "failed": f"{type(error).__name__}: {str(error)[:200]}"}
    finally:
        torch.compiler.reset()
        if bench.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(bench.device)
    return {
        "ratio": round(done.ratio, 4),
        "goal": done.goal,
        "holds": bench.rehearses or done.holds,  # debug sizes show that a part runs
        "part_s": round(time.monotonic() - start, 1),
        **done.facts,
    }


if __name__ == "__main__":
    run_cli(main)
