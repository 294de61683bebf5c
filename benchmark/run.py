"""Trains a script on several environments with several seeds, here or on a Slurm cluster.

    python benchmark/run.py --command "python ppo.py" --env-ids CartPole-v1 Acrobot-v1 --workers 2
    python benchmark/run.py --command "python ppo.py" --env-ids CartPole-v1 --evaluate 100 \\
        --save results/cartpole
    python benchmark/run.py --command "python ppo_atari.py --track" \\
        --env-ids PongNoFrameskip-v4 --slurm --gpus 1 --time 24:00:00
    python benchmark/run.py --command "python ppo_atari_envpool.py" --env-ids Pong-v5 --slurm \\
        --gpus 4 --nodes 2 --cpus 16

Started again, it leaves out the runs that are finished and goes on with the others from their
checkpoints: a run in runs/ belongs to a command if all of its arguments are those that the command
asks for, but for those that change nothing of what is trained, such as --track. What a run prints
is added to runs/logs/ENV_ID__EXP_NAME__SEED.log. A run that fails does not stop the others; the
exit code is then 1. Ctrl-C stops all of them after their current iteration, with checkpoints; a
second one at once.

With --processes, torchrun starts so many processes that train a run together (detail A2); on Slurm
a run has as many as GPUs on each of its nodes, if nothing else is said.

No run is trained twice at a time: a run that another run.py trains is left out, and so is on Slurm
one that is in the queue already. With --slurm, --save has the report written by a job of its own,
when all runs have ended well.
"""

import contextlib
import fcntl
import glob
import io
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, field
from pathlib import Path

import cloudpickle
import common
import submitit
import torch.distributed
import tyro
from tqdm import tqdm

RUNS = Path("runs")
LOGS = RUNS / "logs"
PROGRAMS = Path(__file__).resolve().parent

# Exit codes of a script that was asked to stop by SIGHUP, SIGINT or SIGTERM, and has saved
STOPPED = (128 + signal.SIGHUP, 128 + signal.SIGINT, 128 + signal.SIGTERM)

# A Slurm job carries these modules along, because the node does not find them by their names
cloudpickle.register_pickle_by_value(common)
cloudpickle.register_pickle_by_value(sys.modules[__name__])


@dataclass
class Cluster:
    """What runs ask of a Slurm cluster."""

    slurm: bool = False
    """submit the runs as one job array, and end"""
    partition: str | None = None
    """Slurm: partition"""
    account: str | None = None
    """Slurm: account that is charged"""
    qos: str | None = None
    """Slurm: quality of service"""
    time: str = "24:00:00"
    """Slurm: what a run may take before it is requeued, in minutes, HH:MM:SS or D-HH:MM:SS"""
    cpus: int = 4
    """Slurm: cores of a run, on each node; more if its threads are more"""
    gpus: int = 0
    """Slurm: GPUs of a run, on each node"""
    memory: int = 16
    """Slurm: GB of memory of a run, on each node"""

    def __post_init__(self):
        check(self, "cpus")
        check(self, "memory")
        check(self, "gpus", low=0)
        if parse_minutes(self.time) < 1:
            common.refuse(
                f"--time {self.time}: must be minutes, HH:MM:SS or D-HH:MM:SS, a minute or more"
            )


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
    workers: int | None = None
    """runs at a time; if not given, one, or on Slurm all"""
    processes: int | None = None
    """processes that train a run together, on each node; if not given, one, or one a GPU"""
    threads: int | None = None
    """threads of each process; if not given, one for small networks, else its share of the cores"""
    evaluate: int = 0
    """episodes that evaluate.py plays with the agent of each finished run"""
    save: Path | None = None
    """when all are finished, report.py writes its files under this name"""
    nodes: int = 1
    """Slurm: nodes of a run"""
    cluster: tyro.conf.OmitArgPrefixes[Cluster] = field(default_factory=Cluster)

    def __post_init__(self):
        check(self, "num_seeds")
        check(self, "nodes")
        check(self, "evaluate", low=0)
        check(self, "start_seed", low=0)
        if self.workers is not None:
            check(self, "workers")
        if self.threads is not None:
            check(self, "threads")
        if self.processes is None:
            self.processes = max(1, self.cluster.gpus)
        check(self, "processes")
        if self.threads is not None:
            cores = self.processes * self.threads
            self.cluster.cpus = max(self.cluster.cpus, cores)
        if self.nodes > 1 and not self.cluster.slurm:
            common.refuse(f"--nodes {self.nodes}: only Slurm has several; add --slurm")


