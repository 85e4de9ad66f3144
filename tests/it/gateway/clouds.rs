//! Providers whose credentials are made for each call: AWS's signatures, Google's access tokens; and Azure's key.
//!
//! Calls go to the clouds' own addresses (`world.rs`), so that what is checked is what they would check.

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use base64::prelude::BASE64_STANDARD;
use reqwest::Method;
use ring::signature::{KeyPair, RSA_PKCS1_2048_8192_SHA256, RsaKeyPair, UnparsedPublicKey};
use serde_json::{Value, json};

use super::world::{TRUSTED, World};
use super::{Rig, aws};
use crate::harness::Answer;
use crate::upstream::Seen;

const AWS_SECRET: &str = "wJalrXUtnFEMI/K7MDENG+bPxRfiCYEXAMPLEKEY";
const CLAUDE: &str = "bedrock-runtime/us-east-1/model/anthropic.claude-x-v1%3A0";
/// The model in the path of Bedrock's own calls, and Bedrock's host.
const RUNTIME: &str = "bedrock-runtime.us-east-1.amazonaws.com";

fn aws_key(id: &str, more: Value) -> String {
    let mut key = json!({ "accessKeyId": id, "secretAccessKey": AWS_SECRET, "region": "us-east-1" });
    key.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    key.to_string()
}

fn converse() -> Value {
    json!({ "messages": [{ "role": "user", "content": [{ "text": "one two" }] }] })
}

/// The signature of a request that must have a good one, made just now.
#[track_caller]
fn signature(seen: &Seen) -> aws::Proof {
    let proof = aws::check(seen, AWS_SECRET).unwrap_or_else(|why| panic!("{why}\n{seen:?}"));
    let time = jiff::fmt::strtime::parse("%Y%m%dT%H%M%SZ", &proof.time).unwrap().to_datetime().unwrap();
    let made = time.to_zoned(jiff::tz::TimeZone::UTC).unwrap().timestamp();
    let age = jiff::Timestamp::now().as_second() - made.as_second();
    assert!((-1..60).contains(&age), "{proof:?}: made {age} s ago");
    proof
}

#[actix_web::test]
async fn bedrock_hears_calls_that_are_signed_for_it_with_the_stored_key() {
    let world = World::with(&[("aws-bedrock", &aws_key("AKIDFILE", json!({})))], "");
    let arn = "bedrock-runtime/eu-central-1/model/arn%3Aaws%3Abedrock%3Aeu-central-1%3A123%3Ainference-profile%2Feu.x";
    for (method, path, host, region, service) in [
        ("POST", format!("{CLAUDE}/converse"), RUNTIME, "us-east-1", "bedrock"),
        ("POST", format!("{CLAUDE}/invoke"), RUNTIME, "us-east-1", "bedrock"),
        ("POST", format!("{CLAUDE}/converse-stream"), RUNTIME, "us-east-1", "bedrock"),
        ("POST", format!("{CLAUDE}/invoke-with-response-stream"), RUNTIME, "us-east-1", "bedrock"),
        ("POST", "bedrock-runtime/us-east-1/model/a.b-v1:0/converse".into(), RUNTIME, "us-east-1", "bedrock"),
        // The region of the path counts, not that of the key.
        ("POST", format!("{arn}/converse"), "bedrock-runtime.eu-central-1.amazonaws.com", "eu-central-1", "bedrock"),
        (
            "GET",
            "bedrock-runtime/us-east-1/async-invoke?statusEquals=Done&b=2&a=x%2Fy%2Bz%3D&c".into(),
            RUNTIME,
            "us-east-1",
            "bedrock",
        ),
        (
            "POST",
            "bedrock-mantle/us-east-1/anthropic/v1/messages".into(),
            "bedrock-mantle.us-east-1.api.aws",
            "us-east-1",
            "bedrock-mantle",
        ),
    ] {
        let request = world.request(method.parse().unwrap(), &format!("aws-bedrock/{path}"), &[TRUSTED]);
        let request = if method == "POST" { request.json(&converse()) } else { request };
        let answer = request.send().await.unwrap();
        let seen = world.heard_one();
        assert!(answer.status() == 200 || method == "GET", "{path}: {answer:?}");
        let proof = signature(&seen);
        assert_eq!((proof.region.as_str(), proof.service.as_str()), (region, service), "{path}");
        assert_eq!((proof.key_id.as_str(), seen.header("host")), ("AKIDFILE", Some(host)), "{path}");
        assert!(world.tunnel.asked().contains(&format!("{host}:443")), "{path}: {:?}", world.tunnel.asked());
        let (_, rest) = path.split_once('/').unwrap().1.split_once('/').unwrap();
        let query = seen.query.as_ref().map(|query| format!("?{query}")).unwrap_or_default();
        assert_eq!(format!("{}{query}", seen.path), format!("/{rest}"), "{path}");
        let body = if method == "POST" { converse().to_string() } else { String::new() };
        assert_eq!(seen.body, body, "{path}");
        assert!(!seen.headers.iter().any(|(name, _)| name.to_ascii_lowercase().starts_with("cf-")), "{seen:?}");
    }
}

