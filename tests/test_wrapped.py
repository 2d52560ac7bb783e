"""Our modules in the hands of others: adapters, hooks, wrappers, and code that expects the marks of
the official layer.
"""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.nn.parallel import DistributedDataParallel

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
    run_steps,
)

## Loaded, copied and moved ------------------------------------------------------------------------


def loaded(model: Mamba) -> Mamba:
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.load_state_dict(weights, assign=True)
    model.tie_weights()
    return model


def from_meta(model: Mamba) -> Mamba:
    with torch.device("meta"):
        return Mamba(model.config).to_empty(device="cpu")


@pytest.mark.parametrize("tied", [True, False])
def test_the_marks_of_the_official_layer_and_tied_matrices_survive(tied, tmp_path):
    """Code of that family looks for the marks before it decays or initialises a parameter."""
    random_model(tie_embeddings=tied).save_pretrained(tmp_path)
    ends = ("A_log _no_weight_decay", "D _no_weight_decay", "dt_proj.bias _no_reinit")
    expected = {f"backbone.layers.{i}.mixer.{end}" for i in range(2) for end in ends}
    for way, change in {
        "made": lambda model: model,
        "loaded": loaded,
        "from a folder": lambda model: Mamba.from_pretrained(tmp_path),
        "from meta": from_meta,
        "to meta": lambda model: model.to("meta"),
        "to bfloat16": lambda model: model.to(torch.bfloat16),
        "pickled": lambda model: pickle.loads(pickle.dumps(model)),
        "one after the other": lambda model: copy.deepcopy(loaded(copy.deepcopy(model))),
    }.items():
        model = change(random_model(tie_embeddings=tied))
        marks = {
            f"{name} {mark}"
            for name, parameter in model.named_parameters()
            for mark in ("_no_weight_decay", "_no_reinit")
            if getattr(parameter, mark, False)
        }
        assert marks == expected, way
        assert (model.lm_head.weight is model.backbone.embedding.weight) == tied, way


def test_a_state_is_of_its_own_class_and_of_the_parameters_dtype_on_any_device():
    block = MambaBlock(MambaConfig(8)).to(torch.bfloat16)
    state = block.init_state(3)
    assert isinstance(state, MambaState)
    assert (state.conv.dtype, state.h.dtype) == (torch.bfloat16, torch.float32)
    assert block.to("meta").init_state(3).h.is_meta


## Adapters and hooks ------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd")
@pytest.mark.parametrize(
    # The library wants a rank that the groups divide: 32 channels, one group each.
    ("targets", "rank"),
    [(["conv1d"], 32), (["in_proj", "x_proj", "dt_proj", "out_proj"], 8)],
)
def test_lora_learns_in_forward_and_in_step_is_merged_and_leaves_nothing_behind(targets, rank):
    """A hook that stays would cost generation its fast steps, without a word."""
    peft = pytest.importorskip("peft")
    model, ids = random_model().double(), random_ids(2, 5)
    lora = peft.LoraConfig(target_modules=targets, r=rank, init_lora_weights=False)
    wrapper = peft.get_peft_model(copy.deepcopy(model), lora).double()
    adapted, start = wrapper.get_base_model(), random_state(model, 2)
    logits, _ = results = adapted(ids, start)
    assert_same_results(run_steps(adapted, ids, start), results, 1e-12)
    assert (logits - model(ids, start)[0]).abs().max() > 0.01, "it changes nothing"
    learnt = {name: p for name, p in adapted.named_parameters() if "lora_" in name}
    assert len(learnt) == 4 * len(targets)
    for output in (logits, adapted.step(ids[:, 0], start)[0]):
        assert all(g.any() for g in gradients_of(output.square().sum(), learnt).values())
    if "conv1d" not in targets:  # these the library cannot merge
        merged = wrapper.merge_and_unload()
        assert mamba.is_our_own(merged)
        assert_same_results(merged(ids, start), results, 1e-12)


