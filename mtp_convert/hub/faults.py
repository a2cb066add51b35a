"""Every way in which the Hub or the network refuses, as an error with a sentence and a hint.

what happened                          code
401, 403, gated, no token              MTP051
404: repository, revision, file        MTP052
409, 412                               MTP053
429, 5xx, 408, 425                     MTP054
no connection, broken, timed out       MTP055
HF_HUB_OFFLINE                         MTP056
any other answer                       MTP050
a file here cannot be read             MTP042
"""

from __future__ import annotations

import re
from typing import TypeGuard

from huggingface_hub import errors as hub
from huggingface_hub import get_token

from mtp_convert.errors import ConvertError, Problem
from mtp_convert.hub.session import PASSING, passes
from mtp_convert.summary import printable

HIDDEN = "hf_***"
LONGEST = 200  # characters of a server's own words
_XET_STATUS = re.compile(r"HTTP status (?:client|server) error \((\d{3})\b")


def fault(error: Exception, where: str) -> ConvertError:
    """The error to show for one of huggingface_hub or of the network; where: the repository or file."""
    scrub(error)
    error = reason(error)
    if isinstance(error, hub.OfflineModeIsEnabled):
        return ConvertError("MTP056", Problem("no request may be sent", where))
    if isinstance(error, hub.LocalTokenNotFoundError):
        return ConvertError("MTP051", Problem("no token", where))
    if isinstance(error, hub.HfHubHTTPError):
        return _answered(error, where)
    if isinstance(error, hub.HFValidationError):
        return ConvertError("MTP001", Problem("no name of a repository", got=where, expected="org/name"))
    if is_local(error):
        return ConvertError("MTP042", Problem(str(error.strerror), str(error.filename)))
    if status := status_of(error):
        return _refused(status, "", where)
    if isinstance(error, ValueError):
        return ConvertError(
            "MTP050", Problem(f"an answer that makes no sense: {printable(str(error))[:LONGEST]}", where)
        )
    return ConvertError("MTP055", Problem(f"no connection ({type(error).__name__})", where))


def reason(error: Exception) -> Exception:
    """What the Hub or the operating system said: huggingface_hub wraps it where several files are sent at once."""
    found: BaseException | None = error
    while found is not None:
        if isinstance(found, OSError) and not isinstance(found, hub.LocalEntryNotFoundError):  # that is but the result
            return found
        found = found.__cause__
    return error


def may_pass(error: Exception) -> bool:
    """Whether the same request may succeed a little later."""
    error = reason(error)
    if isinstance(error, hub.LocalTokenNotFoundError) or is_local(error):
        return False
    if not isinstance(error, hub.HfHubHTTPError) and (status := status_of(error)):
        return status in PASSING or status >= 500
    return passes(error) and (isinstance(error, hub.HfHubHTTPError) or not isinstance(error, ValueError))


def status_of(error: Exception) -> int:
    """The HTTP status of an answer, 0 without one. Storage by Xet has a client of its own, which says it in words."""
    if isinstance(error, hub.HfHubHTTPError):
        return int(error.response.status_code)
    found = _XET_STATUS.search(str(error))
    return int(found[1]) if found else 0


def is_local(error: Exception) -> TypeGuard[OSError]:
    """Whether a file of this machine is the reason."""
    return isinstance(error, OSError) and error.filename is not None


def _answered(error: hub.HfHubHTTPError, where: str) -> ConvertError:
    """The Hub answered with a refusal."""
    status, said = error.response.status_code, words(error)
    if isinstance(error, hub.GatedRepoError):
        return ConvertError("MTP051", Problem("access must be asked for", where), hint="accept its terms on the Hub")
    if isinstance(error, hub.RevisionNotFoundError):
        return ConvertError("MTP052", Problem("no such revision", where), hint="give a branch, a tag or a commit")
    if isinstance(error, hub.EntryNotFoundError):
        return ConvertError("MTP052", Problem("no such file", where))
    if isinstance(error, hub.RepositoryNotFoundError):
        hint = (
            "check the name; if it is private, log in with `hf auth login` or set HF_TOKEN to a token that may read it"
        )
        return ConvertError("MTP052", Problem("no such repository, or not open to you", where), hint=hint)
    return _refused(status, said, where)


def _refused(status: int, said: str, where: str) -> ConvertError:
    """A status that says it all."""
    if status in (401, 403):
        what = "the token is not valid" if status == 401 else "the token may not do this"
        return ConvertError("MTP051", Problem(f"{what} ({status}{said})", where))
    if status == 404:
        return ConvertError("MTP052", Problem(f"not found (404{said})", where))
    if status in (409, 412):
        return ConvertError("MTP053", Problem(f"refused with {status}{said}", where))
    code = "MTP054" if status in PASSING or status >= 500 else "MTP050"
    return ConvertError(code, Problem(f"the Hub answered {status}{said}", where))


def words(error: hub.HfHubHTTPError) -> str:
    """What the server itself says, as `: ...`; empty where it says nothing."""
    text = error.server_message or error.response.headers.get("X-Error-Message") or ""
    text = " ".join(printable(redacted(text.replace("\n", " "))).split())
    return f": {text[:LONGEST]}" if text else ""


def redacted(text: str) -> str:
    """The text without the user's token."""
    token = get_token()
    return text.replace(token, HIDDEN) if token else text


def scrub(error: BaseException | None) -> None:
    """Take the user's token out of an error and of what caused it: a traceback prints them all."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        error.args = tuple(redacted(a) if isinstance(a, str) else a for a in error.args)
        error = error.__cause__ or error.__context__
