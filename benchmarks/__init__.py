"""How fast a run is, measured in one go: `python -m benchmarks` (`make bench`)."""
