"""Free text about edited subjects: generate text, and score variety and fit with the new target.

*Fluency* and *consistency* follow ROME and MEMIT. Fluency is the weighted entropy of 2- and 3-grams of words.
Consistency is the cosine of two TF-IDF vectors: the model's text about a subject, and texts about things that truly
have the new target.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from sphere_edit.data.reading import DataError, Fields, read_records
from sphere_edit.data.requests import EditRequest, joint
from sphere_edit.evaluation.metrics import Evaluation
from sphere_edit.model.generation import TOP_5, continue_rows
from sphere_edit.model.inference import frozen
from sphere_edit.model.structure import check_usable
from sphere_edit.model.tokens import check_fits, check_tokenizer, encode

TEXT_TOKENS = 100
_ROWS_PER_BATCH = 32
_WEIGHTS = {2: 2 / 3, 3: 4 / 3}

_REFERENCE = ("target", "text", "relation")
References = dict[tuple[str | None, str], list[str]]


def generate_texts(
    model: Any,
    tokenizer: Any,
    requests: Sequence[EditRequest],
    seed: int = 0,
    length: int = TEXT_TOKENS,
    progress: Callable[[int, int], None] | None = None,
) -> list[list[str]]:
    """Generate a text for each ``generation`` prompt of each request; a request without any uses the edit's prompt.

    Each token is sampled from the five likeliest ones, as published. Every text has the full length, because entropy
    grows with length: end of text is never sampled, while the published code goes on after one.

    Args:
        model: causal LM; run in evaluation mode, left unchanged.
        seed: the same seed and requests give the same texts; the caller's random state stays unchanged.
        length: tokens of each text with its prompt, as published.

    Raises:
        ValueError: a prompt leaves no room for a token, or the model has too few positions for a batch. A batch needs
            the tokens of its longest prompt plus ``length`` less the tokens of its shortest prompt.
    """
    check_usable(model)
    check_tokenizer(tokenizer)
    prompts = [prompt for r in requests for prompt in r.generation or (r.text,)]
    rows = [encode(tokenizer, prompt) for prompt in prompts]
    batches = [range(len(rows))[at : at + _ROWS_PER_BATCH] for at in range(0, len(rows), _ROWS_PER_BATCH)]
    lacking = [length - min(len(rows[i].ids) for i in batch) for batch in batches]
    for batch, new in zip(batches, lacking, strict=True):
        for i in batch:
            if len(rows[i].ids) >= length:
                used = len(rows[i].ids)
                raise ValueError(f"prompt {prompts[i][:60]!r}… takes {used} tokens of a text of length {length}")
            check_fits(model, rows[i], prompts[i], new)
    device = next(model.parameters()).device
    texts: list[str] = []
    with frozen(model), torch.no_grad(), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        for batch, new in zip(batches, lacking, strict=True):
            given = [rows[i].ids for i in batch]
            out = continue_rows(model, tokenizer, given, new, min_new_tokens=new, **TOP_5)
            for ids, row in zip(given, out, strict=True):
                first = max(map(len, given)) - len(ids)
                texts.append(tokenizer.decode(row[first : first + length], skip_special_tokens=True))
            if progress is not None:
                progress(len(texts), len(rows))
    left = iter(texts)
    return [[next(left) for _ in r.generation or (r.text,)] for r in requests]


def reference_texts(requests: Iterable[EditRequest]) -> References:
    """True sentences from the data: prompts completed by true targets, by relation and target.

    ROME's references are encyclopaedia articles on subjects that have the target. One-sentence stand-ins replace them
    here, so compare the figures among models and methods on the same data, not with published ones.
    """
    found: dict[tuple[str | None, str], dict[str, None]] = {}
    for r in requests:
        if r.relation is not None and r.target_true is not None:
            prompts = (r.text,) if r.neighborhood_answers else (r.text, *r.neighborhood)
            found.setdefault((r.relation, r.target_true), {}).update(
                {f"{p}{joint(p)}{r.target_true}": None for p in prompts}
            )
    return {key: list(texts) for key, texts in found.items()}


def read_references(path: str | Path) -> References:
    """Read a user's references: JSON records ``{target, text}``; an optional ``relation`` limits a text's use.

    Blanks around a target are removed, as for requests.

    Raises:
        DataError: the file cannot be used; the message names the file, the line and the field.
    """
    found: References = {}
    for where, fields in read_records(path):
        unknown = sorted(set(fields) - set(_REFERENCE))
        if unknown:
            raise DataError(f"{where}: unknown field {unknown[0]!r}; known fields are {', '.join(_REFERENCE)}")
        record = Fields(where, fields)
        key = record.optional_text("relation"), record.text("target").strip()
        found.setdefault(key, []).append(record.text("text"))
    return found


def fit_tfidf(
    requests: Sequence[EditRequest],
    references: References,
    corpus: Iterable[str] | None = None,
    source: str = "the references",
) -> Any:
    """Fit scikit-learn's TF-IDF for `score_texts`; None if no request has a reference.

    Args:
        corpus: documents to fit on; None takes all references.
        source: the documents' origin, for messages.

    Raises:
        ImportError: scikit-learn is not installed.
        ValueError: the documents have no words.
    """
    if not any(_about(request, references) for request in requests):
        return None
    try:
        from sklearn.feature_extraction.text import TfidfVectorizer
    except ImportError as error:
        raise ImportError("consistency needs scikit-learn; pip install 'sphere-kernels[edit]'") from error
    every = (text for known in references.values() for text in known)
    try:
        return TfidfVectorizer().fit(every if corpus is None else corpus)
    except ValueError as error:
        raise ValueError(f"{source}: expected text with words of two letters or more to fit TF-IDF on") from error


def _about(request: EditRequest, references: References) -> list[str]:
    new = request.target_new
    return [*references.get((request.relation, new), ()), *references.get((None, new), ())]


def score_texts(
    requests: Sequence[EditRequest],
    texts: Sequence[Sequence[str]],
    references: References,
    tfidf: Any = None,
) -> Evaluation:
    """``fluency`` of the texts of each request, and ``consistency`` with references for the new target.

    Args:
        texts: the texts of each request, from `generate_texts`.
        references: a request without references for its relation and new target does not count in ``consistency``.
        tfidf: from `fit_tfidf`; None calls it on all references, and raises its errors.
    """
    per_request = [{"fluency": math.fsum(map(n_gram_entropy, own)) / len(own)} for own in texts]
    if tfidf is None:
        tfidf = fit_tfidf(requests, references)
    for request, record, own in zip(requests, per_request, texts, strict=True):
        if known := _about(request, references):
            said, wanted = tfidf.transform([" ".join(own), " ".join(known)])
            record["consistency"] = 100 * float(said.multiply(wanted).sum())  # both rows have norm 1 or 0
    return Evaluation.of(per_request, ("fluency", "consistency"))


def n_gram_entropy(text: str) -> float:
    """100 × the mean of 2/3 of the entropy of a text's word pairs and 4/3 of the entropy of word triples, in bits.

    A word is a run of letters and digits, or any other single character. The published code uses nltk instead: "don't"
    is three words here and two there. A text of one word has entropy 0.
    """
    words = re.findall(r"\w+|[^\w\s]", text)
    return 100 * sum(weight * _entropy(words, n) for n, weight in _WEIGHTS.items()) / len(_WEIGHTS)


def _entropy(words: Sequence[str], n: int) -> float:
    counts = Counter(zip(*(words[i:] for i in range(n)), strict=False)).values()
    return math.fsum(count / sum(counts) * math.log2(sum(counts) / count) for count in counts)
