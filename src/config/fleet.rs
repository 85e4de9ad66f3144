//! `[fleet]`: which store several daemons share limits and cached answers through, as it is written and as it is used.

use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::check::Check;
use super::machine::Surroundings;
use super::records::Secrets;
use super::value::ByteSize;
use crate::base::Secret;

/// `[fleet]`: several daemons that share what accounts and tokens may use, and all limits. Each leases parts of them from a
/// store, Redis 6.2 or Valkey 7.2 and newer, so that few calls wait for it. Without `url` each daemon counts for itself.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct FleetSection {
    /// The store: `redis://[user[:password]@]host[:port][/database]`, or `rediss://` with TLS. Of a cluster one or more of its
    /// nodes, with commas between them.
    /// Example: `"rediss://neurond@10.0.0.5:6379"`
    #[serde(skip_serializing_if = "Option::is_none")]
    pub url: Option<String>,
    /// Whether the store is a cluster, with keys spread over several servers.
    pub cluster: bool,
    /// Environment variable with the password. It wins over the one in the address.
    /// Example: `"FLEET_PASSWORD"`
    #[serde(skip_serializing_if = "Option::is_none")]
    pub secret_env: Option<String>,
    /// File with the password. A leading `$CREDENTIALS_DIRECTORY` is what systemd's `LoadCredential=` sets.
    /// Example: `"$CREDENTIALS_DIRECTORY/fleet"`
    #[serde(skip_serializing_if = "Option::is_none")]
    pub secret_file: Option<PathBuf>,
    /// PEM file of the certificate authorities that are believed in place of those of the web.
    /// Example: `"/etc/ssl/certs/internal.pem"`
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ca_file: Option<PathBuf>,
    /// What the fleet's keys begin with: daemons with the same name share.
    pub name: String,
    /// How long an answer of the store may take, in milliseconds. Beyond it the store counts as lost.
    pub timeout_ms: u64,
    /// Of what is left of a limit, one daemon leases at most this part ahead of need; and never more than it takes in half a
    /// second. Less makes more calls wait for the store, more leaves more in the hands of a daemon that is killed.
    pub lease_share: f64,
    /// While the store does not answer and a lease is used up: `"refuse"`, calls that need more are refused with 503;
    /// `"local"`, they go on within limits that each daemon counts for itself, and the store is told when it is back.
    pub on_loss: OnLoss,
    /// Whether daemons find each other's cached answers: who has none asks the store before it goes upstream, and sends what it
    /// keeps. Answers lie there as they are, for as long as they are kept. While the store does not answer each has its own.
    pub cache: bool,
    /// A larger cached answer is not shared, 64 MiB at most.
    pub cache_entry_bytes: ByteSize,
    /// Another store for cached answers, written as `url`, with the same password and the same of `cluster`: one that may forget
    /// them to make room (`maxmemory-policy allkeys-lru`). Left out: the store of the limits, which has to have room for all.
    /// Example: `"rediss://neurond@10.0.0.6:6379"`
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cache_url: Option<String>,
}

/// The most that `fleet.cache_entry_bytes` may be.
const CACHE_ENTRY_BYTES: u64 = 64 << 20;

impl Default for FleetSection {
    fn default() -> Self {
        Self {
            url: None,
            cluster: false,
            secret_env: None,
            secret_file: None,
            ca_file: None,
            name: "neurond".to_owned(),
            timeout_ms: 250,
            lease_share: 0.1,
            on_loss: OnLoss::Refuse,
            cache: false,
            cache_entry_bytes: ByteSize(1 << 20),
            cache_url: None,
        }
    }
}

/// What happens to calls without a lease while the store does not answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, Default)]
#[serde(rename_all = "lowercase")]
pub enum OnLoss {
    /// They are refused.
    #[default]
    Refuse,
    /// They are counted by each daemon for itself.
    Local,
}

