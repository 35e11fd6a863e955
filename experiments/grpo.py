"""`python experiments/grpo.py reward=motion+aesthetic`: the loop of `train.py` with GRPO (AR-Drag section 3.3)."""

from experiments.train import run
from runtime.cli import main

if __name__ == "__main__":
    main("grpo", run)
