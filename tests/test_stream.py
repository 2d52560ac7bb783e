"""Ids in, ids out, and text: what `stream` and `generate` claim, as sentences.

The judge is the model, reading the whole text again for every token.
"""

import contextlib
import math
import re
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

import generate
from mamba import Mamba
from test_mamba import assert_close, random_ids, random_model

BYTES = generate.ByteTokenizer()


def streamed(model: Mamba, ids: Tensor, **options) -> Tensor:
    """(batch, new tokens), greedy unless said otherwise"""
    steps = generate.stream(model, ids, **{"temperature": 0, "max_new_tokens": 12} | options)
    return torch.stack(list(steps), dim=1)


@torch.no_grad()
def reading_again(model: Mamba, text: Tensor, new: int = 12) -> Tensor:
    """The greedy continuation of a text, which is read again for every token."""
    length = text.shape[1]
    for _ in range(new):
        best = model(text)[:, -1, : model.config.vocab_size].argmax(-1, keepdim=True)
        text = torch.cat([text, best], dim=1)
    return text[:, length:]


def scripted_model(texts: list, **changes) -> Mamba:
    """A model whose most probable tokens at the i-th call are script[:, i], whatever it reads."""
    model, calls = random_model(**changes), iter(torch.tensor([*map(list, texts)]).unbind(1))

    def follow_script(lm_head, inputs, logits):
        return 100.0 * F.one_hot(next(calls), logits.shape[-1]).view_as(logits)

    model.lm_head.register_forward_hook(follow_script)
    return model


## Tokens ------------------------------------------------------------------------------------------


def test_greedy_streaming_equals_reading_the_whole_text_again_for_every_token():
    model, ids = random_model(), random_ids(3, 4).int()
    assert torch.equal(streamed(model, ids), reading_again(model, ids))


def test_each_of_unequal_prompts_has_the_continuation_that_it_has_alone():
    """Of ids and of texts; what was padding is not seen by the penalty either."""
    model = random_model(vocab_size=256)
    prompts, options = ["To be", "o", "not to"], {"temperature": 0, "repetition_penalty": 2}
    alone = [generate.generate(model, BYTES, prompt, **options) for prompt in prompts]
    assert generate.generate(model, BYTES, prompts, **options) == alone
    assert len(set(alone)) == 3
    ids, mask = generate.encode_batch(BYTES, prompts, "cpu")
    for filler in (0, 7):
        ids = ids.masked_fill(~mask, filler)
        rows = streamed(model, ids, mask=mask.int(), max_new_tokens=256, **options).tolist()
        assert ["".join(BYTES.decode_stream(row)) for row in rows] == alone


def test_with_a_huge_penalty_no_token_of_the_prompt_or_the_text_comes_again():
    model, ids = random_model(), random_ids(2, 14)
    answers = streamed(model, ids, max_new_tokens=8, repetition_penalty=1e6)
    for prompt, new in zip(ids.tolist(), answers.tolist(), strict=True):
        assert len(set(new)) == 8 and not set(new) & set(prompt)


def test_streams_with_one_seed_are_equal_and_leave_the_global_generator_alone():
    model, ids = random_model(), random_ids(2, 4)
    before = torch.get_rng_state()
    first, again, other = (streamed(model, ids, temperature=1.0, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), before)
    first, other = (streamed(model, ids, temperature=1.0) for _ in range(2))
    assert not torch.equal(first, other), "without a seed, torch's own generator"
    off = {"temperature": 1, "top_k": 0, "top_p": 1, "min_p": 0, "repetition_penalty": 1}
    said = torch.stack(list(generate.stream(model, ids, seed=1)), dim=1)
    assert torch.equal(said, streamed(model, ids, max_new_tokens=256, seed=1, **off))


def test_rows_that_only_pad_the_vocabulary_are_never_sampled():
    """Even where they would be the most probable: the checkpoints have three such rows."""
    for options in ({"temperature": 1.0}, {"temperature": 0}, {"vocab_size": 28}):
        model = scripted_model([[30] * 30] * 4, vocab_size=29)
        assert model.lm_head.weight.shape[0] == 32
        tokens = streamed(model, random_ids(4, 3, 28), max_new_tokens=30, **options)
        assert tokens.max() < options.get("vocab_size", 29)


