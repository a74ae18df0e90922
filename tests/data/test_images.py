"""What comes out of every odd image that people have: the right pixels, or a reason."""

from __future__ import annotations

import dataclasses
import io
import struct
import sys
import warnings
import zlib
from types import FunctionType

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from toys import CLASSES

from carot_hf import ShiftSet
from carot_hf.data.batches import ReadSet
from carot_hf.data.images import MAX_PIXELS, BadImageError, image_suffixes, is_image_name, read_image
from carot_hf.data.transforms import ImageTransform, random_box


def encoded(image, form, **options):
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


@pytest.fixture
def photo():
    """Smooth colours, 64 x 48, that survive JPEG."""
    rng = np.random.default_rng(0)
    return Image.fromarray(rng.integers(0, 256, (4, 5, 3)).astype(np.uint8)).resize((64, 48), Image.Resampling.BICUBIC)


def distance(first, second):
    return float(np.abs(np.asarray(first, float) - np.asarray(second, float)).mean())


def png_chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def header_only_png(width, height):
    """A PNG that says that it is so large, with hardly any data behind it."""

    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + png_chunk(b"IHDR", head)
        + png_chunk(b"IDAT", zlib.compress(b"\0"))
        + png_chunk(b"IEND", b"")
    )


# ---- decoded right ----


@pytest.mark.parametrize("kind", ["image", "array", "bytes", "path", "datasets bytes", "datasets path"])
def test_every_way_of_holding_an_image(photo, tmp_path, kind):
    data = encoded(photo, "PNG")
    (tmp_path / "a.png").write_bytes(data)
    value = {
        "image": photo,
        "array": np.asarray(photo),
        "bytes": data,
        "path": tmp_path / "a.png",
        "datasets bytes": {"bytes": data, "path": None},
        "datasets path": {"bytes": None, "path": str(tmp_path / "a.png")},
    }[kind]
    image = read_image(value)
    assert image.mode == "RGB"
    assert distance(image, photo) == 0


@pytest.mark.parametrize("form", ["JPEG", "TIFF"])
def test_cmyk(photo, form):
    image = read_image(encoded(photo.convert("CMYK"), form, **({"quality": 95} if form == "JPEG" else {})))
    assert distance(image, photo) < 8  # JPEG loses some


def test_palette_with_alpha_drops_it_without_a_warning(photo):
    palette = photo.quantize(16)
    data = encoded(palette, "PNG", transparency=bytes([0, 128] + [255] * 14))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        image = read_image(data)
    assert distance(image, palette.convert("RGB")) == 0


@pytest.mark.parametrize("mode", ["RGBA", "LA", "L", "1"])
def test_other_modes(photo, mode):
    source = photo.convert(mode)
    assert distance(read_image(encoded(source, "PNG")), source.convert("RGB")) == 0


@pytest.mark.parametrize("form", ["PNG", "TIFF"])
def test_16_bit_grey_is_scaled(form):
    """PIL's own conversion cuts everything above 255 off: white."""
    values = np.array([[0, 257, 32896], [65535, 51400, 1000]], np.uint16)
    data = encoded(Image.fromarray(values), form)
    expected = np.array([[0, 1, 128], [255, 200, 4]])  # by 257; 1000 / 257 = 3.89
    assert np.array_equal(np.asarray(read_image(data))[:, :, 1], expected)
    assert np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))[0, 2, 0] == 255


def as_uint16(values, form):
    """Grey values that a file holds as they are, in 16 bits."""
    if form == "PGM":
        height, width = np.shape(values)
        return b"P5 %d %d 65535\n" % (width, height) + np.asarray(values, ">u2").tobytes()
    return encoded(Image.fromarray(np.asarray(values, np.uint16)), form)


