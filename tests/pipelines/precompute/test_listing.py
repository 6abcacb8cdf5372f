"""Where pictures come from, and the first look at them."""

import base64
import bz2
import gzip
import io
import json
import lzma
import os
import tarfile
from pathlib import Path
from unittest.mock import ANY

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from mova_core.data import DataError
from mova_core.features import FeatureStore
from mova_core.images import FORMATS, SUFFIXES, ImageUnavailable, read_image
from mova_core.io.uris import Member, parse
from pipelines.precompute.inspect_images import inspect
from pipelines.precompute.listing import find_images, image_table


def encoded(seed: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (20, 30, 3), dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def draw(path: Path, seed: int) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encoded(seed))
    return str(path)


def tar(path: Path, members: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as opened:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            opened.addfile(member, io.BytesIO(content))
    return path


def record(*images: str, **fields) -> dict:
    said = [{"from": "human", "value": "what?"}, {"from": "gpt", "value": "that"}]
    return {"image": list(images), "conversations": said, **fields}


class TestFolders:
    def test_pictures_at_any_depth_sorted(self, tmp_path):
        drawn = [draw(tmp_path / name, seed) for seed, name in enumerate(("a/b/1.png", "a/c.jpg", "z.PNG"))]
        (tmp_path / "notes.txt").write_text("left alone")
        found = find_images(tmp_path)
        assert found["image"].to_pylist() == drawn and found["experts"].null_count == 3
        assert find_images(tmp_path, limit=2)["image"].to_pylist() == drawn[:2]

    def test_every_suffix_of_a_format_that_is_read(self, tmp_path):
        """Pillow's own table names them; capitals count, too."""
        Image.init()
        known = {suffix for suffix, form in Image.registered_extensions().items() if form in FORMATS}
        assert known - SUFFIXES == {".pfm"}, "floating-point pixels have no agreed range"
        assert SUFFIXES - known == {".dib", ".mpo"}, "they hold BMPs and JPEGs"
        names = [f"a{suffix.upper() if number % 2 else suffix}" for number, suffix in enumerate(sorted(SUFFIXES))]
        for name in names:
            (tmp_path / name).write_bytes(b"")
        assert sorted(map(os.path.basename, find_images(tmp_path)["image"].to_pylist())) == sorted(names)

    def test_what_is_no_picture_by_its_name_is_counted(self, tmp_path, capsys):
        draw(tmp_path / "a.png", 1)
        for name in ("b.heic", "c.HEIC", "d", "e.tar.gz"):
            (tmp_path / name).write_bytes(b"")
        assert len(find_images(tmp_path)) == 1
        assert capsys.readouterr().err == (
            f"{tmp_path}: files of no kind that is read, by their names: 2 .heic, 1 .tar.gz, 1 without a suffix\n"
        )

    def test_links_to_folders_are_followed_once(self, tmp_path):
        far, folder = tmp_path / "far", tmp_path / "pictures"
        drawn = [draw(folder / "a.png", 1), draw(folder / "z.png", 2)]
        draw(far / "x.png", 3)
        for name in ("coco", "the-same"):
            (folder / name).symlink_to(far)
        (far / "back").symlink_to(folder)
        (folder / "loop").symlink_to(folder)
        (folder / "broken.png").symlink_to(folder / "nothing.png")
        found = find_images(folder)["image"].to_pylist()
        assert found == [drawn[0], f"{folder}/broken.png", f"{folder}/coco/x.png", drawn[1]]

    def test_a_folder_that_cannot_be_listed_is_named(self, tmp_path, monkeypatch):
        draw(tmp_path / "a.png", 1)
        (tmp_path / "closed").mkdir()
        real = os.scandir

        def scandir(folder):
            if str(folder).endswith("closed"):
                raise PermissionError(13, "Permission denied", folder)
            return real(folder)

        monkeypatch.setattr(os, "scandir", scandir)
        with pytest.raises(DataError, match=r"closed: cannot be read \(Permission denied\)"):
            find_images(tmp_path)
        assert len(find_images(tmp_path, None, "skip")) == 1

    @pytest.mark.parametrize("name", ["a::b", "a#1", "x.tar#1", "50%", "a?b", "data:image"])
    def test_folders_with_odd_names(self, tmp_path, name):
        drawn = draw(tmp_path / name / "a#b::c@1+2.png", 1)
        archive = tar(tmp_path / name / "t" / "x.tar", {"m.tar#n@1+2.png": encoded(2)})
        assert find_images(tmp_path / name / "a#b::c@1+2.png")["image"].to_pylist() == [drawn]
        [member] = find_images(archive)["image"].to_pylist()
        assert read_image(member) == encoded(2) and read_image(drawn) == encoded(1)

    def test_nothing_in_it(self, tmp_path):
        with pytest.raises(DataError, match="holds no picture"):
            find_images(tmp_path)


class TestRecords:
    def test_each_image_once_in_the_order_of_the_records(self, tmp_path):
        path = tmp_path / "data.json"
        path.write_text(json.dumps([record("2.png"), record("1.png", "2.png"), record("3.png")]))
        there = [str(tmp_path / "there" / f"{number}.png") for number in (2, 1, 3)]
        assert find_images(path, tmp_path / "there")["image"].to_pylist() == there
        assert find_images(path, tmp_path / "there", limit=2)["image"].to_pylist() == there[:2]

    @pytest.mark.parametrize(
        ("image", "says"),
        [
            ("data:image/png;base64," + "A" * 200_000, r"is a data URI \(data:image/png;b... of 200,022 characters\)"),
            ("x" * 200_000, "'x{40}'... of 200,000 characters is too long"),
        ],
    )
    def test_what_is_no_path_is_refused_shortly(self, tmp_path, image, says, capsys):
        """200 KB were printed for one record."""
        path = tmp_path / "data.json"
        path.write_text(json.dumps([record("1.png"), record(image)]))
        with pytest.raises(DataError, match=f"record 2.*{says}") as error:
            find_images(path)
        assert len(str(error.value)) < 400
        told: list[str] = []
        assert len(find_images(path, None, "skip", told)) == 1 and len(told) == 1
        assert len(capsys.readouterr().err) < 600

    def test_routed_only_unites_the_labels_of_an_image(self, tmp_path):
        path = tmp_path / "data.jsonl"
        labelled = [
            record("1.png", routing=["sam"]), record("2.png", routing=[]), record("1.png", routing=["deplot", "sam"]),
        ]  # fmt: skip
        path.write_text("\n".join(map(json.dumps, labelled)))
        assert find_images(path, routed_only=True)["experts"].to_pylist() == [["deplot", "sam"], []]
        assert find_images(path)["experts"].to_pylist() == [None, None]
        path.write_text("\n".join(map(json.dumps, [*labelled, record("3.png")])))
        with pytest.raises(DataError, match=r"line 4: it has no routing label: run `mova label` first"):
            find_images(path, routed_only=True)
        skipped: list[str] = []
        assert len(find_images(path, None, "skip", skipped, routed_only=True)) == 2 and len(skipped) == 1
        draw(tmp_path / "1.png", 1)
        with pytest.raises(DataError, match="routing labels"):
            find_images(tmp_path, routed_only=True)


class TestTars:
    def test_pictures_by_folder_glob_and_range(self, tmp_path):
        for number in range(3):
            tar(tmp_path / f"s-{number:03}.tar", {f"{number}/a.png": encoded(number), f"{number}/a.json": b"{}"})
        by_folder = find_images(tmp_path)["image"].to_pylist()
        assert [read_image(place) for place in by_folder] == [*map(encoded, range(3))]
        assert parse(by_folder[1]) == Member(f"{tmp_path}/s-001.tar", "1/a.png", ANY, len(encoded(1)))
        for pattern, wanted in (("*.tar", [0, 1, 2]), ("s-{001..002}.tar", [1, 2]), ("s-00{2,0}.tar", [2, 0])):
            found = find_images(tmp_path / pattern)["image"].to_pylist()
            assert found == [by_folder[number] for number in wanted], pattern
        assert find_images(tmp_path / "s-002.tar")["image"].to_pylist() == by_folder[2:]
        assert find_images(tmp_path, limit=2)["image"].to_pylist() == by_folder[:2]

    @pytest.mark.parametrize("damage", ["cut in a member", "cut in a header", "cut after a member", "garbage", "empty"])
    def test_a_broken_file_is_named_and_left_out(self, tmp_path, damage):
        good = tar(tmp_path / "good.tar", {"a.png": encoded(1)})
        bad = tar(tmp_path / "bad.tar", {"a.png": encoded(2), "b.png": encoded(3)})
        whole = bytearray(bad.read_bytes())
        member = parse(find_images(bad)["image"][1].as_py())
        assert isinstance(member, Member)
        second = member.offset - 512  # its header
        if damage == "garbage":
            whole[second : second + 512] = b"x" * 512
        cuts = {
            "cut in a member": second + 700,
            "cut in a header": second + 100,
            "cut after a member": second,
            "empty": 0,
        }
        bad.write_bytes(whole[: cuts.get(damage, len(whole))])
        with pytest.raises(DataError, match=r"bad\.tar: broken \.tar file \(.*\): download it again"):
            find_images(tmp_path)
        skipped: list[str] = []
        found = find_images(tmp_path, None, "skip", skipped)["image"].to_pylist()
        assert (
            [place.partition("#")[0] for place in found] == [str(good)]
            and len(skipped) == 1
            and "bad.tar" in skipped[0]
        )
        with pytest.raises(DataError, match=r"holds no picture, the first error: .*bad\.tar: broken"):
            find_images(bad, None, "skip")

    def test_capitals(self, tmp_path):
        [place] = find_images(tar(tmp_path / "A.TAR", {"a.PNG": encoded(1)}))["image"].to_pylist()
        assert read_image(place) == encoded(1)

    def test_tars_in_one_file(self, tmp_path):
        """As `cat` makes it; the second one was lost without a word."""
        parts = [tar(tmp_path / f"{number}.tar", {f"{number}.png": encoded(number)}) for number in range(3)]
        whole = b"".join(part.read_bytes() for part in parts)
        joined = tmp_path / "joined.tar"
        joined.write_bytes(whole)
        found = find_images(joined)["image"].to_pylist()
        assert [read_image(place) for place in found] == [*map(encoded, range(3))]
        for end in (parts[0].read_bytes()[:700], b"something else" * 500):
            joined.write_bytes(parts[0].read_bytes() + end)
            with pytest.raises(
                DataError, match=r"joined\.tar: broken \.tar file \(after a whole tar, at byte 10,240: "
            ):
                find_images(joined)
            skipped: list[str] = []
            assert find_images(joined, None, "skip", skipped)["image"].to_pylist() == found[:1] and len(skipped) == 1

    @pytest.mark.parametrize(("suffix", "pack"), [("gz", gzip.compress), ("bz2", bz2.compress), ("xz", lzma.compress)])
    def test_compressed_tars_are_refused_as_such(self, tmp_path, suffix, pack):
        packed = tmp_path / f"x.tar.{suffix}"
        packed.write_bytes(pack(bytes(10240)))
        with pytest.raises(
            DataError, match=r"x\.tar\..* is compressed, so that no member can be read alone: unpack it"
        ):
            find_images(packed)
        with pytest.raises(DataError, match="or unpack the tars"):
            find_images(tmp_path)
        packed.rename(tmp_path / "x.tar")
        with pytest.raises(DataError, match=r"compressed, so that no member can be read alone: unpack it with \w+"):
            find_images(tmp_path)

    def test_a_number_missing_from_a_range(self, tmp_path):
        tar(tmp_path / "1.tar", {"a.png": encoded(1)})
        with pytest.raises(DataError, match=r"2\.tar: there is no such file"):
            find_images(tmp_path / "{1..2}.tar")
        assert len(find_images(tmp_path / "{1..2}.tar", None, "skip")) == 1


class TestParquet:
    IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])

    def noted(self, table: pa.Table, *columns: str) -> pa.Table:
        """As Hugging Face's datasets write it."""
        features = {name: {"_type": "Image"} for name in columns} | {"id": {"dtype": "int64", "_type": "Value"}}
        return table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})

    def test_hugging_face_images(self, tmp_path):
        rows = pa.array([{"bytes": encoded(row), "path": f"{row}.png"} for row in range(5)], self.IMAGE)
        table = pa.table({"id": range(5), "image": rows, "mask": rows})
        for number in range(2):
            pq.write_table(self.noted(table, "image"), tmp_path / f"{number}.parquet", row_group_size=2)
        found = find_images(tmp_path)["image"].to_pylist()
        assert len(found) == 10 and found[3] == f"{tmp_path}/0.parquet#image[1,1]"
        assert [read_image(place) for place in found[:5]] == [*map(encoded, range(5))]
        assert find_images(tmp_path / "1.parquet", column="mask")["image"][4].as_py().endswith("1.parquet#mask[2,0]")
        pq.write_table(self.noted(table, "image", "mask"), tmp_path / "0.parquet")
        with pytest.raises(DataError, match=r"0\.parquet: .* any of the columns image, mask: say which \(--column\)"):
            find_images(tmp_path)
        pq.write_table(table, tmp_path / "0.parquet")
        with pytest.raises(DataError, match="any of the columns image, mask"):
            find_images(tmp_path)
        with pytest.raises(DataError, match="no column 'img': choose one of id, image, mask"):
            find_images(tmp_path, column="img")
        with pytest.raises(DataError, match="'id' holds int64"):
            find_images(tmp_path, column="id")

    def test_names_and_plain_bytes(self, tmp_path):
        only_names = pa.array([{"bytes": None, "path": f"{row}.png"} for row in (2, 1)], self.IMAGE)
        for number, column in enumerate((only_names, pa.array(["2.png", None, "1.png", "https://h/3.png", "2.png"]))):
            pq.write_table(pa.table({"id": range(len(column)), "image": column}), tmp_path / f"{number}.parquet")
        assert find_images(tmp_path)["image"].to_pylist() == [
            f"{tmp_path}/2.png",
            f"{tmp_path}/1.png",
            "https://h/3.png",
        ]
        found = find_images(tmp_path / "*.parquet", "s3://b/there")["image"].to_pylist()
        assert found == ["s3://b/there/2.png", "s3://b/there/1.png", "https://h/3.png"]
        pq.write_table(
            pa.table({"text": ["a"], "jpg": pa.array([encoded(4)], pa.large_binary())}), tmp_path / "b.parquet"
        )
        [place] = find_images(tmp_path / "b.parquet")["image"].to_pylist()
        assert read_image(place) == encoded(4)
        pq.write_table(pa.table({"id": [1]}), tmp_path / "b.parquet")
        with pytest.raises(DataError, match="no column of images, nor of paths: it has id"):
            find_images(tmp_path / "b.parquet")

    def test_lists_of_images_beside_captions(self, tmp_path):
        """The captions were taken for names of files."""
        rows = [[{"bytes": encoded(row), "path": None}] * (row % 3) for row in range(4)] + [None]
        texts = ["what is it", "b.", "c", "Is that a.b?", "e"]
        features = {"images": {"_type": "List", "feature": {"_type": "Image"}}, "text": {"_type": "Value"}}
        plain = [[encoded(row)] * (row % 3) for row in range(5)]
        for name, column in (
            ("a", pa.array(rows, pa.list_(self.IMAGE))),
            ("b", pa.array(plain, pa.list_(pa.binary()))),
        ):
            for note in (json.dumps({"info": {"features": features}}), "{}"):
                table = pa.table({"images": column, "text": texts}).replace_schema_metadata({"huggingface": note})
                pq.write_table(table, tmp_path / f"{name}.parquet", row_group_size=2)
                found = find_images(tmp_path / f"{name}.parquet")["image"].to_pylist()
                wanted = [encoded(row) for row, values in enumerate(column.to_pylist()) for _ in values or ()]
                assert [read_image(place) for place in found] == wanted

    def test_text_is_not_taken_for_names(self, tmp_path):
        pq.write_table(pa.table({"text": ["what is it", "a cat"], "n": [1, 2]}), tmp_path / "a.parquet")
        with pytest.raises(DataError, match=r"no column of images, nor of paths: it has text, n \(--column takes"):
            find_images(tmp_path / "a.parquet")
        assert find_images(tmp_path / "a.parquet", column="text")["image"].to_pylist() == [
            f"{tmp_path}/what is it",
            f"{tmp_path}/a cat",
        ]
        pq.write_table(pa.table({"text": ["what is it", "a cat"], "file": ["1.JPG", "2.avif"]}), tmp_path / "a.parquet")
        assert find_images(tmp_path / "a.parquet")["image"].to_pylist() == [f"{tmp_path}/1.JPG", f"{tmp_path}/2.avif"]

    def test_pictures_as_text(self, tmp_path):
        texts = [
            base64.b64encode(encoded(1)).decode(),
            f"data:image/png;base64,{base64.b64encode(encoded(2)).decode()}",
        ]
        pq.write_table(pa.table({"image": texts, "text": ["what is it", "b"]}), tmp_path / "a.parquet")
        found = find_images(tmp_path)["image"].to_pylist()
        assert found == [f"{tmp_path}/a.parquet#image[0,{row}]" for row in range(2)]
        assert [read_image(place) for place in found] == [encoded(1), encoded(2)]

    @pytest.mark.parametrize(
        "note",
        [
            '{"info": null}',
            "null",
            "[1]",
            "{",
            '{"info": {"features": [3]}}',
            '{"info": {"features": {"image": null}}}',
        ],
    )
    def test_odd_notes(self, tmp_path, note):
        table = pa.table({"image": pa.array([{"bytes": encoded(1), "path": None}], self.IMAGE)})
        pq.write_table(table.replace_schema_metadata({"huggingface": note}), tmp_path / "a.parquet")
        assert len(find_images(tmp_path)) == 1

    def test_bytes_and_paths_in_one_column(self, tmp_path):
        """The paths were looked for beside the Parquet file, whatever --images says."""
        rows = [
            {"bytes": encoded(1), "path": "1.png"},
            {"bytes": None, "path": "2.png"},
            None,
            {"bytes": None, "path": None},
        ]
        pq.write_table(pa.table({"image": pa.array(rows, self.IMAGE)}), tmp_path / "a.parquet", row_group_size=2)
        drawn = draw(tmp_path / "pictures" / "2.png", 2)
        found = find_images(tmp_path / "a.parquet", tmp_path / "pictures")["image"].to_pylist()
        assert found == [f"{tmp_path}/a.parquet#image[0,0]", drawn]
        pq.write_table(pa.table({"image": pa.array(rows, self.IMAGE)}), tmp_path / "a.parquet", write_statistics=False)
        found = find_images(tmp_path / "a.parquet", tmp_path / "pictures")["image"].to_pylist()
        assert found[:2] == [f"{tmp_path}/a.parquet#image[0,0]", drawn]
        for place in found[2:]:
            with pytest.raises(ImageUnavailable, match="the cell is empty"):
                read_image(place)

    def test_a_footer_that_ends_the_process_is_named(self, tmp_path, web):
        """Arrow calls std::terminate for it: exit code 134, and no word of the file."""
        pq.write_table(pa.table({"image": [encoded(1)]}), tmp_path / "a.parquet")
        damaged = (Path(__file__).parent / "damaged_footer.parquet").read_bytes()
        (tmp_path / "b.parquet").write_bytes(damaged)
        with pytest.raises(DataError, match=r"b\.parquet: broken \.parquet file \(reading it ended its process"):
            find_images(tmp_path)
        told: list[str] = []
        assert len(find_images(tmp_path, None, "skip", told)) == 1 and "b.parquet" in told[0]
        (web.folder / "b.parquet").write_bytes(damaged)
        with pytest.raises(DataError, match=r"b\.parquet: broken \.parquet file \(reading it ended its process"):
            find_images(f"{web.url}/b.parquet")

    def test_a_broken_file_is_named_and_left_out(self, tmp_path):
        pq.write_table(pa.table({"image": [encoded(1)]}), tmp_path / "a.parquet")
        (tmp_path / "b.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-9])
        with pytest.raises(DataError, match=r"b\.parquet: broken \.parquet file"):
            find_images(tmp_path)
        assert len(find_images(tmp_path, None, "skip")) == 1


class TestOtherPlaces:
    def test_kinds_are_not_mixed(self, tmp_path):
        draw(tmp_path / "a.png", 1)
        tar(tmp_path / "b.tar", {"a.png": encoded(1)})
        with pytest.raises(DataError, match=r"holds 1 picture files and 1 \.tar files: name those that you mean"):
            find_images(tmp_path)
        assert find_images(tmp_path / "*.png")["image"].to_pylist() == [str(tmp_path / "a.png")]
        assert find_images(tmp_path / "a.png")["image"].to_pylist() == [str(tmp_path / "a.png")]
        for gone, said in (("x.tar", "no data file"), ("x", "no data file"), ("*.jpg", "matches")):
            with pytest.raises(DataError, match=said):
                find_images(tmp_path / gone)

    def test_a_name_that_is_no_text(self, tmp_path):
        draw(tmp_path / "a.png", 1)
        os.rename(tmp_path / "a.png", os.fsencode(tmp_path) + b"/\xff.png")
        draw(tmp_path / "b.png", 1)
        with pytest.raises(DataError, match="its name is not UTF-8"):
            find_images(tmp_path)
        assert find_images(tmp_path, None, "skip")["image"].to_pylist() == [str(tmp_path / "b.png")]

    def test_any_filesystem(self, tmp_path):
        memory = fsspec.filesystem("memory")
        folder = f"memory://{tmp_path.name}"
        tar(tmp_path / "x.tar", {"a.png": encoded(1), "b.png": encoded(2)})
        pq.write_table(pa.table({"image": [encoded(3)]}), tmp_path / "x.parquet")
        for name, content in (
            ("pictures/b/1.png", encoded(5)), ("pictures/a.png", encoded(4)), ("pictures/c.txt", b""),
            ("data.jsonl", json.dumps(record("a.png", "b/1.png")).encode()),
            ("x.tar", (tmp_path / "x.tar").read_bytes()), ("x.parquet", (tmp_path / "x.parquet").read_bytes()),
        ):  # fmt: skip
            memory.pipe_file(f"/{tmp_path.name}/{name}", content)
        for source, images, seeds in (
            (f"{folder}/pictures", None, [4, 5]), (f"{folder}/data.jsonl", f"{folder}/pictures", [4, 5]),
            (f"{folder}/x.tar", None, [1, 2]), (f"{folder}/*.tar", None, [1, 2]), (f"{folder}/x.parquet", None, [3]),
        ):  # fmt: skip
            found = find_images(source, images)["image"].to_pylist()
            assert [read_image(place) for place in found] == [*map(encoded, seeds)], source

    def test_the_web(self, web):
        draw(web.folder / "pictures" / "a" / "1.png", 1)
        draw(web.folder / "pictures" / "2.png", 2)
        tar(web.folder / "x.tar", {f"{seed}.png": encoded(seed) for seed in range(30)})
        (web.folder / "data.json").write_text(json.dumps([record("pictures/2.png")]))
        assert find_images(f"{web.url}/data.json")["image"].to_pylist() == [f"{web.url}/pictures/2.png"]
        found = find_images(f"{web.url}/pictures/")["image"].to_pylist()
        assert found == [f"{web.url}/pictures/2.png", f"{web.url}/pictures/a/1.png"]
        members = find_images(f"{web.url}/x.tar")["image"].to_pylist()
        assert len(members) == 30 and read_image(members[29]) == encoded(29)
        with pytest.raises(DataError, match=r"no data file http.*nothing\.json"):
            find_images(f"{web.url}/nothing.json")
        with pytest.raises(DataError, match=r"no data file http.*nothing\.tar"):
            find_images(f"{web.url}/nothing.tar")
        with pytest.raises(DataError, match="nosuch"):
            find_images("nosuch://data.json")


@pytest.mark.ray
def test_every_image_is_inspected_once(ray_cluster, tmp_path):
    """Equal pictures become one row that needs the experts of all; what cannot be used is told, a picture that is none kept."""
    paths = [draw(tmp_path / f"{index}.png", seed) for index, seed in enumerate((5, 6, 5, 7, 6))]
    bad = tmp_path / "bad.png"
    bad.write_text("no picture")
    gone = str(tmp_path / "gone.png")
    needs = [["sam"], None, ["deplot"], [], ["vary"], ["sam"], ["sam"]]
    images = image_table([*paths, str(bad), gone], needs)
    store = FeatureStore(tmp_path / "store", create=True)
    for _ in range(2):
        found = inspect(images, store, progress=False)
        assert found.readable["image"].to_pylist() == [paths[0], paths[1], paths[3]]
        assert found.readable["experts"].to_pylist() == [["deplot", "sam"], None, []]
        assert [row["path"] for row in found.refused] == [str(bad), gone]
        assert "not an image" in found.refused[0]["reason"] and "cannot be read" in found.refused[1]["reason"]
        kept = {row["image"]: row["sha256"] for row in store.quarantined()}
        assert len(store.quarantined()) == 2 and kept[str(bad)] and kept[gone] is None
    assert len(set(found.readable["key"].to_pylist())) == 3


@pytest.mark.ray
def test_inspected_images_are_not_read_again(ray_cluster, web, tmp_path):
    """Only what is new or changed is fetched; a refusal counts until it is released."""
    for number in range(5):
        draw(web.folder / f"{number}.png", number)
    (web.folder / "bad.png").write_text("no picture")
    web.failures["/4.png"] = 2
    urls = [f"{web.url}/{name}.png" for name in (*range(5), "bad", "gone")]
    store = FeatureStore(tmp_path / "store", create=True)

    def fetched(*wanted: str) -> list[str]:
        """What `inspect` reads of the server."""
        web.gets.clear()
        found = inspect(image_table(wanted or urls), store, progress=False)
        if not wanted:
            assert found.readable["image"].to_pylist() == urls[:5]
            assert [row["path"] for row in found.refused] == urls[5:]
            assert "not an image" in found.refused[0]["reason"] and "No such file" in found.refused[1]["reason"]
        return sorted(path.strip("/") for path in web.gets.elements())

    gone = ["gone.png"]  # asked for by GET, where HEAD says that it is not there
    assert fetched() == sorted(["0.png", "1.png", "2.png", "3.png", *["4.png"] * 3, "bad.png", *gone])
    assert fetched() == gone
    draw(web.folder / "2.png", 7)
    os.utime(web.folder / "2.png", (1, 1))
    assert fetched() == ["2.png", *gone]
    assert len(list((tmp_path / "store" / "listings").iterdir())) == 1
    assert fetched(urls[0]) == [], "and what the other images were is not forgotten"
    assert fetched() == gone
    assert store.release() == 2 and not store.quarantined()
    assert fetched() == ["bad.png", *gone] and len(store.quarantined()) == 2
    for listing in (tmp_path / "store" / "listings").iterdir():
        listing.write_bytes(b"damaged")
    assert len(fetched()) == 6 + len(gone)
