"""Makes of runs what is published: a table beside the published numbers, learning curves, plots.

    python benchmark/report.py runs/*__ppo__* --save benchmark/results/ppo
    python benchmark/report.py runs/*__mine__* --script mine.py --save results/mine
    python benchmark/report.py --readme    # README.md's table, from all that is in results/
    python benchmark/report.py --redraw    # the figures and tables in results/, from its CSVs

Writes SAVE_runs.csv (a line for each run: its command, steps, hours, result, commit, machine and
date), SAVE_curves.csv (mean return of the last 100 episodes at 200 steps of each run), SAVE.md (the
table), SAVE_steps.png and SAVE_hours.png.

Runs of one script on one environment that differ in nothing but the seed, or in how they are kept
(--track, --capture-video), are one row of the table.
Its result is the mean return of the last 100 training episodes, as mean over seeds +- standard
deviation. From three seeds on, the interquartile mean stands beside it with its 95 % bootstrap
interval (Agarwal et al., 2021, arXiv:2108.13264). What evaluate.py says of the last checkpoints, in
evaluation.csv of their runs, has a column of its own.

What others published stands beside it, after the same steps where that is known: of an unfinished
run, a point of a published curve. benchmark/published_results.csv has it all, with sources.

Shapes: I = iterations of a run, S = seeds, P = POINTS of a curve.
"""

import dataclasses
import datetime
import itertools
import math
import re
import sys
import textwrap
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import matplotlib

matplotlib.use("Agg")
import common
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import tyro
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

# Steps that are so near to one another are the same
SAME_STEPS = 0.02

