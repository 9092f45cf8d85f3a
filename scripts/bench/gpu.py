"""A GPU at work at the paper's sizes: training as a share of its arithmetic, sampling as a share of its bandwidth.

    python scripts/bench/gpu.py [--device cuda:N] [--only gpt,tokenizer,sampler] [--quick]

1. gpt: a training step of GPT-L on packed clips of random assignments, bf16, as the loop makes it (loss, gradients,
   clipping, AdamW, moving average), with run.compile and without. MFU = arithmetic of the model, 6 operations a weight
   and id and 3 times the causal attention, / time with run.compile / the GPU's published dense bf16 peak. Goal: 0.35.
2. tokenizer: the same for VQ_SB, random assignments, without the perceptual network; arithmetic as counted. Goal: 0.30.
3. sampler: GPT-LP with guidance, 32 slots, forced random assignments, with --compile and without, against
   - the time that its bytes (weights of every step, live keys and values) take at the measured speed of a copy.
     Goal: 0.5.
   - what the ancestors do: batches run until 2052 ids are written, uncompiled, attend to the whole static cache under
     a mask and wait for the device at every step. A step costs the same at every place, so some are timed. Goal: 10x.

Random weights and codes; wall time between synchronisations. The ratio is that of 3, the loop; `holds` is all that was
run. The last line is JSON. --quick samples 32 clips instead of 256.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from _bench import report
from packed import gpt_flops, random_sequences
from sampler import drawn_requests, exhaust, pad_to_maximum
from torch import Tensor

from autoregressive.batches import TokenBatch
from autoregressive.model import GPT
from autoregressive.presets import PRESETS
from autoregressive.sampler import Request, Sampler, SamplerCounts, SamplingConfig
from autoregressive.sequence import length_rule
from autoregressive.train import gpt_loss
from tokenizer.common.device import FlopCount, gemm_roof, generator_for, peak_memory, pick_device
from tokenizer.common.errors import UserError, run_cli
from tokenizer.losses.objective import LossConfig, tokenizer_loss
from tokenizer.presets import build_tokenizer
from tokenizer.training.optim import OptimConfig
from tokenizer.training.train_state import RunConfig, TrainState
from tokenizer.training.train_step import train_step
from tokenizer.training.trainer import start_run

PARTS = ("gpt", "tokenizer", "sampler")
GOALS = {"gpt": 0.35, "tokenizer": 0.30, "sampler": 0.5, "loop": 10.0}
DENSE_BF16 = {"H100": 989e12, "H200": 989e12, "A100": 312e12}  # published; of other GPUs the measured roof is taken
CLIPS_GPT, CLIPS_TOKENIZER, SLOTS, FEW_STEPS, LOOP_STEPS, REPEATS = 48, 48, 32, 5, 40, 4


def main() -> None:
    parser = argparse.ArgumentParser(description="Training and sampling at the paper's sizes on one GPU.")
    parser.add_argument("--device", default="cuda", help="cuda | cuda:N")
    parser.add_argument("--only", default=",".join(PARTS), help="some of gpt,tokenizer,sampler (default: all)")
    parser.add_argument("--quick", action="store_true", help="sample 32 clips, not 256")
    args = parser.parse_args()
    wanted = args.only.split(",")
    if strange := sorted(set(wanted) - set(PARTS)):
        raise UserError(f"--only {','.join(strange)}: choose from {', '.join(PARTS)}")
    device = pick_device(args.device)
    if device.type == "cpu":
        raise UserError("this bench is for a GPU; sampler.py, packed.py and training.py are for a CPU")
    name = torch.cuda.get_device_name(device)
    gemm, copy = gemm_roof(device, torch.bfloat16), copy_roof(device)
    peak = next((flops for part, flops in DENSE_BF16.items() if part in name), gemm)
    found: dict[str, dict[str, Any]] = {}
    if "gpt" in wanted:
        found["gpt"] = train_gpt(device, peak)
        print("gpt", found["gpt"], flush=True)
    if "tokenizer" in wanted:
        found["tokenizer"] = train_tokenizer(device, peak)
        print("tokenizer", found["tokenizer"], flush=True)
    if "sampler" in wanted:
        found["sampler"], found["loop"] = sample(device, copy, 32 if args.quick else 256)
    shares = {part: values["ratio"] for part, values in found.items()}
    part = "loop" if "loop" in shares else wanted[0]
    report(
        "one GPU at the paper's sizes",
        ratio=shares[part],
        goal=GOALS[part],
        holds=all(share >= GOALS[name] for name, share in shares.items()),
        of=part,
        **{name: {**values, "goal": GOALS[name]} for name, values in found.items()},
        device=name,
        torch=torch.__version__,
        measured_gemm_tflops=round(gemm / 1e12, 1),
        published_tflops=round(peak / 1e12, 1),
        measured_copy_gb_per_second=round(copy / 1e9),
        quick=args.quick,
    )


def copy_roof(device: torch.device) -> float:
    """Bytes a second, read and written together, of the largest of a few copies."""
    source = torch.empty(2**31, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    return 2 * source.nbytes / min(seconds(lambda: target.copy_(source)) for _ in range(REPEATS))


def seconds(run: Callable[[], object]) -> float:
    """Wall time from one idle moment of the device to the next."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    torch.cuda.synchronize()
    return time.perf_counter() - start


