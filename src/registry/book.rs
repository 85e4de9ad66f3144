//! What an account has told the registry, as it lies on disk. Secrets are in here sealed, never open.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use uuid::Uuid;

use crate::base::{Millis, Result};
use crate::config::gateway::canonical;
use crate::logs::{Filter, Query};

/// All of an account.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(super) struct Book {
    /// The last generation that was given; none is ever given twice.
    #[serde(default)]
    pub last: u64,
    /// By name.
    #[serde(default)]
    pub gateways: BTreeMap<String, GatewayRecord>,
    /// Oldest first.
    #[serde(default)]
    pub keys: Vec<KeyRecord>,
    /// Oldest first.
    #[serde(default)]
    pub routes: Vec<RouteRecord>,
    /// Oldest first.
    #[serde(default)]
    pub providers: Vec<ProviderRecord>,
    /// Oldest first.
    #[serde(default)]
    pub datasets: Vec<DatasetRecord>,
    /// Oldest first.
    #[serde(default)]
    pub evaluations: Vec<EvaluationRecord>,
}

/// A gateway.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct GatewayRecord {
    pub internal: Uuid,
    /// In the names of the wire; secrets among them sealed.
    pub fields: Map<String, Value>,
    /// Part of the keys of its cached answers.
    pub generation: u64,
    pub created: Millis,
    pub modified: Millis,
}

/// A stored key of a provider. Its gateway may be one of the file.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct KeyRecord {
    pub id: Uuid,
    pub gateway: String,
    /// Canonical.
    pub provider: String,
    pub alias: String,
    pub default: bool,
    pub secret_id: Uuid,
    pub sealed: String,
    pub preview: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rate_limit: Option<f64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rate_limit_period: Option<f64>,
    pub created: Millis,
    pub modified: Millis,
}

/// A dynamic route. Its gateway may be one of the file.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct RouteRecord {
    pub id: Uuid,
    pub gateway: String,
    pub name: String,
    /// Oldest first, never changed.
    pub versions: Vec<VersionRecord>,
    /// Oldest first; the last one is in force.
    pub deployments: Vec<DeploymentRecord>,
    pub created: Millis,
    pub modified: Millis,
}

/// One version of a route.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct VersionRecord {
    pub id: Uuid,
    pub elements: Value,
    /// Whether it can be deployed.
    pub valid: bool,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub comment: Option<String>,
    pub created: Millis,
}

/// A version put in force.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct DeploymentRecord {
    pub id: Uuid,
    pub version: Uuid,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub comment: Option<String>,
    pub created: Millis,
}

/// A provider that is not built in.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct ProviderRecord {
    pub id: Uuid,
    /// Without `custom-`.
    pub slug: String,
    pub name: String,
    pub base_url: String,
    pub enable: bool,
    /// For people: `description`, `link`, `beta` and the like.
    pub about: Map<String, Value>,
    /// Extra headers, each value sealed.
    #[serde(default)]
    pub headers: BTreeMap<String, String>,
    pub generation: u64,
    pub created: Millis,
    pub modified: Millis,
}

/// A selection of a gateway's log records. Its gateway may be one of the file.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct DatasetRecord {
    pub id: Uuid,
    pub gateway: String,
    pub name: String,
    pub enable: bool,
    /// All must let a record through.
    pub filters: Vec<FilterRecord>,
    pub created: Millis,
    pub modified: Millis,
}

/// A filter, in the words of the wire; that it is one was checked.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct FilterRecord {
    pub key: String,
    pub operator: String,
    pub value: Vec<Value>,
}

/// What was to be found out about the records of some datasets.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct EvaluationRecord {
    pub id: Uuid,
    pub gateway: String,
    pub name: String,
    /// As they were when it was made: they may be changed or deleted since.
    pub datasets: Vec<DatasetRecord>,
    /// One for each evaluator.
    pub results: Vec<ResultRecord>,
    /// Records that were looked at.
    pub total_logs: u64,
    /// Whether it is over, well or not.
    pub processed: bool,
    pub created: Millis,
    pub modified: Millis,
}

