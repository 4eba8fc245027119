"""What training and serving a decoder take: arithmetic, bytes a rank, hours, money. Plain numbers in and out.

Bytes are bytes, times seconds, prices US dollars. Every assumption is a constant or an argument here, and
`headwater plan` prints it. P is parameters, N ranks, b the bytes of a weight in the compute precision.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

Offload = Literal["none", "optimizer", "all"]

# What a run can be expected to reach (Llama 3, arXiv 2407.21783, Table 4: 0.38 to 0.43 on 8,192 and 16,384 H100s).
MFU = 0.4
# Compute-optimal tokens a parameter (Hoffmann et al. 2022, arXiv 2203.15556, Table 3: 20.2 tokens at 67 B).
CHINCHILLA_TOKENS = 20.0
# Of a GPU's memory; the rest is the CUDA context's, NCCL's, and what the allocator can't put together again.
USABLE_MEMORY = 0.9
# Of the memory bandwidth on the data sheet, while tokens are written one by one.
DECODE_BANDWIDTH = 0.6
LOSS_PIECE = 256  # positions
MOST_GPUS = 1 << 16

# DeepSpeed's own settings where the recipe's engine sets none, in elements.
REDUCE_BUCKET = 500_000_000
MOST_LIVE = 1_000_000_000  # stage3_max_live_parameters


class Gpu(NamedTuple):
    """A GPU by its maker's data sheet."""

    name: str
    memory: float  # bytes
    flops: float  # dense bf16 with fp32 sums, a second
    bandwidth: float  # of the memory, bytes a second
    sheet: str


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("L4", 24e9, 121e12, 300e9, "NVIDIA L4 data sheet, dense is half of sparse"),
        Gpu("L40S", 48e9, 362.05e12, 864e9, "NVIDIA L40S data sheet"),
        Gpu("A100-40GB", 40e9, 312e12, 1555e9, "NVIDIA A100 data sheet, SXM"),
        Gpu("A100-80GB", 80e9, 312e12, 2039e9, "NVIDIA A100 data sheet, SXM"),
        Gpu("H100", 80e9, 989.5e12, 3350e9, "NVIDIA H100 data sheet, SXM, dense is half of sparse"),
        Gpu("H200", 141e9, 989.5e12, 4800e9, "NVIDIA H200 data sheet, SXM, dense is half of sparse"),
        Gpu("B200", 180e9, 2250e12, 7700e9, "NVIDIA HGX B200 data sheet, an eighth, dense is half of sparse"),
        Gpu("MI300X", 192e9, 1307.4e12, 5300e9, "AMD Instinct MI300X data sheet"),
    )
}


class Decoder(NamedTuple):
    """What a plan needs to know of a model. Widths in features."""

    parameters: int
    multiplied: int  # of them those that a token is multiplied with: all but tables that are looked up
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head: int  # features of one
    ffn: int
    gated: bool  # SwiGLU with RMSNorm, as in Llama; else two matrices with LayerNorm, as in GPT
    vocab: int


class Load(NamedTuple):
    """How a decoder is trained on each rank."""

    sequence: int  # tokens in a row
    micro_batch: int  # rows in a forward pass
    precision: int  # b, bytes of a weight in computing: 2 or 4
    checkpointing: bool  # activations of all layers but one made anew in the backward pass
    tensor: int = 1  # ranks that share each layer's matrices
    offload: Offload = "none"
    optimizer: Literal["adamw", "muon"] = "adamw"
    loss_in_pieces: bool = False  # whether the head gives the loss of a piece of the rows at a time
    on_gpu: bool = True  # buffers count whole, and two work at once; a CPU's are taken page by page as they are filled


# Arithmetic


def flops_per_token(decoder: Decoder, sequence: int) -> float:
    """FLOPs of training on one token: 6N + 12LHQT (PaLM, arXiv 2204.02311, appendix B).

    N are the weights that a token is multiplied with. Attention counts the whole row, as in PaLM, though half of it is
    masked; making activations anew isn't counted.
    """
    return 6.0 * decoder.multiplied + 12.0 * decoder.layers * decoder.heads * decoder.head * sequence


