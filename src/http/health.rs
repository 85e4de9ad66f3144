//! For whoever runs the daemon: alive, ready, and every figure.

use actix_web::HttpResponse;
use actix_web::http::StatusCode;
use serde_json::json;

use crate::base::{Millis, Phase, Result};
use crate::fallback::Rest;
use crate::gateway::record::label;
use crate::http::{Services, answer};
use crate::ledger::FleetHealth;

/// The process answers; nothing else is claimed.
pub(super) fn live() -> Result<HttpResponse> {
    answer::json(StatusCode::OK, &json!({ "status": "alive" }))
}

/// 200 if every configured model takes requests and nobody is draining us; otherwise 503 with the reasons. Devices that serve although
/// something in them broke are warned of.
pub(super) fn ready(services: &Services) -> Result<HttpResponse> {
    let mut reasons = Vec::new();
    match *services.phase.borrow() {
        Phase::Starting => reasons.push("the daemon is starting".to_owned()),
        Phase::Draining => reasons.push("the daemon is draining".to_owned()),
        Phase::Ready => {}
    }
    let fleet = services.fleet.get();
    let config = services.config.get();
    for model in config.models.iter().filter(|model| !fleet.serves(&model.id)) {
        reasons.push(format!("{} is not loaded", model.id));
    }
    let mut models: Vec<&str> = fleet.serving().map(|id| id.as_str()).collect();
    models.sort_unstable();
    let (status, word) = match reasons.is_empty() {
        true => (StatusCode::OK, "ready"),
        false => (StatusCode::SERVICE_UNAVAILABLE, "not ready"),
    };
    let warnings: Vec<&String> = fleet.troubles.values().collect();
    answer::json(status, &json!({ "status": word, "reasons": reasons, "warnings": warnings, "models": models }))
}

/// Every series, in Prometheus' text format. What only its owner knows is asked for here, not counted twice.
pub(super) async fn metrics(services: &Services) -> HttpResponse {
    let metrics = &services.metrics;
    let cache = services.relays.cache.stats().await;
    for (what, value) in [
        ("entries", cache.entries),
        ("memory_bytes", cache.memory_bytes),
        ("disk_bytes", cache.disk_bytes),
        ("fills", cache.fills_open),
        ("followers", cache.followers),
        ("evictions", cache.evictions),
        ("off", u64::from(cache.is_off)),
    ] {
        metrics.cache_state.with_label_values(&[what]).set(value as i64);
    }
    let ledger = services.relays.ledger.health();
    for (what, value) in [
        ("open", ledger.open as u64),
        ("queued", ledger.queued as u64),
        ("faulty", u64::from(ledger.fault.is_some())),
        ("faults", ledger.faults),
        ("refused", ledger.refused),
        ("unmetered", ledger.unmetered),
    ] {
        metrics.ledger.with_label_values(&[what]).set(value as i64);
    }
    for (what, value) in ledger.fleet.iter().flat_map(fleet) {
        metrics.fleet.with_label_values(&[what]).set(value as i64);
    }
    metrics.breakers.reset();
    for target in services.relays.fallback.health(Millis::now()).await.unwrap_or_default() {
        if target.rest != Rest::None {
            let provider = label(target.target.provider.rsplit(':').next().unwrap_or_default()).to_owned();
            metrics.breakers.with_label_values(&[&provider]).inc();
        }
    }
    HttpResponse::Ok().content_type("text/plain; version=0.0.4; charset=utf-8").body(services.metrics.render())
}

/// How it is with the store of the fleet, by what is counted.
fn fleet(health: &FleetHealth) -> [(&'static str, u64); 9] {
    [
        ("up", u64::from(health.is_up)),
        ("losses", health.losses),
        ("leases", health.leases),
        ("asks", health.asks),
        ("rounds", health.rounds),
        ("waits", health.waits),
        ("refused", health.refused),
        ("local", health.local),
        ("clock_off_ms", health.clock_off_ms),
    ]
}
