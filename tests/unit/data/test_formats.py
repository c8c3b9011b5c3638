"""What is read of a file, and what is said where it cannot be read exactly: no row is merged, split or lost."""

import gzip
import json
import sys
import zipfile
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet
import pytest

from trainer.config.schema import DataConfig, Source, TaskConfig
from trainer.data.corpus import load_corpus, load_for_prediction
from trainer.data.sources import check_paths, is_hub_id
from trainer.errors import UserError
from trainer.tasks.single_label import TASK

CSV = "text,label\na,x\nb,y\n"
TSV = CSV.replace(",", "\t")
LINES = '{"text": "a", "label": "x"}\n{"text": "b", "label": "y"}\n'
ROWS = [("a", "x"), ("b", "y")]
QUOTES = "a quote opens here and does not close in this line"


def packed(content):
    return gzip.compress(content, mtime=0)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch, cache):
    """Every test in a folder of its own, where the files are."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(path, content):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def rows(path, **settings):
    corpus = load_corpus(DataConfig(train=path, validation_fraction=0.0, **settings), TaskConfig(), 1, quiet=True)
    split = corpus.splits["train"]
    return list(zip(split.texts, [corpus.label_names[i] for i in split.targets], strict=True))


def refused(path, **settings):
    with pytest.raises(UserError) as error:
        rows(path, **settings)
    assert "\n" not in str(error.value)
    return str(error.value).removeprefix("data.train: ")


def predicted(path, id_column=None, **layout):
    """Ids, texts and warnings of an input."""
    config = DataConfig(train="x", empty_text="refuse")
    split, ids, warnings = load_for_prediction(Source(path, **layout), config, TASK, ["a", "b"], id_column, quiet=True)
    return list(zip(ids, split.texts, strict=True)), warnings


# --- one record, one row ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["csv", "tsv"])
def test_a_quote_that_spans_lines_is_refused_where_it_opens(suffix):
    between = "," if suffix == "csv" else "\t"
    text = f"text{between}label\nz{between}x\n" + f'"a{between}x\nc{between}y\nb"{between}y\n'
    path = write(f"q.{suffix}", text)
    assert refused(path).startswith(
        f"{path}: line 3: {QUOTES}; if texts may span lines: --data.quoting multi_line; if "
    )
    with pytest.raises(UserError, match=rf"--input: {path}: line 3: .* --quoting none"):
        predicted(path)
    assert rows(path, quoting="none") == [("z", "x"), ('"a', "x"), ("c", "y"), ('b"', "y")]
    path = write(f"r.{suffix}", f'text{between}label\n"a\n\nb"{between}x\nc{between}y\n')
    assert rows(path, quoting="multi_line") == [("a\n\nb", "x"), ("c", "y")]


@pytest.mark.parametrize(
    ("content", "quoting", "said"),
    [
        ('text,label\na,x\n"b,y\n', "single_line", f"line 3: {QUOTES}"),
        ('text,label\n"a\nb",x\n"b,y\nc,y\n', "multi_line", "line 4: a quote opens here and does not close; if quotes"),
        ('text,label\n"a" b,x\n', "single_line", "line 2: text follows a quote that closes"),
        ('text,label\n"a\nb" c,x\n', "multi_line", "line 2: text follows a quote that closes"),
        ("text,label\na\rb,x\nc,y\n", "single_line", r"line 2 has a carriage return (\r) inside"),
        ("text,label\na\rb,x\nc,y\n", "multi_line", r"line 2 has a carriage return (\r) outside quotes"),
        ('text,label\n"a\nb",x\nc\n', "multi_line", "line 4 has 1 fields, expected 2 (text, label)"),
    ],
)
def test_what_could_merge_or_split_rows_is_refused_with_its_line(content, quoting, said):
    assert refused(write("x.csv", content), quoting=quoting).startswith(f"x.csv: {said}")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("x.csv", "text,label\r\na,x\r\nb,y\r\n"),
        ("x.csv", "text,label\r\r\na,x\r\r\nb,y\r\r\n"),  # written twice as a text file by Windows
        ("x.csv", "text,label\na,x\nb,y\n\n\n"),
        ("x.csv", "\n\ufefftext,label\na,x\nb,y".replace("\n\ufeff", "\ufeff")),
        ("x.csv", "text,label,,\na,x,,\nb,y,,\n"),
        ("x.csv", ",text,label,n,n\n0,a,x,1,2\n1,b,y,,\n"),
        ("x.jsonl", LINES.replace("\n", "\r\n") + "\n\n"),
        ("x.ndjson", LINES),
        ("x.JSON", json.dumps([{"text": "a", "label": "x"}, {"label": "y", "text": "b", "more": 1}])),
        ("x.csv.gz", packed(CSV.encode())),
        ("x.jsonl.gz", packed(LINES.encode())),
    ],
)
def test_files_that_people_have(name, content):
    assert rows(write(name, content)) == ROWS


@pytest.mark.parametrize("between", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c", "\x1e", "\0"])
def test_what_only_looks_like_a_line_end_is_text(between):
    text = f"a{between}b"
    assert rows(write("x.csv", f"text,label\n{text},x\nc,y\n"))[0] == (text, "x")
    assert predicted(write("y.tsv", f"text\n{text}\nc\n"))[0] == [("0", text), ("1", "c")]
    if between > "\x1f":
        assert rows(write("x.jsonl", f'{{"text": "{text}", "label": 1}}\n{{"text": "c", "label": 0}}\n'))[0] == (
            text,
            "1",
        )


def test_an_input_of_one_column_keeps_its_rows():
    assert predicted(write("x.csv", 'text\r\r\na\r\r\n""\r\r\n  \r\r\n\r\r\nb\r\r\n\r\r\n'))[0] == [
        ("0", "a"), ("1", ""), ("2", ""), ("3", ""), ("4", "b"),
    ]  # fmt: skip
    with pytest.raises(UserError, match="line 2 has a carriage return"):
        predicted(write("y.csv", "text\na\rb\nc\n"))


# --- empty texts ------------------------------------------------------------------------------------------------------


def test_rows_without_text_are_refused_skipped_or_kept(monkeypatch):
    path = write("x.csv", "text,label\na,x\n ,y\nb,y\n,\n")
    said = "x.csv: 2 rows have an empty or missing text (text): row 2, 4"
    assert refused(path) == f"{said}; --data.empty_text skip skips them"
    for large in (2**26, 0, 0):  # read, then cached, then from the cache
        monkeypatch.setattr("trainer.data.rows.MIN_CACHED_BYTES", large)
        corpus = load_corpus(
            DataConfig(train=path, validation_fraction=0.0, empty_text="skip"), TaskConfig(), 1, quiet=True
        )
        split = corpus.splits["train"]
        assert (list(split.texts), split.targets.tolist(), split.rows.tolist()) == (["a", "b"], [0, 1], [0, 2])
        assert corpus.label_names == ["x", "y"] and len(split.digests) == 2
        assert corpus.warnings == [f"data.train: {said}; they are skipped"]
    assert refused(path, empty_text="keep") == "x.csv: 1 row has an empty or missing label: row 4"
    assert rows(write("y.csv", "text,label\na,x\n,y\n"), empty_text="keep") == [("a", "x"), ("", "y")]
    assert refused(write("z.csv", "text,label\n,x\n,y\n"), empty_text="skip") == "z.csv has no row with a text"


def test_a_label_of_a_row_after_skipped_ones_is_named_by_the_row_of_its_file():
    write("a.csv", "text,label\na,x\n,x\n")
    write("b.csv", "text,label\nb,y\n,y\nc,\n")
    assert refused("*.csv", empty_text="skip") == "*.csv: 1 row has an empty or missing label: row 3 of b.csv"
    write("b.csv", "text,label\nb,y\n,y\nc,z\n")
    said = refused("*.csv", empty_text="skip", label_names=["x", "y"])
    assert said.startswith("*.csv: 1 of 3 labels are unknown, first 'z' in row 3 of b.csv; known")


def test_an_input_keeps_rows_without_text_and_says_so():
    found, warnings = predicted(write("x.csv", "id,text\n7,a\n8,\n9,b\n"), id_column="id")
    assert found == [("7", "a"), ("8", ""), ("9", "b")]
    assert warnings == ["--input: x.csv: 1 row has an empty or missing text (text): row 2; they are kept"]


# --- columns without a name -------------------------------------------------------------------------------------------


def spilled(path, **settings):
    """The warnings about text that no column with a name holds."""
    corpus = load_corpus(DataConfig(train=path, validation_fraction=0.0, **settings), TaskConfig(), 1, quiet=True)
    return [line for line in corpus.warnings if "behind the last named column" in line]


@pytest.mark.parametrize("header", ["v1,v2,,,", "v1,v2, ,,", "v1,v2,Unnamed: 2,Unnamed: 3,Unnamed: 4"])
def test_text_that_spills_behind_the_named_columns_is_told(monkeypatch, header):
    monkeypatch.setattr("trainer.data.formats.CHUNK", 3)
    layout = {"text_columns": ["v2"], "label_column": "v1"}
    lines = [header, "a,one,,,", "b,two, three,,", "", "a,four,,, ", 'b,"five, six",,,', "a,seven,,, eight", "b,0,,9,"]
    path = write("x.csv", "\n".join(lines) + "\n")
    (told,) = spilled(path, **layout)
    assert told.startswith(f"data.train: {path}: 3 rows have text ") and "row 2, 5, 6; " in told
    assert "quote" in told and told.endswith(" --data.text_columns")
    (told,) = predicted(path, **layout)[1]
    assert f"--input: {path}: 3 rows have " in told and "row 2, 5, 6; " in told and told.endswith(" --text_columns")
    tabs = write("x.tsv", "\n".join(lines).replace(",", "\t") + "\n")
    assert len(spilled(tabs, **layout)) == 1
    one, two = write("1.csv", f"{header}\na,x,,,\n"), write("2.csv", f"{header}\nb,x,y,,\n")
    (told,) = spilled("[12].csv", **layout)
    assert f"1 row has text behind the last named column: row 1 of {two}; " in told and one not in told


@pytest.mark.parametrize(
    "content",
    [
        ",text,label\n0,a,x\n1,b,y\n",
        "Unnamed: 0,text,label\n0,a,x\n1,b,y\n",
        "text,label,,\na,x,,\nb,y, ,\n",
        "text,,label\na,c,x\nb,,y\n",
        "text,label,note\na,x,more\nb,y,\n",
    ],
)
def test_columns_that_hold_no_rest_of_a_text_are_not_told(content):
    path = write("x.csv", content)
    assert rows(path) == ROWS and spilled(path) == []


# --- headers, delimiters, encodings -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "header", ["text,label", "label,text", " Text ,LABEL", '"text","label"', "\ufefftext,label", "\ntext,label"]
)
def test_a_header_is_not_read_as_a_row(header):
    path = write("x.csv", f"{header}\na,x\nb,y\n")
    said = refused(path, column_names=["text", "label"])
    assert " is a header (" in said and "without one: --data.column_names [] (if it is a row" in said
    with pytest.raises(UserError, match=r"is a header .* --column_names \[\]"):
        predicted(path, column_names=["text", "label"])


def test_a_header_with_some_other_names_is_no_row_either():
    path = write("x.csv", "Class Index,Title,Description\n1,a,b\n2,c,d\n")
    layout = {"column_names": ["label", "title", "description"], "text_columns": ["title", "description"]}
    assert "line 1 is a header (Class Index, Title, Description)" in refused(path, **layout)
    path = write("y.csv", "review,stars\n" + "a,x\nb,y\n" * 3)
    corpus = load_corpus(DataConfig(train=path, column_names=["text", "label"], validation_fraction=0), TaskConfig(), 1)
    assert corpus.label_names == ["stars", "x", "y"]
    write("part/a.csv", "1,a,b\n2,c,d\n")
    assert rows("part/*.csv", **layout) == [("a b", "1"), ("c d", "2")]
    write("part/b.csv", "label,Title,description\n1,a,b\n")
    assert "part/b.csv: line 1 is a header" in refused("part/*.csv", **layout)


def test_a_header_in_the_middle_is_no_row():
    # cat a.csv b.csv
    for text in ("text,label\na,x\ntext,label\nb,y\n", "\ufefftext,label\na,x\n\ufefftext,label\nb,y\n"):
        assert refused(write("x.csv", text)) == "x.csv: line 3 repeats the names of the columns; remove it"
    assert predicted(write("y.csv", "text\na\ntext\n"))[0] == [("0", "a"), ("1", "text")]


@pytest.mark.parametrize(
    ("name", "content", "typed"),
    [
        ("x.csv", "text;label\nwell, a;x\nb;y\n", ";"),
        ("x.csv", "Body;Stars\na;x\nb;y\n", ";"),
        ("x.csv", TSV, "\\t"),
        ("x.tsv", CSV, ","),
        ("x.csv.gz", packed(b"text;label\na;x\nb;y\n"), ";"),
    ],
)
def test_another_delimiter_is_named(name, content, typed):
    path = write(name, content)
    assert refused(path).endswith(f": --data.delimiter '{typed}'")
    if b"Body" not in (content if isinstance(content, bytes) else content.encode()):
        assert [label for _, label in rows(path, delimiter=typed)] == ["x", "y"]


def test_a_first_line_that_csv_cannot_read_is_refused_or_read():
    said = "x.csv: line 1 has a carriage return (\\r) outside quotes"
    assert refused(write("x.csv", "te\rxt,note\na,x\n"), quoting="multi_line") == said
    long = "a" * 200_000  # the module refuses fields of half that length by default
    assert rows(write("x.csv", f"{long},x\nb,y\n"), column_names=["text", "label"])[0] == (long, "x")


def test_another_delimiter_of_a_file_without_header_and_of_one_split():
    path = write("x.csv", "a;x\nb;y\n")
    assert refused(path, column_names=["text", "label"]).endswith(": --data.delimiter ';'")
    assert rows(path, column_names=["text", "label"], delimiter=";") == ROWS
    write("ok.csv", CSV)
    with pytest.raises(UserError, match=r"^data.test: .*: --data.test.delimiter ';'$"):
        load_corpus(DataConfig(train="ok.csv", test=Source(path, column_names=["text", "label"])), TaskConfig(), 1)
    with pytest.raises(UserError, match=r"^--input: .*: --delimiter ','$"):
        predicted("ok.csv", delimiter=";")


ACCENT = "text,label\ncafé,x\nb,y\n"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32", "cp1252", "latin-1"])
@pytest.mark.parametrize("is_packed", [False, True])
def test_encodings(encoding, is_packed):
    content = ACCENT.encode(encoding)
    path = write("x.csv.gz" if is_packed else "x.csv", packed(content) if is_packed else content)
    assert rows(path, encoding=encoding) == [("café", "x"), ("b", "y")]


@pytest.mark.parametrize(
    ("content", "encoding", "said"),
    [
        (ACCENT.encode("cp1252"), "utf-8", "line 2 has a byte that is not UTF-8 (0xe9, character 4); set the file"),
        (b"text,label\na,x\n\x81,y\n", "cp1252", "line 3 has a byte that is not CP1252 (0x81, character 1); set the "),
        (ACCENT.encode("utf-16"), "utf-8", "does not look like {}: --data.encoding utf-16"),
        (ACCENT.encode("utf-16-le"), "utf-8", "does not look like {}: --data.encoding utf-16-le"),
        (ACCENT.encode("utf-16-le"), "utf-16", "does not look like {}: --data.encoding utf-16-le"),
        (ACCENT.encode(), "cp1252", "does not look like {}: --data.encoding utf-8"),
        (b"text,label\na,x\nb,y\n", "utf-16", "does not look like {}: --data.encoding utf-8"),
        (ACCENT.encode("utf-16-be"), "latin-1", "does not look like {}: --data.encoding utf-16-le"),
        (packed(b"x"), "utf-8", "is compressed with gzip; add .gz to its name"),
        (b"PK\x03\x04", "cp1252", "is a zip archive or a spreadsheet; name it .zip or .xlsx"),
    ],
)
def test_another_encoding_or_type_is_named(content, encoding, said):
    assert refused(write("x.csv", content), encoding=encoding).startswith(f"x.csv: {said.format(encoding)}")


# --- archives and binary types ----------------------------------------------------------------------------------------


def zipped(path, **files):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name.replace("____", "//").replace("__", ".").replace("//", "__"), content)
    return path


def test_a_zip_with_one_file():
    assert rows(zipped("x.zip", data__csv=CSV, **{"____MACOSX/._data": "x"})) == ROWS
    assert rows(zipped("y.zip", data__jsonl=LINES)) == ROWS
    said = refused(zipped("x.zip", a__csv=CSV, b__csv=CSV))
    assert said == "x.zip: holds 2 files (a.csv, b.csv); unpack it and give the path of one file"
    assert "holds 0 files" in refused(zipped("x.zip"))
    for name in ("a__zip", "a__csv__gz", "a__parquet", "a"):
        assert "x.zip: a compressed file must hold one of .csv" in refused(zipped("x.zip", **{name: CSV}))
    assert refused(write("x.zip", "no")) == "x.zip: File is not a zip file"


def test_archives_that_are_damaged():
    assert "ended before the end-of-stream" in refused(write("x.csv.gz", packed(CSV.encode() * 99)[:-12]))
    assert refused(write("y.csv.gz", CSV)) == "y.csv.gz: Not a gzipped file (b'te')"
    assert "a compressed file must hold one of" in refused(write("x.parquet.gz", packed(b"x")))


def test_a_damaged_byte_in_a_zip_with_lzma():
    with zipfile.ZipFile("x.csv.zip", "w", zipfile.ZIP_LZMA) as archive:
        archive.writestr("x.csv", CSV * 99)
    data = bytearray(Path("x.csv.zip").read_bytes())
    data[60:64] = b"\xff\xff\xff\xff"
    Path("x.csv.zip").write_bytes(data)
    assert refused("x.csv.zip").startswith("x.csv.zip: ")


def test_an_arrow_file_with_a_wrong_offset():
    table = pa.table({"text": ["one", "two"], "label": ["a", "b"]})
    pyarrow.feather.write_feather(table, "x.arrow", compression="uncompressed")
    data = Path("x.arrow").read_bytes()
    offsets = b"\0\0\0\0\3\0\0\0\6\0\0\0"
    assert data.count(offsets) == 1
    Path("x.arrow").write_bytes(data.replace(offsets, b"\0\0\0\0\3\0\0\0\6\0\0\x7f"))
    assert refused("x.arrow").startswith("x.arrow: ")


@pytest.mark.parametrize("name", ["x.parquet", "x.pq", "x.arrow", "x.feather"])
def test_stored_class_names_are_used(name):
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})
    table = datasets.Dataset.from_dict({"text": ["a", "b"], "label": [1, 0]}, features).data.table
    table = table.replace_schema_metadata(features.arrow_schema.metadata)
    write_table = pyarrow.parquet.write_table if name.endswith(("parquet", "pq")) else pyarrow.feather.write_feather
    write_table(table, name)
    assert rows(name) == [("a", "yes"), ("b", "no")]
    assert rows(name, label_names=["n", "y"]) == [("a", "y"), ("b", "n")]
    write_table(table.replace_schema_metadata(None), f"z{name}")
    assert rows(f"z{name}") == [("a", "1"), ("b", "0")]
    assert refused(f"*{name}") == f"z{name}: the stored class names of 'label' are not those of {name}"
    write("other.csv", "text,label\na,n\nb,y\n")
    with pytest.raises(UserError, match=r"^data.test: its stored class names have 'no', which is not a class"):
        load_corpus(DataConfig(train="other.csv", test=name, validation_fraction=0.0), TaskConfig(), 1)
    mapped = Source(name, label_names={"0": "n", "1": "y"})
    assert load_corpus(
        DataConfig(train="other.csv", test=mapped, validation_fraction=0.0), TaskConfig(), 1
    ).label_names == [
        "n",
        "y",
    ]


@pytest.mark.parametrize("name", ["x.csv", "x.parquet", "x.json", "x.arrow", "x.csv.gz", "x.xlsx"])
def test_a_git_lfs_pointer_is_named(name):
    path = write(name, "version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 3\n")
    assert refused(path) == f"{path}: is a Git LFS pointer, not the data; fetch it with git lfs pull"


def test_bytes_that_are_no_text_in_parquet_are_named_by_row():
    texts = [b"a", b"caf\xe9"]
    bad = pa.Array.from_buffers(pa.string(), 2, pa.array(texts, pa.binary()).buffers())
    for path in ("x.parquet", "x.arrow"):
        table = pa.table({"text": bad, "label": ["x", "y"]})
        (pyarrow.parquet.write_table if path == "x.parquet" else pyarrow.feather.write_feather)(table, path)
        assert refused(path) == f"{path}: row 2: column 'text' has a byte that is not UTF-8 (0xe9)"


def test_spreadsheets(monkeypatch):
    openpyxl = pytest.importorskip("openpyxl")

    def book(*sheets):
        made = openpyxl.Workbook()
        made.remove(made.active)
        for number, cells in enumerate(sheets):
            sheet = made.create_sheet(f"S{number}")
            for row in cells:
                sheet.append(row)
        made.save("x.xlsx")
        return "x.xlsx"

    cells = [["n", "text", "label", None, None], [1, "a", 1.0], [None] * 3, [2, 5, "y", None], [None] * 5]
    assert rows(book(cells, [])) == [("a", "1"), ("5", "y")]
    assert "has 2 sheets with cells ('S0', 'S1')" in refused(book(cells, [[0]]))
    (told,) = spilled(book([["text", "label", " "], ["a", "x", None], ["b", "y", 5]]))
    assert "x.xlsx: 1 row has text " in told and ": row 2; " in told
    (told,) = spilled(book([["text", "label"], ["a", "x"], ["b", "y", 1]]))
    assert "x.xlsx: 1 row has text " in told and ": row 2; " in told
    assert "line 2 of the sheet repeats the names of the columns" in refused(book([["text", "label"]] * 2))
    assert [text for text, _ in rows(book(*[ROWS]), column_names=["text", "label"])] == ["a", "b"]
    assert predicted(book([["text"], ["a"], [None], ["b"], [None]]))[0] == [("0", "a"), ("1", ""), ("2", "b")]
    assert "cannot be read" in refused(zipped("x.xlsx", a=""))
    with zipfile.ZipFile(book([["text", "label"], *ROWS])) as whole:
        parts = {part: whole.read(part) for part in whole.namelist()}
    sheet = parts["xl/worksheets/sheet1.xml"]
    for size in (b"A1", b"A1:B2", b"A1:A3"):  # as some programs write it
        assert b'"A1:B3"' in sheet
        with zipfile.ZipFile("y.xlsx", "w") as smaller:
            for part, content in parts.items():
                smaller.writestr(part, content.replace(b'"A1:B3"', b'"' + size + b'"'))
        assert rows("y.xlsx") == ROWS


def test_a_spreadsheet_without_its_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "openpyxl", None)
    assert refused(zipped("x.xlsx", a="")) == (
        "x.xlsx: reading .xlsx needs openpyxl: pip install openpyxl (or save the sheet as csv)"
    )


# --- places -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path",
    ["/usr/no/such/train.txt", "./corpus/default", "corpus/default", "corpus/v2/default", "csv", "json", "text",
     "parquet", "imagefolder", "./x", "../x/y", "~/x", "a/b/c/d", "dta/train.txt", "dta/x.cvs", "x.csv", "no/x.csv",
     "a//b", "a/b/", "C:\\x\\y", "https://x.org/a.csv", "a b/c", "*.csv", "no/**/*.parquet", "corpus/[x]",
     "x" * 300, "no/x.pq", "no/x.GZ", "no/x/y.zip"],
)  # fmt: skip
def test_a_path_that_does_not_exist_is_an_error_at_once(path, monkeypatch):
    write("corpus/v2/train.csv", CSV)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: pytest.fail("asked the hub, or searched the disk"))
    assert refused(path).startswith(f"no file {path!r}")
    with pytest.raises(UserError, match=r"^--input: no file "):
        check_paths({"input": path})


@pytest.mark.parametrize("path", ["owner/name", "owner/name:test", "owner/na.me-1.0/20231101.en", "owner/x.abc:train"])
def test_what_is_looked_up_on_the_hub(path):
    assert refused("owner/x.abc").endswith("a hub data set of this name is written owner/x.abc:train")
    assert is_hub_id(path)
    check_paths({"train": path})
    write("owner/x", "")
    assert not is_hub_id(path)


def test_whatever_datasets_raises_is_said_in_one_line(monkeypatch):
    def fails(*_, **__):
        raise datasets.exceptions.DatasetGenerationError("An error\noccurred") from ValueError("two\nlines")

    monkeypatch.setattr(datasets, "load_dataset", fails)
    with pytest.raises(UserError, match=r"'owner/name' was not found .* \(two lines\)\nUse local files"):
        rows("owner/name")


def test_globs_are_recursive_and_in_order():
    for place, row in (
        ("deep/b.csv", "a,x"),
        ("deep/a/2.csv", "b,y"),
        ("deep/a/1/3.csv", "c,x"),
        ("deep/.h.csv", "h,h"),
    ):
        write(place, f"text,label\n{row}\n")
    wanted = [("c", "x"), ("b", "y"), ("a", "x")]
    assert rows("deep/**/*.csv") == rows("deep/**") == rows("deep/**/**/*.csv") == wanted
    assert "deep/a is a folder; name what" in refused("deep/*")


def test_folders_of_part_files():
    for name in ("_SUCCESS", ".part-00000.csv.crc", "part-00001-f.csv"):
        write(f"spark/{name}", "")
    write("spark/part-00000-f.csv", "text,label\na,x\n")
    write("spark/part-00002-f.csv", "text,label\nb,y\n")
    assert rows("spark") == rows("spark/") == rows("spar*") == rows("spark/*") == rows("spar*/**") == ROWS
    write("lines/part-0.json", LINES.splitlines()[0])
    write("lines/part-1.json", LINES.splitlines()[1])
    assert rows("lines") == ROWS
    write("spark/_delta_log/0.json", "{}")
    assert "spark is a Delta table" in refused("spark")
    write("two/train.csv", CSV)
    write("two/test.csv", CSV)
    write("parted/label=1/part-0.csv", CSV)
    for folder in ("two", "parted"):
        assert refused(folder).startswith(f"{folder} is a folder; name what")


def test_saved_data_sets():
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})
    saved = datasets.Dataset.from_dict({"text": ["a", "b", "c"], "label": [1, 0, 1]}, features).select([2, 1])
    datasets.DatasetDict(train=saved, test=saved).save_to_disk("all", num_shards={"train": 2, "test": 1})
    wanted = [("c", "yes"), ("b", "no")]
    assert rows("all") == rows("all/test") == wanted
    with pytest.raises(UserError, match="all is a folder; name what belongs to this split, as "):
        predicted("all")
    write("broken/state.json", "{}")
    assert "broken/state.json was not written by save_to_disk" in refused("broken")


def test_files_of_an_earlier_save_in_the_same_folder_are_not_read():
    for texts in (["old", "older"], ["a", "b"]):
        data = datasets.Dataset.from_dict({"text": texts, "label": ["x", "y"]})
        data.save_to_disk("again", num_shards=1 if texts[0] == "old" else 2)
    assert [text for text, _ in rows("again")] == ["a", "b"]


def test_what_cannot_be_read_exactly_is_refused():
    write("twice.jsonl", '{"text": "a", "label": "x", "text": "b"}')
    assert "line 1: two columns have the same name 'text'" in refused("twice.jsonl")
    table = pa.table({"text": ["a", "b"], "label": pa.array([1.0, 16777217.0], pa.float32())})
    pyarrow.parquet.write_table(table, "wide.parquet")
    assert "row 2: column 'label' is float, in which 16777216 may have lost digits" in refused("wide.parquet")


# --- several files ----------------------------------------------------------------------------------------------------


def test_shards_may_differ_in_what_is_not_asked_for():
    write("a/1.csv", "text,label\na,x\n")
    write("a/2.csv", "n,label,text\n1,y,b\n")
    write("a/3.csv", "")
    write("a/4.csv", "label,text,other\n")
    write("a/5.jsonl", "\n")
    assert rows("a/*") == ROWS
    write("a/6.jsonl", '{"text": "c", "label": "x", "note": 1}\n{"text": "d", "label": "y"}\n')
    assert len(rows("a/*")) == 4
    write("a/7.csv", "text,lable\nb,y\n")
    assert refused("a/*") == "a/7.csv: column 'label' is in a/1.csv, and not in a/7.csv"
    write("a/4.csv", "c,x\n")  # the only row of a shard without a header
    assert refused("a/*") == "a/4.csv: column 'label' is in a/1.csv, and not in a/4.csv"
    write("e/1.csv", "")
    write("e/2.jsonl", "")
    assert refused("e/*") == "e/* has no rows"


def test_messages_name_the_shard_and_its_row(monkeypatch):
    monkeypatch.setattr("trainer.data.formats.CHUNK", 3)
    write("a.csv", "text,label\n" + "a,x\n" * 8)
    write("b.csv", "text,label\n" + "b,y\n" * 4 + ",y\n" * 2)
    write("c.csv", "text,label\n,y\n")
    for large in (2**26, 0):
        monkeypatch.setattr("trainer.data.rows.MIN_CACHED_BYTES", large)
        assert "(text): row 5, 6 of b.csv; row 1 of c.csv; --data" in refused("[abc].csv")
    write("b.jsonl", '{"text": "b", "label": "y"}\n{"text": ["b"], "label": "y"}\n')
    assert refused("[ab].*").endswith("row 2 of b.jsonl: column 'text' holds a list, not text")
