"""Which checkpoints are kept, and the way to the rows from one that is older than a window of bad batches."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from llm import checkpoint
from llm.checkpoint import to_keep
from llm.zero import Fragment
from pipelines import checkpoints
from pipelines.worker import Trainer


def written(folder: Path, step: int, loss: float | None = None) -> Path:
    """A checkpoint without files."""
    path = folder / f"step-{step:08d}"
    path.mkdir(parents=True)
    (path / "manifest.json").write_text(json.dumps({"step": step, "held_out_loss": loss, "files": {}}))
    return path


def test_a_damaged_checkpoint_takes_no_sound_ones_place(tmp_path):
    sound, damaged = written(tmp_path, 5), written(tmp_path, 10)
    (damaged / "manifest.json").write_text('{"step": 10, "files": {"gone": "0"}}')
    found = checkpoints.newest(tmp_path)
    assert found.path == sound
    checkpoints.set_aside_damaged(tmp_path, found)
    checkpoints.prune(tmp_path, newest=1, best=0)
    assert checkpoints.newest(tmp_path).step == 5
    assert [path.name[-13:] for path in tmp_path.glob("damaged-*")] == ["step-00000010"]


def saved(folder: Path, step: int) -> Path:
    """A whole checkpoint of one rank."""
    checkpoint.save(
        folder, step, rank=0, world=1, fragments=[Fragment("weight", 0, {"weight": torch.full((64,), float(step))})],
        save_model=lambda path: (path.mkdir(), (path / "config.json").write_text("{}")),
        gather=lambda mine: [mine], facts={},
    )  # fmt: skip
    return folder / f"step-{step:08d}"


STATE = "state-00-of-01.safetensors"


@pytest.mark.parametrize("name", [STATE, "model/config.json", "manifest.json"])
@pytest.mark.parametrize("damage", ["truncated", "flipped", "missing"])
def test_the_newest_checkpoint_if_damaged_is_named_and_the_one_before_used(tmp_path, caplog, name, damage):
    sound, newest = saved(tmp_path, 5), saved(tmp_path, 10)
    content = bytearray((newest / name).read_bytes())
    (newest / name).unlink()
    if damage != "missing":
        content[len(content) // 2] ^= 0x80
        (newest / name).write_bytes(content if damage == "flipped" else content[: len(content) // 2])
    found = checkpoints.newest(tmp_path)
    assert (found.path, found.step) == (sound, 5)
    assert f"{newest} is damaged and is passed over: {name}" in caplog.text
    restored = torch.zeros(64)
    checkpoint.restore_state(found, [Fragment("weight", 0, {"weight": restored})])
    assert restored.tolist() == [5.0] * 64


def test_what_a_kill_left_half_written_is_no_checkpoint(tmp_path):
    sound = saved(tmp_path, 5)
    saved(tmp_path, 10).rename(tmp_path / ".partial-step-00000010")
    assert checkpoints.newest(tmp_path).path == sound
    checkpoints.prune(tmp_path, newest=1, best=0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest.json", "step-00000005"]
    shutil.rmtree(sound)
    assert checkpoints.newest(tmp_path) is None


def test_the_best_are_kept_beside_the_newest(tmp_path):
    for step, loss in [(1, 2.0), (2, 1.0), (3, None), (4, 1.5), (5, 3.0)]:
        written(tmp_path, step, loss)
    checkpoints.prune(tmp_path, newest=1, best=2)
    assert sorted(int(path.name[5:]) for path in tmp_path.glob("step-*")) == [2, 4, 5]
    assert to_keep({"a": None, "b": None}, newest=1, best=1) == {"b"}


def test_where_batches_are_left_out_again_the_newest_checkpoint_goes_but_never_the_last(tmp_path):
    written(tmp_path, 5), written(tmp_path, 10)
    assert checkpoints.before(tmp_path, []) == 10
    assert checkpoints.before(tmp_path, [{"back_to": 5}]) == 10
    assert checkpoints.before(tmp_path, [{"back_to": 10}]) == 5
    assert checkpoints.before(tmp_path, [{"back_to": 5}]) == 5
    assert [path.name for path in tmp_path.glob("step-*")] == ["step-00000005"]


@pytest.mark.parametrize(("began", "entered"), [(0, 0), (2, 2), (3, 5), (4, 6)])
def test_a_stream_that_is_entered_before_a_window_goes_through_it(began, entered):
    handed = iter(
        [{"step": np.array([n]), "row": np.array([n]), "batch_targets": np.array([1])} for n in range(entered, 9)]
    )
    trainer = SimpleNamespace(windows=[(3, 5)], began=began, watchdog=SimpleNamespace(at=lambda *_: None))
    taken = [Trainer.next_batch(trainer, handed, step).rows.tolist() for step in range(began, 6)]
    assert taken == [[n] for n in (0, 1, 2, 5, 6, 7)[began:]]
