"""CoTracker3 (arXiv 2410.11831), a learned tracker: `pip install -e '.[tracker]'`. Its licence is CC BY-NC.

The package is not on the package index, where its name is free: install it from its repository only, as the extra does.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tracking.trackers import Tracks, check_input
from tracking.weights import read_weights

if TYPE_CHECKING:
    from torch import Tensor

HUB = "https://huggingface.co/facebook/cotracker3/resolve/main/scaled_{mode}.pth"
# Short edge that clips are brought to, and half of what the finest level of its correlations sees there, pixels.
SHORT_EDGE, SEEN = 384, 14
# Frames of the windows that the published weights were trained with.
WINDOWS = {"offline": 60, "online": 16}


@dataclass(frozen=True)
class CoTracker3:
    """Meta's CoTracker3 with its own predictors; it runs where the video is.

    `offline` sees the whole clip, `online` sees windows of 16 frames, half of them new: unlike the other trackers
    neither is causal, so it scores finished clips only. Clips are enlarged to 384x512 first: on a CPU that takes
    seconds a clip.

    Attributes:
        mode: `offline` or `online`; the weights must be of the same one.
        checkpoint: local file of the weights, `scaled_offline.pth`, `scaled_online.pth` or a .safetensors file.
        hub: download the published weights where no file is named.
    """

    mode: Literal["offline", "online"] = "offline"
    checkpoint: str | None = None
    hub: bool = False

    def __post_init__(self) -> None:
        if self.mode not in WINDOWS:
            raise ValueError(f"tracker.mode must be offline or online, got {self.mode}")

    def check(self) -> None:
        """Look for the package and the weights; imports and downloads nothing.

        Raises:
            ValueError: the package is not installed, or no weights are named.
            FileNotFoundError: there is no such file.
        """
        if importlib.util.find_spec("cotracker") is None:
            raise ValueError("tracker=cotracker3 needs CoTracker: pip install -e '.[tracker]' (licence CC BY-NC)")
        if self.checkpoint is None and not self.hub:
            raise ValueError(
                f"tracker.checkpoint is not set; name the file scaled_{self.mode}.pth, or set tracker.hub=true to "
                f"download it"
            )
        if self.checkpoint is not None and not Path(self.checkpoint).expanduser().is_file():
            raise FileNotFoundError(f"tracker.checkpoint: no file at {self.checkpoint}")

    def prepare(self, device: str) -> None:
        """Load the network.

        Raises:
            ValueError: the file's weights are not of this mode.
        """
        self._loaded(device)

    def reach(self, height: int, width: int) -> float:
        """See `Tracker.reach`: the finest level of its correlations."""
        return max(1.0, SEEN * min(height, width) / SHORT_EDGE)

    def track(self, video: Tensor, queries: Tensor) -> Tracks:
        """Follow points; see `Tracker.track`, but not causal. Non-finite pixels count as grey."""
        import torch

        check_input(video, queries)
        frames, points = video.shape[2], queries.detach().to(video.device, torch.float32)
        pixels = (video.detach().float().nan_to_num(0.0, 0.0, 0.0).clamp(-1, 1) + 1) * 127.5
        # The predictors take one clip at a time.
        rows = [
            self._follow(clip.transpose(1, 2).contiguous(), start)
            for clip, start in zip(pixels.split(1), points.split(1), strict=True)
        ]
        xy, visible, score = (torch.cat(column).transpose(1, 2) for column in zip(*rows, strict=True))
        first = torch.arange(frames, device=video.device) == 0
        return Tracks(
            torch.where(first[:, None], points[:, :, None], xy.float()),
            visible | first,
            score.float().where(~first, 1.0),
        )

    def _follow(self, clip: Tensor, starts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Positions `[1, T, K, 2]`, visibility and confidence `[1, T, K]` of `clip [1, T, 3, H, W]` in 0..255."""
        import torch

        length, points = clip.shape[1], starts.shape[1]
        if points == 0:
            empty = clip.new_zeros(1, length, 0)
            return clip.new_zeros(1, length, 0, 2), empty.bool(), empty
        predictor, heard = self._loaded(str(clip.device))
        queries = torch.cat([torch.zeros_like(starts[..., :1]), starts], -1)  # (frame, x, y)
        with torch.no_grad():
            if self.mode == "offline":
                xy, visible = predictor(clip, queries=queries)
            else:
                predictor(clip[:, :1], is_first_step=True, queries=queries, add_support_grid=True)
                for window in windows(length, predictor.step):
                    xy, visible = predictor(clip[:, window], add_support_grid=True)
        # Both keep the support grid's points behind the asked ones.
        _, seen, sure, *_ = heard[-1]
        heard.clear()
        return xy, visible, (seen * sure)[:, :, :points]

    def _loaded(self, device: str) -> tuple[Any, list[Any]]:
        """The predictor on `device`, and what its network last returned; loaded on the first call.

        The predictors return no confidence, so the network's own output is overheard.
        """
        loaded: tuple[Any, list[Any]] | None = getattr(self, "_predictor", None)
        if loaded is None:
            predictor = self._load()
            heard: list[Any] = []
            forward = predictor.model.forward

            def overhear(*args: Any, **kwargs: Any) -> Any:
                heard[:] = [forward(*args, **kwargs)]
                return heard[-1]

            predictor.model.forward = overhear  # the offline predictor calls `forward`, so no hook would run
            loaded = predictor.eval().requires_grad_(False), heard
            object.__setattr__(self, "_predictor", loaded)
        return loaded[0].to(device), loaded[1]

    def _load(self) -> Any:
        """The predictor with its weights, on the CPU."""
        import torch

        self.check()
        # Importing the package calls torch.manual_seed(0), and building the network draws its first weights.
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            from cotracker import predictor as package

            cls = package.CoTrackerPredictor if self.mode == "offline" else package.CoTrackerOnlinePredictor
            predictor = cls(checkpoint=None, offline=self.mode == "offline", window_len=WINDOWS[self.mode])
        state = self._weights()
        try:
            predictor.model.load_state_dict(state)
        except RuntimeError as error:
            line = " ".join(str(error).split())[:200]
            raise ValueError(
                f"tracker.checkpoint={self.checkpoint} are not weights of mode {self.mode}: {line}"
            ) from error
        return predictor

    def _weights(self) -> dict[str, Any]:
        import torch

        if self.checkpoint is None:
            url = HUB.format(mode=self.mode)
            found = torch.hub.load_state_dict_from_url(url, map_location="cpu", weights_only=True)
            return dict(found.get("model", found))
        return dict(read_weights(Path(self.checkpoint).expanduser()))


def windows(length: int, step: int) -> list[slice]:
    """Frames of each call of the online predictor: windows of `2 step` that begin every `step` frames.

    The last one may be shorter; a clip of up to `2 step` frames is one window.
    """
    starts = range(0, max(1, length - step), step)
    return [slice(start, min(start + 2 * step, length)) for start in starts]
