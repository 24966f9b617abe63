"""Tables: formats, damage, and reading on from a row."""

import datetime
import decimal
import io
import json
import subprocess
import sys
import uuid
from pathlib import Path

import pytest

from datamux_jax.data import lines
from datamux_jax.data.tables import Table
from datamux_jax.errors import InputError

COLUMNS = {"a": "text", "b": "value"}


def rows(source, columns=COLUMNS, skip=0, **settings):
    with Table(source, columns, **settings) as table:
        return list(table.rows(skip))


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def parquet(path, columns, **settings):
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table(columns), path, **settings)
    return path


def both_rows(tmp_path, kind):
    """The same two rows in a format."""
    texts = ['naïve "𝄞", ok', "zwei"]
    if kind == "parquet":
        return parquet(tmp_path / "t.parquet", {"b": [1, 0], "a": texts})
    content = {
        "tsv": f"b\ta\n1\t{texts[0]}\n0\t{texts[1]}\n",
        "csv": 'b,a\n1,"naïve ""𝄞"", ok"\n0,zwei\n',
        "jsonl": "".join(json.dumps({"b": b, "a": a, "c": []}) + "\n" for b, a in zip((1, 0), texts, strict=True)),
    }[kind]
    return write(tmp_path / f"t.{kind}", content)


@pytest.mark.parametrize("kind", ["tsv", "csv", "jsonl", "parquet"])
def test_the_same_rows_in_every_format(tmp_path, kind):
    read = rows(both_rows(tmp_path, kind))
    assert [row.values for row in read] == [{"a": 'naïve "𝄞", ok', "b": "1"}, {"a": "zwei", "b": "0"}]
    assert [row.number for row in read] == [1, 2]
    assert [row.line for row in read] == ([2, 3] if kind in ("tsv", "csv") else [1, 2])
    assert not any(row.problem for row in read)


@pytest.mark.parametrize("kind", ["tsv", "csv", "jsonl"])
def test_byte_order_marks_line_ends_and_streams(tmp_path, kind):
    content = both_rows(tmp_path, kind).read_bytes()
    expected = [row.values for row in rows(io.BytesIO(content), file_format=kind)]
    changed = b"\xef\xbb\xbf" + content.replace(b"\n", b"\r\n").rstrip() + b"\r\n\r\n  \n"
    assert [row.values for row in rows(io.BytesIO(changed), file_format=kind)] == expected
    assert [row.values for row in rows(io.BytesIO(content.rstrip()), file_format=kind)] == expected


def test_lines_of_text_are_all_rows(tmp_path):
    path = write(tmp_path / "t.txt", b"\xef\xbb\xbfone\r\n\n \xfftwo\nthree\n\n")
    read = rows(path, {"text": "text"})
    assert [row.values.get("text") for row in read] == ["one", None, " \ufffdtwo", "three", None]
    assert [row.problem for row in read] == [
        "",
        "has no text in the column 'text'",
        "is not UTF-8 at byte 2 (0xff)",
        "",
        "has no text in the column 'text'",
    ]
    assert rows(write(tmp_path / "empty.txt", b"\xef\xbb\xbf"), {"text": "text"}) == []


def test_quoted_fields_hold_lines(tmp_path):
    path = write(tmp_path / "t.csv", 'a,b\n"x\n\n""y"", z",1\r\n5" disk,2\n')
    read = rows(path)
    assert [row.values for row in read] == [{"a": 'x\n\n"y", z', "b": "1"}, {"a": '5" disk', "b": "2"}]
    assert [row.line for row in read] == [2, 5]


def test_quotes_are_characters_in_tsv(tmp_path):
    path = write(tmp_path / "t.tsv", 'a\tb\n"one" "\t1\n"two\t2\n')
    assert [row.values["a"] for row in rows(path)] == ['"one" "', '"two']


