"""`headwater export`: a folder or a GGUF file, whole or not there."""

from __future__ import annotations

import json

import pytest

from cluster.errors import BadInput
from llm.files import hash_file
from pipelines import export as exporting
from pipelines.__main__ import main
from pipelines.export import export
from tests.models import save_tiny_model


@pytest.fixture
def folder(tmp_path):
    folder = save_tiny_model(tmp_path / "model")
    (folder / "pytorch_model.bin").write_bytes(b"a pickle")
    (folder / "LICENSE").write_text("of the model")
    return folder


def names(path):
    return {file.name for file in path.iterdir()}


def test_a_folder_is_copied_without_pickles(folder, tmp_path, capsys):
    (tmp_path / "lineage.json").write_text("{}")
    out = tmp_path / "deep" / "copy"
    answer = export(folder, "folder", out, lineage=tmp_path / "lineage.json", dtype=None, as_json=True)
    assert names(out) == names(folder) - {"pytorch_model.bin"} | {"lineage.json"}
    for file in names(out) - {"lineage.json"}:
        assert hash_file(out / file) == hash_file(folder / file)
    assert json.loads(capsys.readouterr().out) == answer
    assert answer["bytes"] == sum(file.stat().st_size for file in out.iterdir())
    assert names(out.parent) == {"copy"}

    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert AutoModelForCausalLM.from_pretrained(out).config.vocab_size == len(AutoTokenizer.from_pretrained(out))


def test_nothing_is_written_over(folder, tmp_path):
    (tmp_path / "there").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for form in ("folder", "gguf"):
        for name in ("there", "link"):
            with pytest.raises(BadInput, match="is there already"):
                export(folder, form, tmp_path / name, lineage=None, dtype=None, as_json=False)
    assert (tmp_path / "there").read_text() == "mine"


def test_what_fails_leaves_nothing(folder, tmp_path, monkeypatch):
    full = OSError(28, "No space left on device")

    def copyfile(source, target):
        target.write_bytes(b"half")
        raise full

    monkeypatch.setattr(exporting.shutil, "copyfile", copyfile)
    with pytest.raises(OSError, match="No space"):
        export(folder, "folder", tmp_path / "out", lineage=None, dtype=None, as_json=False)
    assert names(tmp_path) == {"model"}


def test_a_copy_with_other_bytes_is_refused(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(exporting.shutil, "copyfile", lambda source, target: target.write_bytes(b"other"))
    with pytest.raises(BadInput, match="copied with other bytes"):
        export(folder, "folder", tmp_path / "out", lineage=None, dtype=None, as_json=False)
    assert names(tmp_path) == {"model"}


def test_the_command_writes_both(folder, tmp_path, monkeypatch, capsys):
    from gguf import GGUFReader

    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    assert main(["export", str(folder), "--to", "gguf", "--dtype", "bfloat16"]) == 0
    assert main(["export", str(folder), "--to", "folder", "--out", "elsewhere/copy", "--json"]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[0].startswith(f"{tmp_path / 'model.gguf'}: 0.")
    assert json.loads(shown[1])["path"] == str(tmp_path / "elsewhere" / "copy")
    assert {one.name for one in GGUFReader(tmp_path / "model.gguf").tensors} >= {
        "token_embd.weight",
        "blk.1.attn_q.weight",
    }


def test_refusals_are_told_with_exit_code_2(folder, tmp_path, capsys):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"hidden_act": "gelu"}))
    out = str(tmp_path / "x")
    for arguments, message in [
        (["--to", "gguf"], "hidden_act=gelu can't be told"),
        (["--to", "folder", "--dtype", "float16"], "--dtype is for gguf"),
        (["--to", "folder", "--out", str(folder)], "is there already"),
    ]:
        assert main(["export", str(folder), "--out", out, *arguments]) == 2
        assert message in capsys.readouterr().err
    (folder / "model.safetensors").unlink()
    assert main(["export", str(folder), "--to", "folder", "--out", out]) == 2
    assert "no weights" in capsys.readouterr().err
    assert names(tmp_path) == {"model"}
