"""Training on the CPU: a step, the quantizer, bf16 LPIPS, curation, checkpoints.

    python scripts/bench/training.py [--quick] [--only step,attention,quantizer,perceptual,curation,checkpoint]

step        a training step at S-B width in fp32 (random assignments, l1, quantizer terms, clipping, AdamW, EMA), as a
            share of the matrix-product roof of the same run. The perceptual network is left out. Goal: 0.65.
attention   forward and backward of the mini proxy's four attentions in bf16, torch's own backward of a call for each
            clip and block in float32 over ours; unequal assignments. Goal: 1.3.
quantizer   peak memory of autograd through the written formula of the entropy term over ours, 16384 codes, 3000
            latents, each side in a fresh process. Goal: 2.
perceptual  largest change of a clip's distance in bf16 over 1e-3, held-out clips against blurred and noisy copies;
            bf16 as in training: first layer, normalisation, difference and means stay in fp32. Goal: at most 1.
curation    the time of brute force over the prefix tree's, LPIPS included. Brute force reconstructs each clip under
            each assignment and compares both sides anew. The best row must agree on every clip. Goal: 3.
checkpoint  the time that the training thread waits for a checkpoint, over the steps between two. Goal: at most 0.05.

One thread, CPU time of the thread.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from _bench import Part, fastest, in_fresh_process, peak_bytes, run_parts, thread_seconds
from torch import Tensor

from tokenizer.assignment import Packing, pack, pack_uniform
from tokenizer.blocks import bottlenecks as quantizer_module
from tokenizer.blocks.attention import attend_by_clip, block_causal_attention
from tokenizer.blocks.bottlenecks import ENTROPY_TEMPERATURE, VectorQuantizer
from tokenizer.common.checkpoint import CheckpointStore
from tokenizer.common.device import FlopCount
from tokenizer.data.clips import DataConfig, build_dataset
from tokenizer.losses.objective import LossConfig, tokenizer_loss
from tokenizer.losses.perceptual import load_perceptual
from tokenizer.model import TransformerConfig, VideoTokenizer
from tokenizer.presets import build_tokenizer
from tokenizer.router.curate import Scorer, Scores
from tokenizer.router.reward import QualityTable, reward, stats_of
from tokenizer.training.optim import OptimConfig
from tokenizer.training.train_state import RunConfig, TrainState
from tokenizer.training.train_step import train_step
from tokenizer.training.trainer import BackgroundWriter

REPEATS = 3
CODES = 16384
Terms = tuple[Tensor, dict[str, Tensor]]


def main() -> None:
    parts: dict[str, Callable[[bool], Part]] = {
        "step": step,
        "attention": attention,
        "quantizer": quantizer,
        "perceptual": perceptual,
        "curation": curation,
        "checkpoint": checkpoint,
    }
    torch.set_num_threads(1)
    run_parts("training on the CPU", "A training step and its parts on the CPU.", parts)


# --- a step -----------------------------------------------------------------------------------------------------------


def step(quick: bool) -> Part:
    layers, num_clips = ((2, 2), 2) if quick else ((6, 12), 4)
    torch.manual_seed(0)
    run = RunConfig(device="cpu", batch_size=num_clips)
    encoder, decoder = TransformerConfig(layers[0], 512, 8), TransformerConfig(layers[1], 768, 12)
    model = build_tokenizer("VQ_SB", encoder=encoder, decoder=decoder, codebook_size=1024 if quick else CODES)
    state = TrainState.start(model, run, OptimConfig())
    video_BCTHW = torch.rand(num_clips, 3, 16, 128, 128)
    length_BN = model.space.lengths_of(model.space.draw_rows(num_clips, torch.Generator().manual_seed(0)))
    config = LossConfig(perceptual=0.0, perceptual_net="none")

    def loss(batch: Tensor, step: int) -> Terms:
        return tokenizer_loss(config, model(batch, length_BN), batch, None, torch.Generator())

    with FlopCount() as count:  # this step also pays for the allocations
        train_step(run, state, video_BCTHW, loss)
    seconds, roofs = [], []
    for _ in range(REPEATS):
        seconds.append(thread_seconds(train_step, run, state, video_BCTHW, loss))
        roofs.append(gemm_rate())
    rate, roof = count.total / min(seconds), max(roofs)
    facts = {
        "gflop_per_step": round(count.total / 1e9, 1),
        "seconds": round(min(seconds), 3),
        "tflops": round(rate / 1e12, 4),
        "roof_tflops": round(roof / 1e12, 4),
        "tokens": int(length_BN.sum()),
        "num_clips": num_clips,
        "layers": list(layers),
    }
    return Part(rate / roof, 0.65, facts=facts)


def gemm_rate(side: int = 1024) -> float:
    """Operations a second of a product of two square matrices: the best of 4."""
    square = torch.rand(side, side)
    return 2 * side**3 / fastest(torch.mm, square, square, repeats=4)


# --- attention --------------------------------------------------------------------------------------------------------


def attention(quick: bool) -> Part:
    torch.manual_seed(0)
    clips = 2 if quick else 8
    tokens = pack(torch.tensor([8, 16, 32, 64, 128])[torch.randint(5, (clips, 4))])
    patches = pack_uniform(clips, 4, 64)
    seconds: dict[str, float] = {"ours": 0.0, "torch": 0.0}
    for query, key, heads in ((tokens, tokens, 3), (tokens, patches, 3), (patches, patches, 4), (patches, tokens, 4)):
        inputs = [
            torch.randn(p.num_tokens, heads, 64, dtype=torch.bfloat16, requires_grad=True) for p in (query, key, key)
        ]

        def ours(inputs: list[Tensor] = inputs, query: Packing = query, key: Packing = key) -> None:
            block_causal_attention(*inputs, query, key).sum().backward()

        def reference(inputs: list[Tensor] = inputs, query: Packing = query, key: Packing = key) -> None:
            q_Lhe, k_She, v_She = (x.float() for x in inputs)
            attend_by_clip(q_Lhe, k_She, v_She, query, key).bfloat16().sum().backward()

        for name, run in (("ours", ours), ("torch", reference)):
            seconds[name] += fastest(run)
    facts = {name: round(value, 4) for name, value in seconds.items()}
    return Part(seconds["torch"] / seconds["ours"], 1.3, facts=facts | {"clips": clips})


# --- the quantizer ----------------------------------------------------------------------------------------------------


def quantizer(quick: bool) -> Part:
    latents = 1000 if quick else 3000
    found = {side: in_fresh_process(_quantizer_side, side, latents) for side in ("ours", "formula")}
    facts = {
        "time_ratio": round(found["formula"]["seconds"] / found["ours"]["seconds"], 3),
        "latents": latents,
        "codes": CODES,
        "gb_of_latents_times_codes": round(latents * CODES * 4 / 1e9, 3),
        **found,
    }
    return Part(found["formula"]["rise_gb"] / found["ours"]["rise_gb"], 2.0, facts=facts)


def _quantizer_side(side: str, latents: int) -> dict[str, float]:
    """How far the peak memory of this process rises, and the fastest forward and backward."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if side == "formula":
        quantizer_module.entropy_and_nearest = _formula
    model, z_LE = VectorQuantizer(CODES, 8), torch.randn(latents, 8, requires_grad=True)

    def step(some: VectorQuantizer) -> None:
        out = some(z_LE)
        (out.latent_LE.square().sum() + torch.stack(list(out.terms.values())).sum()).backward()

    step(VectorQuantizer(16, 8))  # loads what it needs
    before = peak_bytes()
    seconds = fastest(step, model)
    return {"rise_gb": round((peak_bytes() - before) / 1e9, 4), "seconds": round(seconds, 4)}


