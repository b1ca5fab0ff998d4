"""Settings: what cannot be is refused with its name, and what can survives the way through YAML."""

from __future__ import annotations

import copy
import json
import pickle
import re

import pytest
import yaml

from sphere_edit.cli.options import check_same, settings
from sphere_edit.config import ConfigError, EditConfig, declarations, unused_settings
from sphere_edit.methods import METHODS
from sphere_edit.settings import read_yaml
from sphere_edit.targets.presets import PRESETS, auto_layers, preset

_NAN, _INF = float("nan"), float("inf")
_BAD = {
    "layers": [3, None, "12", (1.0,), (True,), [[1]]],
    "method": ["", 3, None],
    "null_space": [1, "yes", None],
    "sphere": [0, "true"],
    "energy_ratio": [-0.1, 1.1, _NAN, "0.5", True, None],
    "alpha": [-1e-9, 1.0001, _NAN, _INF, True],
    "subspace": ["past", None, 1],
    "refresh_every": [0, -1, 1.0, True],
    "directions": ["near", None, True],
    "project": ["all", None, True],
    "revive": [-0.1, 1, _NAN, True],
    "batch_size": [0, -1, 2.5, "100", True],
    "value_steps": [0, 1.5],
    "value_lr": [0, -1, _NAN, _INF],
    "value_weight_decay": [-1, _NAN, "0"],
    "value_kl": [-1e-3, _INF],
    "value_clamp": [0, -4, _NAN],
    "value_beta1": [-0.1, 1, 1.5, _NAN, True],
    "value_beta2": [-0.1, 1.0, None],
    "value_stop": [-1, _NAN],
    "value_stop_on": ["kl", None],
    "value_anchor": [-1, 0.5, True],
    "gradient_lr": [0, -1, _NAN, "1"],
    "gradient_whiten": [1, None],
    "gradient_preheat": [-1, 0.5, True],
    "null_space_threshold": [0, -1, _INF],
    "ridge": [0, -10, _NAN],
    "covariance_weight": [0, -10, _NAN],
    "history": [1, "yes", None],
    "rect_share": [-0.1, 1.1, _NAN, True],
    "prune_in": ["copy", None, 1],
    "modules": ["attention", None],
    "targets": ["closed", None],
    "loop_rounds": [0, 1.5],
    "loop_step": [0, _NAN, _INF],
    "loop_reach": [0, -1],
    "loop_momentum": [-0.1, 1.1],
    "loop_stop": [0, _NAN],
    "loop_kl": [-1, _INF],
    "loop_arithmetic": ["float16", None],
    "ft_steps": [0, 1.5],
    "ft_lr": [0, -1, _NAN, _INF],
    "ft_stop": [-1, _NAN],
    "ft_minibatch": [-1, 0.5, True],
    "ft_eos": [1, None],
    "contexts": [-1, 1.5, True],
    "context_length": [0, None],
    "covariance_text": ["", None, 5],
    "covariance_tokens": [0, 1e5],
    "energy_s": [-1, _NAN, _INF],
    "guard": ["loud", None, True],
    "measure_every": [-1, 0.5, True, None],
    "seed": [-1, 0.5, None],
}


@pytest.mark.parametrize(("name", "value"), [(n, v) for n, values in _BAD.items() for v in values], ids=str)
def test_refused(name, value):
    with pytest.raises(ConfigError, match=rf"^{name}: expected .*, got "):
        EditConfig(**{name: value})
    with pytest.raises(ConfigError, match=rf"^{name}: "):
        EditConfig().replace(**{name: value})


def test_settings_stay_as_they_are():
    config = EditConfig(ridge=2.0)
    with pytest.raises(AttributeError, match=r"settings are immutable; expected config.replace\(ridge=1\)"):
        config.ridge = 1
    with pytest.raises(AttributeError, match=r"settings are immutable; .* not del ridge"):
        del config.ridge
    for made in (copy.deepcopy(config), pickle.loads(pickle.dumps(config)), eval(repr(config))):
        assert made == config and hash(made) == hash(config) and made.ridge == 2.0


@pytest.mark.parametrize("name", ["method", "targets"])
@pytest.mark.parametrize("value", [["memit"], {"a": 1}], ids=["list", "mapping"])
def test_names_that_are_no_texts(name, value, tmp_path):
    (tmp_path / "given.yaml").write_text(yaml.safe_dump({"settings": {name: value}}))
    message = re.escape(f"{name}: expected a text, got {value!r}")
    for given in ((tmp_path / "given.yaml", []), (None, [f"{name}={json.dumps(value)}"])):
        with pytest.raises(ConfigError, match=message):
            settings("auto", *given, {})
    with pytest.raises(ConfigError, match=message):
        EditConfig.from_run({name: value})


