"""Source code: repositories found, read in order from folders and archives, licensed, and left out with a reason."""

import io
import random
import tarfile
import zipfile
from pathlib import Path

import pytest
from identify.vendor.licenses import LICENSES

from pipelines.corpus import repositories
from pipelines.corpus.collect import SourceFile, resolve
from pipelines.corpus.records import Page, Refusal
from pipelines.corpus.repositories import Repository, by_repository, is_allowed, licence_of, page_of, read_repository
from pipelines.schema import Source

TEXTS = dict(LICENSES)
MIT = TEXTS["MIT"].replace("[year] [fullname]", "2020 Ada Lovelace")
BODY = b"def area(width, height):\n    return width * height\n"
DETECT = Source(name="mine", path="/", licence="detect")
DECLARED = Source(name="mine", path="/", licence="MIT")
FILES = {
    "z.py": BODY,
    "a/deep/one.py": BODY,
    "a/two.py": BODY,
    "README.md": b"# Areas\n\nOf rectangles.\n",
    "LICENSE": MIT.encode(),
}


def write(root: Path, files: dict[str, bytes]) -> None:
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)


def tarball(path: Path, files: dict[str, bytes], extra: tuple[tarfile.TarInfo, ...] = ()) -> Repository:
    mode = "w:" + {".gz": "gz", ".tgz": "gz", ".bz2": "bz2", ".xz": "xz"}.get(path.suffix, "")
    with tarfile.open(path, mode) as out:
        for name, data in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            out.addfile(entry, io.BytesIO(data))
        for entry in extra:
            out.addfile(entry)
    return archive(path)


def zipped(path: Path, files: dict[str, bytes]) -> Repository:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as out:
        for name, data in files.items():
            out.writestr(name, data)
    return archive(path)


def archive(path: Path) -> Repository:
    return Repository(f"file:{path.name}", (), (SourceFile(path, f"file:{path.name}", path.stat().st_size),))


def paths(found) -> list[str]:
    return [page.meta["path"] for page in found if isinstance(page, Page)]


def refusals(found) -> list[tuple[str, str]]:
    return [(one.url, one.reason) for one in found if isinstance(one, Refusal)]


def one(data: bytes, name: str = "a.py", source: Source = DECLARED) -> Page | Refusal:
    return page_of(f"file:r/{name}", data, "file:r", source, "MIT" if source is DETECT else None)


def reason(data: bytes, name: str = "a.py") -> str:
    refusal = one(data, name)
    assert isinstance(refusal, Refusal), refusal
    assert refusal.url == f"file:r/{name}"
    return refusal.reason


# Repositories


