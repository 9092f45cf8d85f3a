"""Clip -> sequence -> clip is exact, and whatever a model says, the grammar lets only valid sequences out."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from autoregressive.sequence import (
    BlockPositions,
    ClipCodes,
    Grammar,
    LengthRule,
    SequenceLayout,
    length_rule,
    pack_sequences,
)
from tokenizer.common.errors import UserError

CLASSES = SequenceLayout(codebook_size=64, levels=(2, 4, 8), num_blocks=4, num_classes=11)
FRAMES = SequenceLayout(codebook_size=64, levels=(2, 4, 8), num_blocks=4, condition_lengths=(8, 2))


def random_clip(layout: SequenceLayout, seed: int) -> ClipCodes:
    generator = torch.Generator().manual_seed(seed)

    def draw(most: int, num: int) -> torch.Tensor:
        return torch.randint(most, (num,), generator=generator)

    free = draw(len(layout.levels), layout.num_blocks - len(layout.condition_lengths)).tolist()
    lengths = (*layout.condition_lengths, *(layout.levels[i] for i in free))
    label = int(draw(layout.num_classes, 1)) if layout.num_classes else None
    codes = draw(layout.codebook_size, sum(lengths))
    return ClipCodes(codes, lengths, label, draw(layout.codebook_size, layout.condition_tokens))


@given(st.integers(0, 10**6), st.sampled_from([CLASSES, FRAMES]))
@settings(max_examples=100, deadline=None)
def test_clip_to_sequence_and_back_is_exact(seed: int, layout: SequenceLayout) -> None:
    clip = random_clip(layout, seed)
    id_Q = layout.encode(clip)
    assert len(id_Q) == layout.condition_tokens + 1 + layout.num_blocks + sum(clip.lengths) <= layout.max_length
    back = layout.decode(id_Q)
    assert (back.lengths, back.label) == (clip.lengths, clip.label)
    assert torch.equal(back.code_L, clip.code_L) and torch.equal(back.condition_L, clip.condition_L)


@given(st.lists(st.integers(0, 10**6), min_size=1, max_size=3), st.sampled_from([CLASSES, FRAMES]))
@settings(max_examples=50, deadline=None)
def test_positions_in_blocks_are_those_that_the_grammar_walks_through(seeds: list[int], layout: SequenceLayout) -> None:
    """Packed sequences at once, and the rows of a sampler one id at a time, against the grammar's own count."""
    packed = pack_sequences(layout, [layout.encode(random_clip(layout, seed)) for seed in seeds])
    positions = BlockPositions(layout, torch.device("cpu"))
    of_L = positions.of(packed.id_L, torch.cat([torch.arange(length) for length in packed.lengths]))
    first_of, given = {2: 1, 4: 3, 8: 7}, layout.condition_tokens
    for id_Q, of_Q in zip(packed.id_L.split(packed.lengths), of_L.split(packed.lengths), strict=True):
        grammar, inner_1 = Grammar(layout), torch.zeros(1, dtype=torch.long)
        assert of_Q[:given].tolist() == (list(range(8, 15)) + [1, 2, 0] if given else [])
        assert of_Q[given] == 0
        for token, of in zip(id_Q[given + 1 :].tolist(), of_Q[given + 1 :].tolist(), strict=True):
            grammar.advance(token)
            inner_1 = positions.after(inner_1, torch.tensor([token]))
            length = grammar.lengths[-1]
            wanted = first_of[length] + length - grammar.codes_left if grammar.codes_left else 0
            assert of == wanted == inner_1.item() < layout.num_block_positions


def test_layout_is_that_of_the_paper() -> None:
    levels = (32, 64, 128, 256, 512)
    c2v = SequenceLayout(8192, levels, 4, num_classes=101)
    assert (c2v.num_ids, c2v.num_input_ids, c2v.max_length) == (8197, 8197 + 102, 2053)
    prediction = SequenceLayout(8192, levels, 4, condition_lengths=(512, 128))
    assert (prediction.condition_tokens, prediction.num_input_ids, prediction.max_length) == (640, 8198, 2309)


def test_order_of_a_small_sequence() -> None:
    layout = SequenceLayout(codebook_size=10, levels=(1, 2), num_blocks=2, num_classes=3)
    clip = ClipCodes(torch.tensor([7, 8, 9]), (2, 1), label=1)
    assert layout.encode(clip).tolist() == [13, 11, 7, 8, 10, 9]  # class 1, "2 follow", two codes, "1 follows", code
    packed = pack_sequences(layout, [layout.encode(clip)])
    assert packed.id_L.tolist() == [13, 11, 7, 8, 10] and packed.target_W.tolist() == [11, 7, 8, 10, 9]


