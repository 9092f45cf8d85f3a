"""The quantiser against terms computed by hand, its gradients, its precision, and the figures of its use."""

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tokenizer.blocks import bottlenecks as quantizer_module
from tokenizer.blocks.bottlenecks import ENTROPY_TEMPERATURE, VectorQuantizer, code_usage, entropy_and_nearest


def quantizer_of(codes: list[list[float]]) -> VectorQuantizer:
    quantizer = VectorQuantizer(len(codes), len(codes[0]))
    with torch.no_grad():
        quantizer.codebook.weight.copy_(torch.tensor(codes))
    return quantizer


def random_case(num_tokens: int = 40, num_codes: int = 16, width: int = 8) -> tuple[VectorQuantizer, Tensor]:
    generator = torch.Generator().manual_seed(0)
    quantizer = quantizer_of(torch.randn(num_codes, width, generator=generator).tolist())
    return quantizer, torch.randn(num_tokens, width, generator=generator)


def test_terms_by_hand() -> None:
    """Codes along x and y; a token at 0 degrees and one at 60, of lengths that must not count."""
    quantizer = quantizer_of([[5.0, 0.0], [0.0, 0.1]])
    z_LE = torch.tensor([[3.0, 0.0], [0.5 * 7, 0.75**0.5 * 7]])
    out = quantizer(z_LE)
    assert out.code_L.tolist() == [0, 1]
    torch.testing.assert_close(out.latent_LE, torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
    # token 0 lies on its code; token 1 is 30 degrees from it: squared distance 2 - 2 cos 30, mean over 2 x 2 numbers
    wanted = (2 - 2 * math.cos(math.pi / 6)) / 4
    assert out.terms["codebook"].item() == pytest.approx(wanted, rel=1e-5)
    assert out.terms["commitment"].item() == pytest.approx(wanted, rel=1e-5)
    assert set(out.terms) == {"codebook", "commitment", "entropy"}


def entropy_term(z_LE: Tensor, codes_VE: Tensor) -> Tensor:
    return entropy_and_nearest(z_LE, codes_VE)[0]


def test_entropy_by_hand() -> None:
    """softmax(-d / 0.01), d the squared distance: mean entropy of a token minus the entropy of the mean."""
    cosine_LV = torch.tensor([[1.0, 0.995], [0.99, 1.0], [0.3, 0.3]])  # to codes along the axes
    prob = [[math.exp(-(2 - 2 * c) / ENTROPY_TEMPERATURE) for c in row] for row in cosine_LV.tolist()]
    prob = [[p / sum(row) for p in row] for row in prob]
    per_token = sum(-sum(p * math.log(p) for p in row) for row in prob) / 3
    mean = [sum(column) / 3 for column in zip(*prob, strict=True)]
    wanted = per_token + sum(p * math.log(p) for p in mean)
    assert entropy_term(cosine_LV, torch.eye(2)).item() == pytest.approx(wanted, rel=1e-4)


def test_entropy_prefers_sure_and_even_use() -> None:
    def of(*codes: int) -> float:
        return entropy_term(F.one_hot(torch.tensor(codes), 4).float(), torch.eye(4)).item()

    assert of(0, 1, 2, 3) == pytest.approx(-math.log(4), rel=1e-4)  # sure and even: the least there can be
    assert of(0, 1, 2, 3) < of(0, 0, 1, 1) < of(0, 0, 0, 0)
    assert entropy_term(torch.zeros(4, 4), torch.eye(4)).item() == pytest.approx(0, abs=1e-5)  # even, but unsure


def test_entropy_has_its_gradients_in_whatever_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against autograd through the formula, as one part and as many; 7 tokens in parts of 2."""
    generator = torch.Generator().manual_seed(0)
    z_LE, codes_VE = (F.normalize(torch.randn(n, 4, generator=generator), dim=-1) for n in (7, 5))
    codes_VE[1], codes_VE[2] = z_LE[0], F.normalize(z_LE[0] + 0.1 * codes_VE[2], dim=-1)  # near each other: unsure

    def plain(z_LE: Tensor, codes_VE: Tensor) -> Tensor:
        prob_LV = (z_LE @ codes_VE.T * 2 / ENTROPY_TEMPERATURE).softmax(dim=-1)
        mean_V = prob_LV.mean(dim=0)
        return -(prob_LV * (prob_LV + 1e-30).log()).sum(dim=-1).mean() + (mean_V * (mean_V + 1e-12).log()).sum()

    def results(term: Callable[[Tensor, Tensor], Tensor]) -> list[Tensor]:
        leaves = [z_LE.clone().requires_grad_(), codes_VE.clone().requires_grad_()]
        value = term(*leaves)
        return [value.detach(), *torch.autograd.grad(3 * value, leaves)]

    wanted = results(plain)
    torch.testing.assert_close(results(entropy_term), wanted, rtol=1e-4, atol=1e-5)
    monkeypatch.setattr(quantizer_module, "_parts", lambda z_LE, codes_VE: z_LE.split(2))
    torch.testing.assert_close(results(entropy_term), wanted, rtol=1e-4, atol=1e-5)


def test_codes_do_not_depend_on_the_terms() -> None:
    """Training with and without the entropy, and encoding, find the same; ties go to the first code."""
    quantizer, z_LE = random_case()
    with torch.no_grad():
        quantizer.codebook.weight[-1] = quantizer.codebook.weight[0]
        z_LE[0] = quantizer.codebook.weight[0]
    code_L = quantizer.encode(z_LE)
    assert code_L[0] == 0
    for quantizer.has_entropy in (True, False):
        assert torch.equal(quantizer(z_LE).code_L, code_L)


def test_the_gradient_passes_straight_through() -> None:
    """The decoder's gradient reaches the normalised latent unchanged, and not the codes."""
    quantizer, z_LE = random_case()
    z_LE.requires_grad_()
    weight_LE = torch.randn(z_LE.shape)
    (quantizer(z_LE).latent_LE * weight_LE).sum().backward()
    assert z_LE.grad is not None
    wanted = torch.autograd.grad((F.normalize(z_LE, dim=-1) * weight_LE).sum(), z_LE)[0]
    torch.testing.assert_close(z_LE.grad, wanted)
    codes_grad = quantizer.codebook.weight.grad
    assert codes_grad is None or not codes_grad.any()


def test_each_term_moves_its_own_side() -> None:
    quantizer, z_LE = random_case()
    z_LE.requires_grad_()
    moved = {}
    for name, term in quantizer(z_LE).terms.items():
        grads = torch.autograd.grad(term, [z_LE, quantizer.codebook.weight], retain_graph=True, allow_unused=True)
        moved[name] = tuple(grad is not None and bool(grad.any()) for grad in grads)
    assert moved == {"codebook": (False, True), "commitment": (True, False), "entropy": (True, True)}


def test_everything_is_fp32_under_bf16_autocast() -> None:
    quantizer, z_LE = random_case(num_tokens=500, num_codes=200)
    plain = quantizer(z_LE)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = quantizer(z_LE)
        nearest_L = quantizer.encode(z_LE)
    assert torch.equal(mixed.code_L, plain.code_L) and torch.equal(nearest_L, plain.code_L)
    assert torch.equal(mixed.latent_LE, plain.latent_LE) and mixed.latent_LE.dtype == torch.float32
    for name, term in mixed.terms.items():
        assert term.dtype == torch.float32 and torch.equal(term, plain.terms[name])


def test_forward_nearest_and_lookup_say_the_same() -> None:
    quantizer, z_LE = random_case()
    brute_L = torch.cdist(F.normalize(z_LE, dim=-1), F.normalize(quantizer.codebook.weight, dim=-1)).argmin(dim=-1)
    with torch.no_grad():
        out = quantizer(z_LE)
    assert torch.equal(out.code_L, brute_L) and torch.equal(quantizer.encode(z_LE), brute_L)
    assert torch.equal(out.latent_LE, quantizer.decode(out.code_L))  # codes are all that decoding needs, to the bit
    assert out.terms == {}  # nothing to train, nothing computed
    assert torch.equal(quantizer.encode(z_LE.view(5, 8, 8)), brute_L.view(5, 8))


@pytest.mark.parametrize("num_latents", [100, 5])
def test_the_codebook_starts_from_latents_that_occur(num_latents: int) -> None:
    quantizer, _ = random_case(num_codes=16)
    z_LE = torch.randn(num_latents, 8)
    quantizer.start(z_LE, torch.Generator().manual_seed(1))
    similarity_VL = quantizer.unit_codes() @ F.normalize(z_LE, dim=-1).T
    source_V = similarity_VL.argmax(dim=1)
    torch.testing.assert_close(similarity_VL.max(dim=1).values, torch.ones(16))
    assert len(source_V.unique()) == min(16, num_latents)  # each latent once before any comes again


def test_usage_and_perplexity_by_hand() -> None:
    figures = code_usage(torch.tensor([2, 2, 0, 0, 0, 0, 0, 0]))
    assert (figures["code_usage"], figures["dead_codes"]) == (2 / 8, 6)
    assert figures["perplexity"] == pytest.approx(2, rel=1e-5)
    figures = code_usage(torch.tensor([4.0, 1.0, 1.0, 0.0]))
    assert (figures["code_usage"], figures["dead_codes"]) == (3 / 4, 1)
    shares = [4 / 6, 1 / 6, 1 / 6]
    assert figures["perplexity"] == pytest.approx(math.exp(-sum(p * math.log(p) for p in shares)), rel=1e-5)
    assert code_usage(torch.ones(32)) == pytest.approx({"code_usage": 1.0, "perplexity": 32.0, "dead_codes": 0})
