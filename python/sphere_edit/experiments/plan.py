"""The plan of a run, ``sphere-edit run --dry-run``: work, time and room, estimated without writing anything."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sphere_edit.config import EditConfig
from sphere_edit.data.requests import EditRequest, batches
from sphere_edit.editing.editor import SphereEditor
from sphere_edit.evaluation.metrics import evaluate, perplexity
from sphere_edit.experiments.snapshots import sample
from sphere_edit.files import check_writable
from sphere_edit.methods import method_class
from sphere_edit.methods.covariance import covariances_to_measure
from sphere_edit.model.inference import frozen
from sphere_edit.model.loading import cache_dir
from sphere_edit.model.text import token_windows
from sphere_edit.model.tokens import encode, readable
from sphere_edit.runs import run_folder
from sphere_edit.runs.spec import RunOptions
from sphere_edit.targets.gradient import look_back
from sphere_edit.units import duration, size

_WINDOW = 256
_LONG = 0.5  # seconds; a longer probe is accepted
_MOST = 64  # most requests of a probe
_STATES = 3  # checkpoints on the disk while the newest is written


@dataclass(frozen=True)
class Plan:
    """The plan of a run.

    Attributes:
        rows: lines of the plan, by subject.
        problems: lacks of room for which the run would fail.
    """

    rows: dict[str, list[str]]
    problems: list[str]


def check_folder(path: Path, overwrite: bool) -> None:
    """Raise RunError if `run_folder.new_run` would refuse ``path``; nothing is made."""
    path = path.resolve()
    run_folder.check_new_run(path, overwrite)
    folder = _there(path)
    try:
        check_writable(folder)
    except OSError as error:
        raise run_folder.RunError(f"{path} cannot be written ({folder}: {error.strerror})") from error


def make_plan(editor: SphereEditor, requests: Sequence[EditRequest], options: RunOptions) -> Plan:
    """Plan a run of ``requests`` by a fresh editor that `check_run` has passed.

    Room on the disk and in memory follows from shapes. Times are measured on a few requests and extrapolated.
    """
    to_measure, tokens = _covariance(editor)
    scored = len(sample(requests, options.score_sample, ""))
    rows = {
        "model": [_model(editor, options)],
        "edits": [_edits(requests, editor.config)],
        "edited": [f"{m.name} [{', '.join(map(str, m.weight.shape))}]" for m in _maps(editor)],
        "method": [_method(editor.config)],
        "targets": [_targets(editor.config)],
        "first": list(_first(editor, to_measure, tokens)),
        "evaluated": list(_evaluated(requests, scored, options, editor.config)),
        "time": list(_times(editor, requests, options, scored, tokens if to_measure else 0)),
    }
    cached = sum(8 * editor.structure.edited[layer].weight.shape[1] ** 2 for layer in to_measure)
    problems: list[str] = []
    for what, parts, (where, free) in (
        ("disk", _disk(editor, requests, options), _free_disk(_there(options.out.resolve()))),
        ("cache", {"covariances": cached}, _free_disk(_there(cache_dir()))),
        ("memory", _memory(editor), _free_memory(editor.structure.device)),
    ):
        needed = sum(parts.values())
        if not needed:
            continue
        named = ", ".join(f"{name} {size(count)}" for name, count in parts.items() if count)
        rows[what] = [f"about {size(needed)}: {named}", f"free: {'unknown' if free is None else size(free)} {where}"]
        if free is not None and free < needed:
            problems.append(f"{what}: about {size(needed)} needed, {size(free)} free {where}")
    return Plan(rows, problems)


def _maps(editor: SphereEditor) -> list[Any]:
    return [editor.structure.edited[layer] for layer in editor.config.layers]


def _model(editor: SphereEditor, options: RunOptions) -> str:
    parameters = list(editor.model.parameters())
    weights, held = (sum(f(p) for p in parameters) for f in (torch.Tensor.numel, lambda p: p.nbytes))
    where = f"{str(editor.structure.dtype).removeprefix('torch.')} on {editor.structure.device}"
    return f"{options.model_name}: {type(editor.model).__name__}, {weights:,} weights, {size(held)}, {where}"


def _edits(requests: Sequence[EditRequest], config: EditConfig) -> str:
    parts = batches(requests, config.batch_size)
    last = f", the last of {len(parts[-1])}" if len(parts[-1]) < config.batch_size else ""
    return f"{len(requests)} in {len(parts)} {'batch' if len(parts) == 1 else 'batches'} of {config.batch_size}{last}"


def _method(config: EditConfig) -> str:
    sphere = f"SPHERE: α {config.alpha:g} within the directions of η {config.energy_ratio:g}, {config.subspace} weight"
    if config.directions == "tracked":
        sphere += ", tracked"
    revive = f"; REVIVE of {config.revive:g}" if config.revive else ""
    return f"{config.method}; {sphere if config.sphere else 'without SPHERE'}{revive}"


def _targets(config: EditConfig) -> str:
    if method_class(config).trains:
        if config.ft_minibatch:
            return f"none: at most {config.ft_steps} epochs a batch, {config.ft_minibatch} facts a training step"
        return f"none: at most {config.ft_steps} training steps a batch"
    return {
        "closed_loop": f"closed_loop: up to {config.loop_rounds} rounds; arithmetic: {config.loop_arithmetic}",
        "optimised": f"optimised: at most {config.value_steps} steps, {config.contexts + 1} prompts a fact",
        "gradient": "gradient: one pass a batch",
    }[config.targets]


def _covariance(editor: SphereEditor) -> tuple[list[int], int]:
    """Layers whose key covariance is not in the cache, and the number of tokens to measure with."""
    config = editor.config
    if method_class(config).trains:
        return [], 0
    layers = covariances_to_measure(
        editor.model, editor.tokenizer, editor.structure, config.layers, config, editor.covariance_cache
    )
    width = readable(editor.model, _WINDOW)
    windows = token_windows(editor.tokenizer, config.covariance_text, width, config.covariance_tokens)
    return layers, sum(map(len, windows)) if layers else 0


def _first(editor: SphereEditor, to_measure: Sequence[int], tokens: int) -> Iterator[str]:
    config = editor.config
    if config.contexts and not method_class(config).trains:
        yield f"{config.contexts} context prefixes of {config.context_length} tokens"
    if to_measure:
        layers = ", ".join(map(str, to_measure))
        yield f"covariance of keys of layers {layers}: {tokens:,} tokens of {config.covariance_text}"
    elif not method_class(config).trains:
        yield "covariances of keys are in the cache"
    if config.gradient_preheat:
        yield f"gradients of {config.gradient_preheat} other facts"
    if config.value_anchor:
        yield f"values of {config.value_anchor} other facts"


def _evaluations(edits: int, options: RunOptions, config: EditConfig) -> int:
    """Number of evaluations during the run."""
    count = -(-edits // config.batch_size)
    return -(-count // options.curve_every) if options.curve_every else 0


def _evaluated(requests: Sequence[EditRequest], scored: int, options: RunOptions, config: EditConfig) -> Iterator[str]:
    yield f"{scored} requests before and after" + (", with the model's own answers" if options.answers else "")
    if number := _evaluations(len(requests), options, config):
        groups = "of those so far, of the first and of the newest"
        own = f", with the model's own answers to {options.curve_answers}" if options.curve_answers else ""
        yield f"{number} times on the way: at most {options.curve_sample} {groups}{own}"
    if options.harness:
        when = "each time" if number and not options.harness_ends else "before and after"
        yield f"{', '.join(options.harness)} by lm-evaluation-harness {when}"


def _times(
    editor: SphereEditor, requests: Sequence[EditRequest], options: RunOptions, scored: int, tokens: int
) -> Iterator[str]:
    """Estimates from three probes: seconds per token, per scored request, and per pass forward and backward."""
    model, tokenizer, config = editor.model, editor.tokenizer, editor.config
    perplexity(model, tokenizer, options.perplexity_text, 2)
    start = time.perf_counter()
    perplexity(model, tokenizer, options.perplexity_text, _WINDOW)
    token = (time.perf_counter() - start) / _WINDOW

    def passes(chosen: Sequence[EditRequest]) -> None:
        rows = [encode(tokenizer, r.prompt, r.subject, r.target_new) for r in chosen]
        with frozen(model):
            look_back(model, editor.structure, rows, config.layers)

    once, count = _seconds_each(passes, requests)
    score, _ = _seconds_each(lambda chosen: evaluate(model, tokenizer, chosen), requests)
    on_the_way = _evaluations(len(requests), options, config)
    asked = 2 * scored + on_the_way * min(len(requests), 3 * options.curve_sample)
    if tokens:
        yield f"covariance: about {duration(token * tokens)}"
    least, most = _passes(config)
    if config.value_anchor:
        yield f"values of other facts: at most {duration(config.value_steps * once * config.value_anchor)}"
    between = " to ".join(duration(n * once * len(requests)) for n in sorted({least, most}))
    yield (
        f"edits: about {between}, {least if least == most else f'{least} to {most}'} passes a fact; solving, "
        "projecting and measuring come on top"
    )
    evaluated = score * asked + token * (2 + on_the_way) * options.perplexity_tokens
    skipped = {"the answers": options.answers or options.curve_answers, "the harness": options.harness}
    left = [name for name, asked in skipped.items() if asked]
    without = f", without {' and '.join(left)}" if left else ""
    yield f"evaluations: about {duration(evaluated)}{without}"
    timed = f"{1000 * once:.3g} ms a pass forward and backward, {1000 * score:.3g} ms a scored request"
    yield f"estimated from {count} of the facts, timed here: {timed}"


def _passes(config: EditConfig) -> tuple[int, int]:
    """Least and most forward and backward passes of a fact; the last pass of a closed loop is a check, forward only."""
    if method_class(config).trains:
        return 1, config.ft_steps
    prompts = config.contexts + 1
    ways = {"closed_loop": (2, config.loop_rounds + 1), "optimised": (prompts, prompts * config.value_steps)}
    return ways.get(config.targets, (1, 1))


def _seconds_each(
    action: Callable[[Sequence[EditRequest]], object], requests: Sequence[EditRequest]
) -> tuple[float, int]:
    """Seconds per request, and the number of requests timed: the sample grows until the time reaches `_LONG`."""
    count = 1
    action(sample(requests, count, "probe"))  # untimed: the first call sets things up
    while True:
        chosen = sample(requests, count, "probe")
        start = time.perf_counter()
        action(chosen)
        spent = time.perf_counter() - start
        if spent >= _LONG or len(chosen) >= min(len(requests), _MOST):
            return spent / len(chosen), len(chosen)
        count *= 4


def _disk(editor: SphereEditor, requests: Sequence[EditRequest], options: RunOptions) -> dict[str, int]:
    """Bytes of a run folder's larger files, from shapes; an upper bound for checkpoints."""
    config, maps = editor.config, _maps(editor)
    parts, solves = len(batches(requests, config.batch_size)), not method_class(config).trains
    gradient = solves and config.targets == "gradient"
    columns = len(requests) if solves else 0
    if gradient:
        columns = sum(len(encode(editor.tokenizer, r.text, None, r.target_new).target) for r in requests)
    kept = states = 0
    for n, d in (m.weight.shape for m in maps):
        update = parts * n * d if method_class(config).dense else columns * (n + d)
        kept += 4 * (columns * d + update + (columns * n if gradient else 0))
        states += max(4, editor.structure.dtype.itemsize) * (n * d + n * n)
        if config.method == "alphaedit" or config.history:  # keys in fp64, or one square matrix instead
            states += 8 * d * (columns if 4 * columns <= 3 * d else d)
        if gradient:
            states += 16 * (n + d) + (8 * n * n if config.gradient_whiten else 0)
    return {
        "batches": kept,
        "checkpoints": states * min(_STATES, parts // options.checkpoint_every),
        "deltas": sum(m.weight.nbytes for m in maps),
        "model": sum(p.nbytes for p in editor.model.parameters()) if options.save_model else 0,
    }


def _memory(editor: SphereEditor) -> dict[str, int]:
    """Bytes that editing needs besides the model; a lower bound without activations."""
    config, copies, covariances = editor.config, 0, 0
    for n, d in (m.weight.shape for m in _maps(editor)):
        copies += 4 * (3 * n * d + 2 * n * n)  # W before all edits; master and Gram matrix, now and before the batch
        covariances += 12 * d * d  # fp64, and the null space or the factor in fp32
    rounds = 0
    if config.loop_arithmetic == "bfloat16" and config.targets == "closed_loop":
        rounds = 2 * sum(p.numel() for p in editor.model.parameters())
    trains = method_class(config).trains
    return {"weights": copies, "covariances": 0 if trains else covariances, "bfloat16 copy": rounds}


def _there(path: Path) -> Path:
    """The innermost folder of a path that exists."""
    return next(folder for folder in (path, *path.parents) if folder.is_dir())


def _free_disk(folder: Path) -> tuple[str, int | None]:
    return f"at {folder}", shutil.disk_usage(folder).free


def _free_memory(device: torch.device) -> tuple[str, int | None]:
    if device.type == "cuda":
        return f"on {device}", torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return "on this machine", next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return "on this machine", None
