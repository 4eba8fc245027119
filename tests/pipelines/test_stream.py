"""How Ray Data works on the stream."""

from __future__ import annotations

from functools import partial

import pytest
from ray.data._internal.execution.execution_callback import ExecutionCallback

from pipelines.stream import _Pace


@pytest.mark.slow
def test_ray_data_may_have_as_many_tasks_as_we_say_whatever_it_counts(ray):
    counted = []

    class Watched(ExecutionCallback):
        def on_execution_step(self, executor) -> None:
            counted.append(executor._resource_manager._get_total_resources().cpu)

    rows = ray.data.range(8, override_num_blocks=2)
    rows.context.custom_execution_callback_classes = [partial(_Pace, 7.0), Watched]
    assert sorted(row["id"] for row in rows.take_all()) == [*range(8)]
    assert set(counted) == {7.0}  # of two that there are
