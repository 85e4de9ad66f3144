//! From the path of a native call to the provider's address.
//!
//!     openai        chat/completions                                   https://api.openai.com/v1 + /chat/completions
//!     mistral       chat/completions                                   https://api.mistral.ai + /v1/chat/completions
//!     azure-openai  {resource}/{deployment}/chat/completions           https://{resource}.openai.azure.com/openai/deployments/…
//!     aws-bedrock   bedrock-runtime/{region}/model/{id}/converse       https://bedrock-runtime.{region}.amazonaws.com/model/…
//!     vertex        v1/projects/{project}/locations/{region}/…         https://{region}-aiplatform.googleapis.com/v1/…
//!
//! What is left of a path travels byte for byte: a signature may cover it.

use std::borrow::Cow;
use std::fmt;

use percent_encoding::percent_decode_str;

use crate::base::{Error, Result};
use crate::provider::{Dialect, Placing, Provider};

/// Where to send a request.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Url {
    /// TLS or not; only an operator's own base can be without.
    pub tls: bool,
    /// Host, and port if one was given.
    pub authority: String,
    /// From the first slash on.
    pub path_and_query: String,
}

impl fmt::Display for Url {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}://{}{}", if self.tls { "https" } else { "http" }, self.authority, self.path_and_query)
    }
}

pub(super) fn build(provider: &Provider, base: Option<&str>, rest: &str, query: Option<&str>) -> Result<Url> {
    check_path(rest)?;
    if query.is_some_and(|query| query.bytes().any(|byte| byte <= b' ' || byte >= 0x7f || byte == b'#')) {
        return Err(Error::bad_input("the query holds characters that belong percent-encoded"));
    }
    let rest = rest.trim_start_matches('/');
    let (base, rest) = place(provider, base, rest)?;
    let (tls, authority, prefix) = split_base(provider, &base)?;
    let rest = versioned(provider, prefix, &rest);
    let mut path_and_query = format!("{prefix}/{rest}");
    if let Some(query) = query.filter(|query| !query.is_empty()) {
        path_and_query.push('?');
        path_and_query.push_str(query);
    }
    Ok(Url { tls, authority: authority.to_owned(), path_and_query })
}

pub(super) fn model_in(provider: &Provider, rest: &str) -> Option<String> {
    let mut segments = rest.trim_start_matches('/').split('/');
    let decoded = |text: &str| percent_decode_str(text).decode_utf8_lossy().into_owned();
    match (provider.place, provider.dialect) {
        (Placing::Azure, _) => segments.nth(1).map(decoded),
        (Placing::Bedrock, _) => {
            segments.find(|segment| *segment == "model")?;
            segments.next().map(decoded)
        }
        (Placing::Vertex, _) => {
            segments.find(|segment| *segment == "publishers")?;
            let publisher = segments.next()?;
            segments.next().filter(|segment| *segment == "models")?;
            let model = segments.next()?.split(':').next()?;
            Some(format!("{publisher}/{}", decoded(model)))
        }
        (Placing::Fixed, Dialect::Google) => {
            segments.find(|segment| *segment == "models")?;
            segments.next()?.split(':').next().map(decoded)
        }
        (Placing::Fixed, _) if provider.slug == "huggingface" => Some(decoded(rest.trim_matches('/'))),
        (Placing::Fixed, _) => None,
    }
    .filter(|model| !model.is_empty())
}

/// One segment of a path, so that no byte of it is taken for anything else.
pub(super) fn segment(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for byte in text.bytes() {
        match byte {
            b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' => out.push(char::from(byte)),
            _ => out.push_str(&format!("%{byte:02X}")),
        }
    }
    out
}

/// Whether this can be a label of a host name; nothing else may get into one.
pub(super) fn is_label(text: &str) -> bool {
    (1..=63).contains(&text.len())
        && text.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-')
        && !text.starts_with('-')
        && !text.ends_with('-')
}

/// Refuses what could leave the provider's base, also in disguise: some servers decode before they resolve.
fn check_path(rest: &str) -> Result<()> {
    if rest.bytes().any(|byte| byte <= b' ' || byte >= 0x7f || matches!(byte, b'\\' | b'#' | b'?')) {
        return Err(Error::bad_input("the path holds characters that belong percent-encoded"));
    }
    let plain = if rest.contains('%') {
        let lower = rest.to_ascii_lowercase();
        // Twice, for servers that do as well.
        let once = lower.replace("%25", "%");
        Cow::Owned(once.replace("%2e", ".").replace("%2f", "/").replace("%5c", "/"))
    } else {
        Cow::Borrowed(rest)
    };
    if plain.split('/').any(|segment| matches!(segment, "." | "..")) {
        return Err(Error::bad_input("the path has `.` or `..` in it: name the endpoint directly"));
    }
    Ok(())
}

