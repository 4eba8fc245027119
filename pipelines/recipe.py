"""The recipe: all settings of a run, from a YAML file and the command line, checked before anything starts."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml
from pydantic import model_validator

from cluster import mirror
from cluster.errors import BadInput, Problem
from cluster.runs import folder_at
from pipelines.alignment import EvaluateSettings, RankSettings
from pipelines.schema import (
    ClusterSettings,
    IngestSettings,
    ModelSettings,
    PretrainSettings,
    RewardSettings,
    RlhfSettings,
    ServeSettings,
    SftSettings,
    ShardsSettings,
    TokenizerSettings,
    TrackingSettings,
)
from pipelines.settings import Settings, check, identity, placement

RECIPES = Path(__file__).parent / "recipes"


class Recipe(Settings):
    """Everything that a run is."""

    name: str = placement(doc="name of the run and of its folder", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    seed: int = identity(1337, "draws the initial weights and the order of the rows", ge=0, lt=2**32)
    held_out: float = identity(
        0.01, "share of the documents kept out of all training, chosen by hash of id", gt=0, le=0.5
    )
    openings: tuple[str, ...] = placement(("Once upon a time",), "what `serve --trial` lets a base model complete")
    questions: tuple[str, ...] = placement(("Hello, how are you?",), "what `serve --trial` asks a chat model")
    ingest: IngestSettings = identity(doc="raw sources to documents")
    tokenizer: TokenizerSettings = identity(doc="documents to a tokenizer")
    shards: ShardsSettings = identity(doc="documents to token shards")
    model: ModelSettings = identity(doc="shape of the model")
    pretrain: PretrainSettings = identity(doc="token shards to a base model")
    sft: SftSettings = identity(doc="demonstrations to a chat model")
    rank: RankSettings = identity(RankSettings(), "prompts to ranked answers")
    reward: RewardSettings = identity(doc="rankings to a reward model")
    rlhf: RlhfSettings = identity(doc="chat model to policy")
    evaluate: EvaluateSettings = identity(EvaluateSettings(), "base, chat and policy side by side")
    serve: ServeSettings = placement(ServeSettings(), "the service")
    cluster: ClusterSettings = placement(ClusterSettings(), "where Ray is")
    wandb: TrackingSettings = placement(TrackingSettings(), "dashboards")

    @model_validator(mode="after")
    def _weights_are_of_sources(self) -> Recipe:
        """But for a folder's, which a recipe's weights can't have known."""
        sources = {source.name for source in self.ingest.sources}
        for setting, weights in (
            ("tokenizer.weights", self.tokenizer.weights),
            ("pretrain.mixture", self.pretrain.mixture),
        ):
            if self.ingest.folder is None and (unknown := set(weights) - sources):
                raise ValueError(f"{setting}: '{min(unknown)}' is no source, sources are {', '.join(sorted(sources))}")
        return self

    @model_validator(mode="after")
    def _row_fits_context(self) -> Recipe:
        """But for a folder's model, which may lie elsewhere by now: pretraining looks at it before it starts."""
        if self.model.start_from:
            return self
        context = self.model.shape.context
        if self.shards.sequence_length > context:
            name = f"preset '{self.model.preset}'" if self.model.preset else "the model"
            raise ValueError(
                f"shards.sequence_length {self.shards.sequence_length} is longer than the context of {name} "
                f"({context} tokens)"
            )
        return self


def load_recipe(name_or_path: str, overrides: tuple[str, ...] = ()) -> Recipe:
    """The shipped recipe of that name, or the YAML file at that path, with `a.b=value` overrides applied."""
    path = _find(name_or_path)
    values = read_yaml(path)
    for override in overrides:
        _override(values, override)
    return check(Recipe, values, str(path.name))


def shipped() -> list[str]:
    """Names of the recipes that come with the project."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML mapping, duplicate keys refused."""
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader=_UniqueKeys)
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(
            Problem(f"cannot read the recipe {path}: {error}", "check the path and its permissions")
        ) from None
    except yaml.YAMLError as error:
        raise BadInput(Problem(f"{path} is not valid YAML: {error}", "correct the line that it names")) from None
    if not isinstance(values, dict):
        raise BadInput(Problem(f"{path} holds {type(values).__name__}, not settings", "write `key: value` lines"))
    return values


def _find(name_or_path: str) -> Path:
    shipped_file = RECIPES / f"{name_or_path}.yaml"
    if shipped_file.is_file():
        return shipped_file
    path = folder_at(name_or_path)
    if mirror.exists(path) and not path.is_dir():
        return mirror.fetch(path)
    raise BadInput(
        Problem(f"no recipe '{name_or_path}'", f"name a YAML file or one of the shipped ones: {', '.join(shipped())}")
    )


def _override(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise BadInput(Problem(f"'{override}' is not a setting", "write a.b=value, for example pretrain.steps=200"))
    try:
        value = yaml.load(text, Loader=_UniqueKeys)
    except yaml.YAMLError as error:
        raise BadInput(Problem(f"the value of '{override}' is not valid YAML: {error}", "quote it")) from None
    *parents, last = key.split(".")
    for parent in parents:
        below = values.setdefault(parent, {})
        if not isinstance(below, dict):
            raise BadInput(Problem(f"'{override}': '{parent}' holds no settings of its own", "check the dotted name"))
        values = below
    values[last] = value


class _UniqueKeys(yaml.SafeLoader):
    """YAML takes the last of two equal keys without a word; here the second is an error."""

    def construct_mapping(self, node, deep=False):
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        twice = {key for key in keys if keys.count(key) > 1}
        if twice:
            raise yaml.constructor.ConstructorError(
                None, None, f"key given twice: {sorted(map(str, twice))}", node.start_mark
            )
        return super().construct_mapping(node, deep)


# YAML 1.1 reads 3e-4 as a string; people write learning rates so.
_UniqueKeys.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:\d[\d_]*\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+0123456789."),
)
