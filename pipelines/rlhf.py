"""Stage 8: the chat model to a policy that is preferred, by GRPO against the learned reward model.

A step: each worker takes its prompts from the stream, its engine writes K answers to each with the policy's present
weights, the reward model scores them, and each answer is pushed up or down by how it compares with the others to its
prompt (`llm.preferences`). A KL term holds the policy to the chat model. One update is made from each batch, so the
samples are always the present policy's.

It departs from the paper in two points: the standard deviation of a group is the biased one, and an answer that was
cut off at the token limit is scored as it stands. The scripted judge is nowhere in here.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cluster import mirror
from cluster.errors import Problem, StageFailed
from llm.chat import render_turns
from llm.engine import Completion, Engine
from llm.files import write_json
from llm.packing import IGNORED, pack_groups
from llm.preferences import group_advantages, kl_estimate, policy_loss, token_logprobs
from llm.sampling import SamplingParams
from llm.vocabulary import fingerprint, load_tokenizer
from pipelines import checkpoints, conversations, records, reward, training, worker
from pipelines.recipe import Recipe
from pipelines.schema import RlhfSettings
from pipelines.sft import build
from pipelines.stage import Outcome, Stage, StageRun
from pipelines.stream import RowStream
from pipelines.token_rows import Piece, write_rows

SMOOTHED_STEPS = 5  # at either end of the run, for the figures of the table


def run(stage: StageRun) -> Outcome:
    """Render the prompts into rows, train the policy, export it."""
    import ray

    recipe, tokens = stage.recipe, stage.folder.path / "prompts"
    tokenizer = stage.input("tokenizer") / "tokenizer"
    if not stage.folder.has("prompts"):
        longest = recipe.model.shape.context - recipe.rlhf.max_new_tokens
        render = ray.remote(num_cpus=recipe.rlhf.data_cpus)(_render)
        with stage.folder.artefact("prompts") as target:
            ray.get(
                render.remote(stage.input("sft") / "conversations", tokenizer, longest, recipe.rlhf.answers, target)
            )
    manifest = json.loads((mirror.here(tokens) / "manifest.json").read_text())
    training.train(_job(stage, manifest), "rlhf", stage.record)
    checkpoints.export(stage.folder.path)
    return _outcome(stage, manifest)


def _render(folder: Path, tokenizer_folder: Path, longest: int, answers: int, target: Path) -> None:
    """The first turns of the training conversations that pose no task, each once, a row each."""
    tokenizer = load_tokenizer(mirror.here(tokenizer_folder))
    found: dict[tuple[int, ...], str] = {}
    for conversation in conversations.load(folder / "train.parquet"):
        if conversation.task is None:
            ids = render_turns(tokenizer, conversations.first_prompt(conversation.messages))
            found.setdefault(tuple(ids), conversation.id)
    fitting = [Piece(name, list(ids), [IGNORED] * len(ids)) for ids, name in found.items() if len(ids) <= longest]
    if not fitting:
        raise StageFailed(Problem(f"no prompt of {folder} fits {longest} tokens", "lower rlhf.max_new_tokens"))
    row_tokens = max(len(piece.ids) for piece in fitting)
    rows, counts = np.arange(len(fitting)), np.full(len(fitting), answers)
    facts = {"tokenizer_fingerprint": fingerprint(tokenizer), "pad_id": tokenizer.pad_token_id, "rows": len(fitting)}
    with mirror.filling(target):
        write_rows(target / "train", fitting, len(tokenizer), lambda n: pack_groups(n, rows, counts, row_tokens))
        write_json(target / "manifest.json", facts)


def _job(stage: StageRun, manifest: dict[str, Any]) -> worker.Job:
    settings, chat = stage.recipe.rlhf, stage.input("sft") / "model"
    return worker.Job(
        folder=stage.folder.path,
        settings=settings,
        build=partial(build, chat),
        objective=partial(policy_objective, clip=settings.clip, kl_weight=settings.kl_weight),
        tokenizer=stage.input("tokenizer") / "tokenizer",
        stream=RowStream.of(stage.folder.path / "prompts" / "train", manifest["pad_id"], settings, stage.recipe.seed),
        facts={"tokenizer_fingerprint": manifest["tokenizer_fingerprint"]},
        experience=partial(Rollouts.start, chat, stage.input("reward") / "model", settings, stage.recipe.seed),
    )


@dataclass
class Rollouts:
    """What a worker needs to turn prompts into scored answers. The engine runs on the weights that are trained."""

    policy: torch.nn.Module
    engine: Engine
    reference: torch.nn.Module
    reward_model: torch.nn.Module
    pad_id: int
    settings: RlhfSettings
    seed: int
    checked: bool = False

    @classmethod
    def start(
        cls,
        chat: Path,
        reward_folder: Path,
        settings: RlhfSettings,
        seed: int,
        policy: torch.nn.Module,
        tokenizer: Any,
        device: torch.device,
    ) -> Rollouts:
        """Load the reference (the chat model) and the reward model beside the policy."""
        models = (build(chat, None), reward.load(mirror.here(reward_folder)))
        frozen = [model.to(device).eval().requires_grad_(False) for model in models]
        engine = Engine(policy, tokenizer, slots=settings.slots)
        return cls(policy, engine, frozen[0], frozen[1], tokenizer.pad_token_id, settings, seed)

    @torch.no_grad()
    def __call__(self, batch: worker.Batch, step: int) -> worker.Batch:
        """Prompts (R, T) to answers, advantages and log-probabilities, each (R, K, ...)."""
        self.policy.eval()
        answers = self._write_answers(batch, step)
        ids, mask = self._padded(answers)  # (R * K, L)
        sampled = _place([answer.logprobs for answer in answers], mask)
        reference = token_logprobs(_logits(self.reference, ids), ids) * mask
        self._check_parity(ids, mask, sampled)
        self.policy.train()
        rewards = self._rewards(answers).view(len(batch.rows), self.settings.answers)
        arrays = {
            "input_ids": ids,
            "mask": mask.float(),
            "sampled": sampled,
            "reference": reference,
            "advantages": group_advantages(rewards).flatten(),
        }
        shaped = {name: array.view(*rewards.shape, *array.shape[1:]).cpu().numpy() for name, array in arrays.items()}
        return replace(batch, arrays=shaped, figures=_figures(rewards, mask, sampled, reference, answers))

    def _write_answers(self, batch: worker.Batch, step: int) -> list[Completion]:
        """K answers to each prompt, the K of a prompt side by side; seeds depend on step, row and number alone."""
        prompts, params = [], []
        for row, padded in zip(batch.rows.tolist(), batch.arrays["input_ids"], strict=True):
            prompt = [int(token) for token in padded if token != self.pad_id]
            for number in range(self.settings.answers):
                prompts.append(prompt)
                params.append(
                    SamplingParams(
                        max_new_tokens=self.settings.max_new_tokens, seed=sampling_seed(self.seed, step, row, number)
                    )
                )
        self.engine.drop_prefixes()  # the optimizer has changed the weights since
        return self.engine.generate(prompts, params)

    def _padded(self, answers: list[Completion]) -> tuple[torch.Tensor, torch.Tensor]:
        """Prompt and answer, padded at the end: ids (N, L), and a mask (N, L - 1) of the answers' tokens."""
        sequences = [torch.tensor([*answer.prompt_ids, *answer.ids]) for answer in answers]
        ids = torch.nn.utils.rnn.pad_sequence(sequences, True, self.pad_id)
        mask = torch.zeros(ids.shape[0], ids.shape[1] - 1, dtype=torch.bool)
        for row, answer in enumerate(answers):
            begin = len(answer.prompt_ids) - 1  # token t is predicted at t - 1
            mask[row, begin : begin + len(answer.ids)] = True
        device = next(self.policy.parameters()).device
        return ids.to(device), mask.to(device)

    def _rewards(self, answers: list[Completion]) -> torch.Tensor:
        return reward.score_ids(self.reward_model, [[*a.prompt_ids, *a.ids] for a in answers], self.pad_id)

    def _check_parity(self, ids: torch.Tensor, mask: torch.Tensor, sampled: torch.Tensor) -> None:
        """Once a worker: the log-probabilities that the engine sampled with are the trainer's own."""
        if self.checked:
            return
        worst = float(((token_logprobs(_logits(self.policy, ids), ids) - sampled) * mask).abs().max())
        if worst > self.settings.parity:
            raise RuntimeError(
                f"the engine's log-probabilities differ from the trainer's by {worst:.2e}, more than rlhf.parity "
                f"{self.settings.parity:.0e}: the policy would learn from samples of another model"
            )
        self.checked = True


