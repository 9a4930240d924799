"""Rows that are unlike the others: another language, another length, no words at all.

How: languages by their script and by words that only they have, from the first 40 words of an
answer. Trade-off: 11 languages of the Latin script instead of the dozens of langdetect or lingua:
enough to see that a row is foreign, without a model and in microseconds a text.
"""

from __future__ import annotations

import re
from collections import Counter

import numpy as np

from finegraft.data.audit._contract import Check, Scan

LANGUAGE, LONG, SHORT, RUN = (f"FG-CHECK-{n:03d}" for n in range(80, 84))

CHECKS = (
    Check(
        LANGUAGE,
        "an answer in another language than the rest",
        "warning",
        "Fewer than 1 in 100 rows are in this language, and the prompt does not ask for one. The "
        "model learns to change language unasked.",
        "Translate or remove the row.",
        "a Spanish answer among 2,000 English ones",
    ),
    Check(
        LONG,
        "an answer that is far longer than the rest",
        "warning",
        "Several documents may have run together, and one row weighs as much as a hundred.",
        "Look whether it is one answer; split or cut it.",
        "30,000 characters where 500 are usual",
    ),
    Check(
        SHORT,
        "an answer that is far shorter than the rest",
        "note",
        "It may have been cut off.",
        "Look whether it is complete.",
        "ok",
    ),
    Check(
        RUN,
        "more than 200 characters without a space",
        "warning",
        "An encoded picture, a hash or minified code. Hundreds of tokens that teach nothing.",
        "Take it out.",
        "data:image/png;base64,iVBORw0KGgo...",
    ),
)

# The first letters of a run are those of base64 or of minified code, 100 of which have no literal
# in common, so every chunk is searched; see scan.
RUN_PATTERN = re.compile(r"[!-~]{200,}")
SCANS: tuple[Scan, ...] = ()

# Frequent in English as well as elsewhere (or a name there), so that they tell nothing.
_SHARED = (
    "a an at do go he i in me my no so to up us we van dan den die war had her da os and per te "
    "dat man also most list ale co po na al del la le de se si un una"
)
# Frequent words of each language; what two of them have counts for neither.
_WORDS = {
    "English": "the of and is that it with as was on be this have from or by not are but which you "
    "they his her their there been would what about when your can more will how if",
    "German": "der die das und ist nicht ein eine zu den mit sich auf für von dem im auch es wird "
    "sind wie oder aber nach bei aus einer werden kann ich wir",
    "French": "le les des est une dans que pour qui pas sur plus avec ce sont il elle nous vous "
    "cette aux être mais ou par du leur ces",
    "Spanish": "el los las del que es una por con para como más pero sus este está son muy también "
    "y hay desde cuando porque esta ser",
    "Italian": "il di che è per non sono della con gli nel anche più come alla questo dei delle "
    "si ha essere ma questa",
    "Portuguese": "os do da não uma em dos as mais como mas ao ele das tem à seu sua ou ser "
    "quando muito há nos já está eu também são",
    "Dutch": "het een van en niet zijn op te dat met voor aan er maar om hij ook als bij nog naar "
    "wordt deze uit worden",
    "Polish": "nie się na jest że do to jak przez ale od co po tym dla są być może oraz które",
    "Swedish": "och att det som är för på inte med har till av den om jag ett från kan vi var",
    "Turkish": "ve bir bu için ile olarak daha çok olan gibi da en kadar ama sonra değil",
    "Indonesian": "yang dan di untuk dengan dari pada ini itu adalah tidak dalam akan atau juga",
}
_SCRIPTS = (
    ("Japanese", "\u3040-\u30ff"),
    ("Korean", "\uac00-\ud7af"),
    ("Chinese", "\u4e00-\u9fff"),
    ("Cyrillic", "\u0400-\u04ff"),
    ("Arabic", "\u0600-\u06ff"),
    ("Hebrew", "\u0590-\u05ff"),
    ("Greek", "\u0370-\u03ff"),
    ("Devanagari", "\u0900-\u097f"),
    ("Thai", "\u0e00-\u0e7f"),
)
LANGUAGES = ("", *_WORDS, *(name for name, _ in _SCRIPTS))
_ID = {name: i for i, name in enumerate(LANGUAGES)}
_english = {*_WORDS["English"].split(), *_SHARED.split()}
_counted = Counter(
    word
    for name, words in _WORDS.items()
    for word in set(words.split())
    if name == "English" or word not in _english
)
_OWN = {
    word: _ID[name]
    for name, words in _WORDS.items()
    for word in words.split()
    if _counted[word] == 1 and (name == "English" or word not in _english)
}
_ANY_SCRIPT = re.compile(f"[{''.join(span for _, span in _SCRIPTS)}]")
_SCRIPT = re.compile("|".join(f"([{span}])" for _, span in _SCRIPTS))
_FIRST_WORDS, _LEAST_WORDS, _LEAST_HITS, _LEAST_SHARE = 40, 6, 3, 0.75
_ASKS = re.compile(
    r"translat|übersetz|tradu|vertaal|english|german|french|spanish|italian|portugu|dutch|polish|"
    r"swedish|turkish|indonesian|chinese|japanese|korean|russian|arabic|hebrew|greek|hindi|thai|"
    r"deutsch|français|español|italiano|languages?\b|bahasa|latin|poem|song|lyrics",
    re.IGNORECASE,
)


