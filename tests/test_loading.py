"""Checkpoints from folders and from the Hub: what loads, and what is said of what does not."""

import functools
import json
import pickle
import re
import socket
import tempfile
import time
from pathlib import Path

import pytest
import torch
import transformers
from hub import COMMIT, LIST, Hub
from huggingface_hub import constants, errors
from safetensors.torch import save_file

import mamba
from mamba import Mamba, MambaConfig
from test_mamba import assert_close, random_model, randomise

ROOT = Path(__file__).resolve().parent.parent
NAME = "someone/small-mamba"
CONFIG = {"d_model": 8, "n_layer": 2, "vocab_size": 30, "ssm_cfg": {}, "rms_norm": True}
CONFIG |= {"residual_in_fp32": True, "fused_add_norm": True, "pad_vocab_size_multiple": 8}
HF_CONFIG = {"model_type": "mamba", "hidden_size": 8, "num_hidden_layers": 2, "vocab_size": 32}
HF_CONFIG |= {"architectures": ["MambaForCausalLM"], "intermediate_size": 16, "d_model": 2048}
SAFE, INDEX = "model.safetensors", "model.safetensors.index.json"
BIN, BIN_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
SHARDS = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
FORMATS = {"safetensors": [SAFE], "shards": [INDEX, *SHARDS], "bin": [BIN]}  # in this order
FORMATS["bin shards"] = [BIN_INDEX, *(f"pytorch_model-0000{i}-of-00003.bin" for i in (1, 2, 3))]
HF, HF_SHARDS = "hf safetensors", "hf shards"
OUT = "backbone.layers.0.mixer.out_proj.weight"
D, NORM, EMBEDDING = "backbone.layers.1.mixer.D", "backbone.norm_f.weight", mamba.EMBEDDING
IDS = torch.arange(20).view(2, 10)


def small(**changes) -> Mamba:
    torch.manual_seed(0)  # the same numbers each time
    return random_model(**{"d_model": 8, "d_state": 16, "bias": False} | changes)


# The tied matrix is there under both of its names in the originals, under one in the others.
WEIGHTS = {name: tensor.detach() for name, tensor in small().state_dict().items()}
HF_WEIGHTS = {k.replace("embedding.", "embeddings."): v for k, v in WEIGHTS.items()}
del HF_WEIGHTS["lm_head.weight"]


def write(folder: Path, layout: str = "bin", tensors: object = None, **changes) -> Path:
    """A whole folder, as transformers has it ("hf ...") or as originals are, with these changes."""
    folder.mkdir(exist_ok=True)
    form = layout.removeprefix("hf ")
    config, weights = (CONFIG, WEIGHTS) if form == layout else (HF_CONFIG, HF_WEIGHTS)
    tensors, files = tensors or weights, FORMATS.get(form, [BIN])
    (folder / "config.json").write_text(json.dumps(config | changes))
    parts = [list(tensors)[i::3] for i in range(3)] if len(files) > 1 else [tensors]
    if len(files) > 1:
        index, *files = files
        where = {name: file for file, part in zip(files, parts, strict=True) for name in part}
        (folder / index).write_text(json.dumps({"metadata": {}, "weight_map": where}))
    for file, part in zip(files, parts, strict=True):
        if file.endswith(".bin"):
            part = {name: tensors[name] for name in part}
            torch.save(part, folder / file, _use_new_zipfile_serialization=form != "old bin")
        else:
            save_file({name: tensors[name].clone() for name in part}, folder / file)
    return folder


def assert_loads(name_or_path: str | Path, dtype: torch.dtype = torch.float32, **options) -> None:
    model = Mamba.from_pretrained(name_or_path, dtype=dtype, **options)
    for name, tensor in WEIGHTS.items():
        assert torch.equal(model.state_dict()[name], tensor.to(dtype)), name
    assert model.lm_head.weight is model.backbone.embedding.weight
    assert all(p.is_contiguous() and p.requires_grad for p in model.parameters())


