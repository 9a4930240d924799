"""What belongs to templates and protocols and stands inside texts."""

from __future__ import annotations

import re

from finegraft.data.audit._contract import Check, Scan

TEMPLATE, TURNS, THINK, FENCE = (f"FG-CHECK-{n:03d}" for n in range(70, 74))

_TOKENS = (
    *("<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|begin_of_text|>"),
    *("<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|user|>", "<|assistant|>"),
    *("<|system|>", "<|end|>", "<|eom_id|>", "<|python_tag|>", "<start_of_turn>", "<end_of_turn>"),
    *("[INST]", "[/INST]", "<<SYS>>", "<</SYS>>", "[BOS]", "[EOS]", "<bos>", "<eos>", "</s>"),
    *("<pad>", "<unk>", "<|start|>", "<|channel|>", "<|return|>"),
)
# </s> and <pad> end a text where they come from a template; HTML has <s> as well
_TEMPLATE = re.compile(
    "|".join(re.escape(t) for t in _TOKENS if t != "</s>") + r"|</s>(?=\s*(?:\Z|<s>|\[INST\]))"
)
_TURNS = re.compile(
    r"(?:\A|\n)(?:### ?)?(?:Human|User|USER|HUMAN|Instruction)(?: ?\d+)?:[ \n]"
    r"|\n(?:### ?)?(?:Assistant|ASSISTANT|Response):[ \n]"
)

CHECKS = (
    Check(
        TEMPLATE,
        "a token of a chat template inside a text",
        "warning",
        "The text was rendered before and would be rendered again: the model sees two ends of a "
        "turn, and a user could close his own turn.",
        "Take the tokens out and let the template put them in; --fix takes them out.",
        "The answer is 4.<|im_end|>",
        "change",
        lambda text: _TEMPLATE.sub("", text),
    ),
    Check(
        TURNS,
        "an answer that goes on with the next turn",
        "warning",
        "The answer holds the user's next question too. The model learns not to stop.",
        "Cut the answer there, or make turns of it.",
        "It is 4.\\nUser: And 3 + 3?",
    ),
    Check(
        THINK,
        "a thinking block that is not closed, or not opened",
        "warning",
        "The model learns to think without end, or to answer inside its thoughts.",
        "Write both <think> and </think>.",
        "<think>Two and two make four. 4",
    ),
    Check(
        FENCE,
        "a code block that is not closed",
        "warning",
        "The answer was cut off by a limit of length, in the middle of its code.",
        "Take the whole answer from its source, or remove the row.",
        "```python\\nprint(",
    ),
)


def _one_sided(match: re.Match[str]) -> bool:
    return match.string.count("<think>") != match.string.count("</think>")


def _open_fence(match: re.Match[str]) -> bool:
    return len(re.findall(r"(?m)^[ \t>]*(?:[-*\d.]+ +)?```", match.string)) % 2 == 1


SCANS = (
    Scan(TEMPLATE, _TEMPLATE, tuple(token.lower() for token in _TOKENS)),
    Scan(
        TURNS,
        _TURNS,
        ("human:", "user:", "instruction:", "assistant:", "response:", "\nai:", "\nbot:", "\ngpt:"),
        shapes=(),
        where="answers",
    ),
    Scan(
        THINK, re.compile(r"</?think>"), ("<think>", "</think>"), accept=_one_sided, where="answers"
    ),
    Scan(FENCE, re.compile(r"```"), ("```",), accept=_open_fence, where="answers"),
)
