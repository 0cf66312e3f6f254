"""Which program sent a request: only what the operator listed becomes a label."""

import pytest

from proxy.core.clients import Clients

LISTED = Clients("User-Agent", ("terraform", "doctl", "csi-digitalocean", "Gradient"))


@pytest.mark.parametrize(
    ("value", "client"),
    [
        pytest.param("Terraform/1.9.0 godo/1.118.0", "terraform", id="any-case"),
        pytest.param("doctl/1.100.0 (linux/amd64) godo/1.1", "doctl", id="with-comment"),
        pytest.param("csi-digitalocean/4.9.0", "csi-digitalocean", id="with-hyphen"),
        pytest.param("gradient/Python 3.1.0", "Gradient", id="the-lists-spelling"),
        pytest.param("doctl", "doctl", id="no-version"),
        pytest.param("  doctl /1", "doctl", id="blanks"),
        pytest.param("doctl;1", "doctl", id="other-separator"),
        pytest.param("godo/1.1 doctl/1.100.0", "other", id="only-the-first-product"),
        pytest.param("doctl-x/1", "other", id="longer-name"),
        pytest.param("doct", "other", id="shorter-name"),
        pytest.param("(doctl)", "other", id="comment-first"),
        pytest.param("/doctl", "other", id="no-name"),
        pytest.param("other", "other", id="other"),
        pytest.param("d\u00f6ctl/1", "other", id="not-ascii"),
        pytest.param("\udcff", "other", id="no-text"),
        pytest.param("x" * 8000, "other", id="long"),
        pytest.param("", "other", id="empty"),
        pytest.param(None, "other", id="absent"),
    ],
)
def test_a_program_is_its_first_product(value: str | None, client: str) -> None:
    """RFC 9110: the most significant product comes first."""
    assert LISTED.of(value) == client


def test_without_a_list_all_are_other() -> None:
    """Nothing that a caller sends becomes a label by itself."""
    assert Clients().of("doctl/1.100.0") == "other"
