import io
from collections.abc import Callable
from unittest.mock import Mock

import numpy as np
import pytest
from PIL import Image

from epsd.files.images import ImageError, Shortage, decode, decode_planes, fit, is_image, pixels
from pictures import picture


def encoded(image: Image.Image, form: str = "PNG", **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, form, **options)
    return stream.getvalue()


GREY = np.arange(0, 256, 4, dtype=np.uint8).reshape(8, 8)


def test_rgb_is_read_pixel_for_pixel() -> None:
    values = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    read = pixels(decode(encoded(Image.fromarray(values)), "a.png"))
    assert read.shape == (3, 5, 7)
    assert np.array_equal(read, values.transpose(2, 0, 1))


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "1", "P", "CMYK", "YCbCr", "I;16"])
@pytest.mark.parametrize("grayscale", [False, True])
def test_every_mode_becomes_rgb_or_grey_of_the_same_brightness(mode: str, grayscale: bool) -> None:
    flat = Image.fromarray(np.full((6, 9), 255, dtype=np.uint8))
    made = Image.fromarray(np.full((6, 9), 65535, dtype=np.uint16)) if mode == "I;16" else flat.convert(mode)
    form = "TIFF" if mode in ("CMYK", "YCbCr") else "PNG"
    read = pixels(decode(encoded(made, form), "a", grayscale=grayscale))
    assert read.shape == (1 if grayscale else 3, 6, 9)
    assert read.min() >= 254


@pytest.mark.parametrize("form", ["PNG", "TIFF"])
def test_sixteen_bit_is_scaled_not_clipped(form: str) -> None:
    deep = Image.fromarray(GREY.astype(np.uint16) * 257)
    assert np.array_equal(pixels(decode(encoded(deep, form), "a", grayscale=True))[0], GREY)


def test_sixteen_bit_that_is_dark_stays_dark() -> None:
    deep = Image.fromarray(np.full((4, 4), 200, dtype=np.uint16))
    assert pixels(decode(encoded(deep), "a", grayscale=True)).max() == 1


def test_floating_tiff_in_unit_range_is_scaled() -> None:
    image = Image.fromarray((GREY / 255).astype(np.float32))
    assert np.array_equal(pixels(decode(encoded(image, "TIFF"), "a", grayscale=True))[0], GREY)


def test_cmyk_jpeg_keeps_its_colours() -> None:
    red = Image.new("RGB", (16, 16), (255, 0, 0)).convert("CMYK")
    read = pixels(decode(encoded(red, "JPEG", quality=95), "a.jpg")).mean((1, 2))
    assert read[0] > 230 and read[1] < 30 and read[2] < 30


def test_palette_keeps_its_colours_and_transparency_becomes_white() -> None:
    half = Image.new("RGBA", (4, 4), (0, 0, 255, 255))
    half.paste((10, 20, 30, 0), (0, 0, 2, 4))
    read = pixels(decode(encoded(half), "a.png"))
    assert read[:, 0, 0].tolist() == [255, 255, 255]
    assert read[:, 0, 3].tolist() == [0, 0, 255]
    palette = Image.new("RGB", (4, 4), (9, 200, 77)).quantize(4)
    assert pixels(decode(encoded(palette), "a.png"))[:, 1, 1].tolist() == [9, 200, 77]
    keyed = Image.new("P", (4, 4), 0)
    keyed.putpalette([5, 6, 7, 0, 255, 0])
    assert pixels(decode(encoded(keyed, transparency=0), "a.png"))[:, 0, 0].tolist() == [255, 255, 255]


@pytest.mark.parametrize(("orientation", "corner"), [(1, (0, 0)), (3, (-1, -1)), (6, (0, -1)), (8, (-1, 0))])
def test_exif_rotation_is_applied(orientation: int, corner: tuple[int, int]) -> None:
    values = np.zeros((8, 16), dtype=np.uint8)
    values[:4, :4] = 255  # bright top left as stored
    exif = Image.Exif()
    exif[0x0112] = orientation
    read = pixels(decode(encoded(Image.fromarray(values), "PNG", exif=exif), "a", grayscale=True))[0]
    assert read.shape == ((16, 8) if orientation in (6, 8) else (8, 16))
    assert read[corner] == 255
    assert read[::-1, ::-1][corner] == 0


