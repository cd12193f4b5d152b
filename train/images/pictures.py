"""Pictures from outside as 8-bit RGB: upright, over white, each of Pillow's modes by its own rule.

Of more than 8 bits the upper 8 count; Pillow's modes I and F say no range of values and are refused, a PGM says it. Of
several frames the first counts. Colour profiles are not applied: LAB is converted from D50, CMYK by its inks alone.
"""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from ppcl_fx.errors import PpclError
from ppcl_fx.io.reading import read_bytes

PICTURE_BYTES = 256 * 2**20  # a picture's file may be this large
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "JPEG2000", "PPM", "AVIF")
"""What is read. Pillow knows more formats: some of them hand the file to other programs."""
_PHOTOMETRIC, _SAMPLE_FORMAT, _BITS = 262, 339, 258


def open_picture(source: bytes | str | Path) -> Image.Image:
    """Return the content of a picture's file, or the file of that name, as an upright RGB picture.

    Raises PpclError where it is no picture of a known format, is damaged, too large for Pillow's bound, or its mode
    does not say what its values mean.
    """
    data = source if isinstance(source, bytes) else read_bytes(source, PICTURE_BYTES)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data), formats=FORMATS) as picture:
                picture.load()
                found, turn = _by_format(picture, data), picture.getexif().get(ExifTags.Base.Orientation, 1)
                found.getexif()[ExifTags.Base.Orientation] = turn
                return ImageOps.exif_transpose(found)
    except PpclError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise PpclError(f"too many pixels ({_words(error)})") from None
    except UnidentifiedImageError:
        raise PpclError(f"no picture that can be read; the formats are {', '.join(FORMATS)}") from None
    # Pillow's readers raise whatever a damaged file makes them raise.
    except Exception as error:  # noqa: BLE001
        raise PpclError(f"no picture that can be read ({_words(error)})") from None


def as_rgb(picture: Image.Image) -> Image.Image:
    """Return a picture in memory as RGB, as it is shown; PpclError where its mode does not say what its values mean."""
    if picture.mode in ("I", "F"):
        kind = "whole numbers" if picture.mode == "I" else "fractions"
        raise PpclError(f"its values are {kind} of no known range (mode {picture.mode}); save it with 8 or 16 bits")
    if picture.mode.startswith("I;16"):
        values, clear = np.asarray(picture), picture.info.get("transparency")
        return _gray(values >> 8 if clear is None else np.where(values == clear, 255, values >> 8))
    if not picture.has_transparency_data:
        return picture.convert("RGB")
    whole = (picture.convert("LA") if picture.mode == "La" else picture).convert("RGBA")
    shown = Image.new("RGB", whole.size, "white")
    shown.paste(whole.convert("RGB"), mask=whole.getchannel("A"))
    return shown


def _by_format(picture: Any, data: bytes) -> Image.Image:
    """An opened picture as RGB, by what its file says of its values."""
    clear = picture.info.get("transparency")
    if picture.format == "TIFF":
        return _tiff(picture)
    if picture.format == "PPM" and picture.mode == "I":
        return _gray(np.asarray(picture) >> 8)  # Pillow has stretched the file's range to 16 bits
    if picture.format == "PNG" and clear is not None:
        depth = data[24]  # of the header, which comes first in every PNG
        if picture.mode == "RGB" and depth == 16:
            raise PpclError("16 bits a colour and one transparent colour, of which Pillow keeps 8; save it with alpha")
        if picture.mode == "L" and depth < 8:  # Pillow has stretched the pixels, and not this value
            picture.info["transparency"] = clear * 255 // (2**depth - 1)
    return as_rgb(picture)


def _tiff(picture: Any) -> Image.Image:
    tags = picture.tag_v2
    if picture.mode == "L" and tags.get(_SAMPLE_FORMAT, (1,))[0] == 2:
        raise PpclError("its values are signed; save it with 8 or 16 bits without a sign")
    if not picture.mode.startswith("I;16"):
        return as_rgb(picture)
    values = np.asarray(picture) >> (tags[_BITS][0] - 8)
    return _gray(255 - values if tags[_PHOTOMETRIC] == 0 else values)  # 0: white is zero


def _gray(values: np.ndarray[Any, Any]) -> Image.Image:
    return Image.fromarray(values.astype(np.uint8)).convert("RGB")


def _words(error: BaseException) -> str:
    return " ".join(str(error).split())[:120] or type(error).__name__
