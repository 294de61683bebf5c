"""Whatever is given: it is taken, or refused in one line with exit code 2. Cases are random.

Seconds in CI; `pytest -m slow tests/test_properties.py` tries many more.
"""

import copy
import dataclasses
import shutil
import sys

import pytest
import torch
import tyro
from conftest import import_scripts, load, train_in
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

MODULES = import_scripts()
SIZES = dict(num_envs=2, num_steps=16, num_minibatches=1, update_epochs=1, total_timesteps=32)
JUNK = [None, True, -1, 0, 3, 1e300, float("nan"), "", "text", [], [1, "a"], {}, {"a": 1}, b"\x00"]

FEW = pytest.param(30, id="few")
MANY = pytest.param(1000, id="many", marks=pytest.mark.slow)


def check(property_, num_examples: int) -> None:
    """Tries a property on so many cases, the same ones each time."""
    quiet = settings(
        max_examples=num_examples,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    quiet(property_)()


def refused(capsys, name: str, function, *args) -> bool:
    """Calls the function -> whether it refused; fails if it did so in other than one line."""
    capsys.readouterr()
    try:
        function(*args)
    except SystemExit as ended:
        assert ended.code == 2
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1 and lines[0].startswith(f"{name}.py: "), lines
        return True
    return False


def values_of(field: dataclasses.Field) -> st.SearchStrategy:
    """Values that a user could give for an argument, most of which make no sense."""
    numbers = st.integers(-(10**13), 10**13) | st.integers(-2, 300)
    if isinstance(field.default, bool):
        return st.booleans()
    if isinstance(field.default, int):
        return numbers
    if isinstance(field.default, float) or field.name == "target_kl":
        return st.floats() | st.floats(0, 1) | numbers
    return st.text(max_size=20)


@pytest.mark.parametrize("num_examples", [FEW, MANY])
@pytest.mark.parametrize("name", MODULES)
def test_arguments(name, num_examples, capsys):
    """Fails when an argument that cannot work is taken, or ends in a traceback."""
    script = MODULES[name]
    fields = dataclasses.fields(script.Args)
    choices = st.fixed_dictionaries({}, optional={f.name: values_of(f) for f in fields})
    outcomes = set()

    @given(choices)
    def property_(values):
        outcome = refused(capsys, name, lambda: script.Args(**values))
        outcomes.add(outcome)
        if not outcome:
            args = script.Args(**values)
            assert args.num_iterations >= 1 and args.minibatch_size >= 1
            assert args.num_envs >= 1 and args.num_steps >= 1
            assert 0 < args.learning_rate < 1e13 and 0 <= args.gamma <= 1

    check(property_, num_examples)
    assert outcomes == {True, False}


@pytest.mark.parametrize("num_examples", [FEW, MANY])
def test_command_lines(num_examples, capsys):
    """Fails when words that are no command line end in a traceback, or with another exit code."""
    script = MODULES["ppo"]
    options = st.sampled_from([f"--{f.name}" for f in dataclasses.fields(script.Args)])
    words = st.lists(options | st.text(max_size=9) | st.integers().map(str), max_size=4)

    @given(words)
    def property_(line):
        try:
            tyro.cli(script.Args, args=[*line])
        except SystemExit as ended:
            assert ended.code in (0, 2)  # 0: --help
        assert "Traceback" not in capsys.readouterr().err

    check(property_, num_examples)


@pytest.fixture(scope="module", params=MODULES)
def trained(request, tmp_path_factory):
    """-> a script's name, the script, and the folder of a run of one iteration."""
    script = MODULES[request.param]
    return request.param, script, train_in(script, tmp_path_factory.mktemp("run"), **SIZES)


@pytest.mark.parametrize("num_examples", [FEW, MANY])
def test_damaged_checkpoints(trained, num_examples, capsys):
    """Fails when a cut or a wrong byte is not noticed, or ends in a traceback."""
    name, script, run_dir = trained
    path = run_dir / "checkpoint.pt"
    whole = path.read_bytes()
    weights = load(run_dir)["agent"]
    positions = st.integers(0, len(whole) - 1)

    @given(positions, st.integers(1, 255), st.none() | positions)
    def property_(position, change, length):
        damaged = bytearray(whole)
        damaged[position] ^= change
        path.write_bytes(damaged[:length])
        if not refused(capsys, name, script.load_checkpoint, run_dir):  # it hit a time, or a name
            loaded = script.load_checkpoint(run_dir)["agent"]
            assert all(torch.equal(weights[key], loaded[key]) for key in weights)

    check(property_, num_examples)
    path.write_bytes(whole)


@pytest.mark.parametrize("num_examples", [FEW, pytest.param(300, marks=pytest.mark.slow)])
def test_edited_checkpoints(trained, num_examples, capsys, monkeypatch, tmp_path):
    """Fails when a checkpoint with junk in it ends in a traceback, or a refusal leaves a file."""
    name, script, run_dir = trained
    monkeypatch.chdir(tmp_path)
    # Given anew, because an argument that is taken out has its default, millions of steps
    words = ["--resume", str(run_dir), "--total-timesteps", str(SIZES["total_timesteps"])]
    words += [f"--no-{option}" for option in ("compile", "amp") if hasattr(script.Args, option)]
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *words])
    path = run_dir / "checkpoint.pt"
    whole = path.read_bytes()
    checkpoint = load(run_dir)
    files = set(run_dir.iterdir())
    places = [(key,) for key in checkpoint]
    for key, part in checkpoint.items():
        if isinstance(part, dict):
            places.extend((key, inner) for inner in part)
    outcomes = set()

    @given(st.sampled_from(places), st.sampled_from(JUNK) | st.just("nothing"))
    def property_(place, junk):
        edited = copy.deepcopy(checkpoint)
        parent = edited if len(place) == 1 else edited[place[0]]
        if junk == "nothing":
            del parent[place[-1]]
        else:
            parent[place[-1]] = junk
        torch.save(edited, path)
        outcome = refused(capsys, name, lambda: script.main(script.parse_args()))
        outcomes.add(outcome)
        new = set(run_dir.iterdir()) - files
        if outcome:
            assert not new
        for file in new:  # of a run that went on, such as from iteration 0
            shutil.rmtree(file) if file.is_dir() else file.unlink()

    check(property_, num_examples)
    path.write_bytes(whole)
    assert True in outcomes
