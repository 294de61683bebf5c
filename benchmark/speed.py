"""Steps per second of the scripts beside Stable-Baselines3's PPO and SBX, its twin in JAX.

    pip install -e ".[atari,mujoco,envpool,procgen,microrts,benchmark]" sbx-rl==0.28.0
    python benchmark/speed.py                          # ppo.py on CartPole-v1, 5 runs of each
    python benchmark/speed.py --script ppo_continuous_action --save halfcheetah.json
    python benchmark/speed.py --script ppo_atari --processes 1 2 --repeats 3
    python benchmark/speed.py --script ppo_procgen --processes 1 2 4 8 --cuda
    python benchmark/speed.py --table benchmark/results/speed_*.json

The contestants train on one machine and one environment, with the script's hyperparameters. They
take turns, each run in a process of its own, because shared machines change their speed from minute
to minute: only the ratio of medians means something. All log to TensorBoard and compute on the same
number of threads, one for MLPs; several processes share the cores. JAX chooses its threads itself:
on CartPole, SBX takes 1.2 seconds of processor time a second. Stable-Baselines3 normalises
(VecNormalize) and preprocesses (its Atari wrappers) where the script does, and so does SBX, which
only takes part on vectors, and where it is installed. The first iteration is left out of the
measurement, and with it the start of the program and the time to compile.

Engines of their own are also measured alone, with random actions, beside those of the script that
they vary: ppo_atari.py and ppo_multidiscrete.py. The environments' share of a training step is the
ratio of the two speeds, the rest is the network's.
"""

import datetime
import importlib.metadata
import importlib.util
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import common
import gymnasium as gym
import tyro
from tqdm import tqdm

# Environment steps of one run, about a minute or less
STEPS = {
    "ppo": 100_000,
    "ppo_continuous_action": 40_960,
    "ppo_atari": 8_192,
    "ppo_atari_lstm": 8_192,
    "ppo_atari_envpool": 8_192,
    "ppo_procgen": 49_152,
    "ppo_multidiscrete": 65_536,
    "ppo_multidiscrete_mask": 65_536,
}

SB3 = "stable-baselines3"
SBX = "sbx"
IN_SB3 = ("ppo", "ppo_continuous_action", "ppo_atari")
IN_SBX = ("ppo", "ppo_continuous_action")

# A script's options for speed, if it has them
OPTIONS = ("compile", "amp", "async_envs")

# The scripts whose engines are measured beside another one's, alone
BESIDE = {
    "ppo_atari_envpool": "ppo_atari",
    "ppo_multidiscrete_mask": "ppo_multidiscrete",
}
ALONE = ", environments alone"


@dataclass
class Args:
    script: Literal[tuple(STEPS)] = "ppo"
    """the script to measure"""
    env_id: str | None = None
    """environment that all train on; the script's default if not given"""
    steps: int | None = None
    """environment steps of one run"""
    repeats: int = 5
    """runs of each contestant"""
    processes: list[int] = field(default_factory=lambda: [1])
    """numbers of processes that train together (detail A2)"""
    leave_out: list[str] = field(default_factory=list)
    """options that are not measured, such as amp on a processor without bfloat16"""
    cuda: bool = False
    """train on the GPU"""
    save: Path | None = None
    """file to write the measurements to, as JSON"""
    table: list[Path] = field(default_factory=list)
    """measure nothing, and print the table of these files"""
    contestant: str | None = None
    """only run this contestant, once, and print its steps/s (the child processes use it)"""

    def __post_init__(self):
        if self.repeats < 1:
            common.refuse(f"--repeats {self.repeats}: must be at least 1")
        for name in self.leave_out:
            if name not in OPTIONS:
                common.refuse(f"--leave-out {name}: is none of {', '.join(OPTIONS)}")
        if min(self.processes, default=0) < 1:
            common.refuse(f"--processes {' '.join(map(str, self.processes))}: must be at least 1")
        names = [contestant.name for contestant in list_contestants(self)]
        if self.contestant is not None and self.contestant not in names:
            common.refuse(f"--contestant {self.contestant}: is none of {', '.join(names)}")


@dataclass(frozen=True)
class Contestant:
    """What is measured."""

    name: str
    program: str  # Stable-Baselines3, SBX or a script
    options: tuple[str, ...] = ()  # of the script
    processes: int = 1
    alone: bool = False  # the environments, with random actions


