//! What may be written and what is made of it, as text in and text out.

use std::io;
use std::path::Path;
use std::time::Duration;

use serde_json::json;

use super::*;
use crate::base::Millis;
use crate::config::machine::Surroundings;

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields, default)]
struct File {
    gateway: Vec<GatewaySection>,
    provider: Vec<ProviderSection>,
    vault: VaultSection,
    registry: RegistrySection,
}

fn told(text: &str) -> Resolved {
    let file: File = toml::from_str(text).unwrap_or_else(|error| panic!("{text}\n{error}"));
    let written =
        Sections { gateway: &file.gateway, provider: &file.provider, vault: &file.vault, registry: &file.registry };
    let variable = |name: &str| match name {
        "OPENAI_API_KEY" => Some("sk-from-the-environment".to_owned()),
        "EMPTY" => Some(" \n".to_owned()),
        "CREDENTIALS_DIRECTORY" => Some("/run/credentials".to_owned()),
        "STATE_DIRECTORY" => Some("/var/lib/neurond:/var/lib/more".to_owned()),
        _ => None,
    };
    let text = |path: &Path| match path.to_str().unwrap() {
        "/run/credentials/bedrock" => Ok("{\n  \"accessKeyId\": \"AK\",\n  \"region\": \"eu-west-1\"\n}\n".to_owned()),
        "/etc/neurond/key" => Ok("sk-from-a-file\n".to_owned()),
        "/etc/neurond/answer.json" => Ok("{\"type\":\"object\"}".to_owned()),
        "/etc/neurond/broken.json" => Ok("{\"type\":".to_owned()),
        _ => Err(io::ErrorKind::NotFound.into()),
    };
    let machine = Surroundings {
        cpus: 1,
        cores: 1,
        memory: 1 << 30,
        now: Millis(0),
        variable: &variable,
        text: &text,
        modified: &|_| Err(io::ErrorKind::NotFound.into()),
    };
    resolve(&written, "/etc/neurond/neurond.toml", Path::new("/etc/neurond"), &machine)
}

fn good(text: &str) -> Resolved {
    let told = told(text);
    assert!(told.problems.is_empty(), "{text}\n{:?}", told.problems);
    told
}

/// Refused with exactly these sentences, each of which begins with the file.
fn refused(text: &str, wanted: &[&str]) {
    let problems = told(text).problems;
    assert_eq!(problems.len(), wanted.len(), "{text}\n{problems:#?}");
    for (problem, wanted) in problems.iter().zip(wanted) {
        assert!(problem.starts_with("/etc/neurond/neurond.toml: "), "{problem}");
        assert!(problem.contains(wanted), "{problem}\nlacks: {wanted}");
        assert!(!problem.contains("sk-"), "{problem}");
    }
}

#[test]
fn a_gateway_that_says_nothing_wants_a_token_logs_and_keeps_nothing() {
    let told = good("[[gateway]]\nid = \"prod\"\n");
    let [gateway] = &told.fixed.gateways[..] else { panic!() };
    assert_eq!((gateway.id.as_str(), &gateway.account), ("prod", &None));
    let Settings { authentication, collect_logs, cache_per_account, cache_ttl, rate_limit, .. } = &gateway.settings;
    assert_eq!((*authentication, *collect_logs, *cache_per_account), (true, true, true));
    assert_eq!((cache_ttl, rate_limit, &gateway.settings.log_limit), (&None, &None, &None));
    assert_eq!(gateway.settings.retry, Retry::default());
    assert_eq!(gateway.settings.timeouts, Timeouts::default());
    assert!(gateway.settings.fallback.is_empty() && gateway.settings.rules.is_empty());
    assert_eq!(told.registry, Some(PathBuf::from("/var/lib/neurond/registry")));
    assert_eq!(told.keys.default, Some(PathBuf::from("/var/lib/neurond/master.key")));
}

