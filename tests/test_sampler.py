"""How the next token is drawn: cuts, penalty, and the race.

The judge sorts all probabilities in float64.
"""

import itertools
import math
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import generate
from test_mamba import assert_close

# Of a larger vocabulary on a CPU, top_p first looks at 1024 tokens.
SHORT = 1024
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def weights_drawn_from(logits: Tensor, **options) -> Tensor:
    """The weight that `sample` gives to each token, normalised, (batch, vocab) float64."""
    drawn = []

    def all_of_them(weights: Tensor, generator: torch.Generator | None) -> Tensor:
        drawn.append(weights)
        return torch.arange(weights.shape[-1]).expand_as(weights)

    with mock.patch.object(generate, "draw", all_of_them):
        token_ids = generate.sample(logits, **options).view(len(logits), -1)
    (weights,) = drawn
    assert all(len(row.unique()) == len(row) for row in token_ids), "a token is there twice"
    found = torch.zeros(logits.shape, dtype=torch.float64)
    return normalized(found.scatter(-1, token_ids, weights.double()))


def normalized(weights: Tensor) -> Tensor:
    return weights / weights.sum(-1, keepdim=True)


def judge(logits: Tensor, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0) -> Tensor:
    """The judge of these weights: each cut, of what the one before has left."""
    below_best = logits.double() - logits.double().amax(-1, keepdim=True)
    probs = (below_best / min(max(temperature, 1e-30), 1e30)).softmax(-1)
    best_first, order = probs.sort(dim=-1, descending=True, stable=True)
    if top_k:
        among_best = torch.arange(logits.shape[-1]) < min(top_k, logits.shape[-1])
        best_first = normalized(best_first * among_best)
    better = best_first.cumsum(-1) - best_first
    enough = (better >= top_p) & (top_p < 1)
    best_first = best_first * ~enough * (best_first >= min_p * best_first[:, :1])
    return normalized(best_first.gather(-1, order.argsort(-1)))


def assert_cut(logits: Tensor, **options) -> list[int]:
    """Returns how many tokens each row has left."""
    actual, expected = weights_drawn_from(logits, **options), judge(logits, **options)
    kept, right = actual > 1e-30, expected > 1e-30  # what is less may be 0 in float32
    found, wanted = kept.sum(-1).tolist(), right.sum(-1).tolist()
    assert torch.equal(kept, right), f"{found} tokens can be drawn, not {wanted}: {options}"
    assert_close("weights", actual, expected, 1e-5)
    return found


def test_the_cuts_worked_by_hand():
    logits = torch.tensor([[0.1, 0.4, 0.05, 0.3, 0.15]]).log() + 7  # a constant changes nothing
    for options, weights in (
        ({}, [10, 40, 5, 30, 15]),
        ({"temperature": 0.5}, [100, 1600, 25, 900, 225]),  # the squares
        ({"top_k": 2}, [0, 40, 0, 30, 0]),
        ({"top_p": 0.72}, [0, 40, 0, 30, 15]),  # two tokens make 0.70, three are needed
        ({"top_p": 0.68}, [0, 40, 0, 30, 0]),
        ({"min_p": 0.3}, [0, 40, 0, 30, 15]),  # 0.3 of 0.4 is 0.12
        ({"min_p": 1.0}, [0, 40, 0, 0, 0]),
        ({"temperature": 0.5, "top_p": 0.85}, [0, 16, 0, 9, 0]),  # the squares: 25 of 28.5
        ({"top_k": 3, "top_p": 0.8}, [0, 40, 0, 30, 0]),  # of what top-k leaves: 70 of 85
    ):
        expected = normalized(torch.tensor([weights]).double())
        for whose, found in (("", weights_drawn_from), ("the judge's ", judge)):
            assert_close(f"{whose}weights, {options}", found(logits, **options), expected, 1e-6)


