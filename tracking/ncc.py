"""Training-free point tracking by normalised cross-correlation with the patch under the point in frame 0."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tracking.trackers import Tracks, check_input

if TYPE_CHECKING:
    from torch import Tensor

# Variance below which a patch counts as flat, for pixels in [-1, 1]: a standard deviation of 1.3 grey levels.
FLAT = 1e-4
# Frames whose short edge is longer are reduced to it: template and search window are the same share of a large frame.
SHORT_EDGE = 64


@dataclass(frozen=True)
class NCC:
    """Template matching in a small window around the predicted position, all points of a batch at once.

    Frames with a short edge above 64 pixels are reduced to that first. The template keeps its pixel grid (no
    interpolation blurs it); the peak of the correlation is refined below a pixel by a soft-argmax. A point that is lost
    goes on with its last velocity, slowing down, and is found again when it reappears inside the search window. Visible
    means: correlation times agreement in contrast reaches `threshold` inside the frame. The contrast counts because
    correlation alone would accept a faded ghost of the texture.

    Attributes:
        radius: half size of the template in pixels of the reduced frame; it is (2 radius + 1) wide, weighted by a
            Gaussian.
        search: largest displacement from the predicted position, in pixels of the reduced frame per frame.
        temperature: of the soft-argmax, in units of correlation.
        momentum: share of the old velocity in the prediction, in [0, 1).
        inertia: correlation that a candidate loses at the rim of the search window against its centre.
        update: share of the newly seen patch in the template per visible frame, in [0, 1); 0 keeps frame 0's.
        threshold: confidence from which a point counts as visible, in (0, 1).
    """

    radius: int = 5
    search: int = 4
    temperature: float = 0.15
    momentum: float = 0.5
    inertia: float = 0.3
    update: float = 0.03
    threshold: float = 0.35

    def __post_init__(self) -> None:
        for name, low in (("radius", 1), ("search", 1)):
            if getattr(self, name) < low:
                raise ValueError(f"tracker.{name} must be at least {low}, got {getattr(self, name)}")
        if not self.temperature > 0:
            raise ValueError(f"tracker.temperature must be positive, got {self.temperature}")
        for name in ("momentum", "update"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"tracker.{name} must be in [0, 1), got {getattr(self, name)}")
        if not 0 < self.threshold < 1:
            raise ValueError(f"tracker.threshold must be in (0, 1), got {self.threshold}")
        if not self.inertia >= 0:
            raise ValueError(f"tracker.inertia must not be negative, got {self.inertia}")

    def reach(self, height: int, width: int) -> float:
        """See `Tracker.reach`: the template, whose middle is the nearest pixel."""
        return math.ceil((self.radius + 0.5) * max(1, min(height, width) / SHORT_EDGE))

    def track(self, video: Tensor, queries: Tensor) -> Tracks:
        """Follow points; see `Tracker.track`. Non-finite pixels count as grey."""
        check_input(video, queries)
        pixels = video.detach().float().nan_to_num(0.0, 0.0, 0.0)
        starts = queries.detach().float()
        if min(video.shape[-2:]) <= SHORT_EDGE:
            return self._follow(pixels, starts)
        reduced, scale = _reduced(pixels)
        # the centre of pixel i lies at scale * (i + 0.5) - 0.5 of the reduced frame
        found = self._follow(reduced, (starts + 0.5) * scale - 0.5)
        xy = (found.xy + 0.5) / scale - 0.5
        xy[:, :, 0] = starts
        return Tracks(xy, found.visible, found.confidence)

    def _follow(self, pixels: Tensor, queries: Tensor) -> Tracks:
        """Follow points through finite frames of the size that template and search window are meant for."""
        import torch

        (batch, _, length, height, width), points = pixels.shape, queries.shape[1]
        # [T, B, H * W, 3]: one gather per frame fetches the search regions of all points
        frames = pixels.permute(2, 0, 3, 4, 1).reshape(length, batch, -1, 3)
        owner = torch.arange(batch, device=pixels.device).repeat_interleave(points)
        query = queries.reshape(-1, 2).nan_to_num(0.0)
        anchor = query.round()
        position, velocity = anchor.clone(), torch.zeros_like(anchor)
        weight = _gaussian(self.radius).to(pixels.device)
        template = _centred(_regions(frames[0], owner, anchor, self.radius, height, width).flatten(2), weight)
        limit = anchor.new_tensor([width - 1, height - 1])
        out = [(query, torch.ones_like(owner, dtype=torch.bool), torch.ones_like(query[:, 0]))]
        for frame in frames[1:]:
            guess = (position + velocity).clamp(min=-self.radius).minimum(limit + self.radius)
            corner = guess.round()
            region = _regions(frame, owner, corner, self.radius + self.search, height, width)
            shift, confidence, patch = self._match(region, template, weight, guess - corner)
            found = corner + shift
            place = found + query - anchor
            inside = ((place >= -0.5) & (place <= limit + 0.5)).all(-1)
            visible = (confidence >= self.threshold) & inside
            seen = visible[:, None]
            new = torch.where(seen, found, guess)
            velocity = torch.where(
                seen, self.momentum * velocity + (1 - self.momentum) * (new - position), 0.8 * velocity
            )
            position = new
            rate = self.update * visible[:, None, None]
            template = template + rate * (_centred(patch, weight) - template)
            out.append((position + query - anchor, visible, confidence))
        xy, visible, confidence = (
            torch.stack(column, 1).unflatten(0, (batch, points)) for column in zip(*out, strict=True)
        )
        return Tracks(xy, visible, confidence)

    def _match(self, region: Tensor, template: Tensor, weight: Tensor, centre: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Best place of `template [n, 3, p]` in `region [n, 3, R, R]`.

        `centre [n, 2]` is where the point is expected. Returns the displacement `[n, 2]` from the region's
        middle, the confidence `[n]` and the patch `[n, 3, p]` at the integer peak.
        """
        import torch
        from torch.nn.functional import conv2d, unfold

        n, side = len(region), 2 * self.radius + 1
        patches = unfold(region, side)  # [n, 3 p, S S]
        covariance = torch.bmm((template * weight).flatten(1)[:, None], patches)[:, 0]
        kernel = weight.reshape(1, 1, side, side)
        moments = conv2d(torch.stack([region, region**2]).flatten(0, 2)[:, None], kernel)
        mean, square = moments.flatten(2).unflatten(0, (2, n, 3)).squeeze(3)
        spread = (square - mean**2).sum(1).clamp(min=0) + FLAT
        own = ((template**2 * weight).sum((1, 2)) + FLAT)[:, None]
        correlation = covariance / (spread * own).sqrt()
        offsets = _offsets(self.search).to(region)  # [S S, 2]
        distance = ((offsets - centre[:, None]) / self.search).square().sum(-1)
        peak = (correlation - self.inertia * distance).argmax(1)
        near = (offsets[None] - offsets[peak][:, None]).abs().amax(-1) <= 1.5
        scores = correlation.masked_fill(~near, float("-inf")) / self.temperature
        shift = scores.softmax(1) @ offsets
        pick = peak[:, None]
        agreement = 2 * (spread * own).sqrt() / (spread + own)
        confidence = (correlation * agreement).gather(1, pick)[:, 0].clamp(0, 1)
        patch = patches.gather(2, pick[:, None].expand(-1, patches.shape[1], -1))[..., 0]
        return shift, confidence, patch.unflatten(1, (3, -1))


