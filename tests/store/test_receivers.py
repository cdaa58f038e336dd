"""Where webhooks may go: every disguise of an address that is not a public machine's."""

from __future__ import annotations

import pytest

from store.receivers import ReceiverRefusedError, Receivers
from store.settings import Settings

PUBLIC = [
    "93.184.215.14",
    "8.8.8.8",
    "2606:2800:21f:cb07:6820:80da:af6b:8b2c",
    "64:ff9b::8.8.8.8",
    "::ffff:8.8.8.8",
]
OPEN = Receivers()


def refused(receivers: Receivers, url: str, *addresses: str) -> str:
    with pytest.raises(ReceiverRefusedError) as caught:
        receivers.check(receivers.target(url), addresses)
    return caught.value.message


@pytest.mark.parametrize("address", PUBLIC)
def test_public_machines(address: str) -> None:
    assert OPEN.check(OPEN.target("https://example.com/x"), [address]) == [address]


@pytest.mark.parametrize(
    "address",
    [
        *(
            "127.0.0.1",
            "127.9.9.9",
            "0.0.0.0",
            "0.1.2.3",
            "10.0.0.1",
            "172.16.0.1",
            "172.31.255.255",
            "192.168.1.1",
        ),
        *(
            "100.64.0.1",
            "100.127.255.255",
            "169.254.1.1",
            "198.18.0.1",
            "192.0.2.1",
            "198.51.100.1",
            "203.0.113.1",
        ),
        *("224.0.0.1", "239.255.255.255", "240.0.0.1", "255.255.255.255", "192.88.99.1"),
        # metadata services: AWS, GCP, Azure and more; Azure's wire server; Alibaba; Oracle; AWS over IPv6
        *("169.254.169.254", "168.63.129.16", "100.100.100.200", "192.0.0.192", "fd00:ec2::254"),
        *("::1", "::", "fe80::1", "fe80::1%eth0", "fc00::1", "fdff::1", "ff02::1", "ff0e::1", "fec0::1"),
        *("::ffff:127.0.0.1", "::ffff:7f00:1", "::ffff:169.254.169.254", "::127.0.0.1", "::ffff:0:127.0.0.1"),
        *(
            "64:ff9b::127.0.0.1",
            "64:ff9b::a9fe:a9fe",
            "64:ff9b:1::8.8.8.8",
            "2002:7f00:1::",
            "2002:808:808::",
        ),
        *("2001::1", "2001:0:4136:e378:8000:63bf:3fff:fdd2", "2001:db8::1", "3fff::1", "100::1", "5f00::1"),
    ],
)
def test_other_machines(address: str) -> None:
    assert "not of a public machine" in refused(OPEN, "https://example.com/", address)
    # One among public ones is enough, wherever it stands.
    refused(OPEN, "https://example.com/", "8.8.8.8", address)
    refused(OPEN, "https://example.com/", address, "8.8.8.8")


def test_a_refusal_does_not_say_which_address_it_is() -> None:
    assert "10.1.2.3" not in refused(OPEN, "https://wiki.corp/", "10.1.2.3")
    assert "no address" in refused(OPEN, "https://example.com/")


