"""Token after token on a CPU: other products, a step of few operators, and the sampler.

The judge of a product is the product in float64, that of a step is `Mamba.step` on the same
numbers in float64. The judge of a stream is the same stream by `Mamba.step`: the tokens have to be
equal. What may be sampled is judged by sorting all probabilities in float64.

Models are tiny, and so are the pieces that columns are cut into: several of each.
"""

from __future__ import annotations

import copy
import math
import weakref
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

import generate
from mamba import Mamba, MambaConfig, MambaState

# Relative errors of a product, whose result is rounded once, and of a step: a dozen roundings.
OF_A_PRODUCT = {torch.float32: 1e-6, torch.float16: 5e-4, torch.bfloat16: 4e-3}
OF_A_STEP = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


@pytest.fixture
def small_pieces(monkeypatch):
    monkeypatch.setattr(generate, "LONGEST_PIECE", 16)


@pytest.fixture(params=[1, 2])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


## ================================================================================================
## Helpers
## ================================================================================================


def normal(*shape: int, seed: int = 0, dtype=torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed + 1000 * len(shape))
    return torch.randn(shape, generator=generator).to(dtype)


def small_model(dtype=torch.float32, **changes) -> Mamba:
    """No parameter has the value that it starts training with, or one that could be left out."""
    sizes = {"d_model": 8, "vocab_size": 40, "d_state": 4, "dt_rank": 2, "tie_embeddings": False}
    model = Mamba(MambaConfig(**{**sizes, **changes}))
    for seed, (name, parameter) in enumerate(model.named_parameters()):
        values = normal(*parameter.shape, seed=seed)
        if "norm" in name or name.endswith(".D"):
            values = 1 + values / 3
        elif "embedding" not in name and "A_log" not in name and parameter.ndim >= 2:
            values *= 0.7 / math.sqrt(parameter[0].numel())
        parameter.copy_(values)
    return model.to(dtype)


