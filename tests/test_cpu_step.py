"""Token after token on a CPU: other products, and a step of few operators.

The judge of a product is the product in float64, that of a step is `Mamba.step` on the same numbers
in float64, with twice the room that `Mamba.step` itself needs in the dtype of the weights. When
this step is taken is claimed in test_decoding.py.
"""

import copy
import itertools
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

import generate
from mamba import MambaState
from test_mamba import assert_close, error_of, random_ids, random_model, random_state

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    """Columns of tiny models are cut into several pieces, too."""
    monkeypatch.setattr(generate, "LONGEST_PIECE", 16)


@pytest.fixture(params=[1, 2])
def threads(request):
    torch.set_num_threads(request.param)
    return request.param


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False])
def test_a_product_is_rounded_once_however_its_weight_lies_in_memory(bias, dtype, threads):
    """Also in several threads, and in bfloat16, where a sum of ones alone would end at 256."""
    weights = {f"{rows} rows": torch.randn(rows, 23) for rows in (1, 7, 80, 449)}
    weights |= {
        "columns one after the other": torch.randn(23, 37).T,
        "every second column of a wider one": torch.randn(37, 46)[:, ::2],
        "one row for all": torch.randn(1, 23).expand(37, -1),
        "ones": torch.ones(3, 1000),
    }
    for name, weight in weights.items():
        linear = nn.Linear(*weight.shape[::-1], bias=bias, dtype=dtype)
        linear.weight = nn.Parameter(weight.to(dtype), requires_grad=False)
        x = weight[0] if name == "ones" else torch.randn(2 * weight.shape[1])[::2]
        for worth_threads in (1, 2**18):
            with mock.patch.object(generate, "WORTH_THREADS", worth_threads):
                y = generate.product(linear)(x)
            assert y.dtype == torch.float32
            expected = copy.deepcopy(linear).double()(x.to(dtype).double())
            one_rounding = max(torch.finfo(dtype).eps / 2, 1e-6)
            assert_close(f"{name}, threads from {worth_threads} on", y, expected, one_rounding)


def test_pieces_are_whole_registers_of_16_few_and_as_many_for_each_thread(threads, monkeypatch):
    for longest, rows in itertools.product((16, 40, 448), (1, 15, 16, 17, 448, 449, 897, 2001)):
        monkeypatch.setattr(generate, "LONGEST_PIECE", longest)
        for worth_threads, workers in ((3 * rows, threads), (3 * rows + 1, 1)):
            monkeypatch.setattr(generate, "WORTH_THREADS", worth_threads)
            columns = generate.Bags(torch.randn(rows, 3))
            pieces, length = columns.pieces, columns.table.shape[1]
            assert columns.table.shape == (3 * pieces, length) and columns.table.is_contiguous()
            assert length % 16 == 0 and length < longest + 16, f"pieces of {length}"
            assert pieces % workers == 0 and (pieces - workers) * longest < rows, f"{pieces} pieces"
            assert pieces * (length - 16) < rows <= pieces * length, f"{pieces} of {length}"


## A step of the model -----------------------------------------------------------------------------


def run(step, ids: Tensor, state: MambaState) -> dict[str, Tensor]:
    """The logits of all tokens, and the state after each."""
    found = []
    for token_ids in ids:
        logits, state = step(token_ids, state)
        found.append({"logits": logits, **vars(state)})
    return {name: torch.stack([after[name] for after in found]) for name in found[0]}


STEPS = {
    "no biases": {"bias": False, "conv_bias": False},
    "own head, no window": {"tie_embeddings": False, "d_conv": 1},
    "a window of one": {"d_conv": 2},
    "odd sizes": {"d_model": 9, "d_state": 5, "dt_rank": 3, "expand": 3, "vocab_size": 37},
    "one state, rank one": {"d_state": 1, "dt_rank": 1, "expand": 1},
    "as many low ranks as states": {"d_state": 4, "dt_rank": 4},
    "a stream of short floats": {"residual_in_fp32": False},
    "another eps": {"norm_eps": 1.0},
    "squares too large for float16": {"residual_in_fp32": False},
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", STEPS)
@torch.no_grad()
def test_a_step_by_copies_is_the_step_of_the_model(case, dtype):
    """Five tokens, from a state that is not zero; no state changes once it has been asked for."""
    model = random_model(**STEPS[case]).to(dtype)
    model.backbone.embedding.weight.mul_(50_000 if "too large" in case else 1)
    exact, ids, start = copy.deepcopy(model).double(), random_ids(5, 1), random_state(model, 1)
    before, copies = start.map(torch.clone), generate.CopiedStep(model, start)
    assert not copies.layers, "copied for a stream that is left after its first token"
    found = run(lambda token_ids, _: (copies(token_ids), copies.state()), ids, start)
    plain, expected = run(model.step, ids, start), run(exact.step, ids, start.map(Tensor.double))
    for name, tensor in found.items():
        room = 2 * error_of(plain[name], expected[name]) + torch.finfo(dtype).eps / 2
        assert_close(name, tensor, expected[name], room)
        assert tensor.dtype == (dtype if name == "conv" else torch.float32)
    assert torch.equal(start.conv, before.conv) and torch.equal(start.h, before.h)
    stream = model.embed(ids[0]).squeeze(0)
    with torch.inference_mode():
        assert copies.layers[0](stream).dtype == stream.dtype


@pytest.mark.parametrize("bias", [-30.0, -12.0, 30.0])
def test_delta_has_float32_digits_at_every_size(bias):
    """At -12 Δ is 6e-6, at -30 1e-13: Δ = log(1 + e^dt) would be 0."""
    model = random_model()
    for layer in model.backbone.layers:
        layer.mixer.dt_proj.bias.data = bias + torch.linspace(-2, 2, 32)
        layer.mixer.A_log.data.fill_(-5.0)  # so that a long step does not forget everything
    start, ids = model.init_state(1), random_ids(1, 1)[0]
    step = generate.CopiedStep(model, start)
    step(ids)
    _, expected = copy.deepcopy(model).double().step(ids, start.map(Tensor.double))
    assert_close("h", step.state().h, expected.h, 1e-5)


## Weights that change, and inference mode ---------------------------------------------------------


@torch.no_grad()
def test_weights_that_change_in_the_middle_of_a_stream_are_an_error_and_no_old_text():
    model = random_model()
    parameters = list(model.parameters())
    changes = [*(p.neg_ for p in parameters), torch.inference_mode()(parameters[0].neg_)]
    changes.append(lambda: torch._foreach_neg_(parameters))  # as optimizers do
    for change in changes:
        steps = generate.stream(model, random_ids(1, 4), max_new_tokens=64)
        next(steps), next(steps), next(steps)
        change()
        with pytest.raises(RuntimeError, match="weights changed in the middle"):
            next(steps)


@pytest.mark.parametrize("made_inside", [False, True])
def test_a_stream_may_start_and_go_on_inside_and_outside_of_inference_mode(made_inside):
    """Parameters that are made inside have no version that would tell of a change."""
    with torch.inference_mode(made_inside):
        model, ids = random_model(), random_ids(1, 4)
    tokens = []
    for starts, goes_on in ((False, False), (False, True), (True, False), (True, True)):
        steps = generate.stream(model, ids, temperature=0, max_new_tokens=64)
        with torch.inference_mode(starts):
            begun = [next(steps).item() for _ in range(4)]
        with torch.inference_mode(goes_on):
            tokens.append(begun + [step.item() for step in steps])
    assert tokens == [tokens[0]] * 4
