"""`benchmarks/RESULTS.md`: several programs' sections on one page. One is replaced, the others stay."""

from pathlib import Path

PAGE = Path(__file__).parent / "RESULTS.md"
CHART = Path(__file__).parent / "chart.svg"


def replaced(page: str, section: str) -> str:
    """Put `section` in the place of the one on `page` with the same first line, which begins with `# `.

    It becomes the first where the page has none of that name.
    """
    section = section.strip() + "\n"
    title = section.partition("\n")[0]
    before: list[str] = []
    mine: list[str] = []
    after: list[str] = []
    into = before
    for line in page.splitlines(keepends=True):
        if line.startswith("# "):
            into = mine if line.rstrip() == title else after if mine else before
        into.append(line)
    if not mine:
        before, after = [], before
    rest = "".join(after)
    return "".join(before) + section + (f"\n\n{rest}" if rest else "")


def write(section: str, chart: str) -> None:
    """Keep the figures, and the chart that they refer to."""
    before = PAGE.read_text(encoding="utf-8") if PAGE.exists() else ""
    PAGE.write_text(replaced(before, section), encoding="utf-8")
    CHART.write_text(chart, encoding="utf-8")
