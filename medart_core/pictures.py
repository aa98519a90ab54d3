"""Grids of images with names, for people to look at."""

import textwrap
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

MARGIN, TEXT_HEIGHT, GREY = 4, 16, (90, 90, 90)


def image_grid(
    rows: Sequence[Sequence[Image.Image]],
    row_names: Sequence[str] = (),
    column_names: Sequence[str] = (),
    cell: int = 128,
) -> Image.Image:
    """Paste rows of images of one shape into one picture: cells `cell` pixels wide, names to the left and above."""
    font = ImageFont.load_default(size=12)
    columns = max(len(row) for row in rows)
    left = 120 if row_names else MARGIN
    top = TEXT_HEIGHT * 3 + MARGIN if column_names else MARGIN
    cell_height = round(cell * rows[0][0].height / rows[0][0].width)
    width, height = left + columns * (cell + MARGIN), top + len(rows) * (cell_height + MARGIN)
    sheet = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(sheet)
    characters = max(8, cell // 7)
    for column, name in enumerate(column_names):
        place = (left + column * (cell + MARGIN), MARGIN)
        draw.multiline_text(place, "\n".join(textwrap.wrap(name, characters)[:3]), GREY, font)
    for line, row in enumerate(rows):
        y = top + line * (cell_height + MARGIN)
        if row_names:
            draw.multiline_text((MARGIN, y + 4), "\n".join(textwrap.wrap(row_names[line], 17)), GREY, font)
        for column, image in enumerate(row):
            if image.size != (cell, cell_height):
                image = image.resize((cell, cell_height), Image.Resampling.BICUBIC)
            sheet.paste(image, (left + column * (cell + MARGIN), y))
    return sheet
