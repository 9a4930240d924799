"""A tokenizer as llama.cpp reads it.

What: ``read`` turns a fast tokenizer into tokens, types, scores or merges, special ids and flags;
``Vocabulary.write`` puts them into a file. How: everything comes from the tokenizer itself, and
what its file spells in many ways (a leading blank, a first token) is found by trying it. Three
kinds: byte-level BPE, SentencePiece-like BPE with byte fallback, WordPiece. Constraint: as many
tokens as the embedding has rows; rows without a token are marked unused. Trade-off: tokens that
swallow blanks beside them (``lstrip``, ``rstrip``) cannot be told to llama.cpp, except for Phi-3's;
a warning says so.

SentencePiece scores are not in ``tokenizer.json``. They only order the merges, and so does the
place of a token's merge in the list: the score is minus that place.
"""

from __future__ import annotations

import json
import logging
import re
from dataclasses import dataclass, field
from typing import Any

from gguf import GGUFWriter, TokenType

from finegraft.core.errors import ExportError
from finegraft.export.gguf import pretokenizers

logger = logging.getLogger(__name__)

_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_BLANK = "\u2581"
_PHI3 = re.compile("phi-?3", re.IGNORECASE)
# Tokens that llama.cpp looks up in a Phi-3, of which the last three swallow nothing.
_PHI3_TOKENS = ("</s>", "<unk>", "<s>", "<|endoftext|>")
_SPECIAL = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")


@dataclass
class Vocabulary:
    """What a GGUF file says about its tokenizer.

    Attributes:
        model: ``gpt2``, ``llama`` (SentencePiece) or ``bert``.
        pre: Name of the splitting rule.
        ids: Special ids by llama.cpp's names.
        flags: Booleans under ``tokenizer.ggml``.
        strips: Whether special tokens swallow blanks behind them as Phi-3's do.
    """

    model: str
    pre: str
    tokens: list[str]
    types: list[int]
    scores: list[float] | None = None
    merges: list[str] | None = None
    ids: dict[str, int] = field(default_factory=dict)
    flags: dict[str, bool] = field(default_factory=dict)
    template: Any = None
    strips: bool = False

    def model_name(self, name: str) -> str:
        """``name`` as it must stand in the file.

        llama.cpp takes the rules for blanks beside Phi-3's special tokens from the model's name,
        and fails to load a file of that name that lacks the tokens.
        """
        if self.strips and not _PHI3.search(name):
            return f"{name} (phi-3)"
        return name if self.strips else _PHI3.sub("phi 3", name)

    def write(self, writer: GGUFWriter) -> None:
        """Add the ``tokenizer`` keys to a file."""
        writer.add_tokenizer_model(self.model)
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.types)
        if self.scores is not None:
            writer.add_token_scores(self.scores)
        if self.merges is not None:
            writer.add_token_merges(self.merges)
        for name, value in self.ids.items():
            getattr(writer, f"add_{name}_token_id")(value)
        for name, value in self.flags.items():
            writer.add_bool(f"tokenizer.ggml.{name}", value)
        if self.template:
            writer.add_chat_template(self.template)


def _refuse(found: str) -> ExportError:
    return ExportError(
        "FG-EXPORT-006",
        f"this tokenizer cannot be written as GGUF: {found}",
        allowed="fast tokenizers: byte-level BPE, SentencePiece-like BPE, BERT's WordPiece",
        fix="use the tokenizer that the base model was published with",
    )


