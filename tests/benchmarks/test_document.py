"""The page that the benchmarks write."""

from benchmarks.document import Section, page


def section(title, *cells):
    made = Section(title, "About it.", "float32")
    made.table(["what", "cost"])
    made.row(cells)
    return made


def test_a_section_replaces_its_own_and_leaves_the_others(tmp_path):
    section("First", "a", 1).write(tmp_path)
    section("Second", "b", 2).write(tmp_path)
    before = page(tmp_path).read_text()
    section("First", "a", 3).write(tmp_path)
    assert page(tmp_path).read_text() == before.replace("| a | 1 |", "| a | 3 |")
    assert before.count("\n## ") == 2
    assert before.startswith("# Benchmarks\n\n## First\n\nAbout it.\n")


def test_what_is_written_is_what_was_printed(tmp_path, capsys):
    section("First", "a", 1).write(tmp_path / "page.md")
    assert (tmp_path / "page.md").read_text() == "# Benchmarks\n\n" + capsys.readouterr().out


def test_a_title_that_begins_another_one_is_not_it(tmp_path):
    section("Memory of more", "a", 1).write(tmp_path)
    section("Memory", "b", 2).write(tmp_path)
    assert "## Memory of more\n" in page(tmp_path).read_text()


def test_nothing_is_written_without_a_page(tmp_path):
    section("First", "a", 1).write(None)
    assert not list(tmp_path.iterdir())
