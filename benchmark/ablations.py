"""Measures what each detail is worth: takes it out of a script that works, and trains.

    python benchmark/ablations.py --list        # the variants, and how each is made
    python benchmark/ablations.py --workers 2   # trains them all; started again, goes on
    python benchmark/ablations.py --slurm       # submits them to a Slurm cluster, and ends
    python benchmark/ablations.py --domain mujoco --variants 9 28-no-observation-normalisation
    python benchmark/ablations.py --report      # writes what is finished so far
    python benchmark/ablations.py --details     # writes docs/details.md's tables and overviews

A variant is a copy of a script, runs/ablations/SCRIPT__VARIANT.py, in which some lines are edited
or which gets other flags. Its runs are trained, stopped and gone on with as those of run.py. The
queue goes seed by seed over all variants, the full recipe first: one that is cut off has all
variants, with fewer seeds. A run that has its line in ablations.csv is not trained again, be its
folder at hand or not.

Writes into --save: ablations.csv, a line for each finished run, and two figures: of the return at
the end, ablations_DOMAIN.png, and of its mean over the training, ablations_DOMAIN_throughout.png.
Their names have the environments in place of the domain where --env-ids names them. A run that
ended early because its weights became NaN or infinite counts with its last return; the column
`note` says so. What --details draws of all domains is ablations_overview.png, and
ablations_overview_throughout.png. Columns of ablations.csv: mean_return is that of the last 100
episodes, auc its mean over the whole training, first_return its first value, env_id the name that
was asked for, also where EnvPool has another.

The worth of a detail is the change of the interquartile mean (IQM) over seeds against the full
recipe of the same script. The unit is what the full recipe gained from its first_return to its
IQM, so that -100 % is to have learned nothing; returns themselves are no unit where they can be
negative. A change is that of one environment, or the mean over several; its 95 % interval comes
from a bootstrap that draws seeds anew in each environment, with the unit held fixed.

Shapes: S = seeds.
"""

import functools
import re
import signal
import sys
import textwrap
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import matplotlib

matplotlib.use("Agg")
import common
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import tyro
from matplotlib.colors import to_rgba
from report import NoRunError, read_run
from run import RUNS, Cluster, Job, Queue, check, submit
from scipy import stats
from tqdm import tqdm

COPIES = RUNS / "ablations"
BOOTSTRAPS = 2000
MIN_SEEDS = 5  # of fewer, an interval would be too narrow
SMALL = 0.1  # an interval within this of zero rules out that a detail matters much

# What tells one run from another in ablations.csv; of two that are equal in it, the later counts
KEY = ["domain", "script", "detail", "variant", "env_id", "seed", "total_timesteps"]

# Columns of compute_changes beside those of the environments
NOT_ENV_IDS = ["script", "label", "seeds", "change", "low", "high"]

# Between them stand the tables of docs/details.md
BEGIN = "<!-- effects -->\n"
END = "<!-- /effects -->"


@dataclass
class Variant:
    """A script without one detail, or with another one in its place."""

    script: str
    """whose full recipe it is compared with"""
    detail: str
    name: str
    flags: str = ""
    edits: list[tuple[str, str]] = field(default_factory=list)
    """lines that are in the script once, and what takes their place"""
    source: str | None = None
    """the script that is copied, if it is another one"""

    @property
    def slug(self) -> str:
        """What it is called on the command line and in names of files."""
        return f"{self.detail} {self.name}".replace(" ", "-")

    @property
    def copy(self) -> Path:
        return COPIES / f"{Path(self.script).stem}__{self.slug}.py"


@dataclass
class Domain:
    """Variants that are trained on the same environments."""

    variants: list[Variant]
    env_ids: list[str]
    total_timesteps: int
    num_seeds: int
    flags: str = ""
    """of every run, the full recipe's as well"""


# Details that cannot be taken out: {number: why}
DEFINITIONS = {
    "12": "debug variables are logged, nothing is trained on them",
    "23": "a normal distribution is the policy; another one is another policy",
    "25": "independent components are what makes a probability of several numbers",
    "33": "a state has to start somewhere, once in a training",
    "35": "an LSTM cannot be trained on steps that are out of order",
    "37": "independent components are what makes a probability of several choices",
}


def recipe(script: str) -> Variant:
    """A script as it is, which its variants are compared with."""
    return Variant(script, "full", "recipe")


def one_environment(script: str, rollout: int) -> Variant:
    """As many samples in a rollout, all of one environment."""
    flags = f"--num-envs 1 --num-steps {rollout}"
    return Variant(script, "1", "one environment", flags)


