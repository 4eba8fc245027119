"""`headwater` whose pretraining takes its time, most where a rank is alone: python -m tests.pipelines.slowed WORDS.

So that what happens around it, nodes that go and come back, happens between its first and its last step.
"""

import sys
import time

import torch
import torch.distributed as dist

from pipelines import pretrain, training
from pipelines.__main__ import main

ALONE_S, TOGETHER_S = 0.4, 0.1  # a forward pass
GROW_S = 3.0

next_token_objective = pretrain.next_token_objective


def objective(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    time.sleep(ALONE_S if dist.get_world_size() == 1 else TOGETHER_S)
    return next_token_objective(model, batch)


if __name__ == "__main__":
    from tests.pipelines import slowed  # under its own name, by which the workers know it

    pretrain.next_token_objective = slowed.objective
    training.GROW_S = GROW_S
    sys.exit(main())