def _formula(z_LE: Tensor, codes_VE: Tensor) -> tuple[Tensor, Tensor]:
    """`entropy_and_nearest` as one writes it first: a softmax over tokens times codes."""
    logit_LV = z_LE @ codes_VE.T * (2 / ENTROPY_TEMPERATURE)
    prob_LV = logit_LV.softmax(dim=-1)
    mean_V = prob_LV.mean(dim=0)
    per_token = -(prob_LV * logit_LV.log_softmax(dim=-1)).sum(dim=-1).mean()
    return per_token + (mean_V * (mean_V + 1e-12).log()).sum(), logit_LV.argmax(dim=-1)


# --- LPIPS in bf16 ----------------------------------------------------------------------------------------------------


def perceptual(quick: bool) -> Part:
    limit, num_clips = 1e-3, 8
    cases = [("stlpips_alex", 64), ("stlpips_alex", 128), ("stlpips_vgg", 64)]
    worst, facts = 0.0, {}
    for name, size in cases[:1] if quick else cases:
        exact, fast = load_perceptual(name), load_perceptual(name, dtype=torch.bfloat16)
        data = build_dataset(DataConfig(sources=["bundled:heldout"], size=size, augment=False))
        real_BCTHW = torch.stack([data.get(index).video_CTHW[:, ::4] for index in range(num_clips)])
        gaps = {}
        with torch.no_grad():
            for damage, copy_BCTHW in _damaged(real_BCTHW).items():
                gap_B = fast.clip_distance(copy_BCTHW, real_BCTHW) - exact.clip_distance(copy_BCTHW, real_BCTHW)
                gaps[damage] = float(f"{float(gap_B.abs().max()):.2g}")
            frames_TCHW = real_BCTHW[0].transpose(0, 1)
            seconds = [fastest(net.features, frames_TCHW) for net in (fast, exact)]
        worst = max(worst, *gaps.values())
        facts[f"{name}_{size}"] = gaps | {"time_ratio": round(seconds[0] / seconds[1], 2)}
    return Part(worst / limit, 1.0, at_least=False, facts=facts | {"num_clips": num_clips})