#[test]
fn everything_that_is_written_counts() {
    let told = good(
        r#"
        [[gateway]]
        id = "prod"
        account = "acme"
        authentication = false
        cache_ttl = 3600
        cache_invalidate_on_update = true
        cache_per_account = false
        collect_logs = false
        log_management = 10000
        log_management_strategy = "STOP_INSERTING"
        rate_limiting_limit = 100
        rate_limiting_interval = 60
        rate_limiting_technique = "sliding"
        retry_max_attempts = 3
        retry_delay = 0
        retry_backoff = "linear"
        request_timeout_ms = 1
        first_byte_timeout_ms = 2
        idle_timeout_ms = 86400000
        fallback = ["xai/grok-4", "@cf/meta/llama-3.1-8b-instruct", "custom-mine/a/b"]
        spend_limits = { rules = [{ id = "day", limit = 10, limitType = "cost", window = 86400, metadata = { team = { mode = "partition" } }, model = { mode = "filter", values = ["gpt-4.1"] } }, { limit = 1.5, limitType = "cost", window = 60, enabled = false }] }
        guardrails = { prompt = { P1 = "BLOCK", S10 = "FLAG" } }
        dlp = { enabled = true, policies = [{ id = "p", enabled = true, action = "FLAG", check = ["RESPONSE"], profiles = ["x"] }] }
        rules = [{ name = "card", pattern = '\d{16}' }, { name = "word", pattern = "x", on = "response", action = "flag" }]
        schemas = { request = { type = "object" }, response = "answer.json" }
        otel = [{ url = "https://otel.example/v1/traces", headers = { x-team = "a" }, authorization = { env = "OPENAI_API_KEY" }, content_type = "protobuf" }, { url = "http://10.0.0.7:4318/v1/traces", allow_private = true }]
        logpush = true
        logpush_public_key = "-----BEGIN PUBLIC KEY-----"
        zdr = true
        "#,
    );
    let gateway = &told.fixed.gateways[0];
    assert_eq!(gateway.account, Some(AccountId::new("acme")));
    let s = &gateway.settings;
    assert_eq!((s.authentication, s.collect_logs, s.cache_per_account), (false, false, false));
    assert_eq!(s.cache_ttl, Some(Duration::from_secs(3600)));
    assert_eq!(s.log_limit, Some(LogLimit { records: 10_000, delete_oldest: false }));
    let interval = Duration::from_secs(60);
    assert_eq!(s.rate_limit, Some(RateLimit { limit: 100, interval, technique: Technique::Sliding }));
    let (max_attempts, delay, backoff) = (Some(3), Some(Duration::ZERO), Some(Backoff::Linear));
    assert_eq!(s.retry, Retry { max_attempts, delay, backoff });
    assert_eq!(s.timeouts.idle, Some(Duration::from_secs(86_400)));
    let targets: Vec<_> = s.fallback.iter().map(|target| format!("{} {}", target.provider, target.model)).collect();
    assert_eq!(targets, ["grok grok-4", "workers-ai @cf/meta/llama-3.1-8b-instruct", "custom-mine a/b"]);
    let [rule] = &s.spend_limits[..] else { panic!("one is switched off: {:?}", s.spend_limits) };
    assert_eq!((rule.id.as_str(), rule.limit_usd, rule.window), ("day", 10.0, Duration::from_secs(86_400)));
    assert_eq!(rule.metadata["team"], Scope::Partition);
    assert_eq!(rule.model, Some(Scope::Filter(vec!["gpt-4.1".into()])));
    assert_eq!(s.guardrails.prompt.iter().collect::<Vec<_>>(), [(&"P1", &Action::Block), (&"S10", &Action::Flag)]);
    let (request, response) = (false, true);
    assert_eq!(s.dlp[0].sides, Sides { request, response });
    assert_eq!((s.rules[0].sides, s.rules[0].action), (Sides { request: true, response }, Action::Block));
    assert_eq!((s.rules[1].sides, s.rules[1].action), (Sides { request, response }, Action::Flag));
    assert_eq!(s.schemas.response, Some(json!({ "type": "object" })));
    assert_eq!(s.otel[0].authorization.as_ref().unwrap().expose(), "sk-from-the-environment");
    assert_eq!(s.otel.iter().map(|otel| otel.allow_private).collect::<Vec<_>>(), [false, true]);
    assert_eq!(
        gateway.fields["otel"][1],
        json!({ "url": "http://10.0.0.7:4318/v1/traces", "headers": {} }),
        "the file's alone"
    );
    assert!(s.otel[0].protobuf && s.logpush && s.zero_data_retention);
    // What is shown is in the names of the wire, and no secret is.
    assert_eq!(gateway.fields["otel"][0]["authorization"], MASK);
    assert_eq!(gateway.fields["cache_ttl"], 3600);
    assert_eq!(gateway.fields["schemas"]["response"]["type"], "object");
    assert!(!gateway.fields.contains_key("id"));
    assert!(!format!("{gateway:?}").contains("sk-from"), "{gateway:?}");
}

