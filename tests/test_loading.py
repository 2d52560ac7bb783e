"""Checkpoints from folders and from the Hub: what loads, and what is said of what does not."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import re
import socket
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch
import transformers
from conftest import use_endpoint
from hub import COMMIT, LIST, Hub, nowhere
from huggingface_hub import constants
from safetensors.torch import save_file

import mamba
from mamba import Mamba, MambaConfig

ROOT = Path(__file__).resolve().parent.parent
NAME = "someone/small-mamba"
CONFIG = {
    **{"d_model": 16, "n_layer": 2, "vocab_size": 30, "ssm_cfg": {}, "rms_norm": True},
    **{"residual_in_fp32": True, "fused_add_norm": True, "pad_vocab_size_multiple": 8},
}
HF_CONFIG = {
    **{"model_type": "mamba", "hidden_size": 16, "num_hidden_layers": 2, "vocab_size": 32},
    **{"architectures": ["MambaForCausalLM"], "intermediate_size": 32, "d_model": 2048},
}
INDEX, BIN_INDEX = "model.safetensors.index.json", "pytorch_model.bin.index.json"
SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
BIN_SHARDS = ["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"]
D = "backbone.layers.1.mixer.D"


def randomise(model: torch.nn.Module) -> torch.nn.Module:
    """Norms and D of a new model are 1, biases 0: exchanged or lost, they would not be missed."""
    with torch.no_grad():
        for i, parameter in enumerate(model.parameters()):
            parameter.uniform_(-0.5, 0.5, generator=torch.Generator().manual_seed(i))
    return model.eval()


def weights() -> dict[str, torch.Tensor]:
    """As state-spaces/mamba-* have them: the tied matrix is there under both of its names."""
    config = MambaConfig(d_model=16, n_layer=2, vocab_size=30)
    return {k: v.detach() for k, v in randomise(Mamba(config)).state_dict().items()}


def hf_weights() -> dict[str, torch.Tensor]:
    renamed = {k.replace("embedding.", "embeddings."): v for k, v in weights().items()}
    del renamed["lm_head.weight"]
    return renamed


def write_shards(folder: Path, tensors: dict[str, torch.Tensor], shards: list[str]) -> None:
    """Every second weight is in the second file."""
    names = list(tensors)
    for i, shard in enumerate(shards):
        part = {name: tensors[name].clone() for name in names[i::2]}
        (torch.save if shard.endswith(".bin") else save_file)(part, folder / shard)
    where = {name: shards[i % 2] for i, name in enumerate(names)}
    index = INDEX if shards is SHARDS else BIN_INDEX
    (folder / index).write_text(json.dumps({"metadata": {}, "weight_map": where}))


def write(folder: Path, layout: str) -> Path:
    """A whole folder: "hf" and the shards as transformers has them, the others as originals."""
    folder.mkdir(exist_ok=True)
    config = HF_CONFIG if layout in ("hf", "shards", "bin shards") else CONFIG
    (folder / "config.json").write_text(json.dumps(config))
    if layout == "bin":
        torch.save(weights(), folder / "pytorch_model.bin")
    elif layout == "old bin":
        path = folder / "pytorch_model.bin"
        torch.save(weights(), path, _use_new_zipfile_serialization=False)
    elif layout in ("shards", "bin shards"):
        write_shards(folder, hf_weights(), SHARDS if layout == "shards" else BIN_SHARDS)
    else:
        tensors = hf_weights() if layout == "hf" else weights()
        tensors.pop("lm_head.weight", None)
        save_file(tensors, folder / "model.safetensors")
    return folder


def assert_loads(name_or_path: str | Path, dtype: torch.dtype = torch.float32, **options) -> None:
    model = Mamba.from_pretrained(name_or_path, dtype=dtype, **options)
    for name, tensor in weights().items():
        assert torch.equal(model.state_dict()[name], tensor.to(dtype)), name
    assert model.lm_head.weight is model.backbone.embedding.weight
    assert all(p.is_contiguous() and p.requires_grad for p in model.parameters())
    assert model(torch.tensor([[1, 2]])).isfinite().all()


def error_of(function) -> tuple[type, str]:
    """The exception's type and message: one sentence."""
    with pytest.raises(Exception) as info:
        function()
    message = str(info.value)
    assert 20 < len(message) < 600 and "\n" not in message, message
    # torch's own words on a refused pickle suggest to run it
    assert "weights_only=False" not in message and "Re-running" not in message
    return type(info.value), message


## ================================================================================================
## What loads
## ================================================================================================


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", ["bin", "old bin", "safetensors", "hf", "shards", "bin shards"])
def test_every_layout_gives_the_same_model_bit_by_bit(layout, dtype, tmp_path):
    assert_loads(write(tmp_path, layout), dtype)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": False, "use_bias": True, "use_conv_bias": False},
        {"expand": 3, "time_step_rank": 5, "conv_kernel": 3, "state_size": 7},
        {"layer_norm_epsilon": 0.3, "residual_in_fp32": False},
    ],
)
def test_a_folder_that_transformers_wrote_gives_the_logits_of_transformers(changes, tmp_path):
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "vocab_size": 29}
    theirs = transformers.MambaForCausalLM(transformers.MambaConfig(**sizes, **changes))
    randomise(theirs).save_pretrained(tmp_path, max_shard_size="10KB" if not changes else "1GB")
    assert (tmp_path / INDEX).exists() == (not changes)
    ids = torch.randint(29, (2, 11), generator=torch.Generator().manual_seed(0))
    expected = theirs(ids).logits
    actual = Mamba.from_pretrained(tmp_path)(ids)
    assert actual.shape == expected.shape  # no rows were added
    error = (actual - expected).norm() / expected.norm()
    assert error < 1e-5, error


