"""The options of a run besides the settings of the edits: each declared once, and recorded in ``config.yaml``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import Field, dataclass, field, fields
from pathlib import Path
from typing import Any

from sphere_edit.evaluation.metrics import PERPLEXITY_TOKENS


def _option(default: Any, doc: str, **more: Any) -> Any:
    """A field of `RunOptions` with the description ``doc``.

    Args:
        more: ``flags`` of the command line, unless they follow from the field's name; ``least`` value of a count;
            ``earlier``: the value for runs of versions without the field, unless it is the default; ``metavar``.
    """
    return field(default=default, metadata={"doc": doc, **more})


@dataclass(frozen=True)
class RunOptions:
    """Options of a run besides the settings; ``metadata["doc"]`` of each field describes the option.

    Args:
        model_name, data_name: the user's names for model and data; for the record.
        out: the run folder.
        perplexity_tokens: see `sphere_edit.evaluation.metrics.perplexity`.
        given: how model and data were read; a resume reads them in the same way.
    """

    model_name: str
    data_name: str
    out: Path
    perplexity_text: str = _option("heldout", "Text of the perplexity: heldout, or a file.")
    perplexity_tokens: int = PERPLEXITY_TOKENS
    checkpoint_every: int = _option(
        10,
        "Batches between two copies of the whole state, of which two are kept; a stopped run goes on from them.",
        least=1,
    )
    save_model: bool = _option(False, "Also write the edited model to OUT/model.", flags=("--save-model",))
    overwrite: bool = _option(False, "Replace an earlier run at OUT when done.", flags=("--overwrite",))
    curve_every: int = _option(
        0, "Batches between two evaluations on the way, of the report's curves; 0 for none.", least=0
    )
    curve_sample: int = _option(
        200,
        "Requests scored there at most: of those so far, the first, and the newest each.",
        least=1,
        earlier=None,
    )
    curve_answers: int = _option(
        0, "Requests of each of these that the model also answers by itself (see --answers).", least=0
    )
    score_sample: int | None = _option(
        None, "Requests scored before and after, drawn at random; by default all.", least=1
    )
    answers: bool = _option(
        False, "Also let it answer their prompts by itself: exact, and contains.", flags=("--answers",)
    )
    judge: str | None = _option(
        None,
        "With --answers: an OpenAI-compatible endpoint, e.g. http://localhost:8000/v1, that is asked whether each "
        "answer is right.",
        metavar="URL",
    )
    judge_model: str | None = _option(None, "Its model's name there.", metavar="NAME")
    harness: tuple[str, ...] = _option(
        (),
        "Tasks of general ability, some of boolq, rte, nq, gsm8k; scored before, after and with --curve-every.",
    )
    harness_data: str | None = _option(None, "Folder of their files; SPHERE_EDIT_DATA by default.")
    harness_limit: int | None = _option(None, "The first N records of each task only.", least=1)
    harness_ends: bool = _option(False, "Score them before and after only.", flags=("--harness-ends",))
    given: dict[str, Any] = field(default_factory=dict)

    def recorded(self) -> dict[str, Any]:
        """The options in the form of ``config.yaml``."""
        found = {one.name: getattr(self, one.name) for one in declared() if one.name != "overwrite"}
        return found | {"harness": list(self.harness), "perplexity_tokens_at_most": self.perplexity_tokens}


def declared() -> list[Field[Any]]:
    """The fields of `RunOptions` that a user chooses."""
    return [one for one in fields(RunOptions) if "doc" in one.metadata]


def check_counts(options: RunOptions) -> None:
    """Raise ValueError if a count is below the least value."""
    for one in declared():
        value, least = getattr(options, one.name), one.metadata.get("least")
        if least is None or (value is None and one.default is None):
            continue
        if value is None or value < least:
            raise ValueError(f"{one.name}: expected a whole number of at least {least}, got {value}")


def recorded_options(recorded: Mapping[str, Any]) -> dict[str, Any]:
    """The options, without settings, that a run began with; read from ``config.yaml``."""
    own = {one.name: recorded.get(one.name, one.metadata.get("earlier", one.default)) for one in declared()}
    own["harness"] = ",".join(own["harness"] or ()) or None
    own |= {"overwrite": recorded["replaces"] is not None, "device": recorded["device"]}
    own |= {"threads": recorded["environment"]["threads"]}
    own |= {"on_conflict": recorded["given"].get("on_conflict", "refuse")}  # earlier runs and runs from Python
    return own | {name: recorded["given"].get(name) for name in ("limit", "order", "preset", "dtype")}
