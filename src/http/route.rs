//! Method and path to endpoint. Pure, and on the raw path: a framework's router decodes before it matches, which breaks
//! model ids with encoded slashes (`/ai/run/@cf%2Fmeta%2Fllama`); here segments are split first and decoded once.

use actix_web::http::Method;
use percent_encoding::percent_decode_str;
use smallvec::SmallVec;

use crate::base::{Error, Kind, Result};

/// Which listener a request came in through.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Listener {
    /// The API: every surface with credentials.
    Api,
    /// Worker code calling `env.AI`: no credentials, one configured account.
    Binding,
}

/// Whose shapes an answer has, success or error.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Surface {
    /// `/v1`: OpenAI's shapes.
    OpenAi,
    /// `/client/v4/accounts/{account}/ai/v1`: OpenAI's success, Cloudflare's envelope with OpenAI's `error` on failure.
    CloudflareV1,
    /// `/client/v4/accounts/{account}/ai`: Cloudflare's envelope.
    Native,
    /// The AI binding: bare results.
    Binding,
    /// `/v1/{account}/{gateway}`: what the upstream answers; our own refusals as `AiGatewayError`.
    Gateway,
    /// `/client/v4/accounts/{account}/ai-gateway`: Cloudflare's envelope with the management API's codes.
    Management,
    /// Anthropic's Messages, wherever they are served: Anthropic's shapes.
    Messages,
}

/// What is asked for.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum Endpoint {
    Live,
    Ready,
    Metrics,
    ChatCompletions,
    Completions,
    Responses,
    Embeddings,
    Rerank,
    Models,
    Model(String),
    /// A model in the path, native.
    Run(String),
    /// A model in the body, native.
    RunUnified,
    ModelSearch,
    ModelSchema,
    TaskSearch,
    AuthorSearch,
    /// An account's own adapters.
    Finetunes,
    /// Those that every account may use.
    PublicFinetunes,
    CreateFinetune,
    /// By id or name.
    DeleteFinetune(String),
    /// A file of an adapter, by the adapter's id or name.
    FinetuneAssets(String),
    /// A model in a header, bare.
    BindingRun,
    /// Anthropic's Messages, onto whatever model is named.
    Messages,
    /// A native call of a provider, through a gateway.
    Provider {
        gateway: String,
        /// As in the path, decoded.
        slug: String,
        /// What follows the provider in the path, as sent.
        rest: String,
    },
    /// A list of steps, through a gateway.
    Universal {
        gateway: String,
    },
    /// A chat in OpenAI's words with any provider's model, through a gateway.
    CompatChat {
        gateway: String,
    },
    CompatEmbeddings {
        gateway: String,
    },
    CompatModels {
        gateway: String,
    },
    /// A model and its native input in the body, through a gateway.
    GatewayRun {
        gateway: String,
    },
    /// Gateways, stored keys, custom providers, routes: what follows `ai-gateway/` in the path, decoded.
    Management(Vec<String>),
    /// Known to clients, not to this build.
    NotBuilt(&'static str),
}

/// Where a request goes. Even one that goes nowhere has a surface, so that its error has the right shape.
#[derive(Debug)]
pub(super) struct Route {
    pub(super) surface: Surface,
    /// The account named in the path.
    pub(super) account: Option<String>,
    /// The label in metrics: one of a closed set.
    pub(super) label: &'static str,
    pub(super) endpoint: Result<Endpoint>,
}

