"""examples/recipes.py: padding, packing and windows change nothing but the cost. The judge is the
same layer or model reading one document at a time, alone and mostly by `step`, in float64."""

import copy
import json
import re

import pytest
import recipes
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor

from mamba import OUR_OWN, Mamba, MambaBlock, MambaConfig
from test_mamba import assert_all_close, assert_close, gradients_of, random_model, randomise

SIZES = {"d_model": 8, "d_state": 3, "n_layer": 2, "vocab_size": 11}
CONFIG = MambaConfig(**SIZES)


def small(**changes) -> Mamba:
    return random_model(**SIZES | changes).double()


def rows(digits: str) -> Tensor:
    return torch.tensor([[int(digit) for digit in row] for row in digits.split()])


def assert_same_gradients(loss: Tensor, expected: Tensor, module) -> None:
    assert_all_close(gradients_of(loss, module), gradients_of(expected, module), 1e-9)


def by_steps(block: MambaBlock, u: Tensor) -> Tensor:
    """u (l, d_model), one position at a time from the left -> (l, d_model)."""
    state, ys = block.init_state(1), []
    for u_t in u:
        y, state = block.step(u_t.unsqueeze(0), state)
        ys.append(y)
    return torch.cat(ys)


def test_each_sequence_in_a_bidirectional_batch_is_read_from_both_sides_whatever_pads_it():
    """Padding on the right, on the left, on both sides, none, and packed documents."""
    block = randomise(recipes.BidirectionalBlock(CONFIG)).double()
    u = torch.randn(5, 9, 8, dtype=torch.float64, requires_grad=True)
    documents = rows("111100000 000000001 001111100 111111111 122223300")
    y, found, expected = block(u, documents), [], []
    for row in range(5):
        for number in set(documents[row].tolist()) - {0}:
            here = documents[row] == number
            alone = u[row, here]
            leftward = by_steps(block.leftward, alone.flip(0)).flip(0)
            expected.append(by_steps(block.rightward, alone) + leftward)
            found.append(y[row, here])
    found, expected = torch.cat(found), torch.cat(expected)
    assert_close("y", found, expected, 1e-9)
    weights, masked = torch.randn_like(expected), documents[:4] > 0
    leaves = {"u": u} | dict(block.named_parameters())
    assert_same_gradients((found * weights).sum(), (expected * weights).sum(), leaves)
    assert_close("with a mask", block(u[:4], masked)[masked], y[:4][masked], 1e-9)
    assert_close("no documents", block(u)[3], y[3], 1e-9)


@pytest.mark.parametrize("pool, features", [("last", None), ("mean", 5)])
def test_a_row_among_longer_rows_is_classified_as_it_is_alone(pool, features):
    model = randomise(recipes.SequenceClassifier(CONFIG, 4, features, pool)).double()
    lengths, answers, expected = torch.tensor([9, 1, 4, 2, 8]), torch.randint(4, (5,)), []
    inputs = torch.randn(5, 9, 5).double() if features else torch.randint(11, (5, 9))
    for row, length in zip(inputs, lengths.tolist(), strict=True):
        u = model.embed(row[:length])
        for norm, block in zip(model.norms, model.blocks, strict=True):
            u = u + by_steps(block, norm(u))
        u = model.norm_f(u)
        expected.append(model.head(u[-1] if pool == "last" else torch.stack(list(u)).mean(0)))
    assert_close("logits", model(inputs, lengths), torch.stack(expected), 1e-9)
    assert_close("without lengths", model(inputs[:1])[0], expected[0], 1e-9)
    loss = recipes.answer_loss(model, inputs, lengths, answers)
    assert_same_gradients(loss, F.cross_entropy(torch.stack(expected), answers), model)


@pytest.mark.parametrize("window, seqlen", [(4, 14), (30, 12), (1, 4)])
def test_each_window_takes_one_step_and_leaves_its_state_to_the_next(window, seqlen):
    """By hand: a token at a time, the gradient cut at the borders, and a descent at each."""
    model, twin, ids, expected = small(), small(), torch.randint(11, (3, seqlen)), []
    twin.load_state_dict(model.state_dict())
    optimizers = [torch.optim.SGD(each.parameters(), lr=0.1) for each in (model, twin)]
    losses = list(recipes.train_in_windows(model, ids, window, optimizers[0]))
    state = twin.init_state(3)
    for part in range(seqlen - 1)[::window]:
        state, parts = state.detach(), []
        for t in range(part, min(part + window, seqlen - 1)):
            logits, state = twin.step(ids[:, t], state)
            parts.append(F.cross_entropy(logits, ids[:, t + 1]))
        twin.zero_grad()
        (loss := torch.stack(parts).mean()).backward()
        optimizers[1].step()
        expected.append(loss.item())
    assert losses == pytest.approx(expected, abs=1e-9)
    assert_all_close(model.state_dict(), twin.state_dict(), 1e-9)


