"""The sprites world: keyed clips, exact tracks and visibility, splits that differ as they should."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, grid_sample

from algorithms.pretraining.towers import TowerStage
from data.clip import Clip, ClipBatch
from data.draws import Stream, generator, normal, normals, seed_of
from data.pool import ClipPool, from_bytes, to_bytes
from data.sprites import (
    COLOURS,
    DIRECTIONS,
    HARD_TEXTURES,
    SHAPES,
    Sprites,
    _distance,
    _draw_scene,
    _render,
    _touched,
    parse_size,
    vocabulary,
)

BUCKET = (32, 32)
LONE = Sprites(max_sprites=1, max_distractors=0)


@pytest.fixture(scope="module")
def splits() -> dict[str, ClipBatch]:
    return {split: Sprites().batch(split, range(100), BUCKET) for split in ("train", "heldout", "hard")}


def under_the_point(clip: Clip) -> Tensor:
    """Colours `[T, 3]` in [0, 1] at the track, between pixels."""
    size = torch.tensor([clip.trajectory.width - 1, clip.trajectory.height - 1])
    where = 2 * clip.trajectory.xy[0] / size - 1
    pixels = grid_sample(clip.video.transpose(0, 1), where[:, None, None], align_corners=True)
    return (pixels[:, :, 0, 0] + 1) / 2


def likeness(clip: Clip) -> Tensor:
    """Cosine between the colour under the point and the colour of the sprite that the prompt names first."""
    named = torch.tensor(COLOURS[clip.prompt.split()[2]])
    return cosine_similarity(under_the_point(clip), named[None])


def speeds(batch: ClipBatch) -> Tensor:
    return batch.trajectory.xy[:, 0].diff(dim=1).norm(dim=-1)


def test_a_clip_is_a_function_of_its_key() -> None:
    world = Sprites()
    first = world.clip("train", 3, BUCKET)
    again = Sprites().batch("train", [5, 3], BUCKET)
    assert torch.equal(again.video[1], first.video)
    assert torch.equal(again.trajectory.xy[1], first.trajectory.xy)
    assert (again.prompts[1], again.names[1]) == (first.prompt, first.name)
    others = [
        world.clip("train", 4, BUCKET),
        world.clip("heldout", 3, BUCKET),
        world.clip("hard", 3, BUCKET),
        Sprites(seed=1).clip("train", 3, BUCKET),
    ]
    assert all((other.video - first.video).abs().max() > 0.1 for other in others)
    wide = world.clip("train", 3, (32, 40))
    assert (wide.video[..., :32] - first.video).abs().max() > 0.1


def test_splits_share_no_clip(splits: dict[str, ClipBatch]) -> None:
    tracks = torch.cat([batch.trajectory.xy.flatten(1) for batch in splits.values()])
    assert (torch.pdist(tracks) > 1).all()
    names = [name for batch in splits.values() for name in batch.names]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("bucket", Sprites().buckets)
def test_clips_of_every_size(bucket: tuple[int, int]) -> None:
    batch = Sprites(frames=9).batch("train", range(4), bucket)
    assert batch.video.shape == (4, 3, 9, *bucket) and batch.video.dtype == torch.float32
    assert batch.video.min() >= -1 and batch.video.max() <= 1 and batch.video.std() > 0.1
    path = batch.trajectory
    assert (path.height, path.width, path.num_frames, path.fps) == (*bucket, 9, 8.0)
    assert path.xy.shape == (4, 1, 9, 2) and path.xy.dtype == torch.float32
    assert batch.visible.shape == path.presence.shape == path.intensity.shape == (4, 1, 9)


def test_the_touched_point_shows_its_sprite_wherever_it_can_be_seen() -> None:
    """Every shape, a ring's hole included, in every frame."""
    shapes = set()
    for index in range(60):
        clip = LONE.clip("train", index, BUCKET)
        shapes.add(clip.prompt.split()[3])
        assert clip.visible[0, 0], "nobody drags what is hidden"
        assert likeness(clip)[clip.visible[0]].min() > 0.99, clip.name
    assert shapes == set(SHAPES)


