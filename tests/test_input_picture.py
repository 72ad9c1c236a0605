"""Pictures that clients send, from a text to a picture at the size at which it is used."""

import base64
import struct
import time
import zlib
from collections.abc import Callable
from urllib.parse import quote

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image, ImageChops, ImageStat

from src.api.input_picture import decode, fitted_size
from src.api.limits import ModelLimits
from src.api.request import ImageRequest
from src.errors import InvalidInput
from tests.support.pictures import file, in_base64, plain

LIMITS = ModelLimits(native_size=512, max_size=1024, scheduler="PNDM")
CORNERS = plain("white", (64, 96))
CORNERS.paste("red", (0, 0, 32, 48))
CORNERS.paste("blue", (32, 48, 64, 96))
"""Red above on the left, blue below on the right."""


def parse(image: object, **job_input: object) -> ImageRequest:
    return ImageRequest.parse({"prompt": "a cat", "image": image, **job_input}, LIMITS)


def read(image: object) -> Image.Image:
    picture = parse(image).image
    assert picture and picture.mode == "RGB"
    return picture


def refusal(image: object, **job_input: object) -> str:
    started = time.monotonic()
    with pytest.raises(InvalidInput) as refused:
        parse(image, **job_input)
    assert time.monotonic() - started < 5
    return str(refused.value).removeprefix("invalid input: ")


def difference(a: Image.Image, b: Image.Image) -> float:
    """The mean difference between two pictures, in levels of 255."""
    return max(ImageStat.Stat(ImageChops.difference(a, b)).mean)


@pytest.mark.parametrize(("name", "tolerance"), [("PNG", 0), ("JPEG", 5), ("WEBP", 5)])
def test_formats_are_read(name: str, tolerance: int):
    assert difference(read(in_base64(CORNERS, name)), CORNERS) <= tolerance


def with_line_breaks(text: str) -> str:
    return "\r\n".join(text[i : i + 76] for i in range(0, len(text), 76))


@pytest.mark.parametrize(
    "written",
    [
        lambda text: "data:image/png;base64," + text,
        lambda text: "data:;base64," + text,
        lambda text: "\n DATA:image/PNG;Base64," + text,
        lambda text: "data:image/png;base64," + quote(text, safe=""),
        lambda text: quote(text, safe="").replace("%2B", "%2b"),
        lambda text: text.replace("+", "-").replace("/", "_"),
        lambda text: text.rstrip("="),
        with_line_breaks,
        lambda text: f" {text}\n",
    ],
)
def test_spellings_of_base64_are_read(written: Callable[[str], str]):
    # of every length modulo 3, so with and without padding
    for size in ((64, 96), (64, 97), (64, 98), (65, 96)):
        assert read(written(in_base64(CORNERS.resize(size, 0)))).size == (64, 96)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16"])
def test_every_mode_of_png_becomes_rgb(mode: str):
    black_and_white = Image.new("L", (64, 64))
    black_and_white.paste(255, (0, 0, 32, 64))
    picture = Image.new("I;16", (64, 64)) if mode == "I;16" else black_and_white.convert(mode)
    if mode == "I;16":
        picture.paste(65535, (0, 0, 32, 64))
    assert read(in_base64(picture)).tobytes() == black_and_white.convert("RGB").tobytes()


@pytest.mark.parametrize("mode", ["L", "CMYK", "RGB"])
@pytest.mark.parametrize("progressive", [False, True])
def test_every_mode_of_jpeg_becomes_rgb(mode: str, progressive: bool):
    grey = plain("gray")
    assert difference(read(in_base64(grey.convert(mode), "JPEG", progressive=progressive)), grey) <= 2


def test_transparent_parts_become_white():
    red = plain("red")
    half = Image.new("L", red.size)
    half.paste(255, (0, 0, 32, 64))
    red.putalpha(half)
    palette = plain("red").convert("P")
    for text in (in_base64(red), in_base64(red, "WEBP", lossless=True)):
        assert (read(text).getpixel((0, 0)), read(text).getpixel((63, 0))) == ((255, 0, 0), (255, 255, 255))
    assert read(in_base64(palette, transparency=palette.getpixel((0, 0)))).getextrema() == ((255, 255),) * 3


@pytest.mark.parametrize("name", ["PNG", "WEBP"])
def test_first_frame_of_an_animation_is_read(name: str):
    frames = [plain(color) for color in ("red", "lime", "blue")]
    text = in_base64(frames[0], name, save_all=True, append_images=frames[1:], lossless=True)
    assert read(text).getpixel((5, 5)) == (255, 0, 0) if name == "PNG" else read(text).getpixel((5, 5))[0] > 250


