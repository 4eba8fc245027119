"""The benchmarks of pretraining: what is timed, what counts as the same work, what the peers are given."""

import json
import os
import time

import numpy as np
import pytest
import torch

from llm.order import batch_rows
from llm.packing import RowReader, pack, write_index
from llm.presets import Preset, build_model
from llm.shardfile import write_shard
from tests.bench import control_plane, drive, loop, pretrain, processes, recovery, workload
from tests.bench.agreement import same_losses
from tests.bench.measure import Invalid
from tests.bench.processes import Seen
from tests.bench.workload import L4_256, L8_512, Model, Plan

SMALL = Model("small", Preset(layers=1, hidden=16, heads=2, kv_heads=2, context=12), 64, rows=4)


# What is timed


def seen_of(seconds: list[float], gaps: list[float], **figures: float) -> list[Seen]:
    """Steps of those `seconds`, with `gaps` between each and the next, and the same other figures in each."""
    at, seen = 0.0, []
    for step, (took, gap) in enumerate(zip(seconds, [*gaps, 0.0], strict=True)):
        at += took
        seen.append(Seen({"step": step, "loss": 9.0 - step, "seconds": took, **figures}, at))
        at += gap
    return seen


def test_the_first_steps_are_left_out():
    turn = pretrain.turn_of(
        seen_of([9.0] * pretrain.WARM_UP + [2.0] * 5, [0.5] * (pretrain.WARM_UP + 4), data_wait_s=0.1)
    )
    assert turn.seconds == 10.0
    assert turn.made["data_wait_share"] == pytest.approx(0.05)
    assert turn.made["outside_share"] == pytest.approx(1 - 10.0 / 12.5)
    assert turn.made["losses"][:2] == [9.0, 8.0]


def test_a_stall_is_what_a_save_adds_between_steps_and_slow_steps_are_told_apart():
    saves = {5: 0.7, 11: 0.5, 17: 0.6}  # seconds, after these steps
    gaps = [0.1 + saves.get(step, 0.0) for step in range(19)]
    seconds = [1.0] * 6 + [1.25] * 2 + [1.0] * 4 + [1.25] * 2 + [1.0] * 6
    stall, slowdown = pretrain.stalls(seen_of(seconds, gaps, save_wait_s=0.0), every=6)
    assert (stall, slowdown) == (pytest.approx(0.6), pytest.approx(0.5))
    assert pretrain.stalls(seen_of(seconds, gaps, save_wait_s=0.65), every=6)[0] == pytest.approx(0.65)


def test_lines_come_once_though_the_file_is_replaced(tmp_path):
    path, looks = tmp_path / "metrics.jsonl", []
    states = [
        None,
        '{"step": 0}\n{"step": 1}\n{"st',
        '{"step": 0}\n',  # cut back to a checkpoint
        '{"step": 0}\n{"step": 1, "again": true}\n',
    ]

    def going_on() -> bool:
        if (text := states[len(looks)]) is not None:
            (tmp_path / "new").write_text(text)
            os.replace(tmp_path / "new", path)
        looks.append(text)
        return len(looks) < len(states)

    begun = time.time()
    seen = list(processes.lines(path, going_on))
    assert [one.record for one in seen] == [{"step": 0}, {"step": 1}, {"step": 1, "again": True}]
    assert begun <= seen[0].at <= seen[-1].at <= time.time()


def test_the_parts_of_a_recovery_are_all_of_it():
    parts = recovery.split([100.0, 101.0, 104.0, 109.0, 112.0], {"seconds": 2.5, "data_wait_s": 2.0})
    assert dict(zip(recovery.PARTS, parts, strict=True)) == {
        "detect": 1.0,
        "restart": 3.0,
        "load": 5.0,
        "first_batch": 2.5,
        "step": 0.5,
    }
    assert recovery.medians([parts, [3.0, 3.0, 5.0, 2.5, 0.5], [2.0, 9.0, 5.0, 2.5, 0.5]])["detect"] == 2.0


def test_a_step_that_the_dying_attempt_wrote_late_is_no_recovery():
    before = [{"step": step, "seconds": 1.0} for step in range(24)]
    late = {"step": 24, "seconds": 1.0}
    again = {"step": 20, "seconds": 1.5}
    assert recovery.made_again(before, [*before, late]) == []
    assert recovery.made_again(before, before[:20]) == []
    assert recovery.made_again(before, [*before[:20], again]) == [again]


# What counts as the same


def test_losses_of_the_first_steps_have_to_be_equal():
    mine, other = {"losses": [8.3, 8.1, 8.0]}, {"losses": [8.3, 8.1, 8.000005]}
    assert same_losses(mine, other, "fp32") == {"largest_loss_difference": pytest.approx(5e-6)}
    with pytest.raises(Invalid, match="in fp32 are not the same"):
        same_losses({"losses": [8.3, 8.1001]}, other, "fp32")
    for broken in ([8.3, float("nan")], []):
        with pytest.raises(Invalid):
            same_losses({"losses": broken}, other, "bf16")


