"""Token after token on a GPU: the kernels of a step in triton_scan.py, and the step recorded.

The judge is `Mamba.step`: of the kernels on the same numbers in float64; of the graphs token after
token, where the logits have to be equal. Without a GPU the kernels run in Triton's interpreter (see
test_triton_scan.py), and a stand-in takes the place of a recorded graph.
"""

from __future__ import annotations

import copy
import gc
import itertools
import math
import re
import types
import weakref
from unittest import mock

import pytest
import torch
import triton
import triton.language as tl
from test_sampler import judge
from test_triton_scan import GPU, assert_rounded, needs_gpu, poisoned, sized, small_model
from torch import Tensor

import generate
import triton_scan
from mamba import Mamba, MambaState
from test_mamba import assert_close, error_of

pytestmark = pytest.mark.gpu
DEVICE = "cuda" if GPU else "cpu"
F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64


@pytest.fixture(autouse=True)
def few_programs(monkeypatch):
    """Each costs 6 ms in the interpreter. For a single processor tiles are large, programs few."""
    if not GPU:
        monkeypatch.setattr(triton_scan, "PROCESSORS", 1)
    with torch.no_grad():
        yield


def random_ids(model: Mamba, *shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(model.config.vocab_size, shape, generator=generator).to(DEVICE)


def random_state(model: Mamba, batch: int) -> MambaState:
    generator = torch.Generator().manual_seed(1)
    return model.init_state(batch).map(lambda t: t.copy_(torch.randn(t.shape, generator=generator)))


def inside_nan(tensor: Tensor) -> Tensor:
    """The same numbers as some rows of a tensor that is NaN everywhere else."""
    around = tensor.new_full((len(tensor) + 2, *tensor.shape[1:]), math.nan)
    return around[1:-1].copy_(tensor)


def normal(*shape: int, seed: int = 0, dtype=torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed + 1000 * len(shape))
    return torch.randn(shape, generator=generator).to(DEVICE, dtype)


def among_others(state: MambaState) -> tuple[MambaState, tuple[Tensor, Tensor]]:
    """The state as rows of a batch that is NaN, stored as in a recorded step; and that batch."""
    layers, batch, d_inner, width = state.conv.shape
    conv = state.conv.new_full((layers, width, batch + 2, d_inner), math.nan).permute(0, 2, 3, 1)
    h = state.h.new_full((layers, batch + 2, *state.h.shape[2:]), math.nan)
    rows = MambaState(conv[:, 1:-1], h[:, 1:-1])
    rows.conv.copy_(state.conv)
    rows.h.copy_(state.h)
    return rows, (conv, h)


ODD = {"d_model": 9, "n_layer": 2, "d_state": 5, "dt_rank": 3, "vocab_size": 11,
       "pad_vocab_size_multiple": 1}  # fmt: skip
SHORT = {"dtype": F16, "residual_in_fp32": False, "tie_embeddings": True, "d_conv": 2}
# Up to five rows are multiplied one by one, more are a matrix for the tensor cores.
STEPS = [
    *((ODD, batch) for batch in (3, 6)),
    ({"rule": "dirac", "bias": True, "conv_bias": False}, 2),
    ({"bias": True, "d_state": 1, "dt_rank": 1, "expand": 1, "d_conv": 1, "norm_eps": 1.0}, 6),
    *((SHORT, batch) for batch in (1, 6)),
    *(({**ODD, "dtype": BF16}, batch) for batch in (1, 6)),
]


@pytest.mark.parametrize(("changes", "batch"), STEPS)
def test_a_fused_step_is_the_step_of_the_model(changes, batch):
    """Two tokens, from a state that is not zero. In short floats it is hardly further from exact
    numbers than the step (but the interpreter cuts off where others round to bfloat16)."""
    model = small_model(**changes)
    for parameter in model.parameters():
        parameter.data = inside_nan(parameter.data)
    assert triton_scan.can_fuse(model)
    exact, dtype = copy.deepcopy(model).double(), model.lm_head.weight.dtype
    start = random_state(model, batch)
    (state, around), plain_state = among_others(start), start.map(torch.clone)
    exact_state, times = start.map(Tensor.double), 3 if dtype == BF16 and not GPU else 2
    for i, token_ids in enumerate(random_ids(model, 2, batch)):
        with poisoned():
            logits = triton_scan.fused_step(model, token_ids, state)
        plain, plain_state = model.step(token_ids, plain_state)
        expected, exact_state = exact.step(token_ids, exact_state)
        assert logits.dtype == dtype
        for name, actual, other, right in (
            ("logits", logits, plain, expected),
            ("h", state.h, plain_state.h, exact_state.h),
            ("conv", state.conv, plain_state.conv, exact_state.conv),
        ):
            allowed = 1e-6 if dtype == F32 else times * error_of(other, right)
            assert_close(f"{name} of token {i}", actual, right, allowed)
    assert all(t[:, [0, -1]].isnan().all() for t in around), "the state of another row has changed"


def block_step(layer, u: Tensor, state: MambaState, added: Tensor | None = None) -> Tensor:
    """The stream after a block, with what it has left to be added."""
    u, added = triton_scan.block_step(layer, u, state.conv, state.h, added)
    return u if added is None else (u + added.sum(0)).to(u.dtype)


@pytest.mark.parametrize("batch", [1, 6])
def test_a_block_steps_on_with_nothing_between_the_steps(batch):
    """A kernel reads the state before the last one has ended: not if that one writes the state."""
    layer = small_model().backbone.layers[0]
    layer.mixer.dt_proj.bias -= 10  # where log(1 + e^dt) would have lost the digits of Δ and h
    state, expected = (layer.mixer.init_state(batch) for _ in range(2))
    inputs = normal(sized(2, 100), batch, 8)
    outs = [block_step(layer, u, state) for u in inputs]
    for u, out in zip(inputs, outs, strict=True):
        wanted, expected = layer(u, expected)
        assert_close("u", out, wanted, 1e-5)
    assert_close("h", state.h, expected.h, 1e-5)
    added = normal(2, batch, 8, seed=5)  # as a block of many sequences leaves it
    wanted, _ = layer(u + added.sum(0), expected)
    assert_close("u", block_step(layer, u, state, added), wanted, 1e-5)


def test_to_a_float32_stream_a_block_adds_and_rounds_no_more_than_its_own_share():
    model = small_model(BF16)
    layer = model.backbone.layers[0]
    exact = copy.deepcopy(layer).double()
    for batch in (1, 6):
        u, state = model.embed(random_ids(model, batch)) * 1000, model.init_state(batch)[0]
        out = block_step(layer, u, state)
        assert out.dtype == u.dtype == F32
        assert_close("u", out, exact(u.double(), exact.mixer.init_state(batch))[0], 1e-4)
        assert block_step(layer, u.bfloat16(), state).dtype == BF16


def product(x, weight, bias=None, *, norm=None, eps=1e-5, conv=None, residual=None):
    """The judge: vector_step in float64, and the windows after it."""
    x, weight = x[:, : weight.shape[1]].double(), weight.double()
    if norm is not None:
        x = x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * norm
    out, window = x @ weight.T + (0 if bias is None else bias), None
    if conv is not None:
        window, filters, conv_bias = conv
        x, z = out.chunk(2, dim=1)
        window = torch.cat([window, x.unsqueeze(-1)], dim=-1)
        pre = (window * filters[:, 0]).sum(-1) + (0 if conv_bias is None else conv_bias)
        out, window = torch.cat([pre / (1 + torch.exp(-pre)), z], dim=1), window[..., 1:]
    return out + (0 if residual is None else residual), window


def tile_of(ROWS: int, BATCH: int, BLOCK: int, blocks: int, AHEAD: bool) -> dict:
    """As matrix_tile gives it, with so many blocks for a program."""
    tile = {"ROWS": ROWS, "BATCH": BATCH, "BLOCK": BLOCK, "STAGES": 3, "AHEAD": AHEAD}
    return {**tile, "PART": BLOCK * blocks}


ALL = ["bias", "residual", "norm", "conv_bias"]
# The batch; the tile, None for what vector_tile or matrix_tile chooses: rows of the weight, columns
# and warps of a vector, or that of a matrix; columns, W and what else is given.
TILES = [(1, None), (3, (8, 8, 4)), (1, (32, 32, 4)), (6, None),
         (19, tile_of(16, 16, 16, 2, False)), (6, tile_of(32, 32, 16, 2, True))]  # fmt: skip
PRODUCTS = [(*tile, 18, 4, ALL) for tile in TILES]
PRODUCTS += [(1, None, 1, 1, ["conv_bias", "norm"])]
PRODUCTS += [(batch, None, 3, 3, ["residual"]) for batch in (1, 6)]


@pytest.mark.parametrize(("batch", "tile", "columns", "W", "given"), PRODUCTS)
def test_a_product_is_one_with_all_that_goes_with_it(batch, tile, columns, W, given, monkeypatch):
    """Of the first columns of x. The convolution is for the first half of the rows, whose border is
    inside a tile, and its window moves on by one."""
    if tile is not None:
        name = "matrix_tile" if isinstance(tile, dict) else "vector_tile"
        monkeypatch.setattr(triton_scan, name, lambda *sizes: tile)
    many = batch >= 6
    x = inside_nan(normal(batch, columns + 5))
    x[:, columns:] = math.nan
    shapes = {
        "weight": (22, columns), "bias": (22,), "residual": (batch, 22), "norm": (columns,),
        "filters": (11, 1, W), "conv_bias": (11,), "window": (W - 1, batch, 11),
    }  # fmt: skip
    tensors = {name: inside_nan(normal(*shape)) for name, shape in shapes.items()}
    weight, window = tensors["weight"], tensors["window"].permute(1, 2, 0)
    known = {"bias"} if many else {"bias", "residual", "norm"}
    options = {name: tensors[name] for name in known & set(given)}
    conv_bias = tensors["conv_bias"] if "conv_bias" in given else None
    options["conv"] = window, tensors["filters"], conv_bias
    expected, expected_window = product(x, weight, eps=0.1, **options)
    with poisoned():
        if many:
            actual = triton_scan.tile_step(x, weight, **options)
        else:
            actual = triton_scan.vector_step(x, weight, eps=0.1, **options)
    assert actual.dtype == F32
    assert_close("out", actual, expected, 2e-6)
    assert_close("window", window, expected_window, 1e-6)
    assert tensors["window"]._base[[0, -1]].isnan().all(), "something beside it has changed"


def test_the_parts_of_a_product_are_summed_by_the_kernel_that_follows(monkeypatch):
    """Also where the columns end in the middle of a part. The first part has the bias. The norm
    writes the stream with what is added to it, or leaves it as it is."""
    stream, norm, eye = normal(6, 21, seed=2), normal(21, seed=3), torch.eye(21, device=DEVICE)
    for columns, blocks, ahead, count in ((40, 2, False, 2), (40, 1, True, 3), (1, 1, True, 1)):
        x, weight = inside_nan(normal(6, columns)), inside_nan(normal(21, columns, seed=1))
        tile = tile_of(32, 16, 16, blocks, ahead)
        monkeypatch.setattr(triton_scan, "matrix_tile", lambda *sizes, tile=tile: tile)
        with poisoned():
            parts = triton_scan.tile_step(x, weight, norm, split=True)
            total = triton_scan.sum_step(parts)
            after, normed = triton_scan.norm_step(stream, norm, 0.1, parts)
            alone, normed_alone = triton_scan.norm_step(stream, norm, 0.1)
        assert parts.shape == (count, 6, 21) and alone is stream
        expected = product(x, weight, norm)[0]
        # What is normed is the stream as it is kept.
        short, of_short = triton_scan.norm_step(stream.bfloat16(), norm, 0.1, 100 * parts)
        assert short.dtype == torch.bfloat16
        for name, actual, wanted in (
            ("norm of a short stream", of_short, product(short, eye, norm=norm, eps=0.1)[0]),
            ("total", total, expected),
            ("stream", after, stream + expected),
            ("norm", normed, product(stream + expected, eye, norm=norm, eps=0.1)[0]),
            ("norm alone", normed_alone, product(stream, eye, norm=norm, eps=0.1)[0]),
        ):
            assert_close(name, actual, wanted, 1e-6)


def test_a_sum_of_parts_takes_several_programs():
    parts = normal(3, 5, 77)
    assert_close("sum", triton_scan.sum_step(parts), parts.sum(0), 1e-6)


def test_the_first_rung_the_norm_and_a_product_alone_are_rounded_once():
    cases = (1, 1, F32), (1, 40, F16), (3, sized(1030, 2560), F32), (6, 40, BF16)
    for batch, columns, dtype in cases:
        u, norm = normal(batch, columns), normal(columns, dtype=dtype, seed=3)
        weight = normal(5, columns, dtype=dtype, seed=1)
        u, norm, weight = inside_nan(u), inside_nan(norm), inside_nan(weight)
        with poisoned():
            first, sizes = weight.new_empty(batch, 5), {"COLUMNS": columns, "BLOCK": 1024}
            triton_scan.first_step_kernel[(5, batch)](u, weight, norm, first, 5, 0.1, **sizes)
            _, normed = triton_scan.norm_step(u, norm, 0.1)
            linear = triton_scan.vector_step if batch < 6 else triton_scan.tile_step
            out, wide = (linear(u.to(dtype), weight, dtype=d) for d in (None, F32))
        assert first.dtype == normed.dtype == out.dtype == dtype and wide.dtype == F32
        one = torch.eye(columns, device=DEVICE)
        assert_rounded("first", first, product(u, weight, norm=norm, eps=0.1)[0], 2e-6)
        assert_rounded("norm", normed, product(u, one, norm=norm, eps=0.1)[0], 1e-6)
        for actual in (out, wide):
            assert_rounded("out", actual, product(u.to(dtype), weight)[0], 2e-6)


def test_tiles_are_powers_of_two_within_what_a_processor_has(monkeypatch):
    every = (1, 3, 16, 17, 48, 80, 264, 768, 1536, 2560, 5120, 50280)
    kinds = list(itertools.product((6, 16, 17, 64, 65, 1000), (2, 4), (True, False)))
    for processors, rows, columns in itertools.product((1, 132), every, every[:-1]):
        monkeypatch.setattr(triton_scan, "PROCESSORS", processors)
        for batch in (1, 2, 3, 4):
            tile = ROWS, BLOCK, warps = triton_scan.vector_tile(rows, columns, batch)
            assert all(number & (number - 1) == 0 for number in tile), tile
            assert ROWS <= 16 and 8 <= BLOCK < 2 * max(columns, 8), tile
            assert ROWS * BLOCK <= 64 * 32 * warps, f"{tile}: more than the registers hold"
        for batch, size, split in kinds:
            tile = triton_scan.matrix_tile(rows, columns, batch, size, split)
            ROWS, BATCH, BLOCK, PART = (tile[name] for name in ("ROWS", "BATCH", "BLOCK", "PART"))
            assert all(number & (number - 1) == 0 for number in (ROWS, BATCH, BLOCK)), tile
            assert min(ROWS, BATCH, BLOCK) >= 16, f"{tile}: tensor cores want 16"
            assert PART % BLOCK == 0 and (split or PART >= columns), f"{tile}: columns are left out"
            shared = tile["STAGES"] * (ROWS + BATCH) * BLOCK * size
            assert shared <= 227 * 1024, f"{tile}: {shared} bytes shared"
            assert not tile["AHEAD"] or ROWS * BLOCK * size <= 64 * 512, f"{tile}: registers"


@triton.jit
def uniform_kernel(seeds, out, N: tl.constexpr):
    i_b, draws = tl.program_id(0), tl.arange(0, N)
    tl.store(out + i_b * N + draws, tl.rand(tl.load(seeds + i_b), draws))


def draw_until_kept(logits: Tensor, uniform: list[float], options: dict) -> int:
    """The judge of sample_triton for one row, which it sorts: draw, and look whether it is kept."""
    temperature, top_p, min_p = (
        options.get(name, off) for name, off in (("temperature", 1), ("top_p", 1), ("min_p", 0))
    )
    weights = ((logits - logits.max()) / temperature).exp()
    rank = logits.argsort(descending=True, stable=True).argsort()
    left = weights
    for u in uniform:
        reached = (left > 0) & (left.cumsum(0) - left <= u * left.sum())
        token = reached.nonzero().max()
        left = weights * (rank < rank[token])
        if weights[token] >= min_p and not left.sum() >= top_p * weights.sum() > 0:
            return token.item()


SAMPLING = [{}, {"temperature": 0.5}, {"top_p": 0.75}, {"top_p": 0.3, "min_p": 0.4},
            {"temperature": 2.0, "min_p": 0.6, "top_p": 0.9}]  # fmt: skip


@pytest.mark.parametrize("options", SAMPLING, ids=str)
def test_a_token_is_drawn_until_one_is_kept(options):
    """Of a vocabulary that takes several walks, with many equal logits; row by row."""
    rows, vocab = sized((6, 20_000), (64, 50_277))
    logits = (2 * normal(rows, vocab + 3)).bfloat16()[:, :vocab]
    tokens = triton_scan.sample_triton(
        logits, generator=torch.Generator(DEVICE).manual_seed(3), **options
    )
    seeds = torch.randint(
        2**31, (rows,), generator=torch.Generator(DEVICE).manual_seed(3), device=DEVICE
    )
    uniform = normal(rows, 32)
    uniform_kernel[(rows,)](seeds, uniform, 32)
    exact = zip(logits.cpu().double(), uniform.tolist(), strict=True)
    expected = [draw_until_kept(row, numbers, options) for row, numbers in exact]
    # Where a sum in float32 lands on the other side of a border, the neighbour is drawn.
    wrong = sum(a != b for a, b in zip(tokens.tolist(), expected, strict=True))
    assert wrong <= sized(0, 2), (tokens.tolist(), expected)
    assert tokens.dtype == torch.int64


@pytest.mark.parametrize("options", SAMPLING, ids=str)
def test_every_token_is_drawn_as_often_as_by_the_cuts(options):
    """On a GPU that is so for `sample`, which leaves top-k and float64 to PyTorch."""
    logits, rows = torch.tensor([[0.1, 0.4, 0.05, 0.3, 0.15, 0.3]]).log() + 7, sized(60, 200_000)
    calls = [(triton_scan.sample_triton, F32, options)]
    if GPU:
        others = [(BF16, options), (F64, options), (F32, options | {"top_k": 3})]
        calls += [(generate.sample, *other) for other in others]
    for call, dtype, given in calls:
        odds = judge(logits.to(dtype), **given).squeeze(0)
        tokens = call(logits.to(DEVICE, dtype).expand(rows, -1), **given)
        often = torch.bincount(tokens.cpu(), minlength=6) / rows
        assert ((often - odds).abs() <= 4.5 * (odds * (1 - odds) / rows).sqrt()).all(), (
            call,
            often,
        )


def test_logits_that_are_no_numbers_give_a_token_and_edges_the_best():
    nothing, one = math.nan, [-math.inf, 0.0, -math.inf]
    rows = torch.tensor([[nothing] * 3, [0.0, nothing, 1.0], one, [1.0, 3.0, 2.0]], device=DEVICE)
    assert triton_scan.sample_triton(rows)[:3].tolist() in ([0, 0, 1], [0, 2, 1])
    for options in ({"top_p": 1e-40}, {"temperature": 1e-40}, {"min_p": 1}, {"min_p": 1.5}):
        assert triton_scan.sample_triton(rows[2:], **options).tolist() == [1, 1]
    equal = torch.zeros(sized(40, 1000), 4, device=DEVICE)  # before the third are exactly 0.5
    assert triton_scan.sample_triton(equal, top_p=0.5).unique().tolist() == [0, 1]
    for wrong in (rows.double(), rows.mT):
        with pytest.raises(ValueError, match="need rows of float32, bfloat16 or float16, with st"):
            triton_scan.sample_triton(wrong)


def linear(x=None, weight=None, **given):
    x, weight = normal(6, 9) if x is None else x, normal(21, 9) if weight is None else weight
    return triton_scan.vector_step(x, weight, **given)


def block(u=None, h=None, **options):
    layer = small_model().backbone.layers[0]
    state = layer.mixer.init_state(1)
    u, h = normal(1, 8) if u is None else u, state.h if h is None else h
    return triton_scan.block_step(layer, u, state.conv, h, **options)


RESIDUAL, ROWS = "residual must be (6, 21) and contiguous", "need x (b, 9 or more) in rows"
WRONG = [
    (
        lambda: triton_scan.tile_step(*[normal(6, 6)] * 2, conv=(normal(6, 3, 3),), split=True),
        "it cannot be split",
    ),
    (lambda: linear(residual=normal(6, 20)), RESIDUAL),
    (lambda: linear(residual=normal(21, 6).T), RESIDUAL),
    (lambda: linear(normal(6, 8)), ROWS),
    (lambda: linear(normal(9, 6).T), ROWS),
    (lambda: linear(weight=normal(9, 21).T), ROWS),
    (lambda: block(u=normal(1, 16)[:, ::2]), "the weights must be contiguous"),
    (lambda: block(h=normal(1, 4, 16).mT), "the weights must be contiguous"),
    (lambda: block(rule="zoh"), "got 'zoh'"),
    (
        lambda: linear(weight=normal(8, 9), conv=(normal(2, 4, 3), normal(4, 1, 4), None)),
        "need windows (6, 4, 3) and filters (4, 1, 4)",
    ),
    (lambda: triton_scan.norm_step(normal(9, 6).T, normal(9), 0.1), "need u (b, columns), contig"),
    (lambda: triton_scan.norm_step(normal(6, 9), normal(9), 0.1, normal(6, 9)), "and added (parts"),
    (lambda: block(u=normal(2, 8)), "need h (2, 16, 4)"),
]


def test_a_call_that_cannot_be_right_says_what_is_wrong():
    for call, words in WRONG:
        with pytest.raises(ValueError, match=re.escape(words)):
            call()


def with_another_order_at_the_same_address(model: Mamba) -> None:
    embedding = model.backbone.embedding.weight
    embedding.data = embedding.data.view(embedding.shape[::-1]).T


FUSED = [{"dtype": dtype} for dtype in (F32, BF16, F16)]
FUSED += [{"rule": "dirac", "scan": "triton", "d_state": 256, "d_conv": 9}]
NOT_FUSED = [{"d_state": 257}, {"dtype": F64}, *({"rule": rule} for rule in ("zoh", "bilinear"))]
NOT_FUSED += [{"scan": scan} for scan in ("sequential", "chunked")]
CHANGES = [lambda model: model.backbone.layers.float(), lambda model: model.lm_head.float()]


def test_a_model_is_fused_if_the_kernels_have_all_of_it():
    for changes in FUSED + NOT_FUSED:
        assert triton_scan.can_fuse(small_model(**changes)) is (changes in FUSED), changes
    for change in (*CHANGES, with_another_order_at_the_same_address):
        model = small_model(BF16)
        change(model)
        assert not triton_scan.can_fuse(model)


class StandIn(triton_scan.StepGraph):
    """Without a GPU: what would be replayed is computed, with the parameters and the buffers that
    there were when it was made: a graph knows addresses, and not the model."""

    def __init__(self, model: Mamba, batch: int) -> None:
        nothing = mock.MagicMock()  # also as a context
        names = ("CUDAGraph", "Stream", "current_stream", "device", "stream", "graph")
        with mock.patch.multiple(torch.cuda, **dict.fromkeys(names, nothing)):
            super().__init__(model, batch)
        with torch.inference_mode(False), torch.no_grad():
            recorded = copy.deepcopy(model)
            for ours, theirs in zip(recorded.parameters(), model.parameters(), strict=True):
                ours.data = theirs.data
        buffers, logits = copy.copy(self), self.logits
        buffers.state = copy.copy(self.state)
        self.graph = types.SimpleNamespace(replay=lambda: logits.copy_(buffers.run(recorded)))


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


def read(model: Mamba, ids: Tensor) -> tuple[Tensor, MambaState]:
    """The logits (b, vocab_size) after a prompt, and the state."""
    logits, state = model(ids, model.init_state(len(ids)))
    return logits[:, -1], state


def go_on(step, logits: Tensor) -> Tensor:
    """The logits (b, 6, vocab_size) of six tokens, each the most probable one."""
    every = []
    for _ in range(6):
        logits = step(logits.argmax(-1))
        every.append(logits.clone())
    return torch.stack(every, dim=1)


def plain(model: Mamba, ids: Tensor) -> Tensor:
    logits, state = read(model, ids)
    return go_on(PlainStep(model, state), logits)


def recorded(model: Mamba, ids: Tensor) -> Tensor:
    logits, state = read(model, ids)
    with triton_scan.step_graph(model, state) as step:
        return go_on(step, logits)


def assert_right(model: Mamba, *shape: int) -> None:
    ids = random_ids(model, *shape, seed=shape[-1])
    assert torch.equal(recorded(model, ids), plain(model, ids))


# zoh: the operators of `step` itself are recorded, so a graph gives its numbers to the bit.
def recorded_model(**changes) -> Mamba:
    return small_model(**{"rule": "zoh", "n_layer": 2, **changes})


def test_a_graph_is_made_for_each_batch_size_and_keeps_nothing_of_what_it_has_read(made):
    """Of other prompts with other lengths, in inference mode or not."""
    model = recorded_model()
    for batch, length, count in ((2, 1, 1), (2, 9, 1), (2, 4, 1), (1, 4, 2), (3, 4, 3)):
        for inference in (True, False, True):
            with torch.inference_mode(inference), torch.no_grad():
                assert_right(model, batch, length)
        gc.collect()
        assert [graph() is None for graph in made] == [True] * (count - 1) + [False]


def test_ids_or_a_state_of_another_shape_are_refused(made):
    wrong = [(shape, lambda t: t, "token ids (2,), got (") for shape in ((1,), (3,), (2, 1), ())]
    wrong += [((2,), lambda t: t[:1], "a state (2, 2, 16, ")]  # it would fit every layer
    wrong += [((2,), lambda t: t[:, :, :-1], "a state (2, 2, 16, ")]
    for count, (shape, of_state, words) in enumerate(wrong, start=1):
        model = recorded_model()
        with triton_scan.step_graph(model, model.init_state(2).map(of_state)) as step:
            with pytest.raises(ValueError, match=re.escape(f"need {words}")):
                step(random_ids(model, *shape))
        assert_right(model, 2, 3)
        assert len(made) == count


def test_generations_at_the_same_time_have_a_graph_each(made):
    """Those before and after take one that is free."""
    model = recorded_model()
    assert_right(model, 2, 4)
    prompts = [random_ids(model, 2, 4, seed=seed) for seed in (0, 1)]
    right, other_right = (plain(model, prompt) for prompt in prompts)
    (first, state), (second, other_state) = (read(model, prompt) for prompt in prompts)
    graph, other_graph = (triton_scan.step_graph(model, s) for s in (state, other_state))
    with graph as step, other_graph as other_step:
        for i in range(6):
            first, second = step(first.argmax(-1)), other_step(second.argmax(-1))
            assert torch.equal(first, right[:, i]) and torch.equal(second, other_right[:, i])
    assert_right(model, 2, 4)
    assert len(made) == 2


def with_other_numbers(model: Mamba) -> None:
    """A parameter stays what it is, and its numbers lie elsewhere."""
    model.backbone.norm_f.weight.data = -model.backbone.norm_f.weight.data


def with_another_dtype_at_the_same_address(model: Mamba) -> None:
    """model.float().half() may put its last numbers where those of bfloat16 were at first."""
    for parameter in model.parameters():
        numbers, parameter.data = parameter.data, parameter.data.view(F16)
        parameter.data.copy_(numbers.clone())


MOVED = [lambda model: setattr(model.config, "rule", "bilinear"), with_other_numbers]
MOVED += [with_another_order_at_the_same_address, with_another_dtype_at_the_same_address]


@pytest.mark.parametrize("change", MOVED)
def test_a_model_that_is_no_longer_the_one_recorded_gets_a_new_graph(change, made):
    model = recorded_model(dtype=BF16)
    assert_right(model, 1, 4)
    change(model)
    assert_right(model, 1, 4)
    assert len(made) == 2


def test_a_graph_is_made_at_the_first_token_and_given_back_however_a_generation_ends(made):
    """The token after a prompt needs no recording, and takes no graph from the next generation."""
    model = recorded_model()
    ids = random_ids(model, 1, 4)
    logits, state = read(model, ids)
    ends = [(0, KeyError, 0), (2, GeneratorExit, 1), (0, OSError, 1), (3, OSError, 1)]
    for new, error, count in ends:
        with pytest.raises(error), triton_scan.step_graph(model, state) as step:
            for _ in range(new):
                step(logits.argmax(-1))
            raise error
        assert len(made) == count
        for use in (lambda step=step: step(ids[:, 0]), step.state):
            with pytest.raises(RuntimeError, match="has ended"):
                use()
    assert_right(model, 1, 4)
    assert len(made) == 1
    gone = weakref.ref(model)
    del model, step, use
    gc.collect()
    assert gone() is None, "something keeps the model"
    assert made[0]() is None, "something keeps its graph"


@pytest.mark.parametrize(("batch", "rule"), [(2, "zoh"), pytest.param(3, "mamba", marks=needs_gpu)])
def test_a_change_of_any_weight_in_place_counts_from_the_next_token(batch, rule, made):
    model = small_model(rule=rule, n_layer=2)
    ids, state = random_ids(model, batch), random_state(model, batch)
    with triton_scan.step_graph(model, state) as step:
        before, judge = step(ids).clone(), PlainStep(model, state)
        assert_close("logits", before, judge(ids), 1e-6)
        for name, parameter in model.named_parameters():
            parameter.mul_(1.01)
            assert_close(f"logits after a change of {name}", step(ids), judge(ids), 1e-5)
    assert len(made) == 1


def large_model(dtype=torch.float32, **changes) -> Mamba:
    """On a GPU: in both kinds of products there are several tiles, and borders inside them."""
    sizes = {"d_model": 328, "n_layer": 2, "vocab_size": 5003, "d_state": 16, "dt_rank": 21}
    return small_model(dtype, **{**sized({}, sizes), **changes})


TEXTS = [(3, F32, "mamba"), (5, F16, "dirac"), (64, F32, "zoh")]
TEXTS += [pytest.param(batch, BF16, "mamba", marks=needs_gpu) for batch in (1, 64)]


@pytest.mark.parametrize(("batch", "dtype", "rule"), TEXTS)
def test_logits_and_states_of_a_given_text_are_those_of_the_step(batch, dtype, rule, made):
    """Over many tokens, so that an error of the state would grow. The state can be had before and
    after each, as a copy; the one that was given stays as it is."""
    model = large_model(dtype, rule=rule)
    exact, text = copy.deepcopy(model).double(), random_ids(model, batch, sized(4, 25))
    start = random_state(model, batch)
    judge, exact_state = PlainStep(model, start), start.map(Tensor.double)
    before = start.map(torch.clone)
    states = [(start, before, before)]
    with triton_scan.step_graph(model, start) as step:
        for i, token_ids in enumerate(text.unbind(1)):
            states.append((step.state(), judge.now, exact_state))
            right, exact_state = exact.step(token_ids, exact_state)
            logits, other = step(token_ids), judge(token_ids)
            allowed = 1e-5 if dtype == F32 else 2 * error_of(other, right)
            assert_close(f"logits of token {i}", logits, right, allowed)
        states.append((step.state(), judge.now, exact_state))
    for i, after in enumerate(states):
        for name in ("conv", "h"):
            actual, other, right = (getattr(state, name) for state in after)
            assert actual.is_contiguous()
            allowed = 1e-5 if dtype == F32 else 2 * error_of(other, right)
            assert_close(f"{name} of state {i}", actual, right, allowed)
    assert states[1][0].h.data_ptr() != start.h.data_ptr(), "not a copy"


@needs_gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_model_on_a_gpu_that_is_not_the_current_one_is_trained_and_recorded_there(made):
    for rule in ("mamba", "zoh"):
        model = large_model(d_model=64, vocab_size=100, rule=rule).to("cuda:1")
        ids = random_ids(model, 3, 5).to("cuda:1")
        assert torch.equal(recorded(model, ids).argmax(-1), plain(model, ids).argmax(-1))
        with torch.enable_grad():
            model(ids)[0].sum().backward()
        assert all(p.grad.isfinite().all() for p in model.parameters())
    assert len(made) == 2
