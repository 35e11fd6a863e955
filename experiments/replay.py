"""Look again at an update that was not finite: `python experiments/replay.py checkpoint=<run>/replay/step_000012`.

The bundle holds the weights, the rollouts of all processes and the config of that very moment. The update is computed
again from it, in one process, with the plain engine: acting from the same weights and draws, decoding and scoring the
kept latents, loss and gradient of the kept mini-batch. Where all that is finite now, what was seen came from outside:
memory, a device, a reward service.
Exit code 0: reproduced; 1: not.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from runtime.checkpoint import read_state
from runtime.cli import main, setup_phase
from runtime.config import Plan

OWN = ("checkpoint", "run_dir", "device")


class Replay:
    """The bundle that is looked at: its config decides everything."""

    def prepare(self, cfg: DictConfig, overrides: Sequence[str]) -> DictConfig:
        """The config of the bundle, with the plain engine.

        Raises:
            ValueError: another setting is overridden, or no bundle is named.
            FileNotFoundError: it is not there.
        """
        named = {text.lstrip("+~").partition("=")[0] for text in overrides}
        if odd := sorted(named - set(OWN)):
            raise ValueError(f"{odd[0]}: a replay computes what the run computed; only {', '.join(OWN)} can be given")
        if not isinstance(cfg.checkpoint, str):
            raise ValueError("checkpoint is missing; give a bundle: checkpoint=outputs/grpo/<run>/replay/step_000012")
        self.folder = Path(cfg.checkpoint)
        saved = read_state(self.folder)["config"]
        engine = {**cfg.engine, "precision": saved["engine"]["precision"]}
        return OmegaConf.create(
            {**saved, "run_dir": cfg.run_dir, "device": cfg.device, "resume": False, "engine": engine}
        )

    def run(self, plan: Plan) -> None:
        """Print what of the update is not finite."""
        from runtime.replay import acted, kept, learned, opened, scored
        from runtime.session import Session

        with setup_phase():
            session = Session(plan.settings, plan.config)
            bundle = opened(session, self.folder)
        print(f"update {session.iteration + 1}: {bundle.point} was not finite ({bundle.what})")
        found, same = acted(session, bundle)
        found = [*found, *scored(session, bundle), *learned(session, bundle)]
        for line in filter(None, [*kept(bundle), *found, same]):
            print(line)
        print("reproduced" if found else "not reproduced: computed again, every number is finite; it came from outside")
        if not found:
            sys.exit(1)


if __name__ == "__main__":
    replay = Replay()
    main("replay", replay.run, replay.prepare)