def test_an_absent_field_means_what_it_means_in_transformers(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "mamba"}')
    config, theirs = mamba.read_config(tmp_path / "config.json"), transformers.MambaConfig()
    names = {name: ours for name, ours in mamba.HF_FIELDS.items() if isinstance(ours, str)}
    assert {ours: getattr(config, ours) for ours in names.values()} == {
        ours: getattr(theirs, name) for name, ours in names.items()
    }
    assert config.d_inner == theirs.intermediate_size
    assert config.padded_vocab_size == theirs.vocab_size


def test_tokens_and_options_of_the_official_code_change_nothing_in_the_original_layout(tmp_path):
    tokens = {"eos_token_id": 0, "bos_token_id": [0, 1], "pad_token_id": 2}
    others = {"architectures": ["MambaLMHeadModel"], "torch_dtype": "float16", "layer": "Mamba1"}
    write(tmp_path, "bin")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | tokens | others))
    assert_loads(tmp_path)


def test_fields_that_transformers_ignores_are_ignored_in_its_layout(tmp_path):
    write(tmp_path, "hf")
    stale = {"d_model": 2048, "n_layer": 7, "rms_norm": False, "use_mambapy": True, "ssm_cfg": 3}
    (tmp_path / "config.json").write_text(json.dumps(HF_CONFIG | stale))
    assert_loads(tmp_path)


@pytest.mark.parametrize("layout", ["bin", "hf"])
def test_a_config_without_event_time_is_read_and_one_with_it_is_shown_the_example(layout, tmp_path):
    change_config(layout, event_time=False)(tmp_path)
    assert_loads(tmp_path)
    change_config(layout, event_time=True)(tmp_path)
    kind, message = error_of(lambda: Mamba.from_pretrained(tmp_path))
    assert kind is ValueError and "event_time" in message and "examples/event_time.py" in message
    assert (ROOT / "examples" / "event_time.py").exists()


@pytest.mark.parametrize("layout", ["bin", "hf"])
def test_a_field_that_is_null_has_its_default(layout, tmp_path):
    change_config(layout)(tmp_path)
    expected = mamba.read_config(tmp_path / "config.json")
    ours = ["ssm_cfg", "norm_eps", "rule", "attn_cfg", "event_time", "residual_in_fp32", "d_stat"]
    theirs = ["time_step_rank", "layer_norm_epsilon", "hidden_act", "use_bias", "norm_eps"]
    names = ours if layout == "bin" else theirs
    change_config(layout, **dict.fromkeys(names))(tmp_path)
    assert mamba.read_config(tmp_path / "config.json") == expected
    if layout == "bin":
        change_config(layout, ssm_cfg={"d_state": None, "d_conv": 3})(tmp_path)
        config = mamba.read_config(tmp_path / "config.json")
        assert (config.d_state, config.d_conv) == (16, 3)


