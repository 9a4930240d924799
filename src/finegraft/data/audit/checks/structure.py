"""Rows that are not what training reads: fields, types, roles, and too few of them."""

from __future__ import annotations

from finegraft.data.audit._contract import Check

UNREADABLE, NOT_OBJECT, EMPTY, BLANK, NULL, TYPE, MISSING, ROLE = (
    f"FG-CHECK-{n:03d}" for n in range(1, 9)
)
ORDER, UNANSWERED, EMPTY_SYSTEM, NO_ANSWER, FEW, NO_TURNS, ECHO, TOOL_JSON = (
    f"FG-CHECK-{n:03d}" for n in range(10, 18)
)
LEAST_ROWS, USEFUL_ROWS = 10, 50

CHECKS = (
    Check(
        UNREADABLE,
        "a line that is not JSON",
        "error",
        "The file was cut off, written by hand, or two writers wrote at once. Training refuses it.",
        "Correct the line, or remove it with --fix.",
        '{"prompt": "What is 2 + 2?", "completion": ',
        "remove",
    ),
    Check(
        NOT_OBJECT,
        "a line of JSON that is not an object",
        "error",
        "Rows are objects with named fields; a list, a text or a number has no names.",
        "Write the row as an object, or remove it with --fix.",
        '["What is 2 + 2?", "4"]',
        "remove",
    ),
    Check(
        EMPTY,
        "an empty field",
        "error",
        "A prompt or answer of no characters teaches the model to say nothing.",
        "Fill the field in, or remove the row with --fix.",
        '{"prompt": "What is 2 + 2?", "completion": ""}',
        "remove",
    ),
    Check(
        BLANK,
        "a field of spaces only",
        "error",
        "Spaces look filled in to a program that only asks whether a field is empty.",
        "Fill the field in, or remove the row with --fix.",
        '{"prompt": "   ", "completion": "4"}',
        "remove",
    ),
    Check(
        NULL,
        "a field that is null (or NaN)",
        "error",
        "A join or a spreadsheet left a hole. Written out it would train the word nan.",
        "Fill the field in, or remove the row with --fix.",
        '{"prompt": "What is 2 + 2?", "completion": null}',
        "remove",
    ),
    Check(
        TYPE,
        "a field of the wrong type",
        "error",
        "Where text is expected there is an object, a list or something else without a reading.",
        "Write the field as text, or remove the row with --fix.",
        '{"prompt": {"text": "What is 2 + 2?"}, "completion": "4"}',
        "remove",
    ),
    Check(
        MISSING,
        "a field that most rows have is not there",
        "error",
        "Files with different columns were put together, or a name is misspelt in some rows.",
        "Name the fields alike in all rows, or remove the row with --fix.",
        '{"prompt": "What is 2 + 2?", "compeltion": "4"}',
        "remove",
    ),
    Check(
        ROLE,
        "a message whose role is not known",
        "error",
        "Templates know system, user, assistant and tool (and a few names for these).",
        "Rename the role, or remove the row with --fix.",
        '{"messages": [{"role": "asistant", "content": "4"}]}',
        "remove",
    ),
    Check(
        ORDER,
        "roles out of order",
        "warning",
        "After an optional system message, users and assistants take turns, and a tool answers a "
        "call. Many templates refuse or silently merge anything else.",
        "Join what one side says in a row, and move the system message to the start.",
        "user, user, assistant",
    ),
    Check(
        UNANSWERED,
        "the last turn has no answer",
        "warning",
        "The conversation ends with the user. The last turn is read and nothing is learnt from it.",
        "Add the answer; --fix cuts the turn off.",
        "user, assistant, user",
        "change",
    ),
    Check(
        EMPTY_SYSTEM,
        "an empty system message",
        "warning",
        "The model learns to act on an empty system block, which inference will not send.",
        "Write one, or remove the message; --fix removes it.",
        '{"role": "system", "content": ""}',
        "change",
    ),
    Check(
        NO_ANSWER,
        "a conversation without any answer",
        "error",
        "No message is the assistant's, so there is nothing to learn.",
        "Add an answer, or remove the row with --fix.",
        "user, user",
        "remove",
    ),
    Check(
        FEW,
        "too few rows",
        "warning",
        "OpenAI's guide to fine-tuning asks for 10 rows at least, and sees clear improvement from "
        "50 to 100. Below 10 the verdict is not to train. Source: "
        "https://platform.openai.com/docs/guides/supervised-fine-tuning",
        "Collect more rows; 50 good ones are a start.",
        "a file of 8 rows",
    ),
    Check(
        NO_TURNS,
        "a conversation without messages",
        "error",
        "The list of messages is empty.",
        "Remove the row with --fix.",
        '{"messages": []}',
        "remove",
    ),
    Check(
        ECHO,
        "the answer repeats its prompt",
        "warning",
        "A column was copied twice. The model learns to echo.",
        "Put the real answer in.",
        '{"prompt": "What is 2 + 2?", "completion": "What is 2 + 2?"}',
        "remove",
    ),
    Check(
        TOOL_JSON,
        "a tool call whose arguments are not JSON",
        "error",
        "The model learns to make calls that no program can read. Training refuses the row.",
        "Correct the arguments, or remove the row with --fix.",
        '{"function": {"name": "add", "arguments": "{a: 1,"}}',
        "remove",
    ),
)
