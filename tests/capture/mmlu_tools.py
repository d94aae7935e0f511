"""Small models, tokenizers of every kind and made-up questions for the tests of the runners."""

from __future__ import annotations

import random
from functools import cache
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from equipoise.capture.mmlu import LETTERS, Question, QuestionSet
from equipoise.capture.prompts import render

torch.set_num_threads(1)  # tiny models: a second thread only waits

SENTENCE = "the cell of a naïve river has 42 bones, é or Ω; what? which gives (x+1)² in old law"
WORDS = SENTENCE.split()
KINDS = ("byte_bpe", "metaspace", "unigram", "bytes", "mixed", "words")


def make_questions(subjects: Any = ("anatomy", "sociology"), count: int = 5, seed: int = 0) -> Any:
    """Questions of very different lengths, with line breaks and blanks where CSVs have them."""
    draw = random.Random(seed)

    def text(most: int) -> str:
        return " ".join(draw.choices(WORDS, k=draw.randint(1, most)))

    def questions(subject: str, number: int) -> tuple[Question, ...]:
        return tuple(
            Question(
                subject,
                index,
                f"  {text(9)}\n{text(3)} \n" if index % 2 else text(6),
                (text(3), text(2) + " ", f" {text(2)}", str(index)),
                draw.choice(LETTERS),
            )
            for index in range(number)
        )

    return QuestionSet(
        split="test",
        taxonomy="hendrycks",
        source="made up",
        questions={s: questions(s, count) for s in subjects},
        examples={s: questions(s, 5) for s in subjects},
    )


def prompts_of(questions: QuestionSet, shots: int = 5) -> list[Any]:
    return [render(q, questions.shots(q, shots)) for qs in questions.questions.values() for q in qs]


@cache
def make_tokenizer(kind: str) -> Any:
    """A fast tokenizer trained on made-up prompts; "bytes" and "mixed" split some letters in two."""
    corpus = [
        p.text + f" {letter}" for p in prompts_of(make_questions(seed=9)) for letter in LETTERS
    ]
    tokenizer, trainer = _model(kind)
    if trainer is not None:
        tokenizer.train_from_iterator(corpus, trainer)
    if kind == "metaspace":  # as Llama's: trained word by word, applied to the text as one word
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(split=False)
    if kind in ("metaspace", "byte_bpe"):
        first = tokenizer.token_to_id("<s>")
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", first)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def _model(kind: str) -> tuple[Tokenizer, Any]:
    special = ["<s>", "</s>", "<unk>"]
    if kind == "unigram":
        tokenizer = Tokenizer(models.Unigram())
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        return tokenizer, trainers.UnigramTrainer(
            vocab_size=300, special_tokens=special, unk_token="<unk>"
        )
    if kind == "words":
        tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        return tokenizer, trainers.WordLevelTrainer(special_tokens=special)
    if kind == "metaspace":
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        bytes_ = [f"<0x{i:02X}>" for i in range(256)]
        return tokenizer, trainers.BpeTrainer(vocab_size=600, special_tokens=special + bytes_)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    if kind == "byte_bpe":
        tokenizer = Tokenizer(models.BPE())
        trainer = trainers.BpeTrainer(
            vocab_size=500, special_tokens=special, initial_alphabet=alphabet
        )
    else:
        merges = [("Ġ", "A"), ("Ġ", "C")] if kind == "mixed" else []
        names = special + alphabet + ["".join(pair) for pair in merges]
        tokenizer = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, merges))
        trainer = None
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, trainer


class Slow:
    """A fast tokenizer that does not tell where its tokens come from."""

    is_fast = False

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)


def make_model(family: str = "olmoe", dtype: torch.dtype = torch.float64, **changes: Any) -> Any:
    """A tiny random model whose answers depend on its whole context."""
    import transformers

    names = {
        "olmoe": ("OlmoeConfig", "OlmoeForCausalLM", {"num_experts": 8}),
        "mixtral": ("MixtralConfig", "MixtralForCausalLM", {"num_local_experts": 8}),
        "gpt_oss": (
            "GptOssConfig",
            "GptOssForCausalLM",
            {"num_local_experts": 8, "head_dim": 8, "sliding_window": 32},
        ),
        "qwen3_next": (
            "Qwen3NextConfig",
            "Qwen3NextForCausalLM",
            {
                "num_experts": 8,
                "moe_intermediate_size": 16,
                "shared_expert_intermediate_size": 16,
                "head_dim": 8,
                "linear_num_value_heads": 2,
                "linear_num_key_heads": 2,
                "linear_key_head_dim": 8,
                "linear_value_head_dim": 8,
                "layer_types": ["linear_attention", "full_attention"],
            },
        ),
        "llama": ("LlamaConfig", "LlamaForCausalLM", {}),
    }
    config_name, model_name, special = names[family]
    values = {
        "vocab_size": 700,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "initializer_range": 0.4,
        "num_experts_per_tok": 2,
        "eos_token_id": 1,
        "bos_token_id": 0,
        "pad_token_id": 2,
    }
    if family == "llama":
        values.pop("num_experts_per_tok")
    torch.manual_seed(1)
    config = getattr(transformers, config_name)(**(values | special | changes))
    model = getattr(transformers, model_name)(config).to(dtype).eval()
    if family != "llama":
        model.set_experts_implementation("eager")
    return model
