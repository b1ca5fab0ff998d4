"""EasyEdit, KnowEdit and LRE records, tables, objects of Python, and what is said about a source."""

from __future__ import annotations

import gzip
import json
import math
from pathlib import Path
from typing import Any

import pytest

from sphere_edit.data import DataError, load, load_requests
from sphere_edit.data.requests import EditRequest

PLAIN = {"prompt": "{} is in", "subject": "Rome", "target_new": "Japan"}
EASYEDIT = {
    "case_id": 7,
    "prompt": "The capital of Vanuatu is",
    "subject": "Vanuatu",
    "target_new": "Rome",
    "ground_truth": "Port Vila",
    "rephrase_prompt": "Vanuatu's seat of government is",
    "locality": {"neighborhood": {"prompt": "The capital of Fiji is", "ground_truth": "Suva"}},
}
READ = EditRequest(
    id="7",
    prompt="The capital of {} is",
    subject="Vanuatu",
    target_new="Rome",
    target_true="Port Vila",
    paraphrases=("Vanuatu's seat of government is",),
    neighborhood=("The capital of Fiji is",),
    neighborhood_answers=("Suva",),
)
LRE = {
    "name": "city in country",
    "prompt_templates": ["{} is part of the country of", "{} is in"],
    "prompt_templates_zs": ["Where is {}?"],
    "samples": [{"subject": "Lyon", "object": "France"}, {"subject": "Osaka", "object": "Japan"}],
}


def write(path: Path, text: str) -> Path:
    data = text.encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def one(tmp_path: Path, record: dict[str, Any]) -> EditRequest:
    (request,) = load_requests(write(tmp_path / "edits.json", json.dumps([record])), on_note=lambda text: None)
    return request


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"ground_truth": ["Port Vila", "Vila"]},
        {"ground_truth": [["Port Vila"]]},
        {"rephrase_prompt": ["Vanuatu's seat of government is"]},
        {"prompt": "The capital of {} is"},
        {"case_id": None, "id": "7"},
        {
            "locality": {
                "Relation_Specificity": [{"prompt": "The capital of Fiji is", "ground_truth": [["Suva", "S."]]}]
            }
        },
        {"locality": {"neighborhood": {"prompt": ["The capital of Fiji is"], "ground_truth": ["Suva"]}}},
        {"locality": {"neighborhood": {"prompt": ["The capital of Fiji is"], "ground_truth": "Suva"}}},
        {"locality": None, "locality_prompt": "The capital of Fiji is", "locality_ground_truth": "Suva"},
    ],
)
def test_easyedit_in_each_of_its_shapes(tmp_path: Path, changes: dict[str, Any]) -> None:
    assert one(tmp_path, {**EASYEDIT, **changes}) == READ


def test_local_prompts_without_an_answer_are_no_neighbours(tmp_path: Path) -> None:
    specific = [
        {"prompt": "The continent of Vanuatu is", "ground_truth": [["Oceania"]]},
        {"prompt": "The river of Vanuatu is", "ground_truth": [[""]]},
        {"prompt": "The king of Vanuatu is", "ground_truth": []},
        {"prompt": "", "ground_truth": "nobody"},
    ]
    several = {"prompt": ["Fiji lies in", "Samoa lies in"], "ground_truth": [[], ["Polynesia"]]}
    request = one(tmp_path, {**EASYEDIT, "locality": {"Relation_Specificity": specific, "distracting": several}})
    assert request.neighborhood == ("The continent of Vanuatu is", "Samoa lies in")
    assert request.neighborhood_answers == ("Oceania", "Polynesia")


def test_easyedit_says_what_it_does_not_read(tmp_path: Path) -> None:
    said: list[str] = []
    hop = {"portability": {"Reasoning": [{"prompt": "Through it flows the", "ground_truth": [["Tiber"]]}]}}
    path = write(tmp_path / "edits.json", json.dumps([{**EASYEDIT, "case_id": 1}, {**EASYEDIT, **hop, "pid": "P36"}]))
    assert [request.id for request in load_requests(path, on_note=said.append)] == ["1", "7"]
    assert said == [f"{path}: fields not read: pid"]
    assert load(path).schema == "EasyEdit"


