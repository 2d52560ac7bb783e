"""A residual block in few kernels (triton_scan.py), against the block as mamba.py's modules say it.

Without a GPU the kernels run in Triton's interpreter, and a block is told to take them.
"""

from __future__ import annotations

import copy
import functools
from unittest import mock

import pytest
import torch
from test_triton_scan import DEVICE, GPU, needs_gpu, whole_slices  # noqa: F401  the last: a fixture
from torch import Tensor, nn
from torch.nn.utils import parametrize

import mamba
import triton_scan
from mamba import Mamba, MambaConfig
from test_mamba import assert_all_close, assert_close, error_of

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def several_programs(monkeypatch):
    monkeypatch.setattr(triton_scan, "NORM_ROWS", 4)  # of ten rows: two programs and a half


def random_model(**changes) -> Mamba:
    """Random in every parameter, also in those that start at 0 or 1."""
    settings = {"d_model": 12, "n_layer": 2, "vocab_size": 30, "scan": "chunked"} | changes
    model = Mamba(MambaConfig(**settings))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return model.to(DEVICE)


def results(
    model: Mamba, *, fused: bool, autocast=False, of=("logits", "conv", "h"), seqlen: int = 5,
    wanted=("conv", "h"),
) -> dict[str, Tensor]:  # fmt: skip
    """Logits, states, and all gradients of a loss that weighs these at random, of rows with
    documents in them. wanted: of the first state."""
    generator = torch.Generator().manual_seed(1)

    def draw(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=generator).to(like)

    ids = torch.randint(30, (2, seqlen), generator=generator).to(DEVICE)
    reset = (torch.rand(2, seqlen, generator=generator) < 0.2).to(DEVICE)
    model.zero_grad()
    state = model.init_state(2).map(draw)
    for name in wanted:
        getattr(state, name).requires_grad_()
    kernels = triton_scan if fused else None
    with (
        mock.patch.object(mamba, "kernels_for", lambda *_: kernels),
        torch.autocast(DEVICE, torch.bfloat16, enabled=autocast),
    ):
        logits, after = model(ids, state, reset=reset)
    outputs = {"logits": logits, "conv": after.conv, "h": after.h}
    sum((outputs[name] * draw(outputs[name])).sum() for name in of).backward()
    inputs = {"d conv": state.conv, "d h": state.h, **dict(model.named_parameters())}
    gradients = {name: t.grad for name, t in inputs.items() if t.grad is not None}
    return {name: tensor.detach().clone() for name, tensor in (outputs | gradients).items()}


@pytest.mark.parametrize(
    "changes",
    [
        {"bias": True, "d_state": 3, "d_conv": 2, "dt_rank": 3, "norm_eps": 0.1},
        {"rule": "dirac", "conv_bias": False, "residual_in_fp32": False, "expand": 1.5},
    ],
)
def test_it_is_the_block_in_values_states_and_gradients_and_twice_the_same_to_the_bit(changes):
    model = random_model(**changes)
    expected, actual = results(model, fused=False), results(model, fused=True)
    assert_all_close(actual, expected, 1e-4 if GPU else 2e-5)
    again = results(model, fused=True)
    assert all(torch.equal(actual[name], again[name]) for name in actual)


@pytest.mark.parametrize("autocast", [True, False], ids=["autocast", "bfloat16 weights"])
def test_in_bfloat16_it_loses_no_more_than_the_plain_block_does(autocast):
    model = random_model(bias=True)
    if not autocast:
        model = model.to(torch.bfloat16)
    exact = results(copy.deepcopy(model).double(), fused=False)
    plain = results(model, fused=False, autocast=autocast)
    fused = results(model, fused=True, autocast=autocast)
    assert {name: t.dtype for name, t in fused.items()} == {n: t.dtype for n, t in plain.items()}
    # Each of such small tensors is a draw of roundings, their mean is not.
    lost, allowed = (
        sum(error_of(found[name], exact[name]) for name in exact) / len(exact)
        for found in (fused, plain)
    )
    assert lost <= (1.2 if GPU else 3) * allowed, "the interpreter cuts off what a GPU rounds"


def test_a_text_of_several_slices_has_its_gradients_in_their_places(monkeypatch):
    for name, value in {"K": 8, "room_for_sums": lambda x: 64}.items():
        monkeypatch.setattr(triton_scan, name, value)
    model = random_model(n_layer=1)
    expected, actual = (results(model, fused=fused, seqlen=9) for fused in (False, True))
    assert_all_close(actual, expected, 1e-4 if GPU else 2e-5)


@pytest.mark.parametrize("of", ["logits", "h"])
def test_a_loss_of_one_output_alone(of):
    """As in training, or of the last state: what nothing arrives at is None."""
    model = random_model()
    expected, actual = (results(model, fused=fused, of=[of]) for fused in (False, True))
    zeros = {name for name in actual if name not in expected}  # where the modules leave None
    assert all(not actual.pop(name).any() for name in zeros)
    assert_all_close(actual, expected, 1e-4 if GPU else 2e-5)


