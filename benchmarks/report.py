"""The measurements as tables on a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

Rows = Sequence[Mapping[str, Any]]


def show(console: Console, result: Mapping[str, Any]) -> None:
    """Print conditions first, then one table for each list of rows."""
    facts = Table(title="conditions", show_header=False)
    for name, value in result["conditions"].items():
        facts.add_row(name, _text(value))
    console.print(facts)
    for title, rows in result.items():
        if title != "conditions":
            console.print(table(title, rows))


def table(title: str, rows: Rows) -> Table:
    """Make a table of rows whose columns are the keys; `passes` becomes the caption."""
    counts = rows[0].get("passes", {})
    caption = "; ".join(f"{name}: {count}" for name, count in counts.items())
    columns = list(dict.fromkeys(name for row in rows for name in row if name != "passes"))
    found = Table(title=title, caption=f"through the network: {caption}" if caption else None)
    for name in columns:
        found.add_column(name, justify="right")
    for row in rows:
        found.add_row(*[_text(row.get(name, ""), name) for name in columns])
    return found


def _text(value: Any, column: str = "") -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if column.startswith("share") and isinstance(value, float):
        return f"{value:.1%}"
    if isinstance(value, float):
        unit = " x" if column.startswith(("faster", "goal")) else ""
        return f"{value:.3g}{unit}"
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {part}" for name, part in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
