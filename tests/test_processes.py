"""Detail A2: several processes train as one. Real processes, started by torchrun, over gloo."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import import_scripts, load, record, run, run_dir_of, scalars, wait_until

ROOT = Path(__file__).resolve().parent.parent
MODULES = import_scripts()
SIZES = dict(num_envs=4, num_steps=16, num_minibatches=2, update_epochs=2, total_timesteps=256)
WORDS = ["--num-envs", 4, "--num-steps", 16, "--num-minibatches", 2, "--update-epochs", 2]

# Each process takes its share of recorded minibatches, then trains for some iterations.
WORKER = """
import contextlib
import sys
sys.path.insert(0, {tests!r})
import torch
from conftest import import_scripts

recorded = torch.load("recorded.pt", weights_only=False)
scripts = import_scripts()
results = {{}}


def take_share(mb, rank):
    if "lstm_state" not in mb:  # shares of different sizes
        third = len(mb["obs"]) // 3
        return {{key: x[:third] if rank == 0 else x[third:] for key, x in mb.items()}}
    num_envs = mb["lstm_state"].shape[1]  # [2, E, 128]; all else is [T * E, ...]
    share = {{}}
    for key, x in mb.items():
        if key == "lstm_state":
            share[key] = x[:, rank::2]
        else:
            share[key] = x.unflatten(0, (-1, num_envs))[:, rank::2].flatten(0, 1)
    return share


def work(name, script, args):
    weights, minibatches, spaces = recorded[name]
    agent = script.Agent(*spaces)
    agent.load_state_dict(weights)
    optimizer = torch.optim.Adam(agent.parameters(), lr=2.5e-4, eps=1e-5, fused=True)
    for mb in minibatches:
        stats = script.train_step(agent, optimizer, take_share(mb, script.get_rank()), args)

    step = script.train_step
    trained = []

    def train_step(agent, *rest):
        trained[:] = [agent]
        return step(agent, *rest)

    script.train_step = train_step
    script.join_processes = lambda args: contextlib.nullcontext()  # they have joined already
    score = script.main(args)
    return agent.state_dict(), stats, trained[0].state_dict(), score


with scripts["ppo"].join_processes(scripts["ppo"].Args(cuda=False)):
    for name, script in scripts.items():
        # The KL limit is so low that each update ends early
        args = script.Args(**{sizes!r}, cuda=False, target_kl=1e-9)
        results[name] = work(name, script, args)
    torch.save(results, f"results{{scripts['ppo'].get_rank()}}.pt")
"""


def torchrun(*words: object, cwd: Path) -> subprocess.Popen:
    """Starts two processes that know of each other."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    return subprocess.Popen(
        [*command, *map(str, words)],
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """-> what was recorded, and what the two processes made of it."""
    folder = tmp_path_factory.mktemp("processes")
    recorded = {}
    for name, script in MODULES.items():
        weights, minibatches, spaces = record(script, folder / name, **SIZES)
        # Max-pooling amplifies the last bits from one step to the next
        num_steps = 1 if name == "ppo_procgen" else 3
        recorded[name] = weights, minibatches[:num_steps], spaces
    torch.save(recorded, folder / "recorded.pt")
    (folder / "worker.py").write_text(WORKER.format(tests=str(ROOT / "tests"), sizes=SIZES))
    process = torchrun("worker.py", cwd=folder)
    try:
        _, stderr = process.communicate(timeout=200)
    finally:
        process.kill()
    assert process.returncode == 0, stderr[-3000:]
    results = [torch.load(folder / f"results{rank}.pt", weights_only=False) for rank in (0, 1)]
    return recorded, results, sorted((folder / "runs").iterdir())


@pytest.mark.parametrize("name", MODULES)
def test_two_processes_update_as_one(name, trained):
    """Fails when a gradient is averaged without its weight, clipped before, or advantages apart."""
    script = MODULES[name]
    weights, minibatches, spaces = trained[0][name]
    agent = script.Agent(*spaces)
    agent.load_state_dict(weights)
    optimizer = torch.optim.Adam(agent.parameters(), lr=2.5e-4, eps=1e-5, fused=True)
    for mb in minibatches:
        stats = script.train_step(agent, optimizer, mb, script.Args(**SIZES, cuda=False))
    for results in trained[1]:
        updated, their_stats, _, _ = results[name]
        for key, ours in agent.state_dict().items():
            assert (ours - updated[key]).abs().max() < 1e-6, key
        for key, value in stats.items():
            torch.testing.assert_close(value, their_stats[key], rtol=1e-4, atol=1e-6)
    moved = max((agent.state_dict()[key] - old).abs().max() for key, old in weights.items())
    assert moved > 1e-4


