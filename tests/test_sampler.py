"""The sampler: what a clip depends on and what it does not, the grammar, lengths, guidance, and how often it waits."""

import gc
import re
import weakref
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from autoregressive.logits import draw_ids, guide, gumbel, id_words, keep_top_k, keep_top_p, key_words
from autoregressive.model import GPT, GPTConfig
from autoregressive.presets import PRESETS
from autoregressive.sampler import Request, Sample, Sampler, SamplingConfig, cost_of_fp8_cache
from autoregressive.sequence import Grammar, LengthRule, length_rule, longest_sequence
from tokenizer.common.errors import UserError

CLASSES = replace(PRESETS["GPT-debug"], block_positions=True)
FRAMES = replace(PRESETS["GPT-debug"], num_classes=0, condition_lengths=[8, 4])
ANY = LengthRule()
GUIDED = SamplingConfig(slots=3, guidance=(2.0,))


def random_gpt(config: GPTConfig, seed: int = 0) -> GPT:
    """Random weights with a head that has opinions."""
    torch.manual_seed(seed)
    model = GPT(config).eval()
    torch.nn.init.normal_(model.head.weight, std=0.3)
    return model


@pytest.fixture(scope="module")
def gpt() -> GPT:
    return random_gpt(CLASSES)


@pytest.fixture(scope="module")
def frames_gpt() -> GPT:
    return random_gpt(FRAMES)


def requests_of(num: int, rule: LengthRule = ANY) -> list[Request]:
    return [Request(("clip", i), label=i % CLASSES.num_classes, rule=rule) for i in range(num)]


def conditions(num: int) -> list[Request]:
    rule = length_rule(FRAMES.layout)
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(FRAMES.codebook_size, (num, 12), generator=generator)
    return [Request(("clip", i), condition_L=codes[i], rule=rule) for i in range(num)]


def run(model: GPT, config: SamplingConfig, requests: list[Request]) -> dict[tuple, list[int]]:
    """Key of each request -> ids of its sequence."""
    return {sample.request.key: sample.id_Q.tolist() for sample in Sampler(model, config).run(requests)}


@torch.no_grad()
def recompute(model: GPT, config: SamplingConfig, request: Request) -> Tensor:
    """One clip without slots and without a cache: the whole sequence through the model for each id."""
    layout, grammar = model.layout, Grammar(model.layout, request.rule)
    key_12, word_V = torch.tensor([key_words(config.seed, *request.key)]), id_words(layout.num_ids)
    heads = [layout.condition_id(request.label), layout.open_id][: config.streams]
    id_GQ = torch.stack([torch.cat([request.condition_L, torch.tensor([head])]) for head in heads])
    while not grammar.finished:
        num = id_GQ.shape[1]
        logits_GV = torch.stack([model(id_Q, [num])[-1] for id_Q in id_GQ])
        block = len(grammar.lengths) - (0 if grammar.wants_length else 1)
        logits_1V = guide(logits_GV[None], torch.tensor([config.scale_of(block)]))
        bias_V = torch.zeros(layout.num_ids).masked_fill(~grammar.allowed_ids(), -torch.inf)
        noise_1V = gumbel(key_12, torch.tensor([num - 1]), word_V)
        drawn = draw_ids(logits_1V, bias_V, noise_1V, config.temperature, config.top_k, config.top_p)
        grammar.advance(int(drawn))
        id_GQ = torch.cat([id_GQ, drawn.expand(len(heads), 1)], dim=1)
    return id_GQ[0]


@pytest.mark.parametrize(
    "config",
    [
        SamplingConfig(slots=2),
        SamplingConfig(slots=2, guidance=(2.5, 1.0, 0.5, 1.0)),
        SamplingConfig(slots=2, guidance=(2.5,), temperature=0.8, top_k=20, top_p=0.9, seed=7),
    ],
)
def test_sampling_equals_uncached_recomputation(gpt: GPT, config: SamplingConfig) -> None:
    requests = requests_of(5)
    ours = run(gpt, config, requests)
    assert {r.key: recompute(gpt, config, r).tolist() for r in requests} == ours


