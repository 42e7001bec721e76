"""A report as one self-contained HTML file: tables, figures, a gallery of images, layers, how it was made.

    write_page(Path("results/reports/demo.html"), PageContent("Demo", …), max_mib=64)

The page opens from `file://` without a network. Texts of prompts and methods reach it as escaped HTML, or as JSON that
a script puts into text nodes; a Content-Security-Policy allows only its own script and style, by their hash.
"""

import base64
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from math import prod
from pathlib import Path
from string import Template

from vqdm.errors import UserError
from vqdm.report.gallery import LARGEST, WEBP_QUALITY, Gallery, PageMethod, empty_gallery, fill_gallery, script_json
from vqdm.report.marks import Marks
from vqdm.runs.files import atomic_write

FILES = Path(__file__).with_name("page_files")
SCRIPTS = ("page.js", "gallery.js", "plot.js", "layers.js")  # one script on the page, in this order
SLACK = 512  # bytes for the text about the gallery, known only when it is filled
WIDE = 300  # points; a wider figure has a row of its own
LAYER_COLUMNS = {  # key of a record in layers.json: its name on the page, and whether it is a number
    "name": ("layer", False),
    "shape": ("shape", False),
    "bits": ("bits per weight", True),
    "relative_output_error": ("relative output error", True),
    "relative_weight_error": ("relative weight error", True),
    "seconds": ("seconds", True),
    "scheme": ("scheme", False),
}


@dataclass(frozen=True)
class PageContent:
    """Contents of a page. All texts are plain: they are escaped here and never read as HTML or Markdown."""

    title: str
    findings: Sequence[str] = ()  # what won, in sentences; the first is the headline
    summary: str = ""
    table_header: Sequence[str] = ()
    table_rows: Sequence[Sequence[str]] = ()
    marks: Marks | None = None  # None: all columns, none marked
    notes: Sequence[str] = ()  # the protocol, folded below the table
    plot: Mapping | None = None  # of `plot.plot_data`
    figures: Sequence[tuple[str, Path]] = ()  # (title, SVG)
    methods: Sequence[PageMethod] = ()
    prompts: Sequence[str] = ()  # all prompts that the methods were scored on, in order
    images_per_prompt: int = 1
    commands: Sequence[str] = ()
    versions: Mapping[str, str] = field(default_factory=dict)
    score_labels: Mapping[str, str] = field(default_factory=dict)  # {column of images.csv: its name on the page}
    lower_is_better: Sequence[str] = ("distance_to_fp", "lpips_to_fp")  # among the scores of images
    worst_by: str = "psnr_to_fp"  # chooses the worst images; without it, the first score does


def write_page(path: Path, content: PageContent, *, max_mib: float = 64) -> None:
    """Write one HTML file of at most `max_mib` MiB; the page says which images had to be left out of the gallery."""
    gallery = empty_gallery(content.methods if content.prompts else ())
    if gallery.methods:
        gallery = fill_gallery(
            gallery,
            content.prompts,
            content.images_per_prompt,
            worst_by=content.worst_by,
            lower_is_better=content.lower_is_better,
            budget=int(max_mib * 2**20) - len(_render(content, gallery).encode()) - SLACK,
        )
    atomic_write(path, _render(content, gallery).encode())


def _render(content: PageContent, gallery: Gallery) -> str:
    style, page = (_file(name) for name in ("page.css", "page.html"))
    script = "\n".join(map(_file, SCRIPTS))
    layers = [_layers(method) for method in content.methods if method.layers is not None]
    sections = {
        "results": ("Results", _tables(content) + _notes(content)),
        "tradeoff": ("Quality against size", _file("plot.html") if content.plot else ""),
        "gallery": ("Images", _gallery_html(content, gallery) if gallery.methods else ""),
        "figures": ("Figures", "".join(_figure(title, path) for title, path in content.figures)),
        "layers": ("Layers", _file("layers.html") if layers else ""),
        "made": ("How it was made", _commands(content) + _versions(content)),
    }
    there = [(name, title, html) for name, (title, html) in sections.items() if html]
    return Template(page).substitute(
        policy=_policy(style, script),
        title=escape(content.title),
        findings="".join(_paragraph("finding", sentence) for sentence in content.findings),
        summary=_paragraph("summary", content.summary),
        navigation="".join(f'<a href="#{name}">{title}</a>' for name, title, _ in there),
        sections="".join(_section(*section) for section in there),
        style=style,
        script=script,
        data=script_json(_data(content, gallery) | {"layers": layers, "plot": content.plot}),
        rows=",\n".join(gallery.rows),
        images="\n".join(
            f'<script type="application/json" id="images-{row}">{images}</script>'
            for row, images in enumerate(gallery.images)
        ),
    )


