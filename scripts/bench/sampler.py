"""The sampler against a loop that pays for every clip as if it were the longest, and a step against the memory limit.

    python scripts/bench/sampler.py [--quick]

1. Sampling 64 clips in 8 slots, same weights, same draw of lengths (random assignments of the paper's levels, forced on
   both sides), same code for a step. The other loop is what the ancestors do: batches of 8 run until 2052 ids are
   written whatever a clip's length, attend to the whole static cache under a mask, and wait for the device at every
   step. Its 8 batches do the same work to the operation, so two are run, one before and one after the sampler, and
   the faster counts eight times. Goal: 2.3x.
2. Slot utilisation of 16 B clips, counted by the sampler itself on a model that costs next to nothing. Goal: 0.95.
3. A step at GPT-L's shape with 756 ids in the cache, as a fraction of the time that its bytes (weights, live keys and
   values) take at the speed of a matrix-vector product over the same matrices, in the same precision and run: torch.mv
   or torch's linear of one row, whichever is faster.
   Goals: fp32, B = 1: 0.85; bf16, B = 16: 0.75; fp32 with guidance (two rows a clip), B = 4 and 8: 0.6.

One thread, CPU time of the thread, in 3 variants interleaved and the minimum of the repeats. The ratio is that of 1;
`holds` is all of them. The last line is JSON. --quick takes 8 of 24 layers in 3, and in 1 a quarter of every length.
"""

from __future__ import annotations

import argparse
from dataclasses import replace

import torch
import torch.nn.functional as F
from _bench import report, thread_seconds

from autoregressive.logits import draw_ids, guide, gumbel, id_words, key_words
from autoregressive.model import GPT
from autoregressive.presets import PRESETS
from autoregressive.sampler import Request, Sampler, SamplingConfig
from autoregressive.sequence import LengthRule, length_rule
from tokenizer.common.device import generator_for

GOAL, GOAL_UTILISATION, GOALS_STEP = (
    2.3,
    0.95,
    {"fp32_b1": 0.85, "fp32_b4_guided": 0.6, "fp32_b8_guided": 0.6, "bf16_b16": 0.75},
)
SLOTS, CLIPS, LIVE, REPEATS = 8, 64, 756, 3
PAPER_LEVELS = [32, 64, 128, 256, 512]