impl Route {
    /// Finds the endpoint of a request.
    pub(super) fn find(listener: Listener, method: &Method, path: &str) -> Self {
        let segments = segments(path.trim_start_matches('/'));
        let (surface, account, found) = match (listener, segments.as_slice()) {
            (_, ["health", "live"]) => (Surface::OpenAi, None, get("/health/live", Endpoint::Live)),
            (_, ["health", "ready"]) => (Surface::OpenAi, None, get("/health/ready", Endpoint::Ready)),
            (_, ["metrics"]) => (Surface::OpenAi, None, get("/metrics", Endpoint::Metrics)),
            // Records and addresses of gateways: the shim reads the management API's own envelope.
            (Listener::Binding, ["ai-gateway", "gateways", _, "logs" | "url", ..]) => {
                (Surface::Management, None, management(method, &segments[1..]))
            }
            (Listener::Binding, rest) => (Surface::Binding, None, binding(rest)),
            (_, ["v1", "messages", rest @ ..]) => (Surface::Messages, None, messages(rest, ROOT.messages)),
            (_, ["v1", account, gateway, rest @ ..]) if !OPENAI.contains(account) => {
                (Surface::Gateway, Some(*account), through(method, gateway, rest))
            }
            (_, ["v1", rest @ ..]) => (Surface::OpenAi, None, v1(rest, &ROOT)),
            // Anthropic's SDKs put `/v1` behind whatever base they are given.
            (_, ["client", "v4", "accounts", account, "ai", "v1", "messages", rest @ ..])
            | (_, ["client", "v4", "accounts", account, "ai", "v1", "v1", "messages", rest @ ..]) => {
                (Surface::Messages, Some(*account), messages(rest, CLOUDFLARE.messages))
            }
            (_, ["client", "v4", "accounts", account, "ai", "v1", rest @ ..]) => {
                (Surface::CloudflareV1, Some(*account), v1(rest, &CLOUDFLARE))
            }
            (_, ["client", "v4", "accounts", account, "ai-gateway", rest @ ..]) => {
                (Surface::Management, Some(*account), management(method, rest))
            }
            (_, ["client", "v4", "accounts", account, rest @ ..]) => {
                (Surface::Native, Some(*account), native(method, rest))
            }
            (_, ["client", ..]) => (Surface::Native, None, Err(None)),
            _ => (Surface::OpenAi, None, Err(None)),
        };
        let (account, account_error) = match account.map(account_id).transpose() {
            Ok(account) => (account, None),
            Err(error) => (None, Some(error)),
        };
        let (label, endpoint) = match found {
            _ if account_error.is_some() => ("other", Err(account_error.unwrap_or_else(|| no_route(surface)))),
            Ok(Found { label, endpoint, takes }) => {
                let fits = method == takes || (takes == Method::GET && method == Method::HEAD);
                (label, if fits { endpoint } else { Err(wrong_method(method, &takes)) })
            }
            Err(error) => ("other", Err(error.unwrap_or_else(|| no_route(surface)))),
        };
        Self { surface, account, label, endpoint }
    }
}

/// What stands between slashes, as sent.
fn segments(path: &str) -> SmallVec<[&str; 12]> {
    let (mut segments, mut from) = (SmallVec::new(), 0);
    for at in memchr::memchr_iter(b'/', path.as_bytes()) {
        segments.push(&path[from..at]);
        from = at + 1;
    }
    segments.push(&path[from..]);
    segments
}

struct Found {
    label: &'static str,
    endpoint: Result<Endpoint>,
    takes: Method,
}

type Search = Result<Found, Option<Error>>;

fn get(label: &'static str, endpoint: Endpoint) -> Search {
    Ok(Found { label, endpoint: Ok(endpoint), takes: Method::GET })
}

fn post(label: &'static str, endpoint: Endpoint) -> Search {
    Ok(Found { label, endpoint: Ok(endpoint), takes: Method::POST })
}

fn delete(label: &'static str, endpoint: Endpoint) -> Search {
    Ok(Found { label, endpoint: Ok(endpoint), takes: Method::DELETE })
}

/// Labels of the OpenAI-compatible routes under one prefix.
struct Labels {
    chat: &'static str,
    completions: &'static str,
    responses: &'static str,
    embeddings: &'static str,
    rerank: &'static str,
    models: &'static str,
    model: &'static str,
    messages: &'static str,
    other: &'static str,
}

