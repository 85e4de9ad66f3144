//! What calls cost, and what they may: prices, limits, budgets and allocations, through the real surface.

use std::time::Duration;

use neurond::base::Neurons;
use neurond::config::Tariffs;
use neurond::ledger::Row;
use neurond::task::Usage;
use serde_json::{Value, json};

use super::{Rig, question, streamed};
use crate::harness::{Answer, CLASSIC, token};

const TRUSTED: (&str, &str) = ("cf-aig-authorization", "Bearer secret");

/// What the list says that so many tokens of gpt-4o-mini cost.
fn listed(prompt: u64, cached: u64, completion: u64) -> Neurons {
    let usage = Usage {
        prompt_tokens: prompt as u32,
        cached_tokens: cached as u32,
        completion_tokens: completion as u32,
        ..Usage::default()
    };
    Tariffs::load(None).unwrap().charge("openai", "gpt-4o-mini", &usage).unwrap()
}

/// The ledger's one row of a provider, once it has so many requests.
async fn row(rig: &Rig, provider: &str, requests: u64) -> Row {
    for _ in 0..500 {
        let rows = rig.daemon.rows().await;
        let found: Vec<_> = rows.iter().filter(|(who, _)| &*who.provider == provider).collect();
        if let [(who, row)] = found[..]
            && row.requests >= requests
        {
            assert_eq!((row.requests, &*who.gateway, who.account.as_str()), (requests, "g", "acme"));
            return *row;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("no row of {provider} with {requests} requests: {:?}", rig.daemon.rows().await);
}

#[actix_web::test]
async fn whatever_way_an_answer_takes_it_is_written_down_once_at_the_price_of_the_list() {
    let ttl = ("cf-aig-cache-ttl", "3600");
    for (name, headers, body, calls) in [
        ("whole", &[][..], question("one two three"), 1),
        ("a stream", &[][..], streamed("one two three"), 1),
        ("kept", &[ttl][..], question("one two three"), 1),
        ("a stream that is kept", &[ttl][..], streamed("one two three"), 1),
        // The first asks the upstream; the others cost nothing.
        ("asked again", &[ttl][..], question("one two three"), 3),
    ] {
        let rig = Rig::start();
        let mut usage = Value::Null;
        for call in 0..calls {
            let answer = Answer::of(rig.chat(headers, &body)).await;
            assert_eq!(answer.status, 200, "{name}: {answer:?}");
            let hit = if call > 0 { "HIT" } else { "MISS" };
            assert_eq!(answer.header("cf-aig-cache-status"), hit, "{name}");
            if body["stream"] == true {
                let last = super::events(&answer).into_iter().rev().find(|event| event.data.contains("total_tokens"));
                usage = serde_json::from_str::<Value>(&last.unwrap().data).unwrap()["usage"].clone();
            } else {
                usage = answer.json()["usage"].clone();
            }
        }
        rig.is_clean().await;
        let count = |field: &str| usage[field].as_u64().unwrap();
        let row = row(&rig, "openai", 1).await;
        assert_eq!(
            (row.prompt_tokens, row.completion_tokens),
            (count("prompt_tokens"), count("completion_tokens")),
            "{name}"
        );
        assert_eq!(row.cost, listed(row.prompt_tokens, 0, row.completion_tokens), "{name}");
        assert_eq!(row.neurons, Neurons::ZERO, "{name}: the allocation is for this machine's models");
    }
}

#[actix_web::test]
async fn what_others_wait_for_is_paid_for_when_who_asked_first_has_left() {
    let rig = Rig::start();
    let body = streamed("slowly please");
    let headers = [("cf-aig-cache-ttl", "3600"), ("x-fake", "gap=100")];
    let mut first = rig.chat(&headers, &body).send().await.unwrap();
    assert!(first.chunk().await.unwrap().is_some());
    drop(first);
    let row = row(&rig, "openai", 1).await;
    assert!(row.completion_tokens > 0 && row.cost > Neurons::ZERO, "{row:?}");
    rig.is_clean().await;
}

#[actix_web::test]
async fn what_an_upstream_does_not_count_is_estimated_and_what_a_caller_prices_costs_that() {
    let rig = Rig::start();
    let ask = async |headers: &[(&str, &str)], body: &Value| {
        assert_eq!(Answer::of(rig.chat(headers, body)).await.status, 200);
    };
    ask(&[("x-fake", "no-usage")], &question("how much is this")).await;
    let estimated = row(&rig, "openai", 1).await;
    assert!(estimated.cost > Neurons::ZERO && estimated.prompt_tokens > 0, "{estimated:?}");
    ask(&[("cf-aig-custom-cost", r#"{"total_cost":0.25}"#)], &question("and this")).await;
    let both = row(&rig, "openai", 2).await;
    assert_eq!(both.cost.saturating_sub(estimated.cost), Neurons::from_usd(0.25));
    let unknown = json!({ "model": "nobody-prices-me", "messages": [{ "role": "user", "content": "x" }] });
    ask(&[], &unknown).await;
    rig.is_clean().await;
    rig.daemon
        .eventually("a model without a price is counted", |daemon| {
            daemon.metric(r#"neurond_upstream_unpriced_total{provider="openai"}"#) == 1.0
        })
        .await;
}

#[actix_web::test]
async fn a_rule_counts_by_address_as_trusted_proxies_say_it_and_tells_how_it_stands() {
    let rig = Rig::with(
        "[limits]\ntrusted_proxies = [\"127.0.0.0/8\", \"10.0.0.0/8\"]\n\
         [[limit]]\nname = \"each-address\"\nby = [\"ip\"]\nrequests = 2\nwindow_s = 86400\n",
    );
    let ask = async |from: &str| Answer::of(rig.chat(&[("x-forwarded-for", from)], &question("q"))).await;
    let first = ask("1.2.3.4").await;
    assert_eq!((first.status, first.header("ratelimit-limit"), first.header("ratelimit-remaining")), (200, "2", "1"));
    assert!(first.header("ratelimit-reset").parse::<u64>().unwrap() <= 86_400);
    assert_eq!(ask("6.6.6.6, 1.2.3.4, 10.9.9.9").await.status, 200, "the last that is no proxy of ours");
    let refused = ask("1.2.3.4").await;
    assert_eq!((refused.status, refused.json()["error"][0]["code"].clone()), (429, json!(2003)), "{refused:?}");
    let reset: u64 = refused.header("retry-after").parse().unwrap();
    assert!(reset <= 86_400, "{reset}");
    assert_eq!((refused.header("ratelimit-remaining"), refused.header("x-ratelimit-limit")), ("0", "2"));
    if reset > 60 {
        assert_eq!(refused.header("x-should-retry"), "false", "nobody waits until midnight");
    }
    assert_eq!(ask("1.2.3.5").await.status, 200);
    assert_eq!(ask("nonsense").await.status, 200, "whoever cannot be told is where its connection comes from");
    assert_eq!(rig.daemon.metric(r#"neurond_refused_by_limits_total{kind="rate"}"#), 1.0);
    assert_eq!(rig.upstream.requests().len(), 4);
}

#[actix_web::test]
async fn rules_are_exact_with_two_hundred_at_once_and_a_refusal_counts_nowhere() {
    let rig = Rig::made(
        "[[limit]]\nname = \"tight\"\nby = [\"header:x-team\"]\nrequests = 10\nwindow_s = 86400\n\
         [[limit]]\nname = \"wide\"\nrequests = 30\nwindow_s = 86400\ntechnique = \"sliding\"\n",
        false,
        |config| config.server.workers = 4,
    );
    let wave = async |team: &str| {
        let calls = (0..200).map(|_| Answer::of(rig.chat(&[("x-team", team)], &question("q"))));
        let answers = futures_util::future::join_all(calls).await;
        assert!(answers.iter().all(|answer| matches!(answer.status, 200 | 429)));
        answers.iter().filter(|answer| answer.status == 200).count()
    };
    assert_eq!(wave("a").await, 10);
    assert_eq!(wave("b").await, 10);
    assert_eq!(wave("c").await, 10);
    assert_eq!(wave("d").await, 0, "thirty in all: those that were refused did not count");
}

#[actix_web::test]
async fn a_rule_about_a_model_binds_a_fallback_too_and_lets_the_next_one_try() {
    let rig = Rig::with("[[limit]]\nname = \"mini\"\nmodels = [\"gpt-4o-mini\"]\nrequests = 1\nwindow_s = 86400\n");
    let chat = |model: &str, fallback: &'static str| {
        let body = json!({ "model": model, "messages": [{ "role": "user", "content": "x" }] });
        rig.post("compat/chat/completions", &[("cf-aig-fallback", fallback)], &body)
    };
    let first = Answer::of(chat("openai/gpt-4o-mini", "anthropic/claude-sonnet-4-5")).await;
    assert_eq!((first.status, first.header("cf-aig-provider")), (200, "openai"), "{first:?}");
    let second = Answer::of(chat("openai/gpt-4o-mini", "anthropic/claude-sonnet-4-5")).await;
    assert_eq!((second.status, second.header("cf-aig-provider")), (200, "anthropic"), "{second:?}");
    assert!(second.header("cf-aig-attempts").contains("gpt-4o-mini=rate_limited"), "{second:?}");
    let third = Answer::of(chat("groq/unknown", "openai/gpt-4o-mini").header("x-fake", "status=500")).await;
    assert_ne!(third.status, 200, "behind another one it is bound as well: {third:?}");
}

#[actix_web::test]
async fn tokens_count_by_what_was_used_and_a_misestimate_is_made_good() {
    let rig = Rig::with("[[limit]]\nname = \"tokens\"\ntokens = 3000\nwindow_s = 86400\n");
    let ask = async |most: u64| {
        let mut body = question("a few words");
        body["max_tokens"] = json!(most);
        let answer = Answer::of(rig.chat(&[], &body)).await;
        rig.is_clean().await;
        answer
    };
    for _ in 0..5 {
        assert_eq!(ask(2000).await.status, 200, "each may take 2000 and takes a few");
    }
    let refused = ask(3000).await;
    assert_eq!(refused.status, 429, "what can take more than is left is not begun: {refused:?}");
}

#[actix_web::test]
async fn a_token_that_has_spent_its_dollars_is_refused_everywhere_and_others_are_not() {
    let rig = Rig::made("", false, |config| {
        config.auth.tokens[0].budget.cost_per_month = Some(Neurons::from_usd(0.000_000_001));
    });
    let ask = async |token: &str| Answer::of(rig.chat(&[("cf-aig-authorization", token)], &question("q"))).await;
    assert_eq!(ask("secret").await.status, 200, "what is left is something");
    rig.is_clean().await;
    row(&rig, "openai", 1).await;
    let refused = ask("secret").await;
    assert_eq!((refused.status, refused.json()["error"][0]["code"].clone()), (429, json!(2041)), "{refused:?}");
    assert_eq!(refused.header("x-should-retry"), "false");
    assert!(refused.text.contains("budget of ada a month"), "{refused:?}");
    assert_eq!(Answer::of(rig.chat(&[], &question("q"))).await.status, 200, "who shows no token has no budget");
    assert_eq!(rig.upstream.requests().len(), 2);
}

#[actix_web::test]
async fn spend_limits_of_a_gateway_are_kept_for_each_value_and_only_where_they_are_meant() {
    let rules = r#"spend_limits = { enabled = true, rules = [
        { id = "each-user", enabled = true, limit = 0.000000001, limitType = "cost", window = 86400, technique = "fixed",
          metadata = { user = { mode = "partition" }, plan = { mode = "filter", values = ["free"] } } } ] }"#;
    let rules = rules.split_whitespace().collect::<Vec<_>>().join(" ");
    let rig = Rig::with(&format!("[[gateway]]\nid = \"s\"\nauthentication = false\n{rules}\n"));
    let ask = async |metadata: &str| {
        let request = reqwest::Client::new().post(rig.daemon.url("/v1/acme/s/openai/chat/completions"));
        let answer = Answer::of(request.header("cf-aig-metadata", metadata).json(&question("q"))).await;
        rig.is_clean().await;
        tokio::time::sleep(Duration::from_millis(20)).await;
        answer
    };
    let ann = r#"{"user":"ann","plan":"free"}"#;
    assert_eq!(ask(ann).await.status, 200);
    let refused = ask(ann).await;
    assert_eq!(refused.status, 429, "{refused:?}");
    let words = refused.json()["message"].as_str().unwrap().to_owned();
    assert!(
        words.starts_with("Spend limit exceeded: rule 'each-user'") && words.ends_with("for openai gpt-4o-mini"),
        "{words}"
    );
    assert_eq!(ask(r#"{"user":"bob","plan":"free"}"#).await.status, 200, "a budget of its own");
    for _ in 0..2 {
        assert_eq!(ask(r#"{"user":"ann","plan":"paid"}"#).await.status, 200, "the rule is not about this plan");
    }
}

#[actix_web::test]
async fn a_gateways_own_rate_limit_is_kept_and_hits_count_as_requests() {
    let rig = Rig::with(
        "[[gateway]]\nid = \"r\"\nauthentication = false\nrate_limiting_limit = 2\nrate_limiting_interval = 86400\ncache_ttl = 600\n",
    );
    let ask = async || {
        Answer::of(
            reqwest::Client::new().post(rig.daemon.url("/v1/acme/r/openai/chat/completions")).json(&question("q")),
        )
        .await
    };
    let (first, second, third) = (ask().await, ask().await, ask().await);
    assert_eq!((first.status, first.header("ratelimit-remaining")), (200, "1"));
    assert_eq!((second.header("cf-aig-cache-status"), second.header("ratelimit-remaining")), ("HIT", "0"));
    assert_eq!(third.status, 429, "{third:?}");
}

/// A call of a model of this machine, in Cloudflare's own form.
async fn run(rig: &Rig, body: Value) -> Answer {
    let url = rig.daemon.url(&format!("/client/v4/accounts/acme/ai/run/{CLASSIC}"));
    let answer = Answer::of(reqwest::Client::new().post(url).bearer_auth("secret").json(&body)).await;
    // What a call took is counted when its answer has ended.
    for _ in 0..1000 {
        if rig.daemon.services.gateway.ledger.health().open == 0 {
            break;
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    answer
}

#[actix_web::test]
async fn a_free_account_is_served_until_its_neurons_are_used_up_and_told_when_there_are_more() {
    let rig = Rig::with("[plan]\nneurons_per_day = 1.0\nbeyond = \"refuse\"\n");
    let ask = || run(&rig, json!({ "prompt": "x ".repeat(200), "max_tokens": 20 }));
    let mut served = 0;
    let refused = loop {
        let answer = ask().await;
        if answer.status != 200 {
            break answer;
        }
        served += 1;
        assert!(served < 100, "an allocation that never ends");
    };
    assert!(served > 0);
    assert_eq!((refused.status, refused.json()["errors"][0]["code"].clone()), (429, json!(4006)), "{refused:?}");
    assert!(refused.text.contains("you have used up your daily free allocation of 1 neurons"), "{refused:?}");
    assert_eq!(refused.header("x-should-retry"), "false");
    assert!(refused.header("retry-after").parse::<u64>().unwrap() <= 86_400);
    // The same through a gateway, in the gateway's words for the engine's own refusal.
    let body = json!({ "model": format!("workers-ai/{CLASSIC}"), "messages": [{ "role": "user", "content": "x" }] });
    let through = Answer::of(rig.post("compat/chat/completions", &[TRUSTED], &body)).await;
    assert_eq!(through.status, 429, "{through:?}");
    let chat = json!({ "model": CLASSIC, "messages": [{ "role": "user", "content": "x" }] });
    let openai = reqwest::Client::new().post(rig.daemon.url("/v1/chat/completions")).bearer_auth("secret").json(&chat);
    let openai = Answer::of(openai).await;
    assert_eq!((openai.status, openai.json()["error"]["code"].clone()), (429, json!("insufficient_quota")));
    let other = reqwest::Client::new().post(rig.daemon.url("/v1/chat/completions")).bearer_auth("other").json(&chat);
    assert_eq!(Answer::of(other).await.status, 200, "each account has its own");
}

#[actix_web::test]
async fn where_a_plan_cuts_an_answer_ends_where_its_money_does() {
    let rig = Rig::with("[plan]\nneurons_per_day = 0.5\nbeyond = \"refuse\"\nat_the_end = \"cut\"\n");
    // One that would not end by itself.
    let answer = run(&rig, json!({ "prompt": "tell me everything", "max_tokens": 1500, "ignore_eos": true })).await;
    assert_eq!(answer.status, 200, "{answer:?}");
    let tokens = answer.json()["result"]["usage"]["completion_tokens"].as_u64().unwrap();
    assert!(tokens > 0 && tokens < 1500, "{tokens}");
    let rows = rig.daemon.rows().await;
    let spent: f64 = rows.iter().map(|(_, row)| row.neurons.as_f64()).sum();
    assert!(spent <= 0.5 && spent > 0.4, "{spent}");
    let next = run(&rig, json!({ "prompt": "tell me everything", "max_tokens": 1500, "ignore_eos": true })).await;
    assert_eq!((next.status, next.json()["errors"][0]["code"].clone()), (429, json!(4006)), "{next:?}");
}

#[actix_web::test]
async fn the_catalogs_limit_holds_for_tokens_and_says_so() {
    let rig = Rig::made("", false, |config| {
        config.auth.tokens = vec![token("ada", "secret", "acme"), token("bob", "other", "bobs")];
        let rules = neurond::config::Limits {
            catalog: neurond::config::CatalogLimits::Tokens,
            proxies: Vec::new(),
            rules: Vec::new(),
        };
        config.metering.limits = std::sync::Arc::new(rules);
    });
    let chat = json!({ "model": CLASSIC, "max_tokens": 1, "messages": [{ "role": "user", "content": "x" }] });
    let client = reqwest::Client::new();
    let ask = |token: Option<&str>| {
        let request = client.post(rig.daemon.url("/v1/chat/completions")).json(&chat);
        Answer::of(match token {
            Some(token) => request.bearer_auth(token),
            None => request,
        })
    };
    let answers = futures_util::future::join_all((0..700).map(|_| ask(Some("secret")))).await;
    let served = answers.iter().filter(|answer| answer.status == 200).count();
    // A minute may end meanwhile, and another begin.
    assert!((300..=600).contains(&served), "{served}");
    let refused = answers.iter().find(|answer| answer.status == 429);
    let refused = refused.expect("one that is refused");
    assert_eq!(refused.json()["error"]["code"], json!("rate_limit_exceeded"), "{refused:?}");
    assert!(refused.header("retry-after").parse::<u64>().unwrap() <= 60, "{refused:?}");
    assert_eq!(ask(Some("other")).await.status, 200, "by account");
    assert_eq!(ask(None).await.status, 200, "who shows no token is not counted");
}

#[actix_web::test]
async fn calls_of_this_machines_models_are_written_down_once_through_a_gateway_or_not() {
    let rig = Rig::start();
    let body = json!({ "model": format!("workers-ai/{CLASSIC}"), "max_tokens": 5, "messages": [{ "role": "user", "content": "x" }] });
    let answer = Answer::of(rig.post("compat/chat/completions", &[TRUSTED], &body)).await;
    assert_eq!(answer.status, 200, "{answer:?}");
    rig.is_clean().await;
    let row = row(&rig, "workers-ai", 1).await;
    assert!(row.neurons > Neurons::ZERO && row.cost == row.neurons, "{row:?}");
    assert_eq!(row.completion_tokens, answer.json()["usage"]["completion_tokens"].as_u64().unwrap());
}

#[actix_web::test]
async fn several_prompts_of_one_request_count_as_one_request_and_all_their_tokens() {
    let rig = Rig::with(
        "[[limit]]\nname = \"two\"\nrequests = 2\nwindow_s = 86400\n\
         [[limit]]\nname = \"tokens\"\ntokens = 100000\nwindow_s = 86400\n",
    );
    let ask = async || {
        let body = json!({ "model": CLASSIC, "prompt": ["one", "two", "three"], "max_tokens": 4 });
        let request = reqwest::Client::new().post(rig.daemon.url("/v1/completions")).bearer_auth("secret").json(&body);
        Answer::of(request).await
    };
    let mut produced = 0;
    for left in ["1", "0"] {
        let answer = ask().await;
        produced += answer.json()["usage"]["completion_tokens"].as_u64().unwrap();
        assert_eq!((answer.status, answer.json()["choices"].as_array().unwrap().len()), (200, 3), "{answer:?}");
        assert_eq!(answer.header("ratelimit-remaining"), left);
    }
    let refused = ask().await;
    assert_eq!((refused.status, refused.json()["error"]["code"].clone()), (429, json!("rate_limit_exceeded")));
    let rows = rig.daemon.rows().await;
    let (requests, tokens) = rows
        .iter()
        .fold((0, 0), |(requests, tokens), (_, row)| (requests + row.requests, tokens + row.completion_tokens));
    assert_eq!((requests, tokens), (6, produced), "each is billed");
}

#[actix_web::test]
async fn requests_of_a_batch_are_bound_by_the_budget_of_its_token() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().to_owned();
    let rig = Rig::made("", false, move |config| {
        config.batches = Some(path);
        config.auth.tokens[0].budget.neurons_per_month = Some(Neurons::from_micro(1));
    });
    let requests = json!([{ "prompt": "one", "max_tokens": 4 }, { "prompt": "two", "max_tokens": 4 }]);
    let answer = run(&rig, json!({ "requests": [{ "prompt": "first of all", "max_tokens": 4 }] })).await;
    assert_eq!(answer.json()["result"]["responses"][0]["success"], true, "what is left is something: {answer:?}");
    let over = |result: &Value| {
        let responses = result["responses"].as_array().unwrap();
        assert_eq!(responses.len(), 2, "{result}");
        for response in responses {
            assert_eq!(response["success"], false, "{result}");
            assert!(response["error"].to_string().contains("budget of ada a month"), "{result}");
        }
    };
    over(&run(&rig, json!({ "requests": requests })).await.json()["result"]);
    // In line as well.
    let url = rig.daemon.url(&format!("/client/v4/accounts/acme/ai/run/{CLASSIC}?queueRequest=true"));
    let queued = reqwest::Client::new().post(url).bearer_auth("secret").json(&json!({ "requests": requests }));
    let id = Answer::of(queued).await.json()["result"]["request_id"].clone();
    let whole = async {
        loop {
            let answer = run(&rig, json!({ "request_id": id })).await.json();
            if answer["result"].get("responses").is_some() {
                break answer["result"].clone();
            }
        }
    };
    over(&tokio::time::timeout(Duration::from_secs(20), whole).await.unwrap());
}
