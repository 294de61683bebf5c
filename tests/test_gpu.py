"""What only a GPU can show, in all eight scripts; skipped where there is none."""

import re
import subprocess
import sys
import warnings

import pytest
import torch
from conftest import ROOT, import_scripts, load, record, scalars, train_in

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")

MODULES = import_scripts()
SIZES = dict(num_envs=4, num_steps=16, num_minibatches=2, update_epochs=1)
BATCH = SIZES["num_envs"] * SIZES["num_steps"]


@pytest.fixture(params=MODULES)
def script(request):
    return MODULES[request.param]


def move(mb: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The minibatch on the GPU, but for an LSTM's starts, which are read on the host."""
    return {key: x if key == "starts" else x.cuda() for key, x in mb.items()}


def make_agent(script, weights, spaces, device):
    agent = script.Agent(*spaces).to(device)
    agent.load_state_dict(weights)
    return agent


def count_waits(script, folder, num_steps: int) -> int:
    """Trains an iteration of that many steps -> how often the host waits for the GPU."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            sizes = SIZES | {"num_steps": num_steps}
            total = SIZES["num_envs"] * num_steps
            train_in(script, folder, **sizes, total_timesteps=total, cuda=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing" in str(warning.message) for warning in caught)


def test_an_environment_step_waits_twice(script, tmp_path):
    """Fails when more is copied than an observation (with its mask) to the GPU, an action back."""
    few = count_waits(script, tmp_path / "few", 16)
    many = count_waits(script, tmp_path / "many", 32)
    copies = 3 if script.__name__ in ("ppo_multidiscrete_mask", "ppo_atari_lstm") else 2
    assert (many - few) / 16 <= copies


def test_a_gradient_step_waits_for_nothing(script, tmp_path):
    """Fails when a number of the loss, the clipping or Adam is looked at on the host."""
    weights, minibatches, spaces = record(script, tmp_path, **SIZES)
    agent = make_agent(script, weights, spaces, "cuda")
    optimizer = torch.optim.Adam(agent.parameters(), lr=1e-4, eps=1e-5, fused=True)
    mb = move(minibatches[0])
    args = script.Args(**SIZES)
    script.train_step(agent, optimizer, mb, args)  # the first one also sets up
    torch.cuda.set_sync_debug_mode("error")
    try:
        script.train_step(agent, optimizer, mb, args)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_first_gradient_is_that_of_a_cpu(script, tmp_path):
    """Fails when the GPU computes in less than float32, or something else."""
    weights, minibatches, spaces = record(script, tmp_path, **SIZES)
    args = script.Args(**SIZES)
    gradients = []
    for device in ("cpu", "cuda"):
        agent = make_agent(script, weights, spaces, device)
        mb = minibatches[0] if device == "cpu" else move(minibatches[0])
        with script.restore_process_settings():
            script.use_deterministic_algorithms(True)
            stats = script.clipped_gradient(agent, mb, args)
        assert abs(stats["approx_kl"].item()) < 1e-5  # the first ratio is 1
        flat = [p.grad.flatten().cpu() for p in agent.parameters()]
        gradients.append(torch.cat(flat))
    on_cpu, on_gpu = gradients
    assert (on_cpu - on_gpu).norm() < 1e-3 * on_cpu.norm()


@pytest.mark.slow
def test_a_compiled_training_gives_the_same_losses(script, tmp_path):
    """Fails when --compile computes something else on a GPU."""
    losses = []
    for compiled in (False, True):
        sizes = SIZES | {"total_timesteps": 2 * BATCH}
        folder = tmp_path / str(compiled)
        run_dir = train_in(script, folder, **sizes, compile=compiled, anneal_clip=True, cuda=True)
        losses.append([value for _, value in scalars(run_dir, "losses/value_loss")])
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)


def test_training_gives_no_warning_of_the_gpu(script, tmp_path):
    """Fails when an operation has no deterministic kernel, or is told to wait."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train_in(script, tmp_path, **SIZES, total_timesteps=2 * BATCH, cuda=True)
    messages = [str(warning.message) for warning in caught]
    assert [text for text in messages if re.search("cuda|determinis", text, re.I)] == []


def test_same_seed_same_weights(script, tmp_path):
    """Fails when something on the GPU depends on the order in which it runs."""
    weights = []
    for folder in (tmp_path / "a", tmp_path / "b"):
        run_dir = train_in(script, folder, **SIZES, total_timesteps=2 * BATCH, cuda=True)
        weights.append(load(run_dir)["agent"])
    for name, x in weights[0].items():
        assert torch.equal(x, weights[1][name]), name


def test_memory_does_not_grow(script, tmp_path):
    """Fails when an iteration keeps tensors of the one before."""
    peaks = []
    for iterations in (2, 6):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        folder = tmp_path / str(iterations)
        train_in(script, folder, **SIZES, total_timesteps=iterations * BATCH, cuda=True)
        peaks.append(torch.cuda.max_memory_allocated() - before)
    assert peaks[1] < peaks[0] + 2**20


def test_a_checkpoint_goes_to_a_cpu_and_back(script, tmp_path):
    """Fails when a checkpoint can only go on where it was written."""
    run_dir = train_in(script, tmp_path, **SIZES, total_timesteps=BATCH, cuda=True)
    relative = f"runs/{run_dir.name}"
    for iterations, cuda in ((2, False), (3, True)):
        total = iterations * BATCH
        train_in(script, tmp_path, **SIZES, total_timesteps=total, cuda=cuda, resume=relative)
        assert load(run_dir)["iteration"] == iterations


def test_no_cuda_touches_no_gpu(script, tmp_path):
    """Fails when a run on the CPU takes a GPU's memory, which another run may need."""
    program = (
        "import importlib, sys, torch\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        f"script = importlib.import_module({script.__name__!r})\n"
        f"script.main(script.Args(**{SIZES!r}, total_timesteps={BATCH}, cuda=False))\n"
        "assert not torch.cuda.is_initialized()\n"
    )
    command = [sys.executable, "-c", program]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
