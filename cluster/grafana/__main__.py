"""Writes the dashboards' JSON files."""

from pathlib import Path

from grafana_foundation_sdk.cog.encoder import JSONEncoder

from cluster.grafana.engine import ENGINE
from cluster.grafana.overview import OVERVIEW
from cluster.grafana.pipeline import PIPELINE
from cluster.grafana.quality import QUALITY

FOLDER = Path(__file__).parent / "dashboards"
BOARDS = (OVERVIEW, PIPELINE, QUALITY, ENGINE)


def render_files() -> dict[Path, str]:
    encoder = JSONEncoder(sort_keys=True, indent=1, ensure_ascii=False)
    return {FOLDER / f"{board.name}.json": encoder.encode(board.built()) + "\n" for board in BOARDS}


if __name__ == "__main__":
    for path, text in render_files().items():
        path.write_text(text)
