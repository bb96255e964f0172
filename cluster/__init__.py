"""Files for operators.

The Python code in this folder writes dashboards, rules and alerts, and runs `make monitoring`.
"""
