"""How the next token is drawn: cuts, penalty, and the race.

The judge sorts all probabilities in float64.
"""

import math
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st
from torch import Tensor

import generate
from test_mamba import assert_close

# Of a larger vocabulary on a CPU, top_p first looks at 1024 tokens.
SHORT = 1024
OFF = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}


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


def cut(logits: Tensor, temperature: float, top_k: int, top_p: float, min_p: float) -> Tensor:
    """The judge of these weights: each cut, of what the one before has left."""
    below_best = logits.double() - logits.double().amax(-1, keepdim=True)
    probs = (below_best / min(max(temperature, 1e-30), 1e30)).softmax(-1)
    best_first, order = probs.sort(dim=-1, descending=True, stable=True)
    if top_k:
        among_best = torch.arange(logits.shape[-1]) < min(top_k, logits.shape[-1])
        best_first = normalized(best_first * among_best)
    better = best_first.cumsum(-1) - best_first
    best_first = best_first * (better < top_p) * (best_first >= min_p * best_first[:, :1])
    return normalized(best_first.gather(-1, order.argsort(-1)))


def assert_cut(logits: Tensor, **options) -> list[int]:
    """Returns how many tokens each row has left."""
    actual, expected = weights_drawn_from(logits, **options), cut(logits, **OFF | options)
    found, wanted = ((weights > 0).sum(-1).tolist() for weights in (actual, expected))
    assert torch.equal(actual > 0, expected > 0), f"{found} tokens can be drawn, not {wanted}"
    assert_close("weights", actual, expected, 1e-5)
    return found


@pytest.mark.parametrize(
    ("options", "weights"),
    [
        ({}, [10, 40, 5, 30, 15]),
        ({"temperature": 0.5}, [100, 1600, 25, 900, 225]),  # the squares
        ({"top_k": 2}, [0, 40, 0, 30, 0]),
        ({"top_k": 9}, [10, 40, 5, 30, 15]),
        ({"top_p": 0.72}, [0, 40, 0, 30, 15]),  # two tokens make 0.70, three are needed
        ({"top_p": 0.68}, [0, 40, 0, 30, 0]),
        ({"min_p": 0.3}, [0, 40, 0, 30, 15]),  # 0.3 of 0.4 is 0.12
        ({"min_p": 1.0}, [0, 40, 0, 0, 0]),
        ({"temperature": 0.5, "top_p": 0.85}, [0, 16, 0, 9, 0]),  # the squares are cut: 25 of 28.5
        ({"top_k": 3, "top_p": 0.8}, [0, 40, 0, 30, 0]),  # of the mass that top-k leaves: 70 of 85
    ],
    ids=str,
)
def test_the_cuts_worked_by_hand(options, weights):
    logits = torch.tensor([[0.1, 0.4, 0.05, 0.3, 0.15]]).log() + 7  # a constant changes nothing
    expected = normalized(torch.tensor([weights]).double())
    assert_close("weights", weights_drawn_from(logits, **options), expected, 1e-6)
    assert_close("the judge's weights", cut(logits, **OFF | options), expected, 1e-6)


@pytest.mark.parametrize(
    ("vocab", "kept", "looked_at"),
    [(5, 1, 5), (5, 3, 5), (SHORT, 700, SHORT), (SHORT + 1, SHORT, SHORT)]
    + [(3000, kept, SHORT) for kept in (1, 40, SHORT - 1, SHORT)]
    + [(3000, kept, 3000) for kept in (SHORT + 1, SHORT + 2, 2900)],
)
def test_top_p_keeps_the_most_probable_tokens_that_make_it_up(vocab, kept, looked_at):
    """And sorts all of them only where the first are not enough."""
    logits = torch.randn(1, vocab)
    best_first = logits.double().softmax(-1).sort(-1, descending=True).values[0]
    top_p = (best_first[:kept].sum() - best_first[kept - 1] / 2).item()  # half of it to spare
    assert assert_cut(logits, top_p=top_p) == [kept]
    probs = logits.softmax(-1)
    found = generate.most_probable(probs, top_p)
    for actual, expected in zip(found, probs.sort(-1, descending=True), strict=True):
        assert torch.equal(actual, expected[:, :looked_at])


def test_every_row_has_its_own_cuts_each_of_what_the_one_before_has_left():
    """One row that is peaked, for which 1024 tokens are enough, and one that is flat."""
    logits = 2 * torch.randn(2, 3000)
    for scales in ([9.0, 9.0], [9.0, 0.1], [0.1, 9.0]):
        assert_cut(logits * torch.tensor(scales).unsqueeze(-1), top_p=0.9)
    assert_cut(logits, temperature=0.7, top_p=0.95)
    assert_cut(logits, temperature=3.0, top_p=0.95, min_p=0.02)
    assert_cut(logits, top_k=2000, top_p=0.95)
    assert_cut(logits, top_k=50, top_p=0.6, min_p=0.3)
    assert_cut(torch.tensor([[0.0, -30.0]]), top_p=1.0)  # off, though 1 - 1e-13 is 1 in float32


