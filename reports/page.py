"""HTML of a report: one page that holds everything it shows and requests nothing. Whatever comes from a run is escaped here."""

import html

# The page may show only what it holds: no scripts and no requests, whatever a caption says.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; background: #fff; max-width: 1100px; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2.2rem; border-bottom: 1px solid #ddd; padding-bottom: .2rem; }
h3 { font-size: 1rem; }
table { border-collapse: collapse; margin: .6rem 0; }
th, td { text-align: left; vertical-align: top; padding: .2rem .8rem .2rem 0; border-bottom: 1px solid #eee; overflow-wrap: anywhere; }
th { color: #666; font-weight: 600; } td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; }
pre { background: #f6f6f6; padding: .6rem; white-space: pre-wrap; overflow-wrap: anywhere; }
img.curves { width: 100%; max-width: 820px; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(230px, 1fr)); gap: 1rem; }
.card { border: 1px solid #ddd; border-radius: 6px; padding: .6rem; overflow-wrap: anywhere; }
.card img { width: 100%; height: 170px; object-fit: contain; background: #f6f6f6; image-rendering: auto; }
.card p { margin: .3rem 0; } .caption { font-weight: 600; } .reference, .note { color: #666; font-size: .9rem; }
.warning { background: #fff3d6; border-left: 4px solid #d90; padding: .5rem .8rem; }
"""


def text(value):
    """Escape any value as text."""
    return html.escape(str(value).encode("utf-8", "replace").decode(), quote=True)


def page(title, parts):
    """Make a whole page of parts, which are HTML made by the functions here."""
    head = f'<meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{POLICY}"><title>{text(title)}</title>'
    body = "\n".join(part for part in parts if part)
    head = f"<head>{head}<style>{STYLE}</style></head>"
    return f'<!DOCTYPE html>\n<html lang="en">{head}\n<body><h1>{text(title)}</h1>\n{body}\n</body></html>\n'


def section(title, *parts):
    """Make a section with a heading; an empty string where it has no content."""
    body = "\n".join(part for part in parts if part)
    return f"<section><h2>{text(title)}</h2>\n{body}</section>" if body else ""


def paragraph(value, kind=""):
    """Make a paragraph. kind: "", "note" or "warning"."""
    return f'<p class="{kind}">{text(value)}</p>' if kind else f"<p>{text(value)}</p>"


def code(value):
    """Show a command line or other text as it is."""
    return f"<pre>{text(value)}</pre>"


def folded(title, body):
    """Make a part that the reader can unfold."""
    return f"<details><summary>{text(title)}</summary>\n{body}</details>" if body else ""


def table(headings, rows):
    """Make a table whose columns of numbers are aligned right. headings: list of str, or None; rows: lists of values."""
    if not rows:
        return ""
    numeric = [all(_is_number(row[place]) for row in rows) for place in range(len(rows[0]))]

    def line(tag, cells):
        made = [f"<{tag}{' class=number' * number}>{text(cell)}</{tag}>" for cell, number in zip(cells, numeric)]
        return f"<tr>{''.join(made)}</tr>"

    head = f"<thead>{line('th', headings)}</thead>" if headings else ""
    return f"<table>{head}<tbody>{''.join(line('td', row) for row in rows)}</tbody></table>"


def _is_number(value):
    return str(value).replace(",", "").replace(".", "", 1).replace("-", "", 1).isdigit()


def image(uri, alt, kind):
    """Make a picture of a data URI. kind: its CSS class."""
    assert uri.startswith("data:image/")
    return f'<img class="{kind}" src="{uri}" alt="{text(alt)}">'


def cards(several):
    """Show pictures with captions.

    Args:
        several: list of dicts with image_id, caption and, where known, references (list), uri and note.
    """
    made = []
    for one in several:
        picture = image(one["uri"], f"image {one['image_id']}", "") if one.get("uri") else ""
        true = "".join(f'<p class="reference">{text(reference)}</p>' for reference in one.get("references", []))
        note = f"{one['image_id']}" + (f" · {one['note']}" if one.get("note") else "")
        made.append(f'<div class="card">{picture}<p class="caption">{text(one["caption"])}</p>{true}<p class="note">{text(note)}</p></div>')
    return f'<div class="cards">{"".join(made)}</div>' if made else ""
