"""Slot filling on a real encoder, through the command line: cities, dates and amounts of money."""

from __future__ import annotations

import json
import random
import re

from command_line import finegraft

# Names that no vocabulary holds; the held-out rows have other ones than the training rows.
_BEGIN = [
    "Bar",
    "Hol",
    "Kel",
    "Mor",
    "Tan",
    "Vel",
    "Ash",
    "Brin",
    "Cor",
    "Dun",
    "Fen",
    "Gal",
    "Har",
    "Ing",
    "Jor",
    "Lan",
    "Nor",
    "Pel",
    "Ros",
    "Sel",
]
_END = [
    "berg",
    "dorf",
    "ville",
    "ton",
    "grad",
    "minster",
    "stadt",
    "field",
    "haven",
    "mouth",
    "port",
    "wick",
]
_MONTHS = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
]
_DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
_SENTENCES = (
    "book a flight from {city} to {city} on {date}",
    "I need a ticket to {city} for {date} below {amount}",
    "is there anything to {city} under {amount}?",
    "my order from {date} cost {amount}, please refund it",
    "please cancel the order of {amount} that went to {city}",
    "I will be in {city} {date} and can pay {amount}",
    "ship it to {city} before {date}",
    "what is the weather in {city} on {date}",
    "can you show me my open orders",
)


def made(dice, cities):
    """One row: a sentence with its slots filled."""
    number = dice.randint(2, 900)
    text, entities = "", []
    for part in re.split(r"(\{\w+\})", dice.choice(_SENTENCES)):
        kind = part.strip("{}") if part.startswith("{") else None
        if kind == "city":
            part = dice.choice(cities)
        elif kind == "date":
            day, month = dice.randint(1, 28), dice.choice(_MONTHS)
            part = dice.choice(
                (f"{month} {day}", f"{day} {month}", f"next {dice.choice(_DAYS)}", f"{day}/7/2025")
            )
        elif kind == "amount":
            part = dice.choice((f"${number}", f"{number} euros", f"{number}.50 dollars"))
        if kind:
            entities.append({"start": len(text), "end": len(text) + len(part), "label": kind})
        text += part
    return {"text": text, "entities": entities}


def write(path, dice, cities, count):
    rows = [made(dice, cities) for _ in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


def test_slots_with_names_never_seen(tmp_path):
    """600 rows teach entity F1 of 0.9 and more, and the saved run finds the same spans."""
    dice = random.Random(1)
    cities = [begin + end for begin in _BEGIN for end in _END]
    dice.shuffle(cities)
    write(tmp_path / "train.jsonl", dice, cities[:160], 600)
    held = write(tmp_path / "held.jsonl", dice, cities[160:], 150)
    done = finegraft(
        *("train", "--task", "token_classification", "--model", "demo-encoder"),
        *("--data", "train.jsonl", "--eval-data", "held.jsonl", "--output", "run", "--json"),
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    metrics = json.loads(done.stdout)["metrics"]
    assert metrics["f1"] >= 0.9 and set(metrics["per_class"]) == {"amount", "city", "date"}
    done = finegraft("predict", "run", "--file", "held.jsonl", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    right = wanted = found = 0
    for row, said in zip(held, json.loads(done.stdout)["predictions"], strict=True):
        true = {(e["start"], e["end"], e["label"]) for e in row["entities"]}
        told = {(e["start"], e["end"], e["label"]) for e in said["entities"]}
        right, wanted, found = right + len(true & told), wanted + len(true), found + len(told)
    assert abs(2 * right / (wanted + found) - metrics["f1"]) < 0.01
