"""The HTML of a run's report.

Every piece takes plain text and escapes it, so that what calls it cannot forget to.
"""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence

from .drawing import plain

LONGEST = 600  # characters of one text that a client may have chosen
_STYLE = """
:root{--ink:#1f2328;--soft:#59636e;--line:#d8dee4;--wash:#f6f8fa}
*{box-sizing:border-box}
body{margin:0;background:#fff;color:var(--ink);font:16px/1.55 system-ui,-apple-system,"Segoe UI",
Roboto,"Helvetica Neue",Arial,sans-serif}
main{max-width:60rem;margin:0 auto;padding:2.5rem 1.5rem 4rem}
h1{font-size:1.9rem;line-height:1.2;margin:0 0 .4rem;overflow-wrap:anywhere}
h2{font-size:1.25rem;margin:2.8rem 0 .7rem;padding-top:1.1rem;border-top:1px solid var(--line)}
p{margin:.5rem 0;max-width:46rem}.lead,.note,figcaption span{color:var(--soft)}.note,
figcaption span{font-size:.88rem}
.banner{background:#fff8c5;border:1px solid #d4a72c;border-radius:6px;padding:.6rem .9rem;
margin:1rem 0;max-width:none}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(10.5rem,1fr));gap:.8rem;
margin:1.4rem 0}
.tiles div{background:var(--wash);border:1px solid var(--line);border-radius:8px;
padding:.75rem .9rem}
.tiles b{display:block;font-size:1.5rem;line-height:1.25;font-variant-numeric:tabular-nums}
.tiles span{color:var(--soft);font-size:.85rem}
.scroll{overflow:auto;max-height:36rem;margin:.8rem 0}
table{border-collapse:collapse;width:100%;font-size:.9rem;font-variant-numeric:tabular-nums}
th,td{padding:.38rem .8rem .38rem 0;text-align:left;vertical-align:top;
border-bottom:1px solid var(--line);overflow-wrap:anywhere}
thead th{position:sticky;top:0;background:#fff;color:var(--soft);font-weight:600;
overflow-wrap:normal}
th.r,td.r{text-align:right;white-space:nowrap}td.n{white-space:nowrap}tbody th{font-weight:600;
width:11rem}
i{display:inline-block;width:.65em;height:.65em;border-radius:50%;margin-right:.45em}
figure{margin:1.8rem 0}figcaption{margin-bottom:.5rem}figcaption b{display:block}
svg{display:block;width:100%;height:auto}svg *{stroke-linejoin:round;stroke-linecap:butt}
svg text{font-family:system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,
sans-serif!important}
summary{cursor:pointer}pre{background:var(--wash);border:1px solid var(--line);border-radius:6px;
padding:1rem;overflow:auto;font-size:.82rem}
@media print{.scroll{max-height:none}}
"""


def cut(value: str, longest: int) -> str:
    """The text, or its beginning and how much is missing."""
    return (
        value
        if len(value) <= longest
        else f"{value[:longest]} ... ({len(value) - longest} more characters)"
    )


def text(value: str, longest: int = LONGEST) -> str:
    """The text, cut where it is too long, and escaped for element content and quoted attributes."""
    return html.escape("\n".join(plain(line) for line in cut(value, longest).split("\n")))


def number(value: float) -> str:
    """Three decimals; a dash for NaN, which stands for a number that there is not."""
    return f"{value:.3f}" if math.isfinite(value) else "–"


def percent(share: float) -> str:
    """A share with one decimal, or two digits below one per cent; a dash for NaN."""
    return (
        f"{100 * share:.{'1f' if share >= 0.01 else '2g'}}\u00a0%" if math.isfinite(share) else "–"
    )


def table(
    columns: str, head: Sequence[str], rows: Iterable[Sequence[str]], dots: Sequence[str] = ()
) -> str:
    """A table that scrolls where it is long.

    Args:
        columns: a letter a column: "l" and "r" for left- and right-aligned, "n" for left-aligned on
            one line, "h" for a heading of its row.
        head: the columns' names; none for no head.
        dots: colours, one a row, of a dot before the first cell.
    """
    cells = {
        "l": ("<td>", "</td>"),
        "r": ("<td class=r>", "</td>"),
        "n": ("<td class=n>", "</td>"),
        "h": ("<th scope=row>", "</th>"),
    }
    heads = "".join(
        f"<th{' class=r' if column == 'r' else ''}>{text(name)}</th>"
        for column, name in zip(columns, head, strict=bool(head))
    )
    lines = []
    for number, row in enumerate(rows):
        inside = [
            cells[column][0] + text(cell) + cells[column][1]
            for column, cell in zip(columns, row, strict=True)
        ]
        if dots:
            inside[0] = inside[0].replace(
                ">", f'><i style="background:{text(dots[number])}"></i>', 1
            )
        lines.append(f"<tr>{''.join(inside)}</tr>\n")
    top = f"<thead><tr>{heads}</tr></thead>" if head else ""
    return f"<div class=scroll><table>{top}<tbody>\n{''.join(lines)}</tbody></table></div>\n"


def figure(title: str, note: str, svg: str) -> str:
    """A figure below its title and what to know about it. `svg` is put in as it is.

    It comes from `fedloop.report.figures`.
    """
    caption = f"<figcaption><b>{text(title)}</b><span>{text(note)}</span></figcaption>"
    return f"<figure>{caption}\n{svg}</figure>\n"


def tiles(pairs: Iterable[tuple[str, str]]) -> str:
    """Numbers to see first, each with what it is."""
    inside = "".join(
        f"<div><b>{text(value)}</b><span>{text(name)}</span></div>" for value, name in pairs
    )
    return f"<div class=tiles>{inside}</div>\n"


def paragraph(words: str, kind: str = "note") -> str:
    """A paragraph: "note" is small, "lead" opens the page, "banner" is not to be missed."""
    return f"<p class={kind}>{text(words)}</p>\n" if words else ""


def folded(title: str, words: str) -> str:
    """Preformatted text of any length that shows when its title is clicked."""
    return (
        f"<details><summary>{text(title)}</summary><pre>{text(words, len(words))}</pre></details>\n"
    )


def page(title: str, top: str, sections: Iterable[tuple[str, str]]) -> str:
    """The whole document. `top` and the sections' contents are HTML made by the functions above."""
    # should a text ever slip through unescaped, it still runs nothing
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    body = "".join(
        f"<section><h2>{text(name)}</h2>\n{content}</section>\n" for name, content in sections
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta'
        f' http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width,'
        f' initial-scale=1"><title>{text(title, 200)}: report of a run</title>'
        f"<style>{_STYLE}</style></head>\n<body><main><h1>{text(title, 200)}</h1>\n"
        f"{top}{body}</main></body></html>\n"
    )
