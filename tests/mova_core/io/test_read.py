"""The bytes that a locator addresses, and that remote bytes are fetched once per machine."""

import base64
import contextlib
import io
import os
import socket
import subprocess
import sys
import tarfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mova_core.images import ImageError, ImageRef, ImageUnavailable, read_image
from mova_core.io import read
from mova_core.io.filesystem import ReadError, read_file
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

    def test_threads_wait_for_their_own_row_group_only(self, tmp_path, table, monkeypatch):
        """A lock for all cells of a process made four threads on four files take four times as long."""
        for name in "abcd":
            pq.write_table(table, tmp_path / f"{name}.parquet")
        together, decoded = threading.Barrier(4, timeout=20), []
        read_row_group = pq.ParquetFile.read_row_group

        def counting(parquet, group, **options):
            together.wait()  # no thread goes on before all four files are being decoded
            decoded.append(group)
            return read_row_group(parquet, group, **options)

        monkeypatch.setattr(pq.ParquetFile, "read_row_group", counting)
        rows = [(name, row) for row in range(4) for name in "abcd"]
        cells = [str(Cell(str(tmp_path / f"{name}.parquet"), "image", 0, row)) for name, row in rows]
        with ThreadPoolExecutor(8) as threads:
            assert list(threads.map(read_image, cells)) == [encoded(row) for _, row in rows]
        assert len(decoded) == 4, "two threads on each file, and one of them decodes"
        assert not read._locks

    def test_a_remote_row_group_is_fetched_once(self, table, web):
        pq.write_table(table, web.folder / "x.parquet", row_group_size=3)
        cells = [str(Cell(f"{web.url}/x.parquet", "image", 0, row)) for row in range(3)]
        assert [read_image(cell) for cell in cells] == [*map(encoded, range(3))]
        fetched = web.gets["/x.parquet"]
        read._open_column.cache_clear()  # another process starts with an empty cache
        assert read_image(cells[2]) == encoded(2) and web.gets["/x.parquet"] == fetched > 0

    def test_items_of_lists_and_text(self, tmp_path):
        struct = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        rows = [[{"bytes": encoded(0), "path": None}, {"bytes": encoded(1), "path": None}], None, []]
        texts = [
            base64.b64encode(encoded(2)).decode(),
            "data:image/png;base64," + base64.b64encode(b"abc").decode(),
            "x",
        ]
        file = tmp_path / "X.PARQUET"
        pq.write_table(pa.table({"images": pa.array(rows, pa.list_(struct)), "text": texts}), file)
        assert [read_image(f"{file}#images[0,0,{item}]") for item in range(2)] == [encoded(0), encoded(1)]
        for item in ("1,0", "2,0", "0,2"):
            with pytest.raises(ImageUnavailable, match="its list is shorter"):
                read_image(f"{file}#images[0,{item}]")
        assert read_image(f"{file}#text[0,0]") == encoded(2) and read_image(f"{file}#text[0,1]") == b"abc"
        with pytest.raises(ImageUnavailable, match="No such file"):
            read_image(f"{file}#text[0,2]")

    @pytest.mark.parametrize(("remote", "cache_gb"), [(False, "10"), (False, "0"), (True, "10")])
    def test_cells_of_a_large_row_group(self, web, remote, cache_gb, monkeypatch):
        """In any order, also those before the last one; no more than a few rows are in memory."""
        monkeypatch.setattr(read, "WHOLE_BYTES", 1000)
        monkeypatch.setenv("MOVA_CACHE_GB", cache_gb)
        cells = [bytes([row]) * 2000 for row in range(40)]
        pq.write_table(pa.table({"image": cells}), web.folder / "x.parquet")
        file = f"{web.url if remote else web.folder}/x.parquet"
        for row in (3, 4, 39, 0, 17, 16):
            assert read_image(f"{file}#image[0,{row}]") == cells[row], row
        with pytest.raises(ImageUnavailable, match=r"its row group has (40 rows|no row 40)"):
            read_image(f"{file}#image[0,40]")
        assert read_image(f"{file}#image[0,2]") == cells[2]

    def test_one_cell_of_a_large_row_group_takes_little_memory(self, tmp_path, monkeypatch):
        """200 MB in one row group, which is one page, took 1,031 MB in each process."""
        monkeypatch.setenv("MOVA_CACHE", str(tmp_path / "cache"))
        rows = [os.urandom(1_000_000) for _ in range(40)]
        pq.write_table(pa.table({"image": pa.array(rows, pa.binary())}), tmp_path / "x.parquet")
        code = (
            "import sys; from mova_core.io.read import read_bytes\n"
            "peak = lambda: next(int(x.split()[1]) for x in open('/proc/self/status') if x.startswith('VmHWM')) // 1024\n"
            "import pyarrow.parquet; before = peak(); read_bytes(sys.argv[1]); print(peak() - before)"
        )
        place = f"{tmp_path}/x.parquet#image[0,30]"
        run = subprocess.run([sys.executable, "-c", code, place], capture_output=True, text=True, check=True)
        assert int(run.stdout) < 60


class TestSpecialFiles:
    """To open one of them may wait for ever, to read it may never end."""

    def test_pipes_sockets_and_devices_are_refused_unopened(self, tmp_path):
        pipe, socket_file = str(tmp_path / "pipe.png"), str(tmp_path / "s.png")
        os.mkfifo(pipe)
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(socket_file)
            for path, kind in ((pipe, "a named pipe"), (socket_file, "a socket"), ("/dev/zero", "a device")):
                for read_it in (read_image, file_version):
                    with pytest.raises((ImageUnavailable, ReadError), match=f"it is {kind}, not a file"):
                        read_it(path)
                with pytest.raises(ReadError, match=f"it is {kind}"):
                    read_file(path)
        os.mkfifo(tmp_path / "x.tar")
        os.mkfifo(tmp_path / "x.parquet")
        for place in ("x.tar#a@0+1", "x.parquet#image[0,0]"):
            with pytest.raises(ImageUnavailable, match="it is a named pipe"):
                read_image(f"{tmp_path}/{place}")


class Dripping(BaseHTTPRequestHandler):
    """Sends a byte now and then, so that no pause is long."""

    protocol_version = "HTTP/1.1"

    def do_HEAD(self):
        self.send_response(200)
        self.send_header("Content-Length", "1000")
        self.end_headers()

    def do_GET(self):
        self.do_HEAD()
        with contextlib.suppress(OSError):
            for _ in range(1000):
                self.wfile.write(b"x")
                time.sleep(0.05)

    def log_message(self, *arguments):
        pass


def test_a_server_that_sends_too_slowly_is_given_up(tmp_path, monkeypatch):
    """Once, not once per attempt."""
    monkeypatch.setenv("MOVA_CACHE", str(tmp_path))
    monkeypatch.setattr(read, "DOWNLOAD_S", 0.4)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Dripping)
    server.daemon_threads = True
    with server:
        threading.Thread(target=partial(server.serve_forever, poll_interval=0.02), daemon=True).start()
        started = time.monotonic()
        with pytest.raises(ImageUnavailable, match="the download took longer than 0 s"):
            read_image(f"http://127.0.0.1:{server.server_port}/a.png")
        assert time.monotonic() - started < 5
        server.shutdown()


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
