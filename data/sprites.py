"""`world=sprites`: rendered clips whose tracks, visibility and text are known exactly.

Textured sprites and unnamed distractors move over a textured background: they speed up, turn, hide each other
and leave the frame, while the camera pans. Everything is an analytic function of the clip's key, so a clip is
rendered on demand, no frame is stored, and the touched point's track is exact to the float.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from data.clip import Clip, ClipBatch
from data.draws import Stream, generator
from tracking.trajectory import Trajectory

Array = NDArray[np.floating]

SPLITS = {"train": 0, "heldout": 1, "hard": 2, "benchmark": 3}
# Speeds of the benchmark's clips, in turn, relative to the world's: from drags that hardly move to long ones.
PACES = (0.4, 0.8, 1.2, 1.8)
COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.90, 0.18, 0.15),
    "green": (0.20, 0.75, 0.25),
    "blue": (0.20, 0.35, 0.95),
    "yellow": (0.95, 0.85, 0.20),
    "purple": (0.65, 0.25, 0.85),
    "cyan": (0.20, 0.85, 0.90),
    "orange": (0.98, 0.55, 0.10),
    "white": (0.95, 0.95, 0.95),
}
SHAPES = ("disc", "square", "diamond", "ring")
TEXTURES = ("striped", "checked", "dotted")
HARD_TEXTURES = ("waved", "crossed")
GROUNDS: dict[str, tuple[tuple[float, float, float], tuple[float, float, float]]] = {
    "sand": ((0.76, 0.65, 0.45), (0.60, 0.48, 0.32)),
    "grass": ((0.25, 0.45, 0.20), (0.40, 0.60, 0.28)),
    "sea": ((0.12, 0.25, 0.45), (0.25, 0.42, 0.60)),
    "stone": ((0.35, 0.35, 0.38), (0.55, 0.55, 0.57)),
}
DIRECTIONS = ("right", "down and right", "down", "down and left", "left", "up and left", "up", "up and right")


@dataclass(frozen=True)
class Sprites:
    """Rendered sprites.

    Attributes:
        seed: seed of the world; each clip is a function of (seed, split, bucket, index).
        frames: pixel frames per clip, 1 + 4 (latent frames - 1).
        fps: frames per second of the time axis.
        sizes: frame sizes "HxW" that clips may have, multiples of 8.
        max_sprites: named sprites per clip are 1 to this many (the hard split adds one), fewer more often.
        max_distractors: unnamed smaller sprites per clip are 0 to this many, fewer more often.
        speed: mean speed of a sprite in pixels per frame (the hard split moves 1.5 times as fast).
        pan: largest camera speed in pixels per frame.
    """

    seed: int = 0
    frames: int = 33
    fps: float = 8.0
    sizes: list[str] = field(default_factory=lambda: ["32x32", "40x32", "32x40"])
    max_sprites: int = 3
    max_distractors: int = 2
    speed: float = 0.6
    pan: float = 0.15

    def __post_init__(self) -> None:
        if self.frames < 5 or self.frames % 4 != 1:
            raise ValueError(f"world.frames must be 1 + 4 k with k >= 1, got {self.frames}; try 33")
        if self.max_sprites < 1:
            raise ValueError(f"world.max_sprites must be 1 or more, got {self.max_sprites}")
        if self.max_distractors < 0:
            raise ValueError(f"world.max_distractors must be 0 or more, got {self.max_distractors}")
        if self.seed < 0:
            raise ValueError(f"world.seed must be 0 or more, got {self.seed}")
        if not (0 < self.speed < np.inf and 0 <= self.pan < np.inf and 0 < self.fps < np.inf):
            raise ValueError("world.speed and world.fps must be positive, world.pan 0 or more, all finite")
        if not self.sizes:
            raise ValueError("world.sizes is empty; name one frame size or more, such as 32x32")
        for height, width in self.buckets:
            if height % 8 or width % 8 or min(height, width) < 16:
                raise ValueError(f"world.sizes: {height}x{width} must be multiples of 8, 16 or more")

    @property
    def buckets(self) -> list[tuple[int, int]]:
        """Frame sizes (H, W)."""
        return [parse_size(text) for text in self.sizes]

    def size(self, split: str) -> int | None:
        """Clips are rendered on demand: as many as one asks for."""
        _split_id(split)
        return None

    def batch(self, split: str, indices: Sequence[int], bucket: tuple[int, int]) -> ClipBatch:
        """Render clips by index; the same (seed, split, bucket, index) gives the same clip."""
        return ClipBatch.stack([self.clip(split, int(i), bucket) for i in indices])

    def clip(self, split: str, index: int, bucket: tuple[int, int]) -> Clip:
        """Render one clip of frame size `bucket` = (H, W)."""
        import torch

        height, width = bucket
        rng = generator(Stream.DATA, self.seed, _split_id(split), height, width, index)
        world = replace(self, speed=self.speed * PACES[index % len(PACES)]) if split == "benchmark" else self
        scene = _draw_scene(world, rng, height, width, hard=split == "hard")
        video = _render(scene, self.frames, height, width)
        xy, visible = _touched(scene, height, width)
        inside = _inside(xy, height, width)
        trajectory = Trajectory(
            xy=torch.from_numpy(xy[None].astype(np.float32)),
            intensity=torch.from_numpy(_intensity(rng, self.frames)[None].astype(np.float32)),
            presence=torch.from_numpy(np.logical_and.accumulate(inside)[None]),
            height=height,
            width=width,
            fps=self.fps,
        )
        return Clip(
            video=torch.from_numpy(video.astype(np.float32)),
            trajectory=trajectory,
            prompt=_describe(scene),
            visible=torch.from_numpy((visible & inside)[None]),
            name=f"sprites/{split}/{height}x{width}/{index:05d}",
        )


@dataclass(frozen=True)
class _Sprite:
    shape: str
    colour: str
    texture: str
    radius: float
    path: Array  # [T, 2] centre in frame coordinates
    phase: float
    scale: float


@dataclass(frozen=True)
class _Scene:
    ground: str
    waves: Array  # [n, 4]: kx, ky, phase, amplitude
    camera: Array  # [T, 2]
    sprites: list[_Sprite]  # painted in order: later ones hide earlier ones
    named: list[int]
    touched: int
    offset: Array  # [2] from the sprite's centre


def parse_size(text: str) -> tuple[int, int]:
    """Parse "HxW".

    Raises:
        ValueError: the text is not two positive integers joined by x.
    """
    parts = str(text).split("x")
    if len(parts) != 2 or not all(p.isdigit() and int(p) > 0 for p in parts):
        raise ValueError(f"world.sizes: {text!r} is not a size; write height x width, such as 32x40")
    return int(parts[0]), int(parts[1])


def _split_id(split: str) -> int:
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; choose one of {', '.join(SPLITS)}")
    return SPLITS[split]


def _draw_scene(world: Sprites, rng: np.random.Generator, height: int, width: int, hard: bool) -> _Scene:
    count = _few(rng, 1, world.max_sprites) + int(hard)
    distractors = _few(rng, 0, world.max_distractors)
    camera = _pan(rng, world.frames, world.pan)
    speed = world.speed * (1.5 if hard else 1.0)
    textures = TEXTURES + HARD_TEXTURES if hard else TEXTURES
    colours = list(rng.permutation(list(COLOURS)))
    sprites = []
    for i in range(count + distractors):
        small = i >= count
        radius = float(rng.uniform(2.5, 3.5) if small else rng.uniform(4.5, 7.0))
        sprites.append(
            _Sprite(
                shape=str(rng.choice(SHAPES[:-1] if small else SHAPES)),
                colour=str(colours[i % len(colours)]),
                texture=str(rng.choice(textures)),
                radius=radius,
                path=_wander(rng, world.frames, height, width, speed) - camera,
                phase=float(rng.uniform(0, 2 * np.pi)),
                scale=float(rng.uniform(0.6, 0.9)),
            )
        )
    touched = 0
    angle, reach = rng.uniform(0, 2 * np.pi), _reach(sprites[0].shape, np.sqrt(rng.uniform()))
    offset = reach * sprites[0].radius * np.array([np.cos(angle), np.sin(angle)])
    order = _painting_order(rng, sprites, touched, offset)
    return _Scene(
        ground=str(rng.choice(list(GROUNDS))),
        waves=np.stack(
            [
                rng.normal(0, 0.3, 6),
                rng.normal(0, 0.3, 6),
                rng.uniform(0, 2 * np.pi, 6),
                rng.uniform(0.3, 1.0, 6),
            ],
            axis=1,
        ),
        camera=camera,
        sprites=[sprites[j] for j in order],
        named=[order.index(j) for j in range(count)],
        touched=order.index(touched),
        offset=offset,
    )


def _few(rng: np.random.Generator, low: int, high: int) -> int:
    """A number from low to high; each is a third as frequent as the one before it, for a small frame soon is full."""
    weights = 3.0 ** -np.arange(high - low + 1)
    return low + int(rng.choice(len(weights), p=weights / weights.sum()))


def _reach(shape: str, u: float) -> float:
    """How far from the centre a sprite is touched, in radii, for u in [0, 1]: a ring's middle is a hole."""
    return 0.5 + 0.3 * u if shape == "ring" else 0.4 * u


