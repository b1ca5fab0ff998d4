"""A judge of answers: another model, where words alone do not tell whether an answer is right. Asked only on demand."""

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
"""Whether an answer is right: of a question, its right answers (the answer, then its aliases), and what was said."""

SECONDS = 60.0
_ASKED = """Question or beginning of a sentence: {question}
Right answers: {answers}
Said: {said}

Does what was said give one of the right answers? Further words do not matter, unless they contradict it.
Reply with one word, yes or no."""
_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # the endpoint is near


class JudgeError(ValueError):
    """A judge that cannot be asked, or whose reply cannot be read; what was judged before is kept."""


class Endpoint:
    """A judge behind an OpenAI-compatible endpoint, such as a server on one's own machine.

    Args:
        url: its base, which ends before ``/chat/completions``, e.g. ``http://localhost:8000/v1``.
        model: its name there.
        kept: a JSONL file of ``model``, ``prompt``, ``reply`` and ``right``. Each verdict is added to it at once, and
            what it has is not asked again. None keeps them in memory.
        seconds: how long a reply may take.

    Attributes:
        verdicts: what has been judged, in order.

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
        """Raises JudgeError; an empty answer is wrong without asking."""
        if not said:
            return False
        prompt = _ASKED.format(question=question, answers=" / ".join(answers), said=said)
        if (self.model, prompt) not in self._known:
            reply = self.ask(prompt)
            right = self._verdict(reply)
            self._keep({"model": self.model, "prompt": prompt, "reply": reply, "right": right})
        return self._known[self.model, prompt]

    def check(self) -> None:
        """Raise JudgeError unless the judge replies as it should to a question whose answer is plain."""
        self._verdict(self.ask(_ASKED.format(question="Two and two are", answers="four", said="four")))

    def ask(self, prompt: str) -> str:
        """The reply to a prompt, greedy."""
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
        except (OSError, HTTPException, ValueError) as error:  # the last of an address that cannot be
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
    """The judge, which replies; None where none is asked for.

    Raises:
        ValueError: it has no model, there are no answers to judge, or it does not reply as it should.
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
    """The verdicts of a file; a last line that a kill has torn is cut off."""
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
