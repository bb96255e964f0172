"""Metrics, access log, traces and audits."""
