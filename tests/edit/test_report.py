"""The report page: its figures are those of the events, foreign text stays text, and it is one valid file by itself."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml

from sphere_edit import files
from sphere_edit.cli.terminal import learned_table
from sphere_edit.config import EditConfig
from sphere_edit.report.correlations import correlations
from sphere_edit.report.page import write_report
from sphere_edit.runs import run_folder

HOSTILE = [
    "<script>alert(1)</script>",
    "\"'><img src=x onerror=alert(1)>",
    "</style></svg></table><!-- ]]>",
    "costs $x_1$ and $\\frac{1}{0}$ {{ 7 * 7 }} {% raw %}",
    "W" * 300,
    "אמת \u202eabc\u202c العربية",
    "👩‍👩‍👧 Zürich 東京",
    "bell \x07 null \x00 return \r c1 \x85 del \x7f",
    "lone \ud83d surrogate \udc00, non-characters \ufffe \U0010ffff",
    "line\nbreak\n\nand &amp; &#60;b>",
]
VOID = {"meta", "br", "hr", "img", "link", "input"}
NAMES = [f"{m}_{k}" for m in ("efficacy", "generalization", "specificity") for k in ("success", "accuracy")]


def events_of(layers: list[int], sizes: list[int], n: int = 24, sphere: bool = True, true: bool = True) -> list[dict]:
    """Events as `experiments.run` writes them, with figures that are all different."""
    events: list[dict[str, Any]] = []

    def look(when: str, shift: float) -> None:
        scores = {
            name: {"mean": None, "stderr": None, "n": 0}
            if not true and (name.endswith("success") or name.startswith("specificity"))
            else {"mean": 0.111 * (i + 1) + shift, "stderr": 0.0123 * (i + 1), "n": sum(sizes) - i % 2}
            for i, name in enumerate(NAMES)
        }
        events.append({"event": "evaluation", "when": when, "scores": scores, "perplexity": 27.615 + 10 * shift})
        for layer in layers:
            values = [math.exp(-0.1 * i) * (1 + 0.01 * layer) for i in range(n)]
            values = [v / sum(values) for v in values]
            events.append(
                {
                    "event": "spectrum",
                    "when": when,
                    "layer": layer,
                    "rank": 5 + layer % 3,
                    "energy_ratio": 0.51,
                    "eigenvalues": values,
                }
            )

    look("before", 0.0)
    events.append({"event": "prepared", "contexts": ["{}", HOSTILE[0]], "null_space_rank": {}, "seconds": 3.25})
    excess = {layer: 80.0 + 3.37 * layer for layer in layers}
    orthogonal = 234193.765
    for layer in layers:
        events.append(
            {
                "event": "energy",
                "batch": 0,
                "edits": 0,
                "layer": layer,
                "energy": orthogonal + excess[layer],
                "excess": excess[layer],
            }
        )
    done = 0
    for number, size in enumerate(sizes, 1):
        done += size
        for layer in layers:
            excess[layer] += 1.43 * (layer - 5.2) / number
            event = {
                "event": "energy",
                "batch": number,
                "edits": done,
                "layer": layer,
                "energy": orthogonal + excess[layer],
                "excess": excess[layer],
                "update_norm": 0.5 + 0.11 * layer + 0.01 * number,
                "suppressed": 0.0,
                "residual": 1.5 - 0.1 * layer,
                "weight_norm": 40.0 + layer,
            }
            if sphere:
                event |= {"rank": 7, "energy_ratio": 0.5, "suppressed": 0.2 + 0.013 * layer + 0.01 * number}
            events.append(event)
        events.append(
            {
                "event": "batch",
                "batch": number,
                "edits": done,
                "size": size,
                "loss": 0.04,
                "nll": 0.01,
                "steps": 21.5,
                "seconds": {"values": 2.5 + number, "keys": 0.25, "solve": 0.125, "energy": 0.5},
            }
        )
    look("after", 0.3)
    return events


def make_run(
    path: Path,
    texts: list[str] | None = None,
    sphere: bool = True,
    true: bool = True,
    edits: int = 12,
    layers: tuple[int, ...] = (4, 5, 6, 7, 8),
) -> Path:
    """A small run folder; ``texts`` are used wherever a model, a data file or a person can put text."""
    path.mkdir(parents=True)
    sizes = [4] * (edits // 4)
    said = texts or ["plain text"]
    config = EditConfig(layers=layers, batch_size=4, sphere=sphere)
    run_folder.write_config(
        path,
        {
            "model": said[0],
            "data": said[-1],
            "edits": edits,
            "perplexity_text": "heldout",
            "perplexity_tokens": 3000,
            "settings": config.to_dict(),
            "environment": {"torch": "2.13.0", "machine": said[1 % len(said)]},
        },
    )
    requests, events = [], events_of(list(layers), sizes, sphere=sphere, true=true)
    for i in range(edits):
        text = said[i % len(said)]
        requests.append(
            {
                "prompt": "The capital of {} is" + f" {text}" * bool(texts),
                "subject": f"Land {i}",
                "target_new": f"City {i}" if texts is None else text,
                "target_true": "Old" if true else None,
                "paraphrases": [text],
                "neighborhood": [],
                "relation": text,
                "id": text,
            }
        )
        before = {"efficacy_accuracy": 0.0} | ({"efficacy_success": float(i % 3 == 0)} if true else {})
        after = {"efficacy_accuracy": float(i % 4 != 0)} | ({"efficacy_success": 1.0} if true else {})
        events.append({"event": "request", "id": text, "before": before, "after": after})
    for i, text in enumerate(said):
        kind = ("edited", "paraphrase", "neighbor", "neutral")[i % 4]
        events.append({"event": "sample", "kind": kind, "prompt": text, "before": text, "after": f" {text}"})
    events.append({"event": "finished", "seconds": 100.5})
    for name, records in ((run_folder.REQUESTS, requests), (run_folder.METRICS, events)):
        (path / name).write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


class Page(HTMLParser):
    """Tables as lists of rows, all text, attributes and ids; complains about tags that do not nest."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: Counter[str] = Counter()
        self.attributes: list[tuple[str, str, str]] = []
        self.tables: dict[str, list[list[str]]] = {}
        self.texts: list[str] = []
        self.tiles: list[str] = []
        self.table = ""
        self.feed(html)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self.table = dict(attrs)["id"] or ""
            self.tables[self.table] = []
        elif tag == "tr":
            self.tables[self.table].append([])
        elif tag in ("td", "th"):
            self.tables[self.table][-1].append("")
        elif tag == "div" and ("class", "tile") in attrs:
            self.tiles.append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        self.texts.append(data)
        if {"td", "th"} & set(self.open):
            self.tables[self.table][-1][-1] += data
        elif "dl" in self.open and self.tiles:
            self.tiles[-1] += data

    def body(self, table: str) -> list[list[str]]:
        return [[" ".join(cell.split()) for cell in row] for row in self.tables[table][1:]]


