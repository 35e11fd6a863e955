"""Videos a person can judge by eye: asked and tracked path on enlarged frames, side by side, as mp4 and PNG.

Frames are uint8 `[T, H, W, 3]`, RGB. The asked path is yellow, its dot grows and brightens with the touch
force; the tracked path is magenta, its dot small. Rims make both seen on any background.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from PIL import Image, ImageDraw, ImageFont
    from torch import Tensor

    from tracking.trajectory import Trajectory

Frames = NDArray[np.uint8]
Colour = tuple[int, int, int]

ASKED: Colour = (255, 225, 25)
TRACKED: Colour = (255, 0, 200)
LEGEND = ((ASKED, "asked path, dot: touch force"), (TRACKED, "tracked path"))
DARK: Colour = (25, 25, 25)
GREY: Colour = (90, 90, 90)
WHITE: Colour = (255, 255, 255)
GAP = 8
_SHIFT = 4  # cv2 takes sub-pixel positions as integers with this many fractional bits


def draw(video: Tensor, asked: Trajectory, tracked_xy: Tensor | None, scale: int) -> Frames:
    """Enlarge a video and draw the paths on it.

    The whole asked path is shown in every frame, the tracked one up to the frame. Both are drawn only where a
    position is asked for (`presence`), the tracked one only where it is finite.

    Args:
        video: `[3, T, H, W]` in [-1, 1]; values outside are clamped.
        asked: `[K, T]`, in pixels of the video.
        tracked_xy: `[K, T, 2]` in the same pixels; None draws none.
        scale: each pixel becomes `scale` x `scale`.

    Returns:
        uint8 `[T, H * scale, W * scale, 3]`.

    Raises:
        ValueError: the sizes of the video and of the paths disagree, or scale is below 1.
    """
    _check_sizes(video, asked, tracked_xy, scale)
    out = _enlarged(video, scale)
    presence, intensity = _numpy(asked.presence).astype(bool), _numpy(asked.intensity)
    pen = max(1.0, min(out.shape[1:3]) / 128)
    asked_xy = _enlarged_xy(asked.xy, scale)
    tracked = None if tracked_xy is None else _enlarged_xy(tracked_xy, scale)
    for k, shown in enumerate(presence):
        for t, frame in enumerate(out):
            _line(frame, asked_xy[k], shown, ASKED, pen)
            if tracked is not None:
                _line(frame, tracked[k, : t + 1], shown[: t + 1], TRACKED, pen)
            if shown[t]:
                force = float(np.clip(intensity[k, t], 0, 1))
                fill = tuple(round(c * (0.5 + 0.5 * force)) for c in ASKED)
                _dot(frame, asked_xy[k, t], pen * (2.2 + 2.8 * force), fill, DARK, pen)
                if tracked is not None:
                    _dot(frame, tracked[k, t], 1.7 * pen, TRACKED, WHITE, pen)
    return out


def side_by_side(panels: Sequence[Frames], titles: Sequence[str], caption: str = "") -> Frames:
    """Set videos of one size beside each other, a title above each, the wrapped caption and the legend below.

    Args:
        panels: each `[T, H, W, 3]`.
        titles: one per panel.
        caption: such as the prompt.

    Returns:
        uint8 `[T, H', W', 3]`.

    Raises:
        ValueError: no panels, sizes that differ, or another number of titles.
    """
    frames, height, width = _same_size(panels, titles)
    text = max(12, width // 18)
    font, strip = _font(text), round(1.8 * text)
    total = len(panels) * width + (len(panels) + 1) * GAP
    lines = _wrap(caption, font, total - 2 * GAP)
    below = round(1.5 * text)
    legend = _legend_rows(font, total)
    page, pen = _page(total, strip + height + GAP + below * (len(lines) + len(legend)) + GAP)
    for i, title in enumerate(titles):
        x = GAP + i * (width + GAP)
        pen.text((x + width / 2, strip / 2), title, DARK, _font(text, bold=True), anchor="mm")
    top = strip + height + GAP
    for i, line in enumerate(lines):
        pen.text((GAP, top + i * below), line, DARK, font)
    _draw_legend(pen, legend, font, top + len(lines) * below, below)
    out = np.repeat(np.asarray(page)[None], frames, axis=0)
    for i, panel in enumerate(panels):
        x = GAP + i * (width + GAP)
        out[:, strip : strip + height, x : x + width] = panel
    return out


def contact_sheet(
    panels: Sequence[Frames], titles: Sequence[str], caption: str = "", every: int = 4, tile: int = 144
) -> Frames:
    """Lay out every `every`-th frame: a row per panel with its title, a column per frame with its number.

    Tiles are shrunk to `tile` pixels of width, never enlarged. Otherwise as `side_by_side`.

    Returns:
        One image, uint8 `[H', W', 3]`.
    """
    import cv2

    frames, height, width = _same_size(panels, titles)
    size = (min(tile, width), max(1, round(height * min(tile, width) / width)))
    picks = range(0, frames, every)
    font, bold = _font(13), _font(13, bold=True)
    side = round(max(bold.getlength(title) for title in titles)) + 2 * GAP
    total = side + len(picks) * (size[0] + GAP)
    lines = _wrap(caption, font, total - 2 * GAP)
    legend = _legend_rows(font, total)
    head, row = 24, size[1] + GAP
    page, pen = _page(total, head + len(panels) * row + 20 * (len(lines) + len(legend)) + GAP)
    for c, t in enumerate(picks):
        x = side + c * (size[0] + GAP)
        pen.text((x + size[0] / 2, head / 2), f"frame {t}", GREY, font, anchor="mm")
    top = head + len(panels) * row
    for i, line in enumerate(lines):
        pen.text((GAP, top + 20 * i), line, DARK, font)
    _draw_legend(pen, legend, font, top + 20 * len(lines), 20)
    for r, title in enumerate(titles):
        pen.text((GAP, head + r * row + size[1] / 2), title, DARK, bold, anchor="lm")
    out = np.array(page)
    for r, panel in enumerate(panels):
        for c, t in enumerate(picks):
            y, x = head + r * row, side + c * (size[0] + GAP)
            out[y : y + size[1], x : x + size[0]] = cv2.resize(panel[t], size, interpolation=cv2.INTER_AREA)
    return out


def write(path: Path, frames: Frames, fps: float) -> None:
    """Write `[T, H, W, 3]` as an mp4 that browsers play (H.264, yuv420p); odd sizes are padded by one pixel.

    Raises:
        ValueError: no frames, or fps is not positive.
    """
    import av

    if len(frames) == 0 or not fps > 0:
        raise ValueError(f"{path}: cannot write {len(frames)} frames at {fps} frames per second")
    path.parent.mkdir(parents=True, exist_ok=True)
    height, width = frames.shape[1:3]
    even = np.pad(frames, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    with av.open(str(path), "w", options={"movflags": "+faststart"}) as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
        stream.width, stream.height, stream.pix_fmt = even.shape[2], even.shape[1], "yuv420p"
        stream.options = {"crf": "16"}
        for frame in even:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), "rgb24")))
        container.mux(stream.encode())


def write_comparison(path: Path, panels: Sequence[Frames], titles: Sequence[str], caption: str, fps: float) -> None:
    """Write `side_by_side` as `path` (mp4), and the `contact_sheet` beside it as PNG."""
    from PIL import Image

    write(path, side_by_side(panels, titles, caption), fps)
    Image.fromarray(contact_sheet(panels, titles, caption)).save(path.with_suffix(".png"), optimize=True)


def _check_sizes(video: Tensor, asked: Trajectory, tracked_xy: Tensor | None, scale: int) -> None:
    frames, height, width = video.shape[1:]
    if scale < 1:
        raise ValueError(f"scale must be 1 or more, got {scale}")
    if (asked.num_frames, asked.height, asked.width) != (frames, height, width):
        raise ValueError(
            f"the video has {frames} frames of {height}x{width}, the asked path "
            f"{asked.num_frames} of {asked.height}x{asked.width}"
        )
    if tracked_xy is not None and tracked_xy.shape != asked.xy.shape:
        raise ValueError(f"tracked path {tuple(tracked_xy.shape)} does not fit asked path {tuple(asked.xy.shape)}")


def _numpy(tensor: Tensor) -> NDArray[np.float64]:
    return np.asarray(tensor.detach().cpu().double().numpy())


def _enlarged(video: Tensor, scale: int) -> Frames:
    unit = (_numpy(video).transpose(1, 2, 3, 0) + 1) / 2
    pixels = np.round(255 * np.clip(np.nan_to_num(unit), 0, 1)).astype(np.uint8)
    return np.ascontiguousarray(pixels.repeat(scale, axis=1).repeat(scale, axis=2))


def _enlarged_xy(xy: Tensor, scale: int) -> NDArray[np.float64]:
    """Positions in the enlarged frame: pixel centres are integers before and after."""
    return (_numpy(xy) + 0.5) * scale - 0.5


def _line(frame: Frames, xy: NDArray[np.float64], shown: NDArray[np.bool_], colour: Colour, pen: float) -> None:
    """Draw a path `[T, 2]` with a dark rim, broken where it is not shown."""
    import cv2

    runs = [_fixed(xy[part]) for part in _runs(shown & np.isfinite(xy).all(-1))]
    for ink, thickness in ((DARK, round(pen) + 2), (colour, round(pen))):
        cv2.polylines(frame, runs, False, ink, thickness, cv2.LINE_AA, _SHIFT)


def _dot(frame: Frames, xy: NDArray[np.float64], radius: float, fill: Sequence[int], rim: Colour, pen: float) -> None:
    import cv2

    if not np.isfinite(xy).all():
        return
    centre = [int(n) for n in _fixed(xy)]
    for ink, size in ((rim, radius + 0.7 * pen), (fill, radius)):
        cv2.circle(frame, centre, round(size * 2**_SHIFT), ink, -1, cv2.LINE_AA, _SHIFT)


def _fixed(xy: NDArray[np.float64]) -> NDArray[np.int32]:
    # cv2 overflows on far-away points; a lost track may be anywhere.
    return np.round(np.clip(xy, -20_000, 20_000) * 2**_SHIFT).astype(np.int32)


def _runs(shown: NDArray[np.bool_]) -> Iterator[slice]:
    """Slices of neighbouring True values."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], shown, [False]])))
    for begin, end in edges.reshape(-1, 2):
        yield slice(int(begin), int(end))


