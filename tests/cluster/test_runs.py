"""The run folder: artefacts whole or not there, done-markers last, nothing lost when settings change."""

import json

import pytest

from cluster.errors import BadInput, PreflightRefused
from cluster.preflight import Piece, disk_problems, starving_problems
from cluster.runs import Run, StageFolder, canonical_hash, find_run, hash_folder, read_json, runs_root


@pytest.fixture
def folder(tmp_path):
    return StageFolder(tmp_path / "run" / "shards")


def test_an_artefact_appears_when_it_is_whole(folder):
    with folder.artefact("tokens") as target:
        (target / "a").write_text("1")
        assert not (folder.path / "tokens").exists()
    assert (folder.path / "tokens" / "a").read_text() == "1"


def test_a_failure_leaves_the_old_artefact_and_no_trace(folder):
    with folder.artefact("tokens") as target:
        (target / "a").write_text("old")
    with pytest.raises(RuntimeError), folder.artefact("tokens") as target:
        (target / "a").write_text("new")
        raise RuntimeError
    assert (folder.path / "tokens" / "a").read_text() == "old"
    assert [path.name for path in folder.path.iterdir()] == ["tokens"]


def test_begin_goes_on_under_the_same_key_and_sweeps_up(folder):
    folder.begin("key-1")
    (folder.path / "half").write_text("kept")
    (folder.path / ".partial-tokens").mkdir()
    folder.stop_request.touch()
    folder.begin("key-1")
    assert (folder.path / "half").exists()
    assert not (folder.path / ".partial-tokens").exists()
    assert not folder.stop_request.exists()


def test_another_key_puts_the_work_aside_and_its_return_takes_it_back(folder):
    folder.begin("key-1")
    folder.finish({"key": "key-1"})
    folder.begin("key-2")
    assert folder.done() is None
    folder.begin("key-1")
    assert folder.done() == {"key": "key-1"}


def test_the_lock_keeps_a_second_command_out(tmp_path):
    run = Run(tmp_path / "run")
    with run.locked():
        with pytest.raises(PreflightRefused, match="another command"), run.locked():
            pass
    with run.locked():
        pass


def test_an_unwritable_root_is_bad_input(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInput, match="cannot write to"), Run(tmp_path / "file" / "run").locked():
        pass


def test_a_damaged_marker_is_named(folder):
    folder.begin("key")
    (folder.path / "done.json").write_text("{")
    with pytest.raises(BadInput, match=r"done\.json is damaged"):
        folder.done()


def test_hashes_follow_content_and_names_not_order(tmp_path):
    assert canonical_hash({"a": 1, "b": [2]}) == canonical_hash({"b": [2], "a": 1})
    assert canonical_hash({"a": 1}) != canonical_hash({"a": 1.5})
    (tmp_path / "x").write_text("1")
    first = hash_folder(tmp_path)
    (tmp_path / "x").rename(tmp_path / "y")
    assert hash_folder(tmp_path) != first


def test_a_run_is_found_by_name_and_by_folder(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "lineage.json").write_text(json.dumps({"schema_version": 1}))
    assert find_run("mine", tmp_path).name == "mine"
    assert find_run(str(tmp_path / "mine"), tmp_path / "elsewhere").name == "mine"
    with pytest.raises(BadInput, match="runs there: mine"):
        find_run("yours", tmp_path)


def test_the_root_is_the_flag_then_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("HEADWATER_RUNS", str(tmp_path / "env"))
    assert runs_root(str(tmp_path / "flag")) == tmp_path / "flag"
    assert runs_root(None) == tmp_path / "env"
    monkeypatch.delenv("HEADWATER_RUNS")
    monkeypatch.chdir(tmp_path)
    assert runs_root(None) == tmp_path / "runs"


def test_no_file_reads_as_nothing(tmp_path):
    assert read_json(tmp_path / "none.json") is None


def test_nodes_that_would_leave_ray_data_nothing_are_named():
    nodes = [{"CPU": 2.0}, {"CPU": 2.0, "memory": 1.0}, {"CPU": 0.0}, {"CPU": 1.25}, {"memory": 1.0}]
    (problem,) = starving_problems("pretrain", worker(1.0), 0.25, nodes)
    assert "a node of 2 CPUs 2 workers of pretrain.cpus_per_worker 1 leave Ray Data 0" in problem.what
    assert starving_problems("pretrain", worker(0.75), 0.25, [{"CPU": 1.0}]) == []
    assert starving_problems("pretrain", worker(1.0, 1), 0.25, [{"CPU": 8.0, "GPU": 4.0}]) == [], "GPUs are fewer"
    assert starving_problems("pretrain", worker(1.0), 0.25, [{"CPU": 9.0}]) == [], "there are no more than 8 workers"


def worker(cpus: float, gpus: float = 0.0) -> Piece:
    return Piece("worker", "pretrain.workers", cpus, gpus, 1, 8)


def test_a_disk_that_is_too_small_is_named(tmp_path):
    assert disk_problems(tmp_path / "not" / "yet", 1) == []
    (problem,) = disk_problems(tmp_path, 10**18)
    assert "1000000000.27 GB" in str(problem)