def general(
    script: str, head: str = "", samples: str = "share.batch_size", valid: str = ""
) -> list[Variant]:
    """Variants of what is the same in every script.

    head: index of the last layer of actor and critic; samples: how many a rollout has; valid: index
    of those that are experience.
    """
    variant = functools.partial(Variant, script)

    orthogonal = """\
        for layer in self.modules():
            if isinstance(layer, nn.Linear | nn.Conv2d):
                nn.init.orthogonal_(layer.weight, 2**0.5)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
"""
    orthogonal_heads = f"""\
        nn.init.orthogonal_(self.actor{head}.weight, 0.01)
        nn.init.orthogonal_(self.critic{head}.weight, 1.0)
"""
    step = """\
    optimizer.step()
    return stats
"""
    step_as_in_tensorflow = """\
    # TensorFlow's Adam adds its epsilon before the bias correction.
    state = optimizer.state[next(agent.parameters())]
    steps = float(state["step"]) + 1 if state else 1  # with this one
    for group in optimizer.param_groups:
        group["eps"] = 1e-5 / (1 - 0.999**steps) ** 0.5
    optimizer.step()
    return stats
"""
    shuffled = f"torch.randperm({samples}, device=device)"
    drawn = f"torch.randint({samples}, ({samples},), device=device)"

    copied = """\
        buffer["advantages"].copy_(torch.from_numpy(advantages))
"""
    normalised = f"""\
        std, mean = advantages{valid}.std(), advantages{valid}.mean()
        advantages = (advantages - mean) / (std + 1e-8)
        buffer["advantages"].copy_(torch.from_numpy(advantages))
"""
    clipped = """\
    pg_loss2 = -advantages * ratio.clamp(1 - args.clip_coef, 1 + args.clip_coef)
    pg_loss = torch.max(pg_loss1, pg_loss2)  # [M]
"""
    unclipped = """\
    pg_loss = pg_loss1  # [M]
"""

    return [
        variant("2", "initialisation of PyTorch", "", [(orthogonal, ""), (orthogonal_heads, "")]),
        variant("3", "epsilon 1e-8", "", [("eps=1e-5", "eps=1e-8")]),
        variant("3", "epsilon as in TensorFlow", "", [(step, step_as_in_tensorflow)]),
        variant("4", "constant learning rate", "--no-anneal-lr"),
        variant("5", "lambda 1", "--gae-lambda 1"),
        variant("5", "lambda 0", "--gae-lambda 0"),
        variant("6", "one minibatch", "--num-minibatches 1"),
        variant("6", "samples drawn with replacement", "", [(shuffled, drawn)]),
        variant("7", "no advantage normalisation", "--no-norm-adv"),
        variant("7", "normalised over the rollout", "--no-norm-adv", [(copied, normalised)]),
        variant("8", "no clipping of the ratio", "", [(clipped, unclipped)]),
        variant("9", "no value clipping", "--no-clip-vloss"),
        variant("11", "no gradient clipping", "--max-grad-norm 1e9"),
        variant("A1", "clip range annealed", "--anneal-clip"),
        variant("A3", "early stopping on KL", "--target-kl 0.01"),
    ]


def no_entropy_bonus(script: str) -> Variant:
    return Variant(script, "10", "no entropy bonus", "--ent-coef 0")


def bootstrapped(script: str) -> Variant:
    return Variant(script, "time limits", "bootstrapped", "--bootstrap-truncated")


def half_precision_planes() -> Variant:
    """The convolutional network of MicroRTS in bfloat16, as --amp has it in other scripts."""
    network = """\
        hidden = self.network(obs.float().movedim(-1, 1))  # planes first
"""
    network_in_half_precision = """\
        with torch.autocast(obs.device.type, torch.bfloat16):
            hidden = self.network(obs.float().movedim(-1, 1))  # planes first
        hidden = hidden.float()
"""
    edits = [(network, network_in_half_precision)]
    return Variant("ppo_multidiscrete_mask.py", "half precision", "bfloat16", "", edits)


def two_networks(script: str, shared_trunk_detail: str) -> list[Variant]:
    """Variants of a script whose policy and value have a network each, the general ones too."""
    clip = """\
    stats["grad_norm"] = nn.utils.clip_grad_norm_(agent.parameters(), args.max_grad_norm)
"""
    clip_each = """\
    policy = [p for name, p in agent.named_parameters() if not name.startswith("critic")]
    stats["grad_norm"] = nn.utils.clip_grad_norm_(policy, args.max_grad_norm)
    nn.utils.clip_grad_norm_(agent.critic.parameters(), args.max_grad_norm)
"""
    critic = """\
        self.critic = make_mlp(observation_space.shape[0], 1)
"""
    # Computed twice, as the numbers are the same
    critic_on_actor = """\
        self.critic = nn.Sequential(*self.actor[:-1], nn.Linear(64, 1))
"""
    return [
        *general(script, head="[-1]"),
        Variant(script, "11", "each network clipped by itself", "", [(clip, clip_each)]),
        Variant(script, shared_trunk_detail, "shared trunk", "", [(critic, critic_on_actor)]),
        bootstrapped(script),
    ]


