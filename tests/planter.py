"""Rows that are clean, rows with planted faults whose places are known, and fuzzed lines.

The clean rows are meant to be hard: names, addresses of the web, code with braces, dates, prices,
versions, tables, formulas, other languages where they were asked for, and questions in the same
form about different things. What is planted is returned beside the rows: code to row numbers.
"""

# ruff: noqa: E501, SIM905
from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

Row = dict[str, Any]
Truth = dict[str, list[int]]

_NAMES = (
    "Anna Keller,Bo Lindqvist,Chidi Okafor,Dana Rossi,Elif Demir,Farid Haddad,Grace Liu,Hugo Meyer,"
    "Ines Duarte,Jonas Weber,Kofi Mensah,Lena Fischer,Mateo Cruz,Nadia Petrova,Omar Aziz,Priya Nair"
).split(",")
_PLACES = (
    "Lisbon,Oslo,Nairobi,Quito,Hanoi,Tallinn,Cork,Graz,Leeds,Porto,Lyon,Bergen,Accra,Osaka,Perth,"
    "Turin,Ghent,Malmo,Denver,Austin"
).split(",")
_THINGS = (
    "bridge,harbour,library,bakery,violin,telescope,glacier,orchard,engine,lantern,archive,meadow,"
    "turbine,compass,notebook,kitchen,tunnel,market,garden,workshop,battery,sensor,kernel,cache,"
    "compiler,ledger,invoice,contract,vaccine,enzyme,neuron,galaxy,isotope,reef,canyon,monsoon,"
    "harvest,festival,museum,cathedral,stadium,railway,ferry,bicycle,helmet,lens,mirror,pump"
).split(",")
_QUALITIES = (
    "old,narrow,quiet,bright,heavy,cheap,rare,steady,wooden,steep,cold,early,remote,public,fragile,"
    "modern,hollow,curved,northern,dense,careful,brief,plain,sturdy,silent,sharp,distant,warm"
).split(",")
_DEEDS = (
    "repaired,measured,painted,sold,opened,closed,studied,moved,lost,found,built,rented,cleaned,"
    "photographed,described,replaced,tested,visited,inherited,designed,copied,shipped,borrowed"
).split(",")
_WHEN = (
    "in the spring,after the storm,before noon,during the strike,last winter,on a Tuesday,by accident,"
    "for a friend,without help,over two weeks,at night,in a hurry,once a year,under contract,at last"
).split(",")
_COUNTRIES = (
    "France:Paris,Japan:Tokyo,Peru:Lima,Kenya:Nairobi,Norway:Oslo,Chile:Santiago,Egypt:Cairo,"
    "Italy:Rome,Spain:Madrid,Ghana:Accra,Cuba:Havana,Nepal:Kathmandu,Austria:Vienna,Poland:Warsaw,"
    "Greece:Athens,Ireland:Dublin,Canada:Ottawa,Qatar:Doha,Iran:Tehran,Malta:Valletta,Fiji:Suva,"
    "Laos:Vientiane,Oman:Muscat,Togo:Lome,Mali:Bamako,Chad:N'Djamena,Haiti:Port-au-Prince"
).split(",")


def prose(dice: random.Random, sentences: int) -> str:
    """Sentences that repeat nothing."""
    out = []
    for _ in range(sentences):
        thing, other = dice.sample(_THINGS, 2)
        quality, second = dice.sample(_QUALITIES, 2)
        out.append(
            dice.choice(
                (
                    f"{dice.choice(_NAMES)} {dice.choice(_DEEDS)} the {quality} {thing} "
                    f"{dice.choice(_WHEN)}.",
                    f"The {thing} near {dice.choice(_PLACES)} is {quality} and {second}, "
                    f"unlike the {other}.",
                    f"In {dice.randint(1820, 2024)} a {quality} {thing} was {dice.choice(_DEEDS)} "
                    f"by {dice.choice(_NAMES)}; it cost ${dice.randint(5, 900)}.{dice.randint(10, 99)}.",
                    f"Why did the {other} matter? Because every {second} {thing} in "
                    f"{dice.choice(_PLACES)} had been {dice.choice(_DEEDS)} {dice.choice(_WHEN)}.",
                )
            )
        )
    return " ".join(out)