def run_flops_per_token(decoder: Decoder, sequence: int) -> float:
    """FLOPs that hardware runs with every layer's activations made anew: a second forward pass, 8N + 16LHQT."""
    return flops_per_token(decoder, sequence) * 4 / 3


def tokens_per_s(decoder: Decoder, sequence: int, gpu: Gpu, gpus: int, mfu: float) -> float:
    """Tokens a second of so many GPUs together, at the share `mfu` of their peak (PaLM, appendix B)."""
    return gpus * gpu.flops * mfu / flops_per_token(decoder, sequence)


def gpu_hours(flops: float, gpu: Gpu, share: float) -> float:
    """Hours of one GPU for `flops` at that share of its peak: of MFU for model FLOPs, of HFU for those run."""
    return flops / (gpu.flops * share) / 3600


# Memory of a rank


class Footprint(NamedTuple):
    """Bytes of one rank on its device, and on the host."""

    weights: float  # in computing precision, with what ZeRO-3 gathers
    optimizer: float  # fp32 weights and moments
    gradients: float  # kept from one backward pass to the next
    activations: float  # kept for the backward pass, at its beginning
    logits: float  # with the loss's fp32 copies
    reduction: float  # beside the gradients, while the ranks' are added up
    update: float  # gradients and their fp32 copy, in the optimizer's step
    host: float  # what was offloaded, to the machine's memory or its disk

    @property
    def state(self) -> float:
        """What is there all the time."""
        return self.weights + self.optimizer

    @property
    def peak(self) -> float:
        """The most at once: at the loss, at the end of the backward pass, or in the optimizer's step."""
        loss = self.gradients + self.activations + self.logits
        return self.state + max(loss, self.gradients + self.reduction, self.update)


def footprint(decoder: Decoder, load: Load, stage: int, ranks: int) -> Footprint:
    """Bytes of a rank under ZeRO `stage` (0 to 3).

    Rajbhandari et al. 2020 (arXiv 1910.02054, section 5): each rank has a share 1/N of the optimizer's state from
    stage 1, of the gradients from 2, of the weights from 3. fp32 weights with AdamW's moments are 12 bytes a
    parameter; Muon keeps one momentum for the layers' matrices, 8 bytes, and makes a copy of it in a step. To these
    come DeepSpeed's buffers. Ranks that share the layers' matrices hold a smaller model, and shares of it are those of
    fewer ranks.
    """
    decoder, ranks = _cut(decoder, load.tensor), ranks // load.tensor
    size, share = float(decoder.parameters), decoder.parameters / ranks
    own = share if stage else size  # what the rank's optimizer updates
    weights = load.precision * (share if stage == 3 else size)
    muon = own * hidden_matrices(decoder) / size if load.optimizer == "muon" else 0.0
    kept, host = _offloaded(load.offload, stage, weights, 12.0 * own - 4.0 * muon, 4.0 * own)
    return Footprint(
        weights=kept[0] + (load.precision * min(size, MOST_LIVE) if stage == 3 else 0.0),
        optimizer=kept[1],
        gradients=load.precision * (share if stage >= 2 else size),
        activations=activation_bytes(decoder, load),
        logits=logit_bytes(decoder, load),
        reduction=_reduction(decoder, load, stage, share) if stage else 0.0,
        update=(2.0 * load.precision + 4.0) * own + 4.0 * muon if load.offload == "none" else load.precision * own,
        host=host,
    )


def _cut(decoder: Decoder, parts: int) -> Decoder:
    """What one of so many ranks has that share each layer's matrices; tables, head and norms are whole on each.

    Shoeybi et al. 2019 (arXiv 1909.08053, section 3): each has so many of the heads and of a block's inner features.
    """
    elsewhere = hidden_matrices(decoder) * (parts - 1) // parts
    return decoder._replace(
        parameters=decoder.parameters - elsewhere,
        multiplied=decoder.multiplied - elsewhere,
        heads=decoder.heads // parts,
        kv_heads=decoder.kv_heads // parts,
        ffn=decoder.ffn // parts,
    )


