"""What a rank does by itself in a step, what it goes on from, and how the driver takes what the workers tell."""

from __future__ import annotations

import os
import time
from contextlib import ExitStack
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.functional import cross_entropy

from cluster.errors import StageFailed, Stopped
from llm import checkpoint, slices, zero
from llm.clocks import Clock
from llm.packing import IGNORED
from pipelines import checkpoints, records, starts, training, worker
from pipelines.schema import PretrainSettings
from pipelines.worker import Batch, Trainer

CPU = torch.device("cpu")
ROWS, TOKENS, VOCAB, SEED = 8, 5, 11, 1337
SETTINGS = PretrainSettings(steps=6, warmup_steps=1, global_batch=ROWS, workers=4, min_workers=1, micro_batch=2)

ALONE = SETTINGS.among(1)


@pytest.fixture
def one_rank():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class Engine:
    """What a step asks of DeepSpeed's engine, with plain gradient descent: no state but the weights."""

    sequence_parallel_size = 1

    def zero_optimization_stage(self) -> int:
        return 1

    def autotp_size(self) -> int:
        return 0

    def __init__(self, model: nn.Module, micro_batches: int):
        self.module, self.micro_batches, self.taken = model, micro_batches, 0

    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        return self.module(ids)

    def backward(self, loss: torch.Tensor) -> None:
        (loss / self.micro_batches).backward()

    def step(self) -> None:
        self.taken += 1
        if self.taken % self.micro_batches == 0:
            with torch.no_grad():
                for weight in self.module.parameters():
                    weight -= 0.1 * weight.grad

    def gradients(self) -> list[torch.Tensor]:
        return [weight.grad.clone() for weight in self.module.parameters()]


def model_with(dropout: float) -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Embedding(VOCAB, 8), nn.Dropout(dropout), nn.Linear(8, VOCAB))


def objective(engine, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    logits = engine(batch["input_ids"])
    return cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), ignore_index=IGNORED, reduction="sum")


def global_batch(step: int, filled_to: int = ROWS) -> Batch:
    """The rows of a global batch, and empty ones behind them."""
    random = np.random.default_rng(step)
    ids, labels = (random.integers(0, VOCAB, (ROWS, TOKENS)) for _ in range(2))
    empty = ((0, filled_to - ROWS), (0, 0))
    arrays = {"input_ids": np.pad(ids, empty), "labels": np.pad(labels, empty, constant_values=IGNORED)}
    return Batch(np.arange(filled_to), ROWS * TOKENS, arrays, 0.0)


def trainer_of(engine: Engine, settings: PretrainSettings = ALONE, saver=None):
    job = SimpleNamespace(settings=settings, objective=objective, stream=SimpleNamespace(seed=SEED))
    told = []
    watchdog = SimpleNamespace(at=lambda *place: told.append(place))
    trainer = SimpleNamespace(
        job=job, engine=engine, device=CPU, step=0, clock=Clock(CPU), watchdog=watchdog, told=told,
        saver=saver or SimpleNamespace(before_change=lambda: None),
    )  # fmt: skip
    trainer._at = lambda *place: Trainer._at(trainer, *place)
    return trainer


def train(model: nn.Module, steps: range) -> list[float]:
    model.train()
    for weight in model.parameters():
        weight.grad = None
    trainer, losses = trainer_of(Engine(model, ALONE.forward_passes)), []
    for step in steps:
        trainer.step = step
        model.zero_grad()
        losses.append(Trainer._forward_backward(trainer, global_batch(step)))
    return losses


# A step


def test_dropout_after_a_restart_is_what_it_would_have_been(one_rank):
    model = model_with(dropout=0.1)
    whole = train(model, range(6))
    restarted = model_with(dropout=0.1)
    first = train(restarted, range(3))
    torch.manual_seed(99)  # as in a new process, in which other things were drawn
    torch.rand(7)
    assert first + train(restarted, range(3, 6)) == whole
    assert all(torch.equal(one, other) for one, other in zip(model.parameters(), restarted.parameters(), strict=True))
    assert train(model_with(dropout=0.0), range(6)) != whole, "it is dropout that is drawn"