def list_contestants(args: Args) -> list[Contestant]:
    """-> all of them, the one that the others are compared with first."""
    contestants = []
    if args.script in IN_SB3:
        contestants.append(Contestant(SB3, SB3))
    if args.script in IN_SBX and importlib.util.find_spec("sbx") is not None:
        contestants.append(Contestant(SBX, SBX))

    # The script with each of its options for speed, and as fast as it can be
    fields = vars(common.load_script(common.ROOT / f"{args.script}.py").Args)
    known = [name for name in OPTIONS if name in fields and name not in args.leave_out]
    fastest = tuple(name for name in ("amp", "compile") if name in known)
    ways = [(), *((name,) for name in known), fastest]
    for num_processes in args.processes:
        if num_processes > 1:
            ways = [(), fastest]
        for names in dict.fromkeys(ways):
            contestants.append(make_contestant(args.script, names, num_processes))

    if args.script in BESIDE:
        other = BESIDE[args.script]
        contestants.append(make_contestant(other))
        for name in (other, args.script):
            contestants.append(Contestant(f"{name}.py{ALONE}", name, alone=True))
    return contestants


def make_contestant(script: str, options: tuple[str, ...] = (), processes: int = 1) -> Contestant:
    """-> a script with those options, such as "ppo.py --compile, 2 processes"."""
    words = [f"--{option.replace('_', '-')}" for option in options]
    name = " ".join([f"{script}.py", *words])
    if processes > 1:
        name += f", {processes} processes"
    return Contestant(name, script, options, processes)


def load_script(args: Args, name: str) -> tuple[ModuleType, Any]:
    """-> the script of that name, and its Args for one run."""
    script = common.load_script(common.ROOT / f"{name}.py")
    steps = STEPS[args.script] if args.steps is None else args.steps
    script_args = script.Args(total_timesteps=steps, cuda=args.cuda)

    if args.env_id is not None:
        script_args = replace(script_args, env_id=args.env_id)
    elif args.script == "ppo_atari_envpool":  # a name that both scripts know
        script_args = replace(script_args, env_id="BreakoutNoFrameskip-v4")
    return script, script_args


def check_args(args: Args) -> None:
    """Refuses what would fail when some of the runs are measured already."""
    for name in {args.script, BESIDE.get(args.script, args.script)}:
        script = common.load_script(common.ROOT / f"{name}.py")
        needed = 2 * script.Args().batch_size  # the first iteration is left out
        if args.steps is not None and args.steps < needed:
            common.refuse(
                f"--steps {args.steps}: must be at least two rollouts of {name}.py, {needed}"
            )

        _, script_args = load_script(args, name)
        script.make_envs(replace(script_args, num_envs=1, num_minibatches=1)).close()
        for number in args.processes:
            if script_args.num_envs % number != 0:
                common.refuse(f"--processes {number}: must divide {name}.py's --num-envs")
    if args.save is not None:
        common.check_writable(args.save, "--save")


def measure_script(args: Args, contestant: Contestant) -> float | None:
    """-> steps/s of a training by a script, from its TensorBoard events; None in other processes.

    Of several processes the first one has the events.
    """
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    script, script_args = load_script(args, contestant.program)
    script.main(replace(script_args, **dict.fromkeys(contestant.options, True)))
    if os.environ.get("RANK", "0") != "0":
        return None

    (run_dir,) = Path("runs").iterdir()
    events = EventAccumulator(str(run_dir), size_guidance={"scalars": 0})
    events.Reload()
    iterations = events.Scalars("charts/SPS")
    first = iterations[0]
    last = iterations[-1]
    return (last.step - first.step) / (last.wall_time - first.wall_time)


def measure_environments(args: Args, name: str) -> float:
    """-> steps/s of the environments of the script of that name, with random actions."""
    script, script_args = load_script(args, name)
    envs = script.make_envs(script_args)
    envs.reset(seed=list(range(envs.num_envs)))

    space = gym.vector.utils.batch_space(envs.single_action_space, envs.num_envs)
    space.seed(0)
    num_steps = script_args.total_timesteps // envs.num_envs
    actions = [space.sample() for _ in range(num_steps)]

    # The second time counts: Java starts slowly
    for _ in range(2):
        start_time = time.time()
        for action in actions:
            envs.step(action)
        seconds = time.time() - start_time
    return num_steps * envs.num_envs / seconds


