"""Weights in int8 against the same weights in fp32 and bf16."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from llm.int8 import FEW_ROWS, Int8Linear, quantize, quantized
from llm.presets import PRESETS, build_model, llama_config
from tests.models import SENTENCES, tiny_model, tiny_tokenizer


def drawn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_no_weight_is_off_by_more_than_half_a_step():
    weight = drawn(48, 32) * torch.logspace(-6, 2, 48)[:, None]
    weight[5] = 0
    q, scale = quantized(weight)
    assert (q.dtype, scale.dtype, int(q.min()) >= -127) == (torch.int8, torch.bfloat16, True)
    step = scale.float()[:, None]
    # The largest may be cut where its scale was rounded down: by 127 steps of at most 1 in 512.
    assert bool(((q * step - weight).abs() <= (0.5 + 127 / 512) * step).all())
    assert bool((q[5] == 0).all())


@pytest.mark.parametrize("rows", [1, 3, FEW_ROWS, FEW_ROWS + 1, 40])
@pytest.mark.parametrize("biased", [False, True])
def test_a_layer_multiplies_by_its_whole_numbers(rows, biased):
    weight, bias = drawn(96, 64), drawn(96, seed=1) if biased else None
    layer = Int8Linear(weight, bias)
    x = drawn(2, rows, 64, seed=2).bfloat16()
    exact = F.linear(x.double(), layer.q.double() * layer.scale.double()[:, None], bias.double() if biased else None)
    found = layer(x)
    assert found.dtype == torch.bfloat16
    assert float((found.double() - exact).norm() / exact.norm()) < 0.006


def test_every_linear_layer_is_taken_and_a_tied_head_is_not():
    from transformers import GPT2Config

    gpt2 = GPT2Config(vocab_size=320, n_embd=32, n_layer=2, n_head=2, n_positions=64)
    untied = llama_config(PRESETS["micro"], tiny_tokenizer())
    untied.tie_word_embeddings = False
    for config, count in [(llama_config(PRESETS["micro"], tiny_tokenizer()), 14), (untied, 15), (gpt2, 8)]:
        model = quantize(build_model(config, seed=0).bfloat16().eval())
        assert sum(isinstance(module, Int8Linear) for module in model.modules()) == count
        assert isinstance(model.get_output_embeddings(), Int8Linear) == (config is untied)


def test_gpt2s_layers_give_what_they_did():
    from transformers.pytorch_utils import Conv1D

    layer = Conv1D(96, 64)
    nn.init.normal_(layer.weight)
    module = nn.ModuleDict({"inner": layer})
    module.get_output_embeddings = lambda: None
    x = drawn(5, 64)
    expected = layer(x)
    found = quantize(module)["inner"](x.bfloat16()).float()
    assert float((found - expected).norm() / expected.norm()) < 0.02


def trained():
    """A model that has read the sentences until it nearly knows them."""
    tokenizer = tiny_tokenizer()
    model = build_model(llama_config(PRESETS["micro"], tokenizer), seed=0)
    rows = [torch.tensor([tokenizer(text)["input_ids"]]) for text in SENTENCES]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(60):
        ids = rows[step % len(rows)]
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval(), rows


def test_a_trained_model_says_nearly_the_same():
    model, rows = trained()
    other = quantize(copy.deepcopy(model).bfloat16())
    with torch.no_grad():
        expected, found, again = (
            torch.cat([one(ids, use_cache=False).logits[0].float() for ids in rows]) for one in (model, other, other)
        )
    targets = torch.cat([ids[0] for ids in rows])
    losses = [F.cross_entropy(logits[:-1], targets[1:]) for logits in (expected, found)]
    assert float(losses[0]) < 4  # of log 320 = 5.8: it has learnt something
    assert abs(float(losses[1] - losses[0])) < 0.01  # perplexity within 1 %
    assert float((found - expected).norm() / expected.norm()) < 0.02
    assert float((found.argmax(-1) == expected.argmax(-1)).float().mean()) > 0.97
    assert torch.equal(found, again)


def test_a_model_without_linear_layers_is_refused():
    model = tiny_model()
    model.model.layers = nn.ModuleList()
    with pytest.raises(ValueError, match="no linear layers"):
        quantize(model.bfloat16())
