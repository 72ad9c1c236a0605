"""The world of the embedded model: scenes, and how they look.

A scene is either a plain shape on a coloured background or a landscape. ``draw`` paints one with Pillow at double
size and scales it down, so that edges are smooth; positions, sizes and colours vary a little from picture to picture.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from random import Random

import numpy as np
from PIL import Image, ImageDraw

SIZE = 128
"""Width and height of a picture in pixels."""

CANVAS = 2 * SIZE

COLORS = {
    "red": (214, 40, 40),
    "orange": (246, 140, 32),
    "yellow": (250, 220, 60),
    "green": (52, 168, 72),
    "blue": (44, 94, 212),
    "purple": (128, 58, 178),
    "pink": (248, 150, 190),
    "brown": (120, 74, 40),
    "black": (26, 26, 30),
    "white": (246, 246, 242),
}
SHAPES = ("circle", "square", "triangle", "star", "heart")
TERRAINS = ("mountains", "snowy mountains", "hills", "sea", "desert", "forest")
TIMES = ("day", "sunset", "night")
THINGS = {
    "mountains": ("house", "tree"),
    "snowy mountains": ("house", "tree"),
    "hills": ("house", "tree"),
    "sea": ("sailboat",),
    "desert": ("cactus",),
    "forest": ("house",),
}
"""What may stand in each terrain."""

Color = tuple[int, int, int]


@dataclass(frozen=True)
class Scene:
    """What a picture shows. A shape has ``shape``, ``color`` and ``background``; a landscape has ``terrain`` and
    ``time``, and sometimes a ``thing``."""

    shape: str | None = None
    color: str | None = None
    background: str | None = None
    terrain: str | None = None
    time: str | None = None
    thing: str | None = None


ATTRIBUTES: dict[str, tuple[str | None, ...]] = {
    "shape": (None, *SHAPES),
    "color": (None, *COLORS),
    "background": (None, *COLORS),
    "terrain": (None, *TERRAINS),
    "time": (None, *TIMES),
    "thing": (None, "house", "tree", "sailboat", "cactus"),
}

SHAPE_SCENES = tuple(
    Scene(shape=shape, color=color, background=background)
    for shape, color, background in product(SHAPES, COLORS, COLORS)
    if color != background
)
LANDSCAPE_SCENES = tuple(
    Scene(terrain=terrain, time=time, thing=thing)
    for terrain in TERRAINS
    for time in TIMES
    for thing in (None, *THINGS[terrain])
)


def _held_out(scenes: Sequence[Scene], share: float, seed: int) -> frozenset[Scene]:
    return frozenset(Random(seed).sample(scenes, round(share * len(scenes))))


HELD_OUT = _held_out(SHAPE_SCENES, 0.12, seed=1) | _held_out(
    [scene for scene in LANDSCAPE_SCENES if scene.thing], 0.3, seed=2
)
"""Combinations that training never sees; evaluation asks for exactly these."""


def draw(scene: Scene, rng: Random) -> Image.Image:
    """Paints ``scene`` as an RGB picture of ``SIZE`` x ``SIZE`` pixels."""
    canvas = _shape(scene, rng) if scene.shape else _landscape(scene, rng)
    return canvas.reduce(CANVAS // SIZE)


def _jitter(color: Color, rng: Random, by: int = 8) -> Color:
    red, green, blue = (min(255, max(0, channel + rng.randint(-by, by))) for channel in color)
    return red, green, blue


def _polygon_points(
    center: tuple[float, float], outline: Sequence[tuple[float, float]], scale: float
) -> list[tuple[float, float]]:
    return [(center[0] + scale * x, center[1] + scale * y) for x, y in outline]


def _polar(radii_and_degrees: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    return [(r * np.cos(np.radians(d)), r * np.sin(np.radians(d))) for r, d in radii_and_degrees]


_T = np.linspace(0, 2 * np.pi, 90)
OUTLINES = {
    "circle": list(zip(np.cos(_T), np.sin(_T), strict=True)),
    "square": [(-0.86, -0.86), (0.86, -0.86), (0.86, 0.86), (-0.86, 0.86)],
    "triangle": [(0, -0.95), (1.02, 0.82), (-1.02, 0.82)],
    "star": _polar([(1.12 if i % 2 == 0 else 0.47, 36 * i - 90) for i in range(10)]),
    # the classical parametric heart curve
    "heart": [
        (x / 16, y / 16)
        for x, y in zip(
            16 * np.sin(_T) ** 3,
            -(13 * np.cos(_T) - 5 * np.cos(2 * _T) - 2 * np.cos(3 * _T) - np.cos(4 * _T)),
            strict=True,
        )
    ],
}
"""Each shape's outline around the origin, in units of its radius."""


