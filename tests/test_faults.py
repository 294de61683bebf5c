"""What goes wrong ends in one clear line, and nothing that was there is lost."""

import copy
import itertools
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import ROOT, import_scripts, load, run, run_dir_of, start, wait_until
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

MODULES = import_scripts()
SCRIPTS = list(MODULES)
SMALL = dict(num_envs=2, num_steps=16, num_minibatches=1, update_epochs=1, total_timesteps=64)
SMALL_WORDS = ["--num-envs", 2, "--num-steps", 16, "--num-minibatches", 1, "--update-epochs", 1]


def wrong_checkpoints(checkpoint: dict) -> dict[str, dict]:
    """{what is wrong with it: a checkpoint that loads, and that nobody can go on with}."""
    wrong = {}
    for key in checkpoint.keys() - {"processes"}:  # which only says how it was trained
        wrong[f"without {key}"] = {k: v for k, v in checkpoint.items() if k != key}
    for value in (-1, "2", 1.5, None):
        wrong[f"iteration {value!r}"] = checkpoint | {"iteration": value}
    wrong["of an older format"] = checkpoint | {"format": 1}
    wrong["returns of text"] = checkpoint | {"recent_returns": ["many"]}
    wrong["no optimizer"] = checkpoint | {"optimizer": {}}
    wrong["no random state"] = checkpoint | {"torch_random": [1, 2, 3]}

    args = checkpoint["args"]
    wrong["an unknown argument"] = checkpoint | {"args": args | {"warmup": 3}}
    for name, value in (("num_envs", "two"), ("num_steps", 2.5), ("env_id", 7), ("gamma", None)):
        wrong[f"{name} {value!r}"] = checkpoint | {"args": args | {name: value}}
    wrong["gamma 2"] = checkpoint | {"args": args | {"gamma": 2.0}}
    if "distribution_mode" in args:
        wrong["no mode"] = checkpoint | {"args": args | {"distribution_mode": "text"}}

    other = copy.deepcopy(checkpoint)
    name = next(iter(other["agent"]))
    other["agent"][name] = torch.zeros(3, 3, 3)
    wrong["weights of another shape"] = other
    return wrong


