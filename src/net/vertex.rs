//! How a Google service account becomes an access token.
//!
//!     key as JSON or base64 --> ServiceAccount --RS256--> assertion --form--> token endpoint (whoever calls)
//!                                                                                  |
//!     Age: fresh, ageing, expired <-- AccessToken <-------- status and body -------'
//!
//! Pure but for the signature: nothing is sent or remembered here. Who asks the endpoint also sees to it that only one
//! call at a time does.

use std::fmt;

use base64::alphabet::{STANDARD, URL_SAFE};
use base64::engine::general_purpose::{GeneralPurpose, GeneralPurposeConfig, URL_SAFE_NO_PAD};
use base64::engine::{DecodePaddingMode, Engine as _};
use ring::rand::SystemRandom;
use ring::signature::{RSA_PKCS1_SHA256, RsaKeyPair};
use serde::Deserialize;
use serde_json::json;

use crate::base::{Error, Kind, Millis, Result, Secret};

/// What a token may do: everything that the account may do in Google Cloud.
const SCOPE: &str = "https://www.googleapis.com/auth/cloud-platform";
const GRANT: &str = "urn%3Aietf%3Aparams%3Aoauth%3Agrant-type%3Ajwt-bearer";
const TOKEN_URI: &str = "https://oauth2.googleapis.com/token";
/// An assertion begins a little earlier, so that a clock that is ahead of Google's is no reason to refuse it.
const SKEW_S: u64 = 10;
/// The longest life of an assertion that is accepted.
const ASSERTION_S: u64 = 3600;
/// How long a token lives whose answer does not say.
const UNKNOWN_LIFE_S: u64 = 600;
/// With less than this left, a token is renewed.
const RENEW_BEFORE_MS: u64 = 5 * 60 * 1000;

/// A key file of Google Cloud, ready to sign.
pub struct ServiceAccount {
    email: String,
    key: RsaKeyPair,
    key_id: Option<String>,
    token_uri: String,
    project: Option<String>,
    region: Option<String>,
}

impl fmt::Debug for ServiceAccount {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ServiceAccount({})", self.email)
    }
}

#[derive(Deserialize)]
struct KeyFile {
    #[serde(rename = "type")]
    kind: Option<String>,
    client_email: Option<String>,
    private_key: Option<Secret<String>>,
    private_key_id: Option<String>,
    token_uri: Option<String>,
    project_id: Option<String>,
    region: Option<String>,
}

impl ServiceAccount {
    /// Reads a key file as Google writes it, with `region` beside its own keys where there is one, as JSON or as its base64.
    ///
    /// # Errors
    /// [`Kind::BadInput`] if it is none, or if it names a token endpoint that is not Google's: a caller may bring the
    /// file, and we are the ones who would call there. The message repeats nothing of the secret.
    pub fn parse(secret: &str) -> Result<Self> {
        let secret = secret.trim();
        let decoded = if secret.starts_with('{') { secret.as_bytes().to_vec() } else { decode_base64(secret)? };
        let file: KeyFile = serde_json::from_slice(&decoded).map_err(|error| {
            // The error's own words may quote the file.
            let place = format!("line {}, column {}", error.line(), error.column());
            Error::bad_input(format!("the service account is no key file of Google Cloud: it breaks at {place}"))
        })?;
        if let Some(kind) = file.kind.filter(|kind| kind != "service_account") {
            let words = if kind.len() < 40 { kind.as_str() } else { "something else" };
            return Err(Error::bad_input(format!("the key file is for {words}: create a key of a service account")));
        }
        let missing = |key| move || Error::bad_input(format!("the service account has no {key}"));
        let email = file.client_email.ok_or_else(missing("client_email"))?;
        let key = private_key(file.private_key.ok_or_else(missing("private_key"))?.expose())?;
        let token_uri = file.token_uri.unwrap_or_else(|| TOKEN_URI.to_owned());
        if !is_googles(&token_uri) {
            return Err(Error::bad_input(format!("token_uri of a service account is {TOKEN_URI}, not another server")));
        }
        // Region and project become parts of a host name and a path.
        let name = |key, value: &Option<String>, more: &[u8]| match value {
            Some(text) if !is_name(text, more) => Err(Error::bad_input(format!(
                "{key} of the service account must be small letters, digits and dashes, such as us-central1"
            ))),
            _ => Ok(()),
        };
        name("region", &file.region, b"")?;
        name("project_id", &file.project_id, b".:")?;
        let (key_id, project, region) = (file.private_key_id, file.project_id, file.region);
        Ok(Self { email, key, key_id, token_uri, project, region })
    }

