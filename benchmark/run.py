"""Trains a script on several environments with several seeds, some runs at a time, here or on a Slurm cluster.

    python benchmark/run.py --command "python ppo.py" --env-ids CartPole-v1 Acrobot-v1 --num-seeds 3 --workers 2
    python benchmark/run.py --command "python ppo.py" --env-ids CartPole-v1 --save benchmark/results/cartpole
    python benchmark/run.py --command "python ppo_atari.py --track" --env-ids PongNoFrameskip-v4 --slurm --gpus 1

Started again, it leaves out the runs that are finished and goes on with the others from their checkpoints: a run in
runs/ belongs to a command if all of its arguments are those that the command asks for. What a run prints is added to
runs/logs/ENV_ID__EXP_NAME__SEED.log. A run that fails does not stop the others; the exit code is then 1. Ctrl-C stops
all of them after their current iteration, with checkpoints; a second one at once.
"""

import contextlib
import dataclasses
import glob
import importlib.util
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import submitit
import tyro
from basics import refuse
from tqdm import tqdm

RUNS, LOGS = Path("runs"), Path("runs", "logs")


@dataclass
class Args:
    command: str  # what trains, without --env-id and --seed: "python ppo.py --total-timesteps 100000"
    env_ids: list[str]  # environments to train on
    num_seeds: int = 3  # runs on each environment
    start_seed: int = 1  # the first seed; the others follow it
    workers: int = 1  # runs at a time
    threads: int | None = None  # threads of each run; if not given, its share of the cores, or --cpus on Slurm
    save: Path | None = None  # when all are finished, report.py writes its files under this name
    slurm: bool = False  # submit the runs as one job array, and end
    partition: str | None = None  # Slurm: partition
    time: int = 24  # Slurm: hours that a run may take before it is requeued
    cpus: int = 4  # Slurm: cores of a run
    gpus: int = 0  # Slurm: GPUs of a run
    memory: int = 16  # Slurm: GB of memory of a run

    def __post_init__(self):
        for name in ("num_seeds", "workers", "time", "cpus", "memory", "threads"):
            if (value := getattr(self, name)) is not None and value < 1:
                refuse(f"--{name.replace('_', '-')} {value}: must be at least 1")


def load_script(path: str) -> ModuleType:
    """-> the module of a script, which knows its arguments and its checkpoints. Raises ValueError if there is none."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    if spec.name not in sys.modules:
        script = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(script)
        except OSError as error:
            raise ValueError(f"cannot read {path}, {error.strerror}") from None
        if not (hasattr(script, "Args") and hasattr(script, "load_checkpoint")):
            raise ValueError(f"{path} has no Args or no load_checkpoint, so it cannot be gone on with")
    return sys.modules[spec.name]


@dataclass
class Job:
    """One run: calling it trains, from its checkpoint if there is one. Plain data, because Slurm's jobs are pickled."""

    command: list[str]
    threads: int

    def __post_init__(self):
        script = next((word for word in self.command if word.endswith(".py")), None)
        if script is None:
            raise ValueError(f"{shlex.join(self.command)} names no script")
        self.child: subprocess.Popen | None = None
        self.script, words = script, self.command[self.command.index(script) + 1 :]
        self.args = dataclasses.asdict(tyro.cli(load_script(script).Args, args=words, prog=script))
        self.name = "{env_id}__{exp_name}__{seed}".format(**self.args).replace("/", "-")

    @property
    def log(self) -> Path:
        return LOGS / f"{self.name}.log"

    def find_run(self) -> tuple[Path | None, bool]:
        """-> the latest run with these arguments, and whether it is finished."""
        script = load_script(self.script)
        for run_dir in sorted(RUNS.glob(f"{glob.escape(self.name)}__*"), reverse=True):
            if (run_dir / "checkpoint.pt").is_file():
                checkpoint = script.load_checkpoint(run_dir)
                if checkpoint["args"] | {"resume": None} == self.args:
                    return run_dir, checkpoint["iteration"] >= script.Args(**self.args).num_iterations
        return None, False

    def start(self) -> subprocess.Popen | None:
        """Starts the run where it was left, unless it is finished."""
        run_dir, finished = self.find_run()
        if finished:
            return None
        command = [*self.command, *(["--resume", str(run_dir)] if run_dir else [])]
        LOGS.mkdir(parents=True, exist_ok=True)
        with self.log.open("a") as log:
            print("$", shlex.join(command), file=log, flush=True)
            environment = os.environ | {"OMP_NUM_THREADS": str(self.threads)}
            # a session of its own, so that Ctrl-C reaches it through us only
            return subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)

    def tail(self, lines: int) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])

    def __call__(self) -> None:
        """What a Slurm job does. Raises RuntimeError if the run fails."""
        signum = submitit.JobEnvironment()._usr_sig()
        handler = signal.signal(signum, signal.SIG_IGN)  # Slurm's warning reaches the run too; it must not end it
        self.child = self.start()
        signal.signal(signum, handler)
        if self.child and self.child.wait():
            raise RuntimeError(f"{self.name} failed:\n{self.tail(20)}")

    def checkpoint(self) -> submitit.helpers.DelayedSubmission:
        """Called by submitit before a preemption or the time limit: the run saves its state, the job is requeued."""
        if self.child:
            self.child.terminate()
            # not child.wait: this interrupts one, which holds its lock
            os.waitid(os.P_PID, self.child.pid, os.WEXITED | os.WNOWAIT)
        return submitit.helpers.DelayedSubmission(Job(self.command, self.threads))


