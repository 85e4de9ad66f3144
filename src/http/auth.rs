//! Credentials out of a request's headers. Who they belong to is the vault's business.

use actix_web::HttpRequest;
use actix_web::http::header::{AUTHORIZATION, HeaderMap, HeaderName, SEC_WEBSOCKET_PROTOCOL};

use crate::base::{Millis, Result};
use crate::http::Services;
use crate::http::route::{Listener, Route, Surface};
use crate::vault::Caller;

/// Where gateways look for a token of ours.
pub(super) static TOKEN: HeaderName = HeaderName::from_static("cf-aig-authorization");
/// In front of a token in a subprotocol, where browsers can set no header.
const TOKEN_PROTOCOL: &str = "cf-aig-authorization.";

/// Says who sent this request; a refusal is counted.
///
/// # Errors
/// `Unauthorized`, and `NotFound` on a binding listener whose configuration went away.
pub(super) fn caller(services: &Services, listener: Listener, route: &Route, headers: &HeaderMap) -> Result<Caller> {
    if listener == Listener::Binding {
        // The binding has no credentials by its contract: being able to reach the listener is what admits a caller.
        let config = services.config.get();
        let Some(binding) = &config.binding else {
            return Err(crate::base::Error::new(
                crate::base::Kind::NotFound,
                "The AI binding is no longer configured on this server.",
            ));
        };
        return Ok(Caller::anonymous(binding.account.clone()));
    }
    let token = bearer(headers).or_else(|| {
        // Anthropic's SDKs and some OpenAI clients; never on Cloudflare's own surface.
        let compatible = matches!(route.surface, Surface::OpenAi | Surface::CloudflareV1 | Surface::Messages);
        compatible.then(|| headers.get("x-api-key")?.to_str().ok()).flatten()
    });
    let admitted = services.vault.admit(token, route.account.as_deref(), Millis::now());
    if admitted.is_err() {
        services.metrics.auth_failures.inc();
    }
    admitted
}

/// The token of `Authorization: Bearer …`. Another scheme is an empty token: sent, and known to nobody.
pub(super) fn bearer(headers: &HeaderMap) -> Option<&str> {
    let value = headers.get(AUTHORIZATION)?;
    let Some((scheme, token)) = value.to_str().ok().and_then(|value| value.trim().split_once(' ')) else {
        return Some("");
    };
    Some(if scheme.eq_ignore_ascii_case("bearer") { token.trim() } else { "" })
}

/// The token of `cf-aig-authorization`, whose scheme may be left out.
pub(super) fn bare(value: &str) -> &str {
    let value = value.trim();
    match value.split_once(' ') {
        Some((scheme, token)) if scheme.eq_ignore_ascii_case("bearer") => token.trim(),
        _ => value,
    }
}

/// The token that a browser hides in a subprotocol, and the protocol that says so.
pub(super) fn hidden(request: &HttpRequest) -> Option<(&str, &str)> {
    let offered = request.headers().get(SEC_WEBSOCKET_PROTOCOL)?.to_str().ok()?;
    let mut protocols = offered.split(',').map(str::trim);
    let protocol = protocols.find(|protocol| protocol.starts_with(TOKEN_PROTOCOL))?;
    Some((&protocol[TOKEN_PROTOCOL.len()..], protocol))
}

#[cfg(test)]
mod tests {
    use actix_web::http::header::HeaderValue;

    use super::*;

    #[test]
    fn only_a_bearer_token_is_a_token() {
        let check = |value: Option<&str>, expected: Option<&str>| {
            let mut headers = HeaderMap::new();
            if let Some(value) = value {
                headers.insert(AUTHORIZATION, HeaderValue::from_str(value).unwrap());
            }
            assert_eq!(bearer(&headers), expected, "{value:?}");
        };
        check(None, None);
        check(Some("Bearer abc"), Some("abc"));
        check(Some("bearer  abc "), Some("abc"));
        check(Some("Basic abc"), Some(""));
        check(Some("abc"), Some(""));
    }
}
