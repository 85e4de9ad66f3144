//! A connection to Redis, Valkey, or a cluster of them, which runs scripts and keeps values.
//!
//! ```text
//! Address ─ open ─> Store ─ run(script, keys, arguments) ─> numbers        many at once: they share a connection
//!                        └─ get, set ────────────────────> bytes
//! ```
//!
//! An error is the connection's end: whoever holds a [`Store`] drops it and opens another. Nothing is tried again here but what
//! a cluster sends elsewhere.

use std::sync::Arc;
use std::time::Duration;

use redis::aio::MultiplexedConnection;
use redis::cluster::ClusterClientBuilder;
use redis::cluster_async::ClusterConnection;
use redis::{
    AsyncConnectionConfig, Client, ConnectionInfo, IntoConnectionInfo, RedisError, RedisResult, TlsCertificates,
};

use crate::base::Secret;

/// A script, with the hash by which a server knows it.
pub use redis::Script;

/// Where a store is.
#[derive(Debug, Clone)]
pub struct Address {
    /// `redis://[user:password@]host[:port][/database]`, `rediss://` with TLS; of a cluster some of its nodes.
    pub urls: Vec<Secret<String>>,
    /// Wins over those in the addresses.
    pub password: Option<Secret<String>>,
    /// Whether keys are spread over several servers.
    pub is_cluster: bool,
    /// Certificates that are believed, in PEM; `None`: those of the web.
    pub authorities: Option<Arc<[u8]>>,
    /// How long connecting may take, and each answer.
    pub timeout: Duration,
}

/// An open connection.
#[derive(Clone)]
pub enum Store {
    /// To one server.
    One(MultiplexedConnection),
    /// To all nodes of a cluster.
    Cluster(ClusterConnection),
}

impl Address {
    /// Whether it can be one.
    ///
    /// # Errors
    /// Why not, without what is secret in it.
    pub fn check(&self) -> Result<(), String> {
        self.infos().map(drop).map_err(|error| error.to_string())
    }

    fn infos(&self) -> RedisResult<Vec<ConnectionInfo>> {
        let info = |url: &Secret<String>| {
            let info = url.expose().as_str().into_connection_info()?;
            let Some(password) = &self.password else { return Ok(info) };
            let settings = info.redis_settings().clone().set_password(password.expose());
            Ok(info.set_redis_settings(settings))
        };
        self.urls.iter().map(info).collect()
    }

    /// Connects.
    ///
    /// # Errors
    /// Why it cannot.
    pub async fn open(&self) -> RedisResult<Store> {
        // The first of a process is everybody's; whoever was earlier chose the same.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let infos = self.infos()?;
        let certificates =
            self.authorities.as_ref().map(|pem| TlsCertificates { client_tls: None, root_cert: Some(pem.to_vec()) });
        if self.is_cluster {
            let mut builder = ClusterClientBuilder::new(infos)
                .retries(2)
                .connection_timeout(self.timeout)
                .response_timeout(self.timeout)
                .overall_response_timeout(Some(self.timeout));
            if let Some(password) = &self.password {
                builder = builder.password(password.expose());
            }
            if let Some(certificates) = certificates {
                builder = builder.certs(certificates);
            }
            let opening = builder.build()?;
            return within(self.timeout * 2, opening.get_async_connection()).await.map(Store::Cluster);
        }
        let Some(info) = infos.into_iter().next() else { return Err(invalid("no address")) };
        let client = match certificates {
            Some(certificates) => Client::build_with_tls(info, certificates)?,
            None => Client::open(info)?,
        };
        let config = AsyncConnectionConfig::new()
            .set_connection_timeout(Some(self.timeout))
            .set_response_timeout(Some(self.timeout));
        client.get_multiplexed_async_connection_with_config(&config).await.map(Store::One)
    }
}

impl Store {
    /// Makes a script known.
    ///
    /// # Errors
    /// The connection's, or the server's.
    pub async fn load(&mut self, script: &Script) -> RedisResult<()> {
        match self {
            Self::One(connection) => script.load_async(connection).await.map(drop),
            Self::Cluster(connection) => script.load_async(connection).await.map(drop),
        }
    }

    /// Runs a script, which answers with numbers.
    ///
    /// # Errors
    /// The connection's, or the server's.
    pub async fn run(&mut self, script: &Script, keys: &[String], arguments: &[String]) -> RedisResult<Vec<i64>> {
        let mut call = script.prepare_invoke();
        for key in keys {
            call.key(key);
        }
        for argument in arguments {
            call.arg(argument);
        }
        match self {
            Self::One(connection) => call.invoke_async(connection).await,
            Self::Cluster(connection) => call.invoke_async(connection).await,
        }
    }

    /// What is kept under a key.
    ///
    /// # Errors
    /// The connection's, or the server's.
    pub async fn get(&mut self, key: &str) -> RedisResult<Option<Vec<u8>>> {
        self.ask(redis::cmd("GET").arg(key)).await
    }

    /// Keeps a value for a time.
    ///
    /// # Errors
    /// The connection's, or the server's.
    pub async fn set(&mut self, key: &str, value: &[u8], keep: Duration) -> RedisResult<()> {
        let keep = u64::try_from(keep.as_millis()).unwrap_or(u64::MAX).max(1);
        self.ask(redis::cmd("SET").arg(key).arg(value).arg("PX").arg(keep)).await
    }

    async fn ask<T: redis::FromRedisValue>(&mut self, command: &redis::Cmd) -> RedisResult<T> {
        match self {
            Self::One(connection) => command.query_async(connection).await,
            Self::Cluster(connection) => command.query_async(connection).await,
        }
    }
}

async fn within<T>(limit: Duration, future: impl Future<Output = RedisResult<T>>) -> RedisResult<T> {
    let late = |_| RedisError::from((redis::ErrorKind::Io, "it does not answer in time"));
    tokio::time::timeout(limit, future).await.map_err(late)?
}

fn invalid(what: &'static str) -> RedisError {
    RedisError::from((redis::ErrorKind::InvalidClientConfig, what))
}
