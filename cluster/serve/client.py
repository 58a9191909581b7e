"""The service as a function call, with the standard library only. `curl` does the same:

curl --data-binary @clip.mp4 http://127.0.0.1:8000/v1/predict
"""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.parse
import urllib.request
from typing import Any

from pipeline.contract import MicaclError

_direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def post_video(url: str, data: bytes, name: str = "upload", timeout_s: float = 300.0) -> dict[str, Any]:
    """The answer for one encoded video. Raises MicaclError with the server's words if it refuses.

    Args:
        url: of the service, e.g. http://127.0.0.1:8000.
        name: what the video is called in error messages; the server keeps nothing of it.
    """
    query = urllib.parse.urlencode({"name": name})
    return _call(urllib.request.Request(f"{url}/v1/predict?{query}", data=data, method="POST"), timeout_s)  # noqa: S310


def get_health(url: str, timeout_s: float = 5.0) -> dict[str, Any]:
    """Bundle, labels and version of a running service. Raises MicaclError."""
    return _call(urllib.request.Request(f"{url}/v1/health"), timeout_s)  # noqa: S310


def wait_for_health(url: str, seconds: float) -> dict[str, Any]:
    """Ask until the service answers. Raises MicaclError after `seconds`."""
    end_s = time.monotonic() + seconds
    while True:
        try:
            return get_health(url)
        except MicaclError:
            if time.monotonic() > end_s:
                raise
        time.sleep(0.1)


def _call(request: urllib.request.Request, timeout_s: float) -> dict[str, Any]:
    try:
        with _direct.open(request, timeout=timeout_s) as reply:
            answer: dict[str, Any] = json.loads(reply.read())
    except urllib.error.HTTPError as error:
        raise _refusal(error) from error
    except (OSError, ValueError) as error:
        raise MicaclError(
            f"{request.full_url.partition('?')[0]} does not answer ({error}).",
            "Nothing was predicted.",
            "Check the address, and that `micacl serve` runs.",
        ) from error
    return answer


def _refusal(error: urllib.error.HTTPError) -> MicaclError:
    try:
        problem = json.loads(error.read())["error"]
        return MicaclError(str(problem["cause"]), str(problem["consequence"]), str(problem["remedy"]))
    except (ValueError, KeyError, TypeError):
        return MicaclError(f"The server answered {error.code}.", "Nothing was predicted.", "Look at the server's log.")
