"""What a run does besides editing: its options, each declared once, and how ``config.yaml`` records them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import Field, dataclass, field, fields
from pathlib import Path
from typing import Any

from sphere_edit.evaluation.metrics import PERPLEXITY_TOKENS


def _option(default: Any, doc: str, **more: Any) -> Any:
    """A field of `RunOptions` with what is said of it.

    Args:
        more: ``flags`` of the command line, where its option is not named like the field; ``least``, of a count;
            ``earlier``, what runs of versions without the field did, where that is not the default.
    """
    return field(default=default, metadata={"doc": doc, **more})


@dataclass(frozen=True)
class RunOptions:
    """What a run does besides editing; each option says what it does in its ``metadata["doc"]``.

    Args:
        model_name, data_name: as the user gave them; for the record.
        out: the run folder.
        perplexity_tokens: see `sphere_edit.evaluation.metrics.perplexity`.
        given: how model and data were read, for those who go on with the run.
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
        """The options as ``config.yaml`` has them."""
        found = {one.name: getattr(self, one.name) for one in declared() if one.name != "overwrite"}
        return found | {"harness": list(self.harness), "perplexity_tokens_at_most": self.perplexity_tokens}


def declared() -> list[Field[Any]]:
    """The fields of `RunOptions` that a user chooses."""
    return [one for one in fields(RunOptions) if "doc" in one.metadata]


def check_counts(options: RunOptions) -> None:
    """Raise ValueError unless every count can be."""
    for one in declared():
        value, least = getattr(options, one.name), one.metadata.get("least")
        if least is None or (value is None and one.default is None):
            continue
        if value is None or value < least:
            raise ValueError(f"{one.name}: expected a whole number of at least {least}, got {value}")


def recorded_options(recorded: Mapping[str, Any]) -> dict[str, Any]:
    """The options other than settings that a run was begun with, from its ``config.yaml``."""
    own = {one.name: recorded.get(one.name, one.metadata.get("earlier", one.default)) for one in declared()}
    own["harness"] = ",".join(own["harness"] or ()) or None
    own |= {"overwrite": recorded["replaces"] is not None, "device": recorded["device"]}
    own |= {"threads": recorded["environment"]["threads"]}
    own |= {"on_conflict": recorded["given"].get("on_conflict", "refuse")}  # as earlier runs and those from Python
    return own | {name: recorded["given"].get(name) for name in ("limit", "order", "preset", "dtype")}
