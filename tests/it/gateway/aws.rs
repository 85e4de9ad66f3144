//! AWS Signature Version 4 as whoever receives a request checks it, from AWS's description of it and from nothing of ours.
//!
//!     request as it came --> canonical request --SHA-256--> string to sign --HMAC, key of day, region, service--> signature

use percent_encoding::percent_decode_str;
use sha2::{Digest, Sha256};

use crate::upstream::Seen;

/// What a good signature says.
#[derive(Debug, PartialEq)]
pub struct Proof {
    pub key_id: String,
    pub region: String,
    pub service: String,
    /// Names of the headers that it covers.
    pub covers: Vec<String>,
    /// As in `x-amz-date`.
    pub time: String,
}

/// Checks the signature of a request that came.
///
/// # Errors
/// What AWS would refuse it for.
pub fn check(seen: &Seen, secret: &str) -> Result<Proof, String> {
    let header = |name: &str| seen.header(name).ok_or_else(|| format!("there is no {name}"));
    let written = header("authorization")?;
    let written = written.strip_prefix("AWS4-HMAC-SHA256 ").ok_or_else(|| format!("{written} is no signature"))?;
    let part = |name: &str| {
        let found = written.split(',').find_map(|part| part.trim().strip_prefix(name)?.strip_prefix('='));
        found.ok_or_else(|| format!("{name} is missing in {written}"))
    };
    let (credential, covers, signature) = (part("Credential")?, part("SignedHeaders")?, part("Signature")?);
    let [key_id, date, region, service, "aws4_request"] = *credential.split('/').collect::<Vec<_>>() else {
        return Err(format!("{credential} is no credential"));
    };
    let time = header("x-amz-date")?;
    if !time.starts_with(date) {
        return Err(format!("{time} is not on {date}"));
    }
    let names: Vec<&str> = covers.split(';').collect();
    if !names.is_sorted() || !names.contains(&"host") {
        return Err(format!("{covers} must be sorted and have the host"));
    }
    let bare = seen.headers.iter().map(|(name, _)| name.to_ascii_lowercase());
    if let Some(name) = bare.filter(|name| name.starts_with("x-amz-")).find(|name| !names.contains(&name.as_str())) {
        return Err(format!("{name} is not covered"));
    }
    let lines = names.iter().map(|name| format!("{name}:{}\n", values(seen, name))).collect::<String>();
    let payload = seen.header("x-amz-content-sha256").map_or_else(|| hex(&Sha256::digest(&seen.body)), str::to_owned);
    let (path, query) = (encoded(seen.path.as_bytes(), b"/"), query(seen.query.as_deref().unwrap_or_default()));
    let canonical = format!("{}\n{path}\n{query}\n{lines}\n{covers}\n{payload}", seen.method);
    let text = format!(
        "AWS4-HMAC-SHA256\n{time}\n{date}/{region}/{service}/aws4_request\n{}",
        hex(&Sha256::digest(&canonical))
    );
    let first = format!("AWS4{secret}").into_bytes();
    let steps = [date, region, service, "aws4_request", &text];
    let expected = steps.iter().fold(first, |key, step| hmac(&key, step.as_bytes()).to_vec());
    if hex(&expected) != signature {
        return Err(format!("{signature} is not the signature of\n{canonical}"));
    }
    let covers = names.into_iter().map(str::to_owned).collect();
    Ok(Proof { key_id: key_id.into(), region: region.into(), service: service.into(), covers, time: time.into() })
}

/// All values under a name, spaces in a row as one.
fn values(seen: &Seen, name: &str) -> String {
    let values = seen.headers.iter().filter(|(have, _)| have.eq_ignore_ascii_case(name));
    let values = values.map(|(_, value)| value.split_ascii_whitespace().collect::<Vec<_>>().join(" "));
    values.collect::<Vec<_>>().join(",")
}

/// Sorted, each part encoded in the one way.
fn query(query: &str) -> String {
    let same = |text: &str| encoded(&Vec::from_iter(percent_decode_str(text)), b"");
    let pairs = query.split('&').filter(|pair| !pair.is_empty()).map(|pair| pair.split_once('=').unwrap_or((pair, "")));
    let mut pairs: Vec<_> = pairs.map(|(name, value)| (same(name), same(value))).collect();
    pairs.sort();
    pairs.iter().map(|(name, value)| format!("{name}={value}")).collect::<Vec<_>>().join("&")
}

/// Everything but letters, digits, `-._~` and what is kept as `%XX`: in paths, which come encoded, for the second time.
fn encoded(text: &[u8], kept: &[u8]) -> String {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) || kept.contains(&byte);
    let one = |byte: &u8| if plain(*byte) { char::from(*byte).to_string() } else { format!("%{byte:02X}") };
    text.iter().map(one).collect()
}

/// HMAC with SHA-256, as RFC 2104 has it.
fn hmac(key: &[u8], text: &[u8]) -> [u8; 32] {
    let mut block = [0; 64];
    match key.len() {
        ..=64 => block[..key.len()].copy_from_slice(key),
        _ => block[..32].copy_from_slice(&Sha256::digest(key)),
    }
    let inner = Sha256::new_with_prefix(block.map(|byte| byte ^ 0x36)).chain_update(text).finalize();
    Sha256::new_with_prefix(block.map(|byte| byte ^ 0x5c)).chain_update(inner).finalize().into()
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The example of AWS's manual, and the same with anything of it changed.
#[test]
fn a_published_signature_is_good_and_a_bent_request_is_not() {
    let headers = [
        ("Host", "iam.amazonaws.com"),
        ("Content-Type", "application/x-www-form-urlencoded; charset=utf-8"),
        ("X-Amz-Date", "20150830T123600Z"),
        (
            "Authorization",
            "AWS4-HMAC-SHA256 Credential=AKIDEXAMPLE/20150830/us-east-1/iam/aws4_request, \
             SignedHeaders=content-type;host;x-amz-date, \
             Signature=5d672d79c15b13162d9279b0855cfba6789a8edb4c82c400e06b5924a6f2b5d7",
        ),
    ];
    let good = Seen {
        id: 0,
        method: "GET".into(),
        path: "/".into(),
        query: Some("Action=ListUsers&Version=2010-05-08".into()),
        headers: headers.map(|(name, value)| (name.to_owned(), value.to_owned())).into(),
        body: bytes::Bytes::new(),
        at: std::time::Instant::now(),
        connection: 1,
        answered: None,
        closed_early: None,
    };
    let secret = "wJalrXUtnFEMI/K7MDENG+bPxRfiCYEXAMPLEKEY";
    let proof = check(&good, secret).unwrap();
    assert_eq!(
        (proof.key_id.as_str(), proof.region.as_str(), proof.service.as_str()),
        ("AKIDEXAMPLE", "us-east-1", "iam")
    );
    let bent: [fn(&mut Seen); 6] = [
        |seen| seen.path = "/x".into(),
        |seen| seen.query = None,
        |seen| seen.body = "x".into(),
        |seen| seen.headers[0].1 = "other.amazonaws.com".into(),
        |seen| seen.headers[2].1 = "20150830T123601Z".into(),
        |seen| seen.headers.push(("x-amz-security-token".into(), "t".into())),
    ];
    for (at, bend) in bent.iter().enumerate() {
        let mut seen = good.clone();
        bend(&mut seen);
        assert!(check(&seen, secret).is_err(), "{at}");
    }
    assert!(check(&good, "another").is_err());
}