@pytest.mark.parametrize("form", ["PNG", "TIFF", "PGM", "JPEG2000", "array", "mode I", "turned"])
@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([[0, 255, 128, 1]], [[0, 255, 128, 1]]),  # 8 bits: as they are
        ([[0, 256, 1023, 512]], [[0, 64, 255, 128]]),  # 10 bits: 256 * 255 / 1023 = 63.8, 127.6
        ([[0, 1024, 4095, 2048]], [[0, 64, 255, 128]]),  # 12 bits: 63.77, 127.53
        ([[0, 4096, 16383, 8192]], [[0, 64, 255, 128]]),  # 14 bits: 63.75, 127.51
        ([[0, 16384, 32896, 8192]], [[0, 64, 128, 32]]),  # 16 bits: 63.75, 128, 31.9
        ([[0, 0, 0, 0]], [[0, 0, 0, 0]]),
    ],
)
def test_grey_is_scaled_by_the_bits_that_it_needs(form, values, expected):
    if form == "array":
        value = np.asarray(values, np.uint16)
    elif form == "mode I":
        value = encoded(Image.fromarray(np.asarray(values, np.int32)), "TIFF")
    elif form == "turned":
        exif = Image.Exif()
        exif[0x0112] = 2  # mirrored
        value = encoded(Image.fromarray(np.asarray(values, np.uint16)), "PNG", exif=exif)
        expected = np.flip(expected)
    else:
        value = as_uint16(values, form)
    result = np.asarray(read_image(value))
    assert result.shape == (1, 4, 3)
    assert np.array_equal(result, np.stack([expected] * 3, axis=-1))


@pytest.mark.parametrize("high", [16384, 40000, 65535])
def test_all_values_of_full_16_bits_are_divided_by_257(high):
    """As transformers' own users scale them, bit for bit; more values than are scaled at once."""
    values = (np.arange(1100 * 1000) % (high + 1)).astype(np.uint16).reshape(1100, 1000)
    result = np.asarray(read_image(encoded(Image.fromarray(values), "TIFF")))
    assert np.array_equal(result[:, :, 2], np.rint(values.astype(np.int64) / 257).astype(np.uint8))


@pytest.mark.parametrize("plain", [False, True])
def test_a_header_that_says_what_is_white_is_believed(plain):
    """A dark PGM of 12 bits stays dark: 1000 / 4095 * 255 = 62.3; 100 is 6.2."""
    data = b"P2 2 1 4095\n1000 100\n" if plain else b"P5 2 1 4095\n" + np.array([1000, 100], ">u2").tobytes()
    assert np.asarray(read_image(data))[0, :, 0].tolist() == [62, 6]


def test_a_tiff_of_12_bits_stays_dark():
    """Two values of 12 bits in three bytes, as PIL reads but does not write them: 0x3E8 = 1000 and 0x064 = 100."""
    entries = [(256, 4, 2), (257, 4, 1), (258, 3, 12), (259, 3, 1), (262, 3, 1), (273, 4, 8), (277, 3, 1), (279, 4, 3)]
    table = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in entries)
    pixels = bytes([0x3E, 0x80, 0x64, 0])
    data = b"II*\0" + struct.pack("<I", 12) + pixels + struct.pack("<H", len(entries)) + table + bytes(4)
    assert np.asarray(Image.open(io.BytesIO(data))).tolist() == [[1000, 100]]
    assert np.asarray(read_image(data))[0, :, 0].tolist() == [62, 6]


def png_of_16_bits(values):
    """A PNG of ``(h, w, 3)`` colours of 16 bits, which PIL does not write."""
    head = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], 16, 2, 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    return (
        b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", head) + png_chunk(b"IDAT", zlib.compress(rows))
        + png_chunk(b"IEND", b"")
    )  # fmt: skip


@pytest.mark.parametrize("form", ["PNG", "PPM"])
def test_colours_of_12_bits_in_16_are_refused(form):
    def data(values):
        values = np.asarray(values)
        header = b"P6 %d %d 65535\n" % (values.shape[1], values.shape[0])
        return png_of_16_bits(values) if form == "PNG" else header + values.astype(">u2").tobytes()

    with pytest.raises(
        BadImageError, match=r"16-bit colours of which the brightest is 1[56] of 255, .* with 8 bits each"
    ):
        read_image(data([[[0, 4095, 300], [9, 9, 9]]]))
    assert read_image(data([[[0, 4370, 0]]])).getpixel((0, 0)) == (0, 17, 0)
    assert read_image(data([[[0, 0, 0]]])).getpixel((0, 0)) == (0, 0, 0)


