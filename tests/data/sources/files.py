"""Containers of pictures, questions and answers for the tests of this folder."""

import io
import json
import tarfile
from pathlib import Path
from typing import Any

from PIL import Image

COLOURS = ("red", "green", "blue")


def png(colour: str, size: tuple[int, int] = (16, 12)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, "PNG")
    return file.getvalue()


def tar(path: Path, members: dict[str, Any]) -> Path:
    """Members by name: bytes, text, an object for JSON, or (type, target) of a link."""
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            if isinstance(content, tuple):
                member.type, member.linkname = content
                archive.addfile(member)
                continue
            if isinstance(content, dict | list):
                content = json.dumps(content)
            data = content.encode() if isinstance(content, str) else content
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path
