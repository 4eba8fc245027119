"""`headwater keys`: the commands' words, answers and exit codes."""

import json
from datetime import UTC, datetime, timedelta

import pytest

from cluster.errors import BadInput
from pipelines import __main__ as command
from pipelines.keys import expiry
from serve.keys import KeyStore

NOW = datetime(2026, 5, 1, 12, tzinfo=UTC)


@pytest.fixture
def call(tmp_path, capsys):
    def call(*words: str) -> tuple[int, str, str]:
        try:
            code = command.main(["keys", *words, "--keys", str(tmp_path / "keys.json")])
        except SystemExit as exit_:
            code = exit_.code
        return code, *capsys.readouterr()

    return call


def test_a_key_is_shown_once_and_works(call, tmp_path):
    code, output, _ = call("add", "laptop", "--concurrent", "2", "--models", "tiny, micro")
    text = output.split()[0]
    key = KeyStore(tmp_path / "keys.json").find(text)
    assert (code, key.name, key.concurrent, key.models) == (0, "laptop", 2, ("tiny", "micro"))
    _, listed, _ = call("list")
    assert "laptop" in listed
    assert "2 at once" in listed
    assert "tiny, micro" in listed
    assert text not in listed
    assert key.sha256 not in listed + call("list", "--json")[1]


def test_programs_read_json(call, tmp_path):
    _, output, _ = call("add", "a", "--json", "--tokens-per-day", "1000", "--expires", "1d")
    made = json.loads(output)
    assert KeyStore(tmp_path / "keys.json").find(made["key"]).name == made["name"] == "a"
    (listed,) = json.loads(call("list", "--json")[1])["keys"]
    assert (listed["name"], listed["tokens_per_day"], listed["requests_per_minute"]) == ("a", 1000, None)
    assert datetime.fromisoformat(listed["expires"]) - datetime.fromisoformat(listed["created"]) > timedelta(hours=23)
    assert json.loads(call("revoke", "a", "--json")[1])["revoked"] == "a"
    assert json.loads(call("list", "--json")[1])["keys"] == []


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("add", "a b"), "a name has"),
        (("add", "a", "--concurrent", "0"), "concurrent"),
        (("add", "a", "--concurrent", "x"), "invalid int value"),
        (("add", "a", "--models", "x,,y"), "models.1"),
        (("add", "a", "--expires", "soon"), "neither a time from now nor a date"),
        (("revoke", "nobody"), "no key 'nobody'"),
        ((), "THING"),
    ],
)
def test_bad_input_exits_with_2_and_changes_nothing(call, tmp_path, words, said):
    code, _, complaint = call(*words)
    assert code == 2
    assert said in complaint
    assert not (tmp_path / "keys.json").exists()


def test_the_file_is_named_by_the_environment_else_by_the_users_folder(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.delenv("HEADWATER_KEYS", raising=False)
    command.main(["keys", "add", "a"])
    assert (tmp_path / "config" / "headwater" / "keys.json").exists()
    monkeypatch.setenv("HEADWATER_KEYS", str(tmp_path / "mine.json"))
    command.main(["keys", "add", "a"])
    assert (tmp_path / "mine.json").exists()


@pytest.mark.parametrize(
    ("text", "end"),
    [
        ("90m", NOW + timedelta(minutes=90)),
        ("12h", NOW + timedelta(hours=12)),
        ("30d", NOW + timedelta(days=30)),
        ("8w", NOW + timedelta(weeks=8)),
        ("2027-01-31", datetime(2027, 1, 31, tzinfo=UTC)),
        ("2027-01-31T12:00+02:00", datetime(2027, 1, 31, 10, tzinfo=UTC)),
    ],
)
def test_when_a_key_ends(text, end):
    assert expiry(text, NOW) == end


@pytest.mark.parametrize("text", ["", "30", "d", "-1d", "0d", "999999999w", "2026-04-30", "tomorrow"])
def test_an_end_that_is_no_end(text):
    with pytest.raises(BadInput, match="--expires"):
        expiry(text, NOW)