def load(run: Path) -> tuple[str, Page]:
    html = write_report(run).read_text(encoding="utf-8")
    return html, Page(html)


def number(text: str) -> float:
    return float(text.replace("\u202f", "").replace(" ", "").replace("−", "-").removesuffix("%"))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("report") / "run")


@pytest.fixture(scope="module")
def page(run: Path) -> Page:
    return load(run)[1]


def test_tables_hold_the_figures_of_the_events(run: Path, page: Page) -> None:
    events = run_folder.read_events(run)
    before, after = (e for e in events if e["event"] == "evaluation")
    *rows, perplexity = page.body("scores")
    assert len(rows) == len(NAMES)
    for name, row in zip(NAMES, rows, strict=True):
        assert row[0] == name.replace("_", " ")
        for cell, of in ((row[1], before), (row[2], after)):
            mean, error = cell.split("±")
            assert number(mean) == pytest.approx(100 * of["scores"][name]["mean"], abs=0.051)
            assert number(error) == pytest.approx(100 * of["scores"][name]["stderr"], abs=0.051)
        assert int(row[3]) == before["scores"][name]["n"]
    assert [number(v) for v in perplexity[1:3]] == pytest.approx([27.615, 30.615], abs=0.0051)
    for row in page.body("energies"):
        first, *_, last = [e for e in events if e["event"] == "energy" and str(e["layer"]) == row[0]]
        wanted = [first["energy"], last["energy"], last["energy"] - first["energy"], first["excess"], last["excess"]]
        assert [number(v) for v in row[1:]] == pytest.approx(wanted, abs=0.0051, rel=0)
    for row in page.body("directions"):
        of = [e for e in events if e["event"] == "energy" and str(e["layer"]) == row[0]][1:]
        rank = 5 + int(row[0]) % 3
        means = [sum(e[name] for e in of) / len(of) for name in ("suppressed", "update_norm", "residual")]
        wanted = [rank, rank, 24, 100 * means[0], *means[1:]]
        assert [number(v) for v in row[1:]] == pytest.approx(wanted, abs=0.051)
    assert len(page.body("energies")) == len(page.body("directions")) == 5
    stages = {row[0]: number(row[1]) for row in page.body("stages")}
    batches = [e["seconds"] for e in events if e["event"] == "batch"]
    assert stages["optimise values"] == pytest.approx(sum(b["values"] for b in batches), abs=0.051)
    assert stages["together"] == pytest.approx(100.5, abs=0.051)