const ROOT: Labels = Labels {
    chat: "/v1/chat/completions",
    completions: "/v1/completions",
    responses: "/v1/responses",
    embeddings: "/v1/embeddings",
    rerank: "/v1/rerank",
    models: "/v1/models",
    model: "/v1/models/{model}",
    messages: "/v1/messages",
    other: "/v1/(not available)",
};

const CLOUDFLARE: Labels = Labels {
    chat: "/client/v4/accounts/{account}/ai/v1/chat/completions",
    completions: "/client/v4/accounts/{account}/ai/v1/completions",
    responses: "/client/v4/accounts/{account}/ai/v1/responses",
    embeddings: "/client/v4/accounts/{account}/ai/v1/embeddings",
    rerank: "/client/v4/accounts/{account}/ai/v1/rerank",
    models: "/client/v4/accounts/{account}/ai/v1/models",
    model: "/client/v4/accounts/{account}/ai/v1/models/{model}",
    messages: "/client/v4/accounts/{account}/ai/v1/messages",
    other: "/client/v4/accounts/{account}/ai/v1/(not available)",
};

fn v1(segments: &[&str], labels: &Labels) -> Search {
    let not_built = |what| post(labels.other, Endpoint::NotBuilt(what));
    match segments {
        ["chat", "completions"] => post(labels.chat, Endpoint::ChatCompletions),
        ["completions"] => post(labels.completions, Endpoint::Completions),
        ["responses"] => post(labels.responses, Endpoint::Responses),
        ["models"] => get(labels.models, Endpoint::Models),
        ["models", id @ ..] if !id.is_empty() => get(labels.model, Endpoint::Model(decoded(id)?)),
        ["embeddings"] => post(labels.embeddings, Endpoint::Embeddings),
        ["rerank"] => post(labels.rerank, Endpoint::Rerank),
        ["moderations"] => not_built("Moderation is"),
        ["audio", _] => not_built("Speech is"),
        ["images", _] => not_built("Image generation is"),
        _ => Err(None),
    }
}

/// What stands behind `/v1` on the OpenAI surface, and so is no account.
const OPENAI: [&str; 9] =
    ["chat", "completions", "responses", "models", "embeddings", "rerank", "moderations", "audio", "images"];

/// An endpoint that takes a body, by its path behind `/v1/`.
///
/// # Errors
/// `NotFound`, and what the endpoint itself says.
pub(super) fn openai(path: &str) -> Result<Endpoint> {
    let segments: Vec<&str> = path.split('/').collect();
    let found = v1(&segments, &ROOT).map_err(|error| error.unwrap_or_else(|| no_route(Surface::OpenAi)))?;
    found.endpoint
}

fn messages(segments: &[&str], label: &'static str) -> Search {
    match segments {
        [] | [""] => post(label, Endpoint::Messages),
        _ => Err(None),
    }
}

/// Whatever goes through a gateway.
fn through(method: &Method, gateway: &str, segments: &[&str]) -> Search {
    let gateway = decoded(&[gateway])?;
    match segments {
        [] | [""] if method == Method::GET => get("gateway: universal socket", Endpoint::Universal { gateway }),
        [] | [""] => post("gateway: universal", Endpoint::Universal { gateway }),
        ["compat", rest @ ..] => match rest {
            ["chat", "completions"] | ["v1", "chat", "completions"] => {
                post("gateway: compat/chat/completions", Endpoint::CompatChat { gateway })
            }
            ["embeddings"] | ["v1", "embeddings"] => {
                post("gateway: compat/embeddings", Endpoint::CompatEmbeddings { gateway })
            }
            ["models"] | ["v1", "models"] => get("gateway: compat/models", Endpoint::CompatModels { gateway }),
            _ => Err(None),
        },
        ["run"] => post("gateway: run", Endpoint::GatewayRun { gateway }),
        [slug, rest @ ..] => {
            let (slug, rest) = (decoded(&[slug])?, rest.join("/"));
            let endpoint = Endpoint::Provider { gateway, slug, rest };
            Ok(Found { label: "gateway: provider", endpoint: Ok(endpoint), takes: method.clone() })
        }
    }
}

