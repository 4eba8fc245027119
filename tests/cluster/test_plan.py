"""The planner against published runs, the papers' own numbers, and sums done by hand."""

import pytest

from cluster import plan
from cluster.plan import GPUS, Decoder, Gpu, Load
from llm import flops

TPU_V4 = Gpu("TPU v4", 32e9, 275e12, 1200e9, "Jouppi et al. 2023, arXiv 2304.01433, Table 4")


def decoder(parameters: float, layers: int, hidden: int, heads: int, **more) -> Decoder:
    """A decoder as papers describe it: four times as wide inside, every weight multiplied."""
    known = {
        "parameters": int(parameters),
        "multiplied": int(parameters),
        "layers": layers,
        "hidden": hidden,
        "heads": heads,
        "kv_heads": heads,
        "head": hidden // heads,
        "ffn": 4 * hidden,
        "gated": False,
        "vocab": 50_257,
    }
    return Decoder(**{**known, **more})


GPT3 = decoder(174.6e9, 96, 12288, 96)
PALM = decoder(540.35e9, 118, 18432, 48, head=256, kv_heads=1, gated=True, vocab=256_000)
CHINCHILLA = decoder(70e9, 80, 8192, 64, vocab=32_000)
BLOOM = decoder(176.247e9, 70, 14336, 112, vocab=250_880)
TRILLION = decoder(1008e9, 128, 25600, 160, vocab=51_200)
LLAMA_405B = decoder(405.85e9, 126, 16384, 128, kv_heads=8, ffn=53248, gated=True, vocab=128_256)


@pytest.mark.parametrize(
    ("model", "sequence", "tokens", "published"),
    [
        (GPT3, 2048, 300e9, 3.14e23),  # Brown et al. 2020, arXiv 2005.14165, Table D.1
        (PALM, 2048, 780e9, 2.5272e24),  # Chowdhery et al. 2022, arXiv 2204.02311, table of training compute
        (CHINCHILLA, 2048, 1.4e12, 5.76e23),  # Hoffmann et al. 2022, arXiv 2203.15556, Table 3 and section 4
        (LLAMA_405B, 8192, 15.6e12, 3.8e25),  # Dubey et al. 2024, arXiv 2407.21783, section 3
    ],
    ids=["GPT-3", "PaLM", "Chinchilla", "Llama 3.1 405B"],
)
def test_flops_of_published_runs(model, sequence, tokens, published):
    assert plan.flops_per_token(model, sequence) * tokens == pytest.approx(published, rel=0.15)


def test_gpu_hours_of_llama_3_at_its_own_mfu():
    # arXiv 2407.21783, Table 4: MFU 0.41 on 16,384 GPUs; the model card: 30.84 M hours of an H100 for 405B.
    flops_of_run = plan.flops_per_token(LLAMA_405B, 8192) * 15.6e12
    assert plan.gpu_hours(flops_of_run, GPUS["H100"], 0.41) == pytest.approx(30.84e6, rel=0.15)


@pytest.mark.parametrize(
    ("model", "tokens", "teraflops", "hours"),
    [
        # Le Scao et al. 2022, arXiv 2211.05100, sections 3.2 and 3.4: up to 156 TFLOP/s a GPU, 1,082,990 hours.
        (BLOOM, 366e9, 156, 1_082_990),
        # Narayanan et al. 2021, arXiv 2104.04473, Table 1 and section 5.1: 1,024 GPUs, 34 days; 3,072 GPUs, 84 days.
        (GPT3, 300e9, 140, 1024 * 34 * 24),
        (TRILLION, 450e9, 163, 3072 * 84 * 24),
    ],
    ids=["BLOOM", "Megatron 175B", "Megatron 1T"],
)
def test_gpu_hours_where_every_activation_was_made_anew(model, tokens, teraflops, hours):
    gpu = GPUS["A100-80GB"]
    found = plan.gpu_hours(plan.run_flops_per_token(model, 2048) * tokens, gpu, teraflops * 1e12 / gpu.flops)
    assert found == pytest.approx(hours, rel=0.15)