def _reduction(decoder: Decoder, load: Load, stage: int, share: float) -> float:
    """DeepSpeed's bucket, and the last gradient, the embedding's, before it is copied there.

    Under ZeRO-1 the rank's share is copied out while all gradients are still there; ZeRO-3 sends a copy of its bucket.
    A GPU's buckets have a size of their own, filled or not, and are two under ZeRO-1 and 2, where sending overlaps
    with computing.
    """
    filled = float(min(decoder.parameters, REDUCE_BUCKET))
    if load.on_gpu:
        buckets = REDUCE_BUCKET + filled if stage == 3 else 2.0 * REDUCE_BUCKET
    else:
        buckets = {1: share, 2: filled, 3: 2 * filled}[stage]
    return load.precision * (buckets + decoder.vocab * decoder.hidden)


def hidden_matrices(decoder: Decoder) -> int:
    """Parameters that Muon moves: all that a token is multiplied with but the head (norms are too few to count)."""
    return decoder.multiplied - decoder.vocab * decoder.hidden


def start_bytes(decoder: Decoder, stage: int, ranks: int, precision: int, tensor: int = 1) -> float:
    """Bytes of a rank on its device while the model is built.

    Under ZeRO 1 and 2 every rank builds it whole, in fp32, and where `tensor` ranks share the layers on the host, so
    that the device gets what the rank keeps; under ZeRO-3 (Llama's and most other architectures) a
    module at a time, of which the largest is the embedding, and keeps its share in the compute precision.
    """
    if tensor > 1:
        return float(precision * _cut(decoder, tensor).parameters)
    if stage < 3:
        return 4.0 * decoder.parameters
    return precision * decoder.parameters / ranks + (4.0 + precision) * decoder.vocab * decoder.hidden


def _offloaded(
    offload: Offload, stage: int, weights: float, state: float, gradients: float
) -> tuple[tuple[float, float], float]:
    """Weights and optimizer state that stay on the device, and bytes on the host (fp32 gradients are there too)."""
    if offload == "none" or stage == 0:
        return (weights, state), 0.0
    if offload == "all" and stage == 3:
        return (0.0, 0.0), weights + state + gradients
    return (weights, 0.0), state + gradients


def activation_bytes(decoder: Decoder, load: Load) -> float:
    """Bytes that the layers keep for the backward pass (Korthikanti et al. 2022, arXiv 2205.05198, section 4).

    Their equation 1 is sbh(34 + 5as/h) a layer: here without the quadratic term, which fused attention (sdpa, flash)
    leaves out, and without dropout's masks (2sbh); with grouped keys, gated blocks and RMSNorm's fp32 copy where the
    model has them. With checkpointing each layer keeps its input alone (their 2sbhL), and one layer is whole at a
    time.
    """
    tokens, layer = load.sequence * load.micro_batch, _layer_bytes(decoder, load.precision)
    if load.checkpointing:
        return tokens * (decoder.layers * load.precision * decoder.hidden + layer)
    return float(tokens * decoder.layers * layer)


def _layer_bytes(decoder: Decoder, precision: int) -> int:
    """Of one token in one layer."""
    width = decoder.heads * decoder.head
    attention = precision * (decoder.hidden + 2 * width + 2 * decoder.kv_heads * decoder.head)  # input, q, out, k, v
    block = precision * (decoder.hidden + (4 if decoder.gated else 2) * decoder.ffn)
    norms = 2 * decoder.hidden * (precision + 4 if decoder.gated else precision)
    return attention + block + norms


