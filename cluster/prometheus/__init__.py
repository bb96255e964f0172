"""What Prometheus scrapes, records and alerts on."""
