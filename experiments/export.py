"""Write a policy in diffusers' layout: `python experiments/export.py checkpoint=<run>/checkpoints/step_000120`.

The result is `<run_dir>/transformer`, which `model.transformer=<folder>` and diffusers' `from_pretrained` read.
Averaged weights are taken where the run had some, adapters (LoRA) are added to the weights that they belong to.
"""

from __future__ import annotations

from runtime.cli import main, setup_phase
from runtime.config import Plan, as_trained


def run(plan: Plan) -> None:
    """Load model and checkpoint, write the transformer."""
    from pathlib import Path

    from policies.adapters import merged
    from policies.causal_dit import save
    from runtime import state
    from runtime.hardware import device_of

    settings = plan.settings
    with setup_phase():
        if settings.checkpoint is None:
            raise ValueError("checkpoint is missing; name one: checkpoint=outputs/grpo/<run>/checkpoints/step_000120")
        network = settings.model.load(device_of(settings.device)).transformer
        state.adapt(settings, network)
    folder = Path(str(settings.run_dir)) / "transformer"
    save(merged(network), folder)
    print(f"transformer: {folder}; use it with model.transformer={folder}")


if __name__ == "__main__":
    main("export", run, as_trained)
