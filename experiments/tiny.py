"""Train the embedded models from nothing: `python experiments/tiny.py` (`make tiny`).

The models that are shipped in `assets/tiny` were made this way. About three hours on two cores; a stage whose result is
in the folder is not trained again, so an interrupted run goes on with the stage it was in. Settings of the stages are
those of `algorithms.pretraining.chain.Recipe`. Try the result with `model.path=outputs/tiny`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def main() -> None:
    """Parse the command line and run the chain."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("outputs/tiny"), help="folder of the models")
    parser.add_argument("--threads", type=int, default=None, help="CPU threads; default: torch's own choice")
    options = parser.parse_args()

    import torch

    from algorithms.pretraining.chain import Chain
    from data.sprites import Sprites

    if options.threads is not None:
        torch.set_num_threads(options.threads)
    try:
        Chain(Sprites(), options.out, lambda line: print(line, flush=True)).run()
    except ValueError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