def test_what_transformers_writes_into_each_config_is_read(tmp_path):
    """Names of sizes among it, which would be refused if it were unknown."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "vocab_size": 32, "hidden_act": "swish"}
    transformers.MambaConfig(**sizes).save_pretrained(tmp_path)
    old = {"no_repeat_ngram_size": 0, "chunk_size_feed_forward": 0, "pad_vocab_size_multiple": 8}
    old |= {"d_inner": 32, "time_step_floor": 1e-4, "max_length": 20, "num_labels": 2}
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | old))
    save_file(hf_weights(), tmp_path / SAFE)
    assert_loads(tmp_path)


def test_of_several_formats_the_first_is_read_and_what_is_saved_beside_them_counts(tmp_path):
    """In this order: one safetensors file, its shards, one .bin file, its shards."""
    for layout, files in (
        ("bin shards", [BIN_INDEX, *BIN_SHARDS]),
        ("bin", ["pytorch_model.bin"]),
        ("shards", [INDEX, *SHARDS]),
        ("safetensors", ["model.safetensors"]),
    ):
        write(tmp_path, layout)
        assert_loads(tmp_path)
        for file in files:  # nobody may read these any more
            (tmp_path / file).write_bytes(b"stale")
        kind, message = error_of(lambda: Mamba.from_pretrained(tmp_path))
        assert kind in (RuntimeError, ValueError) and files[0] in message
    randomise(Mamba(MambaConfig(d_model=16, n_layer=2, vocab_size=30))).save_pretrained(tmp_path)
    assert_loads(tmp_path)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_loading_takes_no_memory_but_that_of_the_tensors_that_are_cast(dtype, tmp_path):
    model = Mamba(MambaConfig(d_model=512, n_layer=16, vocab_size=5000))
    model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(dict(model.state_dict()), tmp_path / "pytorch_model.bin")
    script = str(ROOT / "benchmarks" / "load.py")
    command = [sys.executable, script, "--measure", str(tmp_path), dtype]
    result = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
    # Mapped pages are not counted, the system takes them back; what is cast takes half the file.
    assert result["peak_over_file"] < {"float32": 0.1, "bfloat16": 0.6}[dtype], result


## ================================================================================================
## What is saved
## ================================================================================================


def small(**changes) -> Mamba:
    return randomise(Mamba(MambaConfig(**{**dict(d_model=16, vocab_size=30), **changes})))


IDS = torch.arange(20).view(2, 10)


@pytest.mark.parametrize("flag", [True, False])
@pytest.mark.parametrize("is_tied", [True, False])
def test_whether_the_head_is_the_embedding_is_asked_of_the_tensors(flag, is_tied, tmp_path):
    model = small(tie_embeddings=flag)
    model.lm_head = torch.nn.Linear(16, 32, bias=False)
    if is_tied:
        model.lm_head.weight = model.backbone.embedding.weight
    model.save_pretrained(tmp_path)
    loaded = Mamba.from_pretrained(tmp_path)
    assert torch.equal(loaded(IDS), model(IDS))
    assert json.loads((tmp_path / "config.json").read_text())["tie_embeddings"] == is_tied
    assert (loaded.lm_head.weight is loaded.backbone.embedding.weight) == is_tied
    assert model.config.tie_embeddings == flag  # to save changes nothing in the model


@pytest.mark.parametrize("module", ["backbone.embedding", "lm_head", "backbone.norm_f"])
def test_what_could_not_be_loaded_again_is_not_saved(module, tmp_path):
    model = small()
    weight = model.get_submodule(module).weight
    model.get_submodule(module).weight = torch.nn.Parameter(torch.ones(40, *weight.shape[1:]))
    kind, message = error_of(lambda: model.save_pretrained(tmp_path / "model"))
    assert kind is RuntimeError and f"1 misshapen: {module}.weight (40" in message
    assert not (tmp_path / "model").exists()


def tuned(model: Mamba, **options):
    """The model with LoRA, after a few steps of training on IDS."""
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, **options))
    parameters = [p for p in adapted.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=1.0)
    for _ in range(3):
        optimizer.zero_grad()
        loss_of(adapted).backward()
        optimizer.step()
    return adapted


def loss_of(model) -> torch.Tensor:
    logits = model(IDS[:, :-1])
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), IDS[:, 1:].flatten())


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_head_that_was_trained_beside_adapters_is_there_after_saving_and_loading(tmp_path):
    model = small()
    before = loss_of(model).item()
    options = {"target_modules": ["in_proj"], "modules_to_save": ["lm_head"]}
    merged = tuned(model, **options).merge_and_unload()
    expected = loss_of(merged).item()
    assert expected < before - 0.01
    merged.save_pretrained(tmp_path)
    loaded = Mamba.from_pretrained(tmp_path)
    assert loss_of(loaded).item() == pytest.approx(expected, abs=1e-5)
    assert merged.config.tie_embeddings is loaded.config.tie_embeddings is False


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_adapters_that_are_not_merged_are_not_saved_as_if_they_were(tmp_path):
    adapted = tuned(small(), target_modules=["in_proj"])
    kind, message = error_of(lambda: adapted.base_model.model.save_pretrained(tmp_path))
    assert kind is RuntimeError and "lora_A" in message


def test_peft_warns_of_an_adapter_in_one_of_two_tied_matrices():
    with pytest.warns(UserWarning, match="tied layer is part of the adapter"):
        adapted = tuned(small(), target_modules=["lm_head"])
    with pytest.warns(UserWarning, match="tied_target_modules"):
        adapted.merge_and_unload()
    with pytest.warns(UserWarning, match="no longer tied after merging"):
        options = {"target_modules": ["in_proj"], "modules_to_save": ["lm_head"]}
        tuned(small(), **options).merge_and_unload()


def test_a_local_folder_does_not_ask_for_the_hubs_timeout(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_ETAG_TIMEOUT", "soon")
    write(tmp_path, "bin")
    assert_loads(tmp_path)


def test_what_is_not_the_default_is_saved_too(tmp_path):
    config = MambaConfig(8, rule="zoh", norm_eps=1e-3, tokenizer="bytes", vocab_size=256)
    Mamba(config).save_pretrained(tmp_path)
    assert Mamba.from_pretrained(tmp_path).config == config


def test_a_head_of_its_own_is_saved_even_while_it_equals_the_embedding(tmp_path):
    """A tied one would change with the embedding in the next training step."""
    model = Mamba(MambaConfig(8, vocab_size=16))
    model.lm_head.weight = torch.nn.Parameter(model.backbone.embedding.weight.detach().clone())
    model.save_pretrained(tmp_path)
    loaded = Mamba.from_pretrained(tmp_path)
    assert not loaded.config.tie_embeddings
    assert loaded.lm_head.weight is not loaded.backbone.embedding.weight


def test_peft_does_not_warn_of_a_head_that_is_not_tied(recwarn):
    tuned(small(tie_embeddings=False), target_modules=["lm_head"]).merge_and_unload()
    assert not [warning for warning in recwarn if "tie" in str(warning.message)]


## ================================================================================================
## Folders that are wrong
## ================================================================================================


class Runs:
    """Unpickled without care, this writes a file."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self):
        return Path.touch, (self.canary,)


def change_config(layout: str, **changes):
    def spoil(folder: Path) -> None:
        write(folder, layout)
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return spoil


def replace_file(layout: str, name: str, content: bytes | float | None):
    """content: bytes, None for no such file, a number for that part of the true content."""

    def spoil(folder: Path) -> None:
        path = write(folder, layout) / name
        if content is None:
            path.unlink()
        elif isinstance(content, bytes):
            path.write_bytes(content)
        else:
            whole = path.read_bytes()
            path.write_bytes(whole[: int(len(whole) * content)])

    return spoil


def change_weights(layout: str, change):
    def spoil(folder: Path) -> None:
        write(folder, layout)
        tensors = weights() if layout == "bin" else hf_weights()
        tensors = change(tensors) or tensors
        if layout == "bin":
            torch.save(tensors, folder / "pytorch_model.bin")
        else:
            save_file(tensors, folder / "model.safetensors")

    return spoil


def change_index(change):
    def spoil(folder: Path) -> None:
        path = write(folder, "shards") / INDEX
        index = json.loads(path.read_text())
        path.write_text(json.dumps(change(index["weight_map"])))

    return spoil


def plain_pickle(make):
    def spoil(folder: Path) -> None:
        write(folder, "bin")
        with (folder / "pytorch_model.bin").open("wb") as file:
            pickle.dump(make(folder / "canary"), file)

    return spoil


def zipped_pickle(folder: Path) -> None:
    write(folder, "bin")
    torch.save({"D": Runs(folder / "canary")}, folder / "pytorch_model.bin")


