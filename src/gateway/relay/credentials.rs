//! Credentials that depend on the moment: signatures, and access tokens that are kept while they are good.

use std::rc::Rc;
use std::sync::Arc;

use bytes::Bytes;
use http::Method;
use http::header::{self, HeaderMap, HeaderName, HeaderValue};
use tokio::sync::Mutex;

use super::Relay;
use super::attempt::{Failure, MAX_FAILURE_BYTES};
use crate::base::{Error, Millis, Result};
use crate::gateway::step::{Sign, covers_encodings};
use crate::net::client::{Attempt, Origin};
use crate::net::sigv4;
use crate::net::vertex::{AccessToken, Age, ServiceAccount};
use crate::registry::Gateway;

/// Access tokens kept at most; one more and those that are old go, or all.
const MAX_TOKENS: usize = 1024;

impl Relay {
    /// The attempt with credentials of this moment; `None`: it has all it needs.
    pub(super) async fn signed(
        &self,
        attempt: &Attempt,
        sign: &Sign,
        gateway: &Gateway,
    ) -> Result<Option<Attempt>, Failure> {
        let mut signed = match sign {
            Sign::Ready if gateway.guard.ignores_responses() => return Ok(None),
            _ => attempt.clone(),
        };
        if !gateway.guard.ignores_responses() && !covers_encodings(&signed.headers) {
            // What rules are to read must be readable.
            signed.headers.insert(header::ACCEPT_ENCODING, HeaderValue::from_static("identity"));
        }
        match sign {
            Sign::Ready => {}
            Sign::Aws { credentials, region, service } => {
                // What is left of another signature would not be covered by this one.
                for name in ["authorization", "x-amz-content-sha256", "x-amz-date", "x-amz-security-token"] {
                    signed.headers.remove(name);
                }
                let path = attempt.path.path();
                let host = attempt.origin.authority.as_str();
                let kind = attempt.headers.get(header::CONTENT_TYPE).and_then(|kind| kind.to_str().ok());
                let mut covered = vec![("host", host)];
                covered.extend(kind.map(|kind| ("content-type", kind)));
                let request = sigv4::Request {
                    method: attempt.method.as_str(),
                    path,
                    query: attempt.path.query().unwrap_or_default(),
                    headers: &covered,
                    payload: sigv4::Payload::Bytes(&attempt.body),
                };
                let scope = sigv4::Scope { region, service };
                for (name, value) in sigv4::sign(credentials, scope, &request, Millis::now()) {
                    set(&mut signed.headers, name, &value)?;
                }
            }
            Sign::Google { account, secret } => {
                let token = self.google_token(account, *secret).await?;
                set(&mut signed.headers, "authorization", &format!("Bearer {token}"))?;
            }
        }
        Ok(Some(signed))
    }

    /// An access token, from memory or from Google, where one call asks for all that come meanwhile.
    async fn google_token(&self, account: &ServiceAccount, secret: [u8; 32]) -> Result<String, Failure> {
        if let Some(bearer) = self.fresh_token(&secret) {
            return Ok(bearer);
        }
        let turn = self.turn(secret);
        let held = turn.lock().await;
        if let Some(bearer) = self.fresh_token(&secret) {
            return Ok(bearer);
        }
        let now = Millis::now();
        let kept = self.tokens.borrow().get(&secret).cloned();
        let token = match (self.new_google_token(account, now).await, kept) {
            (Ok(token), _) => token,
            // It is good for some minutes yet, and by then there may be another.
            (Err(_), Some(token)) if token.age(now) == Age::Ageing => return Ok(token.bearer.expose().clone()),
            (Err(failure), _) => return Err(failure),
        };
        let bearer = token.bearer.expose().clone();
        let mut tokens = self.tokens.borrow_mut();
        // Callers may bring accounts of their own, and as many as they like.
        if tokens.len() >= MAX_TOKENS {
            tokens.retain(|_, token| token.age(now) == Age::Fresh);
            if tokens.len() >= MAX_TOKENS {
                tokens.clear();
            }
        }
        tokens.insert(secret, token);
        drop(held);
        Ok(bearer)
    }

    fn fresh_token(&self, secret: &[u8; 32]) -> Option<String> {
        let tokens = self.tokens.borrow();
        let token = tokens.get(secret).filter(|token| token.age(Millis::now()) == Age::Fresh)?;
        Some(token.bearer.expose().clone())
    }

    fn turn(&self, secret: [u8; 32]) -> Rc<Mutex<()>> {
        let mut turns = self.turns.borrow_mut();
        if turns.len() >= MAX_TOKENS {
            turns.retain(|_, turn| Rc::strong_count(turn) > 1);
        }
        turns.entry(secret).or_default().clone()
    }

    /// Forgets a token that Google does not take any more: the next call gets another.
    pub(super) fn forget_token(&self, sign: &Sign) {
        if let Sign::Google { secret, .. } = sign {
            self.tokens.borrow_mut().remove(secret);
        }
    }

    async fn new_google_token(&self, account: &ServiceAccount, now: Millis) -> Result<AccessToken, Failure> {
        let form = account.form(now).map_err(Failure::Ours)?;
        let attempt = token_request(account.token_uri(), form).map_err(Failure::Ours)?;
        let answer = self.client.send(&attempt).await.map_err(Failure::Fault)?;
        let status = answer.status.as_u16();
        let body = answer.body.collect(MAX_FAILURE_BYTES).await.map_err(Failure::Fault)?;
        AccessToken::read(status, &body, now).map_err(Failure::Ours)
    }
}

fn set(headers: &mut HeaderMap, name: &str, value: &str) -> Result<(), Failure> {
    let unusable = || Failure::Ours(Error::bad_input("The stored key cannot be sent: it holds control characters."));
    let name = HeaderName::from_bytes(name.as_bytes()).map_err(|_| unusable())?;
    let mut value = HeaderValue::from_str(value).map_err(|_| unusable())?;
    value.set_sensitive(true);
    headers.insert(name, value);
    Ok(())
}

/// A POST of a form, for an access token.
fn token_request(uri: &str, form: String) -> Result<Attempt> {
    let unusable = || Error::bad_input("The service account's token_uri is no https address.");
    let (tls, rest) = match (uri.strip_prefix("https://"), uri.strip_prefix("http://")) {
        (Some(rest), _) => (true, rest),
        (None, Some(rest)) => (false, rest),
        (None, None) => return Err(unusable()),
    };
    let (authority, path) = rest.split_once('/').unwrap_or((rest, ""));
    let origin = Origin::new(tls, authority).map_err(|_| unusable())?;
    let path = format!("/{path}").parse().map_err(|_| unusable())?;
    let mut headers = HeaderMap::new();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/x-www-form-urlencoded"));
    let (origin, body) = (Arc::new(origin), Bytes::from(form));
    Ok(Attempt { origin, method: Method::POST, path, headers, body, allow_private: false })
}
