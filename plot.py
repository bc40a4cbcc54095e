"""Pictures: lines over time or steps, in one style."""

from pathlib import Path


def lines(path, series, x_label, y_label, title, log=False):
    """Draw {label: (x, y)} as lines into a picture file of the kind that its name ends in, on logarithmic axes where asked."""
    import matplotlib  # takes a second to import

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for label, (x, y) in series.items():
        axes.plot(x, y, label=label, linewidth=1.8)
    axes.set(xlabel=x_label, ylabel=y_label, title=title)
    if log:
        axes.set(xscale="log", yscale="log")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)