@pytest.mark.parametrize("suffix", [".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".zip", ""])
def test_a_repository_is_read_in_its_order_from_folders_and_from_archives(tmp_path, suffix):
    inside = {f"areas-1.0/{name}": data for name, data in FILES.items()}
    if suffix:
        make = zipped if suffix == ".zip" else tarball
        repository = make(tmp_path / f"areas{suffix}", inside)
    else:
        write(tmp_path, inside)
        (repository,) = by_repository(resolve(Source(name="mine", path=str(tmp_path))))
    found = list(read_repository(repository, DETECT))
    assert paths(found) == ["README.md", "z.py", "a/two.py", "a/deep/one.py"]
    assert {page.licence for page in found if isinstance(page, Page)} == {"MIT"}
    assert {page.meta["repository"] for page in found if isinstance(page, Page)} == {repository.url}
    assert next(page for page in found if isinstance(page, Page) and page.text == BODY.decode()).url == (
        f"{repository.url}/z.py"
    )


def test_files_belong_to_the_nearest_marked_folder_else_to_the_root(tmp_path):
    write(tmp_path, {"loose.py": BODY, "x/y.py": BODY, "one/setup.py": BODY, "one/src/a.py": BODY})
    write(tmp_path, {"one/inner/go.mod": b"module x", "one/inner/b.go": BODY, "two/LICENSE": b"", "two/c.py": BODY})
    write(tmp_path, {"one/vendor/lib/LICENSE": b"", "one/vendor/lib/d.py": BODY, "p.tar.gz": b""})
    (tmp_path / "three/.git").mkdir(parents=True)
    write(tmp_path, {"three/e.py": BODY})
    found = by_repository(resolve(Source(name="mine", path=str(tmp_path), include=("*.py", "*.go", "*.gz"))))
    assert {one.url: [file.url.removeprefix("file:") for file in one.files] for one in found} == {
        "file:": ["loose.py", "x/y.py"],
        "file:one": ["one/setup.py", "one/src/a.py", "one/vendor/lib/d.py"],
        "file:one/inner": ["one/inner/b.go"],
        "file:p.tar.gz": ["p.tar.gz"],
        "file:three": ["three/e.py"],
        "file:two": ["two/c.py"],
    }


def test_an_inner_repository_has_the_licence_of_the_one_around_it(tmp_path):
    write(tmp_path, {"LICENSE": MIT.encode(), "crates/a/Cargo.toml": b"[package]\nname='a'\n", "crates/a/b.rs": BODY})
    (repository,) = by_repository(resolve(Source(name="mine", path=str(tmp_path), include=("*.rs",))))
    (page,) = read_repository(repository, DETECT)
    assert (page.licence, page.url, page.meta["path"]) == ("MIT", "file:crates/a/b.rs", "b.rs")


@pytest.mark.parametrize(("text", "expected"), [("GPL-3.0", "licence not allowed"), (None, "no licence found")])
def test_a_repository_without_an_allowed_licence_is_refused_as_a_whole(tmp_path, text, expected):
    licence = {"COPYING": TEXTS[text].encode()} if text else {}
    repository = zipped(tmp_path / "r.zip", {"a.py": BODY, "b.py": BODY, **licence})
    (refusal,) = read_repository(repository, DETECT)
    assert (refusal.reason, refusal.detail, refusal.url) == (expected, text or "", "file:r.zip")


def test_a_declared_licence_holds_and_nothing_is_detected(tmp_path):
    repository = zipped(tmp_path / "r.zip", {"a.py": BODY, "COPYING": TEXTS["GPL-3.0"].encode()})
    assert [page.licence for page in read_repository(repository, DECLARED) if isinstance(page, Page)] == [None]


def test_a_file_with_another_licence_in_its_header_is_refused_alone():
    header = b"# SPDX-License-Identifier: GPL-2.0-only\n"
    assert one(header + BODY, source=DETECT).reason == "licence not allowed"
    assert one(b"# SPDX-License-Identifier: ISC\n" + BODY, source=DETECT).licence == "ISC"


# Archives


def test_links_and_members_that_lead_outside_are_told_and_not_read(tmp_path):
    link = tarfile.TarInfo("link.py")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    repository = tarball(tmp_path / "r.tar", {"../out.py": BODY, "/abs.py": BODY, "a.py": BODY}, (link,))
    found = list(read_repository(repository, DECLARED))
    assert paths(found) == ["a.py"]
    assert [reason for _, reason in refusals(found)] == ["leads outside", "leads outside", "link"]


def test_a_link_in_a_zip_file_is_told(tmp_path):
    with zipfile.ZipFile(tmp_path / "r.zip", "w") as out:
        entry = zipfile.ZipInfo("link.py")
        entry.external_attr = 0o120777 << 16
        out.writestr(entry, "/etc/passwd")
    assert refusals(read_repository(archive(tmp_path / "r.zip"), DECLARED)) == [("file:r.zip/link.py", "link")]


def test_a_bomb_is_refused_whatever_its_sizes_say(tmp_path, monkeypatch):
    monkeypatch.setattr(repositories, "RATIO_FREE_BYTES", 1000)
    big = b"a = 1\n" * 100_000
    packed = tarball(tmp_path / "r.tar.xz", {"a.bin": big, "b.py": BODY})
    assert refusals(read_repository(packed, DECLARED)) == [("file:r.tar.xz", "decompression bomb")]
    found = list(read_repository(zipped(tmp_path / "r.zip", {"a.py": big, "b.py": BODY}), DECLARED))
    assert refusals(found)[0] == ("file:r.zip/a.py", "decompression bomb")


def test_an_archive_with_too_many_files_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(repositories, "MAX_MEMBERS", 2)
    files = {f"{number}.py": BODY for number in range(3)}
    for repository in (zipped(tmp_path / "r.zip", files), tarball(tmp_path / "r.tar", files)):
        assert [reason for _, reason in refusals(read_repository(repository, DECLARED))] == ["too large"]


def test_of_a_cut_off_tarball_what_could_be_read_is_taken(tmp_path):
    draw = random.Random(0)
    noise = [b"\n".join(b"# %s" % draw.randbytes(30).hex().encode() for _ in range(50)) for _ in range(40)]
    files = {f"{number}.py": BODY + lines for number, lines in enumerate(noise)}
    whole = tarball(tmp_path / "w.tar.gz", files)
    data = whole.files[0].path.read_bytes()
    (tmp_path / "r.tar.gz").write_bytes(data[: len(data) // 2])
    found = list(read_repository(archive(tmp_path / "r.tar.gz"), DECLARED))
    assert ("file:r.tar.gz", "damaged archive") in refusals(found)
    assert 10 < len(found) < 40


@pytest.mark.parametrize("name", ["r.zip", "r.tar", "r.tar.gz", "r.tar.xz", "r.tar.bz2"])
def test_what_is_no_archive_is_told(tmp_path, name):
    (tmp_path / name).write_bytes(b"this is no archive at all" * 100)
    assert refusals(read_repository(archive(tmp_path / name), DECLARED)) == [(f"file:{name}", "damaged archive")]


def test_a_damaged_member_of_a_zip_file_costs_itself(tmp_path):
    with zipfile.ZipFile(tmp_path / "r.zip", "w") as out:
        out.writestr("a.py", BODY)
        out.writestr("b.py", BODY.replace(b"area", b"size"))
    data = (tmp_path / "r.zip").read_bytes()
    (tmp_path / "r.zip").write_bytes(data.replace(b"def area", b"def aria", 1))
    found = list(read_repository(archive(tmp_path / "r.zip"), DECLARED))
    assert (paths(found), refusals(found)) == (["b.py"], [("file:r.zip/a.py", "unreadable")])


# Licences


@pytest.mark.parametrize("name", sorted(TEXTS))
def test_every_licence_that_is_known_by_its_words_is_found(name):
    text = TEXTS[name].replace("[year]", "1999").replace("[fullname]", "Ada")
    assert licence_of({"LICENSE.txt": text.encode()}) == name


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"package.json": b'{"license": "MIT"}'}, "MIT"),
        ({"pyproject.toml": b"[project]\nlicense = {text = 'MIT License'}"}, "MIT"),
        ({"Cargo.toml": b"[package]\nlicense = 'MIT OR Apache-2.0'"}, "MIT OR Apache-2.0"),
        ({"src/a.c": b"// SPDX-License-Identifier: ISC\n"}, "ISC"),
        ({"LICENSE": b"All yours, dear reader."}, None),
        ({"LICENSE": MIT.encode(), "package.json": b'{"license": "GPL-3.0"}'}, "MIT"),
        ({"LICENSE-MIT": MIT.encode(), "COPYING": TEXTS["GPL-3.0"].encode()}, "GPL-3.0 AND MIT"),
        ({"sub/LICENSE": MIT.encode()}, None),
        ({"package.json": b"{{{", "pyproject.toml": b"project = 1"}, None),
    ],
)
def test_where_a_licence_is_said(files, expected):
    assert licence_of(files) == expected


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        ("MIT", True),
        ("GPL-3.0", False),
        ("MIT OR GPL-3.0", True),
        ("MIT AND GPL-3.0", False),
        ("GPL-3.0 OR MIT AND ISC", True),
        ("(MIT OR GPL-3.0) AND ISC", False),
        ("(MIT OR ISC) AND ISC", True),
        ("MIT WITH something", False),
    ],
)
def test_expressions(expression, expected):
    assert is_allowed(expression, ("MIT", "ISC")) == expected


