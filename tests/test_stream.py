"""Ids in, ids out, and text: what `stream` and `generate` claim, as sentences.

The judge is the model, reading the whole text again for every token.
"""

import math
import re
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import generate
from mamba import Mamba
from test_mamba import assert_all_close, random_ids, random_model

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
IDS = torch.tensor([[1, 3]])
MISFITS = [
    ("must be int64 or int32, (batch, seqlen), at least one, got", {"input_ids": IDS.float()}),
    ("got torch.int64 (0, 2)", {"input_ids": IDS[:0]}),
    ("got torch.int64 (2,)", {"input_ids": IDS[0]}),
    ("must be in [0, 30), got 1 ... 30", {"input_ids": torch.tensor([[1, 30]])}),
    ("must be in [0, 30), got -1 ... 3", {"input_ids": torch.tensor([[3, -1]])}),
    ("must be in [0, 3), got 1 ... 3", {"vocab_size": 3}),
    ("mask must have the shape of input_ids, (1, 2), got (2, 2)", {"mask": torch.ones(2, 2) > 0}),
    ("mask must be left padding", {"mask": torch.tensor([[1, 0]])}),
    ("state.conv must have shape (1, 32, 3)", {"state": random_model().init_state(3)}),
]


def test_what_is_out_of_range_or_does_not_fit_is_refused_with_its_name_and_itself():
    """A value at once, and not with the first token."""
    model = random_model()
    for name, (wrong, right) in RANGES.items():
        for value in wrong:
            with pytest.raises(ValueError, match=f"^{name} must be .*, got ") as error:
                generate.stream(model, IDS, **{name: value})
            assert str(error.value).endswith(f"got {value}")
        for value in right:
            options = {"max_new_tokens": 1, name: value}
            assert len(list(generate.stream(model, torch.zeros_like(IDS).int(), **options))) == 1
    for words, options in MISFITS:
        with pytest.raises((ValueError, IndexError), match=re.escape(words)):
            next(generate.stream(model, **{"input_ids": IDS} | options))


@pytest.mark.parametrize(("begun", "on_gpu"), [(0, False), (2, False), (0, True), (2, True)])
def test_logits_that_are_no_numbers_are_an_error_and_no_text(begun, on_gpu):
    """After the prompt, and on a CPU after every token; a GPU would have to be waited for."""
    model = random_model(tie_embeddings=False)
    with mock.patch.object(Tensor, "is_cuda", on_gpu):
        steps = generate.stream(model, random_ids(2, 4), temperature=0)
    _ = [next(steps) for _ in range(begun)]
    model.lm_head.weight.data[3, 5] = math.nan
    if begun and on_gpu:
        next(steps)
    else:
        with pytest.raises(RuntimeError, match="not finite"):
            next(steps)


## Conversations -----------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["max_new_tokens", "an end token", "a reader"])
def test_two_turns_equal_one_text_wherever_the_first_one_ends(ending):
    """Also in its state, which between two tokens is the one before the last of them."""
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
        assert_all_close(vars(turn.state), vars(expected), 1e-4)
        text = torch.cat([text, step.unsqueeze(1)], dim=1)
        if ending == "a reader" and len(said) == 3:
            break
    assert len(said) < 12 or ending == "max_new_tokens"
    assert_all_close(vars(turn.state), vars(expected), 1e-4)
    assert not given.h.any() and not given.conv.any(), "the state that was given is as it was"
    text = torch.cat([text, more], dim=1)
    second = torch.cat([said[-1].unsqueeze(1), more], dim=1)
    for _ in range(2):  # the state is a value, whatever others do with it
        assert torch.equal(streamed(model, second, state=turn.state), reading_again(model, text))
        turn.state.h.fill_(9)


## Text, and where it ends -------------------------------------------------------------------------


def generated(texts: list[str], **options) -> list[str]:
    """What `generate` makes of a model that says these texts, byte by byte, one in each row."""
    longest = max(len(text.encode()) for text in texts)
    model = scripted_model([text.encode().ljust(longest, b".") for text in texts], vocab_size=256)
    options = {"temperature": 0, "max_new_tokens": longest} | options
    return generate.generate(model, BYTES, ["a"] * len(texts), **options)


def test_a_text_ends_before_the_first_stop_string():
    """Also where it spans several tokens; what only begins like one is text."""
    for stop, expected in (
        (["e o", "be o"], "to "),  # complete with the same token
        (["not to", "or not"], "to be "),  # the first one that is complete
        (("be", " be or"), "to "),
        (["to be"], ""),
        (["to be or not to be, that", "beer"], "to be or not to be"),  # begun, never finished
        (["t to b"], "to be or no"),
    ):
        assert generated(["to be or not to be"], stop=stop) == [expected], stop


def test_texts_with_nothing_in_them_are_refused():
    model, stops = random_model(vocab_size=256), ("text", [""], ["a", ""], [5])
    calls = [({"stop": stop}, "stop must be a list of texts") for stop in stops]
    calls += [({"prompt": prompt}, "the prompt is empty") for prompt in ("", ["a", ""], [])]
    for options, words in calls:
        with pytest.raises(ValueError, match=words):
            generate.generate(model, BYTES, **{"prompt": "a"} | options)


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
    no_text = b"a\xff, \xed\xa0 and \xf0\x9fb"
    assert "".join(BYTES.decode_stream(no_text)) == BYTES.decode(no_text)
    for length, expected in ((3, "caf"), (4, "caf"), (5, "café"), (8, "café "), (9, "café €")):
        assert generated(["café €"], max_new_tokens=length) == [expected]
