from __future__ import annotations

from pathlib import Path

import pytest

from cluster.errors import BadInput
from pipelines.__main__ import _further_models, _parser, _serve_settings
from pipelines.deploy import service_args
from pipelines.schema import ServeSettings
from serve.options import ApplicationArgs, Options
from tests.models import save_tiny_model


def settings_of(*words: str) -> ServeSettings:
    return _serve_settings(_parser().parse_args(["serve", "run", *words]), None)


def test_what_the_command_says_reaches_the_service():
    settings = settings_of("--replicas", "2", "--max-replicas", "4", "--deadline-s", "9", "--keys", "keys.json")
    options = Options(**service_args(settings))
    assert (options.replicas, options.most, options.deadline_s) == (2, 4, 9.0)
    assert options.keys == str(Path("keys.json").absolute()), "replicas have other working folders"
    assert (settings.host, settings.port) == ("127.0.0.1", 8000)


def test_a_recipe_can_say_whatever_the_service_takes():
    args = service_args(ServeSettings())
    assert args.keys() == Options.model_fields.keys()
    ApplicationArgs(model_folder="m", model_name="m", **args)


def test_fewer_replicas_at_most_than_at_least_are_refused():
    with pytest.raises(BadInput, match=r"max_replicas \(1\) is below replicas \(2\)"):
        settings_of("--replicas", "2", "--max-replicas", "1")
    assert settings_of("--replicas", "0").replicas == 0


def test_further_models_have_names(tmp_path):
    folder = save_tiny_model(tmp_path / "model")
    assert _further_models([f"other={folder}"], tmp_path) == {"other": folder}
    for wrong in ("other", "=model", "other="):
        with pytest.raises(BadInput, match="NAME=MODEL"):
            _further_models([wrong], tmp_path)