def test_tiles_hold_the_key_figures(run: Path, page: Page) -> None:
    before, after = (e for e in run_folder.read_events(run) if e["event"] == "evaluation")
    energies = [e for e in run_folder.read_events(run) if e["event"] == "energy"]
    tiles = [" ".join(tile.split()) for tile in page.tiles]
    assert len(tiles) == len(NAMES) + 2
    for name, tile in zip(NAMES, tiles, strict=False):
        was, now = (f"{100 * of['scores'][name]['mean']:.1f} %" for of in (before, after))
        assert f"{was} → {now}" in tile
    assert "27.61 → 30.61" in tiles[-2] or "27.62 → 30.62" in tiles[-2]
    was, now = sum(e["excess"] for e in energies[:5]), sum(e["excess"] for e in energies[-5:])
    assert f"{was:.1f} → {now:.1f}" in tiles[-1]


def _with_learned(run: Path, figures: list[dict[str, Any]]) -> Path:
    """The run with more said of its batches."""
    events, left = run_folder.read_events(run), iter(figures)
    for event in events:
        if event["event"] == "batch":
            event |= next(left)
    (run / run_folder.METRICS).write_text("".join(json.dumps(event) + "\n" for event in events), encoding="utf-8")
    return run


def test_what_was_learned_and_reached_is_shown(tmp_path: Path) -> None:
    figures: list[dict[str, Any]] = [
        {"learned": 4, "unlearned": [], "reached": 0.9},
        {"learned": 2, "unlearned": ["3", "<b>7</b>"], "reached": 0.4},
        {"learned": 4, "unlearned": [], "reached": None},
    ]
    run = _with_learned(make_run(tmp_path / "run"), figures)
    html, page = load(run)
    text = " ".join("".join(page.texts).split())
    assert "10 of 12 facts learned" in text and "Not learned: 3, <b>7</b>." in text
    assert "Reached: 0.650 of the wanted changes, 0.400 in the batch that reached least" in text
    assert html.count('<p class="warning">') == 1 and "batch 2: reached 0.40 of the wanted change" in text
    table = learned_table(run_folder.read_events(run))
    assert table is not None and "10 of 12" in str(table.title)
    shown = [list(column.cells) for column in table.columns]
    assert shown[1:3] == [["4 of 4", "2 of 4", "4 of 4"], ["0.90", "0.40", "-"]] and shown[3][1] == "3, <b>7</b>"


