"""MQuAKE, QAEdit, UnKE and AKEW records, and what follows from an edit: portability and multi-hop questions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from sphere_edit.cli.app import app
from sphere_edit.data import DataError, load, load_requests
from sphere_edit.data.requests import EditRequest, RequestError

PLAIN = {"prompt": "{} is in", "subject": "Rome", "target_new": "Japan"}


def rewrite(subject: str, new: str, true: str, **more: Any) -> dict[str, Any]:
    return {
        "prompt": "{} is a citizen of",
        "relation_id": "P27",
        "target_new": {"str": new, "id": "Q1"},
        "target_true": {"str": true, "id": "Q2"},
        "subject": subject,
        "question": f"What is the country of citizenship of {subject}?",
        **more,
    }


MQUAKE = {
    "case_id": 12,
    "requested_rewrite": [
        rewrite("Ada Berg", "Peru", "Norway"),
        rewrite("Peru", "Oslo", "Lima", prompt="{} is led from"),
    ],
    "questions": ["What is the capital of Ada Berg's country?", "Whence is the country of Ada Berg led?"],
    "answer": "Lillehammer",
    "answer_alias": ["Lillehamar"],
    "new_answer": "Oslo",
    "new_answer_alias": ["Christiania", "Oslo "],
    "single_hops": [{"question": "Where is she from?", "cloze": "She is from", "answer": "Norway", "answer_alias": []}],
    "new_single_hops": [],
    "orig": {"triples": [["Q3", "P27", "Q2"]]},
}
QAEDIT = {
    "id": 31,
    "source": "NQ",
    "prompt": "who wrote the ferry song?",
    "target": "Ada Berg",
    "subject": "the ferry song",
    "rephrase": "Which person is the author of the ferry song?",
    "locality": [{"loc": "who painted it", "loc_ans": "Munch"}, {"loc": "when was it", "loc_ans": ""}],
}
TEXT = "Ada Berg is an engineer. She builds ferries in Bergen,\nand has done so since 2009."
UNKE = {
    "id": 0,
    "question": "What is Ada Berg's occupation?",
    "para_question": "What does Ada Berg do for a living?",
    "answer": TEXT,
    "sub_question": ["Where does Ada Berg build ferries?", "Since when?"],
    "sub_answer": ["In Bergen.", "Since 2009."],
}
AKEW = {
    "case_id": 4,
    "requested_rewrite": rewrite(
        "Ada Berg",
        "Peru",
        "Norway",
        fact_new="Ada Berg is a citizen of Peru",
        fact_new_uns=TEXT,
        unsfact_triplets_GPT=[
            {"subject": "Ada Berg", "prompt": "{} builds ferries in", "target": "Bergen"},
            {"subject": "Ada Berg", "prompt": "{} is", "target": " "},
        ],
    ),
    "paraphrase_prompts": ["Noise. Ada Berg holds a passport of"],
    "neighborhood_prompts": ["Edvard Munch is a citizen of"],
}


def read(tmp_path: Path, *records: dict[str, Any]) -> tuple[str, list[EditRequest], list[str]]:
    path, said = tmp_path / "edits.json", list[str]()
    path.write_text(json.dumps(records))
    return (
        load(path).schema,
        load_requests(path, on_note=said.append),
        [text.removeprefix(f"{path}: ") for text in said],
    )


def test_mquake_gives_an_edit_for_each_rewrite_and_asks_its_questions_after_the_last(tmp_path: Path) -> None:
    schema, (first, last), said = read(tmp_path, MQUAKE)
    assert schema == "MQuAKE"
    assert first == EditRequest(
        id="12.1",
        prompt="{} is a citizen of",
        subject="Ada Berg",
        target_new="Peru",
        target_true="Norway",
        paraphrases=("What is the country of citizenship of Ada Berg?",),
        relation="P27",
    )
    assert (last.id, last.text, last.target_new) == ("12.2", "Peru is led from", "Oslo")
    assert last.multi_hop == tuple(MQUAKE["questions"])
    assert (last.multi_hop_answers, last.multi_hop_true) == (("Oslo", "Christiania"), "Lillehammer")
    assert said == ["fields not read: answer_alias, new_single_hops, orig, single_hops"]
    _, (_, same), _ = read(tmp_path, {**MQUAKE, "answer": "Christiania"})
    assert same.multi_hop_true is None  # an alias of the new answer is not another one
    assert [r.id for r in read(tmp_path, MQUAKE, {**MQUAKE, "case_id": 13})[1]] == ["12.1", "12.2", "13.1", "13.2"]


def test_qaedit(tmp_path: Path) -> None:
    schema, requests, said = read(tmp_path, QAEDIT, {**QAEDIT, "id": 32, "subject": "a lute"})
    assert schema == "QAEdit"
    assert requests == [
        EditRequest(
            id="31",
            prompt="who wrote {}?",
            subject="the ferry song",
            target_new="Ada Berg",
            paraphrases=("Which person is the author of the ferry song?",),
            neighborhood=("who painted it",),
            neighborhood_answers=("Munch",),
        )
    ]
    assert said[0].startswith("1 of 2 records are no edits; ") and "'a lute', which is not in" in said[0]
    assert said[1:] == ["fields not read: source"]


def test_unke_takes_the_question_for_the_subject(tmp_path: Path) -> None:
    schema, (request,), said = read(tmp_path, UNKE)
    assert (schema, said) == ("UnKE", [])
    assert request == EditRequest(
        id="0",
        prompt="{}",
        subject="What is Ada Berg's occupation?",
        target_new=TEXT,
        paraphrases=("What does Ada Berg do for a living?",),
        portability=("Where does Ada Berg build ferries?", "Since when?"),
        portability_answers=(("In Bergen.",), ("Since 2009.",)),
    )


def test_akew_takes_the_text_for_the_target(tmp_path: Path) -> None:
    schema, (request,), said = read(tmp_path, AKEW)
    assert schema == "AKEW" and said == ["fields not read: neighborhood_prompts"]
    assert request == EditRequest(
        id="4",
        prompt="{} is a citizen of",
        subject="Ada Berg",
        target_new=TEXT,
        paraphrases=("Noise. Ada Berg holds a passport of", "What is the country of citizenship of Ada Berg?"),
        relation="P27",
        portability=("Ada Berg builds ferries in",),
        portability_answers=(("Bergen",),),
    )
    assert read(tmp_path, {**AKEW, "questions": None, "new_answer": None})[1] == [request]
    several = {**MQUAKE, "requested_rewrite": [AKEW["requested_rewrite"], AKEW["requested_rewrite"]]}
    schema, (first, last), _ = read(tmp_path, several)
    assert (schema, first.id, last.id) == ("AKEW", "12.1", "12.2")
    assert not first.multi_hop and last.multi_hop_answers == ("Oslo", "Christiania")


EASYEDIT = {**PLAIN, "ground_truth": "Italy"}


@pytest.mark.parametrize(
    ("portability", "prompts", "answers"),
    [
        (
            {
                "Reasoning": [{"prompt": "Its river is", "ground_truth": [["Tiber", "Tevere"], ["Aniene"]]}],
                "Subject_Aliasing": [{"prompt": "Roma is in", "ground_truth": ["Japan"]}],
                "more": [{"prompt": "x", "ground_truth": []}],
                "Logical_Generalization": None,
            },
            ("Its river is", "Roma is in"),
            (("Tiber", "Tevere", "Aniene"), ("Japan",)),
        ),
        ({"r": {"prompt": ["a", "b"], "ground_truth": ["c", ["d", "e"]]}}, ("a", "b"), (("c",), ("d", "e"))),
        ({"Recalled Relation": "(a, b)", "New Question": "Who?", "New Answer": "Ada"}, ("Who?",), (("Ada",),)),
        (None, (), ()),
    ],
)  # fmt: skip
def test_portability_of_easyedit_and_knowedit(
    tmp_path: Path, portability: Any, prompts: tuple[str, ...], answers: tuple[tuple[str, ...], ...]
) -> None:
    schema, (request,), said = read(tmp_path, {**EASYEDIT, "portability": portability})
    assert (schema, said) == ("EasyEdit", [])
    assert (request.portability, request.portability_answers) == (prompts, answers)
    flat = {**EASYEDIT, "portability_prompt": "Who?", "portability_ground_truth": "Ada"}
    (request,) = read(tmp_path, flat)[1]
    assert (request.portability, request.portability_answers) == (("Who?",), (("Ada",),))


def test_multi_hop_questions_of_wikibigedit(tmp_path: Path) -> None:
    record = {"subject": "Rome", "update": "Where is Rome?", "ans": "Japan", "mhop": "Who leads it?", "mhop_ans": "Ada"}
    (request,) = read(tmp_path, record)[1]
    assert (request.multi_hop, request.multi_hop_answers) == (("Who leads it?",), ("Ada",))
    assert read(tmp_path, {**record, "mhop_ans": " "})[1][0].multi_hop == ()


def test_plain_records_and_tables_have_all_of_it(tmp_path: Path) -> None:
    follows = {
        "portability": ["Roma is in", "Its river is"],
        "portability_answers": ["Japan", ["Tiber", "Tevere"]],
        "multi_hop": ["Who leads it?"],
        "multi_hop_answers": ["Ada"],
        "multi_hop_true": "Bo",
    }
    (request,) = read(tmp_path, {**PLAIN, **follows})[1]
    assert request == EditRequest(**PLAIN, **follows, id="0")
    assert request.portability_answers == (("Japan",), ("Tiber", "Tevere"))
    assert EditRequest.from_dict(json.loads(json.dumps(request.to_dict()))) == request
    bare = EditRequest(**PLAIN).to_dict()
    assert not set(follows) & set(bare) and {"generation", "neighborhood", "relation"} < set(bare)
    table = tmp_path / "edits.csv"
    table.write_text(
        "id,prompt,subject,target_new,portability,portability_answers,multi_hop,multi_hop_answers,multi_hop_true\n"
        '0,{} is in,Rome,Japan,"[""Roma is in"", ""Its river is""]","[""Japan"", [""Tiber"", ""Tevere""]]",'
        "Who leads it?,Ada,Bo\n"
    )
    assert load_requests(table) == [request]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"portability": ["a"]}, r"portability_answers must be a text or a list of texts for each of the 1 prompts"),
        (
            {"portability": ["a"], "portability_answers": [[]]},
            r"for each of the 1 prompts of portability, got \[\[\]\]",
        ),
        ({"portability_answers": ["a"]}, "for each of the 0 prompts"),
        ({"portability_answers": "a"}, "for each of the 0 prompts of portability, got 'a'"),
        ({"portability": ["{}"], "portability_answers": ["a"]}, r"portability must be complete prompts, without \{\}"),
        ({"multi_hop": ["a"]}, "multi_hop and multi_hop_answers: expected both or neither"),
        ({"multi_hop_answers": ["a"]}, "multi_hop and multi_hop_answers: expected both or neither"),
        ({"multi_hop": ["a"], "multi_hop_answers": [" "]}, "multi_hop_answers must be a list of non-empty answers"),
        ({"multi_hop_true": " "}, "multi_hop_true must be non-empty text or absent"),
    ],
)
def test_bad_questions_of_requests(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        EditRequest(**PLAIN, **changes)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({**MQUAKE, "requested_rewrite": []}, "record 0: 'requested_rewrite' is empty"),
        ({**MQUAKE, "questions": "Who?"}, "record 0: field 'questions' must be a list of text, got str"),
        ({**MQUAKE, "new_answer": None}, "record 0: field 'new_answer' must be text"),
        ({**QAEDIT, "locality": [{"loc": 3, "loc_ans": "a"}]}, r"record 0: field 'locality\[0\].loc' must be text"),
        (
            {**UNKE, "sub_answer": []},
            "record 0: 'sub_question' and 'sub_answer' must be lists of one length, got 2 and 0",
        ),
        ({**AKEW, "case_id": None}, "record 0: field 'case_id' must be text or an integer"),
        ({**EASYEDIT, "portability": {"Reasoning": "x"}}, "record 0: field 'portability.Reasoning' must be an object"),
    ],
)
def test_bad_records_name_the_place(tmp_path: Path, record: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        read(tmp_path, record)


def test_the_command_shows_how_they_are_read(tmp_path: Path) -> None:
    path = tmp_path / "cases.jsonl"
    path.write_text(json.dumps(MQUAKE) + "\n")
    shown = CliRunner().invoke(app, ["data", str(path)], env={"COLUMNS": "200"}).output
    assert "MQuAKE" in shown and "multi_hop_answers" in shown and "'Christiania'" in shown
    assert "answer_alias, new_single_hops, orig, single_hops" in shown
