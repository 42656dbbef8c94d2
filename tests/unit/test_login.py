"""How kopf logs in inside a pod."""

import kopf
import pytest

from taskoffer.handlers.watches import by_address

LOGIN = kopf.ConnectionInfo(server="https://kubernetes.default.svc", token="t")


@pytest.mark.parametrize(
    ("environment", "server"),
    [
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1", "KUBERNETES_SERVICE_PORT": "443"}, "https://10.0.0.1:443"),
        ({"KUBERNETES_SERVICE_HOST": "fd00::1", "KUBERNETES_SERVICE_PORT": "6443"}, "https://[fd00::1]:6443"),
        ({}, "https://kubernetes.default.svc"),
    ],
)
def test_in_a_pod_the_api_server_is_reached_by_its_address_which_needs_no_dns(
    environment: dict[str, str], server: str
) -> None:
    login = by_address(LOGIN, environment)
    assert login is not None
    assert login.server == server
    assert login.token == "t"


def test_without_a_service_account_there_is_no_login() -> None:
    assert by_address(None, {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "KUBERNETES_SERVICE_PORT": "443"}) is None