fn management(method: &Method, segments: &[&str]) -> Search {
    let path = segments.iter().filter(|segment| !segment.is_empty()).map(|segment| decoded(&[segment]));
    let path = path.collect::<Result<Vec<_>, _>>()?;
    Ok(Found { label: "ai-gateway", endpoint: Ok(Endpoint::Management(path)), takes: method.clone() })
}

fn native(method: &Method, segments: &[&str]) -> Search {
    const RUN: &str = "/client/v4/accounts/{account}/ai/run/{model}";
    const FINETUNES: &str = "/client/v4/accounts/{account}/ai/finetunes";
    const FINETUNE: &str = "/client/v4/accounts/{account}/ai/finetunes/{finetune}";
    const ASSETS: &str = "/client/v4/accounts/{account}/ai/finetunes/{finetune}/finetune-assets";
    match segments {
        ["ai", "run"] | ["ai", "run", ""] => post("/client/v4/accounts/{account}/ai/run", Endpoint::RunUnified),
        ["ai", "run", model @ ..] => {
            let model = decoded(model)?;
            // A gateway route is no model: here the live service knows no such route.
            if model.starts_with("dynamic/") { Err(None) } else { post(RUN, Endpoint::Run(model)) }
        }
        ["ai", "models", "search"] => get("/client/v4/accounts/{account}/ai/models/search", Endpoint::ModelSearch),
        ["ai", "models", "schema"] => get("/client/v4/accounts/{account}/ai/models/schema", Endpoint::ModelSchema),
        ["ai", "tasks", "search"] => get("/client/v4/accounts/{account}/ai/tasks/search", Endpoint::TaskSearch),
        ["ai", "authors", "search"] => get("/client/v4/accounts/{account}/ai/authors/search", Endpoint::AuthorSearch),
        ["ai", "tomarkdown", ..] => {
            post("/client/v4/accounts/{account}/ai/(not available)", Endpoint::NotBuilt("Markdown conversion is"))
        }
        ["ai", "finetunes"] if method == Method::POST => post(FINETUNES, Endpoint::CreateFinetune),
        ["ai", "finetunes"] => get(FINETUNES, Endpoint::Finetunes),
        ["ai", "finetunes", "public"] => {
            get("/client/v4/accounts/{account}/ai/finetunes/public", Endpoint::PublicFinetunes)
        }
        ["ai", "finetunes", key] => delete(FINETUNE, Endpoint::DeleteFinetune(decoded(&[key])?)),
        ["ai", "finetunes", key, "finetune-assets"] => post(ASSETS, Endpoint::FinetuneAssets(decoded(&[key])?)),
        _ => Err(None),
    }
}

fn binding(segments: &[&str]) -> Search {
    let absent = |what: &str| Err(Some(Error::new(Kind::NotFound, format!("{what} not available in this build"))));
    match segments {
        ["run"] => post("binding:/run", Endpoint::BindingRun),
        ["ai-api", "models", "search"] => get("binding:/ai-api/models/search", Endpoint::ModelSearch),
        ["ai-gateway", ..] => absent("Calling models through a gateway by the binding is"),
        ["to-everything", ..] => absent("Markdown conversion is"),
        ["autorag" | "ai-search", ..] => absent("AI Search is"),
        _ => Err(None),
    }
}

/// A model id or another name out of the rest of a path: joined as sent, then decoded once.
fn decoded(segments: &[&str]) -> Result<String, Option<Error>> {
    if let [plain] = segments
        && !plain.contains('%')
    {
        return Ok((*plain).to_owned());
    }
    let raw = segments.join("/");
    match percent_decode_str(&raw).decode_utf8() {
        Ok(text) => Ok(text.into_owned()),
        Err(_) => Err(Some(Error::bad_input("the name in the path is not valid UTF-8 after decoding"))),
    }
}

