"""What every experiment shares: configuration, checkpoints, logging, progress, signals."""

import time

# `time.monotonic()` at the first import of this package, which every experiment begins with: before Hydra and torch.
STARTED = time.monotonic()
