"""The scanner that knows where keys stand, held against what tomllib reads from the same text."""

import tomllib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blockllm_cli.recipe.lines import key_lines


@pytest.mark.parametrize(
    ("text", "key", "line"),
    [
        ("[batch]\nrows = 1\n", ("batch", "rows"), 2),
        ("\n# rows = 3\n[batch] # x\n\n  rows=1", ("batch", "rows"), 5),
        ("batch.rows = 1", ("batch", "rows"), 1),
        ("batch = {micro_rows = 1, rows = 2}", ("batch", "rows"), 1),
        ("a = [\n 1,\n # b = 2\n]\nb = 1", ("b",), 5),
        ('a = """\nb = 3\n"""\nb = 1', ("b",), 4),
        ("a = '''\nb = 3\n\\'''\nb = 1", ("b",), 4),
        ('a = """x\\""""\nb = 1', ("b",), 2),
        ('a = """"x""""\nb = 1', ("b",), 2),
        ('a = "x # \\" y"\nb = 1', ("b",), 2),
        ("a = 'x \\'\nb = 1", ("b",), 2),
        ('["da.ta"]\n"b c" = 1', ("da.ta", "b c"), 2),
        ('"ro\\u0077s" = 1', ("rows",), 1),
        ("[ data . x ]\na . 'b' = 1", ("data", "x", "a", "b"), 2),
        ("a = [{b = 1},\n {c = 2}]\nd = 3", ("a", "c"), 2),
        ("a = [[1], ['x]', \"]\"]]\nd = 3", ("d",), 2),
        ("a = 2024-01-01 07:32:00 # c\nb = 1", ("b",), 2),
        ("[x]\r\na = 1\r\nb = 2\r\n", ("x", "b"), 3),
        ("[x]\n[x.y]\n[x.z]\nk = 1", ("x", "z", "k"), 4),
        ("[[x]]\nk = 1\n[[x]]\nl = 1", ("x", "l"), 4),
    ],
)
def test_finds_the_line_of_a_key(text: str, key: tuple[str, ...], line: int) -> None:
    tomllib.loads(text)
    assert key_lines(text)[key] == line


def test_an_implied_table_has_the_line_of_the_first_key_in_it() -> None:
    assert key_lines("\nbatch.rows = 1\nbatch.micro_rows = 1")[("batch",)] == 2


BARE = st.text("abcdefgh_-0123456789", min_size=1, max_size=6)
KEYS = st.one_of(
    BARE.map(lambda key: (key, key)),
    st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"], exclude_characters="\\\"'"), max_size=6).map(
        lambda key: (f'"{key}"', key)
    ),
)
VALUES = st.sampled_from(
    ["1", "1.5", "true", '"a = 1 # b"', "'[x]'", '"""\n[y]\nz = 1\n"""', "[1, 2,\n 3]", "{}", "[{k = 1}]", "'''\\'''"]
)
BETWEEN = st.sampled_from(["", "\n", "# c = 1\n", "  ", "\t"])


@settings(deadline=None)
@given(st.lists(st.tuples(KEYS, st.lists(st.tuples(KEYS, VALUES, BETWEEN), max_size=4)), max_size=4))
def test_finds_every_key_that_tomllib_finds_on_the_line_that_holds_it(tables: list) -> None:
    text, expected = "", {}
    for (name_text, name), pairs in tables:
        if (name,) in expected:
            continue
        expected[(name,)] = text.count("\n") + 1
        text += f"[{name_text}]\n"
        for (key_text, key), value, between in pairs:
            if (name, key) in expected:
                continue
            text += between
            expected[(name, key)] = text.count("\n") + 1
            text += f"{key_text} = {value}\n"
    assert set(tomllib.loads(text)) == {path[0] for path in expected}
    found = key_lines(text)
    assert {path: found[path] for path in expected} == expected