def random_ids(model: Mamba, *shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(model.config.vocab_size, shape, generator=generator)


def random_state(model: Mamba) -> MambaState:
    return model.init_state(1).map(lambda t: t.copy_(normal(*t.shape)))


def assert_close(name: str, actual: Tensor, expected: Tensor, tolerance: float) -> None:
    assert actual.shape == expected.shape, f"{name}: {actual.shape}, expected {expected.shape}"
    actual, expected = actual.double(), expected.double()
    error = (actual - expected).norm() / expected.norm().clamp(min=1e-300)
    assert error <= tolerance, f"{name}: relative error {error:.2e}, allowed {tolerance:.1e}"


## ================================================================================================
## A product
## ================================================================================================


PRODUCTS = [(generate.Parts, torch.float32), *((generate.Bags, dtype) for dtype in OF_A_PRODUCT)]


@pytest.mark.parametrize("worth_threads", [1, 2**18])
@pytest.mark.parametrize(("kind", "dtype"), PRODUCTS)
@pytest.mark.parametrize("rows", [1, 7, 80, 449, 1000])
def test_a_product_by_columns_is_the_product(
    rows, kind, dtype, threads, worth_threads, monkeypatch
):
    monkeypatch.setattr(generate, "WORTH_THREADS", worth_threads)
    weight, x = normal(rows, 23, dtype=dtype), normal(23)
    y = kind(weight)(x)
    assert y.dtype == torch.float32
    assert_close("y", y, weight.double() @ x.to(dtype).double(), OF_A_PRODUCT[dtype])


def test_each_dtype_has_its_product():
    for dtype in OF_A_PRODUCT:
        for bias in (False, True):
            linear = nn.Linear(5, 3, bias=bias, dtype=dtype)
            kind = "Parts" if dtype == torch.float32 else "Bags"
            with mock.patch.object(generate, kind, wraps=getattr(generate, kind)) as spy:
                y = generate.product(linear)(torch.ones(5))
            spy.assert_called_once_with(linear.weight)
            assert_close("y", y, linear.double()(torch.ones(5).double()), OF_A_PRODUCT[dtype])


STORED = {
    "columns one after the other": lambda weight: weight.T.contiguous().T,
    "every second column of a wider one": lambda weight: weight.repeat_interleave(2, 1)[:, ::2],
    "one row for all": lambda weight: weight[:1].expand_as(weight),
}


@pytest.mark.parametrize("kind", [generate.Parts, generate.Bags])
@pytest.mark.parametrize("layout", STORED)
def test_a_weight_may_lie_in_memory_as_it_likes(layout, kind, small_pieces):
    weight, x = STORED[layout](normal(37, 5)), normal(10)[::2]
    assert not weight.is_contiguous()
    assert_close("y", kind(weight)(x), weight.double() @ x.double(), 1e-6)


def test_short_floats_are_summed_in_float32():
    """In bfloat16 the sum of ones would end at 256."""
    ones = torch.ones(3, 1000, dtype=torch.bfloat16)
    assert_close("y", generate.Bags(ones)(ones[0]), torch.full((3,), 1000.0), 4e-3)


@pytest.mark.parametrize("longest", [16, 40, 448])
@pytest.mark.parametrize("rows", [1, 15, 16, 17, 80, 448, 449, 897, 1000, 2001])
def test_pieces_are_as_long_as_they_should_be(rows, longest, threads, monkeypatch):
    """Whole registers of 16, few enough to stay there, as many pieces for each thread."""
    monkeypatch.setattr(generate, "LONGEST_PIECE", longest)
    for worth_threads, workers in ((3 * rows, threads), (3 * rows + 1, 1)):
        monkeypatch.setattr(generate, "WORTH_THREADS", worth_threads)
        columns = generate.Bags(normal(rows, 3))
        pieces, length = columns.pieces, columns.table.shape[1]
        assert columns.table.shape == (3 * pieces, length) and columns.table.is_contiguous()
        assert length % 16 == 0 and length < longest + 16, f"pieces of {length}"
        assert pieces % workers == 0, f"{pieces} pieces for {workers} threads"
        assert (pieces - workers) * longest < rows, f"{pieces} pieces are more than are needed"
        assert pieces * (length - 16) < rows, f"{pieces} pieces of {length} are too long"


## ================================================================================================
## A step of the model
## ================================================================================================

STEPS = {
    "two layers": {"n_layer": 2},
    "biases": {"bias": True, "conv_bias": False},
    "tied": {"tie_embeddings": True},
    "no window": {"d_conv": 1},
    "a window of one": {"d_conv": 2, "bias": True},
    "odd sizes": {"d_model": 9, "d_state": 5, "dt_rank": 3, "expand": 3, "vocab_size": 37},
    "one state, rank one": {"d_state": 1, "dt_rank": 1, "expand": 1},
    "as many low ranks as states": {"d_state": 4, "dt_rank": 4},
    "a stream of short floats": {"residual_in_fp32": False, "tie_embeddings": True, "n_layer": 2},
    "another eps": {"norm_eps": 1.0},
}


@pytest.mark.parametrize("case", STEPS)
def test_a_step_by_layers_is_the_step_of_the_model(case, small_pieces):
    check_step(small_model(**STEPS[case]))


@pytest.mark.parametrize("case", ["two layers", "odd sizes", "a stream of short floats"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_step_by_layers_of_short_floats_is_near_the_step_in_float64(case, dtype, small_pieces):
    check_step(small_model(dtype, **STEPS[case]))


def test_a_step_by_layers_in_several_threads_is_the_step_of_the_model(
    threads, small_pieces, monkeypatch
):
    monkeypatch.setattr(generate, "WORTH_THREADS", 1)
    check_step(small_model(n_layer=2, bias=True))


def check_step(model: Mamba) -> None:
    """Five tokens, from a state that is not zero: their logits, and each state that follows."""
    exact, tolerance = copy.deepcopy(model).double(), OF_A_STEP[model.lm_head.weight.dtype]
    start = random_state(model)
    before, expected_state = start.map(torch.clone), start.map(Tensor.double)
    step = generate.CopiedStep(model, start)
    for i, token_ids in enumerate(random_ids(model, 5, 1)):
        logits = step(token_ids)
        expected, expected_state = exact.step(token_ids, expected_state)
        state = step.state()
        assert logits.dtype == state.h.dtype == torch.float32
        assert state.conv.dtype == start.conv.dtype == model.lm_head.weight.dtype
        for name, *pair in (
            ("logits", logits, expected),
            ("h", state.h, expected_state.h),
            ("conv", state.conv, expected_state.conv),
        ):
            assert_close(f"{name} of token {i}", *pair, tolerance)
    assert torch.equal(start.conv, before.conv) and torch.equal(start.h, before.h)


def test_a_state_that_was_asked_for_stays_what_it_is(small_pieces):
    """And another step can start from it: of the same model, or of one with other weights."""
    model, other = small_model(n_layer=2), small_model(n_layer=2, norm_eps=1.0)
    ids = random_ids(model, 3, 1)
    step = generate.CopiedStep(model, random_state(model))
    step(ids[0])
    state = step.state()
    before = state.map(torch.clone)
    expected, _ = model.step(ids[1], before)
    assert_close("logits", step(ids[1]), expected, 1e-5)
    for follower in (model, other):
        expected, _ = follower.step(ids[2], before)
        logits = generate.CopiedStep(follower, state)(ids[2])
        assert_close("logits of another step", logits, expected, 1e-5)
    assert torch.equal(state.conv, before.conv) and torch.equal(state.h, before.h)


@pytest.mark.parametrize(("in_fp32", "dtype"), [(True, torch.float32), (False, torch.bfloat16)])
def test_the_residual_stream_has_the_dtype_that_the_model_asks_for(in_fp32, dtype):
    model = small_model(torch.bfloat16, residual_in_fp32=in_fp32, n_layer=2)
    seen: list[torch.dtype] = []
    with mock.patch.object(generate.LayerStep, "__call__", lambda _, u: seen.append(u.dtype) or u):
        generate.CopiedStep(model, model.init_state(1))(random_ids(model, 1))
    assert seen == [dtype] * 2


@pytest.mark.parametrize("dtype", OF_A_STEP)
def test_a_stream_whose_squares_are_too_large_for_float16_is_normed(dtype, small_pieces):
    model = small_model(dtype, norm_eps=0.1, residual_in_fp32=False)
    model.backbone.embedding.weight.mul_(1000)
    check_step(model)


@pytest.mark.parametrize("bias", [-30.0, -12.0, 30.0])
def test_delta_has_float32_digits_at_every_size(bias):
    """At -12 Δ is 6e-6, at -30 1e-13: Δ = log(1 + e^dt) would be 0."""
    model = small_model()
    block = model.backbone.layers[0].mixer
    block.dt_proj.bias.copy_(bias + torch.linspace(-2, 2, 16))
    block.A_log.fill_(-5.0)  # so that a long step does not forget everything
    start, ids = random_state(model), random_ids(model, 1)
    start.h.zero_()
    step = generate.CopiedStep(model, start)
    step(ids)
    _, expected = copy.deepcopy(model).double().step(ids, start.map(Tensor.double))
    assert_close("h", step.state().h, expected.h, 1e-5)


## ================================================================================================
## What is decoded by layers
## ================================================================================================


def can_copy(model: Mamba, batch: int = 1, tokens: int = 64) -> bool:
    return generate.worth_copies(model, model.init_state(batch), tokens)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("changes", [{}, {"bias": True, "tie_embeddings": True}])
def test_one_sequence_of_some_length_is(changes, dtype):
    assert can_copy(small_model(dtype, **changes)) is True


@pytest.mark.parametrize("rule", ["zoh", "bilinear", "dirac"])
def test_other_rules_than_that_of_the_published_models_are_not(rule):
    assert can_copy(small_model(rule=rule)) is False


def test_two_sequences_and_short_ones_are_not():
    model = small_model()
    assert can_copy(model, batch=2) is False
    assert can_copy(model, tokens=63) is False


def test_other_dtypes_are_not():
    """Neither float64, whose sums would be float32, nor two at once."""
    assert can_copy(small_model(torch.float64)) is False
    for name in ("lm_head", "backbone.norm_f"):
        model = small_model()
        model.get_submodule(name).to(torch.bfloat16)
        assert can_copy(model) is False


@pytest.mark.parametrize("changes", [{}, {"tie_embeddings": True}])
def test_a_model_that_takes_too_much_memory_is_not(changes, monkeypatch):
    """A matrix that is there twice is copied once."""
    model = small_model(torch.bfloat16, **changes)
    size = 2 * sum(parameter.numel() for parameter in model.parameters())
    for limit, allowed in ((size, True), (size - 1, False)):
        monkeypatch.setattr(generate, "COPY_AT_MOST", limit)
        assert can_copy(model) is allowed


def test_a_model_elsewhere_is_not():
    assert generate.worth_copies(small_model().to("meta"), random_state(small_model()), 64) is False


def test_a_model_with_a_hook_is_not_while_it_has_it():
    model = small_model()
    for module in (model, model.backbone.norm_f, model.backbone.layers[0].mixer.dt_proj):
        for register in (module.register_forward_hook, module.register_forward_pre_hook):
            handle = register(lambda *args: None)
            assert can_copy(model) is False
            handle.remove()
            assert can_copy(model) is True


class Adapter(nn.Linear):
    """What LoRA and its like put in the place of a projection."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x.sum(-1, keepdim=True)


def adapted_model() -> Mamba:
    model = small_model()
    mixer = model.backbone.layers[0].mixer
    adapter = Adapter(8, 32, bias=False)
    adapter.weight, mixer.in_proj = mixer.in_proj.weight, adapter
    return model


def test_a_model_with_an_adapter_is_not():
    assert can_copy(adapted_model()) is False


def test_nothing_is_under_autocast():
    model = small_model()
    with torch.autocast("cpu"):
        assert can_copy(model) is False
    assert can_copy(model) is True


## ================================================================================================
## Streams
## ================================================================================================


@pytest.fixture
def made(monkeypatch, small_pieces) -> list[weakref.ref]:
    """The copies of weights that are made from now on, for streams of three tokens or more."""
    references = []

    class Noted(generate.CopiedStep):
        def __call__(self, token_ids: Tensor) -> Tensor:
            begins = not self.layers
            logits = super().__call__(token_ids)
            if begins:
                references.append(weakref.ref(self.layers[0]))
            return logits

    monkeypatch.setattr(generate, "CopiedStep", Noted)
    monkeypatch.setattr(generate, "COPY_FOR_TOKENS", 3)
    return references


def streamed(model: Mamba, ids: Tensor, new: int = 12, **options) -> list[list[int]]:
    """The ids of each row at each step."""
    options = {"temperature": 0, "max_new_tokens": new, **options}
    return [step.tolist() for step in generate.stream(model, ids, **options)]


def by_step():
    return mock.patch.object(generate, "worth_copies", lambda *arguments: False)


def assert_right(model: Mamba, ids: Tensor, **options) -> None:
    tokens = streamed(model, ids, **options)
    with by_step():
        assert tokens == streamed(model, ids, **options)


def test_a_stream_by_layers_has_the_tokens_of_the_stream_by_step(made):
    model = small_model(n_layer=2)
    ids, mask = random_ids(model, 1, 7), torch.arange(7).unsqueeze(0) >= 3
    for count, options in enumerate(
        (
            {"new": 32},
            {"temperature": 1.0, "seed": 1},
            {"temperature": 0.8, "seed": 2, "repetition_penalty": 1.3, "top_p": 0.9},
            {"temperature": 1.0, "seed": 3, "vocab_size": 39, "eos_token_id": 3, "new": 50},
            {"mask": mask},
        ),
        start=1,
    ):
        assert_right(model, ids.clamp(max=38), **options)
        assert len(made) == count


def test_a_padded_prompt_has_the_continuation_of_its_tokens(made):
    model = small_model()
    ids, mask = random_ids(model, 1, 7), torch.arange(7).unsqueeze(0) >= 3
    assert streamed(model, ids, mask=mask) == streamed(model, ids[:, 3:])


def test_copies_are_made_once_and_only_where_they_pay(made, monkeypatch):
    monkeypatch.setattr(generate, "COPY_FOR_TOKENS", 32)
    model, ids = small_model(), random_ids(small_model(), 2, 4)
    streamed(model, ids[:1], 31)
    streamed(model, ids, 32)
    streamed(adapted_model(), ids[:1], 32)
    streamed(small_model(torch.float64), ids[:1], 32)
    assert len(made) == 0
    streamed(model, ids[:1], 32)
    assert len(made) == 1
    streamed(small_model(torch.bfloat16), ids[:1], 32)
    assert len(made) == 2


def test_no_copies_are_made_for_a_stream_that_is_left_after_its_first_token(made):
    model = small_model()
    steps = generate.stream(model, random_ids(model, 1, 4), max_new_tokens=9)
    next(steps)
    assert made == []
    next(steps)
    assert len(made) == 1


def test_interleaved_streams_of_one_model_do_not_disturb_each_other(made):
    model = small_model(n_layer=2)
    prompts = [random_ids(model, 1, 4, seed=seed) for seed in range(2)]
    with by_step():
        expected = [streamed(model, prompt) for prompt in prompts]
    assert expected[0] != expected[1]
    options = {"temperature": 0, "max_new_tokens": 12}
    both = [generate.stream(model, prompt, **options) for prompt in prompts]
    steps = [[token_ids.tolist() for token_ids in pair] for pair in zip(*both, strict=True)]
    assert [list(tokens) for tokens in zip(*steps, strict=True)] == expected
    assert len(made) == 2


def trained_by(optimizer: type[torch.optim.Optimizer], **options):
    def train(model: Mamba) -> None:
        with torch.enable_grad():
            model(random_ids(model, 1, 6)).square().mean().backward()
        optimizer(model.parameters(), **options).step()

    return train


def negated(model: Mamba) -> None:
    model.lm_head.weight.neg_()


def negated_in_inference_mode(model: Mamba) -> None:
    with torch.inference_mode():
        model.lm_head.weight.neg_()


def loaded(model: Mamba) -> None:
    model.load_state_dict({name: -tensor for name, tensor in model.state_dict().items()})


CHANGES = {
    "a step of SGD": trained_by(torch.optim.SGD, lr=1.0),
    "a step of AdamW": trained_by(torch.optim.AdamW, lr=0.05),
    "a step of AdamW for all tensors at once": trained_by(torch.optim.AdamW, lr=0.05, foreach=True),
    "neg_": negated,
    "neg_ in inference mode": negated_in_inference_mode,
    "load_state_dict": loaded,
}


@pytest.mark.parametrize("change", CHANGES)
def test_weights_that_change_in_the_middle_of_a_stream_are_an_error_and_no_old_text(change, made):
    model = small_model(n_layer=2)
    steps = generate.stream(model, random_ids(model, 1, 4), temperature=0, max_new_tokens=20)
    for _ in range(6):
        next(steps)
    CHANGES[change](model)
    with pytest.raises(RuntimeError, match="weights changed in the middle"):
        next(steps)
    assert len(streamed(model, random_ids(model, 1, 4))) == 12


def test_a_change_of_any_weight_is_noticed():
    model = small_model(n_layer=2, bias=True)
    for name, parameter in model.named_parameters():
        step = generate.CopiedStep(model, model.init_state(1))
        step(random_ids(model, 1))
        parameter.neg_()
        with pytest.raises(RuntimeError, match="weights changed in the middle"):
            step(random_ids(model, 1))
        assert name


def leave_at_the_end(steps) -> None:
    list(steps)


def leave_by_closing(steps) -> None:
    next(steps), next(steps)
    steps.steps.close()


def leave_by_an_error_inside(steps) -> None:
    next(steps), next(steps)
    with pytest.raises(KeyboardInterrupt):
        steps.steps.throw(KeyboardInterrupt)


@pytest.mark.parametrize("leave", [leave_at_the_end, leave_by_closing, leave_by_an_error_inside])
def test_a_stream_that_has_ended_keeps_neither_its_copies_nor_the_model(leave, made):
    """They are as large as the model, so they go at once and not with the next collection."""
    model = small_model()
    steps = generate.stream(model, random_ids(model, 1, 4), max_new_tokens=9)
    leave(steps)
    if leave is not leave_at_the_end:
        del steps
    assert [reference() for reference in made] == [None]
    gone = weakref.ref(model)
    del model
    assert gone() is None, "something keeps the model"


def test_a_model_made_in_inference_mode_streams_inside_and_outside(made):
    """Its parameters have no version that would tell of a change."""
    with torch.inference_mode():
        model = small_model(n_layer=2)
    ids = random_ids(model, 1, 4)
    expected = streamed(small_model(n_layer=2), ids)
    for inference in (True, False):
        with torch.inference_mode(inference), torch.no_grad():
            assert streamed(model, ids) == expected
    assert len(made) == 3


def test_a_stream_that_starts_inside_of_inference_mode_may_go_on_outside(made):
    model = small_model(n_layer=2)
    ids = random_ids(model, 1, 4)
    steps = generate.stream(model, ids, temperature=0, max_new_tokens=12)
    with torch.inference_mode():
        tokens = [next(steps).tolist() for _ in range(4)]
    tokens += [step.tolist() for step in steps]
    assert tokens == streamed(model, ids)


def test_a_stream_that_starts_outside_of_inference_mode_may_go_on_inside(made):
    model = small_model(n_layer=2)
    ids = random_ids(model, 1, 4)
    steps = generate.stream(model, ids, temperature=0, max_new_tokens=12)
    tokens = [next(steps).tolist() for _ in range(4)]
    with torch.inference_mode():
        tokens += [step.tolist() for step in steps]
    assert tokens == streamed(model, ids)


## ================================================================================================
## The sampler
## ================================================================================================

# Of a larger vocabulary on a CPU, top_p first looks at 1024 tokens.
SHORT = 1024


def weights_drawn_from(logits: Tensor, **options) -> Tensor:
    """The weight that `sample` gives to each token, normalised, (batch, vocab) float64."""
    drawn = []

    def all_of_them(weights: Tensor, generator: torch.Generator | None) -> Tensor:
        drawn.append(weights)
        return torch.arange(weights.shape[-1]).expand_as(weights)

    with mock.patch.object(generate, "draw", all_of_them):
        token_ids = generate.sample(logits, **options)
    (weights,) = drawn
    assert all(len(row.unique()) == len(row) for row in token_ids), "a token is there twice"
    found = torch.zeros(logits.shape, dtype=torch.float64)
    return normalized(found.scatter(-1, token_ids, weights.double()))


def normalized(weights: Tensor) -> Tensor:
    return weights / weights.sum(-1, keepdim=True)


def nucleus(probs: Tensor, top_p: float) -> Tensor:
    """The judge: float64 probabilities -> those of the most probable tokens until they make up
    top_p, the others 0."""
    best_first, order = probs.sort(-1, descending=True)
    before = best_first.cumsum(-1) - best_first
    return normalized(probs * (before < top_p).gather(-1, order.argsort(-1)))


def assert_same_weights(actual: Tensor, expected: Tensor) -> None:
    found, wanted = ((weights > 0).sum(-1).tolist() for weights in (actual, expected))
    assert torch.equal(actual > 0, expected > 0), f"{found} tokens can be drawn, not {wanted}"
    assert_close("weights", actual, expected, 1e-5)


def top_p_that_keeps(count: int, probs: Tensor) -> float:
    """Half of the last probability that is needed is left to spare, on either side."""
    best_first = probs.sort(-1, descending=True).values[0]
    return (best_first[:count].sum() - best_first[count - 1] / 2).item()


@pytest.mark.parametrize(
    ("vocab", "kept"),
    [(5, 1), (5, 3), (SHORT, 1), (SHORT, 700), (SHORT, SHORT - 1), (SHORT + 1, SHORT)]
    + [(3000, kept) for kept in (1, 2, 40, SHORT - 1, SHORT, SHORT + 1, SHORT + 2, 2900)],
)
def test_top_p_keeps_the_most_probable_tokens_that_make_it_up(vocab, kept):
    logits = normal(1, vocab, seed=kept)
    probs = logits.double().softmax(-1)
    top_p = top_p_that_keeps(kept, probs)
    expected = nucleus(probs, top_p)
    assert (expected > 0).sum() == kept
    assert_same_weights(weights_drawn_from(logits, top_p=top_p), expected)


@pytest.mark.parametrize("top_p", [1e-9, 1e-50])
@pytest.mark.parametrize("vocab", [5, 3000])
def test_the_best_token_passes_every_top_p(vocab, top_p):
    logits = normal(2, vocab)
    weights = weights_drawn_from(logits, top_p=top_p)
    assert torch.equal(weights, nn.functional.one_hot(logits.argmax(-1), vocab).double())


@pytest.mark.parametrize(
    ("vocab", "kept", "looked_at"),
    [(SHORT, 700, SHORT), (3000, 1, SHORT), (3000, SHORT, SHORT), (3000, SHORT + 1, 3000)],
)
def test_all_tokens_are_sorted_only_where_the_first_are_not_enough(vocab, kept, looked_at):
    probs = normal(1, vocab).softmax(-1)
    found = generate.most_probable(probs, top_p_that_keeps(kept, probs.double()))
    for actual, expected in zip(found, probs.sort(-1, descending=True), strict=True):
        assert torch.equal(actual, expected[:, :looked_at])


@pytest.mark.parametrize(
    ("scales", "looked_at"), [((9.0, 9.0), SHORT), ((9.0, 0.1), 3000), ((0.1, 9.0), 3000)]
)
def test_every_row_of_a_batch_has_its_own_nucleus(scales, looked_at):
    """One that is peaked, for which 1024 tokens are enough, and one that is flat."""
    logits = normal(2, 3000) * torch.tensor(scales).unsqueeze(-1)
    probs = logits.softmax(-1)
    assert generate.most_probable(probs, 0.9)[1].shape == (2, looked_at)
    weights = weights_drawn_from(logits, top_p=0.9)
    assert_same_weights(weights, nucleus(logits.double().softmax(-1), 0.9))


def test_of_tokens_that_are_equally_probable_as_many_are_kept_as_make_it_up():
    for top_p, kept in ((0.25, 500), (0.5, 1000), (0.75, 1500)):
        weights = weights_drawn_from(torch.zeros(2, 2000), top_p=top_p - 1e-4)
        assert (weights > 0).sum(-1).tolist() == [kept, kept]
    weights = weights_drawn_from(torch.zeros(1, 4), top_p=0.5)
    assert (weights > 0).sum() == 2, "two of four make up a half exactly"


def test_the_cuts_follow_each_other_in_a_large_vocabulary():
    """Temperature, top_k, top_p, min_p: each cuts what the one before has left."""
    logits = 2 * normal(2, 3000)
    for temperature, top_k, top_p, min_p in (
        (0.7, 0, 0.95, 0.0),
        (1.0, 0, 0.95, 0.02),
        (3.0, 0, 0.95, 0.02),
        (1.0, 2000, 0.95, 0.0),
        (1.0, 50, 0.6, 0.3),
        (1.0, 0, 1.0, 0.02),
    ):
        probs = (logits.double() / temperature).softmax(-1)
        if top_k > 0:
            last = probs.topk(top_k).values[:, -1:]
            probs = normalized(probs * (probs >= last))
        expected = nucleus(probs, top_p)
        expected = normalized(expected * (expected >= min_p * expected.amax(-1, keepdim=True)))
        options = dict(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
        assert_same_weights(weights_drawn_from(logits, **options), expected)


def test_the_race_is_the_one_that_multinomial_runs():
    """The same tokens from the same random numbers; a weight of 0 never wins."""
    weights = normal(200, 50).square() * (normal(200, 50, seed=1) > 0)
    for seed in range(3):
        mine, theirs = (torch.Generator().manual_seed(seed) for _ in range(2))
        drawn = generate.draw(weights, mine)
        assert torch.equal(drawn, torch.multinomial(weights, 1, generator=theirs))
        assert (weights.gather(-1, drawn) > 0).all()


def test_tokens_of_a_large_vocabulary_are_drawn_as_often_as_their_probability_says():
    """Alone, and beside flat rows, for which all tokens are sorted."""
    vocab, draws = 1200, 1500
    peaked = torch.full((vocab,), -20.0)
    peaked[[7, 1100, 300, 41]] = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
    logits = torch.stack([peaked, torch.zeros(vocab)]).repeat(draws, 1)
    generator = torch.Generator().manual_seed(0)
    for rows, top_p, weights in (
        (logits[::2], 0.85, {7: 4, 1100: 3, 300: 2}),
        (logits, 0.95, {7: 4, 1100: 3, 300: 2, 41: 1}),
    ):
        token_ids = generate.sample(rows, top_p=top_p, generator=generator)
        counts = token_ids[:: len(rows) // draws].bincount(minlength=vocab)
        expected = torch.zeros(vocab)
        expected[list(weights)] = normalized(torch.tensor([*weights.values()]).float()) * draws
        assert not counts[expected == 0].any()
        drawn = expected > 0
        chi_square = ((counts - expected).square() / expected)[drawn].sum().item()
        assert chi_square < 20, f"drawn {counts[drawn].tolist()}, expected {weights}"
