"""What `llm.loading` makes of a folder, in each dtype."""

from __future__ import annotations

import pytest
import torch

from llm.int8 import Int8Linear
from llm.loading import load, load_any, load_model
from llm.sampling import SamplingParams
from tests.models import save_tiny_model

GREEDY = SamplingParams(max_new_tokens=16, temperature=0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize("dtype", [None, "float32", "bfloat16"])
def test_weights_have_the_dtype_that_was_asked_for(folder, dtype):
    assert load_model(folder, dtype).dtype == (torch.bfloat16 if dtype == "bfloat16" else torch.float32)


def test_int8_weights_take_a_quarter_of_the_bytes(folder):
    plain, small = load_model(folder), load_model(folder, "int8")
    before, after = plain.model.layers[1].mlp.up_proj, small.model.layers[1].mlp.up_proj
    assert isinstance(after, Int8Linear)
    assert after.q.nbytes * 4 == before.weight.nbytes
    assert small.dtype == torch.bfloat16  # what activations and embeddings have


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_an_engine_generates_in_every_dtype_the_same_way_twice(folder, dtype):
    engine = load(folder, dtype=dtype, slots=2, context=64, prefill_tokens=8)
    assert (engine.slots, engine.context, engine.prefill_tokens) == (2, 64, 8)
    prompts = [list(range(40, 60)), list(range(70, 75))]
    first = engine.generate(prompts, GREEDY)
    engine.drop_prefixes()  # what was read in other pieces rounds otherwise
    again = engine.generate(prompts, GREEDY)
    assert [answer.ids for answer in first] == [answer.ids for answer in again]
    assert all(len(answer.ids) == 16 or answer.finish_reason == "stop" for answer in first)


def test_unknown_dtypes_and_options_are_refused(folder):
    with pytest.raises(ValueError, match="dtype must be one of float32, bfloat16, int8, got 'int4'"):
        load(folder, dtype="int4")
    with pytest.raises(TypeError, match="slot_count"):
        load(folder, slot_count=3)


def test_any_model_of_text_is_taken_but_no_classifier(folder, tmp_path):
    from transformers import BertConfig, BertForMaskedLM, BertForSequenceClassification

    from tests.models import tiny_tokenizer

    assert type(load_any(folder)).__name__ == "LlamaForCausalLM"
    config = BertConfig(
        vocab_size=320, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48
    )
    for kind in (BertForMaskedLM, BertForSequenceClassification):
        kind(config).save_pretrained(tmp_path / kind.__name__)
        tiny_tokenizer().save_pretrained(tmp_path / kind.__name__)
    assert type(load_any(tmp_path / "BertForMaskedLM")).__name__ == "BertForMaskedLM"
    with pytest.raises(ValueError, match="not a causal language model"):
        load_any(tmp_path / "BertForSequenceClassification")
