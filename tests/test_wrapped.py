"""Our modules in the hands of others: adapters, hooks, wrappers, exporters and compilers."""

import copy
import pickle
import sys
from unittest import mock

import export
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.nn.parallel import DistributedDataParallel

import generate
import mamba
import triton_scan
from mamba import Mamba, MambaState, selective_scan
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
    selective_inputs,
)


def loaded(model: Mamba) -> Mamba:
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.load_state_dict(weights, assign=True)
    model.tie_weights()
    return model


CHANGES = {
    "nothing": lambda model: model,
    "assigned": loaded,
    "emptied": lambda model: model.to("meta").to_empty(device="cpu"),
    "pickled": lambda model: pickle.loads(pickle.dumps(model)),
    "copied": lambda model: copy.deepcopy(loaded(copy.deepcopy(model))),
}


@pytest.mark.parametrize("change", CHANGES)
def test_the_marks_of_the_official_layer_and_tied_matrices_survive(change):
    """Code of that family looks for the marks before it decays or initialises a parameter."""
    ends = ("A_log _no_weight_decay", "D _no_weight_decay", "dt_proj.bias _no_reinit")
    expected = {f"backbone.layers.{i}.mixer.{end}" for i in range(2) for end in ends}
    for tied in (True, False):
        model, found = CHANGES[change](random_model(tie_embeddings=tied)), set()
        for name, parameter in model.named_parameters():
            marks = vars(parameter).keys() & {"_no_weight_decay", "_no_reinit"}
            found |= {f"{name} {mark}" for mark in marks}
        assert found == expected
        assert (model.lm_head.weight is model.backbone.embedding.weight) == tied


@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd")  # 32 groups divide the rank
@pytest.mark.parametrize("targets, rank", [("conv1d", 32), ("in_proj x_proj dt_proj out_proj", 8)])
def test_lora_learns_in_forward_and_in_step_is_merged_and_leaves_nothing_behind(targets, rank):
    """A hook that stays would cost generation its fast steps, without a word."""
    peft = pytest.importorskip("peft")
    model, ids, targets = random_model().double(), random_ids(2, 5), targets.split()
    lora = peft.LoraConfig(target_modules=targets, r=rank, init_lora_weights=False)
    wrapper = peft.get_peft_model(copy.deepcopy(model), lora).double()
    adapted, start = wrapper.get_base_model(), random_state(model, 2)
    logits, _ = results = adapted(ids, start)
    assert_same_results(run_steps(adapted, ids, start), results, 1e-12)
    learnt = {name: p for name, p in adapted.named_parameters() if "lora_" in name}
    assert len(learnt) == 4 * len(targets)
    for output in (logits, adapted.step(ids[:, 0], start)[0]):
        assert all(g.any() for g in gradients_of(output.square().sum(), learnt).values())
    if "conv1d" not in targets:  # these the library cannot merge
        merged = wrapper.merge_and_unload()
        assert mamba.is_our_own(merged)
        assert_same_results(merged(ids, start), results, 1e-12)


@pytest.mark.parametrize("d_conv", [1, 4])
def test_what_is_done_to_the_convolution_counts(d_conv):
    """By a hook that computes in float64; and by a wrapper that shows nothing of what it wraps."""
    model, (ids, reset) = random_model(d_conv=d_conv), packed_documents()
    start, expected = random_state(model, 3), copy.deepcopy(model)
    for layer in expected.backbone.layers:
        for parameter in layer.mixer.conv1d.parameters():
            parameter.data *= 2
    plain, wrapped = (layer.mixer for layer in model.backbone.layers)
    wrapped.conv1d = nn.Sequential(wrapped.conv1d)
    for mixer in (plain, wrapped):
        mixer.conv1d.register_forward_hook(lambda module, inputs, output: 2 * output.double())
    first = reset & (torch.arange(16) == 0)  # of one of three rows
    for each in (None, first):
        results = expected(ids, start, reset=each)
        assert_same_results(model(ids, start, reset=each), results, 2e-6)
    assert_same_results(run_steps(model, ids, start), expected(ids, start), 2e-6)
    for inside in (reset, (torch.arange(16) == 1).expand(3, 16)):
        with pytest.raises(ValueError, match="look across a reset inside the sequence: feed such"):
            model(ids, reset=inside)


