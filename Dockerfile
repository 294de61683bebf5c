# Both commands of README.md, on a fresh Debian with Python 3.11:
#
#     docker build -t ppo37 .               # trains CartPole, then installs everything and tests
#     docker run --rm -it ppo37 bash        # then `python ppo_atari.py`, ...
#
# Written by what README.md says, and never built: where it was written, no image could be had.
FROM python:3.11-slim-bookworm

# A C++ compiler for --compile, libGL for Procgen, EGL to film MuJoCo, git for the commit of a run
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ git libegl1 libgl1 libglib2.0-0 \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /ppo37
COPY . .
ENV PIP_NO_CACHE_DIR=1

RUN pip install -e . && python ppo.py
RUN pip install -e ".[atari,box2d,mujoco,envpool,procgen,microrts,benchmark,docs,test]" && pytest -n 2 -m "not slow"
