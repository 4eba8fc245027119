"""`headwater plan`: every shipped recipe has one, it says what doesn't fit, and every figure can be made anew."""

import json
from contextlib import nullcontext

import pytest

from cluster import plan as numbers
from cluster.errors import BadInput
from cluster.preflight import Place
from llm.architectures import Ids
from llm.presets import PRESETS
from pipelines import __main__ as command
from pipelines import plan
from pipelines.plan import Options
from pipelines.recipe import load_recipe, shipped

LARGE = ("small-8gpu", "7b-64gpu", "70b-512gpu")
TALK = 'sft.sources=[{name: talk, path: "arithmetic:", licence: made by a rule}]'


@pytest.fixture(autouse=True)
def no_cluster(monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


@pytest.mark.parametrize("name", shipped())
def test_every_shipped_recipe_has_a_plan(name):
    found = plan.answer(load_recipe(name), Options(price=2.0, api_price=1.0))
    assert json.loads(json.dumps(found)) == found
    assert found["model"]["parameters"] > 1e5
    assert [(row["zero_stage"], row["offload"]) for row in found["memory"]][-1] == (3, "all")
    assert all(row["gpu_hours"] == pytest.approx(row["hours"] * row["gpus"]) for row in found["time"])
    assert all(row["usd"] == pytest.approx(2.0 * row["gpu_hours"]) for row in found["time"])
    assert min(found["disk"].values()) > 0


@pytest.mark.parametrize("name", LARGE)
def test_a_large_recipe_reads_enough_and_fits_where_it_says(name):
    recipe = load_recipe(name)
    found = plan.answer(recipe, Options())
    assert found["training"]["tokens"] >= found["training"]["chinchilla_tokens"]
    assert found["gpu"]["count"] == int(name.partition("-")[2].removesuffix("gpu") or name[6:-3])
    rows = {(row["zero_stage"], row["offload"]): row["fits"] for row in found["memory"]}
    assert rows[recipe.pretrain.zero_stage, "none"]
    [fewest] = [row for row in found["fits"] if row["fewest"]]
    assert fewest["gpus"] <= found["gpu"]["count"]


@pytest.mark.parametrize("name", LARGE)
def test_a_large_recipe_asks_for_its_text_and_then_can_be_looked_at(name, tmp_path, capsys):
    assert command.main(["run", name, "--dry-run", "--runs", str(tmp_path / "runs")]) == 2
    assert "/your/text" in capsys.readouterr().err
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("Some words of one's own.")
    given = [f"ingest.folder={tmp_path / 'text'}", "ingest.folder_licence=unknown"]
    assert command.main(["run", name, "--dry-run", "--runs", str(tmp_path / "runs"), *given]) == 2
    assert "/your/conversations" in capsys.readouterr().err
    assert command.main(["run", name, "--dry-run", "--json", "--runs", str(tmp_path / "runs"), *given, TALK]) == 0
    stages = {row["stage"]: row for row in json.loads(capsys.readouterr().out)["plan"]}
    assert stages["pretrain"]["gpus"] == plan.gpus_of(load_recipe(name).pretrain)


def test_the_numbers_of_a_plan_by_hand():
    found = plan.answer(load_recipe("micro"), Options(gpu="A100-80GB", mfu=0.5))
    shape = PRESETS["micro"]
    parameters = shape.parameters(512)
    per_token = 6 * parameters + 12 * 2 * 64 * 64  # tied: every weight is multiplied; L (HQ) T
    assert found["model"]["parameters"] == found["model"]["multiplied"] == parameters
    assert found["training"]["tokens"] == 60 * 8 * 64
    assert found["training"]["flops_per_token"] == per_token
    assert found["time"][0]["gpu_hours"] == pytest.approx(60 * 8 * 64 * per_token / (156e12 * 3600))
    assert found["time"][0]["usd"] is None
    assert found["disk"]["shards"] == 60 * 8 * 64 * 2
    assert found["serving"]["batch"] == load_recipe("micro").serve.slots


def test_ranks_that_share_rows_hold_a_part_of_the_activations():
    whole = plan.answer(load_recipe("7b-64gpu"), Options())
    shared = plan.answer(load_recipe("7b-64gpu", ("pretrain.sequence_parallel=4",)), Options())
    assert shared["memory"][3]["activations"] == pytest.approx(whole["memory"][3]["activations"] / 4)
    assert shared["memory"][3]["weights"] == whole["memory"][3]["weights"]
    assert shared["training"] == whole["training"]


def test_ranks_that_share_the_layers_hold_a_part_of_each():
    words = ("pretrain.zero_stage=1", "pretrain.workers=8", "pretrain.global_batch=8", "pretrain.micro_batch=1")
    whole = plan.answer(load_recipe("7b-64gpu", words), Options())
    shared = plan.answer(load_recipe("7b-64gpu", (*words, "pretrain.tensor_parallel=4")), Options())
    shape, vocabulary = PRESETS["7b"], load_recipe("7b-64gpu").tokenizer.vocab_size
    tables = 2 * vocabulary * shape.hidden
    norms = (2 * shape.layers + 1) * shape.hidden
    kept = (shape.parameters(vocabulary) - tables - norms) / 4 + tables + norms
    assert [row["zero_stage"] for row in shared["memory"]] == [0, 1, 1, 2, 2]
    assert [fit["zero_stage"] for fit in shared["fits"]] == [1, 2]
    assert shared["memory"][1]["weights"] == pytest.approx(2 * kept, rel=1e-3)
    assert shared["memory"][1]["optimizer"] == pytest.approx(12 * kept / 2, rel=1e-3)
    assert shared["memory"][1]["activations"] < whole["memory"][1]["activations"]
    assert shared["start"]["bytes"] == pytest.approx(2 * kept, rel=1e-3)
    assert shared["training"] == whole["training"]


def test_a_model_that_cannot_be_cut_has_no_plan():
    with pytest.raises(BadInput, match="tensor_parallel is 3: 32 heads are no multiple"):
        plan.answer(load_recipe("7b-64gpu", ("pretrain.workers=48", "pretrain.tensor_parallel=3")), Options())


def test_a_rank_starts_with_its_share_of_a_large_model_and_the_largest_module():
    found = plan.answer(load_recipe("70b-512gpu"), Options())
    shape, vocabulary = PRESETS["70b"], load_recipe("70b-512gpu").tokenizer.vocab_size
    share = 2 * shape.parameters(vocabulary) / 512
    assert found["start"] == {"bytes": pytest.approx(share + 6 * vocabulary * shape.hidden), "fits": True}
    whole = plan.answer(load_recipe("70b-512gpu", ("pretrain.zero_stage=2",)), Options())
    assert whole["start"] == {"bytes": pytest.approx(4 * shape.parameters(vocabulary)), "fits": False}


def test_a_decoder_that_is_no_llama_is_read_rightly():
    recipe = load_recipe("micro", ("model={config: {model_type: gpt2, n_layer: 2, n_embd: 64, n_head: 4}}",))
    found = plan.decoder_of(recipe.model.shape.config(Ids(512)))
    assert found[2:] == (2, 64, 4, 4, 16, 256, False, 512)
    assert found.parameters - found.multiplied == 1024 * 64  # learned positions are looked up


def test_money_is_even_where_an_api_costs_as_much():
    found = plan.answer(load_recipe("7b-64gpu"), Options(price=2.0, api_price=0.5))["serving"]
    assert found["even_tokens_a_day"] * 0.5 / 1e6 == pytest.approx(found["gpus"] * 2.0 * 24)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--gpu", "H1000"), "known are L4"),
        (("--mfu", "1.5"), "up to 1, got 1.5"),
        (("--mfu", "0"), "above 0"),
        (("--price", "-1"), "--price is in US dollars"),
        (("model.depth=3",), "preset and depth are given"),
        (("model.preset=null", "model.config={model_type: gpt22}"), "nearest: gpt2"),
        (("model.preset=null", "model.start_from=/no/such/folder"), "no model folder at /no/such/folder"),
    ],
)
def test_what_cannot_be_planned_is_named(words, said, capsys):
    assert command.main(["plan", "micro", *words]) == 2
    assert said in capsys.readouterr().err