def assert_refused(name_or_path: str | Path, kind: type, *words: str, **options) -> str:
    """One sentence with these words, which is returned; none that leads to run what was refused."""
    with pytest.raises(Exception) as info:
        Mamba.from_pretrained(name_or_path, **options)
    message = str(info.value)
    assert info.type is kind and 20 < len(message) < 600 and "\n" not in message, message
    assert not any(word in message for word in ("weights_only=False", "Re-running", "again"))
    assert all(word in message for word in words), message
    return message


@pytest.mark.parametrize("layout", [*FORMATS, "old bin", HF, HF_SHARDS, "hf bin shards"])
def test_every_layout_gives_the_same_model_bit_by_bit_and_its_files_are_mapped(layout, tmp_path):
    write(tmp_path, layout)
    assert_loads(tmp_path, torch.bfloat16)
    assert_loads(tmp_path)
    maps = Path("/proc/self/maps")
    if maps.exists() and layout != "old bin":  # files from before torch 1.6 cannot be mapped
        model = Mamba.from_pretrained(tmp_path)
        lines = [line for line in maps.read_text().splitlines() if str(tmp_path) in line]
        ranges = [[int(end, 16) for end in line.split()[0].split("-")] for line in lines]
        for name, parameter in model.named_parameters():
            assert any(low <= parameter.data_ptr() < high for low, high in ranges), name


CHANGES = {"tie_word_embeddings": False, "use_bias": True, "use_conv_bias": False, "expand": 3}
CHANGES |= {"time_step_rank": 5, "conv_kernel": 3, "state_size": 7, "layer_norm_epsilon": 0.3}


@pytest.mark.parametrize("changes", [{}, CHANGES])
def test_a_folder_that_transformers_wrote_gives_the_logits_of_transformers(changes, tmp_path):
    sizes = {"hidden_size": 8, "num_hidden_layers": 2, "vocab_size": 29}
    theirs = transformers.MambaForCausalLM(transformers.MambaConfig(**sizes, **changes))
    randomise(theirs).save_pretrained(tmp_path, max_shard_size="4KB" if changes else "1GB")
    assert (tmp_path / INDEX).exists() == bool(changes)
    assert_close("logits", Mamba.from_pretrained(tmp_path)(IDS), theirs(IDS).logits, 1e-5)


def test_an_absent_field_means_what_it_means_in_transformers(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "mamba"}')
    config, theirs = mamba.read_config(tmp_path / "config.json"), transformers.MambaConfig()
    for name, ours in mamba.HF_FIELDS.items():
        # The name of a tokenizer is ours, and absent there: None here.
        assert type(ours) is list or getattr(config, ours) == getattr(theirs, name, None), name
    assert config.d_inner == theirs.intermediate_size
    assert config.padded_vocab_size == theirs.vocab_size


OFFICIAL = {"torch_dtype": "float16", "layer": "Mamba1", "event_time": False, "attn_cfg": {}}
OFFICIAL |= {"eos_token_id": 0, "d_intermediate": 0, "attn_layer_idx": [], "use_fast_path": True}
NULL = dict.fromkeys(("norm_eps", "rule", "event_time", "residual_in_fp32", "d_stat", "ssm_cfg"))
STALE = {"d_model": 2048, "n_layer": 7, "rms_norm": False, "ssm_cfg": 3, "hidden_act": "swish"}
STALE |= {"no_repeat_ngram_size": 0, "pad_vocab_size_multiple": 8, "event_time": False}
HF_NULL = dict.fromkeys(("time_step_rank", "layer_norm_epsilon", "hidden_act", "norm_eps"))


