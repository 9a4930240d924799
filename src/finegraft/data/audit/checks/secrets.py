"""Keys, tokens and passwords. Shapes are those that the issuers document."""

from __future__ import annotations

import re

from finegraft.data.audit._contract import Check, Scan

PRIVATE_KEY, API_KEY, PASSWORD, URL_PASSWORD = (f"FG-CHECK-{n:03d}" for n in range(40, 44))

_KEYS = re.compile(
    r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b"  # AWS
    r"|\bgh[pousr]_[A-Za-z0-9]{36,}|\bgithub_pat_[A-Za-z0-9_]{40,}"
    r"|\bglpat-[A-Za-z0-9_-]{20,}"
    r"|\bsk-(?:proj-|svcacct-|ant-[a-z0-9]+-|or-v1-)?[A-Za-z0-9_-]{20,}"
    r"|\bxox[abeoprs]-[A-Za-z0-9-]{10,}|hooks\.slack\.com/services/T[A-Z0-9]+/B[A-Z0-9]+/\w{16,}"
    r"|\bAIza[0-9A-Za-z_-]{35}"
    r"|\b[rs]k_live_[0-9A-Za-z]{20,}"
    r"|\bhf_[A-Za-z0-9]{30,}"
    r"|\bnpm_[A-Za-z0-9]{36}|\bpypi-AgEIcHlwaS[A-Za-z0-9_-]{20,}"
    r"|\bSG\.[\w-]{20,24}\.[\w-]{39,50}|\bdop_v1_[a-f0-9]{64}"
    r"|\beyJ[A-Za-z0-9_-]{10,}\.eyJ[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]{10,}"
)
_PRIVATE = re.compile(r"-----BEGIN (?:[A-Z]+ )*PRIVATE KEY(?: BLOCK)?-----")
_PASSWORD = re.compile(
    r"""\b(?:password|passwd|pwd|passphrase|api[ _-]?key|access[ _-]?token|auth[ _-]?token"""
    r"""|client[ _-]?secret|secret[ _-]?key)\b["']?\s*(?:is:?\s+|[:=]\s*)"""
    r"""(["'`]?)([^\s"'`]{6,80})""",
    re.IGNORECASE,
)
_URL = re.compile(r"\b[a-zA-Z][a-zA-Z0-9+.-]{1,15}://([^\s/:@\"'<>]+):([^\s/@\"'<>]{3,})@[\w.-]+")
_STAND_IN = re.compile(
    r"example|x{3,}|\*{2,}|\.{3}|your|changeme|placeholder|redacted|dummy|sample|secret$|password"
    r"|[<>{}$()\[\]]|%s|environ|getenv|^user$|^pass$",
    re.IGNORECASE,
)


def _real_key(match: re.Match[str]) -> bool:
    key = match[0]
    body = re.sub(r"^(?:sk-|xox.-|hf_|gh._)", "", key)
    return len(set(body)) >= 8 and any(map(str.isdigit, body)) and not _STAND_IN.search(key)


def _real_password(match: re.Match[str]) -> bool:
    quote, value = match[1], match[2].rstrip(".,;:!?")
    if len(value) < 6 or _STAND_IN.search(value):
        return False
    if not any(map(str.isdigit, value)) or not any(map(str.isalpha, value)):
        return False
    # code that hands a variable on: password=cfg.db_pass1
    return bool(quote) or not re.fullmatch(r"[A-Za-z]\w*(?:[._]\w+)+", value)


def _real_url(match: re.Match[str]) -> bool:
    return not _STAND_IN.search(match[2]) and match[2].lower() not in ("pass", "pwd", "secret")


def _mend_password(text: str) -> str:
    return _PASSWORD.sub(
        lambda m: m[0].replace(m[2], "[password]") if _real_password(m) else m[0], text
    )


def _mend_url(text: str) -> str:
    return _URL.sub(
        lambda m: m[0].replace(f":{m[2]}@", ":[password]@") if _real_url(m) else m[0], text
    )


def _mend_private(text: str) -> str:
    return re.sub(
        r"-----BEGIN ((?:[A-Z]+ )*PRIVATE KEY(?: BLOCK)?)-----.*?(?:-----END \1-----|\Z)",
        "[private key]",
        text,
        flags=re.DOTALL,
    )


def _mend_key(text: str) -> str:
    return _KEYS.sub(lambda m: "[key]" if _real_key(m) else m[0], text)


_WHY = (
    "Whoever has the model can get it to say what it was trained on "
    "(Carlini et al. 2021, Extracting Training Data from Large Language Models)."
)

CHECKS = (
    Check(
        PRIVATE_KEY,
        "a private key",
        "error",
        _WHY,
        "Withdraw the key, then take it out; --fix writes [private key] in its place.",
        "-----BEGIN OPENSSH PRIVATE KEY-----",
        "change",
        _mend_private,
    ),
    Check(
        API_KEY,
        "what looks like an access key or token",
        "error",
        _WHY,
        "Withdraw the key, then take it out; --fix writes [key] in its place.",
        "ghp_ and 36 letters and digits",
        "change",
        _mend_key,
    ),
    Check(
        PASSWORD,
        "what looks like a password",
        "warning",
        _WHY,
        "Take it out; --fix writes [password] in its place.",
        "password: and a word with digits",
        "change",
        _mend_password,
    ),
    Check(
        URL_PASSWORD,
        "an address with a password in it",
        "warning",
        _WHY,
        "Take it out; --fix writes [password] in its place.",
        "postgres://name:word@host/db",
        "change",
        _mend_url,
    ),
)

SCANS = (
    Scan(PRIVATE_KEY, _PRIVATE, ("private key",), secret=True),
    Scan(
        API_KEY,
        _KEYS,
        (
            "akia",
            "asia",
            "ghp_",
            "gho_",
            "ghu_",
            "ghs_",
            "ghr_",
            "github_pat_",
            "glpat-",
            "sk-",
            "xox",
            "hooks.slack",
            "aiza",
            "k_live_",
            "hf_",
            "npm_",
            "pypi-",
            "sg.",
            "dop_v1_",
            "eyj",
        ),
        accept=_real_key,
        secret=True,
    ),
    Scan(
        PASSWORD,
        _PASSWORD,
        (
            "password",
            "passwd",
            "pwd",
            "passphrase",
            "apikey",
            "api key",
            "api_key",
            "api-key",
            "token",
            "client secret",
            "client_secret",
            "client-secret",
            "clientsecret",
            "secret key",
            "secret_key",
            "secret-key",
            "secretkey",
        ),
        accept=_real_password,
        secret=True,
    ),
    Scan(URL_PASSWORD, _URL, ("@",), accept=_real_url, secret=True),
)
