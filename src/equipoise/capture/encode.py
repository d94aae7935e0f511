"""From prompts to token ids, role spans in tokens, and the continuations that are scored.

Every context is encoded in one go, as lm-evaluation-harness does (lm_eval 0.4.13,
models/huggingface.py::tok_encode, api/model.py::_encode_pair), so that ids are the same token by
token. A token belongs to the role of its first character; special tokens that the tokenizer adds to
none.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import TYPE_CHECKING, Any

import numpy as np

from equipoise.capture.prompts import CONTINUATIONS, Prompt, Span
from equipoise.errors import EquipoiseError

if TYPE_CHECKING:
    from numpy.typing import NDArray

_CHUNK = 256  # prompts encoded at a time: bounds the memory of the tokenizer's own records


@dataclass(frozen=True, slots=True)
class Encoded:
    """A prompt in tokens: ids int32 [n], role spans in tokens, and one continuation per letter."""

    ids: NDArray[np.int32]
    spans: tuple[Span, ...]
    continuations: tuple[tuple[int, ...], ...] = ()

    def span(self, role: str) -> tuple[int, int]:
        """Start and stop of a role; (0, 0) where the prompt has none of it."""
        return next(((a, b) for name, a, b in self.spans if name == role), (0, 0))


def encode_prompts(tokenizer: Any, prompts: Sequence[Prompt]) -> list[Encoded]:
    """Encode prompts of one subject; EquipoiseError where the letters cannot be told apart."""
    contexts = list(encode_texts(tokenizer, [p.text for p in prompts], [p.spans for p in prompts]))
    letters = _continuations(tokenizer, prompts, contexts)
    return [Encoded(c.ids, c.spans, found) for c, found in zip(contexts, letters, strict=True)]


def encode_texts(
    tokenizer: Any, texts: Sequence[str], spans: Sequence[Sequence[Span]]
) -> Iterator[Encoded]:
    """Encode whole texts, with the tokenizer's special tokens and spans in tokens."""
    for start in range(0, len(texts), _CHUNK):
        part, part_spans = texts[start : start + _CHUNK], spans[start : start + _CHUNK]
        if getattr(tokenizer, "is_fast", False):
            yield from _encode_fast(tokenizer, part, part_spans)
        else:
            for text, text_spans in zip(part, part_spans, strict=True):
                yield _encode_slow(tokenizer, text, text_spans)


def encode_one(tokenizer: Any, text: str) -> list[int]:
    """Ids of one text, special tokens by lm-evaluation-harness's rule for causal models."""
    ids: list[int] = tokenizer.encode(text, add_special_tokens=_adds_specials(tokenizer, text))
    return ids


def _adds_specials(tokenizer: Any, text: str) -> bool:
    """False for a text that already begins with what the tokenizer would put first."""
    first = tokenizer.bos_token_id
    first = tokenizer.eos_token_id if first is None else first
    return first is None or not text.startswith(tokenizer.decode(first))


