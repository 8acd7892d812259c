"""Small copies of images for the report."""

from __future__ import annotations

import base64
import io
from pathlib import Path

_SIDE = 200
_QUALITY = 70


def thumbnail(file: Path) -> tuple[str, float]:
    """An image as a small JPEG in base64, and its size in parts of the image's."""
    from PIL import Image, ImageOps

    with Image.open(file) as opened:
        image = ImageOps.exif_transpose(opened).convert("RGB")
    width = image.width
    image.thumbnail((_SIDE, _SIDE))
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=_QUALITY)
    return base64.b64encode(stream.getvalue()).decode(), image.width / width