def torchscript(folder: Path) -> None:
    write(folder, "bin")
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), folder / "pytorch_model.bin")


def torn_zip(folder: Path) -> None:
    """A zip file, but none of torch's."""
    with zipfile.ZipFile(write(folder, "bin") / "pytorch_model.bin", "w") as file:
        file.writestr("archive/data.pkl", b"\x80\x02}q\x00.")


BIN, SAFE, SHARD = "pytorch_model.bin", "model.safetensors", SHARDS[1]
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 516\n"
HTML = b"<!DOCTYPE html><html>404</html>"
META = torch.empty(32, device="meta")
LLAMA = {"model_type": "llama", "hidden_size": 16, "num_attention_heads": 4}

FOLDER_FAULTS = {
    # config.json
    "no config": (replace_file("bin", "config.json", None), FileNotFoundError, "config.json"),
    "empty config": (replace_file("bin", "config.json", b""), RuntimeError, "config"),
    "half a config": (replace_file("bin", "config.json", 0.5), RuntimeError, "config"),
    "config is a list": (replace_file("bin", "config.json", b"[1]"), RuntimeError, "config"),
    "config is HTML": (replace_file("bin", "config.json", HTML), RuntimeError, "config"),
    "config is binary": (
        replace_file("bin", "config.json", b"\xff\xfe\0\1"),
        RuntimeError,
        "config.json",
    ),
    "config is deep": (
        replace_file("bin", "config.json", b"[" * 10**5),
        RuntimeError,
        "config.json",
    ),
    "config is {}": (replace_file("bin", "config.json", b"{}"), ValueError, "d_model"),
    "llama": (replace_file("bin", "config.json", json.dumps(LLAMA).encode()), ValueError, "llama"),
    "mamba2-hf": (change_config("hf", model_type="mamba2"), ValueError, "mamba2"),
    "falcon": (change_config("hf", model_type="falcon_mamba"), ValueError, "falcon_mamba"),
    "gpt2": (replace_file("bin", "config.json", b'{"model_type": "gpt2"}'), ValueError, "gpt2"),
    "t5": (change_config("bin", model_type="t5"), ValueError, "t5"),
    "no model_type": (change_config("hf", model_type=None), ValueError, "model_type"),
    "gelu": (change_config("hf", hidden_act="gelu"), ValueError, "hidden_act"),
    "quantized": (change_config("hf", quantization_config={}), ValueError, "quantization_config"),
    "another eps": (change_config("hf", norm_eps=1e-6), ValueError, "norm_eps"),
    "its eps": (change_config("hf", rms_norm_epsilon=1e-6), ValueError, "rms_norm_epsilon"),
    "a size": (change_config("hf", state_dim=32), ValueError, "state_dim"),
    "our name": (change_config("hf", d_state=32), ValueError, "d_state"),
    "hidden_size -1": (change_config("hf", hidden_size=-1), ValueError, "hidden_size"),
    "hidden_size 1.5": (change_config("hf", hidden_size=1.5), ValueError, "hidden_size"),
    "hidden_size a text": (change_config("hf", hidden_size="16"), ValueError, "hidden_size"),
    "state_size true": (change_config("hf", state_size=True), ValueError, "state_size"),
    "eps 0": (change_config("hf", layer_norm_epsilon=0), ValueError, "layer_norm_epsilon"),
    "d_model 0": (change_config("bin", d_model=0), ValueError, "d_model"),
    "n_layer 2.5": (change_config("bin", n_layer=2.5), ValueError, "n_layer"),
    "vocab_size true": (change_config("bin", vocab_size=True), ValueError, "vocab_size"),
    "Mamba2": (change_config("bin", ssm_cfg={"layer": "Mamba2"}), ValueError, "Mamba2"),
    "attention": (change_config("bin", attn_layer_idx=[1]), ValueError, "attn_layer_idx"),
    "an MLP": (change_config("bin", d_intermediate=64), ValueError, "d_intermediate"),
    "layer norm": (change_config("bin", rms_norm=False), ValueError, "rms_norm"),
    "unknown field": (change_config("bin", d_stat=16), ValueError, "d_stat"),
    "unknown in ssm_cfg": (change_config("bin", ssm_cfg={"groups": 4}), ValueError, "groups"),
    "ssm_cfg a number": (change_config("bin", ssm_cfg=3), ValueError, "ssm_cfg"),
    "d_model twice": (change_config("bin", ssm_cfg={"d_model": 8}), ValueError, "ssm_cfg"),
    "2**40 columns": (change_config("bin", d_model=2**40), ValueError, str(2**40)),
    "10**19 rows": (change_config("bin", vocab_size=10**19), ValueError, str(10**19)),
    "10**9 layers": (change_config("hf", num_hidden_layers=10**9), ValueError, str(10**9)),
    "a rule is a list": (change_config("bin", rule=["zoh"]), ValueError, "rule"),
    # the files of the weights
    "no weights": (replace_file("bin", BIN, None), FileNotFoundError, BIN),
    "empty bin": (replace_file("bin", BIN, b""), RuntimeError, "begins with b''"),
    "half a bin": (replace_file("bin", BIN, 0.5), RuntimeError, BIN),
    "a bin without its end": (replace_file("bin", BIN, 0.99), RuntimeError, BIN),
    "half an old bin": (replace_file("old bin", BIN, 0.5), RuntimeError, BIN),
    "HTML for a bin": (replace_file("bin", BIN, HTML), RuntimeError, "<!DOCTYPE html>"),
    "a pointer for a bin": (replace_file("bin", BIN, LFS), RuntimeError, "git lfs pull"),
    "noise for a bin": (replace_file("bin", BIN, bytes(range(256)) * 9), RuntimeError, BIN),
    "a foreign zip": (torn_zip, RuntimeError, BIN),
    "torchscript": (torchscript, RuntimeError, BIN),
    "empty safetensors": (replace_file("hf", SAFE, b""), RuntimeError, "begins with b''"),
    "half a safetensors": (replace_file("hf", SAFE, 0.5), RuntimeError, SAFE),
    "noise for safetensors": (replace_file("hf", SAFE, b"\x07" * 99), RuntimeError, SAFE),
    "HTML for safetensors": (replace_file("hf", SAFE, HTML), RuntimeError, "<!DOCTYPE html>"),
    "a pointer for safetensors": (replace_file("hf", SAFE, LFS), RuntimeError, "git lfs pull"),
    # pickles that are not plain tensors
    "a pickle that runs": (plain_pickle(Runs), RuntimeError, BIN),
    "a zipped pickle that runs": (zipped_pickle, RuntimeError, BIN),
    "a pickled list": (plain_pickle(lambda _: [1, 2]), RuntimeError, BIN),
    "a list of tensors": (change_weights("bin", lambda w: [*w.values()]), RuntimeError, "list"),
    "a number": (
        change_weights("bin", lambda w: {**w, "epoch": 3}),
        RuntimeError,
        "1 unknown: epoch",
    ),
    "a number in place": (change_weights("bin", lambda w: w | {D: 3}), RuntimeError, f"{D} int"),
    "a number for a name": (change_weights("bin", lambda w: {3: w[D]}), RuntimeError, "3"),
    # weights that do not fit
    "a weight too few": (change_weights("bin", lambda w: [w.pop(D)][1:]), RuntimeError, D),
    "a weight too many": (change_weights("hf", lambda w: {**w, "x": w[D] + 1}), RuntimeError, "x"),
    "a weight too short": (
        change_weights("hf", lambda w: w | {D: w[D][1:]}),
        *(RuntimeError, f"1 misshapen: {D} (31,), not (32,)"),
    ),
    "no embedding": (
        change_weights("hf", lambda w: [w.pop("backbone.embeddings.weight")][1:]),
        *(RuntimeError, "backbone.embedding.weight"),
    ),
    "both embeddings": (
        change_weights("hf", lambda w: w | {"backbone.embedding.weight": torch.ones(32, 16)}),
        *(RuntimeError, "backbone.embeddings.weight"),
    ),
    "no layer": (change_config("bin", n_layer=3), RuntimeError, "backbone.layers.2.mixer.A_log"),
    "integers": (change_weights("hf", lambda w: w | {D: w[D].int()}), RuntimeError, "int32"),
    "complex": (change_weights("bin", lambda w: w | {D: w[D] + 1j}), RuntimeError, "complex64"),
    "no data": (change_weights("bin", lambda w: w | {D: META}), RuntimeError, D),
    "sparse": (change_weights("bin", lambda w: w | {D: w[D].to_sparse()}), RuntimeError, D),
    "another head": (
        change_weights("bin", lambda w: w | {"lm_head.weight": torch.ones(32, 16)}),
        *(ValueError, "lm_head"),
    ),
    # shards
    "a missing shard": (replace_file("shards", SHARD, None), FileNotFoundError, SHARD),
    "half a shard": (replace_file("shards", SHARD, 0.5), RuntimeError, SHARD),
    "exchanged shards": (
        lambda folder: (
            (write(folder, "shards") / SHARDS[0]).replace(folder / SHARD)
            and save_file(hf_weights(), folder / SHARDS[0])
        ),
        *(RuntimeError, "another file"),
    ),
    "no weight_map": (change_index(lambda m: {}), ValueError, "weight_map"),
    "a weight_map of lists": (change_index(lambda m: {"weight_map": [m]}), ValueError, INDEX),
    "a way out": (
        change_index(lambda m: {"weight_map": m | {D: "../up.safetensors"}}),
        *(ValueError, "weight_map"),
    ),
    "a file of the other format": (
        change_index(lambda m: {"weight_map": m | {D: "pytorch_model.bin"}}),
        *(FileNotFoundError, "pytorch_model.bin"),
    ),
    "an index in halves": (replace_file("shards", INDEX, 0.5), RuntimeError, INDEX),
    "half an index of bins": (replace_file("bin shards", BIN_INDEX, 0.5), RuntimeError, BIN_INDEX),
    "a missing bin shard": (
        replace_file("bin shards", BIN_SHARDS[1], None),
        *(FileNotFoundError, BIN_SHARDS[1]),
    ),
    "half a bin shard": (
        replace_file("bin shards", BIN_SHARDS[1], 0.5),
        *(RuntimeError, BIN_SHARDS[1]),
    ),
}


