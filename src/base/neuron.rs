//! Money: neurons as integers of a millionth, so that sums are exact.

use std::fmt;
use std::iter::Sum;
use std::ops::Add;

use serde::{Deserialize, Serialize};

/// An amount of neurons in micro-neurons (1 neuron = 1,000,000). A price per million tokens in neurons is the price
/// per token in micro-neurons, so every text price of the catalog is exact. 1,000 neurons cost 0.011 USD.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Neurons(u64);

impl Neurons {
    /// Nothing.
    pub const ZERO: Self = Self(0);

    /// From the integer that the ledger stores.
    pub const fn from_micro(micro: u64) -> Self {
        Self(micro)
    }

    /// `quantity` units at `micro_per_unit` micro-neurons each; saturates instead of wrapping.
    pub const fn priced(quantity: u64, micro_per_unit: u64) -> Self {
        Self(quantity.saturating_mul(micro_per_unit))
    }

    /// The integer that the ledger stores.
    pub const fn micro(self) -> u64 {
        self.0
    }

    /// For display and JSON only; never computed with.
    pub fn as_f64(self) -> f64 {
        self.0 as f64 / 1e6
    }

    /// From USD, rounded to a millionth of a neuron, which is 11 millionths of a millionth of a dollar.
    pub fn from_usd(usd: f64) -> Self {
        Self((usd * (1e9 / 0.011)).round() as u64)
    }

    /// USD at the list price, not rounded, for display only.
    pub fn usd(self) -> f64 {
        self.as_f64() * 0.011 / 1000.0
    }

    /// USD as they are told to people: to 1e-10, so that what cost 0.25 and is kept in units of 1.1e-11 reads 0.25 again.
    pub fn rounded_usd(self) -> f64 {
        ((u128::from(self.0) * 11 + 50) / 100) as f64 / 1e10
    }

    /// Difference, or zero where `other` is larger.
    pub const fn saturating_sub(self, other: Self) -> Self {
        Self(self.0.saturating_sub(other.0))
    }
}

impl Add for Neurons {
    type Output = Self;
    fn add(self, other: Self) -> Self {
        Self(self.0.saturating_add(other.0))
    }
}

impl Sum for Neurons {
    fn sum<I: Iterator<Item = Self>>(amounts: I) -> Self {
        amounts.fold(Self::ZERO, Add::add)
    }
}

/// Two decimals, as in the `cf-ai-neurons` header.
impl fmt::Display for Neurons {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let hundredths = (self.0 + 5_000) / 10_000;
        write!(f, "{}.{:02}", hundredths / 100, hundredths % 100)
    }
}

impl fmt::Debug for Neurons {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{:06} neurons", self.0 / 1_000_000, self.0 % 1_000_000)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_listed_price_per_million_is_exact_per_token() {
        // llama-3.3-70b: 1,000 in at 26,668 and 200 out at 204,805 neurons per million.
        let charge = Neurons::priced(1_000, 26_668) + Neurons::priced(200, 204_805);
        assert_eq!(charge.micro(), 67_629_000);
        assert_eq!(charge.to_string(), "67.63");
    }

    #[test]
    fn dollars_read_as_they_were_written() {
        for usd in [0.0, 0.25, 0.000_000_1, 0.000_011, 1.0, 11.0, 123_456.789] {
            assert_eq!(Neurons::from_usd(usd).rounded_usd(), usd);
        }
        for (micro, usd) in [(1, 0.0), (4, 0.0), (5, 1e-10), (123_456_789, 0.001_358_024_7)] {
            assert_eq!(Neurons::from_micro(micro).rounded_usd(), usd, "{micro}");
        }
        assert!((Neurons::from_micro(u64::MAX).rounded_usd() - 202_914_184.810_805).abs() < 1e-6);
    }

    #[test]
    fn sums_saturate_instead_of_wrapping() {
        assert_eq!(Neurons::priced(u64::MAX, 2) + Neurons::from_micro(1), Neurons::from_micro(u64::MAX));
    }
}
