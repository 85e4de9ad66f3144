//! Spans as OTLP has them on the wire, and what a server says to them.

use http::StatusCode;
use opentelemetry_proto::tonic::collector::trace::v1::{ExportTraceServiceRequest, ExportTraceServiceResponse};
use opentelemetry_proto::tonic::common::v1::InstrumentationScope;
use opentelemetry_proto::tonic::resource::v1::Resource;
use opentelemetry_proto::tonic::trace::v1::{ResourceSpans, ScopeSpans, Span};
use prost::Message;
use serde_json::Value;

use super::span::Attributes;
use crate::base::{Error, Result};

/// What the daemon calls itself.
const SERVICE: &str = "neurond";
/// Letters of a server's words that are told.
const TOLD: usize = 300;

/// The media type of a body.
pub(super) fn content_type(protobuf: bool) -> &'static str {
    if protobuf { "application/x-protobuf" } else { "application/json" }
}

/// The body that says spans.
///
/// # Errors
/// None that is known of; JSON has a word for all that spans hold.
pub(super) fn encode(spans: Vec<Span>, protobuf: bool) -> Result<Vec<u8>> {
    let version = env!("CARGO_PKG_VERSION");
    let mut service = Attributes::default();
    service.text("service.name", SERVICE);
    service.text("service.version", version);
    let scope = InstrumentationScope { name: SERVICE.into(), version: version.into(), ..Default::default() };
    let request = ExportTraceServiceRequest {
        resource_spans: vec![ResourceSpans {
            resource: Some(Resource { attributes: service.done(), ..Default::default() }),
            scope_spans: vec![ScopeSpans { scope: Some(scope), spans, schema_url: String::new() }],
            schema_url: String::new(),
        }],
    };
    if protobuf {
        return Ok(request.encode_to_vec());
    }
    serde_json::to_vec(&request).map_err(|error| Error::internal("spans could not be written").with_source(error))
}

/// How many spans a server has not taken that answered with success, and why; in whichever form it says so.
pub(super) fn rejected(said: &[u8]) -> Option<(u64, String)> {
    let (rejected, why) = if said.trim_ascii_start().starts_with(b"{") {
        let said: Value = serde_json::from_slice(said).ok()?;
        let partial = said.get("partialSuccess")?;
        let rejected = partial.get("rejectedSpans").unwrap_or(&Value::Null);
        // Numbers of 64 bits are texts in this JSON.
        let rejected = rejected.as_i64().or_else(|| rejected.as_str()?.parse().ok()).unwrap_or(0);
        (rejected, partial.get("errorMessage").and_then(Value::as_str).unwrap_or_default().to_owned())
    } else {
        let partial = ExportTraceServiceResponse::decode(said).ok()?.partial_success?;
        (partial.rejected_spans, partial.error_message)
    };
    let why = why.chars().filter(|letter| !letter.is_control()).take(TOLD).collect();
    Some((u64::try_from(rejected).unwrap_or(0), why))
}

/// Statuses after which the same spans may be sent again; all others are a last word.
pub(super) fn is_passing(status: StatusCode) -> bool {
    matches!(
        status,
        StatusCode::TOO_MANY_REQUESTS
            | StatusCode::BAD_GATEWAY
            | StatusCode::SERVICE_UNAVAILABLE
            | StatusCode::GATEWAY_TIMEOUT
    )
}
