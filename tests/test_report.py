"""benchmark/report.py: it says of runs what their events say, and README.md shows nothing else."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import report
import torch
from conftest import ROOT, scalars

import ppo

SMALL = dict(num_envs=2, num_steps=64, num_minibatches=2, update_epochs=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Runs of ppo.py: three seeds on CartPole-v1, one with other arguments, Acrobot-v1 once.

    The last is too short for an episode.
    """
    folder = tmp_path_factory.mktemp("report")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for seed in (1, 2, 3):
            ppo.main(ppo.Args(**SMALL, seed=seed, total_timesteps=4096))
        ppo.main(ppo.Args(**SMALL, gamma=0.9, anneal_lr=False, total_timesteps=2048))
        ppo.main(ppo.Args(**SMALL, env_id="Acrobot-v1", total_timesteps=256))
    return folder


@pytest.fixture(scope="module")
def files(folder):
    """The prefix of the files that report.py writes of all these runs, and what it printed."""
    runs = sorted(map(str, (folder / "runs").iterdir()))
    command = [
        sys.executable,
        str(ROOT / "benchmark" / "report.py"),
        *runs,
        "--save",
        str(folder / "out" / "all"),
    ]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return folder / "out" / "all", result.stdout


def last_hundred(run_dir: Path) -> float:
    return np.mean([value for _, value in scalars(run_dir, "charts/episodic_return")][-100:])


def test_runs(folder, files):
    """Fails when a result is not the mean of the last 100 episodes, or its origin is not told."""
    runs = pd.read_csv(f"{files[0]}_runs.csv")
    assert len(runs) == 5
    for _, run in runs.iterrows():
        run_dir = folder / "runs" / run.run
        steps = [step for step, _ in scalars(run_dir, "charts/SPS")]
        assert (run.steps, run.total_timesteps) == (steps[-1], steps[-1])
        assert (
            run.script == "ppo.py" and run.env_id in run.run and f"__ppo__{run.seed}__" in run.run
        )
        assert re.match(r"[0-9a-f]{40}$", run.commit) and re.match(r"\d{4}-\d\d-\d\d$", run.date)
        assert "core" in run.machine
        if run.env_id == "CartPole-v1":
            assert run.mean_return == pytest.approx(last_hundred(run_dir), abs=1e-4)
            assert 1e-6 < run.hours < 0.1
        else:
            assert (run.episodes, np.isnan(run.mean_return)) == (0, True)
    commands = set(runs.command)
    sizes = "--num-envs 2 --num-steps 64 --num-minibatches 2 --update-epochs 1"
    assert f"python ppo.py --total-timesteps 4096 {sizes}" in commands
    assert any(
        "--total-timesteps 2048 --num-envs 2 --num-steps 64 --no-anneal-lr --gamma 0.9" in c
        for c in commands
    )


def test_curves(folder, files):
    """Fails when a point of a curve is not the mean of the last 100 episodes until then."""
    curves = pd.read_csv(f"{files[0]}_curves.csv")
    seed = curves[(curves.env_id == "CartPole-v1") & (curves.seed == 2)]
    assert len(seed) == 200 and seed.step.iloc[-1] == 4096 and seed.hours.is_monotonic_increasing
    (run_dir,) = (folder / "runs").glob("CartPole-v1__ppo__2__*")
    episodes = scalars(run_dir, "charts/episodic_return")
    for _, point in seed.iloc[[20, 100, 199]].iterrows():
        until = [value for step, value in episodes if step <= point.step]
        assert point.mean_return == pytest.approx(np.mean(until[-100:]), abs=1e-3)


def test_table(folder, files):
    """Fails when seeds are averaged wrongly, other arguments are mixed in, or steps go unnamed."""
    text = Path(f"{files[0]}.md").read_text()
    assert text == files[1]
    rows = [line.strip("| ").split(" | ") for line in text.splitlines()[2:]]
    three, *others = sorted(rows, key=lambda cells: -int(cells[4]))
    scores = [
        last_hundred(sorted((folder / "runs").glob(f"CartPole-v1__ppo__{seed}__*"))[0])
        for seed in (1, 2, 3)
    ]
    assert three[2] == f"{np.mean(scores):.1f} ± {np.std(scores):.1f}"
    low, high = map(float, re.search(r"\[(.+), (.+)\]", three[3]).groups())
    assert (
        low <= float(three[3].split()[0]) <= high
        and min(scores) - 0.1 <= low
        and high <= max(scores) + 0.1
    )
    assert three[4:6] == ["3", "4,096 of 500,000"] and three[8:] == ["492.4 ± 13.1", "497.5 ± 4.0"]
    assert {cells[5] for cells in others} == {"2,048 of 500,000", "256 of 500,000"}


