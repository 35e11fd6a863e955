"""What a person sees after a run: paths on frames, mp4 files, curves and the report page."""

from __future__ import annotations

import base64
import json
import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from data.video_files import read_frames
from runtime import curves, report, videos
from tracking.trajectory import Trajectory

SIZE, FRAMES, SCALE = 16, 6, 8


def still(xy: tuple[float, float] = (8.0, 5.0), intensity: float = 1.0, frames: int = FRAMES) -> Trajectory:
    return Trajectory(
        xy=torch.tensor(xy).expand(1, frames, 2).clone(),
        intensity=torch.full((1, frames), intensity),
        presence=torch.ones(1, frames, dtype=torch.bool),
        height=SIZE,
        width=SIZE,
        fps=8.0,
    )


def sweep() -> Trajectory:
    x = torch.linspace(2, 13, FRAMES)
    return replace(still(), xy=torch.stack([x, torch.full_like(x, 8)], -1)[None])


def blank(frames: int = FRAMES, value: float = -1.0) -> torch.Tensor:
    return torch.full((3, frames, SIZE, SIZE), value)


def changed(frames: np.ndarray) -> np.ndarray:
    return np.asarray((frames > 0).any(-1))


def has(frames: np.ndarray, colour: videos.Colour) -> np.ndarray:
    return np.asarray((np.abs(frames.astype(int) - colour) <= 2).all(-1))


def test_what_is_not_asked_for_is_not_drawn_and_frames_are_enlarged_pixel_by_pixel() -> None:
    video = torch.rand(3, FRAMES, SIZE, SIZE, generator=torch.Generator().manual_seed(0)) * 2.4 - 1.2
    asked = sweep()
    absent = replace(asked, presence=torch.zeros_like(asked.presence))
    out = videos.draw(video, absent, asked.xy, SCALE)
    expected = ((video.clamp(-1, 1) + 1) / 2 * 255).round().byte().permute(1, 2, 3, 0).numpy()
    assert out.dtype == np.uint8 and out.shape == (FRAMES, SIZE * SCALE, SIZE * SCALE, 3)
    for dy, dx in ((0, 0), (3, 5), (SCALE - 1, SCALE - 1)):
        np.testing.assert_array_equal(out[:, dy::SCALE, dx::SCALE], expected)


@pytest.mark.parametrize("scale", [4, 7, 8])
@pytest.mark.parametrize("xy", [(8.0, 5.0), (6.25, 9.5)])
def test_a_dot_stands_where_its_pixel_is_shown(xy: tuple[float, float], scale: int) -> None:
    drawn = changed(videos.draw(blank(), still(xy), None, scale))[0]
    y, x = (n.mean() for n in np.nonzero(drawn))
    # Pixel p of the video covers p * scale .. (p + 1) * scale - 1 of the enlarged frame.
    assert (x, y) == pytest.approx([p * scale + (scale - 1) / 2 for p in xy], abs=0.3)


def test_a_harder_touch_is_a_larger_and_brighter_dot() -> None:
    areas, lights = [], []
    for force in (0.0, 0.5, 1.0):
        frame = videos.draw(blank(), still(intensity=force), None, SCALE)[0]
        areas.append(changed(frame).sum())
        lights.append(int(frame.max()))
    assert areas[0] < areas[1] < areas[2] and lights[0] < lights[1] < lights[2]


def test_the_asked_path_is_whole_in_every_frame_and_the_tracked_one_does_not_run_ahead() -> None:
    asked = sweep()
    low = asked.xy + torch.tensor([0.0, 4.0])
    frames = videos.draw(blank(), asked, low, SCALE)
    row = 12 * SCALE + SCALE // 2
    magenta = has(frames, videos.TRACKED)
    reach = [np.nonzero(frame[row])[0].max() / SCALE for frame in magenta]
    assert np.diff(reach) == pytest.approx(np.diff(asked.xy[0, :, 0].numpy()), abs=0.15)
    ahead = frames[:3, 66:70, 11 * SCALE].max(1)  # y = 8 lies between rows 67 and 68
    assert (ahead[:, :2] > 120).all() and (ahead[:, 2] < 80).all()  # yellow
    later = low.clone()
    later[:, 3:] += 2
    np.testing.assert_array_equal(videos.draw(blank(), asked, later, SCALE)[:3], frames[:3])
    assert (videos.draw(blank(), asked, later, SCALE)[3] != frames[3]).any()


