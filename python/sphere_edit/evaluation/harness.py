"""General ability of a model, by lm-evaluation-harness, on local files of BoolQ, RTE, Natural Questions and GSM8K.

The installed lm-eval defines prompts, metrics and numbers of shots. The records come from local files, so nothing is
fetched. The file of GSM8K has no training part; its five worked examples are drawn from the same file, never the
record asked, and the draw is seeded.
"""

from __future__ import annotations

import copy
import csv
import gzip
import importlib.util
import logging
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sphere_edit.config import ConfigError
from sphere_edit.data.reading import DataError, Fields, Record, read_records
from sphere_edit.model.inference import frozen
from sphere_edit.model.structure import check_usable
from sphere_kernels import env

Records = list[dict[str, Any]]
_SEED = 1234  # lm-eval's default seed for drawing examples


def _boolq(fields: Fields) -> dict[str, Any]:
    """A BoolQ record as in SuperGLUE: the passage begins with the page's title."""
    passage = f"{fields.text('title')} -- {fields.text('passage')}"
    return {"passage": passage, "question": fields.text("question"), "label": int(fields.truth("answer"))}


def _rte(fields: Fields) -> dict[str, Any]:
    label, labels = fields.text("label"), ["entailment", "not_entailment"]
    if label not in labels:
        raise DataError(f"{fields.where}: field 'label' must be one of {', '.join(labels)}, got {label!r}")
    texts = {name: fields.text(name) for name in ("sentence1", "sentence2")}
    return {**texts, "label": labels.index(label)}


def _nq(fields: Fields) -> dict[str, Any]:
    """A question without question mark; the prompt template adds one."""
    answers = list(fields.texts("answer", required=True))
    if not answers:
        raise DataError(f"{fields.where}: field 'answer' is empty; expected at least one text")
    return {"question": fields.text("question").removesuffix("?"), "answer": answers}


def _gsm8k(fields: Fields) -> dict[str, Any]:
    answer = fields.text("answer")
    if "#### " not in answer:
        raise DataError(f"{fields.where}: field 'answer' must end in '#### ' and a number, got {answer[-60:]!r}")
    return {"question": fields.text("question"), "answer": answer}


@dataclass(frozen=True)
class _Source:
    """A task: file of records, parser from a record to the template's fields, and lm-eval's definition."""

    file: str
    parse: Callable[[Fields], dict[str, Any]]
    definition: str
    shots: int = 0


TASKS = {
    "boolq": _Source("sphere_test-ClosedDomainQA.jsonl.gz", _boolq, "super_glue/boolq/default.yaml"),
    "rte": _Source("sphere_test-NLI.tsv.gz", _rte, "glue/rte/default.yaml"),
    "nq": _Source("sphere_test-OpenDomainQA.jsonl.gz", _nq, "nq_open/nq_open.yaml"),
    "gsm8k": _Source("sphere_test-reasoning.jsonl.gz", _gsm8k, "gsm8k/gsm8k.yaml", shots=5),
}


def general_ability(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[str] = tuple(TASKS),
    data: str | Path | None = None,
    limit: int | None = None,
    shots: int | None = None,
    batch_size: int = 8,
) -> dict[str, dict[str, dict[str, float | int | None]]]:
    """Score a model on tasks of lm-evaluation-harness; model, tokenizer and all random states stay unchanged.

    BoolQ and RTE take the likelier of two answers (``acc``, 0 shots). Natural Questions compares the greedy answer
    with the known ones and ignores case, articles and punctuation (``exact_match``, 0 shots). GSM8K compares the number
    after ``####`` (``exact_match_strict``) and the last number of the answer (``exact_match_flexible``; 5 shots).
    Prompts are plain text, without a chat template. A prompt too long for the model loses its beginning, and lm-eval
    logs this.

    Args:
        model: causal LM; run in evaluation mode.
        tokenizer: the model's; adds BOS or not, as for any text.
        tasks: some of ``boolq``, ``rte``, ``nq``, ``gsm8k``.
        data: folder with the files named in ``TASKS``; ``SPHERE_EDIT_DATA`` by default.
        limit: score only so many records of each task, the first ones.
        shots: worked examples before each question; by default the task's own number.
        batch_size: prompts per batch.

    Returns:
        {task: {metric: {"mean", "stderr", "n"}}}; ``stderr`` of the mean is None for one record.

    Raises:
        ConfigError, DataError, StructureError: an argument, a file or the model does not fit, or lm-eval is not
            installed; raised before anything is computed.
    """
    records = read_tasks(tasks, data, limit, shots, batch_size)
    end, kind = tokenizer.eos_token_id, type(tokenizer).__name__
    if end is None:
        raise ConfigError(f"tokenizer {kind} has no EOS token; expected one, it ends an answer")
    if tokenizer("a")["input_ids"][-1] == end:
        raise ConfigError(f"tokenizer {kind} ends every text with EOS; expected one that leaves a prompt open")
    check_usable(model)
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM

    with frozen(model):
        with _no_warnings():
            asked = {name: _task(name, records[name], shots) for name in tasks}
            lm = HFLM(pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=batch_size)
        found = evaluate(lm, {"tasks": asked}, limit=limit, log_samples=False)
    return {name: _scores(found["results"][name], found["n-samples"][name]["effective"]) for name in tasks}


