"""What each stage can be told: every setting with its unit, its default and its sort (identity or placement)."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self, TypeVar

from pydantic import field_validator, model_validator

from cluster import mirror
from cluster.errors import BadInput, Problem
from cluster.runs import folder_at
from llm.adoption import adopt, adopted_size
from llm.architectures import Architecture, Saved, check_architecture, saved_at
from llm.presets import PRESETS, Preset, from_depth
from llm.schedules import learning_rate
from llm.vocabulary import SMALLEST_VOCABULARY
from pipelines.alignment import ConversationSource
from pipelines.corpus import quality
from pipelines.corpus.quality import RULE_SETS
from pipelines.settings import Settings, identity, placement

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Some = TypeVar("Some")

# Licences (SPDX) under which code may be copied on with little more than a notice.
PERMISSIVE = (
    "0BSD",
    "Apache-2.0",
    "BSD-2-Clause",
    "BSD-3-Clause",
    "BSL-1.0",
    "CC0-1.0",
    "ISC",
    "MIT",
    "MIT-0",
    "PSF-2.0",
    "Unlicense",
    "Zlib",
)


class Source(Settings):
    """One body of raw text."""

    name: str = identity(doc="short name that every document of it carries", pattern=r"^[a-z0-9][a-z0-9._-]*$")
    kind: Literal["book", "article", "web", "code", "auto"] = identity(
        "auto", "what the files are; 'auto' decides by each file's suffix"
    )
    path: str = placement(
        doc="a folder or file, local or s3://BUCKET/PREFIX; 'package:NAME/FOLDER' inside an installed package; "
        "'stdlib:' for the source of Python's standard library; 'pydoc:' for its documentation, crawled from a server "
        "on loopback"
    )
    licence: str | None = identity(
        None,
        "licence of the text, carried by every document; 'unknown' if it is not known; 'detect' to find it in every "
        "repository of code and to take those of `licences`",
    )
    licences: tuple[str, ...] = identity(PERMISSIVE, "licences (SPDX) of code that are taken where they are detected")
    include: tuple[str, ...] = identity((), "glob patterns of the file names to take, all when empty")
    max_files: int | None = identity(None, "take at most this many files (or crawled pages)", ge=1)
    text_column: str = identity("text", "column of JSONL, Parquet and CSV that holds the text")
    id_column: str | None = identity(None, "column that holds a name of each row, which must not come twice")
    title_column: str | None = identity(None, "column that holds a title, put before the text as a line of its own")
    url_column: str | None = identity(None, "column that holds an address")
    licence_column: str | None = identity(None, "column that holds a licence of each row")
    markup: Literal["plain", "wikitext"] = identity("plain", "how the text of articles is marked up")
    languages: tuple[str, ...] = identity((), "ISO 639-1 codes of the languages to take of web pages, all when empty")
    block_list: str | None = placement(
        None,
        "a file of domains and address prefixes, one a line, whose web pages are not taken; its content is identity",
    )
    respect: tuple[str, ...] = identity(
        ("noai", "noindex", "none", "tdm-reservation"), "marks by which a web page refuses to be taken"
    )
    rules: tuple[str, ...] | None = identity(
        None, f"sets of rules that documents must keep: {', '.join(RULE_SETS)}; null for those of the kind"
    )
    thresholds: dict[str, float] = identity({}, "bounds of single rules in place of the papers', by the rule's name")

    @field_validator("rules")
    @classmethod
    def _sets_exist(cls, rules: tuple[str, ...] | None) -> tuple[str, ...] | None:
        if unknown := set(rules or ()) - set(RULE_SETS):
            raise ValueError(f"unknown set of rules '{min(unknown)}', known are {', '.join(RULE_SETS)}")
        return rules

    @field_validator("thresholds")
    @classmethod
    def _rules_exist(cls, thresholds: dict[str, float]) -> dict[str, float]:
        return _known_rules(thresholds)


def _known_rules(thresholds: dict[str, float]) -> dict[str, float]:
    quality.judge("", (), thresholds)  # ValueError for a name that no rule has
    return thresholds


class DeduplicateSettings(Settings):
    """Which documents count as said before. MinHash's defaults are those of FineWeb (arXiv 2406.17557)."""

    exact: bool = identity(True, "drop documents of the same words as another")
    near: bool = identity(True, "drop near-duplicates: MinHash of word n-grams, then connected components")
    ngram: int = identity(5, "words in an n-gram", ge=1, le=64)
    bands: int = identity(14, "bands of a signature; one that agrees makes two documents duplicates", ge=1, le=256)
    rows: int = identity(
        8, "hashes in a band; with 14 bands of 8, half of all pairs of similarity 0.72 are found", ge=1, le=64
    )
    passages: bool = identity(True, "take out passages of three sentences that another document has too (not of code)")


