"""What the programs of this folder share."""

import importlib
import importlib.util
import os
import platform
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import NoReturn

import pandas as pd
import torch

ROOT = Path(__file__).resolve().parent.parent

SCRIPTS = (
    "ppo",
    "ppo_atari",
    "ppo_atari_envpool",
    "ppo_atari_lstm",
    "ppo_continuous_action",
    "ppo_multidiscrete",
    "ppo_multidiscrete_mask",
    "ppo_procgen",
)

# Arguments of a script that change nothing of what is trained, only how the run is kept
KEEPING = (
    "resume",
    "track",
    "wandb_project_name",
    "wandb_entity",
    "capture_video",
    "checkpoint_interval",
)


def refuse(problem: str) -> NoReturn:
    """Ends the program over something its user can mend: one line on stderr, exit code 2."""
    print(f"{Path(sys.argv[0]).name}: {' '.join(problem.split())}", file=sys.stderr)
    raise SystemExit(2)


def check_writable(path: Path, option: str) -> None:
    """Refuses a file that cannot be written, before anything is computed for it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        is_new = not path.exists()
        path.open("a").close()
        if is_new:
            path.unlink()
    except OSError as error:
        refuse(f"{option} {path}: cannot be written, {error.strerror}")


def check_save(save: Path) -> None:
    """Refuses a beginning of files' names under which nothing can be written."""
    if save == Path(""):
        refuse("--save: say where to write, as in --save benchmark/results/ppo")
    check_writable(Path(f"{save}.md"), "--save")


def read_checkpoint(run_dir: Path) -> dict:
    """-> the last checkpoint of a run, on the CPU. Raises ValueError if there is none.

    It is data alone: no checkpoint makes Python run or import anything.
    """
    try:
        path = run_dir / "checkpoint.pt"
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        checkpoint["script"], checkpoint["args"], checkpoint["iteration"]
    except Exception as error:  # torch.load raises many kinds
        raise ValueError(f"no run, {type(error).__name__}: {str(error)[:99]}") from None
    return checkpoint


def find_script(name: str, given: Iterable[Path] = ()) -> Path:
    """-> the file that made a run, by the name in its checkpoint. Raises ValueError.

    A file comes into question if its path is given, or if it is one of the eight scripts. So no
    checkpoint can name another module that is then imported.
    """
    for path in given:
        if path.stem == name:
            return path
    if name in SCRIPTS:
        return ROOT / f"{name}.py"
    raise ValueError(
        f"made by {name}.py, which is none of the eight scripts; say where it is, as in "
        f"--script path/to/{name}.py"
    )


def load_script(path: str | Path) -> ModuleType:
    """-> the module of a script, one of the eight or a copy. Raises ValueError if it is none."""
    whole_path = Path(path).resolve()
    if whole_path.parent == ROOT and whole_path.stem in SCRIPTS:
        sys.path.insert(0, str(ROOT))
        return importlib.import_module(whole_path.stem)

    # Under its whole path, which is no other module's name. A copy may be called random.py.
    name = str(whole_path)
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, whole_path)
    if spec is None:
        raise ValueError(f"{path} is no Python file")
    script = importlib.util.module_from_spec(spec)
    sys.modules[name] = script
    try:
        spec.loader.exec_module(script)
    except OSError as error:
        del sys.modules[name]
        raise ValueError(f"cannot read {path}, {error.strerror}") from None
    except Exception as error:  # it is somebody's own file
        del sys.modules[name]
        reason = f"{type(error).__name__}: {str(error)[:99]}"
        raise ValueError(f"cannot import {path}, {reason}") from None

    for needed in ("Args", "Agent", "make_envs", "load_checkpoint"):
        if needed not in vars(script):
            raise ValueError(f"{path} has no {needed}, which a script of this kind has")
    return script


def count_steps(checkpoint: dict) -> int:
    """-> the environment steps that the run has trained."""
    args = checkpoint["args"]
    return checkpoint["iteration"] * args["num_envs"] * args["num_steps"]


def read_evaluation(run_dir: Path, trained_steps: int) -> pd.Series | None:
    """-> the last line of evaluation.csv whose actions were sampled, from the agent of that step.

    So what a run was worth before it was trained further, or greedily, is not taken for its result.
    """
    path = run_dir / "evaluation.csv"
    if not path.is_file():
        return None
    lines = pd.read_csv(path)
    lines = lines[(lines.trained_steps == trained_steps) & ~lines.greedy]
    return None if lines.empty else lines.iloc[-1]


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
