"""The recorded step: the clips of the plain one, few recordings, and no trace of the rehearsals."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from autoregressive import sampler as sampler_module
from autoregressive.attention import Live
from autoregressive.cuda_graph import GraphedStep, Run
from autoregressive.model import GPT
from autoregressive.presets import PRESETS
from autoregressive.sampler import Request, Sampler, SamplingConfig
from autoregressive.sequence import LengthRule

REQUESTS = [Request(("clip", i), label=i) for i in range(5)]
CONFIG = SamplingConfig(slots=2, guidance=(2.0,), top_k=50, top_p=0.95)


CODES = torch.randint(64, (5, 12), generator=torch.Generator().manual_seed(0))
CASES = {  # changes of the model, how it is sampled, what is asked for
    "class": ({"block_positions": True}, CONFIG, REQUESTS),
    "frames": (
        {"num_classes": 0, "condition_lengths": [8, 4]},
        SamplingConfig(slots=2),
        [Request(("clip", i), condition_L=code_K, rule=LengthRule((8, 4))) for i, code_K in enumerate(CODES)],
    ),
}


def random_gpt(**changes: object) -> GPT:
    torch.manual_seed(0)
    model = GPT(replace(PRESETS["GPT-debug"], layers=1, **changes)).eval()
    torch.nn.init.normal_(model.head.weight, std=0.3)
    return model


def clips(sampler: Sampler, requests: list[Request]) -> dict[tuple, list[int]]:
    return {sample.request.key: sample.id_Q.tolist() for sample in sampler.run(requests)}


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


class AsOnAGPU(Sampler):
    """Reads the numbers of keys off its own positions, as the kernel does there."""

    def __init__(self, model: GPT, config: SamplingConfig) -> None:
        super().__init__(model, config)
        self.record = StandIn()
        self._run_step = GraphedStep(self._advance, self._step_state, self.record)

    def _live(self) -> None:
        return None

    def _advance(self, live: Live) -> None:
        super()._advance([int(position) + 1 for position in self._position_S])


class WithoutTriton(AsOnAGPU):
    """Reads all slots up to the longest, rounded up."""

    def _live(self) -> int:  # type: ignore[override]
        live = Sampler._live(self)
        assert isinstance(live, list)
        return self._rounded(max(live))

    def _advance(self, live: Live) -> None:
        Sampler._advance(self, live)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("kind", "recordings"), [(AsOnAGPU, [1]), (WithoutTriton, range(3, 8))])
def test_recorded_clips_are_those_of_the_plain_step(
    kind: Callable, recordings: range, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sampler_module, "_LONGEST_STEP", 8)
    changes, config, requests = CASES[case]
    gpt = random_gpt(**changes)
    plain, recorded = Sampler(gpt, config), kind(gpt, config)
    assert clips(recorded, requests) == clips(plain, requests)
    assert recorded.counts == plain.counts, "a recorded step waits for nothing"
    assert len(recorded.record.replays) in recordings and sum(recorded.record.replays) == recorded.counts.steps
    assert recorded._run_step.num_graphs == len(recorded.record.replays)
