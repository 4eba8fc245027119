"""Nothing starts that cannot finish: what is needed is placed piece by piece, and what finds no node is named."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.preflight import Piece, Place, resource_problems
from pipelines.recipe import load_recipe
from pipelines.run import resource_problems_of
from pipelines.stage import load_stages


def nodes(*sizes: float | tuple[float, float]) -> list[Place]:
    """Nodes of so many CPUs, or CPUs and GPUs, after a head that has none."""
    pairs = [size if isinstance(size, tuple) else (size, 0.0) for size in sizes]
    each = [Place(f"10.0.0.{at}", {"CPU": cpus, "GPU": gpus}) for at, (cpus, gpus) in enumerate(pairs, 2)]
    return [Place("10.0.0.1", {"memory": 1e9}), *each]


def workers(count: int, cpus: float = 1.0, gpus: float = 0.0) -> Piece:
    return Piece("worker", "pretrain.cpus_per_worker", cpus, gpus, count)


READING = Piece("reading task", "pretrain.data_cpus", 0.25)


def problems(pieces: list[Piece], *sizes: float | tuple[float, float]) -> list[str]:
    return [str(one) for one in resource_problems("pretrain", pieces, nodes(*sizes))]


def test_a_sum_that_is_missing_is_named_with_both_numbers():
    (said,) = problems([workers(8)], 1, 1)
    assert "pretrain needs 8 CPUs at once" in said
    assert "Ray has 2" in said
    assert problems([workers(2)], 1, 1) == []
    (said,) = problems([workers(1, gpus=1)], 2)
    assert "needs 1 GPUs at once" in said


def test_a_worker_that_fits_on_no_node_is_refused_although_the_sum_fits():
    (said,) = problems([workers(2, cpus=1.5), READING], 1, 1, 1, 1)
    assert "each worker of pretrain needs 1.5 CPUs on one node, the largest node (10.0.0.2) has 1 CPUs" in said
    assert "pretrain.cpus_per_worker" in said


def test_what_the_largest_node_lacks_is_named_alone():
    (said,) = problems([workers(2, cpus=4, gpus=2)], (16, 1), (16, 1), (16, 1), (16, 1))
    assert "each worker of pretrain needs 2 GPUs on one node, the largest node (10.0.0.2) has 1 GPUs" in said


def test_the_last_worker_is_missed_where_the_others_leave_it_no_room():
    (said,) = problems([workers(3), READING], 1.75, 1.75)
    assert "of 3 of pretrain's workers, 1 CPUs each on one node, 2 find room" in said
    assert "10.0.0.2 1.75 CPUs, 10.0.0.3 1.75 CPUs" in said


def test_ray_data_is_placed_as_well():
    (said,) = problems([workers(3, 0.9), Piece("reading task", "pretrain.data_cpus", 0.3)], 1, 1, 1)
    assert "pretrain's reading tasks" in said
    assert "pretrain.data_cpus" in said
    assert problems([workers(3, 0.7), Piece("reading task", "pretrain.data_cpus", 0.3)], 1, 1, 1) == []


def test_a_share_of_a_gpu_is_of_one_gpu():
    """Three of 0.6 come to 1.8, and two GPUs have room for two of them."""
    (said,) = problems([workers(3, gpus=0.6)], (8, 2))
    assert "3 GPUs at once" in said
    assert problems([workers(4, gpus=0.5)], (8, 2)) == []


def test_ray_divides_a_single_gpu_alone():
    (said,) = problems([workers(1, gpus=1.5)], (8, 8))
    assert "each worker of pretrain claims 1.5 GPUs" in said


def test_a_cluster_without_nodes_has_nothing():
    assert "Ray has 0" in str(resource_problems("pretrain", [workers(1)], [])[0])


def placeable(pieces: list[Piece], places: list[Place]) -> bool:
    """By trying every node for every piece."""
    each = [piece for piece in pieces for _ in range(piece.count)]
    for chosen in itertools.product(range(len(places)), repeat=len(each)):
        rooms = [dict(place.resources) for place in places]
        for at, piece in zip(chosen, each, strict=True):
            for kind, amount in {"CPU": piece.cpus, "GPU": piece.gpus}.items():
                rooms[at][kind] = rooms[at].get(kind, 0.0) - amount
        if all(amount >= 0 for room in rooms for amount in room.values()):
            return True
    return False


EIGHTHS = st.integers(1, 16).map(lambda number: number / 8)


@given(
    st.lists(st.tuples(EIGHTHS, st.integers(0, 2)), min_size=1, max_size=3),
    st.integers(1, 3),
    EIGHTHS,
    st.integers(0, 2),
    st.sampled_from([0.125, 0.25]),
)
def test_workers_and_a_smaller_task_are_refused_where_no_arrangement_exists_and_only_there(
    sizes, count, cpus, gpus, share
):
    pieces = [workers(count, max(cpus, share), gpus), Piece("reading task", "pretrain.data_cpus", share)]
    assert bool(problems(pieces, *sizes)) != placeable(pieces, nodes(*sizes)[1:])


@pytest.mark.parametrize(
    "stage", ["ingest", "tokenizer", "shards", "pretrain", "sft", "rank", "reward", "rlhf", "evaluate"]
)
def test_every_stage_says_in_which_pieces_it_comes(stage):
    recipe = load_recipe("micro", ("pretrain.workers=2", "rank.actors=2"))
    tiny = [Place(f"10.0.0.{at}", {"CPU": 0.01}) for at in range(1000)]
    (problem,) = resource_problems_of(load_stages([stage]), recipe, tiny)
    assert "on one node, the largest node (10.0.0.0) has 0.01 CPUs" in problem.what
    assert f"{stage}." in problem.remedy


def test_workers_that_may_be_fewer_are_asked_for_at_their_fewest():
    settings = ("pretrain.workers=4", "pretrain.global_batch=8", "pretrain.micro_batch=2")
    (pretrain,) = load_stages(["pretrain"])
    four, two = load_recipe("micro", settings), load_recipe("micro", (*settings, "pretrain.min_workers=2"))
    places = nodes(1, 1, 1)
    assert resource_problems_of([pretrain], four, places)
    assert resource_problems_of([pretrain], two, places) == []
    assert pretrain.demand(two).pieces[0].most == 4
