"""Writes rules.yml and alerts.yml."""

from pathlib import Path
from typing import Any

import yaml

from cluster.prometheus.alerts import alerts
from cluster.prometheus.rules import rules

HERE = Path(__file__).parent
WHENCE = "# Written by `make dashboards` from cluster/prometheus/{}: change it there.\n"


def written() -> dict[Path, str]:
    return {
        HERE / "rules.yml": WHENCE.format("rules.py") + _yaml(rules()),
        HERE / "alerts.yml": WHENCE.format("alerts.py") + _yaml(alerts()),
    }


def _yaml(content: dict[str, Any]) -> str:
    return yaml.safe_dump(content, sort_keys=False, width=118)


if __name__ == "__main__":
    for path, text in written().items():
        path.write_text(text)