def test_fields_that_say_nothing_about_the_model_are_read_over(tmp_path):
    """Tokens, nulls, what others write into each config; names of sizes are among them."""
    of_hf = transformers.MambaConfig(**HF_CONFIG).to_dict() | STALE
    for changes in (OFFICIAL | {"ssm_cfg": {"d_state": None, "d_conv": 4}}, NULL, of_hf, HF_NULL):
        layout = HF if changes in (of_hf, HF_NULL) else "bin"
        assert_loads(write(tmp_path / layout, layout, **changes))
        expected = {"vocab_size": 32, "pad_vocab_size_multiple": 1} if layout == HF else {}
        expected = MambaConfig(**{"d_model": 8, "n_layer": 2, "vocab_size": 30, **expected})
        assert mamba.read_config(tmp_path / layout / "config.json") == expected


def test_of_several_formats_the_first_is_read_and_what_is_saved_beside_them_counts(
    tmp_path, monkeypatch
):
    monkeypatch.setenv("HF_HUB_ETAG_TIMEOUT", "soon")  # a local folder does not ask for it
    for layout, files in reversed(FORMATS.items()):
        write(tmp_path, layout)
        assert_loads(tmp_path)
        for file in files:  # nobody may read these any more
            (tmp_path / file).write_bytes(b"stale")
        assert_refused(tmp_path, RuntimeError, files[0])
    by_columns = WEIGHTS | {OUT: WEIGHTS[OUT].mT.contiguous().mT}  # only such files can hold it
    assert_loads(write(tmp_path / "by columns", "bin", by_columns))
    small().save_pretrained(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert_loads("~")


@pytest.mark.parametrize("flag", [True, False])
@pytest.mark.parametrize("head", ["tied", "equal", "another"])
def test_whether_the_head_is_the_embedding_is_asked_of_the_tensors(flag, head, tmp_path):
    """Equal is not tied: a tied one would change with the embedding in the next training step."""
    model, is_tied = small(tie_embeddings=flag), head == "tied"
    weight = model.backbone.embedding.weight
    changed = torch.nn.Parameter(weight.detach() + (1.0 if head == "another" else 0.0))
    model.lm_head.weight = weight if is_tied else changed
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["tie_embeddings"] == is_tied
    assert model.config.tie_embeddings == flag  # to save changes nothing in the model
    loaded = Mamba.from_pretrained(tmp_path)
    loaded.save_pretrained(tmp_path)  # over the file that its weights are mapped from
    for again in (loaded, Mamba.from_pretrained(tmp_path)):
        assert torch.equal(again(IDS), model(IDS)) and again.config.tie_embeddings == is_tied
        assert (again.lm_head.weight is again.backbone.embedding.weight) == is_tied
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", SAFE]


def test_what_is_not_the_default_is_saved_too_and_what_is_ours_alone_only_then(tmp_path):
    changes = {"rule": "zoh", "norm_eps": 1e-3, "tokenizer": "bytes", "d_state": 3, "expand": 1.5}
    changes |= {"d_conv": 2, "dt_rank": 5, "bias": True, "conv_bias": False, "dt_init": "constant"}
    changes |= {"dt_min": 0.1, "dt_max": 0.2, "dt_init_floor": 0.01, "dt_scale": 2.0}
    model = small(**changes, residual_in_fp32=False, pad_vocab_size_multiple=7)
    model.save_pretrained(tmp_path / "new" / "folder")
    assert Mamba.from_pretrained(tmp_path / "new" / "folder").config == model.config
    small(scan="sequential").save_pretrained(tmp_path)  # how to run it, not what it is
    entries = json.loads((tmp_path / "config.json").read_text())
    assert not entries.keys() & set(mamba.OUR_OWN) and len(entries["ssm_cfg"]) == 11
    assert entries["rms_norm"] is entries["fused_add_norm"] is True  # the official code asks
    assert Mamba.from_pretrained(tmp_path, scan="chunked").config == small(scan="chunked").config


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_adapters_are_saved_merged_with_their_own_head_and_peft_warns_of_tied_matrices(tmp_path):
    peft = pytest.importorskip("peft")

    def adapted(**options):
        return peft.get_peft_model(small(), peft.LoraConfig(init_lora_weights=False, **options))

    with pytest.warns(UserWarning, match="tied layer is part of the adapter"):
        adapted(target_modules=["lm_head"])
    with pytest.warns(UserWarning, match="no longer tied after merging"):
        model = adapted(target_modules=["in_proj"], modules_to_save=["lm_head"])
        torch.nn.init.normal_(model.base_model.model.lm_head.modules_to_save["default"].weight)
        with pytest.raises(RuntimeError, match="lora_A"):
            model.base_model.model.save_pretrained(tmp_path / "model")
        expected, merged = model(IDS), model.merge_and_unload()
    assert not (tmp_path / "model").exists()
    merged.save_pretrained(tmp_path)
    loaded = Mamba.from_pretrained(tmp_path)
    assert_close("logits", loaded(IDS), expected, 1e-5)
    assert merged.config.tie_embeddings is loaded.config.tie_embeddings is False


WRONG = {"model_type": "t5", "layer": "Mamba2", "attn_layer_idx": [1], "d_intermediate": 64}
WRONG |= {"rms_norm": False, "d_stat": 16, "scan": "chunked", "ssm_cfg": 3, "n_layer": None}
WRONG |= {"d_model": 2**40, "vocab_size": 10**19, "rule": ["zoh"], "event_time": True}
HF_WRONG = {"model_type": "mamba2", "hidden_act": "gelu", "quantization_config": {}}
HF_WRONG |= {"norm_eps": 1e-6, "rms_norm_epsilon": 1e-6, "state_dim": 32, "d_state": 16}
HF_WRONG |= {"hidden_size": 1.5, "num_hidden_layers": 10**9, "event_time": True}


def test_a_config_of_another_model_is_refused_by_the_name_of_its_field_in_the_file(tmp_path):
    wrong = [("bin", *field) for field in WRONG.items()] + [(HF, *f) for f in HF_WRONG.items()]
    for layout, field, value in wrong:
        write(tmp_path, layout, **{field: value})
        named = str(value) if type(value) is int and value > 10**8 else field
        message = assert_refused(tmp_path, ValueError, f"{tmp_path / 'config.json'}: ", named)
        assert field != "event_time" or "examples/event_time.py" in message
    for field, named in (("layer", "layer"), ("d_stat", "d_stat"), ("d_model", "ssm_cfg")):
        write(tmp_path, ssm_cfg={field: WRONG[field]})
        assert_refused(tmp_path, ValueError, named)
    write(tmp_path, HF, model_type=None)
    assert_refused(tmp_path, ValueError, "model_type = None is another architecture, not 'm")


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 516\n"
LLAMA = b'{"model_type": "llama", "hidden_size": 16, "num_attention_heads": 4}'
DAMAGES = [  # no such file, that part of the true content, or this content
    ("bin", "config.json", None, FileNotFoundError, "has no file config.json"),
    ("bin", "config.json", b"[1]", RuntimeError, "a list is no dict"),
    ("bin", BIN, None, FileNotFoundError, f"{SAFE} or {INDEX} or {BIN} or {BIN_INDEX}"),
    ("bin", BIN, 0.99, RuntimeError, BIN),
    ("old bin", BIN, 0.5, RuntimeError, BIN),
    ("bin", BIN, bytes(range(256)), RuntimeError, f"{bytes(range(40))!r})"),
    ("bin", BIN, LFS, RuntimeError, "run `git lfs pull`"),
    (HF, SAFE, 0.5, RuntimeError, SAFE),
    (HF_SHARDS, SHARDS[1], None, FileNotFoundError, SHARDS[1]),
    (HF_SHARDS, INDEX, 0.5, RuntimeError, INDEX),
    (HF_SHARDS, INDEX, b'{"weight_map": ["x"]}', ValueError, INDEX),
    (HF_SHARDS, INDEX, b'{"weight_map": {"D": "../up", "A": "a"}}', ValueError, "weight_map"),
]


@pytest.mark.parametrize(("layout", "file", "content", "kind", "named"), DAMAGES)
def test_a_damaged_or_foreign_file_is_named(layout, file, content, kind, named, tmp_path):
    path = write(tmp_path / "model", layout) / file
    whole = path.read_bytes()
    path.unlink()
    if content is not None:
        path.write_bytes(whole[: int(len(whole) * content)] if type(content) is float else content)
    message = assert_refused(tmp_path / "model", kind, str(tmp_path), named)
    assert ("git lfs" in message) == (content == LFS)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
def test_a_bin_file_of_anything_but_tensors_is_refused_and_nothing_in_it_is_run(tmp_path):
    path, canary = write(tmp_path) / BIN, tmp_path / "canary"
    runs = type("Runs", (), {"__reduce__": lambda self: (Path.touch, (canary,))})()
    for spoil in (
        lambda: path.write_bytes(pickle.dumps(runs)),
        lambda: torch.save({"D": runs}, path),
        lambda: torch.save([torch.ones(2)], path),
        lambda: torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), path),
    ):
        spoil()
        assert_refused(tmp_path, RuntimeError, str(path), "nothing in it was run")
    assert not canary.exists()


