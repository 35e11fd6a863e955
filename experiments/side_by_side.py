"""Policies side by side: `python experiments/side_by_side.py <evaluation> <evaluation> ...`, or the folder of a sweep.

The evaluations are folders that `evaluate.py` left, of the same clips: `python experiments/evaluate.py -m
checkpoint=a,b`, then `python experiments/side_by_side.py multirun/evaluate/<sweep>`. Writes `table.md`, `table.csv` and
`page.html` (their videos next to each other) into `--out`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def main() -> int:
    """Compare what is named; 2 where it cannot be compared."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folders", nargs="+", type=Path, help="of evaluations, or of a sweep of them")
    parser.add_argument("--out", type=Path, default=Path("outputs/side_by_side"))
    options = parser.parse_args()
    from runtime.side_by_side import write

    folders = [inner for folder in options.folders for inner in evaluations(folder)]
    try:
        print(write(folders, options.out))
    except (FileNotFoundError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    print(f"page: {options.out / 'page.html'}")
    return 0


def evaluations(folder: Path) -> list[Path]:
    """The folder itself, or the evaluations of the sweep in it, by number."""
    if (folder / "evaluation.json").is_file():
        return [folder]
    inner = sorted(path.parent for path in folder.glob("*/evaluation.json"))
    return sorted(inner, key=lambda path: (not path.name.isdigit(), path.name.zfill(6))) or [folder]


if __name__ == "__main__":
    sys.exit(main())
