"""Folders of images: which entries of a listing belong to one clip, and when its content may have changed."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from pathlib import PurePosixPath

from pipeline.contract import digest
from pipeline.storage import Entry

IMAGES = frozenset({".bmp", ".jpeg", ".jpg", ".png", ".webp"})
"""Extensions, in lower case."""


def is_litter(key: str) -> bool:
    """What macOS leaves beside files in archives: it has their extensions and holds no picture."""
    return "__MACOSX/" in key or key.rpartition("/")[2].startswith("._")


def is_image(key: str) -> bool:
    """Told by the extension; what is inside is found out when it is decoded."""
    return PurePosixPath(key).suffix.lower() in IMAGES and not is_litter(key)


class FolderDigest:
    """Over the names and fingerprints of a folder's images, in whatever order a listing gives them.

    A sum of hashes: constant memory. It tells that something changed, not that nobody meddled with it.
    """

    __slots__ = ("images", "total")

    def __init__(self) -> None:
        self.images = self.total = 0

    def add(self, name: str, fingerprint: str) -> None:
        self.images += 1
        self.total = (self.total + int(digest(f"{name}\0{fingerprint}".encode())[:32], 16)) % 2**128

    def __str__(self) -> str:
        return f"{self.images}-{self.total:032x}"


def folder_fingerprint(entries: Iterable[Entry]) -> str:
    """Of one folder from the entries that lie in it itself (other files do not count); empty if none is an image."""
    out = FolderDigest()
    for entry in entries:
        if is_image(entry.key):
            out.add(entry.key.rpartition("/")[2], entry.fingerprint)
    return str(out) if out.images else ""


def fingerprints_of(folders: Collection[str], entries: Iterable[Entry]) -> dict[str, str]:
    """Fingerprint by folder, of those that hold an image. Memory goes with `folders`, not with the images."""
    found: dict[str, FolderDigest] = {}
    for entry in entries:
        parent, _, name = entry.key.rpartition("/")
        if parent in folders and is_image(entry.key):
            found.setdefault(parent, FolderDigest()).add(name, entry.fingerprint)
    return {folder: str(done) for folder, done in found.items()}


def image_folders(entries: Iterable[Entry]) -> Iterator[tuple[str, str]]:
    """(folder, fingerprint) of every folder that holds images itself, as soon as the listing has left it.

    Constant memory: only the folders around the current entry are open. Every store lists so that the keys below a
    folder come together; if one did not, a folder would come twice and be refused as listed twice.
    """
    around: dict[str, FolderDigest] = {}
    for entry in entries:
        parent, _, name = entry.key.rpartition("/")
        for folder in [f for f in around if parent != f and not parent.startswith(f"{f}/")]:
            yield folder, str(around.pop(folder))
        if parent and is_image(entry.key):
            around.setdefault(parent, FolderDigest()).add(name, entry.fingerprint)
    for folder, done in around.items():
        yield folder, str(done)