@pytest.mark.parametrize("name", MODULES)
def test_processes_stay_equal_and_write_one_run(name, trained):
    """Fails when ranks drift apart, decide about the KL alone and hang, or write two runs."""
    (_, _, first, score0), (_, _, second, score1) = (results[name] for results in trained[1])
    for key, weights in first.items():
        assert torch.equal(weights, second[key]), key
    assert score0 == score1 or np.isnan([score0, score1]).all()
    (run_dir,) = [path for path in trained[2] if load(path)["script"] == name]
    saved = load(run_dir)
    assert saved["iteration"] == 4 and saved["processes"] == 2 and saved["args"]["num_envs"] == 4
    assert all(torch.equal(weights, saved["agent"][key]) for key, weights in first.items())
    assert len(list(run_dir.glob("events*"))) == 1
    assert [step for step, _ in scalars(run_dir, "charts/SPS")] == [64, 128, 192, 256]


@pytest.fixture(scope="module")
def run_of_two(tmp_path_factory):
    """A training by two processes, stopped by SIGTERM -> (folder, what torchrun printed)."""
    folder = tmp_path_factory.mktemp("stopped")
    words = ["--checkpoint-interval", 1_000_000, "--total-timesteps", 10_000_000]
    process = torchrun(ROOT / "ppo.py", *words, cwd=folder)
    wait_until(lambda: list(folder.glob("runs/*/checkpoint.pt")) or process.poll() is not None)
    time.sleep(3)
    process.terminate()
    stdout, stderr = process.communicate(timeout=60)
    return folder, stdout + stderr


def test_sigterm_saves_and_one_process_goes_on(run_of_two):
    """Fails when a stopped run is not saved, or cannot be gone on with by another number."""
    folder, printed = run_of_two
    run_dir = run_dir_of(folder)
    assert printed.count(f"--resume runs/{run_dir.name}") == 1, printed
    iteration = load(run_dir)["iteration"]
    assert iteration >= 1
    steps = 512 * (iteration + 2)
    result = run("ppo.py", "--resume", run_dir, "--total-timesteps", steps, cwd=folder)
    assert result.returncode == 0, result.stderr
    assert load(run_dir)["iteration"] == iteration + 2


def test_episodes_of_all_processes_are_logged(run_of_two):
    """Fails when only the first process's are, or two of one step hide each other."""
    folder, _ = run_of_two
    steps = [step for step, _ in scalars(run_dir_of(folder), "charts/episodic_length")]
    environments = {(step - 1) % 4 for step in steps}
    assert environments == {0, 1, 2, 3}
    assert len(set(steps)) == len(steps) and steps == sorted(steps)