@pytest.mark.parametrize("place", ["decoding", "the data set"])
def test_too_little_memory_is_said_of_the_image(photo, monkeypatch, place):
    """The image is refused, or replaced, in place of the end of a run of hours."""

    class Rows:
        def __len__(self):
            return 2

        def __getitem__(self, index):
            image = Image.open(io.BytesIO(encoded(photo, "PNG" if index else "BMP")))
            return {"image": image.resize((9, 9)) if place == "the data set" else image, "label": 0}

    def load(image):
        raise MemoryError

    module = sys.modules["PIL.ImageFile"]
    monkeypatch.setattr(
        sys.modules["PIL.BmpImagePlugin"].BmpImageFile, "load", FunctionType(load.__code__, vars(module))
    )
    data = ShiftSet(Rows(), name="far", num_classes=2)
    reason = "MemoryError" if place == "the data set" else "more memory than there is; shrink it"
    with pytest.raises(BadImageError, match=rf"in set 'far' at index 0, got .*{reason}"):
        data[0]
    assert ReadSet(data, skip=True)[0]["replaced"] == [("far", 0)]


def test_float_grey():
    data = encoded(Image.fromarray(np.array([[0.0, 0.5, 1.0]], np.float32)), "TIFF")
    assert np.asarray(read_image(data))[0, :, 0].tolist() == [0, 128, 255]
    with pytest.raises(BadImageError, match=r"float values from 0\.0 to 7\.0, outside of \[0, 1\]"):
        read_image(encoded(Image.fromarray(np.array([[0.0, 7.0]], np.float32)), "TIFF"))


def test_one_pixel():
    image = read_image(encoded(Image.new("RGB", (1, 1), (10, 20, 30)), "PNG"))
    assert (image.size, image.getpixel((0, 0))) == ((1, 1), (10, 20, 30))
    transform = ImageTransform(size=32, crop=(32, 32), mean=(0.5,) * 3, std=(0.5,) * 3)
    for pixels in (transform.evaluate(image), transform.train(image, np.random.default_rng(0))):
        assert pixels.shape == (3, 32, 32)
        assert pixels[:, 7, 9].tolist() == [10, 20, 30]


@pytest.mark.parametrize("form", ["GIF", "WEBP"])
def test_the_first_frame_of_an_animation(form):
    frames = [Image.new("RGB", (8, 8), color) for color in ((255, 0, 0), (0, 255, 0), (0, 0, 255))]
    options = {"lossless": True} if form == "WEBP" else {}
    data = encoded(frames[0], form, save_all=True, append_images=frames[1:], **options)
    assert read_image(data).getpixel((4, 4)) == (255, 0, 0)


def test_exif_orientation_turns_the_image_or_not(photo):
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn clockwise to be shown upright
    data = encoded(photo, "JPEG", exif=exif, quality=95)
    turned, stored = read_image(data), read_image(data, exif=False)
    assert (turned.size, stored.size) == ((48, 64), (64, 48))
    assert distance(turned, photo.rotate(-90, expand=True)) < 4
    assert distance(stored, photo) < 4


@pytest.mark.parametrize("form", ["PNG", "TIFF", "WEBP", "JPEG"])
def test_orientation_is_found_in_every_format(photo, form):
    exif = Image.Exif()
    exif[0x0112] = 6
    assert read_image(encoded(photo, form, exif=exif)).size == (48, 64)


def test_datasets_turns_images_in_the_same_way(photo):
    exif = Image.Exif()
    exif[0x0112] = 8
    value = {"bytes": encoded(photo, "JPEG", exif=exif), "path": None}
    assert distance(read_image(value), datasets.Image().decode_example(value)) == 0


@pytest.mark.parametrize(("wanted", "size"), [((200, 150), (200, 150)), ((201, 10), (400, 300)), ((20, 30), (100, 75))])
def test_large_jpegs_are_decoded_smaller_but_never_too_small(photo, wanted, size):
    data = encoded(photo.resize((800, 600), Image.Resampling.BICUBIC), "JPEG", quality=95)
    small = read_image(data, min_size=wanted)
    assert small.size == size
    assert distance(small, photo.resize(size, Image.Resampling.BICUBIC)) < 3
    assert read_image(data, min_size=(401, 300)).size == (800, 600)


def test_the_smaller_side_is_right_for_a_turned_jpeg(photo):
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(photo.resize((800, 600)), "JPEG", exif=exif)
    assert read_image(data, min_size=(300, 400)).size == (300, 400)  # 800 x 600 turned and halved


