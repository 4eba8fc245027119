"""Layers shared by ranks: what each has of a matrix, and training on them against whole ones."""

from __future__ import annotations

import itertools
import json
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from llm import boxes, checkpoint, slices, zero
from llm.boxes import Stretch
from llm.slices import Columns
from tests.llm.test_zero import STEPS, Case, config, fresh_model, reference, reference_steps, train

WHOLE = torch.arange(5 * 6).view(5, 6)


def values_of(stretch: Stretch) -> torch.Tensor:
    """Of WHOLE, as a rank holds them."""
    first, width, _ = stretch.columns or Columns(0, 6, 6)
    return WHOLE[:, first : first + width].reshape(-1)[stretch.start : stretch.start + stretch.numel]


def stretches(columns: Columns | None) -> list[Stretch]:
    numel = 5 * (columns.width if columns else 6)
    return [Stretch(start, end - start, columns) for start, end in itertools.combinations(range(0, numel + 1, 2), 2)]


@pytest.mark.parametrize("theirs", [None, Columns(0, 2, 6), Columns(2, 4, 6), Columns(3, 3, 6)])
@pytest.mark.parametrize("mine", [None, Columns(0, 3, 6), Columns(2, 2, 6)])
def test_what_two_stretches_have_in_common_is_copied_and_nothing_else(mine, theirs):
    for own, other in itertools.product(stretches(mine), stretches(theirs)):
        found, saved = torch.full((own.numel,), -1), values_of(other)
        for into, out_of in boxes.overlaps(own, other):
            taken = boxes.view(saved[out_of.begin : out_of.end], out_of)
            boxes.view(found[into.begin : into.end], into).copy_(taken)
        expected = values_of(own)
        assert torch.equal(found, torch.where(torch.isin(expected, saved), expected, -1)), (own, other)


def test_columns_are_saved_and_found_in_another_cut(tmp_path):
    halves = [Columns(0, 3, 6), Columns(3, 3, 6)]
    for rank, columns in enumerate(halves):
        values = {"weight": WHOLE[:, columns.first : columns.first + 3].reshape(-1).float()}
        fragments = checkpoint.copies([zero.Fragment("matrix", 0, values, columns)])
        checkpoint.save_state(tmp_path / f"state-{rank}.safetensors", fragments)
    saved = checkpoint.Checkpoint(tmp_path, {"step": 1})
    for columns, expected in ((None, WHOLE), (Columns(2, 2, 6), WHOLE[:, 2:4])):
        found = {"weight": torch.zeros(expected.numel())}
        checkpoint.restore_state(saved, [zero.Fragment("matrix", 0, found, columns)])
        assert torch.equal(found["weight"], expected.reshape(-1).float())


def test_what_another_rank_saves_is_not_saved_twice():
    spare = zero.Fragment("norm", 0, {"weight": torch.ones(3)}, spare=True)
    assert checkpoint.copies([spare]) == []


@pytest.mark.parametrize(
    ("config_of", "parts", "why"),
    [
        (config, 2, None),
        (partial(config, model_type="qwen3"), 2, None),
        (config, 4, "2 heads are no multiple"),
        (
            partial(config, model_type="phi3"),
            2,
            "type phi3 is cut in a way not known here: colwise_gather_output, row",
        ),
        (partial(config, model_type="gpt2"), 2, "no plan for cutting a model of type gpt2"),
        (partial(config, model_type="gpt_neox"), 2, None),
        (partial(config, model_type="gpt_neox"), 3, "2 heads are no multiple"),
        # Weights that a rank would use on its own features alone, or its own heads.
        (
            partial(config, model_type="apertus", hidden_act="xielu"),
            2,
            "that the plan for cutting it doesn't name: model.layers.0.mlp.act_fn",
        ),
        (
            partial(config, model_type="phi", qk_layernorm=True),
            2,
            "doesn't name: model.layers.0.self_attn.q_layernorm",
        ),
    ],
)
def test_why_layers_cannot_be_shared(config_of, parts, why):
    found = slices.why_not(config_of(), parts)
    assert found is None if why is None else why in found


