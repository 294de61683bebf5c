"""Makes of runs what is published: a table beside the published numbers, learning curves, plots.

    python benchmark/report.py runs/*__ppo__* --save benchmark/results/ppo
    python benchmark/report.py --readme                            # README.md's table, from all that is in results/

Writes SAVE_runs.csv (a line for each run: its command, steps, hours, result, commit, machine and date), SAVE_curves.csv
(mean return of the last 100 episodes at 200 steps of each run), SAVE.md (the table), SAVE_steps.png and SAVE_hours.png.
Runs of one script on one environment that differ in nothing but the seed are one row of the table. Its result is the
mean return of the last 100 training episodes, as mean over seeds +- standard deviation. From three seeds on, the
interquartile mean stands beside it with its 95 % bootstrap interval (Agarwal et al., 2021, arXiv:2108.13264).
"""

import dataclasses
import datetime
import importlib
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
from basics import ROOT, commit, machine, refuse
from rliable import library, metrics
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tqdm import tqdm

WINDOW, POINTS = 100, 200  # episodes that are averaged, points of a curve
GROUP = ["script", "env_id", "command", "steps"]  # what runs have in common that are averaged
BEGIN, END = "<!-- results -->\n", "<!-- /results -->"  # around README.md's table


@dataclass
class Args:
    run_dirs: Annotated[list[Path], tyro.conf.Positional] = field(default_factory=list)  # folders of runs
    save: Path | None = None  # files to write, without their endings
    readme: bool = False  # write README.md's table, from benchmark/results/*_runs.csv
    machine: str = field(default_factory=machine)  # where the runs were trained, if not here


def command_of(script: str, args: dict) -> str:
    """-> the command that such a run begins with, without its seed."""
    sys.path.insert(0, str(ROOT))
    words = [f"python {script}.py"]
    for option in dataclasses.fields(importlib.import_module(script).Args):
        name, value = option.name.replace("_", "-"), args[option.name]
        if value != option.default and name not in ("seed", "resume", "checkpoint-interval"):
            words.append(f"--{'' if value else 'no-'}{name}" if isinstance(value, bool) else f"--{name} {value}")
    return " ".join(words)


def hours_of(times: np.ndarray, first: float) -> np.ndarray:
    """Wall times [I] of iterations' ends, seconds; seconds that the first took -> hours of training at each [I].

    A run that was interrupted and gone on with has gaps, which are no training: an iteration that seems to have taken
    more than ten times the median is counted as one that took the median.
    """
    durations = np.diff(times, prepend=times[0] - first)
    median = np.median(durations)
    return np.where(durations > 10 * median, median, durations).cumsum() / 3600


def read_run(run_dir: Path, machine: str) -> tuple[dict, pd.DataFrame]:
    """-> what SAVE_runs.csv and SAVE_curves.csv say of a run. Refuses what is none, or has not trained."""
    try:
        checkpoint = torch.load(run_dir / "checkpoint.pt", map_location="cpu", weights_only=True)
        script, args = checkpoint["script"], checkpoint["args"]
    except Exception as error:  # torch.load raises many kinds
        refuse(f"{run_dir}: no run, {type(error).__name__}: {str(error)[:99]}")
    events = EventAccumulator(str(run_dir), size_guidance={"scalars": 0}).Reload()
    tags = events.Tags()["scalars"]
    if "charts/SPS" not in tags:
        refuse(f"{run_dir}: has not trained yet")
    iterations = events.Scalars("charts/SPS")
    steps, times = np.array([(event.step, event.wall_time) for event in iterations]).T
    hours = hours_of(times, steps[0] / iterations[0].value)
    run = {"script": f"{script}.py", "env_id": args["env_id"], "seed": args["seed"], "steps": int(steps[-1])}
    run |= {"total_timesteps": args["total_timesteps"], "hours": hours[-1], "run": run_dir.name}
    run |= {"command": command_of(script, args), "machine": machine}
    began = datetime.datetime.fromtimestamp(times[0])
    run |= {"date": began.date().isoformat(), "commit": commit(before=began.isoformat())}

    episodes = events.Scalars("charts/episodic_return") if "charts/episodic_return" in tags else []
    sums = np.cumsum([0.0, *(event.value for event in episodes)])
    at = np.linspace(0, steps[-1], POINTS + 1)[1:]
    ends = np.searchsorted([event.step for event in episodes], at, side="right")  # episodes until then
    begins = np.maximum(ends - WINDOW, 0)
    with np.errstate(invalid="ignore"):
        means = (sums[ends] - sums[begins]) / (ends - begins)
    curve = pd.DataFrame({"step": at.astype(int), "hours": np.interp(at, steps, hours), "mean_return": means})
    run |= {"episodes": len(episodes), "mean_return": means[-1]}
    return run, curve.assign(**{name: run[name] for name in ("script", "env_id", "seed", "command", "steps")})


def published(row: pd.Series) -> pd.Series | None:
    """-> what is published of a script on an environment."""
    table = pd.read_csv(ROOT / "benchmark" / "published_results.csv")
    same = table.env_id.eq(row.env_id) | table.note.fillna("").str.endswith(f" {row.env_id}")
    found = table[table.script.eq(row.script) & same]
    return None if found.empty else found.iloc[0]


def label(command: str) -> str:
    """-> the script and its options, without the environment's, which tables and plots name elsewhere."""
    return re.sub(r"^python | --env-id \S+", "", command)