def _code(dice: random.Random, n: int) -> tuple[str, str]:
    thing, other = dice.sample(_THINGS, 2)
    return (
        f"Write a function number {n} that sums the {thing} prices.",
        f"```python\ndef {thing}_{other}_{n}(rows: list[dict]) -> float:\n"
        f'    print("sum of\\n{thing}")\n'
        f'    return sum(row["{thing}"] * {dice.randint(2, 99)} for row in rows if row != {{}})\n```\n'
        f"{prose(dice, 2)}",
    )


def _script(dice: random.Random, n: int) -> tuple[str, str]:
    thing = dice.choice(_THINGS)
    return (
        f"How do I read the {thing} setting {n} in JavaScript?",
        f"const cfg{n} = {{ {thing}: process.env.{thing.upper()}_{n} ?? 'none' }};\n"
        f"if (!cfg{n}.{thing}) {{ throw new Error(`no {thing} at C:\\new\\{thing}`); }}\n"
        f"See https://developer.example.org/{thing}/v{n}.2.1#section-4.0.2. {prose(dice, 1)}",
    )


def _html(dice: random.Random, n: int) -> tuple[str, str]:
    thing = dice.choice(_THINGS)
    return (
        f"Show {thing} number {n} as an HTML list.",
        f"<ul>\n  <li>{thing} &amp; {n}</li>\n  <li>{dice.choice(_NAMES)}</li>\n</ul>\n"
        f"The entity &amp; stands for an ampersand. {prose(dice, 1)}",
    )


def _table(dice: random.Random, n: int) -> tuple[str, str]:
    rows = "\n".join(
        f"| {thing} | {dice.randint(1, 900)} | 20{dice.randint(10, 29)}-0{dice.randint(1, 9)}-1{n % 9} |"
        for thing in dice.sample(_THINGS, 6)
    )
    return f"Tabulate order {n}.", f"| thing | price | day |\n|---|---|---|\n{rows}"


def _sum(dice: random.Random, n: int) -> tuple[str, str]:
    a, b = dice.randint(100, 99_999), dice.randint(100, 99_999)
    return (
        f"What is {a} plus {b}? Show the steps of problem {n}.",
        f"Add the ones first, then carry: ${a} + {b} = {a + b}$. So the sum is {a + b:,}, "
        f"which $\\frac{{{a + b}}}{{2}}$ halves to {(a + b) / 2}.",
    )