SEVERAL = {k: v for k, v in WEIGHTS.items() if "layers.0" not in k}
SEVERAL |= {NORM: torch.ones(2, 8), "head.bias": torch.ones(3)}
THREE = ", ".join([name for name in WEIGHTS if "layers.0" in name][:3])
MISFITS = [
    (WEIGHTS | {D: 3}, f"1 misshapen: {D} int"),
    (WEIGHTS | {D: WEIGHTS[D].int()}, "int32"),
    (WEIGHTS | {D: WEIGHTS[D].to("meta")}, D),
    (WEIGHTS | {D: WEIGHTS[D][1:]}, f"1 misshapen: {D} (15,), not (16,)"),
    ({k: v for k, v in WEIGHTS.items() if k != EMBEDDING}, f"1 missing: {EMBEDDING})"),
    (HF_WEIGHTS | WEIGHTS, "1 unknown: backbone.embeddings.weight)"),
    (
        SEVERAL,
        f"(weights: 10 missing: {THREE};",
        f"; 1 unknown: head.bias; 1 misshapen: {NORM} (2, 8), not (8,)",
    ),
]


def test_weights_that_do_not_fit_are_counted_and_three_of_a_fault_named(tmp_path):
    for tensors, *words in MISFITS:
        write(tmp_path, "bin", tensors)
        assert_refused(tmp_path, RuntimeError, str(tmp_path), *words)
    (tmp_path / BIN).unlink()
    write(tmp_path, HF, tie_word_embeddings=False)
    assert_refused(tmp_path, RuntimeError, "1 missing: lm_head.weight")
    write(tmp_path, HF, num_hidden_layers=3)
    assert_refused(tmp_path, RuntimeError, "backbone.layers.2.mixer.A_log")
    write(tmp_path, HF, HF_WEIGHTS | {"lm_head.weight": torch.ones(32, 8)})
    assert_refused(tmp_path, ValueError, str(tmp_path), "lm_head is not the embedding")
    (tmp_path / SAFE).unlink()
    save_file(HF_WEIGHTS, write(tmp_path, HF_SHARDS) / SHARDS[1])
    assert_refused(tmp_path, RuntimeError, SHARDS[1], "stands in another file as well")


def test_what_wraps_all_weights_is_named_with_the_line_that_takes_it_off(tmp_path):
    prefixed = {f"module._orig_mod.{name}": tensor for name, tensor in WEIGHTS.items()}
    write(tmp_path, "bin", prefixed)
    message = assert_refused(tmp_path, RuntimeError, "'module._orig_mod.'")
    names = {"weights": prefixed}
    exec(re.search("`(.+)`", message)[1], names)
    write(tmp_path, "bin", names["weights"])
    assert_loads(tmp_path)
    write(tmp_path, "bin", {"optimizer": {"state": {}}, "epoch": 3, "model": WEIGHTS})
    message = assert_refused(tmp_path, RuntimeError, "'model'")
    exec(re.search("`(.+)`", message)[1], {"torch": torch})
    assert_loads(tmp_path)


def test_a_wrong_call_is_refused_before_a_weight_is_looked_for(hub, monkeypatch, tmp_path):
    (write(tmp_path) / BIN).unlink()
    for name, wrong in dict(dtype=torch.int8, scan="fast", device="gpu").items():
        assert_refused(tmp_path, ValueError, str(wrong), **{name: wrong})
    monkeypatch.chdir(ROOT)
    for name in ("", "gpt2", "/no/such/folder", "a/b/c", "tests/typo", "a b/c"):
        assert_refused(name, FileNotFoundError, repr(name), "is neither a folder nor")
    for name in ("a--b/c", "someone/small..mamba", "someone/" + "m" * 200):
        assert_refused(name, errors.HFValidationError, name)
    assert hub.requests == hub.others == []