def test_a_prefix_is_prefilled_in_one_pass_and_equals_recomputation(frames_gpt: GPT) -> None:
    requests = conditions(4)
    sampler = Sampler(frames_gpt, SamplingConfig(slots=2))
    samples = list(sampler.run(requests))
    for sample in samples:
        assert sample.lengths[:2] == (8, 4)
        assert sample.id_Q.tolist() == recompute(frames_gpt, sampler.config, sample.request).tolist()
        assert torch.equal(sample.codes(FRAMES.layout).condition_L, sample.request.condition_L)
    sampled = sum(len(sample.id_Q) - len(sample.request.condition_L) - 1 for sample in samples)
    assert sampler.counts.row_steps == sampler.counts.tokens == sampled, "the prefix costs no step"


def test_a_clip_depends_on_nothing_but_seed_and_key(gpt: GPT) -> None:
    """Other slots, other batch mates, another order, two processes: bit for bit the same."""
    requests = requests_of(10)
    whole = run(gpt, GUIDED, requests)
    assert run(gpt, GUIDED, requests[::-1]) == whole
    assert run(gpt, GUIDED, requests[0::2]) | run(gpt, GUIDED, requests[1::2]) == whole
    assert run(gpt, GUIDED, requests[4:5])["clip", 4] == whole["clip", 4]
    assert run(gpt, replace(GUIDED, slots=8), requests) == whole
    assert len(set(map(tuple, whole.values()))) == 10
    assert run(gpt, replace(GUIDED, seed=1), requests) != whole


def test_rows_are_equal_to_the_bit_whatever_the_others_hold(gpt: GPT) -> None:
    """Logits of one step for the same row in another slot among others."""
    same, generator = torch.tensor([3, 5, 7]), torch.Generator().manual_seed(0)

    def last_logits(slot: int) -> Tensor:
        cache = gpt.new_cache(slots=4, streams=1)
        other_S3 = torch.randint(gpt.layout.num_ids, (4, 3), generator=generator)
        other_S3[slot] = same
        with torch.inference_mode():
            for t in range(3):
                live = [t + 1 if s == slot or t == 2 else 0 for s in range(4)]
                logits_SV = gpt.step(other_S3[:, t], torch.full((4,), t), live, cache, torch.zeros(4, dtype=torch.long))
        return logits_SV[slot]

    assert torch.equal(last_logits(0), last_logits(3))


@pytest.mark.parametrize("top_k", [0, 1])
def test_every_sequence_obeys_the_grammar(gpt: GPT, top_k: int) -> None:
    for sample in Sampler(gpt, SamplingConfig(slots=4, top_k=top_k)).run(requests_of(12)):
        clip = gpt.layout.decode(sample.id_Q)
        assert clip.lengths == sample.lengths and clip.label == sample.request.label
        assert torch.equal(clip.code_L, sample.codes(gpt.layout).code_L)


def test_without_the_mask_broken_sequences_are_found() -> None:
    """A model of equal logits and a tiny grammar, so that good and broken sequences both occur."""
    model = GPT(replace(CLASSES, codebook_size=6, levels=[1, 2], num_blocks=1)).eval()
    sampler = Sampler(model, SamplingConfig(slots=4, check_grammar=False))
    samples = list(sampler.run(requests_of(100)))
    good = [sample for sample in samples if sample.broken is None]
    assert len(samples) == 100 and sampler.counts.broken == 100 - len(good) and 0 < len(good) < 50
    for sample in good:
        assert model.layout.decode(sample.id_Q).lengths == sample.lengths
    for sample in samples:
        if sample.broken is not None:
            assert "grammar wants" in sample.broken
            with pytest.raises(UserError):
                model.layout.decode(sample.id_Q)
    assert {len(sample.id_Q) for sample in samples if sample.broken} == {2, 3, 4}, "some break in their codes"


