"""Rules of the repository itself."""

import ast
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from ray import cloudpickle

from cluster.plan import GPUS, LOSS_PIECE
from llm.flops import peak_flops
from llm.losses import PIECE
from pipelines import starts
from pipelines.recipe import load_recipe, shipped
from pipelines.stream import Dealt, RowStream

CHECKOUT = Path(__file__).resolve().parent.parent
ALLOWED = {
    "llm": {"llm"},
    "cluster": {"cluster", "llm.files"},
    "serve": {"serve", "llm", "cluster"},
    "pipelines": {"pipelines", "llm", "cluster"},
}
ROOMS = ("cluster", "pipelines", "llm", "serve")


def imports(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


@pytest.mark.parametrize("room", ROOMS)
def test_imports_go_one_way(room):
    for path in (CHECKOUT / room).rglob("*.py"):
        if path.name == "__main__.py":
            continue  # the command's own module alone starts everything
        for name in imports(path):
            if name.split(".")[0] in ROOMS:
                allowed = any(name == door or name.startswith(f"{door}.") for door in ALLOWED[room])
                assert allowed or name in ROOMS, f"{path} imports {name}"


def test_no_ray_under_llm():
    for path in (CHECKOUT / "llm").rglob("*.py"):
        assert not {name for name in imports(path) if name.split(".")[0] == "ray"}, path


def test_ray_serve_only_inside_serve():
    for room in ("cluster", "pipelines", "llm"):
        for path in (CHECKOUT / room).rglob("*.py"):
            assert not {name for name in imports(path) if name.startswith("ray.serve")}, path


@pytest.mark.parametrize("name", shipped())
def test_every_shipped_recipe_loads(name):
    assert load_recipe(name).name == name


def test_no_file_takes_a_name_of_the_standard_library():
    import sys

    for room in ROOMS:
        for path in (CHECKOUT / room).rglob("*.py"):
            assert path.stem not in sys.stdlib_module_names or path.stem.startswith("__"), path


@pytest.mark.parametrize("name", ["L4", "L40S", "A100-40GB", "A100-80GB", "H100", "H200"])
def test_a_gpu_is_as_fast_in_the_plan_as_in_the_mfu(name):
    """Two tables, since `cluster/` may not import `llm/`."""
    in_torch = {"H100": "NVIDIA H100 80GB HBM3"}.get(name, f"NVIDIA {name}")
    assert GPUS[name].flops == peak_flops(in_torch, "bf16")


def test_data_stages_and_a_runs_tokenizer_need_no_torch(tmp_path):
    """Its import is 190 MB of the driver's and of each task's memory, and seconds."""
    script = (
        "import sys; from pipelines.stage import load_stages; import pipelines.run;"
        "load_stages(['ingest', 'tokenizer', 'shards']);"
        "from llm.vocabulary import fingerprint, load_tokenizer, train_tokenizer;"
        "made = train_tokenizer(['some text'], 300); made.save_pretrained(sys.argv[1]);"
        "assert fingerprint(load_tokenizer(sys.argv[1])) == fingerprint(made);"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, cwd=CHECKOUT)
    assert done.stdout == "False\n", done.stdout + done.stderr


def test_what_deals_out_rows_needs_no_torch(tmp_path):
    """It is loaded by Ray Data's tasks and by two of Ray Train's processes at each start of a training stage."""
    settings = load_recipe("micro").pretrain
    dealt = Dealt(partial(starts.dataset, RowStream.of(tmp_path, 0, settings, seed=1), settings, tmp_path))
    (tmp_path / "dealt").write_bytes(cloudpickle.dumps(dealt))
    script = "import pickle, sys; pickle.load(open(sys.argv[1], 'rb')); print('torch' in sys.modules)"
    line = [sys.executable, "-c", script, str(tmp_path / "dealt")]
    done = subprocess.run(line, capture_output=True, text=True, cwd=CHECKOUT)
    assert done.stdout == "False\n", done.stdout + done.stderr


def test_the_plan_knows_the_piece_in_which_the_loss_is_made():
    assert LOSS_PIECE == PIECE
