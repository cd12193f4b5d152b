"""Pictures from outside: each mode, depth and kind of transparency with the value that a viewer shows."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ppcl_fx.errors import PpclError
from ppcl_fx.report.results import open_picture as open_for_report
from ppcl_fx.train.images.pictures import as_rgb, open_picture

COLOUR = (200, 100, 50)
WHITE = [255, 255, 255]


def written(picture: Image.Image, kind: str, **how: Any) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **how)
    return file.getvalue()


def values(data: bytes) -> np.ndarray[Any, Any]:
    return np.array(open_picture(data))


def png(depth: int, colour: int, rows: list[bytes], width: int, **chunks: bytes) -> bytes:
    """A PNG file, put together by hand."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", width, len(rows), depth, colour, 0, 0, 0)
    body = zlib.compress(b"".join(b"\0" + row for row in rows))
    more = [(name.encode(), content) for name, content in chunks.items()]
    parts = [(b"IHDR", header), *more, (b"IDAT", body), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "RGBX", "RGBa", "CMYK", "YCbCr", "HSV", "LAB"])
def test_colours_of_every_mode(mode: str) -> None:
    whole = Image.new("RGB", (3, 2), COLOUR)
    picture = whole.convert("RGBA").convert("RGBa") if mode == "RGBa" else whole.convert(mode)
    found = np.array(as_rgb(picture)).astype(int)
    assert found.shape == (2, 3, 3)
    assert np.abs(found - COLOUR).max() <= (1 if mode in ("YCbCr", "LAB") else 0)


def test_lab_is_read_from_d50() -> None:
    # CIELAB with the D50 white point, by the standard's matrix and Bradford's adaptation.
    known = {(54, 38, 46): (200, 100, 50), (51, 7, -46): (90, 120, 200), (50, 0, 0): (119, 119, 119)}
    for lab, rgb in known.items():
        stored = (round(lab[0] * 2.55), lab[1] + 128, lab[2] + 128)
        picture = Image.merge("LAB", [Image.new("L", (2, 2), value) for value in stored])
        assert np.abs(values(written(picture, "TIFF")).astype(int) - rgb).max() <= 2


@pytest.mark.parametrize("mode", ["1", "L", "LA", "La"])
def test_gray(mode: str) -> None:
    level = 255 if mode == "1" else 77
    picture = Image.new("L", (2, 2), level).convert("LA" if mode == "La" else mode).convert(mode)
    assert np.array(as_rgb(picture)).tolist() == [[[level] * 3] * 2] * 2


@pytest.mark.parametrize(("mode", "kind"), [("P", "PNG"), ("P", "GIF"), ("PA", "TIFF"), ("P", "BMP")])
def test_palettes(mode: str, kind: str) -> None:
    picture = Image.new("P", (2, 2), 1)
    picture.putpalette([0, 0, 0, *COLOUR])
    assert values(written(picture.convert(mode), kind)).tolist() == [[list(COLOUR)] * 2] * 2


@pytest.mark.parametrize("mode", ["I;16", "I;16L", "I;16B", "I;16N"])
def test_sixteen_bits_keep_the_upper_eight(mode: str) -> None:
    ramp = np.arange(0, 65536, 113, dtype=np.uint16)[:576].reshape(24, 24)
    wanted = (ramp >> 8).astype(np.uint8)
    order = ">u2" if mode == "I;16B" else "<u2"
    picture = Image.frombytes(mode, (24, 24), ramp.astype(order).tobytes())
    assert np.array_equal(np.array(as_rgb(picture))[..., 1], wanted)
    if mode == "I;16":
        for kind in ("PNG", "TIFF", "JPEG2000", "PPM"):
            assert np.array_equal(values(written(Image.fromarray(ramp), kind))[..., 2], wanted), kind


