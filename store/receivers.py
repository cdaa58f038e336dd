"""Where webhooks may go: which addresses a URL may have, and which machines may be behind its name.

A tenant names the address, the service calls it, from inside a network that the tenant cannot reach. So whatever is
not a public machine is refused, unless the operator allows it: `check` is asked for every address that a name has at
the moment of delivery, and the connection then goes to one of those (worker.posting), not to the name.
"""

import ipaddress
import re
from collections.abc import Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from typing import Final
from urllib.parse import urlsplit

from store.errors import StoreError

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network

# Never a receiver, not even behind a name that the operator allows: only where a network is allowed by its number.
_NEVER: Final = (
    "0.0.0.0/8",  # this host
    "169.254.0.0/16",  # link-local, with the metadata services of most clouds
    "168.63.129.16/32",  # the metadata service of Azure, which is a public number
    "100.100.100.200/32",  # that of Alibaba
    "192.0.0.192/32",  # that of Oracle
    "224.0.0.0/4",  # multicast
    "240.0.0.0/4",  # reserved, broadcast
    "::/128",
    "fe80::/10",
    "ff00::/8",
    "fd00:ec2::/32",  # the metadata service of AWS
)
# Special-purpose registries of IANA (RFC 6890). Written out: what `ipaddress` calls global changes with Python.
_PRIVATE: Final = (
    "10.0.0.0/8",
    "100.64.0.0/10",  # carrier-grade NAT, also of cloud networks
    "127.0.0.0/8",
    "172.16.0.0/12",
    "192.0.0.0/24",
    "192.0.2.0/24",
    "192.88.99.0/24",
    "192.168.0.0/16",
    "198.18.0.0/15",
    "198.51.100.0/24",
    "203.0.113.0/24",
    "2001::/23",  # with Teredo, which carries an IPv4 address
    "2001:db8::/32",
    "2002::/16",  # 6to4, which carries one too
    "3fff::/20",
)
_GLOBAL_IPV6: Final = ipaddress.ip_network("2000::/3")  # nothing else is handed out
_NAT64: Final = ipaddress.ip_network("64:ff9b::/96")
_NAME: Final = re.compile(r"(?!-)[a-z0-9-]{1,63}(?<!-)(\.(?!-)[a-z0-9-]{1,63}(?<!-))*")
_PRINTABLE: Final = re.compile(r"[!-~]+")


class ReceiverRefusedError(StoreError):
    """An address that no webhook may go to."""

    code = "receiver_refused"