def _painting_order(rng: np.random.Generator, sprites: list[_Sprite], touched: int, offset: Array) -> list[int]:
    """A random order in which the touched point is seen in the first frame: nobody drags what is hidden."""
    order = [int(j) for j in rng.permutation(len(sprites))]
    point = sprites[touched].path[0] + offset
    above = order[order.index(touched) + 1 :]
    if any(_distance(sprites[j], *(point - sprites[j].path[0])) < 1 for j in above):
        order.remove(touched)
        order.append(touched)
    return order


def _pan(rng: np.random.Generator, frames: int, limit: float) -> Array:
    angle, speed = rng.uniform(0, 2 * np.pi), rng.uniform(0, limit)
    ease = 1 + 0.5 * np.sin(np.linspace(0, np.pi, frames) + rng.uniform(0, np.pi))
    steps = speed * ease[:, None] * np.array([np.cos(angle), np.sin(angle)])
    return np.asarray(np.cumsum(steps, axis=0) - steps[0])


def _wander(rng: np.random.Generator, frames: int, height: int, width: int, speed: float) -> Array:
    """A path [T, 2] that accelerates and turns; it starts inside and may leave the frame."""
    start = np.array([rng.uniform(0.2, 0.8) * (width - 1), rng.uniform(0.2, 0.8) * (height - 1)])
    centre = np.array([(width - 1) / 2, (height - 1) / 2])
    # Heading towards the far side more often than not keeps most strokes inside for most of the clip.
    to_centre = np.arctan2(*(centre - start)[::-1])
    heading = to_centre + rng.normal(0, 0.9)
    t = np.linspace(0, 1, frames)
    turn = rng.normal(0, 1.6) * t + rng.normal(0, 0.9) * np.sin(2 * np.pi * t + rng.uniform(0, 2 * np.pi))
    base, swing, beat = speed * rng.uniform(0.5, 1.5), rng.uniform(-0.7, 0.7), rng.uniform(1, 2.5)
    pace = base * (1 + swing * np.cos(np.pi * t * beat))
    steps = pace[:, None] * np.stack([np.cos(heading + turn), np.sin(heading + turn)], axis=1)
    return np.asarray(start + np.cumsum(steps, axis=0) - steps[0])


