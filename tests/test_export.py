"""What torch.export, ONNX, torch.func and torch.compile make of the model."""

from __future__ import annotations

import export
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import generate
from mamba import Mamba, MambaBlock, MambaConfig, MambaState
from test_mamba import assert_close, assert_same_results, random_ids, random_model, random_state


class Step(nn.Module):
    """`model.step` as a forward, which is what exporters take."""

    def __init__(self, model: Mamba) -> None:
        super().__init__()
        self.model = model

    def forward(self, token_ids: Tensor, state: MambaState) -> tuple[Tensor, MambaState]:
        return self.model.step(token_ids, state)


def inputs_of(kind: str, batch: int = 2) -> tuple[nn.Module, tuple[Tensor, MambaState]]:
    model = random_model().eval()
    if kind == "step":
        return Step(model), (random_ids(batch, 1)[:, 0], random_state(model, batch))
    return model, (random_ids(batch, 12), random_state(model, batch))


@pytest.mark.parametrize("kind", ["step", "forward"])
def test_an_exported_program_computes_what_the_model_does(kind):
    module, inputs = inputs_of(kind)
    exported = torch.export.export(module, inputs).module()
    ids, state = inputs[0].flip(0), inputs[1].map(lambda tensor: tensor.flip(1))
    logits, next_state = exported(ids, state)
    assert isinstance(next_state, MambaState)
    assert_same_results((logits, next_state), module(ids, state), 1e-6)


def test_an_exported_step_takes_batches_of_any_size():
    module, inputs = inputs_of("step")
    batch = torch.export.Dim("batch", max=64)
    shapes = ({0: batch}, [{1: batch}, {1: batch}])
    exported = torch.export.export(module, inputs, dynamic_shapes=shapes).module()
    ids, state = random_ids(5, 1)[:, 0], random_state(module.model, 5)
    assert_same_results(exported(ids, state), module(ids, state), 1e-6)


@pytest.mark.filterwarnings("ignore")
def test_onnxruntime_computes_what_the_model_does(tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")  # which torch.onnx needs
    module, (ids, state) = inputs_of("forward")
    torch.onnx.export(module, (ids, state), verbose=False).save(tmp_path / "model.onnx")
    session = runtime.InferenceSession(tmp_path / "model.onnx")
    tensors = [tensor.numpy() for tensor in (ids, state.conv, state.h)]
    names = [item.name for item in session.get_inputs()]
    logits, conv, h = map(torch.tensor, session.run(None, dict(zip(names, tensors, strict=True))))
    assert_same_results((logits, MambaState(conv, h)), module(ids, state), 1e-5)


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


def test_a_state_may_be_an_argument_of_a_program_that_is_saved(tmp_path):
    module, inputs = inputs_of("step")
    torch.export.save(torch.export.export(module, inputs), tmp_path / "step.pt2")
    with torch.serialization.safe_globals([MambaState]):  # its example is among what is saved
        program = torch.export.load(tmp_path / "step.pt2").module()
    assert_same_results(program(*inputs), module(*inputs))


def test_another_kind_of_file_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"must end in \.pt2 or \.onnx, got 'step\.bin'"):
        export.export_step(random_model(), tmp_path / "step.bin")


@pytest.mark.parametrize("run", ["forward", "step"])
def test_vmap_takes_states(run):
    block = MambaBlock(MambaConfig(8))
    states = block.init_state(2).map(lambda tensor: torch.randn(3, *tensor.shape))
    u = torch.randn(3, 2, 5, 8) if run == "forward" else torch.randn(3, 2, 8)
    y, next_states = torch.func.vmap(getattr(block, run))(u, states)
    for i in range(3):
        expected, state = getattr(block, run)(u[i], states[i])
        assert_close("y", y[i], expected, 1e-5)
        assert_close("h", next_states.h[i], state.h, 1e-5)


def graphs_of(function, calls) -> int:
    """How many graphs torch.compile makes of these calls."""
    torch.compiler.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(function, backend=backend, fullgraph=True, dynamic=False)
    with torch.no_grad():
        for arguments in calls:
            compiled(*arguments)
    torch.compiler.reset()
    return len(graphs)


def test_a_compiled_model_makes_a_graph_for_each_length_and_one_for_all_steps():
    """Hence: round lengths up to powers of two, by padding on the right, which the tokens to its
    left do not see. These are as many graphs as there are powers."""
    model = random_model(n_layer=1).eval()

    def padded(ids: Tensor) -> Tensor:
        longer = 1 << (ids.shape[1] - 1).bit_length()
        return F.pad(ids, (0, longer - ids.shape[1]))

    lengths = (3, 4, 5, 7, 9, 13, 16, 17, 31)
    texts = [random_ids(2, length) for length in lengths]
    assert graphs_of(model, [(padded(ids),) for ids in texts]) == 4  # 4, 8, 16, 32
    assert_close("logits", model(padded(texts[2]))[:, :5], model(texts[2]), 1e-5)
    steps = [(random_ids(2, 1)[:, 0], random_state(model, 2)) for _ in lengths]
    assert graphs_of(model.step, steps) == 1
