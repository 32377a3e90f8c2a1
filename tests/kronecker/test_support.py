"""The table of layers and operators in the documentation is what the library does."""

from kronecker.support import FILE, table


def test_the_table_is_true():
    found, committed = table().splitlines(), FILE.read_text(encoding="utf-8").splitlines()
    assert "WRONG" not in "".join(found)
    assert found == committed, "write it anew: make support"