/// Account ids are 32 hex digits at Cloudflare, a short name elsewhere. They end up in logs and the ledger: bounded here.
fn account_id(raw: &str) -> Result<String> {
    let good = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    let text = if raw.contains('%') { percent_decode_str(raw).decode_utf8_lossy() } else { raw.into() };
    if text.is_empty() || text.len() > 64 || !text.chars().all(good) {
        return Err(Error::new(Kind::NotFound, "the account in the path is not an account id"));
    }
    Ok(text.into_owned())
}

fn no_route(surface: Surface) -> Error {
    let message = match surface {
        Surface::Native | Surface::CloudflareV1 | Surface::Management => "No route for that URI",
        Surface::OpenAi | Surface::Binding | Surface::Gateway | Surface::Messages => "There is nothing at this path",
    };
    Error::new(Kind::NotFound, message)
}

fn wrong_method(method: &Method, wanted: &Method) -> Error {
    // The method is a token of the client's choice: no reason to repeat a long one.
    let sent: String = method.as_str().chars().take(16).collect();
    Error::new(Kind::MethodNotAllowed, format!("Method {sent} not available for that URI: use {wanted}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(method: Method, path: &str, expected: &str) {
        let route = Route::find(Listener::Api, &method, path);
        let endpoint = match &route.endpoint {
            Ok(endpoint) => format!("{endpoint:?}"),
            Err(error) => format!("{:?}", error.kind()),
        };
        let account = route.account.as_deref().map(|a| format!(" for {a}")).unwrap_or_default();
        assert_eq!(format!("{:?} {endpoint}{account}", route.surface), expected, "{method} {path}");
        assert!(!route.label.contains('@'), "a label of a closed set: {}", route.label);
    }

    #[test]
    fn a_path_is_split_raw_and_decoded_once() {
        let run = "/client/v4/accounts/0a1b/ai/run/";
        for model in ["@cf/meta/llama", "@cf%2Fmeta%2Fllama", "%40cf/meta%2fllama"] {
            check(Method::POST, &format!("{run}{model}"), r#"Native Run("@cf/meta/llama") for 0a1b"#);
            check(Method::GET, &format!("/v1/models/{model}"), r#"OpenAi Model("@cf/meta/llama")"#);
        }
        check(Method::POST, &format!("{run}a%252Fb"), r#"Native Run("a%2Fb") for 0a1b"#);
        check(Method::POST, &format!("{run}a%ff"), "Native BadInput for 0a1b");
        check(Method::POST, &format!("{run}dynamic/x"), "Native NotFound for 0a1b");
        check(Method::POST, "/client/v4/accounts/0a1b/ai/run", "Native RunUnified for 0a1b");
    }

    #[test]
    fn what_is_not_there_is_refused_in_the_shape_of_its_surface() {
        check(Method::GET, "/v1/chat/completions", "OpenAi MethodNotAllowed");
        check(Method::POST, "/v1/models", "OpenAi MethodNotAllowed");
        check(Method::HEAD, "/v1/models", "OpenAi Models");
        check(Method::GET, "/", "OpenAi NotFound");
        check(Method::GET, "/v1/models/", r#"OpenAi Model("")"#);
        check(Method::POST, "/v1/embeddings", "OpenAi Embeddings");
        check(Method::POST, "/v1/moderations", r#"OpenAi NotBuilt("Moderation is")"#);
        check(Method::POST, "/client/v4/accounts/a/ai/v1/v1/messages", "Messages Messages for a");
        check(Method::POST, "/client/v4/accounts/a/ai/v1/messages", "Messages Messages for a");
        check(Method::POST, "/v1/messages", "Messages Messages");
        check(Method::POST, "/client/v4/accounts/a/ai/v1/chat/completions", "CloudflareV1 ChatCompletions for a");
        check(Method::POST, "/client/v4/accounts/a/ai/v1/nothing", "CloudflareV1 NotFound for a");
        check(Method::POST, "/client/v4/accounts/a%20b/ai/run/x", "Native NotFound");
        check(Method::POST, "/client/v4/zones", "Native NotFound");
        check(Method::POST, "/run", "OpenAi NotFound");
    }

    #[test]
    fn what_goes_through_a_gateway_keeps_its_path() {
        let provider = |slug: &str, rest: &str| {
            format!(r#"Gateway Provider {{ gateway: "g", slug: "{slug}", rest: "{rest}" }} for acc"#)
        };
        for (path, slug, rest) in [
            ("openai/chat/completions", "openai", "chat/completions"),
            ("workers-ai/@cf%2Fmeta%2Fllama", "workers-ai", "@cf%2Fmeta%2Fllama"),
            (
                "aws-bedrock/bedrock-runtime/us-east-1/model/a%3A0/invoke",
                "aws-bedrock",
                "bedrock-runtime/us-east-1/model/a%3A0/invoke",
            ),
            ("custom%2Dx/a//b/", "custom-x", "a//b/"),
            ("openai", "openai", ""),
        ] {
            check(Method::POST, &format!("/v1/acc/g/{path}"), &provider(slug, rest));
            check(Method::DELETE, &format!("/v1/acc/g/{path}"), &provider(slug, rest));
        }
        check(Method::POST, "/v1/acc/g", r#"Gateway Universal { gateway: "g" } for acc"#);
        check(Method::POST, "/v1/acc/g/", r#"Gateway Universal { gateway: "g" } for acc"#);
        check(Method::POST, "/v1/acc/g/compat/chat/completions", r#"Gateway CompatChat { gateway: "g" } for acc"#);
        check(Method::POST, "/v1/acc/g/compat/nothing", "Gateway NotFound for acc");
        check(Method::POST, "/v1/acc/g/run", r#"Gateway GatewayRun { gateway: "g" } for acc"#);
        check(
            Method::PATCH,
            "/client/v4/accounts/acc/ai-gateway/gateways/my%20g/routes/1",
            r#"Management Management(["gateways", "my g", "routes", "1"]) for acc"#,
        );
        check(Method::POST, "/v1/a%20c/g/openai/x", "Gateway NotFound");
    }

    #[test]
    fn finetunes_are_made_listed_filled_and_taken_away() {
        let path = "/client/v4/accounts/a/ai/finetunes";
        check(Method::POST, path, "Native CreateFinetune for a");
        check(Method::GET, path, "Native Finetunes for a");
        check(Method::PUT, path, "Native MethodNotAllowed for a");
        check(Method::GET, &format!("{path}/public"), "Native PublicFinetunes for a");
        check(Method::DELETE, &format!("{path}/my%2Dtune"), r#"Native DeleteFinetune("my-tune") for a"#);
        check(Method::POST, &format!("{path}/my-tune/finetune-assets"), r#"Native FinetuneAssets("my-tune") for a"#);
        check(Method::GET, &format!("{path}/my-tune/finetune-assets"), "Native MethodNotAllowed for a");
        check(Method::POST, &format!("{path}/a/b/finetune-assets"), "Native NotFound for a");
    }

    #[test]
    fn the_binding_has_paths_of_its_own() {
        let find = |method: Method, path: &str| {
            let route = Route::find(Listener::Binding, &method, path);
            (route.surface, route.endpoint.map_err(|e| e.kind()))
        };
        assert_eq!(find(Method::POST, "/run"), (Surface::Binding, Ok(Endpoint::BindingRun)));
        assert_eq!(find(Method::GET, "/ai-api/models/search"), (Surface::Binding, Ok(Endpoint::ModelSearch)));
        assert_eq!(find(Method::POST, "/v1/chat/completions"), (Surface::Binding, Err(Kind::NotFound)));
        assert_eq!(find(Method::POST, "/ai-gateway/run"), (Surface::Binding, Err(Kind::NotFound)));
    }
}
