"""A run survives kill -9, stops cleanly on SIGINT and SIGTERM, and goes on bit for bit."""

import contextlib
import os
import pty
import random
import shlex
import shutil
import signal
import subprocess
import sys
import termios
import time

import numpy as np
import pytest
import torch
from conftest import ROOT, load, run, run_dir_of, scalars, start, wait_for_checkpoint, wait_until

BATCH = 512  # ppo.py's default


def equal(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def started(cwd, *args):
    """A long run in cwd that has completed an iteration -> process, its folder."""
    process = start(
        "ppo.py", "--total-timesteps", 10_000_000, "--checkpoint-interval", 1, *args, cwd=cwd
    )
    wait_for_checkpoint(process, cwd)
    run_dir = run_dir_of(cwd)
    wait_until(lambda: load(run_dir)["iteration"] >= 1)
    return process, run_dir


@pytest.mark.parametrize("attempt", range(10))
def test_kill_leaves_a_whole_checkpoint(tmp_path, attempt):
    """Fails without purge_step, and now and then when the checkpoint is written in place."""
    process, run_dir = started(tmp_path)
    time.sleep(random.random())
    process.kill()
    process.communicate()
    iteration = load(run_dir)["iteration"]
    logged = [step for step, _ in scalars(run_dir, "losses/value_loss")]
    assert logged[:iteration] == [BATCH * (i + 1) for i in range(iteration)]

    result = run(
        "ppo.py", "--resume", run_dir, "--total-timesteps", BATCH * (iteration + 2), cwd=tmp_path
    )
    assert result.returncode == 0, result.stderr
    assert run_dir_of(tmp_path) == run_dir
    assert load(run_dir)["iteration"] == iteration + 2
    logged = [step for step, _ in scalars(run_dir, "losses/value_loss")]
    assert logged == [BATCH * (i + 1) for i in range(iteration + 2)]


def test_events_are_flushed_before_each_checkpoint(ppo, monkeypatch):
    """Fails without writer.flush(), or when it comes after the save."""
    calls = []
    flush, save = ppo.SummaryWriter.flush, ppo.save_checkpoint
    monkeypatch.setattr(
        ppo.SummaryWriter, "flush", lambda writer: (calls.append("flush"), flush(writer))
    )
    monkeypatch.setattr(ppo, "save_checkpoint", lambda *args: (calls.append("save"), save(*args)))
    ppo.main(ppo.Args(total_timesteps=2 * BATCH, checkpoint_interval=1))
    assert calls[:6] == ["flush", "save"] * 3


def test_save_that_breaks_off_leaves_the_last_checkpoint(ppo, tmp_path, monkeypatch):
    """Fails when the checkpoint is written in place."""
    ppo.main(ppo.Args(total_timesteps=BATCH))
    run_dir = run_dir_of(tmp_path)
    before = (run_dir / "checkpoint.pt").read_bytes()

    def break_off(checkpoint, file):
        file.write(before[:1000])
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", break_off)
    with pytest.raises(KeyboardInterrupt):
        ppo.main(
            ppo.Args(
                **load(run_dir)["args"] | {"resume": str(run_dir), "total_timesteps": 2 * BATCH}
            )
        )
    assert (run_dir / "checkpoint.pt").read_bytes() == before


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_finish_the_iteration_and_save(tmp_path, signum):
    """Fails without the handlers, without the save, or with another exit code."""
    process = start(
        "ppo.py", "--total-timesteps", 10_000_000, "--checkpoint-interval", 1_000_000, cwd=tmp_path
    )
    wait_for_checkpoint(process, tmp_path)
    run_dir = run_dir_of(tmp_path)
    time.sleep(0.5)  # some iterations that no checkpoint holds
    process.send_signal(signum)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 128 + signum
    assert "Traceback" not in stderr
    iteration = load(run_dir)["iteration"]
    assert iteration >= 1
    assert [step for step, _ in scalars(run_dir, "losses/value_loss")][-1] == BATCH * iteration
    (command,) = [
        line.removeprefix("to go on: python ") for line in stdout.splitlines() if "--resume" in line
    ]
    script, *args = shlex.split(command)
    assert os.path.samefile(tmp_path / script, ROOT / "ppo.py")
    result = run("ppo.py", *args, "--total-timesteps", BATCH * (iteration + 1), cwd=tmp_path)
    assert result.returncode == 0, result.stderr


def test_two_resumes_of_one_checkpoint_are_equal(ppo, tmp_path):
    """Fails when a random state, the optimizer or the seeds are not what the checkpoint says."""
    ppo.main(ppo.Args(total_timesteps=4 * BATCH))
    run_dir = run_dir_of(tmp_path)
    resumed = []
    for name in ("a", "b", "c"):
        shutil.copytree(run_dir, tmp_path / name)
        checkpoint = load(tmp_path / name)
        if name == "c":
            checkpoint["iteration"] = 0  # other seeds for the environments
            torch.save(checkpoint, tmp_path / name / "checkpoint.pt")
        torch.manual_seed(random.randrange(1000))  # main must not depend on what was before it
        np.random.seed(random.randrange(1000))
        ppo.main(
            ppo.Args(
                **checkpoint["args"]
                | {"resume": str(tmp_path / name), "total_timesteps": 8 * BATCH}
            )
        )
        resumed.append(load(tmp_path / name))
    a, b, c = resumed
    assert a["iteration"] == b["iteration"] == 8
    assert equal(a["agent"], b["agent"])
    assert a["recent_returns"] == b["recent_returns"]
    assert torch.equal(a["torch_random"], b["torch_random"])
    assert not equal(a["agent"], c["agent"])


def test_checkpoint_holds_and_restores_everything(ppo, tmp_path):
    """Fails when weights, moments of Adam, counts, returns or random states are not restored."""
    args = ppo.Args(total_timesteps=4 * BATCH, checkpoint_interval=3)
    ppo.main(args)
    run_dir = run_dir_of(tmp_path)
    checkpoint = load(run_dir)
    assert checkpoint["iteration"] == 4 and checkpoint["script"] == "ppo"
    assert ppo.Args(**checkpoint["args"]) == args
    assert len(checkpoint["optimizer"]["state"]) == 12
    assert all(state["step"] == 4 * 16 for state in checkpoint["optimizer"]["state"].values())
    assert (
        checkpoint["recent_returns"]
        == [value for _, value in scalars(run_dir, "charts/episodic_return")][-100:]
    )
    # resumed at its end, a run has nothing to do and saves what it restored
    mean = ppo.main(ppo.Args(**checkpoint["args"] | {"resume": str(run_dir)}))
    assert mean == pytest.approx(np.mean(checkpoint["recent_returns"]))
    again = load(run_dir)
    assert equal(checkpoint["agent"], again["agent"])
    assert checkpoint["python_random"] == again["python_random"]
    assert checkpoint["numpy_random"] == again["numpy_random"]
    assert torch.equal(checkpoint["torch_random"], again["torch_random"])
    for i, state in checkpoint["optimizer"]["state"].items():
        assert equal(state, again["optimizer"]["state"][i])


def test_resumed_run_keeps_its_arguments_except_those_given_anew(tmp_path):
    """Fails when the command line's defaults replace what the run was started with."""
    first = ["--total-timesteps", 1024, "--learning-rate", 0.001, "--no-anneal-lr"]
    assert run("ppo.py", *first, cwd=tmp_path).returncode == 0
    run_dir = run_dir_of(tmp_path)
    given = ["--resume", run_dir, "--total-timesteps", 2048, "--ent-coef", 0.02]
    assert run("ppo.py", *given, cwd=tmp_path).returncode == 0
    args = load(run_dir)["args"]
    assert (args["learning_rate"], args["anneal_lr"], args["ent_coef"]) == (0.001, False, 0.02)
    assert [value for _, value in scalars(run_dir, "charts/learning_rate")] == pytest.approx(
        [0.001] * 4
    )


def test_divergence_stops_the_run_and_keeps_the_last_good_checkpoint(tmp_path):
    """Fails without the check for finite loss and weights, or when it comes after the save."""
    result = run("ppo.py", "--learning-rate", 1e11, "--vf-coef", 1e8, "--total-timesteps", 51_200,
                 "--checkpoint-interval", 1, cwd=tmp_path)  # fmt: skip
    assert result.returncode == 1
    assert (
        "iteration" in result.stderr and "NaN" in result.stderr and "Traceback" not in result.stderr
    )
    assert all(weight.isfinite().all() for weight in load(run_dir_of(tmp_path))["agent"].values())


def test_same_seed_same_weights(ppo, tmp_path, monkeypatch):
    """Fails when anything random is not seeded, or when the seed is not used."""
    weights = []
    for name, seed in (("first", 1), ("second", 1), ("other", 2)):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        ppo.main(ppo.Args(total_timesteps=4096, seed=seed))
        weights.append(load(run_dir_of(tmp_path / name))["agent"])
    assert equal(weights[0], weights[1])
    assert not equal(weights[0], weights[2])


def test_output_on_a_terminal_and_elsewhere(tmp_path):
    """Fails without the progress bar on a terminal, or when it fills a log file."""
    elsewhere = run("ppo.py", "--total-timesteps", 2048, cwd=tmp_path)
    (summary,) = elsewhere.stdout.splitlines()
    assert summary.startswith(f"runs/{run_dir_of(tmp_path).name}: mean return ")
    assert "\r" not in elsewhere.stderr
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 120))
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "ppo.py"), "--total-timesteps", "20480"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=theirs,
    )
    os.close(theirs)
    shown = ""
    with contextlib.suppress(OSError):  # the terminal closes with the program
        while chunk := os.read(ours, 4096):
            shown += chunk.decode()
    assert process.wait() == 0
    for word in ("/20480", "steps/s", "<", "mean return"):  # steps, speed, time left, return
        assert word in shown
