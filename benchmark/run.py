"""Trains a script on several environments with several seeds, here or on a Slurm cluster.

    python benchmark/run.py --command "python ppo.py" --env-ids CartPole-v1 Acrobot-v1 --workers 2
    python benchmark/run.py --command "python ppo.py" --env-ids CartPole-v1 --save results/cartpole
    python benchmark/run.py --command "python ppo_atari.py --track" \\
        --env-ids PongNoFrameskip-v4 --slurm --gpus 1

Started again, it leaves out the runs that are finished and goes on with the others from their
checkpoints: a run in runs/ belongs to a command if all of its arguments are those that the command
asks for. What a run prints is added to runs/logs/ENV_ID__EXP_NAME__SEED.log. A run that fails does
not stop the others; the exit code is then 1. Ctrl-C stops all of them after their current
iteration, with checkpoints; a second one at once.
"""

import contextlib
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
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType

import submitit
import tyro
from common import refuse
from tqdm import tqdm

RUNS = Path("runs")
LOGS = RUNS / "logs"


@dataclass
class Args:
    command: str
    """what trains, without --env-id and --seed: "python ppo.py --total-timesteps 100000" """
    env_ids: list[str]
    """environments to train on"""
    num_seeds: int = 3
    """runs on each environment"""
    start_seed: int = 1
    """the first seed; the others follow it"""
    workers: int = 1
    """runs at a time"""
    threads: int | None = None
    """threads of each run; if not given, its share of the cores, or --cpus on Slurm"""
    save: Path | None = None
    """when all are finished, report.py writes its files under this name"""

    slurm: bool = False
    """submit the runs as one job array, and end"""
    partition: str | None = None
    """Slurm: partition"""
    time: int = 24
    """Slurm: hours that a run may take before it is requeued"""
    cpus: int = 4
    """Slurm: cores of a run"""
    gpus: int = 0
    """Slurm: GPUs of a run"""
    memory: int = 16
    """Slurm: GB of memory of a run"""

    def __post_init__(self):
        self.check("num_seeds")
        self.check("workers")
        self.check("time")
        self.check("cpus")
        self.check("memory")
        if self.threads is not None:
            self.check("threads")

    def check(self, name: str) -> None:
        """Refuses an argument that is less than 1."""
        value = getattr(self, name)
        if value < 1:
            refuse(f"--{name.replace('_', '-')} {value}: must be at least 1")


def load_script(path: str) -> ModuleType:
    """-> the module of a script, which knows its arguments and its checkpoints.

    Raises ValueError if there is none.
    """
    name = Path(path).stem
    if name in sys.modules:
        return sys.modules[name]

    spec = importlib.util.spec_from_file_location(name, path)
    script = importlib.util.module_from_spec(spec)
    sys.modules[name] = script
    try:
        spec.loader.exec_module(script)
    except OSError as error:
        raise ValueError(f"cannot read {path}, {error.strerror}") from None
    if not hasattr(script, "Args") or not hasattr(script, "load_checkpoint"):
        lacks = "has no Args or no load_checkpoint"
        raise ValueError(f"{path} {lacks}, so it cannot be gone on with")
    return script


class Job:
    """One run: calling it trains, from its checkpoint if there is one.

    Plain data, because Slurm's jobs are pickled. Raises ValueError for what is no training.
    """

    def __init__(self, command: list[str], threads: int):
        scripts = [word for word in command if word.endswith(".py")]
        if not scripts:
            raise ValueError(f"{shlex.join(command)} names no script")
        self.command = command
        self.threads = threads
        self.script = scripts[0]
        self.child: subprocess.Popen | None = None

        # What the script makes of its command line
        words = command[command.index(self.script) + 1 :]
        args = tyro.cli(load_script(self.script).Args, args=words, prog=self.script)
        self.num_iterations = args.num_iterations
        self.args = asdict(args)
        self.name = f"{args.env_id}__{args.exp_name}__{args.seed}".replace("/", "-")
        self.log = LOGS / f"{self.name}.log"

    def find_run(self) -> tuple[Path | None, bool]:
        """-> the latest run with these arguments, and whether it is finished."""
        script = load_script(self.script)
        run_dirs = sorted(RUNS.glob(f"{glob.escape(self.name)}__*"), reverse=True)
        for run_dir in run_dirs:
            if not (run_dir / "checkpoint.pt").is_file():
                continue
            checkpoint = script.load_checkpoint(run_dir)
            args = checkpoint["args"]
            args["resume"] = None  # a run that was gone on with is no other one
            if args == self.args:
                return run_dir, checkpoint["iteration"] >= self.num_iterations
        return None, False

    def start(self) -> subprocess.Popen | None:
        """Starts the run where it was left, unless it is finished."""
        run_dir, finished = self.find_run()
        if finished:
            return None

        command = list(self.command)
        if run_dir is not None:
            command += ["--resume", str(run_dir)]
        environment = dict(os.environ)
        environment["OMP_NUM_THREADS"] = str(self.threads)

        LOGS.mkdir(parents=True, exist_ok=True)
        with self.log.open("a") as log:
            print("$", shlex.join(command), file=log, flush=True)
            return subprocess.Popen(
                command,
                stdout=log,
                stderr=log,
                env=environment,
                # A session of its own, so that Ctrl-C reaches it through us only
                start_new_session=True,
            )

    def read_log(self, num_lines: int) -> str:
        """-> the last lines of what the run printed."""
        lines = self.log.read_text(errors="replace").splitlines()
        return "\n".join(lines[-num_lines:])

    def __call__(self) -> None:
        """What a Slurm job does. Raises RuntimeError if the run fails."""
        # Slurm's warning reaches the run too, which inherits that it is ignored: it must not end it
        signum = submitit.JobEnvironment()._usr_sig()
        handler = signal.signal(signum, signal.SIG_IGN)
        self.child = self.start()
        signal.signal(signum, handler)

        if self.child is not None and self.child.wait() != 0:
            raise RuntimeError(f"{self.name} failed:\n{self.read_log(20)}")

    def checkpoint(self) -> submitit.helpers.DelayedSubmission:
        """Called by submitit before a preemption or the time limit.

        The run saves its state, the job is requeued.
        """
        if self.child is not None:
            self.child.terminate()
            # Not child.wait: this interrupts one, which holds its lock
            os.waitid(os.P_PID, self.child.pid, os.WEXITED | os.WNOWAIT)
        return submitit.helpers.DelayedSubmission(Job(self.command, self.threads))


