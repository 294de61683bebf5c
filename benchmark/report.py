"""Makes of runs what is published: a table beside the published numbers, learning curves, plots.

    python benchmark/report.py runs/*__ppo__* --save benchmark/results/ppo
    python benchmark/report.py --readme    # README.md's table, from all that is in results/

Writes SAVE_runs.csv (a line for each run: its command, steps, hours, result, commit, machine and
date), SAVE_curves.csv (mean return of the last 100 episodes at 200 steps of each run), SAVE.md (the
table), SAVE_steps.png and SAVE_hours.png.

Runs of one script on one environment that differ in nothing but the seed are one row of the table.
Its result is the mean return of the last 100 training episodes, as mean over seeds +- standard
deviation. From three seeds on, the interquartile mean stands beside it with its 95 % bootstrap
interval (Agarwal et al., 2021, arXiv:2108.13264).

Shapes: I = iterations of a run, S = seeds, P = POINTS of a curve.
"""

import dataclasses
import datetime
import importlib
import math
import re
import sys
import textwrap
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
import tyro
from common import ROOT, describe_machine, find_commit, refuse
from rliable import library, metrics
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tqdm import tqdm

WINDOW = 100  # episodes that are averaged
POINTS = 200  # points of a curve

# What runs have in common that are averaged
GROUP = ["script", "env_id", "command", "steps"]

# Around README.md's table
BEGIN = "<!-- results -->\n"
END = "<!-- /results -->"

# Arguments of a script that say nothing of what is trained
NOT_IN_COMMAND = ("seed", "resume", "checkpoint_interval")

COLUMNS = [
    "script",
    "environment",
    "mean return",
    "IQM, 95 %",
    "seeds",
    "steps",
    "hours",
    "steps/s",
    "published",
    "baselines",
]
AXIS_LABELS = {"step": "environment steps", "hours": "hours"}


@dataclass
class Args:
    run_dirs: Annotated[list[Path], tyro.conf.Positional] = field(default_factory=list)
    """folders of runs"""
    save: Path | None = None
    """files to write, without their endings"""
    readme: bool = False
    """write README.md's table, from benchmark/results/*_runs.csv"""
    machine: str = field(default_factory=describe_machine)
    """where the runs were trained, if not here"""


def build_command(script: str, args: dict) -> str:
    """-> the command that such a run begins with, without its seed."""
    sys.path.insert(0, str(ROOT))
    script_args = importlib.import_module(script).Args

    words = [f"python {script}.py"]
    for option in dataclasses.fields(script_args):
        name = option.name.replace("_", "-")
        value = args[option.name]
        if value == option.default or option.name in NOT_IN_COMMAND:
            continue
        if value is True:
            words.append(f"--{name}")
        elif value is False:
            words.append(f"--no-{name}")
        else:
            words.append(f"--{name} {value}")
    return " ".join(words)


def compute_hours(end_times: np.ndarray, first_duration: float) -> np.ndarray:
    """Wall times [I] at which iterations ended -> hours of training until each of them [I].

    Both arguments are in seconds; the first iteration has no end before it, so its duration is
    given. A run that was interrupted and gone on with has gaps, which are no training: an iteration
    that seems to have taken more than ten times the median is counted as one that took the median.
    """
    durations = np.diff(end_times, prepend=end_times[0] - first_duration)
    median = np.median(durations)
    durations = np.where(durations > 10 * median, median, durations)
    return durations.cumsum() / 3600


def average_last_episodes(
    end_steps: np.ndarray, returns: np.ndarray, at_steps: np.ndarray
) -> np.ndarray:
    """-> mean return of the last 100 episodes at each of at_steps [P]; NaN if none has ended.

    end_steps, returns: of every episode, in the order in which they ended.
    """
    sums = np.cumsum([0.0, *returns])  # of all until then
    last = np.searchsorted(end_steps, at_steps, side="right")  # episodes that have ended, [P]
    first = np.maximum(last - WINDOW, 0)
    with np.errstate(invalid="ignore"):
        return (sums[last] - sums[first]) / (last - first)


class NoRunError(Exception):
    """A folder is no run, or one that has not trained; the message says why."""