def test_sixteen_bits_a_colour() -> None:
    rows = [struct.pack(">6H", 0x1234, 0xFF00, 0x00FF, 0x8000, 0x7FFF, 0xFFFF)]
    assert values(png(16, 2, rows, 2)).tolist() == [[[0x12, 0xFF, 0], [0x80, 0x7F, 0xFF]]]
    with pytest.raises(PpclError, match="one transparent colour"):
        open_picture(png(16, 2, rows, 2, tRNS=struct.pack(">3H", 0x1234, 0xFF00, 0x00FF)))


def tiff(pixels: bytes, bits: int, photometric: int, form: int, width: int) -> bytes:
    """A TIFF file of one row of gray, put together by hand."""
    tags = {
        256: width, 257: 1, 258: bits, 259: 1, 262: photometric, 273: 8, 277: 1, 278: 1, 279: len(pixels), 339: form,
    }  # fmt: skip
    body = pixels + b"\0" * (len(pixels) % 2)
    fields = b"".join(struct.pack("<HHII", tag, 4 if tag in (273, 279) else 3, 1, value) for tag, value in tags.items())
    return b"II*\0" + struct.pack("<I", 8 + len(body)) + body + struct.pack("<H", len(tags)) + fields + b"\0" * 4


def test_gray_tiffs_by_what_their_tags_say() -> None:
    two = struct.pack("<2H", 0x1234, 0xFFFF)
    assert values(tiff(two, 16, 1, 1, 2))[0, :, 0].tolist() == [0x12, 0xFF]
    assert values(tiff(two, 16, 0, 1, 2))[0, :, 0].tolist() == [0xFF - 0x12, 0], "white is zero"
    assert values(tiff(bytes([0x80, 0x0F, 0xFF]), 12, 1, 1, 2))[0, :, 0].tolist() == [0x80, 0xFF], "12 bits"
    for pixels, bits, form in ((two, 16, 2), (b"\x80\x7f", 8, 2), (struct.pack("<2f", 0.5, 1), 32, 3)):
        with pytest.raises(PpclError, match="; save it with 8 or 16 bits"):
            open_picture(tiff(pixels, bits, 1, form, 2))


@pytest.mark.parametrize("mode", ["I", "F"])
def test_values_of_no_known_range_are_refused(mode: str) -> None:
    with pytest.raises(PpclError, match=rf"of no known range \(mode {mode}\); save it with 8 or 16 bits"):
        as_rgb(Image.new(mode, (2, 2), 1))


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
def test_transparency_is_laid_over_white(kind: str) -> None:
    pixels = np.array([[(0, 255, 0, 0), (255, 0, 0, 255), (0, 0, 0, 128), (10, 20, 30, 51)]], np.uint8)
    how = {"lossless": True, "exact": True} if kind == "WEBP" else {}
    found = values(written(Image.fromarray(pixels), kind, **how))
    assert found.tolist() == [[WHITE, [255, 0, 0], [127] * 3, [206, 208, 210]]]
    gray = Image.merge("LA", [Image.new("L", (1, 1), 10), Image.new("L", (1, 1), 51)])
    assert np.array(as_rgb(gray)).tolist() == [[[206] * 3]]
    assert np.array(as_rgb(Image.new("RGBA", (1, 1), (10, 20, 30, 51)).convert("RGBa")))[0, 0, 0] in (205, 206)