@pytest.mark.parametrize("name", SCRIPTS)
def test_wrong_checkpoints_are_refused(name, tmp_path, monkeypatch, capsys):
    """Fails when one of them ends in a traceback, in several lines, or leaves anything behind."""
    script = MODULES[name]
    monkeypatch.chdir(tmp_path)
    script.main(script.Args(**SMALL, cuda=False))
    run_dir = run_dir_of(tmp_path)
    path = run_dir / "checkpoint.pt"
    whole = path.read_bytes()
    files = sorted(tmp_path.rglob("*"))

    # Made before an argument was, it is none of them
    checkpoint = load(run_dir)
    del checkpoint["args"]["target_kl"]
    torch.save(checkpoint, path)
    assert script.load_checkpoint(run_dir)["args"]["target_kl"] is None
    path.write_bytes(whole)

    wrong = wrong_checkpoints(load(run_dir))
    assert len(wrong) >= 24
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--resume", str(run_dir)])
    for what, checkpoint in wrong.items():
        torch.save(checkpoint, path)
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            script.main(script.parse_args())
        assert ended.value.code == 2, what
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1 and lines[0].startswith(f"{name}.py: "), (what, lines)
        assert sorted(tmp_path.rglob("*")) == files, what

    rng = random.Random(0)
    for _ in range(20):  # a bit that has flipped, a file that was cut off
        damaged = bytearray(whole)
        damaged[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
        if rng.random() < 0.5:
            damaged = damaged[: rng.randrange(len(whole))]
        path.write_bytes(damaged)
        try:
            checkpoint = script.load_checkpoint(run_dir)
        except SystemExit as refusal:
            assert refusal.code == 2
            continue
        path.write_bytes(whole)  # it hit what is no content, such as a time
        assert all(
            torch.equal(weight, checkpoint["agent"][key])
            for key, weight in load(run_dir)["agent"].items()
        )


def test_resume_of_nothing_and_of_more_than_is_wanted(tmp_path):
    """Fails when an unset variable starts a new run, or when fewer steps than done are accepted."""
    result = run("ppo.py", "--resume", "", cwd=tmp_path)
    assert result.returncode == 2 and len(result.stderr.splitlines()) == 1
    assert not list(tmp_path.iterdir())

    assert run("ppo.py", "--total-timesteps", 2048, cwd=tmp_path).returncode == 0
    run_dir = run_dir_of(tmp_path)
    before = (run_dir / "checkpoint.pt").read_bytes()
    result = run("ppo.py", "--resume", run_dir, "--total-timesteps", 1024, cwd=tmp_path)
    assert result.returncode == 2
    assert "2048 steps are done already" in result.stderr
    assert (run_dir / "checkpoint.pt").read_bytes() == before


def test_a_run_is_trained_by_one_process(tmp_path):
    """Fails without the lock, or when it outlives the process that held it."""
    args = ["--total-timesteps", 10_000_000, "--checkpoint-interval", 1]
    process = start("ppo.py", *args, cwd=tmp_path)
    wait_until(lambda: list(tmp_path.glob("runs/*/checkpoint.pt")) or process.poll() is not None)
    run_dir = run_dir_of(tmp_path)
    second = run("ppo.py", "--resume", run_dir, cwd=tmp_path)
    assert second.returncode == 2
    assert second.stderr == f"ppo.py: {run_dir}: another process is training this run\n"
    assert process.poll() is None
    process.kill()
    process.communicate()

    steps = 512 * (load(run_dir)["iteration"] + 1)
    third = run("ppo.py", "--resume", run_dir, "--total-timesteps", steps, cwd=tmp_path)
    assert third.returncode == 0, third.stderr


def test_two_runs_that_begin_in_one_second(ppo, tmp_path, monkeypatch):
    """Fails when the second is refused, or writes into the first one's folder."""
    clock = itertools.count()
    monkeypatch.setattr(time, "time", lambda: 1_790_000_000 + next(clock) / 1e6)
    ppo.main(ppo.Args(**SMALL, gamma=0.9))
    ppo.main(ppo.Args(**SMALL, gamma=0.8))
    runs = sorted((tmp_path / "runs").iterdir())
    assert [load(run_dir)["args"]["gamma"] for run_dir in runs] == [0.9, 0.8]


def test_second_ctrl_c_ends_at_once(tmp_path):
    """Fails when a long rollout keeps the program from ending."""
    sizes = ["--num-steps", 10_000_000, "--total-timesteps", 40_000_000]
    process = start("ppo.py", *sizes, cwd=tmp_path)
    wait_until(lambda: list(tmp_path.glob("runs/*/checkpoint.pt")) or process.poll() is not None)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=5)
    assert process.returncode == 130
    assert load(run_dir_of(tmp_path))["iteration"] == 0


def test_a_checkpoint_that_cannot_be_written(tmp_path):
    """Fails when a full disk ends in a traceback, or costs the checkpoint that was there."""
    assert run("ppo.py", "--total-timesteps", 1024, cwd=tmp_path).returncode == 0
    run_dir = run_dir_of(tmp_path)
    before = (run_dir / "checkpoint.pt").read_bytes()
    limit = len(before) // 2

    def limit_files():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    args = ["--resume", run_dir, "--total-timesteps", 2048]
    process = start("ppo.py", *args, cwd=tmp_path, preexec_fn=limit_files)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 1
    (line,) = stderr.splitlines()
    assert "cannot write" in line and "last good state" in line
    assert (run_dir / "checkpoint.pt").read_bytes() == before


class Overflow(gym.Env):
    """Rewards so large that their squares are infinite."""

    observation_space = gym.spaces.Box(-1, 1, (3,))
    action_space = gym.spaces.Box(-1, 1, (1,))

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        return np.zeros(3, np.float32), {}

    def step(self, action):
        return np.zeros(3, np.float32), 1e200, False, False, {}


def test_statistics_that_overflow(tmp_path, monkeypatch, capsys):
    """Fails when a run ends well with infinite statistics in its checkpoint."""
    script = MODULES["ppo_continuous_action"]
    monkeypatch.chdir(tmp_path)
    spec = gym.envs.registration.EnvSpec("Overflow-v0", Overflow)
    monkeypatch.setitem(gym.registry, "Overflow-v0", spec)
    with pytest.raises(SystemExit) as ended, np.errstate(all="ignore"):
        script.main(script.Args(**SMALL, env_id="Overflow-v0"))
    assert "NaN or infinite" in str(ended.value.code)
    saved = load(run_dir_of(tmp_path))
    assert saved["iteration"] == 0
    assert np.isfinite(saved["envs"]["return"]["var"])