UPRIGHT = {
    1: lambda p: p,
    2: lambda p: p.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
    3: lambda p: p.transpose(Image.Transpose.ROTATE_180),
    4: lambda p: p.transpose(Image.Transpose.FLIP_TOP_BOTTOM),
    5: lambda p: p.transpose(Image.Transpose.TRANSPOSE),
    6: lambda p: p.transpose(Image.Transpose.ROTATE_90),
    7: lambda p: p.transpose(Image.Transpose.TRANSVERSE),
    8: lambda p: p.transpose(Image.Transpose.ROTATE_270),
}
"""For each of EXIF's orientations, how a camera that is held so stores a picture."""


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize("name", ["PNG", "JPEG", "WEBP"])
def test_pictures_are_turned_upright(name: str, orientation: int):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    text = in_base64(UPRIGHT[orientation](CORNERS), name, exif=exif)
    assert difference(read(text), CORNERS) <= 5


@pytest.mark.parametrize("broken", [{"icc_profile": b"nonsense"}, {"exif": b"Exif\0\0nonsense"}])
def test_broken_metadata_is_ignored(broken: dict[str, bytes]):
    for name in ("PNG", "JPEG", "WEBP"):
        assert difference(read(in_base64(CORNERS, name, **broken)), CORNERS) <= 5


def with_hole(color: str, size: tuple[int, int] = (64, 64)) -> Image.Image:
    mask = plain(color, size).convert("RGBA")
    mask.paste((0, 0, 0, 0), (0, 0, 32, 32))
    return mask


@pytest.mark.parametrize(
    ("mask", "warnings"),
    [
        (Image.linear_gradient("L"), []),
        (with_hole("black").convert("RGB"), ["mask: nowhere white, so nothing was painted anew"]),
        (plain("#7f7f7f"), ["mask: nowhere white, so nothing was painted anew"]),
        (plain("white", (100, 96)).convert("RGBA"), []),
        (Image.new("RGBA", (64, 64), (0, 0, 0, 129)), ["mask: nowhere white, so nothing was painted anew"]),
        (with_hole("black"), ["mask: its transparent parts count as white, and were painted anew"]),
        (
            with_hole("white", (96, 64)),
            [
                "mask: its transparent parts count as white, and were painted anew",
                "mask: stretched, because its proportions are not those of image: 96 x 64 for 128 x 128",
            ],
        ),
    ],
)
def test_mask_that_may_not_be_meant_gets_a_warning(mask: Image.Image, warnings: list[str]):
    request = parse(in_base64(plain("red", (128, 128))), mask=in_base64(mask), width=256, height=64)
    assert request.warnings == warnings


def test_mask_is_black_and_white_and_of_the_pictures_size():
    request = parse(in_base64(plain("red", (200, 100))), mask=in_base64(Image.linear_gradient("L")))
    assert request.image and request.mask
    assert (request.mask.mode, request.mask.size, request.image.size) == ("L", (200, 96), (200, 96))
    assert set(request.mask.tobytes()) == {0, 255}
    assert (request.mask.getpixel((0, 47)), request.mask.getpixel((0, 49))) == (0, 255)


@pytest.mark.parametrize(
    ("size", "asked", "used"),
    [
        ((512, 512), {}, (512, 512)),
        ((100, 70), {}, (96, 64)),
        ((1, 1), {}, (64, 64)),
        ((1, 4096), {}, (64, 1024)),
        ((4096, 2048), {}, (1024, 512)),
        ((3000, 2000), {}, (1024, 680)),
        ((4096, 3), {}, (1024, 64)),
        ((1000, 500), {"width": 512}, (512, 256)),
        ((1000, 500), {"height": 512}, (1024, 512)),
        ((500, 1000), {"width": 512}, (512, 1024)),
        ((64, 1024), {"width": 64}, (64, 1024)),
        ((1000, 500), {"width": 512, "height": 512}, (512, 512)),
    ],
)
def test_size_is_the_pictures_own_unless_asked_for(size: tuple[int, int], asked: dict[str, int], used: tuple[int, int]):
    request = parse(in_base64(plain("red", size)), **asked)
    assert request.image
    assert request.image.size == (request.width, request.height) == used


@pytest.mark.parametrize(
    ("size", "asked", "said"),
    [
        ((500, 1000), {"width": 1024}, "width: with this picture the height would be 2048, must be at most 1024"),
        ((300, 200), {"height": 1024}, "height: with this picture the width would be 1536, must be at most 1024"),
        ((300, 100), {"width": 128}, "width: with this picture the height would be 40, must be at least 64"),
        ((1, 4096), {"height": 1024}, "height: with this picture the width would be 0, must be at least 64"),
    ],
)
def test_side_alone_is_refused_if_the_other_would_be_out_of_bounds(
    size: tuple[int, int], asked: dict[str, int], said: str
):
    assert refusal(in_base64(plain("red", size)), **asked) == said
    assert refusal(in_base64(plain("red", size)), **asked, seed=-2).endswith(f"; {said}")


