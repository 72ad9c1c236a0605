"""What goes wrong with a download, in words for the operator."""

import textwrap
from collections.abc import Iterator
from contextlib import contextmanager

from httpx2 import TransportError
from huggingface_hub import constants
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

from src.errors import StartError, one_line

MEANINGS = {
    "GatedRepo": "gated: accept its licence on the hub and set HF_TOKEN",
    "RepoNotFound": "the hub has no such model, or it is private and HF_TOKEN may not read it",
    "RevisionNotFound": "the hub has no such revision",
}
"""By the hub's ``X-Error-Code``."""

PASSING = (408, 425, 429)
"""Too slow, too early, too many: the only client errors that another try may not meet."""

MAX_SENTENCE = 200
"""In characters: the most that is quoted of the hub."""


@contextmanager
def download_errors() -> Iterator[None]:
    """Turns the errors of huggingface_hub into a StartError, which tells whether another try may succeed."""
    try:
        yield
    except StartError:
        raise
    except Exception as error:
        # huggingface_hub looks into its cache when the hub refuses, and then reports that nothing was there
        cause = error.__cause__ if isinstance(error, LocalEntryNotFoundError) else error
        if isinstance(cause, HfHubHTTPError):
            raise _refusal(cause) from error
        if not isinstance(error, LocalEntryNotFoundError | OfflineModeIsEnabled | TransportError):
            raise StartError(f"cannot be downloaded: {one_line(error)}", may_recover=True) from error
        if constants.HF_HUB_OFFLINE:
            hint = "choose it as the endpoint's Model, or set HF_HUB_OFFLINE=0 to download it"
            raise StartError(f"in no local cache, and HF_HUB_OFFLINE=1 forbids a download: {hint}") from error
        raise StartError("in no local cache, and the hub cannot be reached", may_recover=True) from error


def _refusal(error: HfHubHTTPError) -> StartError:
    status = error.response.status_code
    meaning = MEANINGS.get(error.response.headers.get("X-Error-Code", ""), f"the hub answered {status}")
    # the header's sentence, or else the body's
    sentence = (error.server_message or "").partition("\n")[0]
    quoted = f': "{textwrap.shorten(sentence, MAX_SENTENCE, placeholder="...")}"' if sentence else ""
    return StartError(meaning + quoted, may_recover=status >= 500 or status in PASSING)