def test_lengths_can_be_forced_or_limited(gpt: GPT) -> None:
    forced = Sampler(gpt, GUIDED)
    lengths = (2, 8, 4, 2)
    samples = list(forced.run(requests_of(7, length_rule(gpt.layout, lengths))))
    assert [sample.lengths for sample in samples] == [lengths] * 7
    assert forced.counts.synchronisations == 0, "nothing to be read: all is known"

    rule = length_rule(gpt.layout, (4,), max_tokens=14)
    samples = list(Sampler(gpt, GUIDED, longest_sequence(gpt.layout, rule)).run(requests_of(12, rule)))
    assert {sample.lengths[0] for sample in samples} == {4}
    assert max(sum(sample.lengths) for sample in samples) <= 14
    assert len({sample.lengths for sample in samples}) > 1


def test_guidance_of_one_is_no_guidance(gpt: GPT) -> None:
    plain = SamplingConfig(slots=3)
    assert plain.streams == 1 and replace(plain, guidance=(1.0,) * 4).streams == 1
    both_halves = replace(plain, guidance=(1.0, 1.0, 1.0, 1.0 + 1e-12))
    assert both_halves.streams == 2
    requests = requests_of(6)
    assert run(gpt, plain, requests) == run(gpt, both_halves, requests) != run(gpt, GUIDED, requests)


def test_the_host_waits_four_times_a_clip(gpt: GPT) -> None:
    config = SamplingConfig(slots=4)
    sampler = Sampler(gpt, config)
    samples: list[Sample] = list(sampler.run(requests_of(40)))
    counts = sampler.counts
    assert counts.clips == 40 and counts.synchronisations <= 4 * 40
    assert counts.row_steps == sum(sum(sample.lengths) + 4 for sample in samples)
    assert counts.utilisation(config.slots) > 0.85
    assert sampler.cache_bytes == sampler._cache.num_bytes


def test_stopping_early_leaves_a_usable_sampler(gpt: GPT) -> None:
    sampler = Sampler(gpt, GUIDED)
    run_of = sampler.run(requests_of(9))
    next(run_of)
    run_of.close()
    again = {sample.request.key: sample.id_Q.tolist() for sample in sampler.run(requests_of(4))}
    assert again == run(gpt, GUIDED, requests_of(4))


def test_bf16_obeys_the_same_rules(gpt: GPT) -> None:
    half = random_gpt(CLASSES).bfloat16()
    requests = requests_of(6)
    whole = run(half, GUIDED, requests)
    assert run(half, GUIDED, requests[::-1]) == whole
    for ids in whole.values():
        half.layout.decode(torch.tensor(ids))


@pytest.mark.parametrize(
    ("model", "config", "words"),
    [
        (FRAMES, GUIDED, "guidance needs a model with classes"),
        (CLASSES, SamplingConfig(guidance=(1.0, 2.0)), "2 guidance scales: give one, or one for each of 4"),
        (CLASSES, SamplingConfig(slots=10**9), r"GiB free: \d+ slots would fit"),
    ],
)
def test_what_does_not_fit_is_refused(model: GPTConfig, config: SamplingConfig, words: str) -> None:
    with pytest.raises(UserError, match=words):
        Sampler(random_gpt(model), config)


@pytest.mark.parametrize(
    "changes",
    [{"slots": 0}, {"temperature": 0.0}, {"top_p": 0.0}, {"top_k": -1}, {"guidance": ()}, {"guidance": (-1.0,)}],
)
def test_impossible_settings_are_refused(changes: dict) -> None:
    with pytest.raises(UserError, match=next(iter(changes))):
        SamplingConfig(**changes)


# --- the verbs ------------------------------------------------------------------------------------------------------


