"""Claims and their verdicts, and studies written and read back."""

import math

import pytest

from jaxhess.results.page import Picture, Table
from jaxhess.results.study import Claim, Study, index_page, study_files, verdict_count

PAPER = ("arXiv 0000.00000", "Table 6", "Blocks are <far> from the whole.", "0.94 ± 0.06", "relative error")


@pytest.mark.parametrize(
    ("holds", "ours", "error", "verdict"),
    [
        ((0.8, 1.0), 0.9, 0.1, "holds"),
        ((0.8, 1.0), 0.9, 0.11, "cannot tell"),
        ((0.8, 1.0), 0.7, 0.09, "does not hold"),
        ((0.8, 1.0), 1.2, 0.1, "does not hold"),
        ((0.8, None), 1e30, 0.0, "holds"),
        ((None, 0.1), -5.0, 1.0, "holds"),
        ((None, 0.1), 0.3, 0.1, "does not hold"),
        ((None, 0.1), None, 0.0, "cannot tell"),
        ((None, 0.1), math.nan, 0.0, "cannot tell"),
    ],
)
def test_a_verdict_follows_from_the_range_and_the_error(holds, ours, error, verdict):
    assert Claim(*PAPER, holds, ours, error).verdict == verdict
    assert Claim(*PAPER, holds, ours, error, obstacle="no network").verdict == "cannot tell"


@pytest.mark.parametrize(("holds", "error"), [((1.0, 0.0), 0.0), ((0, 1), -0.1), ((0, 1), math.nan)])
def test_a_claim_that_nothing_can_decide_is_refused(holds, error):
    with pytest.raises(ValueError, match="of the claim"):
        Claim(*PAPER, holds, 0.5, error)


def a_study() -> Study:
    return Study(
        "Blocks",
        (Claim(*PAPER, (0.8, 1.0), 0.9, 0.05, "a model"), Claim(*PAPER, (0.8, None), None, obstacle="no network")),
        (Table(("n", "n²"), (("2", "4"),), "squares"),),
        (Picture("blocks", b"png", "how to read it"),),
        {"options": {"steps": [1, 2]}, "seconds": 1.5},
    )


def written(folder, study):
    for name, content in study_files(study).items():
        (folder / name).write_bytes(content)


def test_a_study_is_read_back_as_it_was_written(tmp_path):
    written(tmp_path, a_study())
    assert {path.name for path in tmp_path.iterdir()} == {"study.json", "study.html", "blocks.png"}
    assert Study.load(tmp_path) == a_study()


def test_the_pages_have_every_claim_and_escape_it(tmp_path):
    written(tmp_path, a_study())
    for html in ((tmp_path / "study.html").read_text(), index_page({"blocks": a_study()})):
        assert html.count("Blocks are &lt;far&gt; from the whole.") == 2
        assert "holds: within 0.8 to 1" in html
        assert "cannot tell: no network" in html
        assert verdict_count(a_study().claims) in html
    assert 'href="blocks/study.html"' in index_page({"blocks": a_study()})


@pytest.mark.parametrize("content", ["", "[]", '{"title": "x"}'])
def test_what_is_no_study_is_refused(content, tmp_path):
    (tmp_path / "study.json").write_text(content)
    with pytest.raises(ValueError, match=r"study\.json is not the record of a study"):
        Study.load(tmp_path)


def test_a_study_without_its_figure_is_refused(tmp_path):
    written(tmp_path, a_study())
    (tmp_path / "blocks.png").unlink()
    with pytest.raises(ValueError, match="a figure of it is missing"):
        Study.load(tmp_path)