@pytest.mark.parametrize("env_id", [":CartPole-v1", "a:b:c", ".x:CartPole-v1", ""])
def test_odd_names(tmp_path, env_id):
    """Fails when an environment's name ends in a traceback."""
    result = run("ppo.py", "--env-id", env_id, cwd=tmp_path)
    assert result.returncode == 2, result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def stop_at_random(name: str, signum: int, seconds: float, folder: Path) -> None:
    """Starts a script, sends it a signal after that time of training, and checks what it says."""
    folder.mkdir()
    args = [*SMALL_WORDS, "--total-timesteps", 1_000_000, "--checkpoint-interval", 1_000_000]
    process = start(f"{name}.py", *args, cwd=folder)
    wait_until(lambda: list(folder.glob("runs/*/checkpoint.pt")) or process.poll() is not None)
    time.sleep(seconds)
    process.send_signal(signum)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 128 + signum, stderr
    assert "Exception" not in stderr and "Traceback" not in stderr
    run_dir = run_dir_of(folder)
    assert f"--resume runs/{run_dir.name}" in stdout
    assert load(run_dir)["iteration"] >= 1


@pytest.mark.parametrize("name", ["ppo_multidiscrete", "ppo_multidiscrete_mask"])
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_java_leaves_the_signals_alone(name, signum, tmp_path):
    """Fails when Java begins to shut down at a signal, and a step in flight raises."""
    stop_at_random(name, signum, 1.0, tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("name", SCRIPTS)
def test_stops_at_random_moments(name, tmp_path):
    """Fails when a stop at some moment is not saved: 20 in the scripts with Java, 6 in others."""
    rng = random.Random(name)
    for i in range(20 if "multidiscrete" in name else 6):
        signum = rng.choice([signal.SIGTERM, signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
        stop_at_random(name, signum, rng.random(), tmp_path / str(i))


@pytest.mark.parametrize(
    "redirection", [">&-", "2>&-", ">&- 2>&-", ">/dev/full", "2>/dev/full", "2>&1 | head -n 0"]
)
def test_output_that_nobody_can_read(redirection, tmp_path):
    """Fails when a training ends, or ends badly, because a line could not be printed."""
    (tmp_path / "train.py").write_text(
        f"import itertools, sys, types\nsys.path.insert(0, {str(ROOT)!r})\nimport ppo\n"
        "clock = itertools.count(1_790_000_000, 10)  # so that each iteration prints its line\n"
        "ppo.time = types.SimpleNamespace(time=lambda: next(clock))\n"
        "ppo.main(ppo.Args(total_timesteps=2048))\n"
    )
    command = f"{sys.executable} train.py {redirection}"
    shell = ["bash", "-o", "pipefail", "-c", command]
    result = subprocess.run(shell, cwd=tmp_path, capture_output=True, text=True, timeout=100)
    assert result.returncode == 0, result.stderr
    assert "Error" not in result.stderr
    assert load(run_dir_of(tmp_path))["iteration"] == 4


def test_a_folder_that_is_gone(tmp_path):
    """Fails when it ends in TensorBoard's tracebacks."""
    process = start("ppo.py", "--total-timesteps", 100_000_000, cwd=tmp_path)
    wait_until(lambda: list(tmp_path.glob("runs/*/checkpoint.pt")) or process.poll() is not None)
    time.sleep(1)
    # Moved, since the run could put a file into a folder while its content is being deleted
    (tmp_path / "runs").rename(tmp_path / "elsewhere")
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 1
    lines = [line for line in stderr.splitlines() if "steps/s" not in line]
    assert len(lines) == 1 and "cannot write" in lines[0] and "it is gone" in lines[0], lines


def test_an_error_of_the_environment_says_where_the_run_is(ppo, monkeypatch):
    """Fails when the traceback is lost, or the place of the last checkpoint is not told."""
    monkeypatch.setattr(ppo, "find_episodes", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError) as raised:
        ppo.main(ppo.Args(total_timesteps=2048))
    (run_dir,) = Path("runs").iterdir()
    assert raised.value.__notes__ == [f"last good state: {run_dir}"]


def test_sizes_that_need_too_much_memory(tmp_path):
    """Fails when it ends in an allocator's traceback, or leaves a folder."""
    sizes = ["--num-steps", 100_000_000_000, "--total-timesteps", 900_000_000_000]
    result = run("ppo.py", *sizes, cwd=tmp_path)
    assert result.returncode == 2, result.stderr
    assert len(result.stderr.splitlines()) == 1, result.stderr
    assert "--num-steps 100000000000: there is not enough memory" in result.stderr
    assert not list((tmp_path / "runs").iterdir())


def test_a_slow_disk_and_a_run_that_fails_at_once(tmp_path):
    """Fails when TensorBoard's thread still writes into the folder that was taken away."""
    (tmp_path / "train.py").write_text(
        f"import sys, time\nsys.path.insert(0, {str(ROOT)!r})\nimport ppo\n"
        "from tensorboard.compat.tensorflow_stub.io.gfile import GFile\n"
        "write = GFile.write\n"
        "GFile.write = lambda *args: (time.sleep(0.02), write(*args))\n"
        "try:\n"
        "    ppo.main(ppo.Args(num_steps=10**11, total_timesteps=9 * 10**11))\n"
        "finally:\n"
        "    time.sleep(0.5)\n"
    )
    command = [sys.executable, "train.py"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=100)
    assert (result.returncode, len(result.stderr.splitlines())) == (2, 1), result.stderr
    assert not list((tmp_path / "runs").iterdir())


@pytest.mark.parametrize("wandb_mode", ["nonsense", "online"])
def test_tracking_that_cannot_start(wandb_mode, tmp_path):
    """Fails when W&B's errors end in a traceback, or leave the folder of a run."""
    environment = {"WANDB_MODE": wandb_mode, "WANDB_API_KEY": "too-short", "HOME": str(tmp_path)}
    result = run("ppo.py", "--track", cwd=tmp_path, **environment)
    assert result.returncode == 2, result.stderr
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("ppo.py: ")]
    assert line.startswith("ppo.py: --track: W&B says: ")
    assert "Traceback" not in result.stderr
    assert not list((tmp_path / "runs").iterdir())


def test_names_that_another_script_learns(tmp_path):
    """Fails when ppo.py does not lead to ppo_atari.py, or a version is chosen without a word."""
    result = run("ppo.py", "--env-id", "BreakoutNoFrameskip-v4", cwd=tmp_path)
    assert (result.returncode, len(result.stderr.splitlines())) == (2, 1)
    assert "ppo_atari.py" in result.stderr
    result = run("ppo.py", "--env-id", "CartPole", "--total-timesteps", 512, cwd=tmp_path)
    assert result.returncode == 0 and "CartPole-v1" in result.stderr


class Invisible(Overflow):
    """An environment that cannot be rendered."""

    metadata = {"render_modes": ["rgb_array"]}

    def __init__(self, render_mode=None):
        self.render_mode = render_mode

    def render(self):
        raise AttributeError("no OpenGL")


@pytest.mark.parametrize("environment", [Invisible, Overflow])
def test_what_cannot_be_filmed(environment, tmp_path, monkeypatch, capsys):
    """Fails when a missing EGL or render_mode shows in the middle of a training, as a traceback."""
    script = MODULES["ppo_continuous_action"]
    monkeypatch.chdir(tmp_path)
    spec = gym.envs.registration.EnvSpec("Dark-v0", environment)
    monkeypatch.setitem(gym.registry, "Dark-v0", spec)
    with pytest.raises(SystemExit) as ended:
        script.main(script.Args(**SMALL, env_id="Dark-v0", capture_video=True))
    assert ended.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "ppo_con" in line]
    assert len(lines) == 1 and "Dark-v0" in lines[0]
    assert not list((tmp_path / "runs").iterdir())


def test_compiling_without_a_compiler(tmp_path):
    """Fails when it ends in a long traceback at the first gradient."""
    result = run("ppo.py", "--compile", cwd=tmp_path, CXX="no-such-compiler")
    assert result.returncode == 2
    assert len(result.stderr.splitlines()) == 1 and "compiler" in result.stderr


def test_threads_and_arguments_are_logged(ppo):
    """Fails when a run does not tell its number of threads, or has no HPARAMS."""
    ppo.main(ppo.Args(total_timesteps=512))
    (run_dir,) = Path("runs").iterdir()
    events = EventAccumulator(str(run_dir)).Reload()
    tags = events.Tags()["tensors"]
    text = events.Tensors(tags[0])[0].tensor_proto.string_val[0].decode()
    assert "- threads: 1\n- processes: 1\n" in text and "- learning_rate: 0.00025\n" in text
    assert b"hparams" in next(run_dir.glob("events*")).read_bytes()


def test_a_finished_run_stays_as_it_is(ppo):
    """Fails when going on with a finished run adds a file to it."""
    score = ppo.main(ppo.Args(total_timesteps=512))
    (run_dir,) = Path("runs").iterdir()
    files = {path: path.read_bytes() for path in run_dir.iterdir()}
    assert ppo.main(ppo.Args(total_timesteps=512, resume=str(run_dir))) == score
    assert {path: path.read_bytes() for path in run_dir.iterdir()} == files
