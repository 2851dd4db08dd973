"""Which hosts and addresses are asked for pictures, and what is shown of an address."""

import base64
import datetime
import ipaddress
import socket
import ssl
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from web_pictures import (
    CONTENT,
    MAX_BYTES,
    Host,
    answer,
    read,
    refused,
    resolve_to,
    rules,
)

from alignrec.errors import UserError
from data_prep import STAGE, addresses, fetching, hosts
from data_prep.addresses import Policy
from data_prep.config import HttpConfig
from data_prep.images import BadImage, ImageRules
from data_prep.quarantine import Reason

pytestmark = pytest.mark.usefixtures("nothing_known")


def test_redirects_are_followed_within_the_rules(host: Host) -> None:
    port = host.server_port
    host.paths |= {
        "/relative": answer(301, b"moved", Location="/good.jpg"),
        "/absolute": answer(307, Location=host.url + "/relative"),
        "/loop": answer(302, Location="/loop"),
        "/other": answer(302, Location=f"http://localhost:{port}/good.jpg"),
        "/file": answer(302, Location="file:///etc/passwd"),
        "/nowhere": answer(302, Location="http://[::1/"),
    }
    assert read(host.url + "/absolute") == CONTENT
    verdict = refused(host.url + "/loop")
    assert verdict.reason == Reason.IMAGE_HTTP_ERROR
    assert "more than 5 redirects" in verdict.detail
    for path in ("/other", "/file"):
        assert refused(host.url + path).reason == Reason.IMAGE_FORBIDDEN
    assert refused(host.url + "/nowhere").reason == Reason.IMAGE_BAD_URL
    assert all(path != "/good.jpg" for path, _ in host.requests[3:])


