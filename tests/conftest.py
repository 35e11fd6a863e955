"""Fixtures that several test files share."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.models import build


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of freshly initialised networks, smaller than the shipped ones."""
    return build(tmp_path_factory.mktemp("model"))