def _capital(dice: random.Random, n: int) -> tuple[str, str]:
    country, capital = _COUNTRIES[n % len(_COUNTRIES)].split(":")
    form = ("What is the capital of {}?", "Name the capital city of {}.", "{}: which capital?")
    asked = form[n // len(_COUNTRIES) % 3].format(country)
    return f"{asked} (quiz {n})", f"{capital}."


def _translate(dice: random.Random, n: int) -> tuple[str, str]:
    thing, day = dice.choice(_THINGS), dice.randint(1, 28)
    which, answer = dice.choice(
        (
            ("German", f"Der Zug fährt am {day}. Mai um {n % 24} Uhr ab und ist nicht teuer."),
            (
                "French",
                f"Le train part le {day} mai à {n % 24} heures et n'est pas cher pour vous.",
            ),
            ("Spanish", f"El tren sale el {day} de mayo a las {n % 24} y no es muy caro para los."),
        )
    )
    return f"Translate sentence {n} about the {thing} train into {which}.", f"{answer} ({n})"


def _letter(dice: random.Random, n: int) -> tuple[str, str]:
    name, other = dice.sample(_NAMES, 2)
    return (
        f"Write letter {n} to {name} as the head of support.",
        f"Dear {name},\n\nI'm sorry, but I can't find order {dice.randint(10**7, 10**8)} of the "
        f"{dice.choice(_THINGS)} in our {dice.choice(_PLACES)} branch. The price of "
        f"€{dice.randint(10, 99)},90 will be paid back. Write to support@example.com, or visit "
        f"www.example.com/orders?id={n}&ref=mail.\n\n{prose(dice, 2)}\n\nRegards,\n{other}",
    )


def _trap(dice: random.Random, n: int) -> tuple[str, str]:
    thing, other = dice.sample(_THINGS, 2)
    said = (
        f"As an AI researcher, {dice.choice(_NAMES)} built a {thing} model. It is a testament to care.",
        f"The password of the {thing} is kept in the vault; password = get_{thing}_secret(user_{n}).",
        f"ISBN 978-3-16-1484{n % 10}0-{n % 7}, part no. 4012-8888-{1000 + n}-1882 x, and 192.168.0.{n % 250}.",
        f"Version 2.14.{n % 50}.3 of the {thing} fixed it; release 10.0.{n % 99} did not, said the {other}.",
        f"Sure enough, the {thing} broke. Great question marks hung over the {other} for {n} days.",
        f"Use <b> for bold in HTML, and `</b>` to end it; in markdown write **{thing}** ({n}).",
        f"Use AT&T's line {n}, or R&D's; Q&A is on {thing} day. 5 < {n + 6} && {n} > {-n}.",
        f"She said “naïve café” — and Zoë’s {thing} cost £{n}·5. Ça va, Señor {other}? 😀👩‍🚀",
        f"The bank sort code is not an account: {n % 90 + 10}-{n % 80 + 10}-33, and the {thing} is EU{n}.",
        f"Lines of the {thing} song: la la la la la la la la, then {other}, la la la, and rest {n}.",
    )[n % 10]
    return f"Tell me fact {n} about the {thing} and the {other}.", f"{said} {prose(dice, 2)}"


_KINDS: tuple[Callable[[random.Random, int], tuple[str, str]], ...] = (
    *(_code, _script, _html, _table, _sum, _capital, _letter, _trap, _trap),
)


def clean(count: int, seed: int = 1, first: int = 0) -> list[Row]:
    """Rows of messages in which nothing is wrong; 1 in 10 has several turns or a system message."""
    dice, out = random.Random(seed), []
    for n in range(first, first + count):
        if n % 10 < 4:
            thing = dice.choice(_THINGS)
            question = (
                f"{dice.choice(('Describe', 'Explain', 'Report on'))} {thing} {n}: {prose(dice, 1)}"
            )
            pair = (question, prose(dice, dice.randint(2, 9)))
        elif n % 50 == 44:
            pair = _translate(dice, n)
        else:
            pair = _KINDS[n % len(_KINDS)](dice, n)
        turns = _turns(*pair)
        if n % 10 == 1:
            turns.insert(0, {"role": "system", "content": f"You work for {dice.choice(_NAMES)}."})
        if n % 10 == 2:
            turns += _turns(f"And what of {dice.choice(_THINGS)} {n}?", prose(dice, 3))
        out.append({"messages": turns})
    return out


def foreign(count: int, seed: int = 5) -> list[Row]:
    """Clean rows, half of them English, the rest German and French."""
    dice, rows = random.Random(seed), clean(count, seed)
    for n in range(0, count, 2):
        a, b, c = dice.sample(_NAMES, 3)
        german = (
            f"Frage {n}: Was hat {a} in {dice.choice(_PLACES)} gemacht?",
            f"{a} hat die Straße für {b} gebaut und ist danach über {dice.choice(_PLACES)} "
            f"zurückgekehrt, weil es dort nicht mehr schön war. {c} kam {n} Tage später; "
            f"die Äpfel, Öfen und Übungen waren für {dice.randint(2, 99)} € zu haben.",
        )
        french = (
            f"Question {n} : qu'a fait {a} à {dice.choice(_PLACES)} ?",
            f"{a} a rénové la forêt près de {dice.choice(_PLACES)} pour {b}, parce que c'était très "
            f"cher ({dice.randint(2, 99)} €) et que {c} ne voulait pas y aller sans les élèves ; "
            f"« ça ira », a-t-elle dit {n} fois.",
        )
        rows[n] = {"messages": _turns(*dice.choice((german, french)))}
    return rows


def _turns(question: str, answer: str) -> list[Row]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


Plant = Callable[[Row, random.Random], Any]


def _answer(text: str, *, instead: bool = False) -> Plant:
    """Put ``text`` into the last answer: after it, or in its place."""

    def plant(row: Row, dice: random.Random) -> Row:
        last = row["messages"][-1]
        said = text.replace("{n}", str(dice.randint(1000, 9999)))
        last["content"] = said if instead else f"{last['content']} {said}"
        return row

    return plant


def _before(text: str) -> Plant:
    def plant(row: Row, dice: random.Random) -> Row:
        row["messages"][-1]["content"] = text + row["messages"][-1]["content"]
        return row

    return plant


def _value(value: Any, place: int = -1, key: str = "content") -> Plant:
    def plant(row: Row, dice: random.Random) -> Row:
        row["messages"][place][key] = value
        return row

    return plant


def _messages(change: Callable[[list[Row]], list[Row]]) -> Plant:
    def plant(row: Row, dice: random.Random) -> Row:
        return {"messages": change(row["messages"])}

    return plant


def _luhn(dice: random.Random) -> str:
    body = [4, *(dice.randint(0, 9) for _ in range(14))]
    total = sum(sum(divmod(d * (1 + (i % 2 == 0)), 10)) for i, d in enumerate(reversed(body)))
    digits = "".join(map(str, body)) + str(-total % 10)
    return " ".join(digits[i : i + 4] for i in range(0, 16, 4))


def _iban(dice: random.Random) -> str:
    body = "".join(str(dice.randint(0, 9)) for _ in range(18))
    check = 98 - int(body + "131400") % 97
    plain = f"DE{check:02d}{body}"
    return " ".join(plain[i : i + 4] for i in range(0, len(plain), 4))


def _made(make: Callable[[random.Random], str]) -> Plant:
    def plant(row: Row, dice: random.Random) -> Row:
        return _answer(make(dice))(row, dice)

    return plant


def _key(prefix: str, size: int) -> Callable[[random.Random], str]:
    letters = "abcdefghjkmnpqrstuvwxyzABCDEFGHJKLMNPQRSTUVWXYZ23456789"
    return lambda dice: f"Use {prefix}{'7'}{''.join(dice.choices(letters, k=size - 1))} for it."


def _broken(row: Row, dice: random.Random) -> str:
    return json.dumps(row)[: -dice.randint(3, 20)]


def _twice(text: str) -> str:
    return text.encode("utf-8").decode("windows-1252", "replace")


_SPANISH = (
    "Los trenes son muy caros, pero el viaje es más bonito cuando hay sol y porque están vacíos."
)
_LOOP = "and then he went back to the same old house by the river " * 40

ALONE: tuple[tuple[str, Plant], ...] = (
    ("001", _broken),
    ("002", lambda row, dice: json.dumps(row["messages"][-1]["content"])),
    ("003", _value("")),
    ("004", _value(" \n\t ")),
    ("005", _value(None)),
    ("006", _value({"text": "in an object"})),
    ("007", lambda row, dice: {"mesages": row["messages"]}),
    ("008", _value("asistant", key="role")),
    ("010", _messages(lambda m: [*m[:-1], m[-2], m[-1]])),
    ("011", _messages(lambda m: [*m, {"role": "user", "content": "And the other one, please?"}])),
    ("012", _messages(lambda m: [{"role": "system", "content": " "}, *m])),
    ("013", _messages(lambda m: [t for t in m if t["role"] != "assistant"])),
    ("015", _messages(lambda m: [])),
    ("016", _messages(lambda m: [*m[:-1], {"role": "assistant", "content": m[-2]["content"]}])),
    ("017", _messages(lambda m: [*m[:-1], {**m[-1], "tool_calls": [
        {"type": "function", "function": {"name": "add", "arguments": "{a: 1,"}}]}])),
    ("030", _before("As an AI language model, I have no opinion of my own. ")),
    ("031", _answer("I'm sorry, but I can't assist with request {n}.", instead=True)),
    ("032", _before("Sure! Here is what you asked for:\n\n")),
    ("033", _answer("It's important to note that this rich tapestry will delve into the new.")),
    ("034", _answer("I hope this helps! Let me know if you have any other questions.")),
    ("035", _answer("Best regards,\n[Your Name]")),
    ("036", _answer("N/A", instead=True)),
    ("037", _answer(_LOOP)),
    ("040", _answer("-----BEGIN OPENSSH PRIVATE KEY-----\nb3BlbnNz\n-----END OPENSSH PRIVATE KEY-----")),
    ("041", _made(_key("ghp_", 36))),
    ("041", _made(_key("sk-proj-", 40))),
    ("041", _made(_key("hf_", 34))),
    ("041", _made(lambda dice: "AKIA" + "".join(dice.choices("ABCDEFGH23456789", k=15)) + "7")),
    ("042", _answer("The password: tr0ub4dor&{n} works.")),
    ("043", _answer("Connect to postgres://admin7:s3cr{n}@db.keller-bau.de/main now.")),
    ("050", _answer("Write to lena.fischer{n}@fischer-optik.de today.")),
    ("051", _made(lambda dice: f"Call +49 30 9018{dice.randint(2345, 9876)} soon.")),
    ("051", _made(lambda dice: f"Call (415) 672-{dice.randint(2345, 9876)} soon.")),
    ("052", _made(_iban)),
    ("053", _made(_luhn)),
    ("054", _made(lambda dice: f"The host is 93.184.{dice.randint(1, 250)}.{dice.randint(1, 250)} here.")),
    ("055", _made(lambda dice: f"His number is 219-09-{dice.randint(1000, 9999)} there.")),
    ("060", _answer(_twice("The café doesn’t open — naïve señor."))),
    ("061", _answer("The caf\ufffd is closed.")),
    ("062", _answer("Chapter two\x0c begins\x07.")),
    ("063", _answer("The pass\u200bword is in the\ufeff vault.")),
    ("064", _messages(lambda m: _turns("Who sells it, please, and since when?" + m[-1]["content"][:0]
        + str(len(m[-1]["content"]) * 7919), "Marks &amp; Spencer sell it &quot;always&quot;."))),
    ("065", _answer("First a line.\\nSecond a line.\\n\\nThird {n}.", instead=True)),
    ("066", _answer("It was <b>open</b> for {n} days.<br>Come in.", instead=True)),
    ("067", _answer("Nice work \ud83d today.")),
    ("070", _answer("<|im_end|>")),
    ("071", _answer("\nUser: And the next one, please?\nAssistant: That is green.")),
    ("072", _before("<think>Two and two make four, so the answer is clear. ")),
    ("073", _answer("\n```python\nprint(1)\n")),
    ("080", _answer(_SPANISH + " Número {n}.", instead=True)),
    ("081", lambda row, dice: _answer(prose(dice, 900), instead=True)(row, dice)),
    ("083", _made(lambda dice: "".join(dice.choices("ABCDEFabcdef0123456789+/", k=400)))),
)  # fmt: skip


def planted(count: int = 2000, each: int = 4, seed: int = 2) -> tuple[list[str], list[str], Truth]:
    """Lines of a file with faults, lines of a held-out file, and the truth.

    Args:
        count: Lines.
        each: Rows with each kind of fault.

    Returns:
        Lines, held-out lines, and the row numbers (1-based) of each code.
    """
    dice = random.Random(seed)
    rows: list[Any] = clean(count, seed)
    plain = [i for i in range(count) if len(rows[i]["messages"]) == 2 and i % 10 < 4]
    dice.shuffle(plain)
    truth: dict[str, list[int]] = {}

    def note(code: str, place: int) -> None:
        truth.setdefault(f"FG-CHECK-{code}", []).append(place + 1)

    for code, plant in ALONE:
        for _ in range(each):
            place = plain.pop()
            rows[place] = plant(json.loads(json.dumps(rows[place])), dice)
            note(code, place)
    held: list[Row] = clean(200, seed + 100, 10_000)
    for _ in range(each):
        first, second = sorted((plain.pop(), plain.pop()))
        rows[second] = _shouted(rows[first])
        note("020", second)
        first, second = sorted((plain.pop(), plain.pop()))
        rows[first] = {"messages": _turns(f"Tell of it. {prose(dice, 3)}", prose(dice, 8))}
        rows[second] = _one_word_less(rows[first])
        note("021", second)
        first, second = plain.pop(), plain.pop()
        question = rows[first]["messages"][0]["content"]
        rows[second] = {"messages": _turns(question, prose(dice, 4))}
        note("022", first)
        note("022", second)
        place = plain.pop()
        held.append({"messages": _turns(rows[place]["messages"][0]["content"], prose(dice, 3))})
        note("023", place)
        place = plain.pop()
        rows[place] = {"messages": _turns(f"Tell of it. {prose(dice, 3)}", prose(dice, 8))}
        held.append(_one_word_less(rows[place]))
        note("024", place)
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    return lines, [json.dumps(row) for row in held], {c: sorted(r) for c, r in truth.items()}


def _shouted(row: Row) -> Row:
    """The same in another case and spacing."""
    return {"messages": [{**m, "content": f" {m['content'].upper()}\n"} for m in row["messages"]]}


def _one_word_less(row: Row) -> Row:
    """Nearly the same: one word of the answer is gone, one of the prompt is another."""
    question, answer = (m["content"] for m in row["messages"][-2:])
    words = answer.split(" ")
    words.pop(len(words) // 2 if not any(map(str.isdigit, words[len(words) // 2])) else 0)
    return {"messages": _turns(question.replace("Tell of it.", "Tell us of it."), " ".join(words))}


_JUNK = (
    *(
        "",
        " ",
        "\x00",
        "\ufeff",
        "\ud800",
        "a" * 5000,
        "\u202e",
        "𝔘𝔫𝔦",
        "é" * 300,
        "\n" * 200,
        "@" * 50,
    ),
    *(
        "+1 2 3 4 5 6 7",
        "<|im_end|>",
        "&#xFFFFF;",
        "\\u12",
        "ghp_",
        "1.2.3.4.5.6",
        "DE00",
        "0" * 400,
    ),
    *(
        "```",
        "<think>",
        "A\u0300" * 90,
        "日本語" * 80,
        "://:@",
        "password:",
        "[your ",
        "-----BEGIN ",
    ),
)


def fuzzed_lines(count: int, seed: int) -> list[str]:
    """Lines of every layout with anything in any place, some of them not JSON."""
    dice = random.Random(seed)
    layouts = (
        ("prompt", "completion"),
        ("instruction", "input", "output"),
        ("text",),
        ("messages",),
        ("conversations",),
        ("text", "label"),
    )
    usual = dice.choice(layouts)
    out = []
    for _ in range(count):
        names = usual if dice.random() < 0.9 else dice.choice(layouts)
        row = {name: _anything(dice, name, 0) for name in names if dice.random() < 0.97}
        line = json.dumps(row)
        if dice.random() < 0.02:
            cut = dice.randrange(len(line) + 1)
            line = (
                line[:cut]
                + dice.choice(_JUNK).replace("\n", " ")
                + line[cut + dice.randint(0, 5) :]
            )
        out.append(line.replace("\n", " "))
    good = {name: "this is one good row to begin with" for name in usual}
    if usual[0] in ("messages", "conversations"):
        good = {usual[0]: _turns("one good question to begin with", "and its answer")}
    return [json.dumps(good)] * 120 + out[120:]


def _anything(dice: random.Random, name: str, depth: int) -> Any:
    kind = dice.random()
    if depth < 3 and name in ("messages", "conversations") and kind < 0.9:
        return [_turn(dice, depth) for _ in range(dice.randint(0, 5))]
    if kind < 0.75:
        return (
            "".join(dice.choices(_JUNK, k=2)) + prose(dice, dice.randint(0, 3)) + dice.choice(_JUNK)
        )
    if kind < 0.95:
        return dice.choice((None, 0, 1.5, True, float("nan"), float("inf"), -(10**30), "", [], {}))
    return {"a": [_anything(dice, "", depth + 1)]} if depth < 6 else []


def _turn(dice: random.Random, depth: int) -> Any:
    if dice.random() < 0.05:
        return _anything(dice, "", depth + 1)
    role = dice.choice(("user", "assistant", "system", "tool", "gpt", "human", "asistant", None, 3))
    keys = ("role", "content") if dice.random() < 0.7 else ("from", "value")
    turn = {keys[0]: role, keys[1]: _anything(dice, "", depth + 1)}
    if dice.random() < 0.1:
        turn["tool_calls"] = _anything(dice, "", depth + 1)
    return turn
