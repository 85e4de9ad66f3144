//! A daemon that calls providers at their own addresses, all of which end at the fake upstream.
//!
//!     daemon --CONNECT host:443--> tunnel --TLS, in the name of that host--> fake upstream
//!
//! So the upstream hears what the provider would: its own name, its own paths, signatures over both.

use std::cell::Cell;
use std::io;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::thread::JoinHandle;

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use parking_lot::Mutex;
use reqwest::Method;
use ring::rand::SystemRandom;
use ring::signature::{ECDSA_P256_SHA256_ASN1_SIGNING, EcdsaKeyPair, KeyPair};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use serde_json::Value;
use tokio::io::{AsyncReadExt, AsyncWriteExt, copy_bidirectional};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio_rustls::TlsAcceptor;

use super::ACCOUNT;
use crate::harness::{Answer, Daemon, token};
use crate::upstream::{Seen, Upstream};

/// What may use stored keys.
pub const TRUSTED: (&str, &str) = ("cf-aig-authorization", "Bearer secret");

/// See the top of this file.
pub struct World {
    pub upstream: Upstream,
    pub tunnel: Tunnel,
    pub daemon: Daemon,
    /// One, so that calls follow each other on one connection, and so to one worker.
    client: reqwest::Client,
    /// How many requests a test has looked at.
    told: Cell<usize>,
    _folder: tempfile::TempDir,
}

impl World {
    /// With keys that the file has for providers. The gateway `g` wants no token.
    pub fn with(keys: &[(&str, &str)], more: &str) -> Self {
        let upstream = Upstream::start();
        let tunnel = Tunnel::to(upstream.address);
        let folder = tempfile::tempdir().unwrap();
        let file = |name: &str, text: &str| {
            let path = folder.path().join(name);
            std::fs::write(&path, text).unwrap();
            path.display().to_string()
        };
        let authority = file("ca.pem", &tunnel.authority);
        let master = file("master.key", &"11".repeat(32));
        only_ours(&folder.path().join("master.key"));
        let mut toml = format!(
            "[auth]\nanonymous = \"local\"\n[upstream]\nproxy = \"{}\"\nca_file = \"{authority}\"\n\
             [registry]\nfolder = \"{}/registry\"\n[vault]\nmaster_key_file = \"{master}\"\n\
             [[gateway]]\nid = \"g\"\nauthentication = false\n",
            tunnel.address,
            folder.path().display(),
        );
        for (slug, secret) in keys {
            let path = file(slug, secret);
            toml += &format!("[[provider]]\nslug = \"{slug}\"\nkey = {{ file = \"{path}\" }}\n");
        }
        toml += more;
        let daemon = Daemon::written(&toml, true, |config| config.auth.tokens = vec![token("ada", "secret", ACCOUNT)]);
        Self { upstream, tunnel, daemon, client: reqwest::Client::new(), told: Cell::new(0), _folder: folder }
    }

    /// A request for what follows `/v1/acme/g/`.
    pub fn request(&self, method: Method, path: &str, headers: &[(&str, &str)]) -> reqwest::RequestBuilder {
        let mut request = self.client.request(method, self.daemon.url(&format!("/v1/{ACCOUNT}/g/{path}")));
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        request
    }

    pub async fn post(&self, path: &str, headers: &[(&str, &str)], body: &Value) -> Answer {
        Answer::of(self.request(Method::POST, path, headers).json(body)).await
    }

    /// Tells the management API something that it must accept.
    pub async fn tell(&self, path: &str, body: Value) -> Value {
        let url = self.daemon.url(&format!("/client/v4/accounts/{ACCOUNT}/ai-gateway/{path}"));
        let answer = Answer::of(self.client.post(url).bearer_auth("secret").json(&body)).await;
        assert_eq!(answer.status, 200, "{path}: {answer:?}");
        answer.json()["result"].clone()
    }

    /// What the upstream heard since this was asked last.
    pub fn heard(&self) -> Vec<Seen> {
        let seen = self.upstream.requests();
        let before = self.told.replace(seen.len());
        seen[before..].to_vec()
    }

    /// The one request that it heard.
    #[track_caller]
    pub fn heard_one(&self) -> Seen {
        let mut seen = self.heard();
        assert_eq!(seen.len(), 1, "{seen:?}");
        seen.remove(0)
    }
}

fn only_ours(path: &Path) {
    use std::os::unix::fs::PermissionsExt;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600)).unwrap();
}