#[actix_web::test]
async fn a_signature_is_for_the_address_that_an_operator_put_in_bedrocks_place() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("aws.json");
    std::fs::write(&file, aws_key("AKIDOWN", json!({}))).unwrap();
    let rig = Rig::with(&format!(
        "[[provider]]\nslug = \"bedrock\"\naccount = \"acme\"\nbase_url = \"{{upstream}}/in/front\"\nallow_private = true\n\
         key = {{ file = \"{}\" }}\n",
        file.display()
    ));
    let answer = Answer::of(rig.post(&format!("bedrock/{CLAUDE}/converse"), &[TRUSTED], &converse())).await;
    assert_eq!(answer.status, 200, "{answer:?}");
    let seen = rig.upstream.requests().pop().unwrap();
    assert_eq!(seen.path, "/in/front/model/anthropic.claude-x-v1%3A0/converse");
    assert_eq!(seen.header("host"), Some(rig.upstream.address.to_string().as_str()));
    assert_eq!(signature(&seen).key_id, "AKIDOWN");
}

#[actix_web::test]
async fn the_key_that_signs_is_the_one_that_was_stored_under_the_alias() {
    let world = World::with(&[], "");
    let temporary = json!({ "sessionToken": "FwoGZXIvYXdzEXAMPLE//==" });
    for (alias, secret) in [
        ("default", aws_key("AKIDAPI", json!({}))),
        ("temporary", aws_key("ASIATEMPORARY", temporary)),
        ("plain", "ABSKplain".to_owned()),
    ] {
        let key = json!({ "alias": alias, "provider_slug": "aws-bedrock", "default_config": alias == "default", "secret": secret });
        let shown = world.tell("gateways/g/provider_configs", key).await;
        assert!(!shown.to_string().contains(AWS_SECRET), "{shown}");
    }
    let path = format!("aws-bedrock/{CLAUDE}/converse");
    let ask = async |more: &[(&str, &str)]| {
        let answer = world.post(&path, &[&[TRUSTED], more].concat(), &converse()).await;
        assert_eq!(answer.status, 200, "{answer:?}");
        world.heard_one()
    };
    let seen = ask(&[]).await;
    assert_eq!((signature(&seen).key_id.as_str(), seen.header("x-amz-security-token")), ("AKIDAPI", None));
    let seen = ask(&[("cf-aig-byok-alias", "temporary")]).await;
    let proof = signature(&seen);
    assert_eq!(seen.header("x-amz-security-token"), Some("FwoGZXIvYXdzEXAMPLE//=="));
    assert!(proof.key_id == "ASIATEMPORARY" && proof.covers.contains(&"x-amz-security-token".into()), "{proof:?}");
    // Keys of Bedrock's own are bearer tokens.
    let seen = ask(&[("cf-aig-byok-alias", "plain")]).await;
    assert_eq!((seen.header("authorization"), seen.header("x-amz-date")), (Some("Bearer ABSKplain"), None));
    // What is left of a signature that somebody took off does not go along unsigned.
    let left = [("x-amz-date", "20150830T123600Z"), ("x-amz-security-token", "old"), ("x-amz-content-sha256", "00")];
    let seen = ask(&left).await;
    assert_eq!((signature(&seen).key_id.as_str(), seen.header("x-amz-security-token")), ("AKIDAPI", None));
}

