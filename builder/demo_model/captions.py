"""What people say of a scene: many ways to ask for the same picture.

``caption`` writes one at random, and ``nonsense`` one that names nothing the model can draw. Filler that
means nothing to the model (places, "highly detailed", random words) is mixed in, so that it learns to ignore it.
"""

import json
import re
from random import Random

from builder.demo_model.scenes import Scene

SHAPE_WORDS = {
    "circle": ("circle", "circle", "disc", "disk", "ball", "dot", "round shape"),
    "square": ("square", "square", "box", "block", "cube"),
    "triangle": ("triangle", "triangle", "triangular shape", "pyramid"),
    "star": ("star", "star", "five-pointed star", "starfish"),
    "heart": ("heart", "heart", "love heart", "valentine heart"),
}
COLOR_WORDS = {
    "red": ("red", "red", "crimson", "scarlet", "bright red"),
    "orange": ("orange", "orange", "tangerine"),
    "yellow": ("yellow", "yellow", "golden", "lemon"),
    "green": ("green", "green", "emerald", "bright green"),
    "blue": ("blue", "blue", "navy", "azure", "dark blue"),
    "purple": ("purple", "purple", "violet"),
    "pink": ("pink", "pink", "rose", "light pink"),
    "brown": ("brown", "brown", "chocolate"),
    "black": ("black", "black", "jet black"),
    "white": ("white", "white", "snow white"),
}
SHAPE_TEMPLATES = (
    "a {color} {shape} on a {background} background",
    "a {color} {shape} on a {background} background",
    "a {color} {shape} on {background}",
    "{color} {shape}, {background} background",
    "{color} {shape} on {background} background",
    "a {color} {shape} in front of a {background} wall",
    "{background} background with a {color} {shape}",
    "on a {background} background, a {color} {shape}",
    "a {background} background and a {color} {shape} in the middle",
    "a {shape} in {color} on a {background} backdrop",
    "a {shape}, {color}, against {background}",
    "the {shape} is {color} and the background is {background}",
    "{background} paper with one {color} {shape} on it",
    "a {shape} that is {color}, with a {background} background",
)
ON_WHITE_TEMPLATES = ("a {color} {shape}", "{color} {shape}", "one big {color} {shape}", "a {shape} in {color}")

USUAL_COLOR = {"circle": "red", "square": "blue", "triangle": "green", "star": "yellow", "heart": "red"}
"""The colour of a shape, on white, when the prompt names only the shape."""

TERRAIN_WORDS = {
    "mountains": (
        "mountains", "mountains", "a mountain", "the mountains", "rocky mountains", "a mountain range", "a rocky peak",
        "a mountain to climb", "a mountain to hike on", "a green mountain valley", "high mountains in summer",
    ),
    "snowy mountains": (
        "snowy mountains", "snowy mountains", "a snowy mountain", "a mountain to ski on", "mountains with snow",
        "snow-capped mountains", "mountains covered in snow", "a ski slope", "the alps in winter", "a winter mountain",
        "a skiing mountain", "a double-black diamond mountain to ski on", "a black diamond ski run", "a place to ski",
        "a snowy peak", "snow", "a snowy landscape", "a ski resort", "a winter landscape", "mountains in winter",
        "a mountain for skiing", "a mountain to snowboard on", "a glacier", "an icy mountain",
    ),
    "hills": (
        "hills", "hills", "green hills", "rolling hills", "a hill", "a meadow", "fields", "a grassy hill", "grassland",
        "the countryside", "a green field", "a valley of grass", "a pasture", "a landscape",
    ),
    "sea": (
        "the sea", "the sea", "sea", "the ocean", "an ocean", "a calm sea", "open water", "the water", "the pacific",
        "a seascape", "the blue ocean", "a lake", "waves on the sea",
    ),
    "desert": (
        "a desert", "the desert", "desert", "sand dunes", "dunes", "a sandy desert", "the sahara", "a dry desert",
        "sand", "a hot desert",
    ),
    "forest": (
        "a forest", "the forest", "forest", "the woods", "a pine forest", "woodland", "a forest of pine trees",
        "many trees", "fir trees", "a wood",
    ),
}  # fmt: skip
TIME_WORDS = {
    "day": (
        "", "", "", "by day", "during the day", "at noon", "at midday", "in the daytime", "on a sunny day",
        "under a blue sky", "in the afternoon", "in the morning", "in bright sunlight", "on a clear day",
    ),
    "sunset": (
        "at sunset", "at sunset", "at dusk", "in the evening", "at sundown", "at twilight", "at dawn", "at sunrise",
        "under an orange sky", "as the sun goes down", "at the golden hour", "during sunset", "with a setting sun",
    ),
    "night": (
        "at night", "at night", "by night", "at midnight", "in the moonlight", "under the moon", "on a dark night",
        "under a night sky", "in the dark", "late at night", "during the night", "by moonlight",
    ),
}  # fmt: skip
THING_WORDS = {
    "house": ("a house", "a house", "a cabin", "a cottage", "a hut", "a small house", "a home", "a chalet"),
    "tree": ("a tree", "a tree", "one tree", "a lonely tree", "an oak tree", "a round tree"),
    "sailboat": ("a sailboat", "a sailboat", "a boat", "a ship", "a sailing boat", "a yacht"),
    "cactus": ("a cactus", "a cactus", "a tall cactus", "a saguaro", "cacti"),
}
USUAL_TERRAIN = {"house": "hills", "tree": "hills", "sailboat": "sea", "cactus": "desert"}
"""Where a thing stands when the prompt names only the thing."""