def test_of_tokens_that_are_equally_probable_as_many_are_kept_as_make_it_up():
    for vocab, top_p, kept in ((2000, 0.2499, 500), (2000, 0.7499, 1500), (4, 0.5, 2)):
        weights = weights_drawn_from(torch.zeros(2, vocab), top_p=top_p)
        assert (weights > 0).sum(-1).tolist() == [kept, kept]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_greedy_takes_the_best_token_and_the_tiniest_cuts_leave_it_alone(dtype):
    logits = torch.randperm(200).to(dtype).expand(2, -1)  # exact in short floats
    best = logits.argmax(-1)
    assert torch.equal(generate.sample(logits, temperature=0), best)
    for options in ({"temperature": 1e-40}, {"top_k": 1}, {"top_p": 1e-50}, {"min_p": 1.0}):
        weights = weights_drawn_from(logits, **options)
        assert torch.equal(weights, F.one_hot(best, 200).double()), options


def test_the_race_is_the_one_that_multinomial_runs():
    """The same tokens from the same random numbers; a weight of 0 never wins."""
    weights = torch.randn(200, 50).square() * (torch.randn(200, 50) > 0)
    for seed in range(3):
        mine, theirs = (torch.Generator().manual_seed(seed) for _ in range(2))
        drawn = generate.draw(weights, mine)
        assert torch.equal(drawn, torch.multinomial(weights, 1, generator=theirs))
        assert (weights.gather(-1, drawn) > 0).all()


## Logits near each other, so that every cut has something to cut; and the edges, where arithmetic
## breaks: the smallest number that is not zero, the largest float, gaps too wide for exp. Each cut
## is often off, so that the others show.

edges = st.sampled_from((0.0, 1e-38, -3e38, 3e38, 1e4))
numbers = st.floats(-2, 2, width=32) | st.floats(-50, 50, width=32) | edges
rows_of_logits = st.lists(numbers, min_size=1, max_size=9)
cutoffs = {
    "temperature": st.just(1.0) | st.floats(0.05, 5) | st.sampled_from((0.0, 5e-324, 1.7e308)),
    "top_k": st.just(0) | st.integers(1, 5) | st.sampled_from((9, 12, 2**63)),
    "top_p": st.just(1.0) | st.floats(0.01, 1) | st.sampled_from((5e-324, 1e-8, 0.9999999)),
    "min_p": st.just(0.0) | st.floats(0, 1) | st.sampled_from((5e-324, 1.0)),
}
penalties = st.just(1.0) | st.floats(5e-324, 1.7e308) | st.sampled_from((1.3, 1e-50, 1e50))


# The same examples in every run, and none that fails because the machine is busy.
@settings(
    max_examples=150, derandomize=True, deadline=None, phases=(Phase.explicit, Phase.generate)
)
@given(rows_of_logits, st.fixed_dictionaries(cutoffs), penalties)
@example([-3e38, 3e38], OFF | {"temperature": 1.7e308}, 1.0)
@example([-(2.0**-52), 0.0], OFF | {"top_p": 0.25}, 1.0)  # equal once they are probabilities
def test_any_allowed_arguments_keep_the_best_tokens_and_as_many_as_they_say(
    logits, arguments, penalty
):
    generate.check_sampling(**arguments, repetition_penalty=penalty)
    seen = torch.arange(len(logits)) % 2 == 0
    logits = generate.penalize_repetition(torch.tensor([logits]), seen, penalty)
    best_first = logits.sort(-1, descending=True).values[0]
    assert 0 <= generate.sample(logits, **arguments).item() < len(seen)
    if arguments["temperature"] == 0:
        assert logits[0, generate.sample(logits, **arguments)] == best_first[0]
        return
    # Room for rounding, on either side; less than 1e-30 may be nothing, and so is a logit that is
    # further below the best one than float32 reaches.
    top_p, min_p = arguments["top_p"], arguments["min_p"]
    more = {"top_p": top_p * (1 + 1e-4) + 1e-6, "min_p": min_p * (1 - 1e-4)}
    fewer = {"top_p": max(top_p * (1 - 1e-4) - 1e-6, 5e-324), "min_p": min(min_p * (1 + 1e-4), 1)}
    probs = cut(logits, **OFF | {"temperature": arguments["temperature"]})
    is_near = logits.double() > logits.amax() - torch.finfo().max
    kept = weights_drawn_from(logits, **arguments) > 0
    surely = ((cut(logits, **arguments | fewer) > 1e-30) & is_near).sum()
    assert surely <= kept.sum() <= (cut(logits, **arguments | more) > 0).sum()
    last = probs.sort(-1, descending=True).values[0, kept.sum() - 1]
    assert probs[kept].min() >= last * (1 - 1e-5), "a better one is left out"


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


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("row", [0, 1])
def test_one_logit_that_is_no_number_is_enough_to_stop(row, dtype):
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
