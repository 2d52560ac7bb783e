"""Our modules in the hands of others: adapters, hooks, wrappers, and code that expects the marks
and the numbers of the official layer.
"""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.distributed as dist
import transformers
from torch import nn
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

import generate
import mamba
from mamba import Mamba, MambaBlock, MambaConfig, MambaState
from test_mamba import (
    assert_all_close,
    assert_close,
    assert_same_results,
    gradients_of,
    packed_documents,
    random_ids,
    random_model,
    random_state,
    randomise,
    run_steps,
)

## Numbers and marks of the official layer ---------------------------------------------------------


def loaded(model: Mamba) -> Mamba:
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.load_state_dict(weights, assign=True)
    return model


def from_meta(model: Mamba) -> Mamba:
    with torch.device("meta"):
        return Mamba(model.config).to_empty(device="cpu")


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model,
        loaded,
        from_meta,
        copy.deepcopy,
        lambda model: model.to(torch.bfloat16),
        lambda model: model.to("meta"),
        lambda model: pickle.loads(pickle.dumps(model)),
        lambda model: copy.deepcopy(loaded(copy.deepcopy(model))),
    ],
    ids=["init", "load", "meta", "deepcopy", "dtype", "to meta", "pickle", "one after the other"],
)
def test_the_marks_of_the_official_layer_survive(change):
    """Code of that family looks for them before it decays or initialises a parameter."""
    marks = {
        f"{name} {mark}"
        for name, parameter in change(random_model()).named_parameters()
        for mark in ("_no_weight_decay", "_no_reinit")
        if getattr(parameter, mark, False)
    }
    expected = ("A_log _no_weight_decay", "D _no_weight_decay", "dt_proj.bias _no_reinit")
    assert marks == {f"backbone.layers.{i}.mixer.{end}" for i in range(2) for end in expected}


def test_the_marks_of_a_loaded_model_are_there(tmp_path):
    random_model().save_pretrained(tmp_path)
    mixer = Mamba.from_pretrained(tmp_path).backbone.layers[1].mixer
    assert mixer.A_log._no_weight_decay and mixer.D._no_weight_decay
    assert mixer.dt_proj.bias._no_reinit


def test_parameters_of_any_network_are_grouped_for_weight_decay():
    network = nn.Sequential(nn.Linear(4, 8), MambaBlock(MambaConfig(8)), nn.LayerNorm(8))
    decayed, kept = mamba.param_groups(network, 0.1)
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    assert {names[id(parameter)] for parameter in decayed["params"]} == {
        *("0.weight", "1.in_proj.weight", "1.conv1d.weight", "1.x_proj.weight"),
        *("1.dt_proj.weight", "1.out_proj.weight"),
    }
    assert len(decayed["params"]) + len(kept["params"]) == len(names)


def test_numbers_of_other_types_are_the_numbers_that_they_are(tmp_path):
    config = MambaConfig(
        d_model=np.int64(16),
        n_layer=2.0,
        vocab_size=np.float32(30),
        expand=2.0,
        d_state=np.int32(4),
    )
    assert config == MambaConfig(d_model=16, n_layer=2, vocab_size=30, expand=2, d_state=4)
    assert type(config.d_model) is type(config.n_layer) is type(config.expand) is int
    Mamba(config).save_pretrained(tmp_path)  # JSON knows no numbers of numpy
    assert Mamba.from_pretrained(tmp_path).config == config
    with pytest.raises(ValueError, match=r"^d_state must be a positive integer, got inf"):
        MambaConfig(d_model=8, d_state=float("inf"))


