//! What other providers' models cost: a table of list prices, compiled in, that the operator's own file adds to.
//!
//!     provider, model ──exact──> tariff ──usage──> neurons
//!            └─ without a date, a version, a region, or whose it is really ─┘
//!
//! Prices are written in US dollars, as providers publish them; what comes out is neurons, of which 1,000 are 0.011 USD, so
//! that one unit pays for everything. They are estimates: an upstream's own bill counts.

use std::collections::HashMap;
use std::path::Path;

use serde::Deserialize;

use crate::base::{Error, Lookup, Neurons, Result};
use crate::task::Usage;

const LISTED: &str = include_str!("../../configs/prices.toml");

/// Every price that is known.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Tariffs(Lookup<String, Lookup<String, Tariff>>);

/// What one model costs, in US dollars per million tokens.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Tariff {
    short: Rates,
    /// Prompts of more tokens than this have other rates.
    long: Option<(u32, Rates)>,
}

/// See [`Tariff`]. What is left out costs as much as `input`.
#[derive(Debug, Clone, Copy, PartialEq, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Rates {
    input: f64,
    cached: Option<f64>,
    written: Option<f64>,
    output: f64,
}

/// A tariff as it is written.
#[derive(Deserialize)]
#[serde(deny_unknown_fields, default)]
#[derive(Default)]
struct Line {
    input: f64,
    cached: Option<f64>,
    written: Option<f64>,
    output: f64,
    over: Option<u32>,
    long: Option<Rates>,
}

impl Tariffs {
    /// The list prices, and those of a file of the same form, which win.
    ///
    /// # Errors
    /// When the file cannot be read, or says what cannot be a price.
    pub fn load(path: Option<&Path>) -> Result<Self> {
        let mut tariffs = Self::parse(LISTED).map_err(|why| Error::internal(format!("the list of prices: {why}")))?;
        let Some(path) = path else { return Ok(tariffs) };
        let wrong = |why: String| {
            Error::bad_input(format!("prices.path = \"{}\": {why}. Correct it or leave it out.", path.display()))
        };
        let text = std::fs::read_to_string(path).map_err(|error| wrong(error.to_string()))?;
        for (provider, models) in Self::parse(&text).map_err(wrong)?.0 {
            tariffs.0.entry(provider).or_default().extend(models);
        }
        Ok(tariffs)
    }

    fn parse(text: &str) -> std::result::Result<Self, String> {
        let written: HashMap<String, HashMap<String, Line>> =
            toml::from_str(text).map_err(|error| error.to_string())?;
        let mut table: Lookup<String, Lookup<String, Tariff>> = Lookup::default();
        for (provider, models) in written {
            for (model, line) in models {
                let tariff = line.tariff().map_err(|why| format!("[{provider}] \"{model}\" {why}"))?;
                table.entry(provider.clone()).or_default().insert(model, tariff);
            }
        }
        Ok(Self(table))
    }

    /// What this usage costs; `None` where the model has no price.
    pub fn charge(&self, provider: &str, model: &str, usage: &Usage) -> Option<Neurons> {
        Some(self.find(provider, model)?.charge(usage))
    }

    /// The price of a model under any of the names it goes by.
    pub fn find(&self, provider: &str, model: &str) -> Option<&Tariff> {
        let model = model.strip_prefix("models/").unwrap_or(model);
        if let Some(models) = self.0.get(provider) {
            let found = models.get(model).or_else(|| {
                let mut name = model;
                while let Some(shorter) = shorten(name) {
                    if let Some(tariff) = models.get(shorter) {
                        return Some(tariff);
                    }
                    name = shorter;
                }
                None
            });
            if found.is_some() {
                return found;
            }
        }
        match provider {
            // Deployments are often called as the model is that they are of.
            "azure-openai" => self.find("openai", model),
            "openrouter" => {
                let (owner, model) = model.split_once('/')?;
                let owner = match owner {
                    "google" => "google-ai-studio",
                    "mistralai" => "mistral",
                    "x-ai" => "grok",
                    "perplexity" => "perplexity-ai",
                    // Nobody who sells elsewhere sells here, so this ends.
                    "openrouter" => return None,
                    owner => owner,
                };
                self.find(owner, model)
            }
            _ => None,
        }
    }
}