def language(text: str) -> int:
    """Place in ``LANGUAGES`` of the language of a text; 0 where it cannot be told."""
    start = text[:250]
    if not start.isascii() and _ANY_SCRIPT.search(start):
        found = Counter(match.lastindex for match in _SCRIPT.finditer(start))
        if found:
            # a few kana make Japanese of many Han characters
            first = 1 if found[1] > 3 else found.most_common(1)[0][0] or 1
            if 3 * sum(found.values()) > sum(map(str.isalpha, start)):
                return _ID[_SCRIPTS[first - 1][0]]
    words = start.lower().split(None, _FIRST_WORDS)
    if len(words) < _LEAST_WORDS:
        return 0
    hits = list(filter(None, map(_OWN.get, words)))
    if len(hits) < _LEAST_HITS:
        return 0
    best = max(set(hits), key=hits.count)
    return best if hits.count(best) >= _LEAST_SHARE * len(hits) else 0


def asks_for_language(prompt: str) -> bool:
    """Whether a prompt names a language, so that an answer in one is no surprise."""
    return _ASKS.search(prompt[-4000:]) is not None or not prompt.isascii()


_MAIN_SHARE, _RARE_SHARE, _LEAST_ROWS = 0.8, 0.01, 50


def foreign(languages: np.ndarray) -> np.ndarray:
    """Which rows are in a language that is rare here, where one language is usual.

    Args:
        languages: As ``language`` gave them; negative where the prompt asks for one.
    """
    none = np.zeros(len(languages), bool)
    told = np.abs(languages[languages != 0].astype(np.int64))
    if len(told) < _LEAST_ROWS:
        return none
    counts = np.bincount(told, minlength=len(LANGUAGES))
    if counts.max() < _MAIN_SHARE * len(told):
        return none
    rare = np.flatnonzero((counts > 0) & (counts < _RARE_SHARE * len(told)))
    return np.isin(languages, rare[rare > 0])


_DEVIATIONS, _TIMES, _LEAST_LONG_CHARS = 5.0, 12, 3000
_SHORT_TIMES, _SHORT_CHARS = 25, 12


def lengths(chars: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Which answers are far too long and far too short, in robust deviations of their logarithm.

    Args:
        chars: Length of each answer; 0 where there is none.
    """
    none = np.zeros(len(chars), bool)
    known = chars[chars > 0]
    if len(known) < _LEAST_ROWS:
        return none, none
    logs = np.log(known)
    middle = float(np.median(logs))
    spread = max(1.4826 * float(np.median(np.abs(logs - middle))), 0.15)
    usual = float(np.exp(middle))
    over = np.log(np.maximum(chars, 1)) - middle
    long = (over > _DEVIATIONS * spread) & (chars > _TIMES * usual) & (chars >= _LEAST_LONG_CHARS)
    short = (chars > 0) & (over < -_DEVIATIONS * spread) & (chars * _SHORT_TIMES < usual)
    short &= chars <= _SHORT_CHARS
    if short.sum() > _RARE_SHARE * len(known):  # short answers are usual here
        short[:] = False
    return long, short
