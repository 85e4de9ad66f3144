//! AWS Signature Version 4: the headers with which a request proves whose it is, without its secret going along.
//!
//!     method, path, query, headers, payload --> canonical request --SHA-256--> string to sign --HMAC--> `authorization`
//!     secret --HMAC date--HMAC region--HMAC service--> key of the day ---------------------------^
//!
//! Pure: the time comes in, headers go out. Presigned URLs and signed chunks are not made here: nothing needs them. The
//! signature covers path and query as they are given, so they must be sent exactly so.

use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, percent_decode_str, percent_encode};
use ring::{digest, hmac};
use serde::Deserialize;

use crate::base::{Error, Millis, Result, Secret};

const ALGORITHM: &str = "AWS4-HMAC-SHA256";
const UNSIGNED: &str = "UNSIGNED-PAYLOAD";

/// Everything but RFC 3986's unreserved characters.
const RESERVED: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'.').remove(b'_').remove(b'~');
/// The same within a path.
const RESERVED_IN_PATH: &AsciiSet = &RESERVED.remove(b'/');

/// Headers that are never signed: those made here, and those that somebody on the way may change.
const NOT_SIGNED: [&str; 15] = [
    "authorization",
    "connection",
    "content-length",
    "expect",
    "keep-alive",
    "proxy-authorization",
    "te",
    "trailer",
    "transfer-encoding",
    "upgrade",
    "user-agent",
    "x-amz-content-sha256",
    "x-amz-date",
    "x-amz-security-token",
    "x-amzn-trace-id",
];

/// Who signs.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Credentials {
    /// Names the key; not secret.
    pub access_key_id: String,
    /// The key itself.
    pub secret_access_key: Secret<String>,
    /// Belongs to temporary credentials.
    pub session_token: Option<Secret<String>>,
}

impl Credentials {
    /// Reads a stored key, `{"accessKeyId","secretAccessKey","sessionToken"?,"region"?}`: the credentials and their
    /// region, if it says one.
    ///
    /// # Errors
    /// [`Kind::BadInput`](crate::base::Kind::BadInput) if a part is missing. No part of the secret is in the message.
    pub fn parse(secret: &str) -> Result<(Self, Option<String>)> {
        #[derive(Deserialize)]
        struct Stored {
            #[serde(flatten)]
            credentials: Credentials,
            region: Option<String>,
        }
        let wanted = "an AWS key is JSON with the texts accessKeyId and secretAccessKey, sessionToken where it is \
                      temporary, and region";
        let stored: Stored = serde_json::from_str(secret).map_err(|_| Error::bad_input(wanted))?;
        let Credentials { access_key_id, secret_access_key, session_token } = &stored.credentials;
        let token = session_token.as_ref().map(|token| token.expose().as_str());
        let more = token.into_iter().chain(stored.region.as_deref());
        let mut parts = [access_key_id.as_str(), secret_access_key.expose()].into_iter().chain(more);
        // The id, the region and the token go into headers.
        let bad = parts.any(|part| part.is_empty() || !part.bytes().all(|byte| byte.is_ascii_graphic()));
        drop(parts);
        if bad {
            return Err(Error::bad_input(format!("{wanted}; none of them is empty or has spaces")));
        }
        Ok((stored.credentials, stored.region))
    }
}

/// What a signature is good for.
#[derive(Clone, Copy, Debug)]
pub struct Scope<'a> {
    /// Such as `us-east-1`.
    pub region: &'a str,
    /// The name AWS signs under: `bedrock` for Bedrock's runtime. `s3` has rules of its own: its paths are signed as they
    /// are, not normalised and encoded once more, and it wants to be told the payload's hash.
    pub service: &'a str,
}

/// What a request carries.
#[derive(Clone, Copy, Debug)]
pub enum Payload<'a> {
    /// All of the body.
    Bytes(&'a [u8]),
    /// The body is not covered: for bodies that are not known yet, over TLS, where a service allows it.
    Unsigned,
}

