"""A row of a benchmark: what was measured, and the goal that it has."""

from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Row:
    """One number with its unit ("" for a ratio) and, if it has a goal, the bound."""

    name: str
    value: float
    unit: str
    at_least: float | None = None
    at_most: float | None = None

    @property
    def met(self) -> bool | None:
        """Whether the goal is met; None without one."""
        if self.at_least is None and self.at_most is None:
            return None
        low, high = self.at_least, self.at_most
        return (low is None or self.value >= low) and (high is None or self.value <= high)

    def to_json(self) -> dict:
        return asdict(self) | {"met": self.met}


def table(rows: list[Row]) -> str:
    """The rows as a table in Markdown."""
    lines = ["| measured | value | goal | met |", "|---|---|---|---|"]
    for row in rows:
        bounds = [f">= {row.at_least}"] * (row.at_least is not None) + [f"<= {row.at_most}"] * (row.at_most is not None)
        met = {None: "", True: "yes", False: "no"}[row.met]
        lines.append(f"| {row.name} | {row.value:.3g} {row.unit} | {', '.join(bounds)} | {met} |")
    return "\n".join(lines)
