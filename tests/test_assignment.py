"""Assignments: table, rows, lengths, token counts, packing, prefix tree, best row. All pure, so properties hold it."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenizer.assignment import AssignmentSpace, pack, pack_uniform
from tokenizer.common.errors import UserError

PAPER = AssignmentSpace((32, 64, 128, 256, 512), num_blocks=4)

spaces = st.builds(
    AssignmentSpace,
    st.sets(st.integers(1, 600), min_size=1, max_size=5).map(lambda levels: tuple(sorted(levels))),
    st.integers(1, 4),
)
length_tables = st.integers(1, 4).flatmap(
    lambda num_blocks: st.lists(st.lists(st.integers(1, 9), min_size=num_blocks, max_size=num_blocks), min_size=1)
)
quick = settings(max_examples=40, deadline=None)


def test_the_papers_space() -> None:
    assert PAPER.num_rows == len(PAPER.table_AN) == 625
    assert (PAPER.min_tokens, PAPER.max_tokens) == (128, 2048)
    assert PAPER.table_AN[0].tolist() == [32] * 4 and PAPER.table_AN[-1].tolist() == [512] * 4
    assert PAPER.table_AN[1].tolist() == [32, 32, 32, 64]  # the last block counts fastest
    # uniformly random assignments, as computed in the description of the paper
    assert PAPER.tokens_A.float().mean().item() == pytest.approx(793.6)
    assert PAPER.tokens_A.double().std(correction=0).item() == pytest.approx(349.14, abs=0.005)


@quick
@given(spaces)
def test_rows_lengths_and_token_counts_agree(space: AssignmentSpace) -> None:
    row_A = torch.arange(space.num_rows)
    assert torch.equal(space.rows_of(space.lengths_of(row_A)), row_A)
    assert torch.equal(space.table_AN.sum(dim=1), space.tokens_A)
    assert (space.tokens_A.min(), space.tokens_A.max()) == (space.min_tokens, space.max_tokens)
    table = space.table_AN.tolist()
    assert table == sorted(table)  # lexicographic
    assert len({tuple(lengths) for lengths in table}) == space.num_rows == len(space.levels) ** space.num_blocks
    for level in space.levels:
        assert space.table_AN[space.uniform_row(level)].tolist() == [level] * space.num_blocks


@quick
@given(spaces, st.integers(0, 700))
def test_a_length_outside_the_levels_is_refused_by_name(space: AssignmentSpace, length: int) -> None:
    if length in space.levels:
        return
    lengths = torch.full((2, space.num_blocks), space.levels[0])
    lengths[1, -1] = length
    with pytest.raises(UserError, match=rf"length {length} is none of the levels"):
        space.rows_of(lengths)


def test_wrong_number_of_blocks_and_wrong_levels_are_refused() -> None:
    with pytest.raises(UserError, match="an assignment has 4 lengths, one per block; got 3"):
        PAPER.rows_of(torch.tensor([32, 32, 32]))
    for levels in [(), (0, 1), (4, 2), (2, 2)]:
        with pytest.raises(UserError, match="levels"):
            AssignmentSpace(levels, 4)
    with pytest.raises(UserError, match="num_blocks = 0"):
        AssignmentSpace((1, 2), 0)


def test_draws_are_uniform_and_belong_to_the_generator() -> None:
    space = AssignmentSpace((1, 2), 2)
    row_B = space.draw_rows(4000, torch.Generator().manual_seed(5))
    assert torch.equal(row_B, space.draw_rows(4000, torch.Generator().manual_seed(5)))
    assert not torch.equal(row_B, space.draw_rows(4000, torch.Generator().manual_seed(6)))
    assert (torch.bincount(row_B, minlength=4) - 1000).abs().max() < 120  # 4 sigma


@quick
@given(spaces, st.data())
def test_rows_with_prefix_are_exactly_those(space: AssignmentSpace, data: st.DataObject) -> None:
    prefix = data.draw(st.lists(st.sampled_from(space.levels), max_size=space.num_blocks))
    rows = space.rows_with_prefix(prefix).tolist()
    assert rows == [r for r, lengths in enumerate(space.table_AN.tolist()) if lengths[: len(prefix)] == prefix]
    assert len(rows) == len(space.levels) ** (space.num_blocks - len(prefix))


def test_the_25_rows_of_frame_prediction() -> None:
    assert len(PAPER.rows_with_prefix((512, 128))) == 25
    with pytest.raises(UserError, match="prefix length 100 is none of the levels"):
        PAPER.rows_with_prefix((512, 100))
    with pytest.raises(UserError, match="does not fit"):
        PAPER.rows_with_prefix((32,) * 5)


def test_many_blocks_need_no_table() -> None:
    """Draws and lengths of 5^20 assignments are arithmetic; only what scores every row is refused."""
    space = AssignmentSpace(PAPER.levels, num_blocks=20)
    row_B = space.draw_rows(1000, torch.Generator().manual_seed(0))
    length_BN = space.lengths_of(row_B)
    assert torch.equal(space.rows_of(length_BN), row_B) and length_BN.shape == (1000, 20)
    assert all((length_BN[:, [0, 19]] == level).any(dim=0).all() for level in PAPER.levels)
    assert space.lengths_of(torch.tensor(space.uniform_row(256))).tolist() == [256] * 20
    assert len(space.rows_with_prefix((32,) * 17)) == 125
    tables = (lambda: space.table_AN, lambda: space.tokens_A, lambda: space.rows_with_prefix(()))
    for whole in tables:
        with pytest.raises(UserError, match="95367431640625 assignments, too many to score each .*fixed:"):
            whole()
    with pytest.raises(UserError, match="more assignments than 64 bits can number"):
        AssignmentSpace(PAPER.levels, num_blocks=28)
    with pytest.raises(IndexError, match="625 of 625"):
        PAPER.lengths_of(torch.tensor([3, 625]))


@quick
@given(spaces, st.integers(0, 2**32), st.data())
def test_best_row_is_the_brute_force_one(space: AssignmentSpace, seed: int, data: st.DataObject) -> None:
    score_BA = torch.randint(0, 6, (3, space.num_rows), generator=torch.Generator().manual_seed(seed)).float()
    limit = data.draw(st.none() | st.integers(space.min_tokens, space.max_tokens))
    fits = [a for a in range(space.num_rows) if limit is None or space.tokens_A[a] <= limit]
    # many ties: fewer tokens win, then the smaller row
    wanted = [min(fits, key=lambda a: (-score_A[a], space.tokens_A[a], a)) for score_A in score_BA]
    assert space.best_row(score_BA, limit).tolist() == wanted


def test_a_budget_below_the_smallest_assignment_states_the_minimum() -> None:
    with pytest.raises(UserError, match="100 tokens are below the smallest assignment: the minimum is 128"):
        PAPER.best_row(torch.zeros(1, 625), max_tokens=100)


@quick
@given(length_tables)
def test_packing_says_where_each_token_stands(lengths: list[list[int]]) -> None:
    packing = pack(torch.tensor(lengths))
    places = [
        (b, t) for b, row in enumerate(lengths) for t, length in enumerate(row) for _ in range(length)
    ]  # clip by clip, block by block
    assert list(zip(packing.clip_L.tolist(), packing.block_L.tolist(), strict=True)) == places
    assert packing.num_tokens == len(places) == sum(packing.clip_lengths)
    assert torch.equal(packing.length_BN, torch.tensor(lengths))
    for b, t in itertools.product(range(packing.num_clips), range(packing.num_blocks)):
        assert places.index((b, t)) == packing.first_BN[b, t]
        assert packing.block_ends[b][t] == sum(lengths[b][: t + 1])
    assert packing.is_regular == (len({tuple(row) for row in lengths}) == 1)


@quick
@given(length_tables)
def test_unpack_undoes_pack(lengths: list[list[int]]) -> None:
    clips = [[torch.rand(length, 2) for length in row] for row in lengths]
    packed_LD = torch.cat([block for blocks in clips for block in blocks])
    back = pack(torch.tensor(lengths)).unpack(packed_LD)
    assert [len(blocks) for blocks in back] == [len(blocks) for blocks in clips]
    pairs = zip(itertools.chain(*back), itertools.chain(*clips), strict=True)
    assert all(torch.equal(ours, wanted) for ours, wanted in pairs)


def test_pack_refuses_what_is_no_table_of_lengths() -> None:
    for lengths in (torch.tensor([3, 4]), torch.tensor([[3, 0]]), torch.zeros(0, 4, dtype=torch.long)):
        with pytest.raises(UserError, match="lengths must be a"):
            pack(lengths)


def test_uniform_packing_is_the_same_as_packing_a_uniform_table() -> None:
    uniform = pack_uniform(3, 4, 5)
    assert uniform.lengths == pack(torch.full((3, 4), 5)).lengths and uniform.is_regular
    assert uniform.num_tokens == math.prod((3, 4, 5))
