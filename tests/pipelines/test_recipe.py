"""Recipes: every mistake is named, all at once, with the value and the nearest known name."""

import pytest
import yaml

from cluster.errors import BadInput
from pipelines.recipe import RECIPES, load_recipe
from pipelines.schema import ModelSettings
from pipelines.stage import load_stages
from pipelines.training import cutting_problems


def refused(*overrides: str) -> str:
    with pytest.raises(BadInput) as error:
        load_recipe("micro", overrides)
    return str(error.value)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("pretrain.step=5", "did you mean 'pretrain.steps'?"),
        ("modle.preset=tiny", "did you mean 'model'?"),
        ("pretrain.zzz=5", "known settings here: steps, global_batch"),
        ("pretrain.steps=0", "greater than or equal to 1, got 0"),
        ("pretrain.steps=many", "got 'many'"),
        ("pretrain.dtype=fp8", "'fp32', 'bf16' or 'fp16', got 'fp8'"),
        ("pretrain.learning_rate=.nan", "finite number"),
        ("model.preset=huge", "unknown preset, known are micro, tiny"),
        ("tokenizer.vocab_size=100", "greater than or equal to 282, got 100"),
        ("pretrain.workers=3", "global_batch must be a multiple of workers: 8 rows over 3 workers"),
        ("pretrain.min_workers=3", "min_workers must be at most workers: 3 of 2"),
        ("sft.min_workers=1", "unknown setting 'sft.min_workers'"),
        ("pretrain.micro_batch=3", "a worker's 4 rows must be a multiple of micro_batch, which is 3"),
        ("pretrain.sequence_parallel=2", "sequence_parallel=2 needs GPUs: set gpus_per_worker"),
        ("pretrain.tensor_parallel=2", "tensor_parallel=2 needs GPUs: set gpus_per_worker"),
        ("pretrain.tensor_parallel=3", "workers must be a multiple of tensor_parallel: 2 in groups of 3"),
        ("pretrain.sequence_parallel=3", "workers must be a multiple of sequence_parallel: 2 in groups of 3"),
        ("pretrain.warmup_steps=60", "warmup_steps must be below steps: 60 of 60"),
        ("shards.sequence_length=300", "longer than the context of preset 'micro' (256 tokens)"),
        ("held_out=0.9", "less than or equal to 0.5, got 0.9"),
        ("name=../elsewhere", "name"),
        ("ingest.sources=[]", "nothing to read"),
        ("pretrain", "write a.b=value"),
        ("held_out.x=1", "'held_out' holds no settings of its own"),
        ("pretrain.steps=[1", "not valid YAML"),
    ],
)
def test_a_bad_setting_is_named(override, said):
    assert said in refused(override)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (("pretrain.objective=masked",), "sequence_parallel must be 1 with objective=masked, got 2"),
        (("reward.workers=2", "reward.gpus_per_worker=1", "reward.sequence_parallel=2"), "1 with the reward model"),
        (("rlhf.workers=2", "rlhf.gpus_per_worker=1", "rlhf.sequence_parallel=2"), "1 with the policy"),
        (("pretrain.workers=6",), "global_batch must be a multiple of workers: 8 rows over 3 groups of 2 workers"),
    ],
)
def test_rows_that_must_be_whole_are_not_shared(overrides, said):
    assert said in refused("pretrain.gpus_per_worker=1", "pretrain.sequence_parallel=2", *overrides)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (("pretrain.sequence_parallel=2", "pretrain.workers=4"), "tensor_parallel=2 needs sequence_parallel=1"),
        (("pretrain.zero_stage=3",), "tensor_parallel=2 needs zero_stage=1 or 2"),
        (("pretrain.optimizer=muon",), "tensor_parallel=2 needs optimizer=adamw"),
        (("pretrain.compile=true",), "tensor_parallel=2 needs compile=false"),
        (("pretrain.min_workers=1",), "min_workers must be null or workers where workers come in groups of 2"),
        (("pretrain.objective=mixed",), "tensor_parallel must be 1 with objective=mixed, got 2"),
    ],
)
def test_layers_are_shared_by_what_can_do_so(overrides, said):
    assert said in refused("pretrain.gpus_per_worker=1", "pretrain.tensor_parallel=2", *overrides)


