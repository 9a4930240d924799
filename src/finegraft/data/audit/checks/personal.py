"""Data about people: addresses, numbers of phones, accounts and cards.

Trade-off: patterns and check sums of our own instead of the tables of phonenumbers: what is meant
here is to be looked at by a person, not dialled; numbers without a country code are seen in the
American form only.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable

from finegraft.data.audit._contract import Check, Scan

EMAIL, PHONE, IBAN, CARD, ADDRESS, SSN = (f"FG-CHECK-{n:03d}" for n in range(50, 56))

_EMAIL = re.compile(
    r"(?<![\w.+/:-])[A-Za-z0-9][\w.%+-]*@[A-Za-z0-9-]+(?:\.[A-Za-z0-9-]+)*\.[A-Za-z]{2,24}\b"
)
_PHONE = re.compile(
    r"(?<![\w+.])\+[1-9]\d{0,2}[ .-]?\(?\d{1,4}\)?(?:[ .-]?\d{2,4}){2,4}(?![\w-])"
    r"|(?<![\w.+/-])(?:\+?1[ .-])?(?:\([2-9]\d\d\) ?|[2-9]\d\d[ .-])[2-9]\d\d[.-]\d{4}(?![\w-])"
)
_IBAN = re.compile(r"\b[A-Z]{2}\d\d(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?\b")
_CARD = re.compile(r"(?<![\w.-])[3-6]\d{3}([ -]?)(?:\d{4}\1\d{4}\1\d{1,7}|\d{6}\1\d{5})(?![\w-])")
_IP = re.compile(r"(?<![\w.-])(?:\d{1,3}\.){3}\d{1,3}(?![\w-]|\.\d)")
_SSN = re.compile(r"(?<![\w-])(?!000|666|9\d\d)\d{3}-(?!00)\d\d-(?!0000)\d{4}(?![\w-])")

_NOBODY = re.compile(
    r"@(?:.*\.)?(?:example(?:\.\w+)?|test|invalid|localhost|local|email\.com|domain\.com|"
    r"company\.com|yourcompany\.com|mail\.com|website\.com)$"
    r"|^(?:git|your?|you|name|user|username|email|someone|noreply|no-reply|me|foo|test|admin"
    r"|your[._-]?\w+|first(?:name)?[._-]?last(?:name)?)@",
    re.IGNORECASE,
)
_PUBLIC = frozenset({"8.8.8.8", "8.8.4.4", "1.1.1.1", "1.0.0.1", "9.9.9.9"})
_IBAN_LENGTHS = range(15, 35)


def _somebody(match: re.Match[str]) -> bool:
    return not _NOBODY.search(match[0])


def _phone(match: re.Match[str]) -> bool:
    digits = re.sub(r"\D", "", match[0])
    if not 9 <= len(digits) <= 15 or len(set(digits)) < 3:
        return False
    return not re.search(r"55501\d\d$", digits)  # kept free for films and examples


def iban(text: str) -> bool:
    """Whether a text is an IBAN by length and check sum (ISO 13616, ISO 7064 mod 97)."""
    plain = text.replace(" ", "")
    if len(plain) not in _IBAN_LENGTHS:
        return False
    return int("".join(str(int(c, 36)) for c in plain[4:] + plain[:4])) % 97 == 1


def luhn(text: str) -> bool:
    """Whether the digits of a text satisfy the check sum of cards (ISO/IEC 7812-1)."""
    digits = [int(c) for c in text if c.isdigit()]
    total = sum(sum(divmod(d * (1 + i % 2), 10)) for i, d in enumerate(reversed(digits)))
    return 13 <= len(digits) <= 19 and len(set(digits)) > 2 and total % 10 == 0


def _in_use(match: re.Match[str]) -> bool:
    before = match.string[max(0, match.start() - 12) : match.start()].lower()
    if match[0] in _PUBLIC or re.search(r"(?:version|ver\.?|section|v|§)\s*$", before):
        return False
    try:
        return ipaddress.ip_address(match[0]).is_global and not match[0].endswith(".0")
    except ValueError:
        return False


Accept = Callable[[re.Match[str]], bool]


def _mender(pattern: re.Pattern[str], accept: Accept, word: str) -> Callable[[str], str]:
    def mend(text: str) -> str:
        return pattern.sub(lambda m: word if accept(m) else m[0], text)

    return mend


def _iban(match: re.Match[str]) -> bool:
    return iban(match[0])


def _card(match: re.Match[str]) -> bool:
    before = match.string[max(0, match.start() - 40) : match.start()]
    longer = re.search(r"(?:\b[A-Z]{2}\d\d|\d)[ -]*$", before) or re.match(
        r"[ -]?\d", match.string[match.end() :]
    )
    return not longer and luhn(match[0])


def _any(match: re.Match[str]) -> bool:
    return True


_WHY = (
    "The model may repeat it to anybody, and the law may ask you to have a reason to use it "
    "(GDPR, CCPA)."
)


def _check(code: str, title: str, example: str, scan: tuple[re.Pattern[str], Accept]) -> Check:
    word = f"[{title.split(' ', 1)[1]}]"
    return Check(
        code,
        title,
        "warning",
        _WHY,
        f"Take it out unless you mean it; --fix writes {word} in its place.",
        example,
        "change",
        _mender(scan[0], scan[1], word),
    )


CHECKS = (
    _check(EMAIL, "an email address", "mail anna.keller@ and a real domain", (_EMAIL, _somebody)),
    _check(PHONE, "a phone number", "+49 30 and eight digits", (_PHONE, _phone)),
    _check(IBAN, "a bank account (IBAN)", "DE89 3704 and so on, check sum right", (_IBAN, _iban)),
    _check(CARD, "a card number", "16 digits whose Luhn sum is right", (_CARD, _card)),
    _check(ADDRESS, "an IP address", "an address of the public internet", (_IP, _in_use)),
    _check(SSN, "a US social security number", "three, two and four digits", (_SSN, _any)),
)

SCANS = (
    Scan(EMAIL, _EMAIL, ("@",), accept=_somebody, secret=True),
    Scan(
        PHONE,
        _PHONE,
        shapes=(
            "+00",
            "+0 ",
            "+0-",
            "+0.",
            "+0(",
            "(000)",
            "000-000-0000",
            "000.000.0000",
            "000 000-0000",
            "000 000.0000",
        ),
        accept=_phone,
        secret=True,
    ),
    Scan(IBAN, _IBAN, shapes=("AA00 ", "AA000", "AA00A"), accept=_iban, secret=True),
    Scan(
        CARD,
        _CARD,
        shapes=(
            "0000000000000",
            "0000 0000 0000",
            "0000-0000-0000",
            "0000 000000 0",
            "0000-000000-0",
        ),
        accept=_card,
        secret=True,
    ),
    Scan(ADDRESS, _IP, shapes=(".0.", ".00.", ".000."), accept=_in_use, secret=True),
    Scan(SSN, _SSN, shapes=("000-00-0000",), secret=True),
)
