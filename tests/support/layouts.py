"""Small local copies in the layouts of the Hub: parquet, webdataset tars, folders of images.

An image is 12 x 10 pixels of one colour, which says what it is: red is the class, green the row. A pixel in the corner
tells the images of a folder and split from those of others.
"""

from __future__ import annotations

import io
import struct
import tarfile
import zlib

import datasets
import numpy as np
from PIL import Image


def picture(label, row, form="PNG", of=""):
    pixels = np.zeros((10, 12, 3), np.uint8)
    pixels[:] = (label % 256, row % 256, label // 256)
    pixels[-1, -1] = zlib.crc32(of.encode()) % 256
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, form, **({"lossless": True} if form == "WEBP" else {}))
    return buffer.getvalue()


def empty_png(width, height, depth=8, kind=2):
    """A PNG of some bytes that claims a size; decoded, a large one would fill the memory."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def tars(folder, labels, *, files=1, image="jpg", column="cls", names=None, per_label=None):
    """``<folder>/<n>.tar`` with ``nshards.txt`` beside them, as the clip-benchmark repositories have them."""
    folder.mkdir(parents=True)
    (folder / "nshards.txt").write_text(str(files))
    form = {"jpg": "PNG", "webp": "WEBP", "png": "PNG"}[image]
    for file, rows in enumerate(np.array_split(np.arange(len(labels)), files)):
        with tarfile.open(folder / f"{file}.tar", "w") as archive:
            for row in rows.tolist():
                text = str(labels[row]) if names is None else names[labels[row]]
                for suffix, data in (
                    (image, picture(int(labels[row]), row, form, folder.name)),
                    (column, text.encode()),
                ):
                    entry = tarfile.TarInfo(f"s{row:07d}.{suffix}")
                    entry.size = len(data)
                    archive.addfile(entry, io.BytesIO(data))


def table(folder, split, labels, features, *, files=1, image="image", **columns):
    """``<folder>/data/<split>-*.parquet`` with an image that says its label and row, and any other columns."""
    (folder / "data").mkdir(parents=True, exist_ok=True)
    kinds = datasets.Features({image: datasets.Image(), **features})
    label = next(name for name in features if name not in columns)
    for file, rows in enumerate(np.array_split(np.arange(len(labels)), files)):
        images = [
            {"bytes": picture(int(labels[row]), row, of=f"{folder.name} {split}"), "path": f"{row}.png"}
            for row in rows.tolist()
        ]
        values = {image: images, label: [int(labels[row]) for row in rows]}
        values |= {name: [column[row] for row in rows.tolist()] for name, column in columns.items()}
        made = datasets.Dataset.from_dict(values, features=kinds)
        made.to_parquet(folder / "data" / f"{split}-{file:05d}-of-{files:05d}.parquet")


def parquet(folder, split, labels, *, files=1, feature=None):
    """The same with a label alone, as ILSVRC/imagenet-1k has them."""
    table(folder, split, labels, {"label": feature or datasets.Value("int64")}, files=files)


def folders(folder, labels, names):
    """``<folder>/<name of the class>/<row>.png``."""
    for row, label in enumerate(labels):
        place = folder / names[label]
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{row}.png").write_bytes(picture(int(label), row, of=folder.name))


def put(root, *names):
    """Images of these names, and of class 0, below a folder."""
    for row, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(0, row, of=name))


def content(data, indices=None):
    """Pairs of (label, label as the image says it, row as the image says it) of a set, or of all rows of a stream."""
    if hasattr(data, "share"):
        items = [data.decode(item, "x") for _, item in data.share(0, 1)]
    else:
        items = [data[index] for index in (range(len(data)) if indices is None else indices)]
    result = []
    for item in items:
        red, green, blue = item["image"].getpixel((5, 5))
        result.append((item["label"], red + 256 * blue, green))
    return result
