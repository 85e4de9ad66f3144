//! Pieces of Cloudflare's native shape that more than one surface shows: envelope, padding, usage event.

use serde::Serialize;

use crate::base::RequestId;
use crate::http::answer::UsageJson;

/// `{"result", "success", "errors", "messages"}` around a success.
#[derive(Serialize)]
pub(super) struct Envelope<'a, T> {
    result: &'a T,
    success: bool,
    errors: [(); 0],
    messages: [(); 0],
}

impl<'a, T: Serialize> Envelope<'a, T> {
    pub(super) fn new(result: &'a T) -> Self {
        Self { result, success: true, errors: [], messages: [] }
    }
}

/// Padding of varying length, so that the size of a packet does not tell the length of a token.
pub(super) struct Padding(u64);

impl Padding {
    /// Drawn from the request's random id.
    pub(super) fn new(id: RequestId) -> Self {
        Self(id.low_bits() ^ 0x9e37_79b9_7f4a_7c15)
    }

    /// The next piece: 1 to 36 characters.
    pub(super) fn next(&mut self) -> &'static str {
        const ALPHABET: &str = "abcdefghijklmnopqrstuvwxyz0123456789";
        // SplitMix64: one step, mixed; the low bits of a plain counter would show.
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        &ALPHABET[..1 + ((mixed ^ (mixed >> 31)) % ALPHABET.len() as u64) as usize]
    }
}

/// The last event before `[DONE]` on the native surface.
#[derive(Serialize)]
pub(super) struct UsageEvent {
    response: &'static str,
    usage: UsageJson,
}

impl UsageEvent {
    pub(super) fn new(usage: UsageJson) -> Self {
        Self { response: "", usage }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn padding_varies_and_stays_within_bounds() {
        let mut padding = Padding::new(RequestId::random());
        let lengths: Vec<usize> = (0..500).map(|_| padding.next().len()).collect();
        assert!(lengths.iter().all(|length| (1..=36).contains(length)));
        let different: std::collections::HashSet<_> = lengths.iter().collect();
        assert!(different.len() > 20, "{different:?}");
    }
}