def _intensity(rng: np.random.Generator, frames: int) -> Array:
    """Touch force that swells and fades, in [0.4, 1]."""
    t = np.linspace(0, 1, frames)
    return np.asarray(0.7 + 0.3 * np.sin(2 * np.pi * rng.uniform(0.3, 1.2) * t + rng.uniform(0, 2 * np.pi)))


def _render(scene: _Scene, frames: int, height: int, width: int) -> Array:
    """Paint background, then sprites in order: `[3, T, H, W]` in [-1, 1]."""
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    wx, wy = ((a + c[:, None, None]).astype(np.float32) for a, c in zip((x, y), scene.camera.T, strict=True))
    wave = sum(a * np.sin(kx * wx + ky * wy + p) for kx, ky, p, a in scene.waves.tolist())
    mix = 0.5 + 0.5 * np.tanh(0.8 * np.asarray(wave))
    low, high = (np.array(c, np.float32)[:, None, None, None] for c in GROUNDS[scene.ground])
    video = low + (high - low) * mix
    for sprite in scene.sprites:
        u = x - sprite.path[:, 0, None, None].astype(np.float32)
        v = y - sprite.path[:, 1, None, None].astype(np.float32)
        cover = np.clip(0.5 - _distance(sprite, u, v), 0, 1)
        tone = _tone(sprite, u, v)
        paint = np.array(COLOURS[sprite.colour], np.float32)[:, None, None, None] * (0.45 + 0.55 * tone)
        video = video + cover * (paint - video)
    return np.asarray(2 * video - 1)


