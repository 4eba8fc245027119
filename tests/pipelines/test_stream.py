"""How Ray Data works on the stream."""

from __future__ import annotations

from functools import partial

import pytest
from ray.data._internal.execution.execution_callback import ExecutionCallback

from pipelines.stream import RowStream, _Pace


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


@pytest.mark.slow
def test_the_stream_is_read_by_a_task_on_each_node_at_once(ray, monkeypatch):
    monkeypatch.setattr(RowStream, "spans", lambda stream: [(0, 1)])
    stream = RowStream("", 0, global_batch=4, workers=4, share=1, first_step=0, last_step=1, seed=0)
    machine = ray.nodes()[0]
    head = {"Alive": True, "Resources": {"object_store_memory": 1.0}}
    gone = machine | {"Alive": False}
    for nodes, tasks in (([machine], 1), ([head, gone, *[machine] * 3], 3), ([machine] * 8, 4)):
        monkeypatch.setattr(ray, "nodes", lambda nodes=nodes: nodes)
        (made,) = stream.dataset(0.25).context.custom_execution_callback_classes
        assert made()._least.cpu == 0.25 * tasks