    /// Whose key it is.
    pub fn email(&self) -> &str {
        &self.email
    }

    /// Where the form is posted to: an `https` address of Google.
    pub fn token_uri(&self) -> &str {
        &self.token_uri
    }

    /// The project of the account, if the file names one.
    pub fn project(&self) -> Option<&str> {
        self.project.as_deref()
    }

    /// The region that was written beside Google's own keys.
    pub fn region(&self) -> Option<&str> {
        self.region.as_deref()
    }

    /// The body of the request for a token, `application/x-www-form-urlencoded`. Good for an hour.
    ///
    /// # Errors
    /// [`Kind::Internal`] if the machine cannot sign.
    pub fn form(&self, now: Millis) -> Result<String> {
        Ok(format!("grant_type={GRANT}&assertion={}", self.assertion(now)?))
    }

    /// A signed claim of who asks, as a JSON web token.
    fn assertion(&self, now: Millis) -> Result<String> {
        let mut header = json!({"alg": "RS256", "typ": "JWT"});
        if let Some(id) = &self.key_id {
            header["kid"] = json!(id);
        }
        let begin = now.seconds().saturating_sub(SKEW_S);
        let claims = json!({
            "iss": self.email,
            "scope": SCOPE,
            "aud": self.token_uri,
            "iat": begin,
            "exp": begin + ASSERTION_S,
        });
        let mut token = URL_SAFE_NO_PAD.encode(header.to_string());
        token.push('.');
        token.push_str(&URL_SAFE_NO_PAD.encode(claims.to_string()));
        let mut signature = vec![0; self.key.public().modulus_len()];
        self.key
            .sign(&RSA_PKCS1_SHA256, &SystemRandom::new(), token.as_bytes(), &mut signature)
            .map_err(|_| Error::internal("the service account's key does not sign"))?;
        token.push('.');
        token.push_str(&URL_SAFE_NO_PAD.encode(signature));
        Ok(token)
    }
}

/// Padding, line breaks and the alphabet of URLs are all met in the wild.
fn decode_base64(text: &str) -> Result<Vec<u8>> {
    const ANY_PADDING: GeneralPurposeConfig =
        GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent);
    let text: String = text.split_ascii_whitespace().collect();
    let alphabet = if text.contains(['-', '_']) { &URL_SAFE } else { &STANDARD };
    GeneralPurpose::new(alphabet, ANY_PADDING)
        .decode(text)
        .map_err(|_| Error::bad_input("a service account is Google Cloud's key file as JSON, or the base64 of it"))
}

fn private_key(pem: &str) -> Result<RsaKeyPair> {
    let wanted =
        "private_key of the service account must be an RSA key as PEM, beginning with -----BEGIN PRIVATE KEY-----";
    let body = pem.split_once("-----BEGIN PRIVATE KEY-----").and_then(|(_, rest)| rest.split_once("-----END"));
    let (body, _) = body.ok_or_else(|| Error::bad_input(wanted))?;
    // A key file that was pasted through a shell often has its line breaks as two characters.
    let body = body.replace("\\n", "\n");
    let key = decode_base64(&body).map_err(|_| Error::bad_input(wanted))?;
    RsaKeyPair::from_pkcs8(&key).map_err(|error| Error::bad_input(format!("{wanted}, of 2048 bits or more: {error}")))
}

