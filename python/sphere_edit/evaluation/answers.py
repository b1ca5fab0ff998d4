"""Free answers: let the model write after a prompt, and compare the answer with the wanted one.

*Accuracy* (`metrics`) shows the model each right token before the next, and stops at the target's end (teacher
forcing). A user shows the model nothing: the model writes token after token until it ends its text or line. Editing
methods with the same accuracy differ here (Yang et al., "The Mirage of Model Editing", arXiv 2502.11177).

Answers are normalised as in SQuAD (Rajpurkar et al. 2016): lower case, without punctuation and articles. *Exact*
compares the whole answer; *contains* looks for the target's words anywhere in the answer, in a row. Any alias of an
answer counts. A base model seldom stops after an answer, so read *contains* for a base model and *exact* for a chat
model.
"""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from sphere_edit.data.requests import EditRequest
from sphere_edit.evaluation.judge import Judge
from sphere_edit.evaluation.metrics import FOLLOWING, METRICS, Evaluation, named, questions, together
from sphere_edit.model.generation import continue_rows
from sphere_edit.model.inference import frozen
from sphere_edit.model.structure import check_usable
from sphere_edit.model.tokens import Row, check_fits, check_tokenizer, encode

ANSWER_TOKENS = 20
ANSWER_SCORES = tuple(f"{metric}_{kind}" for metric in METRICS for kind in ("exact", "contains"))
JUDGED_SCORES = tuple(f"{metric}_judged" for metric in (*METRICS, *FOLLOWING))
FOLLOWING_ANSWER_SCORES = tuple(f"{metric}_{kind}" for metric in FOLLOWING for kind in ("exact", "contains"))
_ROWS_PER_BATCH = 64
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def evaluate_answers(
    model: Any,
    tokenizer: Any,
    requests: Sequence[EditRequest],
    tokens: int = ANSWER_TOKENS,
    chat: bool = False,
    progress: Callable[[int, int], None] | None = None,
    judge: Judge | None = None,
) -> tuple[Evaluation, dict[str, str]]:
    """Score free answers to every prompt of the requests: `ANSWER_SCORES`.

    Efficacy (the prompt) and generalization (paraphrases) want ``target_new``. Specificity (neighbourhood) wants
    ``target_true``, or ``neighborhood_answers`` if a request has them. Requests with portability and multi-hop
    questions also get `FOLLOWING_ANSWER_SCORES`. A multi-hop question has several wordings; one right answer to any
    wording counts, as in MQuAKE.

    Args:
        model: causal LM; run in evaluation mode, left unchanged.
        tokens: most tokens of an answer.
        chat: write each prompt as a user's message in the tokenizer's chat template.
        judge: also decides whether each answer is right: `JUDGED_SCORES`.

    Returns:
        The scores, and the answer to each prompt.

    Raises:
        ValueError: as `write_answers` and the judge raise it.
    """
    wanted = [questions(request) for request in requests]
    prompts = list(dict.fromkeys(p for groups in wanted for group in groups.values() for p, _, _ in group))
    answers = dict(zip(prompts, write_answers(model, tokenizer, prompts, tokens, chat, progress), strict=True))
    per_request = []
    for groups in wanted:
        record: dict[str, float] = {}
        for name, group in groups.items():
            if group:
                told = [(normalised(answers[q.prompt]), list(map(normalised, q.answers))) for q in group]
                record[f"{name}_exact"] = together(name, [said in right for said, right in told])
                contained = [any(f" {one} " in f" {said} " for one in right) for said, right in told]
                record[f"{name}_contains"] = together(name, contained)
                if judge is not None:
                    judged = [judge(q.prompt, q.answers, answers[q.prompt]) for q in group]
                    record[f"{name}_judged"] = together(name, judged)
        per_request.append(record)
    names = named(per_request, ANSWER_SCORES, (*FOLLOWING_ANSWER_SCORES, *JUDGED_SCORES))
    return Evaluation.of(per_request, names), answers


def write_answers(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    tokens: int = ANSWER_TOKENS,
    chat: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> list[str]:
    """Greedy continuations to the end of text or line, ``tokens`` at most; prompts of similar length share a batch.

    Raises:
        ValueError: ``tokens`` is below 1, the tokenizer has no chat template, or a prompt leaves the model too few
            positions.
    """
    check_usable(model)
    check_tokenizer(tokenizer)
    if tokens < 1:
        raise ValueError(f"tokens: expected at least 1, got {tokens}")
    if chat and not tokenizer.chat_template:
        raise ValueError("chat: the tokenizer has no chat template; expected chat=False, or an instruction-tuned model")
    rows = [_chat_row(tokenizer, p) if chat else encode(tokenizer, p) for p in prompts]
    for row, prompt in zip(rows, prompts, strict=True):
        check_fits(model, row, prompt, tokens)
    by_length = sorted(range(len(rows)), key=lambda i: (len(rows[i].ids), i))
    ends = _line_ends(tokenizer, model)
    answers = [""] * len(rows)
    with frozen(model), torch.no_grad():
        for start in range(0, len(rows), _ROWS_PER_BATCH):
            batch = by_length[start : start + _ROWS_PER_BATCH]
            given = [rows[i].ids for i in batch]
            stop: Any = [lambda ids, scores, **_: ends.to(ids.device)[ids[:, -1]]]
            out = continue_rows(model, tokenizer, given, tokens, do_sample=False, stopping_criteria=stop)
            for i, row in zip(batch, out[:, max(map(len, given)) :], strict=True):
                answers[i] = tokenizer.decode(row, skip_special_tokens=True).partition("\n")[0].strip()
            if progress is not None:
                progress(start + len(batch), len(rows))
    return answers


def normalised(text: str) -> str:
    """Lower case without punctuation and articles, single blanks; punctuation and articles stay if all else is gone."""
    bare = re.sub(r"\b(a|an|the)\b", " ", text.lower().translate(_PUNCTUATION))
    return " ".join(bare.split()) or " ".join(text.lower().split())


def _chat_row(tokenizer: Any, prompt: str) -> Row:
    message = [{"role": "user", "content": prompt}]
    text = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    return Row(tuple(tokenizer(text, add_special_tokens=False)["input_ids"]))


def _line_ends(tokenizer: Any, model: Any) -> Tensor:
    """Mask of the tokens that contain a line end, bool ``[ids]``."""
    size = max(len(tokenizer), model.get_input_embeddings().weight.shape[0])
    texts = tokenizer.batch_decode([[i] for i in range(len(tokenizer))])
    return torch.tensor(["\n" in text for text in texts] + [False] * (size - len(texts)))