def test_packing_hides_the_condition_from_the_loss() -> None:
    sequences = [FRAMES.encode(random_clip(FRAMES, seed)) for seed in range(3)]
    packed = pack_sequences(FRAMES, sequences)
    assert list(packed.lengths) == sorted(len(id_Q) - 1 for id_Q in sequences)
    assert packed.given == 10 and len(packed.id_L) == sum(packed.lengths)
    said = packed.target_W.split([length - 10 for length in packed.lengths])
    for target_Q, id_Q in zip(said, sorted(sequences, key=len), strict=True):
        assert target_Q[0] == FRAMES.length_id(8) and target_Q.equal(id_Q[11:])  # behind 10 codes, separator


@given(
    seed=st.integers(0, 10**6),
    layout=st.sampled_from([CLASSES, FRAMES]),
    scale=st.sampled_from([0.0, 1.0, 1e4, float("inf")]),
    max_tokens=st.none() | st.integers(14, 40),
)
@settings(max_examples=100, deadline=None)
def test_the_grammar_makes_any_logits_valid(
    seed: int, layout: SequenceLayout, scale: float, max_tokens: int | None
) -> None:
    """100 examples of 100 streams each: 10,000 streams of logits."""
    generator = torch.Generator().manual_seed(seed)
    rule = length_rule(layout, max_tokens=max_tokens)
    for _ in range(100):
        grammar, ids = Grammar(layout, rule), []
        while not grammar.finished:
            logits_V = torch.randn(layout.num_ids, generator=generator) * scale
            allowed_V = grammar.allowed_ids()
            token = int(logits_V.nan_to_num(0, 1e30, -1e30).masked_fill(~allowed_V, -torch.inf).argmax())
            grammar.advance(token)
            ids.append(token)
        condition = [0] * layout.condition_tokens + [layout.open_id]
        clip = layout.decode(torch.tensor(condition + ids))
        assert clip.lengths[: len(rule.forced)] == rule.forced
        assert max_tokens is None or sum(clip.lengths) <= max_tokens


def test_allowed_ids_and_allows_agree() -> None:
    grammar = Grammar(CLASSES, LengthRule(max_tokens=12))
    assert grammar.allowed_levels() == (True, True, False)  # 8 and three blocks of 2 would be 14
    for length in (4, 4, 2, 2):  # 12 in all
        for token in (CLASSES.length_id(length), *range(length)):
            allowed = [i for i in range(-1, CLASSES.num_input_ids + 1) if grammar.allows(i)]
            assert allowed == grammar.allowed_ids().nonzero().flatten().tolist() and token in allowed
            grammar.advance(token)
    assert grammar.finished


def test_codes_can_be_skipped_at_once() -> None:
    grammar = Grammar(CLASSES)
    for _ in range(4):
        assert grammar.wants_length
        grammar.advance(CLASSES.length_id(4))
        grammar.skip_codes(3)
        assert not grammar.wants_length and not grammar.finished
        grammar.advance(0)
    assert grammar.finished and grammar.wanted == "nothing more" and not grammar.allowed_ids().any()


@pytest.mark.parametrize(
    ("ids", "words"),
    [
        ([0], "must hold its condition"),
        ([78, 3], "place 1 of a sequence holds 3, but the grammar wants a length token"),
        ([78, 64, 1, 65], "place 3 of a sequence holds 65, but the grammar wants a code"),
        ([78, 64, 1], "ends after 3 ids, but the grammar wants a code"),
        ([78, *[64, 1, 1] * 4, 5], "place 13 of a sequence holds 5, but the grammar wants nothing more"),
    ],
)
def test_broken_sequences_are_named(ids: list[int], words: str) -> None:
    with pytest.raises(UserError, match=words):
        CLASSES.decode(torch.tensor(ids))


def test_rules_that_cannot_be_are_refused() -> None:
    with pytest.raises(UserError, match=r"length 3 is none of the levels \[2, 4, 8\]"):
        length_rule(CLASSES, (2, 3))
    with pytest.raises(UserError, match="5 lengths .* but a clip has 4 blocks"):
        length_rule(CLASSES, (2,) * 5)
    with pytest.raises(UserError, match=r"clips begin with \[8, 2\]"):
        length_rule(FRAMES, (4, 2))
    with pytest.raises(UserError, match="13 tokens are below the smallest clip that is allowed here: 14"):
        length_rule(FRAMES, max_tokens=13)
    with pytest.raises(UserError, match=r"class 11 does not exist: this model has classes 0 \.\. 10"):
        CLASSES.condition_id(11)
    with pytest.raises(UserError, match="length 5 is none of the levels"):
        SequenceLayout(64, (2, 4), 4, condition_lengths=(5,))
    with pytest.raises(UserError, match="does not begin with"):
        FRAMES.encode(ClipCodes(torch.zeros(8, dtype=torch.long), (2, 2, 2, 2)))