def make_mujoco() -> list[Variant]:
    """Variants of details 24 and 27 to 31."""
    variant = functools.partial(Variant, "ppo_continuous_action.py")

    # A head of twice the width; sums over the numbers of an action, sample by sample
    dependent = [
        (
            "self.actor = make_mlp(observation_space.shape[0], action_space.shape[0])",
            "self.actor = make_mlp(observation_space.shape[0], 2 * action_space.shape[0])",
        ),
        ("        self.logstd = nn.Parameter(torch.zeros(action_space.shape[0]))\n", ""),
        (
            "        return DiagonalGaussian(self.actor(obs), self.logstd), ",
            "        mean, logstd = self.actor(obs).chunk(2, -1)\n"
            "        return DiagonalGaussian(mean, logstd), ",
        ),
        ("- log_normalizer.sum()", "- log_normalizer.sum(-1)"),
        ("2 * math.pi * math.e)).sum()", "2 * math.pi * math.e)).sum(-1)"),
    ]

    # The three tasks' bounds; the probability is still that of what was drawn
    stored = 'buffer["actions"][t] = action'
    stored_clipped = 'buffer["actions"][t] = action.clamp(-1, 1)'

    scale_obs = (
        "        obs = (obs - self.obs_statistics.mean) / np.sqrt(self.obs_statistics.var + 1e-8)\n"
    )
    scale_rewards = "        rewards = rewards / np.sqrt(self.return_statistics.var + 1e-8)\n"
    no_scaled_obs = (scale_obs, "")
    no_clipped_obs = ("return obs.clip(-10, 10)", "return obs")
    no_scaled_rewards = (scale_rewards, "")
    no_clipped_rewards = ("        rewards = rewards.clip(-10, 10)\n", "")
    none = [no_scaled_obs, no_clipped_obs, no_scaled_rewards, no_clipped_rewards]

    return [
        variant("24", "deviation depends on the state", "", dependent),
        variant("27", "clipped actions stored", "", [(stored, stored_clipped)]),
        variant("28", "no observation normalisation", "", [no_scaled_obs]),
        variant("29", "no observation clipping", "", [no_clipped_obs]),
        variant("30", "no reward scaling", "", [no_scaled_rewards]),
        variant("31", "no reward clipping", "", [no_clipped_rewards]),
        variant("28-31", "none of the four", "", none),
    ]


def make_atari() -> list[Variant]:
    """Variants of details 14 to 22, of which the engine can do some and the wrappers the others."""
    wrappers = functools.partial(Variant, "ppo_atari.py")
    engine = functools.partial(Variant, "ppo_atari_envpool.py")

    maximum = "screen = np.maximum(self.screens[0], self.screens[1])"
    separate = [
        ("import contextlib\n", "import contextlib\nimport copy\n"),
        (
            "        self.critic = nn.Linear(512, 1)\n",
            "        self.critic = nn.Linear(512, 1)\n"
            "        self.critic_network = copy.deepcopy(self.network)\n",
        ),
        ("self.critic(hidden).squeeze(-1)", "self.critic(self.critic_network(images)).squeeze(-1)"),
    ]
    one_frame = [
        ("stack_num=4", "stack_num=1"),
        ("envpool.make_spec(args.env_id)", "envpool.make_spec(args.env_id, stack_num=1)"),
    ]
    scale = "        images /= 255  # a copy, so that not the rollout itself is scaled\n"

    return [
        wrappers("14", "no no-ops", "", [("    env = NoopReset(env)\n", "")]),
        wrappers("15", "no maximum over frames", "", [(maximum, "screen = self.screens[1]")]),
        engine("16", "whole games", "", [("episodic_life=True", "episodic_life=False")]),
        engine("17", "no FIRE", "", [("use_fire_reset=True", "use_fire_reset=False")]),
        wrappers("18", "nearest pixel", "", [("cv2.INTER_AREA", "cv2.INTER_NEAREST")]),
        engine("19", "raw rewards", "", [("reward_clip=True", "reward_clip=False")]),
        engine("20", "one frame", "", one_frame),
        engine("21", "separate networks", "", separate),
        engine("22", "images not scaled", "", [(scale, "")]),
    ]


def make_lstm() -> list[Variant]:
    """Variants of details 32, 34 and 36."""
    variant = functools.partial(Variant, "ppo_atari_lstm.py")

    orthogonal = """\
        for name, parameter in self.lstm.named_parameters():
            if "weight" in name:
                nn.init.orthogonal_(parameter, 1.0)
            else:
                nn.init.zeros_(parameter)
"""
    reset = "            state = state * going_on[start]\n"
    state = 'mb["lstm_state"] = first_state[:, index]'
    zeros = 'mb["lstm_state"] = torch.zeros_like(first_state[:, index])'

    return [
        variant("32", "LSTM initialisation of PyTorch", "", [(orthogonal, "")]),
        variant("34", "LSTM states not reset", "", [(reset, "")]),
        variant("36", "LSTM states zero in training", "", [(state, zeros)]),
    ]


PPO = "ppo.py"
MUJOCO = "ppo_continuous_action.py"
MASK = "ppo_multidiscrete_mask.py"
ENVPOOL = "ppo_atari_envpool.py"

DOMAINS = {
    "classic": Domain(
        [
            recipe(PPO),
            one_environment(PPO, 512),
            no_entropy_bonus(PPO),
            *two_networks(PPO, shared_trunk_detail="13"),
        ],
        ["CartPole-v1", "Acrobot-v1", "LunarLander-v3"],
        total_timesteps=500_000,
        num_seeds=10,
    ),
    # The recipe itself has one environment and no entropy bonus
    "mujoco": Domain(
        [
            recipe(MUJOCO),
            *make_mujoco(),
            *two_networks(MUJOCO, shared_trunk_detail="26"),
        ],
        ["HalfCheetah-v4", "Hopper-v4", "Walker2d-v4"],
        total_timesteps=500_000,
        num_seeds=5,
    ),
    "microrts": Domain(
        [
            recipe(MASK),
            Variant(MASK, "A4", "no mask", source="ppo_multidiscrete.py"),
            one_environment(MASK, 1024),
            *general(MASK),
            no_entropy_bonus(MASK),
            bootstrapped(MASK),
            half_precision_planes(),
        ],
        ["MicrortsMining-v1", "MicrortsProduceCombatUnitsShapedReward-v1"],
        total_timesteps=500_000,
        num_seeds=5,
    ),
    # In bfloat16, which is faster: by how much on one machine is in README.md's table of speeds
    "atari": Domain(
        [
            recipe(ENVPOOL),
            recipe("ppo_atari.py"),
            recipe("ppo_atari_lstm.py"),
            *make_atari(),
            *make_lstm(),
            one_environment(ENVPOOL, 1024),
            *general(ENVPOOL, samples="len(samples)", valid="[valid]"),
            no_entropy_bonus(ENVPOOL),
            Variant(ENVPOOL, "half precision", "float32", "--no-amp"),
        ],
        ["BreakoutNoFrameskip-v4"],
        total_timesteps=1_000_000,
        num_seeds=1,
        flags="--amp",
    ),
}


