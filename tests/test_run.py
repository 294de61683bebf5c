"""benchmark/run.py: runs that fail, are killed, are stopped half-way and gone on with.

Here and through submitit.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import run as run_module
import submitit
import torch
from conftest import ROOT, find_slurm_job, load, scalars, wait_until

RUN = ROOT / "benchmark" / "run.py"
PPO = f"{sys.executable} {ROOT / 'ppo.py'}"
LONG = "--total-timesteps 20000000 --checkpoint-interval 5"


def start(cwd: Path, command: str, *args: object, **environment: str) -> subprocess.Popen:
    """Starts `python benchmark/run.py --command COMMAND ARGS` in the folder cwd."""
    words = [sys.executable, str(RUN), "--command", command, *map(str, args)]
    env = os.environ | environment
    return subprocess.Popen(
        words, cwd=cwd, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def run(cwd: Path, command: str, *args: object, **environment: str) -> subprocess.CompletedProcess:
    process = start(cwd, command, *args, **environment)
    stdout, stderr = process.communicate(timeout=200)
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)


def runs(cwd: Path, name: str = "") -> list[Path]:
    """Folders of the runs whose name begins so."""
    return sorted(path for path in (cwd / "runs").glob(f"{name}*") if path.name != "logs")


def trainers(cwd: Path) -> dict[int, str]:
    """Process IDs and commands of all ppo.py that run in the folder cwd."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "cmdline").read_text().split("\0")
            is_script = str(ROOT / "ppo.py") in words[1:3]  # torchrun says python -u
            if is_script and (process / "cwd").resolve() == cwd.resolve():
                found[int(process.name)] = " ".join(words)
        except (OSError, IndexError):  # it ended meanwhile, or is no program
            pass
    return found


def iteration(cwd: Path, name: str) -> int:
    """How far the checkpoint of the only run of that name is."""
    folders = [path for path in runs(cwd, name) if (path / "checkpoint.pt").exists()]
    return load(folders[0])["iteration"] if folders else 0


def test_a_failing_run_does_not_stop_the_others(tmp_path):
    """Fails when the others do not run, or when the failure is not said or not in the exit code."""
    command = f"{PPO} --total-timesteps 1024"
    result = run(tmp_path, command, "--env-ids", "NoSuch-v0", "CartPole-v1", "--num-seeds", 1)
    assert result.returncode == 1
    assert (
        "NoSuch-v0__ppo__1: failed, runs/logs/NoSuch-v0__ppo__1.log ends with\n$ " in result.stderr
    )
    assert "ppo.py: --env-id NoSuch-v0" in result.stderr and "Traceback" not in result.stderr
    assert re.search(r"CartPole-v1__ppo__1: runs/\S+: mean return", result.stderr)
    (finished,) = runs(tmp_path)
    assert load(finished)["iteration"] == 2
    again = run(
        tmp_path, command, "--env-ids", "CartPole-v1", "--num-seeds", 1, "--save", "results/ppo"
    )
    assert (again.returncode, runs(tmp_path)) == (0, [finished])
    assert again.stdout.startswith("1 runs, of which 1 are finished\n| script | environment |")
    assert f",{finished.name}," in (tmp_path / "results" / "ppo_runs.csv").read_text()
    args = "--env-ids CartPole-v1 --num-seeds 1 --threads 1"
    other = run(tmp_path, f"{command} --gamma 0.9", *args.split())
    assert other.stdout == "1 runs, of which 0 are finished\n"  # other arguments, another run
    assert len(runs(tmp_path)) == 2


def test_killed_worker_and_restart_half_way(tmp_path):
    """Fails when a kill goes unnoticed, Ctrl-C leaves or loses something, or all begins anew."""
    args = ["--env-ids", "CartPole-v1", "--num-seeds", 2, "--workers", 2]
    process = start(tmp_path, f"{PPO} {LONG}", *args)
    names = [f"CartPole-v1__ppo__{seed}" for seed in (1, 2)]
    wait_until(lambda: all(iteration(tmp_path, name) > 0 for name in names))
    (victim,) = (pid for pid, command in trainers(tmp_path).items() if "--seed 2" in command)
    os.kill(victim, signal.SIGKILL)
    assert process.stderr.readline().startswith("CartPole-v1__ppo__2: failed")
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130 and not trainers(tmp_path)
    assert "stopping 1 runs" in stderr
    assert stderr.endswith("stopped; started again, it goes on\n")

    reached = {name: iteration(tmp_path, name) for name in names}
    assert all(reached.values())
    again = start(tmp_path, f"{PPO} {LONG}", *args)
    wait_until(lambda: all(iteration(tmp_path, name) > reached[name] for name in names))
    again.send_signal(signal.SIGTERM)
    assert again.wait(60) == 130 and not trainers(tmp_path)
    assert len(runs(tmp_path)) == 2
    for name in names:
        (folder,) = runs(tmp_path, name)
        steps = [step for step, _ in scalars(folder, "charts/SPS")]
        assert steps == [512 * (1 + i) for i in range(len(steps))] and len(steps) > reached[name]
        log = (tmp_path / "runs" / "logs" / f"{name}.log").read_text()
        assert log.count("\n$ ") == 1  # the second command


