"""What ppo_atari_lstm.py gains by calling its LSTM once a segment, beside a call once a step.

    python benchmark/lstm_segments.py                    # prints milliseconds and their ratio
    python benchmark/lstm_segments.py --save benchmark/results/lstm_segments.json

One minibatch, 128 steps of 2 environments: the gradient of the whole agent, and of its part after
the convolutions. Episodes begin at random, one in 30 steps, about as often as an untrained agent
loses a life in Breakout. Both ways take turns; the median counts.

Shapes as in ppo_atari_lstm.py: K = 128 steps of E = 2 environments, one after another.
"""

import datetime
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import common
import gymnasium as gym
import numpy as np
import torch
import tyro

sys.path.insert(0, str(common.ROOT))
from ppo_atari_lstm import Agent  # noqa: E402


@dataclass
class Args:
    repeats: int = 20
    """measurements of each"""
    threads: int = 1
    """threads of PyTorch"""
    save: Path | None = None
    """file to write the measurements to, as JSON"""


class PlainLoop(Agent):
    """The same agent, whose LSTM is called once a step."""

    def remember(
        self, hidden: torch.Tensor, starts: torch.Tensor, state: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """hidden [K, E, 512], starts [K, E], state [2, E, 128] -> outputs [K * E, 128], state."""
        outputs = []
        for step in range(len(hidden)):
            going_on = ~starts[step].to(state.device)  # [E]
            state = state * going_on.unsqueeze(-1)

            output, (h, c) = self.lstm(hidden[step : step + 1], (state[:1], state[1:]))
            state = torch.cat([h, c])
            outputs.append(output)
        return torch.cat(outputs).flatten(0, 1), state


def make_minibatch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """-> obs [K * E, 1, 84, 84], starts [K * E], state [2, E, 128], all random."""
    starts = torch.rand(128, 2) < 1 / 30
    obs = torch.randint(0, 256, (256, 1, 84, 84), dtype=torch.uint8)
    state = torch.randn(2, 2, 128)
    return obs, starts.flatten(), state


def differentiate_lstm(
    agent: Agent, obs: torch.Tensor, starts: torch.Tensor, state: torch.Tensor
) -> None:
    """Computes the gradient of the LSTM alone, at random inputs in place of obs."""
    hidden = torch.randn(128, 2, 512, requires_grad=True)
    output, _ = agent.remember(hidden, starts.unflatten(0, (128, 2)), state)
    torch.autograd.grad(output.mean(), [hidden, *agent.lstm.parameters()])


def differentiate_all(
    agent: Agent, obs: torch.Tensor, starts: torch.Tensor, state: torch.Tensor
) -> None:
    """Computes the gradient of the whole agent."""
    distribution, value, _ = agent(obs, starts, state)
    loss = value.mean() + distribution.entropy().mean()
    torch.autograd.grad(loss, list(agent.parameters()))


def measure(differentiate: Callable, agent: Agent, minibatch: tuple) -> float:
    """-> seconds that one call takes."""
    start_time = time.perf_counter()
    differentiate(agent, *minibatch)
    return time.perf_counter() - start_time


def main(args: Args) -> None:
    """Measures, prints and saves."""
    torch.manual_seed(1)
    torch.set_num_threads(args.threads)

    # Two agents with the same weights
    observation_space = gym.spaces.Box(0, 255, (1, 84, 84), np.uint8)
    action_space = gym.spaces.Discrete(4)
    plain = PlainLoop(observation_space, action_space)
    segments = Agent(observation_space, action_space)
    segments.load_state_dict(plain.state_dict())

    seconds = {
        "LSTM, plain loop": [],
        "LSTM, segments": [],
        "whole agent, plain loop": [],
        "whole agent, segments": [],
    }
    for _ in range(args.repeats):
        mb = make_minibatch()
        seconds["LSTM, plain loop"].append(measure(differentiate_lstm, plain, mb))
        seconds["LSTM, segments"].append(measure(differentiate_lstm, segments, mb))
        seconds["whole agent, plain loop"].append(measure(differentiate_all, plain, mb))
        seconds["whole agent, segments"].append(measure(differentiate_all, segments, mb))

    milliseconds = {}
    for name, measured in seconds.items():
        milliseconds[name] = round(1000 * statistics.median(measured), 2)
        print(f"{name:26} {milliseconds[name]:8.2f} ms")

    ratio = {}
    for part in ("LSTM", "whole agent"):
        gain = milliseconds[f"{part}, plain loop"] / milliseconds[f"{part}, segments"]
        ratio[part] = round(gain, 2)
        print(f"{part}: {ratio[part]} times as fast")

    if args.save:
        record = {
            "command": f"python benchmark/lstm_segments.py --threads {args.threads}",
            "machine": common.describe_machine(),
            "commit": common.find_commit(),
            "date": datetime.date.today().isoformat(),
            "milliseconds": milliseconds,
            "ratio": ratio,
        }
        args.save.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Args))