def run_here(jobs: list[Job], workers: int) -> int:
    """Runs all, so many at a time -> how many failed. Raises KeyboardInterrupt when all have stopped after Ctrl-C."""
    children: dict[str, subprocess.Popen] = {}  # the running ones
    stopping = threading.Event()

    def work(job: Job) -> bool:
        """-> whether the run is finished."""
        if stopping.is_set() or not (child := job.start()):
            return not stopping.is_set()
        children[job.name] = child
        if stopping.is_set():  # Ctrl-C came while it started
            child.terminate()
        returncode = child.wait()
        del children[job.name]
        return returncode == 0

    failed = 0
    bar = tqdm(total=len(jobs), unit=" runs", disable=None)
    with ThreadPoolExecutor(workers) as pool, bar:
        futures = {pool.submit(work, job): job for job in jobs}
        try:
            for future in as_completed(futures):
                job = futures[future]
                if future.result():
                    tqdm.write(f"{job.name}: {job.tail(1) if job.log.exists() else 'finished'}", sys.stderr)
                else:
                    failed += 1
                    tqdm.write(f"{job.name}: failed, {job.log} ends with\n{job.tail(20)}", sys.stderr)
                bar.set_postfix_str(f"{len(children)} running, {failed} failed", refresh=False)
                bar.update()
        except BaseException:
            stopping.set()
            with contextlib.suppress(KeyboardInterrupt):
                stop = "which save their state; Ctrl-C again kills them"
                tqdm.write(f"stopping {len(children)} runs, {stop}", sys.stderr)
                for child in list(children.values()):
                    child.terminate()
                pool.shutdown()
            for child in list(children.values()):  # none, but for a second Ctrl-C
                child.kill()
            raise
    return failed


def submit(args: Args, jobs: list[Job]) -> None:
    """Submits all as one Slurm job array, of which so many run at a time."""
    try:
        executor = submitit.SlurmExecutor(folder=LOGS / "slurm", max_num_timeout=100)
        executor.update_parameters(
            job_name=Path(jobs[0].script).stem,
            array_parallelism=args.workers,
            partition=args.partition,
            time=60 * args.time,
            cpus_per_task=args.cpus,
            gpus_per_node=args.gpus or None,
            mem=f"{args.memory}GB",
            additional_parameters={"requeue": True},
        )
        with executor.batch():
            submitted = [executor.submit(job) for job in jobs]
    except (RuntimeError, OSError, submitit.core.utils.FailedJobError) as error:
        refuse(f"--slurm: {error}")
    print(f"submitted {len(submitted)} runs as job array {submitted[0].job_id.split('_')[0]}; logs in {LOGS}")


def main(args: Args) -> int:
    """-> the exit code."""
    threads = args.threads or (args.cpus if args.slurm else max(1, (os.cpu_count() or 1) // args.workers))
    seeds = range(args.start_seed, args.start_seed + args.num_seeds)
    command = shlex.split(args.command)
    if not command or not shutil.which(command[0]):
        refuse(f"--command {args.command}: there is no such program")
    ids = [(env_id, seed) for seed in seeds for env_id in args.env_ids]
    try:
        jobs = [Job([*command, "--env-id", env_id, "--seed", str(seed)], threads) for env_id, seed in ids]
    except ValueError as error:
        refuse(f"--command: {error}")
    unfinished = [job for job in jobs if not job.find_run()[1]]
    print(f"{len(jobs)} runs, of which {len(jobs) - len(unfinished)} are finished")
    if args.slurm and unfinished:
        submit(args, unfinished)
        return 0
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        if unfinished and run_here(unfinished, args.workers):
            return 1
    except KeyboardInterrupt:
        print("stopped; started again, it goes on", file=sys.stderr)
        return 130
    if args.save:
        folders = [str(job.find_run()[0]) for job in jobs]
        report = str(Path(__file__).with_name("report.py"))
        return subprocess.run([sys.executable, report, *folders, "--save", str(args.save)]).returncode
    return 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Args)))
