//! Prices: neurons per unit, for every unit a task may be billed in.

use serde::{Deserialize, Deserializer, Serialize};

use crate::base::Neurons;
use crate::task::Usage;

/// What a model costs. Token prices are neurons per million tokens, which is micro-neurons per token; all others are neurons per
/// unit, kept to a millionth. A unit that is left out costs nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Price {
    /// Prompt tokens computed, per million.
    pub input: u64,
    /// Prompt tokens out of the prefix cache, per million; the input price if left out.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cached_input: Option<u64>,
    /// Tokens produced, per million.
    pub output: u64,

    /// A 512 by 512 block of the picture made.
    #[serde(with = "exact")]
    pub tile: Neurons,
    /// A denoising step, whatever the size.
    #[serde(with = "exact")]
    pub step: Neurons,
    /// A denoising step of one tile.
    #[serde(with = "exact")]
    pub tile_step: Neurons,
    /// A tile of a picture given.
    #[serde(with = "exact")]
    pub input_tile: Neurons,
    /// A tile of a picture given, for each step.
    #[serde(with = "exact")]
    pub input_tile_step: Neurons,
    /// The first megapixel made.
    #[serde(with = "exact")]
    pub first_megapixel: Neurons,
    /// Each further megapixel made.
    #[serde(with = "exact")]
    pub megapixel: Neurons,
    /// A megapixel given.
    #[serde(with = "exact")]
    pub input_megapixel: Neurons,
    /// A minute of sound heard.
    #[serde(with = "exact")]
    pub audio_minute: Neurons,
    /// A minute of sound heard over a WebSocket.
    #[serde(with = "exact")]
    pub stream_audio_minute: Neurons,
    /// A minute of sound made.
    #[serde(with = "exact")]
    pub output_audio_minute: Neurons,
    /// A thousand characters spoken.
    #[serde(with = "exact")]
    pub characters: Neurons,
    /// A picture looked at.
    #[serde(with = "exact")]
    pub image: Neurons,
}

/// One line of a price list, for display.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct PriceLine {
    /// `per M input tokens`, `per audio minute` …, as in a model search result.
    pub unit: &'static str,
    /// For one such unit.
    pub neurons: f64,
}

impl PriceLine {
    /// The same in USD, not rounded: 1,000 neurons are 0.011 USD.
    pub fn usd(&self) -> f64 {
        self.neurons * 0.011 / 1000.0
    }
}

impl Price {
    /// The price of a text model, in neurons per million tokens; cached tokens cost the input price.
    pub fn tokens(input: u64, output: u64) -> Self {
        Self { input, output, ..Self::default() }
    }

    /// What this usage costs.
    pub fn charge(&self, usage: &Usage) -> Neurons {
        let cached = u64::from(usage.cached_tokens.min(usage.prompt_tokens));
        let fresh = u64::from(usage.prompt_tokens) - cached;
        Neurons::priced(fresh, self.input)
            + Neurons::priced(cached, self.cached_input.unwrap_or(self.input))
            + Neurons::priced(u64::from(usage.completion_tokens), self.output)
    }

    /// Whether nothing costs anything.
    pub fn is_zero(&self) -> bool {
        self.listed().is_empty()
    }

    /// Every unit that costs something, in the order of a price list.
    pub fn listed(&self) -> Vec<PriceLine> {
        // A price per million in neurons is the same integer as micro-neurons per token: here the former is wanted.
        let per_million = |neurons: u64| neurons as f64;
        let mut lines = vec![
            ("per M input tokens", per_million(self.input)),
            ("per M cached input tokens", per_million(self.cached_input.unwrap_or(0))),
            ("per M output tokens", per_million(self.output)),
        ];
        lines.extend(
            [
                ("per 512 by 512 tile", self.tile),
                ("per step", self.step),
                ("per 512 by 512 tile and step", self.tile_step),
                ("per input 512 by 512 tile", self.input_tile),
                ("per input 512 by 512 tile and step", self.input_tile_step),
                ("per first MP", self.first_megapixel),
                ("per subsequent MP", self.megapixel),
                ("per input MP", self.input_megapixel),
                ("per audio minute", self.audio_minute),
                ("per audio minute (websocket)", self.stream_audio_minute),
                ("per output audio minute", self.output_audio_minute),
                ("per 1k characters", self.characters),
                ("per image", self.image),
            ]
            .map(|(unit, neurons)| (unit, neurons.as_f64())),
        );
        lines.retain(|(_, neurons)| *neurons > 0.0);
        lines.into_iter().map(|(unit, neurons)| PriceLine { unit, neurons }).collect()
    }
}

/// Neurons as written (`4.80`), kept as an integer of a millionth.
mod exact {
    use super::*;

    pub(super) fn serialize<S: serde::Serializer>(neurons: &Neurons, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_f64(neurons.as_f64())
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Neurons, D::Error> {
        let neurons = f64::deserialize(deserializer)?;
        // Above this, a millionth is no longer told apart from its neighbour.
        if !(0.0..=1e9).contains(&neurons) {
            return Err(serde::de::Error::custom(format!(
                "a price of {neurons} neurons is out of range: write a number from 0 to 1000000000"
            )));
        }
        Ok(Neurons::from_micro((neurons * 1e6).round() as u64))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn price(text: &str) -> Result<Price, String> {
        toml::from_str(text).map_err(|error| error.to_string())
    }

    #[test]
    fn cached_tokens_pay_their_own_price_or_the_full_one() {
        let usage = Usage { prompt_tokens: 100, cached_tokens: 60, completion_tokens: 10, ..Usage::default() };
        assert_eq!(price("input = 5\noutput = 7").unwrap().charge(&usage).micro(), 500 + 70);
        assert_eq!(price("input = 5\ncached_input = 1\noutput = 7").unwrap().charge(&usage).micro(), 200 + 60 + 70);
    }

    #[test]
    fn unit_prices_are_kept_to_a_millionth() {
        let flux = price("tile = 4.80\ntile_step = 9.60\nimage = 0.228055").unwrap();
        assert_eq!(flux.tile.micro(), 4_800_000);
        assert_eq!(flux.image.micro(), 228_055);
        // 1024 by 1024 in 4 steps, as the live service bills it.
        assert_eq!(
            (Neurons::priced(4, flux.tile.micro()) + Neurons::priced(16, flux.tile_step.micro())).to_string(),
            "172.80"
        );
        for wrong in ["tile = -1", "tile = nan", "step = 1e12", "tille = 1", "input = 1.5"] {
            assert!(price(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_price_list_names_each_unit_that_costs_something() {
        let lines = price("input = 25608\noutput = 75147").unwrap().listed();
        assert_eq!(lines.iter().map(|l| l.unit).collect::<Vec<_>>(), ["per M input tokens", "per M output tokens"]);
        assert!((lines[0].usd() - 0.281688).abs() < 1e-9);
        assert!(Price::default().is_zero());
    }
}
