"""Where the subject ends and the target begins, checked against the characters that the tokens stand for."""

from __future__ import annotations

import pytest
import tiny
import torch
from tokenizers import Tokenizer, normalizers
from transformers import PreTrainedTokenizerFast

from sphere_edit.data.requests import EditRequest
from sphere_edit.model.text import token_windows
from sphere_edit.model.tokens import check_tokenizer, encode, leading_tokens, pad_left

_CASES = [
    ("{} lies in", "Vanuatu"),
    ("The capital of {} is", "Vanuatu"),
    ("Who founded {}", "Vanuatu"),
    ("The author of {} was", "The Red Door"),
    ("The Red Door is near the Red Gate; {} is by", "The Red Door"),
    ("Anna met {} and Anna left; so did Anna", "Anna"),
    ("{} and the other {{x}} of Anna", "Anna"),
    ("Müßig — in «{}» spricht man", "Zoë Åkers"),
    ("首都 {} は", "東京"),
    ("The emoji {} means", "🦊"),
    ("{}", "X"),
]


def _decoded_end(tokenizer, row) -> str:
    return tokenizer.decode(row.ids[: row.subject_last + 1], skip_special_tokens=True)


@pytest.mark.parametrize("bos", [False, True], ids=["plain", "bos"])
@pytest.mark.parametrize(("template", "subject"), _CASES)
def test_subject_last(tokenizer, bos_tokenizer, bos, template, subject):
    tok = bos_tokenizer if bos else tokenizer
    row = encode(tok, template, subject)
    text = template.replace("{}", subject)
    assert list(row.ids) == tok(text)["input_ids"]
    assert (row.ids[0] == tok.bos_token_id) == bos
    end = len(template[: template.index("{}")] + subject)
    upto, before = _decoded_end(tok, row), tok.decode(row.ids[: row.subject_last], skip_special_tokens=True)
    assert upto.startswith(text[:end])
    assert not before.startswith(text[:end])  # no earlier token completes the subject
    assert row.target == ()


def test_subject_that_is_part_of_a_longer_token(tokenizer):
    """Its last token is the one that holds its last character, though more follows in it."""
    whole = next(t for t in (" the", " of", " and") if len(tokenizer(t)["input_ids"]) == 1)
    row = encode(tokenizer, "a {}" + whole[-1] + " b", whole[1:-1])
    assert _decoded_end(tokenizer, row) == "a" + whole


@pytest.mark.parametrize(("template", "subject"), _CASES)
def test_metaspace_and_byte_fallback(template, subject):
    """Tokens that carry the blank before them, a blank put before the text, characters as several byte tokens."""
    tok = tiny.make_metaspace_tokenizer()
    row = encode(tok, template, subject, "Rome")
    text = template.replace("{}", subject)
    end = len(template[: template.index("{}")] + subject)
    assert [*row.ids, row.target[-1]] == tok(text + " Rome")["input_ids"]
    upto = _decoded_end(tok, row).removeprefix(" ")
    before = tok.decode(row.ids[: row.subject_last], skip_special_tokens=True).removeprefix(" ")
    assert upto.startswith(text[:end]) and not before.startswith(text[:end])
    assert tok.decode(row.target).strip() == "Rome"


def test_normalised_text(tokenizer):
    """Composed by the tokenizer, as Qwen's NFC does: places are those of the text given."""
    core = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    core.normalizer = normalizers.NFC()
    tok = PreTrainedTokenizerFast(tokenizer_object=core)
    composed, apart = "Zo\u00eb", "Zoe\u0308"
    for template in ("{} is", "Where is {} now"):
        assert encode(tok, template, apart, "Rome") == encode(tok, template, composed, "Rome")


@pytest.mark.parametrize("bos", [False, True], ids=["plain", "bos"])
@pytest.mark.parametrize("target", ["Rome", "the North Sea", "Zürich", "東京", "x"])
def test_target(tokenizer, bos_tokenizer, bos, target):
    tok = bos_tokenizer if bos else tokenizer
    row = encode(tok, "The capital of {} is", "Vanuatu", target)
    whole = tok("The capital of Vanuatu is " + target)["input_ids"]
    assert [*row.ids, row.target[-1]] == whole
    assert whole[len(whole) - len(row.target) :] == list(row.target)
    assert tok.decode(row.target).strip() == target
    assert tok.decode(row.ids[: len(row.ids) - len(row.target) + 1]).endswith("Vanuatu is")
    assert row.subject_last == encode(tok, "The capital of {} is", "Vanuatu").subject_last


