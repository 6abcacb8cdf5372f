"""Pictures of all formats and modes: the right RGB pixels, or one clear error."""

import hashlib
import io
import pickle
import struct
import time
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin

from mova_core import images
from mova_core.images import (
    DecodedImage,
    ImageError,
    ImageRef,
    ImageUnavailable,
    clip_pixels,
    load_image,
    pad_to_square,
)

RED, WHITE = (255, 0, 0), (255, 255, 255)


def encoded(image: Image.Image, form: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.RandomState(seed).randint(0, 256, (height, width, 3), dtype=np.uint8))


def colours(image: Image.Image) -> list[tuple[int, ...]]:
    return [tuple(pixel) for pixel in np.asarray(image).reshape(-1, 3).tolist()]


def png(width: int, height: int, depth: int, kind: int, raw: bytes, *extra: tuple[bytes, bytes]) -> bytes:
    """A PNG of rows as the format packs them."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0)
    chunks = [(b"IHDR", header), *extra, (b"IDAT", zlib.compress(raw)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*one) for one in chunks)


def turned() -> Image.Exif:
    exif = Image.Exif()
    exif[0x112] = 6
    return exif


@pytest.fixture
def picture() -> Image.Image:
    return noise(40, 30)


class TestImageRef:
    def test_key_is_the_digest_of_the_encoded_bytes(self, tmp_path, picture):
        data = encoded(picture)
        (tmp_path / "a.png").write_bytes(data)
        digest = hashlib.sha256(data).hexdigest()
        assert ImageRef(path=tmp_path / "a.png").key == ImageRef(data=data).key == digest
        assert ImageRef(path=tmp_path / "a.png", key=digest).read() == data
        assert ImageRef.of(data).key == ImageRef.of(str(tmp_path / "a.png")).key

    def test_a_relative_path_is_the_same_picture_elsewhere(self, tmp_path, monkeypatch):
        (tmp_path / "a.png").write_bytes(b"abc")
        monkeypatch.chdir(tmp_path)
        pickled = pickle.dumps(ImageRef(path="a.png"))
        monkeypatch.chdir("/")
        assert pickle.loads(pickled).read() == b"abc"

    def test_pickles_small(self, tmp_path):
        (tmp_path / "a.png").write_bytes(encoded(noise(300, 300)))
        ref = ImageRef(path=tmp_path / "a.png")
        key = ref.key
        pickled = pickle.dumps(ref)
        assert len(pickled) < 400
        assert pickle.loads(pickled).key == key and pickle.loads(pickled).path == str(tmp_path / "a.png")
        assert pickle.loads(pickle.dumps(ImageRef(data=b"abc"))).read() == b"abc"

    def test_changed_content_is_refused(self, tmp_path, picture):
        file = tmp_path / "a.png"
        file.write_bytes(encoded(picture))
        ref = ImageRef(path=file)
        assert ref.key
        file.write_bytes(encoded(noise(5, 5)))
        with pytest.raises(ImageError, match="changed since it was listed"):
            ref.decode()

    def test_is_read_only_and_needs_a_source(self, picture):
        with pytest.raises(AttributeError):
            ImageRef(path="a").key = "b"  # type: ignore[misc]
        with pytest.raises(ImageError, match="needs a path or"):
            ImageRef()
        with pytest.raises(ImageError, match="needs a path or"):
            ImageRef.of(picture)


@pytest.fixture
def counted(monkeypatch) -> Counter[str]:
    """How often images were read from their path, hashed and decoded."""
    counts: Counter[str] = Counter()

    def count(owner: object, name: str, what: str) -> None:
        original = getattr(owner, name)

        def counting(*args, **options):
            counts[what] += 1
            return original(*args, **options)

        monkeypatch.setattr(owner, name, counting)

    count(images, "read_image", "read")
    count(hashlib, "sha256", "hashed")
    count(images, "_decode", "decoded")
    return counts


class TestLoaded:
    def test_one_read_and_one_hash(self, tmp_path, picture, counted):
        file = tmp_path / "a.png"
        file.write_bytes(encoded(picture))
        loaded = ImageRef(path=file).loaded()
        file.unlink()
        assert loaded.data == loaded.read() and loaded.loaded() is loaded
        assert np.array_equal(np.asarray(loaded.decode()), np.asarray(picture))
        assert loaded.key == loaded.key and counted == {"read": 1, "hashed": 1, "decoded": 1}
        assert loaded.path == str(file) and len(pickle.dumps(loaded)) < 400, "pickles without the bytes"

    def test_bytes_are_hashed_once(self, picture, counted):
        ref = ImageRef(data=encoded(picture))
        assert ref.loaded() is ref and ref.decode() and ref.key and ref.read()
        assert counted == {"hashed": 1, "decoded": 1}

    def test_changed_or_missing_content_is_refused(self, tmp_path, picture):
        (tmp_path / "a.png").write_bytes(encoded(picture))
        with pytest.raises(ImageUnavailable, match="changed since it was listed"):
            ImageRef(path=tmp_path / "a.png", key="0" * 64).loaded()
        with pytest.raises(ImageUnavailable, match="changed since it was listed"):
            ImageRef(data=encoded(picture), key="0" * 64).loaded()
        with pytest.raises(ImageUnavailable, match="cannot be read"):
            ImageRef(path=tmp_path / "b.png").loaded()


class TestDecodedImage:
    def test_one_read_one_hash_and_one_decoding(self, tmp_path, picture, counted):
        file = tmp_path / "a.png"
        file.write_bytes(encoded(picture))
        shared = DecodedImage(ImageRef(path=file))
        assert isinstance(shared, ImageRef) and DecodedImage.of(shared) is shared is ImageRef.of(shared)
        assert shared.decode() is shared.decode() is load_image(shared)
        assert shared.key == hashlib.sha256(file.read_bytes()).hexdigest()
        assert shared.loaded() is shared and shared.read() == shared.data == file.read_bytes()
        assert np.array_equal(np.asarray(shared.decode()), np.asarray(picture))
        assert shared.decode("published") is not shared.decode()
        del counted["hashed"]  # this test hashes, too
        assert counted == {"read": 1, "decoded": 2}, "one decoding for each way"

    def test_pickles_as_a_reference(self, tmp_path, picture):
        (tmp_path / "a.png").write_bytes(encoded(picture))
        shared = DecodedImage(tmp_path / "a.png")
        shared.decode()
        pickled = pickle.dumps(shared)
        assert len(pickled) < 400 and type(pickle.loads(pickled)) is ImageRef
        assert pickle.loads(pickled).key == shared.key

    def test_a_picture_without_encoded_bytes(self, picture):
        for source in (picture, np.asarray(picture)):
            shared = DecodedImage(source)
            assert np.array_equal(np.asarray(shared.decode()), np.asarray(picture))
            assert np.array_equal(np.asarray(pickle.loads(pickle.dumps(shared)).decode()), np.asarray(picture))
            for ask in (shared.read, shared.loaded, lambda shared=shared: shared.key):
                with pytest.raises(ImageError, match="has no encoded bytes"):
                    ask()

    def test_threads_decode_once(self, picture, counted):
        shared = DecodedImage(encoded(picture))
        with ThreadPoolExecutor(8) as threads:
            decoded = list(threads.map(lambda _: shared.decode(), range(32)))
        assert len({id(image) for image in decoded}) == 1 and counted == {"hashed": 1, "decoded": 1}

    def test_the_same_pixels_are_computed_once(self, picture):
        shared = DecodedImage(encoded(picture))
        first, again = clip_pixels([shared], 32), clip_pixels([shared, shared], 32)
        assert torch.equal(first, clip_pixels([picture], 32)) and torch.equal(again, torch.cat([first, first]))
        computed = shared.cached("name", lambda: "computed")
        assert computed == "computed" == shared.cached("name", lambda: "never called")
        assert not torch.equal(images.square_pixels([shared], 32, (0, 0, 0), (1, 1, 1)), first)
        with pytest.raises(ImageError, match="image of 3 bytes"):
            clip_pixels([DecodedImage(b"abc")], 32)


class TestSources:
    def test_all_sources_give_the_same_pixels(self, tmp_path, picture):
        file = tmp_path / "a.png"
        file.write_bytes(encoded(picture))
        for source in (picture, np.asarray(picture), file, str(file), file.read_bytes(), ImageRef(path=file)):
            assert np.array_equal(np.asarray(load_image(source)), np.asarray(picture))
        grey = np.arange(12, dtype=np.uint8).reshape(3, 4)
        assert np.array_equal(np.asarray(load_image(grey)), np.stack([grey] * 3, axis=-1))

    def test_a_wrong_extension_does_not_matter(self, tmp_path, picture):
        file = tmp_path / "a.jpg"
        file.write_bytes(encoded(picture))
        assert np.array_equal(np.asarray(load_image(file)), np.asarray(picture))

    @pytest.mark.parametrize(
        "array",
        [np.zeros((4, 4, 3)), np.zeros((4, 4, 4), np.uint8), np.zeros((4,), np.uint8), np.zeros((0, 4, 3), np.uint8)],
        ids=["float", "four channels", "flat", "empty"],
    )
    def test_arrays_of_another_kind(self, array):
        with pytest.raises(ImageError, match="array"):
            load_image(array)


class TestModes:
    def test_transparency_is_put_on_white(self):
        half = Image.new("RGBA", (2, 1), (255, 0, 0, 255))
        half.putpixel((1, 0), (0, 255, 0, 0))  # green, hidden
        for source in (
            half,
            half.convert("PA"),
            encoded(half),
            encoded(half, "WEBP", lossless=True),
            encoded(half, "TIFF"),
        ):
            assert colours(load_image(source)) == [RED, WHITE]
        assert colours(load_image(half, "published")) == [RED, (0, 255, 0)]
        grey = Image.new("LA", (1, 1), (0, 0))
        assert load_image(encoded(grey)).getpixel((0, 0)) == WHITE

    def test_transparent_colours_without_alpha_channel(self):
        palette = Image.new("P", (2, 1))
        palette.putpalette([255, 0, 0, 0, 0, 255])
        palette.putpixel((1, 0), 1)
        assert colours(load_image(encoded(palette, transparency=1))) == [RED, WHITE]
        assert list(load_image(encoded(Image.new("RGB", (1, 1), RED), transparency=RED)).getdata()) == [WHITE]

    @pytest.mark.parametrize("depth", [1, 2, 4, 8, 16])
    def test_a_transparent_grey_of_any_depth_becomes_white(self, depth):
        greys = [0, 1, *[0] * 6]
        row = int("".join(f"{grey:0{depth}b}" for grey in greys), 2).to_bytes(depth, "big")
        for transparent, wanted in ((0, [WHITE, (round(255 / (2**depth - 1)),) * 3]), (1, [(0, 0, 0), WHITE])):
            data = png(8, 1, depth, 0, b"\0" + row, (b"tRNS", struct.pack(">H", transparent)))
            assert colours(load_image(data))[:2] == wanted, (depth, transparent)

    def test_a_transparent_colour_of_16_bits_becomes_white(self):
        pixels = np.array([[40000, 1, 2], [40000, 700, 2]], ">u2")
        data = png(2, 1, 16, 2, b"\0" + pixels.tobytes(), (b"tRNS", pixels[0].tobytes()))
        assert colours(load_image(data)) == [WHITE, (40000 >> 8, 700 >> 8, 0)]

    def test_a_png_with_much_text_or_profile(self, picture):
        """Pillow refuses text of more than 1 MB; the pixels do not need it."""
        info = PngImagePlugin.PngInfo()
        for add in (info.add_itxt, info.add_text):
            add("workflow", "x" * 1_200_000, zip=True)
        much = encoded(picture, pnginfo=info, icc_profile=bytes(1_200_000), exif=turned())
        assert np.array_equal(np.asarray(load_image(much)), np.asarray(picture.transpose(Image.Transpose.ROTATE_270)))
        with pytest.raises(ImageError, match="broken image"):
            load_image(much[:-200])

    def test_sixteen_bits_are_scaled(self):
        deep = Image.fromarray(np.array([[0, 257, 32768, 65535]], dtype=np.uint16))
        assert deep.mode == "I;16"
        for source in (deep, encoded(deep), encoded(deep, "TIFF")):
            assert [red for red, _, _ in colours(load_image(source))] == [0, 1, 128, 255]

    @pytest.mark.parametrize("image", [Image.new("F", (2, 2), 0.5), Image.new("I", (2, 2), 1_000_000)], ids=["F", "I"])
    def test_pixels_without_an_agreed_range(self, image):
        with pytest.raises(ImageError, match="no agreed range"):
            load_image(encoded(image, "TIFF"))

    @pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr"])
    def test_other_modes(self, mode, picture):
        image = picture.convert(mode)
        source = encoded(image, "TIFF") if mode in ("CMYK", "YCbCr") else encoded(image)
        assert load_image(source).mode == "RGB"
        assert np.array_equal(np.asarray(load_image(image)), np.asarray(image.convert("RGB")))

    def test_first_frame_of_an_animation(self):
        frames = [Image.new("RGB", (8, 8), colour) for colour in (RED, (0, 0, 255))]
        for form in ("GIF", "WEBP", "PNG"):
            data = encoded(frames[0], form, save_all=True, append_images=frames[1:])
            red, green, blue = colours(load_image(data))[36]
            assert red > 240 and green < 15 and blue < 15

    @pytest.mark.parametrize("orientation", range(1, 9))
    def test_exif_orientation(self, orientation, picture):
        exif = Image.Exif()
        exif[0x0112] = orientation
        data = encoded(picture, exif=exif)
        turned = load_image(data)
        assert turned.size == ((40, 30) if orientation < 5 else (30, 40))
        corner = [(0, 0), (39, 0), (39, 29), (0, 29), (0, 0), (0, 29), (39, 29), (39, 0)][orientation - 1]
        assert turned.getpixel((0, 0)) == picture.getpixel(corner)
        assert np.array_equal(np.asarray(load_image(turned)), np.asarray(turned))  # not rotated twice
        assert load_image(data, "published").size == (40, 30)

    def test_broken_exif_does_not_cost_the_picture(self, picture):
        data = encoded(picture, exif=b"Exif\x00\x00MM\x00*\x00\x00\xff\xff\x01")
        assert np.array_equal(np.asarray(load_image(data)), np.asarray(picture))


class TestBadInput:
    def test_missing_files(self, tmp_path):
        with pytest.raises(ImageError, match=r"gone\.png: cannot be read"):
            load_image(tmp_path / "gone.png")
        with pytest.raises(ImageError, match="cannot be read"):
            load_image(tmp_path)

    def test_zero_bytes(self, tmp_path):
        (tmp_path / "empty.png").touch()
        with pytest.raises(ImageError, match=r"empty\.png: 0 bytes"):
            load_image(tmp_path / "empty.png")

    def test_text_named_png(self, tmp_path):
        (tmp_path / "text.png").write_text("this is no picture")
        with pytest.raises(ImageError, match=r"text\.png: not an image"):
            load_image(tmp_path / "text.png")

    @pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
    def test_truncated(self, form):
        data = encoded(noise(200, 200), form)
        for compat in ("fixed", "published"):
            with pytest.raises(ImageError, match=r"broken image|not an image"):
                load_image(data[: len(data) // 2], compat)

    @pytest.mark.parametrize("side", [12_000, 20_000])
    def test_a_decompression_bomb_is_not_decoded(self, side):
        data = encoded(Image.new("1", (side, side)))
        start = time.perf_counter()
        with pytest.raises(ImageError, match="over the limit of 100,000,000 pixels"):
            load_image(data)
        assert time.perf_counter() - start < 0.1

    def test_a_header_that_claims_too_much(self):
        """A header of 41 bytes that claims 30,000 x 30,000 pixels."""
        header = struct.pack(">4sIIBBBBB", b"IHDR", 30_000, 30_000, 8, 2, 0, 0, 0)
        data = (
            b"\x89PNG\r\n\x1a\n"
            + struct.pack(">I", 13)
            + header
            + struct.pack(">I", zlib.crc32(header))
            + b"\0\0\0\0IDAT"
        )
        for compat in ("fixed", "published"):
            with pytest.raises(ImageError, match="over the limit of 100,000,000 pixels"):
                load_image(data, compat)

    def test_cmyk_of_a_printer(self, picture):
        """Adobe's CMYK JPEG stores inverted inks, which Pillow inverts back; half of such a file is refused."""
        data = encoded(picture.resize((200, 150)).convert("CMYK"), "JPEG", quality=95)
        assert load_image(data).size == (200, 150)
        assert colours(load_image(encoded(Image.new("RGB", (16, 16), RED).convert("CMYK"), "JPEG")))[0][0] > 240
        with pytest.raises(ImageError, match="broken image"):
            load_image(data[: len(data) // 2])

    def test_a_truncated_animation(self):
        frames = [noise(64, 64, seed) for seed in range(3)]
        data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
        assert load_image(data[: len(data) - 50]).size == (64, 64)  # the first frame is whole
        with pytest.raises(ImageError, match=r"broken image|not an image"):
            load_image(data[:1000])

    def test_limits(self, picture):
        with pytest.raises(ImageError, match="40x30 is over the limit of 1,000 pixels"):
            load_image(picture, max_pixels=1000)
        with pytest.raises(ImageError, match="side over the limit"):
            load_image(encoded(Image.new("1", (1, 40_000))))

    def test_unknown_compat(self, picture):
        with pytest.raises(ValueError, match="fixed, published"):
            load_image(picture, "publishd")  # type: ignore[arg-type]

    def test_postscript_is_never_run(self):
        with pytest.raises(ImageError, match="not an image"):
            load_image(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n")


class TestSquarePixels:
    @pytest.mark.parametrize(
        "size", [(640, 480), (480, 640), (48, 64), (20, 20), (1, 129), (257, 1), (3, 7), (168, 100)]
    )
    @pytest.mark.parametrize("strip", [1, 2000, 16_000_000])
    def test_equal_to_padding_first(self, monkeypatch, size, strip):
        monkeypatch.setattr(images, "STRIP_PIXELS", strip)
        image = noise(*size)
        padded = pad_to_square(image, (122, 116, 104)).resize((168, 168), Image.Resampling.BICUBIC)
        assert np.array_equal(np.asarray(images._square_resized(image, 168, (122, 116, 104))), np.asarray(padded))

    @pytest.mark.parametrize("side", [672, 1024])
    @pytest.mark.parametrize("longer", [640, 800, 1024, 1920, 2016])
    def test_most_of_the_padding_is_not_filtered(self, side, longer):
        for shorter in (1, longer // 2 + 1, longer * 3 // 4):
            (start, stop), (top, bottom) = images._touched(shorter, longer, side)
            assert (
                stop - start < min(longer, shorter + longer // 3) and (bottom - top) * longer == (stop - start) * side
            )
            for size in ((longer, shorter), (shorter, longer)):
                image = noise(*size)
                padded = pad_to_square(image, (122, 116, 104)).resize((side, side), Image.Resampling.BICUBIC)
                ours = images._square_resized(image, side, (122, 116, 104))
                assert np.array_equal(np.asarray(ours), np.asarray(padded)), size

    def test_very_long_pictures(self):
        for size in ((20_000, 1), (1, 6_000)):
            pixels = clip_pixels([noise(*size)], 168)
            assert pixels.shape == (1, 3, 168, 168) and bool(torch.isfinite(pixels).all())

    def test_published_flaws_need_the_published_mode(self):
        three = noise(3, 3)
        right, flawed = clip_pixels([three], 32)[0], clip_pixels([three], 32, "published")[0]
        assert not torch.equal(right, flawed)
        as_read = Image.fromarray(np.asarray(three).transpose(1, 2, 0).copy())
        assert torch.equal(flawed, clip_pixels([as_read], 32)[0])
        with pytest.raises(ImageError, match="one pixel"):
            clip_pixels([noise(1, 1)], 32, "published")
        one = clip_pixels([Image.new("RGB", (1, 1), RED)], 32)[0]
        assert bool((one == one[:, :1, :1]).all())

    def test_the_error_names_the_bad_picture(self, picture):
        with pytest.raises(ImageError, match="image of 3 bytes"):
            clip_pixels([picture, b"abc"], 32)
