"""`python -m llm`: a model folder alone, on a machine that has nothing but torch and transformers."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from llm.__main__ import main
from llm.loading import load
from llm.sampling import SamplingParams
from llm.vocabulary import encode_text
from tests.models import save_tiny_model

CHECKOUT = Path(__file__).resolve().parents[2]

# Runs the runtime where the modules named in its first argument are as if they weren't installed.
WITHOUT = """
import sys, runpy
from importlib.machinery import PathFinder
hidden = set(sys.argv.pop(1).split(",")) - set(sys.modules)  # which the environment loads at every start

class Installed(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.split(".")[0] in hidden else super().find_spec(name, path, target)

sys.meta_path = [Installed if finder is PathFinder else finder for finder in sys.meta_path]
try:
    runpy.run_module("llm", run_name="__main__", alter_sys=True)
finally:
    print(",".join(sorted(hidden & set(sys.modules))), file=sys.stderr)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model"))


def needed(*names: str) -> set[str]:
    """The distributions that `names` need, themselves included, as their own metadata says."""
    found: set[str] = set()
    waiting = list(names)
    while waiting:
        name = re.sub(r"[-_.]+", "-", waiting.pop()).lower()
        try:
            requires = [] if name in found else metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue
        found.add(name)
        waiting += [re.split(r"[^\w.-]", one, maxsplit=1)[0] for one in requires if not re.search(r"extra\s*==", one)]
    return found


def others() -> set[str]:
    """Installed modules that torch and transformers don't need."""
    kept = needed("torch", "transformers", "pip", "setuptools", "headwater")
    kept -= needed("headwater") - needed("torch", "transformers")
    return {
        module
        for module, owners in metadata.packages_distributions().items()
        if not {re.sub(r"[-_.]+", "-", owner).lower() for owner in owners} & kept
    } - {"llm", "tests", "cluster", "pipelines", "serve"}


def expected(folder, text, **settings):
    engine = load(folder, slots=1)
    return engine.generate([encode_text(engine.tokenizer, text)], SamplingParams(**settings))[0].text


def test_it_needs_torch_and_transformers_alone(folder):
    hidden = others() | {"pydantic"}  # which transformers' command line needs, and nothing else of it
    assert {"ray", "deepspeed", "fastapi", "wandb", "pyarrow", "llguidance", "rensa"} <= hidden
    command = [sys.executable, "-c", WITHOUT, ",".join(hidden), str(folder), "The cat", "--max-new-tokens", "12"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=CHECKOUT)
    assert done.returncode == 0, done.stderr
    assert done.stdout == expected(folder, "The cat", max_new_tokens=12, temperature=0.8, seed=0) + "\n"
    assert done.stderr.splitlines()[-1] == ""  # none of them was imported


def test_settings_are_those_of_the_engine(folder, capsys):
    flags = ["--max-new-tokens", "9", "--temperature", "1.3", "--top-p", "0.9", "--seed", "5"]
    assert main([str(folder), "Nobody", *flags]) == 0
    wanted = expected(folder, "Nobody", max_new_tokens=9, temperature=1.3, top_p=0.9, seed=5)
    assert capsys.readouterr().out == wanted + "\n"


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_weights_may_be_smaller(folder, capsys, dtype):
    assert main([str(folder), "The cat", "--max-new-tokens", "4", "--dtype", dtype]) == 0
    assert capsys.readouterr().out


def test_chat_puts_a_users_turn(folder, monkeypatch, capsys):
    seen = []
    stream = "llm.engine.Engine.stream"
    monkeypatch.setattr(
        stream, lambda engine, prompt, params: seen.append(engine.tokenizer.decode(prompt)) or iter(())
    )
    assert main([str(folder), "Hi <|end|>", "--chat"]) == 0
    assert seen == ["<|user|>Hi <|end|><|end|><|assistant|>"]
    tokens = load(folder).tokenizer
    assert main([str(folder), "Hi", "--chat"]) == 0
    assert seen[1] == tokens.apply_chat_template(
        [{"role": "user", "content": "Hi"}], add_generation_prompt=True, tokenize=False
    )


def test_text_comes_as_it_is_made(folder, monkeypatch):
    """Each token's text is written and flushed before the next one is asked for."""
    import io

    out, seen = io.StringIO(), []
    monkeypatch.setattr(sys, "stdout", out)
    from llm.engine import Token

    def stream(engine, prompt, params):
        for piece in ("one", " two"):
            seen.append(out.getvalue())
            yield Token("a", 1, piece, 0.0, [], None)

    monkeypatch.setattr("llm.engine.Engine.stream", stream)
    assert main([str(folder), "count"]) == 0
    assert (seen, out.getvalue()) == (["", "one"], "one two\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere", "a"], "no model folder at nowhere"),
        (["FOLDER", ""], "the prompt is empty"),
        (["FOLDER", "a", "--max-new-tokens", "1000"], "more than the context of 256"),
        (["FOLDER", "a", "--temperature", "-1"], "temperature must be a number from 0"),
        (["FOLDER", "a\udc80"], "the prompt isn't valid Unicode"),
    ],
)
def test_bad_input_is_told_in_plain_words(folder, capsys, arguments, message):
    assert main([str(folder) if word == "FOLDER" else word for word in arguments]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("llm: ")
    assert message in shown.err
    assert len(shown.err.splitlines()) == 1


def test_a_model_without_a_chat_template_is_named(folder, tmp_path, capsys):
    import shutil

    shutil.copytree(folder, tmp_path / "bare")
    (tmp_path / "bare" / "chat_template.jinja").unlink()
    assert main([str(tmp_path / "bare"), "Hi", "--chat"]) == 2
    assert "no chat template" in capsys.readouterr().err
