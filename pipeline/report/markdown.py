"""A report as Markdown: sentences and tables, charts as the tables beside them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from secateur.pipeline.report.content import Section, Table
from secateur.pipeline.report.material import Material

MOST_ROWS = 100


def markdown(m: Material, sections: Sequence[Section]) -> str:
    """The whole report."""
    lines = [f"# {m.config.name} on {m.device}", ""]
    for number, section in enumerate(sections, start=1):
        lines += [f"## {number}. {section.title}", "", f"**{section.sentence}**", ""]
        if section.tiles:
            lines += [*(f"- {tile.title}: **{tile.value}** ({tile.detail})" for tile in section.tiles), ""]
        for text in section.text:
            lines += [text, ""]
        for figure in section.figures:
            lines += [f"### {figure.title}", "", *([figure.note, ""] if figure.note else []), *_table(figure.table)]
        for table in section.tables:
            lines += _table(table)
        for picture in section.pictures:
            lines.append(f"- Picture: {picture.alt}")
        for code in section.code:
            fence = "```" if "```" not in code.text else "~~~"
            lines += [f"{code.title}:", "", fence, code.text.rstrip("\n"), fence, ""]
    return "\n".join(lines).rstrip("\n") + "\n"


def _table(table: Table) -> Iterator[str]:
    yield f"{table.caption}:"
    yield ""
    yield _row(table.titles)
    yield _row(["--:" if table.is_numeric(i) else "---" for i in range(len(table.columns))])
    for row in table.rows[:MOST_ROWS]:
        yield _row(row)
    if len(table.rows) > MOST_ROWS:
        yield ""
        yield f"({MOST_ROWS} of {len(table.rows):,} rows; report.json has all.)"
    yield ""


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', '&#124;').replace(chr(10), ' ') for cell in cells)} |"
