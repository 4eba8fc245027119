"""Peers that have a virtual environment of their own: datatrove, transformers' Trainer and service, llama.cpp.

reads   tests/bench/PEER.txt     its requirements
writes  runs/bench/peer-PEER     the environment, unless a variable of PYTHONS names the Python of one
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.bench.measure import FOLDER, Invalid

PYTHONS = {
    "datatrove": "HEADWATER_PEER_PYTHON",
    "hf_trainer": "HEADWATER_TRAINER_PYTHON",
    "transformers_serve": "HEADWATER_TRANSFORMERS_SERVE_PYTHON",
    "llama_cpp": "HEADWATER_LLAMA_CPP_PYTHON",
}
JOBS = Path(__file__).with_name("datatrove_jobs.py")
# One thread in each of its two worker processes; nothing may be fetched.
ENVIRONMENT = {"RAYON_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}


def run(job: str, **settings: Any) -> dict[str, Any]:
    """What a job of datatrove says: `seconds`, without the imports, and what it made. Raises Invalid if it fails."""
    process = subprocess.run(
        [str(python("datatrove")), str(JOBS), job, json.dumps(settings, default=str)],
        env=environment() | ENVIRONMENT,
        capture_output=True,
        text=True,
    )
    if process.returncode:
        raise Invalid(f"datatrove's {job} failed:\n{process.stderr[-2000:]}")
    return json.loads(process.stdout.splitlines()[-1])


def python(peer: str) -> Path:
    """The Python that has the peer; its environment is made first where there is none."""
    if named := os.environ.get(PYTHONS[peer]):
        return Path(named)
    folder = FOLDER / f"peer-{peer}"
    stamp = folder / hashlib.sha256(requirements(peer).read_bytes()).hexdigest()[:16]
    if not stamp.exists():
        print(f"making {folder}, once", flush=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
        install = ["-m", "pip", "install", "-q", "-r", str(requirements(peer))]
        if subprocess.run([str(folder / "bin/python"), *install]).returncode:
            raise Invalid(f"what {requirements(peer).name} asks for could not be installed into {folder}")
        stamp.touch()
    return folder / "bin/python"


def requirements(peer: str) -> Path:
    """The file of what is installed for the peer, every package pinned."""
    return Path(__file__).with_name(f"{peer}.txt")


def environment() -> dict[str, str]:
    """Ours without what is meant for our own Python."""
    left_out = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "TOKENIZERS_PARALLELISM")
    return {key: value for key, value in os.environ.items() if key not in left_out}
