"""Streams on a GPU: when the step of a stream is recorded, and that its tokens stay the same.

What a recorded step computes is claimed in test_step_graph.py. On a machine without a GPU a
stand-in takes the place of a recorded graph. It has the same buffers, reads the parameters where
they were when it was made, and computes where a graph would be replayed.

The judge is the same stream with no graph: the tokens have to be equal.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import math
import types
import weakref
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

import generate
import triton_scan
from mamba import Mamba, MambaConfig

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def small_model(dtype=torch.float32, **changes) -> Mamba:
    """No parameter has the value that it starts training with, or one that could be left out."""
    sizes = {"d_model": 8, "vocab_size": 16, "d_state": 4, "dt_rank": 2, "tie_embeddings": False}
    model = Mamba(MambaConfig(**{**sizes, **changes}))
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        values = torch.randn(parameter.shape, generator=generator)
        if "norm" in name or name.endswith(".D"):
            values = 1 + values / 3
        elif "embedding" not in name and "A_log" not in name and parameter.ndim >= 2:
            values *= 0.7 / math.sqrt(parameter[0].numel())
        parameter.copy_(values)
    return model.to(DEVICE, dtype)


def random_ids(model: Mamba, *shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(model.config.vocab_size, shape, generator=generator).to(DEVICE)


## ================================================================================================
## What can be recorded
## ================================================================================================


def can_record_on_a_gpu(model: Mamba, can_record=generate.can_record) -> bool:
    """The answer there, wherever this runs."""
    with mock.patch.object(torch.Tensor, "is_cuda", True):
        return can_record(model)


def test_a_model_on_the_cpu_is_not_recorded():
    assert generate.can_record(small_model().cpu()) is False


@pytest.mark.parametrize(
    "changes", [{}, {"rule": "zoh"}, {"bias": True, "tie_embeddings": True, "n_layer": 2}]
)
def test_a_model_on_a_gpu_is_recorded(changes):
    assert can_record_on_a_gpu(small_model(**changes)) is True


def test_a_model_with_a_hook_is_not_recorded_while_it_has_it():
    model = small_model()
    for module in (model, model.backbone.norm_f, model.backbone.layers[0].mixer.dt_proj):
        for register in (module.register_forward_hook, module.register_forward_pre_hook):
            handle = register(lambda *args: None)
            assert can_record_on_a_gpu(model) is False
            handle.remove()
            assert can_record_on_a_gpu(model) is True


class Adapter(nn.Linear):
    """What LoRA and its like put in the place of a projection."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x.sum(-1, keepdim=True)