@pytest.mark.parametrize("name", FOLDER_FAULTS)
def test_a_broken_or_hostile_folder_is_refused_in_one_sentence(name, tmp_path):
    spoil, expected, named = FOLDER_FAULTS[name]
    folder = tmp_path / "model"
    spoil(folder)
    before = sorted(path.name for path in folder.iterdir())
    for dtype in (torch.float32, torch.bfloat16):
        kind, message = error_of(lambda dtype=dtype: Mamba.from_pretrained(folder, dtype=dtype))
        assert kind is expected
        assert named in message and str(folder) in message
        assert "again" not in message  # nobody downloaded it
    assert sorted(path.name for path in folder.iterdir()) == before  # no canary: nothing was run


def test_weights_that_do_not_fit_are_counted_by_fault_and_the_first_are_named(tmp_path):
    def change(tensors):
        tensors["backbone.norm_f.weight"] = torch.ones(2, 8)
        tensors["head.bias"] = torch.ones(3)
        return {name: tensor for name, tensor in tensors.items() if "layers.0" not in name}

    change_weights("bin", change)(tmp_path)
    _, message = error_of(lambda: Mamba.from_pretrained(tmp_path))
    assert re.search(r"10 missing: (backbone\.layers\.0\.[\w.]+(, )?){3};", message)
    assert (
        "; 1 unknown: head.bias; 1 misshapen: backbone.norm_f.weight (2, 8), not (16,)" in message
    )


