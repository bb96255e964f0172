"""The dashboards, built with Grafana's own SDK."""