def _reduced(pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Frames `[B, 3, T, h, w]` with a short edge of `SHORT_EDGE`, and their scale `[2]` as (x, y)."""
    from torch.nn.functional import interpolate

    height, width = pixels.shape[-2:]
    share = SHORT_EDGE / min(height, width)
    size = round(height * share), round(width * share)
    scale = pixels.new_tensor([size[1] / width, size[0] / height])
    frames = interpolate(pixels.transpose(1, 2).flatten(0, 1), size=size, mode="area")
    return frames.unflatten(0, (len(pixels), -1)).transpose(1, 2), scale


def _offsets(radius: int) -> Tensor:
    """Integer displacements `[(2 radius + 1)^2, 2]` as (x, y), row by row."""
    import torch

    line = torch.arange(-radius, radius + 1)
    y, x = torch.meshgrid(line, line, indexing="ij")
    return torch.stack([x, y], -1).reshape(-1, 2)


def _gaussian(radius: int) -> Tensor:
    """Weights `[p]` over a template; the rim, which often shows background, counts less."""
    weight = (-_offsets(radius).float().square().sum(-1) / (2 * (0.75 * radius) ** 2)).exp()
    return weight / weight.sum()


def _centred(patch: Tensor, weight: Tensor) -> Tensor:
    """Take the weighted mean of each channel out of `patch [n, 3, p]`."""
    return patch - (patch * weight).sum(-1, keepdim=True)


def _regions(frame: Tensor, owner: Tensor, centre: Tensor, radius: int, height: int, width: int) -> Tensor:
    """Squares `[n, 3, R, R]` around integer `centre [n, 2]` of `frame [B, H * W, 3]`; edges repeat."""
    import torch

    line = torch.arange(-radius, radius + 1, device=frame.device)
    x = (centre[:, :1].long() + line).clamp(0, width - 1)
    y = (centre[:, 1:].long() + line).clamp(0, height - 1)
    index = (y[:, :, None] * width + x[:, None, :]) + (owner * height * width)[:, None, None]
    return frame.reshape(-1, 3)[index].permute(0, 3, 1, 2)
