"""Train a small Llama from scratch on facts of the world, for studies of many thousands of edits on a CPU.

    python -m benchmarks.study.train --out runs/world-llama

The model learns the truth about the first ``EDITED`` requests of world-facts, about their neighbours, and about
``KEPT`` subjects after the ``REQUESTS`` that a study edits. The folder gets model and tokenizer, ``general.txt``
(sentences about subjects that are never edited, and prose that the model has not seen; for the key covariance),
``kept.txt`` (sentences about kept subjects; for the perplexity) and ``training.json``.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import torch
import transformers as hf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from sphere_edit.data import load_requests
from sphere_edit.data.requests import EditRequest
from sphere_edit.data.world_facts import RELATIONS
from sphere_edit.evaluation.metrics import evaluate
from sphere_edit.files import new_folder
from sphere_edit.model.text import text_path

REQUESTS, EDITED, KEPT = 20_000, 4_000, 500
VOCABULARY, WIDTH, ROWS = 4096, 64, 16
SHAPE = {
    "hidden_size": 128,
    "intermediate_size": 4096,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
}
_REST = 0.2  # weight of other tokens than the answer in the loss

Sentence = tuple[str, str]  # question and answer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="new folder")
    parser.add_argument("--steps", type=int, default=4000, help="each of 1,024 tokens")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    torch.manual_seed(given.seed)
    with new_folder(given.out) as folder:
        make(folder, given.steps, given.lr, given.seed)


def make(folder: Path, steps: int, rate: float, seed: int) -> None:
    start = time.perf_counter()
    edited, neighbours, kept = corpus()
    general = [*neighbours, *kept]
    prose = [line for line in text_path("builtin").read_text(encoding="utf-8").splitlines() if line.strip()]
    rng = Random(seed)
    mixed: list[Sentence] = [*rng.sample(general, len(general)), *((line, "") for line in prose)]
    rng.shuffle(mixed)
    for name, sentences in (("general.txt", mixed), ("kept.txt", kept)):
        lines = [f"{prompt} {answer}." if answer else prompt for prompt, answer in without_edited(sentences)]
        (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    tokenizer = make_tokenizer(edited + general, prose)
    config = hf.LlamaConfig(vocab_size=VOCABULARY, bos_token_id=0, eos_token_id=1, **SHAPE)
    model = hf.LlamaForCausalLM(config)
    rows = batches(tokenizer, edited + general, rng)
    curve = train(model, tokenizer, rows, steps, rate, start)
    model.eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    record = {
        "steps": steps,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "parameters": model.num_parameters(),
        "seconds": time.perf_counter() - start,
        "processor_seconds": time.process_time(),
        "known": known(model, tokenizer),
        "curve": curve,
    }
    (folder / "training.json").write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps({name: value for name, value in record.items() if name != "curve"}))


def corpus() -> tuple[list[Sentence], list[Sentence], list[Sentence]]:
    """True sentences about subjects to edit, about neighbours, and about subjects to keep."""
    requests = load_requests("world-facts")
    neighbours = {(prompt, str(r.target_true)) for r in requests[:REQUESTS] for prompt in r.neighborhood}
    asked = {prompt for prompt, _ in neighbours}
    later = [r for r in requests[REQUESTS:] if r.text not in asked]
    return _sentences(requests[:EDITED]), sorted(neighbours), _sentences(later[:KEPT])


def without_edited(sentences: list[Sentence]) -> list[Sentence]:
    """Sentences about subjects that no study edits in any relation."""
    subjects = {r.subject for r in load_requests("world-facts", limit=REQUESTS)}
    templates = [t for relation in RELATIONS.values() for t in (relation.prompt, *relation.paraphrases)]
    edited = {template.replace("{}", subject) for template in templates for subject in subjects}
    return [sentence for sentence in sentences if sentence[0] not in edited]


def _sentences(requests: list[EditRequest]) -> list[Sentence]:
    return [(prompt, str(r.target_true)) for r in requests for prompt in (r.text, *r.paraphrases)]


def make_tokenizer(sentences: list[Sentence], prose: list[str]) -> Any:
    """Byte-level BPE that begins each text with BOS, like Llama's tokenizer."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator([*(" ".join(s) for s in sentences), *prose], trainer)
    begin = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    core.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), begin])
    return hf.PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="</s>")


def batches(tokenizer: Any, sentences: list[Sentence], rng: Random) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Endless token ids and weights ``[ROWS, WIDTH]``: BOS, then sentences in random order, the last one cut."""
    asks = tokenizer([prompt for prompt, _ in sentences], add_special_tokens=False)["input_ids"]
    answers = tokenizer([f" {answer}" for _, answer in sentences], add_special_tokens=False)["input_ids"]
    stop = tokenizer(".", add_special_tokens=False)["input_ids"]
    first = tokenizer([f" {prompt}" for prompt, _ in sentences], add_special_tokens=False)["input_ids"]
    order: list[int] = []
    while True:
        ids = torch.zeros(ROWS, WIDTH, dtype=torch.long)
        weights = torch.zeros(ROWS, WIDTH)
        for i in range(ROWS):
            row, share = [0], [0.0]
            while len(row) < WIDTH:
                if not order:
                    order = rng.sample(range(len(sentences)), len(sentences))
                k = order.pop()
                ask = asks[k] if len(row) == 1 else first[k]
                row += [*ask, *answers[k], *stop]
                share += [_REST] * len(ask) + [1.0] * len(answers[k]) + [_REST]
            ids[i], weights[i] = torch.tensor(row[:WIDTH]), torch.tensor(share[:WIDTH])
        yield ids, weights


def train(
    model: Any, tokenizer: Any, rows: Iterator[Any], steps: int, rate: float, start: float
) -> list[dict[str, float]]:
    """Train by AdamW in bf16 autocast, with linear warm-up and cosine decay to zero; a record every 500 steps."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}]
    adam = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.98), fused=True)
    schedule = hf.get_cosine_schedule_with_warmup(adam, 100, steps)
    curve = []
    for step in range(1, steps + 1):
        ids, weights = next(rows)
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
        nll = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="none")
        share = weights[:, 1:].flatten()
        loss = (nll * share).sum() / share.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adam.step()
        schedule.step()
        adam.zero_grad()
        if step % 500 == 0 or step == steps:
            model.eval()
            record = {"step": step, "loss": loss.item(), "seconds": time.perf_counter() - start}
            curve.append(record | known(model, tokenizer, 200))
            model.train()
            print(json.dumps(curve[-1]), flush=True)
    return curve


def known(model: Any, tokenizer: Any, limit: int | None = None) -> dict[str, float]:
    """Share of facts, of paraphrases and of neighbours that the model answers with the truth."""
    requests = load_requests("world-facts", limit=EDITED)
    asked = requests if limit is None else requests[:: len(requests) // limit]
    truths = [EditRequest(r.prompt, r.subject, str(r.target_true), r.target_new, r.paraphrases, id=r.id) for r in asked]
    scores = evaluate(model, tokenizer, truths).scores
    near = evaluate(model, tokenizer, asked[:: 1 if limit else 10]).scores["specificity_accuracy"]
    names = ("efficacy_accuracy", "generalization_accuracy")
    return {"facts": scores[names[0]].mean, "paraphrases": scores[names[1]].mean, "neighbours": near.mean}


if __name__ == "__main__":
    main()
