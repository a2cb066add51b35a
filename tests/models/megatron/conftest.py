"""One start of the gloo processes for all tests here."""

from __future__ import annotations

import _gloo
import pytest


@pytest.fixture(scope="session")
def gloo(tmp_path_factory: pytest.TempPathFactory) -> _gloo.Results:
    return _gloo.run(tmp_path_factory.mktemp("gloo"))