def _distance(sprite: _Sprite, u: Array | float, v: Array | float) -> Array:
    """Signed distance to the sprite's outline in pixels, negative inside."""
    r = sprite.radius
    if sprite.shape == "square":
        return np.asarray(np.maximum(np.abs(u), np.abs(v)) - 0.88 * r)
    if sprite.shape == "diamond":
        return np.asarray((np.abs(u) + np.abs(v) - 1.25 * r) / np.sqrt(2))
    radial = np.hypot(u, v)
    if sprite.shape == "ring":
        return np.asarray(np.maximum(radial - r, 0.3 * r - radial))
    return np.asarray(radial - r)


def _tone(sprite: _Sprite, u: Array, v: Array) -> Array:
    """Texture brightness in [0, 1]; it moves with the sprite."""
    k = sprite.scale
    c, s = float(np.cos(sprite.phase)), float(np.sin(sprite.phase))
    a, b = k * (c * u + s * v), k * (c * v - s * u)
    pattern = {
        "striped": lambda: np.sin(1.3 * a),
        "checked": lambda: 1.4 * np.sin(a) * np.sin(b),
        "dotted": lambda: np.cos(a) + np.cos(b) - 0.6,
        "waved": lambda: np.sin(1.2 * a + np.sin(1.1 * b)),
        "crossed": lambda: np.maximum(np.cos(1.2 * a), np.cos(1.2 * b)) - 0.3,
    }[sprite.texture]()
    # A slow ramp across the sprite makes every point of a periodic texture distinct.
    ramp = 0.25 * np.clip(b / (k * sprite.radius), -1, 1)
    return np.asarray(np.clip(0.5 + 0.5 * np.tanh(2 * pattern) * 0.75 + ramp * 0.5, 0, 1))


def _touched(scene: _Scene, height: int, width: int) -> tuple[Array, NDArray[np.bool_]]:
    """Track `[T, 2]` of the touched point and whether nothing painted later covers it, `[T]`."""
    xy = scene.sprites[scene.touched].path + scene.offset
    visible = np.ones(len(xy), dtype=bool)
    for sprite in scene.sprites[scene.touched + 1 :]:
        offset = xy - sprite.path
        visible &= _distance(sprite, offset[:, 0], offset[:, 1]) > 0
    return xy, visible


def _inside(xy: Array, height: int, width: int) -> NDArray[np.bool_]:
    x, y = xy[:, 0], xy[:, 1]
    return np.asarray((x >= 0) & (x <= width - 1) & (y >= 0) & (y <= height - 1))


def _describe(scene: _Scene) -> str:
    """A sentence of the small grammar: the touched sprite, its way, the others, the ground."""
    first, *others = [scene.sprites[i] for i in scene.named]
    way = first.path[-1] - first.path[0]
    sector = int(np.round(np.arctan2(way[1], way[0]) / (np.pi / 4))) % 8
    text = f"a {first.texture} {first.colour} {first.shape} moves {DIRECTIONS[sector]} over {scene.ground}"
    if others:
        text += " with " + " and ".join(f"a {s.texture} {s.colour} {s.shape}" for s in others)
    return text


def vocabulary() -> list[str]:
    """Every word that `_describe` can write."""
    words = ("a", "moves", "over", "with", "and")
    parts = (*COLOURS, *SHAPES, *TEXTURES, *HARD_TEXTURES, *GROUNDS, *DIRECTIONS)
    return sorted({w for text in (*words, *parts) for w in text.split()})