def test_a_finished_row_repeats_the_first_end_token_until_all_rows_are_finished():
    script = [[5, 3, 6, 7, 8, 9], [5, 5, 5, 0, 9, 9]]
    for ends, expected in (
        (3, [[5, 3, 3, 3, 3, 3], script[1]]),
        ((3, 0), [[5, 3, 3, 3], [5, 5, 5, 0]]),
        ([0, 3], [[5, 3, 0, 0], [5, 5, 5, 0]]),
        (torch.tensor([3, 0]), [[5, 3, 3, 3], [5, 5, 5, 0]]),
        (torch.tensor(0), [script[0], [5, 5, 5, 0, 0, 0]]),
        ([], script),
        (None, script),
    ):
        options = {"eos_token_id": ends, "max_new_tokens": 6}
        tokens = streamed(scripted_model(script), random_ids(2, 3), **options)
        assert tokens.tolist() == expected, ends


# What is refused, and the last values that are allowed.
RANGES = {
    "max_new_tokens": ([0, -1, 2.0, "2", True], [1]),
    "temperature": ([-1e-9, math.nan, math.inf, "1"], [0, 5e-324, 1.7e308]),
    "top_k": ([-1, 2.0, math.nan], [0, 2**63]),
    "top_p": ([0, 1.0000001, math.nan], [5e-324, 1]),
    "min_p": ([-1e-9, 1.0000001, math.nan], [0, 1]),
    "repetition_penalty": ([0, -1, math.nan, math.inf], [5e-324, 1.7e308]),
    "seed": ([-1, 2**64, 2.5, "2"], [0, 2**64 - 1, None]),
    "vocab_size": ([0, 31, 2.5], [1, 30, None]),
    "eos_token_id": ([-1, 30, 2.0, "2", [3, 30]], [0, 29, None]),
}
FLOATS, SHORT_INTEGERS = torch.zeros(1, 3), torch.zeros(1, 3, dtype=torch.int16)
NO_BATCHES = [torch.zeros(s, dtype=torch.int64) for s in ((0, 5), (1, 0), (5,), ())]


def test_a_value_outside_its_range_is_refused_with_its_name_and_itself():
    """At once, and not with the first token."""
    model, ids = random_model(), torch.zeros(1, 3, dtype=torch.int32)
    for name, (wrong, right) in RANGES.items():
        for value in wrong:
            with pytest.raises(ValueError, match=f"^{name} must be .*, got ") as error:
                generate.stream(model, ids, **{name: value})
            assert str(error.value).endswith(f"got {value}")
        for value in right:
            assert len(list(generate.stream(model, ids, **{"max_new_tokens": 1, name: value}))) == 1
    for wrong in (FLOATS, SHORT_INTEGERS, *NO_BATCHES):
        found = re.escape(f"{wrong.dtype} {tuple(wrong.shape)}")
        with pytest.raises(ValueError, match=f"^input_ids must be int64 or int32, .* got {found}$"):
            generate.stream(model, wrong)


@pytest.mark.parametrize(
    ("error", "words", "options"),
    [
        (IndexError, r"\[0, 30\), got 0 ... 30", {"input_ids": torch.tensor([[0, 30]])}),
        (IndexError, r"\[0, 30\), got -1 ... 3", {"input_ids": torch.tensor([[3, -1]])}),
        (IndexError, r"\[0, 3\), got 1 ... 3", {"vocab_size": 3}),
        (ValueError, "mask must have the shape", {"mask": torch.ones(2, 2, dtype=torch.bool)}),
        (ValueError, "mask must be left padding", {"mask": torch.tensor([[1, 0]])}),
        (ValueError, "state", {"state": random_model().init_state(3)}),
    ],
)
def test_what_does_not_fit_together_is_refused(error, words, options):
    ids = options.get("input_ids", torch.tensor([[1, 3]]))
    with pytest.raises(error, match=words):
        next(generate.stream(random_model(), **{"input_ids": ids} | options))


