"""Code that the documentation shows runs."""

from __future__ import annotations

import re
from typing import Any

import torch

from runtime.models import ROOT


def test_the_live_example_makes_the_clip_that_was_drawn() -> None:
    text = (ROOT / "docs" / "full_size.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, flags=re.S)
    names: dict[str, Any] = {}
    exec(compile(code, "docs/full_size.md", "exec"), names)  # our own page
    video = torch.cat(names["frames"], 2)
    assert video.shape == names["clip"].video.shape and video.isfinite().all()
    assert (video[:, :, 0] - names["clip"].video[:, :, 0]).square().mean() < 0.05, "it begins with the reference image"
