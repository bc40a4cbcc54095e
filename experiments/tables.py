"""Lay out results as tables in Markdown."""


def table(columns, rows):
    """Write a head and rows of cells -> lines."""
    head, *body = [f"| {' | '.join(cells)} |" for cells in (columns, *rows)]
    return [head, "|" + "---|" * len(columns), *body]