def test_runs_are_stopped_when_nobody_reads(tmp_path):
    """Fails when a closed terminal keeps run.py from passing on that all is to stop."""
    process = start(tmp_path, f"{PPO} {LONG}", "--env-ids", "CartPole-v1", "--num-seeds", 1)
    wait_until(lambda: iteration(tmp_path, "CartPole") > 0)
    process.stdout.close()
    process.stderr.close()
    process.send_signal(signal.SIGTERM)
    process.wait(60)
    assert not trainers(tmp_path)


def test_second_ctrl_c_kills(tmp_path):
    """Fails when a run that does not stop keeps run.py from ending."""
    process = start(tmp_path, f"{PPO} {LONG}", "--env-ids", "CartPole-v1", "--num-seeds", 1)
    wait_until(lambda: iteration(tmp_path, "CartPole") > 0)
    (child,) = trainers(tmp_path)
    os.kill(child, signal.SIGSTOP)  # it cannot heed a SIGTERM
    process.send_signal(signal.SIGINT)
    wait_until(lambda: process.stderr.readline().startswith("stopping 1 runs"))
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 130 and not trainers(tmp_path)


@pytest.mark.parametrize(
    ("args", "line"),
    [
        (
            ("python nothing.py", "--env-ids", "A-v0"),
            "run.py: --command: cannot read nothing.py, No such file",
        ),
        (
            ("echo", "--env-ids", "A-v0"),
            "run.py: --command: echo --env-id A-v0 --seed 1 names no script",
        ),
        ((f"python {ROOT}/tests/conftest.py", "--env-ids", "A-v0"), "run.py: --command: "),
        (
            ("nothing ppo.py", "--env-ids", "A-v0"),
            "run.py: --command nothing ppo.py: there is no such program",
        ),
        (
            (PPO, "--env-ids", "CartPole-v1", "CartPole-v1"),
            "run.py: --env-ids CartPole-v1 CartPole-v1: the same environment twice",
        ),
        (
            (f"python {ROOT}/ppo_procgen.py", "--env-ids", "starpilot", "procgen-starpilot-v0"),
            "run.py: --env-ids starpilot procgen-starpilot-v0: the same environment twice",
        ),
        ((PPO, "--env-ids", "A-v0", "--evaluate", -1), "run.py: --evaluate -1: must be at least 0"),
        ((PPO, "--env-ids", "A-v0", "--time", "1d"), "run.py: --time 1d: must be minutes"),
        ((PPO, "--env-ids", "A-v0", "--save", ""), "run.py: --save: say where to write"),
        (
            (PPO, "--env-ids", "A-v0", "--save", "file/x"),
            "run.py: --save file/x",
        ),
        ((PPO, "--env-ids", "A-v0", "--workers", 0), "run.py: --workers 0: must be at least 1"),
        ((PPO, "--env-ids", "A-v0", "--slurm"), "run.py: --slurm: Could not detect"),
    ],
)
def test_bad_input_is_one_line(tmp_path, monkeypatch, capsys, args, line):
    """Fails when a check is taken out, or comes after the training."""
    (tmp_path / "file").write_text("")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["run.py"])
    if "--slurm" in args:
        monkeypatch.setenv("PATH", str(tmp_path))  # without Slurm, be it installed or not
    assert refused(["--command", *map(str, args)], capsys).startswith(line)
    assert not runs(tmp_path)


def refused(words: list[str], capsys) -> str:
    """Gives main that command line, checks that it refuses as it should -> its one line."""
    with pytest.raises(SystemExit) as end:
        run_module.main(run_module.tyro.cli(run_module.Args, args=words))
    (line,) = capsys.readouterr().err.splitlines()
    assert end.value.code == 2
    return line


