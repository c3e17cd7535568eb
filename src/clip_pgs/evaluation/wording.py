"""Numbers and names as people read them, in the report and on the terminal."""

from __future__ import annotations

SUITE_TITLES = {
    "zeroshot-classification": "Zero-shot classification",
    "zeroshot-retrieval": "Zero-shot retrieval",
    "linear-probe": "Linear probe",
    "robustness": "Robustness",
    "compositionality": "Language compositionality",
}
# What the main tables and figures show of a suite; the other metrics are in the appendix.
MAIN_METRICS = {
    "zeroshot-classification": ("acc1",),
    "zeroshot-retrieval": (
        *(f"text_retrieval_recall@{k}" for k in (1, 5, 10)),
        *(f"image_retrieval_recall@{k}" for k in (1, 5, 10)),
    ),
    "linear-probe": ("lp_acc1",),
    "robustness": ("acc1",),
    "compositionality": ("acc",),
}
SUITE_UNITS = {
    "zeroshot-classification": "top-1 accuracy, percent",
    "zeroshot-retrieval": "recall, percent",
    "linear-probe": "top-1 accuracy, percent",
    "robustness": "top-1 accuracy, percent",
    "compositionality": "accuracy, percent",
}
_METRIC_LABELS = {
    "acc1": "top-1",
    "acc5": "top-5",
    "mean_per_class_recall": "class recall",
    "lp_acc1": "top-1",
    "lp_acc5": "top-5",
    "lp_mean_per_class_recall": "class recall",
    "acc": "accuracy",
    "mean_average_precision": "mAP",
    **{f"text_retrieval_recall@{k}": f"text R@{k}" for k in (1, 5, 10)},
    **{f"image_retrieval_recall@{k}": f"image R@{k}" for k in (1, 5, 10)},
}
_AVERAGE_LABELS = {
    "average": "average",
    "id_average": "ID average",
    "ood_average": "OOD average",
}
PLUS_MINUS, BLANK = "\N{PLUS-MINUS SIGN}", "\N{EN DASH}"
_PREFIXES = ("", "k", "M", "G", "T", "P", "E", "Z")


def suite_title(suite: str) -> str:
    """Return a suite's name for people."""
    return SUITE_TITLES.get(suite, suite)


def metric_label(metric: str) -> str:
    """Return a metric's name for people."""
    return _METRIC_LABELS.get(metric, metric)


def set_label(dataset: str) -> str:
    """Return a data set's name without the collection it comes from."""
    return dataset.rsplit("/", 1)[-1]


def average_label(name: str) -> str:
    """Return an average's name for people."""
    return _AVERAGE_LABELS.get(name, name.replace("_", " "))


def percent(value: float | None) -> str:
    """Return a share in [0, 1] as percent with one decimal; "" for None."""
    # Halves go up: the mean of cells such as 30.95 is not to depend on its last bit.
    return "" if value is None else f"{100 * value + 1e-9:.1f}"


def spread_text(spread: float | None) -> str:
    """Return a standard deviation in [0, 1] in percent, after a sign; "" for None."""
    return "" if spread is None else f"{PLUS_MINUS} {percent(spread)}"


def scaled(value: float | None, unit: str = "") -> str:
    """Return a number with three digits and a prefix, such as "10.8 T"; "" for None."""
    if value is None:
        return ""
    power = 0
    while abs(value) >= 999.5 and power < len(_PREFIXES) - 1:
        value, power = value / 1000, power + 1
    digits = f"{value:.3g}" if power else f"{value:g}"
    return f"{digits} {_PREFIXES[power]}{unit}".strip()


def duration(seconds: float | None) -> str:
    """Return a time span in its two largest units, such as "11 min 21 s"; "" for None."""
    if seconds is None:
        return ""
    rest = round(seconds)
    parts: list[str] = []
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60), ("s", 1)):
        count, rest = divmod(rest, size)
        if count or (unit == "s" and not parts):
            parts.append(f"{count} {unit}")
    return " ".join(parts[:2])


def counted(number: int, noun: str) -> str:
    """Return a number with its noun, such as "1 seed" or "2 seeds"."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