/// See `FleetSection`.
#[derive(Debug, Clone, PartialEq)]
pub struct Fleet {
    /// One, or nodes of a cluster.
    pub urls: Vec<Secret<String>>,
    /// Wins over those in the addresses.
    pub password: Option<Secret<String>>,
    /// Whether it is a cluster.
    pub is_cluster: bool,
    /// Certificates that are believed, in PEM.
    pub authorities: Option<String>,
    /// What keys begin with.
    pub name: String,
    /// How long an answer may take.
    pub timeout: Duration,
    /// Of what is left, what is leased ahead.
    pub share: f64,
    /// While it does not answer.
    pub on_loss: OnLoss,
    /// What of the cache is shared.
    pub cache: Option<FleetCache>,
}

/// How cached answers are shared.
#[derive(Debug, Clone, PartialEq)]
pub struct FleetCache {
    /// Where they lie, as [`Fleet::urls`].
    pub urls: Vec<Secret<String>>,
    /// A larger one is not shared.
    pub max_entry_bytes: u64,
}

pub(super) fn resolve(
    check: &mut Check,
    written: &FleetSection,
    folder: &Path,
    machine: &Surroundings,
) -> Option<Fleet> {
    let urls = addresses(check, "fleet.url", written.url.as_deref()?, written.cluster);
    let cache_urls = written.cache_url.as_ref().map(|url| addresses(check, "fleet.cache_url", url, written.cluster));
    let max_entry_bytes = written.cache_entry_bytes.0;
    if !(1..=CACHE_ENTRY_BYTES).contains(&max_entry_bytes) {
        let remedy = "is not from 1 byte to 64 MiB; \"1MiB\" is the default";
        check.wrong("fleet.cache_entry_bytes", max_entry_bytes, remedy);
    }
    let urls_of_answers = cache_urls.unwrap_or_else(|| urls.clone());
    let cache = written.cache.then_some(FleetCache { urls: urls_of_answers, max_entry_bytes });
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "-_.:".contains(c);
    if written.name.is_empty() || written.name.len() > 64 || !written.name.chars().all(is_plain) {
        let remedy = "is not a name; write up to 64 letters, digits, -, _, . and :";
        check.wrong("fleet.name", format_args!("{:?}", written.name), remedy);
    }
    if !(10..=10_000).contains(&written.timeout_ms) {
        check.wrong("fleet.timeout_ms", written.timeout_ms, "is not from 10 to 10000; 250 is the default");
    }
    if !(0.0..=0.5).contains(&written.lease_share) {
        check.wrong("fleet.lease_share", written.lease_share, "is not from 0 to 0.5; 0.1 is the default");
    }
    let secrets = Secrets { folder, machine };
    let authorities = written.ca_file.as_ref().and_then(|path| {
        let path = folder.join(path);
        let read = (machine.text)(&path);
        read.map_err(|error| check.wrong("fleet.ca_file", path.display(), &format!("cannot be read: {error}"))).ok()
    });
    Some(Fleet {
        urls,
        password: secrets.read(check, "fleet", written.secret_env.as_deref(), written.secret_file.as_deref()),
        is_cluster: written.cluster,
        authorities,
        name: written.name.clone(),
        timeout: Duration::from_millis(written.timeout_ms),
        share: written.lease_share,
        on_loss: written.on_loss,
        cache,
    })
}

fn addresses(check: &mut Check, key: &str, written: &str, is_cluster: bool) -> Vec<Secret<String>> {
    let urls: Vec<_> = written.split(',').map(|url| Secret::new(url.trim().to_owned())).collect();
    let is_url = |url: &Secret<String>| ["redis://", "rediss://"].iter().any(|scheme| url.expose().starts_with(scheme));
    if !urls.iter().all(is_url) {
        // It may have a password in it.
        check.problem(&format!(
            "{key} is no address of a store: write redis://HOST:PORT, or rediss://HOST:PORT with TLS"
        ));
    }
    if urls.len() > 1 && !is_cluster {
        check.problem(&format!(
            "{key} has several addresses: that is for the nodes of a cluster; set fleet.cluster = true"
        ));
    }
    urls
}