#[actix_web::test]
async fn each_try_has_a_signature_and_only_who_is_trusted_has_any() {
    let world = World::with(&[("aws-bedrock", &aws_key("AKIDFILE", json!({})))], "");
    world.upstream.script("/model", ["503", "reset", "ok"]);
    let path = format!("aws-bedrock/{CLAUDE}/converse");
    let tries = [TRUSTED, ("cf-aig-max-attempts", "3"), ("cf-aig-retry-delay", "1")];
    let answer = world.post(&path, &tries, &converse()).await;
    assert_eq!(answer.status, 200, "{answer:?}");
    let heard = world.heard();
    assert_eq!(heard.len(), 3, "{heard:?}");
    heard.iter().for_each(|seen| assert_eq!(signature(seen).key_id, "AKIDFILE"));
    world.post(&path, &[], &converse()).await;
    let seen = world.heard_one();
    assert_eq!((seen.header("authorization"), seen.header("x-amz-date")), (None, None));
}

#[actix_web::test]
async fn a_callers_own_signature_passes_with_all_that_it_covers() {
    let world = World::with(&[("aws-bedrock", &aws_key("AKIDFILE", json!({})))], "");
    let covered = [
        ("accept", "application/vnd.amazon.eventstream"),
        ("accept-encoding", "deflate, gzip, br"),
        ("amz-sdk-invocation-id", "1-2-3"),
        ("content-type", "application/json"),
        ("x-amz-content-sha256", "UNSIGNED-PAYLOAD"),
        ("x-amz-date", "20260101T000000Z"),
        ("x-amz-security-token", "theirs"),
    ];
    let names: Vec<&str> = covered.iter().map(|(name, _)| *name).collect();
    let proof = format!(
        "AWS4-HMAC-SHA256 Credential=THEIRS/20260101/us-east-1/bedrock/aws4_request, SignedHeaders={};host, Signature=00ff",
        names.join(";")
    );
    let headers = [&covered[..], &[TRUSTED, ("authorization", &proof)]].concat();
    let body = "{\"messages\" :[], \"x\":1.50e+3}";
    let path = format!("aws-bedrock/{CLAUDE}/converse-stream?b=%20&a=%2f");
    let answer = world.request(Method::POST, &path, &headers).body(body).send().await.unwrap();
    assert_eq!(answer.status(), 200);
    let seen = world.heard_one();
    assert_eq!(
        (seen.path.as_str(), seen.query.as_deref()),
        ("/model/anthropic.claude-x-v1%3A0/converse-stream", Some("b=%20&a=%2f"))
    );
    assert_eq!((seen.body.as_ref(), seen.header("host")), (body.as_bytes(), Some(RUNTIME)));
    for (name, value) in [&covered[..], &[("authorization", proof.as_str())]].concat() {
        assert_eq!(seen.header(name), Some(value), "{name}");
        assert_eq!(seen.headers.iter().filter(|(have, _)| have.eq_ignore_ascii_case(name)).count(), 1, "{name}");
    }
    // The same in a query.
    let presigned = "X-Amz-Algorithm=AWS4-HMAC-SHA256&X-Amz-Credential=T%2F1&X-Amz-Signature=00ff";
    world.post(&format!("aws-bedrock/{CLAUDE}/invoke?{presigned}"), &[TRUSTED], &converse()).await;
    let seen = world.heard_one();
    assert_eq!((seen.query.as_deref(), seen.header("authorization")), (Some(presigned), None));
}

#[actix_web::test]
async fn frames_of_bedrocks_streams_pass_byte_for_byte() {
    let world = World::with(&[("aws-bedrock", &aws_key("AKIDFILE", json!({})))], "");
    let path = format!("aws-bedrock/{CLAUDE}/converse-stream");
    let passed = world.request(Method::POST, &path, &[TRUSTED]).json(&converse()).send().await.unwrap();
    let straight = format!("{}/model/anthropic.claude-x-v1%3A0/converse-stream", world.upstream.url());
    let straight = reqwest::Client::new().post(straight).json(&converse()).send().await.unwrap();
    assert_eq!(passed.headers()["content-type"], straight.headers()["content-type"]);
    let (passed, straight) = (passed.bytes().await.unwrap(), straight.bytes().await.unwrap());
    assert!(straight.len() > 500 && passed == straight, "{} of {} bytes", passed.len(), straight.len());
}

const GEMINI: &str =
    "google-vertex-ai/v1/projects/p1/locations/us-central1/publishers/google/models/gemini-x:generateContent";
/// A key made for these tests and used nowhere else: whoever reads it gains nothing.
const ACCOUNT_KEY: &str = include_str!("account.pem");

/// A service account as Google writes it, with the region that is ours.
fn account() -> Value {
    json!({
        "type": "service_account",
        "project_id": "test-project",
        "private_key_id": "kid1",
        "private_key": ACCOUNT_KEY,
        "client_email": "tester@test-project.iam.gserviceaccount.com",
        "token_uri": "https://oauth2.googleapis.com/token",
        "region": "europe-west4",
    })
}

