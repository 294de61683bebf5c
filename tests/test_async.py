"""--async-envs: environments in processes of their own train as they do in one."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, import_scripts, load, run_dir_of, scalars, train_in, wait_until

MODULES = import_scripts()
NAMES = ("ppo", "ppo_atari", "ppo_atari_lstm", "ppo_continuous_action")
LONG = ["--total-timesteps", 12_345_678, "--checkpoint-interval", 1_000_000, "--async-envs"]

# Ends its episodes by time limits, and fails in its 300th step
BROKEN = """
import gymnasium as gym
import numpy as np


class Broken(gym.Env):
    observation_space = gym.spaces.Box(-1, 1, (3,))
    action_space = gym.spaces.Discrete(2)
    steps = 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.zeros(3, np.float32), {}

    def step(self, action):
        self.steps += 1
        if self.steps == 300:
            raise ValueError("an error of my own")
        return np.zeros(3, np.float32), 1.0, False, self.steps % 20 == 0, {}


gym.register("Broken-v0", Broken)
"""


def processes(folder: Path) -> list[int]:
    """IDs of the processes that run in a folder."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            is_there = (process / "cwd").resolve() == folder.resolve()
            if is_there and (process / "cmdline").read_text():  # a zombie has none
                found.append(int(process.name))
        except OSError:  # it has ended meanwhile
            pass
    return found


def start(folder: Path, *words: object) -> subprocess.Popen:
    """Starts ppo.py in a session of its own, as a terminal does, and waits until it trains."""
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "ppo.py"), *map(str, LONG), *map(str, words)],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    wait_until(lambda: list(folder.glob("runs/*/checkpoint.pt")) or process.poll() is not None)
    time.sleep(1)
    assert len(processes(folder)) == 5  # the training's, and four environments'
    return process


@pytest.mark.parametrize("name", NAMES)
def test_the_same_weights_and_returns(name, tmp_path):
    """Fails when a seed, a final observation or an episode's end differs, or a return is lost."""
    script = MODULES[name]
    sizes = dict(num_envs=2, num_steps=64, num_minibatches=2, update_epochs=1, cuda=False)
    more = {"total_timesteps": 1024 if name == "ppo" else 256, "bootstrap_truncated": True}
    runs = []
    for async_envs in (False, True):
        folder = tmp_path / str(async_envs)
        runs.append(train_in(script, folder, **sizes, **more, async_envs=async_envs))

    ours, theirs = (load(run_dir) for run_dir in runs)
    for key, weights in ours["agent"].items():
        assert torch.equal(weights, theirs["agent"][key]), key
    assert ours["recent_returns"] == theirs["recent_returns"]
    assert ours.get("envs") == theirs.get("envs")
    if name == "ppo":
        assert ours["recent_returns"]
        first, second = (scalars(run_dir, "charts/episodic_return") for run_dir in runs)
        assert first == second


def send_to_group(process: subprocess.Popen, folder: Path) -> None:
    """Ctrl-C at a terminal, which reaches the environments' processes as well."""
    os.killpg(process.pid, signal.SIGINT)


def send_to_all(process: subprocess.Popen, folder: Path) -> None:
    """Slurm's SIGTERM, which reaches every process of a job."""
    for pid in sorted(processes(folder), reverse=True):  # the environments' first
        os.kill(pid, signal.SIGTERM)


@pytest.mark.parametrize(("send", "code"), [(send_to_group, 130), (send_to_all, 143)])
def test_a_signal_to_all_processes_saves(tmp_path, send, code):
    """Fails when an environment's process dies of it first, and takes the training along."""
    process = start(tmp_path)
    send(process, tmp_path)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == code and "Traceback" not in stderr, stderr
    assert "to go on: " in stdout
    assert load(run_dir_of(tmp_path))["iteration"] >= 1
    wait_until(lambda: not processes(tmp_path), 10)


def test_environments_end_with_a_killed_training(tmp_path):
    """Fails when kill -9 leaves processes behind, which nobody would ever end."""
    process = start(tmp_path)
    process.kill()
    process.communicate(timeout=60)
    wait_until(lambda: not processes(tmp_path), 10)


def test_an_error_in_an_environment_ends_all(tmp_path):
    """Fails when its traceback is lost, or the program waits for the other environments."""
    (tmp_path / "broken.py").write_text(BROKEN)
    words = ["--env-id", "broken:Broken-v0", "--num-steps", 16]
    process = subprocess.run(
        [sys.executable, str(ROOT / "ppo.py"), *map(str, LONG), *map(str, words)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
    )
    assert process.returncode == 1
    assert "broken.py" in process.stderr and "ValueError: an error of my own" in process.stderr
    assert "last good state: " in process.stderr
    wait_until(lambda: not processes(tmp_path), 10)


def test_films_of_an_environment_in_a_process(tmp_path):
    """Fails when --capture-video films nothing, or a spare environment's film as well."""
    sizes = dict(num_envs=2, num_steps=64, num_minibatches=1, update_epochs=1)
    more = dict(total_timesteps=256, capture_video=True, async_envs=True)
    run_dir = train_in(MODULES["ppo"], tmp_path, **sizes, **more)
    films = {path.name for path in run_dir.rglob("*.mp4")}
    assert {"rl-video-episode-0.mp4", "rl-video-episode-1.mp4"} <= films
