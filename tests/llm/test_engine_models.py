"""The engine over architectures that position and mask differently, against transformers' own generation."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)
from transformers.models.auto import AutoModelForCausalLM

from llm.engine import Engine
from llm.sampling import SamplingParams

VOCABULARY, CONTEXT, WINDOW = 320, 128, 16
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
    "tie_word_embeddings": False,  # tied random ones say the last token again, whatever came before
}
MIXED = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
CONFIGS = {
    "llama": LlamaConfig(**SHAPE),
    "gpt2": GPT2Config(
        vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=CONTEXT, tie_word_embeddings=False
    ),
    "qwen2-sliding": Qwen2Config(**SHAPE, **MIXED, use_sliding_window=True),
    "qwen3": Qwen3Config(**SHAPE, head_dim=8),
    "mistral": MistralConfig(**SHAPE, sliding_window=WINDOW),
    "gemma2": Gemma2Config(**SHAPE, **MIXED, head_dim=8, query_pre_attn_scalar=8, attn_implementation="eager"),
    "gemma3": Gemma3TextConfig(**SHAPE, **MIXED, head_dim=8, query_pre_attn_scalar=8),
}
# Shorter than the window, at its edge, and several windows long; answers leave the window too.
LENGTHS = [3, WINDOW - 1, WINDOW, WINDOW + 1, 3 * WINDOW + 5]
GREEDY = SamplingParams(max_new_tokens=16, temperature=0, top_logprobs=3)


def build(name: str):
    """A model of random weights, large enough that every prediction depends on what was said long before."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[name]).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.normal_(0, 0.35 if "gemma" in name else 0.25)
    return model


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, VOCABULARY, (length,), generator=generator).tolist() for length in LENGTHS]


def generated(model, prompt: list[int], engine: Engine) -> list[int]:
    ids = torch.tensor([prompt])
    ends = sorted(engine.end_ids)
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=16, do_sample=False, eos_token_id=ends, pad_token_id=0
    )
    return out[0, len(prompt) :].tolist()


def logprobs_of(model, prompt: list[int], answer: list[int]) -> torch.Tensor:
    with torch.no_grad():
        logits = model(torch.tensor([prompt + answer]), use_cache=False).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1).gather(-1, torch.tensor(answer)[:, None])[:, 0]


@pytest.mark.parametrize("name", CONFIGS)
def test_greedy_is_transformers_generate_and_logprobs_a_forward_pass(name, tokenizer):
    model = build(name)
    engine = Engine(model, tokenizer, slots=3, prefill_tokens=20)
    for prompt, answer in zip(prompts(), engine.generate(prompts(), GREEDY), strict=True):
        assert answer.ids == generated(model, prompt, engine)
        given = torch.tensor(answer.logprobs)
        torch.testing.assert_close(given, logprobs_of(model, prompt, answer.ids), atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["mistral", "gemma3"])
def test_what_the_window_hides_matters(name, tokenizer):
    """Otherwise the comparison above would say nothing of windows."""
    model = build(name)
    narrow = Engine(model, tokenizer).generate(prompts()[-1:], GREEDY)[0]
    model.config.sliding_window = CONTEXT
    wide = Engine(model, tokenizer).generate(prompts()[-1:], GREEDY)[0]
    assert narrow.ids != wide.ids


@pytest.mark.parametrize("name", ["gpt2", "gemma3"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_either_attention_gives_the_same(name, attention, tokenizer):
    model = build(name)
    expected = [answer.ids for answer in Engine(model, tokenizer).generate(prompts(), GREEDY)]
    model.set_attn_implementation(attention)
    assert [answer.ids for answer in Engine(model, tokenizer).generate(prompts(), GREEDY)] == expected


def test_layers_that_are_not_attention_are_refused(tokenizer):
    model = build("qwen3")
    model.config.layer_types = ["full_attention", "linear_attention"]
    with pytest.raises(ValueError, match="linear_attention layers: the engine runs attention only"):
        Engine(model, tokenizer)