fn contents() -> Value {
    json!({ "contents": [{ "role": "user", "parts": [{ "text": "one two" }] }] })
}

/// Checks that a request asks for a token as Google wants it, in the name of [`account`].
fn asks_for_a_token(seen: &Seen) {
    assert_eq!((seen.method.as_str(), seen.path.as_str()), ("POST", "/token"), "{seen:?}");
    assert_eq!(seen.header("host"), Some("oauth2.googleapis.com"));
    assert_eq!(seen.header("content-type"), Some("application/x-www-form-urlencoded"));
    let form = std::str::from_utf8(&seen.body).unwrap();
    let token =
        form.strip_prefix("grant_type=urn%3Aietf%3Aparams%3Aoauth%3Agrant-type%3Ajwt-bearer&assertion=").unwrap();
    let (signed, signature) = token.rsplit_once('.').unwrap();
    let pem: String = ACCOUNT_KEY.lines().filter(|line| !line.starts_with("-----")).collect();
    let key = RsaKeyPair::from_pkcs8(&BASE64_STANDARD.decode(pem).unwrap()).unwrap();
    let public = UnparsedPublicKey::new(&RSA_PKCS1_2048_8192_SHA256, key.public_key());
    public.verify(signed.as_bytes(), &URL_SAFE_NO_PAD.decode(signature).unwrap()).unwrap();
    let part = |text: &str| -> Value { serde_json::from_slice(&URL_SAFE_NO_PAD.decode(text).unwrap()).unwrap() };
    let (header, claims) = signed.split_once('.').map(|(header, claims)| (part(header), part(claims))).unwrap();
    assert_eq!((&header["alg"], &header["kid"]), (&json!("RS256"), &json!("kid1")));
    assert_eq!(claims["iss"], account()["client_email"]);
    assert_eq!(claims["aud"], account()["token_uri"]);
    assert_eq!(claims["scope"], "https://www.googleapis.com/auth/cloud-platform");
    let (begin, end) = (claims["iat"].as_i64().unwrap(), claims["exp"].as_i64().unwrap());
    let now = jiff::Timestamp::now().as_second();
    assert!((now - 60..=now).contains(&begin) && end > now && end - begin <= 3600, "{claims}");
}

/// The token that a request carries.
#[track_caller]
fn token(seen: &Seen) -> String {
    let token = seen.header("authorization").and_then(|value| value.strip_prefix("Bearer "));
    token.filter(|token| token.starts_with("ya29.fake")).unwrap_or_else(|| panic!("{seen:?}")).to_owned()
}

#[actix_web::test]
async fn vertex_gets_a_token_for_the_stored_account_until_it_is_nearly_over() {
    for secret in [account().to_string(), BASE64_STANDARD.encode(account().to_string())] {
        let world = World::with(&[("google-vertex-ai", &secret)], "");
        let ask = async || {
            let answer = world.post(GEMINI, &[TRUSTED], &contents()).await;
            assert_eq!(answer.status, 200, "{answer:?}");
            world.heard()
        };
        // With less than five minutes left another is asked for; if there is none, the old one will do.
        world.upstream.script("/token", ["expires=200", "503"]);
        let mut tokens = Vec::new();
        for expected in [2, 2, 2, 1, 1] {
            let heard = ask().await;
            assert_eq!(heard.len(), expected, "{heard:?}");
            if let [asked, _] = &heard[..] {
                asks_for_a_token(asked);
            }
            let call = heard.last().unwrap();
            assert_eq!(call.header("host"), Some("us-central1-aiplatform.googleapis.com"));
            assert_eq!(format!("google-vertex-ai{}", call.path), GEMINI);
            tokens.push(token(call));
        }
        assert!(tokens[0] == tokens[1] && tokens[1] != tokens[2], "{tokens:?}");
        assert!(tokens[2] == tokens[3] && tokens[3] == tokens[4], "{tokens:?}");
    }
}