@dataclass(frozen=True)
class Target:
    """A URL in parts. The request is made of these, so no second parser can see another machine in it.

    `host`: a name in lower case, or an IP address without brackets. `path`: with the query.
    """

    secure: bool
    host: str
    port: int
    path: str

    @property
    def authority(self) -> str:
        """What the Host header says."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == (443 if self.secure else 80) else f"{host}:{self.port}"


class Receivers:
    """What an operator allows."""

    def __init__(self, *, http: bool = False, ports: str = "443", allow: str = "") -> None:
        """As in SEUF_WEBHOOK_HTTP, _PORTS and _ALLOW. ValueError names what cannot be read."""
        self.http = http
        self.ports = frozenset(int(port) for port in ports.split(","))
        self.networks, self.hosts = _allowed(allow)

    def target(self, url: str) -> Target:
        """The URL in parts; ReceiverRefusedError says which rule it breaks. Looks nothing up."""
        if not _PRINTABLE.fullmatch(url) or "\\" in url:
            raise _refuse(
                "it has characters that no URL has", "Write them percent-encoded, a name in punycode."
            )
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError as error:
            raise _refuse("it is not a URL", "Write it as https://host/path.") from error
        if parts.scheme not in ("https", "http"):
            raise _refuse("it does not begin with https://", "Write it as https://host/path.")
        if parts.scheme == "http" and not self.http:
            raise _refuse(
                "it is not encrypted (http)", "Use https, or let the operator set SEUF_WEBHOOK_HTTP."
            )
        if "@" in parts.netloc:
            raise _refuse("it carries credentials", "Leave them out: messages are signed.")
        if "#" in url:
            raise _refuse("it has a fragment, which is never sent", "Leave out what begins with #.")
        port = port if port is not None else (443 if parts.scheme == "https" else 80)
        if port not in self.ports:
            shown = ", ".join(map(str, sorted(self.ports)))
            raise _refuse(f"port {port} is not allowed", f"Allowed: {shown} (SEUF_WEBHOOK_PORTS).")
        path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        target = Target(parts.scheme == "https", _host(parts.hostname or "", parts.netloc), port, path)
        if (literal := _literal(target.host)) is not None:
            self.check(target, [str(literal)])
        return target

    def check(self, target: Target, addresses: Sequence[str]) -> list[str]:
        """`addresses` (of the target's host) if every one may be called, else ReceiverRefusedError.

        One that may not is enough: a name that has both kinds is an attempt, or a mistake.
        """
        if not addresses:
            raise _refuse("its name has no address")
        for text in addresses:
            address = _unwrapped(ipaddress.ip_address(text))
            if not self._may(target.host, address):
                # Which address it is stays unsaid: a tenant could map the network with it.
                raise _refuse(
                    "its address is not of a public machine",
                    "Use a public receiver, or let the operator allow it with SEUF_WEBHOOK_ALLOW.",
                )
        return list(addresses)

    def _may(self, host: str, address: Address) -> bool:
        if any(address in network for network in self.networks):
            return True
        if any(address in network for network in _NEVER_NETWORKS):
            return False
        return host in self.hosts or _is_public(address)


def _allowed(text: str) -> tuple[tuple[Network, ...], frozenset[str]]:
    """Networks and host names of SEUF_WEBHOOK_ALLOW; ValueError names what is neither."""
    networks, hosts = [], set()
    for part in filter(None, (part.strip() for part in text.split(","))):
        try:
            networks.append(ipaddress.ip_network(part))
        except ValueError as error:
            name = part.lower()
            if "/" in part or not _NAME.fullmatch(name) or _numeric(name):
                raise ValueError(f"{part!r} is neither a network (10.1.0.0/16) nor a host name") from error
            hosts.add(name)
    return tuple(networks), frozenset(hosts)


def _is_public(address: Address) -> bool:
    if isinstance(address, IPv6Address) and address not in _GLOBAL_IPV6:
        return False
    return not any(address in network for network in _PRIVATE_NETWORKS)


def _unwrapped(address: Address) -> Address:
    """The IPv4 machine behind an IPv6 address that only carries one."""
    if isinstance(address, IPv6Address):
        if address.ipv4_mapped is not None:
            return address.ipv4_mapped
        if address in _NAT64:
            return IPv4Address(int(address) & 0xFFFFFFFF)
    return address


def _host(host: str, netloc: str) -> str:
    """A host name, or an IP address in its one ordinary form: 127.1, 0x7f.1 and 2130706433 are none."""
    if netloc.startswith("["):
        try:
            return str(IPv6Address(host))
        except ValueError as error:
            raise _refuse("what stands in brackets is not an IPv6 address") from error
    host = host.removesuffix(".")
    if _numeric(host):
        try:
            return str(IPv4Address(host))
        except ValueError as error:
            raise _refuse(
                "its host is a number, but not an IPv4 address", "Write it as four decimal numbers."
            ) from error
    if len(host) > 253 or not _NAME.fullmatch(host):
        raise _refuse("its host is not a name", "Write it as https://host/path, a name in punycode.")
    return host


def _numeric(host: str) -> bool:
    """Would a resolver read it as a number? (WHATWG: the last label is one, in any notation.)"""
    return re.fullmatch(r"[0-9]+|0x[0-9a-f]*", host.rpartition(".")[2]) is not None


def _literal(host: str) -> Address | None:
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None


def _refuse(why: str, fix: str = "Use the address of a public https receiver.") -> ReceiverRefusedError:
    return ReceiverRefusedError(f"The webhook's address is refused: {why}.", fix)


_NEVER_NETWORKS: Final = tuple(map(ipaddress.ip_network, _NEVER))
_PRIVATE_NETWORKS: Final = tuple(map(ipaddress.ip_network, _PRIVATE))
