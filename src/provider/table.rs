//! The upstreams that are known by name. Bases are defaults: an operator may point any of them elsewhere.

use crate::provider::{Auth, Dialect, Placing, Provider};

/// Every provider, in the order in which lists show them.
pub(super) static PROVIDERS: &[Provider] = &[
    Provider { asks_usage: true, ..openai("openai", &[], "https://api.openai.com/v1") },
    Provider {
        dialect: Dialect::Anthropic,
        ..keyed("anthropic", &[], "https://api.anthropic.com", "x-api-key", &["x-api-key", "authorization"], Some("v1"))
    },
    Provider {
        dialect: Dialect::Google,
        brings_query: &["key"],
        ..keyed(
            "google-ai-studio",
            &["google"],
            "https://generativelanguage.googleapis.com",
            "x-goog-api-key",
            &["x-goog-api-key", "authorization"],
            Some("v1beta"),
        )
    },
    Provider {
        auth: Auth::Vertex,
        dialect: Dialect::Google,
        place: Placing::Vertex,
        ..bearer(
            "google-vertex-ai",
            &["vertex", "google-vertex"],
            "https://{region}-aiplatform.googleapis.com",
            Some("v1"),
        )
    },
    Provider {
        auth: Auth::SigV4,
        dialect: Dialect::Bedrock,
        brings_query: &["X-Amz-Signature"],
        place: Placing::Bedrock,
        ..bearer("aws-bedrock", &["bedrock"], "https://bedrock-runtime.{region}.amazonaws.com", None)
    },
    Provider {
        dialect: Dialect::OpenAi,
        asks_usage: true,
        brings_query: &["api-key"],
        place: Placing::Azure,
        ..keyed(
            "azure-openai",
            &["azure"],
            "https://{resource}.openai.azure.com",
            "api-key",
            &["api-key", "authorization"],
            None,
        )
    },
    Provider { asks_usage: true, ..openai("groq", &[], "https://api.groq.com/openai/v1") },
    openai("mistral", &["mistralai"], "https://api.mistral.ai"),
    Provider { asks_usage: true, version: None, ..openai("deepseek", &[], "https://api.deepseek.com") },
    Provider { asks_usage: true, ..openai("openrouter", &[], "https://openrouter.ai/api") },
    Provider { dialect: Dialect::Cohere, ..openai("cohere", &[], "https://api.cohere.ai") },
    Provider { version: None, ..openai("perplexity-ai", &["perplexity"], "https://api.perplexity.ai") },
    Provider { asks_usage: true, ..openai("grok", &["xai", "x-ai"], "https://api.x.ai") },
    Provider { asks_usage: true, ..openai("cerebras", &["cerebras-ai"], "https://api.cerebras.ai/v1") },
    bearer("replicate", &[], "https://api.replicate.com/v1", Some("v1")),
    bearer("huggingface", &["hugging-face"], "https://api-inference.huggingface.co/models", None),
    // Served here. A base makes it another machine's.
    openai("workers-ai", &[], ""),
    Provider { asks_usage: true, ..openai("fireworks", &["fireworks-ai"], "https://api.fireworks.ai/inference/v1") },
    Provider { asks_usage: true, ..openai("baseten", &[], "https://inference.baseten.co/v1") },
    Provider {
        auth: Auth::HeaderAndBearer("x-api-key"),
        dialect: Dialect::OpenAi,
        ..keyed("parallel", &[], "https://api.parallel.ai", "x-api-key", &["x-api-key", "authorization"], None)
    },
    keyed("cartesia", &[], "https://api.cartesia.ai", "x-api-key", &["x-api-key", "authorization"], None),
    Provider { auth: Auth::Scheme("Token"), ..bearer("deepgram", &[], "https://api.deepgram.com", Some("v1")) },
    keyed("elevenlabs", &[], "https://api.elevenlabs.io", "xi-api-key", &["xi-api-key", "authorization"], Some("v1")),
    Provider { auth: Auth::Scheme("Key"), ..bearer("fal", &[], "https://fal.run", None) },
    keyed("ideogram", &[], "https://api.ideogram.ai", "api-key", &["api-key"], None),
    bearer("adobe-firefly", &[], "https://firefly-api.adobe.io", None),
];

/// What every custom provider is taken for until its operator says otherwise.
pub(super) static CUSTOM: Provider = Provider {
    brings: &["authorization", "x-api-key", "api-key", "x-goog-api-key"],
    version: None,
    ..openai("custom", &[], "")
};

/// A provider with a bearer token and nothing that could be called chat.
const fn bearer(
    slug: &'static str,
    aliases: &'static [&'static str],
    base: &'static str,
    version: Option<&'static str>,
) -> Provider {
    Provider {
        slug,
        aliases,
        base,
        auth: Auth::Bearer,
        dialect: Dialect::Opaque,
        version,
        brings: &["authorization"],
        brings_query: &[],
        asks_usage: false,
        place: Placing::Fixed,
    }
}

/// A provider that speaks OpenAI's dialect under `v1`.
const fn openai(slug: &'static str, aliases: &'static [&'static str], base: &'static str) -> Provider {
    Provider { dialect: Dialect::OpenAi, ..bearer(slug, aliases, base, Some("v1")) }
}

/// A provider with its key in a header of its own.
const fn keyed(
    slug: &'static str,
    aliases: &'static [&'static str],
    base: &'static str,
    header: &'static str,
    brings: &'static [&'static str],
    version: Option<&'static str>,
) -> Provider {
    Provider { auth: Auth::Header(header), brings, ..bearer(slug, aliases, base, version) }
}
