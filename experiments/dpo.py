"""`python experiments/dpo.py algorithm.credit=clip`: the loop of `train.py` with online DPO."""

from experiments.train import run
from runtime.cli import main

if __name__ == "__main__":
    main("dpo", run)
