"""Personal data: what is masked, what only looks like it, and that masking twice changes nothing more."""

import ipaddress
import re
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.corpus import personal
from pipelines.corpus.personal import KINDS, Secret, entropy, find_secrets, is_card, luhn, mask

JWT = "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiJhZGEiLCJpYXQiOjF9.c2lnbmF0dXJlLW9mLWl0LWFsbA"
PEM = "-----BEGIN RSA PRIVATE KEY-----\n" + "MIIEpAIBAAKCAQEA" * 8 + "\n-----END RSA PRIVATE KEY-----"
KEYS = {
    "AWS access key": "AKIA" + "QWERTYUIOPASDFGH",
    "GitHub token": "ghp_" + "a1B2c3D4e5F6" * 3,
    "GitLab token": "glpat-" + "a1B2c3D4e5F6g7H8i9J0",
    "Slack token": "xoxb-" + "170299-170281-a1B2c3D4",
    "Stripe key": "sk_live_" + "a1B2c3D4e5F6g7H8",
    "Google key": "AIza" + "a1B2c3D4e5F6g7H8i9J0k1L2m3N4o5P6q7R",
    "OpenAI key": "sk-" + "a1B2c3D4e5F6g7H8i9J0" + "T3BlbkFJ" + "a1B2c3D4e5F6g7H8i9J0",
    "Anthropic key": "sk-ant-api03-" + "a1B2c3D4e5F6" * 8,
    "Hugging Face token": "hf_" + "a1B2c3D4e5F6g7H8i9J0k1L2m3N4o5P6q7",
    "JSON web token": JWT,
    "private key": PEM,
}


@pytest.mark.parametrize(
    ("text", "kind", "masked"),
    [
        ("Write to ada.l+x@maths.ox.ac.uk.", "email", "Write to <EMAIL>."),
        ("<a@b.org>,c_d@e-f.io", "email", "<<EMAIL>>,<EMAIL>"),
        ("from 128.197.54.25:80, not", "ip", "from <IP>:80, not"),
        ("at 2a00:1450:4001:82a::200e now", "ip", "at <IP> now"),
        ("Tel: +44 (181) 390 8446, or", "phone", "Tel: <PHONE>, or"),
        ("+4915112345678", "phone", "<PHONE>"),
        ("call (617) 576-7675 or 617-576-7675.", "phone", "call <PHONE> or <PHONE>."),
        ("card 4111 1111 1111 1111, 5555555555554444", "card", "card <CARD>, <CARD>"),
        ("3782 822463 10005", "card", "<CARD>"),
        ("3056 930902 5904", "card", "<CARD>"),
        *((f"key {key}", "key", "key <KEY>") for key in KEYS.values()),
    ],
)
def test_what_is_masked(text, kind, masked):
    assert mask(text, [kind]) == (masked, Counter({kind: masked.count(f"<{kind.upper()}>")}))


@pytest.mark.parametrize(
    "text",
    [
        "me@example.com, you@mail.example, git@github.com:a/b, icon@2x.png, @handle, a @ b.com, x@y",
        "version 1.2.3.4, v140.2.3.4, release 130.1.2.3, 1.2.3.4, section 4.12.9.1, 256.1.1.1, 1.2.3.4.5",
        "10.0.0.1 127.0.0.1 192.168.1.1 203.0.113.9 169.254.0.1 224.0.0.1 2001:db8::1 fe80::1 ::1 12:30:45",
        "std::map a::b 2024:10:12 3abc:def",
        "1999-12-31, 31-12-1999, ISBN 0-306-40615-2, 978-0-306-40615-7, 617-576-767, 212-555-0123, 617 576 7675",
        "+1.5, 3+4, +12 345, 2+12345678901, 100-200-3000, 1 800 555",
        "4111 1111 1111 1112, 1234567890123456, 1700000000000, 0.4111111111111111, 5105-1051 0510 5100",
        "sk-learn, hf_transfer, AKIAIOSFODNN7EXAMPLE, ghp_short, eyJ, -----BEGIN PRIVATE KEY-----\n...",
    ],
)
def test_what_only_looks_like_it_stays(text):
    assert mask(text, KINDS) == (text, Counter())


def test_only_the_kinds_that_are_asked_for_are_masked():
    assert mask("a@b.org +4915112345678", ["phone"])[0] == "a@b.org <PHONE>"
    with pytest.raises(KeyError, match="address"):
        mask("", ["address"])


@given(st.lists(st.sampled_from([*"a@.:+-() 12457<>/\n", "a@b.org", "617-576-7675", "8.8.4.4", "4111111111111111"])))
def test_a_second_masking_changes_nothing(parts):
    once, _ = mask("".join(parts), KINDS)
    assert mask(once, KINDS) == (once, Counter())


@given(st.ip_addresses())
def test_every_masked_address_is_global(address):
    _, counts = mask(f"host {address} up", ["ip"])
    assert not counts or ipaddress.ip_address(str(address)).is_global


@given(st.integers(0, 10**15))
def test_luhn_has_one_check_digit_for_every_number(number):
    assert sum(luhn(f"{number}{digit}") for digit in range(10)) == 1


def test_luhn_and_issuers_by_hand():
    assert luhn("79927398713")
    assert not luhn("79927398710")
    assert is_card("2223003122003222")
    assert not is_card("79927398713")
    assert not is_card("9999999999999995")


def test_entropy_by_hand():
    assert entropy("aaaa") == 0
    assert entropy("abcd") == 2
    assert entropy("aab") == pytest.approx(0.9182958)


@pytest.mark.parametrize(("kind", "key"), KEYS.items())
def test_secrets_are_found_with_their_line(kind, key):
    assert list(find_secrets(f"first\n\nx = {key}\n")) == [Secret(kind, 3)]


def test_assigned_secrets_are_random_literals_only():
    assert list(find_secrets("a = 1\nDB_PASSWORD = 'q7Zp2LxV9kRw4TnB'\n")) == [Secret("assigned secret", 2)]
    assert list(find_secrets('{"api_key": "f3a9c17e5b8d2046"}')) == [Secret("assigned secret", 1)]
    for harmless in (
        "my-secret-name-1-2",
        "${DB_PASSWORD_12}",
        "passwordpassword",
        "config.secrets.key.v12",
        "123456789012",
    ):
        assert not list(find_secrets(f"password = '{harmless}'"))


def test_every_repeat_is_bounded():
    """So that no expression can go over the same characters more than a fixed number of times."""
    forms = [form.pattern for _, form in personal.FORMATS.values()]
    named = [
        personal.EMAIL,
        personal.IPV4,
        personal.IPV6,
        personal.INTERNATIONAL,
        personal.NORTH_AMERICAN,
        personal.CARD,
    ]
    for pattern in [*forms, *(form.pattern for form in named), personal.ASSIGNMENT.pattern]:
        bare = re.sub(r"\\.|\[(?:\\.|[^\]])*\]", "x", pattern)
        assert not re.search(r"[*+]|\{\d+,\}", bare.replace("(?", "(")), pattern


@pytest.mark.parametrize(
    "unit", ["a", "a.", "1", "1.", "+1", "a@", "a@b.", "(2", "eyJ", "password=", "-----BEGIN ", "4111 "]
)
@pytest.mark.timeout(20)
def test_a_megabyte_of_near_misses_is_gone_through(unit):
    text = unit * (1_000_000 // len(unit))
    mask(text, KINDS)
    list(find_secrets(text))