/// A proxy that reaches every host of the world on port 443, and speaks for each of them.
pub struct Tunnel {
    pub address: SocketAddr,
    /// A certificate in PEM; who believes it believes all hosts here.
    pub authority: String,
    house: Arc<House>,
    stop: Option<watch::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

struct House {
    upstream: SocketAddr,
    asked: Mutex<Vec<String>>,
    key: EcdsaKeyPair,
    pkcs8: Vec<u8>,
}

impl Tunnel {
    pub fn to(upstream: SocketAddr) -> Self {
        let random = SystemRandom::new();
        let pkcs8 = EcdsaKeyPair::generate_pkcs8(&ECDSA_P256_SHA256_ASN1_SIGNING, &random).unwrap();
        let key = EcdsaKeyPair::from_pkcs8(&ECDSA_P256_SHA256_ASN1_SIGNING, pkcs8.as_ref(), &random).unwrap();
        let base64 = BASE64_STANDARD.encode(certificate(&key, "authority"));
        let authority = format!("-----BEGIN CERTIFICATE-----\n{base64}\n-----END CERTIFICATE-----\n");
        let house = Arc::new(House { upstream, asked: Mutex::default(), key, pkcs8: pkcs8.as_ref().to_vec() });
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        listener.set_nonblocking(true).unwrap();
        let address = listener.local_addr().unwrap();
        let (stop, mut stopped) = watch::channel(());
        let serves = house.clone();
        let thread = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async {
                let listener = TcpListener::from_std(listener).unwrap();
                loop {
                    tokio::select! {
                        _ = stopped.changed() => return,
                        accepted = listener.accept() => if let Ok((socket, _)) = accepted {
                            tokio::spawn(carry(socket, serves.clone()));
                        },
                    }
                }
            });
        });
        Self { address, authority, house, stop: Some(stop), thread: Some(thread) }
    }

    /// Hosts that connections were asked for, `host:port`, in order.
    pub fn asked(&self) -> Vec<String> {
        self.house.asked.lock().clone()
    }
}

impl Drop for Tunnel {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// One connection. Whatever ends it early is somebody who left.
async fn carry(mut caller: TcpStream, house: Arc<House>) -> io::Result<()> {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(caller.read_u8().await?);
    }
    let head = String::from_utf8_lossy(&head).into_owned();
    let target = head.strip_prefix("CONNECT ").and_then(|rest| rest.split(' ').next()).unwrap_or_default();
    house.asked.lock().push(target.to_owned());
    let Some(host) = target.strip_suffix(":443") else {
        return caller.write_all(b"HTTP/1.1 403 Forbidden\r\n\r\n").await;
    };
    caller.write_all(b"HTTP/1.1 200 OK\r\n\r\n").await?;
    let chain = vec![certificate(&house.key, host)];
    let key = PrivateKeyDer::from(PrivatePkcs8KeyDer::from(house.pkcs8.clone()));
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = rustls::ServerConfig::builder_with_provider(provider).with_safe_default_protocol_versions().unwrap();
    let config = config.with_no_client_auth().with_single_cert(chain, key).unwrap();
    let mut caller = TlsAcceptor::from(Arc::new(config)).accept(caller).await?;
    let mut upstream = TcpStream::connect(house.upstream).await?;
    upstream.set_nodelay(true)?;
    copy_bidirectional(&mut caller, &mut upstream).await.map(drop)
}

/// A certificate for one host, signed with its own key: all of them are each other's authorities.
fn certificate(key: &EcdsaKeyPair, host: &str) -> CertificateDer<'static> {
    const SEQUENCE: u8 = 0x30;
    const OBJECT: u8 = 6;
    const BITS: u8 = 3;
    let algorithm = der(SEQUENCE, &[&der(OBJECT, &[b"\x2a\x86\x48\xce\x3d\x04\x03\x02"])]);
    let common = der(SEQUENCE, &[&der(OBJECT, &[b"\x55\x04\x03"]), &der(0x0c, &[b"fake upstream"])]);
    let name = der(SEQUENCE, &[&der(0x31, &[&common])]);
    let valid = der(SEQUENCE, &[&der(0x17, &[b"000101000000Z"]), &der(0x18, &[b"21000101000000Z"])]);
    let (elliptic, p256) = (b"\x2a\x86\x48\xce\x3d\x02\x01", b"\x2a\x86\x48\xce\x3d\x03\x01\x07");
    let kind = der(SEQUENCE, &[&der(OBJECT, &[elliptic]), &der(OBJECT, &[p256])]);
    let public = der(SEQUENCE, &[&kind, &der(BITS, &[b"\0", key.public_key().as_ref()])]);
    let hosts = der(SEQUENCE, &[&der(0x82, &[host.as_bytes()])]);
    let other_names = der(SEQUENCE, &[&der(OBJECT, &[b"\x55\x1d\x11"]), &der(4, &[&hosts])]);
    let extensions = der(0xa3, &[&der(SEQUENCE, &[&other_names])]);
    let (version, serial) = (der(0xa0, &[&der(2, &[b"\x02"])]), der(2, &[b"\x01"]));
    let content = der(SEQUENCE, &[&version, &serial, &algorithm, &name, &valid, &name, &public, &extensions]);
    let signature = key.sign(&SystemRandom::new(), &content).unwrap();
    der(SEQUENCE, &[&content, &algorithm, &der(BITS, &[b"\0", signature.as_ref()])]).into()
}

/// One value of DER: its tag, its length, its parts.
fn der(tag: u8, parts: &[&[u8]]) -> Vec<u8> {
    let body = parts.concat();
    let [high, low] = u16::try_from(body.len()).unwrap().to_be_bytes();
    let length = match body.len() {
        ..128 => vec![low],
        128..256 => vec![0x81, low],
        _ => vec![0x82, high, low],
    };
    [vec![tag], length, body].concat()
}