def test_every_step_and_rank_draws_another_dropout():
    seeds = {worker.dropout_seed(SEED, step, rank) for step in range(50) for rank in range(8)}
    assert len(seeds) == 400
    assert worker.dropout_seed(SEED, 1, 0) != worker.dropout_seed(SEED + 1, 1, 0)


@pytest.mark.parametrize("workers", [2, 3, 4])
def test_the_gradient_is_the_same_for_a_number_of_workers_that_does_not_divide_the_batch(workers, monkeypatch):
    def gradients(workers: int) -> tuple[list[torch.Tensor], float]:
        """Averaged over the ranks, as DeepSpeed does, and the loss added up."""
        settings = SETTINGS.among(workers)
        share, found, nats = settings.rows_per_worker, [], 0.0
        monkeypatch.setattr(worker.dist, "get_world_size", lambda: workers)
        for rank in range(workers):
            monkeypatch.setattr(worker.dist, "get_rank", lambda rank=rank: rank)
            whole = global_batch(0, workers * share)
            own = {name: values[rank * share : (rank + 1) * share] for name, values in whole.arrays.items()}
            engine = Engine(model_with(0.0), settings.forward_passes)
            mine = Batch(whole.rows[rank * share : (rank + 1) * share], whole.targets, own, 0.0)
            nats += Trainer._forward_backward(trainer_of(engine, settings), mine)
            found.append(engine.gradients())
        return [torch.stack(one).mean(0) for one in zip(*found, strict=True)], nats

    (expected, loss), (got, other_loss) = gradients(1), gradients(workers)
    assert other_loss == pytest.approx(loss, rel=1e-6)
    for one, other in zip(expected, got, strict=True):
        torch.testing.assert_close(other, one, atol=1e-6, rtol=1e-5)