def read(
    tokenizer: Any, rows: int, *, pre_tokenizer: str | None = None, ends: tuple[int, ...] = ()
) -> Vocabulary:
    """Return the vocabulary of a tokenizer.

    Args:
        tokenizer: From transformers, fast.
        rows: Of the embedding.
        pre_tokenizer: llama.cpp's name of the splitting rule; None: found by comparing.
        ends: Ids that end an answer, as the generation settings say.

    Raises:
        ExportError: FG-EXPORT-006 a kind that llama.cpp lacks, FG-EXPORT-007 an unknown splitting
            rule, FG-EXPORT-008 more tokens than rows.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise _refuse(f"{type(tokenizer).__name__} is not a fast tokenizer")
    whole = json.loads(backend.to_str())
    tokens, types = _tokens(tokenizer, whole, rows)
    kind = whole["model"]["type"]
    if kind == "BPE" and whole["model"].get("byte_fallback"):
        found = _sentencepiece(backend, whole, tokens, types)
    elif kind == "BPE":
        pre = pretokenizers.detect(backend, pre_tokenizer)
        found = Vocabulary("gpt2", pre, tokens, types, merges=_merges(whole))
    elif kind == "WordPiece":
        found = _wordpiece(whole, tokens, types)
    else:
        raise _refuse(f"a model of type {kind}")
    found.ids = _special_ids(tokenizer, found.model, rows, ends)
    found.flags |= _added(tokenizer, found.ids, whole)
    found.template = _templates(tokenizer)
    found.strips = _strips_like_phi3(whole)
    return found


def _tokens(tokenizer: Any, whole: dict[str, Any], rows: int) -> tuple[list[str], list[int]]:
    """Token texts and types by id, with fillers for rows that have none."""
    ids = {index: text for text, index in tokenizer.get_vocab().items()}
    if ids and max(ids) >= rows:
        raise ExportError(
            "FG-EXPORT-008",
            f"the tokenizer has {max(ids) + 1:,} tokens and the embedding {rows:,} rows",
            allowed="a row for every token",
            fix="resize the embedding before training: new_tokens=[...] does it; or pass the "
            "tokenizer that belongs to these weights",
        )
    tokens = [ids.get(i, f"[PAD{i}]") for i in range(rows)]
    types = [int(TokenType.NORMAL if i in ids else TokenType.UNUSED) for i in range(rows)]
    byte_fallback = whole["model"].get("byte_fallback")
    for index, text in ids.items():
        if byte_fallback and _BYTE.fullmatch(text):
            types[index] = int(TokenType.BYTE)
    for added in whole["added_tokens"]:
        index, text = added["id"], added["content"]
        types[index] = int(TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED)
        # llama.cpp looks for these in the text as it is, before blanks are rewritten
        tokens[index] = text if added["special"] else text.replace(_BLANK, " ")
    return tokens, types


def _merges(whole: dict[str, Any]) -> list[str]:
    return [pair if isinstance(pair, str) else " ".join(pair) for pair in whole["model"]["merges"]]


def _sentencepiece(
    backend: Any, whole: dict[str, Any], tokens: list[str], types: list[int]
) -> Vocabulary:
    prefix = _blank_in_front(backend, whole)
    merges = [pair.split(" ", 1) for pair in _merges(whole)]
    rank: dict[str, int] = {}
    for place, (left, right) in enumerate(merges):
        rank.setdefault(left + right, place)
    # What no merge makes comes last, should its parts ever lie side by side.
    scores = [float(-rank.get(token, len(merges))) for token in tokens]
    unknown = whole["model"].get("unk_token")
    if unknown in tokens:
        types[tokens.index(unknown)] = int(TokenType.UNKNOWN)
    return Vocabulary(
        "llama", "default", tokens, types, scores=scores, flags={"add_space_prefix": prefix}
    )


def _blank_in_front(backend: Any, whole: dict[str, Any]) -> bool:
    """Whether text gets a blank in front; refuses what else happens to it."""
    text = "one  two\n three é"
    changed = backend.normalizer.normalize_str(text) if backend.normalizer else text
    if backend.pre_tokenizer:
        parts = [part for part, _ in backend.pre_tokenizer.pre_tokenize_str(changed)]
    else:
        parts = [changed]
    plain = text.replace(" ", _BLANK)
    joined = "".join(parts)
    if joined not in (plain, _BLANK + plain):
        raise _refuse(f"it rewrites {text!r} to {joined!r}")
    vocab = whole["model"]["vocab"]
    if len(parts) > 1 and any(_BLANK in token[1:] for token in vocab):
        raise _refuse("it splits at blanks and has tokens that span them")
    prefix = joined != plain
    scheme = (whole.get("pre_tokenizer") or {}).get("prepend_scheme")
    if prefix and scheme == "first":
        logger.warning(
            "llama.cpp puts a blank in front of text after a special token as well, this "
            "tokenizer only at the very beginning"
        )
    return prefix


def _wordpiece(whole: dict[str, Any], tokens: list[str], types: list[int]) -> Vocabulary:
    normalizer = whole.get("normalizer") or {}
    if normalizer.get("type") != "BertNormalizer":
        raise _refuse(f"WordPiece after the normalizer {normalizer.get('type')}")
    if not normalizer.get("handle_chinese_chars", True):
        raise _refuse("WordPiece that does not split Chinese characters")
    inner = whole["model"]["continuing_subword_prefix"]
    special = (int(TokenType.CONTROL), int(TokenType.UNUSED))

    def phantom(text: str, kind: int) -> str:
        """Beginnings of words carry a blank, continuations nothing."""
        if kind in special:
            return text
        return text.removeprefix(inner) if text.startswith(inner) else _BLANK + text

    found = [phantom(text, kind) for text, kind in zip(tokens, types, strict=True)]
    lowercase = bool(normalizer.get("lowercase", True))
    accents = normalizer.get("strip_accents")
    flags = {
        "normalizer.lowercase": lowercase,
        "normalizer.strip_accents": lowercase if accents is None else bool(accents),
    }
    return Vocabulary("bert", "default", found, types, flags=flags)


def _special_ids(tokenizer: Any, model: str, rows: int, ends: tuple[int, ...]) -> dict[str, int]:
    found = {name: getattr(tokenizer, f"{name}_token_id", None) for name in _SPECIAL}
    if model == "bert":
        found["bos"] = found["cls"] if found["bos"] is None else found["bos"]
        found["eos"] = found["sep"] if found["eos"] is None else found["eos"]
        ends = ()  # nothing is generated
    found.pop("cls")  # llama.cpp reads bos in its place
    others = [end for end in ends if end != found["eos"] and end < rows]
    found |= dict(zip(("eot", "eom"), others, strict=False))
    if len(others) > 2:
        logger.warning("llama.cpp takes three ids that end an answer, %s are left out", others[2:])
    return {name: value for name, value in found.items() if value is not None}


def _added(tokenizer: Any, ids: dict[str, int], whole: dict[str, Any]) -> dict[str, bool]:
    """Whether a beginning and an end are added to a text, found by tokenizing one."""
    word = next(iter(whole["model"]["vocab"]))
    plain = tokenizer(word, add_special_tokens=False)["input_ids"]
    full = tokenizer(word)["input_ids"]
    start = len(full) - len(plain)
    places = [i for i in range(start + 1) if full[i : i + len(plain)] == plain]
    if not places:
        raise _refuse("special tokens change how the text beside them is split")
    before, after = full[: places[0]], full[places[0] + len(plain) :]
    if before not in ([], [ids.get("bos")]) or after not in ([], [ids.get("eos")]):
        raise _refuse(f"it puts ids {before} before and {after} after a text")
    return {"add_bos_token": bool(before), "add_eos_token": bool(after)}


def _templates(tokenizer: Any) -> Any:
    found = getattr(tokenizer, "chat_template", None)
    if isinstance(found, dict):
        return [{"name": name, "template": text} for name, text in found.items()]
    return found


def _strips_like_phi3(whole: dict[str, Any]) -> bool:
    """Whether the tokens that swallow blanks are those of Phi-3; warns of others."""
    added = whole["added_tokens"]
    left = [token["content"] for token in added if token.get("lstrip")]
    right = {token["content"] for token in added if token.get("rstrip")}
    names = {token["content"] for token in added}
    known = bool(right) and not left and names.issuperset(_PHI3_TOKENS)
    if known and right == names.difference(_PHI3_TOKENS[1:]):
        return True
    if left or right:
        logger.warning(
            "llama.cpp keeps the blanks beside %s, this tokenizer swallows them",
            ", ".join([*left, *sorted(right)][:5]),
        )
    return False