class Wrapper(nn.Module):
    """An adapter that shows nothing of what it wraps."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.inner = module

    def forward(self, window):
        return 2 * self.inner(window)


def doubled_by_hook(conv1d):
    """In float64, too."""
    conv1d.register_forward_hook(lambda module, inputs, output: 2 * output.double())
    return conv1d


def doubled_before(conv1d):
    conv1d.bias.data *= 2
    conv1d.register_forward_pre_hook(lambda module, inputs: (2 * inputs[0],))
    return conv1d


def doubled_by_method(conv1d):
    conv1d.forward = lambda window: 2 * nn.Conv1d.forward(conv1d, window)
    return conv1d


@pytest.mark.parametrize("double", [Wrapper, doubled_by_hook, doubled_before, doubled_by_method])
@pytest.mark.parametrize("d_conv", [1, 4])
def test_what_is_done_to_the_convolution_counts(double, d_conv):
    model, (ids, reset) = random_model(d_conv=d_conv), packed_documents()
    start, expected = random_state(model, 3), copy.deepcopy(model)
    for layer in expected.backbone.layers:
        for parameter in layer.mixer.conv1d.parameters():
            parameter.data *= 2
    for layer in model.backbone.layers:
        layer.mixer.conv1d = double(layer.mixer.conv1d)
    first = reset & (torch.arange(16) == 0)  # of one of three rows
    for each in (None, first):
        results = expected(ids, start, reset=each)
        assert_same_results(model(ids, start, reset=each), results, 2e-6)
    assert_same_results(run_steps(model, ids, start), expected(ids, start), 2e-6)
    with pytest.raises(ValueError, match="look across a reset inside the sequence: feed such"):
        model(ids, reset=reset)


@pytest.mark.parametrize("hook", ["register_full_backward_hook", "register_full_backward_pre_hook"])
def test_backward_hooks_of_the_convolution_are_called(hook):
    model, calls = random_model(), []
    conv1d = model.backbone.layers[0].mixer.conv1d
    getattr(conv1d, hook)(lambda *arguments: calls.append(arguments))
    model(random_ids(2, 5)).sum().backward()
    assert len(calls) == 1


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
    assert_same_results(run_steps(model, ids, start), model(ids, start), 1e-12)
    assert len(calls) == 3 + 1
    tokens = list(generate.stream(model, ids, max_new_tokens=70, temperature=0))
    assert len(tokens) == 70 and len(calls) == 4 + 1 + 69


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


def test_a_loss_as_head_is_shared_between_processes(one_process):
    """What does not go through the wrapper's forward is not: gradients would stay each its own. A
    message that comes back three times as large stands for what the others send."""
    model, ids = random_model(), random_ids(2, 9)
    replica = DistributedDataParallel(model)

    def reply(_, bucket):
        future = torch.futures.Future()
        future.set_result(3 * bucket.buffer())
        return future

    def loss_of(hidden):
        return F.cross_entropy(model.lm_head(hidden).flatten(0, 1), ids[:, 1:].flatten())

    replica.register_comm_hook(None, reply)
    replica(ids[:, :-1], head=loss_of).backward()
    logits = model(ids[:, :-1])
    loss = 3 * F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    gradients = {f"gradient of {name}": p.grad for name, p in model.named_parameters()}
    assert_all_close(gradients, gradients_of(loss, model), 1e-5)


def test_the_head_takes_the_place_of_the_logits():
    model, ids = random_model().double(), random_ids(2, 7)
    start = random_state(model, 2)
    logits, state = model(ids, start)
    last = model(ids, start, head=lambda hidden: model.lm_head(hidden[:, -1]))
    assert_same_results(last, (logits[:, -1], state), 1e-12)
    hidden = model(ids, head=nn.Identity())
    assert_close("hidden", model.lm_head(hidden), model(ids), 1e-12)
