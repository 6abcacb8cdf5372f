"""References to images; decoding to validated RGB pictures; the square pixels that most experts read.

Two modes, chosen by `compat`: "fixed" (default) rotates a picture as its EXIF tag says, composites transparency on white and
scales 16-bit greys to 8 bits; "published" reproduces the published MoVA, flaws included.

Shapes: B images, S side of the square, h x w pixels.
"""

import contextlib
import hashlib
import io
import math
import os
import struct
import threading
import time
from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, NoReturn, get_args

import numpy as np
from PIL import ExifTags, Image, ImageOps

from mova_core.io import uris
from mova_core.io.filesystem import ReadError
from mova_core.io.read import read_bytes

if TYPE_CHECKING:  # reading pictures must not cost the seconds that torch takes to start
    from torch import Tensor

PreprocessingMode = Literal["fixed", "published"]
Colour = tuple[int, int, int]

MAX_PIXELS = 100_000_000
MAX_SIDE = 30_000  # padding to a square costs the square of the longer side
STRIP_PIXELS = 16_000_000  # padded pixels in memory at once; a picture with more is resized in strips

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

# Formats that Pillow decodes by itself. Of the others, EPS and WMF start other programs, and TGA accepts any bytes.
FORMATS = ("JPEG", "PNG", "GIF", "BMP", "PPM", "WEBP", "TIFF", "JPEG2000", "ICO", "AVIF")
SUFFIXES = frozenset((  # of these formats, in lower case
    ".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".apng", ".gif", ".bmp", ".dib", ".ppm", ".pgm", ".pbm", ".pnm",
    ".webp", ".tif", ".tiff", ".jp2", ".j2k", ".jpc", ".jpf", ".jpx", ".j2c", ".ico", ".avif", ".avifs",
))  # fmt: skip

_PNG = b"\x89PNG\r\n\x1a\n"
_PNG_DEPTH_AT = 24  # the byte that holds the bits per channel


class ImageError(ValueError):
    """An image that cannot be used; the message is one line that names the image and says what is wrong."""


class ImageUnavailable(ImageError):
    """An image whose bytes cannot be read now, or have changed: the storage or the network may deliver them later."""


class ImageRef:
    """An encoded image in a file or in memory, identified by the SHA-256 of its bytes. Read-only and usable by any thread.

    A reference to a path reads the path anew on every `read` and `decode`, so that a million references cost little memory.
    `loaded` keeps the encoded bytes; `DecodedImage` keeps the decoded picture, too. All three pickle as path and key.

    Args:
        path: a locator (see `mova_core.io.uris`): a file, a URL, a member of a tar, a cell of a Parquet file.
        data: the encoded bytes, in place of a path.
        key: the SHA-256 of the encoded bytes in hex where known; otherwise computed when first needed.

    Raises:
        ImageError: neither path nor data given.
    """

    __slots__ = ("_data", "_key", "_path", "_verified")

    def __init__(
        self, path: str | os.PathLike[str] | None = None, data: bytes | None = None, key: str | None = None
    ) -> None:
        if path is None and data is None:
            raise ImageError("an image reference needs a path or the encoded bytes")
        self._path = None if path is None else os.fspath(path)
        self._data = None if data is None else bytes(data)
        self._key = key
        self._verified = False  # whether _data is known to have the SHA-256 _key

    @classmethod
    def of(cls, source: "str | os.PathLike[str] | bytes | ImageRef") -> "ImageRef":
        """A reference to a path or to encoded bytes; a reference is returned unchanged.

        Raises:
            ImageError: `source` is a decoded image, which has no encoded bytes.
        """
        if isinstance(source, ImageRef):
            return source
        if isinstance(source, (bytes, bytearray, memoryview)):
            return ImageRef(data=bytes(source))
        if isinstance(source, (str, os.PathLike)):
            return ImageRef(path=source)
        raise ImageError(f"{_label(source)}: an image reference needs a path or encoded bytes")

    @property
    def path(self) -> str | None:
        """Locator of the image, or None."""
        return self._path

    @property
    def data(self) -> bytes | None:
        """Encoded bytes where the reference carries them, or None."""
        return self._data

    @property
    def key(self) -> str:
        """SHA-256 of the encoded bytes in hex. Raises ImageError if the bytes must be read for it and cannot be."""
        if self._key is None:
            self.read()
        assert self._key is not None
        return self._key

    def read(self) -> bytes:
        """The encoded bytes.

        Raises:
            ImageError: the bytes cannot be read, or their SHA-256 is no longer `key`.
        """
        if self._verified:
            assert self._data is not None
            return self._data
        data = self._unverified()
        key = hashlib.sha256(data).hexdigest()
        if (
            self._key not in (None, key) and self._data is None
        ):  # this machine may have cached the bytes of an earlier run
            data = read_image(self._path or "", newer_than=time.time())
            key = hashlib.sha256(data).hexdigest()
        if self._key is None:
            self._key = key
        elif self._key != key:  # else features of the new pixels would be stored under the old picture's key
            change = f"sha256 {self._key[:12]} -> {key[:12]}"
            raise ImageUnavailable(f"{_label(self)}: its content changed since it was listed ({change})")
        self._verified = self._data is not None
        return data

    def loaded(self) -> "ImageRef":
        """This image with its encoded bytes in memory: read once, hashed once.

        `key`, `read` and `decode` of the returned reference touch neither disk nor network. It holds the encoded bytes
        (0.1 to 10 MB for most pictures) until it is dropped: keep it for one request or one sample, not in a data set.

        Raises:
            ImageError: as `read`.
        """
        data = self.read()
        if self._verified:
            return self
        loaded = ImageRef(path=self._path, data=data, key=self._key)
        loaded._verified = True
        return loaded

    def _unverified(self) -> bytes:
        """The encoded bytes, whatever their SHA-256."""
        return self._data if self._data is not None else read_image(self._path or "")

    def decode(self, compat: PreprocessingMode = "fixed") -> Image.Image:
        """The RGB picture, as `load_image` returns it."""
        return load_image(self, compat)

    def __reduce__(self) -> tuple[Any, ...]:
        # Absolute, because another process may have another current folder.
        path = self._path if self._path is None else uris.absolute(self._path)
        return ImageRef, (path, self._data if path is None else None, self._key)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({_label(self)!r}, key={self._key[:12] if self._key else None!r})"


