"""Rows that stand there twice, contradict each other, or are in the held-out file as well."""

from __future__ import annotations

from finegraft.data.audit._contract import Check

EXACT, NEAR, CONFLICT, LEAK, NEAR_LEAK = (f"FG-CHECK-{n:03d}" for n in range(20, 25))

CHECKS = (
    Check(
        EXACT,
        "the same row once more",
        "warning",
        "Apart from case and spacing the whole row stands there before. It counts twice in "
        "training, and if one copy is held out the measured quality is too good.",
        "Keep the first; --fix removes the others.",
        "rows 4 and 17 are equal",
        "remove",
    ),
    Check(
        NEAR,
        "almost the same row once more",
        "warning",
        "At least 80% of its groups of three words (Jaccard) are those of an earlier row, and all "
        "its numbers. Source: Broder 1997, On the resemblance and containment of documents.",
        "Keep one of them; --fix removes the later one.",
        "What is the capital of France, please? / Please: what is the capital of France?",
        "remove",
    ),
    Check(
        CONFLICT,
        "the same prompt has different answers",
        "warning",
        "The model is pulled to both and learns neither. Where several answers are right (stories, "
        "translations) this is fine.",
        "Keep the right one.",
        "What is 2 + 2? 4 / What is 2 + 2? 5",
    ),
    Check(
        LEAK,
        "the prompt is in the held-out rows too",
        "warning",
        "What was trained cannot be tested: the measured quality will be too good.",
        "Remove it on one side; --fix removes it here.",
        "row 7 is row 2 of eval.jsonl",
        "remove",
    ),
    Check(
        NEAR_LEAK,
        "almost a row of the held-out ones",
        "warning",
        "As for near duplicates, but across the two files: the test is easier than the work.",
        "Remove it on one side; --fix removes it here.",
        "row 7 is nearly row 2 of eval.jsonl",
        "remove",
    ),
)