/// Whether an address is one of Google's own, over TLS, on the usual port.
fn is_googles(uri: &str) -> bool {
    let Some(rest) = uri.strip_prefix("https://") else { return false };
    let host = rest.split(['/', '?', '#']).next().unwrap_or_default();
    // User names and ports are nothing Google writes; without them the host is what it seems.
    let plain = host.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || b".-".contains(&byte));
    plain && (host.ends_with(".googleapis.com") || host == "accounts.google.com")
}

fn is_name(text: &str, more: &[u8]) -> bool {
    let fits = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-' || more.contains(&byte);
    (1..=63).contains(&text.len()) && text.bytes().all(fits)
}

/// What calls carry, for as long as it lives.
#[derive(Clone, Debug)]
pub struct AccessToken {
    /// Goes behind `Authorization: Bearer`.
    pub bearer: Secret<String>,
    /// When it is worth nothing any more.
    pub expires: Millis,
}

/// What is to be done about a token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Age {
    /// Use it.
    Fresh,
    /// Use it, and ask for the next one: less than five minutes are left.
    Ageing,
    /// Ask for another one first.
    Expired,
}

impl AccessToken {
    /// Reads what the token endpoint answered at `now`.
    ///
    /// # Errors
    /// - [`Kind::Unauthorized`] if Google does not accept the account; its reason is in the message.
    /// - [`Kind::Busy`] or [`Kind::Unreachable`] if the endpoint is in trouble: the same form may be accepted in a moment.
    /// - [`Kind::Internal`] if the answer has no token in it.
    pub fn read(status: u16, body: &[u8], now: Millis) -> Result<Self> {
        #[derive(Deserialize)]
        struct Answer {
            access_token: String,
            expires_in: Option<u64>,
        }
        if !(200..300).contains(&status) {
            return Err(refusal(status, body));
        }
        let answer: Option<Answer> = serde_json::from_slice(body).ok();
        // It becomes a header's value.
        let good =
            answer.filter(|a| !a.access_token.is_empty() && a.access_token.bytes().all(|b| b.is_ascii_graphic()));
        let Some(Answer { access_token, expires_in }) = good else {
            return Err(Error::internal("Google's token endpoint answered without an access token"));
        };
        let life = expires_in.unwrap_or(UNKNOWN_LIFE_S).saturating_mul(1000);
        Ok(Self { bearer: Secret::new(access_token), expires: Millis(now.0.saturating_add(life)) })
    }

    /// What is to be done at `now`.
    pub fn age(&self, now: Millis) -> Age {
        match self.expires.0.saturating_sub(now.0) {
            0 => Age::Expired,
            left if left < RENEW_BEFORE_MS => Age::Ageing,
            _ => Age::Fresh,
        }
    }
}

fn refusal(status: u16, body: &[u8]) -> Error {
    #[derive(Deserialize, Default)]
    struct Refusal {
        error: Option<String>,
        error_description: Option<String>,
    }
    if status == 429 || status >= 500 {
        let kind = if status == 429 { Kind::Busy } else { Kind::Unreachable };
        return Error::new(kind, format!("Google's token endpoint answers {status}: try again in a moment"));
    }
    let refusal: Refusal = serde_json::from_slice(body).unwrap_or_default();
    let reasons = [refusal.error, refusal.error_description].into_iter().flatten();
    let reason: Vec<String> =
        reasons.map(|text| text.chars().filter(|c| !c.is_control()).take(200).collect()).collect();
    let reason = if reason.is_empty() { format!("status {status}") } else { reason.join(": ") };
    Error::new(Kind::Unauthorized, format!("Google does not accept the service account ({reason}): renew its key"))
}

#[cfg(test)]
mod tests {
    use base64::engine::general_purpose::STANDARD as BASE64;
    use ring::signature::{KeyPair, RSA_PKCS1_2048_8192_SHA256, UnparsedPublicKey};
    use serde_json::Value;