def test_runs_that_is_a_file_is_one_line(tmp_path, monkeypatch, capsys):
    """Fails when a file in the way of a folder ends in a traceback."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["run.py"])
    words = ["--command", PPO, "--env-ids", "CartPole-v1"]
    (tmp_path / "runs").write_text("")
    assert refused(words, capsys).startswith("run.py: runs: is a file")
    (tmp_path / "runs").unlink()
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "logs").write_text("")
    assert refused(words, capsys).startswith("run.py: logs: runs/logs/new: cannot be written")


def test_how_a_run_is_kept_makes_it_no_other_one(tmp_path):
    """Fails when --track or --capture-video has a finished run trained again."""
    args = "--env-ids CartPole-v1 --num-seeds 1".split()
    first = f"{PPO} --total-timesteps 1024 --capture-video"
    assert run(tmp_path, first, *args).returncode == 0
    second = f"{PPO} --total-timesteps 1024 --track --checkpoint-interval 3"
    result = run(tmp_path, second, *args)
    assert (result.returncode, result.stdout) == (0, "1 runs, of which 1 are finished\n")
    assert len(runs(tmp_path)) == 1


def test_evaluates_what_is_finished(tmp_path):
    """Fails when agents are not evaluated, or a second time, or the report does not say so."""
    args = "--env-ids CartPole-v1 --num-seeds 2 --workers 2".split()
    command = f"{PPO} --total-timesteps 1024"
    assert run(tmp_path, command, *args).returncode == 0
    args += ["--evaluate", "5", "--save", "out/x"]
    result = run(tmp_path, command, *args)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("2 runs, of which 0 are finished\n| script ")
    assert result.stderr.count(" 5 episodes, ") == 2
    assert "| evaluated |" in result.stdout and len(runs(tmp_path)) == 2
    result = run(tmp_path, command, *args)
    assert result.stdout.startswith("2 runs, of which 2 are finished\n")
    for folder in runs(tmp_path):
        assert (folder / "evaluation.csv").read_text().count("\n") == 2  # the head, and a line


def test_a_copied_script(tmp_path):
    """Fails when a copy is not trained, evaluated and reported, or another module is taken."""
    copy = shutil.copy(ROOT / "ppo.py", tmp_path / "mine.py")
    command = f"{sys.executable} {copy} --total-timesteps 1024"
    args = "--env-ids CartPole-v1 --num-seeds 1 --evaluate 2 --save out/x".split()
    result = run(tmp_path, command, *args)
    assert result.returncode == 0, result.stderr
    assert "| mine.py --total-timesteps 1024 | CartPole-v1 |" in result.stdout


def test_nobody_trains_a_run_twice_at_a_time(tmp_path):
    """Fails when two run.py begin the same run, or the lock outlives the run that holds it."""
    args = "--env-ids CartPole-v1 --num-seeds 1".split()
    first = start(tmp_path, f"{PPO} {LONG}", *args)
    wait_until(lambda: trainers(tmp_path))
    second = run(tmp_path, f"{PPO} {LONG}", *args)
    assert second.returncode == 1
    assert "CartPole-v1__ppo__1: left out, another process trains it" in second.stderr
    assert len(trainers(tmp_path)) == 1

    # A run whose run.py is killed goes on, and still is nobody else's
    wait_until(lambda: iteration(tmp_path, "CartPole") > 0)
    first.kill()
    first.wait()
    assert "left out, another process" in run(tmp_path, f"{PPO} {LONG}", *args).stderr
    (pid,) = trainers(tmp_path)
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not trainers(tmp_path))
    third = start(tmp_path, f"{PPO} {LONG}", *args)
    wait_until(lambda: trainers(tmp_path))
    third.send_signal(signal.SIGINT)
    third.communicate(timeout=60)
    assert len(runs(tmp_path)) == 1


def test_a_ctrl_c_that_wakes_nobody_is_seen():
    """Fails when a Ctrl-C just before the queue waits is lost, so that the runs go on."""

    class Sleep:
        """A run of a minute, whose first second brings a Ctrl-C."""

        def start(self):
            # Another thread takes the signal: the one that waits is not woken, as if it had come
            # just before
            threading.Timer(1, signal.raise_signal, [signal.SIGINT]).start()
            return subprocess.Popen(["sleep", "60"])

        start_evaluation = None

    begin = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        run_module.Queue([Sleep()], workers=1).run()
    assert time.monotonic() - begin < 30


def test_a_ctrl_c_while_the_runs_begin_stops_them(monkeypatch):
    """Fails when a Ctrl-C before the last run is handed out lets those before it go on."""

    class Sleep:
        """A run of a minute."""

        def start(self):
            return subprocess.Popen(["sleep", "60"])

        start_evaluation = None

    submit = run_module.ThreadPoolExecutor.submit
    queue = run_module.Queue([Sleep(), Sleep()], workers=2)

    def submit_or_interrupt(pool, train, job):
        if job is queue.jobs[1]:
            wait_until(lambda: queue.children)
            raise KeyboardInterrupt
        return submit(pool, train, job)

    monkeypatch.setattr(run_module.ThreadPoolExecutor, "submit", submit_or_interrupt)
    begin = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        queue.run()
    assert time.monotonic() - begin < 30


@pytest.mark.parametrize(
    ("options", "script", "threads"),
    [
        ("--workers 2", "ppo_atari", (os.cpu_count() or 1) // 2 or 1),
        ("", "ppo_atari", os.cpu_count() or 1),
        ("", "ppo", 1),
        ("--threads 3", "ppo", 3),
        ("--slurm --cpus 5", "ppo_atari", 5),
        ("--slurm --cpus 5", "ppo_continuous_action", 1),
    ],
)
def test_threads_of_a_run(options, script, threads):
    """Fails when small networks get more threads than one, or workers more than there are cores."""
    path = str(ROOT / f"{script}.py")
    words = ["--command", path, "--env-ids", "A", *options.split()]
    args = run_module.tyro.cli(run_module.Args, args=words)
    assert run_module.count_threads(args, path) == threads


@pytest.mark.parametrize(
    ("options", "cpus"),
    [
        ("", 4),
        ("--threads 8", 8),
        ("--threads 8 --processes 2", 16),
        ("--threads 8 --gpus 2", 16),
        ("--threads 8 --cpus 20", 20),
    ],
)
def test_slurm_has_a_core_for_each_thread(options, cpus):
    """Fails when the threads of a run share cores, or --cpus is not heeded."""
    words = ["--command", PPO, "--env-ids", "A", "--slurm", *options.split()]
    args = run_module.tyro.cli(run_module.Args, args=words)
    assert args.cluster.cpus == cpus


def test_threads_wait_passively(tmp_path, monkeypatch):
    """Fails when threads that wait take the cores from other runs, or a user's word is ignored."""
    monkeypatch.chdir(tmp_path)
    printed = []
    for said in (None, "active"):
        monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
        if said:
            monkeypatch.setenv("OMP_WAIT_POLICY", said)
        job = run_module.Job([*PPO.split(), "--env-id", "CartPole-v1"], 2)
        code = "import os; print(os.environ['OMP_WAIT_POLICY'], os.environ['OMP_NUM_THREADS'])"
        with job.lock() as lock:
            child = job.start_program([sys.executable, "-c", code], lock)
        assert child.wait() == 0
        printed.append(job.read_log(1))
    assert printed == ["passive 2", "active 2"]