def test_a_flat_record_without_a_true_target_stays_wikibigedit(tmp_path: Path) -> None:
    flat = {name: value for name, value in EASYEDIT.items() if name not in ("ground_truth", "locality", "case_id")}
    path = write(tmp_path / "edits.json", json.dumps([flat]))
    assert load(path).schema == "WikiBigEdit"
    assert load_requests(path)[0].target_true is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ground_truth": 3}, r"record 0: field 'ground_truth' must be text, got int 3"),
        ({"ground_truth": [["a", 3]]}, r"record 0: field 'ground_truth\[0\]\[1\]' must be text, got int 3"),
        ({"ground_truth": "Rome "}, r"1 of 1 records are no edits; .*record 0: 'ground_truth' and 'target_new'"),
        ({"subject": "Fiji"}, r"1 of 1 records are no edits; .*'Fiji', which is not in"),
        ({"locality": {"n": "x"}}, r"record 0: field 'locality.n' must be an object, got str 'x'"),
        ({"locality": {"n": [{"prompt": 5}]}}, r"record 0: field 'locality.n\[0\].prompt' must be text, got int 5"),
        ({"locality": {"n": {"prompt": ["a", "b"], "ground_truth": ["c"]}}}, r"record 0: .*of one length, got 2 and 1"),
        ({"case_id": 1.5}, r"record 0: field 'case_id' must be text or an integer"),
    ],
)
def test_bad_easyedit_records(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        one(tmp_path, {**EASYEDIT, **changes})


@pytest.mark.parametrize("name", ["edits.json", "edits.json.gz"])
def test_a_file_that_is_one_object(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    assert load_requests(write(path, json.dumps(EASYEDIT, indent=2))) == [READ]
    assert load_requests(write(path, "\ufeff\n" + json.dumps(EASYEDIT, indent=2) + "\n\n")) == [READ]
    expected = (
        r"edits\.json.*, one JSON object: no schema fits; .*a list of records or one object a line.*'meta', 'rows'"
    )
    with pytest.raises(DataError, match=expected):
        load_requests(write(path, json.dumps({"meta": 1, "rows": [PLAIN]}, indent=2)))
    broken = json.dumps(EASYEDIT, indent=2).replace('"Vanuatu",', '"Vanuatu"')
    with pytest.raises(DataError, match=r"line 5: invalid JSON \(Expecting ',' delimiter"):
        load_requests(write(path, broken))
    with pytest.raises(DataError, match=r"line 1: invalid JSON"):
        load_requests(write(path, '{"prompt": "x"\n'))


@pytest.mark.parametrize("indent", [None, 1])
def test_lre_relations_hold_facts_as_they_are(tmp_path: Path, indent: int | None) -> None:
    said: list[str] = []
    path = write(tmp_path / "relation.json", json.dumps(LRE, indent=indent))
    assert load_requests(path, on_note=said.append) == [
        EditRequest(
            id=str(i),
            prompt="{} is part of the country of",
            subject=subject,
            target_new=target,
            paraphrases=(f"{subject} is in",),
            relation="city in country",
        )
        for i, (subject, target) in enumerate([("Lyon", "France"), ("Osaka", "Japan")])
    ]
    assert said == [f"{path}: fields not read: prompt_templates_zs"]
    both = write(tmp_path / "relations.jsonl", f"{json.dumps(LRE)}\n{json.dumps(LRE)}\n")
    assert [request.id for request in load(both).requests] == ["0", "1", "2", "3"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"samples": []}, "'samples' is empty"),
        ({"prompt_templates": []}, "'prompt_templates' is empty"),
        ({"prompt_templates": ["{} is in", "It is in"]}, r"one \{\} each, got 'It is in'"),
        ({"samples": [{"subject": "Lyon"}]}, r"field 'samples\[0\].object' is missing"),
        ({"samples": [{"subject": " ", "object": "France"}]}, "sample 0: .*subject is empty"),
    ],
)
def test_bad_lre_relations(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=f"one JSON object.*{message}"):
        load_requests(write(tmp_path / "relation.json", json.dumps({**LRE, **changes}, indent=1)))


@pytest.mark.parametrize("name", ["edits.csv", "edits.csv.gz", "edits.tsv", "edits.TSV.gz"])
def test_tables_of_the_plain_schema(tmp_path: Path, name: str) -> None:
    text = "\ufeffid,prompt,subject,target_new,paraphrases,neighborhood,relation\r\n"
    text += 'a,"{} is, now, in",Rome,Japan,Where is Rome? In,"[""Milan is in"", ""[Pisa] is in""]",city\r\n'
    text += '\r\n"b","{}\nis ""in""",Pisa,China,,\r\n'
    text = text if ".csv" in name else text.replace(",", "\t").replace("is\t now\t in", "is, now, in")
    text = text.replace('in""\t ""', 'in"", ""')
    assert load_requests(write(tmp_path / name, text)) == [
        EditRequest(
            id="a",
            prompt="{} is, now, in",
            subject="Rome",
            target_new="Japan",
            paraphrases=("Where is Rome? In",),
            neighborhood=("Milan is in", "[Pisa] is in"),
            relation="city",
        ),
        EditRequest(id="b", prompt='{}\nis "in"', subject="Pisa", target_new="China"),
    ]


