"""Budgets: what parses, what is chosen, and that a clip's choice is its own."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenizer.assignment import AssignmentSpace
from tokenizer.budget import choose_rows, find_price, keeps_quality, parse_budget
from tokenizer.common.errors import UserError

SPACE = AssignmentSpace((8, 16, 32), 3)  # 27 rows, 24 to 96 tokens


def scores(num_clips: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(num_clips, SPACE.num_rows, generator=torch.Generator().manual_seed(seed))


def chosen_tokens(text: str, score_BA: torch.Tensor, price: float | None = None) -> torch.Tensor:
    return SPACE.tokens_A[choose_rows(parse_budget(text, SPACE), score_BA, SPACE, price)]


@given(
    st.text(max_size=30) | st.from_regex(r"(tokens|average|price|quality|fixed|uniform|router):?[-+0-9.,einf]{0,12}")
)
def test_any_text_parses_or_is_refused_in_one_line(text: str) -> None:
    try:
        budget = parse_budget(text, SPACE)
    except UserError as error:
        assert repr(text) in str(error) and "\n" not in str(error)
        return
    rows = choose_rows(budget, scores(2), SPACE, price=0.0)
    assert rows.shape == (2,) and int(rows.min()) >= 0 and int(rows.max()) < SPACE.num_rows


@given(st.integers(SPACE.min_tokens, 200), st.integers(0, 50))
def test_a_limit_is_kept_and_nothing_better_fits_into_it(limit: int, seed: int) -> None:
    score_BA = scores(4, seed)
    row_B = choose_rows(parse_budget(f"tokens:{limit}", SPACE), score_BA, SPACE)
    allowed_A = SPACE.tokens_A <= limit
    assert allowed_A[row_B].all()
    assert torch.equal(score_BA.gather(1, row_B[:, None])[:, 0], score_BA[:, allowed_A].amax(dim=1))


def test_router_is_the_argmax_and_a_higher_price_never_buys_more_tokens() -> None:
    score_BA = scores(20)
    assert torch.equal(choose_rows(parse_budget("router", SPACE), score_BA, SPACE), score_BA.argmax(dim=1))
    spent = [chosen_tokens(f"price:{price}", score_BA) for price in (-1.0, -0.01, 0.0, 0.01, 0.1, 1.0)]
    for more, less in pairwise(spent):
        assert (less <= more).all()
    assert (spent[0] == SPACE.max_tokens).all() and (spent[-1] == SPACE.min_tokens).all()


def test_equal_scores_go_to_the_cheapest_row() -> None:
    assert chosen_tokens("router", torch.zeros(1, SPACE.num_rows)).item() == SPACE.min_tokens


def test_fixed_and_uniform_need_no_router() -> None:
    fixed = parse_budget("fixed:8, 32,16", SPACE)
    assert not fixed.needs_router
    row_B = choose_rows(fixed, None, SPACE, num_clips=3)
    assert SPACE.lengths_of(row_B).tolist() == [[8, 32, 16]] * 3
    uniform = choose_rows(parse_budget("uniform:16", SPACE), scores(2), SPACE)
    assert SPACE.lengths_of(uniform).tolist() == [[16, 16, 16]] * 2


@settings(deadline=None)
@given(st.integers(0, 1000), st.integers(1, 12), st.floats(SPACE.min_tokens, 120), st.floats(1e-3, 1e3))
def test_the_price_meets_the_average_and_a_lower_one_does_not(seed: int, clips: int, wish: float, scale: float) -> None:
    score_SA = scale * scores(clips, seed)
    price = find_price(score_SA, SPACE, wish)

    def mean(price: float) -> float:
        return chosen_tokens(f"average:{wish!r}", score_SA, price).double().mean().item()

    assert mean(price) <= wish
    if wish < SPACE.max_tokens:
        assert mean(price - 1e-6 * scale) > wish
    else:
        assert mean(price) == SPACE.max_tokens


def test_clips_that_tie_at_the_price_stay_equal_and_below_the_wish() -> None:
    score_SA = scores(1).expand(5, -1)
    tokens = chosen_tokens("average:60", score_SA, find_price(score_SA, SPACE, 60))
    assert len(tokens.unique()) == 1 and tokens[0] <= 60


@pytest.mark.parametrize("text", ["router", "tokens:50", "price:0.02", "average:50", "quality:0.5", "uniform:8"])
def test_a_clip_never_depends_on_its_batch_mates(text: str) -> None:
    score_SA = scores(16)
    budget, price = parse_budget(text, SPACE), find_price(score_SA, SPACE, 50)
    together = choose_rows(budget, score_SA, SPACE, price)
    alone = torch.cat([choose_rows(budget, score_1A, SPACE, price) for score_1A in score_SA.split(1)])
    shuffled = torch.randperm(16, generator=torch.Generator().manual_seed(1))
    assert torch.equal(together, alone)
    assert torch.equal(together[shuffled], choose_rows(budget, score_SA[shuffled], SPACE, price))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("tokens:23", "minimum is 24"),
        ("average:10", "minimum is 24"),
        ("uniform:64", "8, 16, 32"),
        ("fixed:8,8,9", "8, 16, 32"),
        ("fixed:8,8", "3 blocks"),
        ("tokens:many", "whole number"),
        ("price:nan", "finite"),
        ("average:inf", "finite"),
        ("quality:good", "finite"),
        ("routr", "tokens:N"),
        ("", "router"),
    ],
)
def test_a_wrong_budget_says_what_is_right(text: str, says: str) -> None:
    with pytest.raises(UserError, match=says) as caught:
        parse_budget(text, SPACE)
    assert "\n" not in str(caught.value)


def test_a_quality_floor_gets_the_cheapest_row_that_keeps_it() -> None:
    space = AssignmentSpace((1, 2), 2)  # rows (1, 1), (1, 2), (2, 1), (2, 2): 2, 3, 3 and 4 tokens
    distance_BA = torch.tensor(
        [
            [0.9, 0.5, 0.4, 0.1],  # two rows of 3 tokens keep 0.5: the better one
            [0.5, 0.1, 0.1, 0.1],  # the smallest keeps it
            [0.9, 0.8, 0.7, 0.6],  # no row keeps it: the best
            [0.6, 0.6, 0.6, 0.6],  # no row keeps it, all are equal: the cheapest
        ]
    )
    budget = parse_budget("quality:0.5", space)
    row_B = choose_rows(budget, -distance_BA, space)
    assert row_B.tolist() == [2, 0, 3, 0]
    assert keeps_quality(budget, -distance_BA, row_B).tolist() == [True, True, False, False]
    assert keeps_quality(parse_budget("router", space), -distance_BA, row_B).all()
    spent = [space.tokens_A[choose_rows(parse_budget(f"quality:{q}", space), -distance_BA, space)] for q in (0.6, 0.5)]
    assert (spent[0][:3] <= spent[1][:3]).all()


@pytest.mark.parametrize("text", ["uniform:8", "fixed:8,8,8", "quality:0.1"])
def test_a_trade_off_that_changes_nothing_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="changes nothing"):
        parse_budget(text, SPACE, trade_off=1.0)
    parse_budget("average:50", SPACE, trade_off=1.0)


def test_missing_scores_missing_price_and_broken_scores_are_refused() -> None:
    with pytest.raises(UserError, match="needs a router"):
        choose_rows(parse_budget("router", SPACE), None, SPACE)
    with pytest.raises(UserError, match="find_price"):
        choose_rows(parse_budget("average:50", SPACE), scores(1), SPACE)
    with pytest.raises(UserError, match="finite"):
        choose_rows(parse_budget("router", SPACE), scores(1) * torch.nan, SPACE)
    with pytest.raises(UserError, match="27 rows"):
        choose_rows(parse_budget("router", SPACE), torch.zeros(1, 5), SPACE)
