"""GGUF files against transformers' own reader of them, and the refusals of what they can't tell."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from llm.gguf_file import plain_template, write_gguf
from llm.presets import PRESETS, build_model, llama_config
from llm.vocabulary import CHAT_TEMPLATE, END_OF_TURN, gpt2_tokenizer, load_tokenizer, wrap
from tests.models import SENTENCES, save_tiny_model, tiny_tokenizer

TEXTS = [
    *SENTENCES,
    "In 1984 and 20 45, ½²³ or 12३४ + 7!!  \n\n  end ",
    " 1",
    "it's WE'LL\tgo\u00a0on",
    "日本語 🙂 naïve",
]


def llama(**changes):
    return llama_config(replace(PRESETS["micro"], **changes), tiny_tokenizer())


def qwen(kind: str, **changes):
    from transformers import AutoConfig

    sizes = {"vocab_size": 330, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 128}
    ends = {"eos_token_id": 0, "bos_token_id": None, "pad_token_id": 1}
    return AutoConfig.for_model(kind, **(sizes | heads | ends | changes))


def gpt2(**changes):
    from transformers import GPT2Config

    sizes = {"vocab_size": 320, "n_embd": 64, "n_layer": 2, "n_head": 2, "n_positions": 64}
    return GPT2Config(**(sizes | {"eos_token_id": 0, "bos_token_id": None} | changes))


def saved(folder, config, tokenizer=None):
    """A folder with a model of `config` whose every weight, bias and norm matters."""
    model = build_model(config, seed=3).eval()
    with torch.no_grad():
        generator = torch.Generator().manual_seed(4)
        for weight in model.parameters():
            weight.add_(0.1 * torch.randn(weight.shape, generator=generator))
    model.save_pretrained(folder)
    (tokenizer or tiny_tokenizer()).save_pretrained(folder)
    return model


def read_by_transformers(path):
    """The model in a GGUF file, by transformers' own reader."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    config = AutoConfig.for_model(**load_gguf_checkpoint(str(path))["config"])
    model = AutoModelForCausalLM.from_config(config).eval()
    weights = load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=model)["tensors"]
    left = model.load_state_dict(weights, strict=False)
    assert not left.unexpected_keys
    assert set(left.missing_keys) <= ({"lm_head.weight"} if config.tie_word_embeddings else set())
    model.tie_weights()
    return model


MODELS = {
    "llama": lambda: llama(heads=4, kv_heads=2),
    "llama, untied": lambda: llama(tied=False, rope_theta=5e5),
    "qwen2": lambda: qwen("qwen2", tie_word_embeddings=True),
    "qwen3": lambda: qwen("qwen3", head_dim=128),
    "gpt2": gpt2,
}


