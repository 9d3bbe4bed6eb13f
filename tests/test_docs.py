"""The documents name what is there: files, headings, and the README's folders."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
# The log says what things were called at the time: its links lead to files, and no more is asked of it.
IS_LOG = re.compile(r"docs/(LOG\.md|log/.*)")
PACKAGES = ("policies", "traces", "recycler", "tuning")
FOLDERS = (*PACKAGES, "tests", "benchmarks", "docs")

LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
CODE = re.compile(r"`([^`\n]+)`")
PATH = re.compile(rf"(?:{'|'.join(FOLDERS)})/[\w.*/-]*")


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def without_blocks(text: str) -> str:
    """A document without its fenced and indented code."""
    unfenced = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"^ {4}.*$", "", unfenced, flags=re.MULTILINE)


def anchors(text: str) -> set[str]:
    """What GitHub makes of headings."""
    headings = re.findall(r"^#+ +(.+?) *$", without_blocks(text), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(document: Path, *, to_headings: bool = True) -> Iterator[str]:
    for target in LINK.findall(without_blocks(document.read_text(encoding="utf-8"))):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = document.parent / path if path else document
        if not file.exists() or (to_headings and anchor and anchor not in anchors(file.read_text(encoding="utf-8"))):
            yield target


def missing_paths(text: str) -> Iterator[str]:
    for code in CODE.findall(without_blocks(text)):
        for word in code.split():
            if PATH.fullmatch(word) and not any(ROOT.glob(word.rstrip("/"))):
                yield word


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_every_relative_link_leads_to_a_file_and_a_heading(document: Path) -> None:
    assert list(broken_links(document, to_headings=not IS_LOG.fullmatch(name_of(document)))) == []


@pytest.mark.parametrize("document", [one for one in DOCUMENTS if not IS_LOG.fullmatch(name_of(one))], ids=name_of)
def test_every_path_of_the_repository_in_backticks_exists(document: Path) -> None:
    assert list(missing_paths(document.read_text(encoding="utf-8"))) == []


def test_the_readme_has_a_line_for_every_folder_of_the_packages() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    tree = readme.partition("## What is where")[2].partition("\n## ")[0]
    parents: list[str] = []
    shown = set()
    for indent, folder in re.findall(r"^ {4}((?:  )*)(\w+)/ ", tree, flags=re.MULTILINE):
        parents[len(indent) // 2 :] = [folder]
        shown.add("/".join(parents))
    packages = {name_of(init.parent) for package in PACKAGES for init in (ROOT / package).rglob("__init__.py")}
    # Under `moved` are old names of modules, which go with the next version.
    assert {folder for folder in packages if "moved" not in folder.split("/")} <= shown
    assert all((ROOT / folder).is_dir() for folder in shown)


def test_what_is_wrong_in_a_document_is_found(tmp_path: Path) -> None:
    document = tmp_path / "one.md"
    document.write_text(
        "# On *one* page: `x`\n\n[good](one.md#on-one-page-x), [own](#on-one-page-x), [no heading](#none), "
        "[no file](two.md), [web](https://example.org)\n\n    [code](three.md)\n\n"
        "`policies/base.py` `python benchmarks/none.py --all` `tests/*/none/` `results/policy.json`\n",
        encoding="utf-8",
    )
    assert list(broken_links(document)) == ["#none", "two.md"]
    assert list(missing_paths(document.read_text(encoding="utf-8"))) == ["benchmarks/none.py", "tests/*/none/"]