class IngestSettings(Settings):
    """Raw sources to documents."""

    folder: str | None = placement(None, "your own folder of text, HTML, WARC, tables or code; replaces `sources`")
    folder_licence: str | None = identity(None, "licence of what is in `folder`; 'unknown' if it is not known")
    sources: tuple[Source, ...] = identity((), "bodies of raw text")
    on_error: Literal["skip", "fail"] = identity(
        "skip", "what is done about input that can't be read: leave it out and say so, or end the stage and name it"
    )
    min_characters: int = identity(32, "documents shorter than this are dropped", ge=1)
    max_characters: int = identity(
        1_000_000, "longer documents are cut into pieces of at most this many characters", ge=1_000
    )
    thresholds: dict[str, float] = identity({}, "bounds of single rules for all sources, by the rule's name")
    mask: tuple[Literal["email", "ip", "phone", "card", "key"], ...] = identity(
        ("email", "ip", "phone", "card", "key"), "personal data that are replaced by a placeholder"
    )
    decontaminate: bool = identity(True, "drop documents that share text with what the run will be evaluated on")
    decontaminate_words: int = identity(13, "words in a row that make text shared", ge=3, le=64)
    deduplicate: DeduplicateSettings = identity(DeduplicateSettings(), "what counts as said before")
    cpus_per_task: float = placement(1, "CPUs that a task claims", gt=0)

    @field_validator("thresholds")
    @classmethod
    def _rules_exist(cls, thresholds: dict[str, float]) -> dict[str, float]:
        return _known_rules(thresholds)

    @field_validator("sources")
    @classmethod
    def _names_differ(cls, sources: tuple[Source, ...]) -> tuple[Source, ...]:
        names = [source.name for source in sources]
        if len(set(names)) < len(names):
            raise ValueError("source names must differ")
        return sources

    @model_validator(mode="after")
    def _has_something(self) -> IngestSettings:
        if not self.sources and not self.folder:
            raise ValueError("nothing to read: give 'folder' or at least one of 'sources'")
        return self

    def chosen(self) -> tuple[Source, ...]:
        """The sources to read: the user's folder when there is one."""
        if self.folder is None:
            return self.sources
        return (Source(name="folder", kind="auto", path=self.folder, licence=self.folder_licence),)

    def identity(self) -> dict[str, Any]:
        """With a folder given, the folder's content is what counts, not the sources that it replaces."""
        own = super().identity()
        return own if self.folder is None else {**own, "sources": [source.identity() for source in self.chosen()]}


