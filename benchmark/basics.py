"""What the programs of this folder share."""

import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

import torch

ROOT = Path(__file__).resolve().parent.parent


def refuse(problem: str) -> NoReturn:
    """Ends the program over something that its user can mend: one line on stderr, exit code 2 (raises SystemExit)."""
    print(f"{Path(sys.argv[0]).name}: {' '.join(problem.split())}", file=sys.stderr)
    raise SystemExit(2)


def commit(before: str = "now") -> str:
    """-> the newest commit before that time, "" outside a repository."""
    # The whole name: readers of CSVs take an abbreviation such as 2821e72 for a number.
    log = ["git", "-C", str(ROOT), "log", "-1", "--format=%H", f"--before={before}"]
    return subprocess.run(log, capture_output=True, text=True).stdout.strip()


def machine() -> str:
    """-> processor, how many cores it has, GPU if any, versions of Python and PyTorch, in one line."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(": ")[1] for line in lines if line.startswith("model name")] or [platform.processor()]
    gpu = f"{torch.cuda.get_device_name()}, " if torch.cuda.is_available() else ""
    return f"{names[0]}, {os.cpu_count()} cores, {gpu}Python {platform.python_version()}, torch {torch.__version__}"
