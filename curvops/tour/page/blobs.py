"""Arrays and texts as a page carries them: compressed, and in letters that HTML leaves alone."""

from __future__ import annotations

import base64
import json
import zlib
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

Array: TypeAlias = npt.NDArray[Any]


class Blobs:
    """Arrays that a page holds; the page's data refers to them by what `add` returns."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def add(self, array: Array) -> dict[str, Any]:
        """Keep an array of floating-point numbers bit by bit, and return what finds it again: number, type and shape."""
        array = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<"))
        self.texts.append(packed(array.tobytes()))
        return {"blob": len(self.texts) - 1, "type": f"f{array.itemsize}", "shape": list(array.shape)}


def packed(content: bytes) -> str:
    """Return bytes compressed (zlib) and in base64."""
    return base64.b64encode(zlib.compress(content, 6)).decode()


def json_for_html(data: Any) -> str:
    """Return JSON that can stand inside a script element whatever the texts in it are.

    Example:
        >>> json_for_html("</script>")
        '"\\\\u003c/script>"'
    """
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