def test_ranks_that_share_layers_drop_the_same_and_are_counted_once(monkeypatch):
    """Four ranks in groups of two, a group with half of the rows: what all ranks gather is told once a group."""
    settings = SETTINGS.model_copy(update={"workers": 4, "tensor_parallel": 2})
    nats, tables = [], []
    monkeypatch.setattr(worker.dist, "get_world_size", lambda: 4)
    for rank in range(4):
        monkeypatch.setattr(worker.dist, "get_rank", lambda rank=rank: rank)
        whole, half = global_batch(0), slice(rank // 2 * ROWS // 2, (rank // 2 + 1) * ROWS // 2)
        own = {name: values[half] for name, values in whole.arrays.items()}
        mine = Batch(whole.rows[half], whole.targets, own, 0.0)
        trainer = trainer_of(Engine(model_with(0.5), settings.forward_passes), settings)
        nats.append(Trainer._forward_backward(trainer, mine))
        tables.append((trainer, mine))
    assert nats[0] == nats[1] != nats[2] == nats[3]

    sent: list[torch.Tensor] = []

    def everyones(into: list[torch.Tensor], mine: torch.Tensor) -> None:
        sent.append(mine)
        for target, one in zip(into, sent, strict=False):
            target.copy_(one)

    monkeypatch.setattr(worker.dist, "all_gather", everyones)
    monkeypatch.setattr(worker.dist, "get_rank", lambda: 1)
    for (trainer, mine), own_nats in zip(tables, nats, strict=True):
        trainer.slowness, trainer._tell_slow = None, lambda forward_s: None
        trainer.job.stream.global_batch = ROWS
        total, rows, _, _ = Trainer._gather(trainer, own_nats, mine)
    assert total == pytest.approx(nats[0] + nats[2])
    assert rows == list(range(ROWS))


def test_the_micro_batches_of_a_step_are_told_apart(one_rank):
    trainer = trainer_of(Engine(model_with(0.0), 4))
    trainer.step = 7
    Trainer._forward_backward(trainer, global_batch(7))
    phases = ("forward", "backward", "optimizer")
    assert trainer.told == [(7, phase, part) for part in range(4) for phase in phases]


def test_a_share_is_whole_forward_passes_whatever_the_number_of_workers():
    assert [SETTINGS.among(workers).rows_per_worker for workers in (1, 2, 3, 4, 5, 8)] == [8, 4, 4, 2, 2, 1]
    for workers in range(1, 20):
        of_so_many = SETTINGS.among(workers)
        assert of_so_many.forward_rows <= SETTINGS.micro_batch
        assert of_so_many.rows_per_worker % of_so_many.forward_rows == 0
        assert workers * of_so_many.rows_per_worker >= ROWS


# A save beside a step


class Saved(nn.Linear):
    def save_pretrained(self, folder, state_dict):
        folder.mkdir(parents=True)
        torch.save(state_dict, folder / "weights")


def test_the_optimizer_step_waits_for_the_copy_and_what_is_saved_is_the_step_named(one_rank, tmp_path, monkeypatch):
    model = Saved(4, 4, bias=False)
    before = model.weight.detach().clone()
    copy = checkpoint._copy

    def slow_copy(tensor: torch.Tensor) -> torch.Tensor:
        time.sleep(0.3)
        return copy(tensor)

    monkeypatch.setattr(checkpoint, "_copy", slow_copy)
    monkeypatch.setattr(zero, "is_sharded", lambda engine: False)
    monkeypatch.setattr(slices, "parts_of", lambda engine: 1)
    monkeypatch.setattr(zero, "whole_weights", lambda engine: {"weight": model.weight.data})
    views = {"weight": model.weight.data.view(-1)}
    monkeypatch.setattr(zero, "counters", lambda engine: {"steps": 1.0})
    monkeypatch.setattr(zero, "fragments", lambda engine: iter([zero.Fragment("weight", 0, views)]))
    tokenizer = SimpleNamespace(save_pretrained=lambda folder: None)
    saver = checkpoints.Saver(tmp_path, checkpoints.store(tmp_path, "word", lambda: None), tokenizer, (2, 0))

    def change() -> None:
        model.weight.data.mul_(2)

    engine = SimpleNamespace(module=model, backward=lambda loss: None, step=change, sequence_parallel_size=1)
    trainer = trainer_of(engine, PretrainSettings(steps=6, warmup_steps=1, global_batch=ROWS), saver)
    trainer.job.objective = lambda engine, batch: torch.zeros(())
    saver.begin(engine, 1, {})
    Trainer._forward_backward(trainer, global_batch(1))
    saver.settle()

    assert torch.equal(model.weight, 2 * before), "the step was taken"
    assert saver.held_up_s > 0.25, "it waited for the copy"
    found = checkpoints.newest(tmp_path)
    restored = torch.zeros(16)
    checkpoint.restore_state(found, [zero.Fragment("weight", 0, {"weight": restored})])
    assert found.step == 1
    assert torch.equal(restored, before.flatten())
    assert torch.equal(torch.load(found.model / "weights")["weight"], before)


# Where a start of the workers goes on


def test_every_rank_takes_the_checkpoint_that_rank_0_chose_not_one_published_since(tmp_path, monkeypatch):
    for step in (5, 10):
        (tmp_path / f"checkpoints/step-{step:08d}").mkdir(parents=True)
        (tmp_path / f"checkpoints/step-{step:08d}/manifest.json").write_text(f'{{"step": {step}, "files": {{}}}}')
    monkeypatch.setattr("ray.train.torch.get_device", lambda: CPU)
    monkeypatch.setattr(worker.dist, "get_rank", lambda: 1)
    monkeypatch.setattr(worker, "_shared", lambda known: starts.Begun("word", 5, "step-00000005"))
    job = SimpleNamespace(checkpoints=tmp_path / "checkpoints", folder=tmp_path)
    with ExitStack() as files:
        assert worker._taken_over(job, files).saved.step == 5


def test_rank_0_says_where_it_goes_on_before_the_stream_is_made(tmp_path):
    job = SimpleNamespace(checkpoints=tmp_path / "checkpoints", folder=tmp_path, settings=SETTINGS)
    with ExitStack() as files:
        origin = worker._chosen(job, files)
    assert starts.begun(job.checkpoints) == origin.begun
    assert (origin.begun.step, origin.begun.checkpoint, origin.saved) == (0, None, None)


def test_workers_that_were_ended_after_the_last_save_ask_for_no_more_rows(tmp_path, monkeypatch):
    def asked(name: str):
        raise AssertionError("there is no stream behind the last step")

    context = SimpleNamespace(get_world_rank=lambda: 0, get_world_size=lambda: 1)
    monkeypatch.setattr("ray.train.get_context", lambda: context)
    monkeypatch.setattr("ray.train.get_dataset_shard", asked)
    begun = starts.Begun("word", SETTINGS.steps, f"step-{SETTINGS.steps:08d}")
    monkeypatch.setattr(worker, "_taken_over", lambda job, files: worker.Origin(begun, None, lambda: None))
    (tmp_path / "logs").mkdir()
    job = SimpleNamespace(folder=tmp_path, settings=SETTINGS, among=lambda workers: job)
    worker.work(job)


# The driver


def driven(tmp_path, monkeypatch, tell, step: int = 0) -> list[str]:
    """What `training.train` prints where its workers end at once, after `tell` did to their folder."""
    printed, attempts = [], []
    monkeypatch.setattr(training.console, "print", printed.append)

    def attempt(job, follow) -> None:
        attempts.append(job)
        assert len(attempts) < 4, "it goes on for ever"
        tell(tmp_path, len(attempts))

    monkeypatch.setattr(training, "_attempt", attempt)
    job = SimpleNamespace(folder=tmp_path, settings=SETTINGS, resume_step=lambda: step)
    try:
        training.train(job, "pretrain", lambda record: None)
    finally:
        printed.append(f"{len(attempts)} attempts")
    return printed


def skipped(folder, number: int) -> None:
    event = {"step": 4, "event": "skipped", "why": "the loss is nan", "back_to": 3, "batches": [3, 5 + number]}
    records.append(folder / records.EVENTS, event)


def test_giving_up_ends_the_stage_at_once_in_its_own_words(tmp_path, monkeypatch):
    def tell(folder, number: int) -> None:
        if number == 1:
            return skipped(folder, number)
        gave_up = {"step": 4, "event": "gave up", "why": "the loss is nan", "skips": 1}
        records.append(folder / records.EVENTS, gave_up)

    with pytest.raises(StageFailed) as failed:
        driven(tmp_path, monkeypatch, tell)
    assert failed.value.exit_code == 4
    said = "pretrain: step 4: the loss is nan; bad batches were left out 1 times (max_skips)"
    assert failed.value.problems[0].what == said
    with pytest.raises(Stopped):  # what an earlier command gave up is no reason to give up
        driven(tmp_path, monkeypatch, lambda folder, number: None)


def test_workers_that_end_before_the_last_step_were_asked_to(tmp_path, monkeypatch):
    with pytest.raises(Stopped, match="state saved at step 2"):
        driven(tmp_path, monkeypatch, lambda folder, number: None, step=2)


def test_resuming_after_the_last_step_says_that_nothing_is_trained(tmp_path, monkeypatch):
    printed = driven(tmp_path, monkeypatch, skipped, step=SETTINGS.steps)
    assert printed == ["pretrain: all 6 steps were taken before, none is taken now", "0 attempts"]


def test_only_elastic_workers_start_under_a_short_deadline(monkeypatch):
    monkeypatch.delenv(training.TIMEOUT_VARIABLE, raising=False)
    for settings, expected in ((SETTINGS, "25"), (SETTINGS.model_copy(update={"min_workers": None}), None)):
        with training._start_timeout(settings):
            assert os.environ.get(training.TIMEOUT_VARIABLE) == expected
        assert training.TIMEOUT_VARIABLE not in os.environ