COLUMNS = [
    "script",
    "environment",
    "mean return",
    "IQM, 95 %",
    "evaluated",
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
    script: list[Path] = field(default_factory=list)
    """files that made some of the runs, if they are none of the eight scripts"""
    readme: bool = False
    """write README.md's table, from benchmark/results/*_runs.csv"""
    redraw: bool = False
    """make the figures and tables in benchmark/results/ anew, from its CSVs"""
    machine: str = field(default_factory=common.describe_machine)
    """where the runs were trained, if not here"""


def build_command(script: Path, args: dict, processes: int) -> str:
    """-> the command that such a run begins with, without its seed. Raises ValueError.

    Arguments that change nothing of what is trained are no part of it.
    """
    start = "python" if processes == 1 else f"torchrun --nproc-per-node {processes}"
    words = [f"{start} {script.name}"]
    for option in dataclasses.fields(common.load_script(script).Args):
        name = option.name.replace("_", "-")
        value = args[option.name]
        if value == option.default or option.name == "seed" or option.name in common.KEEPING:
            continue
        if value is True:
            words.append(f"--{name}")
        elif value is False:
            words.append(f"--no-{name}")
        else:
            words.append(f"--{name} {value}")
    return " ".join(words)


def compute_hours(steps: np.ndarray, speeds: np.ndarray, first_steps: list[int]) -> np.ndarray:
    """-> hours of training until the end of each iteration [I].

    steps: environment steps at the end of each iteration [I].
    speeds: the steps per second logged there [I]: those since the script was last started, over
        their time, so that neither pauses nor setting up are in them.
    first_steps: the step at which each start of the script began, 0 first.
    """
    hours = np.zeros(len(steps))
    before = 0.0
    for first, end in itertools.pairwise([*first_steps, np.inf]):
        sitting = (first < steps) & (steps <= end)
        hours[sitting] = before + (steps[sitting] - first) / speeds[sitting] / 3600
        before = hours.max()
    return hours


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


def read_run(
    run_dir: Path, machine: str, scripts: Path | Iterable[Path] = ()
) -> tuple[dict, pd.DataFrame]:
    """-> what SAVE_runs.csv and SAVE_curves.csv say of a run; raises NoRunError.

    scripts: files, or a folder of files, that may have made it, beside the eight scripts.
    """
    if isinstance(scripts, Path):
        scripts = scripts.glob("*.py")
    try:
        checkpoint = common.read_checkpoint(run_dir)
        script = common.find_script(checkpoint["script"], scripts)
    except ValueError as error:
        raise NoRunError(str(error)) from None
    args = checkpoint["args"]

    events = EventAccumulator(str(run_dir), size_guidance={"scalars": 0, "tensors": 0})
    events.Reload()
    tags = events.Tags()
    if "charts/SPS" not in tags["scalars"]:
        raise NoRunError("has not trained yet")
    if "charts/episodic_return" not in tags["scalars"]:
        raise NoRunError("no episode has ended yet, so there is no return to report")
    if "hyperparameters/text_summary" not in tags["tensors"]:
        raise NoRunError("has not logged its hyperparameters, which say when it was started")
    try:
        command = build_command(script, args, checkpoint.get("processes", 1))
    except (ValueError, KeyError) as error:
        raise NoRunError(f"does not fit {script}, {error}") from None

    # Iterations
    iterations = events.Scalars("charts/SPS")
    steps = np.array([event.step for event in iterations])  # [I]
    speeds = np.array([event.value for event in iterations])  # [I]
    starts = events.Tensors("hyperparameters/text_summary")  # logged by each start of the script
    hours = compute_hours(steps, speeds, [event.step for event in starts])
    began = datetime.datetime.fromtimestamp(iterations[0].wall_time)

    # Episodes
    episodes = events.Scalars("charts/episodic_return")
    end_steps = np.array([event.step for event in episodes])
    returns = np.array([event.value for event in episodes])
    at_steps = np.linspace(0, steps[-1], POINTS + 1)[1:]
    means = average_last_episodes(end_steps, returns, at_steps)

    evaluation = common.read_evaluation(run_dir, common.count_steps(checkpoint))

    run = {
        "script": script.name,
        "env_id": args["env_id"],
        "seed": args["seed"],
        "steps": int(steps[-1]),
        "total_timesteps": args["total_timesteps"],
        "hours": hours[-1],
        "run": run_dir.name,
        "command": command,
        "machine": machine,
        "date": began.date().isoformat(),
        "commit": common.find_commit(before=began.isoformat()),
        "episodes": len(episodes),
        "mean_return": means[-1],
        "evaluated_mean": np.nan if evaluation is None else evaluation["mean"],
        "evaluated_episodes": 0 if evaluation is None else evaluation.episodes,
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


def find_published(script: str, env_id: str) -> pd.DataFrame:
    """-> what is published of a script on an environment: lines of published_results.csv."""
    published = pd.read_csv(common.ROOT / "benchmark" / "published_results.csv")
    return published[published.script.eq(script) & published.env_id.eq(env_id)]


def describe_published(published: pd.DataFrame, steps: int) -> str:
    """Lines of one column -> the numbers at the end of training, and those after so many steps.

    A number after other steps than the run's tells its steps, unless the run is an unfinished one.
    """
    texts = []
    end = published.steps.max()
    for by, lines in published.groupby("by", sort=False):
        author = "" if by == "Huang et al." else f" ({by})"
        for line in lines.sort_values("steps", ascending=False).itertuples():
            text = format_result(line.mean, line.std) + author
            if line.steps == end and end < (1 - SAME_STEPS) * steps:
                texts.append(f"{text} at {line.steps:,}")
            elif line.steps == end:
                texts.append(text)
            elif abs(line.steps - steps) < SAME_STEPS * steps:
                texts.append(f"{text} at {line.steps:,} of {end:,}")
    return ", ".join(texts)


def shorten_command(command: str) -> str:
    """-> the script and its options, without the environment's, which tables and plots name."""
    return re.sub(r"^python | --env-id \S+", "", command)


def format_result(mean: float, std: float) -> str:
    """-> both numbers, or the first if there is no second."""
    if np.isnan(std):
        return f"{mean:.1f}"
    digits = 2 if 0 < std < 0.05 or 0 < abs(mean) < 1 else 1
    return f"{mean:.{digits}f} ± {std:.{digits}f}"


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
    rows = [make_row(group) for _, group in runs.groupby(GROUP, sort=False)]
    columns = list(COLUMNS)
    if not any(row["evaluated"] for row in rows):
        columns.remove("evaluated")

    lines = [
        f"| {' | '.join(columns)} |",
        "|" + "---|" * len(columns),
    ]
    for row in rows:
        cells = [row[column] for column in columns]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def make_row(group: pd.DataFrame) -> dict[str, str]:
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

    # A mean over some of the seeds would be another one's
    evaluated = ""
    if "evaluated_mean" in group and group.evaluated_mean.notna().all():
        std = group.evaluated_mean.std(ddof=0) if len(group) > 1 else np.nan
        evaluated = format_result(group.evaluated_mean.mean(), std)

    # Beside what is published; steps that are short of the published ones are named
    published = find_published(run.script, run.env_id)
    steps = f"{run.steps:,}"
    if len(published) > 0 and run.steps < 0.99 * published.steps.max():
        steps = f"{run.steps:,} of {published.steps.max():,}"

    return {
        "script": shorten_command(run.command),
        "environment": run.env_id,
        "mean return": result,
        "IQM, 95 %": iqm,
        "evaluated": evaluated,
        "seeds": str(len(scores)),
        "steps": steps,
        "hours": f"{group.hours.mean():.2f}",
        "steps/s": f"{speeds.mean():.0f}",
        "published": describe_published(published[published.column == "published"], run.steps),
        "baselines": describe_published(published[published.column == "baselines"], run.steps),
    }


def plot(curves: pd.DataFrame, over: str, path: Path) -> None:
    """Draws mean returns over the column "step" or "hours": a panel for each environment.

    A panel has a line for each script and command, with its band, and horizontal lines at what is
    published of the scripts in it; its legend stands beside it.
    """
    env_ids = curves.env_id.unique()
    columns = min(2, len(env_ids))
    rows = math.ceil(len(env_ids) / columns)
    size = (7.4 * columns, 3.2 * rows + 0.4)
    figure, axes = plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)
    panels = axes.flatten()

    for i, env_id in enumerate(env_ids):
        panel = panels[i]
        in_panel = curves[curves.env_id == env_id]
        for script, of_script in in_panel.groupby("script", sort=False):
            groups = [group for _, group in of_script.groupby(GROUP, sort=False)]
            colors = [draw_line(panel, group, over) for group in groups]
            name = f"{script}, " if in_panel.script.nunique() > 1 else ""
            draw_published(panel, find_published(script, env_id), name, over, colors[0])
        panel.set(title=env_id, xlabel=AXIS_LABELS[over], ylabel="mean return")
        panel.grid(alpha=0.3)
        panel.locator_params(axis="x", nbins=5)
        panel.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1.02, 1), frameon=False)

    for panel in panels[len(env_ids) :]:
        panel.remove()
    explanation = "line: mean over seeds of the mean return of the last 100 training episodes"
    if curves.groupby(GROUP).seed.nunique().max() > 1:
        explanation += "\nband: one standard deviation, but not beyond the lowest and highest seed"
    figure.supxlabel(explanation, fontsize="small")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_line(panel: plt.Axes, group: pd.DataFrame, over: str) -> str:
    """Draws curves that differ in their seeds, as far as the shortest of them goes -> the colour.

    The band ends at the lowest and at the highest seed, because a mean less a standard deviation
    may be what no agent can get.
    """
    seeds = [curve for _, curve in group.groupby("seed")]
    end = min(curve[over].iloc[-1] for curve in seeds)
    grid = np.linspace(0, end, POINTS + 1)[1:]  # [P]
    values = [np.interp(grid, curve[over], curve.mean_return) for curve in seeds]
    values = np.array(values)  # [S, P]
    mean = values.mean(0)
    std = values.std(0)
    low = np.maximum(mean - std, values.min(0))
    high = np.minimum(mean + std, values.max(0))

    plural = "" if len(seeds) == 1 else "s"
    name = f"{shorten_command(group.command.iloc[0])}, {len(seeds)} seed{plural}"
    (line,) = panel.plot(grid, mean, label=fold(name))
    color = matplotlib.colors.to_hex(line.get_color())
    if len(seeds) > 1:
        panel.fill_between(grid, low, high, color=color, alpha=0.2, linewidth=0)
    return color