class Wrapper(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.weight, self.bias = inner, inner.weight, inner.bias

    def forward(self, x: Tensor) -> Tensor:
        return 2 * self.inner(x)


def adapted(model: Mamba) -> None:
    mixer = model.backbone.layers[0].mixer
    in_proj, mixer.in_proj = mixer.in_proj, Adapter(8, 32, bias=False, device=DEVICE)
    mixer.in_proj.weight = in_proj.weight


def wrapped(model: Mamba) -> None:
    mixer = model.backbone.layers[0].mixer
    mixer.out_proj = Wrapper(mixer.out_proj)


def parametrized(model: Mamba) -> None:
    class Doubled(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return 2 * weight

    norm = model.backbone.norm_f
    nn.utils.parametrize.register_parametrization(norm, "weight", Doubled())


def with_another_forward(model: Mamba) -> None:
    """As accelerate does: the module keeps its type and its name, and has no hook."""
    linear = model.backbone.layers[0].mixer.in_proj
    linear.forward = lambda x, forward=linear.forward: 2 * forward(x)


def with_weights_of_another_kind(model: Mamba) -> None:
    """As quantisation does: a subclass of Tensor holds the numbers in its own way."""

    class Quantized(Tensor):
        pass

    linear = model.backbone.layers[0].mixer.in_proj
    linear.weight = nn.Parameter(linear.weight.detach().as_subclass(Quantized))


CHANGED = (adapted, wrapped, parametrized, with_another_forward, with_weights_of_another_kind)


@pytest.mark.parametrize("change", CHANGED)
def test_a_model_in_which_something_is_not_our_own_is_not_recorded(change):
    model = small_model()
    change(model)
    assert can_record_on_a_gpu(model) is False


def test_neither_is_a_subclass_of_the_model():
    class Other(Mamba):
        pass

    model = small_model()
    model.__class__ = Other
    assert can_record_on_a_gpu(model) is False


def test_nothing_is_recorded_under_autocast():
    model, before = small_model(), torch.is_autocast_enabled("cuda")
    torch.set_autocast_enabled("cuda", True)
    try:
        assert can_record_on_a_gpu(model) is False
    finally:
        torch.set_autocast_enabled("cuda", before)
    assert can_record_on_a_gpu(model) is True


## ================================================================================================
## Streams
## ================================================================================================


class StandIn(triton_scan.StepGraph):
    """A StepGraph on a machine without a GPU: what would be replayed is computed.

    With the parameters and the buffers that there were when it was made, whatever has come in
    their place since: a graph knows addresses, and not the model.
    """

    def __init__(self, model: Mamba, batch: int) -> None:
        nothing = contextlib.nullcontext
        with contextlib.ExitStack() as stack:
            for name, fake in (
                ("CUDAGraph", types.SimpleNamespace),
                ("Stream", mock.Mock),
                ("current_stream", mock.Mock),
                ("device", lambda device: nothing()),
                ("stream", lambda stream: nothing()),
                ("graph", lambda graph, **options: nothing()),
            ):
                stack.enter_context(mock.patch.object(torch.cuda, name, fake))
            super().__init__(model, batch)
        with torch.inference_mode(False), torch.no_grad():
            recorded = copy.deepcopy(model)
            for ours, theirs in zip(recorded.parameters(), model.parameters(), strict=True):
                ours.data = theirs.data
        buffers, logits = copy.copy(self), self.logits
        buffers.state = copy.copy(self.state)
        self.graph.replay = lambda: logits.copy_(buffers.run(recorded))


@pytest.fixture
def made(monkeypatch) -> list[weakref.ref]:
    """The graphs that are made from now on."""
    references = []

    class Noted(triton_scan.StepGraph if GPU else StandIn):
        def __init__(self, model: Mamba, batch: int) -> None:
            super().__init__(model, batch)
            references.append(weakref.ref(self))

    monkeypatch.setattr(triton_scan, "StepGraph", Noted)
    if not GPU:
        monkeypatch.setattr(generate, "can_record", can_record_on_a_gpu)
    return references


def streamed(model: Mamba, ids: Tensor, new: int = 6, **options) -> Tensor:
    options = {"temperature": 0, "max_new_tokens": new, **options}
    return torch.stack(list(generate.stream(model, ids, **options)), dim=1)


def streamed_without_a_graph(model: Mamba, ids: Tensor, new: int = 6, **options) -> Tensor:
    with mock.patch.object(generate, "can_record", lambda model: False):
        return streamed(model, ids, new, **options)


def assert_right(model: Mamba, ids: Tensor, **options) -> None:
    assert torch.equal(
        streamed(model, ids, **options), streamed_without_a_graph(model, ids, **options)
    )


# zoh: the operators of `step` itself are recorded, so a graph gives its numbers to the bit.
def recorded_model(**changes) -> Mamba:
    return small_model(**{"rule": "zoh", "n_layer": 2, **changes})


def test_a_stream_has_the_tokens_that_it_has_without_a_graph(made):
    model = recorded_model()
    ids = random_ids(model, 3, 5)
    for options in (
        {},
        {"temperature": 1.0, "seed": 1},
        {"temperature": 1.0, "seed": 2, "repetition_penalty": 1.3, "top_p": 0.9},
        {"temperature": 1.0, "seed": 3, "vocab_size": 16, "eos_token_id": 3, "new": 30},
    ):
        assert_right(model, ids, **options)
    assert len(made) == 1


def test_padding_stays_out_of_the_state_of_a_graph(made):
    model = recorded_model()
    mask = torch.ones(2, 5, dtype=torch.bool, device=DEVICE)
    mask[0, :3] = False
    ids = random_ids(model, 2, 5).masked_fill(~mask, 0)
    assert_right(model, ids, mask=mask)
    assert torch.equal(streamed(model, ids, mask=mask)[:1], streamed(model, ids[:1, 3:]))


def test_no_graph_is_made_for_one_token(made):
    model = recorded_model()
    ids = random_ids(model, 1, 4)
    streamed(model, ids, 1)
    next(generate.stream(model, ids, max_new_tokens=9))
    assert made == []
    streamed(model, ids, 2)
    assert len(made) == 1


def test_a_stream_of_one_token_leaves_the_graph_where_it_is(made):
    model = recorded_model()
    for new in (3, 1, 3):
        streamed(model, random_ids(model, 1, 4), new)
    assert len(made) == 1


def leave_by_closing(steps) -> None:
    for _ in range(3):
        next(steps)
    steps.steps.close()


def leave_by_an_error_of_the_reader(steps) -> None:
    with pytest.raises(ZeroDivisionError):
        for count, _ in enumerate(steps):
            1 / (2 - count)
    del steps
    gc.collect()


def leave_by_an_error_inside(steps) -> None:
    for _ in range(3):
        next(steps)
    with pytest.raises(KeyboardInterrupt):
        steps.steps.throw(KeyboardInterrupt)


@pytest.mark.parametrize(
    "leave", [leave_by_closing, leave_by_an_error_of_the_reader, leave_by_an_error_inside]
)
def test_a_stream_that_is_left_gives_its_graph_back(leave, made):
    model = recorded_model()
    ids = random_ids(model, 2, 4)
    leave(generate.stream(model, ids, max_new_tokens=9))
    assert len(made) == 1
    assert_right(model, ids)
    assert len(made) == 1


def test_a_forward_hook_is_called_for_every_token(made):
    """For a while, and after that there are graphs again."""
    model, calls = recorded_model(), []
    ids = random_ids(model, 2, 4)
    expected = streamed(model, ids)
    out_proj = model.backbone.layers[1].mixer.out_proj
    handle = out_proj.register_forward_hook(lambda *args: calls.append(args))
    assert torch.equal(streamed(model, ids), expected)
    assert len(calls) == 6  # the prompt and five tokens; the sixth is not fed back
    handle.remove()
    assert torch.equal(streamed(model, ids), expected)
    assert len(calls) == 6 and len(made) == 1


@pytest.mark.parametrize("change", CHANGED)
def test_what_is_not_our_own_is_asked_for_every_token(change, made):
    model = small_model()
    change(model)
    assert_right(model, random_ids(model, 2, 4))
    assert made == []
