"""Saves beside training, of real engines: what is saved is the state they began at, though a step was taken since."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llm import checkpoint, parts, zero
from pipelines.checkpoints import Saver
from tests.llm.ranks import on_ranks
from tests.llm.test_zero import Case, FakeTokenizer, join, leave, start, step, train

SAVED_AT = 2
FILE_BYTES = 200_000  # so that the small model's weights take several files


def rank_main(rank: int, case: Case, folder: str, file_bytes: int) -> None:
    join(rank, case, folder)
    parts.FILE_BYTES, zero.zero_settings = file_bytes, small_groups(zero.zero_settings)
    engine = start(case)
    saver = Saver(Path(folder), checkpoint.OnDisk(), FakeTokenizer(), (2, 0))
    for number in range(SAVED_AT):
        step(engine, case, number, rank)
    saver.begin(engine, SAVED_AT, {})
    saver.before_change()
    step(engine, case, SAVED_AT, rank)
    saver.settle()
    leave()


def small_groups(settings_of: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    """ZeRO-3's settings with several shares of the state, of which a disk's buffers hold one at a time."""

    def settings(**words: Any) -> dict[str, Any]:
        made = settings_of(**words)
        made["zero_optimization"]["sub_group_size"] = 1_000_000
        return made

    return settings


def saved_and_gone_on(case: Case, folder: Path, file_bytes: int = parts.FILE_BYTES) -> Path:
    folder.mkdir()
    on_ranks(rank_main, (case, str(folder), file_bytes), case.ranks)
    return folder / f"step-{SAVED_AT:08d}"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "tensor", "file_bytes"),
    [
        (2, 1, parts.FILE_BYTES),
        (3, 1, parts.FILE_BYTES),
        (3, 1, FILE_BYTES),
        (1, 2, FILE_BYTES),
        (2, 2, parts.FILE_BYTES),
    ],
)
def test_training_goes_on_from_what_was_saved_beside_it(stage, tensor, file_bytes, tmp_path):
    whole = train(Case(2, stage, tensor=tensor), tmp_path / "whole")
    saved = saved_and_gone_on(Case(2, stage, tensor=tensor), tmp_path / "checkpoints", file_bytes)
    assert (saved / "model/model.safetensors.index.json").exists() == (file_bytes == FILE_BYTES)
    resumed = Case(2, stage, first=SAVED_AT, load=str(tmp_path / "checkpoints"), tensor=tensor)
    assert train(resumed, tmp_path / "resumed") == whole[SAVED_AT:]


@pytest.mark.soak  # DeepSpeed compiles its way to the disk at first use, which takes minutes
def test_what_lies_on_a_disk_is_saved_as_it_was_too(tmp_path):
    if not zero.deepspeed().ops.op_builder.AsyncIOBuilder().is_compatible(verbose=False):
        pytest.skip("needs libaio's headers and a C++ compiler")
    whole = train(Case(2, 3, preset="tiny"), tmp_path / "whole")
    away = Case(2, 3, preset="tiny", offload="optimizer", offload_to=str(tmp_path / "disk"))
    saved_and_gone_on(away, tmp_path / "checkpoints")
    resumed = Case(2, 3, preset="tiny", first=SAVED_AT, load=str(tmp_path / "checkpoints"))
    assert train(resumed, tmp_path / "resumed") == pytest.approx(whole[SAVED_AT:], abs=2e-5)