def _file(name: str) -> str:
    return (FILES / name).read_text(encoding="utf-8")


def _data(content: PageContent, gallery: Gallery) -> dict:
    """Data for the page's script besides rows, images and layers."""
    names = gallery.scores.names
    return {
        "methods": [{"name": method.name, "size": method.size} for method in gallery.methods],
        "scores": [
            {"name": name, "label": content.score_labels.get(name, name), "lower": name in content.lower_is_better}
            for name in names
        ],
        "score": names.index(content.worst_by) if content.worst_by in names else 0,
        "copies": content.images_per_prompt,
        "shown": gallery.shown,
        "layerColumns": [{"label": label, "numeric": numeric} for label, numeric in LAYER_COLUMNS.values()],
    }


def _section(name: str, title: str, html: str) -> str:
    return (
        f'<section id="{name}" aria-labelledby="{name}-title">\n<h2 id="{name}-title">{title}</h2>\n{html}</section>\n'
    )


def _policy(style: str, script: str) -> str:
    """A policy that allows its own script and style by hash and embedded images; no network, frame, form or markup."""
    own = [f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'" for text in (style, script)]
    return (
        f"default-src 'none'; img-src data:; style-src {own[0]}; script-src {own[1]}; base-uri 'none'; "
        "form-action 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
    )


def _paragraph(kind: str, text: str) -> str:
    return f'<p class="{kind}">{escape(text)}</p>\n' if text else ""


def _is_numeric(text: str) -> bool:
    """True for a number with anything that may follow it (± its error, a note), or for a placeholder of one."""
    return re.match(r"[-−+]?\d[\d.,]*($|[^\w.,])|(–|—|not run.*)?$", text) is not None


def _tables(content: PageContent) -> str:
    """The table with the columns to be read first, a line on its marks, and all other columns folded below it."""
    if not content.table_rows:
        return ""
    marks = content.marks or Marks(tuple(range(len(content.table_header))))
    html = _table(content, marks.first, marks, label="Table of results")
    if marks.best:
        front = f" ◆ On the front: no row of as few bits has better {marks.front_by}." if marks.front else ""
        html += _paragraph("hint", f"Bold: the best of its column among compressed rows; ± may hide the order.{front}")
    if not marks.folded:
        return html
    names = ", ".join(content.table_header[column] for column in marks.folded)
    return html + (
        f"<details><summary>Other metrics: {escape(names)}</summary>\n"
        f"{_table(content, (0, *marks.folded), marks, label='Table of other metrics')}</details>\n"
    )


def _table(content: PageContent, columns: Sequence[int], marks: Marks, *, label: str) -> str:
    """A table as HTML: columns of numbers are right-aligned, and the first cell of a row is its header."""
    rows = content.table_rows
    kinds = {c: "number" if c and all(_is_numeric(row[c]) for row in rows) else "text" for c in columns}
    head = "".join(f'<th scope="col" class="{kinds[c]}">{escape(content.table_header[c])}</th>' for c in columns)

    def cell(number: int, column: int) -> str:
        text = escape(rows[number][column])
        if column == columns[0]:
            front = ' <span class="front" title="on the front">◆</span>' if number in marks.front else ""
            return f'<th scope="row">{text}{front}</th>'
        inner = f"<strong>{text}</strong>" if (number, column) in marks.best else text
        return f'<td class="{kinds[column]}">{inner}</td>'

    body = "".join("<tr>" + "".join(cell(i, c) for c in columns) + "</tr>\n" for i in range(len(rows)))
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{label}">'
        f"<table><thead><tr>{head}</tr></thead><tbody>\n{body}</tbody></table></div>\n"
    )


