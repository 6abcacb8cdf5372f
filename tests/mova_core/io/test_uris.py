"""Locators as strings."""

import os

import pytest

from mova_core.io.uris import Cell, Member, absolute, is_url, joined, local_path, parent, parse, scheme


class TestStrings:
    @pytest.mark.parametrize(
        "place",
        [
            Member("s3://b/x.tar", "a#1@2.png", 512, 7),
            Member("/data/A.TAR", "a.png", 512, 7),
            Member("/data/x.tar#1/b#2.tar", "a.png", 512, 7),
            Cell("/data/x.parquet", "image[0,1]", 3, 17),
            Cell("/data/X.Parquet", "images", 3, 17, 2),
            Cell("/data/x.parquet#1/b.parquet", "image", 0, 0),
        ],
    )
    def test_text_parses_back(self, place):
        assert parse(str(place)) == place

    @pytest.mark.parametrize("path", ["/data/a#b.png", "https://h/a.png#here", "/x.tar", "/x.tar#a.png", "x.parquet#3"])
    def test_other_locators_are_whole_files(self, path):
        assert parse(path) == path

    def test_a_member_named_like_a_tar_is_found_by_its_place(self):
        parsed = parse(str(Member("/data/x.tar", "y.tar#z@1+2.png", 512, 7)))
        assert isinstance(parsed, Member) and (parsed.file, parsed.offset, parsed.length) == ("/data/x.tar", 512, 7)

    def test_paths_and_urls(self, tmp_path):
        (tmp_path / "real").mkdir()
        (tmp_path / "link").symlink_to(tmp_path / "real")
        assert absolute(tmp_path / "link" / "a.png") == str(tmp_path / "real" / "a.png")
        assert absolute("a.png") == os.path.join(os.getcwd(), "a.png") and absolute("s3://b/a.png") == "s3://b/a.png"
        assert absolute(f"file://{tmp_path}/a.png") == str(tmp_path / "a.png")
        assert joined("/data", "a/b.png") == "/data/a/b.png" and joined("s3://b/c/", "a.png") == "s3://b/c/a.png"
        assert joined("/data", "https://h/a.png") == "https://h/a.png" and joined("/data", "/a.png") == "/a.png"
        assert parent("s3://b/c/x.json") == "s3://b/c" and is_url("gs://x") and not is_url("/a://b")

    def test_schemes(self):
        assert scheme("S3://b/a.png") == "s3" and scheme("/data/a.png") == "" == scheme("c:/a.png")
        assert local_path("/data/a.png") == local_path("file:///data/a.png") == local_path("local:///data/a.png")
        assert local_path("a.png") == "a.png" and local_path("s3://b/a.png") is None
