//! Which replica answers a call, and whether a call that failed is worth another one.
//!
//! Pure: candidates and their loads come in, an index goes out. The gateway asks with what the fleet says now,
//! `neurond simulate` with what its devices would say.

use std::hash::{DefaultHasher, Hash, Hasher};

use crate::base::{AccountId, DeviceId, Kind};

/// Times a call that has not sent a byte is handed to a replica: once for a swap under its feet, once for a death.
pub const ATTEMPTS: usize = 3;

/// A replica as the choice sees it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Candidate {
    /// Where it is.
    pub device: DeviceId,
    /// Sequences that wait there.
    pub waiting: u64,
    /// Sequences that are computed there.
    pub running: u64,
}

/// What requests of one session of an account have in common, so that they meet their prefix again.
pub fn affinity(session: &str, account: &AccountId) -> u64 {
    let mut hasher = DefaultHasher::new();
    (session, account).hash(&mut hasher);
    hasher.finish()
}

/// The candidate that answers: the one its affinity names, else the least loaded. `None` if there are none.
pub fn choose(candidates: &[Candidate], affinity: Option<u64>) -> Option<usize> {
    match affinity {
        Some(_) if candidates.is_empty() => None,
        Some(affinity) => Some((affinity % candidates.len() as u64) as usize),
        None => (0..candidates.len()).min_by_key(|&at| candidates[at].waiting + candidates[at].running),
    }
}

/// Whether a call that has not sent a byte may be handed to another replica: its slot was retired or its device died
/// between the look at the fleet and the first token.
pub fn is_worth_another(kind: Kind) -> bool {
    matches!(kind, Kind::ModelUnavailable | Kind::EngineLost)
}

/// Requests share prefix KV within an account only: timing would tell one account what another has asked.
pub fn cache_salt(account: &AccountId) -> u64 {
    let digest = blake3::hash(account.as_str().as_bytes());
    let mut bytes = [0; 8];
    bytes.copy_from_slice(&digest.as_bytes()[..8]);
    u64::from_le_bytes(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Chooses among devices with these loads, waiting and running.
    fn check(loads: &[(u64, u64)], affinity: Option<u64>, expected: Option<usize>) {
        let candidates: Vec<Candidate> = (0..)
            .zip(loads)
            .map(|(device, &(waiting, running))| Candidate { device: DeviceId(device), waiting, running })
            .collect();
        assert_eq!(choose(&candidates, affinity), expected, "{loads:?} {affinity:?}");
    }

    #[test]
    fn the_least_loaded_answers_and_the_first_among_equals() {
        check(&[], None, None);
        check(&[(0, 3), (1, 1), (0, 2)], None, Some(1));
        check(&[(5, 0), (0, 4), (3, 2)], None, Some(1));
    }

    #[test]
    fn a_session_stays_where_it_is_whatever_the_load() {
        check(&[], Some(7), None);
        let at = choose(&[(0, 0), (9, 9), (0, 1)].map(candidate), Some(4));
        assert_eq!(at, choose(&[(9, 9), (0, 0), (7, 1)].map(candidate), Some(4)));
    }

    fn candidate((waiting, running): (u64, u64)) -> Candidate {
        Candidate { device: DeviceId(0), waiting, running }
    }

    #[test]
    fn sessions_of_different_accounts_are_different() {
        let of = |session, account| affinity(session, &AccountId::new(account));
        assert_eq!(of("s", "a"), of("s", "a"));
        assert_ne!(of("s", "a"), of("s", "b"));
        assert_ne!(of("s", "a"), of("t", "a"));
    }

    #[test]
    fn only_a_lost_slot_or_device_is_worth_another_try() {
        for (kind, worth) in [
            (Kind::ModelUnavailable, true),
            (Kind::EngineLost, true),
            (Kind::Busy, false),
            (Kind::Timeout, false),
            (Kind::BadInput, false),
        ] {
            assert_eq!(is_worth_another(kind), worth, "{kind:?}");
        }
    }
}