def test_every_setting_is_checked():
    assert set(_BAD) == set(declarations())


@pytest.mark.parametrize(
    "values",
    [
        {"alpha": 0},
        {"alpha": 1},
        {"energy_ratio": 1},
        {"energy_s": 0},
        {"contexts": 0},
        {"targets": "optimised", "value_stop": 0},
    ],
    ids=str,
)
def test_edges_are_accepted(values):
    assert all(getattr(EditConfig(**values), name) == value for name, value in values.items())


@pytest.mark.parametrize("name", PRESETS)
def test_presets_survive_yaml(name):
    config = preset(name).replace(alpha=0.25, seed=7)
    assert EditConfig.from_dict(yaml.safe_load(yaml.safe_dump(config.to_dict()))) == config
    assert preset(name) == PRESETS[name] != config


def test_unknown_names():
    with pytest.raises(ConfigError, match="unknown setting 'alhpa'; known settings are .*'alpha'"):
        EditConfig.from_dict({"alhpa": 0.5})
    with pytest.raises(ConfigError, match="preset 'llama' is not known; expected one of auto, llama3-8b"):
        preset("llama")


@pytest.mark.parametrize(
    ("depth", "layers"),
    [(32, (4, 5, 6, 7, 8)), (28, (3, 4, 5, 6, 7)), (5, (0, 1, 2, 3)), (2, (0,)), (1, ()), (8, (1, 2, 3, 4, 5))],
)
def test_automatic_layers(depth, layers):
    assert auto_layers(depth) == layers


_ELSEWHERE = [
    ("rome", "history", True, "memit, rect, prune"),
    ("alphaedit", "covariance_weight", 3.0, "memit, rect, prune"),
    ("memit", "ridge", 3.0, "alphaedit, ridge"),
    ("memit", "null_space", False, "alphaedit, ridge"),
    ("rect", "prune_in", "copies", "prune"),
    ("prune", "rect_share", 0.2, "rect"),
    ("rome", "ft_lr", 0.1, "ft"),
    ("memit", "ft_eos", True, "ft"),
    ("ft", "project", "batch", "alphaedit, memit, rect, prune, rome, ridge"),
]


@pytest.mark.parametrize(("method", "name", "value", "users"), _ELSEWHERE, ids=lambda value: str(value))
def test_settings_of_another_method_are_refused(method, name, value, users):
    message = rf"^{name}: {method} has no use for it, only {users}; expected .* \(the default\), got {value!r}"
    for call in (
        lambda: EditConfig(method=method, **{name: value}),
        lambda: EditConfig(method=method).replace(**{name: value}),
        lambda: EditConfig().replace(method=method, **{name: value}),
        lambda: settings("auto", None, [f"{name}={json.dumps(value)}"], {"method": method}),
    ):
        with pytest.raises(ConfigError, match=message):
            call()
    optimised = {"targets": "optimised"} if name == "project" else {}
    user = EditConfig(method=users.split(", ")[0], **{name: value}, **optimised)
    assert getattr(user, name) == value
    default = getattr(EditConfig(), name)
    assert getattr(user.replace(method=method), name) == default  # what it has no use for is not carried over
    assert getattr(EditConfig(method=method, **{name: default}), name) == default
    assert getattr(EditConfig(method="mine.own:Method", **{name: value}, **optimised), name) == value


_FOR_OTHERS = [
    ("closed_loop", "value_lr", 0.1, "optimised"),
    ("closed_loop", "value_anchor", 9, "optimised"),
    ("optimised", "loop_step", 0.1, "closed_loop"),
    ("optimised", "loop_arithmetic", "model", "closed_loop"),
]


@pytest.mark.parametrize(("targets", "name", "value", "users"), _FOR_OTHERS, ids=str)
def test_settings_of_other_targets_are_refused(targets, name, value, users):
    message = (
        rf"^{name}: only {users} targets have a use for it, not {targets}; expected .* \(the default\), got {value!r}"
    )
    for call in (
        lambda: EditConfig(targets=targets, **{name: value}),
        lambda: EditConfig().replace(targets=targets, **{name: value}),
        lambda: settings("auto", None, [f"{name}={json.dumps(value)}"], {"targets": targets}),
    ):
        with pytest.raises(ConfigError, match=message):
            call()
    user = EditConfig(targets=users, **{name: value})
    assert getattr(user.replace(targets=targets), name) == getattr(EditConfig(), name)
    with pytest.raises(ConfigError, match=rf"^{name}: only {users} targets have a use for it, not ft"):
        EditConfig(method="ft", **{name: value})


def test_what_closed_loop_targets_do_not_go_with():
    with pytest.raises(
        ConfigError, match="project: closed_loop targets solve for all layers at once; expected 'layer'"
    ):
        EditConfig(project="batch")
    with pytest.raises(ConfigError, match="modules: optimised values are outputs of the down-projection; expected"):
        EditConfig(targets="optimised", modules="up")