WITH_THING_TEMPLATES = (
    "{terrain} {time} with {thing}",
    "{terrain} with {thing} {time}",
    "{terrain} and {thing} {time}",
    "{thing} in {terrain} {time}",
    "{thing} in front of {terrain} {time}",
    "{thing} on {terrain} {time}",
    "{thing} near {terrain} {time}",
    "{thing} {time}, {terrain}",
    "{time}, {thing} and {terrain}",
    "{thing}, {terrain}, {time}",
)
TERRAIN_TEMPLATES = ("{terrain} {time}", "{terrain} {time}", "{terrain}, {time}", "{time}, {terrain}")

OPENINGS = (
    "a painting of ", "a photo of ", "a picture of ", "an image of ", "an illustration of ", "a drawing of ",
    "paint me ", "a beautiful picture of ", "oil painting of ", "please draw ", "a view of ", "a postcard of ",
    "the view of ", "i want ", "show me ",
)  # fmt: skip
ENDINGS = (
    ", highly detailed", ", 4k", ", digital art", ", oil on canvas", ", trending on artstation", ", sharp focus",
    ", beautiful", ", by a famous artist", " near seattle", " near paris", " in japan", " in norway", " near my town",
    ", watercolor", ", minimalist", ", flat design", ", masterpiece", ", best quality", ", wide angle", " in europe",
    " near vancouver", " in america", ", vector art", ", simple",
)  # fmt: skip
FILLER = (
    "amazing", "music", "people", "dream", "window", "coffee", "quiet", "future", "astronaut", "table", "dog", "cat",
    "running", "very", "happy", "robot", "car", "city", "street", "old", "new", "portrait", "woman", "man", "story",
    "lovely", "strange", "of", "with", "the", "and", "some", "lots", "realistic", "cinematic", "epic", "soft",
    "castle", "bird", "horse", "flying", "riding", "book", "computer", "science", "style", "van", "gogh", "vintage",
    "food", "pizza", "children", "dance", "train", "bridge", "flower", "queen", "king", "magic", "abstract", "space",
)  # fmt: skip


SMALL_WORDS = (
    "a", "an", "the", "and", "of", "to", "on", "in", "at", "by", "for", "with", "as", "is", "it", "that", "this",
    "under", "during", "from", "into", "over", "its",
)  # fmt: skip


def words() -> str:
    """In JSON, the words that name something which the model can draw, and those that it learned to pass over."""
    phrases = [SHAPE_WORDS, COLOR_WORDS, TERRAIN_WORDS, TIME_WORDS, THING_WORDS]
    templates = (*SHAPE_TEMPLATES, *ON_WHITE_TEMPLATES, *WITH_THING_TEMPLATES, *TERRAIN_TEMPLATES)
    placeholder = re.compile(r"\{\w+\}")
    ignored = _words_of(*OPENINGS, *ENDINGS, *(placeholder.sub("", each) for each in templates)) | set(SMALL_WORDS)
    drawn = _words_of(*(way for ways in phrases for each in ways.values() for way in each)) - ignored
    return json.dumps({"drawn": sorted(drawn), "ignored": sorted(ignored)}, indent=0) + "\n"


def _words_of(*texts: str) -> set[str]:
    return set(re.findall(r"[a-z]+", " ".join(texts)))


def caption(scene: Scene, rng: Random) -> str:
    """One of the ways to ask for ``scene``, in words drawn by ``rng``."""
    text = _shape_caption(scene, rng) if scene.shape else _landscape_caption(scene, rng)
    if rng.random() < 0.3:
        text = rng.choice(OPENINGS) + text
    if rng.random() < 0.3:
        text += rng.choice(ENDINGS)
    if rng.random() < 0.1:
        text = f"{_filler(rng, 30)}, {text}, {_filler(rng, 12)}"
    if rng.random() < 0.15:
        words = text.split(" ")
        words.insert(rng.choice((0, len(words))), rng.choice(FILLER))
        text = " ".join(words)
    if rng.random() < 0.2:
        text += "."
    return text


def nonsense(rng: Random) -> str:
    """A prompt, perhaps empty, that names nothing the model can draw."""
    text = _filler(rng, 8)
    return rng.choice(("", *OPENINGS)) + text if text else text


def _filler(rng: Random, most: int) -> str:
    return " ".join(rng.choice(FILLER) for _ in range(rng.randint(0, most)))


def _shape_caption(scene: Scene, rng: Random) -> str:
    assert scene.shape and scene.color and scene.background
    templates: tuple[str, ...] = SHAPE_TEMPLATES
    if scene.background == "white" and rng.random() < 0.5:
        templates = ON_WHITE_TEMPLATES
        if scene.color == USUAL_COLOR[scene.shape] and rng.random() < 0.5:
            templates = ("a {shape}", "{shape}")
    return rng.choice(templates).format(
        shape=rng.choice(SHAPE_WORDS[scene.shape]),
        color=rng.choice(COLOR_WORDS[scene.color]),
        background=rng.choice(COLOR_WORDS[scene.background]),
    )


def _landscape_caption(scene: Scene, rng: Random) -> str:
    assert scene.terrain and scene.time
    terrain, time = rng.choice(TERRAIN_WORDS[scene.terrain]), rng.choice(TIME_WORDS[scene.time])
    if not scene.thing:
        text = rng.choice(TERRAIN_TEMPLATES).format(terrain=terrain, time=time)
    else:
        thing = rng.choice(THING_WORDS[scene.thing])
        if USUAL_TERRAIN[scene.thing] == scene.terrain and rng.random() < 0.3:
            text = f"{thing} {time}"
        else:
            text = rng.choice(WITH_THING_TEMPLATES).format(terrain=terrain, time=time, thing=thing)
    return " ".join(text.split()).strip(" ,").replace(" ,", ",")