def test_paths_break_where_nothing_is_asked_for_or_the_track_is_lost() -> None:
    asked = sweep()
    gap = replace(asked, presence=torch.tensor([[True, True, False, False, True, True]]))
    x = asked.xy[0, :, 0].numpy() * SCALE
    column = round(float(x[2] + x[3]) / 2)
    whole, broken = (changed(videos.draw(blank(), path, None, SCALE)) for path in (asked, gap))
    assert whole[:, :, column].any() and not broken[:, :, column].any()
    lost = torch.full_like(asked.xy, math.nan)
    np.testing.assert_array_equal(videos.draw(blank(), asked, lost, SCALE), videos.draw(blank(), asked, None, SCALE))
    far = asked.xy + 1e9  # must neither overflow nor wrap around into the frame
    np.testing.assert_array_equal(
        has(videos.draw(blank(), asked, far, SCALE), videos.TRACKED), np.zeros(whole.shape, bool)
    )


def test_sizes_that_disagree_are_refused() -> None:
    with pytest.raises(ValueError, match="6 frames of 16x16, the asked path 7"):
        videos.draw(blank(), still(frames=7), None, SCALE)
    with pytest.raises(ValueError, match="does not fit"):
        videos.draw(blank(), still(), still(frames=7).xy, SCALE)
    with pytest.raises(ValueError, match="scale must be 1"):
        videos.draw(blank(), still(), None, 0)
    panel = np.zeros((2, 64, 64, 3), np.uint8)
    for panels, titles in (([panel, panel[:1]], ["a", "b"]), ([panel], ["a", "b"]), ([], [])):
        with pytest.raises(ValueError, match="one size and one title each"):
            videos.side_by_side(panels, titles)


def test_panels_stand_side_by_side_unchanged() -> None:
    colours = ((200, 30, 40), (30, 200, 40))
    panels = [np.broadcast_to(np.array(c, np.uint8), (3, 96, 120, 3)).copy() for c in colours]
    for t in range(3):
        panels[0][t, t] = 7
    out = videos.side_by_side(panels, ["before", "after"], "a striped red disc moves right " * 6)
    found = [np.argwhere(has(out[0], c)) for c in colours]
    (top, left), (top2, left2) = found[0].min(0), found[1].min(0)
    assert top - 1 == top2 and left2 - left == 120 + videos.GAP  # row 0 of the first panel is the mark
    np.testing.assert_array_equal(out[:, top2 : top2 + 96, left : left + 120], panels[0])
    np.testing.assert_array_equal(out[:, top2 : top2 + 96, left2 : left2 + 120], panels[1])
    short = videos.side_by_side(panels, ["before", "after"], "a")
    assert out.shape[1] > short.shape[1] and out.shape[2] == short.shape[2]


def test_captions_keep_every_letter_and_fit() -> None:
    font = videos._font(14)
    text = "a white ring moves " + "over" * 40 + " sand"
    lines = videos._wrap(text, font, 200)
    assert "".join(lines).replace(" ", "") == text.replace(" ", "")
    assert max(font.getlength(line) for line in lines) <= 200 and len(lines) > 3
    assert videos._wrap("", font, 200) == []


def test_an_mp4_is_what_browsers_play_and_shows_the_frames(tmp_path: Path) -> None:
    import av

    ramp = np.linspace(30, 220, 65)[None, None, :, None]
    frames = np.round(ramp * np.linspace(0.5, 1, 5)[:, None, None, None]).astype(np.uint8)
    frames = frames.repeat(47, axis=1).repeat(3, axis=3)
    path = tmp_path / "new" / "clip.mp4"
    videos.write(path, frames, 7.5)
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.pix_fmt) == ("h264", "yuv420p")
        assert float(stream.average_rate) == 7.5
    shown = np.stack(list(read_frames(path)))
    assert shown.shape == (5, 48, 66, 3)
    assert np.abs(shown[:, :47, :65].astype(int) - frames).mean() < 3
    for bad, fps in ((frames[:0], 8.0), (frames, 0.0), (frames, math.nan)):
        with pytest.raises(ValueError, match="cannot write"):
            videos.write(path, bad, fps)


def test_a_contact_sheet_shows_every_fourth_frame_of_each_panel(tmp_path: Path) -> None:
    from PIL import Image

    values = np.arange(9) * 20 + 60
    panel = np.broadcast_to(values[:, None, None, None], (9, 64, 64, 3)).astype(np.uint8)
    panel = panel * np.array([1, 0, 0], np.uint8)
    videos.write_comparison(tmp_path / "clip.mp4", [panel, panel], ["a", "b"], "prompt", 8)
    sheet = np.asarray(Image.open(tmp_path / "clip.png"))
    counts = [int(has(sheet, (int(v), 0, 0)).sum()) for v in values]
    assert counts == [2 * 64 * 64 if t % 4 == 0 else 0 for t in range(9)]
    assert (tmp_path / "clip.mp4").stat().st_size > 0


