"""Stages of `headwater run` in a process of their own, with a model that no preset names.

    python -m tests.bench.drive ORDER

ORDER  JSON: `settings` over those of the recipe `tiny`, `shape` of the model, `run` folder, `first` and `last` stage,
       `nap_s`: seconds of sleep in place of the model's forward pass, 0 for the real one
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

from cluster.runs import Run
from llm.presets import Preset
from pipelines import training, worker
from pipelines.run import Journey, execute
from tests.bench import workload

if TYPE_CHECKING:
    import torch


def main(order: dict[str, Any]) -> None:
    recipe = workload.recipe_of(order["settings"], Preset(**order["shape"]))
    with _sleeping(order["nap_s"]):
        execute(Journey(recipe, Run(Path(order["run"])), order["first"], order["last"]))


def nap(seconds: float, model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Sleep, and a loss of one nat a target whose gradient is zero for every parameter: nothing is computed."""
    from llm.packing import IGNORED

    time.sleep(seconds)
    targets = (batch["labels"] != IGNORED).sum()
    return targets + sum(parameter.flatten()[0] * 0 for parameter in model.parameters())


@contextmanager
def _sleeping(seconds: float) -> Iterator[None]:
    """The workers' objective is a nap of so many seconds; the real one where that is 0."""
    if not seconds:
        yield
        return
    real = training.train

    def train(job: worker.Job, *rest: Any) -> None:
        real(replace(job, objective=partial(nap, seconds)), *rest)

    with mock.patch.object(training, "train", train):
        yield


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
