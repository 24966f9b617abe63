"""Words with tags in files: CoNLL columns and CoNLL-U, and the schemes in which tags mark entities.

Sources: the shared tasks of CoNLL-2000 to 2003 (columns, `-DOCSTART-`, IOB1 and IOB2), https://universaldependencies.org/format.html
(CoNLL-U). Entities are kept as IOB2: every entity starts with B-.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from datamux_jax.data.lines import Lines, decoded
from datamux_jax.data.tables import opened
from datamux_jax.errors import InputError, choose

DOCUMENT = "-DOCSTART-"
FORM, FIELDS = 1, 10  # Of CoNLL-U: the column of the word, from 0, and how many there are.
TAGS = {"upos": 3, "xpos": 4}  # Of CoNLL-U, from 0.
OUTSIDE = "O"
ENTITY = re.compile(r"[BIESLU]-.+")
NO_WORD = re.compile(r"\d+[-.]\d+")  # Id of a range or an empty node.


class Sentence(NamedTuple):
    """Words, a tag each, and where they stand.

    Attributes:
      lines: of the words, from 1.
    """

    path: Path
    words: list[str]
    tags: list[str]
    lines: list[int]


def read_columns(path: Path, word: str, tag: str) -> list[Sentence]:
    """Sentences of a file with a word a line, its columns between spaces or tabs, and an empty line after each sentence.

    Args:
      path: the file.
      word: number of the column of the words, from 1; "": the first.
      tag: of the tags; "": the last.

    Raises:
      InputError: a file that cannot be read, a column that is no number, bytes that are no UTF-8, or a line without a column.
    """
    at, of = _column(word or "1", "text") - 1, _column(tag, "label") - 1 if tag else -1
    needed = max(at + 1, of + 1, 2)

    def parse(text: str) -> tuple[str, str] | None:
        fields = text.split()
        if fields[0] == DOCUMENT:
            return None
        if len(fields) < needed:
            raise ValueError(f"has {len(fields)} columns, but {needed} are needed")
        return fields[at], fields[of]

    return _sentences(path, parse)


def read_conllu(path: Path, tag: str) -> list[Sentence]:
    """Sentences of a CoNLL-U file; ranges such as 3-4 (a token of several words) and empty nodes such as 8.1 are left out.

    Args:
      path: the file.
      tag: key of `TAGS`; "": "upos".

    Raises:
      InputError: a file that cannot be read, no such tag, bytes that are no UTF-8, or a line that is no CoNLL-U.
    """
    of = TAGS[choose(TAGS, tag or "upos", "The tag of CoNLL-U data.label =")]

    def parse(text: str) -> tuple[str, str] | None:
        if text.startswith("#"):
            return None
        fields = text.split("\t")
        if len(fields) != FIELDS:
            raise ValueError(f"has {len(fields)} fields between tabs, but CoNLL-U has {FIELDS}")
        if NO_WORD.fullmatch(fields[0]):
            return None
        if not fields[0].isdecimal():
            raise ValueError(f"has the id {fields[0]!r}, which is no number, range or empty node")
        if not fields[FORM].strip():
            raise ValueError("has no word")
        return fields[FORM], fields[of]

    return _sentences(path, parse)


def _column(number: str, key: str) -> int:
    if not number.isdecimal() or int(number) < 1:
        raise InputError(f"data.{key} = {number!r} is no column of a CoNLL file. Give its number, from 1.")
    return int(number)


def _sentences(path: Path, parse: Callable[[str], tuple[str, str] | None]) -> list[Sentence]:
    """The sentences of a file; `parse` gives word and tag of a line, or None if it is no word, or raises ValueError."""
    sentences = [Sentence(path, [], [], [])]
    with opened(path) as handle:
        for number, line, problem in Lines(handle, str(path)):
            text, wrong = decoded(line)
            try:
                if problem or wrong:
                    raise ValueError(problem or wrong)
                if not text.strip():
                    sentences.append(Sentence(path, [], [], []))
                elif found := parse(text):
                    sentences[-1].words.append(found[0])
                    sentences[-1].tags.append(found[1])
                    sentences[-1].lines.append(number)
            except ValueError as error:
                raise InputError(f"{path}, line {number}: the line {error}. Correct it, or take the sentence out.") from error
    return [sentence for sentence in sentences if sentence.words]


def to_iob2(sentences: Sequence[Sentence]) -> bool:
    """Rewrites tags that mark entities as IOB2, in place; what scheme they are of shows in the tags of all sentences together.

    Known are IOB1 (B- only between neighbours of one type), IOB2, and BIOES with its other letters, BILOU.

    Returns:
      Whether the tags mark entities; others, such as parts of speech, are left as they are.

    Raises:
      InputError: tags that no scheme allows, with file and line.
    """
    tags = {tag for sentence in sentences for tag in sentence.tags} - {OUTSIDE}
    if not tags or not all(map(ENTITY.fullmatch, tags)):
        return False
    letters = {tag[0] for tag in tags}
    if letters & set("ESLU"):
        if letters & set("ES") and letters & set("LU"):
            raise InputError(
                f"The tags of {sentences[0].path} and the files beside it have the letters {', '.join(sorted(letters))}: E and S "
                "are of BIOES, L and U of BILOU. Write all tags in one scheme."
            )
        for sentence in sentences:
            _from_bioes(sentence)
        return True
    starts = [where for sentence in sentences if (where := _first(sentence, _starts_inside))]
    if starts:  # Only IOB1 has such an I-; then a B- that has no neighbour of its type before it has no place.
        lone = [where for sentence in sentences if (where := _first(sentence, _needless))]
        if lone:
            raise InputError(
                f"{starts[0]} starts an entity with I-, as in IOB1, but {lone[0]} has a B- that follows no entity of its type, as "
                "in IOB2. Write all tags in one scheme: in IOB2 every entity starts with B-."
            )
        for sentence in sentences:
            inside = [_starts_inside(before, tag) for before, tag in _pairs(sentence)]
            sentence.tags[:] = ["B" + tag[1:] if first else tag for tag, first in zip(sentence.tags, inside, strict=True)]
    return True


def _pairs(sentence: Sentence) -> Iterator[tuple[str, str]]:
    """Each tag behind the one before it."""
    return zip([OUTSIDE, *sentence.tags], sentence.tags, strict=False)


def _starts_inside(before: str, tag: str) -> bool:
    """An I- that does not go on with an entity."""
    return tag[0] == "I" and before[1:] != tag[1:]


def _needless(before: str, tag: str) -> bool:
    """A B- that IOB1 writes as I-."""
    return tag[0] == "B" and before[1:] != tag[1:]


def _first(sentence: Sentence, rule: Callable[[str, str], bool]) -> str:
    """Where a rule first holds in a sentence, for an error; "" if it does not."""
    lines = (line for line, pair in zip(sentence.lines, _pairs(sentence), strict=True) if rule(*pair))
    return next((f"{sentence.path}, line {line}," for line in lines), "")


def _from_bioes(sentence: Sentence) -> None:
    """Rewrites BIOES or BILOU as IOB2.

    Raises:
      InputError: an entity that does not start or end as it must.
    """
    tags = [{"L": "E", "U": "S"}.get(tag[0], tag[0]) + tag[1:] for tag in sentence.tags]
    following = [*tags[1:], OUTSIDE]
    for line, (before, tag), after in zip(sentence.lines, _pairs(sentence._replace(tags=tags)), following, strict=True):
        opened_before = before[0] in "BI" and before[1:] == tag[1:]
        goes_on = after[0] in "IE" and after[1:] == tag[1:]
        if (tag[0] in "IE" and not opened_before) or (tag[0] in "BI" and not goes_on):
            raise InputError(
                f"{sentence.path}, line {line}: the tag {tag!r} between {before!r} and {after!r} is not BIOES, in which entities "
                "are B I E or B E, or S alone (BILOU: L and U). Correct the tags, or write all of them as IOB2."
            )
    sentence.tags[:] = [{"S": "B", "E": "I"}.get(tag[0], tag[0]) + tag[1:] for tag in tags]
