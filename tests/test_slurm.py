"""`--slurm` of run.py and ablations.py on a Slurm cluster of one node, which the tests start.

It takes Debian's packages slurm-wlm and munge, and root. tests/test_run.py has what needs neither.
"""

import getpass
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
from conftest import ROOT, load, scalars, wait_until
from test_run import PPO, iteration, run, runs, trainers

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "sinfo", "scontrol", "scancel")
MISSING = [name for name in PROGRAMS if shutil.which(name) is None]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(MISSING), reason=f"Slurm is not installed: no {', '.join(MISSING)}"),
    pytest.mark.skipif(os.geteuid() != 0, reason="Slurm's daemons run as root here"),
]

CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}
SlurmctldPort={control_port}
SlurmdPort={node_port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MpiDefault=none
KillWait=5
NodeName={host} CPUs={cores} RealMemory=4000 State=UNKNOWN
PartitionName=debug Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def find_port() -> int:
    """-> a port that nobody uses."""
    with socket.socket() as free:
        free.bind(("", 0))
        return free.getsockname()[1]


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    """A cluster of one node, in a folder of its own; SLURM_CONF names it."""
    folder = tmp_path_factory.mktemp("slurm")
    for name in ("state", "spool"):
        (folder / name).mkdir()
    configuration = CONFIGURATION.format(
        host=socket.gethostname(),
        control_port=find_port(),
        node_port=find_port(),
        user=getpass.getuser(),
        cores=os.cpu_count(),
        folder=folder,
    )
    (folder / "slurm.conf").write_text(configuration)
    key = folder / "munge.key"
    key.write_bytes(secrets.token_bytes(1024))
    key.chmod(0o600)

    files = {"socket": "sock", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
    munged = ["munged", "--force", f"--key-file={key}"]
    munged += [f"--{option}={folder}/munge.{ending}" for option, ending in files.items()]
    daemons = ["munge", "slurmctld", "slurmd"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_CONF", str(folder / "slurm.conf"))
        patch.delenv("OMP_NUM_THREADS", raising=False)
        try:
            subprocess.run(munged, check=True)
            subprocess.run(["slurmctld", "-i"], check=True)
            subprocess.run(["slurmd"], check=True)
            wait_until(lambda: "idle" in ask("sinfo --noheader"))
            yield folder
        finally:
            for name in reversed(daemons):
                file = folder / f"{name}.pid"
                if file.exists():
                    os.kill(int(file.read_text()), signal.SIGTERM)
            time.sleep(2)


def ask(command: str) -> str:
    """-> what one of Slurm's programs prints."""
    return subprocess.run(command.split(), capture_output=True, text=True, check=True).stdout


def errors(cwd: Path) -> str:
    """-> what all jobs have written to stderr."""
    return "".join(path.read_text() for path in (cwd / "runs" / "logs" / "slurm").glob("*.err"))


def test_an_array_trains_evaluates_and_reports(slurm, tmp_path):
    """Fails when a job does not do its part, or a second call queues the same runs once more."""
    command = f"{PPO} --total-timesteps 10240"
    options = "--num-seeds 2 --slurm --cpus 1 --memory 1 --time 30 --evaluate 2 --save out/x"
    words = ["--env-ids", "CartPole-v1", *options.split()]
    first = run(tmp_path, command, *words)
    assert first.returncode == 0, first.stderr
    second = run(tmp_path, command, *words)
    assert second.stdout.endswith("2 runs are in the queue already\n"), second.stderr
    wait_until(lambda: not ask("squeue --noheader"), 240)
    assert len(runs(tmp_path)) == 2 and all(
        load(path)["iteration"] == 20 for path in runs(tmp_path)
    )
    assert "| evaluated |" in (tmp_path / "out" / "x.md").read_text()
    third = run(tmp_path, command, *words)
    assert third.stdout.startswith("2 runs, of which 2 are finished\n")


def test_variants_are_trained_and_reported(slurm, tmp_path):
    """Fails when a variant's job does not train its copy of the script, or is queued twice."""
    words = "--variants 4 --env-ids CartPole-v1 --num-seeds 1 --total-timesteps 10240 --save out"
    on_slurm = "--slurm --memory 1 --time 30"
    first = run_ablations(tmp_path, *words.split(), *on_slurm.split())
    assert "submitted 2 runs as job array" in first
    second = run_ablations(tmp_path, *words.split(), *on_slurm.split())
    assert second.endswith("2 runs are in the queue already\n")
    wait_until(lambda: not ask("squeue --noheader"), 240)
    assert "Error" not in errors(tmp_path)
    run_ablations(tmp_path, *words.split(), "--report")
    lines = pd.read_csv(tmp_path / "out" / "ablations.csv")
    assert lines.variant.tolist() == ["constant learning rate", "recipe"]
    assert lines.steps.tolist() == [10240, 10240]


def run_ablations(cwd: Path, *words: str) -> str:
    """-> what ablations.py prints."""
    command = [sys.executable, ROOT / "benchmark" / "ablations.py", *words]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=True).stdout


def test_what_no_node_has_is_refused(slurm, tmp_path):
    """Fails when such a job is submitted, and then waits for ever without a word."""
    result = run(tmp_path, PPO, "--env-ids", "CartPole-v1", "--slurm", "--cpus", 5000)
    assert result.returncode == 2 and result.stderr.count("\n") == 1
    assert "--cpus 5000: no node of the partition has more than" in result.stderr


def stop_and_go_on(cwd: Path, job: str, stop: str) -> None:
    """Stops the job of a run in that folder; fails if it does not go on where it was."""
    subprocess.run([*stop.split(), job], check=True)
    wait_until(lambda: "PENDING" in ask("squeue --noheader --format=%T"), 90)
    assert not trainers(cwd)
    reached = iteration(cwd, "CartPole")
    log = cwd / "runs" / "logs" / "CartPole-v1__ppo__1.log"
    assert "to go on: " in log.read_text() and "RuntimeError" not in errors(cwd)

    # Slurm lets a requeued job wait for two minutes
    subprocess.run(["scontrol", "update", f"jobid={job}", "starttime=now"], check=True)
    wait_until(lambda: iteration(cwd, "CartPole") > reached, 120)
    subprocess.run(["scancel", job], check=True)
    wait_until(lambda: not ask("squeue --noheader"), 90)
    (folder,) = runs(cwd)
    steps = [step for step, _ in scalars(folder, "charts/SPS")]
    assert steps == [512 * (1 + i) for i in range(len(steps))] and len(steps) > reached
    assert "RuntimeError" not in errors(cwd)


@pytest.mark.parametrize("how", ["scancel --signal=USR2", "scontrol requeue"])
def test_a_requeued_run_goes_on(slurm, tmp_path, how):
    """Fails when it begins anew, counts as failed, or is trained here at the same time."""
    command = f"{PPO} --total-timesteps 20000000 --checkpoint-interval 5"
    words = "--env-ids CartPole-v1 --num-seeds 1".split()
    on_slurm = "--slurm --cpus 1 --memory 1".split()
    assert run(tmp_path, command, *words, *on_slurm).returncode == 0
    wait_until(lambda: iteration(tmp_path, "CartPole") > 0, 120)
    job = ask("squeue --noheader --format=%i").strip()
    here = run(tmp_path, command, *words)
    assert here.returncode == 1 and "left out, another process trains it" in here.stderr

    stop_and_go_on(tmp_path, job, how)


def test_two_processes_train_a_requeued_run(slurm, tmp_path):
    """Fails when torchrun is not started, its end by a signal counts as a failure, or one is left.

    Detail A2 on Slurm: what the tests above do with one process.
    """
    command = f"{PPO} --total-timesteps 20000000 --checkpoint-interval 5"
    words = "--env-ids CartPole-v1 --num-seeds 1 --slurm --processes 2 --cpus 2 --memory 1"
    result = run(tmp_path, command, *words.split())
    assert result.returncode == 0, result.stderr
    wait_until(lambda: iteration(tmp_path, "CartPole") > 0, 120)
    assert len(trainers(tmp_path)) == 2
    job = ask("squeue --noheader --format=%i").strip()

    stop_and_go_on(tmp_path, job, "scontrol requeue")
