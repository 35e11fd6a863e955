"""How the student makes the clips that its loss is computed on, by name (AR-Drag section 3.2, Algorithm 1).

Settings only; the rollouts themselves are in `rollouts.py`, so that a config is checked before torch is loaded.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from algorithms.distillation.rollouts import Generated, Student

SCOPES = ("per_video", "per_frame")


class Strategy(Protocol):
    """A way to make clips for the loss."""

    def __call__(self, student: Student) -> Generated:
        """Make a clip for every sample of `student.state`; each follows from the weights and the state's keys."""
        ...


@dataclass(frozen=True)
class Exiting:
    """What strategies with a random exit step share.

    Attributes:
        exit: per_video (one exit step for all frames) or per_frame (one for each chunk).
    """

    exit: str = "per_video"

    def __post_init__(self) -> None:
        if self.exit not in SCOPES:
            raise ValueError(f"strategy.exit must be one of {', '.join(SCOPES)}, got {self.exit!r}")


@dataclass(frozen=True)
class SelfRollout(Exiting):
    """The paper's: the loss is on the prediction at a random exit step, but the frame goes on to noise level 0 without
    gradient, and that finished frame is what later frames see, as at inference.
    """

    def __call__(self, student: Student) -> Generated:
        """See `Strategy`."""
        from algorithms.distillation.rollouts import at_exits, exit_steps

        return at_exits(student, exit_steps(student, self.exit), collapse=False)


@dataclass(frozen=True)
class SelfForcing(Exiting):
    """Self-Forcing (arXiv 2506.08009): a frame ends with its prediction at the exit step (collapse), and that is what
    later frames see, though inference never makes such a frame.
    """

    def __call__(self, student: Student) -> Generated:
        """See `Strategy`."""
        from algorithms.distillation.rollouts import at_exits, exit_steps

        return at_exits(student, exit_steps(student, self.exit), collapse=True)


@dataclass(frozen=True)
class TeacherForcing(Exiting):
    """The history is the true one; each frame is denoised from noise to its exit step given that."""

    def __call__(self, student: Student) -> Generated:
        """See `Strategy`."""
        from algorithms.distillation.rollouts import exit_steps, on_truth

        return on_truth(student, exit_steps(student, self.exit))


@dataclass(frozen=True)
class DiffusionForcing:
    """Every frame is a noised true one at a level of its own, 0 among them, and later frames see it as it is
    (arXiv 2407.01392)."""

    def __call__(self, student: Student) -> Generated:
        """See `Strategy`."""
        from algorithms.distillation.rollouts import exit_steps, on_noised_truth

        return on_noised_truth(student, exit_steps(student, "per_frame", clean=True))


@dataclass(frozen=True)
class Windowed(Exiting):
    """Self-Rollout of which a random window is judged, as a clip of its own: the student learns the late frames of
    clips that are longer than those the teacher knows. The warm-up stages `ode` and `consistency` ask the teacher about
    whole clips all the same.

    Attributes:
        frames: latent frames of the window, rounded up to whole chunks.
    """

    frames: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.frames < 2:
            raise ValueError(f"strategy.frames must be at least 2, got {self.frames}")

    def __call__(self, student: Student) -> Generated:
        """See `Strategy`; the window is the same for the whole batch."""
        from algorithms.distillation.rollouts import at_exits, exit_steps, window

        made = at_exits(student, exit_steps(student, self.exit), collapse=False)
        return made._replace(window=window(student, self.frames))
