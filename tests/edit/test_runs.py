"""Run folders: complete or absent, readable, and undone bit for bit or refused."""

from __future__ import annotations

import json
import shutil
from contextlib import nullcontext
from pathlib import Path

import pytest
import tiny
import torch
import yaml
from safetensors.torch import load_file, save_file

from sphere_edit.experiments import run as experiment
from sphere_edit.files import read_facts
from sphere_edit.model.structure import find_structure
from sphere_edit.runs import run_folder
from sphere_edit.runs.deltas import switch
from sphere_edit.runs.journal import RunError
from sphere_edit.runs.spec import RunOptions


@pytest.fixture(scope="module")
def finished(tokenizer, tmp_path_factory):
    """Make a run of three edits (once per family and dtype); the edited model's weights and the folder."""
    made = {}

    def build(family, dtype):
        if (family, dtype) not in made:
            base = tmp_path_factory.mktemp("finished")
            model = tiny.make_model(family, dtype=dtype)
            options = RunOptions("tiny", "facts", base / "run", perplexity_tokens=300)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(experiment, "write_report", lambda folder: None)
                patch.setenv("SPHERE_EDIT_CACHE", str(base / "cache"))
                experiment.run(model, tokenizer, tiny.facts(3), tiny.CONFIG, options)
            made[family, dtype] = tiny.state(model), base / "run"
        return made[family, dtype]

    return build


@pytest.fixture
def edit(finished, tmp_path):
    """An edited model and its run folder, to be damaged at will."""

    def build(family="llama", dtype=torch.float32):
        weights, run = finished(family, dtype)
        model = tiny.make_model(family, dtype=dtype)
        model.load_state_dict(weights)
        return model, Path(shutil.copytree(run, tmp_path / "run"))

    return build


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_apply_and_revert_bit_for_bit(family, dtype, edit):
    edited, run = edit(family, dtype)
    fresh = tiny.make_model(family, dtype=dtype)
    before, after = tiny.state(fresh), tiny.state(edited)
    structure = find_structure(fresh)
    names = switch(run, structure, "after")
    assert names == [structure.down[i].name for i in (1, 2, 3)]
    assert tiny.same(fresh, after) and not tiny.same(fresh, before)
    switch(run, structure, "before")
    assert tiny.same(fresh, before)
    switch(run, find_structure(edited), "before")
    assert tiny.same(edited, before)


def test_factors_are_the_update(edit):
    edited, run = edit()
    fresh, batches = tiny.make_model("llama"), sorted((run / "batches").iterdir())
    assert [read_facts(path)["requests"] for path in batches] == [["capital", "book"], ["player"]]
    found = [load_file(path) for path in batches]
    for layer, (down, now) in enumerate(
        zip(find_structure(fresh).down[1:4], find_structure(edited).down[1:4], strict=True), 1
    ):
        weight = down.weight
        for tensors, size in zip(found, (2, 1), strict=True):
            left, right = tensors[f"{layer}.left"], tensors[f"{layer}.right"]
            assert left.shape == (tiny.HIDDEN, size) and right.shape == tensors[f"{layer}.keys"].shape == (size, 80)
            weight = weight + left @ right
        torch.testing.assert_close(weight, now.weight, atol=1e-5, rtol=1e-4)


def _flip(path, where):
    blob = bytearray(path.read_bytes())
    blob[where] ^= 1
    path.write_bytes(bytes(blob))


def _rewrite(run, text=None, **facts):
    """Other facts, or a text in their place."""
    path = run / "deltas.safetensors"
    new = {k: v for k, v in {**read_facts(path), **facts}.items() if v is not None}
    save_file(load_file(path), path, {"facts": json.dumps(new) if text is None else text})


def _change_bits(run, change):
    path = run / "deltas.safetensors"
    tensors, facts = load_file(path), read_facts(path)
    change(tensors)
    save_file(tensors, path, {"facts": json.dumps(facts)})


def _flip_bits(tensors):
    """One bit of the last weight's stored bits: the earlier weights' pass their check."""
    tensors["model.layers.3.mlp.down_proj.bits"][3, 5] ^= 1