/// A request as it will be sent.
#[derive(Clone, Copy, Debug)]
pub struct Request<'a> {
    /// In capitals.
    pub method: &'a str,
    /// From the first slash to the question mark, as in the request line.
    pub path: &'a str,
    /// Behind the question mark, as in the request line; may be empty.
    pub query: &'a str,
    /// Names and values of what is to be signed; `host` must be among them. Old signatures and headers that may change
    /// on the way are left out here.
    pub headers: &'a [(&'a str, &'a str)],
    /// The body.
    pub payload: Payload<'a>,
}

/// Signs a request: the headers to add, in place of any of the same names.
pub fn sign(
    credentials: &Credentials,
    scope: Scope<'_>,
    request: &Request<'_>,
    now: Millis,
) -> Vec<(&'static str, String)> {
    let time = timestamp(now);
    let date = &time[..8];
    let mut added = vec![("x-amz-date", time.clone())];
    if let Some(token) = &credentials.session_token {
        added.push(("x-amz-security-token", token.expose().clone()));
    }
    let s3 = scope.service == "s3";
    let payload = match request.payload {
        Payload::Bytes(bytes) => hex(digest::digest(&digest::SHA256, bytes).as_ref()),
        Payload::Unsigned => UNSIGNED.to_owned(),
    };
    if s3 || matches!(request.payload, Payload::Unsigned) {
        added.push(("x-amz-content-sha256", payload.clone()));
    }

    let (headers, names) = canonical_headers(request.headers, &added);
    let path = if s3 { request.path.to_owned() } else { canonical_path(request.path) };
    let query = canonical_query(request.query);
    let canonical = format!("{}\n{path}\n{query}\n{headers}\n{names}\n{payload}", request.method);

    let Scope { region, service } = scope;
    let area = format!("{date}/{region}/{service}/aws4_request");
    let hash = hex(digest::digest(&digest::SHA256, canonical.as_bytes()).as_ref());
    let text = format!("{ALGORITHM}\n{time}\n{area}\n{hash}");

    let secret = format!("AWS4{}", credentials.secret_access_key.expose());
    let mut key = hmac::Key::new(hmac::HMAC_SHA256, secret.as_bytes());
    for part in [date, region, service, "aws4_request"] {
        key = hmac::Key::new(hmac::HMAC_SHA256, hmac::sign(&key, part.as_bytes()).as_ref());
    }
    let signature = hex(hmac::sign(&key, text.as_bytes()).as_ref());
    let id = &credentials.access_key_id;
    let proof = format!("{ALGORITHM} Credential={id}/{area}, SignedHeaders={names}, Signature={signature}");
    added.push(("authorization", proof));
    added
}

/// `20150830T123600Z`.
fn timestamp(now: Millis) -> String {
    let millis = i64::try_from(now.0).unwrap_or(i64::MAX);
    let moment = jiff::Timestamp::from_millisecond(millis).unwrap_or(jiff::Timestamp::MAX);
    moment.strftime("%Y%m%dT%H%M%SZ").to_string()
}

/// Lines of `name:value`, sorted, one a name; and the names, joined by `;`.
fn canonical_headers(given: &[(&str, &str)], added: &[(&str, String)]) -> (String, String) {
    let given = given.iter().map(|(name, value)| (name.to_ascii_lowercase(), *value));
    let given = given.filter(|(name, _)| !NOT_SIGNED.contains(&name.as_str()));
    let added = added.iter().map(|(name, value)| ((*name).to_owned(), value.as_str()));
    let mut all: Vec<(String, &str)> = given.chain(added).collect();
    // Stable: the values of a name that occurs twice stay in their order.
    all.sort_by(|a, b| a.0.cmp(&b.0));

    let (mut lines, mut names) = (String::new(), String::new());
    let mut last: Option<&str> = None;
    for (name, value) in &all {
        if last == Some(name.as_str()) {
            lines.pop();
            lines.push(',');
        } else {
            lines.push_str(name);
            lines.push(':');
            names.push_str(if last.is_some() { ";" } else { "" });
            names.push_str(name);
        }
        for (index, word) in value.split_ascii_whitespace().enumerate() {
            lines.push_str(if index > 0 { " " } else { "" });
            lines.push_str(word);
        }
        lines.push('\n');
        last = Some(name);
    }
    (lines, names)
}

