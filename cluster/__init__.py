"""What operators deploy.

The folder's Python writes dashboards, rules and alerts, and runs `make monitoring`.
"""