def test_tokens_a_second_of_palm_at_its_own_mfu():
    # arXiv 2204.02311, section 4.1 and appendix B: 238.3 k tokens/s on 6,144 chips are 46.2 %.
    assert plan.tokens_per_s(PALM, 2048, TPU_V4, 6144, 0.462) == pytest.approx(238_300, rel=0.01)


def test_the_peaks_are_those_that_training_reports_its_mfu_by():
    names = {"H100": "NVIDIA H100 80GB HBM3", "A100-80GB": "NVIDIA A100-SXM4-80GB", "MI300X": None}
    for gpu in GPUS.values():
        if name := names.get(gpu.name, f"NVIDIA {gpu.name}"):
            assert flops.peak_flops(name, "bf16") == pytest.approx(gpu.flops, rel=1e-3), gpu.name


# Memory


ZERO_7_5B = decoder(7.5e9, 32, 4096, 32)
QUIET = Load(sequence=1, micro_batch=1, precision=2, checkpointing=False)


@pytest.mark.parametrize(("stage", "gigabytes"), [(0, 120), (1, 31.4), (2, 16.6), (3, 1.9)])
def test_state_is_that_of_the_zero_paper(stage, gigabytes):
    # Rajbhandari et al. 2020, arXiv 1910.02054, Figure 1: 7.5 B parameters on 64 ranks. What ZeRO-3 gathers is extra.
    found = plan.footprint(ZERO_7_5B, QUIET, stage, 64)
    gathered = 2 * plan.MOST_LIVE if stage == 3 else 0
    assert found.state + found.gradients - gathered == pytest.approx(gigabytes * 1e9, rel=0.02)


def test_muon_keeps_one_momentum_for_the_layers_matrices():
    # 4 bytes less for each of their parameters, on 64 ranks; the embedding and the head keep AdamW's two moments.
    hidden = ZERO_7_5B.multiplied - ZERO_7_5B.vocab * ZERO_7_5B.hidden
    adamw = plan.footprint(ZERO_7_5B, QUIET, 2, 64)
    muon = plan.footprint(ZERO_7_5B, QUIET._replace(optimizer="muon"), 2, 64)
    assert adamw.optimizer - muon.optimizer == pytest.approx(4 * hidden / 64)
    offloaded = plan.footprint(ZERO_7_5B, QUIET._replace(optimizer="muon", offload="optimizer"), 2, 64)
    assert offloaded.host == pytest.approx((16 * ZERO_7_5B.parameters - 4 * hidden) / 64)


def test_activations_are_those_of_the_paper():
    # Korthikanti et al. 2022, arXiv 2205.05198, equation 1: sbh(34 + 5as/h) a layer; here without dropout's masks (2)
    # and the quadratic term. Section 5: 2sbhL and one layer when all is made anew.
    load = Load(sequence=2048, micro_batch=2, precision=2, checkpointing=False)
    tokens = 2048 * 2
    assert plan.activation_bytes(GPT3, load) == tokens * 12288 * 32 * 96
    anew = plan.activation_bytes(GPT3, load._replace(checkpointing=True))
    assert anew == tokens * 12288 * (2 * 96 + 32)


def test_shared_keys_and_gated_blocks_by_hand():
    model = decoder(1e9, 1, 100, 10, kv_heads=2, ffn=300, gated=True)
    load = Load(sequence=1, micro_batch=1, precision=2, checkpointing=False)
    attention, block, norms = 2 * (100 + 200 + 40), 2 * (100 + 1200), 2 * 100 * 6
    assert plan.activation_bytes(model, load) == attention + block + norms
    assert plan.logit_bytes(model, load) == 50_257 * 10
    # Of a piece bf16 logits, their fp32 copy and gradient; of the head (100 wide) the gradient in fp32 and bf16.
    in_pieces = load._replace(loss_in_pieces=True)
    assert plan.logit_bytes(model, in_pieces) == 50_257 * (1 * 8 + 100 * 6)
    assert plan.logit_bytes(model, in_pieces._replace(sequence=4096)) == 50_257 * (256 * 8 + 100 * 6)


