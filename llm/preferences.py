"""Learning from preferences, as pure functions: the reward model's loss, advantages, and the policy's loss."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from llm.packing import IGNORED


def ranking_nats(scores: torch.Tensor, ranks: torch.Tensor) -> torch.Tensor:
    """Sum over all pairs of answers to one prompt of -log sigmoid(score of the better - score of the worse).

    The Bradley-Terry likelihood over every pair that a ranking of K answers makes, as in InstructGPT (Ouyang et al.
    2022, arXiv 2203.02155, equation 1); tied answers make no pair. scores: (B, T) one score a token; ranks: (B, T) the
    answer's rank (1 best) at its last token and IGNORED elsewhere; a row holds the answers to one prompt. A scalar.
    """
    total = scores.new_zeros(())
    for row_scores, row_ranks in zip(scores, ranks, strict=True):
        ends = row_ranks != IGNORED
        margins, better = pair_margins(row_scores[ends], row_ranks[ends])
        total = total + F.softplus(-margins[better]).sum()
    return total


def pair_margins(scores: torch.Tensor, ranks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """scores[i] - scores[j] (K, K), and where answer i is ranked better than j (K, K), of K answers to a prompt."""
    return scores[:, None] - scores[None, :], ranks[:, None] < ranks[None, :]


def count_pairs(ranks: list[int]) -> int:
    """How many ordered pairs a ranking makes; ties make none."""
    return sum(one < other for one in ranks for other in ranks)


def group_advantages(rewards: torch.Tensor, epsilon: float = 1e-4) -> torch.Tensor:
    """Each answer's reward against the other answers to its prompt: (r - mean) / (std + epsilon). Shape (P, K) both.

    GRPO (Shao et al. 2024, arXiv 2402.03300, section 4.1.2), with the biased standard deviation of the group.
    """
    mean = rewards.mean(dim=1, keepdim=True)
    return (rewards - mean) / (rewards.std(dim=1, keepdim=True, unbiased=False) + epsilon)


def token_logprobs(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """log p(ids[:, t] | before) for t >= 1, in fp32. logits: (B, T, V), ids: (B, T); result (B, T - 1)."""
    logprobs = torch.log_softmax(logits[:, :-1].float(), dim=-1)
    return logprobs.gather(-1, ids[:, 1:, None]).squeeze(-1)


def kl_estimate(logprobs: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Per token, an unbiased and never negative estimate of KL(policy || reference) from the policy's own samples.

    exp(d) - d - 1 with d = log reference - log policy: Schulman's k3 (2020), as GRPO uses it. Same shape as both.
    """
    d = reference - logprobs
    return torch.exp(d) - d - 1


def policy_loss(
    logprobs: torch.Tensor,
    sampled: torch.Tensor,
    reference: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    *,
    clip: float,
    kl_weight: float,
) -> torch.Tensor:
    """GRPO's objective, negated: the sum over answers of the mean over their tokens. A scalar.

    logprobs, sampled, reference: (B, L) log-probabilities of the answer's tokens under the policy, under the policy as
    it sampled them, and under the reference. advantages: (B,). mask: (B, L), 1 on answer tokens. Per token it is
    min(ratio A, clip(ratio, 1 - clip, 1 + clip) A) - kl_weight KL, equation 3 of arXiv 2402.03300.
    """
    ratio = torch.exp(logprobs - sampled)
    advantage = advantages[:, None]
    surrogate = torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)
    per_token = (kl_weight * kl_estimate(logprobs, reference) - surrogate) * mask
    return (per_token.sum(dim=1) / mask.sum(dim=1).clamp(min=1)).sum()