@given(st.tuples(st.integers(1, 4096), st.integers(1, 4096)))
def test_any_size_becomes_one_that_can_be_asked_for(size: tuple[int, int]):
    width, height = fitted_size(size, 1024, {})
    parse(in_base64(plain("red")), width=width, height=height)


def test_picture_is_scaled_as_diffusers_does_it():
    picture = Image.radial_gradient("L").convert("RGB")
    assert read(in_base64(picture.resize((100, 70)))).tobytes() == (
        picture.resize((100, 70)).resize((96, 64), Image.Resampling.LANCZOS).tobytes()
    )


def chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


@pytest.mark.parametrize(("color_type", "pixels"), [(0, [0x1234, 0x8000]), (2, [0x1234, 0, 0xABCD, 0xFF00, 0xFF00, 0])])
def test_transparent_color_of_16_bits_becomes_white(color_type: int, pixels: list[int]):
    written = struct.pack(f">{len(pixels)}H", *pixels)
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 2, 1, 16, color_type, 0, 0, 0))
    transparent = chunk(b"tRNS", written[: len(written) // 2])
    rows = chunk(b"IDAT", zlib.compress(b"\0" + written))
    picture = decode(b"\x89PNG\r\n\x1a\n" + header + transparent + rows + chunk(b"IEND", b""))
    assert picture.getpixel((0, 0)) == (255, 255, 255)
    assert picture.getpixel((1, 0)) == ((128, 128, 128) if color_type == 0 else (255, 255, 0))


def png(width: int, height: int, *chunks: bytes) -> bytes:
    """A black PNG, of which at most a few rows are there."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    rows = zlib.compress(bytes(min(height * (3 * width + 1), 10**6)))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def compressed(prefix: bytes, size: int = 10**8) -> bytes:
    return prefix + zlib.compress(bytes(size))


JPEG = file(CORNERS, "JPEG")
TOO_LARGE = "must have at most 4096 x 4096 pixels"
DAMAGED = "is damaged or cut off"
OTHER = "must be a PNG, JPEG or WebP file"


def progressive_with_many_scans() -> bytes:
    """24 s of work in 130 kB: the last scan of a large picture, a thousand times."""
    jpeg = file(plain("white", (4096, 4096)), "JPEG", progressive=True)
    last_scan = jpeg[jpeg.rindex(b"\xff\xda") : -2]
    return jpeg[:-2] + 1000 * last_scan + jpeg[-2:]


@pytest.mark.parametrize(
    ("make", "said"),
    [
        pytest.param(lambda: png(30_000, 30_000), TOO_LARGE, id="decompression bomb"),
        pytest.param(lambda: png(4097, 64), TOO_LARGE, id="a pixel too wide"),
        pytest.param(lambda: png(64, 12_000), TOO_LARGE, id="too high"),
        pytest.param(
            lambda: file(plain("red", (16383, 64)), "WEBP", lossless=True), TOO_LARGE, id="a WebP that is too wide"
        ),
        pytest.param(lambda: png(64, 64, chunk(b"zTXt", compressed(b"k\0\0"))), DAMAGED, id="bomb in a text"),
        pytest.param(lambda: png(64, 64, chunk(b"iTXt", compressed(b"k\0\1\0\0\0"))), DAMAGED, id="in another text"),
        pytest.param(
            lambda: png(64, 64, *[chunk(b"zTXt", compressed(b"k\0\0", 2**20))] * 300), DAMAGED, id="in many texts"
        ),
        pytest.param(lambda: png(64, 64, chunk(b"iCCP", compressed(b"k\0\0"))), DAMAGED, id="in a colour profile"),
        pytest.param(lambda: png(64, 64, 900_000 * chunk(b"tEXt", b"")), DAMAGED, id="a million chunks"),
        pytest.param(lambda: JPEG[:2] + 3_000_000 * b"\xff\xfe\0\2" + JPEG[2:], DAMAGED, id="millions of markers"),
        pytest.param(lambda: JPEG[:2] + 12_000_000 * b"\xff" + JPEG[2:], DAMAGED, id="a marker without end"),
        pytest.param(progressive_with_many_scans, DAMAGED, id="a thousand scans"),
        pytest.param(lambda: file(CORNERS)[:-60], DAMAGED, id="a PNG cut off"),
        pytest.param(lambda: JPEG[:-200], DAMAGED, id="a JPEG cut off"),
        pytest.param(lambda: file(CORNERS, "WEBP")[:-20], DAMAGED, id="a WebP cut off"),
        pytest.param(lambda: file(CORNERS, "WEBP")[:40], DAMAGED, id="a WebP's header"),
        pytest.param(lambda: png(64, 64, b"\0\0\0\1tEXtk\0\0\0\0"), DAMAGED, id="a PNG with a wrong checksum"),
        pytest.param(lambda: png(4096, 4096), DAMAGED, id="a PNG without its rows"),
        pytest.param(lambda: file(CORNERS, "GIF"), OTHER, id="GIF"),
        pytest.param(lambda: file(CORNERS, "TIFF"), OTHER, id="TIFF"),
        pytest.param(lambda: file(CORNERS, "BMP"), OTHER, id="BMP"),
        pytest.param(lambda: b"<svg xmlns='http://www.w3.org/2000/svg'/>", OTHER, id="SVG"),
        pytest.param(lambda: b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", OTHER, id="HEIC"),
        pytest.param(lambda: b"%PDF-1.7\n" + JPEG, OTHER, id="a PDF with a JPEG in it"),
        pytest.param(lambda: file(CORNERS, "GIF") + file(CORNERS), OTHER, id="a GIF with a PNG behind it"),
        pytest.param(lambda: b"a secret letter", OTHER, id="text"),
        pytest.param(lambda: b"", "is empty", id="nothing"),
    ],
)
def test_hostile_file_is_refused_in_words(make: Callable[[], bytes], said: str):
    text = base64.b64encode(make()).decode()
    assert refusal(text) == f"image: {said}"


@pytest.mark.parametrize("text", ["a secret!", "pässword", "\udcff", "/etc/passwd.", "file:///etc/passwd", "data:,a"])
def test_text_that_is_no_base64_is_refused_and_not_quoted(text: str):
    assert refusal(text) == "image: must be a file in base64, a data: URL with one, or its http or https address"


def test_fault_of_a_picture_is_told_with_all_others():
    assert refusal("a secret!", prompt="", mask="c2VjcmV0", scheduler="KLMS", num_inference_steps=1, strength=0.5) == (
        "prompt: must have 1 to 2,000 characters, got 0; "
        "image: must be a file in base64, a data: URL with one, or its http or https address; "
        "mask: must be a PNG, JPEG or WebP file; "
        "strength: num_inference_steps x strength must be 1 or more, got 1 x 0.5; scheduler: KLMS needs a strength of 1"
    )


@settings(max_examples=300)
@given(st.sampled_from(["PNG", "JPEG", "WEBP"]), st.data())
def test_damaged_file_is_read_or_refused_in_words(name: str, data: st.DataObject):
    damaged = bytearray(file(CORNERS, name))
    places = st.integers(0, len(damaged) - 1)
    for place, value in data.draw(st.lists(st.tuples(places, st.integers(0, 255)), min_size=1, max_size=5)):
        damaged[place] = value
    try:
        assert parse(bytes(damaged)).image
    except InvalidInput as refused:
        assert str(refused).startswith("invalid input: image: ")


@pytest.mark.parametrize(
    ("job_input", "said"),
    [
        ({"mask": True}, "mask: needs image, the picture that it is a mask of"),
        ({"strength": 0.5}, "strength: needs image, the picture that it is about"),
        ({"mask": "c2VjcmV0"}, f"mask: {OTHER}; mask: needs image, the picture that it is a mask of"),
        (
            {"strength": 5},
            "strength: must be at most 1.0, got 5.0; strength: needs image, the picture that it is about",
        ),
        ({"image": True, "strength": 0}, "strength: must be above 0.0, got 0.0"),
        ({"image": True, "strength": 1.01}, "strength: must be at most 1.0, got 1.01"),
        (
            {"image": True, "strength": 0.019},
            "strength: num_inference_steps x strength must be 1 or more, got 50 x 0.019",
        ),
        (
            {"image": True, "num_inference_steps": 1},
            "strength: num_inference_steps x strength must be 1 or more, got 1 x 0.8",
        ),
        ({"image": True, "scheduler": "KLMS"}, "scheduler: KLMS needs a strength of 1"),
    ],
)
def test_fields_that_do_not_fit_a_picture_are_refused(job_input: dict[str, object], said: str):
    pictures = {name: in_base64(plain("red")) for name, value in job_input.items() if value is True}
    with pytest.raises(InvalidInput) as refused:
        ImageRequest.parse({"prompt": "x"} | job_input | pictures, LIMITS)
    assert str(refused.value) == f"invalid input: {said}"


def test_strength_defaults_to_that_of_diffusers_and_steps_are_counted_as_it_does():
    red = in_base64(plain("red"))
    assert (parse(red).strength, parse(red, mask=red).strength, parse(None).strength) == (0.8, 1.0, None)
    steps = {strength: parse(red, num_inference_steps=100, strength=strength).denoising_steps for strength in (0.29, 1)}
    assert steps == {0.29: 28, 1: 100}
    assert parse(red, mask=red, scheduler="KLMS").strength == 1
