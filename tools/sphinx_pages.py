"""What Sphinx needs to know to build ``docs/`` as it stands (an extension, see ``docs/conf.py``).

The pages are plain Markdown whose links lead to other files of the repository: a README outside of
``docs``, a source, a folder. :func:`rewritten` points such links at pages that :func:`write_beside`
makes under ``docs/_repository`` before a build. Which page stands where in the navigation is read
off the tables of ``docs/index.md`` (:func:`toctrees`), so that no page is listed twice.
"""

import ast
import re
from collections.abc import Iterator
from os import path
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sphinx.application import Sphinx

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
BESIDE = DOCS / "_repository"  # ignored by git
PAGES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", "findings/README.md")
_KINDS = {".py": "python", ".sh": "bash", ".yml": "yaml", ".yaml": "yaml", ".toml": "toml"}

# Says that a page need not stand in the navigation.
_ORPHAN = "---\norphan: true\n---\n"
_FENCE = re.compile(r"(^ *```.*?^ *```)", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"(?<!`)(\[[^\]\[]+\]\()([^)\s]+)(\))")


def targets(text: str) -> list[str]:
    """The targets of a page's links, code blocks left out.

    >>> targets("[a](b.md#c) and [d](../e.py)")
    ['b.md#c', '../e.py']
    """
    return [found[1] for found in _LINK.findall(_FENCE.sub("", text))]


def page_of(file: Path) -> Path | None:
    """The page that shows a file or folder of the repository; ``None`` for what is linked as it is.

    >>> page_of(ROOT / "docs" / "guide.md").name, page_of(ROOT / "CHANGELOG.md").name
    ('guide.md', 'changelog.md')
    >>> page_of(ROOT / "tools" / "demo.py").name, page_of(ROOT / "LICENSE")
    ('tools-demo-py.md', None)
    """
    file = file.resolve()
    if not file.is_relative_to(ROOT):
        return None
    inside = file.relative_to(ROOT).as_posix()
    if file.suffix == ".md":
        if file.is_relative_to(DOCS):
            return file
        return BESIDE / f"{_slug(inside.removesuffix('/README.md').removesuffix('.md'))}.md"
    if file.is_dir() or file.suffix in _KINDS:
        return BESIDE / f"{_slug(inside)}.md"
    return None


def _slug(name: str) -> str:
    return re.sub(r"\W+", "-", name).strip("-").lower()


def rewritten(text: str, folder: Path, place: Path | None = None) -> str:
    """A page's text whose links lead to pages of the build.

    Args:
        text: Markdown as it stands in the repository.
        folder: where it stands there.
        place: the folder that the text is put into; the same one if not given.
    """

    def replaced(found: re.Match[str]) -> str:
        target, _, anchor = found[2].partition("#")
        if not target or "://" in target or target.startswith("mailto:"):
            return found[0]
        file = folder / target
        link = path.relpath(page_of(file) or file, place or folder)
        return f"{found[1]}{Path(link).as_posix()}{'#' * bool(anchor)}{anchor}{found[3]}"

    return "".join(
        part if part.lstrip().startswith("```") else _LINK.sub(replaced, part)
        for part in _FENCE.split(text)
    )


def sources() -> list[Path]:
    """Files and folders that pages link to and that are no pages, what folders hold included."""
    pages = [*DOCS.rglob("*.md"), *(ROOT / name for name in PAGES)]
    found: dict[Path, None] = {}
    for page in pages:
        if page.is_relative_to(BESIDE) or not page.is_file():
            continue
        for target in targets(page.read_text(encoding="utf-8")):
            file = (page.parent / target.partition("#")[0]).resolve()
            if file.suffix == ".md" or "://" in target or page_of(file) is None:
                continue
            found[file] = None
            if file.is_dir():
                found |= dict.fromkeys(sorted(x for x in file.iterdir() if x.suffix in _KINDS))
    return list(found)


def shown(file: Path) -> str:
    """The page of a source, or the list of a folder's files with the first line of each."""
    name = file.relative_to(ROOT).as_posix()
    if file.is_file():
        place, language = path.relpath(file, BESIDE), _KINDS[file.suffix]
        code = f"```{{literalinclude}} {place}\n:language: {language}\n```"
        return f"{_ORPHAN}# {name}\n\n{code}\n"
    lines = [
        f"- [{entry.name}]({path.relpath(page_of(entry) or entry, BESIDE)}){_first_line(entry)}"
        for entry in sorted(file.iterdir())
        if entry.is_file() and (entry.suffix in _KINDS or entry.suffix == ".json")
    ]
    return f"{_ORPHAN}# {name}\n\n" + "\n".join(lines) + "\n"


def _first_line(file: Path) -> str:
    if file.suffix != ".py":
        return ""
    words = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
    line = words.partition("\n")[0].replace("``", "`")
    return f": {line}" if line else ""


def write_beside() -> None:
    """Write the pages of files that stand outside of ``docs``; those that are as wanted stay."""
    BESIDE.mkdir(exist_ok=True)
    wanted = {page_of(file): shown(file) for file in sources()}
    for name in PAGES:
        page = ROOT / name
        if page.is_file():
            text = rewritten(page.read_text(encoding="utf-8"), page.parent, BESIDE)
            wanted[page_of(page)] = f"{_ORPHAN}{_images(text, page.parent)}"
    for old in set(BESIDE.glob("*.md")) - wanted.keys():
        old.unlink()
    for file, text in wanted.items():
        assert file is not None
        if not file.is_file() or file.read_text(encoding="utf-8") != text:
            file.write_text(text, encoding="utf-8")


def _images(text: str, folder: Path) -> str:
    """Sources of ``<img>``, which are no Markdown links."""
    return re.sub(
        r'(src(?:set)?=")([^":]+)(")',
        lambda found: found[1] + path.relpath(folder / found[2], BESIDE) + found[3],
        text,
    )


def toctrees(text: str, folder: Path) -> Iterator[str]:
    r"""The navigation that a page of tables stands for: one hidden toctree per section.

    >>> print(next(toctrees("# All\n## Use\n| [A](guide.md) | b |\n", DOCS)))
    ```{toctree}
    :hidden:
    :caption: Use
    <BLANKLINE>
    A <guide>
    ```
    """
    for place, section in enumerate(re.split(r"^## ", text, flags=re.MULTILINE)):
        rows = "\n".join(line for line in section.splitlines() if line.startswith("| "))
        pages: dict[str, str] = {}
        for link, target, _ in _LINK.findall(rows):
            file = page_of(folder / target.partition("#")[0])
            if file is not None:
                name = Path(path.relpath(file, folder)).with_suffix("").as_posix()
                pages.setdefault(name, f"{link[1:-2]} <{name}>")
        if pages:
            caption = [f":caption: {section.splitlines()[0]}"] if place else []
            yield "\n".join(["```{toctree}", ":hidden:", *caption, "", *pages.values(), "```"])


def _read(app: "Sphinx", name: str, content: list[str]) -> None:
    file = Path(app.srcdir) / f"{name}.md"
    if file.is_relative_to(BESIDE):
        return
    text = content[0]
    trees = list(toctrees(text, file.parent)) if name in {"index", "decisions/README"} else []
    content[0] = "\n\n".join([rewritten(text, file.parent), *trees])


def setup(app: "Sphinx") -> dict[str, bool]:
    """Called by Sphinx, for ``docs/conf.py`` names this module as an extension."""
    app.connect("config-inited", lambda *_: write_beside())
    app.connect("source-read", _read)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
