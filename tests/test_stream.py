"""What generate.py claims about the sampler and the stream, as sentences.

The judges are probabilities computed by hand, and the model reading the whole text again.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import generate
from mamba import Mamba, MambaState
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


def test_there_may_be_several_end_tokens_and_a_finished_row_repeats_the_first_of_them():
    script = torch.tensor([[5, 3, 6, 7, 8, 9], [5, 5, 5, 0, 9, 9]])
    for ends in ([3, 0], (3, 0)):
        tokens = streamed(
            scripted_model(script), random_ids(2, 3), temperature=0, eos_token_id=ends
        )
        assert tokens.tolist() == [[5, 3, 3, 3], [5, 5, 5, 0]]
    for never in ([], None):
        steps = generate.stream(
            scripted_model(script), random_ids(2, 3), temperature=0, eos_token_id=never,
            max_new_tokens=6,
        )  # fmt: skip
        assert torch.equal(torch.stack(list(steps), dim=1), script)
    with pytest.raises(
        ValueError, match=r"eos_token_id must be None or in \[0, 30\), got \[3, 30\]"
    ):
        generate.stream(random_model(), random_ids(2, 3), eos_token_id=[3, 30])


@pytest.mark.parametrize("name", ["max_new_tokens", "top_k", "seed", "vocab_size", "eos_token_id"])
@pytest.mark.parametrize("value", [2.5, 2.0, "2"])
def test_what_counts_is_an_integer(name, value):
    with pytest.raises(ValueError, match=f"{name} must be .*, got {value}"):
        generate.stream(random_model(), random_ids(1, 3), **{name: value})


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


## ================================================================================================
## Conversations
## ================================================================================================

## Two turns are one text: the model reads it whole and agrees with what was said in parts. By
## model.step, and for one row of 64 tokens or more by the copies that a CPU makes.

TURNS = {"by step": (2, 12), "by copies": (1, 70)}


def reading_again(model: Mamba, text: Tensor, new: int) -> Tensor:
    """The greedy continuation of a text, which is read again for every token."""
    length = text.shape[1]
    for _ in range(new):
        best = model(text)[:, -1, : model.config.vocab_size].argmax(-1, keepdim=True)
        text = torch.cat([text, best], dim=1)
    return text[:, length:]


@pytest.mark.parametrize("how", TURNS)
def test_two_turns_equal_one_text_wherever_the_first_one_ends(how):
    """After max_new_tokens, after an end token, and where the reader stops, as at a stop string."""
    batch, new = TURNS[how]
    model, ids, more = random_model(), random_ids(batch, 5), random_ids(batch, 4)
    greedy = {"temperature": 0, "max_new_tokens": new}
    whole = list(generate.stream(model, ids, **greedy))
    ending = whole[4][0].item()
    for kind in ("max_new_tokens", "an end token", "a reader"):
        options = greedy | ({"eos_token_id": ending} if kind == "an end token" else {})
        turn, said = generate.stream(model, ids, **options), []
        for step in turn:
            said.append(step)
            if kind == "a reader" and len(said) == 3:
                break
        assert kind != "an end token" or batch == 2 or len(said) <= 5
        said = torch.stack(said, dim=1)
        second = torch.cat([said[:, -1:], more], dim=1)
        text = torch.cat([ids, said, more], dim=1)
        _, expected = model(text[:, : ids.shape[1] + said.shape[1] - 1], model.init_state(batch))
        assert_close(f"h after {kind}", turn.state.h, expected.h, 1e-4)
        assert_close(f"conv after {kind}", turn.state.conv, expected.conv, 1e-4)
        answer = streamed(model, second, state=turn.state, **greedy)
        assert torch.equal(answer, reading_again(model, text, new)), kind


@pytest.mark.parametrize("how", TURNS)
def test_the_state_of_a_stream_is_the_one_before_its_last_token_at_any_time(how):
    batch, new = TURNS[how]
    model, ids = random_model(), random_ids(batch, 5)
    given = model.init_state(batch)
    turn = generate.stream(model, ids, state=given, max_new_tokens=new, seed=0)
    assert torch.equal(turn.state.h, given.h), "nothing was read so far"
    states, text = [], ids
    for step in turn:
        states.append((turn.state, text))
        text = torch.cat([text, step.unsqueeze(1)], dim=1)
    states.append((turn.state, text[:, :-1]))
    for state, read in states[:3] + states[-2:]:
        _, expected = model(read, model.init_state(batch))
        assert (state.h.dtype, state.conv.dtype) == (expected.h.dtype, expected.conv.dtype)
        assert_close("h", state.h, expected.h, 1e-4)
        assert_close("conv", state.conv, expected.conv, 1e-4)
    assert not given.h.any() and not given.conv.any(), "the state that was given is as it was"


def test_a_state_of_a_stream_is_a_value_whatever_others_do_with_it():
    model, ids = random_model(), random_ids(1, 5)
    options = {"temperature": 0, "max_new_tokens": 70}
    turn = generate.stream(model, ids, **options)
    *_, last = turn
    state, before = turn.state, turn.state.map(torch.clone)
    answers = [streamed(model, last.unsqueeze(1), state=state, **options) for _ in range(2)]
    assert torch.equal(*answers)
    assert torch.equal(state.h, before.h) and torch.equal(state.conv, before.conv)


def test_a_beginning_is_read_once_for_several_continuations():
    model, beginning, questions = random_model(), random_ids(1, 9), random_ids(3, 4)
    _, state = generate.prefill(model, beginning)
    greedy = {"temperature": 0, "max_new_tokens": 8}
    together = streamed(model, questions, state=state[:, [0] * 3], **greedy)
    text = torch.cat([beginning.expand(3, -1), questions], dim=1)
    assert torch.equal(together, reading_again(model, text, 8))
    for row in range(3):
        alone = streamed(model, questions[row : row + 1], state=state, **greedy)
        assert torch.equal(alone[0], together[row])


def test_unequal_second_turns_are_refused_and_not_forgotten():
    model, ids = random_model(), random_ids(2, 4)
    _, state = generate.prefill(model, ids)
    mask = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]])
    with pytest.raises(ValueError, match="padding in a row whose state is not zero"):
        next(generate.stream(model, ids, mask=mask, state=state))


def test_a_state_of_another_batch_is_refused():
    model = random_model()
    with pytest.raises(ValueError, match="state"):
        next(generate.stream(model, random_ids(2, 4), state=model.init_state(3)))


def test_a_stream_on_a_recorded_step_gives_its_state_as_a_copy(monkeypatch):
    """What lends its buffers, as a graph does, is asked before it has ended."""

    class Lent(generate.PlainStep):
        ended = False

        def __exit__(self, *_) -> None:
            Lent.ended, self.last = True, None

        def __enter__(self):
            return self

        def state(self) -> MambaState:
            assert not Lent.ended
            return self.last.map(torch.clone)

    monkeypatch.setattr(generate, "continuing", lambda model, state, tokens: Lent(model, state))
    model, ids = random_model(), random_ids(2, 5)
    turn = generate.stream(model, ids, max_new_tokens=3, temperature=0)
    said = torch.stack(list(turn), dim=1)
    assert Lent.ended
    _, expected = model(torch.cat([ids, said[:, :-1]], dim=1), model.init_state(2))
    assert_close("h", turn.state.h, expected.h, 1e-4)


## ================================================================================================
## Where a text ends
## ================================================================================================


def generated(texts: list[str], **options) -> list[str] | str:
    """What `generate` makes of a model that says these texts, byte by byte, one in each row."""
    longest = max(len(text.encode()) for text in texts)
    script = torch.tensor([list(text.encode().ljust(longest, b".")) for text in texts])
    model, tokenizer = scripted_model(script, vocab_size=256), generate.ByteTokenizer()
    options = {"temperature": 0, "max_new_tokens": longest, **options}
    return generate.generate(model, tokenizer, ["a"] * len(texts), **options)


@pytest.mark.parametrize(
    ("stop", "expected"),
    [
        ([], "to be or not to be"),
        (["or"], "to be "),
        (["e o", "be o"], "to "),  # complete with the same token
        (["o"], "t"),
        (["not to", "or not"], "to be "),  # the first one that is complete
        (["be", " be or"], "to "),
        (["to be"], ""),
        (["to be or not to be, that"], "to be or not to be"),
        (["xyz", "beer", "not to be?"], "to be or not to be"),  # begun, never finished
        (["to bo", "tto"], "to be or not to be"),
        (["t to b"], "to be or no"),
    ],
    ids=str,
)
def test_a_text_ends_before_the_first_stop_string(stop, expected):
    """Also where it spans several tokens; what only begins like one is text."""
    assert generated(["to be or not to be"], stop=stop) == [expected]


def test_every_row_of_a_batch_has_its_own_end():
    texts = ["one. two", "no end he", "three four. five"]
    assert generated(texts, stop=[". ", "four"]) == ["one", "no end he" + "." * 7, "three "]
    ends = [ord("."), ord("n")]
    assert generated(texts, eos_token_id=ends) == ["o", "", "three four"]


def test_no_step_is_taken_once_all_rows_have_ended():
    texts, steps = ["a.bcdefgh", "abcd.efgh"], []
    model = scripted_model(torch.tensor([list(text.encode()) for text in texts]), vocab_size=256)
    model.lm_head.register_forward_hook(lambda *_: steps.append(1))
    options = {"temperature": 0, "max_new_tokens": 9, "stop": ["."]}
    assert generate.generate(model, generate.ByteTokenizer(), ["x", "y"], **options) == [
        "a",
        "abcd",
    ]
    assert len(steps) == 5


def test_pieces_hold_back_what_may_become_a_stop_string_and_nothing_else():
    tokenizer = generate.ByteTokenizer()
    pieces = list(generate.text_of(tokenizer, b"abxab-cd", [ord("d")], ["ab-", "-e"]))
    assert pieces == ["", "", "abx", "", "", ""]
    pieces = list(generate.text_of(tokenizer, b"abxa-cd", [ord("d")], ["ab-", "-e"]))
    assert pieces == ["", "", "abx", "", "a", "-c"]
    assert list(generate.text_of(tokenizer, b"xa", [], ["ab"])) == ["x", "", "a"]


@pytest.mark.parametrize("stop", ["text", [""], ["a", ""], [5]])
def test_a_stop_that_would_end_every_text_or_is_no_list_is_refused(stop):
    with pytest.raises(ValueError, match="stop must be a list of texts that are not empty"):
        generate.generate(random_model(), generate.ByteTokenizer(), "a", stop=stop)


@pytest.mark.filterwarnings("ignore")  # torch.ao will move
@pytest.mark.parametrize("shape", [(0, 5), (1, 0), (5,), ()])
def test_a_prompt_of_no_tokens_or_of_another_shape_is_refused_in_a_sentence(shape):
    ids = torch.zeros(shape, dtype=torch.int64)
    for wrong in (ids, torch.zeros(1, 3)):
        with pytest.raises(
            ValueError, match=r"input_ids must be int64 or int32, \(batch, seqlen\)"
        ):
            generate.stream(random_model(), wrong)


@pytest.mark.parametrize("tokens", [20, 70])
def test_the_state_of_a_running_stream_is_a_copy(tokens):
    model, ids = random_model(), random_ids(1, 5)
    expected = [t.item() for t in generate.stream(model, ids, max_new_tokens=tokens, temperature=0)]
    start = model.init_state(1)
    stream = generate.stream(model, ids, state=start, max_new_tokens=tokens, temperature=0)
    spoken = []
    stream.state.h.fill_(9)
    for token in stream:
        stream.state.h.fill_(9)
        spoken.append(token.item())
    assert spoken == expected and not start.h.any()


def test_end_tokens_may_be_a_tensor():
    steps = generate.stream(random_model(), random_ids(2, 3), eos_token_id=torch.tensor([1, 2]))
    assert steps.ends == [1, 2]


def test_a_model_with_quantised_projections_generates():
    """Its Linears have no parameter that would tell the device."""
    model = random_model(vocab_size=256)
    quantised = torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, torch.qint8)
    assert not isinstance(quantised.lm_head.weight, Tensor)
    text = generate.generate(quantised, generate.ByteTokenizer(), ["ab", "c"], max_new_tokens=5)
    assert len(text) == 2