@pytest.mark.parametrize(
    ("text", "minutes"),
    [
        ("90", 90),
        ("24:00:00", 1440),
        ("1:30:59", 90),
        ("45:30", 45),
        ("2-12", 3600),
        ("1-01:30:00", 1530),
        ("", 0),
        ("-5", 0),
        ("1:2:3:4", 0),
        ("soon", 0),
    ],
)
def test_times_are_slurms(text, minutes):
    """Fails when a time is read otherwise than Slurm does."""
    assert run_module.parse_minutes(text) == minutes


@pytest.mark.slow
def test_a_queue_of_twenty(tmp_path):
    """Fails when a run is lost, or when more than two run at a time."""
    args = ["--env-ids", "CartPole-v1", "Acrobot-v1", "--num-seeds", 10, "--workers", 2]
    process = start(tmp_path, f"{PPO} --total-timesteps 2048", *args)
    most = 0
    while process.poll() is None:
        most = max(most, len(trainers(tmp_path)))
    assert process.returncode == 0 and most == 2
    folders = runs(tmp_path)
    assert len(folders) == 20 and all(load(folder)["iteration"] == 4 for folder in folders)
    assert process.stderr.read().count(": mean return") == 20


def test_slurm_array(slurm):
    """Fails when Slurm misses an option, or a preempted job is not requeued or begins anew."""
    command = f"{PPO} --total-timesteps 60000 --checkpoint-interval 5"
    what = "--env-ids CartPole-v1 Acrobot-v1 --num-seeds 2"
    where = "--slurm --partition a100 --gpus 1 --cpus 3 --memory 7"
    how = "--workers 2 --threads 1 --time 5:00:00 --account a1 --qos low"
    result = run(slurm, command, *what.split(), *where.split(), *how.split())
    assert result.returncode == 0, result.stderr
    assert result.stdout.endswith("submitted 4 runs as job array 4711; logs in runs/logs\n")
    submitted = (slurm / "submitted.sh").read_text()
    wanted = [
        "array=0-3%2",
        "partition=a100",
        "account=a1",
        "qos=low",
        "gpus-per-node=1",
        "cpus-per-task=3",
        "mem=7GB",
        "time=300",
        "requeue",
        "job-name=ppo",
    ]
    for option in wanted:
        assert f"#SBATCH --{option}\n" in submitted, option

    words, node = find_slurm_job(slurm, 2)
    job = subprocess.Popen(words, **node)
    reached = wait_until(lambda: iteration(slurm, "CartPole-v1__ppo__2"))
    job.send_signal(signal.SIGUSR2)
    job.wait(60)
    assert not trainers(slurm) and (slurm / "asked").read_text() == "requeue 4711_2\n"
    assert iteration(slurm, "CartPole-v1__ppo__2") >= reached
    assert subprocess.run(words, **node, timeout=100).returncode == 0
    assert iteration(slurm, "CartPole-v1__ppo__2") == 117
    assert "--resume" in (slurm / "runs" / "logs" / "CartPole-v1__ppo__2.log").read_text()