def test_visibility_tells_who_is_in_front() -> None:
    seen, hidden = [], []
    for index in range(100):
        clip = Sprites().clip("train", index, BUCKET)
        same, inside = likeness(clip), clip.trajectory.presence[0]
        assert clip.visible[0, 0] and same[0] > 0.95
        seen.append(same[clip.visible[0]])
        hidden.append(same[inside & ~clip.visible[0]])
    # Outlines are antialiased: half a pixel around an edge shows both.
    assert torch.cat(seen).quantile(0.02) > 0.97
    assert torch.cat(hidden).quantile(0.8) < 0.97


@pytest.mark.parametrize("index", range(6))
def test_pixels_move_exactly_as_the_track(index: int) -> None:
    """With whole-pixel motion a sprite's patch is the same numbers at every frame, to rounding."""
    scene = _draw_scene(LONE, generator(Stream.DATA, index), 48, 48, hard=index % 2 == 1)
    steps = np.array([[0, 0], [1, 0], [3, 1], [2, 4], [-2, 5]])
    start = np.array([23.3, 21.8])
    front = replace(scene.sprites[scene.touched], path=start + steps)
    scene = replace(scene, sprites=[front], touched=0, named=[0], camera=np.zeros((5, 2)))
    video = _render(scene, 5, 48, 48)
    xy, visible = _touched(scene, 48, 48)
    assert visible.all()
    assert np.allclose(xy - xy[0], steps) and np.abs(xy[0] - start).max() <= front.radius
    # The pixels around the touched point that the sprite covers wholly.
    v, u = np.mgrid[-2:3, -2:3].reshape(2, -1) + np.round(xy[0, ::-1]).astype(int)[:, None]
    inner = _distance(front, u - start[0], v - start[1]) < -0.5
    u, v = u[inner], v[inner]
    assert len(u) >= 6 and video[:, 0, v, u].std() > 0.05
    for frame, (dx, dy) in enumerate(steps):
        np.testing.assert_allclose(video[:, frame, v + dy, u + dx], video[:, 0, v, u], atol=1e-4)


def test_motion_speeds_up_and_turns(splits: dict[str, ClipBatch]) -> None:
    train = splits["train"]
    speed = speeds(train)
    assert 0.5 < speed.mean() < 0.75
    assert (speed.amax(1) / speed.amin(1)).median() > 1.4
    step = train.trajectory.xy[:, 0].diff(dim=1)
    heading = torch.atan2(step[..., 1], step[..., 0])
    turned = (heading[:, -1] - heading[:, 0] + math.pi).remainder(2 * math.pi) - math.pi
    assert turned.abs().median() > 0.5


def test_points_are_hidden_and_leave_at_a_sensible_rate(splits: dict[str, ClipBatch]) -> None:
    inside, visible = splits["train"].trajectory.presence[:, 0], splits["train"].visible[:, 0]
    assert 0.1 < float((~inside).any(1).float().mean()) < 0.5
    assert 0.03 < float((inside & ~visible).any(1).float().mean()) < 0.5
    assert float(inside.float().mean()) > 0.85


def test_nothing_is_asked_for_after_the_point_has_left(splits: dict[str, ClipBatch]) -> None:
    for batch in splits.values():
        path = batch.trajectory
        x, y = path.xy[..., 0], path.xy[..., 1]
        inside = (x >= 0) & (x <= path.width - 1) & (y >= 0) & (y <= path.height - 1)
        assert torch.equal(path.presence, inside.cumprod(-1).bool()), "once gone, gone"
        assert inside[..., 0].all() and not (batch.visible & ~inside).any()
        assert (~path.presence).any()


def test_intensity_swells_and_fades(splits: dict[str, ClipBatch]) -> None:
    force = splits["train"].trajectory.intensity[:, 0]
    assert force.min() >= 0.4 - 1e-6 and force.max() <= 1 + 1e-6
    assert (force.amax(1) - force.amin(1)).min() > 0.1
    assert force.diff(dim=1).abs().max() < 0.1, "smoothly"


def test_the_hard_split_is_harder(splits: dict[str, ClipBatch]) -> None:
    train, hard = splits["train"], splits["hard"]
    assert speeds(hard).mean() / speeds(train).mean() == pytest.approx(1.5, abs=0.15)

    def sprites(batch: ClipBatch) -> list[int]:
        return [len(re.findall(r"\ba\b", prompt)) for prompt in batch.prompts]

    assert set(sprites(train)) == set(sprites(splits["heldout"])) == {1, 2, 3}
    assert set(sprites(hard)) == {2, 3, 4}
    for split, batch in splits.items():
        words = {word for prompt in batch.prompts for word in prompt.split()}
        assert (set(HARD_TEXTURES) <= words) == (split == "hard")
        assert split == "hard" or not set(HARD_TEXTURES) & words


