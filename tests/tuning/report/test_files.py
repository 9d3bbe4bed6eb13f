from __future__ import annotations

import base64
import re
import shlex
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from typer.testing import CliRunner

from tuning.confirm.results import TuningResult
from tuning.report import files as module
from tuning.report.files import write_report
from tuning.report.result_rows import percent

VOID = {"meta", "link", "img", "br"}
PICTURES = {"pareto.png", "full-share.png", "kl-by-kind.png", "search.png"}


class Page(HTMLParser):
    """Reads a page; an end tag that closes nothing, or the wrong element, is an error."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.words += data.split()

    @property
    def text(self) -> str:
        return " ".join(self.words)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture(scope="module")
def html(report_folder: Path) -> str:
    return (report_folder / "report.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(html: str) -> Page:
    return Page(html)


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves the drawing out."""
    blank = tuple(replace(picture, draw=lambda _: Figure((1, 1))) for picture in module._PICTURES)
    monkeypatch.setattr(module, "_PICTURES", blank)
    monkeypatch.setattr(module, "_LADDER", replace(module._LADDER, draw=lambda _: Figure((1, 1))))


def test_the_page_is_well_formed(page: Page, html: str) -> None:
    assert html.startswith("<!doctype html>")
    assert [len(page.all(tag)) for tag in ("html", "head", "title", "body", "h1", "main")] == [1] * 6
    assert len(page.all("table")) == 3


def test_nothing_is_loaded_from_anywhere(page: Page, html: str) -> None:
    links = [attributes[name] for _, attributes in page.elements for name in ("src", "href") if name in attributes]
    assert links
    assert all(link is not None and link.startswith("data:") for link in links)
    assert not page.all("script")
    assert not re.search(r"https?://|@import|url\(", html)


def test_pictures_are_in_the_page_and_beside_it(page: Page, report_folder: Path) -> None:
    files = sorted((report_folder / "pictures").iterdir())
    assert {file.name for file in files} == PICTURES
    images = page.all("img")
    inline = {base64.b64decode(str(image["src"]).removeprefix("data:image/png;base64,")) for image in images}
    assert inline == {file.read_bytes() for file in files}
    assert all(image["alt"] for image in images)
    assert len(page.all("figcaption")) == 4


def test_no_half_written_file_is_left(report_folder: Path) -> None:
    assert {path.name for path in report_folder.iterdir()} == {"report.html", "results.json", "pictures"}


def test_the_headline_is_the_result(page: Page, report_result: TuningResult) -> None:
    best = report_result.best.measured
    share = report_result.kl_ratio(best)
    assert (
        f"logistic_profile runs full in {best.full_share:.1%} of unit-steps and differs from full attention by a KL "
        f"of {best.kl.value:.3f} nats per step: {share.value:.0%} "
        f"(95% interval {100 * share.low:.0f} to {share.high:.0%}) of that of fixed stride 10 at the same budget."
    ) in page.text


def test_every_policy_has_a_row(page: Page, report_result: TuningResult) -> None:
    rows = [attributes.get("class") for attributes in page.all("tr")]
    # One in the table of policies, and one per kind of text.
    assert [rows.count(role) for role in ("exported", "family", "baseline", "reference")] == [2, 10, 2, 4]
    families = [family.measured for family in report_result.families]
    for measured in (*families, report_result.baseline, *report_result.references):
        assert measured.label in page.text
        assert f"{measured.kl.value:.3f} {measured.kl.low:.3f}\N{EN DASH}{measured.kl.high:.3f}" in page.text


def test_provenance_is_told(page: Page, report_result: TuningResult) -> None:
    for word in (*report_result.tune_names, *report_result.prompt_names, "k = 128 tokens", "30 layers, 3 KV heads"):
        assert word in page.text
    for package, version in report_result.versions.items():
        assert f"{package} {version}" in page.text


def test_the_command_of_the_report_is_one_that_generate_knows(page: Page) -> None:
    typer = pytest.importorskip("typer")
    generate = pytest.importorskip("recycler.generate")
    (command,) = re.findall(r"python -m recycler\.generate (.*?--compare)", page.text)
    app = typer.Typer()
    app.command()(generate.main)
    known = CliRunner().invoke(app, ["--help"], env={"COLUMNS": "200", "NO_COLOR": "1"}).output
    for option in (word for word in shlex.split(command) if word.startswith("--")):
        assert option in known


@pytest.mark.usefixtures("fast")
def test_names_are_escaped(report_result: TuningResult, tmp_path: Path) -> None:
    bad = "<script>alert('&')</script>"
    best = replace(report_result.best, measured=replace(report_result.best.measured, label=bad), parameters={bad: bad})
    result = replace(
        report_result,
        model=replace(report_result.model, id=bad),
        families=[best],
        baseline=replace(report_result.baseline, label=bad),
        prompt_kinds=[bad] * 12,
        prompt_names=[bad] * 12,
        tune_names=[bad],
        versions={bad: bad},
    )
    html = write_report(result, tmp_path).read_text(encoding="utf-8")
    assert "<script" not in html
    assert "alert('&')" in Page(html).text


@pytest.mark.usefixtures("fast")
def test_a_result_with_nothing_to_compare_with_is_reported(report_result: TuningResult, tmp_path: Path) -> None:
    result = replace(
        report_result,
        baseline=replace(report_result.baseline, prompt_kl=np.zeros(12)),
        families=[replace(report_result.best, parameters={})],
        references=[],
        versions={},
    )
    page = Page(write_report(result, tmp_path / "new" / "folder").read_text(encoding="utf-8"))
    assert "nothing to compare with" in page.text
    assert "nan" not in page.words


def test_a_result_whose_budget_was_given_certifies_nothing(page: Page) -> None:
    assert "ertif" not in page.text


@pytest.mark.usefixtures("fast")
def test_a_certificate_is_told_with_every_policy_that_was_tested(ladder_result: TuningResult, tmp_path: Path) -> None:
    page = Page(write_report(ladder_result, tmp_path).read_text(encoding="utf-8"))
    assert ladder_result.ladder is not None
    assert len(page.all("table")) == 4
    assert f"Certified: {ladder_result.certificate}." in page.text
    for rung in ladder_result.ladder.rungs:
        found = rung.certificate
        assert f"{found.kl_bound:.3f} {found.n_exceeding} of 36 {percent(found.share_bound)}" in page.text
    assert page.words.count("yes") == 2
    assert "KL has no upper bound, so a prompt counts up to 0.8 nats" in page.text
    assert "Only the budget was chosen on them" in page.text
    assert {path.name for path in (tmp_path / "pictures").iterdir()} == {*PICTURES, "certificate.png"}


@pytest.mark.usefixtures("fast")
def test_a_write_that_fails_leaves_the_report_that_was_there(
    report_result: TuningResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_report(report_result, tmp_path)
    before = path.read_bytes()

    def refuse(self: Path, text: str, encoding: str) -> int:
        self.write_bytes(b"<")
        raise OSError("no space left on device")

    monkeypatch.setattr(Path, "write_text", refuse)
    with pytest.raises(OSError, match="no space"):
        write_report(report_result, tmp_path)
    assert path.read_bytes() == before
