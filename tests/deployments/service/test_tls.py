"""Tests HTTPS with a certificate that is issued for a public name."""

import ssl
import subprocess

import httpx
import pytest

from parse.demo import EXAMPLE_PROMPT
from tests.deployments.service.service_client import TIMEOUT_S, chat

NAME = "parse.example"


@pytest.fixture
def certificate(tmp_path):
    """A self-signed certificate and its key."""
    options = {"ssl_certfile": str(tmp_path / "certificate.pem"), "ssl_keyfile": str(tmp_path / "key.pem")}
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    command += ["-subj", f"/CN={NAME}", "-addext", f"subjectAltName=DNS:{NAME}", "-days", "2"]
    command += ["-out", options["ssl_certfile"], "-keyout", options["ssl_keyfile"]]
    subprocess.run(command, check=True, capture_output=True)
    return options


def test_a_service_with_a_certificate_answers_over_https_only(deployed, certificate):
    deployed.shut_down()
    try:
        result = deployed.deploy(http_options=certificate, draft=None)
        assert result.returncode == 0, result.stdout + result.stderr
        url = f"https://127.0.0.1:{deployed.port}"
        assert url in result.stdout
        context = ssl.create_default_context(cafile=certificate["ssl_certfile"])
        with httpx.Client(verify=context, timeout=TIMEOUT_S) as client:
            request = client.build_request(
                "POST",
                f"{url}/v1/chat/completions",
                json=chat(EXAMPLE_PROMPT, mode="off"),
                extensions={"sni_hostname": NAME},
            )
            response = client.send(request)
        assert response.status_code == 200 and "80" in response.json()["choices"][0]["message"]["content"]
        with pytest.raises(httpx.TransportError):
            httpx.get(f"http://127.0.0.1:{deployed.port}/ready", timeout=TIMEOUT_S)
    finally:
        deployed.shut_down()
