"""The most used clients. `make test-clients` runs all of them."""

from collections.abc import Iterator, Mapping

import pytest

from tests.clients.__main__ import PAGE
from tests.clients.environments import ClientUnavailable
from tests.clients.matrix import CLIENTS, Client, run_checks, servers

CORE = [client for client in CLIENTS if client.in_make_test]


@pytest.fixture(scope="module")
def variables() -> Iterator[Mapping[str, str]]:
    with servers() as variables:
        yield variables


@pytest.mark.slow
@pytest.mark.timeout(600)  # the first run installs the client
@pytest.mark.parametrize("client", CORE, ids=lambda client: client.name)
def test_a_client_works_with_its_defaults(client: Client, variables: Mapping[str, str]) -> None:
    try:
        results = run_checks(client, variables)
    except ClientUnavailable as error:
        pytest.skip(str(error))
    assert not [check for check in results if check.result == "failed"]


@pytest.mark.parametrize("client", CLIENTS, ids=lambda client: client.name)
def test_the_page_says_which_version_was_tested(client: Client) -> None:
    """It is written by `make test-clients`."""
    assert f"| {client.title} (`{client.packages[0]}`) | {client.version} |" in PAGE.read_text()