def logit_bytes(decoder: Decoder, load: Load) -> float:
    """Logits and what the loss makes of them.

    Where the head gives the loss: those of a piece of the rows, in fp32 too, with their gradient; and the gradient of
    the head's weight, summed in fp32, with a piece's part of it. Else all of them, with an fp32 copy and its logarithm
    of the softmax (the gradient takes the place of one).
    """
    if load.loss_in_pieces:
        of_piece = (2 * load.precision + 4) * min(LOSS_PIECE, load.sequence * load.micro_batch)
        return float(decoder.vocab * (of_piece + (4 + load.precision) * decoder.hidden))
    return float(load.sequence * load.micro_batch * decoder.vocab * (load.precision + 8))


# How many GPUs


class Fit(NamedTuple):
    """The smallest number of GPUs whose memory holds a rank under a ZeRO stage; None if no number does."""

    stage: int
    gpus: int | None
    footprint: Footprint


def fits(decoder: Decoder, load: Load, gpu: Gpu, most: int = MOST_GPUS) -> list[Fit]:
    """For ZeRO 1, 2 and 3 the fewest GPUs, a power of two (of groups that share layers), on which `load` fits.

    `most` GPUs at most; ZeRO-3 is for ranks with layers of their own.
    """
    return [_smallest(decoder, load, gpu, stage, most) for stage in stages(load)[1:]]


def stages(load: Load) -> range:
    """ZeRO's stages that a load can be trained with."""
    return range(3 if load.tensor > 1 else 4)


def best(found: list[Fit]) -> Fit | None:
    """The fewest GPUs, and of equal ones the lowest stage, which sends least; None if nothing fits."""
    return min((fit for fit in found if fit.gpus), key=lambda fit: (fit.gpus, fit.stage), default=None)


def _smallest(decoder: Decoder, load: Load, gpu: Gpu, stage: int, most: int) -> Fit:
    numbers = (load.tensor << power for power in range((most // load.tensor).bit_length()))
    for number in numbers:
        found = footprint(decoder, load, stage, number)
        if found.peak <= gpu.memory * USABLE_MEMORY:
            return Fit(stage, number, found)
    return Fit(stage, None, footprint(decoder, load, stage, most))


# Serving


class Serving(NamedTuple):
    """What serving takes; prices are of a million tokens, None without a price of a GPU."""

    gpus: int
    batch: int  # requests written at once
    context: int  # tokens that each looks back on
    decode_tokens_per_s: float  # of all requests together
    prefill_tokens_per_s: float
    usd_output: float | None
    usd_input: float | None


def serving(decoder: Decoder, gpu: Gpu, batch: int, context: int, mfu: float, usd_per_hour: float | None) -> Serving:
    """One replica in bf16 on the fewest GPUs that hold it.

    Writing a token reads every weight and the keys and values of all requests, so the memory's bandwidth bounds it
    until the batch is large; reading a prompt is bound by arithmetic (Pope et al. 2022, arXiv 2211.05102, section 2).
    """
    weights, cache = 2.0 * decoder.parameters, float(cache_bytes(decoder) * context * batch)
    gpus = 1 << max(0, math.ceil(math.log2((weights + cache) / (gpu.memory * USABLE_MEMORY))))
    forward = flops_per_token(decoder, context) / 3
    read = (2.0 * decoder.multiplied + cache) / (gpus * gpu.bandwidth * DECODE_BANDWIDTH)
    decode = batch / max(read, batch * forward / (gpus * gpu.flops * mfu))
    prefill = gpus * gpu.flops * mfu / forward
    output, put = (_per_million(gpus, usd_per_hour, rate) for rate in (decode, prefill))
    return Serving(gpus, batch, context, decode, prefill, output, put)


def cache_bytes(decoder: Decoder) -> int:
    """Bytes of one token's keys and values in bf16."""
    return 2 * 2 * decoder.layers * decoder.kv_heads * decoder.head


def _per_million(gpus: int, usd_per_hour: float | None, tokens_a_second: float) -> float | None:
    return None if usd_per_hour is None else gpus * usd_per_hour / 3600 / tokens_a_second * 1e6