/// The same name with one thing less: a variant, a version, a date, a region.
fn shorten(name: &str) -> Option<&str> {
    const REGIONS: [&str; 8] = ["us.", "eu.", "apac.", "global.", "jp.", "au.", "ca.", "us-gov."];
    if let Some(base) = name.strip_prefix("ft:") {
        // ft:MODEL:ORGANISATION:NAME:ID is a model that somebody tuned.
        let end = base.find(':').map(|at| at + 3)?;
        return Some(&name[..end]);
    }
    if name.starts_with("arn:") {
        return name.rsplit_once('/').map(|(_, rest)| rest);
    }
    if let Some(rest) = REGIONS.iter().find_map(|region| name.strip_prefix(region)) {
        return Some(rest);
    }
    if let Some((base, _)) = name.rsplit_once(['@', ':']) {
        return Some(base);
    }
    let (base, last) = name.rsplit_once('-')?;
    let digits = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    if last == "latest" || last == "preview" || digits(last) && last.len() >= 3 {
        return Some(base);
    }
    // A date with dashes.
    let (rest, month) = base.rsplit_once('-')?;
    let (rest, year) = rest.rsplit_once('-')?;
    (digits(last) && digits(month) && digits(year) && year.len() == 4).then_some(rest)
}

impl Tariff {
    /// What this usage costs, rounded once.
    pub fn charge(&self, usage: &Usage) -> Neurons {
        let rates = match &self.long {
            Some((over, long)) if usage.prompt_tokens > *over => long,
            _ => &self.short,
        };
        let cached = usage.cached_tokens.min(usage.prompt_tokens);
        let written = usage.written_tokens.min(usage.prompt_tokens - cached);
        let fresh = usage.prompt_tokens - cached - written;
        let usd_a_million = f64::from(fresh) * rates.input
            + f64::from(cached) * rates.cached.unwrap_or(rates.input)
            + f64::from(written) * rates.written.unwrap_or(rates.input)
            + f64::from(usage.completion_tokens) * rates.output;
        Neurons::from_usd(usd_a_million / 1e6)
    }
}