def _damaged(video_BCTHW: Tensor) -> dict[str, Tensor]:
    noise = 0.1 * torch.randn(video_BCTHW.shape, generator=torch.Generator().manual_seed(0))
    blurred = {
        f"blur_{k}": F.avg_pool3d(video_BCTHW, (1, k, k), 1, (0, k // 2, k // 2), count_include_pad=False)
        for k in (3, 9)
    }
    return blurred | {"noise": (video_BCTHW + noise).clamp(0, 1)}


# --- curation ---------------------------------------------------------------------------------------------------------


def curation(quick: bool) -> Part:
    """With --quick 3 levels (81 assignments) instead of 5 (625)."""
    model = _untrained_tokenizer([8, 16, 32] if quick else [8, 16, 32, 64, 128])
    clips = build_dataset(DataConfig(sources=["bundled:heldout"], size=64, augment=False))
    video = torch.stack([clips.get(i).video_CTHW for i in (0, len(clips) - 1)])
    scorer = Scorer(model, load_perceptual("stlpips_alex"))
    found: dict[str, Scores] = {}
    tree_seconds = thread_seconds(lambda: found.update(tree=scorer.tree(video)))
    brute_seconds = thread_seconds(lambda: found.update(brute=scorer.brute_force(video)))
    same = torch.equal(_best_rows(model, found["tree"]), _best_rows(model, found["brute"]))
    facts = {
        "identical_argmax": same,
        "largest_lpips_difference": float((found["tree"][0] - found["brute"][0]).abs().max()),
        "assignments": model.space.num_rows,
        "tree_seconds_per_clip": round(tree_seconds / len(video), 3),
    }
    return Part(brute_seconds / tree_seconds, 3.0, condition=same, facts=facts)


def _untrained_tokenizer(levels: list[int]) -> VideoTokenizer:
    """The miniature's shape with random weights; codes from real latents, so that assignments differ."""
    torch.manual_seed(0)
    model = build_tokenizer("VQ_mini", levels=levels, init="random").eval()
    torch.nn.init.normal_(model.to_pixels.weight, std=0.1)
    clips = build_dataset(DataConfig(sources=["bundled:train"], size=64, augment=False))
    video = torch.stack([clips.get(i).video_CTHW for i in range(0, 64, 8)])
    lengths = model.space.lengths_of(torch.full((len(video),), model.space.num_rows - 1))
    with torch.inference_mode():
        latents = model.encode_latents(video, pack(lengths))
    model.quantizer.start(latents, torch.Generator().manual_seed(0))
    return model


def _best_rows(model: VideoTokenizer, scores: Scores) -> Tensor:
    """The best row of each clip at w_q = 1.2."""
    space = model.space
    table = QualityTable(*scores, [str(i) for i in range(len(scores[0]))], space.levels, space.num_blocks)
    return reward(table.lpips_BA, space.tokens_A, 1.2, stats_of(table)).argmax(dim=1)


# --- checkpoints ------------------------------------------------------------------------------------------------------


def checkpoint(quick: bool) -> Part:
    """The state of the mini tokenizer (with --quick the debug one) after a step, at the default interval.

    The wait is the copy to memory plus the rest of the writing when the next checkpoint is due: here nothing, since
    the writing thread has a whole interval of steps. `foreground_seconds`: a write that training waits for.
    """
    preset = "VQ_debug" if quick else "VQ_mini"
    torch.manual_seed(0)
    run = RunConfig(device="cpu")
    model = build_tokenizer(preset)
    state = TrainState.start(model, run, OptimConfig())
    video_BCTHW = torch.rand(run.batch_size, 3, model.config.num_frames, model.config.size, model.config.size)
    length_BN = model.space.lengths_of(model.space.draw_rows(run.batch_size, torch.Generator().manual_seed(0)))

    def loss(batch: Tensor, step: int) -> Terms:
        output = model(batch, length_BN)
        return (output.video_BCTHW - batch).abs().mean() + output.quantized.terms["commitment"], {}

    steps, waits, whole = [], [], []
    with tempfile.TemporaryDirectory() as folder:
        store = CheckpointStore(Path(folder))
        for _ in range(REPEATS):
            steps.append(thread_seconds(train_step, run, state, video_BCTHW, loss))
            writer = BackgroundWriter(store)
            waits.append(thread_seconds(writer.save, state.snapshot({})))
            writer.join()
            whole.append(thread_seconds(store.save, state.snapshot({})))
    facts = {
        "preset": preset,
        "stall_seconds": round(min(waits), 4),
        "foreground_seconds": round(min(whole), 4),
        "step_seconds": round(min(steps), 4),
        "interval": run.checkpoint_every,
    }
    return Part(min(waits) / (run.checkpoint_every * min(steps)), 0.05, at_least=False, facts=facts)


if __name__ == "__main__":
    main()
