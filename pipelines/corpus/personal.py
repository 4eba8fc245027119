"""Personal data and secrets in text: found by form and checksum, masked by placeholders.

    email   <EMAIL>   name@host.domain; not example domains (RFC 2606), file names such as a@2x.png, or git@HOST
    ip      <IP>      global addresses, IPv4 and IPv6 (2000::/3); not versions, see `_is_address`
    phone   <PHONE>   + and 9 to 15 digits (ITU-T E.164), or North American with separators (NANP)
    card    <CARD>    14 to 19 digits with an issuer's prefix (ISO/IEC 7812-1) that pass Luhn's checksum
    key     <KEY>     credentials of known format, JSON web tokens and PEM private keys

Every expression has bounded repeats and can begin at few places only, so the time is linear in the text; each is tried
only where a substring that it needs is there.
"""

from __future__ import annotations

import ipaddress
import math
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from typing import NamedTuple

KINDS = ("email", "ip", "phone", "card", "key")


def mask(text: str, kinds: Collection[str]) -> tuple[str, Counter[str]]:
    """`text` with everything of `kinds` (of KINDS) replaced by its placeholder, and how many of each were.

    Idempotent: it goes on until nothing is found, since a masked neighbour can uncover another. KeyError for a kind
    that isn't known.
    """
    if unknown := set(kinds) - set(KINDS):
        raise KeyError(f"unknown kinds {sorted(unknown)}, known are {', '.join(KINDS)}")
    maskers = [(kind, MASKERS[kind]) for kind in KINDS if kind in kinds]
    counts: Counter[str] = Counter()
    before = -1
    while counts.total() > before:
        before = counts.total()
        for kind, masker in maskers:
            text, found = masker(text)
            counts[kind] += found
    return text, +counts


class Secret(NamedTuple):
    """Where a secret is; never what it is. `line` counts from 1."""

    kind: str
    line: int


def find_secrets(text: str) -> Iterator[Secret]:
    """Credentials in source code: the known formats, and literals of high entropy assigned to what is called a
    password, secret, token or key. Format by format, each in the order of the text."""
    for kind, match in _known_secrets(text):
        yield Secret(kind, text.count("\n", 0, match.start()) + 1)
    for match in _assigned_secrets(text):
        yield Secret("assigned secret", text.count("\n", 0, match.start()) + 1)


def is_card(digits: str) -> bool:
    """Whether `digits` are a payment card's number: an issuer's prefix and length, and Luhn's checksum."""
    return any(re.fullmatch(form, digits) for form in ISSUERS) and luhn(digits)