def test_top_p_keeps_the_most_probable_tokens_that_make_it_up():
    """And sorts all of them only where the first are not enough."""
    of_many = [(3000, kept) for kept in (1, 40, SHORT - 1, SHORT, SHORT + 1, SHORT + 2, 2900)]
    for vocab, kept in [(5, 1), (5, 3), (SHORT, 700), (SHORT + 1, SHORT), *of_many]:
        logits = torch.randn(1, vocab)
        probs, best_first = (t.softmax(-1).sort(descending=True) for t in (logits, logits.double()))
        best_first = best_first.values[0]
        top_p = (best_first[:kept].sum() - best_first[kept - 1] / 2).item()  # half of it to spare
        assert assert_cut(logits, top_p=top_p) == [kept]
        looked_at = SHORT if vocab > SHORT >= kept else vocab
        found = generate.most_probable(logits.softmax(-1), top_p)
        for actual, expected in zip(found, probs, strict=True):
            assert torch.equal(actual, expected[:, :looked_at])
    for vocab, top_p, kept in ((2000, 0.2499, 500), (2000, 0.7499, 1500), (4, 0.5, 2)):
        weights = weights_drawn_from(torch.zeros(2, vocab), top_p=top_p)
        assert (weights > 0).sum(-1).tolist() == [kept, kept], "of equally probable ones"


def test_every_row_has_its_own_cuts_each_of_what_the_one_before_has_left():
    """Of short rows, and of long ones, where 1024 tokens are enough for the peaked one alone."""
    long_rows = 2 * torch.randn(2, 3000) * torch.tensor([[9.0], [0.1]])
    some = {"temperature": (1.0, 0.3, 3.0), "top_k": (0, 3, 2000, 2**63), "top_p": (1.0, 0.05, 0.9)}
    some["min_p"] = (0.0, 0.02, 0.3)
    for logits in (torch.randn(20, 9), long_rows, long_rows.flip(0), long_rows[:1]):
        for values in itertools.product(*some.values()):
            assert_cut(logits, **dict(zip(some, values, strict=True)))
    assert_cut(torch.tensor([[0.0, -30.0]]), top_p=1.0)  # off, though 1 - 1e-13 is 1 in float32
    assert_cut(torch.tensor([[-3e38, 3e38]]), temperature=1.7e308)


def test_greedy_takes_the_best_token_and_the_tiniest_cuts_leave_it_alone():
    for dtype in FLOATS:
        logits = torch.randperm(200).to(dtype).expand(2, -1)  # exact in short floats
        best = logits.argmax(-1)
        assert torch.equal(generate.sample(logits, temperature=0), best)
        for options in ({"temperature": 5e-324}, {"top_k": 1}, {"top_p": 5e-324}, {"min_p": 1.0}):
            weights = weights_drawn_from(logits, **options)
            assert torch.equal(weights, F.one_hot(best, 200).double()), (dtype, options)


def test_the_race_is_the_one_that_multinomial_runs():
    """The same tokens from the same random numbers; a weight of 0 never wins."""
    weights = torch.randn(200, 50).square() * (torch.randn(200, 50) > 0)
    for seed in range(3):
        mine, theirs = (torch.Generator().manual_seed(seed) for _ in range(2))
        drawn = generate.draw(weights, mine)
        assert torch.equal(drawn, torch.multinomial(weights, 1, generator=theirs))
        assert (weights.gather(-1, drawn) > 0).all()


def test_the_repetition_penalty_lowers_what_was_seen_whatever_its_sign():
    logits = torch.tensor([[0.75, -3.0, 3.0, -3.0]])
    seen = torch.tensor([[True, True, False, False]])
    for penalty, expected in (
        (1.5, [0.5, -4.5, 3.0, -3.0]),
        (1e-50, [torch.finfo().max, -0.0, 3.0, -3.0]),  # finite: inf - inf would be no number
        (1e50, [0.0, -torch.finfo().max, 3.0, -3.0]),
    ):
        for dtype in (torch.float32, torch.bfloat16):
            found = generate.penalize_repetition(logits.to(dtype), seen, penalty)
            assert found.dtype == torch.float32
            assert_close("logits", found, torch.tensor([expected]), 1e-6)


@pytest.mark.parametrize("row", [0, 1])
@pytest.mark.parametrize("dtype", FLOATS)
def test_one_logit_that_is_no_number_is_enough_to_stop(dtype, row):
    """A token may be forbidden, by -inf, but not all of them."""
    logits = torch.randn(2, 50_000).to(dtype)
    logits[:, 0] = torch.finfo(dtype).max / 2
    generate.check_logits(logits)
    logits[row, 1:] = -math.inf
    generate.check_logits(logits)
    assert generate.sample(logits)[row] == 0
    for value, column in ((math.nan, 3), (math.inf, 3), (-math.inf, 0)):
        damaged = logits.clone()
        damaged[row, column] = value
        with pytest.raises(RuntimeError, match="not finite"):
            generate.check_logits(damaged)