/// The base with its blanks filled in, and the path that is left.
fn place<'a>(provider: &Provider, base: Option<&'a str>, rest: &'a str) -> Result<(Cow<'a, str>, Cow<'a, str>)> {
    let given = base.unwrap_or(provider.base);
    match provider.place {
        Placing::Fixed => Ok((given.into(), rest.into())),
        Placing::Azure => {
            let form =
                "azure-openai paths are {resource}/{deployment}/…, for example my-resource/gpt-4o/chat/completions";
            let (resource, rest) = rest.split_once('/').ok_or_else(|| Error::bad_input(form))?;
            let (deployment, rest) = rest.split_once('/').ok_or_else(|| Error::bad_input(form))?;
            check_label("resource", resource)?;
            if deployment.is_empty() {
                return Err(Error::bad_input(form));
            }
            let base = given.replace("{resource}", resource);
            Ok((base.into(), format!("openai/deployments/{deployment}/{rest}").into()))
        }
        Placing::Bedrock => {
            let form = "aws-bedrock paths are bedrock-runtime/{region}/… or bedrock-mantle/{region}/…";
            let (service, rest) = rest.split_once('/').ok_or_else(|| Error::bad_input(form))?;
            let (region, rest) = rest.split_once('/').ok_or_else(|| Error::bad_input(form))?;
            check_label("region", region)?;
            let host = match (service, base) {
                ("bedrock-runtime" | "bedrock-mantle", Some(base)) => base.replace("{region}", region),
                ("bedrock-runtime", None) if region.starts_with("cn-") => {
                    format!("https://bedrock-runtime.{region}.amazonaws.com.cn")
                }
                ("bedrock-runtime", None) => format!("https://bedrock-runtime.{region}.amazonaws.com"),
                ("bedrock-mantle", None) => format!("https://bedrock-mantle.{region}.api.aws"),
                _ => return Err(Error::bad_input(form)),
            };
            Ok((host.into(), rest.into()))
        }
        Placing::Vertex => {
            let form = "google-vertex-ai paths are v1/projects/{project}/locations/{region}/…";
            let mut segments = rest.split('/');
            let region = segments.find(|segment| *segment == "locations").and_then(|_| segments.next());
            let region = region.ok_or_else(|| Error::bad_input(form))?;
            check_label("region", region)?;
            let host = match (region, base) {
                (region, Some(base)) => base.replace("{region}", region),
                ("global", None) => "https://aiplatform.googleapis.com".to_owned(),
                // Regions of several regions have hosts of another form.
                ("us" | "eu", None) => format!("https://aiplatform.{region}.rep.googleapis.com"),
                (region, None) => provider.base.replace("{region}", region),
            };
            Ok((host.into(), rest.into()))
        }
    }
}

fn check_label(what: &str, text: &str) -> Result<()> {
    if is_label(text) {
        return Ok(());
    }
    Err(Error::bad_input(format!("`{text}` cannot be a {what}: it consists of a-z, 0-9 and hyphens")))
}

/// Scheme, authority, and the path that every call begins with (no slash at its end).
fn split_base<'a>(provider: &Provider, base: &'a str) -> Result<(bool, &'a str, &'a str)> {
    if base.is_empty() {
        return Err(Error::bad_input(format!("{} has no address: give it a base URL", provider.slug)));
    }
    let wrong = || Error::bad_input(format!("the base URL of {} is not of the form https://host/path", provider.slug));
    let (tls, rest) = match (base.strip_prefix("https://"), base.strip_prefix("http://")) {
        (Some(rest), _) => (true, rest),
        (_, Some(rest)) => (false, rest),
        _ => return Err(wrong()),
    };
    let (authority, path) = rest.split_at(rest.find('/').unwrap_or(rest.len()));
    let odd = |byte: u8| byte <= b' ' || byte >= 0x7f || matches!(byte, b'@' | b'?' | b'#' | b'\\' | b'{' | b'}');
    if authority.is_empty() || rest.bytes().any(odd) {
        return Err(wrong());
    }
    Ok((tls, authority, path.trim_end_matches('/')))
}

