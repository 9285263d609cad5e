"""Pages hold all they need, escape what users named, and put the worst first."""

import json
import re
from html.parser import HTMLParser

import pytest

from regkit.report.figures import boxes, curves, figure, steps
from regkit.report.page import cohort_page, fragment, pair_page

VOID = {"meta", "link", "input", "img", "br"}


class Read(HTMLParser):
    """The page's elements; every one that opens must close."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.stack: list[str] = []
        self.feed(text)
        self.close()
        assert self.stack == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.stack.append(tag)

    def handle_endtag(self, tag):
        assert self.stack and self.stack.pop() == tag

    def handle_data(self, data):
        if self.stack and self.stack[-1] not in ("style", "script"):
            self.words.append(data)

    def all(self, tag: str, kind: str = "") -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.elements if name == tag and kind in ["", *(attrs.get("class") or "").split()]]

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def self_contained(text: str) -> Read:
    assert "http://" not in text and "https://" not in text and "@import" not in text
    page = Read(text)
    for tag, attrs in page.elements:
        for name in ("src", "href", "action", "data", "poster", "srcset"):
            assert (attrs.get(name) or "#").startswith(("#", "data:")), f"<{tag} {name}={attrs[name]}> leaves the page"
    assert all(address.startswith('"data:') for address in re.findall(r"url\(([^)]{0,12})", text))
    ids = [attrs["id"] for _, attrs in page.elements if "id" in attrs]
    assert len(ids) == len(set(ids))
    assert {a["href"] for a in page.all("a")} <= {f"#{i}" for i in ids}  # every section of the bar is there
    return page


def test_cohort_has_all_its_sections(evaluation, views):
    page = self_contained(cohort_page(evaluation, views))
    for words in ("14 pairs, 2 methods: 1 of 28 registrations failed.", "The worst case c2", "Mean rank", "Paired comparisons", "< 0.001",
                  "Dice by group and method", "Dice by label", "Landmarks", "Capture", "By group (2)", "TRE ≤ 5 mm", "50 %"):
        assert words in page.text, words
    assert len(page.all("svg", "chart")) == 6  # Dice, HD95, TRE; labels, landmarks, capture
    assert len(page.all("details", "case")) == 28
    assert len(page.all("div", "viewer")) == 27


def test_the_ten_worst_come_first_and_open(evaluation, views):
    page = Read(cohort_page(evaluation, views))
    cases = page.all("details", "case")
    assert ["open" in case for case in cases] == [True] * 10 + [False] * 18
    order = [(case["data-text"] or "").split()[0] for case in cases]
    assert order[:5] == ["c2", "c13", "c13", "c12", "c12"]


def test_a_failed_case_says_why_and_shows_where_it_started(evaluation, views):
    text = cohort_page(evaluation, views)
    first = text.split('id="case-1"')[1].split('id="case-2"')[0]
    assert "the scans do not overlap" in first and "failed" in first
    assert 'data-has="before"' in first and 'data-mode="moved" aria-pressed="false" disabled' in first
    assert "There are no pictures of this case." in text and 'data-has="outlines"' in text


HOSTILE = '"><script>alert(1)</script>\' onload=x & {{ 7*7 }} </style>'


def test_names_and_reasons_are_escaped(evaluation, views):
    for case in evaluation["cases"]:
        if case["id"] == "c2":
            case |= {"id": HOSTILE, "group": HOSTILE, "reason": HOSTILE, "why": HOSTILE}
    evaluation |= {"title": HOSTILE, "command": HOSTILE, "groups": [HOSTILE, "hands"], "methods": ["regkit", HOSTILE]}
    for row in evaluation["table"]:
        row["group"] = HOSTILE if row["group"] == "heads" else row["group"]
    for row in evaluation["labels"] + evaluation["points"]:
        row |= {"name": HOSTILE, "point": HOSTILE}
    views[f"regkit/{HOSTILE}"] = views["regkit/c2"]
    text = cohort_page(evaluation, views)
    page = self_contained(text)
    assert len(page.all("script")) == 1 and "onload" not in [name for _, attrs in page.elements for name in attrs]
    assert "49" not in page.text.split("Cases, the worst first")[1][:300]
    assert HOSTILE in "".join(page.words)
    plain = re.findall(r"<script", text)
    assert len(plain) == 1


def test_a_picture_that_is_none_does_not_reach_the_style_sheet(record, pictures):
    broken = json.loads(json.dumps(pictures["good"]))
    broken["planes"][0]["fixed"] = 'data:image/png;base64,AA");} body{display:none'
    assert "display:none}" not in pair_page(record, broken).split("<style>")[2].split("</style>")[0]


def test_empty_evaluations_are_told(evaluation):
    empty = {key: [] if isinstance(value, list) else None for key, value in evaluation.items()}
    page = self_contained(cohort_page(empty, {}))
    assert "No case was evaluated." in page.text
    self_contained(cohort_page({}, {}))


@pytest.mark.parametrize("field", ["table", "tests", "ranks", "success", "capture", "labels", "points"])
def test_any_list_may_be_empty_and_any_value_none(field, evaluation, views):
    hollow = [{key: value if key in ("id", "method", "group", "measure", "status", "name") else None for key, value in row.items()}
              for row in evaluation[field]]
    self_contained(cohort_page({**evaluation, field: []}, views))
    self_contained(cohort_page({**evaluation, field: hollow}, views))


def test_cases_of_nothing_but_names_are_told(evaluation):
    evaluation["cases"] = [{"id": "a", "group": None, "method": "regkit", "status": "ok", "dice": float("nan")}]
    assert "a" in self_contained(cohort_page(evaluation, {})).text


def test_fifty_cases_stay_small(evaluation, pictures):
    """Pictures that differ, as those of fifty pairs do; a view of a brain takes at most 200 kB."""
    def fresh(k: int) -> dict:
        shown = json.loads(json.dumps(pictures["good"]))
        for n, plane in enumerate(shown["planes"]):
            for kind in ("fixed", "before", "after"):
                # other text of the size that a textured plane of 320 pixels has
                plane[kind] = "data:image/webp;base64," + f"{k:04d}{n}{kind}".ljust(20_000, "A")
        return shown

    evaluation["cases"] = [{**evaluation["cases"][0], "id": f"pair{k}"} for k in range(50)]
    text = cohort_page(evaluation, {f"regkit/pair{k}": fresh(k) for k in range(50)})
    assert len(text) < 15e6


def test_a_picture_of_several_methods_is_stored_once(evaluation, views):
    text = cohort_page(evaluation, views)
    address = views["regkit/c0"]["planes"][0]["fixed"]
    assert text.count(address) == 1


def test_pair_page(record, pictures):
    page = self_contained(pair_page(record, pictures["good"], {"dice": 0.8, "dice_before": 0.3, "labels": [
        {"label": 1, "name": "cord", "dice_before": 0.3, "dice": 0.8, "hd95_mm": None}]}))
    for words in ("moving.nii.gz onto fixed.nii.gz", "PASS.", "97 %", "probably 3.20 mm apart (1.10 mm to 9.00 mm", "all agrees",
                  "Landmark error, mean of 3", "6.00 mm → after 0.00 mm", "a note",
                  "turns by 0.0° and keeps sizes", "cord"):
        assert words in page.text, words


def test_pair_page_says_what_the_verdict_is_and_why(record, pictures):
    record["verdict"] |= {"status": "FAIL", "probability": 0.03, "reasons": ["the scans overlap by 2 %"]}
    record["inputs"]["moving"]["findings"] = [{"severity": "doubtful", "what": "the axes are sheared"},
                                              {"severity": "note", "what": "hush"}]
    text = Read(pair_page(record, pictures["good"])).text
    for words in ("FAIL.", "3 %", "not to be trusted", "the scans overlap by 2 %", "moving: the axes are sheared"):
        assert words in text, words
    assert "hush" not in text and "mm apart" not in text
    record["verdict"]["status"] = "WARN"
    assert "WARN." in Read(pair_page(record, pictures["good"])).text
    del record["verdict"]
    assert "No verdict." in Read(pair_page(record, pictures["good"])).text


def test_a_bare_record_will_do(pictures):
    self_contained(pair_page({"matrix": [[0, -2.0, 0], [2, 0, 0], [0, 0, 1]]}, pictures["failed"]))
    assert "turns by 90.0° and scales by 2.000" in pair_page({"matrix": [[0, -2.0, 0], [2, 0, 0], [0, 0, 1]]}, pictures["failed"])


def test_fragment_needs_no_script(record, pictures):
    record["inputs"]["fixed"]["path"] = f"/scans/{HOSTILE}".replace("</", "<")
    text = fragment(record, pictures["good"])
    page = self_contained(text)
    assert not page.all("script") and not page.all("style")
    assert len(page.all("img")) == 6 and all((img["src"] or "").startswith("data:image/webp") for img in page.all("img"))
    assert "lncc" in page.text
    assert len(Read(fragment(record, pictures["failed"])).all("img")) == 3


def test_figures_as_people_write_them():
    assert [figure(v) for v in (None, float("nan"), "x", 0.8123, -0.5)] == ["–", "–", "–", "0.812", "−0.500"]
    assert [figure(v, "mm") for v in (3.14159, 31.4159, 314.159)] == ["3.14 mm", "31.4 mm", "314 mm"]


def test_charts_of_nothing_are_empty():
    rows = [{"name": "a", "tone": 0, "values": [None, float("nan")], "before": None, "after": None}]
    assert boxes(rows, title="t", unit="", better="high") == steps(rows, title="t", unit="") == ""
    assert curves([{"name": "a", "tone": 0, "points": []}], title="t", across="x") == ""


def test_a_far_value_does_not_squash_the_boxes():
    rows = [{"name": "a", "tone": 0, "values": [1.0, 1.2, 1.4, 1.1, 1000.0], "before": 3.0}]
    chart = str(boxes(rows, title="t", unit="mm", better="low"))
    assert 'class="beyond"' in chart and "1000" not in chart


def test_verdicts_are_told_and_can_be_filtered_by():
    evaluation = {"title": "t", "methods": ["a"], "cases": [
        {"id": name, "group": "g", "method": "a", "status": "ok", "verdict": verdict, "probability": 0.25}
        for name, verdict in (("w", "PASS"), ("x", "FAIL"), ("y", None), ("z", float("nan")), ("v", "PASS"))]}
    text = cohort_page(evaluation, {})
    assert "5 pairs by a: none failed. Verdicts: 2 PASS, 1 FAIL." in Read(text).text
    assert text.count("<dt>Verdict</dt>") == 3 and text.count('<span class="chip bad">FAIL</span>') == 1 and "nan" not in Read(text).text
    assert 'data-text="x g a ok fail"' in text


def test_a_case_tells_its_time_once():
    evaluation = {"title": "t", "methods": ["a"], "measures": {"seconds": {"name": "Time", "unit": "s", "better": "low"}},
                  "cases": [{"id": "x", "group": "g", "method": "a", "status": "ok", "seconds": 4.5}]}
    assert cohort_page(evaluation, {}).count("<dt>Time</dt>") == 1
    assert cohort_page({**evaluation, "measures": {}}, {}).count("<dt>Time</dt>") == 1
