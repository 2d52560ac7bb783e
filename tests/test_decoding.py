"""Who takes the steps of a stream: `model.step`, on a GPU a recorded step, on a CPU copied weights.

What these compute is claimed in test_step_graph.py and test_cpu_step.py. Here: when each is taken,
that the tokens are those of `model.step`, and that nothing is kept.
"""

import contextlib
import gc
import sys
import weakref
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

import generate
import triton_scan
from mamba import Mamba, MambaState
from test_mamba import assert_all_close, random_ids, random_model, random_state

pytestmark = pytest.mark.gpu
GPU = torch.cuda.is_available()


class StandIn(generate.PlainStep):
    """In place of a recorded step: it writes over what it lent, and ends with its context."""

    ended = False

    def __init__(self, model: Mamba, state: MambaState) -> None:
        super().__init__(model, state.map(torch.clone))
        self.logits = torch.empty(state.h.shape[1], model.lm_head.out_features)

    def __call__(self, token_ids: Tensor) -> Tensor:
        logits, state = self.model.step(token_ids, self.state())
        self.last.conv.copy_(state.conv)
        self.last.h.copy_(state.h)
        return self.logits.copy_(logits)

    def state(self):
        assert not self.ended
        return self.last.map(torch.clone)


@pytest.fixture(params=["recorded", "copied"])
def kind(request, monkeypatch) -> str:
    monkeypatch.setattr(generate, "can_record", lambda model: request.param == "recorded")
    monkeypatch.setattr(generate, "COPY_FOR_TOKENS", 3)
    return request.param


@pytest.fixture
def taken(monkeypatch) -> list[weakref.ref]:
    """The steps that are taken otherwise than by `model.step`, from now on."""
    references, real, copied = [], triton_scan.step_graph, generate.CopiedStep

    def noted(step):
        references.append(weakref.ref(step))
        return step

    @contextlib.contextmanager
    def lent(model, state):
        with real(model, state) if GPU else contextlib.nullcontext(StandIn(model, state)) as step:
            try:
                yield noted(step)
            finally:
                step.ended = True

    monkeypatch.setattr(triton_scan, "step_graph", lent)
    monkeypatch.setattr(generate, "CopiedStep", lambda *arguments: noted(copied(*arguments)))
    return references


def stream_of(model: Mamba, ids: Tensor, **options) -> generate.Stream:
    return generate.stream(model, ids, **{"temperature": 0, "max_new_tokens": 9} | options)


# In float64 on a GPU, where `model.step` is what is recorded: tokens are equal whatever is near.
def model_for(kind: str) -> Mamba:
    return random_model().double().cuda() if GPU and kind == "recorded" else random_model()


SAMPLED = {"temperature": 0.9, "seed": 3, "repetition_penalty": 1.3, "top_p": 0.9}
SAMPLED |= {"vocab_size": 29, "eos_token_id": 3, "max_new_tokens": 50}


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, SAMPLED])
def test_a_stream_has_the_tokens_and_the_state_that_it_has_by_step(options, kind, taken):
    model = model_for(kind)
    ids = random_ids(1, 5, 29).to(model.lm_head.weight.device)
    start = random_state(model, 1)
    turn, expected = (stream_of(model, ids, state=start, **options) for _ in range(2))
    tokens = []
    for token in turn:
        tokens.append(token.item())
        turn.state.map(torch.zero_)  # a copy, so that nothing happens
    assert len(taken) == 1 and len(set(tokens)) > 1
    with mock.patch.multiple(generate, can_record=lambda *_: False, worth_copies=lambda *_: False):
        assert tokens == [token.item() for token in expected]
    assert_all_close(vars(turn.state), vars(expected.state), 1e-5)


@pytest.mark.parametrize("leave", [list, lambda steps: steps.steps.close()])
def test_a_stream_that_is_left_keeps_neither_its_step_nor_the_model(leave, kind, taken):
    """Copies are as large as the model: they go at once, and not with the next collection."""
    model = model_for(kind)
    gone = weakref.ref(model)
    gc.disable()
    try:
        steps = stream_of(model, random_ids(1, 4).to(model.lm_head.weight.device))
        next(steps), next(steps)
        leave(steps)
        if leave is not list:  # that one has ended, and may be held for its state
            del steps
        assert [step() for step in taken] == [None]
        del model
        assert gone() is None, "something keeps the model"
    finally:
        gc.enable()


def test_a_recorded_step_is_for_a_gpu_and_for_modules_of_our_own():
    """And where Triton is not installed, there is `model.step`."""
    model, ids = random_model(), random_ids(2, 4)
    assert not generate.can_record(model)
    expected = torch.stack(list(stream_of(model, ids)))
    with mock.patch.object(generate, "can_record", lambda _: True):
        with mock.patch.dict(sys.modules, {"triton_scan": None}):  # importing it is an ImportError
            assert torch.equal(torch.stack(list(stream_of(model, ids))), expected)
    with mock.patch.object(Tensor, "is_cuda", True):
        assert generate.can_record(model)
        model.lm_head.register_forward_hook(lambda *_: None)
        assert not generate.can_record(model)


def test_weights_are_copied_for_one_long_sequence_of_a_small_model_of_our_own(monkeypatch):
    def worth(model: Mamba, tokens: int = 64, batch: int = 1, dtype=torch.float32) -> bool:
        state = random_model().init_state(batch).map(lambda tensor: tensor.to(dtype))
        return generate.worth_copies(model, state, tokens)

    model, mixed, replaced = random_model(), random_model(), random_model()
    mixed.backbone.norm_f.bfloat16()
    replaced.backbone.layers[0].mixer = nn.Identity()  # it has no configuration to look at
    refused = {
        "two sequences": worth(model, batch=2),
        "a short one": worth(model, tokens=63),
        "float64": worth(random_model().double()),
        "a state in float64": worth(model, dtype=torch.float64),
        "two dtypes": worth(mixed),
        "another rule": worth(random_model(rule="zoh")),
        "another device": worth(random_model().to("meta")),
        "a module that is not ours": worth(replaced),
    }
    assert set(refused.values()) == {False}, refused
    assert all(worth(random_model().to(d)) for d in (torch.float32, torch.bfloat16, torch.float16))
    size = 4 * sum(parameter.numel() for parameter in model.parameters())  # a tied matrix is one
    for most, answer in ((size, True), (size - 1, False)):
        monkeypatch.setattr(generate, "COPY_AT_MOST", most)
        assert worth(model) is answer
