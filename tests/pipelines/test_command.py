"""The command's arguments, exit codes and messages, without Ray."""

import errno
import json
import logging
import os

import pytest

from cluster.errors import Problem, StageFailed, Stopped
from pipelines import __main__ as command


@pytest.fixture
def call(tmp_path, capsys):
    def call(*words: str) -> tuple[int, str]:
        try:
            code = command.main([words[0], "--runs", str(tmp_path / "runs"), *words[1:]])
        except SystemExit as exit_:
            code = exit_.code
        captured = capsys.readouterr()
        return code, captured.out + captured.err

    return call


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("run", "tny"), "no recipe 'tny'"),
        (("run", "micro", "pretrain.step=1"), "did you mean 'pretrain.steps'?"),
        (("run", "micro", "--set", "seed=x"), "got 'x'"),
        (("run", "micro", "--from", "pretrain", "--to", "ingest"), "--from pretrain comes after --to ingest"),
        (("run", "micro", "--from", "shards"), "shards needs ingest, which has not finished"),
        (("run", "micro", "ingest.folder=/no/such/folder"), "/no/such/folder"),
        (("run", "micro", "--frm", "ingest"), "unrecognized arguments: --frm"),
        (("complete", "nothing", "Once"), "no run 'nothing' under"),
        (("report", "nothing"), "no run 'nothing' under"),
        (("serve", "nothing"), "no run 'nothing' under"),
    ],
)
def test_bad_input_exits_with_2_and_says_what(call, words, said):
    code, output = call(*words)
    assert code == 2
    assert said in output


def test_settings_may_stand_anywhere(call):
    code, output = call("run", "--dry-run", "micro", "name=a", "--json", "seed=7", "--set", "pretrain.steps=70")
    assert code == 0
    answer = json.loads(output)
    assert answer["recipe"]["name"] == "a"
    assert answer["recipe"]["seed"] == 7
    assert answer["recipe"]["pretrain"]["steps"] == 70


def test_dry_run_starts_and_writes_nothing(call, tmp_path):
    code, output = call("run", "micro", "--dry-run")
    assert code == 0
    assert "not run yet" in output
    assert not (tmp_path / "runs").exists()


def test_a_run_folder_of_another_schema_is_refused(call, tmp_path):
    folder = tmp_path / "runs" / "micro"
    folder.mkdir(parents=True)
    (folder / "lineage.json").write_text('{"schema_version": 99}')
    code, output = call("run", "micro")
    assert code == 2
    assert "schema version 99" in output


def test_a_folder_that_is_no_run_is_left_alone(call, tmp_path):
    folder = tmp_path / "runs" / "micro"
    folder.mkdir(parents=True)
    (folder / "thesis.txt").write_text("mine")
    code, output = call("run", "micro")
    assert code == 2
    assert "is not a run folder" in output
    assert [path.name for path in folder.iterdir() if path.name != ".lock"] == ["thesis.txt"]


def test_a_ray_job_needs_an_absolute_root(monkeypatch, capsys):
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    assert command.main(["run", "micro", "--runs", "runs"]) == 2
    assert "needs an absolute --runs, got 'runs'" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["run", "micro"], ["report", "micro"], ["k8s", "render", "micro"]])
def test_storage_of_another_kind_is_refused_rather_than_taken_for_a_folder(words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert command.main([*words, "--runs", "gs://bucket/runs"]) == 2
    assert "'gs://bucket/runs'" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (StageFailed(Problem("what", "do this")), 4),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), 4),
        (Stopped("asked to"), 5),
        (KeyboardInterrupt(), 5),
    ],
)
def test_exit_codes(monkeypatch, capsys, error, code):
    def fail(chosen):
        raise error

    monkeypatch.setattr(command, "show_report", fail)
    assert command.main(["report", "x"]) == code


def test_every_verb_has_help(capsys):
    for words in (
        ["--help"],
        ["run", "--help"],
        ["complete", "--help"],
        ["look", "tokens", "--help"],
        ["serve", "--help"],
    ):
        with pytest.raises(SystemExit) as exit_:
            command.main(words)
        assert exit_.value.code == 0
    assert "default: 0.8" in capsys.readouterr().out


def test_what_is_warned_of_is_shown_and_errors_are_told_once(monkeypatch, capsys):
    def verb(chosen):
        log = logging.getLogger("headwater")
        log.warning("checkpoint %s is damaged", "[step-3]")
        log.error("a traceback")
        log.warning("checkpoint %s is damaged", "[step-3]")

    monkeypatch.setattr(command, "show_report", verb)
    assert command.main(["report", "x"]) == 0
    assert capsys.readouterr().err == "warning: checkpoint [step-3] is damaged\n"
    assert not logging.getLogger("headwater").handlers