/// The path with exactly one version in front, where the provider has versions.
fn versioned<'a>(provider: &Provider, prefix: &str, rest: &'a str) -> Cow<'a, str> {
    let (first, behind) = rest.split_once('/').unwrap_or((rest, ""));
    let base_has_one = prefix.split('/').any(is_version);
    if is_version(first) {
        let doubled = prefix.rsplit('/').next() == Some(first);
        // Bases of OpenAI's kind end where `chat/completions` begins, whatever their version is called.
        let chat = base_has_one && provider.slug == "custom" && rest == "v1/chat/completions";
        return if doubled || chat { behind.into() } else { rest.into() };
    }
    match provider.version {
        Some(version) if !base_has_one => format!("{version}/{rest}").into(),
        _ => rest.into(),
    }
}

/// `v1`, `v2`, `v1beta`, `v1beta1`.
fn is_version(segment: &str) -> bool {
    let Some(rest) = segment.strip_prefix('v') else { return false };
    rest.starts_with(|first: char| first.is_ascii_digit())
        && rest.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::Kind;
    use crate::provider::find;

    fn check(slug: &str, base: Option<&str>, rest: &str, expected: &str) {
        let url = find(slug).unwrap().url(base, rest, None);
        assert_eq!(url.unwrap().to_string(), expected, "{slug} {base:?} {rest}");
    }

    #[test]
    fn a_version_is_there_once() {
        for (slug, base, rest, expected) in [
            ("openai", None, "chat/completions", "https://api.openai.com/v1/chat/completions"),
            ("openai", None, "v1/chat/completions", "https://api.openai.com/v1/chat/completions"),
            ("openai", Some("http://127.0.0.1:9"), "chat/completions", "http://127.0.0.1:9/v1/chat/completions"),
            ("openai", Some("http://h/v1/"), "v1/models", "http://h/v1/models"),
            ("openai", Some("https://g/v1/a/gw/openai"), "models", "https://g/v1/a/gw/openai/models"),
            ("anthropic", None, "v1/messages", "https://api.anthropic.com/v1/messages"),
            ("anthropic", None, "messages", "https://api.anthropic.com/v1/messages"),
            ("mistral", None, "chat/completions", "https://api.mistral.ai/v1/chat/completions"),
            ("openrouter", None, "chat/completions", "https://openrouter.ai/api/v1/chat/completions"),
            ("grok", None, "v1/chat/completions", "https://api.x.ai/v1/chat/completions"),
            ("groq", None, "v1/models", "https://api.groq.com/openai/v1/models"),
            ("deepseek", None, "chat/completions", "https://api.deepseek.com/chat/completions"),
            ("cohere", None, "v2/chat", "https://api.cohere.ai/v2/chat"),
            ("cohere", None, "embed", "https://api.cohere.ai/v1/embed"),
            ("google", None, "v1/models/m:x", "https://generativelanguage.googleapis.com/v1/models/m:x"),
            ("google", None, "models/m:x", "https://generativelanguage.googleapis.com/v1beta/models/m:x"),
            ("replicate", None, "predictions/1", "https://api.replicate.com/v1/predictions/1"),
            ("huggingface", None, "org/vit", "https://api-inference.huggingface.co/models/org/vit"),
        ] {
            check(slug, base, rest, expected);
        }
    }

    #[test]
    fn custom_bases_are_only_lengthened() {
        for (base, rest, expected) in [
            ("https://h", "x/y", "https://h/x/y"),
            ("https://h/v1", "v1/models", "https://h/v1/models"),
            ("https://h", "v1/chat/completions", "https://h/v1/chat/completions"),
            ("https://h/paas/v4", "v1/chat/completions", "https://h/paas/v4/chat/completions"),
            ("https://h/v1beta/openai/", "v1/chat/completions", "https://h/v1beta/openai/chat/completions"),
            ("https://h/v2", "v1/other", "https://h/v2/v1/other"),
        ] {
            check("custom-mine", Some(base), rest, expected);
        }
    }

    #[test]
    fn a_place_in_the_path_becomes_a_host() {
        for (slug, base, rest, expected) in [
            (
                "azure",
                None,
                "res/gpt-4o/chat/completions",
                "https://res.openai.azure.com/openai/deployments/gpt-4o/chat/completions",
            ),
            ("azure", Some("http://h"), "res/d/embeddings", "http://h/openai/deployments/d/embeddings"),
            (
                "bedrock",
                None,
                "bedrock-runtime/us-east-1/model/a.b-v1%3A0/converse",
                "https://bedrock-runtime.us-east-1.amazonaws.com/model/a.b-v1%3A0/converse",
            ),
            (
                "bedrock",
                None,
                "bedrock-mantle/us-east-1/anthropic/v1/messages",
                "https://bedrock-mantle.us-east-1.api.aws/anthropic/v1/messages",
            ),
            (
                "bedrock",
                None,
                "bedrock-runtime/cn-north-1/model/m/invoke",
                "https://bedrock-runtime.cn-north-1.amazonaws.com.cn/model/m/invoke",
            ),
            ("bedrock", Some("http://h:1"), "bedrock-runtime/eu-west-1/model/m/invoke", "http://h:1/model/m/invoke"),
            (
                "google-vertex-ai",
                None,
                "v1/projects/p/locations/europe-west4/publishers/google/models/g:generateContent",
                "https://europe-west4-aiplatform.googleapis.com/v1/projects/p/locations/europe-west4/publishers/google/models/g:generateContent",
            ),
            (
                "google-vertex-ai",
                None,
                "projects/p/locations/global/x",
                "https://aiplatform.googleapis.com/v1/projects/p/locations/global/x",
            ),
            (
                "google-vertex-ai",
                None,
                "v1/projects/p/locations/eu/x",
                "https://aiplatform.eu.rep.googleapis.com/v1/projects/p/locations/eu/x",
            ),
        ] {
            check(slug, base, rest, expected);
        }
    }

    #[test]
    fn bytes_of_paths_and_queries_are_kept() {
        let url = find("openai").unwrap().url(None, "models/a%2Fb%20c//d", Some("after=%7B%22&limit=1"));
        assert_eq!(url.unwrap().path_and_query, "/v1/models/a%2Fb%20c//d?after=%7B%22&limit=1");
    }

    #[test]
    fn paths_that_leave_their_base_or_host_are_refused() {
        for (slug, base, rest) in [
            ("openai", None, "../admin"),
            ("openai", None, "models/.."),
            ("openai", None, "models/%2e%2E/x"),
            ("openai", None, "models/.%2e/x"),
            ("openai", None, "models%2f..%2fx"),
            ("openai", None, "models/%252e%252e/x"),
            ("openai", None, "models/..%5cx"),
            ("openai", None, "a\\b"),
            ("openai", None, "a b"),
            ("openai", None, "a#b"),
            ("openai", Some("ftp://h"), "x"),
            ("openai", Some("https://user@h"), "x"),
            ("openai", Some("https:///x"), "x"),
            ("workers-ai", None, "x"),
            ("custom-mine", None, "x"),
            ("azure", None, "evil.com/d/chat/completions"),
            ("azure", None, "Res/d/chat/completions"),
            ("azure", None, "res"),
            ("azure", None, "res//chat"),
            ("bedrock", None, "bedrock-runtime/us-east-1.evil.com/x"),
            ("bedrock", None, "bedrock-runtime/-x/x"),
            ("bedrock", None, "s3/us-east-1/x"),
            ("bedrock", None, "model/x"),
            ("google-vertex-ai", None, "v1/projects/p/locations/a.evil.com%2f/x"),
            ("google-vertex-ai", None, "v1/projects/p/models"),
        ] {
            let refused = find(slug).unwrap().url(base, rest, None);
            assert_eq!(refused.map_err(|error| error.kind()), Err(Kind::BadInput), "{slug} {base:?} {rest}");
        }
        assert!(find("openai").unwrap().url(None, "x", Some("a b")).is_err());
    }

    #[test]
    fn models_are_found_where_paths_name_them() {
        for (slug, rest, model) in [
            ("google", "v1beta/models/gemini-2.5-pro:generateContent", Some("gemini-2.5-pro")),
            ("google", "v1beta/models", None),
            (
                "google-vertex-ai",
                "v1/projects/p/locations/r/publishers/anthropic/models/claude%40x:rawPredict",
                Some("anthropic/claude@x"),
            ),
            ("google-vertex-ai", "v1/projects/p/locations/r/endpoints/openapi/chat/completions", None),
            ("bedrock", "bedrock-runtime/us-east-1/model/a.b-v1%3A0/converse", Some("a.b-v1:0")),
            ("bedrock", "bedrock-mantle/us-east-1/anthropic/v1/messages", None),
            ("azure", "res/gpt-4o/chat/completions?", Some("gpt-4o")),
            ("huggingface", "org/vit", Some("org/vit")),
            ("openai", "v1/models/gpt-4o", None),
        ] {
            assert_eq!(find(slug).unwrap().model_in_path(rest).as_deref(), model, "{slug} {rest}");
        }
    }

    #[test]
    fn a_segment_survives_being_in_a_path() {
        assert_eq!(segment("arn:aws:x/y z"), "arn%3Aaws%3Ax%2Fy%20z");
        assert_eq!(segment("claude-3@20240620"), "claude-3%4020240620");
    }
}
