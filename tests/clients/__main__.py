"""Tests all clients, and writes docs/clients.md.

python -m tests.clients                          all of them
python -m tests.clients litellm_client           only some, without writing the page
python -m tests.clients --lock litellm_client    pins their newest versions first
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.clients import environments
from tests.clients.matrix import CLIENTS, CheckResult, Client, run_checks, servers

PAGE = Path("docs/clients.md")
INTRODUCTION = """\
# Clients

These clients are tested against the server with the demo pair, each in an environment of its own with pinned versions.
They are configured with the address of the server, an API key and the name of the model. Temperature 0 makes answers
comparable, and some retries are turned off; otherwise they use their defaults.

`make test-clients` runs all of them and writes this page; `make test` runs some.

What needs constrained decoding (structured output, and tools that are required, named or strict) is rejected with an
error that names the field.

Some clients make tools strict by default. Turn that off: `function_tool(..., strict_mode=False)` in the OpenAI Agents
SDK, `OpenAIModelProfile(openai_supports_strict_tool_definition=False)` in Pydantic AI, and `-M strict_tools=false` in
Inspect.

| client | version | works | rejected by name |
|---|---|---|---|
"""


def page(results: Mapping[Client, Sequence[CheckResult]]) -> str:
    rows = []
    for client, checks in results.items():
        working = ", ".join(check.title for check in checks if check.result == "works")
        rejected = ", ".join(f"{check.title} (`{check.detail}`)" for check in checks if check.result == "rejected")
        rows.append(f"| {client.title} (`{client.packages[0]}`) | {client.version} | {working} | {rejected} |\n")
    return INTRODUCTION + "".join(rows)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.clients", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    by_name = {client.name: client for client in CLIENTS}
    parser.add_argument("clients", nargs="*", choices=[*by_name, []], help="only these (default: all)")
    parser.add_argument("--lock", action="store_true", help="pin the newest versions first")
    options = parser.parse_args()
    clients = [by_name[name] for name in options.clients or by_name]
    if options.lock:
        for client in clients:
            if not client.in_node:
                print(environments.lock(client.name, client.packages), flush=True)
        if any(client.in_node for client in clients):
            in_node = [client for client in CLIENTS if client.in_node]  # they share one environment
            print(environments.lock_node(sorted({package for client in in_node for package in client.packages})))
    results: dict[Client, Sequence[CheckResult]] = {}
    with servers() as variables:
        for client in clients:
            results[client] = run_checks(client, variables)
            for check in results[client]:
                print(f"{client.title}: {check.title}: {check.result} {check.detail}", flush=True)
    if any(check.result == "failed" for checks in results.values() for check in checks):
        return 1
    if not options.clients:
        PAGE.write_text(page(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