/// What one evaluator says.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct ResultRecord {
    pub id: Uuid,
    pub evaluator: Evaluator,
    pub status: Status,
    pub description: String,
    /// A number as text; empty where there is none.
    pub result: String,
    /// Records that it rests on.
    pub total_logs: u64,
}

/// What is found out about records.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Evaluator {
    /// What one costs.
    Cost,
    /// How long one takes.
    Speed,
    /// How many that people judged they like.
    Feedback,
}

/// How far a result is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Status {
    Waiting,
    Done,
    Failed,
}

impl Book {
    /// A generation that was never given before, not even by a book that was lost.
    pub(super) fn generation(&mut self, now: Millis) -> u64 {
        self.last = (self.last + 1).max(now.0);
        self.last
    }

    /// A stored key by its name.
    pub(super) fn key(&self, gateway: &str, provider: &str, alias: &str) -> Option<&KeyRecord> {
        self.keys.iter().find(|key| key.is(gateway, provider) && key.alias == alias)
    }

    /// The routes of a gateway, oldest first.
    pub(super) fn routes(&self, gateway: &str) -> impl DoubleEndedIterator<Item = &RouteRecord> {
        self.routes.iter().filter(move |route| route.gateway == gateway)
    }

    /// The datasets of a gateway, oldest first.
    pub(super) fn datasets(&self, gateway: &str) -> impl Iterator<Item = &DatasetRecord> {
        self.datasets.iter().filter(move |dataset| dataset.gateway == gateway)
    }

    /// The evaluations of a gateway, oldest first.
    pub(super) fn evaluations(&self, gateway: &str) -> impl Iterator<Item = &EvaluationRecord> {
        self.evaluations.iter().filter(move |evaluation| evaluation.gateway == gateway)
    }
}

impl KeyRecord {
    pub(super) fn is(&self, gateway: &str, provider: &str) -> bool {
        self.gateway == gateway && self.provider == canonical(provider)
    }

    /// What its secret is sealed to.
    pub(super) fn seal_name<'a>(&'a self, account: &'a str) -> [&'a str; 4] {
        key_name(account, &self.gateway, &self.provider, &self.alias)
    }
}

impl RouteRecord {
    /// The version in force. A route is made with one.
    pub(super) fn deployed(&self) -> Option<&VersionRecord> {
        let last = self.deployments.last()?;
        self.version(last.version)
    }

    pub(super) fn version(&self, id: Uuid) -> Option<&VersionRecord> {
        self.versions.iter().find(|version| version.id == id)
    }
}

impl FilterRecord {
    /// As the wire has it.
    pub(super) fn written(&self) -> Value {
        json!({ "key": self.key, "operator": self.operator, "value": self.value })
    }
}

/// Filters as the log understands them.
///
/// # Errors
/// Names the filter, and what it may be.
pub(super) fn compile(filters: &[FilterRecord]) -> Result<Vec<Filter>> {
    let written: Vec<Value> = filters.iter().map(FilterRecord::written).collect();
    Ok(Query::of_filters(&written.into())?.filters)
}

/// What a stored key is sealed to.
pub(super) fn key_name<'a>(account: &'a str, gateway: &'a str, provider: &'a str, alias: &'a str) -> [&'a str; 4] {
    [account, gateway, provider, alias]
}

/// What a secret among a gateway's settings is sealed to. No provider's slug has a space, so no key has this name.
pub(super) fn setting_name<'a>(account: &'a str, gateway: &'a str, label: &'a str) -> [&'a str; 4] {
    [account, gateway, "gateway settings", label]
}

/// What a header of a custom provider is sealed to.
pub(super) fn header_name<'a>(account: &'a str, provider: &'a str, header: &'a str) -> [&'a str; 4] {
    [account, "custom provider headers", provider, header]
}
