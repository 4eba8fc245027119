"""Running datatrove, which has a virtual environment of its own.

reads   tests/bench/datatrove.txt   its requirements
writes  runs/bench/peer-datatrove   the environment, unless HEADWATER_PEER_PYTHON names the Python of one
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

PEER_PYTHON = "HEADWATER_PEER_PYTHON"
REQUIREMENTS = Path(__file__).with_name("datatrove.txt")
JOBS = Path(__file__).with_name("datatrove_jobs.py")
# One thread in each of its two worker processes; nothing may be fetched.
ENVIRONMENT = {"RAYON_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}


def run(job: str, **settings: Any) -> dict[str, Any]:
    """What the job says: its `seconds`, without the imports, and what it made. Raises Invalid if it fails."""
    process = subprocess.run(
        [str(python()), str(JOBS), job, json.dumps(settings, default=str)],
        env=_environment(),
        capture_output=True,
        text=True,
    )
    if process.returncode:
        raise Invalid(f"datatrove's {job} failed:\n{process.stderr[-2000:]}")
    return json.loads(process.stdout.splitlines()[-1])


def python() -> Path:
    """The Python that has datatrove; its environment is made first where there is none."""
    if named := os.environ.get(PEER_PYTHON):
        return Path(named)
    folder = FOLDER / "peer-datatrove"
    stamp = folder / hashlib.sha256(REQUIREMENTS.read_bytes()).hexdigest()[:16]
    if not stamp.exists():
        print(f"making {folder}, once", flush=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
        subprocess.run([str(folder / "bin/python"), "-m", "pip", "install", "-q", "-r", str(REQUIREMENTS)], check=True)
        stamp.touch()
    return folder / "bin/python"


def _environment() -> dict[str, str]:
    """Ours without what is meant for our own Python."""
    left_out = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "TOKENIZERS_PARALLELISM")
    return {**{key: value for key, value in os.environ.items() if key not in left_out}, **ENVIRONMENT}
