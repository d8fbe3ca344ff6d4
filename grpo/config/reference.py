"""Generate docs/options.md from the schema, and docs/exit-codes.md from `grpo.types.ExitCode`:

python -m grpo.config.reference options > docs/options.md
python -m grpo.config.reference exit-codes > docs/exit-codes.md
"""

from __future__ import annotations

import re
import sys

from grpo.config.describe import Section, default_text, field_texts, meaning_text, sections, type_text
from grpo.types import ExitCode

OPTIONS_HEAD = """\
<!-- python -m grpo.config.reference options > docs/options.md -->
# Options

Every option of a recipe. `grpo options SECTION` and `grpo options OPTION` print the same text in a terminal.

On the command line an option is written `section.option=value`. An entry of a list is addressed by its index:
`rewards[0].weight=2` or `rewards.0.weight=2`; `[i]` stands for the index below. *Required* options have no default. A
misspelt option, or one that has no effect next to the others, is an error that names the nearest valid one. Options of
other trainers are in [migrating.md](migrating.md).
"""
EXIT_CODES_HEAD = """\
<!-- python -m grpo.config.reference exit-codes > docs/exit-codes.md -->
# Exit codes

| code | name | meaning |
|---|---|---|
"""
EXIT_CODES_END = """
A scheduler should repeat a command only after 75, and with `resume=auto`
([operations.md](operations.md#how-runs-end)). `grpo submit` and `grpo logs` return the code of the job, or one of the
codes in [cluster.md](cluster.md#exit-codes).
"""


def options_page() -> str:
    """Return the text of docs/options.md."""
    return OPTIONS_HEAD + "".join(f"\n{_section_text(section)}\n" for section in sections())


def exit_codes_page() -> str:
    """Return the text of docs/exit-codes.md."""
    meanings = field_texts(ExitCode)
    rows = [f"| {code.value} | `{code.name}` | {_cell(meanings[code.name])} |\n" for code in ExitCode]
    return EXIT_CODES_HEAD + "".join(rows) + EXIT_CODES_END


def _section_text(section: Section) -> str:
    lines = [f"## {section.name}", "", _linked(section.meaning), ""]
    if section.examples:
        lines += ["```bash", *(f"grpo train RECIPE {example}" for example in section.examples), "```", ""]
    lines += ["| option | type | default | meaning | on resume |", "|---|---|---|---|---|"]
    for option in section.options:
        default = default_text(option.default)
        default = default if default == "required" else f"`{default}`"
        cells = (f"`{option.name}`", type_text(option), default, _linked(meaning_text(option)), option.resume.value)
        lines.append(f"| {' | '.join(map(_cell, cells))} |")
    return "\n".join(lines)


def _cell(text: str) -> str:
    """Return `text` for a cell of a table: the character | would end the cell."""
    return text.replace("|", "\\|")


def _linked(text: str) -> str:
    """Return `text` with each path docs/x.md as a link from a page in docs/."""
    return re.sub(r"\bdocs/([\w-]+\.md)", r"[\1](\1)", text)


PAGES = {"options": options_page, "exit-codes": exit_codes_page}

if __name__ == "__main__":
    sys.stdout.write(PAGES[sys.argv[1]]())