/// Without `.`, `..` and empty segments; every reserved byte encoded, those of an earlier encoding included.
fn canonical_path(path: &str) -> String {
    let mut kept: Vec<&str> = Vec::new();
    for segment in path.split('/') {
        match segment {
            "" | "." => {}
            ".." => drop(kept.pop()),
            name => kept.push(name),
        }
    }
    let mut clean = String::from("/");
    clean.push_str(&kept.join("/"));
    if path.ends_with('/') && !kept.is_empty() {
        clean.push('/');
    }
    percent_encode(clean.as_bytes(), RESERVED_IN_PATH).to_string()
}

/// Sorted by name and value, each encoded in the one way that counts, however it was written. A `+` is a plus.
fn canonical_query(query: &str) -> String {
    let same = |text: &str| percent_encode(&Vec::from_iter(percent_decode_str(text)), RESERVED).to_string();
    let pairs = query.split('&').filter(|pair| !pair.is_empty());
    let pairs = pairs.map(|pair| pair.split_once('=').unwrap_or((pair, "")));
    let mut pairs: Vec<(String, String)> = pairs.map(|(name, value)| (same(name), same(value))).collect();
    pairs.sort();
    pairs.iter().map(|(name, value)| format!("{name}={value}")).collect::<Vec<_>>().join("&")
}