def draw_published(
    panel: plt.Axes, published: pd.DataFrame, script: str, over: str, color: str
) -> None:
    """Draws what is published of a script: lines at the ends of training, and points of curves.

    script: how names in the legend begin.
    """
    for column, style in (("published", "--"), ("baselines", ":")):
        lines = published[published.column == column]
        if lines.empty:
            continue
        first = lines[lines.by == lines.by.iloc[0]]  # of several sources
        end = first.loc[first.steps.idxmax()]
        name = fold(f"{script}{column}: {end['mean']:,.4g} at {end.steps:,}")
        panel.axhline(end["mean"], color=color, linestyle=style, linewidth=1.2, label=name)

        # Points within what was trained
        points = lines[lines.steps <= (1 + SAME_STEPS) * panel.dataLim.x1]
        points = points[points.steps < lines.steps.max()]
        if over == "step" and len(points) > 0:
            name = fold(f"{script}{column}: on the way ({points.by.iloc[0]})")
            panel.plot(points.steps, points["mean"], "x", color=color, label=name)


def fold(name: str) -> str:
    """-> a name of the legend, in lines that are not too long."""
    return textwrap.fill(name, 38, break_on_hyphens=False)


def write_report(args: Args) -> None:
    """Writes the five files of the runs, and prints their table."""
    rows = []
    curves = []
    for run_dir in tqdm(args.run_dirs, unit=" runs", disable=None):
        try:
            run, curve = read_run(run_dir, args.machine, args.script)
        except NoRunError as error:
            print(f"left out: {run_dir}: {error}", file=sys.stderr)
            continue
        rows.append(run)
        curves.append(curve)
    if not rows:
        common.refuse("no run to report")

    runs = pd.DataFrame(rows).sort_values(["script", "env_id", "command", "seed", "run"])
    runs = leave_out_repeated(runs)
    curves = pd.concat([curves[i] for i in runs.index])  # in the order of the runs
    table = make_table(runs)

    runs.to_csv(f"{args.save}_runs.csv", index=False, float_format="%.6g")
    curves.to_csv(f"{args.save}_curves.csv", index=False, float_format="%.6g")
    Path(f"{args.save}.md").write_text(table)
    plot(curves, "step", Path(f"{args.save}_steps.png"))
    plot(curves, "hours", Path(f"{args.save}_hours.png"))
    print(table, end="")


