"""The file of keys: what it keeps, who is found in it, what a change or damage means for a running service."""

import hashlib
import hmac
import os
import stat
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta

import pytest

from cluster.errors import BadInput
from serve import keys
from serve.keys import KeyStore, Unreadable


@pytest.fixture
def file(tmp_path):
    return tmp_path / "config" / "keys.json"


def test_a_key_is_found_by_its_text_alone(file):
    texts = {name: keys.add(file, name) for name in ("a", "b")}
    store = KeyStore(file)
    assert {name: store.find(text).name for name, text in texts.items()} == {"a": "a", "b": "b"}
    assert texts["a"] != texts["b"]
    for wrong in ("", "a", texts["a"][:-1], texts["a"] + "x", texts["a"].upper(), "\udcff"):
        assert store.find(wrong) is None


def test_the_file_has_hashes_and_belongs_to_its_owner(file):
    text = keys.add(file, "a")
    kept = file.read_text()
    assert text not in kept
    assert hashlib.sha256(text.encode()).hexdigest() in kept
    assert len(text.removeprefix("hw-")) == 43  # 256 bits in base64
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700


def test_every_hash_is_compared_whichever_matches(file, monkeypatch):
    first, *_ = [keys.add(file, name) for name in ("a", "b", "c")]
    store, compared = KeyStore(file), []
    real = hmac.compare_digest
    monkeypatch.setattr(hmac, "compare_digest", lambda one, other: compared.append(one) or real(one, other))
    assert store.find(first).name == "a"
    assert compared == [key.sha256 for key in keys.stored(file)]


def test_a_running_store_sees_each_change(file):
    first = keys.add(file, "a")
    store = KeyStore(file)
    assert store.find(first)
    second = keys.add(file, "b")
    assert store.find(second)
    keys.revoke(file, "a")
    assert store.find(first) is None
    assert store.find(second)


def test_a_key_ends_when_it_says(file):
    end = datetime(2030, 1, 1, tzinfo=UTC)
    text, now = keys.add(file, "a", expires=end), end - timedelta(seconds=1)
    store = KeyStore(file, now=lambda: now)
    assert store.find(text)
    now = end
    assert store.find(text) is None


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"\xff",
        b"null",
        b"[]",
        b"{}",
        b'{"version": 2, "keys": []}',
        b'{"version": 1, "keys": [{"name": "a"}]}',
    ],
)
def test_a_damaged_file_lets_nobody_in(file, caplog, content):
    text = keys.add(file, "a")
    store, whole = KeyStore(file), file.read_bytes()
    assert store.find(text)
    file.write_bytes(content)
    for _ in range(2):
        with pytest.raises(Unreadable, match=str(file)):
            store.find(text)
    assert [record.message for record in caplog.records] == [caplog.records[0].message]  # said once
    assert "nobody is let in" in caplog.text
    with pytest.raises(BadInput, match="damaged"):
        keys.add(file, "b")
    assert file.read_bytes() == content  # a command mends nothing by writing over it
    file.write_bytes(whole)
    assert store.find(text)


def test_a_missing_file_lets_nobody_in(file):
    text = keys.add(file, "a")
    store = KeyStore(file)
    assert store.find(text)
    file.unlink()
    with pytest.raises(Unreadable):
        store.find(text)


def test_a_service_that_would_refuse_everyone_does_not_start(file):
    for make in (lambda: None, lambda: keys.add(file, "a") and keys.revoke(file, "a")):
        make()
        with pytest.raises(BadInput, match=f"(?s)no keys in {file}.*keys add NAME"):
            keys.check_file(file)
    file.write_text("{")
    with pytest.raises(BadInput, match="damaged"):
        keys.check_file(file)
    file.unlink()
    keys.add(file, "a")
    keys.check_file(file)


def test_the_hash_of_a_damaged_entry_is_not_said(file):
    keys.add(file, "a")
    sha256 = keys.stored(file)[0].sha256
    file.write_text(file.read_text().replace(sha256, sha256[:-1] + "X"))
    with pytest.raises(BadInput) as refused:
        keys.stored(file)
    assert sha256[:20] not in str(refused.value)


def test_commands_at_once_lose_no_key(file):
    names = [f"k{i}" for i in range(24)]
    with ThreadPoolExecutor(8) as pool:
        texts = list(pool.map(lambda name: keys.add(file, name), names))
    store = KeyStore(file)
    assert [store.find(text).name for text in texts] == names
    assert sorted(os.listdir(file.parent)) == [".keys.json.lock", "keys.json"]


@pytest.mark.parametrize("name", ["", "a b", "../a", "a\n", "x" * 65, "-a"])
def test_a_name_is_one_word(file, name):
    with pytest.raises(BadInput, match="a name has"):
        keys.add(file, name)
    assert not file.exists()


def test_a_name_is_taken_once(file):
    keys.add(file, "a")
    with pytest.raises(BadInput, match="there is a key 'a' already"):
        keys.add(file, "a")
    with pytest.raises(BadInput, match="no key 'b'"):
        keys.revoke(file, "b")


@pytest.mark.parametrize("limits", [{"concurrent": 0}, {"tokens_per_day": -1}, {"models": ()}, {"models": ("",)}])
def test_limits_are_bounds(file, limits):
    with pytest.raises(BadInput, match=next(iter(limits))):
        keys.add(file, "a", limits=limits)
