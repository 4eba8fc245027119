"""Wikis: which pages of a dump are taken, and what a reader would see of their markup."""

import bz2
from pathlib import Path

import pytest

from pipelines.corpus import wiki
from pipelines.corpus.readers import read_file
from pipelines.corpus.records import Page, Refusal
from pipelines.corpus.wiki import plain_text
from pipelines.schema import Source

AUTO = Source(name="mine", path="unused")
HEAD = """<mediawiki xmlns="http://www.mediawiki.org/xml/export-0.11/" version="0.11" xml:lang="de">
<siteinfo><sitename>Wiki</sitename><base>https://de.wiki.example/wiki/Hauptseite</base>
<namespaces><namespace key="0" /><namespace key="6">Datei</namespace><namespace key="14">Kategorie</namespace>
</namespaces></siteinfo>
"""
TAIL = "</mediawiki>"


def article(title: str, text: str, ns: int = 0, more: str = "") -> str:
    return (
        f"<page><title>{title}</title><ns>{ns}</ns><id>7</id>{more}<revision><id>99</id><contributor><username>me"
        f"</username><id>5</id></contributor><text bytes='1'>{text}</text></revision></page>"
    )


def dump(tmp_path: Path, *pages: str, head: str = HEAD, tail: str = TAIL, encoding: str = "utf-8") -> Path:
    path = tmp_path / "a.xml"
    path.write_bytes((head + "\n".join(pages) + tail).encode(encoding))
    return path


def read(path: Path, source: Source = AUTO) -> list[Page | Refusal]:
    return list(read_file(path, f"file:{path.name}", source))


# Dumps


def test_articles_are_taken_and_other_pages_told(tmp_path):
    path = dump(
        tmp_path,
        article("Grüner Tee", "'''Tee''' &amp; mehr.[[Kategorie:Tee]][[Datei:a.png|mini|Bild]]"),
        article("Benutzer:X", "Hallo", ns=2),
        article("Tee, grün", "#REDIRECT [[Grüner Tee]]", more='<redirect title="Grüner Tee" />'),
        article("Leer", "{{Vorlage}}"),
    )
    page, *refused = read(path)
    assert page == Page(
        "https://de.wiki.example/wiki/Gr%C3%BCner_Tee",
        "Grüner Tee\n\nTee & mehr.",
        "article",
        {"title": "Grüner Tee", "language": "de"},
    )
    assert [(one.reason, one.detail) for one in refused] == [
        ("other namespace", "namespace 2"),
        ("redirect", "to Grüner Tee"),
        ("empty", "no text beside templates, tables and links to categories"),
    ]
    assert refused[0].url == "https://de.wiki.example/wiki/Benutzer:X"


def test_a_page_without_a_site_goes_by_its_own_id(tmp_path):
    head = '<mediawiki xmlns="http://www.mediawiki.org/xml/export-0.10/">'
    (page,) = read(dump(tmp_path, article("T", "text"), head=head))
    assert (page.url, page.meta) == ("file:a.xml#7", {"title": "T"})


def test_dumps_in_utf_16_and_parts_of_dumps_are_read(tmp_path):
    (page,) = read(dump(tmp_path, article("T", "käse"), encoding="utf-16"))
    assert page.text == "T\n\nkäse"
    part = tmp_path / "pages-articles1.xml-p1p41242.bz2"
    part.write_bytes(bz2.compress(dump(tmp_path, article("T", "text")).read_bytes()))
    assert [page.text for page in read(part)] == ["T\n\ntext"]


def test_of_a_dump_cut_short_the_whole_pages_are_kept(tmp_path):
    page, damage = read(dump(tmp_path, article("T", "text"), "<page><title>U</ti", tail=""))
    assert (page.text, damage.reason, damage.url) == ("T\n\ntext", "damaged file", "")


def test_a_document_type_is_refused_and_no_entity_expanded(tmp_path):
    bomb = '<!DOCTYPE m [<!ENTITY a "ha"><!ENTITY b "&a;&a;&a;">]>'
    (refusal,) = read(dump(tmp_path, article("T", "&b;"), head=bomb + HEAD))
    assert refusal.reason == "document type"


def test_an_entity_that_is_not_declared_is_damage(tmp_path):
    assert [one.reason for one in read(dump(tmp_path, article("T", "&b;")))] == ["damaged file"]


def test_a_page_too_large_to_hold_is_told_and_the_next_read(tmp_path, monkeypatch):
    monkeypatch.setattr(wiki, "MAX_PAGE_CHARACTERS", 100)
    large, small = read(dump(tmp_path, article("T", "x" * 200_000), article("U", "text")))
    assert (large.reason, small.text) == ("too large", "U\n\ntext")


def test_other_xml_is_text_only_where_its_kind_is_said(tmp_path):
    path = tmp_path / "a.xml"
    path.write_text("<note>hello</note>")
    assert [one.reason for one in read(path)] == ["unknown suffix"]
    (page,) = read(path, Source(name="mine", path="unused", kind="article"))
    assert page.text == "<note>hello</note>"


# Wikitext


@pytest.mark.parametrize(
    ("wikitext", "text"),
    [
        ("'''Bold''' and ''it''&nbsp;&mdash; x", "Bold and it — x"),
        ("[[Tea]], [[tea|the drink]]s, [[:Category:Tea]]", "Tea, the drinks, Category:Tea"),
        ("a[[File:a.png|thumb|A [[cap]]tion]]b[[category:Tea]]c[[de:Tee]]d", "abcd"),
        ("[http://a.example label] [http://b.example] http://c.example", "label  http://c.example"),
        ("a{{t|{{u}}|b=[[c]]}}b<ref name=x>''c</ref>d<ref name=x />e<!-- f\n -->g", "abdeg"),
        ("before\n{| class=x\n| a || b\n{|\n| c\n|}\n|}\nafter", "before\n\nafter"),
        ("x\n== Head [[a|b]] ==\ny\n=== Low ===\nz", "x\n\nHead b\n\ny\n\nLow\n\nz"),
        ("* one\n** two\n# three\n; term\n: said", "- one\n- two\n- three\nterm\nsaid"),
        ("Tea ({{lang|x}}; {{y}}) is, (; as said) hot", "Tea is, (as said) hot"),
        ("<nowiki>[[raw]]</nowiki><br/>__TOC__<pre>a  ''b''</pre>", "[[raw]]\na  ''b''"),
        ("<gallery>\nFile:a.png|b\n</gallery>c<math>x^2</math>", "cx^2"),
        ("&#x110000; {{ [[ '' {| <b", "&#x110000; {{ [[  {| <b"),
    ],
)
def test_wikitext_is_what_a_reader_sees(wikitext, text):
    assert plain_text(wikitext) == text


@pytest.mark.parametrize("mark", ["{{a|", "[[b|", "<b>"])
def test_brackets_that_never_close_are_told_before_they_take_minutes(mark):
    assert mark[:2] in plain_text(mark * 200 + "word " * 1000)
    with pytest.raises(Refusal) as caught:
        plain_text("}}]]</b>" + mark * 1000 + "word " * 10_000)
    assert (caught.value.reason, caught.value.value) == ("not wikitext", 1000)


def test_nesting_that_closes_is_followed():
    assert plain_text("x" + "{{a|" * 20 + "}}" * 20 + "[[a|" * 10 + "y" + "]]" * 10) == "xy"
