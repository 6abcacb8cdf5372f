"""The bytes that a locator addresses, and that remote bytes are fetched once per machine."""

import io
import os
import subprocess
import sys
import tarfile
import time

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mova_core.images import ImageError, ImageRef, ImageUnavailable, read_image
from mova_core.io import read
from mova_core.io.read import file_version
from mova_core.io.uris import Cell, Member
from tests.mova_core.io.conftest import encoded


class TestMembersAndCells:
    def test_a_member_of_a_tar(self, tmp_path):
        data, path = encoded(1), tmp_path / "x.tar"
        with tarfile.open(path, "w") as tar:
            for name in ("first.txt", "a.png"):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
        with tarfile.open(path) as tar:
            at = tar.getmember("a.png").offset_data
        image = ImageRef(path=str(Member(str(path), "a.png", at, len(data))))
        assert image.key == ImageRef(data=data).key and image.decode().size == (20, 20)
        os.truncate(path, at + 10)
        with pytest.raises(ImageUnavailable, match=r"x\.tar#a\.png@.*: cannot be read \(10 of"):
            ImageRef(path=str(Member(str(path), "a.png", at, len(data)))).read()
        with pytest.raises(ImageUnavailable, match="over the limit of"):
            ImageRef(path=str(Member(str(path), "a.png", at, 2**30))).read()

    @pytest.fixture
    def table(self):
        rows: list[dict | None] = [{"bytes": encoded(row), "path": f"{row}.png"} for row in range(4)]
        rows += [{"bytes": None, "path": "there.png"}, None]
        kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        return pa.table({"id": range(6), "image": pa.array(rows, kind)})

    def test_neighbours_in_a_parquet_file_are_decoded_once(self, tmp_path, table, monkeypatch):
        pq.write_table(table, tmp_path / "x.parquet", row_group_size=3)
        (tmp_path / "there.png").write_bytes(encoded(9))
        decoded = []
        read_row_group = pq.ParquetFile.read_row_group

        def counting(parquet, group, **options):
            decoded.append(group)
            return read_row_group(parquet, group, **options)

        monkeypatch.setattr(pq.ParquetFile, "read_row_group", counting)
        cells = [str(Cell(str(tmp_path / "x.parquet"), "image", row // 3, row % 3)) for row in range(6)]
        assert [read_image(cell) for cell in cells[:5]] == [*map(encoded, range(4)), encoded(9)]
        assert decoded == [0, 1]
        with pytest.raises(ImageUnavailable, match="the cell is empty"):
            read_image(cells[5])
        for broken, why in (
            ("image[0,7]", "3 rows"),
            ("image[9,0]", "cannot be read"),
            ("other[0,0]", "no column 'other'"),
        ):
            with pytest.raises(ImageUnavailable, match=why):
                read_image(f"{tmp_path}/x.parquet#{broken}")
        pq.write_table(table.slice(1), tmp_path / "x.parquet", row_group_size=3)
        assert read_image(cells[0]) == encoded(1), "the file was replaced"
        (tmp_path / "x.parquet").write_bytes(b"PAR1")
        with pytest.raises(ImageUnavailable, match=r"parquet#image\[0,0\]: cannot be read"):
            read_image(cells[0])

    def test_a_remote_row_group_is_fetched_once(self, table, web):
        pq.write_table(table, web.folder / "x.parquet", row_group_size=3)
        cells = [str(Cell(f"{web.url}/x.parquet", "image", 0, row)) for row in range(3)]
        assert [read_image(cell) for cell in cells] == [*map(encoded, range(3))]
        fetched = web.gets["/x.parquet"]
        read._read_column.cache_clear()  # another process starts with an empty cache
        assert read_image(cells[2]) == encoded(2) and web.gets["/x.parquet"] == fetched > 0


class TestRemote:
    def test_processes_that_want_the_same_fetch_it_once(self, web):
        names = [f"{number}.png" for number in range(20)]
        for number, name in enumerate(names):
            (web.folder / name).write_bytes(encoded(number))
        (web.folder / "x.tar").write_bytes(b"." * 700 + encoded(3) + b"." * 700)
        urls = [f"{web.url}/{name}" for name in names]
        member = str(Member(f"{web.url}/x.tar", "3.png", 700, len(encoded(3))))
        code = "import sys; from mova_core.images import ImageRef; print(*(ImageRef(path=p).key for p in sys.argv[1:]))"
        running = [
            subprocess.Popen([sys.executable, "-c", code, *urls, member], stdout=subprocess.PIPE, text=True)
            for _ in range(3)
        ]
        keys = [ImageRef(data=encoded(number)).key for number in [*range(20), 3]]
        for process in running:
            said, _ = process.communicate(timeout=60)
            assert process.returncode == 0 and said.split() == keys
        assert web.gets == {f"/{name}": 1 for name in [*names, "x.tar"]}
        assert ImageRef(path=urls[0], key=keys[0]).read() == encoded(0)
        assert web.gets["/0.png"] == 1

    def test_changed_content_is_fetched_again_where_the_key_is_known(self, web):
        (web.folder / "a.png").write_bytes(encoded(1))
        url = f"{web.url}/a.png"
        before, version = ImageRef(path=url).key, file_version(url)
        (web.folder / "a.png").write_bytes(encoded(2))
        os.utime(web.folder / "a.png", (1, 1))
        assert file_version(url) != version
        assert ImageRef(path=url).key == before, "without a known key the cached bytes are returned"
        assert ImageRef(path=url, key=ImageRef(data=encoded(2)).key).read() == encoded(2)
        (web.folder / "a.png").write_bytes(encoded(3))
        assert read_image(url, newer_than=time.time() + 1) == encoded(3)
        with pytest.raises(ImageError, match="changed since it was listed"):
            ImageRef(path=url, key=before).read()

    def test_transient_failures_are_retried(self, web):
        (web.folder / "a.png").write_bytes(encoded(1))
        web.failures["/a.png"] = 2
        assert read_image(f"{web.url}/a.png") == encoded(1) and web.gets["/a.png"] == 3
        (web.folder / "b.png").write_bytes(encoded(1))
        web.failures["/b.png"] = 99
        with pytest.raises(ImageUnavailable, match=r"b\.png: cannot be read \(5 attempts failed: HTTP 503"):
            read_image(f"{web.url}/b.png")
        with pytest.raises(ImageUnavailable, match=r"c\.png: cannot be read \(No such file"):
            read_image(f"{web.url}/c.png")
        with pytest.raises(ImageUnavailable, match=r"cannot be read \(5 attempts failed: "):
            read_image("http://127.0.0.1:9/a.png")
        with pytest.raises(ImageUnavailable, match=r"cannot be read \(Protocol not known: nosuch"):
            read_image("nosuch://a.png")

    def test_too_large_files_are_refused_before_the_fetch(self, web, monkeypatch):
        (web.folder / "a.png").write_bytes(encoded(1))
        monkeypatch.setattr(read, "MAX_BYTES", 100)
        for place in (f"{web.url}/a.png", str(web.folder / "a.png")):
            with pytest.raises(ImageUnavailable, match="bytes are over the limit of 100"):
                read_image(place)
        assert not web.gets

    def test_any_filesystem(self):
        with fsspec.open("memory://pictures/a.png", "wb") as file:
            file.write(encoded(1))
        assert ImageRef(path="memory://pictures/a.png").decode().size == (20, 20)
        assert file_version("memory://pictures/a.png")
