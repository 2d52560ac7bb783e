"""Whatever the batch, the padding, the cuts, the resets, the sampler's arguments: hypothesis looks
for the case that breaks a claim, and shows the smallest that it finds.

Sequences are judged by `one_token_at_a_time`, which knows no padding, pieces or resets: it gives
each row's tokens to `step`, and starts from a fresh state where a document does. The sampler is
judged by its own definition, in plain Python and with room for rounding.
"""

from __future__ import annotations

import functools
import itertools
import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

import generate
from mamba import Mamba, MambaConfig, MambaState

# The same examples in every run, and none that fails because the machine is busy.
few, many = (
    settings(max_examples=count, derandomize=True, deadline=None, database=None)
    for count in (60, 200)
)
VOCABULARY = 11


@functools.cache
def random_model(scan: str = "auto") -> Mamba:
    """Random in every parameter, in float64: what differs from its judge by 1e-9 is wrong."""
    torch.manual_seed(0)
    config = MambaConfig(d_model=8, n_layer=2, vocab_size=VOCABULARY, d_state=3, scan=scan)
    model = Mamba(config).double().requires_grad_(False)
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter) / 3)
    return model


def one_token_at_a_time(ids: Tensor, lengths: list[int], reset: Tensor):
    """Logits (batch, seqlen, rows), zero on the padding, and the last state, by `step` alone."""
    model = random_model()
    logits = torch.zeros(*ids.shape, model.lm_head.out_features, dtype=torch.float64)
    states = []
    for row, length in enumerate(lengths):
        state = model.init_state(1)
        for t in range(ids.shape[1] - length, ids.shape[1]):
            if reset[row, t]:
                state = model.init_state(1)
            step_logits, state = model.step(ids[row : row + 1, t], state)
            logits[row, t] = step_logits[0]
        states.append(state)
    conv, h = (torch.cat([vars(s)[name] for s in states], dim=1) for name in ("conv", "h"))
    return logits, MambaState(conv, h)


def check(scan, ids, *, lengths=None, reset=None, cuts=()) -> None:
    """The model, fed in pieces that begin at the cuts, gives what the judge gives.

    lengths: of each row's tokens, which stand on the right; before them is padding.
    """
    batch, seqlen = ids.shape
    lengths = [seqlen] * batch if lengths is None else lengths
    reset = torch.zeros_like(ids, dtype=bool) if reset is None else reset
    first = seqlen - torch.tensor(lengths).unsqueeze(1)
    resets = reset | (first == torch.arange(seqlen))
    model = random_model(scan)
    bounds = sorted({0, seqlen, *(cut for cut in cuts if cut < seqlen)})
    state, parts = model.init_state(batch), []
    for start, end in itertools.pairwise(bounds):
        logits, state = model(ids[:, start:end], state, reset=resets[:, start:end])
        parts.append(logits)

    expected = one_token_at_a_time(ids, lengths, reset)
    is_token = (torch.arange(seqlen) >= first).unsqueeze(-1)
    for name, actual, right in (
        ("logits", torch.cat(parts, dim=1) * is_token, expected[0]),
        ("state.conv", state.conv, expected[1].conv),
        ("state.h", state.h, expected[1].h),
    ):
        error = (actual - right).abs().max().item()
        assert error < 1e-9, f"{name} is off by {error:.1e} with pieces at {bounds}"


## Batches are drawn as what they are made of: rows of tokens, flags and cuts.

scans = st.sampled_from(("sequential", "logspace", "chunked", "recompute"))
cut_sets = st.sets(st.integers(1, 11))


@st.composite
def batches(draw) -> Tensor:
    """Ids (1 to 3, 1 to 12)."""
    seqlen = draw(st.integers(1, 12))
    row = st.lists(st.integers(0, VOCABULARY - 1), min_size=seqlen, max_size=seqlen)
    return torch.tensor(draw(st.lists(row, min_size=1, max_size=3)))