def rows(count: int) -> list[dict[str, float | str]]:
    found: list[dict[str, float | str]] = [
        {
            "step": i,
            "reward": float(i),
            "reward/motion": 2.0,
            "motion/error_px": 3.0 - i / count,
            "log_prob_gap": 0.0,
            "seconds/rest": 0.1,
            "seconds/rollout": 1.0,
        }
        for i in range(1, count + 1)
    ]
    return [{"step": 0, "eval/motion_error_px": 3.0}, *found, {"step": count, "eval/motion_error_px": 2.0}]


def write_rows(folder: Path, found: list[dict[str, float | str]]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "metrics.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in found))
    return path


def test_a_series_holds_what_was_logged_at_its_updates() -> None:
    found: list[dict[str, float | str]] = [{"step": 4, "a": 1.5}, {"step": 5}, {"step": 6, "a": "nan"}]
    found.append({"update": 7, "step": 9, "a": "-inf"})
    x, y = curves.series(found, "a")
    assert x == [4, 6, 7] and y[0] == 1.5 and all(map(math.isnan, y[1:]))
    assert curves.series(found, "b") == ([], [])


def test_smoothing_is_an_unbiased_mean_that_ignores_gaps() -> None:
    assert curves.smoothed([3.0] * 5, span=4) == pytest.approx([3.0] * 5)
    assert curves.smoothed([1.0, 5.0, 2.0], span=1) == [1.0, 5.0, 2.0]
    # Weights 0.5, 0.25 and 0.125 from the newest back, divided by their sum.
    assert curves.smoothed([1.0, 2.0, 4.0], span=2)[-1] == pytest.approx((4 * 4 + 2 * 2 + 1) / 7)
    gap = curves.smoothed([math.nan, 1.0, math.nan, 2.0], span=2)
    assert math.isnan(gap[0]) and gap[1:] == pytest.approx([1.0, 1.0, 5 / 3])


def test_only_what_was_logged_gets_a_panel() -> None:
    titles = [title for title, _ in curves._panels(rows(3))]
    assert [title.split(" (")[0] for title in titles[:3]] == ["Motion error", "Reward", "Reward term: motion"]
    assert titles[3:] == [curves.LINES["log_prob_gap"], "Seconds per update, by phase"]


@pytest.mark.parametrize("count", [1, 30])
def test_panels_draw_the_numbers(count: int, tmp_path: Path) -> None:
    from matplotlib.figure import Figure

    painted = {}
    for title, paint in curves._panels(rows(count)):
        painted[title.split(" (")[0]] = axes = Figure().add_subplot()
        paint(axes)
    error = painted["Motion error"].lines
    np.testing.assert_allclose(np.asarray(error[0].get_ydata()), [3 - i / count for i in range(1, count + 1)])
    np.testing.assert_array_equal(error[-1].get_xydata(), [[0, 3], [count, 2]])
    stack = painted["Seconds per update, by phase"]
    assert [area.get_label() for area in stack.collections] == ["rollout", "rest"]
    top = max(np.asarray(path.vertices)[:, 1].max() for path in stack.collections[-1].get_paths())
    assert top == pytest.approx(1.1)
    out = curves.plot(write_rows(tmp_path, rows(count)), tmp_path / "plots" / "curves.png")
    assert out.read_bytes().startswith(b"\x89PNG")


def test_curves_of_nothing_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=re.escape("metrics.jsonl")):
        curves.plot(tmp_path / "metrics.jsonl", tmp_path / "curves.png")
    with pytest.raises(ValueError, match="no metrics to draw"):
        curves.plot(write_rows(tmp_path, [{"step": 1}]), tmp_path / "curves.png")


BEFORE = {"update": 0, "motion_error_px": 2.0, "motion_error_px_ci": 0.2, "aesthetic": 5.0, "frechet": 0.2, "odd": 1}
AFTER = {"update": 20, "motion_error_px": 1.5, "motion_error_px_ci": 0.1, "aesthetic": 4.5, "frechet": 0.1, "odd": 2}
EVALUATION = {
    "before": BEFORE,
    "after": AFTER,
    "truth": {"update": 77, "motion_error_px": 0.4, "aesthetic": math.nan, "frechet": 0.0},
    "extractor": "tiny <clip>",
    "clips": 32,
    "split": "heldout",
    "tracker": "lucas_kanade",
    "curve": [{"update": 0, "motion_error_px": 2.0}, {"update": 20, "motion_error_px": 1.5}],
    "clip_errors_px": {"0": [1.0, 2.0, 3.0], "20": [0.5, 1.51, 2.49]},
    "schedule": "frames 0-8   ●   ·",
}