def test_a_ledger_with_another_row_is_refused(monkeypatch):
    monkeypatch.setattr(control_plane, "rows_of", lambda model, step, seed: [model.rows * step, model.rows * step + 1])
    plan = control_plane._plan(1, 3)
    control_plane._check_ledger(plan, [[0, 1], [3, 2], [4, 5]])
    for wrong in ([[0, 1], [2, 4], [4, 5]], [[0, 1], [2, 3]], [[0, 1], [2, 2], [4, 5]]):
        with pytest.raises(Invalid):
            control_plane._check_ledger(plan, wrong)


# What the arms are given


@pytest.mark.parametrize("model", [L4_256, L8_512])
@pytest.mark.parametrize("workers", [1, 2])
def test_both_arms_are_given_the_same_training(monkeypatch, tmp_path, model, workers):
    monkeypatch.setattr(workload, "peer_inputs", lambda model: tmp_path)
    plan = Plan(model, workers, 1, 20, zero_stage=1)
    settings = workload.recipe_of(workload.recipe_settings(model, **plan.settings()), model.shape)
    ours, theirs = settings.pretrain, plan.order()
    assert (settings.model.shape, settings.shards.sequence_length) == (model.shape, model.shape.context)
    assert {ours.rate(step) for step in range(20)} == {theirs["learning_rate"]}
    for name in ("steps", "global_batch", "threads", "dtype", "workers", "zero_stage", "weight_decay", "clip_norm"):
        assert getattr(ours, name) == theirs[name], name
    assert ours.forward_rows == model.rows // workers


@pytest.fixture
def batches(monkeypatch, tmp_path):
    """A run with the shards of a few documents: its batches as the peers get them, and how to read its rows."""
    tokens = tmp_path / "shards" / "tokens"
    (tokens / "train").mkdir(parents=True)
    documents = [np.arange(3, 3 + length, dtype=np.uint32) for length in (30, 7, 18, 25, 40)]
    write_shard(tokens / "train" / "shard-00000-000.arrow", list("abcde"), documents, SMALL.vocabulary)
    index = pack(np.array([len(one) for one in documents]), SMALL.shape.context)
    write_index(index, tokens / "train" / "packing.arrow")
    manifest = {"pad_id": 0, "train": {"rows": index.num_rows}}
    monkeypatch.setattr(workload, "prepared", lambda model: tmp_path)
    monkeypatch.setattr(workload, "read_manifest", lambda folder: manifest)
    monkeypatch.setattr(workload, "STEPS", 7)
    return workload._batches(SMALL, seed=5), RowReader(tokens / "train", 0)


def test_the_peers_batches_are_those_of_the_stream(batches):
    given, reader = batches
    for step in range(7):
        rows = batch_rows(step, SMALL.rows, reader.index.num_rows, 5)
        expected = reader.read(rows)
        for name, values in given.items():
            np.testing.assert_array_equal(values[step * SMALL.rows : (step + 1) * SMALL.rows], expected[name])


def test_the_loops_loss_is_the_mean_over_the_global_batch_however_many_ranks(batches, tmp_path):
    rows = {name: torch.from_numpy(values[: SMALL.rows]).long() for name, values in batches[0].items()}
    order = {"global_batch": SMALL.rows, "dtype": "fp32", "clip_norm": 1.0, "learning_rate": 0.0, "weight_decay": 0.1}
    model = build_model(config_of(SMALL), 1)
    optimizer = loop.optimizer_of(model, {**order, "beta1": 0.9, "beta2": 0.95})
    reference = model(**rows, use_cache=False).loss.item()  # Hugging Face's own mean over the targets
    for world in (1, 2, 4):
        parts = [loop.train_step(model, optimizer, rows, rank, world, order) for rank in range(world)]
        assert sum(parts) == pytest.approx(reference, abs=1e-6)


def test_the_loop_trains_on_batches_in_order(batches, tmp_path):
    np.savez(tmp_path / "rows.npz", **batches[0])
    made = loop.batches_of({"rows": str(tmp_path / "rows.npz"), "global_batch": SMALL.rows, "steps": 3})
    assert len(made) == 3
    for step, batch in enumerate(made):
        part = slice(step * SMALL.rows, (step + 1) * SMALL.rows)
        assert batch["input_ids"].tolist() == batches[0]["input_ids"][part].tolist()


def test_a_nap_takes_its_time_and_moves_no_weight():
    model = build_model(config_of(SMALL), 1)
    begun = time.monotonic()
    nats = drive.nap(0.05, model, {"labels": torch.tensor([[-100, 3, 4], [-100, -100, 5]])})
    assert time.monotonic() - begun >= 0.05
    nats.backward()
    assert nats.item() == 3
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in model.parameters())


def config_of(model: Model):
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=model.vocabulary,
        hidden_size=model.shape.hidden,
        intermediate_size=32,
        num_hidden_layers=model.shape.layers,
        num_attention_heads=model.shape.heads,
        num_key_value_heads=model.shape.kv_heads,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=2,
    )


def test_an_order_travels_as_json():
    words = processes.torchrun(2, {"rows": workload.WORK / "rows.npz", "steps": 3}, "-m", "tests.bench.loop")
    assert words[-3:-1] == ["-m", "tests.bench.loop"]
    assert json.loads(words[-1]) == {"rows": str(workload.WORK / "rows.npz"), "steps": 3}