# --- training ---------------------------------------------------------------------------------------------------------


def train_gpt(device: torch.device, peak: float) -> dict[str, Any]:
    """A step of GPT-L on one batch."""
    config = PRESETS["GPT-L"]
    lengths = config.layout.space.lengths_of(config.layout.space.draw_rows(CLIPS_GPT, generator_for(0, "bench gpt")))
    batch = TokenBatch(config.layout, random_sequences(config, lengths.tolist()), config.width)
    with device:
        model = GPT(config)

    def loss(part: TokenBatch, step: int) -> Any:
        return gpt_loss(model, part)

    figures, _ = time_steps(device, model, batch, loss, CLIPS_GPT)
    flops = 3 * gpt_flops(config, batch.packed)
    return figures | rates(flops, figures["seconds"], peak) | {"ids": len(batch.packed.id_L)}


def train_tokenizer(device: torch.device, peak: float) -> dict[str, Any]:
    """A step of VQ_SB on one batch of noise."""
    model = build_tokenizer("VQ_SB").to(device)
    length_BN = model.space.lengths_of(model.space.draw_rows(CLIPS_TOKENIZER, generator_for(0, "bench tokenizer")))
    video_BCTHW = torch.rand(CLIPS_TOKENIZER, 3, 16, 128, 128, device=device)
    config = LossConfig(perceptual=0.0, perceptual_net="none")

    def loss(video: Tensor, step: int) -> Any:
        return tokenizer_loss(config, model(video, length_BN), video, None, torch.Generator())

    figures, flops = time_steps(device, model, video_BCTHW, loss, CLIPS_TOKENIZER)
    return figures | rates(flops, figures["seconds"], peak) | {"tokens": int(length_BN.sum())}


def time_steps(
    device: torch.device, model: torch.nn.Module, batch: Any, loss: Any, clips: int
) -> tuple[dict[str, Any], int]:
    """The loop's own steps on one batch: the fastest in seconds, compiled and plain; and the arithmetic of one."""
    run, optim = RunConfig(device=str(device), precision="bf16", batch_size=clips, compile=True), OptimConfig()
    start_run(run)
    state = TrainState.start(model, run, optim)

    def step() -> None:
        train_step(run, state, batch, loss)

    with FlopCount() as count:
        step()
    figures: dict[str, Any] = {"clips": clips}
    for name, around in (("plain", lambda: torch.compiler.set_stance("force_eager")), ("compiled", nullcontext)):
        with around():
            first = seconds(step)
            torch.cuda.reset_peak_memory_stats()
            figures[f"seconds_{name}"] = round(min(seconds(step) for _ in range(REPEATS)), 4)
            figures[f"gib_{name}"] = round(peak_memory(device) / 2**30, 1)
        print(name, figures, flush=True)
    figures["seconds_of_compiling"] = round(first, 1)
    figures["seconds"] = figures.pop("seconds_compiled")
    return figures, count.total


