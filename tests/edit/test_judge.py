"""A judge behind a local server: what is asked and kept, what is refused, a run whose judge fails and comes back."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import tiny
from typer.testing import CliRunner

from sphere_edit.cli.app import app
from sphere_edit.data.requests import EditRequest
from sphere_edit.evaluation import answers
from sphere_edit.evaluation.answers import evaluate_answers
from sphere_edit.evaluation.judge import Endpoint, JudgeError
from sphere_edit.experiments.run import resume, run
from sphere_edit.report.page import write_report
from sphere_edit.runs import run_folder
from sphere_edit.runs.spec import RunOptions


class Server(ThreadingHTTPServer):
    """Replies as ``reply`` says: text of a message, or bytes and a status as they are."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: list[dict] = []
        self.reply = lambda prompt: "Yes."

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append({"path": self.path, **body})
        reply, status = self.server.reply(body["messages"][0]["content"]), 200
        if isinstance(reply, tuple):
            reply, status = reply
        elif isinstance(reply, str):
            reply = json.dumps({"choices": [{"message": {"role": "assistant", "content": reply}}]}).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(reply)))
        self.end_headers()
        self.wfile.write(reply)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def test_verdicts_are_asked_once_and_kept(server, tmp_path):
    server.reply = lambda prompt: "Yes." if "Said: It is Peru" in prompt else " no\n"
    kept = tmp_path / "judged.jsonl"
    judge = Endpoint(server.url + "/", "small", kept)
    assert judge("Oka lies in", ("Peru", "Perú"), "It is Peru") is True
    assert judge("Oka lies in", ("Peru", "Perú"), "Chile") is judge("Oka lies in", ("Peru", "Perú"), "Chile") is False
    assert judge("Oka lies in", ("Peru",), "") is False
    (first, second) = server.asked
    assert first["path"] == "/v1/chat/completions" and first["model"] == "small" and first["temperature"] == 0
    prompt = first["messages"][0]["content"]
    assert "Oka lies in" in prompt and "Peru / Perú" in prompt and "Said: Chile" in second["messages"][0]["content"]
    lines = [json.loads(line) for line in kept.read_text(encoding="utf-8").splitlines()]
    assert lines == judge.verdicts and [line["reply"] for line in lines] == ["Yes.", "no"]
    assert lines[0] == {"model": "small", "prompt": prompt, "reply": "Yes.", "right": True}

    kept.write_bytes(kept.read_bytes() + b'{"model": "small", "pro')  # a kill in the middle of a line
    again = Endpoint(server.url, "small", kept)
    assert again("Oka lies in", ("Peru", "Perú"), "It is Peru") and len(server.asked) == 2
    other = Endpoint(server.url, "large", kept)
    other("Oka lies in", ("Peru", "Perú"), "It is Peru")
    assert len(server.asked) == 3 and len(kept.read_text(encoding="utf-8").splitlines()) == 3
    kept.write_text('{"model": "small"}\n')
    with pytest.raises(JudgeError, match=r"judged\.jsonl, line 1: not a verdict"):
        Endpoint(server.url, "small", kept)


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        ((b"no such model", 404), "404 Not Found for model 'small'"),
        ((b"{oops", 200), r"expected JSON with choices\[0\].message.content, got b'{oops'"),
        ((b'{"choices": []}', 200), r"expected JSON with choices\[0\].message.content, got b'{\"choices\": \[\]}'"),
        ((b'{"choices": [{"message": {"content": null}}]}', 200), "expected JSON with"),
        ("perhaps", "expected yes or no, got 'perhaps'"),
        ("yes and no", "expected yes or no, got 'yes and no'"),
        (None, "no reply within 0.2 seconds"),
    ],
)
def test_replies_that_cannot_be_read(server, tmp_path, reply, message):
    server.reply = lambda prompt: reply if reply is not None else time.sleep(1) or "yes"
    judge = Endpoint(server.url, "small", tmp_path / "judged.jsonl", 0.2 if reply is None else 30)
    for call in (judge.check, lambda: judge("Oka lies in", ("Peru",), "Chile")):
        with pytest.raises(JudgeError, match=message) as caught:
            call()
        assert server.url in str(caught.value)
    assert not judge.verdicts and not (tmp_path / "judged.jsonl").exists()


def test_an_endpoint_that_is_not_there():
    with Server() as server:
        url = server.url
    with pytest.raises(JudgeError, match=r"judge http://127.0.0.1:\d+/v1: cannot be reached \(.*refused"):
        Endpoint(url, "small").check()
    with pytest.raises(JudgeError, match="judge 'localhost:8000': expected an address such as http://"):
        Endpoint("localhost:8000", "small")
    with pytest.raises(JudgeError, match=r"judge http://\[::1/v1: cannot be reached \(Invalid IPv6 URL\)"):
        Endpoint("http://[::1/v1", "small").check()