@pytest.mark.parametrize(
    ("file", "wanted"),
    [
        (png(8, 0, [bytes([5, 6])], 2, tRNS=b"\0\x05"), [255, 6]),
        (png(4, 0, [bytes([0x3F])], 2, tRNS=b"\0\x03"), [255, 255]),
        (png(4, 0, [bytes([0x31])], 2, tRNS=b"\0\x01"), [51, 255]),
        (png(2, 0, [bytes([0b00011011])], 4, tRNS=b"\0\x01"), [0, 255, 170, 255]),
        (png(1, 0, [bytes([0b01000000])], 2, tRNS=b"\0\0"), [255, 255]),
        (png(16, 0, [struct.pack(">2H", 0x1234, 0x1235)], 2, tRNS=b"\x12\x34"), [255, 0x12]),
        (png(8, 2, [bytes([1, 2, 3, 1, 2, 4])], 2, tRNS=b"\0\x01\0\x02\0\x03"), [255, 1]),
        (png(8, 3, [bytes([0, 1, 2])], 3, PLTE=bytes([9] * 9), tRNS=bytes([0, 255])), [255, 9, 9]),
        (png(8, 3, [bytes([0, 1])], 2, PLTE=bytes([0] * 6), tRNS=bytes([128, 51])), [127, 204]),
    ],
)  # fmt: skip
def test_transparent_values_of_a_png(file: bytes, wanted: list[int]) -> None:
    assert values(file)[0, :, 0].tolist() == wanted


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_the_first_of_several_frames_counts(kind: str) -> None:
    frames = [Image.new("RGB", (16, 16), colour) for colour in (COLOUR, (0, 0, 255))]
    how = {"lossless": True} if kind == "WEBP" else {}
    data = written(frames[0], kind, save_all=True, append_images=frames[1:], **how)
    assert getattr(Image.open(io.BytesIO(data)), "n_frames", 1) == 2
    assert np.abs(values(data).astype(int) - COLOUR).max() == 0


def test_a_transparent_gif() -> None:
    picture = Image.new("P", (2, 1), 0)
    picture.putpalette([0, 255, 0, *COLOUR])
    picture.putpixel((1, 0), 1)
    assert values(written(picture, "GIF", transparency=0)).tolist() == [[WHITE, list(COLOUR)]]


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA", "I;16"])
@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_pictures_are_turned_upright(mode: str, kind: str) -> None:
    gray = np.array([[10, 20, 30], [40, 50, 60]], np.uint8)
    deep = Image.fromarray(gray.astype(np.uint16) << 8)
    picture = deep if mode == "I;16" else Image.fromarray(gray).convert("RGB" if mode == "P" else mode).convert(mode)
    turned = {3: gray[::-1, ::-1], 6: np.rot90(gray, -1), 8: np.rot90(gray), 2: gray[:, ::-1], 5: gray.T, 1: gray}
    for orientation, wanted in turned.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        found = values(written(picture, kind, exif=exif))[..., 0]
        assert found.shape == wanted.shape
        if mode != "P":  # whose palette is the web's
            assert np.array_equal(found, wanted), orientation


def test_what_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    whole = Image.new("RGB", (20, 20))
    for data in (b"", b"no picture", written(whole, "EPS"), written(whole, "PDF"), b"\0" * 1000):
        with pytest.raises(PpclError, match="no picture that can be read; the formats are PNG"):
            open_picture(data)
    for data in (written(whole, "PNG")[:50], written(whole, "JPEG")[:300]):
        with pytest.raises(PpclError, match="no picture that can be read"):
            open_picture(data)
    for pixels in (399, 199):  # Pillow warns above its bound and raises above twice of it
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", pixels)
        with pytest.raises(PpclError, match="too many pixels"):
            open_picture(written(whole, "PNG"))
    monkeypatch.undo()
    with (tmp_path / "sparse.png").open("wb") as file:
        file.truncate(2**40)
    for read in (open_picture, open_for_report):
        with pytest.raises(PpclError, match="larger than the 0.25 GiB"):
            read(tmp_path / "sparse.png")


def test_a_report_shows_pictures_alike(tmp_path: Path) -> None:
    clear = Image.new("RGBA", (2, 2), (0, 255, 0, 0))
    (tmp_path / "a.png").write_bytes(written(clear, "PNG"))
    for given in (clear, written(clear, "PNG"), tmp_path / "a.png"):
        assert np.array(open_for_report(given)).tolist() == [[WHITE] * 2] * 2
    with pytest.raises(PpclError, match="report: a picture cannot be read .*mode F"):
        open_for_report(Image.new("F", (2, 2)))
