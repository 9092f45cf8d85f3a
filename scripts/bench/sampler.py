"""The sampler against a loop that pads to the maximum, its slots, a step against the memory limit, a shared machine.

    python scripts/bench/sampler.py [--quick] [--only padding,slots,fp32_b1,shared]

padding  sampling 64 clips in 8 slots, same weights, same draw of lengths (random assignments of the paper's levels,
         forced on both sides), same code for a step. The other loop is what the ancestors do: batches of 8 run until
         2052 ids are written whatever a clip's length, attend to the whole static cache under a mask, and wait for the
         device at every step. Its 8 batches do the same work to the operation, so two are run, one before and one after
         the sampler, and the faster counts eight times. Goal: 2.3. --quick: a quarter of every length.
slots    slots in use over 16 B clips, counted by the sampler itself on a model that costs next to nothing. Goal: 0.95.
fp32_b1, fp32_b4_guided, fp32_b8_guided, bf16_b16
         a step at GPT-L's shape with 756 ids in the cache, as a fraction of the time that its bytes (weights, live keys
         and values) take at the speed of a matrix-vector product over the same matrices, in the same precision and run:
         torch.mv or torch's linear of one row, whichever is faster; interleaved, minimum of the repeats. Goals: 0.85 at
         B = 1, 0.6 with guidance (two rows a clip), 0.75 in bf16. --quick: 8 of 24 layers.
shared   GPT-mini with guidance in 8 slots on two threads beside a process that does nothing but count, on the same two
         cores, as a fraction of its speed alone; fresh processes, twice each. A fair half of the machine would be 0.5
         to 0.75; spinning threads, OpenMP's default, stall. Goal: 0.35. --quick: 3 seconds each instead of 15.

All but `shared` take CPU time of one thread; `shared` takes wall time, so other work on the machine lowers both sides.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache

import torch
import torch.nn.functional as F
from _bench import Part, in_fresh_process, run_parts, thread_seconds

from autoregressive.logits import draw_ids, guide, gumbel, id_words, key_words
from autoregressive.model import GPT
from autoregressive.presets import PRESETS
from autoregressive.sampler import Request, Sampler, SamplingConfig
from autoregressive.sequence import LengthRule, length_rule
from tokenizer.common.device import generator_for

SLOTS, CLIPS, LIVE, REPEATS = 8, 64, 756, 3
PAPER_LEVELS = [32, 64, 128, 256, 512]
GUIDED = SamplingConfig(SLOTS, guidance=(2.25,))


def main() -> None:
    parts = {
        "padding": padding,
        "slots": slots,
        "fp32_b1": lambda quick: step_fraction(gpt_l(quick, torch.float32), 0.85, 1),
        "fp32_b4_guided": lambda quick: step_fraction(gpt_l(quick, torch.float32), 0.6, 4, streams=2),
        "fp32_b8_guided": lambda quick: step_fraction(gpt_l(quick, torch.float32), 0.6, 8, streams=2),
        "bf16_b16": lambda quick: step_fraction(gpt_l(quick, torch.bfloat16), 0.75, 16),
        "shared": shared,
    }
    torch.set_num_threads(1)
    torch.manual_seed(0)
    run_parts("the sampler", "The sampler against padding, against the memory limit, beside a busy process.", parts)


# --- the same clips, sampled in two ways ---------------------------------------------------------------------------


def padding(quick: bool) -> Part:
    """Speed-up over the other loop on a small GPT."""
    levels = [level // 4 for level in PAPER_LEVELS] if quick else PAPER_LEVELS
    model = GPT(replace(PRESETS["GPT-mini"], levels=levels)).eval()
    requests = drawn_requests(model, CLIPS)
    sampler = Sampler(model, GUIDED)
    before = thread_seconds(lambda: pad_to_maximum(model, GUIDED, requests[:SLOTS]))
    ours = thread_seconds(lambda: exhaust(sampler, requests))
    after = thread_seconds(lambda: pad_to_maximum(model, GUIDED, requests[-SLOTS:]))
    padded = min(before, after) * (CLIPS // SLOTS)
    tokens = sum(sum(request.rule.forced) + model.layout.num_blocks for request in requests)
    facts = {
        "tokens_per_clip": round(tokens / CLIPS, 1),
        "row_step_ratio": round(CLIPS * (model.layout.max_length - 1) / tokens, 3),
        "seconds": {"sampler": round(ours, 2), "padded": round(padded, 2)},
        "seconds_of_padded_batches": [round(before, 2), round(after, 2)],
        "tokens_per_second": round(tokens / ours, 1),
    }
    return Part(padded / ours, 2.3, facts=facts)


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


# --- slots in use --------------------------------------------------------------------------------------------------


def slots(quick: bool) -> Part:
    """Of 16 B clips with free lengths drawn by the model: equal logits, so all assignments are equally likely."""
    levels = [level // 8 for level in PAPER_LEVELS]  # the same proportions, an eighth of the steps
    model = GPT(replace(PRESETS["GPT-debug"], layers=1, levels=levels)).eval()  # the head begins as zeros
    sampler = Sampler(model, SamplingConfig(SLOTS))
    exhaust(sampler, [Request(("clip", i), 0, rule=LengthRule()) for i in range(16 * SLOTS)])
    return Part(sampler.counts.utilisation(SLOTS), 0.95)


# --- a step against the memory limit -------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def gpt_l(quick: bool, dtype: torch.dtype) -> GPT:
    """GPT-L with weights as they begin, 1.3 GB in float32."""
    return GPT(replace(PRESETS["GPT-L"], layers=8 if quick else 24)).eval().to(dtype)


@torch.inference_mode()
def step_fraction(model: GPT, goal: float, batch: int, streams: int = 1) -> Part:
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
    facts = {
        "milliseconds": round(taken * 1e3, 1),
        "roof_gb_per_second": round(weight_bytes / roof / 1e9, 2),
        "weight_mb": round(weight_bytes / 1e6),
        "cache_mb": round(cache_bytes / 1e6),
    }
    return Part(limit / taken, goal, facts=facts)


# --- beside a busy process --------------------------------------------------------------------------------------------


def shared(quick: bool) -> Part:
    """Tokens in wall time, of those alone; the environment that the package sets tells OpenMP how to wait."""
    cores, seconds = sorted(os.sched_getaffinity(0))[:2], 3 if quick else 15
    rates: dict[str, list[float]] = {"alone": [], "beside": []}
    for _ in range(2):
        rates["alone"].append(in_fresh_process(tokens_per_second, cores, seconds))
        with busy_process(cores):
            rates["beside"].append(in_fresh_process(tokens_per_second, cores, seconds))
    shown = {name: [round(rate, 1) for rate in values] for name, values in rates.items()}
    facts = {"tokens_per_second": shown, "cores": len(cores), "omp": os.environ.get("OMP_WAIT_POLICY")}
    return Part(max(rates["beside"]) / max(rates["alone"]), 0.35, facts=facts)


def tokens_per_second(cores: list[int], seconds: float) -> float:
    """Ids written in a second of wall time, over about `seconds` of sampling."""
    os.sched_setaffinity(0, cores)
    torch.set_num_threads(len(cores))
    torch.manual_seed(0)
    model = GPT(replace(PRESETS["GPT-mini"], levels=[4, 8, 16])).eval()  # short clips: many end in the time
    sampler = Sampler(model, GUIDED)
    written, start = 0, time.perf_counter()
    for sample in sampler.run(Request((i,), i % 8) for i in range(10**6)):
        written += len(sample.id_Q)
        if time.perf_counter() - start > seconds:
            break
    return written / (time.perf_counter() - start)


@contextlib.contextmanager
def busy_process(cores: list[int]) -> Iterator[None]:
    """A process that keeps one of the cores busy."""
    process = multiprocessing.get_context("spawn").Process(target=_count, args=(cores,), daemon=True)
    process.start()
    try:
        yield
    finally:
        process.kill()
        process.join()


def _count(cores: list[int]) -> None:
    os.sched_setaffinity(0, cores)
    while True:
        pass


if __name__ == "__main__":
    main()
