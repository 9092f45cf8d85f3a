"""The sampler beside one foreign busy process on the same two cores, as a fraction of its speed alone.

    python scripts/bench/shared_machine.py [--quick]

GPT-mini samples with guidance in 8 slots on two threads, each time in a fresh process on two cores: alone, then beside
a process that does nothing but count, twice each. A fair half of the machine would be 0.5 to 0.75; spinning threads,
OpenMP's default, stall. Speed is tokens in wall time, so other work on the machine lowers both sides. Goal:
0.35. The last line is JSON. --quick samples for 3 seconds each instead of 15.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import time
from collections.abc import Iterator
from dataclasses import replace

from _bench import in_fresh_process, report

GOAL, SLOTS = 0.35, 8


def main() -> None:
    parser = argparse.ArgumentParser(description="The sampler beside one busy process, of its speed alone.")
    parser.add_argument("--quick", action="store_true", help="3 seconds for each measurement, not 15")
    quick = parser.parse_args().quick
    cores = sorted(os.sched_getaffinity(0))[:2]
    rates: dict[str, list[float]] = {"alone": [], "beside": []}
    for _ in range(2):
        rates["alone"].append(in_fresh_process(tokens_per_second, cores, 3 if quick else 15))
        with busy_process(cores):
            rates["beside"].append(in_fresh_process(tokens_per_second, cores, 3 if quick else 15))
    ratio = max(rates["beside"]) / max(rates["alone"])
    shown = {name: [round(rate, 1) for rate in values] for name, values in rates.items()}
    policy = os.environ.get("OMP_WAIT_POLICY", "PASSIVE, set by the package")
    name = "sampler beside one busy process"
    report(name, ratio, GOAL, ratio >= GOAL, tokens_per_second=shown, cores=len(cores), omp=policy)


def tokens_per_second(cores: list[int], seconds: float) -> float:
    """Ids written in a second of wall time, over about `seconds` of sampling."""
    os.sched_setaffinity(0, cores)
    import autoregressive  # sets how OpenMP waits, before torch is loaded  # noqa: I001, F401
    import torch
    from autoregressive.model import GPT
    from autoregressive.presets import PRESETS
    from autoregressive.sampler import Request, Sampler, SamplingConfig

    torch.set_num_threads(len(cores))
    torch.manual_seed(0)
    model = GPT(replace(PRESETS["GPT-mini"], levels=[4, 8, 16])).eval()  # short clips: many end in the time
    sampler = Sampler(model, SamplingConfig(SLOTS, guidance=(2.25,)))
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