@pytest.mark.parametrize("name", MODELS)
def test_transformers_reads_the_same_model(tmp_path, name):
    model = saved(tmp_path / "model", MODELS[name]())
    write_gguf(tmp_path / "model", tmp_path / "model.gguf")
    other = read_by_transformers(tmp_path / "model.gguf")
    ids = torch.randint(0, 320, (2, 40), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        expected, found = (one(ids, use_cache=False).logits for one in (model, other))
    assert expected.std() > 0.05
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["model.gguf"]


@pytest.mark.parametrize("tokenizer", ["ours", "gpt2"])
def test_transformers_reads_the_same_tokenizer(tmp_path, tokenizer):
    from transformers import AutoTokenizer

    if tokenizer == "ours":
        words = tiny_tokenizer()
    else:
        backend = gpt2_tokenizer()
        backend.add_special_tokens(["<|pad|>", "<|mask|>", END_OF_TURN])
        words = wrap(backend)
    saved(tmp_path / "model", llama_config(PRESETS["micro"], words), words)
    write_gguf(tmp_path / "model", tmp_path / "model.gguf", "float16")
    theirs = AutoTokenizer.from_pretrained(tmp_path, gguf_file="model.gguf")
    for text in [*TEXTS, f"a{END_OF_TURN}b"]:
        assert theirs(text, add_special_tokens=False)["input_ids"] == words(text)["input_ids"], text
    assert (theirs.eos_token_id, theirs.pad_token_id) == (words.eos_token_id, words.pad_token_id)


def fields_of(path):
    from gguf import GGUFReader

    return {key: field.contents() for key, field in GGUFReader(path).fields.items()}


def test_the_numbers_and_words_are_told(tmp_path):
    saved(tmp_path / "model", qwen("qwen2", rope_parameters={"rope_type": "linear", "rope_theta": 1e6, "factor": 4.0}))
    write_gguf(tmp_path / "model", tmp_path / "model.gguf")
    fields = fields_of(tmp_path / "model.gguf")
    words = tiny_tokenizer()
    assert fields["qwen2.rope.freq_base"] == 1e6
    assert (fields["qwen2.rope.scaling.type"], fields["qwen2.rope.scaling.factor"]) == ("linear", 4.0)
    assert fields["tokenizer.ggml.pre"] == "gpt-2"
    assert fields["tokenizer.ggml.eos_token_id"] == words.eos_token_id
    assert fields["tokenizer.ggml.eot_token_id"] == words.convert_tokens_to_ids(END_OF_TURN)
    assert fields["tokenizer.ggml.add_bos_token"] is False
    tokens, kinds = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    assert tokens[:320] == words.convert_ids_to_tokens(range(320))
    assert (tokens[320:], kinds[320:]) == ([f"[PAD{n}]" for n in range(320, 330)], [5] * 10)
    assert {n for n, kind in enumerate(kinds) if kind == 3} == set(words.all_special_ids)


def test_the_chat_template_renders_the_same(tmp_path):
    saved(tmp_path / "model", llama())
    write_gguf(tmp_path / "model", tmp_path / "model.gguf")
    template = fields_of(tmp_path / "model.gguf")["tokenizer.chat_template"]
    assert "generation -%}" not in template
    turns = [{"role": role, "content": f" {role}\n"} for role in ("system", "user", "assistant", "user")]
    for prompt in (True, False):
        expected, found = (
            tiny_tokenizer().apply_chat_template(
                turns, chat_template=one, tokenize=False, add_generation_prompt=prompt
            )
            for one in (CHAT_TEMPLATE, template)
        )
        assert found == expected
    assert plain_template("{% generation %}x{%- endgeneration -%}") == "{% if true %}x{%- endif -%}"


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_the_bytes_hold_rounded_weights(tmp_path, dtype):
    from gguf import GGUFReader

    model = saved(tmp_path / "model", llama())
    write_gguf(tmp_path / "model", tmp_path / "model.gguf", dtype)
    file = {tensor.name: tensor for tensor in GGUFReader(tmp_path / "model.gguf").tensors}
    kind = "BF16" if dtype == "bfloat16" else "F16"
    assert {one.tensor_type.name for name, one in file.items() if not name.endswith("norm.weight")} == {kind}
    assert {one.tensor_type.name for name, one in file.items() if name.endswith("norm.weight")} == {"F32"}
    raw = torch.from_numpy(file["blk.1.ffn_up.weight"].data.copy()).view(getattr(torch, dtype))
    expected = model.model.layers[1].mlp.up_proj.weight.to(getattr(torch, dtype))
    assert torch.equal(raw.view_as(expected), expected)


REFUSED = {
    "rope_type=yarn": lambda: qwen("qwen2", rope_parameters={"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}),
    "attention_bias=True": lambda: with_setting(llama(), attention_bias=True),
    "hidden_act=gelu": lambda: with_setting(llama(), hidden_act="gelu"),
    "use_sliding_window=True": lambda: qwen("qwen2", use_sliding_window=True, sliding_window=8),
    "MixtralForCausalLM can't be written": lambda: qwen("mixtral", num_local_experts=2),
    "MistralForCausalLM can't be written": lambda: qwen("mistral"),
    "the model 300 ids: they are not a pair": lambda: with_setting(llama(), vocab_size=300),
    "heads of 33 features": lambda: with_setting(qwen("qwen2", num_attention_heads=2, head_dim=33)),
    "scale_attn_by_inverse_layer_idx=True": lambda: gpt2(scale_attn_by_inverse_layer_idx=True),
}


def with_setting(config, **settings):
    for name, value in settings.items():
        setattr(config, name, value)
    return config


@pytest.mark.parametrize("reason", REFUSED)
def test_what_gguf_cannot_tell_is_refused_by_name(tmp_path, reason):
    saved(tmp_path / "model", REFUSED[reason]())
    with pytest.raises(ValueError, match=reason):
        write_gguf(tmp_path / "model", tmp_path / "model.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def change(folder, name, edit):
    content = json.loads((folder / name).read_text())
    edit(content)
    (folder / name).write_text(json.dumps(content))


TOKENIZERS = {
    "changes text before it splits it": lambda words: words.update(normalizer={"type": "Lowercase"}),
    "GGUF has no name for how": lambda words: words["pre_tokenizer"]["pretokenizers"].pop(0),
    "not byte-level BPE": lambda words: words["model"].update(byte_fallback=True),
    "ignore_merges=True can't be told": lambda words: words["model"].update(ignore_merges=True),
    "takes the space around it": lambda words: words["added_tokens"][2].update(lstrip=True),
    "merges join the numerals '12'": lambda words: join_numerals(words["model"]),
}


def join_numerals(model):
    """The last merge becomes one of two digits."""
    last = "".join(model["merges"].pop())
    model["vocab"]["12"] = model["vocab"].pop(last)
    model["merges"].append(["1", "2"])


@pytest.mark.parametrize("reason", TOKENIZERS)
def test_tokenizers_that_would_give_other_ids_are_refused(tmp_path, reason):
    folder = save_tiny_model(tmp_path / "model")
    change(folder, "tokenizer.json", TOKENIZERS[reason])
    load_tokenizer(folder)
    with pytest.raises(ValueError, match=reason):
        write_gguf(folder, tmp_path / "model.gguf")


def test_a_head_of_its_own_in_a_tied_model_is_refused(tmp_path):
    saved(tmp_path / "model", llama(tied=False))
    change(tmp_path / "model", "config.json", lambda config: config.update(tie_word_embeddings=True))
    with pytest.raises(ValueError, match=r"lm_head|tied|ties"):
        write_gguf(tmp_path / "model", tmp_path / "model.gguf")


def test_a_file_that_was_written_wrongly_is_found_and_not_left(tmp_path, monkeypatch):
    saved(tmp_path / "model", llama())
    plain = "llm.gguf_file._laid_out"
    monkeypatch.setattr(plain, lambda name, tensor, config, family: tensor.float())  # as if nothing were turned
    with pytest.raises(ValueError, match=r"another blk\.0\.attn_[qk]\.weight"):
        write_gguf(tmp_path / "model", tmp_path / "model.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_values_that_float16_cannot_hold_are_refused(tmp_path):
    folder = save_tiny_model(tmp_path / "model")
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"][0, 0] = 1e6
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"blk\.0\.ffn_up\.weight has values that torch\.float16 can't hold"):
        write_gguf(folder, tmp_path / "model.gguf", "float16")