def read_run(run_dir: Path, machine: str, scripts: Path = ROOT) -> tuple[dict, pd.DataFrame]:
    """-> what SAVE_runs.csv and SAVE_curves.csv say of a run; raises NoRunError.

    scripts: the folder of the script that made it.
    """
    try:
        checkpoint = torch.load(run_dir / "checkpoint.pt", map_location="cpu", weights_only=True)
        script = checkpoint["script"]
        args = checkpoint["args"]
    except Exception as error:  # torch.load raises many kinds
        raise NoRunError(f"no run, {type(error).__name__}: {str(error)[:99]}") from None
    if not (scripts / f"{Path(script).name}.py").is_file():
        raise NoRunError(f"made by {script}.py, which is not in {scripts}")

    events = EventAccumulator(str(run_dir), size_guidance={"scalars": 0})
    events.Reload()
    tags = events.Tags()["scalars"]
    if "charts/SPS" not in tags:
        raise NoRunError("has not trained yet")

    # Iterations
    iterations = events.Scalars("charts/SPS")
    steps = np.array([event.step for event in iterations])  # [I]
    times = np.array([event.wall_time for event in iterations])  # [I]
    hours = compute_hours(times, steps[0] / iterations[0].value)
    began = datetime.datetime.fromtimestamp(times[0])

    # Episodes
    episodes = events.Scalars("charts/episodic_return") if "charts/episodic_return" in tags else []
    end_steps = np.array([event.step for event in episodes])
    returns = np.array([event.value for event in episodes])
    at_steps = np.linspace(0, steps[-1], POINTS + 1)[1:]
    means = average_last_episodes(end_steps, returns, at_steps)

    run = {
        "script": f"{script}.py",
        "env_id": args["env_id"],
        "seed": args["seed"],
        "steps": int(steps[-1]),
        "total_timesteps": args["total_timesteps"],
        "hours": hours[-1],
        "run": run_dir.name,
        "command": build_command(script, args),
        "machine": machine,
        "date": began.date().isoformat(),
        "commit": find_commit(before=began.isoformat()),
        "episodes": len(episodes),
        "mean_return": means[-1],
    }
    curve = pd.DataFrame(
        {
            "step": at_steps.astype(int),
            "hours": np.interp(at_steps, steps, hours),
            "mean_return": means,
            "script": run["script"],
            "env_id": run["env_id"],
            "seed": run["seed"],
            "command": run["command"],
            "steps": run["steps"],
        }
    )
    return run, curve


def leave_out_repeated(runs: pd.DataFrame) -> pd.DataFrame:
    """-> the runs, without those that a later one repeats with the same command, seed and steps.

    Names on stderr what it leaves out.
    """
    repeated = runs.duplicated([*GROUP, "seed"], keep="last")
    for name in runs.run[repeated]:
        reason = "there is a later one with the same command and seed"
        print(f"report.py: left out, {reason}: {name}", file=sys.stderr)
    return runs[~repeated]


def find_published(script: str, env_id: str) -> pd.Series | None:
    """-> what is published of a script on an environment, or on the one it was renamed from."""
    published = pd.read_csv(ROOT / "benchmark" / "published_results.csv")
    renamed = published.note.fillna("").str.endswith(f" {env_id}")  # "trained today as Hopper-v4"
    same_env = published.env_id.eq(env_id) | renamed
    found = published[published.script.eq(script) & same_env]
    return None if found.empty else found.iloc[0]


def shorten_command(command: str) -> str:
    """-> the script and its options, without the environment's, which tables and plots name."""
    return re.sub(r"^python | --env-id \S+", "", command)


def format_result(mean: float, std: float) -> str:
    """-> both numbers, "" if they are missing."""
    return "" if np.isnan(mean) else f"{mean:.1f} ± {std:.1f}"


def format_iqm(scores: np.ndarray) -> str:
    """scores [S] -> their interquartile mean and its 95 % interval, by rliable's bootstrap."""
    np.random.seed(0)
    estimates, intervals = library.get_interval_estimates(
        {"": scores[:, None]},
        lambda x: np.array([metrics.aggregate_iqm(x)]),
        reps=2000,
    )
    iqm = estimates[""][0]
    low = intervals[""][0, 0]
    high = intervals[""][1, 0]
    return f"{iqm:.1f} [{low:.1f}, {high:.1f}]"


def make_table(runs: pd.DataFrame) -> str:
    """-> Markdown, a row for each script, environment and command."""
    lines = [
        f"| {' | '.join(COLUMNS)} |",
        "|" + "---|" * len(COLUMNS),
    ]
    for _, group in runs.groupby(GROUP, sort=False):
        cells = make_row(group)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def make_row(group: pd.DataFrame) -> list[str]:
    """Runs that differ in their seeds -> the cells of COLUMNS."""
    run = group.iloc[0]  # all have its script, environment, command and steps
    scores = group.mean_return.to_numpy()
    speeds = group.steps / group.hours / 3600

    # One seed has no standard deviation, two have no interval
    result = f"{scores[0]:.1f}"
    if len(scores) > 1:
        result = format_result(scores.mean(), scores.std())
    iqm = ""
    if len(scores) > 2:
        iqm = format_iqm(scores)

    # Beside what is published; steps that are short of the published ones are named
    steps = f"{run.steps:,}"
    seed_script = ""
    baselines = ""
    published = find_published(run.script, run.env_id)
    if published is not None:
        if run.steps < 0.99 * published.total_timesteps:
            steps = f"{run.steps:,} of {published.total_timesteps:,}"
        seed_script = format_result(published.seed_script_mean, published.seed_script_std)
        baselines = format_result(published.baselines_mean, published.baselines_std)

    return [
        shorten_command(run.command),
        run.env_id,
        result,
        iqm,
        str(len(scores)),
        steps,
        f"{group.hours.mean():.2f}",
        f"{speeds.mean():.0f}",
        seed_script,
        baselines,
    ]


