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
    """Ends the program over something its user can mend: one line on stderr, exit code 2."""
    print(f"{Path(sys.argv[0]).name}: {' '.join(problem.split())}", file=sys.stderr)
    raise SystemExit(2)


def find_commit(before: str = "now") -> str:
    """-> the newest commit before that time, as git tells times; "" outside a repository.

    By its whole name: readers of CSVs take an abbreviation such as 2821e72 for a number.
    """
    command = ["git", "-C", str(ROOT), "log", "-1", "--format=%H", f"--before={before}"]
    result = subprocess.run(command, capture_output=True, text=True)
    return result.stdout.strip()


def describe_machine() -> str:
    """-> processor, number of its cores, GPU if any, versions of Python and PyTorch, in a line."""
    parts = [find_processor(), f"{os.cpu_count()} cores"]
    if torch.cuda.is_available():
        parts.append(torch.cuda.get_device_name())
    parts.append(f"Python {platform.python_version()}")
    parts.append(f"torch {torch.__version__}")
    return ", ".join(parts)


def find_processor() -> str:
    """-> the processor's name, as Linux tells it, elsewhere as Python does."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(": ")[1]
    return platform.processor()
