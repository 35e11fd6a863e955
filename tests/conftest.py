"""Fixtures that several test files share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hypothesis import settings

from runtime.config import CONF
from tests.models import build

# A test that a busy machine slows down is not wrong.
settings.register_profile("patient", deadline=None)
settings.load_profile("patient")


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of freshly initialised networks, smaller than the shipped ones."""
    return build(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def hydra_tree() -> Iterator[None]:
    """The configuration tree, for `compose` in the tests of a file."""
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        yield