def plot(curves: pd.DataFrame, over: str, path: Path) -> None:
    """Draws mean returns over the column "step" or "hours": a panel for each environment.

    A panel has a line for each script and command, the mean over seeds, and its band, one standard
    deviation.
    """
    env_ids = curves.env_id.unique()
    columns = min(3, len(env_ids))
    rows = math.ceil(len(env_ids) / columns)
    size = (4.2 * columns + 0.4, 3.2 * rows)
    figure, axes = plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)
    panels = axes.flatten()

    for i, env_id in enumerate(env_ids):
        panel = panels[i]
        for _, group in curves[curves.env_id == env_id].groupby(GROUP, sort=False):
            draw_line(panel, group, over)
        panel.set(title=env_id, xlabel=AXIS_LABELS[over], ylabel="mean return")
        panel.grid(alpha=0.3)
        panel.locator_params(axis="x", nbins=5)
        panel.legend(fontsize="small")

    for panel in panels[len(env_ids) :]:
        panel.remove()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_line(panel: plt.Axes, group: pd.DataFrame, over: str) -> None:
    """Draws curves that differ in their seeds, as far as the shortest of them goes."""
    seeds = [curve for _, curve in group.groupby("seed")]
    end = min(curve[over].iloc[-1] for curve in seeds)
    grid = np.linspace(0, end, POINTS + 1)[1:]  # [P]
    values = [np.interp(grid, curve[over], curve.mean_return) for curve in seeds]
    values = np.array(values)  # [S, P]
    mean = values.mean(0)
    std = values.std(0)

    plural = "" if len(seeds) == 1 else "s"
    name = f"{shorten_command(group.command.iloc[0])}, {len(seeds)} seed{plural}"
    name = textwrap.fill(name, 45, break_on_hyphens=False)
    (line,) = panel.plot(grid, mean, label=name)
    color = line.get_color()
    panel.fill_between(grid, mean - std, mean + std, color=color, alpha=0.2, linewidth=0)


def write_report(args: Args) -> None:
    """Writes the five files of the runs, and prints their table."""
    rows = []
    curves = []
    for run_dir in tqdm(args.run_dirs, unit=" runs", disable=None):
        try:
            run, curve = read_run(run_dir, args.machine)
        except NoRunError as error:
            print(f"left out: {run_dir}: {error}", file=sys.stderr)
            continue
        rows.append(run)
        curves.append(curve)
    if not rows:
        refuse("no run to report")

    runs = pd.DataFrame(rows).sort_values(["script", "env_id", "command", "seed", "run"])
    runs = leave_out_repeated(runs)
    curves = pd.concat([curves[i] for i in runs.index])  # in the order of the runs
    table = make_table(runs)

    args.save.parent.mkdir(parents=True, exist_ok=True)
    runs.to_csv(f"{args.save}_runs.csv", index=False, float_format="%.6g")
    curves.to_csv(f"{args.save}_curves.csv", index=False, float_format="%.6g")
    Path(f"{args.save}.md").write_text(table)
    plot(curves, "step", Path(f"{args.save}_steps.png"))
    plot(curves, "hours", Path(f"{args.save}_hours.png"))
    print(table, end="")


def make_readme_table() -> str:
    """-> the table of all measured runs."""
    paths = sorted((ROOT / "benchmark" / "results").glob("*_runs.csv"))
    runs = pd.concat([pd.read_csv(path) for path in paths])
    return make_table(runs.sort_values(GROUP, kind="stable"))


def write_readme() -> None:
    """Puts the table of all measured runs into README.md, in the place of the one there."""
    readme = ROOT / "README.md"
    text = readme.read_text()
    before = text.split(BEGIN)[0]
    after = text.split(END)[1]
    readme.write_text(f"{before}{BEGIN}{make_readme_table()}{END}{after}")


def main(args: Args) -> None:
    """Does what it is asked to; refuses to do nothing."""
    if not args.run_dirs and not args.readme:
        refuse("nothing to do: name folders of runs, or --readme")
    if args.run_dirs and args.save in (None, Path("")):
        refuse("--save: say where to write, as in --save benchmark/results/ppo")

    if args.run_dirs:
        write_report(args)
    if args.readme:
        write_readme()


if __name__ == "__main__":
    main(tyro.cli(Args))
