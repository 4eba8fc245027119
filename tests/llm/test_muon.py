"""Muon over ZeRO's shares against torch's own Muon on whole matrices, and what checkpoints keep of an optimizer."""

import os
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from llm import checkpoint as checkpoints
from llm import muon, zero
from llm.losses import next_token_nats
from tests.llm.test_zero import BETAS, DECAY, RATE, ROWS, TOKENS, Case, batch, fresh_model
from tests.llm.test_zero import train as losses_of

STEPS = 5
EXACT = partial(Case, optimizer="muon", orthogonalised_in="fp32")
CLIPPED = 0.05  # far below the gradients' norm, so that clipping acts in every step


def trained(case: Case, folder: Path) -> dict[str, torch.Tensor]:
    """The weights that `case` ends with."""
    losses_of(case, folder)
    return load_file(checkpoints.newest(Path(case.save)).model / "model.safetensors")


def reference(clip_norm: float, monkeypatch) -> dict[str, torch.Tensor]:
    """The same by torch's Muon for the layers' matrices and its AdamW for the rest, in one process.

    Its orthogonalisation is put in fp32: in bf16, rounding alone sets two trainings 4 % apart.
    """
    monkeypatch.setattr("torch.optim._muon._zeropower_via_newtonschulz", newton_schulz)
    model = fresh_model()
    named = dict(model.named_parameters())
    hidden = [weight for name, weight in named.items() if ".layers." in name and weight.dim() == 2]
    rest = [group for group in zero.parameter_groups(model, DECAY, "muon") if not group["muon"]]
    optimizers = [
        torch.optim.Muon(hidden, lr=RATE, weight_decay=DECAY, momentum=0.95, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=RATE, betas=BETAS),
    ]
    for number in range(STEPS):
        ids = batch(number)
        (next_token_nats(model(input_ids=ids).logits, ids) / (ROWS * (TOKENS - 1))).backward()
        if clip_norm:
            assert torch.nn.utils.clip_grad_norm_(model.parameters(), clip_norm) > clip_norm
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    return {name: weight.detach() for name, weight in named.items()}


def newton_schulz(update: torch.Tensor, coefficients: tuple, steps: int, eps: float) -> torch.Tensor:
    """By powers of the singular values' squares on the left, whatever the shape."""
    a, b, c = coefficients
    x = update / update.norm().clamp(min=eps)
    for _ in range(steps):
        square = x @ x.T
        x = a * x + b * square @ x + c * square @ square @ x
    return x


def assert_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    begun = fresh_model().state_dict()
    for name, weight in expected.items():
        off = (found[name] - weight).norm() / (weight - begun[name]).norm()
        assert off < 1e-3, f"{name} is off by {off:.2g} of what training moved it by"


def test_orthogonalised_as_torch_does_it():
    from torch.optim._muon import _zeropower_via_newtonschulz

    for rows, columns in ((6, 6), (4, 12), (12, 4)):
        update = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows))
        expected = _zeropower_via_newtonschulz(update.clone(), muon.COEFFICIENTS, 5, 1e-7)
        assert torch.equal(muon.orthogonalise(update.bfloat16()), expected)


def test_hidden_matrices_are_those_of_the_layers():
    model = fresh_model()
    hidden = muon.hidden_matrices(model)
    names = {name for name, weight in model.named_parameters() if id(weight) in hidden}
    assert "model.layers.0.mlp.down_proj.weight" in names
    assert not names & {"model.embed_tokens.weight", "lm_head.weight", "model.layers.0.input_layernorm.weight"}