def test_a_crop_of_what_is_decoded_smaller_is_never_enlarged(photo):
    transform = ImageTransform(size=32, crop=(32, 32), mean=(0.5,) * 3, std=(0.5,) * 3)
    width, height = transform.train_size
    for size in ((width, height), (width * 3, height), (width, height * 2)):
        for seed in range(300):
            left, top, right, bottom = random_box(*size, np.random.default_rng(seed), transform.scale, transform.ratio)
            assert min(right - left, bottom - top) >= 32


# ---- by name ----


COMMON = [
    *("bmp", "dib", "gif", "ico", "j2k", "jfif", "jp2", "jpe", "jpeg", "jpg", "jpx", "pbm", "pcx", "pgm", "png", "pnm"),
    *("ppm", "rgb", "sgi", "tga", "tif", "tiff", "webp"),
]


@pytest.mark.parametrize("suffix", COMMON)
def test_a_file_of_each_suffix_is_an_image_and_is_read(photo, tmp_path, suffix):
    path = tmp_path / f"image.{suffix}"
    photo.convert("1" if suffix == "pbm" else "RGB").save(path)
    assert is_image_name(path)
    assert read_image(path).width in (64, 48)  # the largest square of an icon


def test_every_suffix_is_that_of_a_format_that_pil_opens():
    """Counted the other way about: what PIL says that it opens, less what it opens with no pixels in it."""
    opened = {suffix for suffix, form in Image.registered_extensions().items() if form in Image.OPEN}
    no_pixels = {"bufr", "eps", "emf", "grib", "h5", "hdf", "iim", "mpeg", "mpg", "ps", "wmf"}
    assert image_suffixes() == (opened - {f".{suffix}" for suffix in no_pixels}) | {".mpo"}  # opened as a JPEG


@pytest.mark.parametrize("name", ["a.jfif", "a.JPG", "b/c.d.TIFF", "a.webp", "a.jp2", "a.pgm", "a.mpo"])
def test_names_of_images(name, tmp_path):
    assert is_image_name(name)
    assert is_image_name(tmp_path / name)


@pytest.mark.parametrize(
    "name",
    [
        *(
            "._0.png",
            "a/.b.png",
            ".png",
            "png",
            "a.png.txt",
            "Thumbs.db",
            ".DS_Store",
            "metadata.csv",
            "a.npy",
            "",
            "a.",
        ),
        *("a.pdf", "a.eps", "a.ps", "a.mpg", "a.mpeg", "a.h5", "a.hdf", "a.grib", "a.bufr", "a.wmf", "a.emf", "a.svg"),
    ],
)
def test_names_of_no_images(name):
    assert not is_image_name(name)


# ---- refused ----


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "no bytes"),
        (b"not an image", "UnidentifiedImageError"),
        ({"bytes": None, "path": None}, "NoneType in place of an image"),
        ({"bytes": None, "path": "nowhere.jpg"}, "FileNotFoundError"),
        (None, "NoneType in place of an image"),
    ],
)
def test_what_is_no_image(data, reason):
    with pytest.raises(BadImageError, match=reason):
        read_image(data)


@pytest.mark.parametrize(
    ("value", "got"),
    [
        (7, "int"),
        (torch.zeros(3, 8, 8), "Tensor"),
        (np.zeros((3, 8, 8), np.uint8), r"an array of shape \(3, 8, 8\) and uint8"),
        (np.zeros((8, 8, 3), np.float32), r"an array of shape \(8, 8, 3\) and float32"),
    ],
)
def test_what_can_be_no_image_is_never_skipped(value, got):
    """A transform that makes tensors is wrong for every row; it is no damaged image."""
    data = ShiftSet([{"image": value, "label": 0}] * 3, name="far", num_classes=2)
    with pytest.raises(TypeError, match=rf"uint8 array, bytes or a path in set 'far' at index 1, got {got} in place"):
        ReadSet(data, skip=True)[1]


# ---- errors that are not ours ----