class DecodedImage(ImageRef):
    """An image for several readers: read, hashed and decoded once, its pixels computed once per way of preprocessing.

    Stands wherever an `ImageRef` or a decoded image does: in `FeatureSource.fetch`, `Question`, `preprocess` of an expert.
    It holds the encoded bytes, the decoded picture (3 bytes a pixel) and the pixels computed by each `preprocess` (12 bytes
    a pixel of the square) until it is dropped: keep it for one request. Pass `image.decode(compat)` to a `preprocess` whose
    pixels nobody else needs. Any thread may use it; threads that want the same image wait for the first of them. It pickles
    as a plain `ImageRef`.

    Args:
        source: anything that `load_image` takes. Decoded images and arrays have no encoded bytes: `key` and `read` raise
            ImageError for them.
    """

    __slots__ = ("_cached", "_lock", "_picture")

    def __init__(self, source: "ImageSource") -> None:
        self._lock = threading.RLock()
        self._cached: dict[Hashable, Any] = {}
        self._picture: Image.Image | np.ndarray | None = None
        if isinstance(source, (Image.Image, np.ndarray)):
            self._picture = source
            self._path = self._data = self._key = None
            self._verified = False
        else:
            reference = ImageRef.of(source)
            super().__init__(reference._path, reference._data, reference._key)
            self._verified = reference._verified

    @classmethod
    def of(cls, source: "ImageSource") -> "DecodedImage":
        """`source` as a DecodedImage; a DecodedImage is returned unchanged."""
        return source if isinstance(source, DecodedImage) else cls(source)

    def read(self) -> bytes:
        """See `ImageRef.read`; the bytes stay in memory."""
        if self._picture is not None:
            raise ImageError(f"{_label(self)}: a decoded image has no encoded bytes")
        with self._lock:
            data = super().read()
            self._data, self._verified = data, True
            return data

    def loaded(self) -> "ImageRef":
        """See `ImageRef.loaded`: this image itself."""
        self.read()
        return self

    def decode(self, compat: PreprocessingMode = "fixed") -> Image.Image:
        """The RGB picture, as `load_image` returns it: the same object on every call, not to be changed."""
        return self.cached(("decoded", compat), partial(self._decode, compat))

    def _decode(self, compat: PreprocessingMode) -> Image.Image:
        if self._picture is not None:
            return load_image(self._picture, compat)
        return _decode(_label(self), self.read(), compat, MAX_PIXELS)

    def cached(self, name: Hashable, compute: Callable[[], Any]) -> Any:
        """What `compute` returned when it was first called under this name."""
        with self._lock:
            if name not in self._cached:
                self._cached[name] = compute()
            return self._cached[name]

    def __reduce__(self) -> tuple[Any, ...]:
        if self._picture is not None:
            return DecodedImage, (self._picture,)
        return super().__reduce__()


