"""Rows shared by ranks (Ulysses): their tokens and labels cut up, and training on them against whole rows."""

import json
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from llm import sequence, zero
from llm.losses import next_token_nats, target_nats
from llm.packing import IGNORED, split_rows
from llm.presets import PRESETS, build_model, llama_config
from tests.llm.ranks import on_ranks
from tests.llm.test_zero import FakeTokenizer, leave

TOKENS, ROWS, VOCAB = 16, 4, 40


def rows() -> dict[str, np.ndarray]:
    """Rows of two pieces each, which end in different places, one of them at the cut between two ranks."""
    generator = np.random.default_rng(0)
    ids = generator.integers(0, VOCAB, (ROWS, TOKENS), dtype=np.int32)
    ends = [5, 8, 11, 14]
    positions = np.array([[*range(end), *range(TOKENS - end)] for end in ends], dtype=np.int32)
    labels = np.where(positions == 0, IGNORED, ids)  # a piece's first token is nobody's target
    return {"input_ids": ids, "position_ids": positions, "labels": labels}


def tensors(columns: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(values.astype(np.int64)) for name, values in columns.items()}


def model():
    return build_model(llama_config(PRESETS["micro"], FakeTokenizer()), seed=3)


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_parts_hold_each_token_and_target_once(parts):
    whole = rows()
    cut = [split_rows(whole, part, parts) for part in range(parts)]
    for name in ("input_ids", "position_ids"):
        assert np.array_equal(np.concatenate([one[name] for one in cut], axis=1), whole[name])
    targets = np.concatenate([one["targets"] for one in cut], axis=1)
    assert np.array_equal(targets[:, :-1], whole["labels"][:, 1:])
    assert (targets[:, -1] == IGNORED).all()


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_losses_of_the_parts_are_the_rows(parts):
    whole = rows()
    logits = torch.randn(ROWS, TOKENS, VOCAB, generator=torch.Generator().manual_seed(0))
    cut = [tensors(split_rows(whole, part, parts))["targets"] for part in range(parts)]
    found = sum(target_nats(*pair) for pair in zip(logits.chunk(parts, dim=1), cut, strict=True))
    assert found.item() == pytest.approx(next_token_nats(logits, tensors(whole)["labels"]).item(), rel=1e-6)


def test_a_token_sees_its_own_piece_up_to_itself():
    mask = sequence.piece_mask(torch.tensor([[0, 1, 0, 1], [3, 4, 5, 0]]))[:, 0].int().tolist()
    assert mask[0] == [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]]
    assert mask[1] == [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [0, 0, 0, 1]]


@pytest.mark.parametrize(
    ("parts", "tokens", "why"),
    [(2, 16, None), (2, 15, "15 tokens of a row"), (3, 15, "2 heads"), (4, 16, "2 heads")],
)
def test_heads_and_tokens_must_divide(parts, tokens, why):
    found = sequence.why_not(llama_config(PRESETS["micro"], FakeTokenizer()), parts, tokens)
    assert found is None if why is None else why in found


def test_a_model_that_does_not_say_its_heads_is_named():
    from transformers import GPT2Config

    assert "gpt2" in sequence.why_not(GPT2Config(), 2, 16)


# Ranks


@dataclass(frozen=True)
class Case:
    """Ranks in groups that share rows, and the ZeRO stage."""

    ranks: int
    group: int
    stage: int
    micro_batch: int


def rank_main(rank: int, case: Case, folder: str) -> None:
    os.environ.update(DS_ACCELERATOR="cpu", RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(case.ranks))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=case.ranks)
    zero.deepspeed().init_distributed()
    shares = case.ranks // case.group
    mine, part = divmod(rank, case.group)
    own = {name: np.array_split(values, shares)[mine] for name, values in rows().items()}
    losses = train(case, tensors(split_rows(own, part, case.group)), shares)
    if rank == 0:
        Path(folder, "found.json").write_text(json.dumps(losses))
    leave()


def train(case: Case, batch: dict[str, torch.Tensor], shares: int) -> list[float]:
    """Losses and gradient norm of three steps, as a training worker takes them."""
    whole = model()
    forwards = ROWS // shares // case.micro_batch
    settings = zero.zero_settings(
        stage=case.stage, micro_batch=case.micro_batch, accumulation=forwards, dtype="fp32", clip_norm=0.0
    )
    groups = sequence.share_rows(whole, case.group, case.micro_batch)
    engine = zero.initialise(whole, settings, betas=(0.9, 0.95), weight_decay=0.1, mpu=groups)
    zero.set_learning_rate(engine, 1e-2)
    found = []
    for _ in range(3):
        total = torch.zeros(())
        for forward in range(forwards):
            one = {name: values.split(case.micro_batch)[forward] for name, values in batch.items()}
            logits = engine(input_ids=one["input_ids"], position_ids=one["position_ids"], use_cache=False).logits
            nats = target_nats(logits, one["targets"])
            engine.backward(nats * zero.averaged_over(engine) * forwards / targets())
            engine.step()
            total += nats.detach()
        dist.all_reduce(total)
        found += [total.item() / targets(), float(engine.get_global_grad_norm())]
    return found


def targets() -> int:
    return int((rows()["labels"][:, 1:] != IGNORED).sum())


def reference() -> list[float]:
    """The same by torch on whole rows."""
    whole, batch = model(), tensors(rows())
    optimizer = torch.optim.AdamW(zero.parameter_groups(whole, 0.1), lr=1e-2, betas=(0.9, 0.95))
    found = []
    for _ in range(3):
        logits = whole(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
        loss = next_token_nats(logits, batch["labels"]) / targets()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(whole.parameters(), float("inf"))
        optimizer.step()
        optimizer.zero_grad()
        found += [loss.item(), norm.item()]
    return found


@pytest.mark.slow
@pytest.mark.parametrize("case", [Case(2, 2, 2, 2), Case(2, 2, 3, 4), Case(4, 2, 1, 2)], ids=str)
def test_training_on_shared_rows_equals_whole_rows(case, tmp_path):
    on_ranks(rank_main, (case, str(tmp_path)), case.ranks)
    assert json.loads((tmp_path / "found.json").read_text()) == pytest.approx(reference(), abs=2e-5)
