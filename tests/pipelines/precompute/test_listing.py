"""Where pictures come from, and the first look at them."""

import io
import json
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
from mova_core.images import read_image
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
    def test_a_broken_one_is_named_and_left_out(self, tmp_path, damage):
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

    def test_a_broken_one_is_named_and_left_out(self, tmp_path):
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
def test_every_image_is_looked_at_once(ray_cluster, tmp_path):
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
def test_what_was_seen_is_not_read_again(ray_cluster, web, tmp_path):
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