ImageSource = Image.Image | bytes | str | os.PathLike[str] | np.ndarray | ImageRef | DecodedImage


def read_image(locator: str, newer_than: float = 0.0) -> bytes:
    """The encoded bytes of an image, whatever they hold.

    Args:
        locator: see `mova_core.io.uris`.
        newer_than: seconds since 1970; bytes that this machine fetched earlier are fetched again.

    Raises:
        ImageUnavailable: the bytes cannot be read.
    """
    try:
        return read_bytes(locator, newer_than)
    except ReadError as error:
        raise ImageUnavailable(f"{locator}: {error}") from error


def load_image(source: ImageSource, compat: PreprocessingMode = "fixed", max_pixels: int = MAX_PIXELS) -> Image.Image:
    """A validated RGB picture; of an animation the first frame.

    Args:
        source: path, encoded bytes, reference, PIL image, `DecodedImage`, or uint8 array (h, w, 3) or (h, w).
        compat: "fixed" applies EXIF orientation, composites transparency on white and scales 16-bit greys to 8;
            "published" is PIL's plain conversion to RGB.
        max_pixels: limit on width x height, checked against the header before decoding; a `DecodedImage` has `MAX_PIXELS`.

    Raises:
        ImageError: not readable, empty, not an image, truncated, over the limit, or pixels without an agreed range.
        ValueError: `compat` is neither mode.
    """
    if compat not in get_args(PreprocessingMode):
        raise ValueError(f"compat must be one of {', '.join(get_args(PreprocessingMode))}, not {compat!r}")
    if isinstance(source, DecodedImage):
        return source.decode(compat)
    name = _label(source)
    if isinstance(source, Image.Image):
        return _converted(name, source, compat, max_pixels)
    if isinstance(source, np.ndarray):
        if source.dtype != np.uint8 or not (source.ndim == 2 or (source.ndim == 3 and source.shape[2] == 3)):
            raise ImageError(f"{name}: an array must be uint8 of shape (h, w, 3) or (h, w)")
        _check_size(name, (source.shape[1], source.shape[0]), max_pixels)
        return Image.fromarray(source).convert("RGB")
    # A reference promises that its pixels are those of its key; paths and bytes need no hash.
    data = source.read() if isinstance(source, ImageRef) else ImageRef.of(source)._unverified()
    return _decode(name, data, compat, max_pixels)


def _decode(name: str, data: bytes, compat: PreprocessingMode, max_pixels: int) -> Image.Image:
    """The RGB picture of encoded bytes; see `load_image`."""
    if not data:
        raise ImageError(f"{name}: 0 bytes")
    try:
        return _converted(name, _opened(name, data, max_pixels), compat, max_pixels)
    except ImageError as error:
        if not data.startswith(_PNG) or not isinstance(error.__cause__, ValueError):
            raise
        bare = _without_text(data)  # Pillow refuses a sound PNG with more than 1 MB of it
        if len(bare) == len(data):
            raise
    return _converted(name, _opened(name, bare, max_pixels), compat, max_pixels)


def _opened(name: str, data: bytes, max_pixels: int) -> Image.Image:
    """The image of encoded bytes, of which Pillow has read the header only."""
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.UnidentifiedImageError:
        raise ImageError(f"{name}: not an image in a known format ({', '.join(FORMATS)})") from None
    except Image.DecompressionBombError:  # from twice Image.MAX_IMAGE_PIXELS, 179 million
        raise ImageError(f"{name}: over the limit of {max_pixels:,} pixels") from None
    except Exception as error:  # parsers of broken headers raise errors of many types
        _unreadable(name, error)
    transparent = image.info.get("transparency")
    if image.format == "PNG" and isinstance(transparent, (int, tuple)) and image.mode in ("L", "RGB"):
        # Pillow scales the pixels to 8 bits and leaves the transparent colour in the bits of the file.
        factor = {2: 85.0, 4: 17.0, 16: 1 / 256}.get(data[_PNG_DEPTH_AT], 1.0)
        values = transparent if isinstance(transparent, tuple) else (transparent,)
        scaled = tuple(int(value * factor) for value in values)
        image.info["transparency"] = scaled if isinstance(transparent, tuple) else scaled[0]
    return image


