"""RUN or MODEL -> an ordinary Hugging Face folder or one GGUF file, whole or not there."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any, Literal

from cluster.errors import BadInput, Problem
from llm.files import hash_file

Form = Literal["folder", "gguf"]

# Weights, settings, tokenizer and papers of a model; nothing that is run when it is loaded.
KEPT = ("*.safetensors", "*.json", "*.jinja", "merges.txt", "vocab.txt", "LICENSE*", "README.md")


def export(
    model_folder: Path, form: Form, out: Path, *, lineage: Path | None, dtype: str | None, as_json: bool
) -> dict[str, Any]:
    """Write the model in `model_folder` to `out`, say where, and return the same as an object.

    `folder`: its files as they are, and the run's `lineage.json` if it is given. `gguf`: one file (`llm.gguf_file`),
    its matrices in `dtype`. The object has `path`, `form` and `bytes`. BadInput if something is at `out`, or if the
    model can't be written so.
    """
    _check(form, out, dtype)
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        if form == "gguf":
            from llm.gguf_file import write_gguf

            write_gguf(model_folder, out, dtype)  # type: ignore[arg-type]
        else:
            _copy(model_folder, out, lineage)
    except ValueError as error:
        raise BadInput(Problem(str(error), "nothing was written; headwater export --help")) from error
    size = sum(path.stat().st_size for path in _files(out))
    answer = {"path": str(out), "form": form, "bytes": size}
    print(json.dumps(answer) if as_json else f"{out}: {size / 1e6:,.1f} MB")
    return answer


def _check(form: Form, out: Path, dtype: str | None) -> None:
    if os.path.lexists(out):
        raise BadInput(Problem(f"{out} is there already", "remove it, or give another --out"))
    if form == "folder" and dtype:
        raise BadInput(Problem("--dtype is for gguf, a folder is copied as it is", "leave it out"))


def _files(path: Path) -> list[Path]:
    return [path] if path.is_file() else [file for file in path.iterdir() if file.is_file()]


def _copy(source: Path, out: Path, lineage: Path | None) -> None:
    """Copy a model folder. ValueError if it isn't one, or a copy has other bytes."""
    from llm.loading import check_readable

    check_readable(source)
    partial = out.with_name(f".partial-{out.name}")
    shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed
    partial.mkdir()
    try:
        for path in [*_kept(source), *([lineage] if lineage else [])]:
            shutil.copyfile(path, partial / path.name)
            if hash_file(path) != hash_file(partial / path.name):
                raise ValueError(f"{path.name} was copied with other bytes: the disk or the memory is damaged")
        os.rename(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _kept(source: Path) -> list[Path]:
    found = {path for pattern in KEPT for path in source.glob(pattern) if path.is_file()}
    if not any(path.suffix == ".safetensors" for path in found):
        raise ValueError(f"no weights (*.safetensors) in {source}")
    return sorted(found)