def policy_objective(
    model: Callable[..., Any], batch: dict[str, torch.Tensor], *, clip: float, kl_weight: float
) -> torch.Tensor:
    """GRPO's loss over prompts (R, K, ...): the sum over their answers."""
    flat = {name: tensor.flatten(0, 1) for name, tensor in batch.items()}
    logprobs = token_logprobs(_logits(model, flat["input_ids"]), flat["input_ids"])
    return policy_loss(
        logprobs,
        flat["sampled"],
        flat["reference"],
        flat["advantages"],
        flat["mask"],
        clip=clip,
        kl_weight=kl_weight,
    )


def _logits(model: Callable[..., Any], ids: torch.Tensor) -> torch.Tensor:
    # Padding stands at the end, where nothing real attends to it.
    positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    return model(input_ids=ids, position_ids=positions, use_cache=False).logits


def _place(values: list[list[float]], mask: torch.Tensor) -> torch.Tensor:
    """Per-answer numbers at the True places of `mask` (N, L - 1), zeros elsewhere."""
    placed = torch.zeros(mask.shape, device=mask.device)
    placed[mask] = torch.tensor([value for row in values for value in row], device=mask.device)
    return placed


def _figures(
    rewards: torch.Tensor,
    mask: torch.Tensor,
    sampled: torch.Tensor,
    reference: torch.Tensor,
    answers: list[Completion],
) -> dict[str, float]:
    tokens = mask.sum()
    return {
        "reward": float(rewards.mean()),
        "reward_std": float(rewards.std(dim=1, unbiased=False).mean()),
        "kl": float((kl_estimate(sampled, reference) * mask).sum() / tokens),
        "entropy": float(-(sampled * mask).sum() / tokens),
        "answer_tokens": float(tokens / len(answers)),
        "cut_off": sum(answer.finish_reason == "length" for answer in answers) / len(answers),
    }