def test_patterns_name_the_layers_of_the_plan_and_no_others():
    import re

    layers = slices.settings(config(), 2)["tensor_parallel"]["partition_config"]["layer_specs"]
    names = [name for name, _ in fresh_model().named_parameters()]
    matched = {name for name in names for layer in layers if re.match(layer["patterns"][0], name)}
    assert matched == {name for name in names if "_proj" in name}
    assert slices.settings(config(), 1) == {}


def test_a_parameter_of_no_group_is_whole():
    assert slices.place_of(torch.zeros(4, 3), 5) == (5, None)
    assert slices.numel_of(torch.zeros(4, 3)) == 12
    assert slices.parts_of(SimpleNamespace(autotp_size=lambda: 0)) == 1


# Ranks


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [
        Case(2, 1, micro_batch=4, tensor=2),
        Case(4, 2, tensor=2),
        Case(2, 2, tensor=2, model_type="qwen3"),
        Case(2, 1, tensor=2, model_type="qwen2"),
        Case(2, 2, tensor=2, model_type="gpt_neox"),
    ],
    ids=str,
)
def test_training_on_shared_layers_equals_whole_ones(case, tmp_path):
    store = str(tmp_path / "checkpoints")
    saving = Case(**vars(case) | {"save": store})
    assert train(saving, tmp_path / "run") == pytest.approx(reference(case.model_type), abs=2e-5)
    norms = json.loads((tmp_path / "run/norms.json").read_text())
    assert norms == pytest.approx([norm for _, norm in reference_steps(case.model_type)], rel=1e-4)
    files = sorted((tmp_path / "checkpoints").glob("step-*/state-*"))
    columns = [json.loads(safe_open(path, framework="pt").metadata()["columns"]) for path in files]
    assert all(columns), "the layers were cut"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({"ranks": 2, "stage": 1, "tensor": 2}, {"ranks": 1, "stage": 2}),
        ({"ranks": 2, "stage": 3}, {"ranks": 4, "stage": 2, "tensor": 2}),
        ({"ranks": 4, "stage": 2, "tensor": 2}, {"ranks": 2, "stage": 1, "tensor": 2}),
    ],
)
def test_a_checkpoint_moves_between_layers_shared_and_whole(before, after, tmp_path):
    store, half = str(tmp_path / "checkpoints"), STEPS // 2
    train(Case(**before, last=half, save=store), tmp_path / "first")
    resumed = train(Case(**after, first=half, load=store), tmp_path / "second")
    assert resumed == pytest.approx(reference()[half:], abs=2e-5)


@pytest.mark.slow
def test_resumed_equals_uninterrupted_bit_for_bit(tmp_path):
    store, half = str(tmp_path / "checkpoints"), STEPS // 2
    cut = partial(Case, 2, 1, "bf16", tensor=2)
    whole = train(cut(), tmp_path / "whole")
    train(cut(last=half, save=store), tmp_path / "first")
    assert train(cut(first=half, load=store), tmp_path / "second") == whole[half:]


@pytest.mark.slow
def test_the_model_that_is_saved_is_whole(tmp_path):
    saved = []
    for name, case in (("cut", partial(Case, 2, 1, tensor=2)), ("whole", partial(Case, 1, 1))):
        train(case(last=1, save=str(tmp_path / name)), tmp_path / f"run-{name}")
        saved.append(AutoModelForCausalLM.from_pretrained(checkpoint.newest(tmp_path / name).model).state_dict())
    # One step moves a weight by the rate, 1e-2, whatever its gradient: where that is next to none, rounding decides.
    for name, weight in saved[0].items():
        assert ((weight - saved[1][name]).abs() < 1e-5).float().mean() > 0.999, name