def _encode_fast(
    tokenizer: Any, texts: Sequence[str], spans: Sequence[Sequence[Span]]
) -> Iterator[Encoded]:
    kinds = [_adds_specials(tokenizer, text) for text in texts]
    encodings: list[Any] = [None] * len(texts)
    for kind in set(kinds):
        where = [i for i, value in enumerate(kinds) if value is kind]
        batch = tokenizer(
            [texts[i] for i in where],
            add_special_tokens=kind,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        for i, encoding in zip(where, batch.encodings, strict=True):
            encodings[i] = encoding
    for encoding, text, text_spans in zip(encodings, texts, spans, strict=True):
        starts = [_token_at(encoding, start, len(text)) for _, start, _ in text_spans]
        ids = np.array(encoding.ids, dtype=np.int32)
        yield Encoded(ids, _token_spans(text_spans, [*starts, _text_end(encoding)]))


def _token_spans(spans: Sequence[Span], bounds: Sequence[int]) -> tuple[Span, ...]:
    ends = zip(spans, bounds, bounds[1:], strict=False)
    return tuple((role, start, stop) for (role, _, _), start, stop in ends if stop > start)


def _token_at(encoding: Any, character: int, length: int) -> int:
    """Number of the first token that starts at or after a character of a text of that length.

    A tokenizer may drop blanks: where a character has no token, the next character's is taken.
    """
    last = _text_end(encoding)
    tokens = map(encoding.char_to_token, range(character, length))
    token: int = next((token for token in tokens if token is not None), last)
    while token < last and encoding.token_to_chars(token)[0] < character:
        token += 1
    return token


def _text_end(encoding: Any) -> int:
    """Number of tokens up to the last that stands for text, leading special tokens counted."""
    stop = len(encoding.ids)
    while stop and encoding.token_to_sequence(stop - 1) is None:
        stop -= 1
    return stop


def _encode_slow(tokenizer: Any, text: str, spans: Sequence[Span]) -> Encoded:
    """Spans without offsets: a boundary is where the ids of the text before it stop agreeing."""
    special = set(tokenizer.all_special_ids)
    ids = encode_one(tokenizer, text)
    bounds = [_agree(ids, [i for i in ids if i in special])]
    for _, start, _ in spans[1:]:
        before = encode_one(tokenizer, text[:start])
        while before and before[-1] in special:
            before.pop()
        same = _agree(ids, before)
        bounds.append(max(bounds[-1], same + (same < len(before))))
    return Encoded(np.array(ids, dtype=np.int32), _token_spans(spans, [*bounds, len(ids)]))


def _agree(first: Sequence[int], second: Sequence[int]) -> int:
    """Number of leading elements that two sequences share."""
    pairs = zip(first, second, strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def _continuations(
    tokenizer: Any, prompts: Sequence[Prompt], contexts: Sequence[Encoded]
) -> list[tuple[tuple[int, ...], ...]]:
    """Ids of the four letters after each context: what encoding context and letter together adds.

    All prompts end in the same line, so the first prompt's letters hold for every prompt that ends
    in the same tokens; the others, and all where context and letter melt together, are encoded in
    full.
    """
    shared: tuple[tuple[int, ...], ...] | None = None
    tail: list[int] = []
    found = []
    for prompt, context in zip(prompts, contexts, strict=True):
        ids = context.ids.tolist()
        if shared is None or ids[-len(tail) :] != tail:
            letters, separate = _letters(tokenizer, prompt.text, ids)
            if separate and shared is None and (start := context.span("answer")[0]):
                shared, tail = letters, ids[start:]
            found.append(letters)
        else:
            found.append(shared)
    return found


def _letters(tokenizer: Any, text: str, ids: list[int]) -> tuple[tuple[tuple[int, ...], ...], bool]:
    """Continuations of one context, and whether its own ids stay as they are under all four."""
    wholes = [encode_one(tokenizer, text + continuation) for continuation in CONTINUATIONS]
    letters = tuple(tuple(whole[len(ids) :]) for whole in wholes)
    if not all(letters) or len(set(letters)) < len(letters):
        raise EquipoiseError(
            f"this tokenizer gives the answers A, B, C, D the tokens {letters}: they cannot be told "
            "apart (an end token that it appends, or too small a vocabulary). Use another tokenizer."
        )
    return letters, all(whole[: len(ids)] == ids for whole in wholes)


def context_length(config: Any, tokenizer: Any) -> int:
    """Longest input in tokens, found as lm-evaluation-harness finds it (models/utils.py).

    The text model's own limit, else the tokenizer's, else 2048.
    """
    text = getattr(config, "text_config", None) or config
    for name in ("n_positions", "max_position_embeddings", "n_ctx"):
        if (value := getattr(text, name, None)) is not None:
            return int(value)
    limit = getattr(tokenizer, "model_max_length", None)
    return int(limit) if limit is not None and limit < 10**18 else 2048
