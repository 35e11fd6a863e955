"""The Hydra tree: settings and the choices of every group. Holds YAML only."""
