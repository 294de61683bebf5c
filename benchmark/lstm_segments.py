"""What ppo_atari_lstm.py gains by calling its LSTM once a segment, beside a plain loop that calls it once a step.

    python benchmark/lstm_segments.py                    # prints milliseconds and their ratio
    python benchmark/lstm_segments.py --save benchmark/results/lstm_segments.json

One minibatch, 128 steps of 2 environments: the gradient of the whole agent, and of its part after the convolutions.
Episodes begin at random, one in 30 steps, about as often as an untrained agent loses a life in Breakout. Both ways take
turns; the median counts.
"""

import datetime
import json
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch
import tyro
from basics import ROOT, commit, machine

sys.path.insert(0, str(ROOT))
from ppo_atari_lstm import Agent  # noqa: E402


@dataclass
class Args:
    repeats: int = 20  # measurements of each
    threads: int = 1  # of PyTorch
    save: Path | None = None  # file to write the measurements to, as JSON


class PlainLoop(Agent):
    """The same agent, whose LSTM is called once a step."""

    def remember(self, hidden, starts, state):
        outputs = []
        for x, new in zip(hidden, starts, strict=True):
            state = state * (~new).to(state).unsqueeze(-1)
            output, state = self.lstm(x.unsqueeze(0), tuple(state.split(1)))
            outputs.append(output)
            state = torch.cat(state)
        return torch.cat(outputs).flatten(0, 1), state


def minibatch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """-> obs [256, 1, 84, 84], starts [256], state [2, 2, 128]."""
    starts = torch.rand(128, 2) < 1 / 30
    return torch.randint(0, 256, (256, 1, 84, 84), dtype=torch.uint8), starts.flatten(), torch.randn(2, 2, 128)


def gradient_of_all(agent: Agent, obs, starts, state) -> None:
    distribution, value, _ = agent(obs, starts, state)
    torch.autograd.grad(value.mean() + distribution.entropy().mean(), list(agent.parameters()))


def gradient_of_lstm(agent: Agent, obs, starts, state) -> None:
    hidden = torch.randn(128, 2, 512, requires_grad=True)
    output, _ = agent.remember(hidden, starts.unflatten(0, (-1, 2)), state)
    torch.autograd.grad(output.mean(), [hidden, *agent.lstm.parameters()])


def main(args: Args) -> None:
    torch.manual_seed(1)
    torch.set_num_threads(args.threads)
    spaces = gym.spaces.Box(0, 255, (1, 84, 84), np.uint8), gym.spaces.Discrete(4)
    plain, segments = PlainLoop(*spaces), Agent(*spaces)
    segments.load_state_dict(plain.state_dict())
    times = {}
    for _ in range(args.repeats):
        inputs = minibatch()
        for part, gradient in {"LSTM": gradient_of_lstm, "whole agent": gradient_of_all}.items():
            for name, agent in {"plain loop": plain, "segments": segments}.items():
                begin = time.perf_counter()
                gradient(agent, *inputs)
                times.setdefault(f"{part}, {name}", []).append(time.perf_counter() - begin)
    milliseconds = {name: round(1000 * statistics.median(seconds), 2) for name, seconds in times.items()}
    ratio = {
        part: round(milliseconds[f"{part}, plain loop"] / milliseconds[f"{part}, segments"], 2)
        for part in ("LSTM", "whole agent")
    }
    for name, value in milliseconds.items():
        print(f"{name:26} {value:8.2f} ms")
    print(*(f"{part}: {value} times as fast" for part, value in ratio.items()), sep="\n")
    if args.save:
        record = {"command": f"python benchmark/lstm_segments.py --threads {args.threads}", "machine": machine()}
        record |= {"commit": commit(), "date": datetime.date.today().isoformat()}
        record |= {"milliseconds": milliseconds, "ratio": ratio}
        args.save.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Args))