def _shape(scene: Scene, rng: Random) -> Image.Image:
    assert scene.shape and scene.color and scene.background
    canvas = Image.new("RGB", (CANVAS, CANVAS), _jitter(COLORS[scene.background], rng))
    center = (CANVAS / 2 + rng.uniform(-20, 20), CANVAS / 2 + rng.uniform(-20, 20))
    points = _polygon_points(center, OUTLINES[scene.shape], rng.uniform(56, 84))
    ImageDraw.Draw(canvas).polygon(points, fill=_jitter(COLORS[scene.color], rng))
    return canvas


SKIES = {
    "day": ((84, 156, 232), (196, 226, 250)),
    "sunset": ((92, 64, 140), (252, 158, 84)),
    "night": ((10, 14, 44), (40, 52, 104)),
}
"""Colour of the sky at the top and at the horizon."""

LIGHT = {"day": (1.0, 1.0, 1.0), "sunset": (0.86, 0.62, 0.6), "night": (0.36, 0.42, 0.6)}
"""What each time of day leaves of the red, green and blue of the ground."""


class _Brush:
    """Draws the parts of one landscape in the light of its time of day."""

    def __init__(self, time: str, rng: Random) -> None:
        self.time, self.rng = time, rng
        self.horizon = rng.uniform(0.52, 0.62) * CANVAS
        top, bottom = (np.array(_jitter(color, rng), dtype=np.float32) for color in SKIES[time])
        height = np.clip(np.arange(CANVAS) / self.horizon, 0, 1)[:, None]
        rows = np.rint(top + (bottom - top) * height).astype(np.uint8)
        self.canvas = Image.fromarray(np.repeat(rows[:, None], CANVAS, axis=1))
        self.pen = ImageDraw.Draw(self.canvas)

    def lit(self, color: Color, by: int = 6) -> Color:
        red, green, blue = (
            round(channel * light)
            for channel, light in zip(_jitter(color, self.rng, by), LIGHT[self.time], strict=True)
        )
        return red, green, blue

    def disc(self, x: float, y: float, radius: float, fill: Color) -> None:
        self.pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=fill)

    def ground(self, color: Color, top: float) -> None:
        self.pen.rectangle((0, top, CANVAS, CANVAS), fill=color)

    def waves(self, color: Color, level: float, height: float, length: float) -> None:
        """A ridge of rolling ground, filled down to the lower edge."""
        phase = self.rng.uniform(0, 2 * np.pi)
        xs = np.arange(0, CANVAS + 4, 4)
        ys = level - height * np.sin(2 * np.pi * xs / length + phase)
        self.pen.polygon([(0, CANVAS), *zip(xs.tolist(), ys.tolist(), strict=True), (CANVAS, CANVAS)], fill=color)

    def peak(self, x: float, base: float, width: float, height: float, color: Color, snow: Color | None) -> None:
        self.pen.polygon([(x - width / 2, base), (x, base - height), (x + width / 2, base)], fill=color)
        if snow:
            down, side = 0.55 * height, 0.55 * width / 2
            edge = [
                (x + side, down),
                (x + side * 0.4, down * 0.72),
                (x - side * 0.1, down),
                (x - side * 0.5, down * 0.75),
            ]
            cap = [(0.0, 0.0), *((ex - x, ey) for ex, ey in edge), (-side, down)]
            self.pen.polygon(_polygon_points((x, base - height), cap, 1.0), fill=snow)