@functools.cache
def files_of(layout: str) -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as folder:
        return {path.name: path.read_bytes() for path in write(Path(folder), layout).iterdir()}


@pytest.fixture
def hub(hub) -> Hub:
    hub.repositories[NAME] = dict(files_of("bin"))
    return hub


def downloads(hub: Hub) -> list[str]:
    return sorted(name for method, _, name in hub.requests if method == "GET" and name != LIST)


def test_one_of_several_formats_is_downloaded_once_and_of_a_foreign_model_none(hub):
    """state-spaces/mamba-2.8b has two, 11 GB each."""
    hub.repositories["someone/foreign"] = files_of("bin") | {"config.json": LLAMA}
    assert_refused("someone/foreign", ValueError, "llama")
    assert downloads(hub) == ["config.json"]
    hub.requests.clear()
    hub.repositories[NAME] |= files_of("hf bin shards") | files_of("shards") | {"x.bin": b"no use"}
    assert_loads(NAME)
    assert downloads(hub) == sorted(["config.json", INDEX, *SHARDS])
    hub.requests.clear()
    assert_loads(NAME + "/")
    assert hub.requests[0] == ("GET", NAME, LIST)
    assert {method for method, _, _ in hub.requests[1:]} == {"HEAD"}
    hub.stop()
    assert_loads(NAME)  # chosen in the cache as on the Hub


def test_of_a_new_commit_only_what_differs_is_downloaded_and_the_old_one_stays_there(hub):
    assert_loads(NAME)
    hub.push(NAME, hub.repositories[NAME] | {"config.json": json.dumps(HF_CONFIG).encode()})
    hub.requests.clear()
    assert_loads(NAME)
    assert downloads(hub) == ["config.json"]
    for revision, size in ((COMMIT, 30), ("main", 32)):
        options = {"revision": revision, "local_files_only": revision == "main"}
        assert Mamba.from_pretrained(NAME, **options).config.vocab_size == size
    assert_refused(NAME, FileNotFoundError, "in the cache", revision="v2", local_files_only=True)


def test_all_files_come_from_one_commit_though_another_is_pushed_meanwhile(hub, monkeypatch):
    read_config = mamba.read_config

    def push(path):
        hub.push(NAME, hub.repositories[NAME] | {BIN: b"for another config.json"})
        return read_config(path)

    monkeypatch.setattr(mamba, "read_config", push)
    assert_loads(NAME)


FAULTS = [
    (LIST, "gated", RuntimeError, "hf auth login"),
    (LIST, "500", RuntimeError, "config.json could not be downloaded (Server error '500"),
    (LIST, "slow", FileNotFoundError, "out of reach"),
    (BIN, "gated", RuntimeError, f"https://huggingface.co/{NAME}"),
    (BIN, "500-body", RuntimeError, f"{BIN} could not be downloaded (Server error '500"),
    (BIN, "cut", FileNotFoundError, f"{BIN} is not in the cache and the Hub is out of reach"),
]


