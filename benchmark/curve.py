"""Draws the learning curve of a run: mean return of the last 100 episodes over environment steps.

    python benchmark/curve.py runs/BreakoutNoFrameskip-v4__ppo_atari__1__1790000000 --save benchmark/results/breakout

Writes SAVE.csv (step, mean return; 200 points) and SAVE.png.
"""

import csv
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import tyro
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


@dataclass
class Args:
    run_dir: Annotated[Path, tyro.conf.Positional]  # folder of the run
    save: Path  # files to write, without their suffix


def curve(run_dir: Path, window: int = 100, points: int = 200) -> list[tuple[int, float]]:
    """-> (step, mean return of the window of episodes that ends there), evenly spaced over the episodes."""
    events = EventAccumulator(str(run_dir), size_guidance={"scalars": 0}).Reload()
    if "charts/episodic_return" not in events.Tags()["scalars"]:
        print(f"curve.py: {run_dir}: no episodes to draw", file=sys.stderr)
        raise SystemExit(2)
    episodes = events.Scalars("charts/episodic_return")
    sums = np.cumsum([0.0, *(episode.value for episode in episodes)])
    ends = np.unique(np.linspace(min(window, len(episodes)), len(episodes), points).astype(int))
    return [(episodes[end - 1].step, (sums[end] - sums[max(0, end - window)]) / min(window, end)) for end in ends]


def main(args: Args) -> None:
    points = curve(args.run_dir)
    with args.save.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["step", "mean_return"])
        writer.writerows((step, f"{mean:.2f}") for step, mean in points)
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    axes.plot(*zip(*points, strict=True))
    axes.set(title=args.run_dir.name.split("__")[0], xlabel="environment steps", ylabel="mean return of 100 episodes")
    axes.grid(alpha=0.3)
    figure.savefig(args.save.with_suffix(".png"), dpi=120)


if __name__ == "__main__":
    main(tyro.cli(Args))