def test_a_checkpoint_without_a_head_or_with_another_is_told_what_is_missing(tmp_path):
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "vocab_size": 32}
    config = transformers.MambaConfig(**sizes, tie_word_embeddings=False)
    transformers.MambaModel(config).save_pretrained(tmp_path)
    _, message = error_of(lambda: Mamba.from_pretrained(tmp_path))
    assert "23 missing: backbone.embedding.weight, " in message
    assert "; 22 unknown: embeddings.weight, " in message
    tensors = hf_weights() | {"classifier.weight": torch.ones(3, 16)}
    save_file(tensors, tmp_path / SAFE)
    _, message = error_of(lambda: Mamba.from_pretrained(tmp_path))
    assert "1 missing: lm_head.weight; 1 unknown: classifier.weight" in message


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model.", "module._orig_mod."])
def test_a_prefix_of_all_names_is_named_with_the_line_that_takes_it_off(prefix, tmp_path):
    change_weights("bin", lambda w: {prefix + name: tensor for name, tensor in w.items()})(tmp_path)
    kind, message = error_of(lambda: Mamba.from_pretrained(tmp_path))
    assert kind is RuntimeError and repr(prefix) in message
    names = {"weights": torch.load(tmp_path / BIN)}
    exec(re.search("`(.+)`", message)[1], names)
    torch.save(names["weights"], tmp_path / BIN)
    assert_loads(tmp_path)


@pytest.mark.parametrize("key", ["state_dict", "model"])
def test_tensors_under_one_key_are_shown_the_line_that_takes_them_out(key, tmp_path):
    change_weights("bin", lambda w: {"optimizer": {"state": {}}, "epoch": 3, key: w})(tmp_path)
    kind, message = error_of(lambda: Mamba.from_pretrained(tmp_path))
    assert kind is RuntimeError and repr(key) in message
    exec(re.search("`(.+)`", message)[1], {"torch": torch})
    assert_loads(tmp_path)


@pytest.mark.parametrize("name", ["", "gpt2", "/no/such/folder", "a/b/c", "tests/typo", "a b/c"])
def test_what_is_no_folder_and_no_repository_is_called_neither(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    kind, message = error_of(lambda: Mamba.from_pretrained(name))
    assert kind is FileNotFoundError and repr(name) in message


@pytest.mark.parametrize(
    "wrong",
    [
        *({"dtype": torch.int8}, {"dtype": "bfloat16"}, {"scan": "fast"}),
        *({"device": "gpu"}, {"device": "cuda:99"}),
    ],
)
def test_a_wrong_argument_is_refused_before_a_weight_is_looked_for(wrong, tmp_path):
    replace_file("bin", BIN, None)(tmp_path)
    kind, message = error_of(lambda: Mamba.from_pretrained(tmp_path, **wrong))
    assert kind is ValueError and str(*wrong.values()) in message


## ================================================================================================
## The Hub
## ================================================================================================


def publish(hub: Hub, folder: Path, layout: str = "bin") -> None:
    write(folder, layout)
    hub.repositories[NAME] = {path.name: path.read_bytes() for path in folder.iterdir()}


def downloads(hub: Hub) -> list[str]:
    return sorted(name for method, _, name in hub.requests if method == "GET" and name != LIST)


@pytest.mark.parametrize("layout", ["bin", "safetensors", "hf", "shards", "bin shards"])
def test_a_model_is_downloaded_once_and_then_only_asked_for(layout, hub, capfd, tmp_path):
    publish(hub, tmp_path / "source", layout)
    assert_loads(NAME)
    assert downloads(hub) == sorted(hub.repositories[NAME])
    hub.requests.clear()
    capfd.readouterr()
    assert_loads(NAME)
    assert hub.requests[0] == ("GET", NAME, LIST)
    assert {method for method, _, _ in hub.requests[1:]} == {"HEAD"}
    assert capfd.readouterr() == ("", "")  # no bar where nothing is downloaded


@pytest.mark.parametrize("first", ["safetensors", "shards", "bin"])
def test_of_several_formats_one_is_downloaded(first, hub, tmp_path):
    """state-spaces/mamba-2.8b has two, 11 GB each."""
    order = ["safetensors", "shards", "bin", "bin shards"]
    for layout in reversed(order[order.index(first) :]):  # one config.json fits them all
        publish(hub, tmp_path / "source", layout)
    hub.repositories[NAME]["optimizer.bin"] = b"of no use here"
    files = {"safetensors": [SAFE], "shards": [INDEX, *SHARDS], "bin": [BIN]}[first]
    assert_loads(NAME)
    assert downloads(hub) == sorted(["config.json", *files])
    hub.stop()
    assert_loads(NAME)  # chosen in the cache as on the Hub


def test_a_foreign_model_is_refused_before_its_weights_are_downloaded(hub, tmp_path):
    publish(hub, tmp_path / "source")
    hub.repositories[NAME]["config.json"] = json.dumps(LLAMA).encode()
    kind, message = error_of(lambda: Mamba.from_pretrained(NAME))
    assert kind is ValueError and "llama" in message
    assert downloads(hub) == ["config.json"]


def test_a_revision_and_a_cache_may_be_chosen(hub, tmp_path):
    publish(hub, tmp_path / "source")
    assert_loads(NAME, revision=COMMIT, cache_dir=tmp_path / "elsewhere")
    assert (tmp_path / "elsewhere").is_dir() and not (tmp_path / "cache").exists()


def test_a_download_that_breaks_once_is_resumed_where_it_broke(hub, monkeypatch, tmp_path):
    publish(hub, tmp_path / "source")
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)  # whole chunks are kept
    hub.faults[BIN] = "cut-once"
    with contextlib.suppress(RuntimeError):  # the first clients 1.x resume in the next call
        Mamba.from_pretrained(NAME)
    assert_loads(NAME)
    half = len(hub.repositories[NAME][BIN]) // 2
    assert hub.ranges == [f"bytes={half // 1000 * 1000}-"]