def test_a_closed_loop_is_not_blamed_for_what_it_reached(tmp_path: Path) -> None:
    figures = [{"learned": 4, "unlearned": [], "reached": 0.4, "rounds": 3} for _ in range(3)]
    html, page = load(_with_learned(make_run(tmp_path / "run"), figures))
    text = " ".join("".join(page.texts).split())
    assert "12 of 12 facts learned" in text and "Not learned" not in text and 'class="warning"' not in html
    assert "Reached: 0.400" in text and "The rounds ask for more" in text


def test_runs_that_do_not_say_what_was_learned(run: Path, page: Page) -> None:
    assert "facts learned" not in "".join(page.texts)
    assert learned_table(run_folder.read_events(run)) is None


def test_requests_show_hit_or_miss(page: Page) -> None:
    rows = page.body("requests")
    assert len(rows) == 12
    for i, row in enumerate(rows):
        verdicts = ["hit" if i % 3 == 0 else "miss", "hit", "miss", "hit" if i % 4 else "miss"]
        assert row == [f"The capital of Land {i} is", f"City {i}", "Old", *verdicts]


def test_only_the_first_fifty_requests(tmp_path: Path) -> None:
    _, page = load(make_run(tmp_path / "run", edits=60))
    assert len(page.body("requests")) == 50
    assert any("The first 50 of 60." in text for text in page.texts)


def test_self_contained_and_valid(run: Path) -> None:
    html, page = load(run)
    assert "script" not in page.tags and "link" not in page.tags and "img" not in page.tags
    for tag, name, value in page.attributes:
        assert not name.startswith("on")
        if name.split(":")[-1] in ("src", "href", "action", "data", "srcset"):
            assert value.startswith("#"), (tag, name, value)
    assert not re.search(r"@import|url\((?!#)", html)
    ids = [value for _, name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    used = {value[1:] for _, name, value in page.attributes if name == "xlink:href"} | set(
        re.findall(r"url\(#([^)]+)\)", html)
    )
    assert used <= set(ids)
    labels = [value for tag, name, value in page.attributes if tag == "svg" and name == "aria-label"]
    assert page.tags["svg"] == len(labels) == 5 and all(len(label) > 30 for label in labels)
    assert "#0101" not in html
    assert "sc-" not in html and "<metadata" not in html


def test_hostile_text_stays_text(tmp_path: Path, page: Page) -> None:
    html, hostile = load(make_run(tmp_path / "run", HOSTILE))
    extra = hostile.tags - page.tags
    assert set(extra) <= {"p", "dl", "dt", "dd", "div"}, "text became tags"
    text = "".join(hostile.texts)
    for wanted in HOSTILE[:7]:
        assert wanted in text
    assert "bell ␇ null ␀ return ␍ c1 \ufffd del ␡" in text
    assert "lone \ufffd surrogate \ufffd, non-characters \ufffd \ufffd" in text
    assert "line⏎ break⏎ ⏎ and &amp; &#60;b>" in text
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]", html)
    long = "q" * 5000
    html, _ = load(make_run(tmp_path / "long", [long]))
    assert long not in html and "q" * 600 + "…" in html


@pytest.mark.parametrize(("sphere", "true"), [(False, True), (True, False), (False, False)])
def test_missing_fields_are_dashes(tmp_path: Path, sphere: bool, true: bool) -> None:
    html, page = load(make_run(tmp_path / "run", sphere=sphere, true=true))
    assert ("without SPHERE" in html) is not sphere
    assert page.tags["svg"] == (5 if sphere else 4)
    for row in page.body("directions"):
        assert (row[4] == "–") is not sphere
    scored = ("efficacy accuracy", "generalization accuracy")
    for row in page.body("scores")[:-1]:
        assert (row[1] == row[2] == "–") is (not true and row[0] not in scored)
    assert all((row[2:5] == ["–"] * 3) is not true for row in page.body("requests"))
    assert "None" not in html and "nan" not in "".join(page.texts)


