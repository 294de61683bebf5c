"""benchmark/report.py: it says of runs what their events say, and README.md shows nothing else."""

import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import pytest
import report
import torch
from conftest import ROOT, scalars
from torch.utils.tensorboard import SummaryWriter

import ppo

SMALL = dict(num_envs=2, num_steps=64, num_minibatches=2, update_epochs=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Runs of ppo.py: three seeds on CartPole-v1, one with other arguments, Acrobot-v1 once.

    The second seed is filmed. Acrobot-v1 is too short for an episode.
    """
    folder = tmp_path_factory.mktemp("report")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for seed in (1, 2, 3):
            kept = dict(capture_video=seed == 2, checkpoint_interval=7 * seed)
            ppo.main(ppo.Args(**SMALL, **kept, seed=seed, total_timesteps=4096))
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
    acrobot = next(name for name in runs if "Acrobot" in name)
    reason = "no episode has ended yet, so there is no return to report"
    assert result.stderr == f"left out: {acrobot}: {reason}\n"
    return folder / "out" / "all", result.stdout


def last_hundred(run_dir: Path) -> float:
    return np.mean([value for _, value in scalars(run_dir, "charts/episodic_return")][-100:])


def test_runs(folder, files):
    """Fails when a result is not the mean of the last 100 episodes, or its origin is not told."""
    runs = pd.read_csv(f"{files[0]}_runs.csv")
    assert len(runs) == 4 and set(runs.env_id) == {"CartPole-v1"}
    for _, run in runs.iterrows():
        run_dir = folder / "runs" / run.run
        steps = [step for step, _ in scalars(run_dir, "charts/SPS")]
        assert (run.steps, run.total_timesteps) == (steps[-1], steps[-1])
        assert (
            run.script == "ppo.py" and run.env_id in run.run and f"__ppo__{run.seed}__" in run.run
        )
        assert re.match(r"[0-9a-f]{40}$", run.commit) and re.match(r"\d{4}-\d\d-\d\d$", run.date)
        assert "core" in run.machine
        assert run.mean_return == pytest.approx(last_hundred(run_dir), abs=1e-4)
        assert 1e-6 < run.hours < 0.1 and run.episodes > 0
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
    assert [cells[5] for cells in others] == ["2,048 of 500,000"] and "nan" not in text


def legend_of(panel) -> list[str]:
    """-> the names in its legend, each on one line."""
    return [" ".join(text.get_text().split()) for text in panel.get_legend().get_texts()]


def test_plots(files, tmp_path, monkeypatch):
    """Fails when a panel, a line or a band is missing, or a line is not the mean over seeds."""
    curves = pd.read_csv(f"{files[0]}_curves.csv")
    monkeypatch.setattr(report.plt, "close", lambda figure: None)
    for over in ("step", "hours"):
        report.plot(curves, over, tmp_path / f"{over}.png")
        assert (tmp_path / f"{over}.png").read_bytes().startswith(b"\x89PNG")
        figure = report.plt.gcf()
        (panel,) = figure.axes
        assert panel.get_title() == "CartPole-v1"
        (three,) = (line for line in panel.lines if line.get_label().split()[-2:] == ["3", "seeds"])
        seeds = [seed for _, seed in curves[curves.steps == 4096].groupby("seed")]
        end = min(seed[over].max() for seed in seeds)  # as far as the shortest goes
        at_end = [np.interp(end, seed[over], seed.mean_return) for seed in seeds]
        assert three.get_xdata()[-1] == pytest.approx(end)
        # none where a seed that was slow at first has ended no episode by then
        assert three.get_ydata()[-1] == pytest.approx(np.mean(at_end), nan_ok=over == "hours")
        assert len(panel.collections) == 1  # one seed has no band
        names = legend_of(panel)
        assert len(names) == 4 and names[2:] == [
            "published: 492.4 at 500,000",
            "baselines: 497.5 at 500,000",
        ]
        assert [line.get_ydata()[0] for line in panel.lines[2:]] == [492.40, 497.54]
        assert "band: one standard deviation" in figure.get_supxlabel()
    for name in ("steps", "hours"):
        assert Path(f"{files[0]}_{name}.png").is_file()


def make_curves(script: str, env_id: str, returns: list[list[float]], end: int) -> pd.DataFrame:
    """-> curves as report.py writes them, of a seed for each list of returns."""
    tables = []
    for seed, values in enumerate(returns):
        steps = np.linspace(0, end, len(values) + 1)[1:]
        table = {"step": steps, "hours": steps / 1e6, "mean_return": values, "seed": seed}
        tables.append(pd.DataFrame(table))
    names = {"script": script, "env_id": env_id, "command": f"python {script}", "steps": end}
    return pd.concat(tables).assign(**names)


def test_scripts_on_one_environment_share_a_panel(tmp_path, monkeypatch):
    """Fails when they have a panel each, their published lines are missing or look the same."""
    monkeypatch.setattr(report.plt, "close", lambda figure: None)
    attack = "MicrortsAttackShapedReward-v1"  # of which nothing is published
    for first, second, env_id, entries in (
        ("ppo_atari.py", "ppo_atari_lstm.py", "BreakoutNoFrameskip-v4", 6),
        ("ppo_multidiscrete.py", "ppo_multidiscrete_mask.py", attack, 2),
    ):
        curves = [make_curves(name, env_id, [[1.0, 2.0]], 10**6) for name in (first, second)]
        report.plot(pd.concat(curves), "step", tmp_path / "both.png")
        figure = report.plt.gcf()
        (panel,) = figure.axes
        names = legend_of(panel)
        assert len(names) == len({*names}) == entries
        for script in (first, second):
            assert any(name.startswith(f"{script}, 1 seed") for name in names)
            if env_id != attack:
                assert any(name.startswith(f"{script}, published: ") for name in names)
        colors = {matplotlib.colors.to_hex(line.get_color()) for line in panel.lines}
        assert len(colors) == 2

        # The legend stands beside the curves, and within the figure
        figure.canvas.draw()
        legend = panel.get_legend().get_window_extent()
        assert legend.x0 >= panel.get_window_extent().x1
        assert legend.x1 <= figure.bbox.x1 and legend.y0 >= figure.bbox.y0


def test_the_band_ends_where_the_seeds_do(tmp_path, monkeypatch):
    """Fails when it is drawn where no seed was, such as above the highest possible return."""
    monkeypatch.setattr(report.plt, "close", lambda figure: None)
    curves = make_curves("ppo.py", "CartPole-v1", [[500.0, 500], [500, 500], [100, 100]], 500_000)
    report.plot(curves, "step", tmp_path / "band.png")
    (band,) = report.plt.gcf().axes[0].collections
    heights = band.get_paths()[0].vertices[:, 1]
    assert heights.max() == 500 and heights.min() == pytest.approx(1100 / 3 - 188.6, abs=0.1)


def test_points_of_a_published_curve(tmp_path, monkeypatch):
    """Fails when they are left out, or drawn far beyond what was trained."""
    monkeypatch.setattr(report.plt, "close", lambda figure: None)
    curves = make_curves("ppo_procgen.py", "starpilot", [[1.0, 8.6]], 1_032_192)
    report.plot(curves, "step", tmp_path / "curve.png")
    points = report.plt.gcf().axes[0].lines[-1]
    assert points.get_xdata().tolist() == [1_032_192] and points.get_ydata().tolist() == [9.447]


def test_pauses_are_no_training():
    """Fails when the hours between two sittings count, or one of a sitting does not."""
    steps = np.array([100, 200, 300, 400, 500])
    speeds = np.array([50, 50, 25, 10, 10])  # 2, 4 and 12 seconds, then 10 and 20
    for first_steps in ([0, 300], [0, 300, 300]):  # killed again before an iteration had ended
        hours = report.compute_hours(steps, speeds, first_steps)
        np.testing.assert_allclose(hours * 3600, [2, 4, 12, 22, 32])


def test_hours_of_a_run_that_was_gone_on_with(tmp_path, monkeypatch):
    """Fails when read_run loses the hours of a start of the script, or adds those between two."""
    monkeypatch.chdir(tmp_path)
    ppo.main(ppo.Args(**SMALL, total_timesteps=2048))
    (run_dir,) = (tmp_path / "runs").iterdir()
    time.sleep(5)
    ppo.main(ppo.Args(**SMALL, total_timesteps=4096, resume=str(run_dir)))

    speeds = dict(scalars(run_dir, "charts/SPS"))
    seconds = 2048 / speeds[2048] + 2048 / speeds[4096]
    run, curve = report.read_run(run_dir, machine="here")
    assert run["hours"] * 3600 == pytest.approx(seconds)
    assert curve.hours.iloc[-1] == run["hours"]


def test_published_numbers_of_renamed_tasks():
    """Fails when -v4 tasks lose the numbers of their -v2, or another script's are taken."""
    hopper = report.find_published("ppo_continuous_action.py", "Hopper-v4")
    assert hopper["mean"][hopper.column == "baselines"].tolist() == [2518.95, 2316.2]
    assert set(hopper.published_as) == {"Hopper-v2", "Hopper"}
    assert report.find_published("ppo_continuous_action.py", "Ant-v4").empty
    pong = report.find_published("ppo_atari_lstm.py", "PongNoFrameskip-v4")
    assert pong["mean"].tolist() == [19.78, 19.79]


def test_published_numbers_have_sources():
    """Fails when a number has none, or a column that no table shows."""
    published = pd.read_csv(ROOT / "benchmark" / "published_results.csv")
    needed = published.drop(columns=["std", "seeds"])
    assert needed.notna().all(axis=None) and set(published.column) == {"published", "baselines"}
    assert not published.duplicated(["script", "env_id", "steps", "column", "by"]).any()
    assert all((ROOT / script).is_file() for script in published.script)


@pytest.mark.parametrize(
    ("script", "env_id", "column", "steps", "text"),
    [
        ("ppo_procgen.py", "starpilot", "baselines", 500_000, "34.0 ± 7.9, 34.9 (OpenAI)"),
        (
            "ppo_procgen.py",
            "starpilot",
            "baselines",
            1_032_192,
            "34.0 ± 7.9, 34.9 (OpenAI), 9.4 (OpenAI) at 1,032,192 of 25,000,000",
        ),
        (
            "ppo_continuous_action.py",
            "HalfCheetah-v4",
            "baselines",
            249_856,
            "2152.3 ± 1159.8, 1668.6 (OpenAI), 997.0 (OpenAI) at 250,000 of 1,000,000",
        ),
        (
            "ppo_multidiscrete_mask.py",
            "MicrortsMining-v1",
            "published",
            999_424,
            "39.98 ± 0.03 (Huang and Ontanon) at 500,000",
        ),
        ("ppo_procgen.py", "bigfish", "baselines", 100_000, "20.1 ± 5.3, 18.8 (OpenAI)"),
        ("ppo_atari_envpool.py", "Pong-v5", "baselines", 10**7, ""),
    ],
)
def test_an_unfinished_run_stands_beside_a_published_curve(script, env_id, column, steps, text):
    """Fails when a number after other steps passes for one after the run's."""
    published = report.find_published(script, env_id)
    assert report.describe_published(published[published.column == column], steps) == text


def test_evaluated_mean_beside_that_of_training(folder, tmp_path, capsys):
    """Fails when it is not shown, or one of an older agent or of greedy actions is taken for it."""
    run_dirs = []
    for seed in (1, 2):
        run_dir = min((folder / "runs").glob(f"CartPole-v1__ppo__{seed}__*"))
        run_dirs.append(Path(shutil.copytree(run_dir, tmp_path / run_dir.name)))
        lines = {"trained_steps": [2048, 4096, 4096], "greedy": [False, False, True]}
        lines |= {"mean": [1.0, 40.0 + 10 * seed, 3.0], "episodes": [5, 6, 7]}
        pd.DataFrame(lines).to_csv(run_dirs[-1] / "evaluation.csv", index=False)

    report.main(report.Args(run_dirs, tmp_path / "out"))
    table = capsys.readouterr().out
    head, _, row = table.splitlines()
    cells = dict(zip(head.split(" | "), row.split(" | "), strict=True))
    assert cells["evaluated"] == "55.0 ± 5.0"
    assert pd.read_csv(tmp_path / "out_runs.csv").evaluated_episodes.tolist() == [6, 6]

    (run_dirs[0] / "evaluation.csv").unlink()  # of one seed alone, it would be no mean over seeds
    report.main(report.Args(run_dirs, tmp_path / "out"))
    assert "evaluated" not in capsys.readouterr().out


def test_a_copied_script_is_given_by_its_path(folder, tmp_path, capsys):
    """Fails when a copy cannot be reported, or its name alone has it imported from anywhere."""
    run_dir = min((folder / "runs").glob("CartPole-v1__ppo__1__*"))
    run_dir = shutil.copytree(run_dir, tmp_path / run_dir.name)
    checkpoint = torch.load(run_dir / "checkpoint.pt", weights_only=True) | {"script": "random"}
    torch.save(checkpoint, run_dir / "checkpoint.pt")
    copy = Path(shutil.copy(ROOT / "ppo.py", tmp_path / "random.py"))

    with pytest.raises(SystemExit):
        report.main(report.Args([run_dir], tmp_path / "out"))
    assert "none of the eight scripts; say where it is, as in --script" in capsys.readouterr().err
    report.main(report.Args([run_dir], tmp_path / "out", script=[copy]))
    assert "| random.py --exp-name ppo --total-timesteps 4096 " in capsys.readouterr().out


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


def test_readme_counts_each_seed_once():
    """Fails when a seed that was trained again is averaged with itself, or the older one is."""
    files = (ROOT / "benchmark" / "results").glob("*_runs.csv")
    runs = pd.concat([pd.read_csv(file) for file in files])
    rows = [row.split(" | ") for row in report.make_readme_table().splitlines()[2:]]
    seeds = [int(row[4]) for row in rows]
    assert sum(seeds) == len(runs.drop_duplicates([*report.GROUP, "seed"])) < len(runs)

    cartpole = runs[runs.env_id.eq("CartPole-v1") & runs.command.eq("python ppo.py")]
    newest = cartpole.sort_values("date", kind="stable").tail(5).mean_return
    (row,) = [row for row in rows if row[:2] == ["| ppo.py", "CartPole-v1"]]
    assert row[2].startswith(f"{newest.mean():.1f} ")


def test_bad_input_is_one_line(tmp_path):
    """Fails when what is no run ends in a traceback."""
    (tmp_path / "file").write_text("")
    (tmp_path / "run").mkdir()
    torch.save({"script": "ppo", "args": {}}, tmp_path / "run" / "checkpoint.pt")
    for args, line in [
        ([], "report.py: nothing to do"),
        ([tmp_path], "report.py: --save: say where"),
        ([tmp_path, "--save", ""], "report.py: --save: say where"),
        (["--readme", "--save", ""], "report.py: --save: say where"),
        (["--save", tmp_path / "x"], "report.py: nothing to do"),
        ([tmp_path, "--save", tmp_path / "file" / "x"], f"report.py: --save {tmp_path}/file/x"),
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
        checkpoint = {"script": script, "args": {}, "iteration": 0}
        torch.save(checkpoint, tmp_path / name / "checkpoint.pt")
    shutil.copytree(tmp_path / "new", tmp_path / "untold")
    with SummaryWriter(str(tmp_path / "untold")) as writer:
        for name in ("charts/SPS", "charts/episodic_return"):
            writer.add_scalar(name, 1, 1)
    (good,) = (folder / "runs").glob("CartPole-v1__ppo__2__*")
    bad = [tmp_path / name for name in ("logs", "new", "untold", "strange")]
    program = str(ROOT / "benchmark" / "report.py")
    command = [sys.executable, program, "--save", str(tmp_path / "x"), *map(str, bad)]

    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 2
    *left_out, last = result.stderr.splitlines()
    assert [line.partition(": ")[0] for line in left_out] == ["left out"] * 4
    assert f"{tmp_path}/logs: no run, FileNotFoundError" in result.stderr
    assert f"{tmp_path}/new: has not trained yet" in result.stderr
    assert f"{tmp_path}/untold: has not logged its hyperparameters" in result.stderr
    assert f"{tmp_path}/strange: made by os.py, which is none of the eight" in result.stderr
    assert last == "report.py: no run to report"

    result = subprocess.run([*command, str(good)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert len(pd.read_csv(tmp_path / "x_runs.csv")) == 1


def test_several_processes_are_told(folder, tmp_path):
    """Fails when a run by two processes passes for one by a single process."""
    (run_dir,) = (folder / "runs").glob("CartPole-v1__ppo__3__*")
    copied = tmp_path / run_dir.name
    shutil.copytree(run_dir, copied)
    checkpoint = torch.load(copied / "checkpoint.pt", weights_only=True)
    assert checkpoint["processes"] == 1
    torch.save(checkpoint | {"processes": 2}, copied / "checkpoint.pt")
    run, _ = report.read_run(copied, "here")
    assert run["command"].startswith("torchrun --nproc-per-node 2 ppo.py --total-timesteps 4096")
    assert report.shorten_command(run["command"]).startswith("torchrun")