def check(args: Cluster | Args, name: str, low: int = 1) -> None:
    """Refuses an argument that is less than that."""
    value = getattr(args, name)
    if value < low:
        common.refuse(f"--{name.replace('_', '-')} {value}: must be at least {low}")


def parse_minutes(text: str) -> int:
    """A time as Slurm writes it: M, M:S, H:M:S or D-H[:M[:S]] -> minutes; 0 if it is none."""
    days, dash, rest = text.rpartition("-")
    try:
        numbers = [int(word) for word in rest.split(":")]
        days = int(days) if dash else 0
    except ValueError:
        return 0
    if len(numbers) > 3 or min(days, *numbers) < 0:
        return 0

    if dash or len(numbers) == 3:
        hours, minutes, *_ = [*numbers, 0]
    else:
        hours, minutes = 0, numbers[0]
    return (24 * days + hours) * 60 + minutes


class BusyError(Exception):
    """Another process trains the run."""


class Job:
    """One run: calling it trains, from its checkpoint if there is one.

    Plain data, because Slurm's jobs are pickled. Raises ValueError for what is no training.
    """

    def __init__(
        self,
        command: list[str],
        threads: int | None,
        episodes: int = 0,
        processes: int = 1,
        nodes: int = 1,
    ):
        scripts = [word for word in command if word.endswith(".py")]
        if not scripts:
            raise ValueError(f"{shlex.join(command)} names no script")
        self.command = command
        self.threads = threads
        self.episodes = episodes  # to play when it is finished
        self.processes = processes  # on each node
        self.nodes = nodes
        self.script = scripts[0]
        self.child: subprocess.Popen | None = None

        # What the script makes of its command line
        words = command[command.index(self.script) + 1 :]
        args = tyro.cli(common.load_script(self.script).Args, args=words, prog=self.script)
        self.num_iterations = args.num_iterations
        if args.num_envs % (processes * nodes) != 0:
            raise ValueError(
                f"--num-envs {args.num_envs} must be a multiple of the number of processes, "
                f"{processes * nodes}"
            )
        self.args = asdict(args)
        self.name = f"{args.env_id}__{args.exp_name}__{args.seed}".replace("/", "-")
        self.log = LOGS / f"{self.name}.log"

    def find_run(self) -> tuple[Path | None, bool]:
        """-> the latest run with these arguments, and whether it is finished."""
        script = common.load_script(self.script)
        wanted = leave_out_keeping(self.args)
        run_dirs = sorted(RUNS.glob(f"{glob.escape(self.name)}__*"), reverse=True)
        for run_dir in run_dirs:
            if not (run_dir / "checkpoint.pt").is_file():
                continue
            checkpoint = script.load_checkpoint(run_dir)
            if leave_out_keeping(checkpoint["args"]) == wanted:
                return run_dir, checkpoint["iteration"] >= self.num_iterations
        return None, False

    def is_done(self) -> bool:
        """-> whether it is finished, and evaluated if it is to be."""
        run_dir, finished = self.find_run()
        return finished and (self.episodes == 0 or self.is_evaluated(run_dir))

    def is_evaluated(self, run_dir: Path) -> bool:
        """-> whether so many episodes were played with the last checkpoint of that run."""
        line = common.read_evaluation(run_dir, common.count_steps(common.read_checkpoint(run_dir)))
        return line is not None and line.episodes >= self.episodes

    def lock(self) -> io.TextIOBase:
        """-> a file that is open; until it is closed, nobody else trains the run.

        Raises BusyError if somebody does. The kernel frees it with the last process that has it.
        """
        LOGS.mkdir(parents=True, exist_ok=True)
        file = (LOGS / f"{self.name}.lock").open("w")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise BusyError(f"{self.name}: another process trains it") from None
        return file

    def start(self) -> subprocess.Popen | None:
        """Starts the run where it was left, unless it is finished. Raises BusyError.

        Of several nodes only the first looks at the run's files, and tells the others.
        """
        if self.node > 0:
            options = self.share_with_nodes(None)
            if options is None:
                return None
            self.log = LOGS / f"{self.name}.node{self.node}.log"
            return self.start_program(self.spread_command() + options, None)

        options = None
        try:
            with self.lock() as lock:
                options = self.find_options()
                if options is None:
                    return None
                return self.start_program(self.spread_command() + options, lock)
        finally:
            if self.nodes > 1:
                self.share_with_nodes(options)

    @property
    def node(self) -> int:
        """Which of the run's nodes this is, the first is 0."""
        return int(os.environ["SLURM_NODEID"]) if self.nodes > 1 else 0

    def share_with_nodes(self, words: list[str] | None) -> list[str] | None:
        """-> what the run's first node has given here, on all of them."""
        address, port = find_first_node()
        box = [words]
        torch.distributed.init_process_group(
            "gloo",
            init_method=f"tcp://{address}:{port + 1}",
            rank=self.node,
            world_size=self.nodes,
        )
        torch.distributed.broadcast_object_list(box)
        torch.distributed.destroy_process_group()
        return box[0]

    def find_options(self) -> list[str] | None:
        """-> what to add to the command, so that it goes on; None if the run is finished."""
        run_dir, finished = self.find_run()
        if finished:
            return None
        return [] if run_dir is None else ["--resume", str(run_dir)]

    def spread_command(self) -> list[str]:
        """-> the command, started by torchrun if there are to be several processes."""
        if self.processes * self.nodes == 1:
            return self.command

        # Time to save, which a script does after the iteration
        options = [f"--nproc-per-node={self.processes}", "--shutdown-timeout=600"]
        if self.nodes == 1:
            options += ["--standalone"]
        else:
            address, port = find_first_node()
            options += [f"--nnodes={self.nodes}", f"--node-rank={self.node}"]
            options += [f"--master-addr={address}", f"--master-port={port}"]
        first = self.command.index(self.script)
        torchrun = ["-m", "torch.distributed.run", *options]
        return self.command[:first] + torchrun + self.command[first:]

    def start_evaluation(self) -> subprocess.Popen | None:
        """Starts evaluate.py on the finished run, unless it is not asked for or done."""
        if self.episodes == 0 or self.node > 0:
            return None
        run_dir, _ = self.find_run()
        if self.is_evaluated(run_dir):
            return None

        num_envs = min(8, self.episodes)
        command = [sys.executable, str(PROGRAMS / "evaluate.py"), str(run_dir)]
        command += ["--episodes", str(self.episodes), "--num-envs", str(num_envs)]
        command += ["--script", self.script]
        with self.lock() as lock:
            return self.start_program(command, lock)

    def start_program(self, command: list[str], lock: io.TextIOBase | None) -> subprocess.Popen:
        """Starts a program that adds to the log; the lock is its own from then on."""
        environment = dict(os.environ)
        if self.threads is not None:
            environment["OMP_NUM_THREADS"] = str(self.threads)
        # Several threads that wait for one another in a loop take the cores from other runs: on
        # two cores with two other processes, ppo_atari.py had 16 to 33 steps/s, and 164 with this.
        environment.setdefault("OMP_WAIT_POLICY", "passive")

        with self.log.open("a") as log:
            self.log_start = log.tell()
            print("$", shlex.join(command), file=log, flush=True)
            return subprocess.Popen(
                command,
                stdout=log,
                stderr=log,
                env=environment,
                pass_fds=[] if lock is None else [lock.fileno()],
                # A session of its own, so that Ctrl-C reaches it through us only
                start_new_session=True,
            )

    def read_log(self, num_lines: int) -> str:
        """-> the last lines of what the run printed."""
        lines = self.log.read_text(errors="replace").splitlines()
        return "\n".join(lines[-num_lines:])

    def read_result(self) -> str:
        """-> the last line that tells a result, of the training or its evaluation."""
        lines = self.log.read_text(errors="replace").splitlines()
        results = [line for line in lines if ": mean return " in line]
        return results[-1] if results else "finished"

    def __call__(self) -> None:
        """What a Slurm job does. Raises RuntimeError if the run fails."""
        for begin in (self.start, self.start_evaluation):
            # Slurm's warning reaches the program too, which inherits that it is ignored: it must
            # not end it
            signum = submitit.JobEnvironment()._usr_sig()
            handler = signal.signal(signum, signal.SIG_IGN)
            try:
                self.child = begin()
            except BusyError as error:
                print(error)
                return
            finally:
                signal.signal(signum, handler)

            if self.child is None:  # there is nothing to do
                continue
            returncode = self.child.wait()
            if self.was_stopped(returncode):
                # Slurm takes the node back, and has told the program too. It will end this job and
                # requeue it; who returned before would count as having come to an end.
                print(f"{self.name}: stopped, its state is saved", flush=True)
                time.sleep(600)
            if returncode != 0:
                raise RuntimeError(f"{self.name} failed:\n{self.read_log(20)}")

    def was_stopped(self, returncode: int) -> bool:
        """-> whether a signal has ended the program, so that it is to go on another time."""
        if self.processes * self.nodes > 1:  # torchrun does not say it by its exit code
            with self.log.open(errors="replace") as log:
                log.seek(self.log_start)
                return returncode != 0 and "SignalException: " in log.read()
        return returncode in STOPPED or returncode == -signal.SIGTERM

    def checkpoint(self) -> submitit.helpers.DelayedSubmission:
        """Called by submitit before a preemption or the time limit.

        The run saves its state, the job is requeued.
        """
        if self.child is not None and self.child.returncode is None:
            self.child.terminate()
            # Not child.wait: this interrupts one, which holds its lock
            with contextlib.suppress(ChildProcessError):  # it has ended meanwhile
                os.waitid(os.P_PID, self.child.pid, os.WEXITED | os.WNOWAIT)
        job = Job(self.command, self.threads, self.episodes, self.processes, self.nodes)
        return submitit.helpers.DelayedSubmission(job)


