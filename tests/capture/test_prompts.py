"""Prompts in characters: the text, and the role of every part."""

from __future__ import annotations

from equipoise.capture.mmlu import Question
from equipoise.capture.prompts import render, template_digest

SHOT = Question("us_foreign_policy", 0, " Who?\n", ("me", "you ", "they", "none"), "B")
ASKED = Question("us_foreign_policy", 1, "Why not?", ("a", "b", "c", "d"), "A")

PROMPT = """\
The following are multiple choice questions (with answers) about us foreign policy.

Who?
A. me
B. you \n\
C. they
D. none
Answer: B

Why not?
A. a
B. b
C. c
D. d
Answer:"""


def test_a_prompt_reads_as_the_harness_writes_it() -> None:
    assert render(ASKED, [SHOT]).text == PROMPT


def test_spans_adjoin_and_hold_what_their_role_says() -> None:
    prompt = render(ASKED, [SHOT, SHOT])
    stops = [0] + [stop for _, _, stop in prompt.spans]
    assert [start for _, start, _ in prompt.spans] == stops[:-1]
    assert stops[-1] == len(prompt.text)
    parts = {role: prompt.text[a:b] for role, a, b in prompt.spans}
    assert list(parts) == ["description", "few-shot", "question", "choices", "answer"]
    assert parts["few-shot"].count("Answer: B\n\n") == 2
    assert parts["question"] == "Why not?\n"
    assert parts["choices"] == "A. a\nB. b\nC. c\nD. d\n"
    assert parts["answer"] == "Answer:"


def test_without_shots_there_is_no_few_shot_part() -> None:
    assert "few-shot" not in {role for role, _, _ in render(ASKED).spans}


def test_braces_in_a_question_stay_as_they_are() -> None:
    question = Question("anatomy", 0, "{x} {{y}} {0}", ("{", "}", "{a}", "%s"), "A")
    assert "{x} {{y}} {0}\nA. {\nB. }\nC. {a}\nD. %s\nAnswer:" in render(question).text


def test_the_digest_names_this_template() -> None:
    assert template_digest() == "0b2bf72751ace6cb"