def test_a_redirect_to_a_private_address_is_refused(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A public host that sends to the inside: the name is allowed, the address is not."""
    monkeypatch.setattr(addresses, "is_public", lambda address: str(address) != "127.0.0.2")
    names = {"public.example": "127.0.0.1", "inside.example": "127.0.0.2"}
    true = socket.getaddrinfo
    monkeypatch.setattr(
        socket, "getaddrinfo", lambda name, *r, **o: true(names.get(name, name), *r, **o)
    )
    port = host.server_port
    host.paths["/x.jpg"] = answer(302, Location=f"http://inside.example:{port}/good.jpg")
    verdict = refused(f"http://public.example:{port}/x.jpg", allowed_hosts=())
    assert verdict.reason == Reason.IMAGE_FORBIDDEN
    assert "127.0.0.2 is not a public address" in verdict.detail
    assert len(host.requests) == 1


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1", "10.1.2.3", "192.168.0.9", "172.16.0.1", "169.254.169.254", "100.64.0.1",
        "0.0.0.0", "224.0.0.1", "255.255.255.255", "::1", "::", "fe80::1", "fd00::1", "ff02::1",
        "::ffff:127.0.0.1", "::ffff:10.0.0.1", "64:ff9b::7f00:1", "2002:7f00:1::",
        "2001:0:4136:e378:8000:63bf:f5ff:fffe", "64:ff9b:1::7f00:1", "::ffff:0:127.0.0.1",
        "::a9fe:a9fe", "fec0::1", "192.88.99.1", "2002:808:808::", "::ffff:8.8.8.8", "2001:db8::1",
        "64:ff9b::c058:6301", "4000::1",
    ],
)  # fmt: skip
def test_addresses_that_are_not_public(address: str) -> None:
    assert not addresses.is_public(ipaddress.ip_address(address))


@pytest.mark.parametrize("address", ["8.8.8.8", "2001:4860:4860::8888", "64:ff9b::808:808"])
def test_public_addresses(address: str) -> None:
    assert addresses.is_public(ipaddress.ip_address(address))


@pytest.mark.parametrize(
    "spelling", ["127.0.0.1", "2130706433", "0x7f.1", "localhost", "[::1]", "[::ffff:7f00:1]"]
)
def test_no_spelling_of_this_machine_is_let_in(host: Host, spelling: str) -> None:
    verdict = refused(
        f"http://{spelling}:{host.server_port}/good.jpg", allowed_hosts=(), private_hosts=()
    )
    assert verdict.reason in (Reason.IMAGE_FORBIDDEN, Reason.IMAGE_UNREACHABLE)
    assert host.requests == []


def test_the_connection_goes_to_the_address_that_was_checked(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A name that resolves to another address the second time gets no second time."""
    asked = resolve_to(monkeypatch, "127.0.0.1")
    monkeypatch.setattr(addresses, "is_public", lambda _: True)
    url = f"http://rebinding.example:{host.server_port}/good.jpg"
    assert read(url, allowed_hosts=()) == CONTENT
    assert asked == ["rebinding.example"]
    assert host.requests[0][1]["Host"] == f"rebinding.example:{host.server_port}"


def test_a_name_without_an_address(monkeypatch: pytest.MonkeyPatch) -> None:
    def getaddrinfo(*_: Any, **__: Any) -> list[Any]:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    verdict = refused("http://absent.example/x.jpg", allowed_hosts=())
    assert (verdict.reason, verdict.transient) == (Reason.IMAGE_UNREACHABLE, True)


def test_a_name_without_an_address_is_asked_for_now_and_then(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    true = socket.getaddrinfo

    def getaddrinfo(name: str, *rest: Any, **options: Any) -> list[Any]:
        asked.append(name)
        if name.endswith(".example"):
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return true(name, *rest, **options)

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    given = {"allowed_hosts": (), "http": HttpConfig(retries=0)}
    for _ in range(3):
        assert refused("http://absent.example/x.jpg", **given).transient
    assert asked == ["absent.example"]
    host.paths["/moved"] = answer(302, Location="http://absent.example/x.jpg")
    assert refused(host.url + "/moved", **given).transient
    assert asked.count("absent.example") == 1
    monkeypatch.setattr(hosts, "PROBE_SECONDS", 0.0)
    refused("http://absent.example/x.jpg", **given)
    assert asked.count("absent.example") == 2


def test_a_listed_host_may_only_be_private_where_the_recipe_says_so(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    resolve_to(monkeypatch, "127.0.0.1")
    url = f"http://pictures.example:{host.server_port}/good.jpg"
    for listed in (("pictures.example",), ("*.example",)):
        verdict = refused(url, allowed_hosts=listed, private_hosts=())
        assert verdict.reason == Reason.IMAGE_FORBIDDEN
        assert "127.0.0.1 is not a public address" in verdict.detail
    assert host.requests == []
    assert read(url, allowed_hosts=(), private_hosts=("pictures.example",)) == CONTENT
    assert read(url, allowed_hosts=("x.example",), private_hosts=("pictures.example",)) == CONTENT


@pytest.mark.parametrize(
    ("host_name", "listed", "allowed"),
    [
        ("a.example", ("a.example",), True),
        ("b.a.example", ("a.example",), False),
        ("b.a.example", ("*.a.example",), True),
        ("c.b.a.example", ("*.a.example",), True),
        ("a.example", ("*.a.example",), False),
        ("evila.example", ("*.a.example",), False),
        ("a.example.evil", ("a.example", "*.a.example"), False),
    ],
)
def test_hosts_of_the_recipe(host_name: str, listed: tuple[str, ...], allowed: bool) -> None:
    assert Policy(("https",), listed).allows(host_name) is allowed
    assert Policy(("https",), ("x.example",), listed[:1]).allows(host_name) is (
        host_name == listed[0]
    )
    given = rules(allowed_schemes=("https",), allowed_hosts=listed)
    state = fetching.source_state(f"https://{host_name.upper()}./x.jpg", given)
    assert state == ("" if allowed else fetching.FORBIDDEN)


@pytest.mark.parametrize(
    "url",
    [
        "http://", "http:///x.jpg", "http://[::1/x.jpg", "http://h:99999/x", "http://h:port/x",
        "http://" + "a" * 300 + "/x", "http://a..b/x", "http://a b/x", "http://a%00b/x",
        "http://\udcff/x", "http://user:pa ss@h/x", "http://us er@h/x", "http://user:pa/ss@h/x",
        "http://user:pa?ss@h/x",
    ],
)  # fmt: skip
def test_addresses_that_are_none(url: str) -> None:
    assert refused(url, allowed_hosts=()).reason == Reason.IMAGE_BAD_URL


@pytest.mark.parametrize("url", ["ftp://h/x.jpg", "HTTPS://h/x", "gopher://h/x", "file:///etc/x"])
def test_schemes_that_the_recipe_does_not_name(url: str) -> None:
    assert refused(url, allowed_schemes=("http",)).reason == Reason.IMAGE_FORBIDDEN


def test_credentials_are_sent_and_never_shown(host: Host) -> None:
    host.paths |= {
        "/x.jpg": answer(200, CONTENT),
        "/moved": answer(302, Location=f"{host.url}/x.jpg"),
        "/large": answer(200, bytes(MAX_BYTES + 1)),
    }
    secret = host.url.replace("://", "://user:p%40ss@")
    assert read(secret + "/x.jpg?sig=TOKEN") == CONTENT
    assert read(secret + "/moved") == CONTENT
    sent = [headers.get("Authorization") for _, headers in host.requests]
    basic = "Basic " + base64.b64encode(b"user:p@ss").decode()
    assert sent == [basic, basic, None]  # a redirect without credentials gets none
    for path in ("/absent", "/large", "/busy", "/moved"):
        host.paths["/busy"] = answer(503)
        host.paths["/moved"] = answer(302, Location=secret + "/absent?sig=TOKEN")
        detail = refused(f"{secret}{path}?sig=TOKEN").detail
        assert "127.0.0.1" in detail
        assert not [s for s in ("user", "p%40ss", "p@ss", "TOKEN") if s in detail]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("s3://key:secret@bucket/x: failed", "s3://bucket/x: failed"),
        ("https://h/x.jpg?X-Amz-Signature=1 said no", "https://h/x.jpg?... said no"),
        ("what?is this.jpg", "what?is this.jpg"),
        ("http://u:p@h/x moved to http://v:q@g/y?z=1", "http://h/x moved to http://g/y?..."),
        ("http://u:p@w@h/x", "http://h/x"),
        ("http://u:p w@h/x?sig=a'SECRET", "http://h/x?..."),
    ],
)
def test_secrets_are_taken_out_of_messages(text: str, shown: str) -> None:
    assert addresses.without_secrets(text) == shown


@pytest.mark.parametrize(
    ("reference", "shown"),
    [
        ("http://user:pa ss@h:80/x.jpg?sig=a'SECRET#part", "http://h:80/x.jpg?..."),
        ("http://user:pa\tss@h/x", "http://h/x"),
        ("HTTP://user:p@ss@[::1]/x", "HTTP://[::1]/x"),
        ("s3://key:secret@Bucket/x", "s3://Bucket/x"),
        ("simplecache::http://user:pass@h/x", "simplecache::http://h/x"),
        ("http://user:pa/ss@h/x", "http://..."),
        ("http://user:pass@[h/x", "http://..."),
        ("what?is this.jpg", "what?is this.jpg"),
    ],
)
def test_addresses_are_shown_without_secrets(reference: str, shown: str) -> None:
    assert addresses.shown(reference) == shown
    verdict = refused(reference, allowed_schemes=("http",), allowed_hosts=("other.example",))
    assert not [s for s in ("user:", ":p", "ss@", "SECRET", "secret") if s in verdict.detail]


@pytest.fixture
def certificate(tmp_path: Path) -> Path:
    """A certificate for pictures.example that signs itself, with its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "pictures.example")])
    now = datetime.datetime.now(datetime.UTC)
    built = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("pictures.example")]), False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), True)
        .sign(key, hashes.SHA256())
    )
    path = tmp_path / "certificate.pem"
    plain = serialization.NoEncryption()
    form = serialization.PrivateFormat.PKCS8
    pem = serialization.Encoding.PEM
    path.write_bytes(key.private_bytes(pem, form, plain) + built.public_bytes(pem))
    return path


def test_certificates_are_checked_for_the_name_not_the_address(
    host: Host, certificate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    host.socket = context.wrap_socket(host.socket, server_side=True)
    resolve_to(monkeypatch, "127.0.0.1")
    rules_of_hosts = {
        "allowed_hosts": (), "private_hosts": ("pictures.example", "other.example"),
    }  # fmt: skip
    url = f"https://pictures.example:{host.server_port}/good.jpg"
    verdict = refused(url, **rules_of_hosts)
    assert (verdict.reason, verdict.transient) == (Reason.IMAGE_UNREACHABLE, False)
    assert "certificate" in verdict.detail
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    assert read(url, **rules_of_hosts) == CONTENT
    wrong = f"https://other.example:{host.server_port}/good.jpg"
    assert "certificate" in refused(wrong, **rules_of_hosts).detail


@pytest.mark.parametrize(
    "host_name", ["https://a.example", "a.example/x", "a.*.example", "*", "", "ü" * 70]
)
def test_hosts_that_would_match_nothing_are_the_users_mistake(host_name: str) -> None:
    for setting in ("allowed_hosts", "private_hosts"):
        section = {"source": "synthetic", "images": {setting: [host_name]}}
        with pytest.raises(UserError, match=f"{setting}.*is no host name"):
            STAGE.load_config(section)


def test_private_hosts_are_exact() -> None:
    section = {"source": "synthetic", "images": {"private_hosts": ["*.example.com"]}}
    with pytest.raises(UserError, match=r"private_hosts: .* is no host name"):
        STAGE.load_config(section)


def test_hosts_of_the_recipe_may_be_names_and_addresses() -> None:
    hosts = ["a.example", "*.B.example", "127.0.0.1", "::1", "my_host", "*.grün.example"]
    config = STAGE.load_config({"source": "synthetic", "images": {"allowed_hosts": hosts}})
    known = Policy(("https",), ImageRules.of(config.images, root="/").allowed_hosts)
    addresses.parse("https://x.b.Example/y", known)
    addresses.parse("https://x.grün.example/y", known)
    with pytest.raises(BadImage):
        addresses.parse("https://grün.example/y", known)


def test_a_user_agent_that_breaks_the_header_is_refused() -> None:
    section = {"source": "synthetic", "images": {"http": {"user_agent": "a\r\nb: c"}}}
    with pytest.raises(UserError, match="user_agent"):
        STAGE.load_config(section)
