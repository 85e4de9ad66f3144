//! Who may call, and how a refusal looks on each surface.

use serde_json::json;

use crate::harness::{Answer, CLASSIC, Daemon, token};

const ACCOUNT: &str = "0123456789abcdef0123456789abcdef";

fn closed() -> Daemon {
    Daemon::start(|config| {
        config.auth.anonymous = None;
        config.auth.tokens = vec![token("ada", "secret-a", ACCOUNT)];
    })
}

#[tokio::test]
async fn a_caller_without_a_good_token_is_refused_in_the_shape_of_the_surface() {
    let daemon = closed();
    for authorization in [None, Some("Bearer wrong"), Some("Basic secret-a"), Some("Bearer ")] {
        let ask = |path: &str| {
            let mut request = reqwest::Client::new().post(daemon.url(path)).json(&json!({ "model": CLASSIC }));
            if let Some(value) = authorization {
                request = request.header("authorization", value);
            }
            Answer::of(request)
        };
        let answer = ask("/v1/chat/completions").await;
        assert_eq!(answer.status, 401);
        assert_eq!(answer.json()["error"]["code"], "invalid_api_key");
        assert!(answer.json().get("errors").is_none());

        let answer = ask(&format!("/client/v4/accounts/{ACCOUNT}/ai/run/{CLASSIC}")).await;
        assert_eq!(answer.status, 401);
        let refused = json!({"result": {}, "success": false, "errors": [{"code": 10000, "message": "Authentication error"}], "messages": []});
        assert_eq!(answer.json(), refused);

        let answer = ask(&format!("/client/v4/accounts/{ACCOUNT}/ai/v1/chat/completions")).await;
        assert_eq!((answer.status, &answer.json()["errors"]), (401, &refused["errors"]));
        assert_eq!(answer.json()["error"]["code"], "invalid_api_key");
    }
    assert_eq!(daemon.metric("neurond_auth_failures_total"), 12.0);
}

#[tokio::test]
async fn a_good_token_opens_its_own_account_only() {
    let daemon = closed();
    let ask = |path: String, header: (&'static str, &'static str)| {
        Answer::of(reqwest::Client::new().get(daemon.url(&path)).header(header.0, header.1))
    };
    let bearer = ("authorization", "Bearer secret-a");
    assert_eq!(ask("/v1/models".into(), bearer).await.status, 200);
    assert_eq!(ask("/v1/models".into(), ("x-api-key", "secret-a")).await.status, 200);
    assert_eq!(ask(format!("/client/v4/accounts/{ACCOUNT}/ai/models/search"), bearer).await.status, 200);
    assert_eq!(
        ask(format!("/client/v4/accounts/{ACCOUNT}/ai/models/search"), ("x-api-key", "secret-a")).await.status,
        401
    );
    assert_eq!(ask("/client/v4/accounts/somebody-else/ai/models/search".into(), bearer).await.status, 401);
}

#[tokio::test]
async fn probes_and_figures_need_no_token() {
    let daemon = closed();
    for path in ["/health/live", "/health/ready", "/metrics"] {
        assert_eq!(daemon.get(path).await.status, 200, "{path}");
    }
}

#[tokio::test]
async fn replaced_tokens_count_from_the_next_request_on() {
    let daemon = closed();
    daemon
        .services
        .vault
        .replace(neurond::config::Auth { anonymous: None, tokens: vec![token("new", "secret-n", ACCOUNT)] });
    let ask = |secret: &str| Answer::of(reqwest::Client::new().get(daemon.url("/v1/models")).bearer_auth(secret));
    assert_eq!((ask("secret-a").await.status, ask("secret-n").await.status), (401, 200));
}
