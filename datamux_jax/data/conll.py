"""Words with tags in files: CoNLL columns and CoNLL-U, and the schemes in which tags mark entities.

Sources: the shared tasks of CoNLL-2000 to 2003 (columns, `-DOCSTART-`, IOB1 and IOB2), https://universaldependencies.org/format.html
(CoNLL-U). Entities are kept as IOB2: every entity starts with B-.
"""

from __future__ import annotations

import collections
import functools
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
LETTERS = "BIESLU"  # Of all schemes, before the type of an entity.
ENTITY = re.compile(rf"[{LETTERS}](-.+)?")  # Plain letters: entities of one kind.
NEARLY_ALL = 0.9  # Of the words with a tag that is not `OUTSIDE`: where so many are parts of entities, all should be.
COMMENT = "#"
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

    Lines that begin with # are words, or, before the first word of a sentence, comments: there a word has as many columns as others of
    the file, and a tag of theirs; a comment has another number of columns, or no such tag and a "=".

    Args:
      path: the file.
      word: number of the column of the words, from 1; "": the first.
      tag: of the tags; "": the last.

    Raises:
      InputError: a file that cannot be read, a column that is no number, bytes that are no UTF-8, a line without a column, or one that
        may be a word or a comment.
    """
    at, of = _column(word or "1", "text") - 1, _column(tag, "label") - 1 if tag else -1
    needed = max(at + 1, of + 1, 2)

    known = functools.cache(lambda: _surely_words(path, needed, of))

    def parse(text: str, first: bool) -> tuple[str, str] | None:
        fields = text.split()
        if fields[0] == DOCUMENT or (fields[0][0] == COMMENT and _comment(text, fields, of, first, *known())):
            return None
        if len(fields) < needed:
            raise ValueError(f"has {len(fields)} columns, but {needed} are needed")
        return fields[at], fields[of]

    return _sentences(path, parse)


def _surely_words(path: Path, needed: int, of: int) -> tuple[set[int], set[str]]:
    """The numbers of columns of the lines of a file that do not begin with #; and their tags, with those of lines that do, have as many
    columns and stand behind the first word of a sentence."""
    plain: set[tuple[int, str]] = set()
    later: set[tuple[int, str]] = set()
    first = True
    with opened(path) as handle:
        for _, line, _ in Lines(handle, str(path)):
            fields = decoded(line)[0].split()
            marked = bool(fields) and fields[0][0] == COMMENT
            if len(fields) >= needed and fields[0] != DOCUMENT and not (marked and first):
                (later if marked else plain).add((len(fields), fields[of]))
            first = not fields or (first and marked)
    widths = {width for width, _ in plain}
    return widths, {tag for _, tag in plain} | {tag for width, tag in later if width in widths}


def _comment(text: str, fields: list[str], of: int, first: bool, widths: set[int], tags: set[str]) -> bool:
    """Whether a line of columns that begins with # is a comment, and not a word.

    Args:
      text: the line.
      fields: its columns.
      of: which of them has the tag of a word.
      first: no word of the sentence stands before it.
      widths: how many columns other lines have.
      tags: that they have.

    Raises:
      ValueError: nobody can tell.
    """
    fits = len(fields) in widths
    if first and not fits:
        return True
    if (fits and not first) or fields[of] in tags:
        return False
    if first and "=" in text:
        return True
    raise ValueError("begins with # and may be a comment or a word: no other word has such a tag")


def read_conllu(path: Path, tag: str) -> list[Sentence]:
    """Sentences of a CoNLL-U file; ranges such as 3-4 (a token of several words) and empty nodes such as 8.1 are left out.

    Args:
      path: the file.
      tag: key of `TAGS`; "": "upos".

    Raises:
      InputError: a file that cannot be read, no such tag, bytes that are no UTF-8, or a line that is no CoNLL-U.
    """
    of = TAGS[choose(TAGS, tag or "upos", "The tag of CoNLL-U data.label =")]

    def parse(text: str, first: bool) -> tuple[str, str] | None:
        if text.startswith(COMMENT):
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


def _sentences(path: Path, parse: Callable[[str, bool], tuple[str, str] | None]) -> list[Sentence]:
    """The sentences of a file; `parse` gets a line and whether it is before the first word of its sentence, and gives word and tag, or
    None if it is no word, or raises ValueError."""
    sentences = [Sentence(path, [], [], [])]
    with opened(path) as handle:
        for number, line, problem in Lines(handle, str(path)):
            text, wrong = decoded(line)
            try:
                if problem or wrong:
                    raise ValueError(problem or wrong)
                if not text.strip():
                    sentences.append(Sentence(path, [], [], []))
                elif found := parse(text, not sentences[-1].words):
                    sentences[-1].words.append(found[0])
                    sentences[-1].tags.append(found[1])
                    sentences[-1].lines.append(number)
            except ValueError as error:
                raise InputError(f"{path}, line {number}: the line {error}. Correct it, or take the sentence out.") from error
    return [sentence for sentence in sentences if sentence.words]


def to_iob2(sentences: Sequence[Sentence], *, entities: bool = False) -> bool:
    """Rewrites tags that mark entities as IOB2, in place; what scheme they are of shows in the tags of all sentences together.

    Known are IOB1 (B- only between neighbours of one type), IOB2, and BIOES with its other letters, BILOU; or the letters alone, where
    there is one type of entities.

    Args:
      sentences: all of them.
      entities: the tags are known to mark entities; otherwise they do if nearly all have the form of a scheme.

    Returns:
      Whether the tags mark entities; others, such as parts of speech, are left as they are.

    Raises:
      InputError: tags that no scheme allows, with file and line.
    """
    counts = collections.Counter(tag for sentence in sentences for tag in sentence.tags)
    tags = set(counts) - {OUTSIDE}
    fitting = {tag for tag in tags if ENTITY.fullmatch(tag)}
    if not entities:
        if any(len(tag) == 1 for tag in fitting) and not {"B", "I", OUTSIDE} <= counts.keys():
            fitting = {tag for tag in fitting if len(tag) > 1}  # Single letters, such as I and E, may mean anything.
        if sum(counts[tag] for tag in fitting) < NEARLY_ALL * sum(counts[tag] for tag in tags):
            return False
    if not tags:
        return False
    if fitting < tags:
        raise InputError(_odd(sentences, tags - fitting))
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


def _odd(sentences: Sequence[Sentence], odd: set[str]) -> str:
    """The error for tags that are of no scheme among tags that are."""
    where = (
        (sentence.path, line, tag) for sentence in sentences for line, tag in zip(sentence.lines, sentence.tags, strict=True)
    )
    path, line, tag = next(one for one in where if one[2] in odd)
    return (
        f"{path}, line {line}: the tag {tag!r} is neither O nor a part of an entity, such as B-PER or I-PER, as the tags of these data "
        "are. Correct the tag, take the sentence out, or name the column of the tags (data.label)."
    )


def _pairs(sentence: Sentence) -> Iterator[tuple[str, str]]:
    """Each tag behind the one before it."""
    return zip([OUTSIDE, *sentence.tags], sentence.tags, strict=False)


def _starts_inside(before: str, tag: str) -> bool:
    """An I- that does not go on with an entity."""
    return tag[0] == "I" and _another(before, tag)


def _needless(before: str, tag: str) -> bool:
    """A B- that IOB1 writes as I-."""
    return tag[0] == "B" and _another(before, tag)


def _another(before: str, tag: str) -> bool:
    """The tag is not of the type of the one before it, if that is of any."""
    return before == OUTSIDE or before[1:] != tag[1:]


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