@pytest.mark.parametrize("wanted", ["conv", "h"])
def test_of_the_first_state_gets_a_gradient_what_wants_one(wanted):
    model = random_model()
    expected, actual = (results(model, fused=fused, wanted=[wanted]) for fused in (False, True))
    assert_all_close(actual, expected, 1e-4 if GPU else 2e-5)


@pytest.mark.parametrize("trained", ["in_proj", "out_proj"])
def test_a_matrix_is_trained_by_itself_and_no_product_is_made_for_others(trained):
    model = random_model(n_layer=1)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith(f"{trained}.weight"))
    with mock.patch.object(triton_scan, "product", wraps=triton_scan.product) as product:
        expected, actual = results(model, fused=False), results(model, fused=True)
    assert_all_close(actual, expected, 1e-4 if GPU else 2e-5)
    assert product.call_count == 1


def test_to_a_float32_stream_a_block_adds_and_rounds_no_more_than_its_own_share():
    layer = random_model(n_layer=1).backbone.layers[0]
    stream, state = 1000 * torch.randn(2, 5, 12, device=DEVICE), layer.mixer.init_state(2)
    expected, _ = layer(stream, state)
    with (
        mock.patch.object(mamba, "kernels_for", lambda *_: triton_scan),
        torch.autocast(DEVICE, torch.bfloat16),
    ):
        actual, _ = layer(stream, state)
    assert actual.dtype == expected.dtype == torch.float32
    assert_close("stream", actual, expected, 1e-4)


def test_no_first_state_is_one_of_zeros():
    layer, stream = random_model(n_layer=1).backbone.layers[0], torch.randn(1, 5, 12, device=DEVICE)
    state, found = layer.mixer.init_state(1), []
    for h0 in (state.h, None):
        layer.zero_grad()
        out, _, h = triton_scan.residual_block_triton(layer, stream, state.conv, h0)
        (out.sum() + h.sum()).backward()
        gradients = {name: parameter.grad.clone() for name, parameter in layer.named_parameters()}
        found.append(gradients | {"out": out.detach(), "h": h.detach()})
    assert_all_close(found[1], found[0], 1e-6)


def test_of_all_that_is_as_long_as_the_text_a_block_keeps_little_for_its_backward_pass():
    """The stream, what in_proj and x_proj give, B and C once more, and of the states every 64th."""
    model, kept = random_model(n_layer=1, d_state=3), {}
    layer, stream = model.backbone.layers[0], torch.randn(1, 9, 12, device=DEVICE)
    state = layer.mixer.init_state(1)
    stream.requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: kept.setdefault(tensor.data_ptr(), tensor), lambda tensor: tensor
    ):
        triton_scan.residual_block_triton(layer, stream, state.conv, state.h)
    assert state.h.data_ptr() not in kept, "a state that wants no gradient"
    weights = {parameter.data_ptr() for parameter in layer.parameters()}
    numbers = {t.numel() for at, t in kept.items() if at not in weights and 9 in t.shape}
    rank, d_inner, states = model.config.dt_rank, model.config.d_inner, 4  # 3, in tiles of 4
    assert numbers == {9 * 12, 9 * d_inner, 9 * (rank + 2 * 3), 2 * 9 * states}
    assert sum(t.numel() for at, t in kept.items() if 9 in t.shape) < 9 * (12 + 3 * d_inner)


def test_frozen_weights_get_no_gradient_and_the_others_theirs():
    model = random_model(bias=True, n_layer=1)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.endswith(("proj.weight", "A_log", "embedding.weight")))
    expected, actual = results(model, fused=False), results(model, fused=True)
    assert_all_close(actual, expected, 1e-4 if GPU else 2e-5)


def test_a_short_stream_between_float32_weights_is_promoted_as_by_the_modules():
    layer = random_model(n_layer=1).backbone.layers[0]
    stream = torch.randn(2, 5, 12, device=DEVICE).bfloat16()
    state = layer.mixer.init_state(2)
    expected, _ = layer(stream, state)
    with mock.patch.object(mamba, "kernels_for", lambda *_: triton_scan):
        actual, _ = layer(stream, state)
    assert_close("stream", actual, expected, 1e-5)
    assert actual.dtype == expected.dtype == torch.float32


