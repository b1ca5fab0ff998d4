"""The page of a run: one self-contained HTML file, made from the run folder alone.

Text of models and data files reaches the page only through `_printable` and jinja2's autoescape; no plot shows it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, UndefinedError
from markupsafe import Markup

from sphere_edit.data.reading import read_records
from sphere_edit.data.requests import EditRequest
from sphere_edit.evaluation.metrics import FOLLOWING, METRICS
from sphere_edit.events import Event
from sphere_edit.files import replacing
from sphere_edit.report.correlations import correlations
from sphere_edit.report.event_log import Log
from sphere_edit.report.plots import draw_plots
from sphere_edit.runs import run_folder

_SHOWN, _LONGEST = 50, 600
_PICTURES = {c: 0x2400 + c for c in range(0x20) if c not in (0x09, 0x0A)} | {0x7F: 0x2421}
_FORBIDDEN = {*range(0x80, 0xA0), *range(0xD800, 0xE000), *range(0xFDD0, 0xFDF0)}
_FORBIDDEN |= {plane | last for plane in range(0, 0x110000, 0x10000) for last in (0xFFFE, 0xFFFF)}
_UNPRINTABLE = dict.fromkeys(_FORBIDDEN, 0xFFFD) | _PICTURES
_JINJA: dict[str, Any] = {"undefined": StrictUndefined, "trim_blocks": True, "lstrip_blocks": True}


def write_report(run: Path) -> Path:
    """Make ``report.html`` of a run folder from config, events and requests; an unfinished run gives a partial page.

    The page is written whole or not at all. It loads nothing and runs no script. The same files give the same page.

    Returns:
        The path of the page.

    Raises:
        RunError: ``run`` is not a run folder, is of another version, or has no events.
        DataError: the requests are missing or damaged.
    """
    config, events = run_folder.read_config(run), run_folder.read_events(run)
    if not events:
        raise run_folder.RunError(f"{run / run_folder.METRICS} has no events; expected those of a run")
    requests = (EditRequest.from_dict(record.fields) for record in read_records(run / run_folder.REQUESTS))
    try:
        page = render(config, events, requests)
    except (KeyError, TypeError, AttributeError, UndefinedError) as error:
        raise run_folder.RunError(
            f"{run / run_folder.METRICS} has an event that is not as expected: {error!r}"
        ) from error
    with replacing(run / run_folder.REPORT) as path:
        path.write_text(page, encoding="utf-8", newline="\n")
    return run / run_folder.REPORT


def render(config: Mapping[str, Any], events: Sequence[Event], requests: Iterable[EditRequest]) -> str:
    """The page as text; a missing figure is a dash, and a part without figures is left out."""
    log = Log.of(events)
    environment = Environment(loader=PackageLoader(__package__), autoescape=True, finalize=_printable, **_JINJA)
    filters = (number, signed, percent, short, plain)
    environment.filters |= {function.__name__: function for function in filters}
    settings = config.get("settings") or {}
    layers = [{"layer": layer, **log.layer(layer)} for layer in log.energies]
    plots = draw_plots(log, settings.get("sphere", True))
    template = environment.get_template("report.html", globals={"metrics": METRICS, "following": FOLLOWING})
    return template.render(
        config=config,
        settings=settings,
        log=log,
        layers=layers,
        plots=plots,
        rows=list(islice(_scored(requests, log.of_kind("request")), _SHOWN)),
        bounds=log.bounds(),
        correlated=correlations([event for event in events if isinstance(event, dict)]),
    )


def _scored(requests: Iterable[EditRequest], events: Sequence[Event]) -> Iterator[tuple[EditRequest, Event | None]]:
    """Scored requests, each with an event; all requests, with None, as long as none is scored."""
    left = iter(events)
    event = next(left, None)
    for request in requests:
        if not events:
            yield request, None
        elif event is None:
            return
        elif event["id"] == request.id:
            yield request, event
            event = next(left, None)


def number(value: float | None, digits: int = 2) -> str:
    """A number grouped in thousands; a dash for None."""
    return "–" if value is None else f"{value:,.{digits}f}".replace(",", "\u202f").replace("-", "−")


def signed(value: float | None, digits: int = 2) -> str:
    return number(value, digits) if value is None or value < 0 else "+" + number(value, digits)


def percent(share: float | None, digits: int = 1) -> str:
    return "–" if share is None else number(100 * share, digits) + "\u00a0%"


def short(value: float | None) -> str:
    """A number to three digits, in scientific notation if very large or small."""
    return "–" if value is None else f"{value:.3g}".replace("-", "−")


def plain(value: Any) -> str:
    """A setting's value in the form that a user types."""
    if isinstance(value, (list, tuple)):
        return ", ".join(map(plain, value)) or "–"
    return "–" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _printable(value: Any) -> Any:
    """Text in HTML's characters (controls become control pictures, surrogates U+FFFD), cut if absurdly long."""
    if not isinstance(value, str) or isinstance(value, Markup):
        return value
    return (value if len(value) <= _LONGEST else value[:_LONGEST] + "…").translate(_UNPRINTABLE)
