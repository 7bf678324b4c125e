"""Draws flowers of five kinds, for a model that may be given away: no photograph is used.

    python deploy/models/draw_flowers.py flowers/    # 10,000 pictures, 64x64, a folder for each kind
"""

import argparse
import math
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter
from tqdm import tqdm

# Petals, from and to; length and width of one, in shares of the picture's side; radius of the middle;
# RGB of petals and of the middle.
KINDS = {
    "cornflower": ((9, 13), 0.27, 0.09, 0.07, (70, 90, 220), (70, 40, 130)),
    "daisy": ((13, 19), 0.30, 0.05, 0.09, (245, 245, 240), (245, 200, 40)),
    "poppy": ((4, 6), 0.27, 0.26, 0.07, (215, 40, 35), (40, 25, 30)),
    "primrose": ((5, 5), 0.25, 0.17, 0.05, (235, 130, 190), (250, 225, 90)),
    "sunflower": ((16, 22), 0.31, 0.07, 0.16, (250, 190, 25), (95, 55, 25)),
}

def petal(x, y, angle, length, width):
    """Corners of a petal that starts at (x, y) and points to `angle`."""
    t = np.linspace(0, math.pi, 16)
    along = length * (1 - np.cos(t)) / 2
    across = width * np.sin(t) * (0.6 + 0.4 * along / length)  # widest beyond the middle
    along, across = np.r_[along, along[::-1]], np.r_[across, -across[::-1]]
    px = x + along * math.cos(angle) - across * math.sin(angle)
    py = y + along * math.sin(angle) + across * math.cos(angle)
    return list(zip(px, py))

def draw_flower(kind, rng, side=64):
    """A PIL image of one flower of this kind, of varied size, place, turn, colours and light."""
    (least, most), length, width, middle, colour, middle_colour = KINDS[kind]
    big = 4 * side  # reduced at the end, for smooth edges
    top, bottom = rng.uniform((120, 180, 210), (190, 225, 250)), rng.uniform((40, 90, 30), (110, 160, 80))
    down = np.linspace(0, 1, big)[:, None, None] ** rng.uniform(0.7, 1.6)
    back = (top * (1 - down) + bottom * down).repeat(big, 1)
    img = Image.fromarray(back.astype(np.uint8))
    pen = ImageDraw.Draw(img)

    x, y = big * rng.uniform(0.42, 0.58), big * rng.uniform(0.36, 0.46)
    scale = big * rng.uniform(0.85, 1.15)
    foot = x + big * rng.uniform(-0.15, 0.15)
    green = tuple(rng.uniform((30, 90, 20), (70, 140, 50)).astype(int))
    pen.line([(x, y), ((x + foot) / 2 + big * rng.uniform(-0.03, 0.03), big * 0.75), (foot, big)], green, big // 28)
    for sign in rng.permutation([-1, 1])[:rng.integers(1, 3)]:
        height = rng.uniform(0.75, 0.85)
        angle = -math.pi / 2 + sign * rng.uniform(0.6, 1.1)
        pen.polygon(petal((x + foot) / 2, big * height, angle, big * 0.22, big * 0.05), green)

    tint = np.array(colour) * rng.uniform(0.85, 1.1) + rng.normal(0, 8, 3)
    n = int(rng.integers(least, most + 1))
    turn = rng.uniform(0, 2 * math.pi)
    for row in range(2 if n > 8 else 1):  # flowers of many petals have a second row, darker below
        for k in range(n):
            angle = turn + 2 * math.pi * (k + 0.5 * row) / n + rng.normal(0, 0.03)
            shade = tint * (0.82 + 0.18 * row if n > 8 else 0.9 + 0.1 * (k % 2))
            corners = petal(x, y, angle, scale * length * (1 - 0.12 * row), scale * width)
            pen.polygon(corners, tuple(shade.clip(0, 255).astype(int)))
    r = scale * middle
    pen.ellipse((x - r, y - r, x + r, y + r), tuple((np.array(middle_colour) * rng.uniform(0.9, 1.1)).clip(0, 255).astype(int)))
    r *= 0.55
    pen.ellipse((x - r, y - r, x + r, y + r), tuple((np.array(middle_colour) * 0.75).astype(int)))
    return img.filter(ImageFilter.GaussianBlur(1)).resize((side, side), Image.Resampling.LANCZOS)

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("out", type=Path, help="the folder that is written")
    p.add_argument("--n", type=int, default=10000, help="number of pictures")
    args = p.parse_args()
    for kind in KINDS:
        (args.out / kind).mkdir(parents=True)
    for i in tqdm(range(args.n)):
        kind = list(KINDS)[i % len(KINDS)]
        draw_flower(kind, np.random.default_rng(i)).save(args.out / kind / f"{i:05d}.png")

if __name__ == "__main__":
    main()
