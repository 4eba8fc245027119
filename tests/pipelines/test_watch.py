"""What `headwater watch` shows of runs in every state, and that nothing of them is touched."""

from __future__ import annotations

import io
import json
import os
import pty
import select
import signal
import subprocess
import time
from pathlib import Path

import pytest
from rich.console import Console

from cluster import mirror, objects, segments
from cluster.errors import BadInput, Problem, StageFailed
from cluster.runs import Run, runs_root
from pipelines import __main__ as command
from pipelines import watch
from pipelines.records import append, cut_back
from pipelines.vitals import Watcher, checkpoint_ages
from tests.commands import CHECKOUT, environment
from tests.commands import command as headwater_command
from tests.s3 import BUCKET, storage

RECIPE = "pretrain: {steps: 100}\nrlhf: {steps: 8}\n"


@pytest.fixture
def run(tmp_path) -> Run:
    """A run of which everything before pretraining is done."""
    made = Run(tmp_path / "runs" / "mine")
    made.path.mkdir(parents=True)
    made.lineage.write_text('{"schema_version": 1}')
    (made.path / "recipe.yaml").write_text(RECIPE)
    for name in ("ingest", "tokenizer", "shards"):
        made.stage(name).begin("key")
        made.stage(name).finish({"key": "key", "figure": f"the figure of {name}", "seconds": 12.0})
    return made


def begin(run: Run, name: str = "pretrain", steps: int = 20) -> Path:
    """A stage that is at its step `steps`."""
    run.stage(name).begin("key")
    folder = run.stage(name).path
    for step in range(steps):
        append(folder / "metrics.jsonl", record(step))
    return folder


def record(step: int) -> dict[str, float]:
    return {
        "step": step,
        "loss": 6.0 - step / 10,
        "learning_rate": 3e-4,
        "peak_rss_mb": 620.0,
        "tokens": 512 * (step + 1),
        "tokens_per_s": 2048.0,
        "data_wait_s": 0.025,
        "forward_s": 0.075,
        "backward_s": 0.125,
        "seconds": 0.25,
    }


def shown(run: Run, width: int = 100, stage: str | None = None) -> str:
    console = Console(width=width, height=50, file=io.StringIO(), force_terminal=False)
    console.print(watch.frame(Watcher(run, stage).look(), console, time.time()))
    return console.file.getvalue()


def content(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Every file with its time and bytes."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path): (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


# States of a run


def test_a_run_that_has_not_begun(tmp_path):
    folder = tmp_path / "runs" / "mine"
    (folder / "jobs").mkdir(parents=True)
    text = shown(watch.run_of("mine", tmp_path / "runs"))
    assert "not begun" in text
    assert "no stage has begun yet" in text


def test_no_such_run_names_those_that_there_are(run):
    with pytest.raises(BadInput, match="runs there: mine"):
        watch.run_of("yours", run.path.parent)


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.png").write_bytes(b"")
    with pytest.raises(BadInput, match="is not a run folder"):
        watch.run_of("photos", tmp_path)


def test_a_stage_at_work_with_its_progress_and_time_left(run):
    begin(run)
    with run.locked():
        text = shown(run)
    assert "✓ shards" in text
    assert "▶ pretrain" in text
    assert "· sft" in text
    assert "step 20 of 100" in text
    assert "20 s left" in text  # 80 steps of a quarter of a second
    assert "20.0%" in text


def test_a_stage_that_was_cut_off_says_so(run):
    begin(run)
    text = shown(run)
    assert "✗ pretrain" in text
    assert "the same command goes on" in text
    assert "left" not in text


def test_a_finished_run_shows_its_last_training(run):
    begin(run, steps=100)
    run.stage("pretrain").finish({"key": "key", "figure": "held-out loss 3.141", "seconds": 75.0})
    run.stage("evaluate").begin("key")
    run.stage("evaluate").finish({"key": "key", "figure": "", "seconds": 1.0})
    vitals = Watcher(run).look()
    assert (vitals.state, vitals.stage.name, vitals.step) == ("done", "pretrain", 100)
    text = shown(run)
    assert "held-out loss 3.141" in text
    assert "done in 1 min 15 s" in text


def test_a_stage_may_be_chosen(run):
    begin(run)
    assert "the figure of ingest" in shown(run, stage="ingest")
    assert Watcher(run, "rlhf").look().stage.state == "not begun"


def test_of_two_stages_that_are_not_done_the_one_that_speaks_is_running(run):
    for name, said in (("sft", 100), ("pretrain", 200)):
        begin(run, name)
        (run.stage(name).logs / "driver.log").write_text("…")
        os.utime(run.stage(name).logs / "driver.log", (said, said))
    with run.locked():
        states = {one.name: one.state for one in Watcher(run).look().stages}
    assert (states["pretrain"], states["sft"]) == ("running", "cut off")


def test_a_stage_in_partitions_shows_how_many_are_done_and_what_it_logs(run):
    shards = run.stage("shards")
    shards.forget_done()
    (shards.work / "tokens").mkdir(parents=True)
    for name in ("00000.json", "00001.json", "00002.arrow"):
        (shards.work / "tokens" / name).write_text("{}")
    (shards.logs / "driver.log").write_text("one\ntwo\nthree\nfour\nfive\n")
    text = shown(run, stage="shards")
    assert "tokens 2" in text
    assert "\ntwo\nthree\nfour\nfive\n" in text
    assert "\none\n" not in text


def test_a_run_that_records_no_step_any_more_is_late(run):
    folder = begin(run)
    os.utime(folder / "metrics.jsonl", (time.time() - 3600,) * 2)
    with run.locked():
        assert "no step for 1 h" in shown(run)


# What a stage records


def test_plots_parts_memory_and_checkpoints(run):
    folder = begin(run)
    for step in (10, 20):
        (folder / "checkpoints" / f"step-{step:08d}").mkdir(parents=True)
        (folder / "checkpoints" / f"step-{step:08d}" / "manifest.json").write_text("{}")
    (folder / "checkpoints" / ".partial-step-00000030").mkdir()
    text = shown(run)
    assert "loss 4.1 (4.1 … 6)" in text
    assert "forward 30.0%" in text
    assert "backward 50.0%" in text
    assert "the rest 10.0%" in text
    assert "peak rss 620.00MB" in text
    assert "tokens/s 2048" in text
    assert "data wait 0.025 s" in text
    assert "checkpoints after step 10 (0 s ago), 20 (0 s ago)" in text
    assert any("⠀" < letter <= "⣿" for letter in text)


def test_held_out_losses_samples_and_events(run):
    folder = begin(run)
    for step, loss in ((9, 5.0), (19, 4.5)):
        sources = {"books": loss - 1, "code": loss + 1}
        append(
            folder / "held_out.jsonl",
            {"step": step, "held_out_loss": loss, "held_out_bits_per_byte": 1.25, "sources": sources},
        )
    append(folder / "samples.jsonl", {"step": 19, "prompt": "Once upon", "text": " a time\x1b[31m"})
    append(folder / "events.jsonl", {"step": 7, "event": "skipped", "why": "the loss is nan"})
    append(folder / "events.jsonl", {"step": 7, "event": "restart"})
    text = shown(run)
    assert "held out after step 20: held out loss 4.5, held out bits per byte 1.25" in text
    assert "  books                     3.5 █▁" in text
    assert "Once upon a time␛[31m" in text  # a model's words must not move the cursor
    assert "\x1b" not in text
    assert "events: skipped 1, restart 1" in text
    assert "step 7: skipped why the loss is nan" in text


def test_of_a_long_sample_a_few_lines_are_shown(run):
    folder = begin(run)
    append(folder / "samples.jsonl", {"step": 19, "prompt": "Once", "text": " upon a time" * 100})
    lines = shown(run, width=60).partition("written after step 20:\n")[2].splitlines()
    assert len(lines) == watch.SAMPLE_LINES
    assert lines[0].startswith("Once upon a time upon")


def test_reinforcement_learning_shows_its_own_numbers(run):
    folder = begin(run, "rlhf", steps=0)
    for step in range(4):
        append(folder / "metrics.jsonl", {**record(step), "reward": step / 2, "kl": 0.125, "rollout_s": 0.01})
    text = shown(run)
    assert "reward 1.5" in text
    assert "kl 0.125" in text
    assert "rollout 4.0%" in text
    assert "step 4 of 8" in text


def test_a_stage_that_says_nothing_of_its_seconds_has_no_bar(run):
    folder = begin(run, steps=0)
    append(folder / "metrics.jsonl", {"step": 0, "loss": 1.0, "data_wait_s": 0.5})
    assert "a step takes" not in shown(run)
    append(folder / "metrics.jsonl", {"step": 1, "loss": 1.0, "data_wait_s": 0.5, "seconds": 2.0})
    assert "a step takes 2 s: █ data wait 25.0%" in shown(run)


def test_mfu_is_a_percentage_where_there_is_one(run):
    folder = begin(run)
    assert " mfu " not in shown(run)
    append(folder / "metrics.jsonl", {**record(20), "mfu": 0.462})
    assert "mfu 46.2%" in shown(run)


@pytest.mark.parametrize("width", [20, 30, 60, 80, 200])
def test_no_line_is_wider_than_the_terminal(run, width):
    folder = begin(run)
    append(folder / "events.jsonl", {"step": 7, "event": "skipped", "rows": list(range(100))})
    lines = shown(run, width).splitlines()
    assert max(map(len, lines)) <= width
    assert any("loss" in line for line in lines)


@pytest.mark.parametrize(("width", "height"), [(120, 30), (80, 24), (60, 20)])
def test_a_frame_fits_into_the_terminal_with_every_number(run, width, height):
    folder = begin(run)
    others = {f"number_{at}": at + 0.5 for at in range(8)}
    append(folder / "metrics.jsonl", {**record(20), **others})
    console = Console(width=width, height=height, file=io.StringIO(), force_terminal=True, color_system=None)
    console.print(watch.frame(Watcher(run).look(), console, time.time()))
    lines = console.file.getvalue().splitlines()
    assert len(lines) <= height
    assert "loss 4" in " ".join(lines)
    if height == 30:
        assert all(f"number {at} {at + 0.5}" in " ".join(lines) for at in range(8))


# As it grows


def test_only_what_is_whole_counts_and_a_half_line_is_waited_for(run):
    folder = begin(run)
    watcher = Watcher(run)
    with open(folder / "metrics.jsonl", "a") as handle:
        handle.write('{"step": 20, "lo')
    assert watcher.look().step == 20
    with open(folder / "metrics.jsonl", "a") as handle:
        handle.write('ss": 1.0}\nnot JSON\n')
    vitals = watcher.look()
    assert vitals.step == 21
    assert vitals.metrics.last == {"step": 20, "loss": 1.0}
    assert len(vitals.metrics["learning_rate"]) == vitals.metrics.count == 21


def test_after_a_restart_it_is_where_the_run_is(run):
    folder = begin(run)
    watcher = Watcher(run)
    assert watcher.look().step == 20
    cut_back(folder / "metrics.jsonl", 15)
    append(folder / "metrics.jsonl", record(15))
    vitals = watcher.look()
    assert vitals.step == 16
    assert list(vitals.metrics["step"]) == list(range(16))


def test_a_stage_that_begins_anew_under_other_settings_has_no_steps_yet(run):
    begin(run)
    watcher = Watcher(run)
    assert watcher.look().step == 20
    run.stage("pretrain").begin("another key")
    assert watcher.look().step == 0


def test_a_checkpoint_that_is_being_written_does_not_count(tmp_path):
    (tmp_path / "step-00000010").mkdir()
    assert checkpoint_ages(tmp_path) == []


def test_silent_storage_is_said_and_the_last_frame_stays(run, monkeypatch):
    begin(run)
    watcher = Watcher(run)
    before = watcher.look()

    def silent():
        raise StageFailed(Problem("object storage did not answer", "wait"))

    monkeypatch.setattr(watcher, "look", silent)
    vitals, note = watch._look_again(watcher, before)
    assert vitals is before
    assert note == "object storage did not answer; what is shown is from before"


# The command


def test_nothing_is_written(run, capsys):
    begin(run)
    before = content(run.path.parent)
    for how in ("--once", "--json"):
        assert command.main(["watch", "mine", "--runs", str(run.path.parent), how]) == 0
    assert content(run.path.parent) == before


def test_one_object_for_programs(run, capsys):
    folder = begin(run)
    append(folder / "metrics.jsonl", {**record(20), "grad_norm": float("nan")})
    append(folder / "events.jsonl", {"step": 3, "event": "restart"})
    assert command.main(["watch", str(run.path), "--json"]) == 0
    answer = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert (answer["state"], answer["stage"], answer["step"], answer["steps"]) == ("cut off", "pretrain", 21, 100)
    assert answer["last"]["grad_norm"] is None
    assert answer["recent"]["seconds"] == 0.25
    assert answer["events"] == {"restart": 1}
    assert [one["state"] for one in answer["stages"]][:5] == ["done", "done", "done", "cut off", "not begun"]


def test_where_there_is_no_terminal_one_frame_is_enough(run, capsys):
    assert command.main(["watch", str(run.path)]) == 0
    assert "the figure of shards" in capsys.readouterr().out


def test_looking_all_the_time_is_refused(run, capsys):
    assert command.main(["watch", str(run.path), "--every", "0"]) == 2
    assert "--every must be above 0, got 0" in capsys.readouterr().err


def test_ctrl_c_ends_it_with_0_and_leaves_the_last_frame(run):
    folder = begin(run)
    before = content(run.path)
    screen, terminal = pty.openpty()
    words = headwater_command("watch", str(run.path), "--every", "0.1")
    process = subprocess.Popen(
        words,
        cwd=CHECKOUT,
        env={**environment(), "TERM": "xterm"},
        stdout=terminal,
        stderr=terminal,
        # A shell has what it runs in the background ignore Ctrl-C, and so would all that the tests start.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    os.close(terminal)
    try:
        seen = _until(screen, "step 20")
        append(folder / "metrics.jsonl", record(20))
        seen += _until(screen, "step 21")
        process.send_signal(signal.SIGINT)
        seen += _until(screen, None)
        assert process.wait(10) == 0
    finally:
        process.kill()
        process.wait()
        os.close(screen)
    assert seen.rindex("\x1b[?1049l") < seen.rindex("step 21")  # the other screen is left, and then the frame printed
    path = str(folder / "metrics.jsonl")
    assert {**content(run.path), path: None} == {**before, path: None}


def _until(screen: int, words: str | None) -> str:
    """What comes, until `words` are among it, or to its end."""
    seen = ""
    while words is None or words not in seen:
        assert select.select([screen], [], [], 60)[0], f"nothing came for a minute, {words!r} was waited for: {seen}"
        try:
            data = os.read(screen, 1 << 16)
        except OSError:  # how Linux says that the other end is closed
            data = b""
        if not data:
            assert words is None, f"the command ended before it had shown {words!r}: {seen}"
            break
        seen += data.decode(errors="replace")
    return seen


# In object storage


@pytest.mark.slow
def test_a_run_in_object_storage_is_read_from_there_and_nothing_is_put(tmp_path, monkeypatch):
    with storage(tmp_path / "server") as server:
        for name, value in {**server.variables, "HEADWATER_CACHE": str(tmp_path / "driver")}.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(segments, "LOOK_EVERY_S", 0.0)
        root = f"s3://{BUCKET}/runs"
        there = _in_storage(Run(runs_root(root) / "mine"))
        folder = there.stage("pretrain").path
        with segments.growing(folder / "metrics.jsonl", base=True) as send:
            for step in range(5):
                append(folder / "metrics.jsonl", record(step))
            send()
            objects_before = _objects()
            monkeypatch.setenv("HEADWATER_CACHE", str(tmp_path / "laptop"))
            mirror.forget()
            watcher = Watcher(watch.run_of("mine", runs_root(root)))
            vitals = watcher.look()
            assert (vitals.run, vitals.step, vitals.steps) == (f"{root}/mine", 5, 100)
            assert [one.step for one in vitals.checkpoints] == [4]
            assert _objects() == objects_before
            append(folder / "metrics.jsonl", record(5))
            send()
            assert watcher.look().step == 6


def _in_storage(run: Run) -> Run:
    """A run whose pretraining has begun and has a checkpoint."""
    folder = run.stage("pretrain")
    folder.begin("key")
    for name, text in {
        "lineage.json": '{"schema_version": 1}',
        "recipe.yaml": RECIPE,
        "pretrain/checkpoints/step-00000004.3f2ab9c1/manifest.json": "{}",
    }.items():
        (run.path / name).parent.mkdir(parents=True, exist_ok=True)
        (run.path / name).write_text(text)
        mirror.send(run.path / name)
    return run


def _objects() -> list[tuple[str, int]]:
    return [(one.path, one.mtime_ns) for one in objects.listing(f"{BUCKET}/runs")]
