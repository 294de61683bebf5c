"""What a user gets wrong ends in one clear line on stderr and exit code 2, and harms no run."""

import pytest
import torch
from conftest import load, run, run_dir_of


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with one run, and beside it damaged copies of it; made once for all tests."""
    cwd = tmp_path_factory.mktemp("bad_input")
    assert run("ppo.py", "--total-timesteps", 1024, cwd=cwd).returncode == 0
    run_dir_of(cwd).rename(cwd / "runs" / "mine")
    checkpoint = load(cwd / "runs" / "mine")
    whole = (cwd / "runs" / "mine" / "checkpoint.pt").read_bytes()
    for name, content in {
        "truncated": whole[: len(whole) // 2],
        "empty": b"",
        "text": b"no checkpoint at all",
    }.items():
        (cwd / "copies" / name).mkdir(parents=True)
        (cwd / "copies" / name / "checkpoint.pt").write_bytes(content)
    (cwd / "copies" / "atari").mkdir()
    torch.save(checkpoint | {"script": "ppo_atari"}, cwd / "copies" / "atari" / "checkpoint.pt")
    (cwd / "copies" / "tensor").mkdir()
    torch.save(torch.zeros(3), cwd / "copies" / "tensor" / "checkpoint.pt")
    (cwd / "without_box2d" / "Box2D").mkdir(parents=True)
    (cwd / "without_box2d" / "Box2D" / "__init__.py").write_text(
        "raise ImportError('not installed')"
    )
    return cwd


def refused(folder, *args, **environment) -> str:
    """Runs ppo.py, checks that it refuses as it should, and returns its one line."""
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    result = run("ppo.py", *args, cwd=folder, **environment)
    assert result.returncode == 2, result.stderr
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("ppo.py: ")
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    return line


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--env-id", "CartPol-v1"], ["CartPol", "Did you mean: `CartPole`"]),
        (["--gym-id", "CartPole-v7"], ["v7", "`v1`"]),
        (["--env-id", "Cart Pole"], ["Malformed"]),
        (["--env-id", "nowhere:CartPole-v1"], ["nowhere"]),
        (["--env-id", "FrozenLake-v1"], ["Discrete(16)", "flat Box"]),
        (["--env-id", "Pendulum-v1"], ["Box(-2.0, 2.0", "Discrete"]),
        (["--num-minibatches", "3"], ["--num-minibatches 3", "divide", "512"]),
        (["--total-timesteps", "511"], ["--total-timesteps 511", "512"]),
        (["--learning-rate", "nan"], ["--learning-rate nan"]),
        (["--learning-rate", "0"], ["--learning-rate 0"]),
        (["--learning-rate=-1"], ["--learning-rate -1"]),
        (["--clip-coef", "inf"], ["--clip-coef inf"]),
        (["--gamma", "1.1"], ["--gamma 1.1", "from 0 to 1"]),
        (["--ent-coef=-0.1"], ["--ent-coef -0.1"]),
        (["--target-kl", "nan"], ["--target-kl nan"]),
        (["--num-envs", "0"], ["--num-envs 0"]),
        (["--num-steps=-128"], ["--num-steps -128"]),
        (["--checkpoint-interval", "0"], ["--checkpoint-interval 0"]),
        (["--seed=-1"], ["--seed -1"]),
        (["--resume", "runs/none"], ["runs/none", "No such file"]),
        (["--resume", "copies/truncated"], ["copies/truncated"]),
        (["--resume", "copies/empty"], ["copies/empty"]),
        (["--resume", "copies/text"], ["copies/text"]),
        (["--resume", "copies/tensor"], ["copies/tensor"]),
        (["--resume", "copies/atari"], ["ppo_atari.py"]),
        (["--resume", "runs/mine", "--env-id", "Acrobot-v1"], ["env_id", "CartPole-v1"]),
        (["--resume", "runs/mine", "--num-envs", "8"], ["num_envs", "4"]),
    ],
    ids=" ".join,
)
def test_refusals(folder, args, words):
    """Each fails when its check is taken out: the run starts, or a traceback appears."""
    line = refused(folder, *args)
    for word in words:
        assert word in line


def test_missing_package_comes_with_the_pip_command(folder):
    """Fails when DependencyNotInstalled is let through."""
    line = refused(folder, "--env-id", "LunarLander-v3", PYTHONPATH=str(folder / "without_box2d"))
    assert "pip install" in line and "box2d" in line


def test_runs_folder_that_cannot_be_written(folder, tmp_path):
    """Fails when OSError is let through."""
    (tmp_path / "runs").write_text("a file where the folder should be")
    assert "runs/CartPole-v1__ppo__1__" in refused(tmp_path)


def test_unknown_flag_and_wrong_type(folder):
    """tyro's own messages, with its suggestions and the exit code of every bad command line."""
    for args in (["--learnig-rate", "1"], ["--num-envs", "many"]):
        result = run("ppo.py", *args, cwd=folder)
        assert result.returncode == 2
        assert "Traceback" not in result.stderr


def test_lunar_lander_trains_where_box2d_is_installed(tmp_path):
    """Fails when make_env accepts no environment with 8 numbers and 4 actions."""
    assert (
        run(
            "ppo.py", "--env-id", "LunarLander-v3", "--total-timesteps", 1024, cwd=tmp_path
        ).returncode
        == 0
    )