#[actix_web::test]
async fn a_service_account_that_a_caller_brings_is_exchanged_too_and_a_token_is_not() {
    let world = World::with(&[], "");
    let bearer = format!("Bearer {}", BASE64_STANDARD.encode(account().to_string()));
    let chat =
        json!({ "model": "google-vertex-ai/google/gemini-x", "messages": [{ "role": "user", "content": "one two" }] });
    for (path, body) in [(GEMINI, contents()), ("compat/chat/completions", chat)] {
        for fresh in [true, false] {
            let answer = world.post(path, &[("authorization", &bearer)], &body).await;
            assert_eq!(answer.status, 200, "{path}: {answer:?}");
            let heard = world.heard();
            // One account, one token, whatever it is used for.
            let expected = if fresh && path == GEMINI { 2 } else { 1 };
            assert_eq!(heard.len(), expected, "{path}: {heard:?}");
            token(heard.last().unwrap());
        }
    }
    for header in ["Bearer ya29.theirs", "bearer ya29.theirs"] {
        world.post(GEMINI, &[TRUSTED, ("authorization", header)], &contents()).await;
        assert_eq!(world.heard_one().header("authorization"), Some(header));
    }
}

#[actix_web::test]
async fn vertex_answers_in_openais_words_where_the_account_says() {
    let world = World::with(&[("google-vertex-ai", &account().to_string())], "");
    let body =
        json!({ "model": "google-vertex-ai/google/gemini-x", "messages": [{ "role": "user", "content": "one two" }] });
    let answer = world.post("compat/chat/completions", &[TRUSTED], &body).await;
    assert_eq!(answer.status, 200, "{answer:?}");
    let said = answer.json()["choices"][0]["message"]["content"].clone();
    assert!(said.as_str().unwrap().contains("one two"), "{said}");
    let call = world.heard().pop().unwrap();
    assert_eq!(call.header("host"), Some("europe-west4-aiplatform.googleapis.com"));
    let place = "/v1/projects/test-project/locations/europe-west4/publishers/google/models/gemini-x:generateContent";
    assert_eq!(call.path, place);
}

#[actix_web::test]
async fn an_account_that_gets_no_token_reaches_no_model_and_says_why() {
    let world = World::with(&[("google-vertex-ai", &account().to_string())], "");
    for (fake, status, words) in [("400", 401, "invalid_grant"), ("503", 502, "token endpoint")] {
        world.upstream.script("/token", [fake]);
        let answer = world.post(GEMINI, &[TRUSTED], &contents()).await;
        assert_eq!(answer.status, status, "{answer:?}");
        assert!(answer.text.contains(words) && !answer.text.contains("PRIVATE"), "{answer:?}");
        assert_eq!(world.heard_one().path, "/token");
    }
}

#[actix_web::test]
async fn azure_is_called_at_its_resource_with_the_key_that_was_brought_or_stored() {
    let world = World::with(&[("azure-openai", "stored-key")], "");
    let path = "res-1/gpt-4o/chat/completions?api-version=2024-10-21&x=%2F";
    let body = json!({ "messages": [{ "role": "user", "content": "one two" }] });
    for (slug, headers, key, bearer) in [
        ("azure-openai", vec![("api-key", "theirs")], Some("theirs"), None),
        ("azure", vec![("api-key", "theirs"), TRUSTED], Some("theirs"), None),
        ("azure-openai", vec![TRUSTED], Some("stored-key"), None),
        ("azure-openai", vec![TRUSTED, ("authorization", "Bearer entra")], None, Some("Bearer entra")),
        ("azure-openai", vec![], None, None),
    ] {
        let answer = world.post(&format!("{slug}/{path}"), &headers, &body).await;
        assert_eq!((answer.status, answer.header("cf-aig-model")), (200, "gpt-4o"), "{headers:?}: {answer:?}");
        let seen = world.heard_one();
        assert_eq!(seen.header("host"), Some("res-1.openai.azure.com"));
        assert_eq!(seen.path, "/openai/deployments/gpt-4o/chat/completions");
        assert_eq!(seen.query.as_deref(), Some("api-version=2024-10-21&x=%2F"));
        assert_eq!((seen.header("api-key"), seen.header("authorization")), (key, bearer), "{headers:?}");
        assert_eq!(seen.body, body.to_string());
    }
    // And in OpenAI's words, with the resource in the model's name.
    let mut unified = body.clone();
    unified["model"] = json!("azure-openai/res-1/gpt-4o");
    let answer = world.post("compat/chat/completions", &[TRUSTED], &unified).await;
    assert_eq!(answer.status, 200, "{answer:?}");
    let seen = world.heard_one();
    assert_eq!(
        (seen.path.as_str(), seen.header("api-key")),
        ("/openai/deployments/gpt-4o/chat/completions", Some("stored-key"))
    );
    assert!(seen.query.unwrap().starts_with("api-version="));
}
