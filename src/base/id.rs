//! Identifiers. Each is its own type so that an account can never be passed where a model is meant.

use std::fmt;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::base::Millis;

/// One call, from the socket to the ledger. Taken from `x-request-id` when the client sent a UUID, made otherwise.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct RequestId(uuid::Uuid);

impl RequestId {
    /// A fresh random id.
    pub fn random() -> Self {
        Self(uuid::Uuid::new_v4())
    }

    /// The id of a call that only has a number, in a simulation.
    pub const fn from_number(number: u128) -> Self {
        Self(uuid::Uuid::from_u128(number))
    }

    /// The id of one of the requests that came under this one: the same whenever it is asked for.
    pub fn of(&self, number: usize) -> Self {
        let mut hash = blake3::Hasher::new();
        hash.update(self.0.as_bytes()).update(&(number as u64).to_le_bytes());
        let mut half = [0; 16];
        half.copy_from_slice(&hash.finalize().as_bytes()[..16]);
        Self(uuid::Builder::from_random_bytes(half).into_uuid())
    }

    /// Accepts what a client sent if it is a UUID; anything else would be an unbounded label in our logs.
    pub fn parse(text: &str) -> Option<Self> {
        uuid::Uuid::try_parse(text).ok().map(Self)
    }

    /// 32 hex digits without dashes, as used in `chatcmpl-…` ids.
    pub fn simple(&self) -> String {
        self.0.simple().to_string()
    }

    /// As it is written, with dashes, in a place of the caller's.
    pub fn text<'a>(&self, place: &'a mut [u8; 36]) -> &'a str {
        self.0.as_hyphenated().encode_lower(place)
    }

    /// All of it as a number, for a compact place on disk.
    pub const fn number(self) -> u128 {
        self.0.as_u128()
    }

    /// A number drawn from the id, for seeding whatever the caller left open.
    pub fn low_bits(&self) -> u64 {
        self.0.as_u64_pair().1
    }
}

impl fmt::Display for RequestId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl fmt::Debug for RequestId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// A log record: 26 characters of Crockford's base 32 (a ULID), which sort as their times do.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LogId(u128);

impl LogId {
    const DIGITS: &[u8; 32] = b"0123456789ABCDEFGHJKMNPQRSTVWXYZ";

    /// An id of this moment.
    pub fn at(now: Millis) -> Self {
        let random = uuid::Uuid::new_v4().as_u128();
        // 80 random bits: those of a UUID that are not its version and variant.
        let random = ((random >> 80) << 34) | (random & ((1 << 34) - 1));
        Self((u128::from(now.0 & ((1 << 48) - 1)) << 80) | (random & ((1 << 80) - 1)))
    }

    /// Reads what [`fmt::Display`] writes, in either case.
    pub fn parse(text: &str) -> Option<Self> {
        if text.len() != 26 || !matches!(text.as_bytes()[0], b'0'..=b'7') {
            return None;
        }
        text.bytes()
            .try_fold(0u128, |value, letter| {
                let digit = Self::DIGITS.iter().position(|digit| *digit == letter.to_ascii_uppercase())?;
                Some((value << 5) | digit as u128)
            })
            .map(Self)
    }

    /// All of it as a number, which sorts as the id does.
    pub const fn number(self) -> u128 {
        self.0
    }

    /// What [`LogId::number`] gave.
    pub const fn from_number(number: u128) -> Self {
        Self(number)
    }

    /// As it is written, in a place of the caller's.
    pub fn text(self, place: &mut [u8; 26]) -> &str {
        for (at, letter) in place.iter_mut().enumerate() {
            *letter = Self::DIGITS[(self.0 >> (125 - 5 * at)) as usize & 31];
        }
        std::str::from_utf8(place).unwrap_or_default()
    }

    /// When the record was begun.
    pub fn time(self) -> Millis {
        Millis((self.0 >> 80) as u64)
    }
}

impl fmt::Display for LogId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.text(&mut [0; 26]))
    }
}

impl fmt::Debug for LogId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

macro_rules! text_id {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(Arc<str>);

        impl $name {
            /// Wraps a name; the text is shared, so clones are cheap.
            pub fn new(text: impl AsRef<str>) -> Self {
                Self(Arc::from(text.as_ref()))
            }

            /// The name as written.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
    };
}

text_id!(
    /// Who pays: 32 hex digits for Cloudflare-shaped accounts, any short name otherwise.
    AccountId
);
text_id!(
    /// A catalog id such as `@cf/meta/llama-3.1-8b-instruct`; aliases are resolved before one of these is made.
    ModelId
);
text_id!(
    /// The name of a gateway token, never the token itself.
    KeyId
);

/// A device of this machine: the CPU is 0 when it serves, GPUs count from their ordinal.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Serialize)]
#[serde(transparent)]
pub struct DeviceId(pub u16);

impl fmt::Display for DeviceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// One loaded version of a model on one device. Never reused within a process, so two versions of a model that
/// overlap during a hot-swap cannot be confused.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Serialize)]
#[serde(transparent)]
pub struct SlotId(pub u64);

impl SlotId {
    /// The next unused slot number of this process.
    pub fn next() -> Self {
        static NEXT: std::sync::atomic::AtomicU64 = std::sync::atomic::AtomicU64::new(1);
        Self(NEXT.fetch_add(1, std::sync::atomic::Ordering::Relaxed))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_log_id_is_read_back_and_sorts_by_its_time() {
        let early = LogId::at(Millis(1_700_000_000_000));
        let late = LogId::at(Millis(1_700_000_000_001));
        let (early_text, late_text) = (early.to_string(), late.to_string());
        assert!(early_text < late_text && early < late);
        assert_eq!((early_text.len(), early.time()), (26, Millis(1_700_000_000_000)));
        assert_eq!(LogId::parse(&early_text), Some(early));
        assert_eq!(LogId::parse(&early_text.to_lowercase()), Some(early));
        assert!(early_text.starts_with("01HF7YAT00"), "as any ULID of that moment: {early_text}");
        assert_ne!(LogId::at(Millis(0)), LogId::at(Millis(0)));
        for bad in ["", "8ZZZZZZZZZZZZZZZZZZZZZZZZZ", "01HF7YAT00U000000000000000", "01HF7YAT0"] {
            assert_eq!(LogId::parse(bad), None, "{bad}");
        }
    }
}
