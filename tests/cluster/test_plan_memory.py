"""The planner's bytes of a rank against what two gloo ranks really take.

Measured is PSS (each page that processes share counts in parts) above what the same process had after its imports, the
start of its process group and the training of a model of next to no size. The most that was taken between two looks is
the PSS now with what the kernel's high-water mark of resident memory lies above the present: what was handed back is
this process's own. glibc is told to hand freed blocks back at once; left alone it kept some 100 MB of them here, which
is its own affair (a GPU's allocator keeps others, for which the planner leaves a tenth of the memory free).
"""

import ctypes
import gc
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from cluster.plan import Load, footprint
from llm import zero
from llm.architectures import Ids
from llm.losses import following
from llm.output_head import rows_nats
from llm.presets import PRESETS, build_model
from pipelines.plan import decoder_of
from tests.llm.test_zero import leave

RANKS, STEPS, VOCAB = 2, 2, 32_000


@dataclass(frozen=True)
class Case:
    """Training of the preset 42m in bf16: the ZeRO stage, and how much goes through at once."""

    stage: int
    sequence: int = 64
    micro_batch: int = 1


CASES = (Case(1), Case(2), Case(3), Case(2, sequence=256, micro_batch=2))


@pytest.fixture(scope="module")
def measured(tmp_path_factory) -> dict[Case, float]:
    """The most bytes that a rank took in each case, mean of the ranks."""
    folder = tmp_path_factory.mktemp("ranks")
    with pytest.MonkeyPatch.context() as environment:
        for setting in ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"):
            environment.setenv(setting, "65536")
        mp.spawn(rank_main, args=(str(folder),), nprocs=RANKS)
    ranks = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(RANKS)]
    return {case: sum(taken) / RANKS for case, *taken in zip(CASES, *ranks, strict=True)}


def rank_main(rank: int, folder: str) -> None:
    os.environ.update(DS_ACCELERATOR="cpu", RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(RANKS))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=RANKS)
    zero.deepspeed().init_distributed()
    for stage in (1, 3):
        train("micro", Case(stage))
    taken = [bytes_of(case) for case in CASES]
    Path(folder, f"{rank}.json").write_text(json.dumps(taken))
    dist.barrier()
    leave()


def bytes_of(case: Case) -> int:
    """The most that training took above what was there."""
    trim()
    before = memory("smaps_rollup", "Pss")
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins anew
    train("42m", case)
    freed = memory("status", "VmHWM") - memory("status", "VmRSS")
    return memory("smaps_rollup", "Pss") + freed - before


def train(preset: str, case: Case) -> None:
    model = build_model(PRESETS[preset].config(Ids(VOCAB)), seed=0).bfloat16()
    settings = zero.zero_settings(
        stage=case.stage, micro_batch=case.micro_batch, accumulation=1, dtype="bf16", clip_norm=1.0
    )
    engine = zero.initialise(model, settings, betas=(0.9, 0.95), weight_decay=0.1)
    for _ in range(STEPS):
        ids = torch.randint(0, VOCAB, (case.micro_batch, case.sequence))
        engine.backward(rows_nats(engine, ids, following(ids)) / ids.numel())
        engine.step()


def memory(file: str, line: str) -> int:
    """Bytes that a file of this process's folder in /proc names."""
    found = re.search(rf"^{line}:\s+(\d+) kB", Path("/proc/self", file).read_text(), re.MULTILINE)
    assert found
    return int(found[1]) * 1024


def trim() -> None:
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_rank_takes_what_was_planned(case, measured):
    load = Load(case.sequence, case.micro_batch, precision=2, checkpointing=False, loss_in_pieces=True, on_gpu=False)
    planned = footprint(decoder_of(PRESETS["42m"].config(Ids(VOCAB))), load, case.stage, RANKS)
    print(f"{case}: planned {planned.peak / 1e6:.0f} MB, measured {measured[case] / 1e6:.0f} MB")
    assert planned.peak == pytest.approx(measured[case], rel=0.15)
