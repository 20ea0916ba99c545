"""A ZIP that is never written down is what other programs expect of one."""

import io
import os
import shutil
import subprocess
import zipfile
import zlib

import pytest

from service import archive
from service.archive import Archive, Entry

SIZES = {"config.json": 10, "model.safetensors": 700_000, "modèle.txt": 0, "tokenizer.json": 3}


@pytest.fixture
def folder(tmp_path):
    for name, size in SIZES.items():
        (tmp_path / name).write_bytes(os.urandom(size))
    return tmp_path


def content_of(source, start=0, stop=None):
    """The bytes of a source, as clients are sent them."""
    found = b""
    for part in source.parts(start, source.length if stop is None else stop):
        if isinstance(part, bytes):
            found += part
            continue
        with part.open() as file:
            found += os.pread(file.fileno(), part.length, part.start)
    return found


def entries(folder):
    return [
        Entry(f"merged/{name}", size, zlib.crc32((folder / name).read_bytes()))
        for name, size in SIZES.items()
    ]


@pytest.mark.parametrize("largest", [archive.MOST, 100, 0])
def test_it_holds_the_files_also_with_sizes_of_64_bits(folder, monkeypatch, largest):
    monkeypatch.setattr(archive, "MOST", largest)
    made = Archive(folder, entries(folder))
    content = content_of(made)
    assert len(content) == made.length
    with zipfile.ZipFile(io.BytesIO(content)) as read:
        assert read.testzip() is None
        assert read.namelist() == [f"merged/{name}" for name in SIZES]
        for name in SIZES:
            assert read.read(f"merged/{name}") == (folder / name).read_bytes()
        assert {info.compress_type for info in read.infolist()} == {zipfile.ZIP_STORED}
        assert {info.external_attr >> 16 for info in read.infolist()} == {0o100644}


@pytest.mark.parametrize("largest", [archive.MOST, 0])
def test_other_programs_unpack_it(folder, monkeypatch, tmp_path_factory, largest):
    unzip = shutil.which("unzip")
    if unzip is None:
        pytest.skip("unzip is not installed")
    monkeypatch.setattr(archive, "MOST", largest)
    path = tmp_path_factory.mktemp("zip") / "it.zip"
    path.write_bytes(content_of(Archive(folder, entries(folder))))
    done = subprocess.run([unzip, "-t", path], capture_output=True, text=True)
    assert "No errors detected" in done.stdout


def test_any_part_of_it_is_the_same_part(folder):
    made = Archive(folder, entries(folder))
    content = content_of(made)
    for start in (0, 1, 30, 39, 60, 200_000, made.length - 30, made.length):
        for stop in (start, start + 1, start + 300_000, made.length):
            assert content_of(made, start, stop) == content[start:stop]


def test_more_than_4_gib_is_laid_out_as_it_should_be(tmp_path):
    """Holes of a file stand for its content: the end of the archive is read, the middle is not."""
    path = tmp_path / "model.safetensors"
    with path.open("wb") as file:
        file.truncate(5 * 2**30)
    (tmp_path / "z.json").write_bytes(b"{}")
    both = [Entry("m/model.safetensors", 5 * 2**30, 123), Entry("m/z.json", 2, zlib.crc32(b"{}"))]
    made = Archive(tmp_path, both)

    class Seekable(io.RawIOBase):
        place = 0

        def readable(self):
            return True

        def seekable(self):
            return True

        def seek(self, offset, whence=0):
            self.place = offset + (0, self.place, made.length)[whence]
            return self.place

        def tell(self):
            return self.place

        def read(self, size=-1):
            stop = made.length if size < 0 else min(self.place + size, made.length)
            content = content_of(made, self.place, stop)
            self.place += len(content)
            return content

    with zipfile.ZipFile(Seekable()) as read:
        assert [info.file_size for info in read.infolist()] == [5 * 2**30, 2]
        assert read.infolist()[1].header_offset > 5 * 2**30
        assert read.read("m/z.json") == b"{}"


def test_a_file_that_has_changed_is_an_error(folder):
    made = Archive(folder, entries(folder))
    (folder / "config.json").write_bytes(b"longer than it was")
    with pytest.raises(OSError, match=r"config\.json has changed"):
        content_of(made)


def test_links_are_not_followed(folder):
    made = Archive(folder, entries(folder))
    (folder / "config.json").unlink()
    (folder / "config.json").symlink_to("/etc/passwd")
    with pytest.raises(OSError, match="symbolic links"):
        content_of(made)
