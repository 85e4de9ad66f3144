//! What every edit has at hand, gateways as they are made, and a book sealed anew.

use serde_json::{Map, Value, json};
use uuid::Uuid;

use super::book::{Book, GatewayRecord, header_name, setting_name};
use super::view::DEFAULT;
use crate::base::{Millis, Result};
use crate::config::gateway::{FIELDS, each_secret};
use crate::vault::seal::{Sealer, is_sealed};

/// What an edit has at hand.
pub(super) struct Bench<'a> {
    pub account: &'a str,
    pub sealer: &'a Sealer,
    pub now: Millis,
}

/// Makes the gateway that every account has: callers need a token, calls are logged, nothing is kept or limited.
pub(super) fn ensure_default(book: &mut Book, bench: &Bench) {
    if book.gateways.contains_key(DEFAULT) {
        return;
    }
    let mut fields = defaults();
    fields.insert("authentication".into(), true.into());
    insert(book, bench, DEFAULT, fields);
}

/// Puts a gateway into the book.
pub(super) fn insert(book: &mut Book, bench: &Bench, id: &str, fields: Map<String, Value>) -> GatewayRecord {
    let (internal, now) = (Uuid::new_v4(), bench.now);
    let record = GatewayRecord { internal, fields, generation: book.generation(now), created: now, modified: now };
    book.gateways.insert(id.to_owned(), record.clone());
    record
}

/// What a gateway is that says nothing.
pub(super) fn defaults() -> Map<String, Value> {
    let mut fields: Map<String, Value> = FIELDS.iter().map(|key| ((*key).to_owned(), Value::Null)).collect();
    for key in ["authentication", "byok_only", "cache_invalidate_on_update", "log_classification", "logpush", "zdr"] {
        fields.insert(key.into(), false.into());
    }
    for key in ["collect_logs", "cache_per_account"] {
        fields.insert(key.into(), true.into());
    }
    for key in ["cache_ttl", "rate_limiting_interval", "rate_limiting_limit"] {
        fields.insert(key.into(), 0.into());
    }
    for key in ["fallback", "rules"] {
        fields.insert(key.into(), json!([]));
    }
    fields.insert("rate_limiting_technique".into(), "fixed".into());
    fields.insert("workers_ai_billing_mode".into(), "postpaid".into());
    fields
}

/// Puts every secret under the sealer's current key; says how many were not.
///
/// # Errors
/// When one does not open. The book may have changed in part then.
pub(super) fn reseal(account: &str, book: &mut Book, sealer: &Sealer) -> Result<usize> {
    let mut count = 0;
    let mut renew = |name: &[&str], sealed: &mut String| -> Result<()> {
        if let Some(fresh) = sealer.reseal(name, sealed)? {
            *sealed = fresh;
            count += 1;
        }
        Ok(())
    };
    for key in &mut book.keys {
        let mut sealed = std::mem::take(&mut key.sealed);
        let outcome = renew(&key.seal_name(account), &mut sealed);
        key.sealed = sealed;
        outcome?;
    }
    for provider in &mut book.providers {
        let id = provider.id.to_string();
        for (name, sealed) in &mut provider.headers {
            renew(&header_name(account, &id, name), sealed)?;
        }
    }
    for (id, gateway) in &mut book.gateways {
        each_secret(&mut gateway.fields, |label, sealed| {
            debug_assert!(is_sealed(sealed), "books hold no open secret");
            renew(&setting_name(account, id, label), sealed)
        })?;
    }
    Ok(count)
}
