"""The grid of pictures as one PNG file, for a README."""

from __future__ import annotations

from pathlib import Path

from ppcl_fx.report.results import PictureGrid, open_picture

_SIDE, _GAP, _LEFT, _TOP = 96, 8, 210, 28


def write_contact_sheet(folder: Path, grid: PictureGrid) -> Path:
    """Write the grid, prompts down and ratios across, to ``folder/grid.png`` and return that path.

    The folder is replaced as a whole or not at all.

    Raises:
        PpclError: the file cannot be written or a picture cannot be read.
    """
    from PIL import Image, ImageDraw, ImageFont

    from ppcl_fx import owned
    from ppcl_fx.files import new_folder

    columns, rows = len(grid.columns), len(grid.prompts)
    size = (_LEFT + columns * (_SIDE + _GAP), _TOP + rows * (_SIDE + _GAP))
    sheet = Image.new("RGB", size, "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    for j, name in enumerate(grid.columns):
        pen.text((_LEFT + j * (_SIDE + _GAP), 8), name, fill="black", font=font)
    for i, prompt in enumerate(grid.prompts):
        top = _TOP + i * (_SIDE + _GAP)
        pen.text((_GAP, top + _SIDE // 2 - 8), prompt, fill="black", font=font)
        for j in range(columns):
            if grid.images[i][j] is not None:
                picture = open_picture(grid.images[i][j]).resize((_SIDE, _SIDE), Image.Resampling.NEAREST)
                sheet.paste(picture, (_LEFT + j * (_SIDE + _GAP), top))
    with new_folder(folder, replaces=owned.PICTURES) as beside:
        sheet.save(beside / "grid.png", optimize=True)
    return folder / "grid.png"