def _drop_bits(tensors):
    del tensors["model.layers.3.mlp.down_proj.bits"]


def _cut(run):
    path = run / "deltas.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


_DAMAGE = {
    "flipped-header": (lambda run: _flip(run / "deltas.safetensors", 12), None),
    "flipped-bits": (lambda run: _change_bits(run, _flip_bits), "damaged"),
    "missing-bits": (lambda run: _change_bits(run, _drop_bits), "cannot be read"),
    "cut": (_cut, "cannot be read"),
    "empty": (lambda run: (run / "deltas.safetensors").write_bytes(b""), "cannot be read"),
    "absent": (lambda run: (run / "deltas.safetensors").unlink(), "not finished .*go on with"),
    "other-format": (lambda run: _rewrite(run, format=1), "expected format 2, found 1"),
    "no-weights": (lambda run: _rewrite(run, weights=None), "cannot be read"),
    "facts-not-json": (lambda run: _rewrite(run, "{"), "cannot be read"),
    "facts-a-list": (lambda run: _rewrite(run, "[]"), "cannot be read"),
    "weights-a-list": (lambda run: _rewrite(run, weights=[]), "cannot be read"),
    "weights-without-sums": (lambda run: _rewrite(run, weights={"model.layers.1.mlp.down_proj": {}}), None),
}


@pytest.mark.parametrize("damage", _DAMAGE)
def test_damaged_deltas_write_nothing(damage, edit):
    change, message = _DAMAGE[damage]
    _, run = edit()
    change(run)
    fresh = tiny.make_model("llama")
    before = tiny.state(fresh)
    with pytest.raises(RunError, match=message) as caught:
        switch(run, find_structure(fresh), "after")
    assert str(run) in str(caught.value)
    assert tiny.same(fresh, before)


def test_any_flipped_byte_is_harmless_or_refused(edit):
    """The factors are for readers; every byte that `switch` reads is guarded by a sum."""
    edited, run = edit()
    path = run / "deltas.safetensors"
    blob, after = path.read_bytes(), tiny.state(edited)
    for where in range(9, len(blob), len(blob) // 40):
        path.write_bytes(blob)
        _flip(path, where)
        fresh = tiny.make_model("llama")
        before = tiny.state(fresh)
        try:
            switch(run, find_structure(fresh), "after")
        except RunError:
            assert tiny.same(fresh, before)
        else:
            assert tiny.same(fresh, after)


def test_wrong_state_of_the_model(edit):
    edited, run = edit()
    after = tiny.state(edited)
    with pytest.raises(RunError, match="already applied"):
        switch(run, find_structure(edited), "after")
    fresh = tiny.make_model("llama")
    with pytest.raises(RunError, match="already reverted"):
        switch(run, find_structure(fresh), "before")
    assert tiny.same(edited, after) and tiny.same(fresh, tiny.state(tiny.make_model("llama")))


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("llama", {"seed": 5}, "is not the weight that .* expects.*made for 'tiny'"),
        ("llama", {"dtype": torch.bfloat16}, r"bfloat16\) is not the weight"),
        ("llama", {"intermediate_size": 64}, r"\[32, 64\].* is not the weight"),
        (
            "llama",
            {"num_hidden_layers": 3},
            "model.layers.3.mlp.down_proj, which this model does not have|not the weight",
        ),
        ("gpt2", {}, "which this model does not have"),
    ],
    ids=["seed", "dtype", "width", "depth", "family"],
)
def test_wrong_model(family, changes, message, edit):
    _, run = edit()
    other = tiny.make_model(family, **changes)
    before = tiny.state(other)
    for to in ("after", "before"):
        with pytest.raises(RunError, match=message):
            switch(run, find_structure(other), to)
    assert tiny.same(other, before)