    use super::*;

    const NOW: Millis = Millis(1_700_000_000_500);

    /// A key made for this test and used nowhere else: whoever reads it gains nothing.
    const TEST_KEY: &str = "\
-----BEGIN PRIVATE KEY-----
MIIEvQIBADANBgkqhkiG9w0BAQEFAASCBKcwggSjAgEAAoIBAQDGm6F8FwDXzY/X
XZl5+3uanDm/ARO1+s87VEDUq3YAGcJTuqHEmGgnItYl06SKxUmWu0QYi2P32NVx
6DL7/WEP6yrZCsiilFmzfAlW4sz7Yxux9lzFocyVFfiaif2fzYqirLQcydwv4Pon
VqVqRjeIpOJna8NnO8lPU3A350COBPsbQExp/kMP7CzbtkkGneN5bfADy80R5240
VquTiou3m+pkfHJejoKMpGgxSJ/ach+7hCm5JYL3ZM300TMtPdOW4R/8VaNQAw8r
XYYYzlX3krwdukfh9R4+6nGUNAENMmEUifQkxtksmvoCauijik617JHQT4x3sJhv
JdgGetBDAgMBAAECggEAQxIDsthB3J762IwvbFZVI51mku5WLbqJiUumqStOKjKI
waXhQ3cElVLaZuPWSVbexxxunqtUEzsSuejkbtzejnWofqt5ng3jTQ2ySblF6A9M
Jwk/wy4k3KQS1H2NPQ44pz8ThDVXOoQLdoV4Ty9vSaIFI0/tKUuzbCqNVxOtZUgI
LfduI/DIRi7uGCm2PYEqhFECjlACK7VcxyV1yGQph8fpNNf+FAUzPucYMJGSWU3c
SaxoyJR7hI1jfpErFqSXT8dGEJ3PrzW5tCIOGKZ6Mx1oj6LwCCag2k6vKirwDw9q
rVFNwH9rdMR5y6J5tc3Qu3NBwPzXO74O89eWG3vgQQKBgQD6sTEhR5G2LXnoHaC+
UIJZD/tA1K73kMRoChZRGcuT/izhDryIflR9jgY4w3a0ogm1/Eldo+t30WwfsEeW
fiC0nwZAt0vOI0Vc0UMqXSqSTbhiVIwjAcPHnIb0VBC8F26p9X7Pzx1ruG0oefWi
yprIITyigbRbrFHktt6079xu6wKBgQDK0CFxbC/7tUB7KfumeytRWLRZ92w5Wo4J
NnyJgjDDrHZKAjjqnbOqii5R8t2u8kNtOPPLPRhQKwEN/xTzn54jrugtDBWI9bZU
XEfEf5PQsU58nQvo4HxfjZ6mGF6PGrE7/nifVwlLiY42BojrzpO/SmGW4ukyFUp/
gfnwkxo+CQKBgGhLSVZAESXKe5oOoW4rzl7BIFVTZktGZf+mmqw44BH8v60N1W+v
pvTpHjuFTiBN/V5BzD/xzyd079erHc1FQdQDCLXpy9bBo7y+roO0aN6fCOOXqwlx
VYL44shJJQErenWo1Y4c62+CNZ+ORZvpUEWMVk6BSYiOAy/0yGhcFcfrAoGABtky
V+ckU6aSL9aCFeQQ2WVaabNOJz2kkDET0Xzg8qqPL/6VN27t0zNpTwEZdT/fAQAs
U0+T05kwJu3XIkbgiynr0yGWVJKffofDMKJyNljWYqTW8x0pdfyNP+SQxNpM4866
+f5xZOiXMcHUu8m0+X+kffjZkQRhCJ819maxOykCgYEA1kk0bTbZ47R51fe35B3v
L6s4q5025vPgijOS1xbPufh0KWpsYc2t6CPz81aQRLLjj/EVCBcgf4rEZv3eEDfv
NEf6aRgsPPIpsKRShjfKMsr7XqJo7mFFSBpxcU74lEpShZDYOcnq9xL/iMISo7ro
PqSaB23YSgj1eMKuEL42OSk=
-----END PRIVATE KEY-----
";