def find_first_node() -> tuple[str, int]:
    """-> a Slurm job's first node, and a port on it that few others use, as few as the next."""
    address = submitit.JobEnvironment().hostnames[0]
    job_id = int(os.environ["SLURM_JOB_ID"])
    return address, 20_000 + 2 * (job_id % 10_000)


def leave_out_keeping(args: dict) -> dict:
    """-> the arguments of a script that say what is trained."""
    return {name: value for name, value in args.items() if name not in common.KEEPING}


class Queue:
    """Runs jobs in processes, so many at a time."""

    def __init__(self, jobs: list[Job], workers: int):
        self.jobs = jobs
        self.workers = workers
        self.children: set[subprocess.Popen] = set()  # the running ones
        self.busy: set[Job] = set()  # those that another process trains
        self.stopping = threading.Event()

    def run(self) -> int:
        """-> how many have failed. Raises KeyboardInterrupt when all have stopped after Ctrl-C."""
        failed = 0
        bar = tqdm(total=len(self.jobs), unit=" runs", disable=None)
        with ThreadPoolExecutor(self.workers) as pool, bar:
            try:
                futures = {pool.submit(self.train, job): job for job in self.jobs}
                pending = set(futures)
                while pending:
                    # Not for ever: a Ctrl-C just before a wait begins shows only when it ends
                    done, pending = wait(pending, timeout=0.5, return_when=FIRST_COMPLETED)
                    for future in done:
                        finished = future.result()
                        if not finished:
                            failed += 1
                        self.show(futures[future], finished)
                        state = f"{len(self.children)} running, {failed} failed"
                        bar.set_postfix_str(state, refresh=False)
                        bar.update()
            except BaseException:
                self.stop()
                raise
        return failed

    def train(self, job: Job) -> bool:
        """Runs one job to its end, in a thread of the pool -> whether it is finished."""
        for begin in (job.start, job.start_evaluation):
            if self.stopping.is_set():
                return False
            try:
                child = begin()
            except BusyError:
                self.busy.add(job)
                return False
            if child is None:  # it has been done before
                continue

            self.children.add(child)
            if self.stopping.is_set():  # Ctrl-C came while it started
                child.terminate()
            returncode = child.wait()
            self.children.remove(child)
            if returncode != 0:
                return False
        return True

    def show(self, job: Job, finished: bool) -> None:
        """Says what has become of a job, in its own last words."""
        if job in self.busy:
            message = f"{job.name}: left out, another process trains it"
        elif not finished:
            message = f"{job.name}: failed, {job.log} ends with\n{job.read_log(20)}"
        elif job.log.exists():
            message = f"{job.name}: {job.read_result()}"
        else:
            message = f"{job.name}: finished"
        tqdm.write(message, sys.stderr)

    def stop(self) -> None:
        """Stops all runs and waits for them; kills them when it is interrupted itself."""
        self.stopping.set()
        with contextlib.suppress(KeyboardInterrupt):
            running = list(self.children)
            for child in running:
                child.terminate()
            advice = "which save their state; Ctrl-C again kills them"
            with contextlib.suppress(OSError):  # nobody reads it
                tqdm.write(f"stopping {len(running)} runs, {advice}", sys.stderr)

            # Not pool.shutdown(): a Ctrl-C just before its wait for threads begins would be lost
            while self.children:
                time.sleep(0.1)
        for child in list(self.children):  # none, but for a second Ctrl-C
            kill_with_children(child)


