"""What the few things of our own buy: each script beside copies in which the library's do the same.

    python benchmark/prices.py --commit b347619 --save benchmark/results/prices.json

Each copy is the script with one named edit; with --commit, the script as it was then is a
contestant too. All train on their default environment and take turns, each in a process of its
own, because shared machines change their speed from minute to minute: only the ratio of medians
means something. The first iteration is left out. CONTRIBUTING.md's price rule: at least 5 % of a
whole training.
"""

import datetime
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import common
import tyro
from tqdm import tqdm

# {script: {what stands in its place: (lines of the script, other lines)}}
EDITS = {
    "ppo": {
        "torch.distributions.Categorical": (
            "return Categorical(self.actor(obs))",
            "return torch.distributions.Categorical(logits=self.actor(obs), validate_args=False)",
        ),
        "two threads": ("torch.set_num_threads(1)", "torch.set_num_threads(2)"),
        "fills new tensors with NaN": (
            "fill_uninitialized_memory = False",
            "fill_uninitialized_memory = True",
        ),
    },
    "ppo_continuous_action": {
        "torch.distributions.Normal": (
            "return DiagonalGaussian(self.actor(obs), self.logstd)",
            "return torch.distributions.Independent(torch.distributions.Normal("
            "self.actor(obs), self.logstd.exp(), validate_args=False), 1, validate_args=False)",
        ),
        "np.mean and np.var": (
            "mean = rows.sum(axis=0) / n\n        delta = mean - self.mean\n\n"
            "        squares = self.var * self.count + np.square(rows - mean).sum(axis=0)",
            "mean = np.mean(rows, axis=0)\n        delta = mean - self.mean\n\n"
            "        squares = self.var * self.count + np.var(rows, axis=0) * n",
        ),
    },
    "ppo_multidiscrete": {
        "torch.distributions.Categorical": (
            "[Categorical(component) for",
            "[torch.distributions.Categorical(logits=component, validate_args=False) for",
        ),
        "two threads": ("torch.set_num_threads(1)", "torch.set_num_threads(2)"),
        "without gc.freeze": ("    gc.freeze()\n", ""),
    },
    "ppo_atari": {
        "without keep_freed_memory": ("    keep_freed_memory()\n", ""),
    },
}
# Environment steps of one run, some seconds each
STEPS = {
    "ppo": 61_440,
    "ppo_continuous_action": 20_480,
    "ppo_multidiscrete": 16_384,
    "ppo_atari": 5_120,
}

# What a child process runs: argv is folder, script, steps, compile
MEASURE = """
import importlib, sys
from pathlib import Path
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
sys.path.insert(0, sys.argv[1])
script = importlib.import_module(sys.argv[2])
compiled = sys.argv[4] == "compile"
script.main(script.Args(total_timesteps=int(sys.argv[3]), cuda=False, compile=compiled))
(run_dir,) = Path("runs").iterdir()
events = EventAccumulator(str(run_dir), size_guidance={"scalars": 0}).Reload()
first, *_, last = events.Scalars("charts/SPS")
print((last.step - first.step) / (last.wall_time - first.wall_time))
"""


@dataclass
class Args:
    scripts: list[str] = field(default_factory=lambda: list(EDITS))
    """scripts to measure"""
    repeats: int = 3
    """runs of each contestant"""
    commit: str | None = None
    """measure the scripts of this commit, too, eager and compiled"""
    save: Path | None = None
    """file to write the measurements to, as JSON"""


def write_contestants(args: Args, script: str, folder: Path) -> dict[str, tuple[Path, str]]:
    """Writes the script and its copies -> {name: (folder of the copy, "eager" or "compile")}."""
    source = (common.ROOT / f"{script}.py").read_text()
    sources = {"as it is": source}
    for name, (old, new) in EDITS[script].items():
        if source.count(old) != 1:
            common.refuse(f"{script}.py: the lines that {name!r} would replace are not in it once")
        sources[name] = source.replace(old, new)
    if args.commit is not None:
        show = ["git", "-C", str(common.ROOT), "show", f"{args.commit}:{script}.py"]
        shown = subprocess.run(show, capture_output=True, text=True)
        if shown.returncode != 0:
            common.refuse(f"--commit {args.commit}: {shown.stderr}")
        sources[args.commit] = shown.stdout

    contestants = {}
    for name, text in sources.items():
        copy = folder / str(len(contestants))
        copy.mkdir()
        (copy / f"{script}.py").write_text(text)
        contestants[name] = (copy, "eager")
    if args.commit is not None:
        for name in ("as it is", args.commit):
            contestants[f"{name}, --compile"] = (contestants[name][0], "compile")
    return contestants


def measure(script: str, copy: Path, mode: str) -> float:
    """-> steps/s of one run."""
    command = [sys.executable, "-c", MEASURE, str(copy), script, str(STEPS[script]), mode]
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    with tempfile.TemporaryDirectory() as folder:
        child = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    if child.returncode != 0:
        sys.exit(child.stderr)
    return float(child.stdout.split()[-1])


def measure_all(args: Args, script: str) -> dict[str, list[float]]:
    """-> {contestant: steps/s of each run}."""
    measured = {}
    with tempfile.TemporaryDirectory() as folder:
        contestants = write_contestants(args, script, Path(folder))
        turns = list(contestants) * args.repeats
        for name in (bar := tqdm(turns, desc=script, unit=" runs", disable=None)):
            bar.set_postfix_str(name)
            copy, mode = contestants[name]
            measured.setdefault(name, []).append(round(measure(script, copy, mode)))
    return measured


def main(args: Args) -> None:
    if not set(args.scripts) <= EDITS.keys():
        common.refuse(f"--scripts: there are {', '.join(EDITS)}")
    record = {
        "command": " ".join(["python", "benchmark/prices.py", *sys.argv[1:]]),
        "commit": common.find_commit(),
        "date": datetime.date.today().isoformat(),
        "machine": common.describe_machine(),
        "steps_per_second": {},
        "ratio": {},
    }
    for script in args.scripts:
        measured = measure_all(args, script)
        reference = statistics.median(measured["as it is"])
        record["steps_per_second"][script] = measured
        record["ratio"][script] = {}
        for name, speeds in measured.items():
            ratio = round(statistics.median(speeds) / reference, 3)
            record["ratio"][script][name] = ratio
            print(f"{script}.py, {name}: {speeds} steps/s, {ratio} x")
        if args.save is not None:
            args.save.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Args))