    fn file() -> Value {
        json!({
            "type": "service_account",
            "project_id": "test-project",
            "private_key_id": "kid1",
            "private_key": TEST_KEY,
            "client_email": "tester@test-project.iam.gserviceaccount.com",
            "client_id": "1",
            "auth_uri": "https://accounts.google.com/o/oauth2/auth",
            "token_uri": "https://oauth2.googleapis.com/token",
            "universe_domain": "googleapis.com",
            "region": "europe-west4",
        })
    }

    fn with(key: &str, value: impl Into<Value>) -> String {
        let mut file = file();
        file[key] = value.into();
        file.to_string()
    }

    #[test]
    fn an_assertion_is_signed_by_the_key_and_claims_what_google_wants() {
        let account = ServiceAccount::parse(&file().to_string()).unwrap();
        let form = account.form(NOW).unwrap();
        let (grant, token) = form.split_once("&assertion=").unwrap();
        assert_eq!(grant, "grant_type=urn%3Aietf%3Aparams%3Aoauth%3Agrant-type%3Ajwt-bearer");
        let (signed, signature) = token.rsplit_once('.').unwrap();
        let key = UnparsedPublicKey::new(&RSA_PKCS1_2048_8192_SHA256, account.key.public_key());
        let signature = URL_SAFE_NO_PAD.decode(signature).unwrap();
        key.verify(signed.as_bytes(), &signature).unwrap();
        assert!(key.verify(&signed.as_bytes()[1..], &signature).is_err());

        let part = |text: &str| -> Value { serde_json::from_slice(&URL_SAFE_NO_PAD.decode(text).unwrap()).unwrap() };
        let (header, claims) = signed.split_once('.').unwrap();
        assert_eq!(part(header), json!({"alg": "RS256", "typ": "JWT", "kid": "kid1"}));
        let expected = json!({
            "iss": "tester@test-project.iam.gserviceaccount.com",
            "scope": "https://www.googleapis.com/auth/cloud-platform",
            "aud": "https://oauth2.googleapis.com/token",
            "iat": 1_699_999_990_u64,
            "exp": 1_700_003_590_u64,
        });
        assert_eq!(part(claims), expected);
    }

    #[test]
    fn a_key_file_is_read_as_json_and_as_base64_of_any_kind() {
        let text = serde_json::to_string_pretty(&file()).unwrap();
        let padded = BASE64.encode(&text);
        let lines: Vec<&str> = padded.as_bytes().chunks(76).map(|line| std::str::from_utf8(line).unwrap()).collect();
        let escaped = with("private_key", TEST_KEY.replace('\n', "\\n"));
        for secret in [
            text.clone(),
            format!("\n {text}\n"),
            lines.join("\r\n"),
            padded.trim_end_matches('=').to_owned(),
            URL_SAFE_NO_PAD.encode(&text),
            escaped,
        ] {
            let account = ServiceAccount::parse(&secret).unwrap();
            assert_eq!(account.email(), "tester@test-project.iam.gserviceaccount.com");
            assert_eq!((account.project(), account.region()), (Some("test-project"), Some("europe-west4")));
            assert_eq!(account.token_uri(), TOKEN_URI);
        }
        let bare = json!({"client_email": "a@b", "private_key": TEST_KEY}).to_string();
        let account = ServiceAccount::parse(&bare).unwrap();
        assert_eq!((account.project(), account.region(), account.token_uri()), (None, None, TOKEN_URI));
    }