def kill_with_children(process: subprocess.Popen) -> None:
    """Kills a program, and first the processes that it has started, which outlive torchrun."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    with contextlib.suppress(OSError):  # it has ended meanwhile
        for pid in children.read_text().split():
            os.kill(int(pid), signal.SIGKILL)
    process.kill()


def ask_slurm(command: str) -> list[str]:
    """-> the words that one of Slurm's programs prints. Raises RuntimeError or OSError."""
    result = subprocess.run(shlex.split(command), capture_output=True, text=True)
    if result.returncode != 0:
        raise RuntimeError(f"{command}: {result.stderr}")
    return result.stdout.split()


def leave_out_queued(jobs: list[Job]) -> tuple[list[Job], set[str]]:
    """-> the jobs that are not in Slurm's queue, and the arrays of those that are.

    runs/logs/NAME.slurm has what a job was submitted as. Raises RuntimeError or OSError.
    """
    alive = ask_slurm("squeue --noheader --array --me --format=%i")
    rest = []
    arrays = set()
    for job in jobs:
        note = LOGS / f"{job.name}.slurm"
        job_id = note.read_text().strip() if note.exists() else ""
        if job_id in alive:
            arrays.add(job_id.split("_")[0])
        else:
            rest.append(job)
    return rest, arrays


