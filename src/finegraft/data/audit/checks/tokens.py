"""What a model's tokenizer and template make of the rows: cut answers, nothing learnt, no end."""

from __future__ import annotations

from finegraft.data.audit._contract import Check

CUT, MASKED, NO_END, REFUSED, UNKNOWN = (f"FG-CHECK-{n:03d}" for n in range(100, 105))

CHECKS = (
    Check(
        CUT,
        "an answer is cut off by max_length",
        "warning",
        "The row has more tokens than max_length, and what is beyond is not trained, the end of "
        "the answer above all: the model does not learn to stop.",
        "Train with the max_length that the message names, or shorten the rows.",
        "1,300 tokens with max_length 1,024",
    ),
    Check(
        MASKED,
        "a row of which nothing is learnt",
        "error",
        "The prompt alone fills max_length, or every answer has weight 0. Training leaves it out.",
        "Raise max_length, or remove the row.",
        "a prompt of 1,100 tokens with max_length 1,024",
    ),
    Check(
        NO_END,
        "no token that ends the answer is learnt",
        "warning",
        "Neither the template nor the tokenizer ends these rows, so generation would not stop.",
        "Use another chat_template, or a tokenizer with an end token.",
        "a template whose turns end with a line break only",
    ),
    Check(
        REFUSED,
        "the chat template refuses the conversation",
        "error",
        "Templates may ask for turns in order, or know no system message or no tools.",
        "Change the rows as it says, or set chat_template.",
        "system, user, assistant with a template without system",
    ),
    Check(
        UNKNOWN,
        "characters that the tokenizer does not know",
        "warning",
        "They become the unknown token; the model cannot learn to write them.",
        "Use a model with a larger vocabulary, or take them out.",
        "an emoji with the vocabulary of 2018",
    ),
)
