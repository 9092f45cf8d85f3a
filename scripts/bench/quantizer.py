"""The quantiser of a training step against autograd through its formula: memory and time.

    python scripts/bench/quantizer.py [--quick]

Forward and backward at the paper's codebook of 16384 codes on 3000 latents, about four clips. The other side is what
one writes first: a softmax over tokens times codes, which autograd remembers several times over. Each side runs in a
fresh process, one thread; memory is how far the peak resident memory rises, time is CPU time, the minimum of 3. The
ratio is that of memory; the last line is JSON; exit 1 where ours takes more than half. --quick takes 1000 latents.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time

import torch
from _report import report
from torch import Tensor

from tokenizer.blocks import quantizer as module
from tokenizer.blocks.quantizer import ENTROPY_TEMPERATURE, VectorQuantizer
from tokenizer.training.profiling import peak_memory

GOAL = 2.0
CODES, WIDTH, REPEATS = 16384, 8, 3
CPU = torch.device("cpu")


def main() -> None:
    parser = argparse.ArgumentParser(description="The quantiser of a training step: memory and time.")
    parser.add_argument("--quick", action="store_true", help="1000 latents, not 3000")
    parser.add_argument("--side", choices=("ours", "formula"), help=argparse.SUPPRESS)  # the fresh process
    args = parser.parse_args()
    latents = 1000 if args.quick else 3000
    if args.side:
        print(json.dumps(measure(args.side, latents)))
        return
    found = {}
    for side in ("ours", "formula"):
        command = [sys.executable, __file__, "--side", side, *(["--quick"] if args.quick else [])]
        found[side] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
    ratio = found["formula"]["rise_gb"] / found["ours"]["rise_gb"]
    report(
        "memory of the quantiser, formula over ours",
        ratio=ratio,
        goal=GOAL,
        holds=ratio >= GOAL,
        time_ratio=round(found["formula"]["seconds"] / found["ours"]["seconds"], 3),
        latents=latents,
        codes=CODES,
        gb_of_latents_times_codes=round(latents * CODES * 4 / 1e9, 3),
        **found,
    )


def measure(side: str, latents: int) -> dict[str, float]:
    """Of one side in this process: how far its peak memory rises, and the fastest of its runs."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if side == "formula":
        module.entropy_term = formula
    quantizer, z_LE = VectorQuantizer(CODES, WIDTH), torch.randn(latents, WIDTH, requires_grad=True)
    _step(VectorQuantizer(16, WIDTH), z_LE)  # loads what it needs
    before, seconds = peak_memory(CPU), []
    for _ in range(REPEATS):
        start = time.thread_time()
        _step(quantizer, z_LE)
        seconds.append(time.thread_time() - start)
    return {"rise_gb": round((peak_memory(CPU) - before) / 1e9, 4), "seconds": round(min(seconds), 4)}


def formula(z_LE: Tensor, codes_VE: Tensor) -> Tensor:
    """`entropy_term`, written down."""
    logit_LV = z_LE @ codes_VE.T * (2 / ENTROPY_TEMPERATURE)
    prob_LV = logit_LV.softmax(dim=-1)
    mean_V = prob_LV.mean(dim=0)
    per_token = -(prob_LV * logit_LV.log_softmax(dim=-1)).sum(dim=-1).mean()
    return per_token + (mean_V * (mean_V + 1e-12).log()).sum()


def _step(quantizer: VectorQuantizer, z_LE: Tensor) -> None:
    out = quantizer(z_LE)
    (out.latent_LE.square().sum() + torch.stack(list(out.terms.values())).sum()).backward()


if __name__ == "__main__":
    main()
