"""What torch.export, ONNX and torch.compile make of the model."""

from __future__ import annotations

import export
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import generate
import mamba
from mamba import Mamba, MambaState, selective_scan
from test_mamba import (
    assert_all_close,
    assert_close,
    assert_same_results,
    gradients_of,
    random_ids,
    random_model,
    random_state,
    selective_inputs,
)

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


class Step(nn.Module):
    """`model.step` as a forward, which is what exporters take."""

    def __init__(self, model: Mamba) -> None:
        super().__init__()
        self.model = model

    def forward(self, token_ids: Tensor, state: MambaState) -> tuple[Tensor, MambaState]:
        return self.model.step(token_ids, state)


@pytest.mark.parametrize("kind", ["step of any batch", "forward"])
def test_an_exported_program_is_saved_and_computes_what_the_model_does(kind, tmp_path):
    """A state may be among its arguments and results."""
    model = random_model().eval()
    ids, state = random_ids(2, 12), random_state(model, 2)
    other_ids, other_state = random_ids(2, 12), random_state(model, 2)
    module, shapes = model, None
    if kind != "forward":
        batch = torch.export.Dim("batch", max=64)
        module, shapes = Step(model), ({0: batch}, [{1: batch}, {1: batch}])
        ids, other_ids, other_state = ids[:, 0], random_ids(5, 1)[:, 0], random_state(model, 5)
    exported = torch.export.export(module, (ids, state), dynamic_shapes=shapes)
    torch.export.save(exported, tmp_path / "program.pt2")
    with torch.serialization.safe_globals([MambaState]):  # its example is among what is saved
        program = torch.export.load(tmp_path / "program.pt2").module()
    logits, last = program(other_ids, other_state)
    assert isinstance(last, MambaState)
    assert_same_results((logits, last), module(other_ids, other_state), 1e-6)


@pytest.mark.filterwarnings("ignore")
def test_onnxruntime_computes_what_the_model_does(tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")  # which torch.onnx needs
    model, ids = random_model(n_layer=1).eval(), random_ids(2, 3)
    state = random_state(model, 2)
    torch.onnx.export(model, (ids, state), verbose=False).save(tmp_path / "model.onnx")
    session = runtime.InferenceSession(tmp_path / "model.onnx")
    tensors = [tensor.numpy() for tensor in (ids, state.conv, state.h)]
    names = [item.name for item in session.get_inputs()]
    logits, conv, h = map(torch.tensor, session.run(None, dict(zip(names, tensors, strict=True))))
    assert_same_results((logits, MambaState(conv, h)), model(ids, state), 1e-5)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("file", ["step.pt2", "step.onnx"])
def test_a_loop_around_the_exported_step_reads_and_writes_as_the_model_does(file, tmp_path):
    if file == "step.onnx":
        pytest.importorskip("onnxruntime")
        pytest.importorskip("onnxscript")
    model, prompt = random_model().eval(), random_ids(1, 7)
    export.export_step(model, tmp_path / file)
    written = export.complete(
        export.load_step(tmp_path / file), model.init_state(1), prompt[0].tolist(), 9
    )
    expected = generate.stream(model, prompt, max_new_tokens=9, temperature=0)
    assert written == [token.item() for token in expected]
    assert len(set(written)) > 2, "a model that repeats itself shows little"


def test_another_kind_of_file_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"must end in \.pt2 or \.onnx, got 'step\.bin'"):
        export.export_step(random_model(), tmp_path / "step.bin")


@pytest.mark.filterwarnings("ignore:Converting a tensor", "ignore:.torch.jit.trace. is deprecated")
def test_auto_recomputes_on_a_cpu_and_runs_chunks_for_compilers_transforms_and_tracers(monkeypatch):
    inputs = selective_inputs(4)
    x = inputs.pop("x")

    def run(x):
        return selective_scan(x, **inputs)[0]

    expected = run(x)
    with monkeypatch.context() as patch:
        patch.setattr(mamba, "scan_chunked", "not to be called")
        assert torch.equal(run(x), expected)
    monkeypatch.setattr(mamba, "scan_recompute", "not to be called")
    for name, chosen in (
        ("torch.compile", torch.compile(run, backend="eager", fullgraph=True)(x)),
        ("torch.func", torch.func.vmap(run)(x.unsqueeze(0))[0]),
        ("torch.jit", torch.jit.trace(run, x, check_trace=False)(x)),
    ):
        assert_close(name, chosen, expected, 1e-5)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_gpu)])
def test_a_compiled_model_is_the_model_and_is_compiled_whole(device):
    """fullgraph: a graph break is an error. And one graph for each length, one for all steps: so
    round lengths up to powers of two, by padding on the right, which the tokens to its left do not
    see. These are as many graphs as there are powers."""
    model, graphs = random_model(n_layer=1).to(device), []
    backend = torch._dynamo.lookup_backend("inductor" if device == "cuda" else "aot_eager")

    def noting(graph, inputs):
        graphs.append(graph)
        return backend(graph, inputs)

    torch.compiler.reset()
    options = {"backend": noting, "fullgraph": True, "dynamic": False}
    forward, step = torch.compile(model, **options), torch.compile(model.step, **options)
    for count, length in ((1, 2), (2, 3), (2, 4)):
        ids, state = random_ids(2, length).to(device), random_state(model, 2)
        padded = F.pad(ids, (0, -length % 2))
        logits, last = forward(padded, state)
        expected, expected_last = model(padded, state)
        assert_same_results((logits, last), (expected, expected_last))
        assert_close("left of the padding", logits[:, :length], model(ids), 1e-5)
        actual, right = (
            gradients_of(each.square().mean() + state.h.sum(), model)
            for each, state in ((logits, last), (expected, expected_last))
        )
        assert_all_close(actual, right, 1e-4)
        assert len(graphs) == count
    with torch.no_grad():
        for token_ids in ids.unbind(1):
            result = step(token_ids, state)
            assert_same_results(result, model.step(token_ids, state), where="step: ")
            state = result[1]
    assert len(graphs) == 3