def test_tables_of_easyedit(tmp_path: Path) -> None:
    head = "case_id,prompt,subject,target_new,ground_truth,rephrase_prompt,locality"
    row = '7,The capital of Vanuatu is,Vanuatu,Rome,{},Vanuatu\'s seat of government is,"{}"'
    local = json.dumps(EASYEDIT["locality"]).replace('"', '""')
    for truth in ("Port Vila", '"[""Port Vila"", ""Vila""]"'):
        path = write(tmp_path / "edits.csv", f"{head}\n{row.format(truth, local)}\n")
        assert load(path).requests == [READ] and load(path).schema == "EasyEdit"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"the table has no rows"),
        ("prompt,subject,target_new\n", r"the table has no rows"),
        ("prompt,,target_new\na,b,c\n", r"line 1: column 2 has no name"),
        ("prompt,subject,subject\na,b,c\n", r"line 1: column 'subject' is named twice"),
        ("prompt,subject,target_new\n{} is,a,b\n{} is,a,b,c\n", r"line 3: 4 cells; the header names 3 columns"),
        ("prompt,subject,target_new\n{} is,a\n", r"line 2: field 'target_new' is missing"),
        ("prompt,subject,target_new\n{} is,a,\n", r"line 2: field 'target_new' is missing"),
        ('prompt,subject,target_new\n"{}\nis",a,b\n"{} is,a,b\n', r"line 4: not a row of the table"),
        ("prompt,subject,target_new,answer\n{} is,a,b,c\n", r"line 2: unknown field 'answer'"),
        ("prompt,subject,target_new,generation\n{} is,a,b,[c\n", r"line 2: field 'generation' is invalid JSON"),
        ("prompt,subject,target_new,generation\n{} is,a,b,[1]\n", r"line 2: field 'generation\[0\]' must be text"),
    ],
)
def test_bad_tables_are_refused_by_line(tmp_path: Path, text: str, message: str) -> None:
    for name in ("edits.csv", "edits.csv.gz"):
        path = write(tmp_path / name, text)
        with pytest.raises(DataError, match=message) as caught:
            load_requests(path)
        assert str(path) in str(caught.value)


def test_a_table_in_another_encoding_names_the_line(tmp_path: Path) -> None:
    (tmp_path / "edits.csv").write_bytes(b"prompt,subject,target_new\n{} is,a,b\n{} is,\xe9,b\n")
    with pytest.raises(DataError, match=r"edits\.csv, line 3: not UTF-8"):
        load_requests(tmp_path / "edits.csv")


class Frame:
    """What a pandas data frame has of a data frame: records by ``to_dict``, and columns when iterated."""

    def __init__(self, *records: dict[str, Any]) -> None:
        self._records = list(records)

    def __iter__(self) -> Any:
        return iter(self._records[0])

    def iterrows(self) -> Any:
        return enumerate(self._records)

    def to_dict(self, orient: str) -> list[dict[str, Any]]:
        assert orient == "records"
        return self._records


class Array:
    """A cell that a data frame read from Parquet has."""

    def __init__(self, *items: Any) -> None:
        self._items = items

    def tolist(self) -> list[Any]:
        return list(self._items)


def test_records_of_python() -> None:
    missing = {"target_true": math.nan, "relation": None}
    expected = [EditRequest(**PLAIN, id="0"), EditRequest(**PLAIN, id="b", paraphrases=("x", "y"))]
    records = [{**PLAIN, **missing}, {**PLAIN, **missing, "id": "b", "paraphrases": Array("x", "y")}]
    assert load_requests(records) == load_requests(iter(records)) == load_requests(Frame(*records)) == expected
    records[1]["paraphrases"] = ("x", "y")
    assert load_requests(records, limit=1) == expected[:1]
    said: list[str] = []
    known = [{**EASYEDIT, "pid": 3, "locality": {**EASYEDIT["locality"], "distracting": None}}]
    assert load_requests(known, on_note=said.append) == [READ] and said == ["records: fields not read: pid"]


def test_records_of_pandas_and_datasets() -> None:
    pandas, datasets = pytest.importorskip("pandas"), pytest.importorskip("datasets")
    records = [
        {**PLAIN, "id": "a", "target_true": None, "paraphrases": ["x"]},
        {**PLAIN, "id": "b", "target_true": "Italy"},
    ]
    expected = load_requests(records)
    assert expected[0].paraphrases == ("x",) and expected[1].target_true == "Italy"
    assert load_requests(pandas.DataFrame(records)) == expected
    assert load_requests(pandas.DataFrame(records).convert_dtypes()) == expected
    assert load_requests(datasets.Dataset.from_list(records)) == expected
    assert load_requests(datasets.Dataset.from_list([EASYEDIT])) == [READ]
    with pytest.raises(DataError, match=r"got DatasetDict with the keys \['train'\]"):
        load_requests(datasets.DatasetDict({"train": datasets.Dataset.from_list(records)}))


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([], "records: there are none"),
        ([PLAIN, "x"], "record 1: expected a mapping, got str"),
        ([PLAIN, {**PLAIN, "target_new": math.nan}], "record 1: field 'target_new' is missing"),
        ([PLAIN, {**PLAIN, "answer": 1}], "record 1: unknown field 'answer'"),
        ([PLAIN, {**PLAIN, "id": "0"}], "record 1: id '0' is used twice; first in record 0"),
        ([{"question": 1}], r"record 0: no schema fits"),
        (PLAIN, "records: expected a file or an iterable of mappings, got dict with the keys .*'prompt'"),
        (3, "records: expected a file or an iterable of mappings, got int"),
    ],
)
def test_bad_records_of_python(records: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_requests(records)
