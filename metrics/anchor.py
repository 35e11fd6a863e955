"""Where tracking starts: in the policy's own frame 0, as long as that shows what was touched."""

from __future__ import annotations

from typing import TYPE_CHECKING

from metrics.appearance import patches

if TYPE_CHECKING:
    from torch import Tensor

    from tracking.trackers import Tracker
    from tracking.trajectory import Trajectory

# Root mean square difference of pixels in [-1, 1] from which a patch shows something else: between what the shipped
# student blurs and the marks that a tracker follows (docs/rewards.md).
FOREIGN = 0.3


def touched(asked: Trajectory) -> Tensor:
    """Points `[B, K, 2]` that the drags start from, in pixels; 0 for a track that is absent in frame 0."""
    return asked.xy[:, :, 0].where(asked.presence[:, :, 0, None], 0)


def differences(video: Tensor, first: Tensor, asked: Trajectory, reach: float) -> Tensor:
    """How far frame 0 is from the reference image under the touched points, `[B]`: the root mean square over a patch,
    the largest of two patches and of a sample's points; 0 without points.

    Args:
        video: `[B, 3, T, H, W]` in [-1, 1].
        first: the reference image `[B, 3, 1, H, W]`.
        asked: the drags, of `B` samples.
        reach: half the side of the larger patch in pixels, all that a tracker sees; the smaller one, the touched spot,
            is half as wide.
    """
    import torch

    points = touched(asked)[:, :, None]
    apart = [patches(video[:, :, :1], points, r) - patches(first, points, r) for r in (reach / 2, reach)]
    found = torch.cat([each.square().mean((-1, -2)).sqrt() for each in apart], -1)  # [B, K, radii]
    found = found.where(asked.presence[:, :, :1], 0).flatten(1)
    return found.amax(1) if found.shape[1] else found.new_zeros(len(found))


def anchored(video: Tensor, first: Tensor, asked: Trajectory, tracker: Tracker) -> tuple[Tensor, Tensor]:
    """What a tracker follows points through: the video, or the same with the reference image as its frame 0.

    A tracker takes from frame 0 what it follows, and the policy makes that frame too: a mark painted there and carried
    along the path would be followed as well as the object. So where frame 0 does not show under a touched point what
    the reference image shows, the reference image stands in its place. Elsewhere frame 0 is as blurred as the frames
    after it, and is the better template.

    Args:
        video, first, asked: see `differences`.
        tracker: that is to follow them.

    Returns:
        The video, and the samples `[B]` bool in which the reference image stands.
    """
    foreign = differences(video, first, asked, tracker.reach(asked.height, asked.width)) > FOREIGN
    if not bool(foreign.any()):
        return video, foreign
    replaced = video.clone()
    replaced[foreign, :, :1] = first[foreign].to(video)
    return replaced, foreign