    #[test]
    fn what_is_no_key_of_a_service_account_is_refused_and_not_repeated() {
        let broken = TEST_KEY.replace("MII", "MIJ");
        for (secret, words) in [
            (String::new(), "key file"),
            ("not base64!".into(), "base64"),
            (BASE64.encode("hello"), "line 1, column"),
            (with("private_key", Value::Null), "no private_key"),
            (with("client_email", Value::Null), "no client_email"),
            (with("private_key", 7), "line 1, column"),
            (with("private_key", "-----BEGIN RSA PRIVATE KEY-----\nMII"), "BEGIN PRIVATE KEY"),
            (with("private_key", broken), "2048 bits"),
            (with("type", "authorized_user"), "authorized_user"),
            (with("region", "evil.example/#"), "region"),
            (with("region", ""), "region"),
            (with("project_id", "a/b"), "project_id"),
        ] {
            let error = ServiceAccount::parse(&secret).unwrap_err();
            assert_eq!(error.kind(), Kind::BadInput);
            assert!(error.message().contains(words), "{words:?} in {error}");
            assert!(!error.message().contains("MII"), "{error}");
        }
    }

    #[test]
    fn tokens_are_asked_for_at_google_only() {
        for (uri, good) in [
            ("https://oauth2.googleapis.com/token", true),
            ("https://oauth2.europe-west4.rep.googleapis.com/token", true),
            ("https://accounts.google.com/o/oauth2/token", true),
            ("http://oauth2.googleapis.com/token", false),
            ("https://127.0.0.1/token", false),
            ("https://googleapis.com.evil.example/token", false),
            ("https://evilgoogleapis.com/token", false),
            ("https://oauth2.googleapis.com@evil.example/", false),
            ("https://evil.example\\.googleapis.com/", false),
            ("https://oauth2.googleapis.com:8443/token", false),
        ] {
            assert_eq!(ServiceAccount::parse(&with("token_uri", uri)).is_ok(), good, "{uri}");
        }
    }

    #[test]
    fn an_answer_becomes_a_token_or_an_error_of_its_kind() {
        let check = |status, body: &str, expected: Result<u64, Kind>| {
            let read = AccessToken::read(status, body.as_bytes(), NOW);
            assert_eq!(read.map(|token| token.expires.0 - NOW.0).map_err(|error| error.kind()), expected, "{body}");
        };
        let good = r#"{"access_token":"ya29.c.x....","expires_in":3599,"token_type":"Bearer"}"#;
        assert_eq!(AccessToken::read(200, good.as_bytes(), NOW).unwrap().bearer.expose(), "ya29.c.x....");
        check(200, good, Ok(3_599_000));
        check(200, r#"{"access_token":"t"}"#, Ok(600_000));
        check(200, r#"{"access_token":"a\r\nb","expires_in":3599}"#, Err(Kind::Internal));
        check(200, r#"{"id_token":"t"}"#, Err(Kind::Internal));
        check(200, "<html>", Err(Kind::Internal));
        check(
            400,
            r#"{"error":"invalid_grant","error_description":"Invalid JWT Signature."}"#,
            Err(Kind::Unauthorized),
        );
        check(401, "<html>", Err(Kind::Unauthorized));
        check(503, "", Err(Kind::Unreachable));
        check(429, "", Err(Kind::Busy));
        let refused = br#"{"error":"invalid_grant","error_description":"Invalid JWT Signature."}"#;
        let error = AccessToken::read(400, refused, NOW).unwrap_err();
        assert!(error.message().contains("invalid_grant: Invalid JWT Signature."), "{error}");
    }

    #[test]
    fn a_token_is_renewed_when_less_than_five_minutes_are_left() {
        let token = AccessToken { bearer: Secret::new("t".into()), expires: Millis(1_000_000) };
        for (now, age) in [
            (0, Age::Fresh),
            (700_000, Age::Fresh),
            (700_001, Age::Ageing),
            (999_999, Age::Ageing),
            (1_000_000, Age::Expired),
            (u64::MAX, Age::Expired),
        ] {
            assert_eq!(token.age(Millis(now)), age, "at {now}");
        }
    }
}