def _landscape(scene: Scene, rng: Random) -> Image.Image:
    assert scene.terrain and scene.time
    brush = _Brush(scene.time, rng)
    _sun_or_moon(brush)
    floor = _TERRAIN_PAINTERS[scene.terrain](brush)
    if scene.thing:
        x = rng.choice((0.3, 0.5, 0.7)) * CANVAS + rng.uniform(-16, 16)
        _THING_PAINTERS[scene.thing](brush, x, floor, rng.uniform(58, 70))
    return brush.canvas


def _sun_or_moon(brush: _Brush) -> None:
    rng = brush.rng
    x = rng.uniform(0.15, 0.85) * CANVAS
    if brush.time == "sunset":
        brush.disc(x, brush.horizon - rng.uniform(20, 50), rng.uniform(20, 26), (255, 214, 110))
    elif brush.time == "night":
        brush.disc(x, rng.uniform(34, 56), rng.uniform(16, 20), (238, 236, 214))
    elif rng.random() < 0.6:
        brush.disc(x, rng.uniform(34, 56), rng.uniform(18, 22), (255, 236, 120))


def _mountains(brush: _Brush, snow: Color | None = None, ground: Color = (96, 150, 78)) -> float:
    rng = brush.rng
    shift = rng.uniform(-0.1, 0.1)
    far = ((0.12, 0.42), (0.9, 0.5)) if rng.random() < 0.5 else ((0.16, 0.5), (0.86, 0.4))
    for x, height in far:
        color = brush.lit((146, 140, 150))
        brush.peak((x + shift) * CANVAS, brush.horizon + 18, 0.8 * CANVAS, height * CANVAS * 0.8, color, snow)
    x = (0.5 + shift + rng.uniform(-0.12, 0.12)) * CANVAS
    brush.peak(x, brush.horizon + 18, 0.95 * CANVAS, rng.uniform(0.38, 0.46) * CANVAS, brush.lit((112, 100, 100)), snow)
    brush.waves(brush.lit(ground), brush.horizon + 8, 5, 1.3 * CANVAS)
    return brush.horizon + rng.uniform(56, 76)


def _snowy_mountains(brush: _Brush) -> float:
    white = brush.lit((246, 248, 252), by=3)
    return _mountains(brush, snow=white, ground=(236, 240, 248))


def _hills(brush: _Brush) -> float:
    rng = brush.rng
    brush.waves(brush.lit((150, 196, 110)), brush.horizon, 18, rng.uniform(0.8, 1.0) * CANVAS)
    brush.waves(brush.lit((116, 178, 84)), brush.horizon + 36, 16, rng.uniform(0.9, 1.2) * CANVAS)
    brush.waves(brush.lit((84, 152, 62)), brush.horizon + 70, 10, rng.uniform(1.0, 1.4) * CANVAS)
    return brush.horizon + rng.uniform(72, 84)


def _sea(brush: _Brush) -> float:
    # the sea mirrors the sky: at sunset it glows, at night it is dark
    surface = {"day": (40, 116, 186), "sunset": (128, 84, 128), "night": (16, 30, 70)}[brush.time]
    near = {"day": (28, 92, 162), "sunset": (102, 66, 116), "night": (11, 22, 54)}[brush.time]
    brush.ground(_jitter(surface, brush.rng, 5), brush.horizon)
    brush.waves(_jitter(near, brush.rng, 5), brush.horizon + 52, 4, 0.5 * CANVAS)
    return brush.horizon + brush.rng.uniform(34, 48)


