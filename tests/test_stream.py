"""What generate.py claims about the sampler and the stream, as sentences.

The judges are probabilities computed by hand, and the model reading the whole text again.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import generate
from mamba import Mamba
from test_mamba import assert_close, random_ids, random_model

## ================================================================================================
## The sampler
## ================================================================================================

PROBABILITIES = torch.tensor([0.1, 0.4, 0.05, 0.3, 0.15])


@pytest.mark.parametrize(
    ("options", "weights"),
    [
        ({}, [10, 40, 5, 30, 15]),
        ({"temperature": 0.5}, [100, 1600, 25, 900, 225]),  # the squares
        ({"temperature": 2.0}, [10**0.5, 40**0.5, 5**0.5, 30**0.5, 15**0.5]),
        ({"top_k": 2}, [0, 40, 0, 30, 0]),
        ({"top_k": 9}, [10, 40, 5, 30, 15]),
        ({"top_p": 0.72}, [0, 40, 0, 30, 15]),  # two tokens make 0.70, three are needed
        ({"top_p": 0.68}, [0, 40, 0, 30, 0]),
        ({"top_p": 1e-9}, [0, 40, 0, 0, 0]),
        ({"min_p": 0.3}, [0, 40, 0, 30, 15]),  # 0.3 of 0.4 is 0.12
        ({"min_p": 1.0}, [0, 40, 0, 0, 0]),
        ({"temperature": 0.5, "top_p": 0.85}, [0, 16, 0, 9, 0]),  # the squares are cut: 25 of 28.5
        ({"top_k": 4, "min_p": 0.3}, [0, 40, 0, 30, 15]),
        ({"top_k": 3, "top_p": 0.8}, [0, 40, 0, 30, 0]),  # of the mass that top-k leaves: 70 of 85
    ],
    ids=str,
)
def test_the_sampler_draws_each_token_as_often_as_its_probability_says(options, weights):
    draws = 20_000
    logits = PROBABILITIES.log().expand(draws, 5) + 7  # a constant changes nothing
    generator = torch.Generator().manual_seed(0)
    counts = generate.sample(logits, **options, generator=generator).bincount(minlength=5)
    expected = torch.tensor(weights) / sum(weights) * draws
    assert not counts[expected == 0].any()
    drawn = expected > 0
    chi_square = ((counts - expected).square() / expected)[drawn].sum().item()
    assert chi_square < 20, f"drawn {counts.tolist()}, expected {expected.tolist()}"


def test_temperature_zero_takes_the_most_probable_token_and_a_tiny_one_nearly_does():
    logits = torch.randn(50, 9)
    for temperature in (0, 1e-6, 1e-40):
        token_ids = generate.sample(logits, temperature=temperature)
        assert torch.equal(token_ids, logits.argmax(-1))


def test_the_repetition_penalty_lowers_what_was_seen_whatever_its_sign():
    logits = torch.tensor([[3.0, -3.0, 3.0, -3.0]])
    seen = torch.tensor([[True, True, False, False]])
    penalized = generate.penalize_repetition(logits, seen, 1.5)
    assert_close("logits", penalized, torch.tensor([[2.0, -4.5, 3.0, -3.0]]), 1e-6)


## ================================================================================================
## The stream
## ================================================================================================


def streamed(model: Mamba, ids: Tensor, **options) -> Tensor:
    """(batch, new tokens)"""
    return torch.stack(list(generate.stream(model, ids, **options)), dim=1)


def scripted_model(script: Tensor, **changes) -> Mamba:
    """A model whose most probable tokens at the i-th call are script[:, i], whatever it reads."""
    model, calls = random_model(**changes), iter(script.unbind(1))

    def follow_script(lm_head, inputs, logits):
        one_hot = F.one_hot(next(calls), logits.shape[-1])
        return 100.0 * one_hot.view(len(one_hot), *[1] * (logits.ndim - 2), -1).expand_as(logits)

    model.lm_head.register_forward_hook(follow_script)
    return model


def test_greedy_streaming_equals_reading_the_whole_text_again_for_every_token():
    model = random_model()
    text = prompt = random_ids(3, 4)
    for _ in range(15):
        logits = model(text)[:, -1, :30]
        text = torch.cat([text, logits.argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(streamed(model, prompt, max_new_tokens=15, temperature=0), text[:, 4:])


def test_with_a_huge_penalty_no_token_of_the_prompt_or_the_text_comes_again():
    model, ids = random_model(), random_ids(2, 4)
    options = {"max_new_tokens": 8, "temperature": 0, "repetition_penalty": 1e6}
    for prompt, new in zip(ids.tolist(), streamed(model, ids, **options).tolist(), strict=True):
        assert len(set(new)) == 8 and not set(new) & set(prompt)


def test_streams_with_one_seed_are_equal_and_leave_the_global_generator_alone():
    model, ids = random_model(), random_ids(2, 4)
    before = torch.get_rng_state()
    first, again, other = (streamed(model, ids, max_new_tokens=20, seed=s) for s in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), before)


def test_rows_that_only_pad_the_vocabulary_are_never_sampled():
    """Even where they would be the most probable: the checkpoints have three such rows."""
    model = scripted_model(torch.full((4, 60), 30), vocab_size=29)
    assert model.lm_head.weight.shape[0] == 32
    assert streamed(model, random_ids(4, 3, 29), max_new_tokens=30).max() < 29
    assert streamed(model, random_ids(4, 3, 29), max_new_tokens=30, temperature=0).max() < 29


def test_a_prompt_with_an_id_that_only_pads_the_vocabulary_is_refused():
    model = random_model()
    assert model.config.padded_vocab_size > 30
    with pytest.raises(IndexError, match=r"\[0, 30\).*30"):
        next(generate.stream(model, torch.tensor([[3, 30]])))


def test_a_finished_row_repeats_the_end_token_until_all_rows_are_finished():
    script = torch.tensor([[5, 6, 0, 7, 8, 9, 9, 9], [5, 5, 5, 5, 0, 9, 9, 9]])
    tokens = streamed(scripted_model(script), random_ids(2, 3), temperature=0, eos_token_id=0)
    assert tokens.tolist() == [[5, 6, 0, 0, 0], [5, 5, 5, 5, 0]]
    tokens = streamed(scripted_model(script), random_ids(2, 3), temperature=0, max_new_tokens=7)
    assert torch.equal(tokens, script[:, :7])


def test_a_left_padded_batch_streams_each_prompts_own_continuation():
    model, lengths = random_model(), (7, 1, 3)
    ids = random_ids(3, 7)
    mask = torch.stack([torch.arange(7) >= 7 - length for length in lengths])
    options = {"max_new_tokens": 12, "temperature": 0, "repetition_penalty": 1.3}
    together = streamed(model, ids, mask=mask, **options)
    for row, length in enumerate(lengths):
        alone = streamed(model, ids[row : row + 1, 7 - length :], **options)
        assert torch.equal(together[row], alone[0]), f"prompt of {length} tokens"


def test_streaming_switches_gradients_off_for_itself_alone():
    tokens = generate.stream(random_model(), random_ids(1, 3), max_new_tokens=2)
    next(tokens)
    assert torch.is_grad_enabled()


def test_streamed_text_is_whole_characters_and_adds_up_to_the_whole_text():
    text, tokenizer = "naïve – 3 € 😀 日本語\n", generate.ByteTokenizer()
    script = torch.tensor([tokenizer.encode(text)])
    model = scripted_model(script, vocab_size=256)
    options = {"max_new_tokens": script.shape[1], "temperature": 0}
    ids = (step.item() for step in generate.stream(model, random_ids(1, 3), **options))
    pieces = list(tokenizer.decode_stream(ids))
    assert "".join(pieces) == text == tokenizer.decode(script[0].tolist())
    assert not any("\ufffd" in piece for piece in pieces), "half of a character"


def test_generated_text_drops_a_character_that_the_last_token_leaves_incomplete():
    script = torch.tensor([list("café €".encode())])
    for length, expected in ((3, "caf"), (4, "caf"), (5, "café"), (8, "café "), (9, "café €")):
        model, tokenizer = scripted_model(script, vocab_size=256), generate.ByteTokenizer()
        options = {"max_new_tokens": length, "temperature": 0}
        assert generate.generate(model, tokenizer, "é", **options) == expected