# Files


def test_a_page_has_language_repository_and_path():
    page = one(b"\xef\xbb\xbffn main() { }\r\n", "src/main.rs")
    meta = {"language": "rust", "repository": "file:r", "path": "src/main.rs"}
    assert page == Page("file:r/src/main.rs", "fn main() { }\n", "code", meta, None)


@pytest.mark.parametrize(
    ("data", "name", "expected"),
    [
        (b"// Code generated by protoc. DO NOT EDIT.\n" + BODY, "a.go", "generated"),
        (b"{}", "package-lock.json", "generated"),
        (BODY, "jquery.min.js", "generated"),
        (BODY, "node_modules/x/a.js", "vendored"),
        (b"x = 1\n" + b"\0" + BODY, "a.py", "binary"),
        (b"caf\xe9 = 1", "a.py", "undecodable"),
        (b"\n \n", "a.py", "empty"),
        (BODY, "a.exe", "unknown suffix"),
        (b"x = 1\n" * 200_000, "a.py", "too large"),
        (b"a" * 1001 + b"\n" + b"b\n" * 100, "a.py", "longest line too long"),
        ((b"a" * 101 + b"\n") * 3, "a.py", "mean line too long"),
        (b"x = [" + b"{}, " * 20 + b"]\n", "a.py", "few letters and digits"),
    ],
)
def test_what_is_left_out(data, name, expected):
    assert reason(data, name) == expected


def test_the_bounds_themselves_are_taken():
    assert isinstance(one(b"a" * 1000 + b"\n" + b"b\n" * 100), Page)
    assert isinstance(one((b"a" * 100 + b"\n") * 3), Page)
    assert isinstance(one(b"a---" * 5), Page)
    assert isinstance(one(BODY * 3 + b"\n" * 1000 + b"# DO NOT EDIT\n" + BODY * 40), Page)


def test_a_measured_value_goes_with_the_refusal():
    assert one(b"a" * 1500 + b"\n" + b"b\n" * 100).value == 1500
    assert one(b"x = [" + b"{}, " * 20 + b"]\n").value == pytest.approx(1 / 87)


def test_a_secret_is_refused_and_never_repeated():
    token = "ghp_" + "a1B2c3D4e5F6" * 3
    refusal = one(f"# do not edit\n\ntoken = '{token}'\n".encode())
    assert (refusal.reason, refusal.detail, refusal.value) == ("secret", "GitHub token in line 3", 3)
    assert token not in repr(vars(refusal)) + str(refusal)
    assert refusal.text == ""


def test_long_lines_of_documentation_are_taken():
    assert isinstance(one(b"word " * 400, "README.md"), Page)