def test_prompts_keep_to_the_vocabulary_and_fit(splits: dict[str, ClipBatch]) -> None:
    prompts = [prompt for batch in splits.values() for prompt in batch.prompts]
    words = {word for prompt in prompts for word in prompt.split()}
    assert words == set(vocabulary()), "and use all of it"
    # The end mark takes a token as well.
    assert max(len(prompt.split()) for prompt in prompts) < TowerStage().text_length


def test_prompts_name_the_direction(splits: dict[str, ClipBatch]) -> None:
    train = splits["train"]
    for path, prompt in zip(train.trajectory.xy[:, 0], train.prompts, strict=True):
        found = re.search(r"moves (.*?) over", prompt)
        assert found
        x, y = (path[-1] - path[0]).tolist()
        off = math.atan2(y, x) - DIRECTIONS.index(found[1]) * math.pi / 4
        assert abs(math.remainder(off, 2 * math.pi)) <= math.pi / 8 + 1e-3


def test_the_camera_pans() -> None:
    """It shifts tracks by its own smooth way, and the ground with them."""
    still, panned = (replace(LONE, pan=pan).batch("train", range(8), BUCKET) for pan in (0.0, 0.15))
    way = (still.trajectory.xy - panned.trajectory.xy)[:, 0]
    step = way.diff(dim=1)
    assert step.norm(dim=-1).max() <= 1.5 * 0.15 + 1e-5 and way[:, -1].norm(dim=-1).mean() > 1
    along = cosine_similarity(step[:, :-1], step[:, 1:], dim=-1)
    assert along.min() > 0.99
    far = torch.cdist(pixel_grid(), still.trajectory.xy[:, 0].mean(1)).T.view(8, 32, 32) > 20
    changes = [(video[:, :, -1] - video[:, :, 0]).abs().amax(1)[far].median() for video in (still.video, panned.video)]
    assert changes[0] < 1e-6 and changes[1] > 0.02