@pytest.mark.slow
@pytest.mark.parametrize("clip_norm", [0.0, CLIPPED])
@pytest.mark.parametrize(("ranks", "stage"), [(1, 1), (1, 2), (2, 1), (2, 2), (2, 3)])
def test_training_equals_torchs_muon_on_whole_matrices(ranks, stage, clip_norm, tmp_path, monkeypatch):
    case = EXACT(ranks, stage, last=STEPS, clip_norm=clip_norm, save=str(tmp_path / "saved"))
    assert_close(trained(case, tmp_path / "run"), reference(clip_norm, monkeypatch))


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [((2, 2), (1, 1)), ((2, 2), (2, 3)), ((2, 3), (2, 2))])
def test_momentum_moves_between_numbers_of_ranks_and_stages(before, after, tmp_path, monkeypatch):
    first = str(tmp_path / "first")
    losses_of(EXACT(*before, last=2, clip_norm=CLIPPED, save=first), tmp_path / "run")
    case = EXACT(*after, first=2, last=STEPS, clip_norm=CLIPPED, load=first, save=str(tmp_path / "second"))
    assert_close(trained(case, tmp_path / "on"), reference(CLIPPED, monkeypatch))


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_resumed_equals_uninterrupted_bit_for_bit(stage, tmp_path):
    first, whole, parts = (str(tmp_path / name) for name in ("first", "whole", "parts"))
    expected = trained(Case(2, stage, last=STEPS, optimizer="muon", save=whole), tmp_path / "run")
    losses_of(Case(2, stage, last=2, optimizer="muon", save=first), tmp_path / "begun")
    found = trained(Case(2, stage, first=2, last=STEPS, optimizer="muon", load=first, save=parts), tmp_path / "on")
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())


@pytest.mark.parametrize(("wrote", "reads"), [("muon", "adamw"), ("adamw", "muon")])
def test_the_other_optimizers_state_is_refused_by_name(wrote, reads, tmp_path):
    def fragment(optimizer: str) -> zero.Fragment:
        kinds = ("weight", *zero.MOMENTS[optimizer])
        return zero.Fragment("matrix", 0, {kind: torch.ones(4) for kind in kinds})

    checkpoints.save_state(tmp_path / "state-00-of-01.safetensors", [fragment(wrote)])
    with pytest.raises(ValueError, match=f"optimizer={wrote} and can't go on with optimizer={reads}"):
        checkpoints.restore_state(checkpoints.Checkpoint(tmp_path, {"step": 1}), [fragment(reads)])


class FakeEngine:
    """As much of an engine as its counters need: AdamW's state, and DeepSpeed's own loss scaler."""

    def __init__(self, steps: int):
        scaler = dynamic_scaler()
        weight = torch.nn.Parameter(torch.ones(2))
        adamw = torch.optim.AdamW([weight], lr=0.1)
        adamw.state[weight] = {"step": torch.tensor(float(steps))}
        self.optimizer = type("Zero", (), {"optimizer": adamw, "loss_scaler": scaler})


def dynamic_scaler():
    zero.deepspeed()
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler

    return DynamicLossScaler(2.0**16, scale_window=3, min_scale=1, delayed_shift=2, consecutive_hysteresis=False)


@pytest.fixture
def one_rank(tmp_path):
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    zero.deepspeed().init_distributed()
    yield
    dist.destroy_process_group()


def test_loss_scale_and_steps_taken_go_on_where_they_were(one_rank):
    overflows = [True, True, False, False, False, False, False, True, False, False]
    whole = FakeEngine(steps=0)
    for overflow in overflows:
        whole.optimizer.loss_scaler.update_scale(overflow)
    begun, resumed = FakeEngine(steps=3), FakeEngine(steps=0)
    for overflow in overflows[:5]:
        begun.optimizer.loss_scaler.update_scale(overflow)
    zero.set_counters(resumed, zero.counters(begun))
    assert zero.counters(resumed)["steps"] == 3, "the two steps that overflowed weren't taken"
    assert zero.counters(resumed)["cur_scale"] == 2.0**15, "the first overflow is forgiven, the second halves it"
    for overflow in overflows[5:]:
        resumed.optimizer.loss_scaler.update_scale(overflow)
    expected = vars(whole.optimizer.loss_scaler)
    assert vars(resumed.optimizer.loss_scaler) == expected