@dataclass
class Args:
    domain: Literal["classic", "mujoco", "microrts", "atari"] = "classic"
    """which scripts, environments, steps and seeds"""
    env_ids: list[str] | None = None
    """environments, if not the domain's"""
    variants: list[str] | None = None
    """variants or numbers of details, if not all; the full recipe is always trained"""
    num_seeds: int | None = None
    """runs of a variant on each environment, if not as many as the domain has"""
    total_timesteps: int | None = None
    """environment steps of each run, if not the domain's"""
    workers: int | None = None
    """runs at a time; if not given, one, or on Slurm all"""
    threads: int = 1
    """threads of each run"""
    save: Path = common.ROOT / "benchmark" / "results"
    """folder of ablations.csv and the figures"""
    machine: str = field(default_factory=common.describe_machine)
    """where the runs were trained, if not here"""
    report: bool = False
    """train nothing, write the files of what is finished"""
    details: bool = False
    """train nothing, write the tables of docs/details.md"""
    list: bool = False
    """train nothing, print the variants"""
    cluster: tyro.conf.OmitArgPrefixes[Cluster] = field(default_factory=lambda: Cluster(cpus=1))
    """what a run asks of a Slurm cluster"""

    def __post_init__(self):
        domain = DOMAINS[self.domain]
        self.env_ids = self.env_ids or domain.env_ids
        if self.num_seeds is None:
            self.num_seeds = domain.num_seeds
        if self.total_timesteps is None:
            self.total_timesteps = domain.total_timesteps

        check(self, "num_seeds")
        check(self, "threads")
        self.cluster.cpus = max(self.cluster.cpus, self.threads)
        if self.workers is not None:
            check(self, "workers")


def choose_variants(args: Args) -> list[Variant]:
    """-> what is asked for, after the full recipes it is compared with; refuses what there is not.

    A word of --variants is a variant's slug, or the number of a detail.
    """
    variants = DOMAINS[args.domain].variants
    if args.variants is None:
        return variants

    for word in args.variants:
        if not any(word in (variant.slug, variant.detail) for variant in variants):
            common.refuse(f"--variants {word}: is none of {', '.join(v.slug for v in variants)}")
    named = [v for v in variants if {v.slug, v.detail} & {*args.variants}]
    scripts = {variant.script for variant in named}
    recipes = [v for v in variants if v.detail == "full" and v.script in scripts]
    return recipes + [variant for variant in named if variant not in recipes]


def edit(variant: Variant) -> str:
    """-> the source of its copy; refuses an edit whose lines are not in the script, or twice."""
    script = variant.source or variant.script
    source = (common.ROOT / script).read_text()
    for old, new in variant.edits:
        count = source.count(old)
        if count != 1:
            common.refuse(
                f"{variant.slug}: {script} has these lines {count} times, not once: {old}"
            )
        source = source.replace(old, new)
    return source


def write_copy(variant: Variant) -> None:
    """Writes the script that is trained; one that is as it should be is not touched."""
    source = edit(variant)
    COPIES.mkdir(parents=True, exist_ok=True)
    if not variant.copy.exists() or variant.copy.read_text() != source:
        variant.copy.write_text(source)


def make_jobs(variants: list[Variant], args: Args) -> list[tuple[Variant, Job]]:
    """-> all runs, seed by seed."""
    flags_of_all = DOMAINS[args.domain].flags.split()
    jobs = []
    for seed in range(1, args.num_seeds + 1):
        for variant in variants:
            for env_id in args.env_ids:
                command = [sys.executable, str(variant.copy), *flags_of_all]
                command += variant.flags.split()
                command += ["--env-id", env_id, "--seed", str(seed)]
                command += ["--total-timesteps", str(args.total_timesteps)]
                jobs.append((variant, Job(command, args.threads)))
    return jobs


def get_env_id(job: Job) -> str:
    """-> the environment as it was asked for; EnvPool's script calls a game by another name."""
    return job.command[job.command.index("--env-id") + 1]


def find_result(job: Job) -> tuple[Path | None, str]:
    """-> the run if it has come to an end, and a note if it was an early one."""
    run_dir, finished = job.find_run()
    if finished:
        return run_dir, ""
    if run_dir is None or not job.log.exists():
        return None, ""
    if "became NaN or infinite" in job.read_log(1):
        return run_dir, "became NaN or infinite"
    return None, ""


