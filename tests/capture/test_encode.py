"""Prompts in tokens: the same ids as encoding the whole string, and one role for every token."""

from __future__ import annotations

import numpy as np
import pytest
from tokenizers import processors
from transformers import LlamaConfig, PreTrainedTokenizerFast

from equipoise.capture.encode import context_length, encode_prompts, encode_texts
from equipoise.capture.mmlu import LETTERS
from equipoise.errors import EquipoiseError
from tests.capture.mmlu_tools import KINDS, Slow, make_questions, make_tokenizer, prompts_of


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shots", [0, 3])
def test_ids_are_those_of_the_whole_string(kind: str, shots: int) -> None:
    tokenizer, prompts = make_tokenizer(kind), prompts_of(make_questions(), shots)
    for prompt, encoded in zip(prompts, encode_prompts(tokenizer, prompts), strict=True):
        assert encoded.ids.tolist() == tokenizer.encode(prompt.text)


@pytest.mark.parametrize("kind", KINDS)
def test_continuations_are_what_the_letter_adds(kind: str) -> None:
    tokenizer, prompts = make_tokenizer(kind), prompts_of(make_questions())
    for prompt, encoded in zip(prompts, encode_prompts(tokenizer, prompts), strict=True):
        context = tokenizer.encode(prompt.text)
        wholes = [tokenizer.encode(f"{prompt.text} {letter}") for letter in LETTERS]
        assert encoded.continuations == tuple(tuple(w[len(context) :]) for w in wholes)


def test_the_kinds_have_letters_of_one_token_and_of_several() -> None:
    prompts = prompts_of(make_questions())
    lengths = {
        kind: [len(c) for c in encode_prompts(make_tokenizer(kind), prompts)[0].continuations]
        for kind in KINDS
    }
    assert lengths["byte_bpe"] == [1, 1, 1, 1]
    assert lengths["bytes"] == [2, 2, 2, 2]
    assert lengths["mixed"] == [1, 2, 1, 2]


@pytest.mark.parametrize("kind", KINDS)
def test_every_token_has_the_role_of_its_first_character(kind: str) -> None:
    tokenizer, prompts = make_tokenizer(kind), prompts_of(make_questions())
    for prompt, encoded in zip(prompts, encode_prompts(tokenizer, prompts), strict=True):
        whole = tokenizer(prompt.text, return_offsets_mapping=True, return_special_tokens_mask=True)
        expected = [
            "none" if special else next(r for r, a, b in prompt.spans if a <= start < b)
            for (start, _), special in zip(
                whole["offset_mapping"], whole["special_tokens_mask"], strict=True
            )
        ]
        roles = np.full(len(encoded.ids), "none", dtype=object)
        for role, start, stop in encoded.spans:
            assert (roles[start:stop] == "none").all(), "two roles for one token"
            roles[start:stop] = role
        assert roles.tolist() == expected


def test_the_cue_is_the_answer_role() -> None:
    tokenizer, prompts = make_tokenizer("byte_bpe"), prompts_of(make_questions())
    for encoded in encode_prompts(tokenizer, prompts):
        start, stop = encoded.span("answer")
        assert tokenizer.decode(encoded.ids[start:stop]) == "Answer:"
        assert stop == len(encoded.ids)


@pytest.mark.parametrize("kind", ["byte_bpe", "bytes", "metaspace"])
def test_a_tokenizer_without_offsets_gives_the_same_spans(kind: str) -> None:
    tokenizer, prompts = make_tokenizer(kind), prompts_of(make_questions(count=2))
    fast, slow = encode_prompts(tokenizer, prompts), encode_prompts(Slow(tokenizer), prompts)
    for one, other in zip(fast, slow, strict=True):
        assert one.ids.tolist() == other.ids.tolist()
        assert one.continuations == other.continuations
        if kind != "metaspace":  # there a token may straddle a boundary in several ways
            assert one.spans == other.spans


def test_a_text_that_begins_with_the_first_special_token_gets_no_second() -> None:
    tokenizer = make_tokenizer("byte_bpe")
    (encoded,) = encode_texts(tokenizer, ["<s>the cell"], [(("text", 0, 11),)])
    assert encoded.ids.tolist() == tokenizer.encode("<s>the cell", add_special_tokens=False)


def test_a_tokenizer_that_appends_an_end_cannot_tell_the_letters_apart() -> None:
    plain = make_tokenizer("byte_bpe")
    backend = type(plain.backend_tokenizer).from_str(plain.backend_tokenizer.to_str())
    backend.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", backend.token_to_id("</s>"))]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    with pytest.raises(EquipoiseError, match="cannot be told apart"):
        encode_prompts(tokenizer, prompts_of(make_questions()))


def test_context_length_prefers_the_config_then_the_tokenizer() -> None:
    tokenizer = make_tokenizer("byte_bpe")
    assert context_length(LlamaConfig(max_position_embeddings=77), tokenizer) == 77
    assert context_length(object(), tokenizer) == 2048
    limited = type("T", (), {"model_max_length": 512})()
    assert context_length(object(), limited) == 512