class TokenizerSettings(Settings):
    """Documents to a byte-level BPE tokenizer."""

    vocab_size: int = identity(32_768, "token ids, special tokens included", ge=SMALLEST_VOCABULARY, le=1_000_000)
    sample_bytes: int = identity(
        1_000_000_000, "bytes of text to learn the merges from, spread over all documents", ge=1_000
    )
    weights: dict[str, float] = identity(
        {}, "weights of the sources in that sample, by name; empty for what the sources have"
    )
    from_folder: str | None = placement(
        None,
        "a Hugging Face folder whose tokenizer.json (byte-level BPE) is taken in place of learning one, with our "
        "special tokens behind its ids and our chat template; its content is identity",
    )
    cpus: float = placement(1, "CPUs that the training task claims", gt=0)

    @property
    def folder(self) -> Path | None:
        """Where the tokenizer that is taken lies, on this machine."""
        return mirror.here(folder_at(self.from_folder)) if self.from_folder else None

    @property
    def ids(self) -> int:
        """Token ids to reckon with: `vocab_size`, or those of the folder's tokenizer with all special tokens."""
        return self._of_folder(adopted_size) if self.from_folder else self.vocab_size

    def adopted(self) -> PreTrainedTokenizerFast:
        """The folder's tokenizer as a run's own. BadInput, with what it is or does, if it can't be one."""
        return self._of_folder(adopt)

    def _of_folder(self, take: Callable[[Path], Some]) -> Some:
        assert self.folder is not None
        try:
            return take(self.folder)
        except ValueError as error:
            remedy = (
                "name a folder with the tokenizer.json of a byte-level BPE that loses nothing, or let one be learnt"
            )
            raise BadInput(Problem(f"tokenizer.from_folder: {error}", remedy)) from None

    def identity(self) -> dict[str, Any]:
        """With a folder given, its content is what counts: nothing is learnt."""
        return super().identity() if self.from_folder is None else {"from_folder": "a folder"}

    @field_validator("weights")
    @classmethod
    def _positive(cls, weights: dict[str, float]) -> dict[str, float]:
        if weights and (min(weights.values()) < 0 or not sum(weights.values())):
            raise ValueError("weights must be positive, or 0 to leave a source out")
        return weights


class ShardsSettings(Settings):
    """Documents to token shards and the packing index."""

    sequence_length: int = identity(2048, "tokens in a row (one training sequence)", ge=8)
    packing: Literal["best_fit", "concatenate"] = identity(
        "best_fit",
        "how documents fill rows: with few of them cut, or one after another in order; code always in order, so that "
        "the files of a repository share rows",
    )
    tokens_per_shard: int = identity(16_000_000, "tokens of a shard file, about", ge=1_000)
    cpus_per_task: float = placement(1, "CPUs that a task claims", gt=0)