def luhn(digits: str) -> bool:
    """Luhn's checksum (ISO/IEC 7812-1, annex B): from the right every second digit doubled, its digits added."""
    doubled = [int(digit) * (1 + place % 2) for place, digit in enumerate(reversed(digits))]
    return sum(number // 10 + number % 10 for number in doubled) % 10 == 0


def entropy(text: str) -> float:
    """Bits per character of `text`, from how often each of its characters comes (Shannon 1948)."""
    counts = Counter(text).values()
    return -sum(count / len(text) * math.log2(count / len(text)) for count in counts)


# Addresses of people

EMAIL = re.compile(
    r"(?<![\w.%+-])([A-Za-z0-9._%+-]{1,64})@((?:[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?\.){1,8})([A-Za-z]{2,24})"
    r"(?![\w-])"
)
RESERVED_DOMAINS = re.compile(r"(?i)(?:^|\.)(?:example\.(?:com|net|org)|example|test|invalid|localhost)$")
FILE_SUFFIXES = frozenset({"gif", "html", "jpeg", "jpg", "js", "pdf", "png", "svg", "webp"})


def _mask_emails(text: str) -> tuple[str, int]:
    return _replace(EMAIL, text, "<EMAIL>", _is_email) if "@" in text else (text, 0)


def _is_email(match: re.Match[str]) -> bool:
    name, domain, top = match.groups()
    if name == "git" or top.lower() in FILE_SUFFIXES:
        return False
    return not RESERVED_DOMAINS.search(domain + top)


# Addresses of machines

IPV4 = re.compile(r"(?<![\w.-])[0-9]{1,3}(?:\.[0-9]{1,3}){3}(?![\w-]|\.[0-9])")
IPV6 = re.compile(r"(?<![\w:.])[23][0-9A-Fa-f]{3}:[0-9A-Fa-f:]{2,35}(?![\w:])")
VERSION_BEFORE = re.compile(r"(?i)(?:\b(?:versions?|ver|release|rev|revision|section|build|v|§)|§)[ .:=\"'v]{0,3}$")
# All four numbers below this are taken for a version or a section: one random address in 4,096 is.
VERSION_NUMBERS = 32
LONGEST_VERSION_WORD = 16


def _mask_addresses(text: str) -> tuple[str, int]:
    found = more = 0
    if b"0.0" in _shape(text, DIGIT_SHAPE):
        text, found = _replace(IPV4, text, "<IP>", _is_address)
    if b"0000:" in _shape(text, HEXADECIMAL_SHAPE):
        text, more = _replace(IPV6, text, "<IP>", _is_address)
    return text, found + more


def _is_address(match: re.Match[str]) -> bool:
    """A global address that doesn't read as a version: no 'version', 'release', 'section' ... just before it, and in
    IPv4 not all of its numbers below 32."""
    try:
        address = ipaddress.ip_address(match[0])
    except ValueError:
        return False
    if address.version == 4 and max(address.packed) < VERSION_NUMBERS:
        return False
    before = match.string[max(0, match.start() - LONGEST_VERSION_WORD) : match.start()]
    return address.is_global and not address.is_multicast and not VERSION_BEFORE.search(before)


# Telephones

INTERNATIONAL = re.compile(
    r"(?<![\w+./=^-])\+[1-9][0-9]{0,2}[ .-]?(?:\([0-9]{1,4}\)[ .-]?)?[0-9]{1,4}(?:[ .-]?[0-9]{2,4}){1,5}"
    r"(?![\w-]|[.,][0-9])"
)
# Area code and exchange begin with 2 to 9. All spaces between might be a row of a table.
NORTH_AMERICAN = re.compile(
    r"(?<![\w.+/#=-])(?<![0-9] )(?:1[ .-])?(?:\([2-9][0-9]{2}\) ?[2-9][0-9]{2}[-. ]"
    r"|[2-9][0-9]{2}([-.])[2-9][0-9]{2}\1)"
    r"[0-9]{4}(?![\w-]|[.,/][0-9]| [0-9])"
)
# 555-0100 to 555-0199 are kept for fiction.
FICTION = re.compile(r"55501[0-9]{2}$")


def _mask_phones(text: str) -> tuple[str, int]:
    found = more = 0
    shape = _shape(text, DIGIT_SHAPE)
    if b"+0" in shape:
        text, found = _replace(INTERNATIONAL, text, "<PHONE>", _is_international)
    if b"-0000" in shape or b".0000" in shape:
        text, more = _replace(NORTH_AMERICAN, text, "<PHONE>", lambda match: not FICTION.search(_digits(match[0])))
    return text, found + more


def _is_international(match: re.Match[str]) -> bool:
    return 9 <= len(_digits(match[0])) <= 15


# Cards

CARD = re.compile(
    r"(?<![\w.,/+-])(?<![0-9] )(?:3[0-9]{3}([ -]?)[0-9]{6}\1[0-9]{4,5}"
    r"|[2-6][0-9]{3}([ -]?)[0-9]{4}\2[0-9]{4}\2[0-9]{4}"
    r"|62[0-9]{15,17})(?![\w-]|[.,/][0-9]| [0-9])"
)
ISSUERS = (
    r"4[0-9]{15}",  # Visa
    r"5[1-5][0-9]{14}|2(?:22[1-9]|2[3-9][0-9]|[3-6][0-9]{2}|7[01][0-9]|720)[0-9]{12}",  # Mastercard
    r"3[47][0-9]{13}",  # American Express
    r"3(?:0[0-5]|[689][0-9])[0-9]{11}",  # Diners Club
    r"6(?:011|5[0-9]{2}|4[4-9][0-9])[0-9]{12}",  # Discover
    r"35(?:2[89]|[3-8][0-9])[0-9]{12}",  # JCB
    r"62[0-9]{14,17}",  # UnionPay
)


def _mask_cards(text: str) -> tuple[str, int]:
    shape = _shape(text, DIGIT_SHAPE)
    if not any(run in shape for run in (b"00000000", b"0000-0000")):
        return text, 0
    return _replace(CARD, text, "<CARD>", lambda match: is_card(_digits(match[0])))


# Keys

# What a format can't be without, and the format; formats are those of the issuers' documentation.
FORMATS: dict[str, tuple[tuple[str, ...], re.Pattern[str]]] = {
    "AWS access key": (("AKIA", "ASIA"), re.compile(r"(?<!\w)A[KS]IA[A-Z2-7]{16}(?!\w)")),
    "GitHub token": (
        ("ghp_", "gho_", "ghu_", "ghs_", "ghr_", "github_pat_"),
        re.compile(r"(?<!\w)(?:gh[pousr]_[A-Za-z0-9]{36,251}|github_pat_[A-Za-z0-9_]{82})(?!\w)"),
    ),
    "GitLab token": (("glpat-",), re.compile(r"(?<!\w)glpat-[A-Za-z0-9_-]{20,200}(?!\w)")),
    "Slack token": (("xox",), re.compile(r"(?<!\w)xox[abeprs]-[0-9][A-Za-z0-9-]{10,200}(?!\w)")),
    "Stripe key": (("k_live_",), re.compile(r"(?<!\w)[rs]k_live_[A-Za-z0-9]{16,200}(?!\w)")),
    "Google key": (("AIza",), re.compile(r"(?<!\w)AIza[A-Za-z0-9_-]{35}(?![\w-])")),
    "OpenAI key": (
        ("T3BlbkFJ",),
        re.compile(r"(?<!\w)sk-(?=[\w-]{20,100}T3BlbkFJ)[\w-]{40,200}(?![\w-])", re.ASCII),
    ),
    "Anthropic key": (("sk-ant-",), re.compile(r"(?<!\w)sk-ant-[a-z]{2,8}[0-9]{2}-[\w-]{80,120}(?![\w-])", re.ASCII)),
    "Hugging Face token": (("hf_",), re.compile(r"(?<!\w)hf_[A-Za-z0-9]{34}(?!\w)")),
    "JSON web token": (
        ("eyJ",),
        re.compile(
            r"(?<![\w.-])eyJ[\w-]{10,2000}\.eyJ[\w-]{10,8000}\.[\w-]{16,1000}(?![\w-])",
            re.ASCII,
        ),
    ),
    "private key": (
        ("PRIVATE KEY",),
        re.compile(
            r"-----BEGIN ((?:[A-Z]{2,10} ){0,2}PRIVATE KEY(?: BLOCK)?)-----(?=[\s\\n\"'+A-Za-z0-9/=]{64})"
            r"(?:[^-]{64,16000}-----END \1-----|[A-Za-z0-9+/=\s\\]{64,16000})"
        ),
    ),
}
# 'AKIAIOSFODNN7EXAMPLE' and the like are of documentation.
SAMPLE = re.compile(r"(?i)example|x{6}|0{8}|1234567|abcdefg")

ASSIGNMENT = re.compile(
    r"(?i)(?:passw(?:or)?d|passphrase|secret|api_?key|access_?key|private_?key|token|credential)"
    r"\w{0,20}[\"']?\]?[ \t]{0,8}(?::=|=>|=|:)[ \t]{0,8}[\"']([\w+/=.~!@#$%^&*-]{12,128})[\"']",
    re.ASCII,
)
ASSIGNED_WORDS = re.compile(r"(?i)pass|secret|key|token|credential")
# A random string of 20 of the 64 characters of base64 has about 4.1 bits per character by its own counts, an English
# identifier of that length about 3.4.
LEAST_ENTROPY = 3.5


def _mask_keys(text: str) -> tuple[str, int]:
    found = 0
    for hints, form in FORMATS.values():
        if any(hint in text for hint in hints):
            text, more = _replace(form, text, "<KEY>", _is_key)
            found += more
    return text, found


def _known_secrets(text: str) -> Iterator[tuple[str, re.Match[str]]]:
    for kind, (hints, form) in FORMATS.items():
        if any(hint in text for hint in hints):
            yield from ((kind, match) for match in form.finditer(text) if _is_key(match))


def _is_key(match: re.Match[str]) -> bool:
    return match[0].startswith(("eyJ", "-----")) or not SAMPLE.search(match[0])


def _assigned_secrets(text: str) -> Iterator[re.Match[str]]:
    if not ASSIGNED_WORDS.search(text):
        return
    yield from (match for match in ASSIGNMENT.finditer(text) if _is_random(match[1]))


def _is_random(literal: str) -> bool:
    """Letters and at least two digits in high disorder. Words joined by points, slashes or dashes (addresses of code,
    of settings, of resources) aren't."""
    digits = sum(character.isdigit() for character in literal)
    if digits < 2 or digits == len(literal) or SAMPLE.search(literal):
        return False
    return max(map(len, re.split(r"[./_-]", literal))) >= 12 and entropy(literal) >= LEAST_ENTROPY


# Replacing

# Digits become 0 and spaces a dash, so that a substring tells whether an expression is worth trying.
DIGIT_SHAPE = bytes.maketrans(b"123456789 ", b"000000000-")
HEXADECIMAL_SHAPE = bytes.maketrans(b"123456789abcdefABCDEF", b"0" * 21)


def _shape(text: str, table: bytes) -> bytes:
    return text.encode("ascii", "replace").translate(table)


def _replace(
    form: re.Pattern[str], text: str, placeholder: str, wanted: Callable[[re.Match[str]], bool]
) -> tuple[str, int]:
    """`text` with those matches of `form` that are `wanted` replaced, and how many they were."""
    spans = [match.span() for match in form.finditer(text) if wanted(match)]
    if not spans:
        return text, 0
    starts, ends = [0, *(end for _, end in spans)], [*(start for start, _ in spans), len(text)]
    return placeholder.join(text[start:end] for start, end in zip(starts, ends, strict=True)), len(spans)


def _digits(text: str) -> str:
    return re.sub(r"[^0-9]", "", text)


MASKERS = {
    "email": _mask_emails,
    "ip": _mask_addresses,
    "phone": _mask_phones,
    "card": _mask_cards,
    "key": _mask_keys,
}
