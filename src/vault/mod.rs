//! Who may call. Tokens are known by their SHA-256 only; nobody above sees more of one than its name.
//!
//!     Authorization: Bearer x --SHA-256--> compared with every token in constant time --> Caller { account, key }
//!
//! Does not read headers (`http::auth` does) and does not decide what an account may spend.

use std::sync::Arc;

use arc_swap::ArcSwap;
use sha2::{Digest, Sha256};
use subtle::{ConditionallySelectable, ConstantTimeEq};

use crate::base::{AccountId, Error, KeyId, Kind, Millis, Result};
use crate::config::{Auth, Budget, Scopes, Token};

pub mod seal;

/// The tokens in force. Cheap to clone; a reload replaces the snapshot for everyone.
#[derive(Clone)]
pub struct Vault(Arc<ArcSwap<Auth>>);

/// Who a request comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Caller {
    /// Who pays.
    pub account: AccountId,
    /// With which token; `None` for anonymous callers and the AI binding.
    pub key: Option<KeyId>,
    /// What for.
    pub scopes: Scopes,
    /// What may be used with its token.
    pub budget: Budget,
}

impl Caller {
    /// Somebody without a token, who may do what an account without tokens may.
    pub fn anonymous(account: AccountId) -> Self {
        Self { account, key: None, scopes: Scopes::ALL, budget: Budget::default() }
    }
}

impl Vault {
    /// Begins with a first set of tokens.
    pub fn new(auth: Auth) -> Self {
        Self(Arc::new(ArcSwap::from_pointee(auth)))
    }

    /// Puts another set of tokens in force, for requests from now on.
    pub fn replace(&self, auth: Auth) {
        self.0.store(Arc::new(auth));
    }

    /// Says who is calling with `token`, on a path that names the account `named` (or none).
    ///
    /// - A token pays for its own account and may name no other, unless it is good for any account.
    /// - No token: the anonymous account pays, whatever the path names, if there is one.
    /// - An unknown token counts as none only where no tokens exist at all: SDKs insist on sending one. Otherwise it is a
    ///   mistake that must not be billed to somebody else.
    ///
    /// # Errors
    /// [`Kind::Unauthorized`] in every other case; which one is for the log, not for the caller.
    pub fn admit(&self, token: Option<&str>, named: Option<&str>, now: Millis) -> Result<Caller> {
        let auth = self.0.load();
        let found = token.and_then(|token| find(&auth.tokens, token));
        let Some(found) = found else {
            return match &auth.anonymous {
                Some(account) if token.is_none() || auth.tokens.is_empty() => {
                    // Where there are tokens, what gateways are told is for who has one.
                    let scopes = Scopes { admin: auth.tokens.is_empty(), ..Scopes::ALL };
                    Ok(Caller { scopes, ..Caller::anonymous(account.clone()) })
                }
                _ if token.is_none() => Err(refused("no token was sent")),
                _ => Err(refused("the token is not known")),
            };
        };
        if found.expires.is_some_and(|end| end <= now) {
            return Err(refused(&format!("token {} has expired", found.id)));
        }
        let account = match named {
            Some(named) if named == found.account.as_str() => found.account.clone(),
            Some(named) if found.any_account => AccountId::new(named),
            Some(_) => return Err(refused(&format!("token {} belongs to another account", found.id))),
            None => found.account.clone(),
        };
        Ok(Caller { account, key: Some(found.id.clone()), scopes: found.scopes.clone(), budget: found.budget })
    }
}

/// Looks at every token, so that the time taken says nothing about which one came close.
fn find<'a>(tokens: &'a [Token], token: &str) -> Option<&'a Token> {
    let hash: [u8; 32] = Sha256::digest(token.as_bytes()).into();
    let mut found = u64::MAX;
    for (index, known) in tokens.iter().enumerate() {
        found.conditional_assign(&(index as u64), hash.ct_eq(&known.sha256));
    }
    usize::try_from(found).ok().and_then(|index| tokens.get(index))
}

/// The caller hears the same sentence each time; the log hears the reason.
fn refused(reason: &str) -> Error {
    Error::new(Kind::Unauthorized, "Authentication error").with_source(std::io::Error::other(reason.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn token(id: &str, secret: &str, account: &str) -> Token {
        Token {
            id: KeyId::new(id),
            sha256: Sha256::digest(secret.as_bytes()).into(),
            account: AccountId::new(account),
            any_account: false,
            scopes: Scopes::ALL,
            expires: None,
            budget: Default::default(),
        }
    }

    fn vault(anonymous: Option<&str>, tokens: bool) -> Vault {
        let tokens = vec![
            token("ada", "secret-a", "acme"),
            Token { any_account: true, ..token("ops", "secret-o", "house") },
            Token { expires: Some(Millis(1_000)), ..token("old", "secret-x", "acme") },
        ]
        .into_iter()
        .filter(|_| tokens)
        .collect();
        Vault::new(Auth { anonymous: anonymous.map(AccountId::new), tokens })
    }

    #[test]
    fn who_calls_follows_from_token_and_path() {
        let check = |vault: &Vault,
                     token: Option<&str>,
                     named: Option<&str>,
                     now: u64,
                     expected: Option<(&str, Option<&str>)>| {
            let caller = vault.admit(token, named, Millis(now));
            let seen = caller.as_ref().ok().map(|c| (c.account.as_str(), c.key.as_ref().map(KeyId::as_str)));
            assert_eq!(seen, expected, "token {token:?}, path {named:?}, at {now}");
            if let Err(error) = caller {
                assert_eq!((error.kind(), error.message()), (Kind::Unauthorized, "Authentication error"));
            }
        };
        let closed = vault(None, true);
        check(&closed, Some("secret-a"), None, 0, Some(("acme", Some("ada"))));
        check(&closed, Some("secret-a"), Some("acme"), 0, Some(("acme", Some("ada"))));
        check(&closed, Some("secret-a"), Some("other"), 0, None);
        check(&closed, Some("secret-o"), Some("other"), 0, Some(("other", Some("ops"))));
        check(&closed, Some("secret-x"), None, 999, Some(("acme", Some("old"))));
        check(&closed, Some("secret-x"), None, 1_000, None);
        check(&closed, Some("secret-"), None, 0, None);
        check(&closed, Some(""), None, 0, None);
        check(&closed, None, None, 0, None);

        let mixed = vault(Some("guest"), true);
        check(&mixed, None, None, 0, Some(("guest", None)));
        check(&mixed, None, Some("acme"), 0, Some(("guest", None)));
        check(&mixed, Some("mistyped"), None, 0, None);
        check(&mixed, Some("secret-a"), None, 0, Some(("acme", Some("ada"))));

        let open = vault(Some("guest"), false);
        check(&open, Some("sk-whatever"), Some("acme"), 0, Some(("guest", None)));
    }

    #[test]
    fn a_replaced_set_of_tokens_counts_at_once_for_every_clone() {
        let vault = vault(None, true);
        let clone = vault.clone();
        vault.replace(Auth { anonymous: None, tokens: vec![token("new", "secret-n", "acme")] });
        assert!(clone.admit(Some("secret-a"), None, Millis(0)).is_err());
        assert!(clone.admit(Some("secret-n"), None, Millis(0)).is_ok());
    }
}