#[test]
fn mistakes_in_gateways_are_all_told_with_what_to_do() {
    let with = |line: &str, wanted: &str| refused(&format!("[[gateway]]\nid = \"prod\"\n{line}\n"), &[wanted]);
    for (line, wanted) in [
        (
            "cache_ttl = 2678401",
            "gateway[0] (prod).cache_ttl = 2678401: is not from 0 to 2678400 (seconds, 0 for no cache)",
        ),
        ("log_management = 9999", "log_management = 9999: is not from 10000 to 10000000"),
        ("log_management_strategy = \"KEEP\"", "\"STOP_INSERTING\" or \"DELETE_OLDEST\""),
        ("rate_limiting_technique = \"leaky\"", "\"leaky\": is not \"fixed\" or \"sliding\""),
        ("retry_max_attempts = 0", "is not from 1 to 5"),
        ("retry_delay = 5001", "is not from 0 to 5000 (milliseconds)"),
        ("retry_backoff = \"square\"", "\"constant\" or \"linear\" or \"exponential\""),
        ("request_timeout_ms = 0", "is not from 1 to 86400000"),
        ("fallback = [\"gpt-4.1\"]", "fallback[0] = \"gpt-4.1\": is no target"),
        ("fallback = [\"dynamic/mine\"]", "is no target"),
        ("guardrails = { prompt = { S14 = \"BLOCK\" } }", "guardrails.prompt.S14"),
        (
            "guardrails = { prompt = { S1 = \"ignore\" } }",
            "guardrails.prompt.S1 = \"ignore\": is not \"FLAG\" or \"BLOCK\"",
        ),
        ("guardrails = { promt = {} }", "guardrails.promt"),
        ("dlp = { profiles = [\"x\"] }", "dlp.action = null: is missing"),
        ("spend_limits = { rules = [{ limitType = \"cost\", window = 1 }] }", "spend_limits.rules[0].limit = null"),
        ("spend_limits = { rules = [{ limit = 1, window = 1 }] }", "rules[0].limitType = null: is missing"),
        ("spend_limits = { rules = [{ limit = 1, limitType = \"cost\" }] }", "rules[0].window = null: is missing"),
        (
            "spend_limits = { rules = [{ limit = 1, limitType = \"cost\", window = 1, model = { mode = \"filter\" } }] }",
            "rules[0].model.values",
        ),
        (
            "rules = [{ name = \"a\", pattern = \"x\" }, { name = \"a\", pattern = \"y\" }]",
            "rules[1].name = \"a\": is there twice",
        ),
        ("rules = [{ name = \"a\", pattern = \"x\", on = \"input\" }]", "rules[0].on"),
        (
            "schemas = { request = \"none.json\" }",
            "gateway[0] (prod).schemas.request = /etc/neurond/none.json: cannot be read",
        ),
        ("schemas = { request = \"broken.json\" }", "is not JSON"),
        ("otel = [{ url = \"ftp://x\" }]", "otel[0].url = \"ftp://x\": is no address without"),
        (
            "otel = [{ url = \"https://x/\", authorization = { env = \"UNSET\" } }]",
            "otel[0].authorization.env = \"UNSET\"",
        ),
        ("otel = [{ url = \"https://x/\", headers = { \"a b\" = \"c\" } }]", "otel[0].headers.a b"),
        ("logpush_public_key = \"short\"", "is not a text of 16 to 1024 characters"),
        ("account = \"a/b\"", "gateway[0] (prod).account = \"a/b\": is not an account"),
    ] {
        with(line, wanted);
    }
    refused("[[gateway]]\nid = \"a b\"\n", &["gateway[0].id = \"a b\": is not a name"]);
    refused("[[gateway]]\nid = \"a\"\n[[gateway]]\nid = \"a\"\n", &["gateway[1].id = \"a\": is written twice"]);
    good("[[gateway]]\nid = \"a\"\n[[gateway]]\nid = \"a\"\naccount = \"x\"\n");
    refused(
        "[[gateway]]\nid = \"a\"\ncache_ttl = 99999999\nretry_delay = 9999\n[[provider]]\nslug = \"opnai\"\n",
        &["retry_delay", "cache_ttl", "provider[0].slug = \"opnai\": is no provider; write one of adobe-firefly, "],
    );
    let unknown = toml::from_str::<File>("[[gateway]]\nid = \"a\"\ncache_tll = 1\n").err().unwrap().to_string();
    assert!(unknown.contains("cache_tll"), "{unknown}");
}

#[test]
fn a_limit_without_an_interval_is_warned_about() {
    let told = good("[[gateway]]\nid = \"prod\"\nrate_limiting_limit = 5\n");
    assert_eq!(told.fixed.gateways[0].settings.rate_limit, None);
    assert!(told.warnings[0].contains("rate_limiting_interval"), "{:?}", told.warnings);
}

