"""One self-contained HTML file for a report.

What: ``page`` puts sections (a title and ready HTML) into a document with one style sheet; helpers
make tables, tiles of numbers and notes. How: strings and ``html.escape``, no template engine.
Constraint: the file opens from disk with no request to any address (its content security policy
forbids them all), follows the reader's dark or light setting, prints, reads at 400 pixels, and
every place in it is reached with the keyboard. Trade-off: no script, so nothing sorts or filters;
long lists fold in ``<details>``.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

TONES = ("good", "note", "warning", "error")

_STYLE = """
:root{color-scheme:light dark;--ink:#1c1f23;--soft:#5c6570;--paper:#fff;--card:#f5f6f8;
--line:#d5d9df;--accent:#2563a8;--second:#b4541a;--good:#1f7a3d;--note:#2563a8;--warning:#8f5f00;
--error:#b3261e;--grid:#e2e5ea}
@media (prefers-color-scheme:dark){:root{--ink:#e6e8eb;--soft:#a2abb6;--paper:#15181c;
--card:#1f2328;--line:#3a4048;--accent:#7cb3f0;--second:#eda671;--good:#6fcf8e;--note:#7cb3f0;
--warning:#e3b341;--error:#ff8a80;--grid:#2c3138}}
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);
font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif}
main{max-width:68rem;margin:0 auto;padding:1.5rem 1rem 4rem}
header.top{border-left:.4rem solid var(--tone,var(--line));padding:.2rem 0 .2rem 1rem}
h1{font-size:1.6rem;line-height:1.25;margin:0;overflow-wrap:anywhere}
h2{font-size:1.2rem;margin:2.2rem 0 .6rem;padding-top:.4rem}
h3{font-size:1rem;margin:1.2rem 0 .4rem}
p{margin:.4rem 0 .8rem;max-width:48rem}
a{color:var(--accent)}
a:focus-visible,summary:focus-visible,[tabindex]:focus-visible{outline:3px solid var(--accent);
outline-offset:2px;border-radius:3px}
nav ul{display:flex;flex-wrap:wrap;gap:.2rem 1.2rem;list-style:none;padding:0;margin:1rem 0 0}
.skip{position:absolute;left:-99rem}.skip:focus{left:1rem;top:.5rem;background:var(--paper)}
.soft{color:var(--soft)}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(9.5rem,1fr));gap:.7rem;
margin:1.2rem 0;padding:0}
.tile{background:var(--card);border:1px solid var(--line);border-radius:.4rem;padding:.6rem .8rem;
margin:0}
.tile dt{color:var(--soft);font-size:.85rem}.tile dd{margin:0;font-size:1.35rem;font-weight:600;
overflow-wrap:anywhere}.tile small{font-size:.8rem;font-weight:400;color:var(--soft);display:block}
.scroll{overflow-x:auto;margin:.4rem 0 1rem}
table{border-collapse:collapse;width:100%;font-size:.93rem}
th,td{text-align:left;vertical-align:top;padding:.35rem .8rem .35rem 0;
border-bottom:1px solid var(--line)}
th{font-weight:600;color:var(--soft)}
td.n,th.n{text-align:right;width:1%;font-variant-numeric:tabular-nums;white-space:nowrap}
code,pre{font-family:ui-monospace,"SF Mono",Menlo,Consolas,"DejaVu Sans Mono",monospace;
font-size:.88em}
pre{background:var(--card);border:1px solid var(--line);border-radius:.4rem;padding:.6rem .8rem;
white-space:pre-wrap;overflow-wrap:anywhere;margin:.4rem 0}
code{overflow-wrap:anywhere}
details{border:1px solid var(--line);border-radius:.4rem;margin:.6rem 0;background:var(--card)}
summary{cursor:pointer;padding:.55rem .8rem}
details>div{padding:0 .9rem .7rem}
.badge{display:inline-block;font-size:.78rem;font-weight:600;border:1px solid currentColor;
border-radius:.8rem;padding:0 .55rem;margin-right:.5rem;white-space:nowrap}
.good{color:var(--good)}.note{color:var(--note)}.warning{color:var(--warning)}
.error{color:var(--error)}
figure{margin:.8rem 0 1.4rem}figcaption{font-weight:600;margin-bottom:.4rem}
.bars{display:grid;grid-template-columns:minmax(4rem,max-content) 1fr max-content;
gap:.2rem .7rem;align-items:center;font-size:.9rem;margin:0}
.bars .name{overflow-wrap:anywhere;max-width:14rem}
.bars .value{text-align:right;font-variant-numeric:tabular-nums}
.bars .track{background:var(--grid);border-radius:2px;height:.95rem;min-width:3rem}
.bars .fill{background:var(--fill,var(--accent));height:100%;border-radius:2px;
print-color-adjust:exact;-webkit-print-color-adjust:exact}
.chart{width:100%;max-width:42rem;height:auto;display:block;overflow:visible}
.chart text{fill:var(--soft);font:12px system-ui,"DejaVu Sans",sans-serif}
.chart .grid{stroke:var(--grid);stroke-width:1}.chart .axis{stroke:var(--line);stroke-width:1}
.chart .bar{fill:var(--accent)}.chart .mark{stroke:var(--error);stroke-width:2;
stroke-dasharray:5 4}.chart text.marked{fill:var(--error)}
.chart .line{fill:none;stroke-width:2;stroke-linejoin:round}
.s0{stroke:var(--accent);color:var(--accent)}.s1{stroke:var(--second);color:var(--second)}
.s2{stroke:var(--good);color:var(--good)}.s3{stroke:var(--soft);color:var(--soft)}
.legend{display:flex;flex-wrap:wrap;gap:.1rem 1.2rem;font-size:.88rem;margin:.2rem 0}
.legend b{font-weight:600}
@media (max-width:40rem){.chart text{font-size:14px}}
.pair{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,26rem),1fr));gap:0 2rem}
footer{margin-top:3rem;color:var(--soft);font-size:.88rem;border-top:1px solid var(--line);
padding-top:.6rem}
@media print{body{font-size:11pt}main{max-width:none;padding:0}nav,.skip{display:none}
h1,h2,h3{break-after:avoid}.chart{max-width:32rem}details{break-inside:avoid}figure,.tile,tr{break-inside:avoid}
details::details-content{content-visibility:visible;block-size:auto}
:root{--ink:#000;--paper:#fff;--card:#fff;--soft:#333;--line:#999;--grid:#ddd;--accent:#2563a8}}
"""


@dataclass(frozen=True)
class Section:
    """A heading and what stands below it.

    Attributes:
        title: Plain text.
        body: Ready HTML.
    """

    title: str
    body: str

    @property
    def anchor(self) -> str:
        """The heading's id in the page."""
        return "".join(c if c.isalnum() else "-" for c in self.title.lower())


def escape(text: object) -> str:
    """Text as HTML shows it; quotes are escaped as well, so that it may stand in an attribute.

    Characters that HTML has no place for (control characters, halves of a surrogate pair) are
    written as ``\\x07`` or ``\\ud83d``.
    """
    plain = "".join(
        c
        if c in "\t\n"
        or (ord(c) >= 32 and not 0x7F <= ord(c) < 0xA0 and not "\ud800" <= c < "\ue000")
        else f"\\u{ord(c):04x}"
        if ord(c) > 255
        else f"\\x{ord(c):02x}"
        for c in str(text)
    )
    return html.escape(plain, quote=True)


def page(
    title: str, sections: Sequence[Section], *, lead: str = "", tone: str = "", footer: str = ""
) -> str:
    """A whole document.

    Args:
        title: Plain text, the heading and the title of the window.
        sections: In order; with more than one, links to them stand on top.
        lead: HTML between the heading and the first section.
        tone: One of ``TONES``, the colour beside the heading, or nothing.
        footer: Plain text.

    Returns:
        HTML, complete with style, to be written as UTF-8.
    """
    links = "".join(f'<li><a href="#{s.anchor}">{escape(s.title)}</a></li>' for s in sections)
    nav = f'<nav aria-label="Sections"><ul>{links}</ul></nav>' if len(sections) > 1 else ""
    body = "".join(
        f'<section aria-labelledby="{s.anchor}"><h2 id="{s.anchor}">{escape(s.title)}</h2>'
        f"{s.body}</section>"
        for s in sections
    )
    colour = f' style="--tone:var(--{tone})"' if tone in TONES else ""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; '
        "style-src 'unsafe-inline'; img-src data:\">"
        '<link rel="icon" href="data:,">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head><body>"
        f'<a class="skip" href="#content">Skip to the content</a><main id="content">'
        f'<header class="top"{colour}><h1>{escape(title)}</h1></header>{lead}{nav}{body}'
        f"<footer>{escape(footer)}</footer></main></body></html>\n"
    )


def tiles(values: Iterable[tuple[str, object, str]]) -> str:
    """Numbers side by side.

    Args:
        values: Name, value and a small remark (or nothing) of each; numbers get separators.
    """
    cells = []
    for name, value, remark in values:
        shown = f"{value:,}" if isinstance(value, int) else value
        small = f"<small>{escape(remark)}</small>" if remark else ""
        cells.append(
            f'<div class="tile"><dt>{escape(name)}</dt><dd>{escape(shown)}{small}</dd></div>'
        )
    return f'<dl class="tiles">{"".join(cells)}</dl>'


def table(head: Sequence[str], rows: Iterable[Sequence[object]], *, label: str = "table") -> str:
    """A table that scrolls sideways where it is too wide; columns of numbers are set right.

    Args:
        head: Names of the columns.
        rows: Plain values; what should be HTML comes as ``Markup``.
        label: What a screen reader calls it.
    """
    rows = [list(row) for row in rows]
    right = [
        bool(rows) and all(isinstance(row[i], int | float) for row in rows)
        for i in range(len(head))
    ]
    kind = [' class="n"' if number else "" for number in right]
    top = "".join(f'<th scope="col"{k}>{escape(h)}</th>' for h, k in zip(head, kind, strict=True))
    lines = "".join(
        "<tr>"
        + "".join(f"<td{k}>{_cell(v)}</td>" for v, k in zip(row, kind, strict=True))
        + "</tr>"
        for row in rows
    )
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(label)}">'
        f"<table><thead><tr>{top}</tr></thead><tbody>{lines}</tbody></table></div>"
    )


class Markup(str):
    """HTML that is ready, so that ``table`` leaves it as it is."""


def _cell(value: object) -> str:
    if isinstance(value, Markup):
        return value
    return escape(f"{value:,}" if isinstance(value, int) else value)


def badge(text: str, tone: str) -> Markup:
    """A small framed word in the colour of ``tone``, which the word itself also says."""
    return Markup(f'<span class="badge {escape(tone)}">{escape(text)}</span>')


def fold(summary: str, body: str, *, opened: bool = False) -> str:
    """A part that opens with a click or the Enter key. Both arguments are HTML."""
    state = " open" if opened else ""
    return f"<details{state}><summary>{summary}</summary><div>{body}</div></details>"


def paragraph(text: str, *, soft: bool = False) -> str:
    """Plain text as a paragraph."""
    kind = ' class="soft"' if soft else ""
    return f"<p{kind}>{escape(text)}</p>"


def code(text: str) -> str:
    """Plain text in a frame, its spaces and line ends kept."""
    return f"<pre>{escape(text)}</pre>"
