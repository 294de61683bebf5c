"""README.md's commands do what it says, as they stand there."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

README = (ROOT / "README.md").read_text()


@pytest.fixture
def folder(tmp_path):
    """A folder that has the project's files."""
    for path in ROOT.glob("*.py"):
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / "benchmark").symlink_to(ROOT / "benchmark")
    return tmp_path


def run(folder: Path, command: str) -> str:
    """Runs a command of README.md in the folder -> what it printed."""
    python = Path(sys.executable).parent
    environment = os.environ | {"PATH": f"{python}:{os.environ['PATH']}", "COLUMNS": "200"}
    result = subprocess.run(
        command, shell=True, cwd=folder, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, (command, result.stderr)
    return result.stdout


def line_of(beginning: str) -> str:
    """The line of README.md's code blocks that begins so, without its comment."""
    blocks = re.findall(r"```(?:sh|bash)\n(.*?)```", README, re.S)
    lines = [line for block in blocks for line in block.splitlines()]
    (line,) = [line for line in lines if line.startswith(beginning)]
    return line.partition("#")[0].strip()


def test_train_many_then_report(folder):
    """Fails when run.py's logs, or anything else that it leaves in runs/, block the report."""
    train = line_of('python benchmark/run.py --command "python ppo.py"')
    train = train.replace('"python ppo.py"', '"python ppo.py --total-timesteps 1024"')
    assert "6 runs, of which 0 are finished" in run(folder, train)

    report = line_of("python benchmark/report.py runs/*")
    assert "| CartPole-v1 |" in run(folder, report)
    assert len(list(folder.glob("my_results*"))) == 5


def test_help_lists_every_argument(folder):
    """Fails when --help lacks an argument or its help line."""
    shown = " ".join(run(folder, line_of("python ppo.py --help")).split())
    for name in ("--env-id", "--total-timesteps", "--ent-coef", "--compile", "--resume"):
        assert name in shown
    assert "weight of the entropy bonus" in shown.replace("│ ", "")


def test_every_command_names_what_there_is():
    """Fails when a command names a file, an extra or an option that does not exist."""
    blocks = re.findall(r"```(?:sh|bash)\n(.*?)```", README, re.S)
    lines = [line.partition("#")[0] for block in blocks for line in block.splitlines()]
    extras = (ROOT / "pyproject.toml").read_text()
    for line in lines:
        for extra in re.findall(r"\.\[([\w,]+)\]", line):
            for name in extra.split(","):
                assert f"\n{name} = [" in extras, line
        source = None
        for word in shlex.split(line):
            if re.fullmatch(r"[\w/]+\.py", word):
                source = (ROOT / word).read_text()
            if source is not None and word.startswith("--") and word != "--help":
                option = word.removeprefix("--").partition("=")[0].replace("-", "_")
                assert f"    {option}: " in source, line
