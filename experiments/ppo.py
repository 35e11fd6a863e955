"""`python experiments/ppo.py algorithm.critic=net`: the loop of `train.py` with PPO and a critic."""

from experiments.train import run
from runtime.cli import main

if __name__ == "__main__":
    main("ppo", run)