HUB_FAULTS = {
    "gated": (RuntimeError, "hf auth login"),
    "private": (FileNotFoundError, "hf auth login"),
    "500": (RuntimeError, "500"),
    "portal": (RuntimeError, "config.json could not be downloaded"),
    "slow": (FileNotFoundError, "out of reach"),
    "500-body": (RuntimeError, "500"),
    "cut": (FileNotFoundError, "out of reach"),
    "short": (RuntimeError, "should be of size"),
}


@pytest.mark.parametrize(
    ("fault", "file"),
    [(fault, LIST) for fault in ("gated", "private", "500", "portal", "slow")]
    + [(fault, BIN) for fault in ("gated", "500-body", "cut", "short")],
)
def test_a_fault_of_the_hub_is_one_sentence_with_a_remedy(fault, file, hub, tmp_path):
    publish(hub, tmp_path / "source")
    hub.faults[file] = fault
    kind, message = error_of(lambda: Mamba.from_pretrained(NAME))
    expected, named = HUB_FAULTS[fault]
    assert kind is expected
    assert message.startswith(f"{NAME}: ") and named in message
    # Nothing broken stays behind: as soon as the Hub is well, the same call succeeds.
    hub.faults.clear()
    assert_loads(NAME)


def test_a_cache_that_cannot_be_written_is_named_with_its_path(hub, monkeypatch, tmp_path):
    """As with HF_HOME: whatever does not depend on rights, which root has all of."""
    publish(hub, tmp_path / "source")
    (tmp_path / "home").write_text("a file")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "home" / "hub"))
    kind, message = error_of(lambda: Mamba.from_pretrained(NAME))
    assert kind is RuntimeError and str(tmp_path / "home") in message
    assert "Not a directory" in message and "again" not in message and "network" not in message


def test_a_full_disk_is_named(hub, tmp_path):
    resource = pytest.importorskip("resource", reason="limits are a matter of Unix")
    publish(hub, tmp_path / "source")
    hub.repositories[NAME][BIN] = bytes(2**21)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, hard))  # the nearest to a disk that is full
    try:
        kind, message = error_of(lambda: Mamba.from_pretrained(NAME))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert kind is RuntimeError and BIN in message and "File too large" in message
    assert "again" not in message and "network" not in message


def test_a_repository_a_revision_or_a_file_that_is_not_there_is_named(hub, tmp_path):
    publish(hub, tmp_path / "source")
    kind, message = error_of(lambda: Mamba.from_pretrained("someone/else"))
    assert kind is FileNotFoundError and "someone/else" in message
    kind, message = error_of(lambda: Mamba.from_pretrained(NAME, revision="v9"))
    assert kind is RuntimeError and NAME in message and "v9" in message
    del hub.repositories[NAME][BIN]
    kind, message = error_of(lambda: Mamba.from_pretrained(NAME))
    assert kind is FileNotFoundError and BIN in message and SAFE in message
    del hub.repositories[NAME]["config.json"]
    kind, message = error_of(lambda: Mamba.from_pretrained(NAME))
    assert kind is FileNotFoundError and "config.json" in message


@pytest.mark.parametrize("name", ["a--b/c", "someone/small..mamba", "someone/" + "m" * 200])
def test_a_name_that_cannot_be_one_is_a_wrong_value(name, hub):
    kind, message = error_of(lambda: Mamba.from_pretrained(name))
    assert issubclass(kind, ValueError) and name in message
    assert hub.requests == hub.others == []


def no_listener(monkeypatch, cache):
    use_endpoint(monkeypatch, nowhere(), cache)


def no_answer(monkeypatch, cache):
    """Addresses are looked up and looked up, as behind a wall that drops all packets."""
    use_endpoint(monkeypatch, "http://hub.invalid", cache)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: time.sleep(20))


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("break_network", [no_listener, no_answer])
def test_without_a_network_the_cache_decides_at_once_and_not_after_many_tries(
    break_network, cached, hub, monkeypatch, tmp_path
):
    publish(hub, tmp_path / "source")
    if cached:
        assert_loads(NAME)
    break_network(monkeypatch, tmp_path / "cache")
    start = time.perf_counter()
    if cached:
        assert_loads(NAME)
    else:
        kind, message = error_of(lambda: Mamba.from_pretrained(NAME))
        assert kind is FileNotFoundError
        assert "out of reach" in message and NAME in message
    # The client alone tries for 23 seconds. benchmarks/load.py measures how long it takes here.
    assert time.perf_counter() - start < 10


def test_what_is_only_partly_in_the_cache_is_missed_by_name_without_a_network(hub, tmp_path):
    publish(hub, tmp_path / "source", "shards")
    hub.faults[SHARD] = "gated"
    error_of(lambda: Mamba.from_pretrained(NAME))
    hub.stop()
    kind, message = error_of(lambda: Mamba.from_pretrained(NAME))
    assert kind is FileNotFoundError and SHARD in message and "out of reach" in message


@pytest.mark.parametrize("fault", ["500", "private", "gated", "portal"])
def test_what_is_in_the_cache_loads_whatever_the_hub_says(fault, hub, tmp_path):
    publish(hub, tmp_path / "source")
    assert_loads(NAME)
    hub.faults.update(dict.fromkeys([LIST, "config.json", BIN], fault))
    assert_loads(NAME)