@pytest.mark.parametrize("orientation", [1, 6])
@pytest.mark.parametrize(("share", "expected"), [(1, 1), (3, 2), (4, 4), (9, 8), (50, 8)])
def test_a_jpeg_is_decoded_at_the_fraction_that_is_enough(orientation: int, share: int, expected: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    asked: list[tuple[int, int]] = []

    def least(width: int, height: int) -> tuple[int, int]:
        asked.append((width, height))
        return -(-width // share), -(-height // share)

    content = encoded(Image.new("RGB", (320, 160), (9, 200, 77)), "JPEG", exif=exif)
    read = decode(content, "a.jpg", least=least)
    seen = (160, 320) if orientation == 6 else (320, 160)
    assert asked == [seen]
    assert read.size == (seen[0] // expected, seen[1] // expected)
    assert decode(content, "a.jpg").size == seen


def test_other_files_are_not_asked_how_much_is_enough() -> None:
    def least(width: int, height: int) -> tuple[int, int]:
        raise AssertionError

    assert decode(encoded(Image.new("RGB", (32, 16)), "PNG"), "a.png", least=least).size == (32, 16)


@pytest.mark.parametrize("grayscale", [False, True])
@pytest.mark.parametrize("orientation", [None, 1, 6])
@pytest.mark.parametrize(
    ("form", "mode"), [("JPEG", "RGB"), ("JPEG", "L"), ("JPEG", "CMYK"), ("PNG", "RGBA"), ("PNG", "L")]
)
def test_planes_are_the_pixels_of_the_picture(form: str, mode: str, orientation: int | None, grayscale: bool) -> None:
    values = np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8)
    smooth = Image.fromarray(values).resize((95, 61)).convert(mode)
    exif = Image.Exif()
    if orientation:
        exif[0x0112] = orientation
    content = encoded(smooth, form, exif=exif)
    whole = decode_planes(content, "a", grayscale=grayscale)
    assert np.array_equal(whole.numpy(), pixels(decode(content, "a", grayscale=grayscale)))

    def half(width: int, height: int) -> tuple[int, int]:
        return width // 2, height // 2

    reduced = decode_planes(content, "a", grayscale=grayscale, least=half)
    assert np.array_equal(reduced.numpy(), pixels(decode(content, "a", grayscale=grayscale, least=half)))
    assert (reduced.shape == whole.shape) == (form == "PNG")


@pytest.mark.parametrize("decoding", [decode, decode_planes])
@pytest.mark.parametrize("form", ["PNG", "JPEG", "GIF", "BMP"])
@pytest.mark.parametrize("keep", [0, 5, 0.6, 0.9])
def test_truncated_images_are_named(form: str, keep: float, decoding: Callable[[bytes, str], object]) -> None:
    whole = picture(0, 64, form)
    cut = whole[: int(keep * len(whole)) if keep < 1 else int(keep)]
    with pytest.raises(ImageError, match=r"photos/a.jpg: "):
        decoding(cut, "photos/a.jpg")


@pytest.mark.parametrize("content", [b"", b"hello", b"\x89PNG\r\n\x1a\n" + b"\0" * 50, b"\xff\xd8" + b"\xff" * 200])
def test_what_is_no_image_is_named(content: bytes) -> None:
    with pytest.raises(ImageError, match=r"a\.png: "):
        decode(content, "a.png")


@pytest.mark.parametrize(
    ("shape", "size", "resize"),
    [((30, 20), 8, None), ((20, 30), 8, 12), ((4, 6), 8, None), ((7, 300), 8, 9), ((3, 3), 5, 4)],
)
def test_fit_gives_the_asked_square_also_from_smaller_images(
    shape: tuple[int, int], size: int, resize: int | None
) -> None:
    assert fit(Image.new("RGB", shape), size, resize).size == (size, size)


def test_fit_cuts_the_middle_and_leaves_what_fits() -> None:
    values = np.zeros((10, 30), dtype=np.uint8)
    values[:, 10:20] = 255
    assert pixels(fit(Image.fromarray(values), 10)).min() == 255
    exact = Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 9), dtype=np.uint8))
    assert np.array_equal(pixels(fit(exact, 9)), pixels(exact))
    assert fit(Image.new("L", (31, 7)), None).size == (31, 7)


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize(("size", "resize"), [(24, 28), (24, None), (64, 75), (7, 100)])
@pytest.mark.parametrize("shape", [(100, 75), (75, 100), (50, 50), (20, 9), (24, 28), (24, 24), (300, 30), (20, 400)])
def test_fit_gives_the_pixels_of_resizing_all_and_cutting_then(
    shape: tuple[int, int], size: int, resize: int | None, mode: str
) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (*shape[::-1], 3), dtype=np.uint8)
    picture = Image.fromarray(noise).convert(mode)
    factor = (resize or size) / min(shape)
    width, height = (max(size, round(side * factor)) for side in shape)
    whole = picture.resize((width, height), Image.Resampling.BILINEAR)
    left, top = (width - size) // 2, (height - size) // 2
    expected = pixels(whole.crop((left, top, left + size, top + size))).astype(int)
    apart = np.abs(pixels(fit(picture, size, resize)) - expected)
    mostly_cut_away = width * height > 4 * size**2
    assert apart.max() <= (2 if mostly_cut_away else 0)  # across and down, each rounds
    assert apart.mean() < 0.3


