"""Settings of a training stage, and what becomes of them in the engine that a worker starts."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch

from llm.attention import ATTENTION
from pipelines import worker
from pipelines.schema import PretrainSettings
from tests.llm.ranks import on_ranks
from tests.llm.test_zero import Case, fresh_model, join, leave

BASE = {"steps": 4, "warmup_steps": 1, "global_batch": 4, "micro_batch": 2, "dtype": "fp32", "gpus_per_worker": 1}
PLAIN = {
    "checkpointing": False,
    "compiled": False,
    "offloaded": False,
    "stage": 2,
    "dtype": "torch.float32",
    "threads": 1,
    "rows": 2,
    "passes": 2,
    "clip": 1.0,
    "tensor": 1,
    "attention": ATTENTION,
    "fastest_products": True,
}


def rank_main(rank: int, words: dict[str, Any], folder: str) -> None:
    settings = PretrainSettings(**{**BASE, **words})
    join(rank, Case(settings.workers, settings.zero_stage), folder)
    job = SimpleNamespace(settings=settings, build=lambda saved, share: fresh_model())
    with (
        mock.patch("ray.train.torch.get_device", return_value=torch.device("cpu")),
        mock.patch("llm.matmul.use_the_fastest") as fastest,
    ):
        engine, _ = worker._start_engine(job, None, "cpu")  # type: ignore[arg-type]
    if rank == 0:
        found = effects(engine) | {"fastest_products": fastest.called}
        Path(folder, "found.json").write_text(json.dumps(found))
    leave()


def effects(engine: Any) -> dict[str, Any]:
    return {
        "checkpointing": engine.module.is_gradient_checkpointing,
        "compiled": engine.is_compiled,
        "offloaded": bool(getattr(engine.optimizer, "cpu_offload", False)),
        "stage": engine.zero_optimization_stage(),
        "dtype": str(engine.module.lm_head.weight.dtype),
        "threads": torch.get_num_threads(),
        "rows": engine.train_micro_batch_size_per_gpu(),
        "passes": engine.gradient_accumulation_steps(),
        "clip": engine.gradient_clipping(),
        "tensor": max(1, engine.autotp_size()),
        "attention": engine.module.config._attn_implementation,
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "changed"),
    [
        ({}, {}),
        ({"activation_checkpointing": True}, {"checkpointing": True}),
        ({"compile": True}, {"compiled": True, "attention": "sdpa"}),
        ({"offload": "optimizer"}, {"offloaded": True}),
        ({"zero_stage": 1, "dtype": "bf16"}, {"stage": 1, "dtype": "torch.bfloat16", "fastest_products": False}),
        ({"threads": 2, "micro_batch": 4, "clip_norm": 0.0}, {"threads": 2, "rows": 4, "passes": 1, "clip": 0.0}),
        ({"workers": 2, "tensor_parallel": 2}, {"tensor": 2}),
    ],
)
def test_a_setting_takes_effect(words, changed, tmp_path):
    on_ranks(rank_main, (words, str(tmp_path)), words.get("workers", 1))
    assert json.loads((tmp_path / "found.json").read_text()) == {**PLAIN, **changed}
