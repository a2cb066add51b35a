"""Single HTTP answers as huggingface_hub gets them: its connections, proxies, certificates, token and offline mode."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

from huggingface_hub import constants, get_session, hf_hub_url
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status  # type: ignore[attr-defined]

from mtp_convert import __version__

# What a request can end in. huggingface_hub's own errors are also errors of the HTTP library that it is built on.
BROKEN: tuple[type[Exception], ...] = (HfHubHTTPError.__bases__[0], OSError, RuntimeError)
PASSING = (408, 425, 429, 500, 502, 503, 504)

Answer = Any  # a response of the HTTP library of huggingface_hub, which changes between its releases


def file_url(repo: str, path: str, revision: str) -> str:
    """Where the Hub answers for a file."""
    return hf_hub_url(repo, path, revision=revision)


@contextmanager
def opened(url: str, headers: Mapping[str, str], *, hub: bool) -> Iterator[Answer]:
    """The answer to a GET, its body not read yet; redirects are not followed.

    Args:
        hub: whether the Hub itself is asked. No other host gets the token.
    """
    own = build_hf_headers(library_name="mtp-convert", library_version=__version__) if hub else {}
    timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT  # seconds without a byte
    with get_session().stream(
        "GET", url, headers={**own, **headers}, timeout=timeout, follow_redirects=False
    ) as answer:
        yield answer


def check(answer: Answer) -> None:
    """Raise huggingface_hub's error for a refusal."""
    hf_raise_for_status(answer)


def same_host(a: str, b: str) -> bool:
    """Whether two addresses are on one host."""
    return urlsplit(a)[:2] == urlsplit(b)[:2]


def passes(error: Exception) -> bool:
    """Whether the same request may succeed a little later."""
    if isinstance(error, OfflineModeIsEnabled):
        return False
    return not isinstance(error, HfHubHTTPError) or error.response.status_code in PASSING


def asked_pause(error: Exception) -> float:
    """Seconds that the server asks to wait for; 0 where it does not."""
    text = error.response.headers.get("Retry-After", "") if isinstance(error, HfHubHTTPError) else ""
    return float(text) if text.isdecimal() else 0.0


def known_tree(repo: str, commit: str) -> dict[str, int] | None:
    """Bytes of every file at a commit, where the cache has the listing; None where it does not."""
    try:
        from huggingface_hub import get_cached_repo_tree
        from huggingface_hub.errors import CachedRepoTreeNotFoundError
    except ImportError:  # releases that keep no listings
        return None
    try:
        return {f.path: f.size for f in get_cached_repo_tree(repo, revision=commit)}
    except CachedRepoTreeNotFoundError:
        return None