def test_every_event_may_be_missing(tmp_path: Path) -> None:
    """Any first part of a log makes a page: interrupted runs are looked at too."""
    run = make_run(tmp_path / "run", edits=4, layers=(4, 5))
    lines = (run / run_folder.METRICS).read_text().splitlines(keepends=True)
    for count in range(1, len(lines), 4):
        (run / run_folder.METRICS).write_text("".join(lines[:count]))
        assert "has not finished" in load(run)[0]


def test_odd_figures(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", edits=4, layers=(4,))
    events = run_folder.read_events(run)
    for event in events:
        if event["event"] == "evaluation" and event["when"] == "after":
            event["perplexity"] = math.inf
            event["scores"]["efficacy_success"] = {"mean": 1.0, "stderr": None, "n": 1}
        if event["event"] == "energy" and event["batch"]:
            event["weight_norm"] = 0.0
        if event["event"] == "spectrum":
            event["eigenvalues"] = [0.9, 0.1] + [0.0] * 6
            event["rank"] = 3
    (run / run_folder.METRICS).write_text("".join(json.dumps(event) + "\n" for event in events))
    _, page = load(run)
    assert page.body("scores")[0][2] == "100.0 %"
    assert page.body("scores")[-1][2] == "inf"


def measure(run: Path, covariance: bool = True, bound: bool = True) -> list[dict]:
    """Add to a run what newer ones say of weights, cosines and scores on the way."""
    events: list[dict[str, Any]] = []
    for i, event in enumerate(run_folder.read_events(run)):
        events.append(event)
        if event["event"] == "energy":
            event |= {"neurons": 10, "moved_mean": 0.01 * i, "moved_max": 0.02 * i, "weight_rank": 24 - event["batch"]}
            event |= {"spectral_norm": 3.0 + 0.1 * i, "condition": None if event["batch"] == 3 else 7.5 + i}
            if event["batch"]:
                event |= {"step_squared": 0.5 + 0.1 * i} | ({"output_change": 0.02 + 0.001 * i} if covariance else {})
                extra = {"energy_step": 1.5 - 0.1 * i, "lipschitz": 300.0 + i, "bound": 1e-4 / (i + 1)}
                event |= extra if bound else {}
        elif event["event"] == "spectrum":
            size = 0.01 if event["when"] == "before" else 0.02
            cosines = [[round(size * (b - a) * (-1) ** b, 4) for b in range(a + 1, 6)] for a in range(6)]
            rest = {"neurons": list(range(6)), "cosines": cosines, "mean_abs": 0.02 + 0.0011 * i}
            events.append({"event": "cosines", "when": event["when"], "layer": event["layer"], **rest})
        elif event["event"] == "batch":
            number = event["batch"]
            means = [0.9 - 0.1 * k - 0.05 * number * (k + 1) - 0.3 * (k == 1 == number) for k in range(5)]
            scores = {name: {"mean": m, "stderr": 0.1, "n": 3} for name, m in zip(NAMES, means, strict=False)}
            parts = {"scores": scores, "first": {NAMES[0]: scores[NAMES[0]]}, "last": {}}
            edits = {"batch": number, "edits": event["edits"]}
            events.append({"event": "curve", **edits, **parts, "perplexity": 20.0 + number})
    (run / run_folder.METRICS).write_text("".join(json.dumps(event) + "\n" for event in events))
    return events


def test_what_is_measured_is_shown(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", edits=16, layers=(4, 6))
    events = measure(run)
    html, page = load(run)
    assert page.tags["svg"] == 12 and "None" not in html and "nan" not in "".join(page.texts)
    labels = [value for tag, name, value in page.attributes if tag == "svg" and name == "aria-label"]
    for said in ("Scores over edits; at the end: efficacy success 70", "Efficacy over edits; at the end: first, succe"):
        assert any(label.startswith(said) for label in labels)
    assert any("perplexity 24" in label for label in labels)
    for tag, name, value in page.attributes:
        assert name.split(":")[-1] not in ("src", "href") or value.startswith("#"), (tag, value)
    ids = [value for _, name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids)) and "$" not in html.split("<svg", 1)[1].split("</svg>")[0]
    weights, bounds = page.body("weights"), page.body("bounds")
    assert [row[0] for row in weights] == [row[0] for row in bounds] == ["4", "6"]
    for row, bounded in zip(weights, bounds, strict=True):
        first, *batches = [e for e in events if e["event"] == "energy" and str(e["layer"]) == row[0]]
        last, cosines = batches[-1], [e for e in events if e["event"] == "cosines" and str(e["layer"]) == row[0]]
        wanted = [last["moved_mean"], last["moved_max"], 20, first["spectral_norm"], last["spectral_norm"]]
        wanted += [first["condition"], last["condition"], *(e["mean_abs"] for e in cosines)]
        assert [number(v) for v in row[1:]] == pytest.approx(wanted, abs=0.0051)
        means = [
            sum(abs(e[name]) for e in batches) / len(batches)
            for name in ("energy_step", "lipschitz", "bound", "step_squared")
        ]
        wanted = [*means, min(e["step_squared"] / e["bound"] for e in batches), means[3] / 10]
        wanted.append(sum(e["output_change"] for e in batches) / len(batches))
        assert [number(v.removesuffix("×")) for v in bounded[1:]] == pytest.approx(wanted, rel=6e-3)
    rows = page.body("correlations")
    assert 0 < number(rows[1][2]) < 1
    assert [row[0] for row in rows] == [name.replace("_", " ") for name in NAMES]
    for row, found in zip(rows[:5], correlations(events), strict=False):
        assert [number(v) for v in row[1:3]] == pytest.approx([found["rho"], found["p"]], abs=5e-3)
        assert row[-1] == str(found["n"])
    assert rows[-1] == ["specificity accuracy", *["–"] * 4, "0"]
    assert any("A dash: fewer than 4 points." in " ".join(text.split()) for text in page.texts)


def test_cosine_map_has_before_below_and_after_above(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", edits=4, layers=(4,))
    measure(run)
    (drawn,) = re.findall(r'<svg role="img" aria-label="Cosines of 6 neurons of layer 4.*?</svg>', load(run)[0], re.S)
    found = {}
    for colour, opacity, path in re.findall(r'fill="var\(--s(\d)\)" fill-opacity="([\d.]+)" d="([^"]+)"', drawn):
        for x, y in re.findall(r"M(\d+) (\d+)h1v1h-1z", path):
            found[int(x), int(y)] = float(opacity) if colour == "1" else -float(opacity)
    largest, wanted = 0.02 * 5, {}
    for a in range(6):
        for b in range(a + 1, 6):
            wanted[a, b] = round(0.01 * (b - a) * (-1) ** b / largest, 1)
            wanted[b, a] = round(0.02 * (b - a) * (-1) ** b / largest, 1)
    assert found == pytest.approx(wanted)


def test_what_is_not_measured_is_left_out(tmp_path: Path, page: Page) -> None:
    assert not {"weights", "bounds", "correlations"} & set(page.tables)
    run = make_run(tmp_path / "run", edits=4, layers=(4,))
    measure(run, covariance=False)
    ((_, *_, change),) = load(run)[1].body("bounds")
    assert change == "–" and any("this method has not" in text for text in load(run)[1].texts)
    other = make_run(tmp_path / "other", edits=4, layers=(4,))
    events = measure(other, bound=False)
    for event in events:
        if event["event"] == "curve":
            event |= {"perplexity": 20.0, "first": {}, "last": {}}
    (other / run_folder.METRICS).write_text("".join(json.dumps(e) + "\n" for e in events if e["event"] != "cosines"))
    _, found = load(other)
    assert "weights" in found.tables and "bounds" not in found.tables and found.tags["svg"] == 5 + 3
    assert all(row[1:] == ["–"] * 4 + [row[-1]] for row in found.body("correlations"))
    lines = (run / run_folder.METRICS).read_text().splitlines(keepends=True)
    for count in range(1, len(lines), 9):
        (run / run_folder.METRICS).write_text("".join(lines[:count]))
        assert "has not finished" in load(run)[0]


def test_requests_that_were_not_drawn_are_left_out(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", edits=60)
    config = yaml.safe_load((run / run_folder.CONFIG).read_text())
    (run / run_folder.CONFIG).write_text(yaml.safe_dump({**config, "score_sample": 4}))
    wanted = [json.loads(line) for line in (run / run_folder.REQUESTS).read_text().splitlines()]
    for i, request in enumerate(wanted):
        request["id"] = f"id {i}"
    (run / run_folder.REQUESTS).write_text("".join(json.dumps(request) + "\n" for request in wanted))
    events = [e for e in run_folder.read_events(run) if e["event"] != "request"]
    drawn = {3: 1.0, 17: 0.0, 55: 1.0, 59: 0.0}
    for i, hit in drawn.items():
        scores = {"efficacy_success": hit, "efficacy_accuracy": 1 - hit}
        events.append({"event": "request", "id": f"id {i}", "before": {}, "after": scores})
    (run / run_folder.METRICS).write_text("".join(json.dumps(event) + "\n" for event in events))
    rows = load(run)[1].body("requests")
    assert [row[0] for row in rows] == [f"The capital of Land {i} is" for i in drawn]
    assert [row[4] for row in rows] == ["hit" if hit else "miss" for hit in drawn.values()]


def test_same_folder_same_bytes(tmp_path: Path, run: Path) -> None:
    assert write_report(run) == run / run_folder.REPORT
    first = (run / run_folder.REPORT).read_bytes()
    (run / run_folder.REPORT).unlink()
    write_report(run)
    assert (run / run_folder.REPORT).read_bytes() == first
    assert not re.search(rb"20\d\d-\d\d-\d\d", first)


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_an_interrupted_write_leaves_the_old_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    run = make_run(tmp_path / "run", edits=4, layers=(4,))
    (run / run_folder.REPORT).write_text("old page")
    names = sorted(p.name for p in run.iterdir())

    def fail(*args: object) -> None:
        raise error("now")

    monkeypatch.setattr(files.os, "replace", fail)
    with pytest.raises(error):
        write_report(run)
    assert (run / run_folder.REPORT).read_text() == "old page"
    assert sorted(p.name for p in run.iterdir()) == names


def test_errors_name_the_folder_and_leave_it(tmp_path: Path) -> None:
    with pytest.raises(run_folder.RunError, match="not a run folder"):
        write_report(tmp_path)
    run = make_run(tmp_path / "run", edits=4, layers=(4,))
    (run / run_folder.METRICS).write_text("")
    with pytest.raises(run_folder.RunError, match="no events"):
        write_report(run)
    (run / run_folder.METRICS).unlink()
    with pytest.raises(run_folder.RunError, match="no readable metrics.jsonl"):
        write_report(run)
    (run / run_folder.METRICS).write_text('{"event": "energy"\n')
    with pytest.raises(run_folder.RunError, match="line 1"):
        write_report(run)
    (run / run_folder.CONFIG).write_text(yaml.safe_dump({"format": 99}))
    with pytest.raises(run_folder.RunError, match="another version"):
        write_report(run)
    assert not (run / run_folder.REPORT).exists()