def _desert(brush: _Brush) -> float:
    rng = brush.rng
    brush.waves(brush.lit((238, 206, 140)), brush.horizon + 4, 12, rng.uniform(0.9, 1.3) * CANVAS)
    brush.waves(brush.lit((224, 182, 110)), brush.horizon + 44, 12, rng.uniform(0.9, 1.3) * CANVAS)
    return brush.horizon + rng.uniform(66, 80)


def _forest(brush: _Brush) -> float:
    rng = brush.rng
    brush.ground(brush.lit((92, 138, 70)), brush.horizon)
    rows = ((40, 10, 92, (44, 104, 66)), (58, 34, 112, (28, 78, 50)))
    for step, down, height, color in rows:
        leaf = brush.lit(color)
        for left in range(-step, CANVAS + step, step):
            x, base = left + rng.uniform(-6, 6), brush.horizon + down
            tall = height + rng.uniform(-12, 12)
            brush.pen.polygon([(x - step * 0.62, base), (x, base - tall), (x + step * 0.62, base)], fill=leaf)
    return brush.horizon + rng.uniform(80, 90)


_TERRAIN_PAINTERS = {
    "mountains": _mountains,
    "snowy mountains": _snowy_mountains,
    "hills": _hills,
    "sea": _sea,
    "desert": _desert,
    "forest": _forest,
}


def _house(brush: _Brush, x: float, floor: float, height: float) -> None:
    half, wall = 0.52 * height, 0.56 * height
    brush.pen.rectangle((x - half, floor - wall, x + half, floor), fill=brush.lit((236, 222, 196)))
    roof = [(x - 1.2 * half, floor - wall), (x, floor - height), (x + 1.2 * half, floor - wall)]
    brush.pen.polygon(roof, fill=brush.lit((186, 60, 48)))
    brush.pen.rectangle((x - 0.6 * half, floor - 0.36 * height, x - 0.15 * half, floor), fill=brush.lit((110, 70, 44)))
    window = (255, 214, 96) if brush.time != "day" else (120, 170, 214)
    brush.pen.rectangle((x + 0.2 * half, floor - 0.42 * height, x + 0.65 * half, floor - 0.2 * height), fill=window)


def _tree(brush: _Brush, x: float, floor: float, height: float) -> None:
    brush.pen.rectangle((x - 5, floor - 0.5 * height, x + 5, floor), fill=brush.lit((110, 74, 44)))
    brush.disc(x, floor - 0.74 * height, 0.4 * height, brush.lit((46, 116, 50)))


def _sailboat(brush: _Brush, x: float, floor: float, height: float) -> None:
    deck = floor - 0.22 * height
    hull = [(x - 0.5 * height, deck), (x + 0.5 * height, deck), (x + 0.32 * height, floor), (x - 0.32 * height, floor)]
    sail = brush.lit((250, 248, 240))
    brush.pen.polygon([(x - 3, deck - 4), (x - 3, floor - 1.15 * height), (x - 0.46 * height, deck - 4)], fill=sail)
    brush.pen.polygon([(x + 3, deck - 4), (x + 3, floor - 1.25 * height), (x + 0.5 * height, deck - 4)], fill=sail)
    brush.pen.polygon(hull, fill=brush.lit((172, 52, 44)))


def _cactus(brush: _Brush, x: float, floor: float, height: float) -> None:
    green, width = brush.lit((56, 130, 66)), 0.11 * height
    for left, top, right, bottom in (
        (-1, -1.1, 1, 0),
        (-3.8, -0.75, -2.2, -0.4),
        (-3.8, -0.5, 0, -0.36),
        (2.2, -0.9, 3.8, -0.5),
        (0, -0.62, 3.8, -0.48),
    ):
        box = (x + left * width, floor + top * height, x + right * width, floor + bottom * height)
        brush.pen.rounded_rectangle(box, radius=0.06 * height, fill=green)


_THING_PAINTERS = {"house": _house, "tree": _tree, "sailboat": _sailboat, "cactus": _cactus}
