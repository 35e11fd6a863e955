"""Numbers that are not finite never reach the weights: the update is left out, or the run stops, and what is needed to
look at it again is kept.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from rewards.base import RewardFailed
from runtime import checkpoint
from runtime.alarms import SKIPPED

if TYPE_CHECKING:
    from pathlib import Path

    from tensordict import TensorDictBase
    from torch import Tensor

    from runtime.session import Session
    from runtime.settings import Guard
    from runtime.team import Team

FOLDER = "replay"
POINTS = ("latent", "log_prob", "video", "reward", "loss", "gradient")


class NonFinite(Exception):
    """Something is not finite, in at least one process; all processes raise it together.

    Args:
        point: one of `POINTS`.
        what: more about it.
        rows: rows of the whole rollout that were being learned from; None before learning.
    """

    def __init__(self, point: str, what: str, rows: Tensor | None = None) -> None:
        super().__init__(f"{point} is not finite ({what})")
        self.point, self.what, self.rows = point, what, rows


def check(team: Team, point: str, tensor: Tensor) -> None:
    """Raise `NonFinite` in all processes where `tensor [B, ...]` is not finite in any."""
    finite = tensor.isfinite().flatten(1).all(1)
    if team.any(not bool(finite.all())):
        odd = [r * len(finite) + i for r, rows in enumerate(team.collect((~finite).nonzero().flatten().tolist()))
               for i in rows]  # fmt: skip
        raise NonFinite(point, f"samples {', '.join(map(str, odd[:8]))}{' ...' if len(odd) > 8 else ''}")


class Watchdog:
    """Keeps replay bundles, counts, and decides whether the run goes on.

    Args:
        settings: see `Guard`.
        in_a_row: updates that were left out just before (a resumed run).
    """

    def __init__(self, settings: Guard, in_a_row: int = 0) -> None:
        self.settings, self.in_a_row = settings, in_a_row

    def good(self) -> None:
        """An update was as it should be."""
        self.in_a_row = 0

    def unscored(self, update: int) -> None:
        """No group of an update could be scored.

        Raises:
            RewardFailed: too many such updates in a row.
        """
        self.in_a_row += 1
        if self.in_a_row >= self.settings.patience:
            raise RewardFailed(
                f"no group could be scored in {self.in_a_row} updates in a row, the last update {update} "
                f"(guard.patience); mend the reward that the warnings name, then go on with resume=true"
            )

    def bad(self, session: Session, found: NonFinite, rollout: TensorDictBase | None) -> dict[str, float]:
        """Keep a bundle and leave the update out; returns what to log.

        Raises:
            FloatingPointError: the run is to stop; the weights are those before the update.
        """
        self.in_a_row += 1
        folder = self._keep(session, found, rollout)
        look = f"; look at it: python experiments/replay.py checkpoint={folder}" if folder else ""
        kept = "the weights are as before it" if found.rows is None else "the weights are as before this mini-batch"
        where = f"update {session.iteration + 1}: {found}; {kept}"
        if self.settings.non_finite == "stop":
            raise FloatingPointError(f"{where}; guard.non_finite=stop{look}")
        if self.in_a_row >= self.settings.patience:
            raise FloatingPointError(f"{where}; the {self.in_a_row}th in a row (guard.patience){look}")
        session.notice(f"{where}, this update is left out{look}")
        return {f"{SKIPPED}{found.point}": 1.0}

    def _keep(self, session: Session, found: NonFinite, rollout: TensorDictBase | None) -> Path | None:
        """Write a bundle: a checkpoint with the rollout, of every process. The first ones of a run are kept."""
        whole = session.run_dir / FOLDER
        full = len(list(whole.glob(f"step_*/{checkpoint.MANIFEST}"))) >= self.settings.bundles
        folder = whole / f"step_{session.iteration:06d}"
        if session.team.share(full or (folder / checkpoint.MANIFEST).is_file()):
            return None
        held = {} if rollout is None else {k: v for k, v in rollout.flatten_keys(".").items()}
        if session.held_video is not None and found.point == "video":
            held["video"] = session.held_video
        counters = {
            "point": found.point,
            "what": found.what,
            "rows": None if found.rows is None else found.rows.tolist(),
        }
        try:
            return session.write(folder, own={"rollout": held}, counters=counters, ema=False)
        except OSError as error:
            session.notice(f"the replay bundle could not be written ({error})")
            return None
