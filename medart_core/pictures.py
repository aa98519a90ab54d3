"""Grids of images with names, for people to look at."""

import textwrap
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont, ImageOps

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
            wrapped, room = textwrap.wrap(row_names[line], 17), max(cell_height // TEXT_HEIGHT, 1)
            if len(wrapped) > room:  # a long caption would run into the next row's
                wrapped[room - 1 :] = [f"{wrapped[room - 1][:14]}..."]
            draw.multiline_text((MARGIN, y + 4), "\n".join(wrapped), GREY, font)
        for column, image in enumerate(row):
            if image.size != (cell, cell_height):
                image = image.resize((cell, cell_height), Image.Resampling.BICUBIC)
            sheet.paste(image, (left + column * (cell + MARGIN), y))
    return sheet


def caption_sheet(images: Sequence[Image.Image], captions: Sequence[str], columns: int = 3) -> Image.Image:
    """Images of any shapes, each with its caption, of any length, beside it."""
    font = ImageFont.load_default(size=15)
    side, text_width, line_height, gap = 200, 330, 20, 24
    blocks = ["\n".join(_wrapped(caption, font, text_width)) for caption in captions]
    starts = range(0, len(blocks), columns)
    heights = [max(side, *(line_height * (1 + b.count("\n")) for b in blocks[s : s + columns])) for s in starts]
    width = gap + columns * (side + text_width + 2 * gap)
    sheet = Image.new("RGB", (width, gap + sum(heights) + gap * len(heights)), "white")
    draw = ImageDraw.Draw(sheet)
    for number, (image, block) in enumerate(zip(images, blocks, strict=True)):
        row, column = divmod(number, columns)
        x, y = gap + column * (side + text_width + 2 * gap), gap + sum(heights[:row]) + gap * row
        small = ImageOps.contain(image, (side, side), Image.Resampling.LANCZOS)
        sheet.paste(small, (x + (side - small.width) // 2, y))
        draw.multiline_text((x + side + gap // 2, y - 3), block, (40, 40, 40), font, spacing=line_height - 15)
    return sheet


def _wrapped(text: str, font, width: int) -> list[str]:
    """Lines of `text` that are at most `width` pixels wide, if its words are."""
    lines = [""]
    for word in "".join(c if c.isprintable() else " " for c in text).split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines
