"""Shapes: their weights counted on real models without storage, and against what their authors published."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM

from llm.architectures import Ids, Saved, check_architecture, load_weights, saved_at, unfit
from llm.presets import PRESETS, build_model, from_depth, llama_config
from tests.models import save_tiny_model


def counted(config) -> int:
    with torch.device("meta"):
        return sum(weight.numel() for weight in AutoModelForCausalLM.from_config(config).parameters())


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_counts_the_weights_of_its_model(name):
    assert PRESETS[name].parameters(1000) == counted(PRESETS[name].config(Ids(1000)))


@pytest.mark.parametrize(
    ("name", "vocabulary", "published"),
    [
        ("7b", 32_000, 6_738_415_616),  # Llama 2, as the files on the Hugging Face hub count
        ("13b", 32_000, 13_015_864_320),
        ("70b", 32_000, 68_976_648_192),
        ("8b", 128_256, 8_030_261_248),  # Llama 3
        ("70b", 128_256, 70_553_706_496),
        ("405b", 128_256, 405_853_388_800),
        ("1b", 128_256, 1_235_814_400),  # Llama 3.2
        ("3b", 128_256, 3_212_749_824),
        ("34b", 32_000, 33_743_970_304),  # Code Llama
        ("135m", 49_152, 134_515_008),  # SmolLM
        ("360m", 49_152, 361_821_120),
    ],
)
def test_a_published_shape_has_the_published_number_of_weights(name, vocabulary, published):
    assert PRESETS[name].parameters(vocabulary) == published


def test_the_numbers_that_name_micro_and_tiny_stay():
    assert PRESETS["micro"].numbers() == {
        "layers": 2,
        "hidden": 64,
        "heads": 2,
        "kv_heads": 2,
        "context": 256,
        "tied": True,
        "rope_theta": 10_000.0,
    }
    assert list(PRESETS["tiny"].numbers().values()) == [6, 256, 4, 4, 512, True, 10_000.0]


@pytest.mark.parametrize(
    ("depth", "hidden", "heads", "kv_heads"),
    [(1, 64, 1, 1), (8, 512, 8, 8), (12, 768, 12, 12), (17, 1152, 9, 9), (32, 2048, 16, 8), (80, 5120, 40, 8)],
)
def test_depth_derives_the_rest(depth, hidden, heads, kv_heads):
    shape = from_depth(depth)
    assert (shape.layers, shape.hidden, shape.heads, shape.kv_heads) == (depth, hidden, heads, kv_heads)


@pytest.mark.parametrize("depth", range(1, 129))
def test_every_depth_makes_whole_heads_and_no_more_than_needed(depth):
    shape = from_depth(depth)
    assert shape.hidden % shape.heads == shape.heads % shape.kv_heads == 0
    assert shape.hidden // shape.heads in (64, 128)
    assert shape.hidden >= 64 * depth > shape.hidden - shape.hidden // shape.heads


def test_depth_counts_the_weights_of_its_model():
    assert from_depth(17).parameters(1000) == counted(from_depth(17).config(Ids(1000)))


def test_a_llama_is_drawn_as_its_own_class_draws_it():
    config = llama_config(PRESETS["micro"], Ids(40))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        theirs = LlamaForCausalLM(config).state_dict()
    ours = build_model(config, seed=5)
    assert isinstance(ours, LlamaForCausalLM)
    assert all(torch.equal(theirs[name], weight) for name, weight in ours.state_dict().items())


GPT2 = {"model_type": "gpt2", "n_layer": 2, "n_embd": 32, "n_head": 2, "n_positions": 64}


def test_any_architecture_is_built_and_loads_back(tmp_path):
    shape = check_architecture(GPT2)
    model = build_model(shape.config(Ids(300)), seed=0)
    model.save_pretrained(tmp_path)
    back = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(back).__name__ == "GPT2LMHeadModel"
    assert back.transformer.wte.weight.shape == (300, 32)
    assert shape.context == 64
    assert shape.parameters(300) == sum(weight.numel() for weight in back.parameters())


def test_the_tokenizers_ids_are_the_models_and_dropout_is_off_unless_asked_for():
    config = check_architecture(GPT2).config(Ids(300, eos_token_id=7, pad_token_id=9))
    assert (config.vocab_size, config.eos_token_id, config.pad_token_id, config.bos_token_id) == (300, 7, 9, None)
    assert (config.resid_pdrop, config.attn_pdrop, config.embd_pdrop) == (0, 0, 0)
    assert check_architecture({**GPT2, "attn_pdrop": 0.1}).config(Ids(300)).attn_pdrop == 0.1


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"n_layer": 2}, "unknown model_type None"),
        ({"model_type": "gpt22"}, "nearest: gpt2"),
        ({**GPT2, "n_layers": 2}, "gpt2 has no 'n_layers', known are .*n_layer"),
        ({**GPT2, "auto_map": {}}, "gpt2 has no 'auto_map'"),
        ({**GPT2, "vocab_size": 5}, "vocab_size is the tokenizer's"),
        ({**GPT2, "eos_token_id": 5}, "eos_token_id is the tokenizer's"),
        ({**GPT2, "n_layer": "two"}, "can't be configured so: .*n_layer"),
    ],
)
def test_what_is_not_known_is_refused_with_what_is(values, said):
    with pytest.raises(ValueError, match=said):
        check_architecture(values)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (GPT2, None),
        ({"model_type": "qwen2", "hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1}, None),
        ({"model_type": "gpt_neox", "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64}, None),
        ({"model_type": "bert", "hidden_size": 32, "num_attention_heads": 2}, "sees the tokens that it is to tell"),
        ({"model_type": "bloom", "hidden_size": 32, "n_head": 2}, "from one document to the next"),
        ({"model_type": "mamba", "hidden_size": 32}, "from one document to the next"),
    ],
)
def test_architectures_that_see_what_they_must_not_are_found(values, said):
    why = unfit(check_architecture(values).config(Ids(64)))
    assert (why is None) if said is None else said in why


def test_a_saved_model_goes_on_with_the_weights_that_it_has(tmp_path):
    folder = save_tiny_model(tmp_path)
    found = saved_at(folder)
    assert found == Saved(folder)
    assert found.context == PRESETS["micro"].context
    weights = load_weights(folder)
    assert found.parameters(7) == sum(weight.numel() for weight in weights.parameters())
    assert weights.dtype == torch.float32
    saved = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    assert all(torch.equal(saved[name], weight) for name, weight in weights.state_dict().items())


def test_pickled_weights_and_unknown_code_are_refused(tmp_path):
    folder = save_tiny_model(tmp_path)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="no safetensors"):
        saved_at(folder)
    config = AutoConfig.from_pretrained(folder).to_dict()
    (folder / "config.json").write_text(str({**config, "model_type": "mine"}).replace("'", '"'))
    with pytest.raises(ValueError, match=r"config\.json"):
        saved_at(folder)