def make_readme_table() -> str:
    """-> the table of all measured runs."""
    paths = sorted((common.ROOT / "benchmark" / "results").glob("*_runs.csv"))
    runs = pd.concat([pd.read_csv(path) for path in paths], ignore_index=True)

    # A run may stand in several figures, and a later one with the same seed takes its place
    began = runs.run.str.rsplit("__", n=1).str[-1].astype(int)
    runs = runs.loc[began.sort_values(kind="stable").index]
    runs = runs.drop_duplicates([*GROUP, "seed"], keep="last")
    return make_table(runs.sort_values(GROUP, kind="stable"))


def write_readme() -> None:
    """Puts the table of all measured runs into README.md, in the place of the one there."""
    readme = common.ROOT / "README.md"
    text = readme.read_text()
    before = text.split(BEGIN)[0]
    after = text.split(END)[1]
    readme.write_text(f"{before}{BEGIN}{make_readme_table()}{END}{after}")


def redraw() -> None:
    """Makes the figures and tables of all measured runs anew."""
    for path in sorted((common.ROOT / "benchmark" / "results").glob("*_curves.csv")):
        save = str(path).removesuffix("_curves.csv")
        curves = pd.read_csv(path)
        plot(curves, "step", Path(f"{save}_steps.png"))
        plot(curves, "hours", Path(f"{save}_hours.png"))
        Path(f"{save}.md").write_text(make_table(pd.read_csv(f"{save}_runs.csv")))


def main(args: Args) -> None:
    """Does what it is asked to; refuses to do nothing."""
    if not args.run_dirs and not args.readme and not args.redraw:
        common.refuse("nothing to do: name folders of runs, --readme or --redraw")
    if args.save is not None:
        common.check_save(args.save)
    if args.run_dirs and args.save is None:
        common.refuse("--save: say where to write, as in --save benchmark/results/ppo")
    if args.save is not None and not args.run_dirs:
        common.refuse(f"--save {args.save}: there are no runs to write about; name their folders")

    if args.run_dirs:
        write_report(args)
    if args.redraw:
        redraw()
    if args.readme:
        write_readme()


if __name__ == "__main__":
    main(tyro.cli(Args))