def plus_minus(mean: float, std: float) -> str:
    return "" if np.isnan(mean) else f"{mean:.1f} ± {std:.1f}"


def table(runs: pd.DataFrame) -> str:
    """-> Markdown, a row for each script, environment and command; steps short of the published ones are named."""
    lines = [
        "| script | environment | mean return | IQM, 95 % | seeds | steps | hours | steps/s | published | baselines |"
    ]
    lines += ["|---|---|---|---|---|---|---|---|---|---|"]
    for (_, env_id, command, steps), group in runs.groupby(GROUP, sort=False):
        scores, other = group.mean_return.to_numpy(), published(group.iloc[0])
        iqm, wanted, columns = "", "", ["", ""]
        if len(scores) > 2:
            np.random.seed(0)
            (iqm,), interval = interquartile_mean(scores)
            iqm = f"{iqm:.1f} [{interval[0, 0]:.1f}, {interval[1, 0]:.1f}]"
        if other is not None:
            wanted = f" of {other.total_timesteps:,}" if steps < 0.99 * other.total_timesteps else ""
            columns = [plus_minus(other[f"{name}_mean"], other[f"{name}_std"]) for name in ("seed_script", "baselines")]
        result = plus_minus(scores.mean(), scores.std()) if len(scores) > 1 else f"{scores[0]:.1f}"
        hours, speed = group.hours.mean(), (group.steps / group.hours / 3600).mean()
        cells = [label(command), env_id, result, iqm, len(scores), f"{steps:,}{wanted}", f"{hours:.2f}"]
        cells += [f"{speed:.0f}", *columns]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines) + "\n"


def interquartile_mean(scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """scores [seeds] -> interquartile mean [1], its 95 % interval [2, 1], by rliable's stratified bootstrap."""
    estimates, intervals = library.get_interval_estimates(
        {"": scores[:, None]}, lambda x: np.array([metrics.aggregate_iqm(x)]), reps=2000
    )
    return estimates[""], intervals[""]


def plot(curves: pd.DataFrame, over: str, path: Path) -> None:
    """One panel for each environment, a line with its band (one standard deviation over seeds) for each script."""
    env_ids = curves.env_id.unique()
    columns = min(3, len(env_ids))
    rows = -(-len(env_ids) // columns)
    size = (4.2 * columns + 0.4, 3.2 * rows)
    figure, axes = plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)
    for panel, env_id in zip(axes.flat, env_ids, strict=False):
        for (_, _, command, _), group in curves[curves.env_id == env_id].groupby(GROUP, sort=False):
            seeds = [seed for _, seed in group.groupby("seed")]
            grid = np.linspace(0, min(seed[over].iloc[-1] for seed in seeds), POINTS + 1)[1:]
            values = np.array([np.interp(grid, seed[over], seed.mean_return) for seed in seeds])
            mean, std = values.mean(0), values.std(0)
            name = f"{label(command)}, {len(seeds)} seed{'s' * (len(seeds) > 1)}"
            (line,) = panel.plot(grid, mean, label=textwrap.fill(name, 45, break_on_hyphens=False))
            panel.fill_between(grid, mean - std, mean + std, color=line.get_color(), alpha=0.2, linewidth=0)
        panel.set(title=env_id, xlabel={"step": "environment steps", "hours": "hours"}[over], ylabel="mean return")
        panel.grid(alpha=0.3)
        panel.locator_params(axis="x", nbins=5)
        panel.legend(fontsize="small")
    for panel in axes.flat[len(env_ids) :]:
        panel.remove()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def newest(runs: pd.DataFrame) -> pd.DataFrame:
    """-> the runs, without those that another one repeats with the same command, seed and steps, said on stderr."""
    again = runs.duplicated([*GROUP, "seed"], keep="last")
    for name in runs.run[again]:
        print(f"report.py: left out, there is a later one with the same command and seed: {name}", file=sys.stderr)
    return runs[~again]


def readme_table() -> str:
    """-> the table of all measured runs."""
    files = sorted((ROOT / "benchmark" / "results").glob("*_runs.csv"))
    return table(pd.concat([pd.read_csv(file) for file in files]).sort_values(GROUP, kind="stable"))


def main(args: Args) -> None:
    if args.run_dirs:
        if not args.save:
            refuse("--save: say where to write, as in --save benchmark/results/ppo")
        read = [read_run(run_dir, args.machine) for run_dir in tqdm(args.run_dirs, unit=" runs", disable=None)]
        runs = newest(
            pd.DataFrame([run for run, _ in read]).sort_values(["script", "env_id", "command", "seed", "run"])
        )
        curves = pd.concat([read[i][1] for i in runs.index])
        args.save.parent.mkdir(parents=True, exist_ok=True)
        runs.to_csv(f"{args.save}_runs.csv", index=False, float_format="%.6g")
        curves.to_csv(f"{args.save}_curves.csv", index=False, float_format="%.6g")
        Path(f"{args.save}.md").write_text(table(runs))
        for over, name in (("step", "steps"), ("hours", "hours")):
            plot(curves, over, Path(f"{args.save}_{name}.png"))
        print(table(runs), end="")
    elif not args.readme:
        refuse("nothing to do: name folders of runs, or --readme")
    if args.readme:
        text = (ROOT / "README.md").read_text()
        before, after = text.split(BEGIN)[0], text.split(END)[1]
        (ROOT / "README.md").write_text(f"{before}{BEGIN}{readme_table()}{END}{after}")


if __name__ == "__main__":
    main(tyro.cli(Args))
