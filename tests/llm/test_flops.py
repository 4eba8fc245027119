"""FLOPs and utilisation against published runs, torch's own counter, and numbers worked out by hand."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    BertConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    T5Config,
)

from llm.flops import attention_flops_per_token, mfu, model_flops_per_token, multiplied_weights, peak_flops

SMALL = {"hidden_size": 128, "num_hidden_layers": 3, "num_attention_heads": 8, "vocab_size": 256}


def weights_of(config, sequence_length: int = 2048) -> float:
    """N, as the FLOPs have it."""
    return (model_flops_per_token(config, sequence_length) - attention_flops_per_token(config, sequence_length)) / 6


# Published runs


@pytest.fixture(scope="module")
def palm() -> LlamaConfig:
    """PaLM 540B's shape (arXiv 2204.02311, table 1): SwiGLU, one key-value head, one table for input and output."""
    return LlamaConfig(
        hidden_size=18_432,
        intermediate_size=4 * 18_432,
        num_hidden_layers=118,
        num_attention_heads=48,
        num_key_value_heads=1,
        head_dim=256,
        vocab_size=256_000,
        tie_word_embeddings=True,
    )


def test_palm_540b(palm):
    """Appendix B: 238.3 K tokens/s on 6144 chips of 275 TFLOP/s are 46.2 %, and 45.7 % without attention."""
    peak = 6144 * 275e12
    flops, attention = model_flops_per_token(palm, 2048), attention_flops_per_token(palm, 2048)
    assert (flops - attention) / 6 == pytest.approx(540.35e9, rel=1e-4)
    assert mfu(238.3e3, flops, peak) == pytest.approx(0.462, abs=5e-4)
    assert mfu(238.3e3, flops - attention, peak) == pytest.approx(0.457, abs=5e-4)


def test_megatron_turing_530b():
    """The same appendix: 65.43 K tokens/s on 2240 A100 are 30.2 %."""
    shape = GPT2Config(n_layer=105, n_embd=20_480, n_head=128, n_positions=2048, vocab_size=50_257)
    peak = 2240 * peak_flops("NVIDIA A100-SXM4-80GB", "bf16")
    assert mfu(65.43e3, model_flops_per_token(shape, 2048), peak) == pytest.approx(0.302, abs=1e-3)


def test_gpt_3():
    """Brown et al. (arXiv 2005.14165), table D.1: 3.14e23 FLOPs for 300 billion tokens, attention left out."""
    shape = GPT2Config(n_layer=96, n_embd=12_288, n_head=96, n_positions=2048, vocab_size=50_257)
    assert 6 * weights_of(shape) * 300e9 == pytest.approx(3.14e23, rel=2e-3)


def test_mixtral_counts_the_experts_that_a_token_is_sent_to():
    """Mixtral 8x7B has 47 billion weights, of which a token uses 13 (arXiv 2401.04088); its input table is no use."""
    shape = MixtralConfig(vocab_size=32_000)
    assert weights_of(shape) + 32_000 * 4096 == pytest.approx(12.88e9, rel=1e-3)


# Torch's own count


@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(**SMALL, intermediate_size=352, num_key_value_heads=2),
        LlamaConfig(**SMALL, intermediate_size=352, tie_word_embeddings=True),
        LlamaConfig(**SMALL, intermediate_size=352, head_dim=32),
        GPT2Config(n_layer=3, n_embd=128, n_head=8, vocab_size=256, n_positions=96),
        BertConfig(**SMALL, intermediate_size=512),
    ],
    ids=["grouped queries", "tied", "wide heads", "gpt2", "bert"],
)
def test_as_many_as_torch_counts(config):
    """Of a forward and a backward pass; torch counts matrices alone, we norms and biases too, which are under 1 %."""
    kind = AutoModelForMaskedLM if isinstance(config, BertConfig) else AutoModelForCausalLM
    model = kind.from_config(config, attn_implementation="sdpa")
    ids = torch.randint(0, 256, (2, 96))
    # Eager, so that the counter sees products: of the fused kernel's backward it counts a recomputation too.
    model.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, labels=ids).loss.backward()
    assert model_flops_per_token(config, 96) * ids.numel() == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_a_model_and_its_configuration_say_the_same():
    config = LlamaConfig(**SMALL, intermediate_size=352)
    assert multiplied_weights(AutoModelForCausalLM.from_config(config)) == weights_of(config)


def test_counting_draws_no_random_numbers():
    """Or a run would not be the same whether its FLOPs are counted or not."""
    before = torch.get_rng_state()
    model_flops_per_token(LlamaConfig(**SMALL, intermediate_size=352), 64)
    assert torch.equal(before, torch.get_rng_state())


# Attention


def test_a_window_bounds_what_is_attended_to():
    shape = MistralConfig(**SMALL, num_key_value_heads=8, sliding_window=64)
    by_hand = 12 * 3 * 8 * 16  # 12 L H Q
    assert attention_flops_per_token(shape, 32) == by_hand * 32
    assert attention_flops_per_token(shape, 512) == by_hand * 64


def test_layers_may_differ():
    shape = LlamaConfig(**SMALL)
    shape.layer_types, shape.sliding_window = ["sliding_attention", "full_attention", "linear_attention"], 64
    assert attention_flops_per_token(shape, 512) == 12 * 8 * 16 * (64 + 512)


def test_two_sequences_are_refused():
    with pytest.raises(ValueError, match="T5Config is of an encoder with a decoder"):
        model_flops_per_token(T5Config(), 512)


# Devices


@pytest.mark.parametrize(
    ("name", "precision", "teraflops"),
    [
        ("NVIDIA H100 80GB HBM3", "bf16", 989.5),
        ("NVIDIA H100 PCIe", "bf16", 756.5),
        ("NVIDIA H100 NVL", "fp16", 835.5),
        ("NVIDIA H200", "bf16", 989.5),
        ("NVIDIA A100-SXM4-40GB", "tf32", 156.0),
        ("NVIDIA A100 80GB PCIe", "fp32", 19.5),
        ("NVIDIA L40S", "bf16", 362.05),
        ("NVIDIA L4", "bf16", 121.0),
        ("NVIDIA B200", "bf16", 2250.0),
        ("Tesla V100-SXM2-16GB", "fp16", 125.0),
        ("Tesla V100-PCIE-16GB", "fp16", 112.0),
        ("Tesla T4", "fp16", 65.0),
    ],
)
def test_known_devices(name, precision, teraflops):
    assert peak_flops(name, precision) == teraflops * 1e12


@pytest.mark.parametrize(
    ("name", "precision"),
    [
        ("cpu", "bf16"),
        ("Intel(R) Xeon(R) Platinum 8481C", "fp32"),
        ("NVIDIA GeForce RTX 4090", "bf16"),
        ("NVIDIA A10G", "bf16"),  # is no A10
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "bf16"),  # a seventh of one
        ("Tesla T4", "bf16"),  # has none
    ],
)
def test_nothing_is_guessed(name, precision):
    assert peak_flops(name, precision) is None