def step_fractions(quick: bool) -> dict[str, dict[str, float]]:
    """Steps of GPT-L at four batch sizes, see `step_fraction`."""
    model = GPT(replace(PRESETS["GPT-L"], layers=8 if quick else 24)).eval()
    return {
        "fp32_b1": step_fraction(model, 1),
        "fp32_b4_guided": step_fraction(model, 4, streams=2),
        "fp32_b8_guided": step_fraction(model, 8, streams=2),
        "bf16_b16": step_fraction(model.bfloat16(), 16),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="The sampler against padding, and against the memory limit.")
    parser.add_argument("--quick", action="store_true", help="a third of GPT-L's layers, a quarter of every length")
    quick = parser.parse_args().quick
    torch.set_num_threads(1)
    torch.manual_seed(0)
    speed_up, sampling = bench_sampling([level // 4 for level in PAPER_LEVELS] if quick else PAPER_LEVELS)
    utilisation = slot_utilisation()
    steps = step_fractions(quick)
    fast = all(steps[name]["fraction"] >= goal for name, goal in GOALS_STEP.items())
    report(
        "sampler against pad-to-maximum",
        ratio=speed_up,
        goal=GOAL,
        holds=speed_up >= GOAL and utilisation >= GOAL_UTILISATION and fast,
        **sampling,
        slot_utilisation={"16_B_clips": round(utilisation, 4), "goal": GOAL_UTILISATION},
        step_of_gpt_l={name: {**values, "goal": GOALS_STEP[name]} for name, values in steps.items()},
        quick=quick,
    )


# --- 1. the same clips, sampled in two ways ---------------------------------------------------------------------------


def bench_sampling(levels: list[int]) -> tuple[float, dict[str, object]]:
    """Speed-up over the other loop on a small GPT, with the facts that explain it."""
    model = GPT(replace(PRESETS["GPT-mini"], levels=levels)).eval()
    requests = drawn_requests(model, CLIPS)
    config = SamplingConfig(SLOTS, guidance=(2.25,))
    sampler = Sampler(model, config)
    before = thread_seconds(lambda: pad_to_maximum(model, config, requests[:SLOTS]))
    ours = thread_seconds(lambda: exhaust(sampler, requests))
    after = thread_seconds(lambda: pad_to_maximum(model, config, requests[-SLOTS:]))
    seconds = {"sampler": ours, "padded": min(before, after) * (CLIPS // SLOTS)}
    tokens = sum(sum(request.rule.forced) + model.layout.num_blocks for request in requests)
    padded_steps = CLIPS // SLOTS * (model.layout.max_length - 1)
    return seconds["padded"] / seconds["sampler"], {
        "clips": CLIPS,
        "slots": SLOTS,
        "tokens_per_clip": round(tokens / CLIPS, 1),
        "row_step_ratio": round(padded_steps * SLOTS / tokens, 3),
        "seconds": {name: round(value, 2) for name, value in seconds.items()},
        "seconds_of_padded_batches": [round(before, 2), round(after, 2)],
        "tokens_per_second": round(tokens / seconds["sampler"], 1),
    }


def drawn_requests(model: GPT, num: int) -> list[Request]:
    """Clips of random assignments, forced: the same draw of lengths for everybody."""
    space = model.layout.space
    length_BN = space.lengths_of(space.draw_rows(num, generator_for(0, "bench lengths")))
    rules = [length_rule(model.layout, tuple(lengths)) for lengths in length_BN.tolist()]
    return [Request(("clip", i), i % model.layout.num_classes, rule=rule) for i, rule in enumerate(rules)]


@torch.inference_mode()
def pad_to_maximum(model: GPT, config: SamplingConfig, batch: list[Request], places: int | None = None) -> None:
    """A full batch that runs to the longest sequence there can be, over the full cache, with a look at every id.

    Same model, same verbs. A clip's own ids are as good as the sampler's; everything past them is thrown away. Each of
    its steps costs the same, so `places` of them say what all cost.
    """
    layout, device, slots = model.layout, model.device, len(batch)
    word_V, scale_S = id_words(layout.num_ids, device), torch.full((slots,), config.guidance[0], device=device)
    bias_SV = torch.zeros(slots, layout.num_ids, device=device)
    cache = model.new_cache(slots, config.streams)
    key_S2 = torch.tensor([key_words(config.seed, *request.key) for request in batch], device=device)
    heads = [[layout.condition_id(request.label), layout.open_id] for request in batch]
    input_SG = torch.tensor(heads, device=device)
    written: list[list[int]] = []
    for place in range(places or layout.max_length - 1):
        position_S = torch.full((slots,), place, device=device)
        logits_RV = model.step(input_SG.flatten(), position_S, layout.max_length, cache, torch.zeros_like(position_S))
        logits_SV = guide(logits_RV.unflatten(0, input_SG.shape), scale_S)
        next_S = draw_ids(logits_SV, bias_SV, gumbel(key_S2, position_S, word_V))
        written.append(next_S.tolist())  # the look at every step
        input_SG = next_S[:, None].expand_as(input_SG)


def exhaust(sampler: Sampler, requests: list[Request]) -> None:
    assert sum(1 for _ in sampler.run(requests)) == len(requests)


# --- 2. slots in use --------------------------------------------------------------------------------------------------


def slot_utilisation() -> float:
    """Of 16 B clips with free lengths drawn by the model: equal logits, so all assignments are equally likely."""
    levels = [level // 8 for level in PAPER_LEVELS]  # the same proportions, an eighth of the steps
    model = GPT(replace(PRESETS["GPT-debug"], layers=1, levels=levels)).eval()  # the head begins as zeros
    sampler = Sampler(model, SamplingConfig(SLOTS))
    exhaust(sampler, [Request(("clip", i), 0, rule=LengthRule()) for i in range(16 * SLOTS)])
    return sampler.counts.utilisation(SLOTS)


# --- 3. a step against the memory limit -------------------------------------------------------------------------------


@torch.inference_mode()
def step_fraction(model: GPT, batch: int, streams: int = 1) -> dict[str, float]:
    """Time that the bytes of a step take at the speed of a matrix-vector product / its time."""
    config, dtype = model.config, model.head.weight.dtype
    cache = model.new_cache(batch, streams, places=LIVE + 1)
    input_R, position_S = torch.arange(batch * streams), torch.full((batch,), LIVE - 1)
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and name.startswith(("blocks", "head"))]
    vectors = {width: torch.randn(width, dtype=dtype) for width in {matrix.shape[1] for matrix in matrices}}
    weight_bytes = sum(matrix.numel() * matrix.element_size() for matrix in matrices)
    cache_bytes = 2 * config.layers * config.width * LIVE * batch * streams * dtype.itemsize

    def products() -> None:
        for matrix in matrices:
            torch.mv(matrix, vectors[matrix.shape[1]])

    def linears() -> None:
        for matrix in matrices:
            F.linear(vectors[matrix.shape[1]][None], matrix)

    def step() -> None:
        model.step(input_R, position_S, [LIVE] * batch, cache, torch.zeros_like(position_S))

    runs = [[thread_seconds(run) for run in (products, linears, step)] for _ in range(REPEATS + 1)][1:]
    *roofs, taken = (min(column) for column in zip(*runs, strict=True))
    roof = min(roofs)
    limit = roof * (weight_bytes + cache_bytes) / weight_bytes
    return {
        "fraction": round(limit / taken, 3),
        "milliseconds": round(taken * 1e3, 1),
        "roof_gb_per_second": round(weight_bytes / roof / 1e9, 2),
        "weight_mb": round(weight_bytes / 1e6),
        "cache_mb": round(cache_bytes / 1e6),
    }


if __name__ == "__main__":
    main()
