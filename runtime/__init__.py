"""What every experiment shares: configuration, checkpoints, logging, progress, signals."""
