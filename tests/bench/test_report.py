"""The pages show what the JSON documents hold."""

import json
import re

import pytest

from bench import offline, report
from bench.report import BLOCKS, markdown_files, update_markdown
from training.provenance import PROJECT_ROOT, describe_run, provenance_sentence

EARLIER_TABLE = "| mode | speed-up |\n| --- | --- |\n| off | 1.00 |"


def markdown_with(block, content=""):
    return f"Before.\n\n<!-- results: {block} -->\n{content}\n<!-- end -->\n\nAfter.\n"


def write(root, name, document):
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document))


@pytest.fixture
def document():
    contender = {"tokens_per_s": 250.0, "ttft_s": 0.009, "answer_s": 0.5, "accepted_share": None}
    figures = {"speedup": 3.0712, "speedup_interval": [2.98, 3.15], "accuracy": 0.998, "accuracy_interval": [0.98, 1.0]}
    modes = dict.fromkeys((*offline.DESCRIPTIONS, "sequential", "exact"), contender | figures)
    costs = {"draft_token": 0.3, "target_token": 3.0}
    run = describe_run(problems=500, seeds=[5])
    return {"run": run, "modes": modes, "costs_ms": costs, "ideal_speedup": 3.2, "of_ideal": 0.95}


@pytest.mark.parametrize("path", markdown_files(PROJECT_ROOT), ids=str)
def test_committed_markdown_shows_the_committed_figures(path):
    text = path.read_text()
    assert update_markdown(text, PROJECT_ROOT) == text


def test_committed_model_cards_show_the_committed_figures():
    model_cards = report.model_cards(PROJECT_ROOT / "models")
    assert len(model_cards) == 6
    assert {path: path.read_text() for path in model_cards} == model_cards


def test_every_block_is_used():
    text = "".join(path.read_text() for path in markdown_files(PROJECT_ROOT))
    names = set(re.findall(r"<!-- results: ([\w-]+) -->", text))
    assert names >= BLOCKS.keys() - {"pair"} and names <= BLOCKS.keys()


def test_a_block_holds_the_table_and_how_it_was_measured(tmp_path, document):
    write(tmp_path, "bench/results/offline.json", document)
    updated = update_markdown(markdown_with("offline-summary", EARLIER_TABLE), tmp_path)
    assert "| `full`: the complete draft is verified at once | 3.07 (2.98 to 3.15) | 99.8% (98.0 to 100.0) |" in updated
    assert provenance_sentence(document["run"]) in updated and EARLIER_TABLE not in updated
    assert updated.startswith("Before.\n") and updated.endswith("<!-- end -->\n\nAfter.\n")
    assert update_markdown(updated, tmp_path) == updated


@pytest.mark.parametrize("earlier", ["", EARLIER_TABLE])
def test_a_block_without_a_document_says_that_it_was_not_measured(tmp_path, earlier):
    updated = update_markdown(markdown_with("load", earlier), tmp_path)
    assert "Not measured with this version: run `bench/measure.sh load`" in updated
    assert (report.EARLIER in updated) == (earlier in updated and bool(earlier))
    assert update_markdown(updated, tmp_path) == updated


def test_a_measured_block_replaces_the_notice(tmp_path, document):
    text = update_markdown(markdown_with("offline", EARLIER_TABLE), tmp_path)
    write(tmp_path, "bench/results/offline.json", document)
    assert "Not measured" not in update_markdown(text, tmp_path)


def test_a_figure_in_a_sentence_comes_from_its_document(tmp_path, document):
    text = "It is <!-- figure: bench/results/offline.json#/modes/full/speedup .1f -->9.9<!-- end --> times as fast."
    assert update_markdown(text, tmp_path) == text
    write(tmp_path, "bench/results/offline.json", document)
    assert ">3.1<!-- end --> times" in update_markdown(text, tmp_path)


def test_an_unknown_block_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="there is no block 'nonsense'"):
        update_markdown(markdown_with("nonsense"), tmp_path)


def test_the_measurements_write_the_documents_of_all_blocks():
    script = (PROJECT_ROOT / "bench" / "measure.sh").read_text().replace("$results", "bench/results")
    assert {str(block.document) for block in BLOCKS.values()} <= set(re.findall(r"[\w/-]+\.json", script))
