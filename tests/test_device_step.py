"""The compiled and the recorded step: clips of the plain one, few graphs, recorded without a trace, clear refusals.

Traced and lowered by torch.compile as for its own backend, but run operation by operation: that needs no C++ compiler.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.utils import counters

from autoregressive import sampler as sampler_module
from autoregressive.attention import Live
from autoregressive.device_step import DeviceStep, Run
from autoregressive.model import GPT
from autoregressive.presets import PRESETS
from autoregressive.sampler import Request, Sampler, SamplingConfig
from tokenizer.common.errors import UserError

REQUESTS = [Request(("clip", i), label=i) for i in range(5)]
CONFIG = SamplingConfig(slots=2, guidance=(2.0,), top_k=50, top_p=0.95)


@pytest.fixture(scope="module")
def gpt() -> GPT:
    torch.manual_seed(0)
    model = GPT(replace(PRESETS["GPT-debug"], layers=1)).eval()
    torch.nn.init.normal_(model.head.weight, std=0.3)
    return model


def clips(sampler: Sampler) -> dict[tuple, list[int]]:
    return {sample.request.key: sample.id_Q.tolist() for sample in sampler.run(REQUESTS)}


class StandIn:
    """Records like a GPU: two rehearsals, then a step that is kept for later and not run."""

    def __init__(self) -> None:
        self.replays: list[int] = []  # how often each recording was replayed

    def __call__(self, rehearse: Run, step: Run) -> Run:
        rehearse()
        rehearse()
        number = len(self.replays)
        self.replays.append(0)

        def replay() -> None:
            self.replays[number] += 1
            step()

        return replay


@pytest.mark.parametrize("make_record", [lambda: None, StandIn])
def test_compiled_clips_are_those_of_the_plain_step(
    gpt: GPT, make_record: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = Sampler(gpt, CONFIG)
    wanted = clips(plain)
    record, written = make_record(), []

    def lowered(graph: torch.fx.GraphModule, inputs: object) -> Callable:
        written.extend(node.args[0].op for node in graph.graph.nodes if node.target is torch.ops.aten.index_put.default)
        return make_boxed_func(graph.forward)

    backend = aot_autograd(fw_compiler=lowered, keep_inference_input_mutations=True)
    monkeypatch.setattr(sampler_module, "_LONGEST_STEP", 8)
    monkeypatch.setattr(sampler_module, "DeviceStep", partial(DeviceStep, backend=backend, record=record))
    torch._dynamo.reset()
    counters.clear()
    sampler = Sampler(gpt, replace(CONFIG, compile=True))
    assert clips(sampler) == wanted
    assert 1 <= counters["stats"]["unique_graphs"] <= 2, "one for a constant number of keys, one for any other"
    assert set(written) == {"placeholder"}, "the cache itself is written, not a part of it: else it is copied whole"
    with torch.compiler.set_stance("fail_on_recompile"):
        assert clips(sampler) == wanted
    assert sampler.counts.synchronisations == 2 * plain.counts.synchronisations, "compiled steps wait for nothing"
    if record is not None:
        buckets = range(3, 1 + -(-gpt.layout.max_length // 8))
        assert len(record.replays) in buckets and sum(record.replays) == sampler.counts.steps


def test_a_recorded_plain_step_gives_the_same_clips(gpt: GPT, monkeypatch: pytest.MonkeyPatch) -> None:
    """The way of a GPU, whose kernel needs no number of keys: one recording serves every step."""
    record = StandIn()

    class Recorded(Sampler):
        def _live(self) -> None:
            return None

        def _advance(self, live: Live) -> None:
            super()._advance([int(position) + 1 for position in self._position_S])

    wanted = clips(Sampler(gpt, CONFIG))
    monkeypatch.setattr(sampler_module, "DeviceStep", partial(DeviceStep, record=record))
    sampler = Recorded(gpt, CONFIG)
    assert clips(sampler) == wanted
    assert record.replays == [sampler.counts.steps] and sampler._run_step.num_recorded == 1


def test_what_cannot_be_compiled_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(graph: object, inputs: object) -> None:
        raise RuntimeError("no kernel for this machine\nand more lines")

    place = torch.zeros(1)
    step = DeviceStep(lambda live: place.add_(live), (place,), place.device, compiled=True, backend=broken)
    with pytest.raises(UserError, match=r"^--compile: .* cpu \(RuntimeError: no kernel for this machine\); [^\n]*$"):
        step(1)


@pytest.mark.parametrize(("device", "words"), [("cpu", "C\\+\\+ compiler, .* 'no-such-c"), ("cuda", "package triton")])
def test_missing_compilers_are_named(gpt: GPT, device: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=f"^--compile for {device} needs .*{words}.* without --compile"):
        DeviceStep(lambda live: None, (), torch.device(device), compiled=True)