def test_noise_is_gumbel_and_independent() -> None:
    key_S2 = torch.tensor([key_words(0, i) for i in range(64)])
    word_V = id_words(4096)
    noise_SV = gumbel(key_S2, torch.zeros(64, dtype=torch.long), word_V).double()
    assert noise_SV.isfinite().all()
    assert noise_SV.mean().item() == pytest.approx(0.57722, abs=0.01)
    assert noise_SV.var().item() == pytest.approx(torch.pi**2 / 6, abs=0.03)
    step_1 = gumbel(key_S2, torch.ones(64, dtype=torch.long), word_V).double()
    rows = torch.cat([noise_SV, step_1])
    correlation = torch.corrcoef(rows) - torch.eye(len(rows))
    assert correlation.abs().max() < 0.09  # 128 rows of 4096: six deviations of chance
    columns = torch.corrcoef(rows[:, :64].T) - torch.eye(64)
    assert columns.abs().max() < 0.5


def test_draws_follow_the_probabilities() -> None:
    probability_V = torch.tensor([0.5, 0.3, 0.15, 0.05])
    num = 20_000
    key_S2 = torch.tensor([key_words(3, "sample")]).expand(num, 2)
    noise_SV = gumbel(key_S2, torch.arange(num), id_words(4))
    drawn_S = draw_ids(probability_V.log().expand(num, 4), torch.zeros(4), noise_SV)
    share_V = torch.bincount(drawn_S, minlength=4) / num
    torch.testing.assert_close(share_V, probability_V, atol=0.015, rtol=0)


def test_noise_has_known_values() -> None:
    """Resumed and repeated runs of later versions must draw the same."""
    words = (1714604089, 2788312637)
    assert key_words(0, "clip", 1) == words
    noise_1V = gumbel(torch.tensor([words]), torch.tensor([5]), id_words(3))
    torch.testing.assert_close(noise_1V, torch.tensor([[0.4954065, 2.9511757, 0.0527605]]))


def test_filters() -> None:
    logits = torch.tensor([[0.0, 3.0, 2.0, 1.0]])
    kept = [keep_top_k(logits, k).isfinite().sum().item() for k in (0, 1, 2, 4, 9)]
    assert kept == [4, 1, 2, 4, 4]
    share = logits.softmax(dim=1)[0].sort(descending=True).values
    for p, num in ((1e-6, 1), (share[0].item() + 1e-4, 2), (share[:3].sum().item() + 1e-4, 4), (1.0, 4)):
        assert keep_top_p(logits, p).isfinite().sum() == num


def test_guidance_is_the_formula() -> None:
    c, u = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0))
    scale_S = torch.tensor([0.0, 1.0, 2.5])
    guided = guide(torch.stack([c, u], dim=1), scale_S)
    assert torch.equal(guided[1], c[1])
    torch.testing.assert_close(guided, u + scale_S[:, None] * (c - u))


def test_a_sampler_that_nobody_needs_is_gone_at_once(gpt: GPT) -> None:
    """With its cache, and on a GPU its graphs: a validation must not leave them to the steps after it."""
    sampler = Sampler(gpt, GUIDED)
    assert len(list(sampler.run(requests_of(2)))) == 2
    watched = weakref.ref(sampler)
    gc.disable()
    try:
        del sampler
        assert watched() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("config", [CLASSES, FRAMES])
def test_keys_and_values_in_8_bits_cost_little_and_say_how_much(config: GPTConfig) -> None:
    model = random_gpt(config)
    eight = SamplingConfig(slots=3, fp8_cache=True)
    sampler = Sampler(model, eight)
    assert sampler.cache_bytes * 4 == Sampler(model, SamplingConfig(slots=3)).cache_bytes
    wanted = requests_of(6) if config is CLASSES else conditions(6)
    whole = {sample.request.key: sample.id_Q.tolist() for sample in sampler.run(wanted)}
    assert run(model, eight, wanted[::-1]) == whole, "a clip depends on nothing but its key"
    found = re.search(r"likeliest id equal in ([\d.]+)%, KL ([\d.e-]+) nats", cost_of_fp8_cache(model))
    assert found and float(found[1]) > 80 and 0 < float(found[2]) < 0.1
    assert eight.facts()["fp8_cache"] is True and "fp8_cache" not in SamplingConfig().facts(), "earlier results resume"