class ModelSettings(Settings):
    """The model, by exactly one of its four settings; the preset 'tiny' when none is given."""

    preset: str | None = identity(None, f"a shape with a name: one of {', '.join(PRESETS)}")
    depth: int | None = identity(None, "layers of a Llama decoder; its other numbers follow", ge=1, le=512)
    config: dict[str, Any] | None = identity(
        None, "model_type and configuration values of any causal model of transformers; dropout is 0 if not given"
    )
    start_from: str | None = placement(
        None,
        "a Hugging Face folder (safetensors) with a causal model to go on training, of the run's own tokenizer or of "
        "the one that tokenizer.from_folder takes; its content is identity",
    )

    @model_validator(mode="before")
    @classmethod
    def _one_of_four(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        given = [name for name in ("preset", "depth", "config", "start_from") if values.get(name) is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} are given, each a whole model: set all but one to null")
        return values if given else {**values, "preset": "tiny"}

    @field_validator("preset")
    @classmethod
    def _known(cls, preset: str | None) -> str | None:
        if preset is not None and preset not in PRESETS:
            raise ValueError(f"unknown preset, known are {', '.join(PRESETS)}")
        return preset

    @field_validator("config")
    @classmethod
    def _buildable(cls, config: dict[str, Any] | None) -> dict[str, Any] | None:
        if config is not None:
            check_architecture(config)
        return config

    @property
    def folder(self) -> Path | None:
        """Where the model to go on from lies, on this machine."""
        return mirror.here(folder_at(self.start_from)) if self.start_from else None

    @property
    def shape(self) -> Preset | Architecture | Saved:
        """What the model is built by. BadInput if it is a folder's that holds no known model."""
        if self.folder:
            return self._found(self.folder)
        if self.config:
            return check_architecture(self.config)
        return from_depth(self.depth) if self.depth else PRESETS[self.preset or "tiny"]

    def _found(self, folder: Path) -> Saved:
        try:
            return saved_at(folder)
        except ValueError as error:
            remedy = "name a folder that `save_pretrained` wrote, with its tokenizer"
            raise BadInput(Problem(f"model.start_from: {error}", remedy)) from None

    def identity(self) -> dict[str, Any]:
        """The numbers, not the name: a preset that is redefined is another model. A folder counts by its content."""
        if self.start_from:
            return {"start_from": "a folder"}
        if self.config:
            return {"config": self.config}
        shape = self.shape
        assert isinstance(shape, Preset)
        return shape.numbers()


class TrainingSettings(Settings):
    """What every stage that trains under Ray Train and DeepSpeed needs to know."""

    steps: int = identity(doc="optimizer steps", ge=1)
    global_batch: int = identity(doc="rows in one optimizer step, over all workers", ge=1)
    learning_rate: float = identity(3e-4, "peak of the schedule", gt=0)
    warmup_steps: int = identity(100, "steps of linear warm-up", ge=0)
    decay: Literal["cosine", "linear", "wsd", "none"] = identity(
        "cosine", "how the rate falls after the warm-up; wsd: stays at the peak, then falls in a line"
    )
    decay_share: float = identity(0.2, "share of the steps in which the rate falls, with decay=wsd", gt=0, le=1)
    final_learning_rate: float = identity(0.1, "share of the peak at the last step", ge=0, le=1)
    weight_decay: float = identity(0.1, "decoupled decay of matrices (not of norms)", ge=0)
    optimizer: Literal["adamw", "muon"] = identity(
        "adamw", "muon: Muon for the layers' matrices, AdamW for the rest, with one rate and decay for both"
    )
    beta1: float = identity(0.9, "AdamW's first-moment decay", ge=0, lt=1)
    beta2: float = identity(0.95, "AdamW's second-moment decay", ge=0, lt=1)
    clip_norm: float = identity(1.0, "largest gradient norm, 0 for no clipping", ge=0)
    spike_sigmas: float | None = identity(
        None, "a loss so many standard deviations above the last 128 is a spike and its step doesn't count", gt=0
    )
    dtype: Literal["fp32", "bf16", "fp16"] = identity(
        "bf16", "compute precision; optimizer state is fp32 in each; fp16 on GPUs alone"
    )
    held_out_rows: int = identity(4096, "held-out rows to evaluate on, at most", ge=1)

    workers: int = placement(1, "training processes", ge=1)
    cpus_per_worker: float = placement(1, "CPUs that a worker claims; leave Ray Data a share", gt=0)
    gpus_per_worker: float = placement(0, "GPUs that a worker claims", ge=0)
    threads: int = placement(1, "compute threads of a worker on CPU", ge=1)
    micro_batch: int = placement(8, "rows in one forward pass of a worker", ge=1)
    zero_stage: Literal[1, 2, 3] = placement(2, "what ZeRO shards: 1 optimizer, 2 and gradients, 3 and weights")
    sequence_parallel: int = placement(
        1,
        "workers that share each row's tokens, of which attention gets whole rows of a share of the heads (Ulysses, "
        "arXiv 2309.14509); next-token prediction on GPUs alone",
        ge=1,
    )
    tensor_parallel: int = placement(
        1,
        "workers that share each layer's matrices and have the same rows (arXiv 1909.08053); with ZeRO 1 or 2, AdamW "
        "and next-token prediction on GPUs alone",
        ge=1,
    )
    data_cpus: float = placement(0.25, "CPUs that a Ray Data reading task claims", gt=0)
    save_every: int = placement(500, "steps between checkpoints", ge=1)
    keep_checkpoints: int = placement(2, "newest checkpoints to keep", ge=1)
    keep_best: int = placement(0, "checkpoints of the lowest held-out loss to keep besides", ge=0)
    offload: Literal["none", "optimizer", "all"] = placement(
        "none",
        "what of the training state leaves the GPU for the machine's memory: the optimizer's, or with ZeRO-3 also the "
        "weights",
    )
    offload_to: str = placement(
        "cpu",
        "where the optimizer's offloaded state goes: 'cpu', the machine's memory, or with ZeRO-3 and AdamW a folder "
        "on an NVMe disk of each worker's machine",
    )
    activation_checkpointing: bool = placement(
        False, "compute activations again in the backward pass instead of keeping them"
    )
    compile: bool = placement(False, "compile the model (torch.compile); needs a C++ compiler on CPU")
    peak_flops: float | None = placement(
        None, "dense FLOP/s of a worker's device for the MFU, where it isn't one that is known", gt=0
    )
    deadline_s: float = placement(
        600,
        "seconds that training may stand still in one place (six times that in an evaluation, a save or a rollout); "
        "then the rank waited for is named",
        ge=5,
    )
    max_skips: int = placement(5, "times that bad batches are left out before the stage gives up", ge=0)
    evaluate_every: int | None = placement(None, "steps between held-out evaluations, only the last when null", ge=1)
    max_failures: int = placement(3, "worker-group restarts before the stage gives up", ge=0)

    @model_validator(mode="after")
    def _batch_divides(self) -> TrainingSettings:
        if self.workers % self.group:
            name = "sequence_parallel" if self.sequence_parallel > 1 else "tensor_parallel"
            raise ValueError(f"workers must be a multiple of {name}: {self.workers} in groups of {self.group}")
        if self.global_batch % self.shares:
            groups = f"groups of {self.group} workers" if self.group > 1 else "workers"
            raise ValueError(
                f"global_batch must be a multiple of workers: {self.global_batch} rows over {self.shares} {groups}"
            )
        rows = self.rows_per_worker
        if rows % min(self.micro_batch, rows):
            raise ValueError(f"a worker's {rows} rows must be a multiple of micro_batch, which is {self.micro_batch}")
        return self

    @model_validator(mode="after")
    def _gpu_alone(self) -> TrainingSettings:
        if self.gpus_per_worker:
            return self
        refused = {
            "dtype": self.dtype == "fp16",
            "offload": self.offload != "none",
            "sequence_parallel": self.sequence_parallel > 1,
            "tensor_parallel": self.tensor_parallel > 1,
        }
        for name in (name for name, asked in refused.items() if asked):
            raise ValueError(f"{name}={getattr(self, name)} needs GPUs: set gpus_per_worker, or leave it out")
        return self

    @model_validator(mode="after")
    def _offload_fits(self) -> TrainingSettings:
        if self.offload == "all" and self.zero_stage != 3:
            raise ValueError(f"offload=all needs zero_stage 3, got {self.zero_stage}")
        return self

    @model_validator(mode="after")
    def _disk_fits(self) -> TrainingSettings:
        if self.offload_to == "cpu":
            return self
        if not os.path.isabs(self.offload_to):
            raise ValueError(f"offload_to must be 'cpu' or an absolute path, got {self.offload_to!r}")
        needs = {"offload=optimizer or all": self.offload != "none", "zero_stage=3": self.zero_stage == 3}
        needs["optimizer=adamw"] = self.optimizer == "adamw"
        for need in (need for need, met in needs.items() if not met):
            raise ValueError(f"offload_to={self.offload_to} needs {need}")
        return self

    @model_validator(mode="after")
    def _layers_can_be_cut(self) -> TrainingSettings:
        if self.tensor_parallel == 1:
            return self
        needs = {
            "sequence_parallel=1": self.sequence_parallel == 1,
            "zero_stage=1 or 2": self.zero_stage < 3,
            "optimizer=adamw": self.optimizer == "adamw",
            "compile=false": not self.compile,
        }
        for need in (need for need, met in needs.items() if not met):
            raise ValueError(f"tensor_parallel={self.tensor_parallel} needs {need}")
        return self

    @model_validator(mode="after")
    def _warmup_ends(self) -> TrainingSettings:
        if self.warmup_steps >= self.steps:
            raise ValueError(f"warmup_steps must be below steps: {self.warmup_steps} of {self.steps}")
        return self

    def identity(self) -> dict[str, Any]:
        """Without what has no effect in the mode that is chosen."""
        return {name: value for name, value in super().identity().items() if name not in self._idle}

    @property
    def _idle(self) -> set[str]:
        """Settings of the result that have no effect beside the others."""
        idle = {"decay_share": self.decay != "wsd", "final_learning_rate": self.decay == "none"}
        return {name for name, is_idle in idle.items() if is_idle}

    def rate(self, step: int) -> float:
        """Learning rate at `step`, counted from 0."""
        return learning_rate(
            step,
            peak=self.learning_rate,
            warmup_steps=self.warmup_steps,
            steps=self.steps,
            decay=self.decay,
            decay_share=self.decay_share,
            final=self.final_learning_rate,
        )

    @property
    def shares(self) -> int:
        """Shares in which a global batch's rows are dealt out: one a worker, or one a group of them."""
        return self.workers // self.group

    @property
    def group(self) -> int:
        """Workers that have the same rows."""
        return self.sequence_parallel * self.tensor_parallel

    @property
    def least_workers(self) -> int:
        """How many workers have to be there for the stage to begin or go on."""
        return self.workers

    def among(self, workers: int) -> Self:
        """These settings for so many workers, be it a number that doesn't divide the global batch."""
        return self.model_copy(update={"workers": workers})

    @property
    def forward_passes(self) -> int:
        """Of a worker in one step."""
        return math.ceil(math.ceil(self.global_batch / self.shares) / self.micro_batch)

    @property
    def forward_rows(self) -> int:
        """Rows in one forward pass: the micro-batch, or all of a worker's rows when those are fewer."""
        return math.ceil(math.ceil(self.global_batch / self.shares) / self.forward_passes)

    @property
    def rows_per_worker(self) -> int:
        """Of one global batch. Where its rows don't divide by the workers, the last of these rows are empty ones."""
        return self.forward_passes * self.forward_rows


Training = TypeVar("Training", bound=TrainingSettings)


def _refuse_parts(settings: Training, what: str) -> Training:
    """ValueError where workers are to share the rows or the layers of a stage that needs them whole."""
    for name in ("sequence_parallel", "tensor_parallel"):
        if (parts := getattr(settings, name)) > 1:
            raise ValueError(f"{name} must be 1 with {what}, got {parts}")
    return settings


class PretrainSettings(TrainingSettings):
    """Token shards to a base model, by next-token prediction, by masked words or by both."""

    objective: Literal["causal", "masked", "mixed"] = identity(
        "causal", "predict the next token, fill in masked words, or of each row one of the two"
    )
    masked_share: float = identity(0.5, "share of the rows that are masked where the objective is mixed", gt=0, lt=1)
    mask_rate: float = identity(
        0.15, "share of a masked row's tokens that are to be filled in (arXiv 1810.04805)", gt=0, lt=1
    )
    spike_sigmas: float | None = identity(
        12, "a loss so many standard deviations above the last 128 is a spike and its step doesn't count", gt=0
    )

    mixture: dict[str, float] = identity(
        {}, "weights of the sources by name: shares of the tokens trained on; empty for what the sources have"
    )
    max_epochs: float = identity(
        4.0, "how often a source is read at most in a mixture; the rest goes to the others (arXiv 2305.16264)", gt=0
    )
    min_workers: int | None = placement(
        None,
        "workers to go on with at least where nodes are lost, up to `workers` again when they come back; null: always "
        "`workers`",
        ge=1,
    )
    samples: tuple[str, ...] = placement(
        ("Once upon a time", "The most important"),
        "texts that the model continues at each evaluation, to see what it has learnt; not with ZeRO-3, whose ranks "
        "hold shares of the weights, nor by masked words alone",
    )
    isolate: bool = identity(
        True, "whether the documents of a row are hidden from one another, each at positions from 0 on"
    )

    @model_validator(mode="after")
    def _whole_rows(self) -> PretrainSettings:
        return _refuse_parts(self, f"objective={self.objective}") if self.objective != "causal" else self

    @field_validator("mixture")
    @classmethod
    def _weights(cls, mixture: dict[str, float]) -> dict[str, float]:
        if mixture and (min(mixture.values()) < 0 or not sum(mixture.values())):
            raise ValueError("weights must be positive, or 0 to leave a source out")
        return mixture

    @model_validator(mode="after")
    def _no_more_than_all(self) -> PretrainSettings:
        if self.least_workers > self.workers:
            raise ValueError(f"min_workers must be at most workers: {self.min_workers} of {self.workers}")
        if self.least_workers < self.workers and self.group > 1:  # Ray Train can't be told to take whole groups
            raise ValueError(f"min_workers must be null or workers where workers come in groups of {self.group}")
        return self

    @property
    def least_workers(self) -> int:
        return self.min_workers or self.workers

    @property
    def _idle(self) -> set[str]:
        idle = {
            "masked_share": self.objective != "mixed",
            "mask_rate": self.objective == "causal",
            "max_epochs": not self.mixture,
        }
        return super()._idle | {name for name, is_idle in idle.items() if is_idle}


class SftSettings(TrainingSettings):
    """Demonstrations to a chat model: loss on what the assistant says alone."""

    sources: tuple[ConversationSource, ...] = identity(doc="bodies of demonstrations", min_length=1)
    held_out: float = identity(
        0.05, "share of the conversations kept from training, chosen by hash of id", gt=0, le=0.5
    )


class RewardSettings(TrainingSettings):
    """Rankings to a reward model; a row holds all answers to one prompt."""

    @model_validator(mode="after")
    def _whole_rows(self) -> RewardSettings:
        return _refuse_parts(self, "the reward model, which compares the answers of a row")


class RlhfSettings(TrainingSettings):
    """The policy, by GRPO against the learned reward model; a row is one prompt."""

    answers: int = identity(4, "answers that the policy writes to each prompt, compared with one another", ge=2)
    max_new_tokens: int = identity(48, "tokens after which an answer is cut off", ge=1)
    clip: float = identity(0.2, "how far from 1 a token's probability ratio counts", gt=0, lt=1)
    kl_weight: float = identity(0.02, "weight of the KL term to the chat model", ge=0)
    parity: float = identity(
        1e-3, "refuse to start if the engine's log-probabilities differ more than this from the trainer's", gt=0
    )

    slots: int = placement(32, "answers that a worker's engine writes at once", ge=1)

    @model_validator(mode="after")
    def _whole_weights(self) -> RlhfSettings:
        if self.zero_stage == 3:
            raise ValueError("zero_stage must be 1 or 2: the rollout engine shares each worker's whole weights, got 3")
        return _refuse_parts(self, "the policy, whose rollout engine writes whole rows")


class ServeSettings(Settings):
    """The service."""

    host: str = placement("127.0.0.1", "address to listen on")
    port: int = placement(8000, "TCP port", ge=1, le=65535)
    replicas: int = placement(
        1, "generation replicas, with max_replicas the fewest; 0 ends the last one when nobody asks", ge=0
    )
    max_replicas: int | None = placement(None, "replicas that load may call for; null keeps their number", ge=1)
    ingresses: int = placement(1, "processes that answer HTTP and pass the work on to the replicas", ge=1)
    cpus_per_replica: float = placement(0.5, "CPUs that a replica claims", gt=0)
    gpus_per_replica: float = placement(0, "GPUs that a replica claims", ge=0)
    slots: int = placement(8, "requests that one replica generates for at once", ge=1)
    max_requests: int = placement(
        512, "requests that may run and wait in one replica; others are told to return", ge=1
    )
    dtype: Literal["float32", "bfloat16", "int8"] | None = placement(
        None, "what the weights are computed in; null takes float32 on a CPU, on a GPU what they were saved in"
    )
    deadline_s: float = placement(600, "seconds that a request may take, waiting included", gt=0)
    target_wait_s: float = placement(2, "seconds until a first token, beyond which a replica is added", gt=0)
    target_tokens: int = placement(
        4096, "tokens to read and write that one replica is thought to have enough with", ge=1
    )
    upscale_delay_s: float = placement(5, "seconds that the load must call for more replicas", ge=0)
    downscale_delay_s: float = placement(60, "seconds that the load must call for fewer replicas", ge=0)
    keys: str | None = placement(None, "file of the API's keys, which `headwater keys` writes; null asks for none")

    @model_validator(mode="after")
    def _check_replicas(self) -> ServeSettings:
        most = 1 if self.max_replicas is None and not self.replicas else self.max_replicas
        if most is not None and most < self.replicas:
            raise ValueError(f"max_replicas ({most}) is below replicas ({self.replicas})")
        return self


class ClusterSettings(Settings):
    """Where Ray is."""

    address: str | None = placement(None, "a running Ray cluster; null joins RAY_ADDRESS or starts a local one")
    object_store_mb: int = placement(512, "object store of a local Ray, MiB", ge=80)


class TrackingSettings(Settings):
    """Weights & Biases."""

    enabled: bool = placement(True, "log to W&B: offline unless WANDB_API_KEY is set")
    project: str = placement("headwater", "W&B project")
