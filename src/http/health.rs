//! For whoever runs the daemon: alive, ready, and every figure.

use actix_web::HttpResponse;
use actix_web::http::StatusCode;
use serde_json::json;

use crate::base::{Phase, Result};
use crate::http::{Services, answer};

/// The process answers; nothing else is claimed.
pub(super) fn live() -> Result<HttpResponse> {
    answer::json(StatusCode::OK, &json!({ "status": "alive" }))
}

/// 200 if every configured model takes requests and nobody is draining us; otherwise 503 with the reasons.
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
    answer::json(status, &json!({ "status": word, "reasons": reasons, "models": models }))
}

/// Every series, in Prometheus' text format.
pub(super) fn metrics(services: &Services) -> HttpResponse {
    HttpResponse::Ok().content_type("text/plain; version=0.0.4; charset=utf-8").body(services.metrics.render())
}