#[test]
fn providers_get_their_address_their_key_and_their_one_name() {
    let told = good(
        r#"
        [[provider]]
        slug = "bedrock"
        key = { file = "$CREDENTIALS_DIRECTORY/bedrock" }
        [[provider]]
        slug = "openai"
        account = "acme"
        base_url = "https://proxy.example/openai/"
        key = { env = "OPENAI_API_KEY" }
        first_byte_timeout_ms = 500
        [[provider]]
        slug = "custom-vllm"
        base_url = "http://10.0.0.7:8000/v1"
        allow_private = true
        key = { file = "key" }
        [[provider]]
        slug = "google-vertex-ai"
        base_url = "https://{region}.vertex.example"
        "#,
    );
    let shown: Vec<_> = told
        .fixed
        .providers
        .iter()
        .map(|provider| {
            let key = provider.key.as_ref().map_or("-", |key| key.expose());
            let base = provider.base_url.as_deref().unwrap_or("-");
            format!("{} {base} {} {key}", provider.slug, provider.allow_private)
        })
        .collect();
    assert_eq!(
        shown,
        [
            "aws-bedrock - false {\"accessKeyId\":\"AK\",\"region\":\"eu-west-1\"}",
            "openai https://proxy.example/openai false sk-from-the-environment",
            "custom-vllm http://10.0.0.7:8000/v1 true sk-from-a-file",
            "google-vertex-ai https://{region}.vertex.example false -",
        ]
    );
    assert_eq!(told.fixed.providers[1].timeouts.first_byte, Some(Duration::from_millis(500)));
    let shown = format!("{:?}", told.fixed);
    assert!(!shown.contains("sk-from") && !shown.contains("accessKeyId"), "{shown}");
}

#[test]
fn mistakes_in_providers_are_told_with_what_to_do() {
    let custom = |line: &str, wanted: &str| {
        refused(&format!("[[provider]]\nslug = \"custom-x\"\n{line}\n"), &[wanted]);
    };
    custom("", "provider[0] (custom-x).base_url: is missing");
    custom("base_url = \"http://x.example\"", "allow_private = true");
    custom("base_url = \"x.example\"", "base_url = (9 characters): is not an address");
    custom("base_url = \"https://sk-user:sk-word@x.example\"", "without credentials");
    custom("base_url = \"https://x.example\"\nkey = {}", "provider[0] (custom-x).key: must have either env or file");
    custom("base_url = \"https://x.example\"\nkey = { env = \"EMPTY\" }", "key = EMPTY: holds no secret");
    custom("base_url = \"https://x.example\"\nkey = { file = \"none\" }", "cannot be read");
    custom("base_url = \"https://x.example\"\nidle_timeout_ms = 0", "is out of range");
    refused("[[provider]]\nslug = \"custom-\"\nbase_url = \"https://x\"\n", &["is no provider"]);
    refused(
        "[[provider]]\nslug = \"xai\"\n[[provider]]\nslug = \"grok\"\n",
        &["provider[1].slug = \"grok\": is written twice"],
    );
}

#[test]
fn key_files_may_be_what_systemd_hands_over() {
    let told = good(
        "[vault]\nmaster_key_file = \"$CREDENTIALS_DIRECTORY/master\"\nprevious_key_files = [\"old.key\"]\n\
         [registry]\nfolder = \"reg\"\n",
    );
    assert_eq!(told.keys.named, Some(PathBuf::from("/run/credentials/master")));
    assert_eq!(told.keys.previous, [PathBuf::from("/etc/neurond/old.key")]);
    assert_eq!(told.registry, Some(PathBuf::from("/etc/neurond/reg")));
}

#[test]
fn every_field_that_may_be_written_is_one_that_is_read() {
    let settings = GatewaySection {
        id: "x".into(),
        account: None,
        authentication: Some(true),
        cache_ttl: Some(60),
        cache_invalidate_on_update: Some(true),
        cache_per_account: Some(true),
        collect_logs: Some(true),
        log_management: Some(10_000),
        log_management_strategy: Some("DELETE_OLDEST".into()),
        log_classification: Some(false),
        rate_limiting_limit: Some(1),
        rate_limiting_interval: Some(1),
        rate_limiting_technique: Some("fixed".into()),
        retry_max_attempts: Some(1),
        retry_delay: Some(1),
        retry_backoff: Some("constant".into()),
        request_timeout_ms: Some(1),
        first_byte_timeout_ms: Some(1),
        idle_timeout_ms: Some(1),
        fallback: Some(vec![]),
        spend_limits: Some(toml::Value::Table(Default::default())),
        guardrails: Some(toml::Value::Table(Default::default())),
        dlp: None,
        rules: Some(vec![]),
        schemas: Some(GatewaySchemas { request: None, response: None }),
        otel: Some(vec![]),
        logpush: Some(true),
        logpush_public_key: Some("-----BEGIN PUBLIC KEY-----".into()),
        zdr: Some(true),
    };
    let Value::Object(written) = serde_json::to_value(&settings).unwrap() else { panic!() };
    for key in written.keys().filter(|key| *key != "id") {
        assert!(FIELDS.contains(&key.as_str()), "{key}");
    }
}
