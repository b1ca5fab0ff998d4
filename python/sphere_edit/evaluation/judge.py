"""A judge of answers, on request only: another model decides whether an answer is right where words cannot."""

from __future__ import annotations

import json
import os
import re
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from http.client import HTTPException
from pathlib import Path
from typing import Any

Judge = Callable[[str, Sequence[str], str], bool]
"""A judge takes a question, its right answers (the answer, then its aliases) and the given answer; True is right."""

SECONDS = 60.0
_ASKED = """Question or beginning of a sentence: {question}
Right answers: {answers}
Said: {said}

Does what was said give one of the right answers? Further words do not matter, unless they contradict it.
Reply with one word, yes or no."""
_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # ignores proxies: the endpoint is near


class JudgeError(ValueError):
    """The judge cannot be reached, or a reply cannot be read; earlier verdicts are kept."""


class Endpoint:
    """A judge behind an OpenAI-compatible endpoint, such as a server on one's own machine.

    Args:
        url: the base address, without ``/chat/completions``, e.g. ``http://localhost:8000/v1``.
        model: the model's name there.
        kept: a JSONL file of ``model``, ``prompt``, ``reply`` and ``right``. Each verdict is appended at once, and a
            prompt in the file is not asked again. None keeps the verdicts in memory.
        seconds: longest time for a reply.

    Attributes:
        verdicts: all verdicts, in order.

    Raises:
        JudgeError: ``url`` is no http or https address, or ``kept`` is damaged.
    """

    def __init__(self, url: str, model: str, kept: Path | None = None, seconds: float = SECONDS) -> None:
        if not re.match(r"https?://[^/]", url):
            raise JudgeError(f"judge {url!r}: expected an address such as http://localhost:8000/v1")
        self.url, self.model, self._kept, self._seconds = url.rstrip("/"), model, kept, seconds
        self.verdicts = [] if kept is None else _read(kept)
        self._known = {(v["model"], v["prompt"]): bool(v["right"]) for v in self.verdicts}

    def __call__(self, question: str, answers: Sequence[str], said: str) -> bool:
        """Judge an answer, or raise JudgeError; an empty answer is wrong without asking."""
        if not said:
            return False
        prompt = _ASKED.format(question=question, answers=" / ".join(answers), said=said)
        if (self.model, prompt) not in self._known:
            reply = self.ask(prompt)
            right = self._verdict(reply)
            self._keep({"model": self.model, "prompt": prompt, "reply": reply, "right": right})
        return self._known[self.model, prompt]

    def check(self) -> None:
        """Raise JudgeError unless the judge replies yes or no to a trivial question."""
        self._verdict(self.ask(_ASKED.format(question="Two and two are", answers="four", said="four")))

    def ask(self, prompt: str) -> str:
        """The judge's greedy reply to a prompt."""
        body = {"model": self.model, "messages": [{"role": "user", "content": prompt}], "temperature": 0}
        try:
            request = urllib.request.Request(
                f"{self.url}/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
            )
            with _DIRECT.open(request, timeout=self._seconds) as response:
                data = response.read()
        except TimeoutError as error:
            raise JudgeError(f"judge {self.url}: no reply within {self._seconds:g} seconds") from error
        except urllib.error.HTTPError as error:
            raise JudgeError(f"judge {self.url}: {error.code} {error.reason} for model {self.model!r}") from error
        except (OSError, HTTPException, ValueError) as error:  # ValueError: an invalid address
            reason = getattr(error, "reason", error)
            raise JudgeError(f"judge {self.url}: cannot be reached ({reason})") from error
        try:
            reply = json.loads(data)["choices"][0]["message"]["content"]
            return str(reply.strip())
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise JudgeError(
                f"judge {self.url}: expected JSON with choices[0].message.content, got {data[:200]!r}"
            ) from error

    def _verdict(self, reply: str) -> bool:
        found = re.findall(r"\b(yes|no)\b", reply.lower())
        if not found or len(set(found)) > 1:
            raise JudgeError(f"judge {self.url}: expected yes or no, got {reply[:200]!r}")
        return str(found[0]) == "yes"

    def _keep(self, verdict: dict[str, Any]) -> None:
        if self._kept is not None:
            with self._kept.open("a", encoding="utf-8") as file:
                file.write(json.dumps(verdict, ensure_ascii=False) + "\n")
                file.flush()
                os.fsync(file.fileno())
        self.verdicts.append(verdict)
        self._known[verdict["model"], verdict["prompt"]] = verdict["right"]


def check_judge(url: str | None, model: str | None, answers: bool) -> Endpoint | None:
    """Make the judge that the options name and check for a reply; None without a judge.

    Raises:
        ValueError: address or model is missing, there are no answers to judge, or the check of the reply fails.
    """
    if url is None and model is None:
        return None
    if url is None or model is None:
        raise ValueError(f"judge: expected its address and the name of its model, got {url!r} and {model!r}")
    if not answers:
        raise ValueError(f"judge {url}: expected answers with it, for these are judged")
    judge = Endpoint(url, model)
    judge.check()
    return judge


def _read(path: Path) -> list[dict[str, Any]]:
    """Read the verdicts of a file; cut off a last line that a kill has torn."""
    if not path.exists():
        return []
    lines = path.read_bytes().splitlines(keepends=True)
    if lines and not lines[-1].endswith(b"\n"):
        os.truncate(path, sum(map(len, lines[:-1])))
        lines.pop()
    verdicts = []
    for number, line in enumerate(lines, start=1):
        try:
            verdict = json.loads(line)
            verdicts.append({name: verdict[name] for name in ("model", "prompt", "reply", "right")})
        except (ValueError, LookupError, TypeError) as error:
            raise JudgeError(f"{path}, line {number}: not a verdict; expected the file as it was kept") from error
    return verdicts
