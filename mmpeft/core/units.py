"""Figures in words for people: durations, bytes, counts, shares, rates."""

NOT_RECORDED = "not recorded"


def duration(seconds: float | None) -> str:
    """`0.42 s`, `38 s`, `5 min 12 s`, `2 h 7 min`."""
    if seconds is None:
        return NOT_RECORDED
    if seconds < 9.95:
        return f"{seconds:.2g} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def size(amount: int | None) -> str:
    """Bytes by powers of 1024: `512 B`, `1.9 MiB`, `2.31 GiB`."""
    if amount is None:
        return NOT_RECORDED
    value, unit = float(amount), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if value < 1024:
            break
        value, unit = value / 1024, larger
    return f"{value:.0f} B" if unit == "B" else f"{_three(value)} {unit}"


def count(number: int | None) -> str:
    """`950`, `12,300`, `1.24 M`, `7.62 B` (a billion)."""
    if number is None:
        return NOT_RECORDED
    if number < 1_000_000:
        return f"{number:,}"
    return f"{_three(number / 1e6)} M" if number < 999_500_000 else f"{_three(number / 1e9)} B"


def percent(share: float | None) -> str:
    """A share of 1 with one decimal: `92.3 %`."""
    return NOT_RECORDED if share is None else f"{share:.1%}".replace("%", " %")


def rate(value: float | None) -> str:
    """A number with three digits that count: `11.2`, `0.034`, `1,320`."""
    return NOT_RECORDED if value is None else _three(value)


def scientific(value: float | None) -> str:
    """A learning rate: `0.001`, `2e-5`; a dash where nothing trains."""
    if value is None:
        return "-"
    text = f"{value:.3g}"
    return text.replace("e-0", "e-").replace("e+0", "e+")


def metric_title(name: str) -> str:
    """A metric's name for a heading: `exact_match` -> `Exact match`."""
    return {"anls": "ANLS", "token_f1": "Token F1"}.get(name, name.replace("_", " ").capitalize())


def _three(value: float) -> str:
    if abs(value) >= 100:
        return f"{value:,.0f}"
    if abs(value) >= 10:
        return f"{value:.1f}"
    return f"{value:.2f}" if abs(value) >= 1 else f"{value:.3g}"