impl Line {
    fn tariff(self) -> std::result::Result<Tariff, String> {
        let Self { input, cached, written, output, over, long } = self;
        let short = Rates { input, cached, written, output };
        let all = [Some(&short), long.as_ref()].into_iter().flatten();
        let prices = all.flat_map(|rates| [Some(rates.input), rates.cached, rates.written, Some(rates.output)]);
        if !prices.flatten().all(|price| (0.0..=1e6).contains(&price)) {
            return Err("has a price that is not between 0 and 1000000".to_owned());
        }
        match (over, long) {
            (Some(over), Some(long)) => Ok(Tariff { short, long: Some((over, long)) }),
            (None, None) => Ok(Tariff { short, long: None }),
            _ => Err("has one of `over` and `long`, which go together".to_owned()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn usage(prompt: u32, cached: u32, written: u32, completion: u32) -> Usage {
        Usage {
            prompt_tokens: prompt,
            cached_tokens: cached,
            written_tokens: written,
            completion_tokens: completion,
            ..Usage::default()
        }
    }

    #[test]
    fn a_call_costs_what_the_list_says_in_neurons() {
        let tariffs = Tariffs::load(None).unwrap();
        let check = |provider: &str, model: &str, usage: Usage, usd: f64| {
            let cost = tariffs.charge(provider, model, &usage).unwrap_or_else(|| panic!("{provider} {model}"));
            assert!((cost.usd() - usd).abs() < 1e-9, "{provider} {model}: {} and not {usd}", cost.usd());
        };
        check("openai", "gpt-4o", usage(1_000_000, 0, 0, 0), 2.5);
        check("openai", "gpt-4o", usage(1000, 400, 0, 10), (600.0 * 2.5 + 400.0 * 1.25 + 10.0 * 10.0) / 1e6);
        let written = (100.0 * 3.0 + 800.0 * 0.3 + 100.0 * 3.75 + 15.0) / 1e6;
        check("anthropic", "claude-sonnet-4-5", usage(1000, 800, 100, 1), written);
        check("google-ai-studio", "models/gemini-2.5-pro", usage(200_000, 0, 0, 0), 0.25);
        check("google-ai-studio", "gemini-2.5-pro", usage(200_001, 0, 0, 0), 200_001.0 * 2.5 / 1e6);
        check("openai", "gpt-4o", usage(0, 0, 0, 0), 0.0);
    }

    #[test]
    fn a_model_is_known_by_all_its_names_and_an_unknown_one_by_none() {
        let tariffs = Tariffs::load(None).unwrap();
        let same = |provider: &str, name: &str, as_provider: &str, as_name: &str| {
            let (one, two) = (tariffs.find(provider, name), tariffs.find(as_provider, as_name));
            assert!(one.is_some() && one == two, "{provider} {name}: {one:?} and {two:?}");
        };
        same("openai", "gpt-4o-2031-01-31", "openai", "gpt-4o");
        same("openai", "ft:gpt-4o-2024-08-06:acme:tuned:Ab12", "openai", "ft:gpt-4o-2024-08-06");
        same("anthropic", "claude-sonnet-4-5-20310131", "anthropic", "claude-sonnet-4-5");
        same("azure-openai", "davinci-002", "openai", "davinci-002");
        same("openrouter", "anthropic/claude-sonnet-4-5", "anthropic", "claude-sonnet-4-5");
        same("google-vertex-ai", "gemini-2.5-pro@001", "google-vertex-ai", "gemini-2.5-pro");
        let claude = "anthropic.claude-3-5-sonnet-20240620-v1:0";
        same("aws-bedrock", &format!("apac.{claude}"), "aws-bedrock", &format!("apac.{claude}"));
        same("aws-bedrock", &format!("jp.{claude}"), "aws-bedrock", claude);
        let profile = format!("arn:aws:bedrock:us-east-1:1:inference-profile/{claude}");
        same("aws-bedrock", &profile, "aws-bedrock", claude);
        let unknown = [("openai", "gpt"), ("openai", ""), ("nobody", "gpt-4o"), ("openai", "ft:"), ("openrouter", "x")];
        for (provider, name) in unknown {
            assert_eq!(tariffs.find(provider, name), None, "{provider} {name}");
        }
    }

    #[test]
    fn a_file_adds_and_changes_prices_and_is_told_what_is_wrong_with_it() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("prices.toml");
        let load = |text: &str| {
            std::fs::write(&path, text).unwrap();
            Tariffs::load(Some(&path)).map_err(|error| error.message().to_owned())
        };
        let tariffs = load("[openai]\n\"gpt-4o\" = { input = 1 }\n[custom-mine]\nm = { output = 2 }").unwrap();
        let million = usage(1_000_000, 0, 0, 1_000_000);
        let usd = |provider, model| tariffs.charge(provider, model, &million).unwrap().usd().round();
        assert_eq!((usd("openai", "gpt-4o"), usd("custom-mine", "m")), (1.0, 2.0));
        assert!(tariffs.find("openai", "gpt-4.1").is_some());
        for (text, why) in [
            ("[openai]\nx = { input = -1 }", "not between"),
            ("[openai]\nx = { over = 1, long = { output = nan } }", "not between"),
            ("[openai]\nx = { over = 1 }", "go together"),
            ("[openai]\nx = { price = 1 }", "price"),
            ("x = 1", "prices.toml"),
        ] {
            assert!(load(text).unwrap_err().contains(why), "{text}");
        }
        assert!(Tariffs::load(Some(&folder.path().join("none"))).is_err());
    }
}