def measure_baselines(speed_args: Args, contestant: Contestant) -> float:
    """-> steps/s of a training by Stable-Baselines3's or SBX's PPO, with the script's defaults."""
    _, args = load_script(speed_args, speed_args.script)
    import torch
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.env_util import make_atari_env, make_vec_env
    from stable_baselines3.common.vec_env import VecFrameStack, VecNormalize

    if contestant.program == SBX:
        from sbx import PPO
    else:
        from stable_baselines3 import PPO

    class Clock(BaseCallback):
        """Notes when rollouts begin, and at which step."""

        def _init_callback(self):
            self.start_times = []
            self.start_steps = []

        def _on_rollout_start(self):
            self.start_times.append(time.time())
            self.start_steps.append(self.num_timesteps)

        def _on_step(self):
            return True  # go on

    # Environments and network as the script has them
    if speed_args.script == "ppo_atari":
        policy = "CnnPolicy"
        envs = make_atari_env(args.env_id, n_envs=args.num_envs, seed=args.seed)
        envs = VecFrameStack(envs, 4)
    else:
        policy = "MlpPolicy"
        torch.set_num_threads(1)
        envs = make_vec_env(args.env_id, n_envs=args.num_envs, seed=args.seed)
    if speed_args.script == "ppo_continuous_action":
        envs = VecNormalize(envs, gamma=args.gamma)

    agent = PPO(
        policy,
        envs,
        learning_rate=lambda remaining: args.learning_rate * remaining,
        n_steps=args.num_steps,
        batch_size=args.minibatch_size,
        n_epochs=args.update_epochs,
        gamma=args.gamma,
        gae_lambda=args.gae_lambda,
        clip_range=args.clip_coef,
        # SBX has no clipping of the value
        clip_range_vf=args.clip_coef if contestant.program == SB3 else None,
        ent_coef=args.ent_coef,
        vf_coef=args.vf_coef,
        max_grad_norm=args.max_grad_norm,
        tensorboard_log="runs",
        seed=args.seed,
        device="cuda" if speed_args.cuda else "cpu",
    )
    clock = Clock()
    total_steps = args.num_iterations * args.batch_size
    agent.learn(total_steps, callback=clock)

    # From the start of the second rollout on
    seconds = time.time() - clock.start_times[1]
    return (total_steps - clock.start_steps[1]) / seconds


def measure(args: Args, contestant: Contestant) -> float | None:
    """-> steps/s of one run of that contestant, in the process that knows it."""
    if contestant.program in (SB3, SBX):
        return measure_baselines(args, contestant)
    if contestant.alone:
        return measure_environments(args, contestant.program)
    return measure_script(args, contestant)