fn hex(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    let digit = |half: u8| char::from(DIGITS[usize::from(half & 15)]);
    bytes.iter().flat_map(|byte| [digit(byte >> 4), digit(*byte)]).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// 2015-08-30 12:36:00 UTC, as in AWS's published cases.
    const THEN: Millis = Millis(1_440_938_160_000);
    const FORM: (&str, &str) = ("Content-Type", "application/x-www-form-urlencoded");
    const JSON: (&str, &str) = ("content-type", "application/json");
    const TOKEN: &str = "AQoDYXdzEPT//////////wEXAMPLEtc764bNrC9SAPBSM22wDOk4x4HIZ8j4FZTwdQWLWsKWHGBuFqwAeMicRXmxfpSPfIeoIYRqTflf\
        KD8YUuwthAx7mSEI/qkPpKPi/kMcGdQrmGdeehM4IC1NtBmUpp2wUE8phUZampKsburEDy0KPkyQDYwT7WZ0wq5VSXDvp75YU9HFvlRd\
        8Tx6q6fE8YQcHNVXAkiY9q6d+xo0rKwT38xVqr7ZD0u0iPPkUL64lIZbqBAz+scqKmlzm8FDrypNC9Yjc8fPOLn9FX9KSYvKTr4rvx3iSIlTJabIQwj2ICCR/oLxBA==";

    type Headers = &'static [(&'static str, &'static str)];
    type Row = (&'static str, &'static str, Headers, &'static [u8], &'static str, &'static str);
    type BedrockRow = (
        &'static str,
        &'static str,
        Headers,
        &'static [u8],
        &'static str,
        Option<&'static str>,
        &'static str,
        &'static str,
    );

    #[rustfmt::skip]
    const SUITE: [Row; 25] = [
        ("get-vanilla", "GET /", &[], b"", "host;x-amz-date", "5fa00fa31553b73ebf1942676e86291e8372ff2a2260956d9b8aae1d763fbf31"),
        ("get-vanilla-empty-query-key", "GET /?Param1=value1", &[], b"", "host;x-amz-date", "a67d582fa61cc504c4bae71f336f98b97f1ea3c7a6bfe1b6e45aec72011b9aeb"),
        ("get-vanilla-query-order-key", "GET /?Param1=value2&Param1=Value1", &[], b"", "host;x-amz-date", "eedbc4e291e521cf13422ffca22be7d2eb8146eecf653089df300a15b2382bd1"),
        ("get-vanilla-query-order-key-case", "GET /?Param2=value2&Param1=value1", &[], b"", "host;x-amz-date", "b97d918cfa904a5beff61c982a1b6f458b799221646efd99d3219ec94cdf2500"),
        ("get-vanilla-query-order-value", "GET /?Param1=value2&Param1=value1", &[], b"", "host;x-amz-date", "5772eed61e12b33fae39ee5e7012498b51d56abc0abb7c60486157bd471c4694"),
        ("get-vanilla-query-unreserved", "GET /?-._~0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz=-._~0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz", &[], b"", "host;x-amz-date", "9c3e54bfcdf0b19771a7f523ee5669cdf59bc7cc0884027167c21bb143a40197"),
        ("get-vanilla-utf8-query", "GET /?ሴ=bar", &[], b"", "host;x-amz-date", "2cdec8eed098649ff3a119c94853b13c643bcf08f8b0a1d91e12c9027818dd04"),
        ("get-unreserved", "GET /-._~0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz", &[], b"", "host;x-amz-date", "07ef7494c76fa4850883e2b006601f940f8a34d404d0cfa977f52a65bbf5f24f"),
        ("get-utf8", "GET /ሴ", &[], b"", "host;x-amz-date", "8318018e0b0f223aa2bbf98705b62bb787dc9c0e678f255a891fd03141be5d85"),
        ("get-space", "GET /example space/", &[], b"", "host;x-amz-date", "652487583200325589f1fba4c7e578f72c47cb61beeca81406b39ddec1366741"),
        ("get-slash", "GET //", &[], b"", "host;x-amz-date", "5fa00fa31553b73ebf1942676e86291e8372ff2a2260956d9b8aae1d763fbf31"),
        ("get-slashes", "GET //example//", &[], b"", "host;x-amz-date", "9a624bd73a37c9a373b5312afbebe7a714a789de108f0bdfe846570885f57e84"),
        ("get-slash-dot-slash", "GET /./", &[], b"", "host;x-amz-date", "5fa00fa31553b73ebf1942676e86291e8372ff2a2260956d9b8aae1d763fbf31"),
        ("get-slash-pointless-dot", "GET /./example", &[], b"", "host;x-amz-date", "ef75d96142cf21edca26f06005da7988e4f8dc83a165a80865db7089db637ec5"),
        ("get-relative", "GET /example/..", &[], b"", "host;x-amz-date", "5fa00fa31553b73ebf1942676e86291e8372ff2a2260956d9b8aae1d763fbf31"),
        ("get-relative-relative", "GET /example1/example2/../..", &[], b"", "host;x-amz-date", "5fa00fa31553b73ebf1942676e86291e8372ff2a2260956d9b8aae1d763fbf31"),
        ("get-header-key-duplicate", "GET /", &[("My-Header1", "value2"), ("My-Header1", "value2"), ("My-Header1", "value1")], b"", "host;my-header1;x-amz-date", "c9d5ea9f3f72853aea855b47ea873832890dbdd183b4468f858259531a5138ea"),
        ("get-header-value-order", "GET /", &[("My-Header1", "value4"), ("My-Header1", "value1"), ("My-Header1", "value3"), ("My-Header1", "value2")], b"", "host;my-header1;x-amz-date", "08c7e5a9acfcfeb3ab6b2185e75ce8b1deb5e634ec47601a50643f830c755c01"),
        ("get-header-value-trim", "GET /", &[("My-Header1", " value1"), ("My-Header2", " \"a   b   c\"")], b"", "host;my-header1;my-header2;x-amz-date", "acc3ed3afb60bb290fc8d2dd0098b9911fcaa05412b367055dee359757a9c736"),
        ("get-header-value-multiline", "GET /", &[("My-Header1", "value1\n  value2\n     value3")], b"", "host;my-header1;x-amz-date", "cfd34249e4b1c8d6b91ef74165d41a32e5fab3306300901bb65a51a73575eefd"),
        ("post-vanilla", "POST /", &[], b"", "host;x-amz-date", "5da7c1a2acd57cee7505fc6676e4e544621c30862966e37dddb68e92efbe5d6b"),
        ("post-vanilla-query", "POST /?Param1=value1", &[], b"", "host;x-amz-date", "28038455d6de14eafc1f9222cf5aa6f1a96197d7deb8263271d420d138af7f11"),
        ("post-header-key-sort", "POST /", &[("My-Header1", "value1")], b"", "host;my-header1;x-amz-date", "c5410059b04c1ee005303aed430f6e6645f61f4dc9e1461ec8f8916fdf18852c"),
        ("post-header-value-case", "POST /", &[("My-Header1", "VALUE1")], b"", "host;my-header1;x-amz-date", "cdbc9802e29d2942e5e10b5bccfdd67c5f22c7c4e8ae67b53629efa58b974b7d"),
        ("post-x-www-form-urlencoded", "POST /", &[FORM], b"Param1=value1", "content-type;host;x-amz-date", "ff11897932ad3f4e8b18135d722051e5ac45fc38421b1da7b9d196a0fe09473a"),
    ];

    #[rustfmt::skip]
    const BEDROCK: [BedrockRow; 7] = [
        ("converse", "POST /model/anthropic.claude-3-5-sonnet-20240620-v1%3A0/converse", &[JSON], b"{\"messages\":[]}", "us-east-1", None, "content-type;host;x-amz-date", "40f11609b51d318bc71127993eb5b075cc12b3bde24aa11d2a25186d1fc1d196"),
        ("converse-stream", "POST /model/anthropic.claude-3-5-sonnet-20240620-v1%3A0/converse-stream", &[JSON, ("Accept", "application/vnd.amazon.eventstream"), ("x-amzn-bedrock-trace", "ENABLED")], b"{\"messages\":[]}", "us-east-1", None, "accept;content-type;host;x-amz-date;x-amzn-bedrock-trace", "4a0998753f93dcac0395e1cb0d90fc652913d98ab0365be268c970df547723d7"),
        ("a colon that is not encoded", "POST /model/anthropic.claude-3-5-sonnet-20240620-v1:0/converse", &[JSON], b"{\"messages\":[]}", "us-east-1", None, "content-type;host;x-amz-date", "d01a8d899a4fa4002b4b754611d4da1c824394200b23acaaa4609304bef93847"),
        ("an inference profile in another region", "POST /model/eu.amazon.nova-lite-v1%3A0/invoke-with-response-stream", &[JSON], b"{\"inputText\":\"\xc3\xa9\"}", "eu-central-1", None, "content-type;host;x-amz-date", "7f4ac3d22d4e47f7ce898456b196018894a94e15df3f32004e39fdbed80cb64b"),
        ("an arn as the model", "POST /model/arn%3Aaws%3Abedrock%3Aus-west-2%3A123456789012%3Ainference-profile%2Fus.meta.llama3-1-70b-instruct-v1%3A0/invoke", &[JSON], b"{}", "us-west-2", None, "content-type;host;x-amz-date", "031492258d677e5992fa479c508c130f2c396229893add1f6f4c6ed6d15f41e9"),
        ("temporary credentials", "POST /model/anthropic.claude-3-5-sonnet-20240620-v1%3A0/invoke", &[JSON], b"{}", "us-east-1", Some(TOKEN), "content-type;host;x-amz-date;x-amz-security-token", "1283e0189cc95d1e1a510bf553fd54e1a796bed3bdfc12f9f35f8c8458b61ee9"),
        ("a listing with a query", "GET /async-invoke?statusEquals=InProgress&maxResults=5&nextToken=a%2Fb%2Bc%3D", &[], b"", "us-east-1", None, "host;x-amz-date", "151a4ced963242ee446945c3cd7e32585f4f02348611ab5030fbbfc7b5a244da"),
    ];

    /// A request, and what it must be signed as.
    struct Case {
        line: &'static str,
        headers: &'static [(&'static str, &'static str)],
        payload: Payload<'static>,
        names: &'static str,
        signature: &'static str,
    }

    fn example(token: Option<&str>) -> Credentials {
        Credentials {
            access_key_id: "AKIDEXAMPLE".into(),
            secret_access_key: Secret::new("wJalrXUtnFEMI/K7MDENG+bPxRfiCYEXAMPLEKEY".into()),
            session_token: token.map(|token| Secret::new(token.into())),
        }
    }

    fn signed(case: &Case, scope: Scope<'_>, host: &str, token: Option<&str>) -> Vec<(&'static str, String)> {
        let (method, target) = case.line.split_once(' ').unwrap();
        let (path, query) = target.split_once('?').unwrap_or((target, ""));
        let headers = [&[("Host", host)], case.headers].concat();
        let request = Request { method, path, query, headers: &headers, payload: case.payload };
        sign(&example(token), scope, &request, THEN)
    }

    fn check(name: &str, case: &Case, scope: Scope<'_>, host: &str, token: Option<&str>) {
        let added = signed(case, scope, host, token);
        let Scope { region, service } = scope;
        let expected = format!(
            "AWS4-HMAC-SHA256 Credential=AKIDEXAMPLE/20150830/{region}/{service}/aws4_request, SignedHeaders={}, Signature={}",
            case.names, case.signature
        );
        let value = |wanted: &str| added.iter().find(|(name, _)| *name == wanted).map(|(_, value)| value.as_str());
        assert_eq!(value("authorization"), Some(expected.as_str()), "{name}");
        assert_eq!(value("x-amz-date"), Some("20150830T123600Z"), "{name}");
        assert_eq!(value("x-amz-security-token"), token, "{name}");
        let unsigned = matches!(case.payload, Payload::Unsigned).then_some(UNSIGNED);
        assert_eq!(value("x-amz-content-sha256"), unsigned, "{name}");
    }

    /// AWS's published cases, by their names.
    #[test]
    fn awss_own_cases_are_signed_as_published() {
        let scope = Scope { region: "us-east-1", service: "service" };
        for (name, line, headers, body, names, signature) in SUITE {
            let case = Case { line, headers, payload: Payload::Bytes(body), names, signature };
            check(name, &case, scope, "example.amazonaws.com", None);
        }
        let names = "host;x-amz-date;x-amz-security-token";
        let signature = "85d96828115b5dc0cfc3bd16ad9e210dd772bbebba041836c64533a82be05ead";
        let case = Case { line: "POST /", headers: &[], payload: Payload::Bytes(b""), names, signature };
        check("post-sts-header-before", &case, scope, "example.amazonaws.com", Some(TOKEN));
    }

    /// Signatures as botocore 1.44 makes them of the same requests.
    #[test]
    fn bedrocks_paths_are_signed_as_botocore_signs_them() {
        for (name, line, headers, body, region, token, names, signature) in BEDROCK {
            let case = Case { line, headers, payload: Payload::Bytes(body), names, signature };
            let host = format!("bedrock-runtime.{region}.amazonaws.com");
            check(name, &case, Scope { region, service: "bedrock" }, &host, token);
        }
        let signature = "0d1e4c601ef3125f7cfa4aa4e665d57fe14d28f177ca9c0f6c626a1ed8609564";
        let names = "content-type;host;x-amz-content-sha256;x-amz-date";
        let case =
            Case { line: "POST /model/m/invoke", headers: &[JSON], payload: Payload::Unsigned, names, signature };
        let scope = Scope { region: "us-east-1", service: "bedrock" };
        check("unsigned", &case, scope, "bedrock-runtime.us-east-1.amazonaws.com", None);
    }

    /// The examples of S3's manual.
    #[test]
    fn s3_has_its_paths_signed_as_they_are_and_is_told_the_payloads_hash() {
        let credentials = Credentials {
            access_key_id: "AKIAIOSFODNN7EXAMPLE".into(),
            secret_access_key: Secret::new("wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY".into()),
            session_token: None,
        };
        let put = [("Date", "Fri, 24 May 2013 00:00:00 GMT"), ("x-amz-storage-class", "REDUCED_REDUNDANCY")];
        for (method, path, query, headers, body, signature) in [
            (
                "GET",
                "/test.txt",
                "",
                &[("Range", "bytes=0-9")][..],
                "",
                "f0e8bdb87c964420e857bd35b5d6ed310bd44f0170aba48dd91039c6036bdb41",
            ),
            (
                "PUT",
                "/test%24file.text",
                "",
                &put,
                "Welcome to Amazon S3.",
                "98ad721746da40c64f1a55b78f14c238d841ea1380cd77a1b5971af0ece108bd",
            ),
            ("GET", "/", "lifecycle", &[], "", "fea454ca298b7da1c68078a5d1bdbfbbe0d65c699e0f91ac7a200a0136783543"),
            (
                "GET",
                "/",
                "max-keys=2&prefix=J",
                &[],
                "",
                "34b48302e7b5fa45bde8084f4b7868a86f0a534bc59db6670ed5711ef69dc6f7",
            ),
        ] {
            let headers = [&[("host", "examplebucket.s3.amazonaws.com")], headers].concat();
            let request = Request { method, path, query, headers: &headers, payload: Payload::Bytes(body.as_bytes()) };
            let scope = Scope { region: "us-east-1", service: "s3" };
            let added = sign(&credentials, scope, &request, Millis(1_369_353_600_000));
            assert!(added.last().unwrap().1.ends_with(&format!("Signature={signature}")), "{method} {path}?{query}");
            assert!(added.iter().any(|(name, value)| *name == "x-amz-content-sha256" && value.len() == 64));
        }
    }

    #[test]
    fn what_may_change_on_the_way_and_old_signatures_are_not_signed() {
        let scope = Scope { region: "us-east-1", service: "bedrock" };
        let bare = Case { line: "GET /", headers: &[], payload: Payload::Bytes(b""), names: "", signature: "" };
        let more: &[(&str, &str)] = &[
            ("Connection", "keep-alive"),
            ("User-Agent", "x"),
            ("Authorization", "AWS4-HMAC-SHA256 Credential=OTHER/…"),
            ("X-Amz-Date", "20000101T000000Z"),
            ("x-amz-security-token", "old"),
            ("transfer-encoding", "chunked"),
        ];
        let dressed = Case { headers: more, ..bare };
        assert_eq!(signed(&dressed, scope, "h", None), signed(&bare, scope, "h", None));
    }

    #[test]
    fn a_stored_key_is_read_and_a_broken_one_says_what_is_wanted() {
        let good = r#"{"accessKeyId":"AKID","secretAccessKey":"s3cret","region":"eu-west-1","sessionToken":"t"}"#;
        let (credentials, region) = Credentials::parse(good).unwrap();
        assert_eq!((credentials.access_key_id.as_str(), region.as_deref()), ("AKID", Some("eu-west-1")));
        assert_eq!(credentials.session_token.unwrap().expose(), "t");
        assert_eq!(credentials.secret_access_key.expose(), "s3cret");
        for bad in ["", "[]", "AKID", &good.replace("accessKeyId", "id"), &good.replace("AKID", "A\\nB")] {
            let error = Credentials::parse(bad).unwrap_err();
            assert!(error.message().contains("accessKeyId") && !error.message().contains("s3cret"), "{error}");
        }
    }
}
