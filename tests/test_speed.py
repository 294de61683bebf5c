"""benchmark/speed.py: what cannot work is refused before anything is measured."""

import json
import sys

import pytest
import speed
from conftest import ROOT


@pytest.mark.parametrize(
    ("args", "line"),
    [
        (["--repeats", "0"], "speed.py: --repeats 0: must be at least 1"),
        (["--steps", "0"], "speed.py: --steps 0: must be at least two rollouts of ppo.py, 1024"),
        (["--steps", "1023"], "speed.py: --steps 1023: must be at least two rollouts of ppo.py"),
        (["--save", "file/x.json"], "speed.py: --save file/x.json: cannot be written"),
        (["--contestant", "nothing"], "speed.py: --contestant nothing: is none of "),
        (
            ["--leave-out", "speed"],
            "speed.py: --leave-out speed: is none of ",
        ),
        (["--env-id", "NoSuch-v0"], "ppo.py: --env-id NoSuch-v0: "),
    ],
    ids=" ".join,
)
def test_bad_input_is_one_line(tmp_path, monkeypatch, capsys, args, line):
    """Fails when the check is taken out, or something is measured before it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["speed.py", *args])
    monkeypatch.setattr(speed, "measure_in_child", lambda contestant: pytest.fail("measured"))
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit) as end:
        speed.main(speed.tyro.cli(speed.Args))
    (said,) = capsys.readouterr().err.splitlines()
    assert end.value.code == 2 and said.startswith(line)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_what_can_be_measured_is(tmp_path, monkeypatch, capsys):
    """Fails when a good command is refused, or its record or its table is not written."""
    monkeypatch.chdir(ROOT)
    save = tmp_path / "new" / "speed.json"
    arguments = ["--processes", "1", "2", "--save", str(save)]
    monkeypatch.setattr(sys, "argv", ["speed.py", *arguments])
    monkeypatch.setattr(speed, "measure_in_child", lambda contestant: 100 * len(contestant.name))
    monkeypatch.setattr(speed, "IN_SBX", ())  # it may or may not be installed
    speed.main(speed.Args(steps=1024, repeats=1, processes=[1, 2], save=save))
    record = json.loads(save.read_text())
    assert record["steps_per_second"] == {
        "stable-baselines3": [1700],
        "ppo.py": [600],
        "ppo.py --compile": [1600],
        "ppo.py --async-envs": [1900],
        "ppo.py, 2 processes": [1900],
        "ppo.py --compile, 2 processes": [2900],
    }
    assert "ppo.py --compile" in capsys.readouterr().out

    speed.main(speed.Args(table=[save]))
    ways = "stable-baselines3 | as it is | --compile | --async-envs | 2 processes | "
    assert capsys.readouterr().out.splitlines() == [
        f"| script | environment | {ways}--compile, 2 processes |",
        "|" + " --- |" * 8,
        "| ppo.py | CartPole-v1 | 1700 (1.00) | 600 (0.35) | 1600 (0.94) | 1900 (1.12) | "
        "1900 (1.12) | 2900 (1.71) |",
    ]


def test_engines_are_also_measured_alone(tmp_path, capsys):
    """Fails when the second table lacks environments, or a ratio is that of something else."""
    ours, theirs = "ppo_multidiscrete_mask.py", "ppo_multidiscrete.py"
    speeds = {ours: 200.0, theirs: 100.0}
    speeds |= {f"{theirs}{speed.ALONE}": 1000.0, f"{ours}{speed.ALONE}": 2000.0}
    record = {
        "script": "ppo_multidiscrete_mask",
        "env_id": "MicrortsMining-v1",
        "steps_per_second": {name: [value] for name, value in speeds.items()},
        "ratio": speed.compute_ratio(speeds),
        "share_of_environments": speed.compute_shares(speeds),
    }
    assert speed.make_table([record]).splitlines() == [
        "| script | environment | as it is |",
        "| --- | --- | --- |",
        f"| {ours} | MicrortsMining-v1 | 200 (1.00) |",
        "",
        "| beside the other script | steps/s | ratio | share of the environments |",
        "| --- | --- | --- | --- |",
        f"| {theirs} | 100 | 1.00 | 10% |",
        f"| {ours} | 200 | 2.00 | 10% |",
        f"| {theirs}, environments alone | 1000 | 1.00 |  |",
        f"| {ours}, environments alone | 2000 | 2.00 |  |",
    ]


def test_a_file_that_is_no_measurement_is_refused(tmp_path, capsys):
    """Fails when --table ends in a traceback."""
    (tmp_path / "x.json").write_text('{"script": "ppo"}')
    with pytest.raises(SystemExit) as end:
        speed.main(speed.Args(table=[tmp_path / "x.json"]))
    assert end.value.code == 2 and "--table" in capsys.readouterr().err


def test_each_option_for_speed_is_measured():
    """Fails when a script lacks its options for speed among what is measured."""
    names = [one.name for one in speed.list_contestants(speed.Args(script="ppo_procgen"))]
    script = "ppo_procgen.py"
    assert names == [script, *(f"{script} {o}" for o in ("--compile", "--amp", "--amp --compile"))]
    args = speed.Args(script="ppo_procgen", leave_out=["amp"], processes=[2])
    ways = ["", " --compile"]
    assert [one.name for one in speed.list_contestants(args)] == [
        f"ppo_procgen.py{way}, 2 processes" for way in ways
    ]