def measure_in_child(contestant: Contestant) -> float:
    """-> steps/s of one run of that contestant, in processes and a folder of its own."""
    command = [sys.executable]
    environment = dict(os.environ)
    if contestant.processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone"]
        command += [f"--nproc-per-node={contestant.processes}"]
        threads = max(1, (os.cpu_count() or 1) // contestant.processes)
        environment["OMP_NUM_THREADS"] = str(threads)

    command += [__file__, *sys.argv[1:], "--contestant", contestant.name]
    with tempfile.TemporaryDirectory() as folder:
        child = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    if child.returncode != 0:
        sys.exit(child.stderr)
    return float(child.stdout.split()[-1])


def compute_ratio(medians: dict[str, float]) -> dict[str, float]:
    """medians: {contestant: steps/s} -> {contestant: how many times as fast as the first one}.

    Environments alone are compared with environments alone.
    """
    first = next(iter(medians))
    first_alone = next((name for name in medians if name.endswith(ALONE)), None)
    ratio = {}
    for contestant, median in medians.items():
        reference = first_alone if contestant.endswith(ALONE) else first
        ratio[contestant] = median / medians[reference]
    return ratio


def compute_shares(medians: dict[str, float]) -> dict[str, float]:
    """medians: {contestant: steps/s} -> {contestant: the environments' part of a step, 0 to 1}.

    Only of those whose environments are measured alone.
    """
    shares = {}
    for contestant, median in medians.items():
        if contestant + ALONE in medians:
            shares[contestant] = median / medians[contestant + ALONE]
    return shares


def save_record(
    args: Args,
    measured: dict[str, list[float]],
    ratio: dict[str, float],
    shares: dict[str, float],
) -> None:
    """Writes the measurements, and how they came about, into the file args.save."""
    _, script_args = load_script(args, args.script)
    versions = [f"SB3 {importlib.metadata.version('stable-baselines3')}"]
    if SBX in measured:
        versions.append(f"SBX {importlib.metadata.version('sbx-rl')}")
        versions.append(f"JAX {importlib.metadata.version('jax')}")
    steps_per_second = {}
    for name, speeds in measured.items():
        steps_per_second[name] = [round(speed) for speed in speeds]

    record = {
        "command": shlex.join(["python", "benchmark/speed.py", *sys.argv[1:]]),
        "commit": common.find_commit(),
        "date": datetime.date.today().isoformat(),
        "machine": ", ".join([common.describe_machine(), *versions]),
        "script": args.script,
        "env_id": script_args.env_id,
        "steps": script_args.total_timesteps,
        "steps_per_second": steps_per_second,
        "ratio": {name: round(value, 2) for name, value in ratio.items()},
    }
    if shares:
        record["share_of_environments"] = {name: round(part, 2) for name, part in shares.items()}
    args.save.write_text(json.dumps(record, indent=2) + "\n")


def make_table(records: list[dict]) -> str:
    """-> two Markdown tables of what save_record wrote: ways to train, and engines side by side.

    The first one has a row a script. A cell is the median of steps/s, and how many times that is
    of the reference: the faster one of Stable-Baselines3 and SBX, or the script as it is where
    neither took part. In the second one, the reference is the other script.
    """
    trainings = []
    engines = []
    for record in sorted(records, key=lambda record: list(STEPS).index(record["script"])):
        speeds = record["steps_per_second"]
        medians = {name: statistics.median(of_one) for name, of_one in speeds.items()}
        script = f"{record['script']}.py"
        reference = max(medians.get(SB3, 0), medians.get(SBX, 0)) or medians[script]

        row = {"script": script, "environment": record["env_id"]}
        for name, median in medians.items():
            is_ours = name.split(" ")[0].strip(",") == script and not name.endswith(ALONE)
            if is_ours or name in (SB3, SBX):
                way = name.removeprefix(script).strip(" ,") or "as it is"
                row[way] = f"{median:.0f} ({median / reference:.2f})"
        trainings.append(row)
        if record["script"] in BESIDE:
            engines += compare_engines(record, medians)

    # Columns in the order in which the scripts have them, several processes last
    columns = list(dict.fromkeys(name for row in trainings for name in row))
    columns.sort(key=lambda name: "processes" in name)
    table = make_rows(columns, [[row.get(name, "") for name in columns] for row in trainings])
    if engines:
        columns = ["beside the other script", "steps/s", "ratio", "share of the environments"]
        table += "\n" + make_rows(columns, engines)
    return table


def compare_engines(record: dict, medians: dict[str, float]) -> list[list[str]]:
    """-> rows of both scripts, training, and of their environments alone."""
    ours = f"{record['script']}.py"
    theirs = f"{BESIDE[record['script']]}.py"
    rows = []
    for script in (theirs, ours):
        ratio = medians[script] / medians[theirs]
        share = record["share_of_environments"][script]
        rows.append([script, f"{medians[script]:.0f}", f"{ratio:.2f}", f"{share:.0%}"])
    for script in (theirs, ours):
        speed = medians[script + ALONE]
        ratio = speed / medians[theirs + ALONE]
        rows.append([script + ALONE, f"{speed:.0f}", f"{ratio:.2f}", ""])
    return rows


def make_rows(columns: list[str], rows: list[list[str]]) -> str:
    """-> a Markdown table."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def read_record(path: Path) -> dict:
    """-> what save_record wrote; refuses what is none of it."""
    try:
        record = json.loads(path.read_text())
        record["script"], record["steps_per_second"]
    except (OSError, ValueError, KeyError) as error:
        common.refuse(f"--table {path}: {type(error).__name__}, {error}")
    return record


def main(args: Args) -> None:
    """Measures one run of one contestant, or all runs of all; or prints a table."""
    if args.table:
        print(make_table([read_record(path) for path in args.table]), end="")
        return

    contestants = list_contestants(args)
    if args.contestant is not None:
        (contestant,) = [one for one in contestants if one.name == args.contestant]
        speed = measure(args, contestant)
        if speed is not None:
            print(speed)
        return

    check_args(args)

    # All have their turn before any has its next one
    measured = {contestant.name: [] for contestant in contestants}
    progress = tqdm(contestants * args.repeats, unit=" runs")
    for contestant in progress:
        progress.set_postfix_str(contestant.name)
        measured[contestant.name].append(measure_in_child(contestant))

    medians = {name: statistics.median(speeds) for name, speeds in measured.items()}
    ratio = compute_ratio(medians)
    shares = compute_shares(medians)
    for name, speeds in measured.items():
        runs = " ".join(f"{speed:6.0f}" for speed in speeds)
        print(f"{name:42} {runs}   median {medians[name]:6.0f} steps/s, {ratio[name]:.2f} x")
    for name, share in shares.items():
        print(f"{name}: the environments take {share:.0%} of a step, the network the rest")

    if args.save is not None:
        save_record(args, measured, ratio, shares)


if __name__ == "__main__":
    main(tyro.cli(Args))