class Broken:
    """A data set with a bug at row 1, an image that it opens itself and that is damaged at row 2."""

    labels = (0, 1, 0)

    def __init__(self, photo, error):
        self.data, self.error = encoded(photo, "JPEG"), error

    def __len__(self):
        return 3

    def __getitem__(self, index):
        if index == 1:
            raise self.error
        with Image.open(io.BytesIO(self.data[:200] if index == 2 else self.data)) as image:
            return {"image": image.convert("RGB"), "label": self.labels[index]}


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize(
    "kind",
    [ValueError, TypeError, AttributeError, KeyError, IndexError, OSError, RuntimeError, ZeroDivisionError],
)
def test_an_error_of_the_users_data_set_is_his(photo, kind, skip):
    error = kind("a bug")
    data = ReadSet(ShiftSet(Broken(photo, error), name="far", num_classes=2), skip=skip)
    with pytest.raises(kind, match="a bug") as caught:
        data[1]
    assert caught.value is error
    note = "Raised by the data of set 'far' at index 1, by its own code or transform."
    assert sys.version_info < (3, 11) or error.__notes__ == [note]
    if skip:
        assert data[2]["replaced"] == [("far", 2)]
    else:
        with pytest.raises(BadImageError, match=r"set 'far' at index 2, got OSError: .*(?i:truncated)"):
            data[2]


def test_the_end_of_a_set_is_no_error(photo):
    data = ShiftSet([{"image": photo, "label": 0}] * 3, name="far", num_classes=2)
    assert len(list(data)) == 3
    with pytest.raises(IndexError) as caught:
        data[3]
    assert not getattr(caught.value, "__notes__", [])


@pytest.mark.parametrize("way", ["with_transform", "set_transform"])
def test_a_transform_sees_decoded_images_and_its_errors_are_its_own(photo, way):
    """It was handed bytes in place of images; what it raised then was said of the image, and `skip` hid it."""

    def transform(batch):
        if 5 in batch["number"]:
            raise ValueError("a bug in the transform")
        return {"image": [image.rotate(180) for image in batch["image"]], "label": [1 - x for x in batch["label"]]}

    rows = spoiled(photo, {3}).remove_columns("label").add_column("label", [0] * 8).add_column("number", [*range(8)])
    if way == "set_transform":
        rows.set_transform(transform)
    data = ShiftSet(rows if way == "set_transform" else rows.with_transform(transform), name="far", num_classes=2)
    item = data[2]
    assert item["label"] == 1
    assert data.labels is None  # the transform makes them
    assert distance(item["image"], photo.rotate(180)) < 8
    with pytest.raises(ValueError, match="a bug in the transform") as caught:
        ReadSet(data, skip=True)[5]
    assert not isinstance(caught.value, BadImageError)
    assert sys.version_info < (3, 11) or "'far' at index 5" in caught.value.__notes__[0]
    with pytest.raises(BadImageError, match="in set 'far' at index 3"):
        data[3]
    assert ReadSet(data, skip=True)[3]["replaced"] == [("far", 3)]


@pytest.mark.parametrize("form", ["numpy", "torch"])
def test_a_format_of_tensors_is_put_aside(photo, form):
    rows = spoiled(photo, set())
    data = ShiftSet(rows.with_format(form), name="far", num_classes=4)
    assert data[2]["label"] == 2
    assert distance(data[2]["image"], read_image(rows[2]["image"])) == 0


@pytest.mark.parametrize("form", ["numpy", "torch", "pandas"])
def test_a_set_of_any_format_is_judged_and_predicted_as_a_plain_one(make_trainer, form, tmp_path):
    """Every image of another colour, labels in no order; through `evaluate`, `predict`, training, and from disk."""
    colours = np.random.default_rng(0).integers(0, 256, (12, 3)).tolist()
    labels = [2, 0, 3, 1, 1, 0, 2, 2, 3, 0, 1, 3]
    images = [Image.new("RGB", (18, 20), tuple(colour)) for colour in colours]
    plain = datasets.Dataset.from_dict({"image": images, "label": labels})
    formatted = plain.with_format(form, columns=["label"])  # as some do to keep images as they are
    plain.with_format(form).save_to_disk(tmp_path / "rows")
    trainer = make_trainer()
    expected, logits = trainer.evaluate(plain), trainer.predict(plain).predictions
    for data in (plain.with_format(form), formatted, datasets.load_from_disk(tmp_path / "rows")):
        found = trainer.evaluate(data)
        assert {k: v for k, v in found.items() if "_nll" in k or "_ece" in k or "_accuracy" in k} == {
            k: v for k, v in expected.items() if "_nll" in k or "_ece" in k or "_accuracy" in k
        }
        result = trainer.predict(data)
        assert result.label_ids.tolist() == labels
        assert np.array_equal(result.predictions, logits)
        held = ShiftSet(data, name="far", num_classes=len(CLASSES))
        assert [held[index]["label"] for index in range(12)] == held.labels.tolist() == labels
        assert held.subset(np.array([7, 2]), "part").labels.tolist() == [2, 3]