def _same_size(panels: Sequence[Frames], titles: Sequence[str]) -> tuple[int, int, int]:
    shapes = {panel.shape for panel in panels}
    if len(shapes) != 1 or len(titles) != len(panels):
        raise ValueError(
            f"panels must have one size and one title each, got sizes {sorted(shapes)}, {len(titles)} titles"
        )
    frames, height, width, _ = shapes.pop()
    return frames, height, width


def _page(width: int, height: int) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    from PIL import Image, ImageDraw

    page = Image.new("RGB", (width, height), WHITE)
    return page, ImageDraw.Draw(page)


@cache
def _font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which matplotlib brings along: captions look the same on every machine."""
    import matplotlib
    from PIL import ImageFont

    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name), size)


def _wrap(text: str, font: ImageFont.FreeTypeFont, width: float) -> list[str]:
    """Break text into lines of at most `width` pixels, between words; a longer word is broken inside."""
    lines: list[str] = []
    line = ""
    for word in text.split():
        joined = f"{line} {word}".strip()
        if font.getlength(joined) <= width:
            line = joined
            continue
        if line:
            lines.append(line)
        while font.getlength(word) > width and len(word) > 1:
            fits = max(1, sum(font.getlength(word[:n]) <= width for n in range(1, len(word) + 1)))
            lines.append(word[:fits])
            word = word[fits:]
        line = word
    return [*lines, line] if line else lines


def _legend_rows(font: ImageFont.FreeTypeFont, width: float) -> list[list[tuple[Colour, str]]]:
    """The legend in one row where it fits, else a row per entry."""
    together = sum(2.5 * font.size + font.getlength(text) for _, text in LEGEND)
    return [list(LEGEND)] if together <= width else [[entry] for entry in LEGEND]


def _draw_legend(
    pen: ImageDraw.ImageDraw,
    rows: Sequence[Sequence[tuple[Colour, str]]],
    font: ImageFont.FreeTypeFont,
    top: float,
    line: float,
) -> None:
    r = 0.38 * font.size
    for i, row in enumerate(rows):
        x, y = float(GAP), top + (i + 0.5) * line
        for colour, text in row:
            pen.ellipse((x, y - r, x + 2 * r, y + r), fill=colour, outline=DARK)
            pen.text((x + 2 * r + 5, y), text, GREY, font, anchor="lm")
            x += 2.5 * font.size + font.getlength(text)