def test_judged_scores(monkeypatch):
    said = {"Oka lies in": "Peru", "Oka is": "Chile", "It is": "Peru", "Who?": "Bo", "Whose?": "Ada"}
    monkeypatch.setattr(answers, "write_answers", lambda model, tokenizer, prompts, *more: [said[p] for p in prompts])
    request = EditRequest(
        "{} lies in", "Oka", "Peru", paraphrases=("Oka is", "It is"), multi_hop=("Who?", "Whose?"),
        multi_hop_answers=("Bea", "Ada"),
    )  # fmt: skip
    asked = []

    def judge(*question):
        asked.append(question)
        return question[2] in question[1]

    found, _ = evaluate_answers(None, None, [request], judge=judge)
    scores = {name: score.mean for name, score in found.scores.items() if name.endswith("_judged")}
    assert scores == {"efficacy_judged": 1.0, "generalization_judged": 0.5, "multi_hop_judged": 1.0}
    assert ("Who?", ("Bea", "Ada"), "Bo") in asked and len(asked) == 5


def test_a_run_whose_judge_fails_goes_on_with_what_was_judged(server, tmp_path):
    requests = tiny.facts(4)

    def options(name: str) -> RunOptions:
        return RunOptions("tiny", "facts", tmp_path / name, answers=True, judge=server.url, judge_model="small")

    def model():
        return tiny.make_model("llama"), tiny.make_tokenizer()

    server.reply = lambda prompt: "yes" if len(prompt) % 2 else "no"
    whole = run(*model(), requests, tiny.CONFIG, options("whole")).events
    asked = len(server.asked)
    kept = (tmp_path / "whole" / run_folder.JUDGED).read_bytes()
    (before, after) = [event["scores"] for event in whole if event["event"] == "evaluation"]
    assert before["efficacy_judged"]["n"] == after["efficacy_judged"]["n"] == 4
    page = write_report(tmp_path / "whole").read_text()
    assert "efficacy judged" in page and "<b>Judged</b> asks the model <bdi>small</bdi>" in page

    once = server.reply
    server.asked.clear()
    server.reply = lambda prompt: once(prompt) if len(server.asked) < asked - 1 else (b"", 503)
    with pytest.raises(JudgeError, match="503"):
        run(*model(), requests, tiny.CONFIG, options("stopped"))
    server.reply, done = once, len(server.asked)
    with run_folder.existing_run(tmp_path / "stopped") as journal:
        assert journal.batches == 2
    events = resume(*model(), tmp_path / "stopped").events
    assert [e["scores"] for e in events if e["event"] == "evaluation"] == [before, after]
    assert (tmp_path / "stopped" / run_folder.JUDGED).read_bytes() == kept
    assert len(server.asked) - done <= 2  # what failed, and what came after it


def test_nothing_is_begun_without_the_judge(tmp_path):
    model, tokenizer = tiny.make_model("llama"), tiny.make_tokenizer()
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    with Server() as server:
        url = server.url
    common = ["--data", "world-facts", "--limit", "2"]
    ways = (["evaluate", str(tmp_path / "model"), *common], ["run", "-m", str(tmp_path / "model"), *common])
    ways[1].extend(["--out", str(tmp_path / "out")])
    for options, message in (
        (["--judge", url, "--judge-model", "small", "--answers"], "cannot be reached"),
        (["--judge", url, "--judge-model", "small"], "expected answers with it"),
        (["--judge", url, "--answers"], "expected its address and the name of its model"),
    ):
        for way in ways:
            done = CliRunner().invoke(app, [*way, *options])
            assert done.exit_code == 2 and message in done.output
    assert not (tmp_path / "out").exists()


def test_an_evaluation_whose_judge_fails_keeps_its_scores(server, tmp_path):
    model, tokenizer = tiny.make_model("llama"), tiny.make_tokenizer()
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    server.reply = lambda prompt: "yes" if len(server.asked) < 4 else (b"", 503)
    ask = ["--answers", "--judge", server.url, "--judge-model", "small", "--json", str(tmp_path / "kept.json")]
    done = CliRunner().invoke(app, ["evaluate", str(tmp_path / "model"), "--data", "world-facts", "--limit", "4", *ask])
    assert done.exit_code == 2 and "503" in done.output
    kept = json.loads((tmp_path / "kept.json").read_text())
    assert kept["scores"]["efficacy_success"]["n"] == 4 and kept["perplexity"] > 1
    assert [one["reply"] for one in kept["judged"]] == ["yes"] * len(kept["judged"]) and kept["judged"]
