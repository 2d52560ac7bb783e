"""Token after token on a GPU: the kernels of a step in triton_scan.py, and the step recorded.

The judge of the kernels is `Mamba.step` on the same numbers in float64. On a machine without a GPU
they run in Triton's interpreter (see test_triton_scan.py), on tiny sizes. So does the rest: there
a stand-in takes the place of a recorded graph. It has the same buffers, reads the parameters where
they were when it was made, and computes where a graph would be replayed.

The judge of the graphs is `Mamba.step`, token after token: the logits have to be equal.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import math
import os
import types
import weakref
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from mamba import Mamba, MambaConfig, MambaState

try:
    import triton_scan
except ImportError as error:
    triton_scan, missing = None, error

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
needs_gpu = pytest.mark.skipif(not GPU, reason="needs a GPU")

# Relative errors. In bfloat16 each of a dozen roundings makes 2e-3, in both ways of computing.
TOLERANCES = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}


@pytest.fixture(autouse=True, scope="module")
def kernels_can_run():
    message = None
    if triton_scan is None:
        message = f'{missing}: pip install -e ".[test]"'
    elif not GPU and not triton_scan.INTERPRETED:
        message = "no GPU, and TRITON_INTERPRET is not 1, or triton was imported before it was"
    if message is not None:
        give_up = pytest.fail if os.environ.get("CI") else pytest.skip
        give_up(message)


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


@pytest.fixture(autouse=True)
def few_programs(monkeypatch):
    """Each costs 6 ms in the interpreter. For a single processor tiles are large, programs few."""
    if triton_scan is not None and not GPU:
        monkeypatch.setattr(triton_scan, "PROCESSORS", 1)


## ================================================================================================
## Helpers
## ================================================================================================


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


def random_state(model: Mamba, batch: int) -> MambaState:
    generator = torch.Generator().manual_seed(1)
    state = model.init_state(batch)
    return state.map(lambda t: t.copy_(torch.randn(t.shape, generator=generator)))


def inside_nan(tensor: Tensor) -> Tensor:
    """The same numbers as some rows of a tensor that is NaN everywhere else."""
    around = tensor.new_full((len(tensor) + 2, *tensor.shape[1:]), math.nan)
    return around[1:-1].copy_(tensor)


@contextlib.contextmanager
def poisoned():
    """A tensor that is made without values holds NaN, and not what memory happens to hold."""

    def poison(make):
        def made(*args, **kwargs):
            tensor = make(*args, **kwargs)
            return tensor.fill_(math.nan) if tensor.is_floating_point() else tensor

        return made

    with contextlib.ExitStack() as stack:
        for owner, name in ((torch.Tensor, "new_empty"), (torch, "empty"), (torch, "empty_like")):
            stack.enter_context(mock.patch.object(owner, name, poison(getattr(owner, name))))
        yield


def assert_close(name: str, actual: Tensor, expected: Tensor, tolerance: float) -> None:
    assert actual.shape == expected.shape, f"{name}: {actual.shape}, expected {expected.shape}"
    actual, expected = actual.double(), expected.double()
    error = (actual - expected).norm() / expected.norm().clamp(min=1e-300)
    assert error <= tolerance, f"{name}: relative error {error:.2e}, allowed {tolerance:.1e}"


## ================================================================================================
## A step of the model
## ================================================================================================


# A layout stores the rows of a state in a way of its own: it returns the state and what is around.
def contiguous(state: MambaState) -> tuple[MambaState, list[Tensor]]:
    return state.map(torch.clone), []


def side_by_side(state: MambaState) -> tuple[MambaState, list[Tensor]]:
    """As a recorded step does: the channels of a window next to each other."""
    windows = state.conv.movedim(-1, 1).contiguous().movedim(1, -1)
    return MambaState(windows, state.h.clone()), []


def among_others(state: MambaState) -> tuple[MambaState, list[Tensor]]:
    """Some rows of the state of a larger batch. The other rows are NaN."""
    around = []
    for tensor in (state.conv, state.h):
        layers, batch, *rest = tensor.shape
        around.append(tensor.new_full((layers, batch + 2, *rest), math.nan))
        around[-1][:, 1:-1] = tensor
    return MambaState(*(tensor[:, 1:-1] for tensor in around)), [t[:, [0, -1]] for t in around]


STEPS = {
    "two layers": ({"n_layer": 2}, side_by_side),
    "impulses": ({"rule": "dirac"}, contiguous),
    "biases": ({"bias": True, "conv_bias": False}, contiguous),
    "no window": ({"d_conv": 1}, side_by_side),
    "a window of one": ({"d_conv": 2}, side_by_side),
    "a window of two": ({"d_conv": 3, "bias": True}, contiguous),
    "odd sizes": (
        {"d_model": 9, "d_state": 5, "dt_rank": 3, "vocab_size": 11, "pad_vocab_size_multiple": 1},
        side_by_side,
    ),
    "one state, rank one": ({"d_state": 1, "dt_rank": 1, "expand": 1}, contiguous),
    "a stream of short floats": ({"residual_in_fp32": False, "tie_embeddings": True}, contiguous),
    "another eps": ({"norm_eps": 1.0}, contiguous),
    "rows of a larger state": ({}, among_others),
}
# Up to four rows are multiplied one by one, more are a matrix for the tensor cores.
EVERY = [(case, batch) for case in STEPS for batch in (1, 5)]
EVERY += [(case, 3) for case in ("two layers", "odd sizes", "rows of a larger state")]


@pytest.mark.parametrize(("case", "batch"), EVERY)
def test_a_fused_step_is_the_step_of_the_model(case, batch):
    changes, layout = STEPS[case]
    check_fused_step(small_model(**changes), batch, layout)


@pytest.mark.parametrize("batch", [1, 6])
@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        ("odd sizes", torch.bfloat16),
        ("a stream of short floats", torch.bfloat16),
        ("a stream of short floats", torch.float16),
    ],
)
def test_a_fused_step_in_short_floats_is_the_step_of_the_model_up_to_their_rounding(
    case, dtype, batch
):
    changes, layout = STEPS[case]
    check_fused_step(small_model(dtype, **changes), batch, layout)


def check_fused_step(model: Mamba, batch: int, layout) -> None:
    """Three tokens, from a state that is not zero: their logits, and each state that follows."""
    for parameter in model.parameters():
        parameter.data = inside_nan(parameter.data)
    assert triton_scan.can_fuse(model)
    exact, dtype = copy.deepcopy(model).double(), model.lm_head.weight.dtype
    start = random_state(model, batch)
    state, around = layout(start)
    expected_state = start.map(Tensor.double)
    for i, token_ids in enumerate(random_ids(model, 3, batch)):
        with poisoned():
            logits = triton_scan.fused_step(model, token_ids, state)
        expected, expected_state = exact.step(token_ids, expected_state)
        assert logits.dtype == dtype
        for name, *pair in (
            ("logits", logits, expected),
            ("h", state.h, expected_state.h),
            ("conv", state.conv, expected_state.conv),
        ):
            assert_close(f"{name} of token {i}", *pair, TOLERANCES[dtype])
    assert all(tensor.isnan().all() for tensor in around), "the state of another row has changed"


def test_every_layer_has_its_own_state():
    """Nothing of one layer's goes into another's: each of them is that of the layer alone."""
    model, batch = small_model(n_layer=3), 2
    start = random_state(model, batch)
    state, ids = start.map(torch.clone), random_ids(model, batch)
    triton_scan.fused_step(model, ids, state)
    _, expected = model.step(ids, start)
    for i in range(3):
        assert_close(f"h of layer {i}", state[i].h, expected[i].h, 1e-5)
        assert_close(f"conv of layer {i}", state[i].conv, expected[i].conv, 1e-5)


@pytest.mark.parametrize("batch", [1, 6])
def test_a_block_steps_on_with_nothing_between_the_steps(batch):
    """A kernel reads the state before the last one has ended: not if that one writes the state."""
    layer = small_model(rule="mamba").backbone.layers[0]
    inputs = normal(100 if GPU else 3, batch, 8)
    state, expected = (layer.mixer.init_state(batch) for _ in range(2))
    outs = [triton_scan.block_step(layer, u, state.conv, state.h) for u in inputs]
    for u, out in zip(inputs, outs, strict=True):
        wanted, expected = layer(u, expected)
        assert_close("u", out, wanted, 1e-5)
    assert_close("h", state.h, expected.h, 1e-5)
    assert_close("conv", state.conv, expected.conv, 1e-5)


@pytest.mark.parametrize("stream_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("batch", [1, 6])
def test_the_residual_stream_keeps_its_dtype(batch, stream_dtype):
    """And its digits: to a float32 stream a block adds, and rounds no more than its own share."""
    block = (layer := small_model(torch.bfloat16).backbone.layers[0]).mixer
    u = 1000 * torch.randn(batch, 8, generator=torch.Generator().manual_seed(2))
    u = u.to(DEVICE, stream_dtype)
    state = block.init_state(batch)
    out = triton_scan.block_step(layer, u, state.conv, state.h)
    assert out.dtype == stream_dtype
    if stream_dtype == torch.float32:
        expected, _ = copy.deepcopy(layer).double()(u.double(), block.init_state(batch))
        assert_close("u", out, expected, 1e-4)  # rounded to bfloat16 it would be 2e-3


@pytest.mark.parametrize(("in_fp32", "dtype"), [(True, torch.float32), (False, torch.bfloat16)])
def test_the_residual_stream_of_a_model_has_the_dtype_that_it_asks_for(in_fp32, dtype):
    model = small_model(torch.bfloat16, residual_in_fp32=in_fp32, n_layer=2)
    block_step = mock.Mock(wraps=triton_scan.block_step)
    with mock.patch.object(triton_scan, "block_step", block_step):
        triton_scan.fused_step(model, random_ids(model, 1), model.init_state(1))
    assert [call.args[1].dtype for call in block_step.call_args_list] == [dtype, dtype]


@pytest.mark.parametrize("bias", [-30.0, -12.0, 30.0])
def test_delta_has_float32_digits_at_every_size(bias):
    """At -12 Δ is 6e-6, at -30 1e-13: Δ = log(1 + e^dt) would be 0."""
    model = small_model(rule="mamba")
    block = model.backbone.layers[0].mixer
    block.dt_proj.bias.copy_(bias + torch.linspace(-2, 2, 16))
    block.A_log.fill_(-5.0)  # so that a long step does not forget everything
    start = random_state(model, 1)
    start.h.zero_()
    state, ids = start.map(torch.clone), random_ids(model, 1)
    triton_scan.fused_step(model, ids, state)
    _, expected = copy.deepcopy(model).double().step(ids, start.map(Tensor.double))
    assert_close("h", state.h, expected.h, 1e-5)


## ================================================================================================
## Products
## ================================================================================================


def product(x, weight, bias=None, *, norm=None, eps=1e-5, conv=None, residual=None, dtype=None):
    """The judge: linear_step in float64, and the windows after it."""
    x, weight = x[:, : weight.shape[1]].double(), weight.double()
    if norm is not None:
        x = x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * norm.double()
    out = x @ weight.T
    if bias is not None:
        out = out + bias.double()
    window = None
    if conv is not None:
        window, filters, conv_bias = (None if t is None else t.double() for t in conv)
        d_inner = len(filters)
        window = torch.cat([window, out[:, :d_inner, None]], dim=-1)
        pre = (window * filters[:, 0]).sum(-1) + (0 if conv_bias is None else conv_bias)
        out = torch.cat([pre / (1 + torch.exp(-pre)), out[:, d_inner:]], dim=-1)
        window = window[..., 1:]
    return out if residual is None else out + residual.double(), window


def normal(*shape: int, seed: int = 0, dtype=torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed + 1000 * len(shape))
    return torch.randn(shape, generator=generator).to(DEVICE, dtype)


# What vector_tile and matrix_tile choose, and tiles with borders everywhere: rows of the weight,
# rows of x where there are several, columns, and the warps of a vector.
VECTORS = {"the tile that is chosen": None, "8 rows, 8 columns": (8, 8, 4), "whole": (32, 32, 4)}
MATRICES = {"the tile that is chosen": None, "16 rows of x": (16, 16, 16), "32": (32, 32, 32)}
PRODUCTS = [(batch, tile) for batch in (1, 3) for tile in VECTORS.values()]
PRODUCTS += [(5, tile) for tile in MATRICES.values()] + [(19, (16, 16, 16))]


@pytest.fixture
def use_tile(monkeypatch):
    def use(batch: int, tile: tuple | None) -> None:
        if tile is not None:
            name = "vector_tile" if batch <= triton_scan.SMALL_BATCH else "matrix_tile"
            monkeypatch.setattr(triton_scan, name, lambda *sizes: tile)

    return use


@pytest.mark.parametrize(("batch", "tile"), PRODUCTS)
@pytest.mark.parametrize("given", ["", "bias", "residual", "norm", "bias residual norm"])
def test_a_product_is_a_product(batch, tile, given, use_tile):
    use_tile(batch, tile)
    rows, columns = 21, 18
    x, weight = inside_nan(normal(batch, columns)), inside_nan(normal(rows, columns, seed=1))
    options = {
        "bias": inside_nan(normal(rows)),
        "residual": inside_nan(normal(batch, rows, seed=2)),
        "norm": inside_nan(normal(columns, seed=3)),
    }
    options = {name: options[name] for name in given.split()}
    with poisoned():
        actual = triton_scan.linear_step(x, weight, eps=0.1, **options)
    expected, _ = product(x, weight, eps=0.1, **options)
    assert actual.dtype == torch.float32
    assert_close("out", actual, expected, 1e-6)


@pytest.mark.parametrize(
    ("batch", "rows", "columns"), [(1, 1, 1), (3, 5, 7), pytest.param(3, 80, 2560, marks=needs_gpu)]
)
@pytest.mark.parametrize("short", [False, True])
def test_the_first_rung_is_the_product_that_the_fast_kernels_compute(batch, rows, columns, short):
    dtype = torch.bfloat16 if short else torch.float32
    u, norm = inside_nan(normal(batch, columns)), inside_nan(normal(columns, dtype=dtype, seed=3))
    weight = inside_nan(normal(rows, columns, seed=1, dtype=dtype))
    with poisoned():
        first = triton_scan.first_step(u, weight, norm, 0.1)
    assert first.dtype == dtype
    assert_close("first", first, product(u, weight, norm=norm, eps=0.1)[0], 6e-3 if short else 1e-6)
    fast = triton_scan.linear_step(u, weight, norm=norm, eps=0.1)
    assert_close("fast", fast, first, 6e-3 if short else 1e-6)


@pytest.mark.parametrize("batch", [1, 3, 6])
@pytest.mark.parametrize("normed", [False, True])
def test_a_product_is_of_the_first_columns_of_wider_rows(batch, normed):
    """As x_proj reads x, which is the first half of x and z."""
    both = normal(batch, 37)
    both[:, 18:] = math.nan
    norm = normal(18, seed=3) if normed else None
    weight = normal(21, 18, seed=1)
    actual = triton_scan.linear_step(both, weight, norm=norm)
    assert_close("out", actual, product(both, weight, norm=norm)[0], 1e-6)


@pytest.mark.parametrize("columns", [1, 3, 8, 9])
def test_a_product_with_few_columns_is_one_as_well(columns):
    x, weight = inside_nan(normal(2, columns)), inside_nan(normal(21, columns, seed=1))
    assert_close("out", triton_scan.linear_step(x, weight), product(x, weight)[0], 1e-6)


@pytest.mark.parametrize("parts", [2, 3])
@pytest.mark.parametrize("columns", [1, 16, 40, 100])
def test_the_parts_of_a_product_sum_up_to_it(parts, columns):
    """Also where the columns end in the middle of a part, or before it."""
    x, weight = inside_nan(normal(6, columns)), inside_nan(normal(21, columns, seed=1))
    with poisoned():
        actual = triton_scan.linear_step(x, weight, parts=parts)
    assert actual.shape == (parts, 6, 21)
    assert_close("out", actual.sum(0), product(x, weight)[0], 1e-6)


def test_parts_are_refused_where_there_are_none():
    x, weight = normal(6, 9), normal(21, 9)
    for rows, given in ((4, {}), (6, {"bias": normal(21)}), (6, {"residual": normal(6, 21)})):
        with pytest.raises(ValueError, match="parts are for more than 4 sequences"):
            triton_scan.linear_step(x[:rows], weight, parts=2, **given)


@pytest.mark.parametrize("residual", [normal(1, 21), normal(6, 20), normal(21, 6).T])
def test_a_residual_of_another_shape_or_layout_is_refused(residual):
    with pytest.raises(ValueError, match=r"residual must be \(6, 21\) and contiguous"):
        triton_scan.linear_step(normal(6, 9), normal(21, 9), residual=residual)


@pytest.mark.parametrize("batch", [1, 6])
@pytest.mark.parametrize("short", [torch.bfloat16, torch.float16])
def test_a_product_of_short_floats_is_summed_in_float32_and_has_the_dtype_asked_for(batch, short):
    x, weight = normal(batch, 40, dtype=short), normal(5, 40, seed=1, dtype=short)
    expected, _ = product(x, weight)
    actual = triton_scan.linear_step(x, weight, dtype=torch.float32)
    assert actual.dtype == torch.float32
    assert_close("out", actual, expected, 5e-6)
    actual = triton_scan.linear_step(x, weight)
    assert actual.dtype == short
    assert_close("out", actual, expected, 6e-3 if short == torch.bfloat16 else 1e-3)


@pytest.mark.parametrize(("batch", "tile"), PRODUCTS)
@pytest.mark.parametrize(("W", "biased"), [(1, True), (2, False), (3, True), (4, True)])
def test_the_first_half_of_the_rows_goes_through_the_convolution(batch, tile, W, biased, use_tile):
    """The border between the halves is inside a tile, and the window moves on by one."""
    use_tile(batch, tile)
    d_inner, columns = 11, 7
    x, weight = normal(batch, columns), normal(2 * d_inner, columns, seed=1)
    filters, conv_bias = normal(d_inner, 1, W), normal(d_inner) if biased else None
    bias = None if biased else normal(2 * d_inner)
    start = normal(batch, d_inner, W - 1)
    expected, expected_window = product(x, weight, bias, conv=(start, filters, conv_bias))
    for order in ((0, 1, 2), (2, 0, 1)):
        stored = inside_nan(start.permute(order))
        window = stored.permute([order.index(axis) for axis in range(3)])
        with poisoned():
            actual = triton_scan.linear_step(x, weight, bias, conv=(window, filters, conv_bias))
        assert_close("out", actual, expected, 2e-6)
        assert_close("window", window, expected_window, 1e-6)
        beside = stored._base[[0, -1]]
        assert beside.isnan().all(), "something beside the windows has changed"


@pytest.mark.parametrize("columns", [1, 7, 16, 33])
@pytest.mark.parametrize("dtypes", [(torch.float32,) * 2, (torch.float32, torch.bfloat16)])
def test_a_norm_is_rms_norm_in_the_dtype_of_its_weight(columns, dtypes):
    u = inside_nan(normal(3, columns, dtype=dtypes[0]))
    weight = inside_nan(normal(columns, dtype=dtypes[1]))
    with poisoned():
        actual = triton_scan.norm_step(u, weight, 0.1)
    assert actual.dtype == dtypes[1]
    rms = (u.double().square().mean(-1, keepdim=True) + 0.1).sqrt()
    tolerance = 1e-6 if dtypes[1] == torch.float32 else 6e-3
    assert_close("norm", actual, u.double() / rms * weight.double(), tolerance)


def is_power_of_2(number: int) -> bool:
    return number >= 1 and number & (number - 1) == 0


@pytest.mark.parametrize("processors", [1, 132])
def test_tiles_are_powers_of_two_within_what_a_processor_has(processors, monkeypatch):
    monkeypatch.setattr(triton_scan, "PROCESSORS", processors)
    for rows in (1, 3, 16, 48, 80, 264, 768, 1536, 3072, 5120, 50280, 128256):
        for columns in (1, 5, 16, 17, 48, 160, 768, 1536, 2048, 2560, 5120, 10240):
            for batch in (1, 2, 3, 4):
                tile = triton_scan.vector_tile(rows, columns, batch)
                case, (ROWS, BLOCK, warps) = f"{tile} for {rows, columns, batch}", tile
                assert all(map(is_power_of_2, tile)), case
                assert ROWS <= 16 and 8 <= BLOCK < 2 * max(columns, 8), case
                assert ROWS * BLOCK <= 64 * 32 * warps, f"{case}: more than the registers hold"
            for batch in (5, 6, 16, 17, 63, 64, 65, 256, 1000):
                for size, epilogue in ((2, True), (4, True), (2, False), (4, False)):
                    tile = triton_scan.matrix_tile(rows, columns, batch, size, epilogue)
                    case = f"{tile} for {rows, columns, batch, size, epilogue}"
                    ROWS, BATCH, BLOCK = tile
                    assert all(map(is_power_of_2, tile)), case
                    assert BLOCK < 2 * max(columns, 16), f"{case}: columns that are not there"
                    assert min(tile) >= 16, f"{case}: tensor cores want 16"
                    assert ROWS * BATCH <= (2048 if epilogue else 4096), case
                    shared = 4 * (ROWS + BATCH) * BLOCK * size  # four stages
                    assert shared <= 227 * 1024, f"{case}: {shared} bytes"


## ================================================================================================
## What can be fused
## ================================================================================================


@pytest.mark.parametrize(
    "changes", [{}, {"rule": "dirac"}, {"scan": "triton"}, {"d_state": 256}, {"d_conv": 9}]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_rules_and_dtypes_that_the_kernels_have_are_fused(changes, dtype):
    assert triton_scan.can_fuse(small_model(dtype, **changes)) is True


@pytest.mark.parametrize(
    "changes",
    [
        *({"rule": rule} for rule in ("zoh", "bilinear")),
        *({"scan": scan} for scan in ("sequential", "chunked")),
        {"d_state": 257},
        {"dtype": torch.float64},
    ],
    ids=str,
)
def test_rules_dtypes_and_sizes_that_the_kernels_have_not_are_not_fused(changes):
    assert triton_scan.can_fuse(small_model(**changes)) is False


def test_weights_of_two_dtypes_are_not_fused():
    """Neither a model whose norms and A are in float32, as some train, nor one odd matrix."""
    model = small_model(torch.bfloat16)
    model.backbone.layers[0].mixer.A_log.data = model.backbone.layers[0].mixer.A_log.data.float()
    assert triton_scan.can_fuse(model) is False
    model = small_model()
    model.lm_head.to(torch.bfloat16)
    assert triton_scan.can_fuse(model) is False


def test_a_weight_with_other_strides_is_not_fused():
    model = small_model()
    weight = model.backbone.layers[0].mixer.out_proj.weight
    weight.data = weight.data.T.contiguous().T
    assert triton_scan.can_fuse(model) is False


## ================================================================================================
## The graphs of a model
## ================================================================================================


class StandIn(triton_scan.StepGraph if triton_scan else object):
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
    return references


class PlainStep:
    """The judge: what `step_graph` yields, with `Mamba.step` and its states."""

    def __init__(self, model: Mamba, state: MambaState) -> None:
        self.model, self.now = model, state

    def __call__(self, token_ids: Tensor) -> Tensor:
        logits, self.now = self.model.step(token_ids, self.now)
        return logits

    def state(self) -> MambaState:
        return self.now


def read(model: Mamba, ids: Tensor) -> tuple[Tensor, MambaState]:
    """The logits (b, vocab_size) after a prompt, and the state."""
    logits, state = model(ids, model.init_state(len(ids)))
    return logits[:, -1], state


def go_on(step, logits: Tensor, new: int = 6) -> Tensor:
    """The logits (b, new, vocab_size) of that many tokens, each the most probable one."""
    every = []
    for _ in range(new):
        logits = step(logits.argmax(-1))
        every.append(logits.clone())
    return torch.stack(every, dim=1)


def recorded(model: Mamba, ids: Tensor, new: int = 6) -> Tensor:
    logits, state = read(model, ids)
    with triton_scan.step_graph(model, state) as step:
        return go_on(step, logits, new)


def plain(model: Mamba, ids: Tensor, new: int = 6) -> Tensor:
    logits, state = read(model, ids)
    return go_on(PlainStep(model, state), logits, new)


def assert_right(model: Mamba, ids: Tensor) -> None:
    assert torch.equal(recorded(model, ids), plain(model, ids))


# zoh: the operators of `step` itself are recorded, so a graph gives its numbers to the bit.
def recorded_model(**changes) -> Mamba:
    return small_model(**{"rule": "zoh", "n_layer": 2, **changes})


def test_a_graph_starts_from_the_state_that_it_is_given_and_leaves_it_as_it_is(made):
    """And keeps nothing of the generations before, of other prompts with other lengths."""
    model = recorded_model()
    for length in (1, 9, 4, 9):
        ids = random_ids(model, 2, length, seed=length)
        logits, state = read(model, ids)
        before = state.map(torch.clone)
        with triton_scan.step_graph(model, state) as step:
            actual = go_on(step, logits)
        assert torch.equal(actual, go_on(PlainStep(model, before), logits))
        assert torch.equal(state.h, before.h) and torch.equal(state.conv, before.conv)
    assert len(made) == 1


@pytest.mark.parametrize("rule", ["zoh", "mamba"])
def test_the_state_after_any_token_can_be_had_as_a_copy(rule, made):
    """Before the first token it is the one that was given."""
    model = small_model(rule=rule, n_layer=2)
    _, start = read(model, random_ids(model, 2, 3))
    judge, states = PlainStep(model, start), []
    with triton_scan.step_graph(model, start) as step:
        for token_ids in random_ids(model, 3, 2):
            states.append((step.state(), judge.state()))
            step(token_ids), judge(token_ids)
        states.append((step.state(), judge.state()))
    assert states[0][0] is not start
    for i, (actual, expected) in enumerate(states):
        assert type(actual) is MambaState
        assert_close(f"h after {i} tokens", actual.h, expected.h, 1e-5)
        assert_close(f"conv after {i} tokens", actual.conv, expected.conv, 1e-5)
        assert actual.conv.is_contiguous() and actual.h.is_contiguous()


def test_a_step_ends_with_its_context(made):
    """Another generation may be using its graph by then."""
    model = recorded_model()
    logits, state = read(model, random_ids(model, 2, 3))
    with triton_scan.step_graph(model, state) as step:
        go_on(step, logits)
    for use in (lambda: step(logits.argmax(-1)), step.state):
        with pytest.raises(RuntimeError, match="has ended"):
            use()


@pytest.mark.parametrize("shape", [(1,), (3,), (2, 1), ()])
def test_ids_for_another_number_of_rows_are_refused(shape, made):
    model = recorded_model()
    with triton_scan.step_graph(model, model.init_state(2)) as step:
        with pytest.raises(ValueError, match=r"need token ids \(2,\), got \("):
            step(random_ids(model, *shape))
    assert made == []


def test_a_state_of_another_model_is_refused(made):
    """Also one that would fit if it were repeated for every layer."""
    model = recorded_model()
    state = model.init_state(2)
    for other in (state.map(lambda t: t[:1]), state.map(lambda t: t[:, :, :-1])):
        with triton_scan.step_graph(model, other) as step:
            with pytest.raises(ValueError, match=r"need a state \(2, 2, 16, .\), got \(.*\)"):
                step(random_ids(model, 2))
    assert_right(model, random_ids(model, 2, 3))


def test_interleaved_generations_with_one_model_have_a_graph_each(made):
    model = recorded_model()
    prompts = [random_ids(model, 2, 4, seed=seed) for seed in range(3)]
    expected = [plain(model, prompt) for prompt in prompts]
    assert not torch.equal(expected[0], expected[1])
    recorded(model, prompts[2])  # leaves a graph, which one of the two will take
    (first, state), (second, other_state) = (read(model, prompt) for prompt in prompts[:2])
    pairs = []
    with (
        triton_scan.step_graph(model, state) as step,
        triton_scan.step_graph(model, other_state) as other_step,
    ):
        for _ in range(6):
            first = step(first.argmax(-1))
            second = other_step(second.argmax(-1))
            pairs.append((first.clone(), second.clone()))
    assert len(made) == 2
    for actual, right in zip(zip(*pairs, strict=True), expected[:2], strict=True):
        assert torch.equal(torch.stack(actual, dim=1), right)
    assert torch.equal(recorded(model, prompts[2]), expected[2])
    assert len(made) == 2


def test_two_models_do_not_share_graphs(made):
    first, second = recorded_model(), recorded_model()
    second.lm_head.weight.neg_()
    ids = random_ids(first, 1, 4)
    for model in (first, second, first, second):
        assert_right(model, ids)
    assert len(made) == 2


def with_another_matrix(model: Mamba) -> None:
    weight = model.lm_head.weight
    model.lm_head.weight = nn.Parameter(-weight)


def with_other_numbers(model: Mamba) -> None:
    """A parameter stays what it is, and its numbers lie elsewhere."""
    model.backbone.norm_f.weight.data = -model.backbone.norm_f.weight.data


def with_all_weights_in_float16(model: Mamba) -> None:
    model.half().lm_head.weight.neg_()


def with_another_rule(model: Mamba) -> None:
    model.config.rule = "bilinear"


def with_the_same_numbers_in_another_order(model: Mamba) -> None:
    """At the same address."""
    embedding = model.backbone.embedding.weight
    embedding.data = embedding.data.view(embedding.shape[::-1]).T


MOVED = (
    with_another_matrix, with_other_numbers, with_all_weights_in_float16, with_another_rule,
    with_the_same_numbers_in_another_order,
)  # fmt: skip


@pytest.mark.parametrize("change", MOVED)
def test_a_model_that_is_no_longer_the_one_recorded_gets_a_new_graph(change, made):
    model = recorded_model()
    ids = random_ids(model, 2, 4)
    recorded(model, ids)
    change(model)
    assert_right(model, ids)
    assert len(made) == 2


def test_another_dtype_at_the_same_address_is_another_model(made):
    """model.float().half() may put its last numbers where those of bfloat16 were at first."""
    model = recorded_model(dtype=torch.bfloat16)
    ids = random_ids(model, 2, 4)
    recorded(model, ids)
    for parameter in model.parameters():
        numbers, parameter.data = parameter.data, parameter.data.view(torch.float16)
        parameter.data.copy_(numbers.clone())
    assert_right(model, ids)


def test_another_batch_size_gets_another_graph(made):
    model = recorded_model()
    for count, batch in enumerate((1, 3, 2, 1), start=1):
        assert_right(model, random_ids(model, batch, 4))
        assert len(made) == count


def test_a_graph_that_is_not_used_again_is_given_up(made):
    model = recorded_model()
    for batch in (1, 2):
        recorded(model, random_ids(model, batch, 4))
    gc.collect()
    assert [reference() is None for reference in made] == [True, False]


def test_without_a_token_no_graph_is_made_and_the_last_one_stays_where_it_is(made):
    """Who wants no more than the token after a prompt waits for no recording."""
    model = recorded_model()
    ids = random_ids(model, 1, 4)
    for new, count in ((0, 0), (2, 1), (0, 1), (2, 1)):
        with triton_scan.step_graph(model, model.init_state(1)) as step:
            for token_ids in ids[0, :new]:
                step(token_ids[None])
        assert len(made) == count


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt, GeneratorExit])
def test_a_generation_that_is_left_gives_its_graph_back(error, made):
    model = recorded_model()
    ids = random_ids(model, 2, 4)
    logits, state = read(model, ids)
    with pytest.raises(error), triton_scan.step_graph(model, state) as step:
        go_on(step, logits, 3)
        raise error
    assert len(made) == 1
    assert_right(model, ids)
    assert len(made) == 1


@pytest.mark.parametrize("batch", [1, 2])
def test_after_a_graph_that_could_not_be_made_the_next_generation_makes_its_own(
    batch, made, monkeypatch
):
    """The GPU has no memory left: what was recorded for another model or batch is not the thing."""
    model = recorded_model()
    recorded(model, random_ids(model, 1, 4))
    with_another_matrix(model)
    ids = random_ids(model, batch, 4)
    with monkeypatch.context() as patch:
        full = mock.Mock(side_effect=MemoryError("full"))
        patch.setattr(triton_scan.StepGraph, "__init__", full)
        with pytest.raises(MemoryError, match="full"):
            recorded(model, ids)
    assert_right(model, ids)


def test_a_graph_made_in_inference_mode_can_be_used_outside_and_the_reverse(made):
    model = recorded_model()
    ids = random_ids(model, 2, 4)
    for inference in (True, False, True):
        with torch.inference_mode(inference), torch.no_grad():
            assert_right(model, ids)


def test_a_model_that_is_gone_takes_its_graph_along(made):
    model = recorded_model()
    recorded(model, random_ids(model, 1, 4))
    assert made[0]() is not None, "the graph is kept for the next generation"
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None, "something keeps the model"
    assert made[0]() is None, "something keeps its graph"


def test_a_change_of_the_weights_in_place_counts_from_the_next_token(made):
    model = recorded_model()
    ids = random_ids(model, 2, 4)
    unchanged = recorded(model, ids, 8)
    every = []
    logits, state = read(model, ids)
    with triton_scan.step_graph(model, state) as step:
        for step_or_judge in (step, PlainStep(model, state)):
            before = go_on(step_or_judge, logits, 4)
            model.lm_head.weight.neg_()
            after = go_on(step_or_judge, before[:, -1], 4)
            model.lm_head.weight.neg_()
            every.append(torch.cat([before, after], dim=1))
    assert len(made) == 1
    assert torch.equal(*every)
    assert torch.equal(every[0][:, :4], unchanged[:, :4])
    assert not torch.equal(every[0][:, 4:], unchanged[:, 4:])


## ================================================================================================
## Graphs of the fused step
## ================================================================================================


def large_model(dtype=torch.float32, **changes) -> Mamba:
    """On a GPU: in both kinds of products there are several tiles, and borders inside them."""
    if not GPU:
        return small_model(dtype, **changes)
    sizes = {"d_model": 328, "n_layer": 2, "vocab_size": 5003, "d_state": 16, "dt_rank": 21}
    return small_model(dtype, **{**sizes, **changes})


@pytest.mark.parametrize(
    ("batch", "rule"),
    [
        (1, "mamba"),
        (5, "dirac"),
        *(pytest.param(b, "mamba", marks=needs_gpu) for b in (3, 5, 64)),
        *(pytest.param(b, "zoh", marks=needs_gpu) for b in (1, 3, 5, 64)),
    ],
)
def test_the_most_probable_tokens_are_those_of_the_step(batch, rule, made):
    model = large_model(rule=rule)
    ids, new = random_ids(model, batch, 7), 20 if GPU else 4
    actual, expected = recorded(model, ids, new), plain(model, ids, new)
    assert torch.equal(actual.argmax(-1), expected.argmax(-1))
    if rule == "zoh":
        assert torch.equal(actual, expected), "recorded operators differ from those unrecorded"
    assert len(made) == 1


@pytest.mark.parametrize(
    ("batch", "dtype"),
    [
        (3, torch.bfloat16),
        *(pytest.param(b, torch.bfloat16, marks=needs_gpu) for b in (1, 4, 5, 64, 256)),
        *(pytest.param(b, torch.float32, marks=needs_gpu) for b in (1, 4, 5, 64, 256)),
    ],
)
def test_logits_of_a_given_text_are_those_of_the_step(batch, dtype, made):
    """Over many tokens, so that an error of the state would grow."""
    model = large_model(dtype)
    text = random_ids(model, batch, 25 if GPU else 6)
    state = model.init_state(batch)
    _, state = model(text[:, :5], state)
    graph = triton_scan.StepGraph(model, batch)
    graph.load(state)
    for i, token_ids in enumerate(text[:, 5:].unbind(1)):
        expected, state = model.step(token_ids, state)
        actual = graph(token_ids)
        assert_close(f"logits of token {i}", actual, expected, TOLERANCES[dtype])
    assert_close("h", graph.state.h, state.h, TOLERANCES[dtype])
    assert_close("conv", graph.state.conv, state.conv, TOLERANCES[dtype])


@needs_gpu
@pytest.mark.parametrize("batch", [2, 6])
def test_a_change_of_any_weight_in_place_counts_in_a_fused_step(batch, made):
    model = large_model()
    state, ids = random_state(model, batch), random_ids(model, batch)
    graph = triton_scan.StepGraph(model, batch)
    for name, parameter in model.named_parameters():
        graph.load(state)
        before = graph(ids).clone()
        parameter.mul_(1.5)
        graph.load(state)
        after = graph(ids)
        expected, _ = model.step(ids, state)
        assert_close(f"logits after a change of {name}", after, expected, 1e-5)
        assert not torch.equal(after, before), f"{name} changes nothing"


@needs_gpu
def test_interleaved_generations_by_fused_steps_are_those_of_the_step(made):
    model = large_model(d_model=64, vocab_size=100)
    prompts = [random_ids(model, batch, 4, seed=seed) for seed, batch in enumerate((1, 1, 6))]
    expected = [plain(model, prompt, 12) for prompt in prompts]
    starts = [read(model, prompt) for prompt in prompts]
    every = [[] for _ in prompts]
    with contextlib.ExitStack() as stack:
        steps = [stack.enter_context(triton_scan.step_graph(model, s)) for _, s in starts]
        logits = [logits for logits, _ in starts]
        for _ in range(12):
            for i, step in enumerate(steps):
                logits[i] = step(logits[i].argmax(-1))
                every[i].append(logits[i].argmax(-1))
    for tokens, right in zip(every, expected, strict=True):
        assert torch.equal(torch.stack(tokens, dim=1), right.argmax(-1))
    assert len(made) == 3


@needs_gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_model_on_a_gpu_that_is_not_the_current_one_is_recorded_there(made):
    for rule in ("mamba", "zoh"):
        model = large_model(d_model=64, vocab_size=100, rule=rule).to("cuda:1")
        ids = random_ids(model, 3, 5).to("cuda:1")
        assert torch.equal(recorded(model, ids).argmax(-1), plain(model, ids).argmax(-1))
    assert len(made) == 2