@pytest.mark.parametrize(("file", "fault", "kind", "named"), FAULTS)
def test_a_fault_of_the_hub_is_one_sentence_unless_the_cache_has_what_is_asked_for(
    file, fault, kind, named, hub, monkeypatch
):
    monkeypatch.setenv("HF_HUB_ETAG_TIMEOUT", "0.3")
    monkeypatch.setattr(time, "sleep", lambda _: None)  # between two tries
    hub.faults[file] = fault
    assert assert_refused(NAME, kind, named).startswith(f"{NAME}: ")
    # Nothing broken stays behind: as soon as the Hub is well, the same call succeeds.
    hub.faults.clear()
    assert_loads(NAME)
    hub.faults |= dict.fromkeys(["config.json", BIN], fault)
    assert_loads(NAME)
    hub.faults[LIST] = fault
    assert_loads(NAME)


def test_a_repository_a_revision_or_a_file_that_is_not_there_is_named(hub):
    assert_refused("someone/else", FileNotFoundError, "someone/else", "hf auth login")
    assert_refused(NAME, RuntimeError, NAME, "v9", revision="v9")
    for file, named in ((BIN, f"{SAFE} or"), ("config.json", "config.json")):
        del hub.repositories[NAME][file]
        assert_refused(NAME, FileNotFoundError, file, named)


def test_without_a_network_the_cache_decides_and_what_is_only_partly_there_is_missed_by_name(
    hub, monkeypatch, tmp_path
):
    """First an address that is looked up and looked up, as behind a wall that drops all packets."""
    hub.repositories[NAME] = files_of(HF_SHARDS)
    hub.faults[SHARDS[1]] = "gated"
    assert_refused(NAME, RuntimeError)
    hub.faults.clear()
    with monkeypatch.context() as patched:
        patched.setattr(socket, "getaddrinfo", lambda *_, **__: time.sleep(20))
        patched.setattr(constants, "ENDPOINT", "http://hub.invalid")
        said = assert_refused(NAME, FileNotFoundError, SHARDS[1], "out of reach")
        assert "HF_HUB_ETAG_TIMEOUT" in said
    assert_loads(NAME)
    hub.stop()
    assert_loads(NAME)
    said = assert_refused(NAME, FileNotFoundError, "out of reach", cache_dir=tmp_path / "empty")
    assert "check the network" in said and "HF_HUB_ETAG_TIMEOUT" not in said


def test_offline_means_that_nobody_is_asked(hub, monkeypatch):
    assert_loads(NAME, cache_dir=(full := constants.HF_HUB_CACHE + "-full"))
    hub.requests.clear()
    hub.others.clear()
    for offline in (False, True):
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
        options = {"local_files_only": not offline}
        assert_loads(NAME, cache_dir=full, **options)
        assert_refused(NAME, FileNotFoundError, "load once without HF_HUB_OFFLINE", **options)
    assert hub.requests == hub.others == []


@pytest.mark.hub
@pytest.mark.parametrize("name", ["state-spaces/mamba-130m", "state-spaces/mamba-130m-hf"])
def test_the_published_weights_give_the_published_numbers(name):
    from generate import generate, load_tokenizer

    model = Mamba.from_pretrained(name)
    tokenizer, prompt = load_tokenizer(model.config, name), "Hey how are you doing?"
    expected = [-55.6909, -69.7903, -49.8981, -51.7581, -57.6544, -57.9368, -56.9591, -57.9033]
    with torch.no_grad():
        first = model(torch.tensor([tokenizer.encode(prompt)]))[0, 0, :8]
    assert torch.allclose(first, torch.tensor(expected), rtol=0, atol=1e-3), first
    text = generate(model, tokenizer, prompt, max_new_tokens=10, temperature=0)
    assert text == "\n\nI'm so glad you're here."