def _without_text(png: bytes) -> bytes:
    """A PNG without its texts and its colour profile, which its pixels do not need."""
    chunks, start = [png[: len(_PNG)]], len(_PNG)
    while start + 8 <= len(png):
        length, kind = struct.unpack_from(">I4s", png, start)
        if kind not in (b"tEXt", b"zTXt", b"iTXt", b"iCCP"):
            chunks.append(png[start : start + 12 + length])
        start += 12 + length
    return b"".join(chunks)


def _converted(name: str, image: Image.Image, compat: PreprocessingMode, max_pixels: int) -> Image.Image:
    """An image of any mode, its pixels perhaps not decoded yet, as RGB; see `load_image`."""
    _check_size(name, image.size, max_pixels)
    try:
        return image.convert("RGB") if compat == "published" else _to_rgb(name, image)
    except ImageError:
        raise
    except Exception as error:  # as above
        _unreadable(name, error)


def pad_to_square(image: Image.Image, colour: Colour) -> Image.Image:
    """The image centred on a square of its longer side; the odd pixel of padding goes to the right or below."""
    width, height = image.size
    if width == height:
        return image
    side = max(width, height)
    square = Image.new("RGB", (side, side), colour)
    square.paste(image, ((side - width) // 2, (side - height) // 2))
    return square


def mean_colour(mean: Sequence[float]) -> Colour:
    """The 8-bit colour of a mean in 0..1, with which pictures are padded; rounded down as in the published code."""
    red, green, blue = (int(channel * 255) for channel in mean)
    return red, green, blue


def clip_pixels(images: Sequence[ImageSource], side: int, compat: PreprocessingMode = "fixed") -> "Tensor":
    """`square_pixels` with CLIP's mean and standard deviation, for CLIP, Vary, Co-DETR, BiomedCLIP and SAM."""
    return square_pixels(images, side, CLIP_MEAN, CLIP_STD, compat)


def square_pixels(
    images: Sequence[ImageSource],
    side: int,
    mean: Sequence[float],
    std: Sequence[float],
    compat: PreprocessingMode = "fixed",
) -> "Tensor":
    """Pictures padded to a square with the mean colour, resized by PIL bicubic, scaled to 0..1 and normalised.

    Bit for bit the pixels of the published path (transformers 4.37.2's CLIPImageProcessor after expand2square).

    Args:
        images: B images, encoded or decoded.
        side: S.
        mean, std: per channel, of pixels in 0..1.

    Returns:
        (B, 3, S, S) float32.

    Raises:
        ImageError: an image cannot be used; with "published" also a picture of one pixel.
    """
    pixels_B3SS = np.empty((len(images), 3, side, side), dtype=np.float32)
    for source, pixels_3SS in zip(images, pixels_B3SS, strict=True):
        if isinstance(source, DecodedImage):
            make = partial(square_pixels, [source.decode(compat)], side, mean, std, compat)
            pixels_3SS[:] = source.cached((side, *mean, *std, compat), make)[0]
            continue
        image = load_image(source, compat)
        if compat == "published" and max(image.size) in (1, 3):
            image = _published_axes(_label(source), pad_to_square(image, mean_colour(mean)))
        square = _square_resized(image, side, mean_colour(mean))
        for channel in range(3):
            # In place and in float32: for each of the 256 values, x / 255 rounds like the published float64 x * (1 / 255).
            values = np.asarray(square.getchannel(channel))
            np.divide(values, np.float32(255), out=pixels_3SS[channel], dtype=np.float32)
            pixels_3SS[channel] -= np.float32(mean[channel])
            pixels_3SS[channel] /= np.float32(std[channel])
    import torch

    return torch.from_numpy(pixels_B3SS)


def _square_resized(image: Image.Image, side: int, colour: Colour) -> Image.Image:
    """`pad_to_square` and bicubic resize to `side`, bit for bit, without storing or filtering most of the padding.

    PIL resizes along the rows first, then along the columns: the first pass needs padding at the left and right only.
    """
    width, height = image.size
    longer = max(width, height)
    if width == height:
        return image.resize((side, side), Image.Resampling.BICUBIC)
    if width == longer:
        (start, stop), (top, bottom) = _touched(height, longer, side)
        rows = Image.new("RGB", (side, stop - start), colour)
        rows.paste(image.resize((side, height), Image.Resampling.BICUBIC), (0, (longer - height) // 2 - start))
        corner = (0, top)
        middle = rows.resize((side, bottom - top), Image.Resampling.BICUBIC)
    else:
        (start, stop), (left, right) = _touched(width, longer, side)
        rows = Image.new("RGB", (right - left, height))
        step = max(1, STRIP_PIXELS // (stop - start))
        for top in range(0, height, step):
            strip = Image.new("RGB", (stop - start, min(step, height - top)), colour)
            strip.paste(image, ((longer - width) // 2 - start, -top))  # paste crops to the strip
            rows.paste(strip.resize((right - left, strip.height), Image.Resampling.BICUBIC), (0, top))
        corner = (left, 0)
        middle = rows.resize((right - left, side), Image.Resampling.BICUBIC)
    if middle.size == (side, side):
        return middle
    square = Image.new("RGB", (side, side), colour)
    square.paste(middle, corner)
    return square


def _touched(shorter: int, longer: int, side: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """The part of a resized line that depends on the picture, the rest being padding of one colour.

    `longer` pixels, of which the `shorter` in the middle are picture, are resized to `side` pixels. The cut lies where a
    pixel border before the resize meets one after, else PIL's filters would be centred elsewhere.

    Returns:
        (start, stop) before the resize, (start, stop) after.
    """
    cuts = math.gcd(longer, side)
    # Checked for sides 128, 168, 672 and 1024 with every length up to 12,000 and every thousandth up to 30,000: with 8 or
    # more possible cuts PIL's integer filters of the part equal those of the whole line.
    if cuts < 8:
        return (0, longer), (0, side)
    offset = (longer - shorter) // 2
    reach = 4 * (longer // side + 2)  # over twice the support of a bicubic filter, so that none is cut short
    first = max(0, (offset - reach) * cuts // longer)
    last = min(cuts, -(-(offset + shorter + reach) * cuts // longer))
    before, after = longer // cuts, side // cuts
    return (first * before, last * before), (first * after, last * after)


def _published_axes(name: str, square: Image.Image) -> Image.Image:
    """The published flaw on squares with sides of 1 or 3 pixels: their rows are taken for colour channels."""
    if square.width == 1:
        raise ImageError(f"{name}: the published path cannot read a picture of one pixel; the default one can")
    return Image.fromarray(np.ascontiguousarray(np.asarray(square).transpose(1, 2, 0)))


def _to_rgb(name: str, image: Image.Image) -> Image.Image:
    """The conversion of mode "fixed"; decodes the pixels if Pillow has read the header only."""
    image.load()
    with contextlib.suppress(SyntaxError, ValueError, TypeError, KeyError, IndexError, struct.error):  # broken EXIF
        if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
            image = ImageOps.exif_transpose(image)
    if image.mode == "RGB" and not image.has_transparency_data:
        return image
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise ImageError(f"{name}: {image.mode} pixels beyond 16 bits have no agreed range; convert to 8 bits")
        greys = np.round(values / 257).astype(np.uint8)
        greys[values == image.info.get("transparency", -1)] = 255  # transparent ones become white
        return Image.fromarray(greys).convert("RGB")
    if image.mode == "F":
        raise ImageError(f"{name}: floating-point pixels have no agreed range; convert to 8 bits")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGB", image.size, (255, 255, 255))
        white.paste(image, mask=image.getchannel("A"))
        return white
    return image.convert("RGB")


def _unreadable(name: str, error: Exception) -> NoReturn:
    detail = " ".join(str(error).split()) or type(error).__name__
    raise ImageError(f"{name}: broken image ({detail})") from error


def _check_size(name: str, size: tuple[int, int], max_pixels: int) -> None:
    width, height = size
    if not width or not height:
        raise ImageError(f"{name}: {width}x{height} has no pixels")
    if width * height > max_pixels:
        raise ImageError(f"{name}: {width}x{height} is over the limit of {max_pixels:,} pixels")
    if max(size) > MAX_SIDE:
        raise ImageError(f"{name}: {width}x{height} has a side over the limit of {MAX_SIDE:,} pixels")


def _label(source: object) -> str:
    """The name of an image in error messages."""
    if isinstance(source, DecodedImage) and source._picture is not None:
        return _label(source._picture)
    if isinstance(source, ImageRef):
        return source.path or f"image of {len(source.data or b''):,} bytes"
    if isinstance(source, (str, os.PathLike)):
        return os.fspath(source)
    if isinstance(source, (bytes, bytearray, memoryview)):
        return f"image of {len(source):,} bytes"
    if isinstance(source, np.ndarray):
        return f"array {source.shape} {source.dtype}"
    return f"PIL image {source.size}" if isinstance(source, Image.Image) else type(source).__name__
