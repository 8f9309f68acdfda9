"""The page: one HTML file with everything inside, which loads nothing from a network."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from html import escape

from pretrain.study.figures.chart import Omitted, Written
from pretrain.study.figures.interactive import CONFIG, figure_json
from pretrain.study.report.html import paragraph

POLICY = (
    "default-src 'none'; script-src 'unsafe-inline' 'unsafe-eval'; style-src 'unsafe-inline'; "
    "img-src data: blob:"
)
"""The browser itself refuses to load anything from elsewhere."""
STYLE = """
body{font:15px/1.5 system-ui,sans-serif;color:#111827;max-width:1120px;margin:0 auto;
padding:1.2rem}
h1{font-size:1.5rem}h2{font-size:1.2rem;margin-top:2.2rem;border-bottom:1px solid #d1d5db}
h3{font-size:1rem;margin-bottom:.3rem}
nav a{margin-right:1rem}.wide{overflow-x:auto}table{border-collapse:collapse;font-size:.85rem;
margin:.6rem 0}caption{caption-side:bottom;text-align:left;color:#4b5563;padding-top:.3rem}
th,td{border-bottom:1px solid #e5e7eb;padding:.25rem .6rem;text-align:left;vertical-align:top;
white-space:nowrap}
.number{text-align:right}.caption{color:#374151;font-size:.9rem}.omitted{background:#f3f4f6;
border-left:4px solid #9ca3af;padding:.5rem .8rem}pre{background:#f3f4f6;padding:.6rem;
overflow-x:auto}figure{margin:1rem 0}img{max-width:100%}
"""


def page(title: str, introduction: str, sections: Sequence[tuple[str, str, str]]) -> str:
    """Whole page; a section is an anchor, a title and its HTML."""
    from plotly.offline import get_plotlyjs

    links = "".join(f'<a href="#{name}">{escape(text)}</a>' for name, text, _ in sections)
    return "\n".join(
        [
            '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{escape(title)}</title><style>{STYLE}</style>",
            f"<script>{get_plotlyjs()}</script></head><body>",
            f"<h1>{escape(title)}</h1>{introduction}<nav>{links}</nav>",
            *(body for _, _, body in sections),
            "</body></html>\n",
        ]
    )


def figure_block(written: Written) -> str:
    """Interactive figure, its caption, its numbers and its printed form."""
    chart = written.chart
    csv = base64.b64encode(written.files["csv"].read_bytes()).decode()
    svg = base64.b64encode(written.files["svg"].read_bytes()).decode()
    config = json.dumps(CONFIG)
    # "</" inside a script would end it.
    traces = figure_json(chart).replace("</", "<\\/")
    return (
        f'<figure id="figure-{chart.name}"><h3>{escape(chart.title)}</h3>'
        f'<div id="plot-{chart.name}"></div>'
        f"<script>(function(){{var f={traces};"
        f'Plotly.newPlot("plot-{chart.name}",f.data,f.layout,{config});}})();</script>'
        f'<figcaption class="caption">{escape(chart.caption)} '
        f'<a download="{chart.name}.csv" href="data:text/csv;base64,{csv}">numbers (CSV)</a>; '
        f"PNG and SVG: figures/{chart.name}.</figcaption>"
        f"<details><summary>printed form</summary>"
        f'<img alt="{escape(chart.title)}" src="data:image/svg+xml;base64,{svg}"></details>'
        "</figure>"
    )


def omitted_block(omitted: Omitted) -> str:
    """Title of a figure with the reason why it is missing."""
    text = f"Not drawn: {omitted.reason}."
    return (
        f'<figure id="figure-{omitted.name}"><h3>{escape(omitted.title)}</h3>'
        f"{paragraph(text, 'omitted')}</figure>"
    )