def pixel_grid() -> Tensor:
    y, x = torch.meshgrid(torch.arange(32.0), torch.arange(32.0), indexing="ij")
    return torch.stack([x, y], -1).view(-1, 2)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Sprites(frames=32), r"world\.frames must be 1 \+ 4 k"),
        (lambda: Sprites(frames=1), r"world\.frames"),
        (lambda: Sprites(max_sprites=0), r"world\.max_sprites must be 1 or more, got 0"),
        (lambda: Sprites(max_distractors=-1), r"world\.max_distractors must be 0 or more"),
        (lambda: Sprites(speed=0), r"world\.speed"),
        (lambda: Sprites(speed=math.nan), r"world\.speed"),
        (lambda: Sprites(speed=math.inf), r"world\.speed"),
        (lambda: Sprites(pan=math.inf), r"world\.pan"),
        (lambda: Sprites(pan=-0.1), r"world\.pan"),
        (lambda: Sprites(seed=-1), r"world\.seed must be 0 or more, got -1"),
        (lambda: Sprites(fps=0), r"world\.fps"),
        (lambda: Sprites(sizes=[]), r"world\.sizes"),
        (lambda: Sprites(sizes=["32"]), r"world\.sizes: '32' is not a size"),
        (lambda: Sprites(sizes=["32x0"]), r"world\.sizes: '32x0' is not a size"),
        (lambda: Sprites(sizes=["30x32"]), r"world\.sizes: 30x32 must be multiples of 8"),
        (lambda: Sprites(sizes=["8x32"]), r"world\.sizes: 8x32"),
        (lambda: Sprites().size("test"), r"unknown split 'test'; choose one of train, heldout, hard"),
        (lambda: Sprites().batch("test", [0], BUCKET), r"unknown split 'test'"),
    ],
)
def test_bad_settings_are_refused_in_one_line(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        make()
    assert "\n" not in str(error.value)


def test_size() -> None:
    assert Sprites().size("train") is None and parse_size("32x40") == (32, 40)


def test_batches_pad_select_and_join() -> None:
    world = Sprites(frames=9)
    one, two = (world.clip("train", i, BUCKET) for i in range(2))
    path = two.trajectory
    double = replace(
        two,
        trajectory=replace(
            path,
            xy=path.xy.repeat(2, 1, 1),
            intensity=path.intensity.repeat(2, 1),
            presence=path.presence.repeat(2, 1),
        ),
        visible=two.visible.repeat(2, 1),
    )
    batch = ClipBatch.stack([one, double])
    assert batch.visible.shape == (2, 2, 9)
    assert not batch.visible[0, 1].any() and not batch.trajectory.presence[0, 1].any()
    assert torch.equal(batch.visible[1], double.visible)
    repeated = batch.repeat(3)
    assert repeated.names == [one.name] * 3 + [two.name] * 3 and len(repeated) == 6
    assert torch.equal(repeated.video[2], one.video) and torch.equal(repeated.video[3], two.video)
    joined = ClipBatch.concat([batch.select([1]), batch.select([0])])
    assert joined.names == batch.select([1, 0]).names
    assert torch.equal(joined.trajectory.xy, batch.trajectory.xy.flip(0))
    assert torch.equal(joined.visible, batch.visible.flip(0))


def test_pool_holds_training_clips_as_bytes() -> None:
    world = Sprites(frames=5)
    pool = ClipPool(world, BUCKET, range(3, 70))
    assert len(pool) == 67
    found, true = pool.batch([66, 0]), world.batch("train", [69, 3], BUCKET)
    assert found.names == true.names and found.prompts == true.prompts
    assert torch.equal(found.trajectory.xy, true.trajectory.xy)
    assert (found.video - true.video).abs().max() <= 0.5 / 127.5 + 1e-6
    assert torch.equal(to_bytes(from_bytes(torch.arange(256).byte())), torch.arange(256).byte())


def test_draws_are_keyed_and_do_not_depend_on_the_batch_split() -> None:
    keys = [(seed, prompt, 2) for seed in range(4) for prompt in range(4)]
    whole = normals(Stream.TRANSITION_NOISE, keys, (3, 5))
    parts = [normals(Stream.TRANSITION_NOISE, keys[i : i + 4], (3, 5)) for i in range(0, 16, 4)]
    assert torch.equal(torch.cat(parts), whole)
    assert torch.equal(normal(Stream.TRANSITION_NOISE, keys[7], (3, 5)), whole[7])
    rows = torch.cat([whole, normals(Stream.INITIAL_NOISE, keys, (3, 5))]).flatten(1)
    assert (torch.pdist(rows) > 0.1).all(), "keys and streams keep apart"
    many = normal(Stream.INITIAL_NOISE, (1, 2), (200_000,))
    assert abs(many.mean()) < 0.01 and abs(many.std() - 1) < 0.01


def test_keys_of_one_length_never_meet() -> None:
    """Shorter keys may meet longer ones, which is why each use has keys of one length."""
    for length in range(1, 4):
        keys = np.stack(np.meshgrid(*[np.arange(6)] * length), -1).reshape(-1, length)
        seeds = {seed_of(Stream.TRAINING, *key.tolist()) for key in keys}
        assert len(seeds) == 6**length
    assert seed_of(Stream.TRAINING, 7) == seed_of(Stream.TRAINING, 7, 0)
    assert min(seeds) >= 0 and max(seeds) < 2**63
    with pytest.raises(ValueError):
        generator(Stream.DATA, -1)


def test_streams_keep_their_numbers() -> None:
    """They are part of every run's identity."""
    names = [
        "INITIAL_NOISE",
        "TRANSITION_NOISE",
        "REFERENCE_NOISE",
        "SCHEDULE",
        "DATA",
        "TRAINING",
    ]
    assert [stream.name for stream in Stream] == names
    assert all(b - a == 1 for a, b in pairwise(Stream)) and Stream.INITIAL_NOISE == 0
    # PCG64 of SeedSequence([1, 0, 5]), so that another numpy or platform cannot change runs unnoticed.
    expected = np.random.default_rng(np.random.SeedSequence([1, 0, 5])).standard_normal(2, dtype=np.float32)
    assert normal(Stream.TRANSITION_NOISE, (0, 5), (2,)).numpy().tolist() == expected.tolist()