def test_a_model_whose_layers_cannot_be_shared_is_named():
    recipe = load_recipe("micro", ("pretrain.gpus_per_worker=1", "pretrain.tensor_parallel=2"))
    assert cutting_problems(recipe, "pretrain") == []
    assert (recipe.pretrain.shares, recipe.pretrain.rows_per_worker) == (1, 8)
    (problem,) = cutting_problems(recipe.model_copy(update={"model": ModelSettings(preset="360m")}), "pretrain")
    assert "pretrain.tensor_parallel is 2: 15 heads are no multiple of it" in str(problem.what)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (("pretrain.gpus_per_worker=0",), "offload=optimizer needs GPUs"),
        (("pretrain.offload_to=nvme",), "offload_to must be 'cpu' or an absolute path, got 'nvme'"),
        (("pretrain.offload=none",), "offload_to=/nvme needs offload=optimizer or all"),
        (("pretrain.zero_stage=2",), "offload_to=/nvme needs zero_stage=3"),
        (("pretrain.optimizer=muon",), "offload_to=/nvme needs optimizer=adamw"),
    ],
)
def test_a_disk_takes_what_zero_3_offloads_of_adamw(overrides, said):
    disk = ("pretrain.gpus_per_worker=1", "pretrain.zero_stage=3", "pretrain.offload=optimizer")
    assert load_recipe("micro", (*disk, "pretrain.offload_to=/nvme")).pretrain.offload_to == "/nvme"
    assert said in refused(*disk, "pretrain.offload_to=/nvme", *overrides)


def test_rows_shared_by_workers_are_dealt_out_in_fewer_shares():
    recipe = load_recipe("micro", ("pretrain.gpus_per_worker=1", "pretrain.sequence_parallel=2"))
    assert (recipe.pretrain.workers, recipe.pretrain.shares, recipe.pretrain.rows_per_worker) == (2, 1, 8)
    assert recipe.pretrain.identity() == load_recipe("micro").pretrain.identity()
    assert cutting_problems(recipe, "pretrain") == []
    (problem,) = cutting_problems(recipe.model_copy(update={"model": ModelSettings(preset="360m")}), "pretrain")
    assert "pretrain.sequence_parallel is 2: 15 heads are no multiple of it" in str(problem.what)


def test_all_problems_are_told_at_once():
    said = refused("pretrain.step=5", "seed=-1", "tokenizer.vocab_size=1")
    assert all(name in said for name in ("pretrain.step", "seed", "tokenizer.vocab_size"))


def test_an_unknown_recipe_lists_the_shipped_ones():
    with pytest.raises(BadInput, match="7b-64gpu, micro, small-8gpu, tiny"):
        load_recipe("mirco")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: 1\na: 2\n", "key given twice"),
        ("- 1\n", "holds list, not settings"),
        ("a: [", "not valid YAML"),
        ("name: x\n", "setting 'pretrain' is missing"),
    ],
)
def test_a_bad_file_is_named(tmp_path, text, said):
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(BadInput) as error:
        load_recipe(str(tmp_path / "mine.yaml"))
    assert said in str(error.value)


def test_a_binary_recipe_is_refused(tmp_path):
    (tmp_path / "mine.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(BadInput, match="cannot read the recipe"):
        load_recipe(str(tmp_path / "mine.yaml"))


def test_scientific_notation_is_a_number():
    assert load_recipe("micro", ("pretrain.learning_rate=3e-4",)).pretrain.learning_rate == 3e-4


def test_the_resolved_recipe_loads_as_the_same_recipe(tmp_path):
    recipe = load_recipe("tiny", ("name=mine", "pretrain.steps=50"))
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe.model_dump(mode="json")))
    assert load_recipe(str(tmp_path / "recipe.yaml")) == recipe


@pytest.mark.parametrize(
    ("override", "stages"),
    [
        ("name=other", set()),
        ("pretrain.workers=1", set()),
        ("pretrain.zero_stage=3", set()),
        ("pretrain.save_every=7", set()),
        ("serve.port=9000", set()),
        ("wandb.enabled=false", set()),
        ("ingest.cpus_per_task=1", set()),
        ("seed=1", {"pretrain", "sft", "rank", "reward", "rlhf", "evaluate"}),
        ("model.preset=tiny", {"pretrain"}),
        ("pretrain.dtype=bf16", {"pretrain"}),
        ("held_out=0.2", {"tokenizer", "shards"}),
        ("sft.held_out=0.2", {"ingest", "sft"}),
        ("rlhf.clip=0.3", {"rlhf"}),
        ("rank.answers=5", {"rank"}),
        ("evaluate.slots=2", set()),
        ("tokenizer.sample_bytes=1000", {"tokenizer"}),
        ("ingest.min_characters=1", {"ingest"}),
    ],
)
def test_settings_belong_to_the_identity_of_their_stages_alone(override, stages):
    before, after = load_recipe("micro"), load_recipe("micro", (override,))
    assert {stage.name for stage in load_stages() if stage.identity(before) != stage.identity(after)} == stages


def test_a_users_folder_replaces_the_sources():
    recipe = load_recipe("micro", ("ingest.folder=/somewhere",))
    assert [source.path for source in recipe.ingest.chosen()] == ["/somewhere"]
    other_place = load_recipe("micro", ("ingest.folder=/elsewhere",))
    assert recipe.ingest.identity() == other_place.ingest.identity(), "a path is placement"
    assert recipe.ingest.identity() != load_recipe("micro").ingest.identity()


def test_recipes_lie_beside_the_schema():
    assert {path.name for path in RECIPES.iterdir()} >= {"micro.yaml", "tiny.yaml"}