def test_hooks_on_a_layer_and_on_a_mixer_are_called_for_every_token():
    model, ids, calls = random_model().double(), random_ids(1, 3), []

    def add_one(module, inputs, output):
        calls.append(module)
        return output[0] + 1, output[1]

    model.backbone.layers[0].register_forward_hook(add_one)
    model.backbone.layers[1].mixer.register_forward_hook(add_one)
    start = random_state(model, 1)
    assert_same_results(run_steps(model, ids, start), model(ids, start), 1e-12)
    assert len(calls) == 2 * (3 + 1)
    assert len([*generate.stream(model, ids, max_new_tokens=70, temperature=0)]) == 70
    assert len(calls) == 8 + 2 * (1 + 69)


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
    assert torch.equal(*(torch.stack([*stream]) for stream in streams))
    (loss := sharded(ids).square().mean()).backward()
    named = sharded.named_parameters()
    gradients = {f"gradient of {name}": p.grad.full_tensor() for name, p in named}
    assert_all_close(gradients, gradients_of(model(ids).square().mean(), model), 1e-6)
    torch.optim.AdamW(mamba.param_groups(sharded, 0.1)).step()
    assert (sharded(ids).square().mean() - loss).abs() > 1e-6, "it learns"


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels run in Triton's interpreter")
@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module")
def test_a_fully_sharded_block_is_still_computed_as_a_whole(one_process, monkeypatch):
    """By the kernels of a block, with the weights that are there while it runs."""
    model, ids = random_model(scan="auto"), random_ids(2, 5)
    sharded, found, kernels_for = copy.deepcopy(model), [], mamba.kernels_for
    for module in (*sharded.backbone.layers, sharded):
        fully_shard(module, mesh=dist.init_device_mesh("cpu", (1,)))
    on_gpu = mock.MagicMock(is_cuda=True, ndim=3, dtype=torch.float32)
    on_gpu.__len__.return_value = 2
    expected = gradients_of(model(ids).square().mean(), model)

    def ask(layer, stream):
        found.append(kernels_for(layer, on_gpu))
        return found[-1]

    monkeypatch.setattr(mamba, "kernels_for", ask)
    sharded(ids).square().mean().backward()
    assert found == [triton_scan] * 2
    named = sharded.named_parameters()
    gradients = {f"gradient of {name}": p.grad.full_tensor() for name, p in named}
    assert_all_close(gradients, expected, 1e-5)


def test_a_loss_as_head_takes_the_place_of_the_logits_and_is_shared_between_processes(one_process):
    """What does not go through the wrapper's forward is not: gradients would stay each its own. A
    message that comes back three times as large stands for what the others send."""
    model, ids = random_model(), random_ids(2, 9)
    start, targets = random_state(model, 2), ids[:, 1:].flatten()

    def reply(_, bucket):
        future = torch.futures.Future()
        future.set_result(3 * bucket.buffer())
        return future

    def head(hidden):
        return F.cross_entropy(model.lm_head(hidden).flatten(0, 1), targets)

    replica = DistributedDataParallel(model)
    replica.register_comm_hook(None, reply)
    loss, _ = results = replica(ids[:, :-1], start, head=head)
    loss.backward()
    logits, state = model(ids[:, :-1], start)
    expected = F.cross_entropy(logits.flatten(0, 1), targets)
    assert_same_results(results, (expected, state), 1e-6)
    gradients = {f"gradient of {name}": p.grad for name, p in model.named_parameters()}
    assert_all_close(gradients, gradients_of(3 * expected, model), 1e-5)


def test_an_exported_model_takes_states_and_batches_of_any_size_and_can_be_saved(tmp_path):
    model = random_model(n_layer=1).eval()
    batch, example = torch.export.Dim("batch", max=64), (random_ids(2, 2), random_state(model, 2))
    shapes = ({0: batch}, [{1: batch}, {1: batch}])
    exported = torch.export.export(model, example, dynamic_shapes=shapes)
    torch.export.save(exported, tmp_path / "model.pt2")
    with torch.serialization.safe_globals([MambaState]):  # its example is among what is saved
        program = torch.export.load(tmp_path / "model.pt2").module()
    inputs = random_ids(5, 2), random_state(model, 5)
    assert_same_results(program(*inputs), model(*inputs), 1e-6)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("file", ["step.pt2", "step.onnx"])
def test_a_loop_around_the_exported_step_reads_and_writes_as_the_model_does(file, tmp_path):
    if file == "step.onnx":
        pytest.importorskip("onnxruntime")
        pytest.importorskip("onnxscript")
    model, prompt = random_model(n_layer=1).eval(), random_ids(1, 7)
    export.export_step(model, tmp_path / file)
    step, start = export.load_step(tmp_path / file), model.init_state(1)
    written = export.complete(step, start, prompt[0].tolist(), 9)
    expected = generate.stream(model, prompt, max_new_tokens=9, temperature=0)
    assert written == [token.item() for token in expected]
    assert len(set(written)) > 2, "a model that repeats itself shows little"


