"""One folder a class: `<class>/.../clip.mp4`. Videos that lie in no folder are unlabelled."""

from __future__ import annotations

import dataclasses

from pipeline.contract import Video
from pipeline.sources.bucket import list_bucket


def list_folder(url: str) -> list[Video]:
    """Videos below `url` with the name of their first folder, in lower case, as label."""
    return [
        dataclasses.replace(v, label=v.name.split("/")[0].strip().lower() if "/" in v.name else None)
        for v in list_bucket(url)
    ]
