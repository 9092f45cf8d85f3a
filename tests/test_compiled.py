"""Compiled layers: the numbers of the plain ones, one compilation for all batches and layers.

Traced and lowered as torch.compile does it, but run operation by operation; generated kernels run on a GPU in
test_gpu.py.
"""

from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from autoregressive.model import GPT
from autoregressive.presets import PRESETS as GPTS
from autoregressive.sampler import Request, Sampler, SamplingConfig
from tokenizer.common.device import FlopCount, compile_layers
from tokenizer.common.errors import UserError, run_cli
from tokenizer.presets import build_tokenizer

CPU = torch.device("cpu")


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    counters.clear()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))


def tokenizer_gradients(model: nn.Module, lengths: list[list[int]]) -> list[Tensor]:
    video_BCTHW = torch.rand(len(lengths), 3, 16, 32, 32, generator=torch.Generator().manual_seed(0))
    model.zero_grad()
    output = model(video_BCTHW, torch.tensor(lengths))
    output.video_BCTHW.square().mean().backward()
    return [output.video_BCTHW.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


def gpt_gradients(model: nn.Module, lengths: list[int]) -> list[Tensor]:
    id_L = torch.randint(64, (sum(lengths),), generator=torch.Generator().manual_seed(0))
    model.zero_grad()
    logits_LV = model(id_L, lengths)
    logits_LV.square().mean().backward()
    return [logits_LV.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


BATCHES = {
    "tokenizer": [[[2, 4, 8, 2], [8, 8, 2, 2]], [[4, 4, 4, 4]], [[8, 2, 2, 2], [2, 2, 2, 2], [4, 8, 8, 8]]],
    "gpt": [[9, 12], [20], [7, 7, 30]],
}


@pytest.mark.parametrize(("name", "graphs"), [("tokenizer", 6), ("gpt", 2)])
def test_compiled_layers_compute_the_same_and_are_compiled_once(traced: None, name: str, graphs: int) -> None:
    """Graphs: three stretches of a layer at the encoder's width and at the decoder's; two of a GPT's."""
    torch.manual_seed(0)
    if name == "tokenizer":
        model, gradients = build_tokenizer("VQ_debug"), tokenizer_gradients
    else:
        model, gradients = GPT(GPTS["GPT-debug"]).eval(), gpt_gradients
        nn.init.normal_(model.head.weight)
    wanted = [gradients(model, batch) for batch in BATCHES[name]]
    compile_layers(model, CPU, "run.compile=true", "train without it")
    with FlopCount() as count:
        gradients(model, BATCHES[name][0])
    assert count.total > 0 and counters["stats"]["unique_graphs"] == 0, "who counts sees the plain operations"
    for batch, reference in zip(BATCHES[name], wanted, strict=True):
        for ours, theirs in zip(gradients(model, batch), reference, strict=True):
            torch.testing.assert_close(ours, theirs)
    assert counters["stats"]["unique_graphs"] == graphs


def test_compiled_layers_sample_the_same_clips(traced: None) -> None:
    torch.manual_seed(0)
    model = GPT(GPTS["GPT-debug"]).eval()
    nn.init.normal_(model.head.weight, std=0.3)

    def clips(compile: bool) -> dict[tuple, list[int]]:
        sampler = Sampler(model, SamplingConfig(slots=2, guidance=(2.0,), compile=compile))
        return {each.request.key: each.id_Q.tolist() for each in sampler.run(Request((i,), i) for i in range(5))}

    wanted = clips(False)
    assert clips(True) == wanted
    assert counters["stats"]["unique_graphs"] == 2


def test_what_cannot_be_compiled_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(graph: object, inputs: object) -> None:
        raise RuntimeError("no kernel for this machine\nand more lines")

    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=broken))
    model = build_tokenizer("VQ_debug")
    compile_layers(model, CPU, "run.compile=true", "train without it")
    with pytest.raises(SystemExit) as end:
        run_cli(lambda: tokenizer_gradients(model, [[2, 2, 2, 2]]) and 0)
    said = capsys.readouterr().err
    assert end.value.code == 2 and said.count("\n") == 1
    assert "cannot be compiled here (RuntimeError: no kernel for this machine); go on without run.compile" in said


@pytest.mark.parametrize(("device", "words"), [("cpu", "C\\+\\+ compiler, .* 'no-such-c"), ("cuda", "package triton")])
def test_missing_compilers_are_named(device: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=f"^--compile for {device} needs .*{words}.* sample without it"):
        compile_layers(build_tokenizer("VQ_debug"), torch.device(device), "--compile", "sample without it")