def ability_scores(
    model: Any, tokenizer: Any, tasks: Sequence[str], data: str | Path | None = None, limit: int | None = None
) -> dict[str, dict[str, float | int | None]]:
    """`general_ability` with one flat name per score: ``{"boolq acc": {"mean", "stderr", "n"}}``."""
    found = general_ability(model, tokenizer, tasks, data, limit)
    return {f"{task} {metric}": score for task, scores in found.items() for metric, score in scores.items()}


def task_files(tasks: Sequence[str], data: str | Path | None = None) -> dict[str, Path]:
    """Paths of the tasks' records; raises ConfigError without a data folder."""
    folder = env.edit_data() if data is None else Path(data)
    if folder is None:
        raise ConfigError(f"no data folder; name the one that has {TASKS[tasks[0]].file}, or set SPHERE_EDIT_DATA")
    return {name: folder / TASKS[name].file for name in tasks}


def read_tasks(
    tasks: Sequence[str],
    data: str | Path | None = None,
    limit: int | None = None,
    shots: int | None = None,
    batch_size: int = 1,
) -> dict[str, Records]:
    """Read all records of the tasks, and check every other argument of `general_ability` but the model."""
    if unknown := [name for name in tasks if name not in TASKS]:
        raise ConfigError(f"task {unknown[0]!r} is not known; expected some of {', '.join(TASKS)}")
    if not tasks or len(set(tasks)) < len(tasks):
        raise ConfigError(f"tasks: expected some of {', '.join(TASKS)}, each once, got {list(tasks)}")
    for name, value, least in (("limit", limit, 1), ("shots", shots, 0), ("batch_size", batch_size, 1)):
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < least):
            raise ConfigError(f"{name}: expected a whole number of at least {least}, got {value!r}")
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError("the package lm-eval is not installed; pip install 'sphere-kernels[harness]'")
    return {name: _read(path, TASKS[name], shots) for name, path in task_files(tasks, data).items()}


def _read(path: Path, source: _Source, shots: int | None) -> Records:
    rows = _tsv(path) if ".tsv" in path.suffixes else read_records(path)
    records = [source.parse(Fields(*row)) for row in rows]
    needed = 1 + (source.shots if shots is None else shots)
    if len(records) < needed:
        raise DataError(f"{path}: {len(records)} records; expected at least {needed}, one asked and {needed - 1} shots")
    return records


def _tsv(path: Path) -> Iterator[Record]:
    """Rows of a gzip TSV with a head line; quotation marks are plain characters."""
    try:
        with gzip.open(path, "rt", encoding="utf-8", newline="") as file:
            for number, row in enumerate(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE), 2):
                yield Record(f"{path}, line {number}", row)
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file") from error
    except (OSError, EOFError, zlib.error, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: cannot be read ({error})") from error


def _task(name: str, records: Records, shots: int | None) -> Any:
    """lm-eval's task with the local records as the test split."""
    import lm_eval
    import yaml
    from datasets import Dataset
    from lm_eval.api.task import ConfigurableTask

    source, split = TASKS[name], {"test": Dataset.from_list(records)}
    definition = Path(lm_eval.__file__).parent / "tasks" / source.definition
    config = {key: value for key, value in yaml.safe_load(definition.read_text()).items() if key != "tag"}
    config |= {
        "task": name,
        "custom_dataset": lambda **_: split,
        "num_fewshot": source.shots if shots is None else shots,
    }
    config |= {"training_split": None, "validation_split": None, "test_split": "test", "fewshot_split": "test"}
    task = ConfigurableTask(config=config)
    task.set_fewshot_seed(_SEED)
    return task


_FILTERS = {"none": "", "remove_whitespace": "", "strict-match": "_strict", "flexible-extract": "_flexible"}


def _scores(found: dict[str, Any], n: int) -> dict[str, dict[str, float | int | None]]:
    scores = {}
    for key, value in found.items():
        metric, comma, chosen = key.partition(",")
        if comma and not metric.endswith("_stderr"):
            stderr = found[f"{metric}_stderr,{chosen}"]
            scores[metric + _FILTERS[chosen]] = {
                "mean": float(value),
                "stderr": None if stderr == "N/A" else float(stderr),
                "n": n,
            }
    return scores


@contextmanager
def _no_warnings() -> Iterator[None]:
    """Silence lm-eval's warnings of a model loaded already and of a task with given records; both are intended."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
