"""Attention piece by piece: what torch gives with transformers' masks, forward and backward."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)

from llm.attention import ATTENTION, BLOCK, PLAIN_ATTENTION, Block, attend_by_pieces, blocks_of

TOKENS = 3 * BLOCK + 40
SIZES = {
    "vocab_size": 90,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 1024,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 1,
    "attn_implementation": "sdpa",
}
TYPES = {
    "llama": LlamaConfig,
    "mistral": MistralConfig,
    "olmo2": Olmo2Config,
    "phi3": Phi3Config,
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
    "smollm3": SmolLM3Config,
}


def pair(kind: str, **more):
    """A model and its copy that attends by pieces."""
    torch.manual_seed(0)
    whole = {"sliding_window": None} if kind in ("mistral", "phi3") else {}
    model = AutoModelForCausalLM.from_config(TYPES[kind](**(SIZES | whole | more))).train()
    other = copy.deepcopy(model)
    attend_by_pieces(other)
    return model, other


def packed_positions(*lengths: int) -> torch.Tensor:
    return torch.cat([torch.arange(length) for length in lengths])


# One row of a few pieces, one of a single piece, one of very many.
POSITIONS = torch.stack(
    [
        packed_positions(5, BLOCK, 2 * BLOCK + 30, 5),
        packed_positions(TOKENS),
        packed_positions(*[1] * 24, *[10] * 40),
    ]
)


def loss_of(model, **inputs):
    logits = model(use_cache=False, **inputs).logits
    return logits.float().log_softmax(-1)[..., 7].sum(), logits


@pytest.mark.parametrize("kind", PLAIN_ATTENTION)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_logits_and_gradients_are_those_of_torchs_attention(kind, checkpointing):
    model, by_pieces = pair(kind)
    assert by_pieces.config._attn_implementation == ATTENTION
    if checkpointing:
        by_pieces.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    ids = torch.randint(2, 90, POSITIONS.shape)
    expected, got = (loss_of(one, input_ids=ids, position_ids=POSITIONS) for one in (model, by_pieces))
    torch.testing.assert_close(got[1], expected[1], rtol=1e-4, atol=1e-5)
    expected[0].backward()
    got[0].backward()
    for (name, one), other in zip(model.named_parameters(), by_pieces.parameters(), strict=True):
        torch.testing.assert_close(other.grad, one.grad, rtol=1e-3, atol=2e-4, msg=lambda text, name=name: name + text)


def test_in_bf16_it_is_as_near_to_fp32_as_torchs_own():
    model, by_pieces = pair("llama")
    ids = torch.randint(2, 90, POSITIONS.shape)
    exact = loss_of(model, input_ids=ids, position_ids=POSITIONS)[1]
    errors = [
        (loss_of(one.bfloat16(), input_ids=ids, position_ids=POSITIONS)[1].float() - exact).abs().mean()
        for one in (model, by_pieces)
    ]
    assert errors[1] < 1.1 * errors[0]


def test_a_padded_batch_and_a_cache_are_as_with_torchs_attention():
    model, by_pieces = pair("llama")
    ids = torch.randint(2, 90, (2, 20))
    seen = torch.ones_like(ids)
    seen[0, :6] = 0
    for one in (model, by_pieces):
        one.eval()
    arguments = {"attention_mask": seen, "max_new_tokens": 12, "do_sample": False, "min_new_tokens": 12}
    assert torch.equal(by_pieces.generate(ids, **arguments), model.generate(ids, **arguments))


def test_a_mask_that_is_given_is_kept():
    model, by_pieces = pair("llama")
    ids, both_ways = torch.randint(2, 90, (2, 30)), torch.ones(2, 1, 30, 30, dtype=torch.bool)
    expected, got = (loss_of(one, input_ids=ids, attention_mask=both_ways)[1] for one in (model, by_pieces))
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize(
    ("kind", "setting"),
    [("mistral", {"sliding_window": 16}), ("llama", {"attention_dropout": 0.1})],
)
def test_a_model_whose_attention_is_another_keeps_it(kind, setting):
    _, other = pair(kind, **setting)
    assert other.config._attn_implementation == "sdpa"


def test_the_saved_model_does_not_know_of_it(tmp_path):
    model, by_pieces = pair("llama")
    model.save_pretrained(tmp_path / "one")
    by_pieces.save_pretrained(tmp_path / "other")
    assert (tmp_path / "one" / "config.json").read_text() == (tmp_path / "other" / "config.json").read_text()


def test_rows_are_cut_at_pieces_and_every_block():
    positions = torch.stack([packed_positions(3, BLOCK + 2), packed_positions(BLOCK + 5)])
    first = [Block(0, 0, 0, 3), Block(0, 3, 3, 3 + BLOCK), Block(0, 3, 3 + BLOCK, BLOCK + 5)]
    second = [Block(1, 0, 0, BLOCK), Block(1, 0, BLOCK, BLOCK + 5)]
    assert list(blocks_of(positions)) == first + second
