"""The real client in this process, pointed at the loopback Hub: what it reads from the environment when imported."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from _server import LoopbackHub
from huggingface_hub import constants

from mtp_convert.hub import fetch, ranges


def moved(hub: LoopbackHub, *, files_only: bool = True) -> int:
    """Bytes of all answers, of the files of repositories or of everything; what was just sent is waited for."""
    counted = -1
    while True:
        found = sum(r.sent for r in hub.requests if not (files_only and r.path.startswith("/api/")))
        if found == counted and all(r.status for r in hub.requests):
            return found
        counted = found
        time.sleep(0.02)


@contextmanager
def pointed_at(hub: LoopbackHub, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    """Ask `hub` and keep files in `cache`; pauses take no time, their lengths are what is yielded."""
    pauses: list[float] = []
    template = f"{hub.endpoint}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    for name, value in {
        "ENDPOINT": hub.endpoint,
        "HUGGINGFACE_CO_URL_TEMPLATE": template,
        "HF_HUB_CACHE": str(cache),
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_DISABLE_TELEMETRY": True,
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DOWNLOAD_TIMEOUT": 5,
    }.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setenv("HF_TOKEN", "hf_test_rw")
    for module in (ranges, fetch):
        monkeypatch.setattr(module, "sleep", pauses.append)
    yield pauses
