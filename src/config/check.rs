//! What is wrong with a file, collected, so that an operator reads it in one go; and where what the daemon keeps is by default.

use std::fmt::Display;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::machine::Surroundings;
use super::{Overrides, gateway};
use crate::base::AccountId;

/// Collects what is wrong, in sentences that begin with the file and the key.
pub(super) struct Check {
    pub(super) origin: String,
    /// Keys that the command line has overridden, with the option that did.
    flags: Vec<(&'static str, &'static str)>,
    pub(super) problems: Vec<String>,
    pub(super) warnings: Vec<String>,
}

impl Check {
    pub(super) fn new(origin: Option<&Path>, overrides: &Overrides) -> Self {
        let flags = [
            ("server.listen", "--listen", overrides.listen.is_some()),
            ("auth.anonymous", "--anonymous", overrides.anonymous.is_some()),
            ("engine.threads", "--threads", overrides.threads.is_some()),
            ("log.filter", "--log", overrides.log_filter.is_some()),
        ];
        let flags = flags.into_iter().filter(|(.., given)| *given).map(|(key, flag, _)| (key, flag)).collect();
        let origin = origin.map_or("(no file)".into(), |path| path.display().to_string());
        Self { origin, flags, problems: Vec::new(), warnings: Vec::new() }
    }

    pub(super) fn wrong(&mut self, key: &str, value: impl Display, remedy: &str) {
        let flag = self.flags.iter().find(|(overridden, _)| *overridden == key);
        self.problems.push(match flag {
            Some((_, flag)) => format!("{flag} {value}: {remedy}"),
            None => format!("{}: {key} = {value}: {remedy}", self.origin),
        });
    }

    /// A mistake that has no one key.
    pub(super) fn problem(&mut self, sentence: &str) {
        self.problems.push(format!("{}: {sentence}", self.origin));
    }

    pub(super) fn warn(&mut self, sentence: impl Into<String>) {
        self.warnings.push(sentence.into());
    }

    pub(super) fn at_least_one(&mut self, key: &str, value: usize) {
        if value == 0 {
            self.wrong(key, value, "allows nothing; write at least 1, or leave it out for the default");
        }
    }

    /// Numbers of GPUs, each once.
    pub(super) fn unlike(&mut self, key: &str, gpus: Option<&[u16]>) {
        let gpus = gpus.unwrap_or_default();
        if let Some(twice) = gpus.iter().enumerate().find_map(|(at, gpu)| gpus[..at].contains(gpu).then_some(gpu)) {
            self.wrong(key, format_args!("{gpus:?}"), &format!("names GPU {twice} twice; write each once"));
        }
    }

    pub(super) fn timeout(&mut self, key: &str, ms: u64) -> Duration {
        // A day is longer than any answer; more would overflow clocks that add it to now.
        if !(1..=86_400_000).contains(&ms) {
            self.wrong(
                key,
                ms,
                "is out of range; write milliseconds from 1 to 86400000, or leave it out for the default",
            );
        }
        Duration::from_millis(ms)
    }

    pub(super) fn address(&mut self, key: &str, text: &str) -> SocketAddr {
        text.parse().unwrap_or_else(|_| {
            let remedy = "is not an IP address with a port; write 127.0.0.1:8080 for this machine only, 0.0.0.0:8080 for the \
                          network, or [::]:8080 for IPv6";
            self.wrong(key, format_args!("{text:?}"), remedy);
            SocketAddr::from(([127, 0, 0, 1], 0))
        })
    }

    pub(super) fn account(&mut self, key: &str, text: &str) -> AccountId {
        let fits = !text.is_empty() && text.len() <= 64;
        if !fits || !text.chars().all(|c| c.is_ascii_alphanumeric() || c == '-' || c == '_') {
            let remedy = "is not an account; write 32 hex digits, or up to 64 letters, digits, - and _";
            self.wrong(key, format_args!("{text:?}"), remedy);
        }
        AccountId::new(text)
    }
}

/// A folder of ours in the state directory.
pub(super) fn state(machine: &Surroundings, name: &str) -> Option<PathBuf> {
    Some(gateway::state_folder(machine)?.join(name))
}
