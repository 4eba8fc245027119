"""The preference losses against hand-computed numbers."""

import math

import pytest
import torch

from llm.packing import IGNORED
from llm.preferences import (
    count_pairs,
    group_advantages,
    kl_estimate,
    policy_loss,
    ranking_nats,
    token_logprobs,
)


def log_sigmoid(x: float) -> float:
    return -math.log(1 + math.exp(-x))


def test_ranking_loss_is_over_all_pairs_of_a_row():
    scores = torch.tensor([[9.0, 2.0, 9.0, 1.0, -1.0]])
    ranks = torch.tensor([[IGNORED, 1, IGNORED, 2, 3]])
    expected = -(log_sigmoid(2 - 1) + log_sigmoid(2 + 1) + log_sigmoid(1 + 1))
    assert ranking_nats(scores, ranks).item() == pytest.approx(expected, rel=1e-6)


def test_ties_make_no_pair_and_rows_do_not_mix():
    scores = torch.tensor([[1.0, 5.0], [0.0, 3.0]])
    ranks = torch.tensor([[1, 1], [2, 1]])
    assert ranking_nats(scores, ranks).item() == pytest.approx(-log_sigmoid(3.0), rel=1e-6)
    assert [count_pairs(r) for r in ([1, 1], [1, 2, 3, 4], [1, 1, 3], [1])] == [0, 6, 2, 0]


def test_ranking_loss_pulls_the_better_one_up():
    scores = torch.zeros(1, 2, requires_grad=True)
    ranking_nats(scores, torch.tensor([[2, 1]])).backward()
    assert scores.grad.tolist() == [[0.5, -0.5]]


def test_advantages_by_hand():
    advantages = group_advantages(torch.tensor([[1.0, 3.0], [2.0, 2.0]]), epsilon=0.0 + 1e-12)
    assert advantages[0].tolist() == pytest.approx([-1.0, 1.0])
    assert advantages[1].tolist() == [0.0, 0.0]


def test_token_logprobs_look_at_the_token_before():
    logits = torch.log(torch.tensor([[[0.2, 0.8], [0.5, 0.5], [1.0, 1.0]]]))
    assert token_logprobs(logits, torch.tensor([[0, 1, 0]])).exp()[0].tolist() == pytest.approx([0.8, 0.5])


def test_kl_estimate_is_zero_for_equal_models_and_else_positive_and_right_on_average():
    assert kl_estimate(torch.tensor([-1.0]), torch.tensor([-1.0])).item() == 0
    p, q = torch.tensor([0.7, 0.3]), torch.tensor([0.4, 0.6])
    estimate = kl_estimate(p.log(), q.log())
    assert (estimate > 0).all()
    exact = (p * (p.log() - q.log())).sum()
    assert (p * estimate).sum().item() == pytest.approx(exact.item(), rel=1e-5)


def test_policy_loss_by_hand():
    loss = policy_loss(
        logprobs=torch.log(torch.tensor([[0.5, 0.3], [0.2, 0.9]])),
        sampled=torch.log(torch.tensor([[0.25, 0.3], [0.2, 0.9]])),
        reference=torch.log(torch.tensor([[0.5, 0.6], [0.2, 0.9]])),
        advantages=torch.tensor([1.0, -2.0]),
        mask=torch.tensor([[1.0, 1.0], [1.0, 0.0]]),
        clip=0.2,
        kl_weight=0.1,
    )
    # Row 0: ratio 2 is clipped to 1.2, ratio 1 stays; KL of the second token is 2 - ln 2 - 1. Row 1: one token.
    first = ((-1.2) + (-1.0 + 0.1 * (2 - math.log(2) - 1))) / 2
    assert loss.item() == pytest.approx(first + 2.0, rel=1e-6)


def test_a_bad_answer_is_not_clipped_when_it_became_likelier():
    common = {"reference": torch.zeros(1, 1), "mask": torch.ones(1, 1), "clip": 0.2, "kl_weight": 0.0}
    logprobs = torch.log(torch.tensor([[0.6]])).requires_grad_()
    loss = policy_loss(logprobs, torch.log(torch.tensor([[0.3]])), advantages=torch.tensor([-1.0]), **common)
    loss.backward()
    assert loss.item() == pytest.approx(2.0)
    assert logprobs.grad.item() == pytest.approx(2.0)