def test_the_command_writes_the_step_and_the_text_that_it_completes(capsys, monkeypatch, tmp_path):
    model, asked = random_model(n_layer=1, vocab_size=256, tokenizer="bytes"), []
    monkeypatch.setattr(Mamba, "from_pretrained", lambda folder: asked.append(folder) or model)
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["export.py", *arguments])
        export.main()
        return capsys.readouterr().out

    said = run()
    assert asked == [str(export.SHIPPED)] and (export.SHIPPED / "config.json").exists()
    prompt = torch.tensor([list(b"To be, or not to be")])
    tokens = [t.item() for t in generate.stream(model, prompt, max_new_tokens=60, temperature=0)]
    text = "To be, or not to be" + bytes(tokens).decode(errors="replace")
    wrote = f"wrote step.pt2: {(tmp_path / 'step.pt2').stat().st_size / 1e6:.1f} MB"
    assert said == f"{wrote}\n{text}\nthe model itself writes the same\n"
    for arguments in (("", "--tokens", "1"), ("a", "--tokens", "0")):
        with pytest.raises(SystemExit, match=r"^2$"):
            run(*arguments)
    with pytest.raises(SystemExit, match=r"error: .* must end in \.pt2 or \.onnx, got 'step\.bin'"):
        run("a", "--tokens", "1", "--out", "step.bin")


@pytest.mark.filterwarnings("ignore:Converting a tensor", "ignore:.torch.jit.trace. is deprecated")
def test_auto_recomputes_on_a_cpu_and_runs_chunks_for_compilers_transforms_and_tracers(monkeypatch):
    inputs = selective_inputs(4)
    x = inputs.pop("x")

    def run(x):
        return selective_scan(x, **inputs)[0]

    with monkeypatch.context() as patch:
        patch.setattr(mamba, "scan_chunked", "not to be called")
        expected = run(x)
    monkeypatch.setattr(mamba, "scan_recompute", "not to be called")
    compiled = torch.compile(run, backend="eager", fullgraph=True)(x)
    traced = torch.jit.trace(run, x, check_trace=False)(x)
    for chosen in (compiled, torch.func.vmap(run)(x.unsqueeze(0))[0], traced):
        assert_close("y", chosen, expected, 1e-5)


def test_gradients_for_each_sample_by_torch_func_are_those_of_each_alone():
    model, ids = random_model(), random_ids(3, 7)
    alone = random_state(model, 3).map(lambda t: t.unsqueeze(2))  # (layers, sample, 1, ...)

    def loss(parameters, row, state):
        logits, last = torch.func.functional_call(model, parameters, (row.unsqueeze(0), state))
        return logits.square().mean() + last.h.square().mean()

    gradient, leaves = torch.func.grad(loss), dict(model.named_parameters())
    each = torch.func.vmap(gradient, in_dims=(None, 0, 1))(leaves, ids, alone)
    for i, row in enumerate(ids):
        actual = {f"gradient of {name}": gradients[i] for name, gradients in each.items()}
        expected = gradients_of(loss(leaves, row, alone[:, i]), leaves)
        assert_all_close(actual, expected, 1e-4, f"sample {i}: ")


@pytest.mark.parametrize(
    "device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu(needed=True))]
)
def test_a_compiled_model_is_the_model_and_is_compiled_whole_once_for_a_length(device):
    """fullgraph: a graph break is an error. Lengths may be rounded up, by padding on the right,
    which the tokens to its left do not see. One graph serves all steps."""
    model, graphs = random_model(n_layer=1).to(device), []
    backend = torch._dynamo.lookup_backend("inductor" if device == "cuda" else "aot_eager")

    def noting(graph, inputs):
        graphs.append(graph)
        return backend(graph, inputs)

    torch.compiler.reset()
    options = {"backend": noting, "fullgraph": True, "dynamic": False}
    forward, step = torch.compile(model, **options), torch.compile(model.step, **options)
    for length in (1, 2):
        ids, state = random_ids(2, length).to(device), random_state(model, 2)
        logits, _ = forward(F.pad(ids, (0, 2 - length)), state)
        expected, _ = model(ids, state)
        assert_close("logits", logits[:, :length], expected, 1e-5)
        actual, right = (
            gradients_of(each[:, :length].square().mean(), model) for each in (logits, expected)
        )
        assert_all_close(actual, right, 1e-4)
        with torch.no_grad():
            inputs = random_ids(1, 2)[0].to(device), state
            assert_same_results(step(*inputs), model.step(*inputs), where="step: ")
    assert len(graphs) == 2
