"""An SMTP server for tests (tests/alerts.rs): keeps what it is given as files.

    smtp_server.py FOLDER PORT starttls|tls|plain USER PASSWORD

Makes FOLDER/ca.pem, the authority of its certificate, and reuses it when it is started again. Says `port N` when it listens;
PORT 0 takes a free one. Every mail is FOLDER/NNN.eml. Mail to refused@… is refused for good, mail to later@… for now.
Needs aiosmtpd and trustme: scripts/fetch_smtp.sh.
"""

import asyncio
import pathlib
import ssl
import sys

import trustme
from aiosmtpd.smtp import SMTP, AuthResult


class Handler:
    def __init__(self, folder):
        self.folder = folder

    async def handle_RCPT(self, server, session, envelope, address, options):
        if address.startswith("refused@"):
            return "550 5.1.1 nobody of that name lives here"
        if address.startswith("later@"):
            return "451 4.7.1 come back later"
        envelope.rcpt_tos.append(address)
        return "250 OK"

    async def handle_DATA(self, server, session, envelope):
        number = len(list(self.folder.glob("*.eml")))
        fresh = self.folder / "mail.new"
        fresh.write_bytes(f"X-To: {','.join(envelope.rcpt_tos)}\r\n".encode() + envelope.content)
        fresh.rename(self.folder / f"{number:03}.eml")
        return "250 OK"


def context(folder):
    server = folder / "server.pem"
    if not server.exists():
        authority = trustme.CA()
        certificate = authority.issue_cert("127.0.0.1", "localhost")
        certificate.private_key_and_cert_chain_pem.write_to_path(server)
        authority.cert_pem.write_to_path(folder / "ca.pem")
    made = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    made.load_cert_chain(server)
    return made


async def main():
    folder, port, security, user, password = sys.argv[1:]
    folder = pathlib.Path(folder)
    tls = context(folder)

    def authenticate(server, session, envelope, mechanism, data):
        known = (data.login, data.password) == (user.encode(), password.encode())
        return AuthResult(success=known, handled=False)

    def connection():
        starttls = security == "starttls"
        return SMTP(
            Handler(folder),
            tls_context=tls if starttls else None,
            require_starttls=starttls,
            authenticator=authenticate,
            auth_required=True,
            auth_require_tls=starttls,
        )

    wrapped = tls if security == "tls" else None
    server = await asyncio.get_running_loop().create_server(connection, "127.0.0.1", int(port), ssl=wrapped)
    print("port", server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


asyncio.run(main())
