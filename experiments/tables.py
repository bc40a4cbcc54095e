"""Lay out results as tables in Markdown."""


def row(cells):
    """Write one row."""
    return f"| {' | '.join(cells)} |"


def table(columns, rows):
    """Write a head and rows of cells -> lines."""
    return [row(columns), "|" + "---|" * len(columns), *map(row, rows)]