class Queue:
    """Runs jobs in processes, so many at a time."""

    def __init__(self, jobs: list[Job], workers: int):
        self.jobs = jobs
        self.workers = workers
        self.children: dict[str, subprocess.Popen] = {}  # the running ones, by their jobs' names
        self.stopping = threading.Event()

    def run(self) -> int:
        """-> how many have failed. Raises KeyboardInterrupt when all have stopped after Ctrl-C."""
        failed = 0
        bar = tqdm(total=len(self.jobs), unit=" runs", disable=None)
        with ThreadPoolExecutor(self.workers) as pool, bar:
            futures = {pool.submit(self.train, job): job for job in self.jobs}
            try:
                for future in as_completed(futures):
                    finished = future.result()
                    if not finished:
                        failed += 1
                    self.show(futures[future], finished)
                    state = f"{len(self.children)} running, {failed} failed"
                    bar.set_postfix_str(state, refresh=False)
                    bar.update()
            except BaseException:
                self.stop(pool)
                raise
        return failed

    def train(self, job: Job) -> bool:
        """Runs one job to its end, in a thread of the pool -> whether it is finished."""
        if self.stopping.is_set():
            return False
        child = job.start()
        if child is None:  # it has been finished before
            return True

        self.children[job.name] = child
        if self.stopping.is_set():  # Ctrl-C came while it started
            child.terminate()
        returncode = child.wait()
        del self.children[job.name]
        return returncode == 0

    def show(self, job: Job, finished: bool) -> None:
        """Says what has become of a job, in its own last words."""
        if not finished:
            message = f"{job.name}: failed, {job.log} ends with\n{job.read_log(20)}"
        elif job.log.exists():
            message = f"{job.name}: {job.read_log(1)}"
        else:
            message = f"{job.name}: finished"
        tqdm.write(message, sys.stderr)

    def stop(self, pool: ThreadPoolExecutor) -> None:
        """Stops all runs and waits for them; kills them when it is interrupted itself."""
        self.stopping.set()
        with contextlib.suppress(KeyboardInterrupt):
            advice = "which save their state; Ctrl-C again kills them"
            tqdm.write(f"stopping {len(self.children)} runs, {advice}", sys.stderr)
            for child in list(self.children.values()):
                child.terminate()
            pool.shutdown()
        for child in list(self.children.values()):  # none, but for a second Ctrl-C
            child.kill()


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
    array = submitted[0].job_id.split("_")[0]
    print(f"submitted {len(submitted)} runs as job array {array}; logs in {LOGS}")


def count_threads(args: Args) -> int:
    """-> threads of each run."""
    if args.threads is not None:
        return args.threads
    if args.slurm:
        return args.cpus
    cores = os.cpu_count() or 1
    return max(1, cores // args.workers)


def make_jobs(args: Args) -> list[Job]:
    """-> a job for every environment and seed; refuses what is no training."""
    command = shlex.split(args.command)
    if not command or shutil.which(command[0]) is None:
        refuse(f"--command {args.command}: there is no such program")
    if len(set(args.env_ids)) < len(args.env_ids):
        refuse(f"--env-ids {' '.join(args.env_ids)}: the same environment twice")
    if RUNS.exists() and not RUNS.is_dir():
        refuse(f"{RUNS}: is a file, where the folder of the runs should be")

    jobs = []
    threads = count_threads(args)
    for seed in range(args.start_seed, args.start_seed + args.num_seeds):
        for env_id in args.env_ids:
            options = ["--env-id", env_id, "--seed", str(seed)]
            try:
                jobs.append(Job(command + options, threads))
            except ValueError as error:
                refuse(f"--command: {error}")
    return jobs


def write_report(jobs: list[Job], save: Path) -> int:
    """Has report.py write its files -> its exit code."""
    program = Path(__file__).with_name("report.py")
    run_dirs = [str(job.find_run()[0]) for job in jobs]
    command = [sys.executable, str(program), *run_dirs, "--save", str(save)]
    return subprocess.run(command).returncode


def main(args: Args) -> int:
    """-> the exit code."""
    jobs = make_jobs(args)
    unfinished = []
    for job in jobs:
        _, finished = job.find_run()
        if not finished:
            unfinished.append(job)
    print(f"{len(jobs)} runs, of which {len(jobs) - len(unfinished)} are finished")

    if args.slurm and unfinished:
        submit(args, unfinished)
        return 0

    # A SIGTERM stops all as Ctrl-C does
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    failed = 0
    try:
        if unfinished:
            failed = Queue(unfinished, args.workers).run()
    except KeyboardInterrupt:
        print("stopped; started again, it goes on", file=sys.stderr)
        return 130
    if failed > 0:
        return 1

    if args.save is not None:
        return write_report(jobs, args.save)
    return 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Args)))