def test_A_may_be_given_as_the_logarithm_of_minus_A(monkeypatch):
    """In every kernel that reads A, in channels and states that fill no tile, of any strides."""
    monkeypatch.setattr(triton_scan, "K", 8)
    x, dt, A, B, C, D, z, bias = triton_scan.random_inputs(1, 9, 3, 3, DEVICE)
    rest = (B, C, D, z, None, bias, None)
    y, h_last, *kept = triton_scan.scan_forward(x, dt, A, *rest, True, "mamba", True)
    gradients = triton_scan.scan_backward(y, h_last, x, dt, A, *rest, *kept, True, "mamba")
    gradients[2] *= A

    A_log = (-A).log().mT.contiguous().mT
    logs = triton_scan.scan_forward(x, dt, A_log, *rest, True, "mamba", True, True)
    others = (x, dt, A_log, *rest, *logs[2:], True, "mamba", True)
    for i, tensor in enumerate((*logs[:2], *triton_scan.scan_backward(y, h_last, *others))):
        assert_close(f"result {i}", tensor, [y, h_last, *gradients][i], 1e-5)


def test_the_norm_of_a_short_stream_is_computed_in_float32():
    stream, du, dout = torch.randn(3, 10, 12, device=DEVICE).bfloat16()
    weight, v, g = torch.randn(12, device=DEVICE), stream.double(), du.double()
    _, _, dweight = triton_scan.norm_backward(du, dout, stream, weight, 0.1)
    expected = (g * v / (v.square().mean(-1, keepdim=True) + 0.1).sqrt()).sum(0)
    assert_close("dweight", dweight, expected, 1e-5)


def test_second_derivatives_are_refused():
    model = random_model(n_layer=1)
    with mock.patch.object(mamba, "kernels_for", lambda *_: triton_scan):
        logits = model(torch.zeros(1, 2, dtype=torch.long, device=DEVICE))
    with pytest.raises(RuntimeError, match="second derivatives"):
        torch.autograd.grad(logits.sum(), [model.backbone.layers[0].norm.weight], create_graph=True)


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def put(place: str, value):
    """A change of a layer: a value in this place."""
    *owners, name = place.split(".")
    return lambda layer: setattr(functools.reduce(getattr, owners, layer), name, value)


def parametrised(layer: nn.Module) -> None:
    parametrize.register_parametrization(layer.mixer.out_proj, "weight", Doubled())


def wide_filter(layer: nn.Module) -> None:
    layer.mixer.config.d_conv = 5
    layer.mixer.conv1d.weight = nn.Parameter(torch.zeros(24, 1, 5))


NOT_OURS = {
    "a hook": lambda layer: layer.mixer.dt_proj.register_forward_hook(lambda *_: None),
    "a subclass": put("mixer.__class__", type("Mine", (mamba.MambaBlock,), {})),
    "a forward of its own": put("norm.forward", lambda stream: stream),
    "a selection of its own": put("mixer.select", lambda x: x),
    "a parametrisation": parametrised,
    "another rule": put("mixer.config.rule", "zoh"),
    "another scan": put("mixer.config.scan", "chunked"),
    "a weight of another kind": put(
        "mixer.in_proj.weight", type("Quantised", (nn.Parameter,), {})(torch.zeros(2, 2))
    ),
    "projections of two dtypes": lambda layer: layer.mixer.x_proj.bfloat16(),
    "float64": nn.Module.double,
    "a wide filter": wide_filter,
    "another filter": put("mixer.conv1d", nn.Conv1d(24, 24, 3, groups=24)),
    "a dilated filter": put("mixer.conv1d", nn.Conv1d(24, 24, 4, groups=24, dilation=2)),
    "delta by a Linear": put("mixer.dt_proj", nn.Linear(1, 24)),
    "delta without a bias": put("mixer.dt_proj.bias", None),
    "a selection with a bias": put("mixer.x_proj", nn.Linear(24, 33)),
}


@pytest.mark.parametrize("change", NOT_OURS.values(), ids=NOT_OURS)
def test_a_block_that_is_not_quite_ours_is_computed_by_its_modules(change):
    layer = random_model(scan="auto").backbone.layers[0]
    stream = mock.MagicMock(is_cuda=True, ndim=3, dtype=torch.float32)
    stream.__len__.return_value = 2
    assert mamba.kernels_for(layer, stream) is triton_scan
    stream.is_cuda = False
    assert mamba.kernels_for(layer, stream) is None
    stream.is_cuda = True
    change(layer)
    assert mamba.kernels_for(layer, stream) is None


@needs_gpu
def test_on_a_gpu_it_is_taken_by_itself_and_not_where_someone_watches():
    model = random_model(scan="auto")
    ids = torch.zeros(1, 3, dtype=torch.long, device=DEVICE)
    with mock.patch.object(
        triton_scan, "residual_block_triton", wraps=triton_scan.residual_block_triton
    ) as kernel:
        logits = model(ids)
        assert kernel.call_count == 2
        seen = []
        model.backbone.layers[1].mixer.x_proj.register_forward_hook(lambda *a: seen.append(a))
        watched = model(ids)
    assert kernel.call_count == 3 and len(seen) == 1
    assert error_of(watched, logits) < 1e-5
