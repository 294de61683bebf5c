"""benchmark/speed.py: what cannot work is refused before anything is measured."""

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
        (["--run", "nothing"], "speed.py: --run nothing: is none of stable-baselines3, ppo.py"),
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
    """Fails when a good command is refused, or its record is not written."""
    monkeypatch.chdir(ROOT)
    save = tmp_path / "new" / "speed.json"
    monkeypatch.setattr(sys, "argv", ["speed.py", "--save", str(save)])
    monkeypatch.setattr(speed, "measure_in_child", lambda contestant: float(len(contestant)))
    speed.main(speed.Args(steps=1024, repeats=1, save=save))
    assert '"stable-baselines3": 1.0' in save.read_text()
    assert "ppo.py --compile" in capsys.readouterr().out