def read_lines(args: Args) -> pd.DataFrame | None:
    """-> the lines of ablations.csv, None if there is no such file."""
    path = args.save / "ablations.csv"
    return pd.read_csv(path, dtype={"detail": str}) if path.exists() else None


def leave_out_reported(jobs: list[tuple[Variant, Job]], args: Args) -> list[tuple[Variant, Job]]:
    """-> the jobs of which ablations.csv has no line, be their runs on this machine or not."""
    lines = read_lines(args)
    if lines is None:
        return jobs
    columns = ["script", "detail", "variant", "env_id", "seed", "total_timesteps"]
    reported = set(lines[columns].itertuples(index=False, name=None))

    rest = []
    for variant, job in jobs:
        run = (get_env_id(job), job.args["seed"], job.args["total_timesteps"])
        if (variant.script, variant.detail, variant.name, *run) not in reported:
            rest.append((variant, job))
    return rest


def find_unfinished(jobs: list[tuple[Variant, Job]], args: Args) -> list[Job]:
    """-> the jobs that are neither finished nor in ablations.csv."""
    unreported = leave_out_reported(jobs, args)
    return [job for _, job in unreported if find_result(job)[0] is None]


def train(jobs: list[Job], workers: int) -> int:
    """Trains them, so many at a time -> the exit code."""
    # A SIGTERM stops all as Ctrl-C does
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        failed = Queue(jobs, workers).run()
    except KeyboardInterrupt:
        print("stopped; started again, it goes on", file=sys.stderr)
        return 130
    return 1 if failed > 0 else 0


def collect(jobs: list[tuple[Variant, Job]], args: Args) -> pd.DataFrame:
    """Adds finished runs to ablations.csv -> all its lines. What is in it is not read again."""
    reported = read_lines(args)
    tables = [] if reported is None else [reported]
    known = [] if reported is None else reported.run.tolist()

    rows = []
    for variant, job in tqdm(jobs, unit=" runs", disable=None):
        run_dir, note = find_result(job)
        if run_dir is None or run_dir.name in known:
            continue
        try:
            run, curve = read_run(run_dir, args.machine, COPIES)
        except NoRunError as error:
            print(f"left out: {run_dir}: {error}", file=sys.stderr)
            continue
        returns = curve.mean_return.dropna()  # none until an episode has ended
        row = {
            "domain": args.domain,
            "script": variant.script,
            "env_id": get_env_id(job),
            "detail": variant.detail,
            "variant": variant.name,
            "seed": run["seed"],
            "steps": run["steps"],
            "total_timesteps": run["total_timesteps"],
            "mean_return": run["mean_return"],
            "auc": returns.mean(),
            "first_return": returns.iloc[0] if len(returns) > 0 else np.nan,
            "note": note,
            "run": run["run"],
            "command": run["command"].replace("python ", f"python {COPIES}/", 1),
            "commit": run["commit"],
            "machine": run["machine"],
            "date": run["date"],
        }
        rows.append(row)

    if rows:
        tables.append(pd.DataFrame(rows))
    if not tables:
        common.refuse("nothing to report: no run is finished")

    lines = pd.concat(tables).drop_duplicates(KEY, keep="last").sort_values(KEY, kind="stable")
    args.save.mkdir(parents=True, exist_ok=True)
    lines.to_csv(args.save / "ablations.csv", index=False, float_format="%.6g")
    return lines


def compute_iqm(scores: np.ndarray, axis: int = -1) -> np.ndarray:
    """Interquartile mean over the axis of seeds."""
    return stats.trim_mean(scores, 0.25, axis=axis)


def has_learned(runs: pd.DataFrame) -> bool:
    """Whether these runs, if there are any, gain something in their training."""
    return len(runs) > 0 and compute_iqm(runs.mean_return) > runs.first_return.mean()


def compute_change(full: pd.DataFrame, variant: pd.DataFrame) -> dict | None:
    """Lines of the full recipe and of a variant -> the change, with its interval and its parts.

    All seeds of the full recipe count, be they more than the variant's: the more, the better its
    mean is known. The interval is NaN if an environment has too few seeds; None if one has not been
    trained.
    """
    changes = {}
    samples = []  # for each environment, returns of the full recipe and of the variant
    gains = []
    for env_id, rows in full.groupby("env_id"):
        of_variant = variant[variant.env_id == env_id]
        if of_variant.empty:
            return None
        ours = rows.mean_return.to_numpy()
        others = of_variant.mean_return.to_numpy()
        gain = compute_iqm(ours) - rows.first_return.mean()
        changes[env_id] = (compute_iqm(others) - compute_iqm(ours)) / gain
        samples += [ours, others]
        gains.append(gain)

    def compute_mean_change(*samples: np.ndarray, axis: int) -> np.ndarray:
        parts = []
        for ours, others, gain in zip(samples[::2], samples[1::2], gains, strict=True):
            parts.append((compute_iqm(others, axis) - compute_iqm(ours, axis)) / gain)
        return np.mean(parts, axis=0)

    low, high = np.nan, np.nan
    num_seeds = min(map(len, samples))
    if num_seeds >= MIN_SEEDS:
        result = stats.bootstrap(
            samples,
            compute_mean_change,
            n_resamples=BOOTSTRAPS,
            method="percentile",
            rng=0,
        )
        low, high = result.confidence_interval
    change = {"seeds": num_seeds, "change": np.mean(list(changes.values()))}
    return change | {"low": low, "high": high} | changes


