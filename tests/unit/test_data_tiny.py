"""The tokenizers that the data tests share: small, built here, byte-level like SmolLM2's.

``pad_token`` equals ``eos_token``, as in SmolLM2, because masking by pad id is the classic way to
lose the EOS.
"""

from __future__ import annotations

import functools
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# SmolLM2-Instruct's template: a system turn appears where the conversation brings none.
SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are SmolLM<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|end|>", "<|user|>", "<|assistant|>"]
_WORDS = ["hello", "world", "bye", "now", "user", "assistant", "system", "You", "are", "SmolLM"]
_CORPUS = [*_WORDS, *(" " + word for word in _WORDS), "###", "\n\n\n\n"]


@functools.cache
def _trained() -> str:
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator(_CORPUS * 9, trainer)
    return str(raw.to_str())


def tiny(
    chat_template: str | None = CHATML, *, adds_bos: bool = False, **special: Any
) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer in which every word of the tests is one token."""
    raw = Tokenizer.from_str(_trained())
    if adds_bos:
        raw.post_processor = processors.TemplateProcessing(
            single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
        )
    names = {"eos_token": "<|im_end|>", "pad_token": "<|im_end|>", "bos_token": "<|im_start|>"}
    if adds_bos:
        names["bos_token"] = "<|endoftext|>"
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, **{**names, **special})
    tokenizer.chat_template = chat_template
    return tokenizer


def user(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


def pieces(tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> list[str]:
    """Each token as text."""
    return [tokenizer.decode([i]) for i in ids]


def test_words_are_single_tokens_and_pad_is_eos() -> None:
    tokenizer = tiny()
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 2
    for word in ("hello", "world", "Ġworld", "user", "assistant", "system"):
        assert word in tokenizer.get_vocab()
