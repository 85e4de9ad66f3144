//! What makes two requests the same: SHA-256 over everything that can change the answer.
//!
//! ```text
//! Material ─ raw() ──> RawKey   over the exact bytes: all that a repeat, byte for byte, has to compute
//!          └ key() ──> Key      over the JSON as it is meant: order of members, blanks and escapes do not count
//! ```
//!
//! Nothing of a body is left out. A body that is no JSON counts by its bytes, and then both are one. Knows nothing of
//! calls, gateways or providers: whoever asks says what they are called.

use std::fmt;

use sha2::{Digest as _, Sha256};

use crate::base::Millis;
use crate::cache::json;

/// Part of every hash. Another way to compute keys needs another number, or old answers are served to new questions.
const FORMAT: &[u8] = b"neurond cache key 2";

/// 256 bits that stand for a request.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct Digest(pub(super) [u8; 32]);

/// Enough to tell two apart in a log.
impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0[..4].iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

/// What is emptied together: all answers of a gateway, or of a custom provider.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Scope(pub(super) [u8; 16]);

impl Scope {
    /// The gateway `gateway` of the account that owns it.
    pub fn gateway(owner: &str, gateway: &str) -> Self {
        Self::new(b"gateway", owner, gateway)
    }

    /// The custom provider `slug` of the account that owns it.
    pub fn provider(owner: &str, slug: &str) -> Self {
        Self::new(b"provider", owner, slug)
    }

    fn new(kind: &[u8], owner: &str, name: &str) -> Self {
        let mut fields = Fields::new(kind);
        fields.add(owner.as_bytes());
        fields.add(name.as_bytes());
        let mut scope = [0; 16];
        scope.copy_from_slice(&fields.digest().0[..16]);
        Self(scope)
    }
}

/// What a gateway is called where a fleet shares its answers.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Common {
    /// The same on every daemon that has the gateway alike, and another one on others.
    pub gateway: Scope,
    /// When this daemon's gateway was emptied last: nothing of before is taken.
    pub since: Millis,
}

/// The parts of a request that count.
#[derive(Clone, Copy, Debug)]
pub struct Material<'a> {
    /// Who asks. `None` where a gateway shares its answers among accounts; leave `auth` empty as well then.
    pub account: Option<&'a str>,
    /// The gateway that is asked, its owner included.
    pub gateway: Scope,
    /// The same for a fleet. `None`: its answers are not shared.
    pub common: Option<Common>,
    /// The provider's slug.
    pub provider: &'a str,
    /// The provider's own scope, if it is one that can be changed or deleted.
    pub provider_scope: Option<Scope>,
    /// The HTTP method.
    pub method: &'a str,
    /// Path and query under the provider, as they are sent.
    pub endpoint: &'a str,
    /// The values of the provider's auth headers.
    pub auth: &'a [&'a [u8]],
    /// The whole body.
    pub body: &'a [u8],
    /// The caller's own key: it stands for provider, method, endpoint, auth and body.
    pub custom: Option<&'a str>,
}

impl Material<'_> {
    /// The key over the exact bytes.
    pub fn raw(&self) -> RawKey {
        RawKey(self.bytes(self.gateway))
    }

    /// The key that entries are kept under. `raw` is what [`Material::raw`] said.
    pub fn key(&self, raw: &RawKey) -> Key {
        let json = if self.custom.is_some() { None } else { json::digest(self.body) };
        let meant = |gateway, body: [u8; 32]| {
            let mut fields = self.asked(b"json", gateway);
            fields.add(&body);
            fields.digest()
        };
        let digest = json.map_or(raw.0, |body| meant(self.gateway, body));
        let common = self.common.map(|Common { gateway, since }| {
            let digest = json.map_or_else(|| self.bytes(gateway), |body| meant(gateway, body));
            CommonKey { digest, since }
        });
        Key { digest, raw: raw.0, scopes: [Some(self.gateway), self.provider_scope], common }
    }

    fn bytes(&self, gateway: Scope) -> Digest {
        if let Some(custom) = self.custom {
            let mut fields = self.owned(b"custom", gateway);
            fields.add(custom.as_bytes());
            return fields.digest();
        }
        let mut fields = self.asked(b"bytes", gateway);
        fields.add(self.body);
        fields.digest()
    }

    fn owned(&self, kind: &[u8], gateway: Scope) -> Fields {
        let mut fields = Fields::new(kind);
        fields.add(&gateway.0);
        fields.add(&[u8::from(self.account.is_some())]);
        fields.add(self.account.unwrap_or_default().as_bytes());
        fields
    }

    fn asked(&self, kind: &[u8], gateway: Scope) -> Fields {
        let mut fields = self.owned(kind, gateway);
        for text in [self.provider, self.method, self.endpoint] {
            fields.add(text.as_bytes());
        }
        fields.add(&(self.auth.len() as u64).to_le_bytes());
        for value in self.auth {
            fields.add(value);
        }
        fields
    }
}