def check_cpus(cluster: Cluster) -> None:
    """Refuses what no node can give: such a job would wait for ever, and not say why."""
    command = "sinfo --noheader --Node --format=%c"
    if cluster.partition is not None:
        command += f" --partition {shlex.quote(cluster.partition)}"
    cores = max(map(int, ask_slurm(command)), default=0)
    if cluster.cpus > cores:
        common.refuse(
            f"--cpus {cluster.cpus}: no node of the partition has more than {cores} cores"
        )


def make_executor(cluster: Cluster, **others) -> submitit.SlurmExecutor:
    """-> what submits jobs that take what is asked for. Raises RuntimeError without Slurm."""
    executor = submitit.SlurmExecutor(folder=LOGS / "slurm", max_num_timeout=100)
    executor.update_parameters(
        partition=cluster.partition,
        account=cluster.account,
        qos=cluster.qos,
        time=parse_minutes(cluster.time),
        mem=f"{cluster.memory}GB",
        **others,
    )
    return executor


@contextlib.contextmanager
def refuse_what_slurm_refuses() -> Iterator[None]:
    """Ends the program with what Slurm says, in one line."""
    try:
        yield
    except (RuntimeError, OSError, submitit.core.utils.FailedJobError) as error:
        common.refuse(f"--slurm: {error}")


@refuse_what_slurm_refuses()
def submit(jobs: list[Job], cluster: Cluster, workers: int | None) -> set[str]:
    """Submits the jobs as one Slurm job array, of which so many run at a time.

    -> that array, and those of jobs that were in the queue before; none if all jobs were.
    """
    executor = make_executor(
        cluster,
        job_name=Path(jobs[0].script).stem,
        array_parallelism=workers or len(jobs),
        nodes=jobs[0].nodes,
        cpus_per_task=cluster.cpus,
        gpus_per_node=cluster.gpus or None,
        additional_parameters={"requeue": True},
    )
    check_cpus(cluster)
    waiting, arrays = leave_out_queued(jobs)
    if len(waiting) < len(jobs):
        print(f"{len(jobs) - len(waiting)} runs are in the queue already")
    if not waiting:
        return set()

    with executor.batch():
        submitted = [executor.submit(job) for job in waiting]
    for job, task in zip(waiting, submitted, strict=True):
        (LOGS / f"{job.name}.slurm").write_text(task.job_id)
    array = submitted[0].job_id.split("_")[0]
    print(f"submitted {len(submitted)} runs as job array {array}; logs in {LOGS}")
    return {*arrays, array}


