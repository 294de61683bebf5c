"""Shared by all tests.

The scripts are imported from, and run in, the repository's root or a temporary folder.
"""

import contextlib
import functools
import importlib
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmark")]

os.environ.setdefault("WANDB_MODE", "disabled")
torch.set_num_threads(1)


@functools.cache
def import_scripts() -> dict[str, ModuleType]:
    """{name: module} of all eight; ppo_procgen before all, because it finds EnvPool a Qt 5."""
    names = ["ppo_procgen", *sorted(path.stem for path in ROOT.glob("ppo*.py"))]
    return {name: importlib.import_module(name) for name in names}


def start(
    script: str, *args: object, cwd: Path, preexec_fn=None, **environment: str
) -> subprocess.Popen:
    """Starts `python SCRIPT ARGS` in the folder cwd, with its output captured as text."""
    return subprocess.Popen(
        [sys.executable, str(ROOT / script), *map(str, args)],
        cwd=cwd,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=preexec_fn,
    )


def run(script: str, *args: object, cwd: Path, **environment: str) -> subprocess.CompletedProcess:
    """Runs `python SCRIPT ARGS` in the folder cwd to its end."""
    process = start(script, *args, cwd=cwd, **environment)
    stdout, stderr = process.communicate(timeout=100)
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)


def interrupted(name: str, folder: Path) -> Path:
    """Runs that script in that folder, filming, stops it by Ctrl-C when it trains -> its run."""
    args = [
        "--num-envs",
        2,
        "--num-steps",
        32,
        "--num-minibatches",
        2,
        "--update-epochs",
        1,
        "--capture-video",
    ]
    process = start(f"{name}.py", *args, "--checkpoint-interval", 1_000_000, cwd=folder)
    wait_for_checkpoint(process, folder)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert "Traceback" not in stderr
    run_dir = run_dir_of(folder)
    assert f"--resume runs/{run_dir.name}" in stdout
    assert load(run_dir)["iteration"] >= 1
    return run_dir


def train_in(script, folder: Path, **args) -> Path:
    """Runs main in that folder -> folder of the only run there."""
    folder.mkdir(exist_ok=True)
    with contextlib.chdir(folder):
        script.main(script.Args(**args))
    return run_dir_of(folder)


def record(script, folder: Path, **sizes) -> tuple[dict, list, list]:
    """Trains an iteration -> weights before it, its minibatches, the spaces of the agent."""
    weights, minibatches, spaces = {}, [], []
    init, step = script.Agent.__init__, script.train_step

    def make_agent(agent, *given):
        spaces[:] = given
        init(agent, *given)

    def train_step(agent, optimizer, mb, args):
        if not weights:
            weights.update({name: x.clone() for name, x in agent.state_dict().items()})
        minibatches.append(mb)
        return step(agent, optimizer, mb, args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script.Agent, "__init__", make_agent)
        patch.setattr(script, "train_step", train_step)
        batch = sizes["num_envs"] * sizes["num_steps"]
        train_in(script, folder, **sizes | {"total_timesteps": batch}, cuda=False)
    return weights, minibatches, spaces


def run_dir_of(cwd: Path) -> Path:
    """The only run in cwd/runs."""
    (run_dir,) = (cwd / "runs").iterdir()
    return run_dir


def wait_until(condition, seconds: float = 60):
    """Polls until condition() is true and returns its value; fails after that many seconds."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if value := condition():
            return value
        time.sleep(0.01)
    pytest.fail(f"nothing after {seconds} seconds")


def wait_for_checkpoint(process: subprocess.Popen, cwd: Path) -> None:
    """Waits until a run in cwd has its first checkpoint, or its process has ended without one."""
    wait_until(lambda: list(cwd.glob("runs/*/checkpoint.pt")) or process.poll() is not None)


def load(run_dir: Path) -> dict:
    """The checkpoint of a run."""
    return torch.load(run_dir / "checkpoint.pt", weights_only=True)


def scalars(run_dir: Path, name: str) -> list[tuple[int, float]]:
    """(step, value) of every TensorBoard event of that name, purged events left out."""
    events = EventAccumulator(str(run_dir), size_guidance={"scalars": 0}).Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


@pytest.fixture
def ppo(tmp_path, monkeypatch):
    """The module ppo, in an empty folder of its own, so that its runs/ stays there."""
    import ppo

    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    return ppo


@pytest.fixture(scope="session")
def evaluate():
    """benchmark/evaluate.py's function -> evaluate(run_dir, **arguments): a return per episode."""
    import evaluate

    return lambda run_dir, **args: evaluate.evaluate(evaluate.Args(run_dir, **args))


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """A folder with stand-ins for Slurm's commands on the path; `sbatch` keeps what it is given."""
    programs = {
        "srun": "",
        "sbatch": 'cp "$1" submitted.sh; echo Submitted batch job 4711',
        "scontrol": "echo $* > asked",
        "squeue": "cat queue 2> /dev/null || true",
        "sinfo": "echo 2; echo 4",
    }
    for name, body in programs.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    return tmp_path


def find_slurm_job(folder: Path, task: int) -> tuple[list[str], dict]:
    """-> the command of that job of the array that was submitted, and subprocess's options with
    which it runs as on a node."""
    submitted = (folder / "submitted.sh").read_text()
    words = re.search(r"(\S+ -u -m submitit\S+ \S+)$", submitted).group().split()
    environment = os.environ | {
        "SUBMITIT_EXECUTOR": "slurm",
        "SLURM_JOB_ID": "4711",
        "SLURM_ARRAY_JOB_ID": "4711",
        "SLURM_ARRAY_TASK_ID": str(task),
        "SLURM_PROCID": "0",
        "SLURM_LOCALID": "0",
        "SLURM_NODEID": "0",
    }
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    return words, {"cwd": folder, "env": environment, **quiet}