def test_a_killed_process_ends_the_other(tmp_path):
    """Fails when the other one waits for ever, or the run cannot be gone on with."""
    words = ["--checkpoint-interval", 1, "--total-timesteps", 10_000_000]
    process = torchrun(ROOT / "ppo.py", *words, cwd=tmp_path)
    wait_until(lambda: list(tmp_path.glob("runs/*/checkpoint.pt")) or process.poll() is not None)
    time.sleep(2)
    children = subprocess.run(
        ["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True
    )
    os.kill(int(children.stdout.split()[-1]), signal.SIGKILL)
    process.communicate(timeout=60)
    assert process.returncode != 0
    run_dir = run_dir_of(tmp_path)
    steps = 512 * (load(run_dir)["iteration"] + 1)
    process = torchrun(
        ROOT / "ppo.py", "--resume", run_dir, "--total-timesteps", steps, cwd=tmp_path
    )
    _, stderr = process.communicate(timeout=100)
    assert process.returncode == 0, stderr


def test_nan_in_one_process_ends_both(tmp_path):
    """Fails when one process goes on alone, or the message is missing."""
    (tmp_path / "worker.py").write_text(
        f"import sys\nsys.path.insert(0, {str(ROOT)!r})\nimport ppo\n"
        "loss = ppo.ppo_loss\n"
        "def ppo_loss(agent, mb, args):\n"
        "    total, stats = loss(agent, mb, args)\n"
        "    return total * (float('nan') if ppo.get_rank() == 1 else 1), stats\n"
        "ppo.ppo_loss = ppo_loss\n"
        "ppo.main(ppo.Args(total_timesteps=2048))\n"
    )
    process = torchrun("worker.py", cwd=tmp_path)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "became NaN or infinite; last good state" in stderr
    assert load(run_dir_of(tmp_path))["iteration"] == 0


def test_no_thread_of_gloo_outlives_training(tmp_path):
    """Fails when something keeps the group: its threads can abort Python at the end of a run."""
    (tmp_path / "worker.py").write_text(
        f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
import ppo

ppo.main(ppo.Args(total_timesteps=512, cuda=False))
for name in Path("/proc/self/task").glob("*/comm"):
    print("thread", name.read_text().strip())
"""
    )
    process = torchrun("worker.py", cwd=tmp_path)
    stdout, stderr = process.communicate(timeout=100)
    assert process.returncode == 0, stderr[-3000:]
    assert "thread" in stdout and "gloo" not in stdout


@pytest.mark.parametrize(
    "script, words, refusal",
    [
        (
            "ppo.py",
            ["--num-envs", 3],
            "--num-envs 3: must be a multiple of the number of processes, 2",
        ),
        (
            "ppo_atari_lstm.py",
            ["--num-envs", 4, "--num-minibatches", 4],
            "--num-minibatches 4: must divide a process's environments, 2, "
            "because a minibatch holds whole ones",
        ),
    ],
)
def test_a_number_that_does_not_divide(script, words, refusal, tmp_path):
    """Fails when it ends in a traceback, in two lines, or leaves a run."""
    process = torchrun(ROOT / script, *words, cwd=tmp_path)
    _, stderr = process.communicate(timeout=60)
    lines = [line for line in stderr.splitlines() if line.startswith(f"{script}: ")]
    assert lines == [f"{script}: {refusal}"]
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("name", ["ppo_continuous_action", "ppo_procgen"])
def test_statistics_are_merged(name, monkeypatch):
    """Fails when what all had before counts twice, or a process's rows are lost."""
    script = MODULES[name]
    rng = np.random.default_rng(0)
    old, *rows = (rng.normal(3, 2, (n, 5)) for n in (50, 20, 30))
    everything = script.RunningMeanStd((5,))
    processes = [script.RunningMeanStd((5,)) for _ in rows]
    for statistics in (everything, *processes):
        statistics.update(old)
        statistics.load_state_dict(statistics.state_dict())  # as a resumed run begins

    for _ in range(2):
        for statistics, own in zip(processes, rows, strict=True):
            statistics.update(own)
            everything.update(own)
        states = [statistics.state_dict() for statistics in processes]
        monkeypatch.setattr(script, "gather", lambda value, states=states: states)
        for statistics in processes:
            statistics.merge()
            np.testing.assert_allclose(statistics.mean, everything.mean, rtol=1e-12)
            np.testing.assert_allclose(statistics.var, everything.var, rtol=1e-12)
            assert statistics.count == pytest.approx(everything.count)


def test_different_weights_are_noticed(ppo, monkeypatch):
    """Fails when processes may drift apart without a word."""
    agent = torch.nn.Linear(2, 2)
    ppo.check_weights_are_equal(agent)
    monkeypatch.setattr(ppo, "gather", lambda value: [value, value + 1])
    with pytest.raises(SystemExit, match="different weights"):
        ppo.check_weights_are_equal(agent)


@pytest.mark.slow
def test_two_processes_learn_cartpole(tmp_path):
    """Fails when two processes learn less than one."""
    process = torchrun(ROOT / "ppo.py", cwd=tmp_path)
    _, stderr = process.communicate(timeout=900)
    assert process.returncode == 0, stderr
    assert np.mean(load(run_dir_of(tmp_path))["recent_returns"]) >= 475


@pytest.mark.slow
@pytest.mark.parametrize("name", MODULES)
def test_compiled_processes_compute_the_same(name, tmp_path):
    """Fails when --compile cannot pass the sum over processes, or leaves it out."""
    losses = []
    for folder, options in (("eager", []), ("compiled", ["--compile", "--anneal-clip"])):
        (tmp_path / folder).mkdir()
        command = [ROOT / f"{name}.py", *WORDS, "--total-timesteps", 64, *options]
        process = torchrun(*command, cwd=tmp_path / folder)
        _, stderr = process.communicate(timeout=600)
        assert process.returncode == 0, stderr
        run_dir = run_dir_of(tmp_path / folder)
        losses.append(scalars(run_dir, "losses/value_loss") + scalars(run_dir, "losses/grad_norm"))
    assert losses[0] == [(step, pytest.approx(value, rel=1e-3)) for step, value in losses[1]]