@pytest.mark.parametrize("project", ("batch", "solve"))
def test_copies_of_a_loop_that_projects(project):
    with pytest.raises(ConfigError, match="project: expected 'layer' where prune_in is 'copies'"):
        EditConfig(targets="optimised", method="prune", prune_in="copies", project=project)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ("auto", "llama3-8b", "gpt2-xl", "smollm2-135m"))
def test_every_preset_fits_every_method(name, method):
    found = preset(name, method)
    assert found == EditConfig.from_dict(found.to_dict())
    assert set(unused_settings(method, found.targets)) < set(declarations())


def test_the_settings_of_an_earlier_run_are_read(tmp_path):
    """From before `project` and `prune_in`, and before what a method does not use was refused."""
    earlier = EditConfig(method="memit", history=True, alpha=0.3).to_dict() | {"ridge": 3.0, "ft_steps": 2}
    del earlier["project"], earlier["prune_in"], earlier["targets"]
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump({"model": "tiny", "settings": earlier}))
    as_it_was = EditConfig(targets="optimised", method="memit", history=True, alpha=0.3)
    assert EditConfig.from_run(earlier) == as_it_was
    assert settings("auto", file, [], {}) == as_it_was
    other = settings("auto", file, [], {"method": "alphaedit"})
    assert other == EditConfig(targets="optimised", alpha=0.3, ridge=3.0)
    with pytest.raises(ConfigError, match="ridge: memit has no use for it"):
        settings("auto", file, ["ridge=3"], {})
    file.write_text(yaml.safe_dump(earlier))  # as one writes it oneself
    with pytest.raises(ConfigError, match="memit has no use for it"):
        settings("auto", file, [], {})


def test_a_run_of_an_earlier_version_goes_on_with_the_targets_it_had():
    earlier = EditConfig(targets="optimised").to_dict()
    del earlier["targets"]
    recorded = {"settings": earlier, "given": {}, "environment": {"threads": 1}, "replaces": None, "device": "cpu"}
    recorded |= {"perplexity_text": "heldout", "save_model": False, "checkpoint_every": 10}
    check_same({}, {"targets": "optimised"}, recorded)
    with pytest.raises(ConfigError, match="targets: the run was begun with 'optimised', got 'closed_loop'"):
        check_same({}, {"targets": "closed_loop"}, recorded)
    check_same({"on_conflict": "refuse"}, {}, recorded)
    with pytest.raises(ConfigError, match="on_conflict: the run was begun with 'refuse', got 'skip'"):
        check_same({"on_conflict": "skip"}, {}, recorded)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("alpha: 0.7\nseed: 010\n", "line 2: 010 would be read as 8, base 8; expected a plain number, or quotes"),
        ("seed: -0_17", "line 1: -0_17 would be read as -15, base 8"),
        ("\nlayers: [1,\n  1:30]", "line 3: 1:30 would be read as 90, base 60"),
        ("alpha: 1:30.5", "line 1: 1:30.5 would be read as 90.5, base 60"),
        ("alpha: 0.7\nseed: 1\n'alpha': 0.8", "line 3: 'alpha' is given twice; first in line 1"),
        ("settings:\n  seed: 1\n  seed: 1\n", "line 3: 'seed' is given twice; first in line 2"),
        ("a: &a {seed: 1}\nb: {<<: *a, seed: 2, seed: 3}", "line 2: 'seed' is given twice; first in line 2"),
    ],
)
def test_yaml_that_is_read_otherwise_than_it_looks(text, message, tmp_path):
    file = tmp_path / "settings.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=re.escape(f"settings.yaml, {message}")):
        settings("auto", file, [], {})


def test_yaml_that_is_read_as_it_looks():
    text = "{a: 0, b: 10, c: 0x1F, d: '010', e: 1e-3, f: 08.5, g: 1_000, h: 0.5, i: '1:30', j: '1', 1: k, l: [0, 0]}"
    found = {"a": 0, "b": 10, "c": 31, "d": "010", "e": 1e-3, "f": 8.5, "g": 1000, "h": 0.5, "i": "1:30", "j": "1"}
    assert read_yaml(text, "here") == {**found, 1: "k", "l": [0, 0]}
    merged = read_yaml("a: &a {x: 1, y: 1}\nb: &b {<<: *a, x: 2}\nc: {<<: *b, y: 3}", "here")
    assert merged["b"] == {"x": 2, "y": 1} and merged["c"] == {"x": 2, "y": 3}
    with pytest.raises(ConfigError, match="--set seed=010, line 1: 010 would be read as 8"):
        settings("auto", None, ["seed=010"], {})