@pytest.mark.parametrize(
    "url",
    [
        *(
            "http://example.com/",
            "ftp://example.com/",
            "//example.com/",
            "example.com",
            "https:example.com",
            "",
        ),
        *(
            "https://",
            "https:///x",
            "https://user:secret@example.com/",
            "https://user@example.com/",
            "https://@example.com/",
        ),
        *(
            "https://example.com/#x",
            "https://example.com:8443/",
            "https://example.com:0/",
            "https://example.com:99999/",
        ),
        *(
            "https://example.com:443:80/",
            "https://exa mple.com/",
            "https://example.com/\n",
            "https://example.com\\@x/",
        ),
        *(
            "https://exämple.com/",
            "https://ex%61mple.com/",
            "https://ex_ample.com/",
            "https://-a.com/",
            "https://a..com/",
        ),
        # loopback as decimal, octal, hexadecimal and short forms of IPv4, and in every form of IPv6
        *(
            "https://2130706433/",
            "https://017700000001/",
            "https://0x7f000001/",
            "https://0x7f.1/",
            "https://127.1/",
        ),
        *(
            "https://0177.0.0.1/",
            "https://127.0.0.1/",
            "https://127.0.0.1./",
            "https://0/",
            "https://00000010.0.0.1/",
        ),
        *(
            "https://[::1]/",
            "https://[::]/",
            "https://[::ffff:127.0.0.1]/",
            "https://[::ffff:7f00:1]/",
            "https://[::1%25lo]/",
        ),
        *(
            "https://[0:0:0:0:0:0:0:1]/",
            "https://[64:ff9b::7f00:1]/",
            "https://[fd00:ec2::254]/",
            "https://[example.com]/",
        ),
        *(
            "https://169.254.169.254/latest/meta-data",
            "https://[fe80::1]/",
            "https://[v1.x]/",
            "https://example.1/",
        ),
        "https://" + "a" * 64 + ".com/",
        "https://" + "a." * 130 + "com/",
    ],
)
def test_addresses_that_are_refused_as_they_are_written(url: str) -> None:
    with pytest.raises(ReceiverRefusedError) as caught:
        OPEN.target(url)
    assert caught.value.fix


@pytest.mark.parametrize(
    ("url", "host", "port", "path", "authority"),
    [
        ("https://Example.COM", "example.com", 443, "/", "example.com"),
        ("https://example.com./a?b=c", "example.com", 443, "/a?b=c", "example.com"),
        ("https://example.com:443/a", "example.com", 443, "/a", "example.com"),
        ("https://8.8.8.8/", "8.8.8.8", 443, "/", "8.8.8.8"),
        (
            "https://[2606:2800:21f:cb07:6820:80da:af6b:8b2c]/",
            "2606:2800:21f:cb07:6820:80da:af6b:8b2c",
            443,
            "/",
            "[2606:2800:21f:cb07:6820:80da:af6b:8b2c]",
        ),
        ("https://xn--exmple-cua.com/", "xn--exmple-cua.com", 443, "/", "xn--exmple-cua.com"),
    ],
)
def test_a_url_in_parts(url: str, host: str, port: int, path: str, authority: str) -> None:
    target = OPEN.target(url)
    assert (target.secure, target.host, target.port, target.path) == (True, host, port, path)
    assert target.authority == authority


def test_what_an_operator_allows() -> None:
    here = Receivers(http=True, ports="80,8443", allow="10.1.0.0/16, hooks.corp ,fd12::/16")
    http = here.target("http://hooks.corp/x")
    assert (http.secure, http.port, http.authority) == (False, 80, "hooks.corp")
    assert here.target("https://hooks.corp:8443/").authority == "hooks.corp:8443"
    assert here.check(http, ["10.9.0.1"]) == ["10.9.0.1"]  # by its name
    other = here.target("http://other.corp/")
    assert here.check(other, ["10.1.2.3", "fd12::1"]) == ["10.1.2.3", "fd12::1"]  # by their numbers
    for address in ("10.2.0.1", "127.0.0.1", "::ffff:10.2.0.1"):
        refused(here, "http://other.corp/", address)
    # A name is no way to what is never a receiver; only its number is.
    for address in ("169.254.169.254", "fd00:ec2::254", "0.0.0.0", "ff02::1", "::ffff:169.254.169.254"):
        refused(here, "http://hooks.corp/", address)
    metadata = Receivers(allow="169.254.169.254/32")
    assert metadata.check(metadata.target("https://169.254.169.254/"), ["169.254.169.254"])
    with pytest.raises(ReceiverRefusedError, match=r"443.*SEUF_WEBHOOK_PORTS|80, 8443"):
        here.target("https://hooks.corp/")


@pytest.mark.parametrize(
    "allow", ["10.1.0.1/16", "*.corp", "10.0.0.0/33", "a b", "http://x", "0x7f.1", "127.1"]
)
def test_an_allowance_that_cannot_be_read_stops_the_start(allow: str) -> None:
    with pytest.raises(ValueError, match="neither a network"):
        Settings(webhook_allow=allow)