@pytest.mark.parametrize("on_gpu", [False, True])
@pytest.mark.parametrize("broken_from", [0, 2])
def test_logits_that_are_no_numbers_are_an_error_and_no_text(broken_from, on_gpu):
    """After the prompt, and on a CPU after every token; a GPU would have to be waited for."""
    model = random_model(tie_embeddings=False)
    with mock.patch.object(Tensor, "is_cuda", on_gpu):
        steps = generate.stream(model, random_ids(2, 4), temperature=0)
    for _ in range(broken_from):
        next(steps)
    model.lm_head.weight.data[3, 5] = math.nan
    looks = contextlib.nullcontext() if on_gpu and broken_from else pytest.raises(RuntimeError)
    with looks as error:
        next(steps)
    assert error is None or "not finite" in str(error.value)


## Conversations -----------------------------------------------------------------------------------

## Two turns are one text: the model reads it whole and agrees with what was said in parts.


@pytest.mark.parametrize("ending", ["max_new_tokens", "an end token", "a reader"])
def test_two_turns_equal_one_text_wherever_the_first_one_ends(ending):
    """And between two tokens the state of a stream is the one before the last of them."""
    model, ids, more = random_model(), random_ids(2, 5), random_ids(2, 4)
    end = streamed(model, ids)[:, 4].tolist() if ending == "an end token" else None
    given = model.init_state(2)
    options = {"temperature": 0, "max_new_tokens": 12, "eos_token_id": end}
    turn, text, said = generate.stream(model, ids, state=given, **options), ids, []
    assert torch.equal(turn.state.h, given.h), "nothing was read so far"
    for step in turn:
        said.append(step)
        assert torch.is_grad_enabled() and not turn.state.h.requires_grad
        _, expected = model(text, model.init_state(2))
        assert_close("h", turn.state.h, expected.h, 1e-4)
        assert_close("conv", turn.state.conv, expected.conv, 1e-4)
        text = torch.cat([text, step.unsqueeze(1)], dim=1)
        if ending == "a reader" and len(said) == 3:
            break
    assert len(said) < 12 or ending == "max_new_tokens"
    assert_close("h at the end", turn.state.h, expected.h, 1e-4)
    assert not given.h.any() and not given.conv.any(), "the state that was given is as it was"
    text = torch.cat([text, more], dim=1)
    second = torch.cat([said[-1].unsqueeze(1), more], dim=1)
    for _ in range(2):  # the state is a value, whatever others do with it
        assert torch.equal(streamed(model, second, state=turn.state), reading_again(model, text))
        turn.state.h.fill_(9)


def test_a_beginning_is_read_once_for_several_continuations():
    model, beginning, questions = random_model(), random_ids(1, 9), random_ids(3, 4)
    _, state = generate.prefill(model, beginning)
    text = torch.cat([beginning.expand(3, -1), questions], dim=1)
    expected = reading_again(model, text)
    assert torch.equal(streamed(model, questions, state=state[:, [0] * 3]), expected)
    assert torch.equal(streamed(model, questions[1:2], state=state), expected[1:2])


## Text, and where it ends -------------------------------------------------------------------------


def generated(texts: list[str], **options) -> list[str]:
    """What `generate` makes of a model that says these texts, byte by byte, one in each row."""
    longest = max(len(text.encode()) for text in texts)
    model = scripted_model([text.encode().ljust(longest, b".") for text in texts], vocab_size=256)
    options = {"temperature": 0, "max_new_tokens": longest} | options
    return generate.generate(model, BYTES, ["a"] * len(texts), **options)


@pytest.mark.parametrize(
    ("stop", "expected"),
    [
        ([], "to be or not to be"),
        (["or"], "to be "),
        (["e o", "be o"], "to "),  # complete with the same token
        (["not to", "or not"], "to be "),  # the first one that is complete
        (("be", " be or"), "to "),
        (["to be"], ""),
        (["to be or not to be, that"], "to be or not to be"),
        (["xyz", "beer", "not to be?"], "to be or not to be"),  # begun, never finished
        (["t to b"], "to be or no"),
    ],
    ids=str,
)
def test_a_text_ends_before_the_first_stop_string(stop, expected):
    """Also where it spans several tokens; what only begins like one is text."""
    assert generated(["to be or not to be"], stop=stop) == [expected]


