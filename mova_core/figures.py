"""How figures are written for people, in every command, line and picture alike."""


def number(value: float | None) -> str:
    """Three digits, or all those before the point; thousands separated, "-" for an unknown number."""
    if value is None:
        return "-"
    if isinstance(value, int) or abs(value) >= 100:
        return f"{round(value):,}"
    if 0 < abs(value) < 0.001:
        return "< 0.001" if value > 0 else "> -0.001"
    return f"{value:.3g}"


def percent(share: float | None, digits: int = 0) -> str:
    """A share as a percentage, "-" for an unknown one."""
    return "-" if share is None else f"{100 * share:.{digits}f} %"