def test_submitits_local_executor(tmp_path, monkeypatch):
    """Fails when a job does not train, or when a failing one is taken for a finished one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(RUN.parent)
    monkeypatch.setenv("PYTHONPATH", str(RUN.parent))
    job_class = run_module.Job
    executor = submitit.LocalExecutor(tmp_path / "submitit")
    executor.update_parameters(timeout_min=5)
    command = [*PPO.split(), "--total-timesteps", "1024", "--env-id"]
    good = executor.submit(job_class([*command, "CartPole-v1"], 1))
    bad = executor.submit(job_class([*command, "NoSuch-v0"], 1))
    good.result()
    assert iteration(tmp_path, "CartPole-v1__ppo__1") == 2
    with pytest.raises(submitit.core.utils.FailedJobError, match="NoSuch-v0__ppo__1 failed"):
        bad.result()


@pytest.mark.slow
def test_two_nodes_train_one_run(tmp_path):
    """Fails when nodes do not find each other, train a run each, or disagree whether to resume."""
    program = (
        "import sys, run\n"
        "command = [sys.executable, sys.argv[1], '--total-timesteps', sys.argv[2]]\n"
        "run.Job(command, threads=1, nodes=2)()\n"
    )
    slurm = {"SUBMITIT_EXECUTOR": "slurm", "SLURM_JOB_ID": str(os.getpid())}
    slurm["SLURM_JOB_NODELIST"] = "localhost,elsewhere"
    for steps in (2048, 4096, 4096):  # begins, goes on, has nothing to do
        nodes = []
        for node in ("0", "1"):
            environment = os.environ | slurm | {"SLURM_NODEID": node}
            environment["PYTHONPATH"] = str(ROOT / "benchmark")
            command = [sys.executable, "-c", program, str(ROOT / "ppo.py"), str(steps)]
            nodes.append(
                subprocess.Popen(
                    command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True
                )
            )
        for process in nodes:
            _, stderr = process.communicate(timeout=120)
            assert process.returncode == 0, stderr
        if steps == 2048:
            # As by --resume RUN --total-timesteps 4096: what a run of more steps goes on from
            (run_dir,) = runs(tmp_path)
            checkpoint = load(run_dir)
            checkpoint["args"]["total_timesteps"] = 4096
            torch.save(checkpoint, run_dir / "checkpoint.pt")
    (run_dir,) = runs(tmp_path)
    assert load(run_dir)["iteration"] == 8 and load(run_dir)["processes"] == 2