def test_offload_moves_bytes_and_makes_none():
    kept = plan.footprint(GPT3, QUIET, 3, 64)
    moved = plan.footprint(GPT3, QUIET._replace(offload="optimizer"), 3, 64)
    gone = plan.footprint(GPT3, QUIET._replace(offload="all"), 3, 64)
    share = GPT3.parameters / 64
    assert moved.optimizer == gone.optimizer == 0
    assert moved.update == pytest.approx(2 * share)
    assert moved.host == pytest.approx(16 * share)  # fp32 weights, moments and gradients
    assert gone.host == pytest.approx(18 * share)
    assert gone.weights == 2 * plan.MOST_LIVE
    assert gone.peak < moved.peak < kept.peak


# How many


def test_the_fewest_gpus_hold_it_and_half_as_many_do_not():
    gpu, load = GPUS["H100"], Load(sequence=4096, micro_batch=1, precision=2, checkpointing=True)
    for fit in plan.fits(decoder(7e9, 32, 4096, 32), load, gpu):
        assert fit.gpus
        assert fit.footprint.peak <= gpu.memory * plan.USABLE_MEMORY
        half = plan.footprint(decoder(7e9, 32, 4096, 32), load, fit.stage, fit.gpus // 2)
        assert half.peak > gpu.memory * plan.USABLE_MEMORY


def test_what_no_number_holds_is_said():
    load = Load(sequence=4096, micro_batch=1, precision=2, checkpointing=True)
    found = plan.fits(GPT3, load, GPUS["H100"])
    assert [fit.gpus is None for fit in found] == [True, True, False]  # 350 GB of weights on each rank
    best = plan.best(found)
    assert best is not None
    assert best.stage == 3
    assert plan.best(plan.fits(GPT3, load, GPUS["L4"], most=2)) is None


def test_of_equal_numbers_the_lowest_stage_is_best():
    small = decoder(1e8, 12, 768, 12)
    best = plan.best(plan.fits(small, QUIET, GPUS["H100"]))
    assert best is not None
    assert (best.gpus, best.stage) == (1, 1)


# Serving


def test_serving_by_hand():
    model, gpu = decoder(1e9, 10, 1000, 10, head=100), Gpu("fast", 80e9, 1e15, 1e12, "made up")
    found = plan.serving(model, gpu, batch=10, context=1000, mfu=0.5, usd_per_hour=3.6)
    cache = 2 * 2 * 10 * 10 * 100 * 1000 * 10
    assert plan.cache_bytes(model) * 1000 * 10 == cache
    assert found.decode_tokens_per_s == pytest.approx(10 / ((2e9 + cache) / (1e12 * plan.DECODE_BANDWIDTH)))
    forward = 2 * 1e9 + 4 * 10 * 10 * 100 * 1000
    assert found.prefill_tokens_per_s == pytest.approx(0.5e15 / forward)
    assert found.usd_output == pytest.approx(1e6 * 0.001 / found.decode_tokens_per_s)
    assert found.gpus == 1


def test_a_larger_batch_is_cheaper_until_arithmetic_bounds_it():
    model = decoder(7e9, 32, 4096, 32, kv_heads=8)
    prices = [plan.serving(model, GPUS["H200"], batch, 256, 0.4, 2.0).usd_output for batch in (1, 8, 64, 512)]
    assert prices == sorted(prices, reverse=True)
    forward = plan.flops_per_token(model, 256) / 3
    huge = plan.serving(model, GPUS["H200"], 2048, 256, 0.4, 2.0)
    assert huge.decode_tokens_per_s <= huge.gpus * GPUS["H200"].flops * 0.4 / forward * 1.001


def test_a_model_too_large_for_one_gpu_takes_more():
    assert plan.serving(LLAMA_405B, GPUS["H100"], 1, 1024, 0.4, None).gpus == 16
    assert plan.serving(LLAMA_405B, GPUS["H100"], 1, 1024, 0.4, None).usd_output is None
