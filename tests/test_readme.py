"""The README's commands give the README's output, and its Python runs."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import equipoise

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
CONSOLES = "".join(re.findall(r"```console\n((?:.*\n)*?)```", README))
COMMANDS = re.findall(r"^\$ equipoise (.+)\n((?:(?!\$ ).*\n)*)", CONSOLES, re.M)
VARYING = re.compile(r"\d[\d,]* tokens/s|(?<=tokens/s)( +\d[\d,]*)+")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("readme")


def value(word: str) -> float | None:
    """The number that a word is: 70,755 or 70.8k or 4.9e-05; None for others."""
    plain = word.strip("().;:").replace(",", "").replace("k", "e3").rstrip("%")
    try:
        return float(plain)
    except ValueError:
        return None


def same(found: str, printed: str) -> None:
    """The same words; numbers within 5 %, since a router may be tied to rounding."""
    ours, theirs = (VARYING.sub("N tokens/s", text).split() for text in (found, printed))
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        number = value(one)
        if number is None or value(other) is None:
            assert one == other or ".." in one  # an interval
        else:
            assert number == pytest.approx(value(other), rel=0.05, abs=1e-5)


def test_the_readmes_commands_are_found() -> None:
    names = [command.split()[0] for command, _ in COMMANDS]
    assert names == ["trace", "stats", "dead", "trace", "diff"]


@pytest.mark.slow
def test_commands_print_what_the_readme_shows(folder: Path) -> None:
    for command, printed in COMMANDS:
        run = subprocess.run(
            [sys.executable, "-m", "equipoise", *command.split()],
            cwd=folder,
            capture_output=True,
            text=True,
            check=True,
            env={"PATH": "/usr/bin:/bin", "COLUMNS": "80"},
        )
        if not printed:
            continue
        said = "\n".join(line for line in run.stderr.splitlines() if " s left" not in line)
        same(f"{run.stdout}\n{said}" if run.stdout else said, printed)


def test_the_five_lines_of_python_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from equipoise.capture.load import load_model

    monkeypatch.chdir(tmp_path)
    code = re.search(r"## Five lines of Python\n\n```python\n(.*?)```", README, re.S)
    assert code is not None
    loaded = load_model("demo")
    inputs = {"input_ids": torch.arange(5, 25)[None], "max_new_tokens": 3}
    exec(code.group(1), {"model": loaded.model, "inputs": inputs})
    trace = equipoise.open("run.trace")
    assert trace.select(phase="prefill").tokens == 20
    assert trace.select(phase="decode").tokens in (0, 1, 2)


def test_the_balancing_script_is_the_one_in_the_readme() -> None:
    script = (ROOT / "scripts" / "balance_trainer.py").read_text()
    assert f"```python\n{script}```" in README
    assert len(script.splitlines()) <= 25


@pytest.mark.slow
def test_the_balancing_script_shows_what_the_readme_shows(tmp_path: Path) -> None:
    """Training amplifies rounding, so its figures are compared loosely, what they show strictly."""
    printed = re.search(r"\$ python scripts/balance_trainer.py\n((?:.*\n)*?)```", README)
    assert printed is not None
    run = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "balance_trainer.py")],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
        env={"PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1", "HOME": str(tmp_path)},
    )
    found, shown = run.stdout.splitlines(), printed.group(1).splitlines()
    assert [line.split("(")[1:] for line in found] == [line.split("(")[1:] for line in shown]
    ours, theirs = ([[float(w) for w in line.split()[:3]] for line in x] for x in (found, shown))
    for one, other in zip(ours, theirs, strict=True):
        assert one == pytest.approx(other, abs=1.5)
    for plain, balanced in ((0, 1), (2, 3)):
        assert ours[balanced][-1] < 0.5 * ours[plain][-1]


@pytest.mark.parametrize("page", sorted((ROOT / "docs").glob("*.md")), ids=lambda p: p.name)
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        assert target.startswith("http") or (page.parent / target).exists(), target


def test_the_readmes_links_and_picture_exist() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("http") or (ROOT / target).exists(), target


def test_every_command_has_its_page_and_a_row_in_the_readme() -> None:
    from equipoise.cli import app

    for command in app.registered_commands:
        name = command.callback.__name__  # type: ignore[union-attr]
        assert (ROOT / "docs" / f"{name}.md").exists()
        assert f"equipoise {name}" in README