def test_plots(files, tmp_path, monkeypatch):
    """Fails when a panel, a line or a band is missing, or a line is not the mean over seeds."""
    curves = pd.read_csv(f"{files[0]}_curves.csv")
    monkeypatch.setattr(report.plt, "close", lambda figure: None)
    for over in ("step", "hours"):
        report.plot(curves, over, tmp_path / f"{over}.png")
        assert (tmp_path / f"{over}.png").read_bytes().startswith(b"\x89PNG")
        panels = report.plt.gcf().axes
        assert [panel.get_title() for panel in panels] == ["Acrobot-v1", "CartPole-v1"]
        (three,) = (
            line for line in panels[1].lines if line.get_label().split()[-2:] == ["3", "seeds"]
        )
        ends = curves[curves.steps == 4096].groupby("seed").mean_return.last()
        assert three.get_ydata()[-1] == pytest.approx(ends.mean(), rel=0.05)
        assert len(panels[1].lines) == len(panels[1].collections) == 2
    for name in ("steps", "hours"):
        assert Path(f"{files[0]}_{name}.png").is_file()


def test_pauses_are_no_training():
    """Fails when the hours between two sittings count."""
    times = 1000 + np.array([0.0, 2, 4, 6, 5006, 5008])  # an iteration takes 2 seconds
    np.testing.assert_allclose(report.compute_hours(times, 2.0) * 3600, [2, 4, 6, 8, 10, 12])


def test_published_numbers_of_renamed_tasks():
    """Fails when -v4 tasks lose the numbers of their -v2, or another script's are taken."""
    hopper = report.find_published("ppo_continuous_action.py", "Hopper-v4")
    assert hopper.baselines_mean == 2518.95
    assert report.find_published("ppo_continuous_action.py", "Ant-v4") is None
    pong = report.find_published("ppo_atari_lstm.py", "PongNoFrameskip-v4")
    assert pong.seed_script_mean == 19.78


def test_a_repeated_run_counts_once(folder, tmp_path, capsys, monkeypatch):
    """Fails when the same seed is averaged twice, or the machine is not the one that is given."""
    (run_dir,) = (folder / "runs").glob("CartPole-v1__ppo__2__*")
    later = tmp_path / "CartPole-v1__ppo__2__9999999999"
    shutil.copytree(run_dir, later)
    report.main(report.Args([run_dir, later], tmp_path / "out", machine="cluster"))
    assert pd.read_csv(tmp_path / "out_runs.csv").machine.tolist() == ["cluster"]
    output = capsys.readouterr()
    assert f"there is a later one with the same command and seed: {run_dir.name}" in output.err
    assert " | 1 | 4,096 of 500,000 | " in output.out


def test_readme_shows_what_was_measured():
    """Fails when README.md's table is not what *_runs.csv give, or a plot is missing."""
    readme = (ROOT / "README.md").read_text()
    assert readme.split(report.BEGIN)[1].split(report.END)[0] == report.make_readme_table()
    files = list((ROOT / "benchmark" / "results").glob("*_runs.csv"))
    for file in files:
        assert f"(benchmark/results/{file.name.removesuffix('_runs.csv')}_steps.png)" in readme
    assert files and all(
        (ROOT / picture).is_file()
        for picture in re.findall(r"\((benchmark/results/\S+png)\)", readme)
    )


def test_bad_input_is_one_line(tmp_path):
    """Fails when what is no run ends in a traceback."""
    (tmp_path / "run").mkdir()
    torch.save({"script": "ppo", "args": {}}, tmp_path / "run" / "checkpoint.pt")
    for args, line in [
        ([], "report.py: nothing to do"),
        ([tmp_path], "report.py: --save: say where"),
        ([tmp_path, "--save", ""], "report.py: --save: say where"),
    ]:
        command = [sys.executable, ROOT / "benchmark" / "report.py", *args]
        result = subprocess.run(list(map(str, command)), capture_output=True, text=True)
        assert result.returncode == 2
        assert result.stderr.startswith(line) and result.stderr.count("\n") == 1


def test_what_is_no_run_is_left_out(folder, tmp_path):
    """Fails when a folder of logs, or a run that was stopped at its start, blocks the report."""
    (tmp_path / "logs").mkdir()
    for name, script in (("new", "ppo"), ("strange", "os")):
        (tmp_path / name).mkdir()
        torch.save({"script": script, "args": {}}, tmp_path / name / "checkpoint.pt")
    (good,) = (folder / "runs").glob("CartPole-v1__ppo__2__*")
    bad = [tmp_path / name for name in ("logs", "new", "strange")]
    program = str(ROOT / "benchmark" / "report.py")
    command = [sys.executable, program, "--save", str(tmp_path / "x"), *map(str, bad)]

    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 2
    *left_out, last = result.stderr.splitlines()
    assert [line.partition(": ")[0] for line in left_out] == ["left out"] * 3
    assert f"{tmp_path}/logs: no run, FileNotFoundError" in result.stderr
    assert f"{tmp_path}/new: has not trained yet" in result.stderr
    assert f"{tmp_path}/strange: made by os.py, which is not in" in result.stderr
    assert last == "report.py: no run to report"

    result = subprocess.run([*command, str(good)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert len(pd.read_csv(tmp_path / "x_runs.csv")) == 1