/// The exact bytes of a request. Cheap to compute, and enough for [`peek`](crate::cache::Cache::peek).
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct RawKey(pub(super) Digest);

/// A request, however its JSON is written.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Key {
    pub(super) digest: Digest,
    /// The same as `digest` where the body is no JSON.
    pub(super) raw: Digest,
    pub(super) scopes: [Option<Scope>; 2],
    pub(super) common: Option<CommonKey>,
}

/// The same request to a fleet.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct CommonKey {
    pub(super) digest: Digest,
    pub(super) since: Millis,
}

/// Fields one behind the other, each with its length: no two lists of fields have the same bytes. SHA-256, since processors
/// have instructions for it: over a request of usual length it takes a quarter of what BLAKE3 does.
struct Fields(Sha256);

impl Fields {
    fn new(kind: &[u8]) -> Self {
        let mut fields = Self(Sha256::new());
        fields.add(FORMAT);
        fields.add(kind);
        fields
    }

    fn add(&mut self, field: &[u8]) {
        self.0.update((field.len() as u64).to_le_bytes());
        self.0.update(field);
    }

    fn digest(self) -> Digest {
        Digest(self.0.finalize().into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BODY: &str = r#"{"model":"m","messages":[{"role":"user","content":"hi"}],"temperature":1}"#;

    fn material(body: &str) -> Material<'_> {
        Material {
            account: Some("a"),
            gateway: Scope::gateway("owner", "g"),
            common: None,
            provider: "openai",
            provider_scope: None,
            method: "POST",
            endpoint: "chat/completions",
            auth: &[b"Bearer k"],
            body: body.as_bytes(),
            custom: None,
        }
    }

    fn key(material: &Material<'_>) -> Digest {
        material.key(&material.raw()).digest
    }

    #[test]
    fn requests_that_mean_the_same_have_one_key_and_a_raw_key_each() {
        let check = |body: &str| {
            let (one, other) = (material(BODY), material(body));
            assert_ne!(one.raw(), other.raw(), "{body}");
            assert_eq!(key(&one), key(&other), "{body}");
        };
        check(r#"{"temperature":1,"messages":[{"content":"hi","role":"user"}],"model":"m"}"#);
        check(
            "{ \"model\" : \"m\",\n\t\"messages\":[ {\"role\":\"user\",\"content\":\"hi\"} ],\r\n\"temperature\":1 }\n",
        );
        check(r#"{"model":"\u006d","messages":[{"role":"user","content":"h\u0069"}],"temperature":1}"#);
    }

    #[test]
    fn whatever_can_change_the_answer_changes_both_keys() {
        let base = material(BODY);
        let check = |why: &str, other: Material<'_>| {
            assert_ne!(base.raw(), other.raw(), "{why}");
            assert_ne!(key(&base), key(&other), "{why}");
        };
        check("account", Material { account: Some("b"), ..base });
        check("a shared gateway", Material { account: None, ..base });
        check("an account without a name is no shared gateway", Material { account: Some(""), ..base });
        check("gateway", Material { gateway: Scope::gateway("owner", "h"), ..base });
        check("owner", Material { gateway: Scope::gateway("other", "g"), ..base });
        check("provider", Material { provider: "groq", ..base });
        check("method", Material { method: "PUT", ..base });
        check("endpoint", Material { endpoint: "chat/completions?a=1", ..base });
        check("auth", Material { auth: &[b"Bearer l"], ..base });
        check("no auth", Material { auth: &[], ..base });
        check("two values of auth", Material { auth: &[b"Bearer k", b""], ..base });
        check("text that moved a field on", Material { provider: "openaiP", method: "OST", ..base });
        check("custom key", Material { custom: Some("k"), ..base });
        for body in [
            r#"{"model":"m","messages":[{"role":"user","content":"hi"}],"temperature":1.0}"#,
            r#"{"model":"m","messages":[{"role":"user","content":"hi"}],"temperature":"1"}"#,
            r#"{"model":"m","messages":[{"role":"user","content":"hi"}],"temperature":1,"user":"u"}"#,
            r#"{"model":"m","messages":[{"role":"user","content":"ho"}],"temperature":1}"#,
            "",
        ] {
            check(body, Material { body: body.as_bytes(), ..base });
        }
    }

    #[test]
    fn images_that_differ_in_a_byte_differ_and_bytes_that_are_no_json_have_one_key() {
        let image = |byte: u8| [b"--boundary\r\n\r\n".as_slice(), &[0xff, byte], b"\r\n--boundary--"].concat();
        let (one, other) = (image(1), image(2));
        let (one, other) = (Material { body: &one, ..material("") }, Material { body: &other, ..material("") });
        assert_ne!(key(&one), key(&other));
        assert_eq!(key(&one), one.raw().0);
        let url = |data: &str| format!(r#"{{"image_url":{{"url":"data:image/png;base64,{data}"}}}}"#);
        assert_ne!(key(&material(&url("AAAA"))), key(&material(&url("AAAB"))));
    }

    #[test]
    fn daemons_that_call_a_gateway_alike_have_one_key_in_common_for_each_of_their_own() {
        let common = |name: &str| Some(Common { gateway: Scope::gateway("owner", name), since: Millis(5) });
        let key = |own: &str, material: Material<'_>| {
            let material = Material { gateway: Scope::gateway("owner", own), ..material };
            material.key(&material.raw())
        };
        let base = Material { common: common("g#alike"), ..material(BODY) };
        let (one, other) = (key("g#1", base), key("g#2", base));
        assert_ne!(one.digest, other.digest);
        assert_eq!(one.common, other.common);
        for (why, other) in [
            ("settings", Material { common: common("g#else"), ..base }),
            ("account", Material { account: Some("b"), ..base }),
            ("a shared gateway", Material { account: None, ..base }),
            ("auth", Material { auth: &[b"Bearer l"], ..base }),
            ("body", Material { body: b"{}", ..base }),
            ("no JSON", Material { body: b"x", ..base }),
            ("the caller's own key", Material { custom: Some("k"), ..base }),
        ] {
            let other = key("g#1", other).common.unwrap();
            assert_ne!(other.digest, one.common.unwrap().digest, "{why}");
            assert_eq!(other.since, Millis(5));
        }
        assert_eq!(key("g#1", material(BODY)).common, None);
    }

    #[test]
    fn a_key_of_the_callers_own_stands_for_all_but_account_and_gateway() {
        let base = Material { custom: Some("mine"), ..material(BODY) };
        let same = Material { provider: "groq", method: "GET", endpoint: "x", auth: &[], body: b"", ..base };
        assert_eq!(base.raw(), same.raw());
        assert_eq!(key(&base), key(&same));
        assert_eq!(key(&base), base.raw().0);
        let check = |why: &str, other: Material<'_>| assert_ne!(key(&base), key(&other), "{why}");
        check("account", Material { account: Some("b"), ..base });
        check("gateway", Material { gateway: Scope::gateway("owner", "h"), ..base });
        check("key", Material { custom: Some("yours"), ..base });
    }
}