@st.composite
def flags_for(draw, ids: Tensor) -> Tensor:
    """Bool of the shape of ids, in any pattern."""
    flags = draw(st.lists(st.booleans(), min_size=ids.numel(), max_size=ids.numel()))
    return torch.tensor(flags).view(ids.shape)


@st.composite
def lengths_for(draw, ids: Tensor) -> list[int]:
    """How many tokens each row has behind its padding: at least one."""
    return [draw(st.integers(1, ids.shape[1])) for _ in ids]


def left_padding(ids: Tensor, lengths: list[int]) -> Tensor:
    seqlen = ids.shape[1]
    return torch.stack([torch.arange(seqlen) >= seqlen - length for length in lengths])


## ================================================================================================
## Sequences
## ================================================================================================


@few
@given(st.data(), scans, batches())
def test_any_left_padding_of_any_batch_gives_each_row_its_own_numbers(data, scan, ids):
    check(scan, ids, lengths=data.draw(lengths_for(ids)))


@few
@given(scans, batches(), cut_sets)
def test_a_sequence_may_be_cut_into_any_pieces(scan, ids, cuts):
    check(scan, ids, cuts=cuts)


@few
@given(st.data(), scans, batches())
def test_any_set_of_resets_separates_the_documents(data, scan, ids):
    check(scan, ids, reset=data.draw(flags_for(ids)))


@few
@given(st.data(), scans, batches(), cut_sets)
def test_padding_resets_and_cuts_may_come_together(data, scan, ids, cuts):
    lengths, reset = data.draw(lengths_for(ids)), data.draw(flags_for(ids))
    check(scan, ids, lengths=lengths, reset=reset, cuts=cuts)


@few
@given(st.data(), batches())
def test_a_mask_with_a_hole_is_refused_wherever_the_hole_is(data, ids):
    mask = data.draw(flags_for(ids))
    tokens = generate.stream(random_model(), ids, mask=mask, max_new_tokens=1, temperature=0)
    lengths = mask.sum(1).tolist()
    if min(lengths) == 0 or not torch.equal(mask, left_padding(ids, lengths)):
        with pytest.raises(ValueError, match="mask"):
            next(tokens)
    else:
        logits, _ = one_token_at_a_time(ids, lengths, torch.zeros_like(mask))
        assert torch.equal(next(tokens), logits[:, -1, :VOCABULARY].argmax(-1))


## ================================================================================================
## The sampler
## ================================================================================================

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


def surely_excluded(logits, temperature, top_k, top_p, min_p) -> set[int]:
    """The tokens that the definition of a cut takes out, whatever the rounding.

    Written with ranks and sums over the better tokens, one token at a time, in Python's floats.
    """
    best = max(logits)
    if temperature == 0:
        return {i for i, logit in enumerate(logits) if logit < best}

    def weight(logit: float) -> float:
        return math.exp(max((logit - best) / max(temperature, 1e-30), -745))

    kept = sorted(logits, reverse=True)[: top_k or None]
    total = sum(map(weight, kept))
    room = 1 + 1e-6  # tokens that tie in float32 may change places
    excluded = set()
    for i, logit in enumerate(logits):
        tie = weight(logit) * room
        better = sum(weight(other) for other in kept if weight(other) > tie) / total
        cut_by_k = logit < kept[-1]
        cut_by_p = top_p < 1 and better > 0 and better > top_p * (1 + 1e-4) + 1e-6
        cut_by_min_p = weight(logit) < min_p * (1 - 1e-4) - 1e-30
        if cut_by_k or cut_by_p or cut_by_min_p:
            excluded.add(i)
    return excluded


