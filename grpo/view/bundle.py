"""Join the page's scripts into one, for a page that is a single file.

Modules cannot import each other inside one file. So that they can be joined, they import names without renaming them,
export declarations only, and use different names at their top levels.
"""

from __future__ import annotations

import re
from pathlib import Path

STATIC = Path(__file__).with_name("static")
_IMPORT = re.compile(r'^import \{[^}]*\} from "\./([\w-]+\.js)";\n', re.MULTILINE)


def bundle(folder: Path = STATIC, first: str = "app.js") -> str:
    """Return the module `first` and all that it imports as one script, each module after those that it imports."""
    placed: dict[str, str] = {}

    def place(name: str) -> None:
        if name in placed:
            return
        placed[name] = ""  # begun: a module that is imported in a circle is placed once
        text = (folder / name).read_text(encoding="utf-8")
        for imported in _IMPORT.findall(text):
            place(imported)
        del placed[name]
        placed[name] = re.sub(r"^export ", "", _IMPORT.sub("", text), flags=re.MULTILINE)

    place(first)
    return "\n".join(placed.values())
