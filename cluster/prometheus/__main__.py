"""Writes rules.yml and alerts.yml."""

from pathlib import Path
from typing import Any

import yaml

from cluster.prometheus.alerts import alerts
from cluster.prometheus.rules import rules

HERE = Path(__file__).parent
HEADER = "# Written by `make dashboards` from cluster/prometheus/{}: change it there.\n"


def render_files() -> dict[Path, str]:
    return {
        HERE / "rules.yml": HEADER.format("rules.py") + _yaml(rules()),
        HERE / "alerts.yml": HEADER.format("alerts.py") + _yaml(alerts()),
    }


def _yaml(content: dict[str, Any]) -> str:
    return yaml.safe_dump(content, sort_keys=False, width=118)


if __name__ == "__main__":
    for path, text in render_files().items():
        path.write_text(text)
