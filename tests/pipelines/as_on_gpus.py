"""`headwater` with settings that are for GPUs alone, on CPUs: python -m tests.pipelines.as_on_gpus WORDS.

The recipe asks for GPUs, so that it is valid; its workers are then started without.
"""

import sys
from dataclasses import replace
from typing import Any

from pipelines import training
from pipelines.__main__ import main
from pipelines.stage import Demand

demand, train = training.demand, training.train


def demand_without_gpus(*given: Any) -> Demand:
    asked = demand(*given)
    return replace(asked, pieces=tuple(replace(piece, gpus=0.0) for piece in asked.pieces))


def train_without_gpus(job: Any, *rest: Any) -> None:
    train(replace(job, settings=job.settings.model_copy(update={"gpus_per_worker": 0})), *rest)


if __name__ == "__main__":
    training.demand, training.train = demand_without_gpus, train_without_gpus
    sys.exit(main())