def rates(flops: float, taken: float, peak: float) -> dict[str, float]:
    return {"ratio": round(flops / taken / peak, 4), "tflops": round(flops / taken / 1e12, 1)}


# --- sampling ---------------------------------------------------------------------------------------------------------


def sample(device: torch.device, bandwidth: float, num_clips: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """GPT-LP: our sampler against its bytes, and against the loop."""
    with device:
        model = GPT(PRESETS["GPT-LP"]).eval().bfloat16()
    config = SamplingConfig(SLOTS, guidance=(2.25,))
    requests = drawn_requests(model, num_clips)
    tokens = [sum(request.rule.forced) + model.layout.num_blocks for request in requests]
    step = padded_step(model, config, requests[:SLOTS])
    padded = step * (model.layout.max_length - 1) * num_clips / SLOTS
    few = min(num_clips, 2 * SLOTS)
    limit = least_bytes(model, tokens) / bandwidth
    plain, _, _ = time_sampler(model, config, requests[:few])
    found = {
        "seconds_without_compile": round(plain, 2),
        "clips_without_compile": few,
        "ratio_without_compile": round(least_bytes(model, tokens[:few]) / bandwidth / plain, 3),
    }
    print(found, "padded", step, flush=True)
    ours, first, sampler = time_sampler(model, replace(config, compile=True), requests)
    found |= {
        "ratio": round(limit / ours, 4),
        "seconds": round(ours, 2),
        "clips": num_clips,
        "slots": SLOTS,
        "clips_per_second": round(num_clips / ours, 2),
        "tokens_per_second": round(sum(tokens) / ours),
        "seconds_before_the_first_clip": round(first, 1),
        "utilisation": round(sampler.counts.utilisation(SLOTS), 3),
        "cache_gib": round(sampler.cache_bytes / 2**30, 2),
    }
    loop = {
        "ratio": round(padded / ours, 2),
        "seconds": round(padded, 2),
        "milliseconds_per_step": round(step * 1e3, 3),
    }
    return found, loop


def time_sampler(model: GPT, config: SamplingConfig, requests: list[Request]) -> tuple[float, float, Sampler]:
    """Seconds for all requests, and those that a first short clip took, which prepares everything."""
    sampler = Sampler(model, config)
    short = replace(requests[0], rule=length_rule(model.layout, model.layout.levels[:1] * model.layout.num_blocks))
    first = seconds(lambda: exhaust(sampler, [short]))
    sampler.counts = SamplerCounts()
    return seconds(lambda: exhaust(sampler, requests)), first, sampler


def least_bytes(model: GPT, lengths: list[int]) -> float:
    """What must be read: all matrices once a step of full slots, and with guidance each token's past twice."""
    config, item = model.config, model.head.weight.element_size()
    read = [p for name, p in model.named_parameters() if p.ndim == 2 and name.startswith(("blocks", "head"))]
    past = 2 * config.layers * config.width * item * sum(length * (length + 1) / 2 for length in lengths)
    return sum(lengths) / SLOTS * sum(p.nbytes for p in read) + 2 * past


def padded_step(model: GPT, config: SamplingConfig, requests: list[Request]) -> float:
    """Seconds of a step of the loop; what its start costs is in both times."""

    def taken(places: int) -> float:
        return seconds(lambda: pad_to_maximum(model, config, requests, places))

    taken(FEW_STEPS)  # kernels set themselves up
    return (taken(FEW_STEPS + LOOP_STEPS) - taken(FEW_STEPS)) / LOOP_STEPS


if __name__ == "__main__":
    run_cli(main)