def test_packing_takes_the_first_row_with_room_and_no_document_sees_another():
    model, losses = small(), []
    documents = [torch.randint(3, (length,)) for length in (5, 1, 7, 2, 8, 3)]
    ids, numbers = recipes.pack(documents, 8)
    assert torch.equal(numbers, rows("11111244 33333330 55555555 66600000"))
    for number, document in enumerate(documents, start=1):
        assert torch.equal(ids[numbers == number], document)
        log_p = model(document.unsqueeze(0))[0].log_softmax(-1)
        losses += [-log_p[t, id] for t, id in enumerate(document[1:])]
    loss, expected = recipes.packed_loss(model, ids, numbers), torch.stack(losses).mean()
    assert_close("loss", loss, expected, 1e-9)
    assert_same_gradients(loss, expected, model)


@pytest.mark.parametrize("tied, size", [(True, 20), (False, 12), (False, 9), (True, 4.0)])
def test_a_resized_model_keeps_what_it_knew_trains_and_can_be_saved(tied, size, tmp_path):
    model, other, old = small(tie_embeddings=tied), small(), int(min(size, 11))
    other.config = model.config  # which is not resized with it
    model.lm_head.requires_grad_(tied)
    ids, new = torch.randint(old, (2, 7)), torch.full((2, 3), int(size) - 1)
    before, table = model(ids)[..., :old], model.backbone.embedding
    recipes.resize_token_embeddings(model, size)
    config, head = model.config, model.lm_head
    assert repr(config.vocab_size) == str(int(size)) and other.config.vocab_size == 11
    assert model.backbone.layers[1].mixer.config is config
    assert model(ids).shape[-1] == config.padded_vocab_size == -(-size // 8) * 8
    assert_close("logits of old tokens", model(ids)[..., :old], before, 1e-9)
    assert (head.weight is table.weight) == head.weight.requires_grad == tied
    assert table.num_embeddings == head.out_features == len(head.weight) == len(table.weight)
    assert size < 11 or all(0.01 < rows.weight[11:].std() < 0.03 for rows in (table, head))
    (slope,) = torch.autograd.grad(model(new).square().sum(), table.weight)
    assert slope[new[0, 0]].any()
    model.save_pretrained(tmp_path)
    loaded = Mamba.from_pretrained(tmp_path, dtype=torch.float64)
    assert loaded.config == model.config
    weights = loaded.state_dict()
    assert all(torch.equal(weights.pop(name), w) for name, w in model.state_dict().items())
    assert not weights
    # Mapped from a file, weights lie elsewhere in memory, and a product may round in another way.
    assert_close("logits", loaded(new), model(new), 1e-14)
    assert torch.equal(copy.deepcopy(loaded)(new), copy.deepcopy(model)(new))


@pytest.mark.parametrize("tied", [True, False])
def test_the_official_loader_reads_what_is_saved_for_it(tied, tmp_path):
    """Its two steps: config.json as keyword arguments, then a strict load of pytorch_model.bin."""
    model, ids = small(tie_embeddings=tied, tokenizer="bytes").float(), torch.randint(11, (2, 7))
    for name in ("model.safetensors.index.json", "model-00001-of-00001.safetensors"):
        (tmp_path / name).write_text("of another model, and older")
    recipes.save_for_official(model, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "pytorch_model.bin"}
    entries = json.loads((tmp_path / "config.json").read_text())
    assert not entries.keys() & {*OUR_OWN}, "its loader takes none of these"
    assert entries.pop("rms_norm") is entries.pop("fused_add_norm") is True
    other = Mamba(MambaConfig(**entries.pop("ssm_cfg"), **entries))
    other.load_state_dict(torch.load(tmp_path / "pytorch_model.bin", map_location="cpu"))
    loaded = Mamba.from_pretrained(tmp_path)  # mapped from the file that is written next
    recipes.save_for_official(loaded, tmp_path)
    for each in (other, loaded, Mamba.from_pretrained(tmp_path)):
        assert torch.equal(each(ids), model(ids))


@pytest.mark.parametrize("changes", [
    {"tie_embeddings": False, "conv_bias": False, "tokenizer": "bytes"},
    {"norm_eps": 0.1, "residual_in_fp32": False},
])  # fmt: skip
def test_transformers_reads_what_is_saved_for_it_and_so_do_we(changes, tmp_path):
    model, ids = small(d_conv=3, expand=3, dt_rank=5, **changes).float(), torch.arange(8).view(2, 4)
    recipes.save_for_transformers(model, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "model.safetensors"}
    theirs = transformers.MambaForCausalLM.from_pretrained(tmp_path)
    assert_close("theirs", theirs(ids).logits, model(ids), 1e-5)
    theirs.save_pretrained(tmp_path)
    loaded = Mamba.from_pretrained(tmp_path)
    assert loaded.config.tokenizer == model.config.tokenizer
    recipes.save_for_transformers(loaded, tmp_path)  # over the file that it is mapped from
    for each in (loaded, Mamba.from_pretrained(tmp_path)):
        assert torch.equal(each(ids), model(ids))


def classify(*lengths: int):
    model = recipes.SequenceClassifier(CONFIG, 4)
    return lambda _: model(torch.zeros(2, 6).long(), torch.tensor(lengths))


@pytest.mark.parametrize(("call", "words"), [
    (classify(3, 0), "need 2 lengths in 1 ... 6, got [3, 0]"),
    (classify(7, 1), "need 2 lengths in 1 ... 6, got [7, 1]"),
    (lambda _: recipes.SequenceClassifier(CONFIG, 4, pool="max"), "'mean', got 'max'"),
    (lambda _: recipes.pack(torch.ones(2, 7), 6), "document 1 has 7 tokens, a row only 6"),
    (lambda _: recipes.resize_token_embeddings(small(), 0), "positive integer, got 0"),
    (lambda path: recipes.save_for_official(small(rule="zoh"), path), "rule = 'zoh' cannot"),
    (lambda path: recipes.save_for_official(small(norm_eps=0.1), path), "norm_eps = 0.1"),
    (lambda path: recipes.save_for_transformers(small(rule="zoh"), path), "only 'mamba'"),
    (lambda path: recipes.save_for_transformers(small(expand=1.5), path), "expand = 1.5"),
])  # fmt: skip
def test_what_does_not_fit_is_refused_and_nothing_is_written(call, words, tmp_path):
    with pytest.raises(ValueError, match=re.escape(words)):
        call(tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_script_compares_on_tasks_that_ask_what_they_say(monkeypatch, capsys):
    """After few steps of training on few rows."""
    ids, lengths, answers = recipes.rows_with_a_mark(2000)
    row, mark = (ids == 0).nonzero().unbind(1)
    assert torch.equal(row, torch.arange(2000)), "one mark in each row"
    assert mark.min() == 0 and (lengths - mark).min() == 2, "up to the last but one"
    assert torch.equal(answers, ids[row, mark + 1] - 1)
    texts, fit = recipes.repetitions(200), recipes.fit

    def fit_a_little(model, loss_of, make, steps):
        return fit(model, loss_of, lambda count: make(min(count, 32)), steps=30)

    monkeypatch.setattr(recipes, "repetitions", lambda count: texts[:count])
    monkeypatch.setattr(recipes, "fit", fit_a_little)
    monkeypatch.setattr("sys.argv", ["recipes.py"])
    recipes.main()
    first, second, third, fourth = re.split(r"^\d\. ", capsys.readouterr().out, flags=re.M)[1:]
    one, both = map(float, re.findall(r"Block: (\d\.\d{3})$", first, re.M))
    assert both < 1.3 < 1.35 < one
    assert re.search(r"SequenceClassifier: \d\.\d{3}$", second, re.M)
    carried, zero = map(float, re.findall(r"at first, (\S+) at last$", third, re.M))
    assert carried < 0.05 < 0.25 < zero
    (few, packed), (many, alone) = re.findall(r"200 documents in (\d+) rows: (.*)$", fourth, re.M)
    assert int(few) < 60 and many == "200"
    assert float(packed) == pytest.approx(float(alone), abs=3e-6)