def _notes(content: PageContent) -> str:
    """The protocol, folded."""
    items = "".join(f"<li>{escape(note)}</li>" for note in content.notes)
    if not items:
        return ""
    return f'<details><summary>Protocol</summary>\n<ul class="notes" aria-label="Protocol">{items}</ul></details>\n'


def _figure(title: str, path: Path) -> str:
    """A figure as an image, not as markup: an SVG's content then can neither run nor load anything."""
    content = path.read_bytes()
    width = re.search(rb'<svg[^>]* width="([\d.]+)pt"', content)
    wide = ' class="wide"' if width and float(width[1]) > WIDE else ""
    data = base64.b64encode(content).decode()
    return (
        f'<figure{wide}><img alt="{escape(title)}" src="data:image/svg+xml;base64,{data}">'
        f"<figcaption>{escape(title)}</figcaption></figure>\n"
    )


def _gallery_html(content: PageContent, gallery: Gallery) -> str:
    return Template(_file("gallery.html")).substitute(about=_about(content, gallery))


def _about(content: PageContent, gallery: Gallery) -> str:
    """A sentence on what the gallery shows, out of how much, and how faithfully."""
    what = "prompts" if content.images_per_prompt == 1 else f"images of {len(content.prompts):,} prompts"
    count, total = f"{len(gallery.rows):,}", f"{gallery.total:,}"
    text = f"Showing all {total} {what}" if count == total else f"Showing {count} of {total} {what}"
    if gallery.worst_by:
        label = content.score_labels.get(gallery.worst_by, gallery.worst_by)
        text += f": in turn the first ones and those with the worst {label} of any method, as many as the file may hold"
    text += ". Images of a row come from the same prompt and the same noise. "
    width, height = gallery.original
    if gallery.shown == gallery.original:
        return _paragraph("about", text + f"They are the files themselves, {width} × {height} pixels, without loss.")
    return _paragraph(
        "about",
        text + f"They were made at {width} × {height} and are shown at {gallery.shown[0]} × {gallery.shown[1]} pixels "
        f"(at most {LARGEST}) as WebP of quality {WEBP_QUALITY}: differences are of these copies, scores of the files.",
    )


def _scheme(scheme: dict) -> str:
    """A scheme's short name as in tables: "additive 3x8g8", "gptq 4 bit g64"."""
    if "num_codebooks" in scheme:
        return f"{scheme['codec']} {scheme['num_codebooks']}x{scheme['codebook_bits']}g{scheme['group_size']}"
    group = f" g{scheme['group_size']}" if scheme.get("group_size") else ""
    return f"{scheme['codec']} {scheme['bits']:.4g} bit{group}"


def _with_shape_in_words(record: dict) -> dict:
    return record | {"shape": " × ".join(map(str, record["shape"]))}


def _layers(method: PageMethod) -> dict:
    """Rows of one method's table of layers, in the order of `LAYER_COLUMNS`; layers left in 16 bit say why."""
    stored = json.loads(method.layers.read_text(encoding="utf-8"))
    try:
        records = [record | {"scheme": _scheme(record["scheme"])} for record in stored["quantized"]]
        left = [record | {"scheme": f"16 bit: {record['reason']}", "bits": 16} for record in stored["left_in_16_bit"]]
        rows = [[record.get(key) for key in LAYER_COLUMNS] for record in map(_with_shape_in_words, records + left)]
        weights = sum(prod(record["shape"]) for record in records)
    except (KeyError, TypeError) as error:
        raise UserError(f"{method.layers} is no list of layers ({error!r}); run its quantize stage again") from error
    return {"method": method.name, "rows": rows, "quantized": len(records), "left": len(left), "weights": weights}


def _commands(content: PageContent) -> str:
    if not content.commands:
        return ""
    return f'<pre tabindex="0" aria-label="Commands"><code>{escape(chr(10).join(content.commands))}</code></pre>\n'


def _versions(content: PageContent) -> str:
    items = "".join(f"<div><dt>{escape(k)}</dt><dd>{escape(v)}</dd></div>" for k, v in content.versions.items())
    return f'<dl class="versions" aria-label="Versions">{items}</dl>\n' if items else ""