def compute_changes(lines: pd.DataFrame) -> pd.DataFrame:
    """Lines of one domain -> a row for each variant: script, change, low, high, each environment.

    The greatest change first. Says on stderr what it leaves out: environments on which a full
    recipe has learned nothing, and variants that are not trained on all environments.
    """
    lines = lines.dropna(subset=["mean_return"])
    rows = []
    for script, of_script in lines.groupby("script"):
        full = of_script[of_script.detail == "full"]
        for env_id, runs in full.groupby("env_id"):
            if not has_learned(runs):
                print(f"{script}: has learned nothing on {env_id}, left out", file=sys.stderr)
                full = full[full.env_id != env_id]

        others = of_script[of_script.detail != "full"]
        for (detail, name), runs in others.groupby(["detail", "variant"]):
            change = compute_change(full, runs) if len(full) > 0 else None
            if change is None:
                print(f"{script}, {detail} {name}: too few runs, left out", file=sys.stderr)
                continue
            rows.append({"script": script, "label": f"{detail}: {name}"} | change)
    if not rows:
        return pd.DataFrame(columns=NOT_ENV_IDS)
    return pd.DataFrame(rows).sort_values("change", ascending=False, kind="stable")


def split_changes(lines: pd.DataFrame, env_ids: list[str]) -> dict[str, pd.DataFrame]:
    """Lines of one domain -> {title of a panel: its rows of compute_changes}.

    The mean over environments comes first, if there are several, without those that have fewer than
    half of the variants of another: a mean needs a variant on each. A panel without rows is left
    out.
    """
    parts = {env_id: compute_changes(lines[lines.env_id == env_id]) for env_id in env_ids}
    most = max(map(len, parts.values()), default=0)
    in_mean = [env_id for env_id in env_ids if 2 * len(parts[env_id]) >= most]
    if len(in_mean) > 1:
        everywhere = len(in_mean) == len(env_ids)
        name = "mean over environments" if everywhere else f"mean of {', '.join(in_mean)}"
        parts = {name: compute_changes(lines[lines.env_id.isin(in_mean)])} | parts
    return {name: changes for name, changes in parts.items() if not changes.empty}


def plot(parts: dict[str, pd.DataFrame], title: str, path: Path) -> None:
    """Draws a panel for each part and in it a line for each variant: the change and its interval.

    Variants are sorted by the first part's changes, the greatest loss at the top.
    """
    order = pd.concat(list(parts.values())).set_index(["script", "label"]).index.unique()
    size = (4 + 2.8 * len(parts), 1.6 + 0.28 * len(order))
    figure, panels = plt.subplots(
        1, len(parts), figsize=size, sharey=True, squeeze=False, layout="constrained"
    )
    heights = np.arange(len(order))
    for panel, (name, changes) in zip(panels[0], parts.items(), strict=True):
        rows = 100 * changes.set_index(["script", "label"])[["change", "low", "high"]]
        rows = rows.reindex(order)

        # What is seen to be off zero has a colour
        colors = np.full(len(order), "darkgrey", dtype=object)
        colors[rows.high < 0] = "tab:red"
        colors[rows.low > 0] = "tab:blue"
        insides = np.where(rows.low.isna(), "white", colors)
        panel.hlines(heights, rows.low, rows.high, color=colors, linewidth=2)
        panel.scatter(rows.change, heights, 30, facecolors=insides, edgecolors=colors, zorder=3)

        panel.axvline(0, color="black", linewidth=1)
        panel.grid(alpha=0.3)
        panel.set_title(name, fontsize="medium")

    labels = [label for _, label in order]
    if order.get_level_values("script").nunique() > 1:
        labels = [f"{label} ({script})" for script, label in order]
    panels[0, 0].set_yticks(heights, labels)
    panels[0, 0].set_ylim(-0.6, len(order) - 0.4)
    figure.suptitle(title, fontsize="medium")
    figure.supxlabel(
        "change of the IQM and its 95 % interval, in % of what the full recipe gains; -100: learns "
        "nothing\nred and blue: zero is not in the interval; hollow: too few seeds for one; "
        "each panel has its own scale",
        fontsize="small",
    )
    figure.savefig(path, dpi=110)
    plt.close(figure)


def in_percent(part: float) -> str:
    """-> "+3", "-52"; "-0" is a loss of less than half a percent."""
    return f"{100 * part:+.0f}"


def place(variant: Variant) -> tuple:
    """Sorts variants as their details are numbered, then A1 to A4, then what has no number."""
    for rank, pattern in enumerate((r"(\d+)", r"A(\d+)")):
        if match := re.match(pattern, variant.detail):
            return rank, int(match[1])
    return 2, 0


def describe_change(full: pd.DataFrame, variant: pd.DataFrame) -> str:
    """Lines of one environment -> the change in words, bold if its interval is off zero.

    "-52 % (-54 to -50)", "-52 %, 2 seeds" of too few for an interval, "" of none or where the full
    recipe has learned nothing.
    """
    if not has_learned(full) or len(variant) == 0:
        return ""
    change = compute_change(full, variant)
    text = f"{in_percent(change['change'])} %"
    if np.isnan(change["low"]):
        return f"{text}, {change['seeds']} seed{'s' if change['seeds'] > 1 else ''}"
    text += f" ({in_percent(change['low'])} to {in_percent(change['high'])})"
    return f"**{text}**" if change["low"] * change["high"] > 0 else text


