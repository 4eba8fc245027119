"""Embeddings against a plain forward pass over one text."""

from __future__ import annotations

import pytest
import torch

from llm.cloze import OBJECTIVE
from llm.embedding import embed, load_embedder
from llm.presets import PRESETS, build_model, llama_config
from tests.models import save_tiny_model, tiny_model, tiny_tokenizer

LENGTHS = [5, 31, 1, 17, 5, 31, 12]


@pytest.fixture(scope="module")
def prompts():
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(30, 320, (length,), generator=generator).tolist() for length in LENGTHS]


def windowed():
    from transformers import MistralConfig

    return build_model(
        MistralConfig(
            vocab_size=320,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=64,
            sliding_window=4,
        ),
        seed=0,
    ).eval()


def encoder():
    from transformers import AutoModelForMaskedLM, BertConfig

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    return AutoModelForMaskedLM.from_config(BertConfig(vocab_size=320, max_position_embeddings=64, **sizes)).eval()


def eager():
    model = tiny_model()
    model.set_attn_implementation("eager")
    return model


CAUSAL = {"llama": tiny_model, "eager": eager, "windowed": windowed}


def means_alone(base, prompts, **settings):
    """One text at a time, as transformers itself looks at it."""
    with torch.no_grad():
        return torch.stack([base(torch.tensor([ids]), **settings).last_hidden_state[0].mean(0) for ids in prompts])


@pytest.mark.parametrize("name", [*CAUSAL, "encoder"])
def test_each_text_is_the_mean_of_its_own_hidden_states(name, prompts):
    model = encoder() if name == "encoder" else CAUSAL[name]()
    found = embed(model, prompts)
    assert (found.dtype, found.shape) == (torch.float32, (len(prompts), model.config.hidden_size))
    torch.testing.assert_close(found, means_alone(model.base_model, prompts), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", [*CAUSAL, "encoder"])
def test_neighbours_make_no_difference(name, prompts):
    model = encoder() if name == "encoder" else CAUSAL[name]()
    together = embed(model, prompts)
    alone = torch.cat([embed(model, [ids]) for ids in prompts])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_decoder_of_masked_words_looks_both_ways(attention, prompts):
    """Against its own layers told that they are no decoder's, which is another way to leave the mask away."""
    model = tiny_model()
    model.set_attn_implementation(attention)
    setattr(model.config, OBJECTIVE, "masked")
    found = embed(model, prompts)
    delattr(model.config, OBJECTIVE)
    one_way = embed(model, prompts)
    for place, ids in enumerate(prompts):
        expected = both_ways(model, ids)
        torch.testing.assert_close(found[place], expected, atol=1e-4, rtol=1e-4)
    several = [place for place, ids in enumerate(prompts) if len(ids) > 1]
    assert float((found - one_way)[several].norm(dim=1).min()) > 0.1


def both_ways(model, ids):
    """The mean last hidden state with attention written out by hand: softmax over all tokens."""
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    base, heads = model.model, model.config.num_attention_heads
    with torch.no_grad():
        x = base.embed_tokens(torch.tensor([ids]))
        turns = base.rotary_emb(x, torch.arange(len(ids))[None])
        for layer in base.layers:
            normed = layer.input_layernorm(x)
            part = layer.self_attn
            q, k, v = (
                project(normed).unflatten(-1, (heads, -1)).transpose(1, 2)
                for project in (part.q_proj, part.k_proj, part.v_proj)
            )
            q, k = apply_rotary_pos_emb(q, k, *turns)
            seen = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1) @ v
            x = x + part.o_proj(seen.transpose(1, 2).flatten(2))
            x = x + layer.mlp(layer.post_attention_layernorm(x))
        return base.norm(x)[0].mean(0)


def test_many_texts_take_several_passes(monkeypatch, prompts):
    monkeypatch.setattr("llm.embedding.MOST_TOKENS", 10)
    model = tiny_model()
    torch.testing.assert_close(embed(model, prompts), means_alone(model.base_model, prompts), atol=1e-5, rtol=1e-5)


def test_bf16_gives_fp32_vectors(prompts):
    assert embed(tiny_model().bfloat16(), prompts).dtype == torch.float32


def test_what_cannot_be_embedded_is_named(prompts):
    model = tiny_model()
    for bad, message in [
        ([], "prompt 1 has 0 tokens"),
        ([5] * 257, "257 tokens, it must have from 1 to the context of 256"),
        ([320], "id 320, outside the vocabulary of 320"),
    ]:
        with pytest.raises(ValueError, match=message):
            embed(model, [prompts[0], bad])
    with pytest.raises(RuntimeError, match="training mode"):
        embed(tiny_model().train(), prompts)
    assert embed(model, []).shape == (0, 64)


def test_folders_of_decoders_and_encoders_are_loaded(tmp_path, prompts):
    decoder = load_embedder(save_tiny_model(tmp_path / "decoder"))
    torch.testing.assert_close(embed(decoder, prompts), embed(tiny_model(), prompts))
    masked = build_model(llama_config(PRESETS["micro"], tiny_tokenizer()), seed=0)
    setattr(masked.config, OBJECTIVE, "masked")
    masked.save_pretrained(tmp_path / "masked")
    encoder().save_pretrained(tmp_path / "encoder")
    for name, kind in [("masked", "LlamaForCausalLM"), ("encoder", "BertForMaskedLM")]:
        tiny_tokenizer().save_pretrained(tmp_path / name)
        assert type(load_embedder(tmp_path / name)).__name__ == kind
    assert getattr(load_embedder(tmp_path / "masked").config, OBJECTIVE) == "masked"
    with pytest.raises(ValueError, match="no model folder"):
        load_embedder(tmp_path / "nowhere")