@pytest.mark.parametrize("shape", [(20_000, 4), (4, 20_000), (60_000, 1)])
def test_fit_of_a_strip_takes_no_more_than_what_stays(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[int, int]] = []
    resize = Image.Image.resize

    def noted(picture: Image.Image, size: tuple[int, int], *rest: object) -> Image.Image:
        made.append(size)
        return resize(picture, size, *rest)

    monkeypatch.setattr(Image.Image, "resize", noted)
    values = np.linspace(0, 255, max(shape)).astype(np.uint8)
    strip = Image.fromarray(np.ascontiguousarray(np.broadcast_to(values, (min(shape), max(shape)))))
    read = pixels(fit(strip if shape[0] > shape[1] else strip.transpose(Image.Transpose.TRANSPOSE), 224, 256))
    assert made == [(224, 224)]
    assert read.min() >= 126 and read.max() <= 129  # the middle of the ramp


def test_fit_averages_when_it_shrinks() -> None:
    stripes = np.tile(np.array([0, 255], dtype=np.uint8), (32, 16))
    assert abs(float(pixels(fit(Image.fromarray(stripes), 4)).mean()) - 127.5) < 3  # without antialiasing: 0 or 255


def test_is_image_goes_by_the_ending() -> None:
    assert is_image("a/B.JPEG") and is_image("x.tif") and not is_image("jpg") and not is_image("a.txt")


@pytest.mark.parametrize(
    "error",
    [MemoryError(), OSError("Cannot allocate memory"), RuntimeError("DefaultCPUAllocator: can't allocate memory")],
)
@pytest.mark.parametrize("read", [decode, decode_planes])
def test_too_little_memory_is_no_damage(
    read: Callable[..., object], error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = picture(0, mode="L")
    monkeypatch.setattr(Image.Image, "convert", Mock(side_effect=error))
    with pytest.raises(Shortage, match=r"a\.png: there is too little memory to decode it"):
        read(content, "a.png")


@pytest.mark.parametrize("ending", ["jpg", "JPEG", "jpe", "jfif", "JFIF", "jif", "jfi"])
def test_every_ending_of_a_jpeg_is_that_of_an_image(ending: str) -> None:
    assert is_image(f"a.{ending}")
