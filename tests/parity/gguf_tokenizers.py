"""Tokenizers for the tests of GGUF, one of each kind that llama.cpp has."""

from __future__ import annotations

from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import BertTokenizerFast, PreTrainedTokenizerFast

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
CORPUS = [
    "the other three theories, there and then: it's IT'S we'll WE'LL o'clock they'd",
    "one two  three   four\n\nfive\r\n six\t seven ...!? ((eight)) [nine]/10 //\n",
    "1234 123 12 1 2024 3.14 1,000,000 $100 50% a1b22c333 v2.5b3",
    "camelCase XMLHttp HTTPServer ÄÖÜß naïve café éclair русский текст 中文字符 日本語 🙂👍🏽",
]
# Token ids must be the same on all of these; the first is empty but for a blank.
TEXTS = [
    " ",
    "hello world",
    " leading and trailing ",
    "two  blanks, three   blanks,\ttab\t\ttabs",
    "lines\n\nand\r\nmore\n \n  end\n",
    "1 22 333 4444 55555 666666 7 000,000.00 3.14159",
    "It's IT'S we'll WE'LL they've o'clock 'quoted' d'accord",
    "Grüße aus Köln, naïve café, señor, Ægir, Łódź",
    "русский текст, ελληνικά, עברית, العربية, हिन्दी, ไทย",
    "中文字符 日本語カナ 한국어",
    "🙂 👍🏽 👨‍👩‍👧 🇨🇭 ✅",
    "def f(x):\n    return x**2  # comment\n\nif __name__ == '__main__':\n\tprint(f(3))",
    'https://example.org/a?b=c&d=e#f <tag attr="v"/> {json: [1, 2]} \\n \\t',
    "CamelCase XMLHttpRequest snake_case kebab-case SCREAMING_CASE",
    "\u00a0nbsp\u2003em\u3000wide\u200bzero",
    "a\u0301 combining e\u0308",
    "<s>tags</s> <|im_start|>user\nhi<|im_end|>\n",
]


def byte_level(split: Any = None, *, size: int = 312, adds_bos: bool = False, **model: Any) -> Any:
    """Byte-level BPE that splits by ``split``, by GPT-2's rule if None."""
    raw = Tokenizer(models.BPE(**model))
    raw.pre_tokenizer = split or pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator(CORPUS * 3, trainer)
    if adds_bos:
        raw.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 1)]
        )
    made = PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    made.chat_template = CHATML
    return made


_MERGED = [
    "▁t", "he", "▁the", "in", "er", "▁a", "on", "re", "an", "▁o", "▁w", "or", "▁th", "ing",
    "▁in", "nd", "▁and", "▁b", "ther", "▁other", "ll", "▁we", "es", "▁▁",
]  # fmt: skip


def _pairs(vocabulary: list[str]) -> list[tuple[str, str]]:
    """Every way to make a token of two others, in the order of tokens, as converters do."""
    known = set(vocabulary)
    return [
        (token[:i], token[i:])
        for token in vocabulary
        for i in range(1, len(token))
        if token[:i] in known and token[i:] in known
    ]


def sentencepiece(*, prefix: bool = True) -> Any:
    """SentencePiece-like BPE with byte fallback; ``prefix`` puts a blank first, as Llama 2 does."""
    chars = ["▁", *"abcdefghijklmnopqrstuvwxyz.,é"]
    specials = ["<pad>", "<s>", "</s>", "<unk>"]
    listed = [*specials, *(f"<0x{i:02X}>" for i in range(256)), *chars, *_MERGED]
    merges = _pairs([*chars, *_MERGED])
    raw = Tokenizer(
        models.BPE(
            vocab={token: i for i, token in enumerate(listed)},
            merges=merges,
            unk_token="<unk>",
            byte_fallback=True,
            fuse_unk=True,
        )
    )
    steps = [normalizers.Prepend("▁")] if prefix else []
    raw.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    raw.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    raw.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in specials])
    raw.add_tokens([AddedToken("<tool>", normalized=False)])
    raw.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        pad_token="<pad>",
    )  # fmt: skip


def wordpiece(*, lowercase: bool = True) -> Any:
    """BERT's WordPiece."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "##re", "other", "##s", "hello",
             "world", "Hello", "it", "'", ",", ".", "!", "?", "cafe", "café", "中", "文",
             *"abcdefghijklmnopqrstuvwxyz", *(f"##{c}" for c in "abcdefghijklmnopqrstuvwxyz"),
             *"0123456789", *(f"##{d}" for d in "0123456789")]  # fmt: skip
    vocab = {word: i for i, word in enumerate(dict.fromkeys(words))}
    raw = Tokenizer(models.WordPiece(vocab=vocab, unk_token="[UNK]"))
    raw.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    raw.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    raw.decoder = decoders.WordPiece()
    raw.add_special_tokens(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"])
    raw.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return BertTokenizerFast(tokenizer_object=raw, do_lower_case=lowercase)


def unknown_split() -> Any:
    """Byte-level BPE with a rule of its own."""
    own = [
        pre_tokenizers.Split(Regex(r"[aeiou]+"), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
    return byte_level(pre_tokenizers.Sequence(own))