DAMAGED = {
    "tsv": (
        b"a\tb\ngood\t1\n\xe9\t1\nshort\nlong\t1\t2\n \t1\nx\t\n\nlast\t2\n",
        [
            "",
            "is not UTF-8 at byte 1 (0xe9)",
            "has 1 fields, but the header names 2",
            "has 3 fields, but the header names 2",
            "has no text in the column 'a'",
            "has no text in the column 'b'",
            "has 1 fields, but the header names 2",
            "",
        ],
    ),
    "csv": (
        b'a,b\ngood,1\n\xe9,1\nshort\n"x"y,1\n\n,1\nlast,2\n"open,1\n\n',
        [
            "",
            "is not UTF-8 at byte 1 (0xe9)",
            "has 1 fields, but the header names 2",
            "is no CSV: ',' expected after '\"'",
            "has 0 fields, but the header names 2",
            "has no text in the column 'a'",
            "",
            "is no CSV: unexpected end of data",
        ],
    ),
    "jsonl": (
        b'{"a": "good", "b": 1.5}\n{"a": "\xe9", "b": 1}\n{"a": "x"}\n[1]\n{"a": 3, "b": 1}\n{"a": null, "b": 1}\n{"a": "x", "b": {}}\n'
        b'{"a"\n{"a": "\\ud800", "b": 1}\n\n{"a": "last", "b": true}',
        [
            "",
            "is not UTF-8 at byte 8 (0xe9)",
            "has no field 'b'",
            "is no JSON object, but of type list",
            "has no text, but a value of type int in the column 'a'",
            "has no value in the column 'a'",
            "has a value of type dict in the column 'b'",
            "is no JSON: Expecting ':' delimiter: line 1 column 5 (char 4)",
            "has a lone surrogate in the column 'a'",
            "is no JSON: Expecting value: line 1 column 1 (char 0)",
            "",
        ],
    ),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_damage_is_named_and_the_rest_is_read(tmp_path, kind):
    content, problems = DAMAGED[kind]
    path = write(tmp_path / f"t.{kind}", content)
    read = rows(path)
    assert [row.problem for row in read] == problems
    assert [row.number for row in read] == list(range(1, len(problems) + 1))
    assert [row.values["a"] for row in read if not row.problem] == ["good", "last"]
    assert all(set(row.values) == set(COLUMNS) for row in read if not row.problem)
    for skip in range(len(problems) + 2):
        assert rows(path, skip=skip) == read[skip:]
    first = next(row for row in read if row.problem)
    with Table(path, COLUMNS) as table, pytest.raises(InputError, match=rf"t.{kind}, line {first.line}: the row is not UTF-8"):
        list(table.good())


def test_damage_in_parquet(tmp_path):
    import pyarrow

    texts = pyarrow.StringArray.from_buffers(
        3, pyarrow.py_buffer(b"\0\0\0\0\4\0\0\0\5\0\0\0\5\0\0\0"), pyarrow.py_buffer(b"good\xe9")
    )
    path = parquet(tmp_path / "t.parquet", {"a": texts, "b": [1, 2, None]})
    read = rows(path)
    assert [row.problem for row in read] == ["", "is not UTF-8 at byte 1 (0xe9)", "has no text in the column 'a'"]
    assert rows(path, {"b": "value"})[2].problem == "has no value in the column 'b'"


def test_parquet_is_read_on_from_any_row(tmp_path):
    path = parquet(tmp_path / "t.parquet", {"a": [f"t{i}" for i in range(10)], "b": list(range(10))}, row_group_size=4)
    for skip in range(12):
        assert [row.number for row in rows(path, skip=skip)] == list(range(skip + 1, 11))
        assert [row.values["a"] for row in rows(path, skip=skip)] == [f"t{i}" for i in range(skip, 10)]


def test_long_lines_are_damage(tmp_path, monkeypatch):
    monkeypatch.setattr(lines, "LONGEST", 20)
    path = write(tmp_path / "t.tsv", "a\tb\n" + "x" * 18 + "\t1\n" + "x" * 60 + "\t1\nshort\t2\n")
    read = rows(path)
    assert [row.problem for row in read] == ["", "is a line of more than 20 bytes", ""]
    path = write(tmp_path / "t.csv", 'a,b\n"' + "open\n" * 6 + "fine,2\n")
    read = rows(path)
    assert read[0].problem == "is no CSV: a quote is open for more than 20 bytes"
    assert [row.problem for row in read[1:-1]] == ["has 1 fields, but the header names 2"] * 5
    assert read[-1].values == {"a": "fine", "b": "2"}


STRAY = {
    "never closed": ('"stray,4', "x,11", "is no CSV: unexpected end of data"),
    "closed where another one opens": ('"stray,4', '"quoted, fine",11', "is no CSV: ',' expected after '\"'"),
    "closed where a row has a comma": ('"stray,4', 'x,"11",', "is no CSV: ',' expected after '\"'"),
    "closed with too many fields": (
        '"stray,4',
        'x",11,y',
        "is no CSV: a quote is open until line 13, which makes 3 fields, not 2",
    ),
    "beside its id": ('4,"stray', "11,x", "is no CSV: unexpected end of data"),
}


@pytest.mark.parametrize("case", STRAY)
def test_a_stray_quote_costs_its_own_row(tmp_path, case):
    stray, other, problem = STRAY[case]
    turned = stray.startswith("4")
    lines = [f"{i},good {i}" if turned else f"good {i},{i}" for i in range(20)]
    lines[4], lines[11] = stray, other
    path = write(tmp_path / "t.csv", ("b,a\n" if turned else "a,b\n") + "\n".join(lines) + "\n")
    read = rows(path)
    assert [row.line for row in read] == list(range(2, 22))
    assert (read[4].problem, read[4].values, read[4].broken) == (problem, {"b": "4"} if turned else {}, True)
    assert not any(row.problem for row in read if row.number not in (5, 12))
    assert [row.values["b"] for row in read if row.number not in (5, 12)] == [str(i) for i in range(20) if i not in (4, 11)]
    for skip in range(21):
        assert rows(path, skip=skip) == read[skip:]


def test_blank_lines_in_an_open_quote_are_not_gathered_without_end(tmp_path, monkeypatch):
    monkeypatch.setattr(lines, "LONGEST", 20)
    read = rows(write(tmp_path / "t.csv", 'a,b\n"' + "\n" * 40 + "fine,2\n"))
    assert read[0].problem == "is no CSV: a quote is open for more than 20 bytes"
    assert (len(read), read[-1].values) == (41, {"a": "fine", "b": "2"})


UNREADABLE = {
    "tsv": (b"i\ta\tb\nk1\t\xff\t1\nk2\nk3\tx\t1\t2\n\nk5\tx\t1\n", ["k1", "k2", None, None, "k5"]),
    "csv": (b'i,a,b\nk1,"\xff\n",1\nk2\nk3,x,1,2\n\nk5,x,1\nk6,"x"x,1\n', ["k1", "k2", None, None, "k5", "k6"]),
    "jsonl": (
        b'{"a": "\xff", "b": 1, "i": "k1"}\n{"i": "k2"}\n[1]\n\n{"a": "x", "b": 1, "i": "k5"}\n',
        ["k1", "k2", None, None, "k5"],
    ),
}


@pytest.mark.parametrize("kind", UNREADABLE)
def test_damaged_rows_keep_the_id_that_can_be_read(tmp_path, kind):
    content, ids = UNREADABLE[kind]
    read = rows(write(tmp_path / f"t.{kind}", content), {"i": "id", "a": "text", "b": "value"})
    assert [row.values.get("i") for row in read] == ids
    assert [bool(row.problem) for row in read] == [i != 4 for i in range(len(ids))]
    assert read[0].values["a"].strip() == "\ufffd"
    assert [row.broken for row in read] == [i != 4 and not (kind == "jsonl" and i == 1) for i in range(len(ids))]


def test_ids_of_parquet_are_of_any_type_and_labels_numbers_of_any_type(tmp_path):
    import pyarrow

    day, moment = datetime.date(2020, 1, 31), datetime.datetime(2020, 1, 31, 12, 30)
    number, name = decimal.Decimal("1.50"), uuid.UUID(int=7)
    columns = {"day": [day], "moment": [moment], "number": [number], "list": [[1]], "none": pyarrow.array([None], "string")}
    columns |= {"ns": pyarrow.array([1], "time64[ns]"), "uuid": pyarrow.array([name.bytes], pyarrow.uuid())}
    path = parquet(tmp_path / "t.parquet", columns)
    (row,) = rows(path, dict.fromkeys(columns, "id"))
    expected = {"day": "2020-01-31", "moment": "2020-01-31 12:30:00", "number": "1.50", "ns": "00:00:00.000000001"}
    assert row.values == expected | {"uuid": str(name)}
    assert row.problem == "has a value of type list in the column 'list'"
    assert rows(path, {"number": "value"})[0].values == {"number": "1.50"}
    assert rows(path, {"day": "value"})[0].problem == "has a value of type date in the column 'day'"


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the system does not tell a process its peak")
def test_a_large_row_group_of_parquet_is_read_in_bounded_memory(tmp_path):
    """In a process of its own, whose peak is that of reading."""
    texts = [f"{i:0300}" for i in range(1000)]
    path = parquet(tmp_path / "t.parquet", {"a": texts * 200}, row_group_size=200_000, use_dictionary=False, compression="none")
    assert path.stat().st_size > 60_000_000
    script = f"""
import itertools, pathlib, re
from datamux_jax.data.tables import Table
def peak():
    return int(re.search("VmHWM: *([0-9]+)", pathlib.Path("/proc/self/status").read_text().replace("\\t", " "))[1])
with Table({str(path)!r}, {{"a": "text"}}) as table:
    before = peak()
    assert len(list(itertools.islice(table.rows(), 1000))) == 1000
print(peak() - before)"""
    kilobytes = int(subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout)
    assert kilobytes < 30_000


def test_the_head_of_json_lines_does_not_decide_over_the_rest(tmp_path):
    late = write(tmp_path / "late.jsonl", '{"a": "x"}\n' * 100 + '{"a": "x", "b": 7}\n')
    assert rows(late, optional=("b",))[-1].values == {"a": "x", "b": "7"}
    with pytest.raises(InputError, match=r"has no column 'b'. Its columns are: a"):
        rows(late)
    for bad in ("garbage\n", "[1]\n"):
        damaged = rows(write(tmp_path / "damaged.jsonl", bad * 100 + '{"a": "x", "b": 7}\n'))
        assert [bool(row.problem) for row in damaged] == [True] * 100 + [False]
    with pytest.raises(InputError, match=r"has no column 'a'. Its columns are: b"):
        rows(write(tmp_path / "none.jsonl", '{"b": 1}\n' * 101), optional=("b",))


def test_columns_without_a_header(tmp_path):
    path = write(tmp_path / "t.tsv", "short\nx\t1\ty\nz\t2\ty\tmore\n")
    read = rows(path, {"1": "text", "3": "value"}, header=False)
    assert [row.values for row in read] == [{"1": "short"}, {"1": "x", "3": "y"}, {"1": "z", "3": "y"}]
    assert [row.problem for row in read] == ["has no field '3'", "", ""]
    assert [row.line for row in read] == [1, 2, 3]


def test_words_and_strings(tmp_path):
    lines = ['{"w": ["a", "b c"]}', '{"w": " a  b "}', '{"w": ["a", ""]}', '{"w": []}', '{"w": [1]}', '{"w": 1}', '{"w": null}']
    read = rows(write(tmp_path / "t.jsonl", "\n".join(lines)), {"w": "words"})
    assert [row.values.get("w") for row in read] == [["a", "b c"], ["a", "b"], None, None, None, None, None]
    problems = [
        "a word with no text",
        "no word",
        "a word with no text, but a value of type int",
        "no list of words, but a value of",
    ]
    for row, problem in zip(read[2:], [*problems, "no value"], strict=True):
        assert row.problem.startswith(f"has {problem}")
    assert rows(write(tmp_path / "t.tsv", "a\tb\n\tx\n"), {"a": "string"})[0].values == {"a": ""}


@pytest.mark.parametrize("kind", ["tsv", "csv", "jsonl", "parquet"])
def test_an_unknown_column_is_refused_with_those_there_are(tmp_path, kind):
    with pytest.raises(InputError, match=rf"t.{kind} has no column 'text'. Its columns are: b, a"):
        Table(both_rows(tmp_path, kind), {"text": "text"})


@pytest.mark.parametrize(
    ("name", "content", "settings", "message"),
    [
        ("t.tsv", "", {}, r"The header of .*t.tsv is missing: the file is empty"),
        ("t.tsv", b"a\t\xff\n", {}, r"The header of .* is not UTF-8 at byte 3"),
        ("t.tsv", "a\ta\tb\n", {}, r"has 2 columns named 'a'"),
        ("t.tsv", "x\ty\n", {"header": False}, r"has no column 'a'. Its columns are: 1, 2"),
        ("t.txt", "x\n", {"header": False}, r"header is false, which is for tsv and csv"),
        ("t.txt", "x\n", {}, r"has no column 'a'. Its columns are: text"),
        ("t.tsv", "a\tb\n".encode("utf-16"), {}, r"is UTF-16-LE, but tables are read as UTF-8.*iconv"),
        ("t.dat", "x", {}, r"ending of .*t.dat does not say.*\.tsv.*Name the format: tsv, csv, jsonl, parquet, text"),
        ("t.dat", "x", {"file_format": "xls"}, r"The format 'xls' does not exist. Choose one of: csv, jsonl"),
        ("t.parquet", "x", {}, r"t.parquet is no Parquet: "),
        ("t.jsonl", "", {}, r"Its columns are: none, it is empty"),
    ],
)
def test_what_is_no_table_is_refused(tmp_path, name, content, settings, message):
    with pytest.raises(InputError, match=message):
        Table(write(tmp_path / name, content), COLUMNS, **settings)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"none.tsv cannot be read: No such file"):
        Table(tmp_path / "none.tsv", COLUMNS)


def test_parquet_needs_its_extra_and_a_file(tmp_path, monkeypatch):
    path = both_rows(tmp_path, "parquet")

    class Stream(io.BytesIO):
        def seekable(self):
            return False

    with pytest.raises(InputError, match=r"is a stream, but Parquet is read from its end"):
        Table(Stream(path.read_bytes()), COLUMNS, file_format="parquet")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(InputError, match=r"pip install 'datamux_jax\[parquet\]'"):
        Table(path, COLUMNS)


@pytest.mark.parametrize("kind", ["tsv", "csv", "jsonl", "parquet"])
def test_progress_goes_from_nothing_to_the_size(tmp_path, kind):
    path = both_rows(tmp_path, kind)
    with Table(path, COLUMNS) as table:
        positions = [table.position for _ in table.rows()]
        assert positions == sorted(positions)
        assert table.position == table.size == path.stat().st_size