@refuse_what_slurm_refuses()
def submit_report(jobs: list[Job], arrays: set[str], args: Args) -> None:
    """Submits a job that writes the report of all jobs when those arrays have ended well."""
    reporter = make_executor(
        args.cluster,
        job_name="report",
        cpus_per_task=1,
        additional_parameters={
            "dependency": "afterok:" + ":".join(sorted(arrays)),
            "kill-on-invalid-dep": "yes",
        },
    )
    report = reporter.submit(write_report, jobs, args.save)
    print(f"submitted the report of all, {args.save}, as job {report.job_id}")


def count_threads(args: Args, script: str) -> int:
    """-> threads of each process. Raises ValueError if the script is none."""
    if args.threads is not None:
        return args.threads
    if "use_one_thread" in vars(common.load_script(script)):  # its network is too small for more
        return 1
    if args.cluster.slurm:
        cores = args.cluster.cpus
    else:
        cores = (os.cpu_count() or 1) // (args.workers or 1)
    return max(1, cores // args.processes)


def make_jobs(args: Args) -> list[Job]:
    """-> a job for every environment and seed; refuses what is no training."""
    command = shlex.split(args.command)
    if not command or shutil.which(command[0]) is None:
        common.refuse(f"--command {args.command}: there is no such program")
    if RUNS.exists() and not RUNS.is_dir():
        common.refuse(f"{RUNS}: is a file, where the folder of the runs should be")

    jobs = []
    for seed in range(args.start_seed, args.start_seed + args.num_seeds):
        for env_id in args.env_ids:
            options = ["--env-id", env_id, "--seed", str(seed)]
            try:
                words = command + options
                job = Job(words, args.threads, args.evaluate, args.processes, args.nodes)
                job.threads = count_threads(args, job.script)
            except ValueError as error:
                common.refuse(f"--command: {error}")
            jobs.append(job)

    # By the names that the script gives them: it may know one environment by two names
    names = {job.name for job in jobs}
    if len(names) < len(jobs):
        common.refuse(f"--env-ids {' '.join(args.env_ids)}: the same environment twice")
    return jobs


def write_report(jobs: list[Job], save: Path) -> None:
    """Has report.py write its files. Raises RuntimeError if it does not, or if it is too early."""
    unfinished = [job.name for job in jobs if not job.is_done()]
    if unfinished:  # another process trains it, and had Slurm's job end
        raise RuntimeError(f"no report yet, {', '.join(unfinished)} not finished")
    run_dirs = [str(job.find_run()[0]) for job in jobs]
    command = [sys.executable, str(PROGRAMS / "report.py"), *run_dirs, "--save", str(save)]
    command += ["--script", jobs[0].script]
    if subprocess.run(command).returncode != 0:
        raise RuntimeError("report.py failed")


def main(args: Args) -> int:
    """-> the exit code."""
    jobs = make_jobs(args)
    common.check_writable(LOGS / "new", "logs:")
    if args.save is not None:
        common.check_save(args.save)
    todo = [job for job in jobs if not job.is_done()]
    print(f"{len(jobs)} runs, of which {len(jobs) - len(todo)} are finished", flush=True)

    if args.cluster.slurm and todo:
        arrays = submit(todo, args.cluster, args.workers)
        if arrays and args.save is not None:
            submit_report(jobs, arrays, args)
        return 0

    # A SIGTERM stops all as Ctrl-C does
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    failed = 0
    try:
        if todo:
            failed = Queue(todo, args.workers or 1).run()
    except KeyboardInterrupt:
        print("stopped; started again, it goes on", file=sys.stderr)
        return 130
    if failed > 0:
        return 1

    if args.save is not None:
        try:
            write_report(jobs, args.save)
        except RuntimeError as error:
            print(f"run.py: {error}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Args)))