def test_the_error_of_a_transform_stops_a_run_that_skips(photo, make_trainer, suite):
    def transform(batch):
        return {**batch, "image": [image.nonsense for image in batch["image"]]}

    train = ShiftSet(spoiled(photo, set()).with_transform(transform), name="train", num_classes=4)
    trainer = make_trainer(suite=dataclasses.replace(suite, train=train), on_bad_image="skip", dataloader_num_workers=1)
    with pytest.raises(AttributeError, match="nonsense"):
        trainer.train()


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "GIF"])
def test_truncated_files(photo, form):
    """Not a picture whose lower half is grey."""
    data = encoded(photo, form)
    with pytest.raises(BadImageError):
        read_image(data[: len(data) // 2])


def test_a_bomb_is_refused_by_its_header():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(BadImageError, match=r"an image of 100,000,000 pixels, more than 89,478,485; shrink it"):
            read_image(header_only_png(10_000, 10_000))
        with pytest.raises(BadImageError, match=r"an image of 10,000,000,000 pixels"):
            read_image(header_only_png(100_000, 100_000))
    assert MAX_PIXELS == Image.MAX_IMAGE_PIXELS
    assert read_image(Image.new("L", (5, 5)), max_pixels=25).size == (5, 5)
    with pytest.raises(BadImageError, match="5 x 5 pixels, more than 24"):
        read_image(Image.new("L", (5, 5)), max_pixels=24)


# ---- in a set ----


def spoiled(photo, bad, size=8):
    """A ``datasets.Dataset`` in which some images are damaged."""
    data = encoded(photo, "JPEG")
    images = [{"bytes": data[:200] if index in bad else data, "path": f"{index}.jpg"} for index in range(size)]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    return datasets.Dataset.from_dict({"image": images, "label": [i % 4 for i in range(size)]}, features=features)


def test_a_bad_image_names_set_index_and_file(photo):
    data = ShiftSet(spoiled(photo, {3}), name="far", num_classes=len(CLASSES))
    assert data[2]["label"] == 2
    with pytest.raises(BadImageError, match=r"in set 'far' at index 3 \(file 3\.jpg\), got OSError: Truncated.*skip"):
        data[3]


def test_the_callers_data_set_stays_as_it_is(photo):
    rows = spoiled(photo, set())
    ShiftSet(rows, name="far", num_classes=4)
    assert rows.features["image"].decode


def test_borders_are_cut_off():
    framed = np.full((20, 30, 3), 200, np.uint8)
    framed[2:-2, 2:-2] = 10
    data = ShiftSet([{"image": Image.fromarray(framed), "label": 0}], name="far", num_classes=2, crop_border=2)
    image = np.asarray(data[0]["image"])
    assert image.shape == (16, 26, 3)
    assert (image == 10).all()


def test_the_next_readable_image_stands_in(photo):
    data = ReadSet(ShiftSet(spoiled(photo, {2, 3, 7}), name="far", num_classes=4), skip=True)
    assert [data[index]["label"] for index in range(8)] == [0, 1, 0, 0, 0, 1, 2, 0]
    assert "replaced" not in data[4]
    assert data[2]["replaced"] == [("far", 2), ("far", 3)]
    assert data[7]["replaced"] == [("far", 7)]  # the first comes after the last
    with pytest.raises(BadImageError, match="index 2"):
        ReadSet(data.data, skip=False)[2]
    none = ReadSet(ShiftSet(spoiled(photo, set(range(3)), 3), name="far", num_classes=4), skip=True)
    with pytest.raises(BadImageError, match="in set 'far', got none"):
        none[0]
