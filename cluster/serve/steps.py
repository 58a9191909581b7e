"""The steps of a request that need neither HTTP nor Ray: body, bags, and the bag that tests a model.

They have a module of their own also because Ray Serve copies a deployment's class while its module is being read: what
stands below the class in the same file is unknown to the copy.
"""

from __future__ import annotations

import asyncio
import dataclasses
import importlib.metadata
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from starlette.requests import ClientDisconnect

from cluster.serve.schemas import BuildArgs, Refused, too_large
from micacl.bundle import Bundle, load_bundle
from pipeline.bags import Bag
from pipeline.codec import encode_instance
from pipeline.contract import BagMeta, CropConfig, Video
from pipeline.raw import RawClip
from pipeline.sandbox import crop_in_sandbox, thread_sandbox


def installed_version() -> str:
    """Of this package; a checkout that runs without being installed has none."""
    try:
        return importlib.metadata.version("micacl")
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def open_bundle(args: BuildArgs) -> Bundle:
    """The bundle with the faces that are asked for. Raises MicaclError."""
    bundle = load_bundle(args.bundle)
    return dataclasses.replace(bundle, crop=dataclasses.replace(bundle.crop, faces=args.faces))


async def read_body(chunks: AsyncIterator[bytes], declared: str | None, cap_bytes: int, seconds: float) -> bytes:
    """The whole body. `declared` is its Content-Length, which a client may leave out or get wrong.

    Raises Refused: 413 before reading if too much is declared, 413 while reading, 408 after `seconds`, 400 if empty or
    broken off.
    """
    if declared and declared.isdecimal() and int(declared) > cap_bytes:
        raise too_large(f"Content-Length is {declared}", cap_bytes)
    parts: list[bytes] = []
    size = 0
    try:
        async with asyncio.timeout(seconds):
            async for chunk in chunks:
                size += len(chunk)
                if size > cap_bytes:
                    raise too_large(f"{size} bytes came", cap_bytes)
                parts.append(chunk)
    except TimeoutError as error:
        cause = f"The upload took longer than {seconds:g} s."
        remedy = "Send a smaller file or use a faster line; who runs the service can raise `upload_s`."
        raise Refused(408, "upload_too_slow", f"{size} bytes came", cause=cause, remedy=remedy) from error
    except ClientDisconnect as error:
        cause = "The upload broke off."
        raise Refused(400, "broken_off", f"{size} bytes came", cause=cause, remedy="Send it again.") from error
    if not size:
        remedy = "Send the file itself: `curl --data-binary @clip.mp4 URL`."
        raise Refused(400, "empty", "the body has zero bytes", cause="The upload is empty.", remedy=remedy)
    return b"".join(parts)


def preprocess(data: bytes, name: str, crop: CropConfig) -> bytes:
    """An encoded video -> tar blocks of its bags, largest face first, made in the calling thread's sandbox.

    Raises Quarantined; CRASHED if the sandbox died of the video.
    """
    video_id = Video(url=name, name=name).id
    return crop_in_sandbox(RawClip(data), name=name, video_id=video_id, config=crop).require()


def start_sandboxes(decoders: ThreadPoolExecutor, threads: int) -> None:
    """Start the sandbox of every thread, so that the first uploads do not wait for it."""
    for _ in range(threads):  # each start keeps its thread busy, so the next one gets another thread
        decoders.submit(lambda: thread_sandbox().start())


def synthetic_bag(crop: CropConfig) -> Bag:
    """A bag of grey frames, of the form that `crop` makes."""
    grey_HWC = np.full((crop.size, crop.size, 3), 128, np.uint8)
    grey = encode_instance([grey_HWC] * crop.frames_per_instance, crop.codec, crop.jpeg_quality)
    meta = BagMeta(
        key="synthetic_0",
        video="synthetic",
        track=0,
        instance_frames=(crop.frames_per_instance,) * crop.instances,
        seconds=1.0,
        fps=25.0,
        size=crop.size,
        detector=crop.detector,
        detector_score=1.0,
        crop=crop.hash,
        codec=crop.codec,
        boxes=((0.0, 0.0, 1.0),) * crop.instances,
    )
    return Bag(meta, (grey,) * crop.instances)