@many
@given(rows_of_logits, st.fixed_dictionaries(cutoffs), st.integers(0, 2**32))
@example([-3e38, 3e38], dict(temperature=1.7e308, top_k=0, top_p=1.0, min_p=0.0), 0)
@example([-2.220446049250313e-16, 0.0], dict(temperature=1.0, top_k=0, top_p=0.25, min_p=0.0), 0)
def test_no_allowed_argument_crashes_the_sampler_or_lets_an_excluded_token_through(
    logits, arguments, seed
):
    generate.check_sampling(**arguments)
    generator = torch.Generator().manual_seed(seed)
    drawn = generate.sample(torch.tensor(logits).expand(100, -1), **arguments, generator=generator)
    assert set(drawn.tolist()) <= set(range(len(logits))) - surely_excluded(logits, **arguments)


@many
@given(
    st.data(),
    batches(),
    st.fixed_dictionaries(cutoffs),
    st.floats(5e-324, 1.7e308) | st.sampled_from((1.0, 1.3, 1e-50, 1e50)),
    st.none() | st.integers(0, 2**64 - 1),
    st.integers(1, VOCABULARY),
)
def test_any_allowed_stream_has_the_length_asked_for_and_stays_in_its_vocabulary(
    data, ids, cuts, penalty, seed, vocab_size
):
    ids = ids.clamp(max=vocab_size - 1)
    lengths = data.draw(st.none() | lengths_for(ids))
    mask = None if lengths is None else left_padding(ids, lengths)
    options = dict(max_new_tokens=3, repetition_penalty=penalty, seed=seed, mask=mask, **cuts)
    steps = list(generate.stream(random_model(), ids, vocab_size=vocab_size, **options))
    assert len(steps) == 3
    assert all(0 <= token_id < vocab_size for step in steps for token_id in step.tolist())
    if seed is not None:
        again = generate.stream(random_model(), ids, vocab_size=vocab_size, **options)
        assert torch.equal(torch.stack(steps), torch.stack(list(again)))


not_numbers = st.sampled_from((math.nan, math.inf, -math.inf))
negative = st.floats(max_value=0, exclude_max=True) | st.floats(-1, 0, exclude_max=True)
above_one = st.floats(min_value=1, exclude_min=True)
outside = {
    "max_new_tokens": st.integers(max_value=0),
    "temperature": negative | not_numbers,
    "top_k": st.integers(max_value=-1),
    "top_p": st.floats(max_value=0) | above_one | not_numbers,
    "min_p": negative | above_one | not_numbers,
    "repetition_penalty": st.floats(max_value=0) | not_numbers,
    "seed": st.integers(max_value=-1) | st.integers(min_value=2**64),
    "vocab_size": st.integers(max_value=0) | st.integers(min_value=VOCABULARY + 1),
    "eos_token_id": st.integers(max_value=-1) | st.integers(min_value=VOCABULARY),
}


@few
@given(st.sampled_from(sorted(outside)).flatmap(lambda n: st.tuples(st.just(n), outside[n])))
def test_a_value_outside_its_range_is_refused_with_its_name_and_itself(argument):
    name, value = argument
    with pytest.raises(ValueError) as error:
        next(generate.stream(random_model(), torch.tensor([[1, 2]]), **{name: value}))
    assert str(error.value).startswith(f"{name} must be") and str(value) in str(error.value)


## ================================================================================================
## Text
## ================================================================================================


@many
@given(st.text())
def test_any_text_comes_back_from_its_bytes_in_one_piece_or_token_by_token(text):
    tokenizer = generate.ByteTokenizer()
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text == "".join(tokenizer.decode_stream(ids))


@many
@given(st.binary())
@example(b"\xed\xa0")  # half of what is no character either
def test_any_bytes_a_model_may_produce_stream_as_text_without_a_crash(data):
    """What comes is the whole text, but for up to three bytes that begin a character at its end."""
    tokenizer = generate.ByteTokenizer()
    streamed = "".join(tokenizer.decode_stream(data))
    assert streamed in [tokenizer.decode(data[: len(data) - held_back]) for held_back in range(4)]
