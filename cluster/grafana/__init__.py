"""Dashboards, written with Grafana's own SDK."""