@pytest.mark.parametrize("fault", ["500", "private", "gated", "portal", "slow"])
def test_what_is_in_the_cache_loads_if_the_hub_lists_but_does_not_give_it(fault, hub, tmp_path):
    publish(hub, tmp_path / "source")
    assert_loads(NAME)
    hub.faults.update(dict.fromkeys(["config.json", BIN], fault))
    assert_loads(NAME)


def test_all_files_come_from_one_commit_though_another_is_pushed_meanwhile(
    hub, monkeypatch, tmp_path
):
    publish(hub, tmp_path / "source")
    read_config = mamba.read_config

    def push(path):
        """As soon as config.json is there."""
        hub.push(NAME, hub.repositories[NAME] | {BIN: b"for another config.json"})
        return read_config(path)

    monkeypatch.setattr(mamba, "read_config", push)
    assert_loads(NAME)


def test_a_new_commit_is_downloaded_where_it_differs(hub, tmp_path):
    publish(hub, tmp_path / "source")
    assert_loads(NAME)
    hub.push(NAME, hub.repositories[NAME] | {"config.json": json.dumps(HF_CONFIG).encode()})
    hub.requests.clear()
    assert_loads(NAME)
    assert downloads(hub) == ["config.json"]
    assert_loads(NAME, revision=COMMIT)


@pytest.mark.parametrize("way", ["local_files_only", "HF_HUB_OFFLINE"])
def test_offline_means_that_nobody_is_asked(way, hub, monkeypatch, tmp_path):
    publish(hub, tmp_path / "source")
    options = {"local_files_only": way == "local_files_only"}
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", way == "HF_HUB_OFFLINE")
    kind, message = error_of(lambda: Mamba.from_pretrained(NAME, **options))
    assert kind is FileNotFoundError and "HF_HUB_OFFLINE" in message
    assert hub.requests == hub.others == []
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    assert_loads(NAME)
    hub.requests.clear()
    hub.others.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", way == "HF_HUB_OFFLINE")
    assert_loads(NAME, **options)
    assert hub.requests == hub.others == []


def test_another_revision_in_the_cache_does_not_stand_in_for_the_one_asked_for(hub, tmp_path):
    publish(hub, tmp_path / "source")
    assert_loads(NAME)
    assert_loads(NAME, revision="main", local_files_only=True)
    kind, _ = error_of(lambda: Mamba.from_pretrained(NAME, revision="v2", local_files_only=True))
    assert kind is FileNotFoundError


LOAD = f"import mamba; mamba.Mamba.from_pretrained({NAME!r})"


def test_the_environment_names_the_hub_and_switches_it_off(tmp_path):
    run = {"cwd": ROOT, "check": True}
    with Hub() as hub:
        publish(hub, tmp_path / "source")
        command = [sys.executable, "-c", LOAD]
        subprocess.run(command, env=hub.environment(tmp_path / "home"), **run)
        hub.requests.clear()
        hub.others.clear()
        offline = hub.environment(tmp_path / "home", HF_HUB_OFFLINE="1")
        subprocess.run(command, env=offline, **run)
        assert hub.requests == hub.others == []


def test_the_clients_own_command_finds_a_wrong_bit_in_the_cache(tmp_path):
    """The README names it."""
    command = ["hf", "cache", "verify", NAME]
    assert f"`{' '.join(command[:-1])} " in (ROOT / "README.md").read_text()
    command[0] = str(Path(sys.executable).with_name("hf"))
    for fault in ("", "flip"):
        with Hub() as hub:
            publish(hub, tmp_path / "source")
            environment = hub.environment(tmp_path / f"home {fault}")
            hub.faults[BIN] = fault
            subprocess.run([sys.executable, "-c", LOAD], env=environment, cwd=ROOT, check=True)
            result = subprocess.run(command, env=environment, capture_output=True, text=True)
        said = result.stdout + result.stderr
        assert (result.returncode, BIN in said) == ((1, True) if fault else (0, False)), said


def test_a_terminal_shows_how_far_a_download_is(tmp_path):
    termios = pytest.importorskip("termios", reason="terminals are a matter of Unix")
    with Hub() as hub:
        publish(hub, tmp_path / "source")
        master, slave = os.openpty()
        termios.tcsetwinsize(slave, (24, 80))
        command, environment = [sys.executable, "-c", LOAD], hub.environment(tmp_path / "home")
        subprocess.run(command, env=environment, cwd=ROOT, stderr=slave, check=True)
        os.close(slave)
        shown = os.read(master, 100_000).decode()
        os.close(master)
    assert "100%" in shown and BIN in shown


## ================================================================================================
## The real Hub: pytest -m hub
## ================================================================================================


@pytest.mark.hub
@pytest.mark.parametrize("name", ["state-spaces/mamba-130m", "state-spaces/mamba-130m-hf"])
def test_the_published_weights_give_the_published_numbers(name):
    from huggingface_hub import hf_hub_download
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(hf_hub_download("EleutherAI/gpt-neox-20b", "tokenizer.json"))
    model = Mamba.from_pretrained(name)
    ids = torch.tensor([tokenizer.encode("Hey how are you doing?").ids])
    expected = [-55.6909, -69.7903, -49.8981, -51.7581, -57.6544]
    expected += [-57.9368, -56.9591, -57.9033, -54.6787, -55.9261]
    with torch.no_grad():
        first = model(ids)[0, 0, :10]
        assert torch.allclose(first, torch.tensor(expected), rtol=0, atol=1e-3), first
        for _ in range(10):
            ids = torch.cat([ids, model(ids)[:, -1:, :50277].argmax(-1)], dim=1)
    assert tokenizer.decode(ids[0].tolist()) == (
        "Hey how are you doing?\n\nI'm so glad you're here."
    )