def find_measured(lines: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """All lines of ablations.csv -> {domain: those of its environments and steps}."""
    lines = lines.dropna(subset=["mean_return"])
    measured = {}
    for name, domain in DOMAINS.items():
        here = (lines.domain == name) & (lines.total_timesteps == domain.total_timesteps)
        here &= lines.env_id.isin(domain.env_ids)
        if here.any():
            measured[name] = lines[here]
    return measured


def make_effects_table(lines: pd.DataFrame, domain: Domain) -> str:
    """Lines of one domain -> a row for each variant in the order of details, its environments."""
    several = len({variant.script for variant in domain.variants}) > 1
    env_ids = [env_id for env_id in domain.env_ids if lines.env_id.eq(env_id).any()]
    head = ["detail: instead", *env_ids]
    rows = [head, ["---"] * len(head)]
    for variant in sorted(domain.variants, key=place):
        of_script = lines[lines.script == variant.script]
        full = of_script[of_script.detail == "full"]
        same = (of_script.detail == variant.detail) & (of_script.variant == variant.name)
        cells = []
        for env_id in env_ids:
            full_here = full[full.env_id == env_id]
            cells.append(describe_change(full_here, of_script[same & (of_script.env_id == env_id)]))
        if variant.detail != "full" and any(cells):
            label = f"{variant.detail}: {variant.name}"
            rows.append([f"{label} (`{variant.script}`)" if several else label, *cells])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def make_effects(lines: pd.DataFrame) -> str:
    """All lines of ablations.csv -> docs/details.md's tables, two for each domain."""
    parts = []
    for name, at_the_end in find_measured(lines).items():
        domain = DOMAINS[name]
        scripts = [f"`{script}`" for script in sorted(at_the_end.script.unique())]
        of = scripts[0] if len(scripts) == 1 else f"{', '.join(scripts[:-1])} and {scripts[-1]}"
        if domain.flags:
            of += f" with `{domain.flags}`"

        throughout = at_the_end.assign(mean_return=at_the_end.auc)
        parts.append(f"**{name}**, {of}, the return after {domain.total_timesteps:,} steps:\n\n")
        parts.append(make_effects_table(at_the_end, domain) + "\n")
        parts.append(f"**{name}**, its mean over the whole training, so how fast it rises:\n\n")
        parts.append(make_effects_table(throughout, domain) + "\n")
    return "\n" + "".join(parts)


def find_overview(lines: pd.DataFrame) -> pd.DataFrame:
    """All lines of ablations.csv -> a row for each variant and environment, in details' order.

    Columns: env_id, label, change, low, high.
    """
    tables = []
    for measured in find_measured(lines).values():
        for env_id, of_env in measured.groupby("env_id"):
            changes = compute_changes(of_env)[["label", "change", "low", "high"]]
            tables.append(changes.assign(env_id=env_id))
    rows = pd.concat(tables)

    variants = [variant for domain in DOMAINS.values() for variant in domain.variants]
    labels = [f"{variant.detail}: {variant.name}" for variant in sorted(variants, key=place)]
    return rows.sort_values("label", key=lambda names: names.map(labels.index), kind="stable")


def describe_cell(row: pd.Series) -> tuple[str, tuple]:
    """A change and its interval -> the text and the color of its cell in an overview.

    An effect is seen: red or blue, the stronger the greater it is. None of more than SMALL: grey.
    Undecided: white, with the interval; with a question mark if too few seeds have none.
    """
    change = in_percent(row.change)
    if np.isnan(row.low):
        return f"{change} ?", to_rgba("white")
    if row.low * row.high > 0:
        strength = 0.1 + 0.4 * min(abs(row.change), 0.5)
        return change, plt.colormaps["RdBu"](0.5 + np.sign(row.change) * strength)
    if max(-row.low, row.high) <= SMALL:
        return change, to_rgba("gainsboro")
    return f"{in_percent(row.low)} to {in_percent(row.high)}", to_rgba("white")


def break_name(env_id: str) -> str:
    """-> the name in lines of up to 16 letters, an overview's column; broken before capitals."""
    words = re.sub("(?<=[a-z])(?=[A-Z])", " ", env_id)
    lines = textwrap.wrap(words, 16, break_on_hyphens=False)
    return "\n".join(line.replace(" ", "") for line in lines)


def plot_overview(rows: pd.DataFrame, title: str, path: Path) -> None:
    """Draws rows of find_overview as a matrix: a line for each variant, a column for each task."""
    labels = rows.label.unique().tolist()
    all_env_ids = [env_id for domain in DOMAINS.values() for env_id in domain.env_ids]
    env_ids = [env_id for env_id in all_env_ids if env_id in set(rows.env_id)]

    size = (3.2 + 1.25 * len(env_ids), 1.6 + 0.27 * len(labels))
    figure, panel = plt.subplots(figsize=size, layout="constrained")
    colors = np.ones((len(labels), len(env_ids), 4))
    for _, row in rows.iterrows():
        line, column = labels.index(row.label), env_ids.index(row.env_id)
        text, colors[line, column] = describe_cell(row)
        matters = row.low * row.high > 0
        panel.text(
            column,
            line,
            text,
            ha="center",
            va="center",
            fontsize="small",
            color="black" if matters else "dimgrey",
            weight="bold" if matters else "normal",
        )
    panel.imshow(colors, aspect="auto")

    panel.xaxis.tick_top()
    panel.set_xticks(range(len(env_ids)), list(map(break_name, env_ids)), fontsize="small")
    panel.set_yticks(range(len(labels)), labels, fontsize="small")
    panel.tick_params(length=0)
    panel.set_xticks(np.arange(len(env_ids) - 1) + 0.5, minor=True)
    panel.set_yticks(np.arange(len(labels) - 1) + 0.5, minor=True)
    panel.grid(which="minor", color="lightgrey")
    panel.tick_params(which="minor", length=0)
    figure.suptitle(title, fontsize="medium")
    figure.supxlabel(
        "change of the IQM, in % of what the full recipe gains; -100: learns nothing\n"
        "red and blue: an effect is seen, zero is not in the 95 % interval\n"
        f"grey: none of more than {100 * SMALL:.0f}; white: undecided, the interval is told\n"
        "?: too few seeds for one; empty: not measured",
        fontsize="small",
    )
    figure.savefig(path, dpi=110)
    plt.close(figure)


def write_details(args: Args) -> None:
    """Puts the tables of all measured effects into docs/details.md, in the place of those there.

    Draws the overviews of all domains.
    """
    lines = read_lines(args)
    if lines is None:
        common.refuse(f"--details: there is no {args.save / 'ablations.csv'}")
    path = common.ROOT / "docs" / "details.md"
    text = path.read_text()
    before = text.split(BEGIN)[0]
    after = text.split(END)[1]
    path.write_text(f"{before}{BEGIN}{make_effects(lines)}{END}{after}")

    for suffix, measure, returns in (
        ("", "the return at the end", lines.mean_return),
        ("_throughout", "the mean of the return over the whole training", lines.auc),
    ):
        rows = find_overview(lines.assign(mean_return=returns))
        title = f"{measure}, each detail taken out"
        plot_overview(rows, title, args.save / f"ablations_overview{suffix}.png")


def describe(lines: pd.DataFrame, args: Args) -> str:
    """-> the second line of a figure's title: domain, its flags, steps, seeds."""
    seeds = lines.groupby(["script", "detail", "variant", "env_id"]).size()
    count = f"{seeds.min()} to {seeds.max()} seeds"
    if seeds.min() == seeds.max():
        count = "1 seed" if seeds.max() == 1 else f"{seeds.max()} seeds"
    name = f"{args.domain} {DOMAINS[args.domain].flags}".strip()
    return f"{name}, {args.total_timesteps:,} steps, {count}"


def write_report(jobs: list[tuple[Variant, Job]], args: Args) -> None:
    """Writes ablations.csv, and the figures of what these jobs are."""
    lines = collect(jobs, args)
    wanted = []
    for variant, job in jobs:
        wanted.append((variant.script, variant.detail, variant.name, get_env_id(job)))
    columns = ["script", "detail", "variant", "env_id"]
    wanted = pd.DataFrame(wanted, columns=columns).drop_duplicates()

    lines = lines[(lines.domain == args.domain) & (lines.total_timesteps == args.total_timesteps)]
    lines = lines.merge(wanted, on=columns)
    name = args.domain
    if args.env_ids != DOMAINS[args.domain].env_ids:  # its figures are of all of them
        name = "_".join(args.env_ids)
    env_ids = [env_id for env_id in args.env_ids if env_id in set(lines.env_id)]
    for suffix, measure, returns in (
        ("", "the return at the end", lines.mean_return),
        ("_throughout", "the mean of the return over the whole training", lines.auc),
    ):
        parts = split_changes(lines.assign(mean_return=returns), env_ids)
        if not parts:
            print("no figure: no variant and its full recipe are finished", file=sys.stderr)
            return
        title = f"{measure}\n{describe(lines, args)}"
        plot(parts, title, args.save / f"ablations_{name}{suffix}.png")


def print_variants(variants: list[Variant], flags_of_all: str) -> None:
    """Prints how each variant is made, and the details that have none."""
    print("| variant | script | flags | edits |\n|---|---|---|---|")
    for variant in variants:
        script = variant.source or variant.script
        print(f"| {variant.slug} | {script} | {variant.flags} | {len(variant.edits) or ''} |")
    print()
    if flags_of_all:
        print(f"every run, before its own flags: {flags_of_all}")
    for detail, reason in DEFINITIONS.items():
        print(f"no variant of {detail}: {reason}")


def main(args: Args) -> int:
    """-> the exit code."""
    variants = choose_variants(args)
    if args.list:
        print_variants(variants, DOMAINS[args.domain].flags)
        return 0

    if args.details:
        write_details(args)
        return 0

    for variant in variants:
        write_copy(variant)
    jobs = make_jobs(variants, args)
    exit_code = 0
    if not args.report:
        unfinished = find_unfinished(jobs, args)
        print(f"{len(jobs)} runs, of which {len(jobs) - len(unfinished)} are finished", flush=True)
        if args.cluster.slurm and unfinished:
            submit(unfinished, args.cluster, args.workers)
            return 0
        exit_code = train(unfinished, args.workers or 1)
    if exit_code != 130:
        write_report(jobs, args)
    return exit_code


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Args)))
