"""The page: one file, nothing from a network, text from outside only as text."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest

from equipoise.report import write_html
from equipoise.report.content import gather
from equipoise.report.html import embedded, key_figures, page_data, render
from equipoise.trace import Trace
from tests.report.conftest import EXPERTS, HOSTILE, NEVER, SUBJECTS


class Page(HTMLParser):
    """Elements with their attributes, and the text of each kind of element."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text: dict[str, list[str]] = {}
        self._open: list[str] = []
        self.feed(source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in ("meta", "br", "link", "img"):
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        while self._open and self._open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        self.text.setdefault(self._open[-1] if self._open else "", []).append(data)

    def ids(self) -> set[str | None]:
        return {attrs.get("id") for _, attrs in self.elements} - {None}


@pytest.fixture(scope="module")
def source(trace: Trace, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("page") / "report.html"
    assert write_html(trace, path) == path
    return path.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(source: str) -> Page:
    return Page(source)


@pytest.fixture(scope="module")
def rows(page: Page) -> dict[str, Any]:
    """The JSON inside the page."""
    found: dict[str, Any] = json.loads(page.text["script"][0], parse_constant=pytest.fail)
    return found


def test_hostile_names_make_no_element(page: Page) -> None:
    scripts = [attrs for tag, attrs in page.elements if tag == "script"]
    assert scripts == [{"type": "application/json", "id": "data"}, {}]
    assert not [tag for tag, _ in page.elements if tag in ("img", "iframe", "object", "link")]
    assert not [name for _, attrs in page.elements for name in attrs if name.startswith("on")]


def test_hostile_names_are_shown_as_text(page: Page, rows: dict[str, Any]) -> None:
    assert any(HOSTILE in text for text in page.text["h1"])
    cells = "".join(page.text["td"])
    for subject in SUBJECTS:
        assert subject in cells
    assert rows["groups"]["subject"]["names"] == list(SUBJECTS)


def test_the_data_cannot_end_its_script_element(source: str) -> None:
    assert source.count("</script>") == 2
    text = embedded({"name": "</script><!-- & \u2028"})
    assert not set(text) & set("<>&\u2028\u2029")
    assert json.loads(text) == {"name": "</script><!-- & \u2028"}


def test_nothing_is_loaded_from_anywhere(source: str, page: Page) -> None:
    loading = ("src", "href", "srcset", "action", "data", "poster")
    links = [attrs[name] for _, attrs in page.elements for name in loading if name in attrs]
    assert all(link is not None and link.startswith("#") for link in links)
    assert not re.search(r"url\(|@import|fetch\(|XMLHttpRequest|import\(", source)
    assert set(re.findall(r"https?://[^\s\"'<]+", source)) == {"http://www.w3.org/2000/svg"}


def test_the_security_policy_allows_the_one_script(page: Page) -> None:
    policy = next(a["content"] for t, a in page.elements if a.get("http-equiv"))
    script = page.text["script"][-1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert policy is not None
    assert f"script-src 'sha256-{digest}'" in policy
    assert "default-src 'none'" in policy


def test_sections_stand_in_order_and_are_linked(page: Page) -> None:
    order = [attrs["id"] for tag, attrs in page.elements if tag == "section"]
    assert order == [
        "verdict",
        "load",
        "balance",
        "groups",
        "accuracy",
        "layers",
        "experts",
        "provenance",
        "definitions",
    ]
    links = {a["href"] for t, a in page.elements if t == "a"}
    assert links == {f"#{name}" for name in order[1:]}


def test_the_verdict_is_the_first_finding(trace: Trace, page: Page) -> None:
    from equipoise.diagnose.findings import findings

    assert findings(trace)[0].message in page.text["p"]


def test_the_data_are_the_rows(trace: Trace, rows: dict[str, Any]) -> None:
    assert [layer["label"] for layer in rows["layers"]] == ["3", "4", "5", "60"]
    for index, layer in enumerate(rows["layers"]):
        assert layer["counts"] == trace.counts_LE[index].tolist()
        assert len(layer["low"]) == len(layer["upper"]) == len(layer["verdict"]) == EXPERTS
        assert layer["interval"][0] <= layer["max_vio"] <= layer["interval"][1]
    layer, expert = NEVER
    assert rows["layers"][layer]["idle"][expert] == trace.tokens
    by_subject = np.array(rows["groups"]["subject"]["counts"])
    assert (by_subject.sum(0) == trace.counts_LE).all()


def test_groupings_too_large_for_the_page_are_named(
    trace: Trace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("equipoise.report.content.GROUP_CELLS", 4 * 4 * EXPERTS)
    content = gather(trace)
    assert list(content.groups) == ["category"]
    assert content.left_out == ["subject"]
    assert "Left out for size: subject" in render(content)


def test_every_element_that_the_script_asks_for_is_there(source: str, page: Page) -> None:
    asked = set(re.findall(r'byId\("([a-z-]+)"\)', page.text["script"][-1]))
    assert asked <= page.ids()


def test_tables_have_captions_and_scoped_headers(page: Page) -> None:
    tables = sum(tag == "table" for tag, _ in page.elements)
    assert tables == sum(tag == "caption" for tag, _ in page.elements) == 4
    assert all(attrs.get("scope") for tag, attrs in page.elements if tag == "th")


def test_accuracy_has_exact_intervals(trace: Trace) -> None:
    overall = gather(trace).accuracy[0]
    assert (overall["correct"], overall["questions"]) == (26, 40)
    assert overall["interval"] == pytest.approx([0.4832, 0.7937], abs=2e-4)  # Clopper-Pearson


def test_key_figures_stand_beside_their_floors(trace: Trace) -> None:
    keys = {key["label"]: key for key in key_figures(gather(trace))}
    assert keys["never selected"]["value"] == "1"
    assert keys["never selected"]["note"] == f"of {4 * EXPERTS} experts"
    assert keys["tokens counted"]["value"] == "2.00k"
    assert "by chance" in keys["largest MaxVio"]["note"]
    assert keys["speed"]["value"] == "3.12k"


def test_a_dense_trace_shows_accuracy_and_no_experts(dense: Trace) -> None:
    source = render(gather(dense))
    page = Page(source)
    order = [attrs["id"] for tag, attrs in page.elements if tag == "section"]
    assert order == ["verdict", "accuracy", "provenance", "definitions"]
    assert "50.0%" in source
    assert "dense" in " ".join(page.text["p"])


def test_an_empty_trace_says_so(empty: Trace) -> None:
    page = Page(render(gather(empty)))
    assert "No token" in " ".join(page.text["p"])
    assert page_data(gather(empty))["layers"][0]["max_vio"] is None


def test_a_partial_trace_carries_a_warning(trace: Trace) -> None:
    content = gather(trace)
    assert "Partial trace" not in render(content)
    content.meta["status"] = "partial"  # type: ignore[index]
    try:
        assert "Partial trace" in render(content)
    finally:
        content.meta["status"] = "complete"  # type: ignore[index]


def test_the_page_of_58_layers_and_256_experts_stays_small() -> None:
    ids = np.random.default_rng(0).integers(0, 32, (200, 2, 8)) * 8 + np.arange(8)
    two = gather(Trace.from_arrays(ids, num_experts=256, sequences=np.arange(200) // 10))
    content = replace(
        two,
        labels=[str(number) for number in range(58)],
        stats={**two.stats, "layers": [*two.layers] * 29},
        experts=two.experts * 29,
        verdicts=two.verdicts * 29,
    )
    source = render(content)
    assert len(source) < 2_000_000
    rows = json.loads(Page(source).text["script"][0])
    assert sum(len(layer["counts"]) for layer in rows["layers"]) == 14_848