def test_channels_that_are_no_multiple_of_the_width_are_those_of_transformers(tmp_path):
    theirs = transformers.MambaConfig(
        vocab_size=30, hidden_size=14, state_size=4, num_hidden_layers=2,
        pad_token_id=0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    theirs.intermediate_size = 21  # 1.5 * 14, which its `expand`, an integer, cannot say
    reference = randomise(transformers.MambaForCausalLM(theirs)).eval()
    weights = {n.replace("embeddings", "embedding"): t for n, t in reference.state_dict().items()}
    config = MambaConfig(14, 2, 30, 4, expand=1.5, pad_vocab_size_multiple=1)
    Mamba(config).save_pretrained(tmp_path)
    model, ids = Mamba.from_pretrained(tmp_path), random_ids(2, 9)
    model.load_state_dict(weights)
    assert model.backbone.layers[0].mixer.in_proj.out_features == 2 * 21
    assert_close("logits", model(ids), reference(ids, use_cache=False).logits, 1e-5)
    with pytest.raises(ValueError, match=r"^expand must give at least one channel, got 0\.1"):
        MambaConfig(d_model=8, expand=0.1)


## Adapters and hooks on the convolution -----------------------------------------------------------


@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd")
def test_lora_on_the_convolution_learns_in_forward_and_in_step():
    peft = pytest.importorskip("peft")
    model, ids = random_model().double(), random_ids(2, 5)
    # The library wants a rank that the groups divide: 32 channels, one group each.
    lora = peft.LoraConfig(target_modules=["conv1d"], r=32, init_lora_weights=False)
    adapted = peft.inject_adapter_in_model(lora, copy.deepcopy(model)).double()
    start = random_state(model, 2)
    logits, state = adapted(ids, start)
    assert_same_results(run_steps(adapted, ids, start), (logits, state), 1e-12)
    assert (logits - model(ids, start)[0]).abs().max() > 0.01, "it changes nothing"
    for run in (lambda: adapted(ids, start)[0], lambda: adapted.step(ids[:, 0], start)[0]):
        gradients = torch.autograd.grad(
            run().square().sum(), [p for n, p in adapted.named_parameters() if "lora_" in n]
        )
        assert len(gradients) == 4 and all(g.abs().max() > 0 for g in gradients)


def test_lora_on_the_projections_learns_is_merged_and_leaves_nothing_behind():
    """A hook that stays would cost generation its fast steps, without a word."""
    peft = pytest.importorskip("peft")
    model, ids = random_model().double(), random_ids(2, 5)
    names = ["in_proj", "x_proj", "dt_proj", "out_proj"]
    lora = peft.LoraConfig(target_modules=names, init_lora_weights=False)
    adapted = peft.get_peft_model(copy.deepcopy(model), lora).double()
    logits = adapted(ids)
    gradients = torch.autograd.grad(
        logits.square().sum(), [p for n, p in adapted.named_parameters() if "lora_" in n]
    )
    assert len(gradients) == 16 and all(g.abs().max() > 0 for g in gradients)
    assert (logits - model(ids)).abs().max() > 0.01, "it changes nothing"
    start = model.init_state(2)
    stepped, _ = run_steps(adapted.get_base_model(), ids, start)
    assert_close("steps", stepped, logits, 1e-12)
    merged = adapted.merge_and_unload()
    assert mamba.is_our_own(merged)
    assert_close("merged", merged(ids), logits, 1e-12)


class Wrapper(nn.Module):
    """An adapter that shows nothing of what it wraps."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.inner = module

    def forward(self, window):
        return 2 * self.inner(window)


def doubled_by_hook(conv1d):
    conv1d.register_forward_hook(lambda module, inputs, output: 2 * output)
    return conv1d


def doubled_in_float64(conv1d):
    conv1d.register_forward_hook(lambda module, inputs, output: 2 * output.double())
    return conv1d


def doubled_by_method(conv1d):
    conv1d.forward = lambda window: 2 * nn.Conv1d.forward(conv1d, window)
    return conv1d


@pytest.mark.parametrize(
    "double", [Wrapper, doubled_by_hook, doubled_in_float64, doubled_by_method]
)
@pytest.mark.parametrize("d_conv", [1, 4])
def test_what_is_done_to_the_convolution_counts(double, d_conv):
    model, ids = random_model(d_conv=d_conv).double(), random_ids(2, 5)
    start, expected = random_state(model, 2), copy.deepcopy(model)
    for layer in expected.backbone.layers:
        for parameter in layer.mixer.conv1d.parameters():
            parameter.data *= 2
    for layer in model.backbone.layers:
        layer.mixer.conv1d = double(layer.mixer.conv1d)
    first = torch.zeros_like(ids, dtype=torch.bool)
    first[1, 0] = True
    for reset in (None, first):
        results = expected(ids, start, reset=reset)
        assert_same_results(model(ids, start, reset=reset), results, 1e-12)
    assert_same_results(run_steps(model, ids, start), expected(ids, start), 1e-12)


@pytest.mark.parametrize("hook", ["register_full_backward_hook", "register_full_backward_pre_hook"])
def test_backward_hooks_of_the_convolution_are_called(hook):
    model, calls = random_model(), []
    conv1d = model.backbone.layers[0].mixer.conv1d
    getattr(conv1d, hook)(lambda *arguments: calls.append(arguments))
    assert not mamba.is_our_own(model)
    model(random_ids(2, 5)).sum().backward()
    assert len(calls) == 1


def test_a_convolution_of_another_shape_is_refused():
    for change in ({"kernel_size": 8}, {"groups": 1}, {"dilation": 2}):
        block = MambaBlock(MambaConfig(8))
        block.conv1d = nn.Conv1d(16, 16, **{"kernel_size": 4, "groups": 16} | change)
        state = block.init_state(2)
        for run in (
            lambda b=block: b(torch.randn(2, 9, 8)),
            lambda b=block, s=state: b.step(torch.randn(2, 8), s),
        ):
            with pytest.raises(ValueError, match="a filter per channel as long as its past"):
                run()


@pytest.mark.parametrize(
    "find", [lambda m: m.backbone.layers[1], lambda m: m.backbone.layers[1].mixer]
)
def test_a_hook_on_a_layer_or_a_mixer_is_called_for_every_token(find):
    model, ids, calls = random_model().double(), random_ids(1, 3), []

    def add_one(module, inputs, output):
        calls.append(module)
        return output[0] + 1, output[1]

    find(model).register_forward_hook(add_one)
    start = random_state(model, 1)
    logits, _ = model(ids, start)
    assert_close("logits", run_steps(model, ids, start)[0], logits, 1e-12)
    assert len(calls) == 1 + 3
    tokens = list(generate.stream(model, ids, max_new_tokens=70, temperature=0))
    assert len(tokens) == 70 and len(calls) == 4 + 1 + 69


def test_a_hook_on_a_block_of_its_own_is_called_by_step():
    block, calls = MambaBlock(MambaConfig(8)), []
    block.register_forward_hook(lambda *arguments: calls.append(arguments))
    block.step(torch.randn(2, 8), block.init_state(2))
    assert len(calls) == 1


def test_one_matrix_of_two_names_stays_one_when_the_model_leaves_the_meta_device():
    model = from_meta(random_model())
    assert model.lm_head.weight is model.backbone.embedding.weight
    model = from_meta(random_model(tie_embeddings=False))
    assert model.lm_head.weight is not model.backbone.embedding.weight


def test_a_state_that_an_adapter_leaves_holds_no_sequence_in_memory():
    block = MambaBlock(MambaConfig(8))
    block.conv1d.register_forward_hook(lambda *arguments: None)
    _, state = block(torch.randn(1, 500, 8), block.init_state(1))
    assert state.conv.untyped_storage().nbytes() == state.conv.nbytes


def test_a_reset_that_an_adapter_would_look_across_is_refused():
    model = random_model()
    ids, reset = packed_documents()
    model.backbone.layers[1].mixer.conv1d.register_forward_pre_hook(lambda *arguments: None)
    with pytest.raises(ValueError, match="look across a reset inside the sequence: feed such"):
        model(ids, reset=reset)


## Sharded and replicated --------------------------------------------------------------------------


@pytest.fixture
def one_process():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_a_fully_sharded_model_trains_and_speaks(one_process):
    model, ids = random_model(tie_embeddings=False), random_ids(2, 9)
    sharded = copy.deepcopy(model)
    mesh = dist.init_device_mesh("cpu", (1,))
    for module in (*sharded.backbone.layers, sharded):
        fully_shard(module, mesh=mesh)
    register_fsdp_forward_method(sharded, "step")
    streams = [generate.stream(m, ids, max_new_tokens=5, temperature=0) for m in (model, sharded)]
    spoken, expected = (torch.stack([*stream]) for stream in streams)
    assert torch.equal(spoken, expected)
    (loss := sharded(ids).square().mean()).backward()
    expected = model(ids).square().mean()
    assert_close("loss", loss, expected, 1e-6)
    named = sharded.named_parameters()
    gradients = {f"gradient of {name}": p.grad.full_tensor() for name, p in named}
    assert_all_close(gradients, gradients_of(expected, model), 1e-6)
    torch.optim.AdamW(mamba.param_groups(sharded, 0.1)).step()
    assert (sharded(ids).square().mean() - loss).abs() > 1e-6, "it learns"


REPLICA = """
import sys, torch, torch.distributed as dist, torch.nn.functional as F, mamba
rank, file = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", store=dist.FileStore(file, 2), rank=rank, world_size=2)
torch.manual_seed(0)
model = mamba.Mamba(mamba.MambaConfig(8, n_layer=1, vocab_size=16))
replica = torch.nn.parallel.DistributedDataParallel(model)
ids = torch.arange(24).view(2, 12) % 16
loss = replica(
    ids[rank : rank + 1, :-1],
    head=lambda hidden: F.cross_entropy(model.lm_head(hidden)[0], ids[rank, 1:]),
)
loss.backward()
if rank == 0:
    torch.save([parameter.grad for parameter in model.parameters()], file + ".grads")
"""


def test_a_loss_as_head_is_averaged_over_processes(tmp_path):
    """What does not go through the wrapper's forward is not: gradients would stay each its own."""
    file = str(tmp_path / "store")
    commands = [[sys.executable, "-c", REPLICA, str(rank), file] for rank in range(2)]
    runs = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for command in commands]
    for run in runs:
        _, errors = run.communicate(timeout=120)
        assert run.returncode == 0, errors
    torch.manual_seed(0)
    model = Mamba(MambaConfig(8, n_layer=1, vocab_size=16))
    ids = torch.arange(24).view(2, 12) % 16
    loss = nn.functional.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
    expected = torch.autograd.grad(loss, list(model.parameters()))
    for actual, gradient in zip(torch.load(file + ".grads"), expected, strict=True):
        assert_close("gradient", actual, gradient, 1e-5)


def test_the_head_takes_the_place_of_the_logits():
    model, ids = random_model().double(), random_ids(2, 7)
    start = random_state(model, 2)
    logits, state = model(ids, start)
    last = model(ids, start, head=lambda hidden: model.lm_head(hidden[:, -1]))
    assert_same_results(last, (logits[:, -1], state), 1e-12)
    hidden = model(ids, head=nn.Identity())
    assert_close("hidden", model.lm_head(hidden), model(ids), 1e-12)


def test_a_state_is_of_its_own_class_and_of_the_parameters_dtype_on_any_device():
    block = MambaBlock(MambaConfig(8)).to(torch.bfloat16)
    state = block.init_state(3)
    assert isinstance(state, MambaState)
    assert (state.conv.dtype, state.h.dtype) == (torch.bfloat16, torch.float32)
    assert block.to("meta").init_state(3).h.is_meta
