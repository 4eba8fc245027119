"""`headwater` whose pretraining gives a loss of NaN for one row: python -m tests.pipelines.poisoned ROW WORDS."""

import sys
from functools import partial

import torch

from pipelines import pretrain
from pipelines.__main__ import main

next_token_objective = pretrain.next_token_objective


def objective(model: torch.nn.Module, batch: dict[str, torch.Tensor], row: list[int]) -> torch.Tensor:
    found = (batch["input_ids"] == torch.tensor(row)).all(dim=1).any()
    return next_token_objective(model, batch) * (float("nan") if found else 1.0)


if __name__ == "__main__":
    from tests.pipelines import poisoned  # under its own name, by which the workers know it

    pretrain.next_token_objective = partial(poisoned.objective, row=[int(one) for one in sys.argv[1].split(",")])
    sys.argv[1:] = sys.argv[2:]
    sys.exit(main())