@pytest.mark.parametrize(
    ("options", "words"),
    [({"stop": stop}, "stop must be a list of texts") for stop in ("text", [""], ["a", ""], [5])]
    + [({"prompt": prompt}, "the prompt is empty") for prompt in ("", ["a", ""], [])],
)
def test_texts_with_nothing_in_them_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        generate.generate(random_model(vocab_size=256), BYTES, **{"prompt": "a"} | options)


def test_every_row_has_its_own_end_and_no_step_is_taken_once_all_have_ended():
    texts = ["one. two", "no end he", "three four. five"]
    assert generated(texts, stop=[". ", "four"]) == ["one", "no end he" + "." * 7, "three "]
    ends = [ord("."), ord("n")]
    assert generated(texts, eos_token_id=ends) == ["o", "", "three four"]
    model, steps = scripted_model([b"a.bcdefgh", b"abcd.efgh"], vocab_size=256), []
    model.lm_head.register_forward_hook(lambda *_: steps.append(1))
    texts = generate.generate(model, BYTES, ["x", "y"], temperature=0, stop=["."])
    assert texts == ["a", "abcd"] and len(steps) == 5


def test_a_tokenizer_says_what_ends_a_text_and_how_many_tokens_there_are_unless_the_caller_does():
    tokenizer = generate.ByteTokenizer()
    tokenizer.eos_token_ids, tokenizer.vocab_size = [ord(".")], 128
    for own, expected in (({}, "a\0\0"), ({"eos_token_id": [], "vocab_size": 256}, "aé.b")):
        model, options = scripted_model(["aé.b".encode()], vocab_size=256), {"temperature": 0} | own
        assert generate.generate(model, tokenizer, "x", max_new_tokens=5, **options) == expected


def test_pieces_hold_back_what_may_become_a_stop_string_and_nothing_else():
    for said, stop, expected in (
        (b"abxab-cd", ["ab-", "-e"], ["", "", "abx", "", "", ""]),
        (b"abxa-cd", ["ab-", "-e"], ["", "", "abx", "", "a", "-c"]),
        (b"xa", ["ab"], ["x", "", "a"]),
        (b"ab", [], ["a", "b"]),
    ):
        assert list(generate.text_of(BYTES, said, [ord("d")], stop)) == expected


def test_streamed_text_is_whole_characters_and_ends_with_the_last_one_that_is_complete():
    text = "naïve – 3 € 😀 日本語\n"
    pieces = list(BYTES.decode_stream(text.encode()))
    assert "".join(pieces) == text == BYTES.decode(text.encode())
    assert not any("\ufffd" in piece for piece in pieces), "half of a character"
    for length, expected in ((3, "caf"), (4, "caf"), (5, "café"), (8, "café "), (9, "café €")):
        assert generated(["café €"], max_new_tokens=length) == [expected]


@settings(max_examples=200, derandomize=True, deadline=None)
@given(st.binary())
@example(b"\xed\xa0")  # half of what is no character either
def test_any_bytes_a_model_may_produce_stream_as_text_without_a_crash(data):
    """What comes is the whole text, but for up to three bytes that begin a character at its end."""
    said = "".join(BYTES.decode_stream(data))
    assert said in [BYTES.decode(data[: len(data) - held_back]) for held_back in range(4)]


@pytest.mark.filterwarnings("ignore")  # torch.ao will move
def test_a_model_with_quantised_projections_generates():
    """Its Linears have no parameter that would tell the device."""
    model = random_model(vocab_size=256)
    quantised = torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, torch.qint8)
    assert not isinstance(quantised.lm_head.weight, Tensor)
    assert len(generate.generate(quantised, BYTES, ["ab", "c"], max_new_tokens=5)) == 2