@pytest.mark.parametrize("end", ["\n", "\n\n", ":\t", "  ", "\n "])
def test_a_target_follows_whitespace_directly(tokenizer, end):
    """As in a chat template: what the prompt ends in belongs to it."""
    for tok in (tokenizer, tiny.make_metaspace_tokenizer()):
        for target in ("Rome", "the North Sea"):
            row = encode(tok, "The capital of {} is" + end, "Vanuatu", target)
            whole = tok(f"The capital of Vanuatu is{end}{target}")["input_ids"]
            assert [*row.ids, row.target[-1]] == whole
            assert tok.decode(row.target).strip() == target
            assert row.subject_last == encode(tok, "The capital of {} is", "Vanuatu", target).subject_last


def test_one_blank_at_the_end_of_a_prompt_is_the_one_before_the_target(tokenizer):
    for tok in (tokenizer, tiny.make_metaspace_tokenizer()):
        requests = [EditRequest("The capital of {} is" + end, "Vanuatu", "Rome") for end in ("", " ")]
        rows = [encode(tok, request.prompt, request.subject, request.target_new) for request in requests]
        assert rows[0] == rows[1]


def test_target_without_subject(tokenizer):
    row = encode(tokenizer, "Curly {} stays", None, "here")
    assert row.subject_last == -1
    assert tokenizer.decode([*row.ids, row.target[-1]]) == "Curly {} stays here"


def test_appended_end_of_text_is_dropped():
    plain, closing = tiny.make_tokenizer(bos=True), tiny.make_tokenizer(bos=True, eos=True)
    assert closing("a")["input_ids"][-1] == closing.eos_token_id
    for target in (None, "Rome"):
        assert encode(closing, "{} is in", "Oslo", target) == encode(plain, "{} is in", "Oslo", target)


@pytest.mark.parametrize("bos", [False, True], ids=["plain", "bos"])
@pytest.mark.parametrize("eos", [False, True], ids=["open", "eos"])
def test_text_windows_begin_as_prompts_do(bos, eos, tmp_path):
    tok, text = tiny.make_tokenizer(bos=bos, eos=eos), tmp_path / "text.txt"
    text.write_text("The mill is old. " * 20, encoding="utf-8")
    ids = tok(text.read_text(), add_special_tokens=False)["input_ids"]
    assert leading_tokens(tok) == [tok.bos_token_id] * bos
    windows = [window.tolist() for window in token_windows(tok, str(text), 16, 10_000)]
    assert all(window[0] == encode(tok, "The mill").ids[0] for window in windows) or not bos
    assert [i for window in windows for i in window[bos:]] == ids
    assert all(len(window) == 16 for window in windows[:-1])


def test_tokenizer_without_the_subjects_end_is_refused():
    class Cut:
        def __call__(self, text, **_):
            return {"input_ids": [1, 2], "offset_mapping": [(0, 1), (1, 2)]}

    with pytest.raises(ValueError, match="no token for the end of the subject 'Oslo'"):
        encode(Cut(), "The {} is", "Oslo")
    with pytest.raises(ValueError, match="no token for the target 'Rome'"):
        encode(Cut(), "{} is", "O", "Rome")


def test_slow_tokenizer_is_refused(tokenizer):
    check_tokenizer(tokenizer)
    with pytest.raises(ValueError, match="NoOffsets has no character offsets"):
        check_tokenizer(type("NoOffsets", (), {"is_fast": False})())


def test_pad_left():
    out = pad_left([[5, 6, 7], [8], []], torch.device("cpu"))
    assert out["input_ids"].tolist() == [[5, 6, 7], [0, 0, 8], [0, 0, 0]]
    assert out["attention_mask"].tolist() == [[1, 1, 1], [0, 0, 1], [0, 0, 0]]
    assert out["position_ids"].tolist() == [[0, 1, 2], [0, 0, 0], [0, 0, 0]]


@torch.no_grad()
def test_padding_does_not_change_a_row(family):
    model = tiny.make_model(family)
    rows = [[5, 6, 7, 8, 9], [10, 11]]
    got = model(**pad_left(rows, torch.device("cpu")), use_cache=False).logits
    for i, row in enumerate(rows):
        want = model(torch.tensor([row]), use_cache=False).logits[0]
        torch.testing.assert_close(got[i, -len(row) :], want, atol=2e-5, rtol=1e-4)