def full_run(folder: Path) -> Path:
    path = write_rows(folder, rows(20))
    curves.plot(path, folder / "curves.png")
    videos.write(folder / "videos" / "clip<0>.mp4", np.zeros((2, 32, 32, 3), np.uint8), 8)
    (folder / "evaluation.json").write_text(json.dumps(EVALUATION))
    (folder / "config.yaml").write_text("seed: 0 # <script>alert(1)</script>\n")
    environment = {"command": "python experiments/grpo.py 'a&b'", "seed": 0, "wall_seconds": 3661.2}
    (folder / "environment.json").write_text(json.dumps(environment | {"versions": {"torch": "2.9"}}))
    return folder


def test_the_page_holds_the_run_and_needs_nothing_else(tmp_path: Path) -> None:
    run = full_run(tmp_path / "run")
    page = report.write(run).read_text()
    assert "fell from 2.00 ± 0.20 to 1.50 ± 0.10 px (-25.0 %)." in page
    assert "Clip by clip it changed by -0.500 ± 0.025 px (95 % interval, 3 clips): clearly better." in page
    assert page.count("-25.0 % better") == 2 and "-10.0 % worse" in page and "-50.0 % better" in page
    assert "Measured on 32 clips of the split heldout" in page and "lucas_kanade" in page
    assert list(report.changes(EVALUATION)) == ["motion_error_px", "aesthetic", "frechet", "odd"]
    assert "<td>0.40</td>" in page and "<td>n/a</td>" in page  # truth: no interval; no finite aesthetic score
    assert "1.500 → 19.50" in page  # training reward of the first and last 2 of 20 updates
    assert "frames 0-8   ●   ·" in page and "1:01:01" in page and "torch 2.9" in page
    sources = re.findall(r'src="data:(\S+);base64,(\S+)"', page)
    assert [base64.b64decode(data) for _, data in sources] == [
        (run / "videos" / "clip<0>.mp4").read_bytes(),
        (run / "curves.png").read_bytes(),
    ]
    assert [kind for kind, _ in sources] == ["video/mp4", "image/png"]
    assert page.count("src=") == len(sources) and "http" not in page and "<link" not in page


def test_everything_written_by_others_is_escaped(tmp_path: Path) -> None:
    page = report.write(full_run(tmp_path / "a<b>c")).read_text()
    for text in ("<script", "a<b>", "clip<0>", "tiny <clip>", "'a&b'"):
        assert text not in page
    for text in ("&lt;script&gt;", "a&lt;b&gt;c", "clip&lt;0&gt;", "tiny &lt;clip&gt;", "a&amp;b"):
        assert text in page


PARTS = ("evaluation.json", "metrics.jsonl", "curves.png", "videos", "config.yaml", "environment.json")
HEADINGS = {
    "evaluation.json": "Before and after",
    "curves.png": "<h2>Curves",
    "videos": "<video",
    "config.yaml": "Resolved configuration",
    "metrics.jsonl": "Training reward",
    "environment.json": "experiments/grpo.py",
}


@pytest.mark.parametrize("missing", PARTS)
def test_a_missing_part_leaves_out_its_section_and_no_other(missing: str, tmp_path: Path) -> None:
    run = full_run(tmp_path)
    (run / missing).rename(tmp_path / "elsewhere")
    page = report.write(run).read_text()
    assert [part for part in PARTS if HEADINGS[part] not in page] == [missing]


def test_an_empty_folder_gives_a_page_and_no_folder_an_error(tmp_path: Path) -> None:
    assert tmp_path.name in report.write(tmp_path).read_text()
    with pytest.raises(FileNotFoundError, match="no such folder"):
        report.write(tmp_path / "none")
    for text in ("{", "[1]"):
        (tmp_path / "evaluation.json").write_text(text)
        with pytest.raises(ValueError, match=re.escape("evaluation.json")):
            report.write(tmp_path)


def test_the_page_says_where_the_same_tracker_found_the_paths_that_it_judges(tmp_path: Path) -> None:
    assert "not given" not in report.write(full_run(tmp_path / "given")).read_text()
    for tracker, same in (("LucasKanade", True), ("CoTracker", False)):
        found = EVALUATION | {"tracker": tracker, "found_by": {"LucasKanade": 8}}
        (tmp_path / "evaluation.json").write_text(json.dumps(found))
        page = report.write(tmp_path).read_text()
        assert "The asked paths of 8 of 32 clips were not given: LucasKanade found them there." in page
        assert ("near 0 by construction" in page) == same


def test_an_evaluation_without_a_before_makes_no_comparison(tmp_path: Path) -> None:
    (tmp_path / "evaluation.json").write_text(json.dumps({"after": AFTER}))
    page = report.write(tmp_path).read_text()
    assert "1.50 ± 0.10" in page and "→" not in page and not re.search(r"% (better|worse)", page)