def test_one_differing_weight_keeps_all_from_being_written(edit):
    _, run = edit()
    fresh = tiny.make_model("llama")
    find_structure(fresh).down[3].weight[0, 0] += 1
    before = tiny.state(fresh)
    with pytest.raises(RunError, match="layers.3.mlp.down_proj"):
        switch(run, find_structure(fresh), "after")
    assert tiny.same(fresh, before)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "is not a run folder"),
        (b"\xff\xfe", "is not a run folder"),
        (b"a: [", "is not a run folder"),
        (b"- 1", "expected format 2, found 'list'"),
        (yaml.safe_dump({"format": 1}).encode(), "expected format 2, found 1"),
    ],
)
def test_bad_config(content, message, tmp_path):
    if content is not None:
        (tmp_path / "config.yaml").write_bytes(content)
    with pytest.raises(RunError, match=message):
        run_folder.read_config(tmp_path)


def test_torn_event_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"event": "prepared"}\n{"event": "ener')
    with pytest.raises(RunError, match=r"metrics.jsonl, line 2: not JSON"):
        run_folder.read_events(tmp_path)
    path.write_bytes(b'{"event": "\xff"}\n')
    with pytest.raises(RunError, match="metrics.jsonl"):
        run_folder.read_events(tmp_path)
    path.unlink()
    with pytest.raises(RunError, match="no readable metrics.jsonl"):
        run_folder.read_events(tmp_path)


def test_model_folders_in_the_making_do_not_meet(tmp_path):
    """Two commands with one target: one wins, whole; a folder with a name like ours is not touched."""
    (tmp_path / ".m.partial").mkdir()
    with pytest.raises(OSError), run_folder.new_model_folder(tmp_path / "m") as first:
        (first / "whole").touch()
        with run_folder.new_model_folder(tmp_path / "m") as second:
            (second / "other").touch()
    assert [p.name for p in (tmp_path / "m").iterdir()] == ["other"]
    assert (tmp_path / ".m.partial").is_dir()


def test_overwrite_through_a_link(finished, tmp_path):
    _, run = finished("llama", torch.float32)
    shutil.copytree(run, tmp_path / "real")
    (tmp_path / "link").symlink_to("real")
    with run_folder.new_run(tmp_path / "link", overwrite=True) as journal:
        work = journal.folder
        assert work.parent == tmp_path and work.name.startswith("real.partial-")
        run_folder.write_config(work, run_folder.read_config(run) | {"edits": 77})
        journal.begin(inputs={})
    assert run_folder.replace_earlier(work, "real") == tmp_path / "real"
    assert (tmp_path / "link").is_symlink() and run_folder.read_config(tmp_path / "link")["edits"] == 77
    assert sorted(p.name for p in tmp_path.iterdir() if "cache" not in p.name) == ["link", "real"]


@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt])
def test_a_run_that_does_not_begin_leaves_nothing(error, tmp_path):
    with (
        pytest.raises(error) if error else nullcontext(),
        run_folder.new_run(tmp_path / "deep" / "er" / "run") as journal,
    ):
        assert (journal.folder / "lock").exists()
        (journal.folder / run_folder.CONFIG).write_text("format: 2")
        if error:
            raise error
    assert not (tmp_path / "deep").exists()


@pytest.mark.parametrize("content", ["format: 2", "format: 2\nmodel: m\nsettings: []\nenvironment: x"])
def test_half_a_config_is_named(content, tmp_path):
    (tmp_path / run_folder.CONFIG).write_text(content)
    with pytest.raises(RunError, match="expected (model|settings) to be"):
        run_folder.read_config(tmp_path)


def test_a_run_that_was_moved_or_copied_replaces_nothing(tmp_path):
    earlier, work = tmp_path / "mine", tmp_path / "mine.partial-abc"
    for folder in (earlier, work, tmp_path / "copy"):
        folder.mkdir()
        (folder / run_folder.REPORT).write_text(folder.name, encoding="utf-8")
        run_folder.write_config(folder, {"model": "tiny", "settings": {}, "environment": {}})
    assert run_folder.replace_earlier(tmp_path / "copy", "mine") == tmp_path / "copy"
    assert (earlier / run_folder.REPORT).read_text(encoding="utf-8") == "mine"
    assert run_folder.replace_earlier(work, "mine") == earlier
    assert (earlier / run_folder.REPORT).read_text(encoding="utf-8") == work.name and not work.exists()