def sampling_seed(seed: int, step: int, row: int, number: int) -> int:
    """The seed of one answer: the same whichever worker writes it, and after any restart."""
    digest = hashlib.sha256(f"{seed}/{step}/{row}/{number}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def _outcome(stage: StageRun, manifest: dict[str, Any]) -> Outcome:
    steps = records.read_lines(stage.folder.path / "metrics.jsonl")
    first, last = steps[:SMOOTHED_STEPS], steps[-SMOOTHED_STEPS:]
    before, after = (float(np.mean([record["reward"] for record in part])) for part in (first, last))
    kl = float(np.mean([record["kl"] for record in last]))
    settings = stage.recipe.rlhf
    answers = len(steps) * settings.global_batch * settings.answers
    return Outcome(
        read=f"{manifest['rows']:,} prompts, {answers:,} answers written",
        wrote="policy",
        figure=f"learned reward {before:.3f} -> {after:.3f}, KL to the chat model {kl:.4f} nats a token",
        metrics={
            "steps": len(steps),
            "answers": answers,
            "reward_before": before,
            "reward_after": after,
            "kl": kl,
            "answer_tokens": float(np.mean([record["answer_tokens"] for record in last])),
        },
    )


def _identity(recipe: Recipe) -> dict[str, Any]:
    return {"seed": recipe.seed, **recipe.rlhf.identity()}


STAGE = Stage(
    name="rlhf",
    version=1,
    needs=("tokenizer", "sft", "reward"),
    artefacts=("model",),
    identity=_identity,
    demand=lambda recipe: training.demand("rlhf", recipe),
    run=run,
)