def test_what_people_see_has_units_and_every_assumption(capsys):
    assert command.main(["plan", "small-8gpu", "--price", "2.5", "--api-price", "1", "pretrain.workers=4"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    for word in ("1.04 B", "GB", "tokens/s", "GPU-hours", "USD", "FLOPs", "GB of a rank on H100, 4 ranks", "ZeRO"):
        assert word in shown
    assumed = numbers.USABLE_MEMORY, numbers.DECODE_BANDWIDTH
    assert all(f"{share:.0%}" in shown for share in assumed)
    assert "nothing was compared" in shown


def test_a_cluster_that_is_up_is_compared_with_the_recipe(monkeypatch):
    import ray

    monkeypatch.setattr(plan, "ray_session", lambda address, mb: nullcontext(False))
    there = {"CPU": 64.0, "GPU": 4.0, "accelerator_type:H100": 1.0}
    monkeypatch.setattr(ray, "cluster_resources", lambda: there)
    monkeypatch.setattr(plan, "live_places", lambda: [Place("10.0.0.1", there)])
    found = plan.cluster_of(load_recipe("small-8gpu", ("cluster.address=head:6379",)))
    assert found is not None
    assert found["kinds"] == ["H100"]
    assert any("pretrain needs 8 GPUs" in one for one in found["missing"])
    assert all("GPUs" in one for one in found["missing"])
    there["GPU"] = 8.0
    assert plan.cluster_of(load_recipe("small-8gpu", ("cluster.address=head:6379",)))["missing"] == []


def test_the_model_is_one_of_four():
    assert load_recipe("micro", ("model={}",)).model.preset == "tiny"
    by_depth = load_recipe("micro", ("model={depth: 4}",))
    assert by_depth.model.identity() == {**PRESETS["tiny"].numbers(), "layers": 4, "context": 4096}
    with pytest.raises(BadInput, match="config and start_from are given"):
        load_recipe("micro", ("model={config: {model_type: gpt2}, start_from: /somewhere}",))
    assert load_recipe("micro").model.identity() == PRESETS["micro"].numbers()
