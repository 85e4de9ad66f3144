//! Which replica answers a call, and whether a call that failed is worth another one.
//!
//! Pure: candidates and their loads come in, an index goes out. The gateway asks with what the fleet says now,
//! `neurond simulate` with what its devices would say.

use std::hash::{DefaultHasher, Hash, Hasher};

use crate::base::{AccountId, DeviceId, Kind};

/// Times a call that has not sent a byte is handed to a replica: once for a swap under its feet, once for a death.
pub const ATTEMPTS: usize = 3;

/// Sequences that a session's own device may have more than twice those of another before it turns to that one: reading
/// its prefix again is dear, but cheaper than a long queue.
const PATIENCE: u64 = 16;

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

impl Candidate {
    fn load(&self) -> u64 {
        self.waiting + self.running
    }
}

/// What requests of one session of an account have in common, so that they meet their prefix again.
pub fn affinity(session: &str, account: &AccountId) -> u64 {
    let mut hasher = DefaultHasher::new();
    (session, account).hash(&mut hasher);
    hasher.finish()
}

/// The candidate that answers: the least loaded, or the one its affinity names as long as that is not overloaded. `None`
/// if there are none.
///
/// Among the least loaded each account has its own order too: accounts share no prefix, so one that asks now and then
/// meets its own again, and idle devices are not all passed over for the first.
///
/// Every session has its own order of devices, so that a device that comes or goes moves only the sessions that it gets
/// or had, and a session that finds its device overloaded always finds the same other one.
pub fn choose(candidates: &[Candidate], affinity: Option<u64>, account: &AccountId) -> Option<usize> {
    let least = candidates.iter().map(Candidate::load).min()?;
    let Some(affinity) = affinity else {
        let own = self::affinity("", account);
        let equals = (0..candidates.len()).filter(|&at| candidates[at].load() == least);
        return equals.max_by_key(|&at| preference(own, candidates[at].device));
    };
    let bearable = 2 * least + PATIENCE;
    let calm = |&at: &usize| candidates[at].waiting == 0 || candidates[at].load() <= bearable;
    (0..candidates.len()).filter(calm).max_by_key(|&at| preference(affinity, candidates[at].device))
}

/// How much a session likes a device.
fn preference(affinity: u64, device: DeviceId) -> u64 {
    let mut hasher = DefaultHasher::new();
    (affinity, device).hash(&mut hasher);
    hasher.finish()
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

    fn choose(candidates: &[Candidate], affinity: Option<u64>) -> Option<usize> {
        super::choose(candidates, affinity, &AccountId::new("acme"))
    }

    /// Chooses among devices with these loads, waiting and running.
    fn check(loads: &[(u64, u64)], affinity: Option<u64>, expected: Option<usize>) {
        let candidates: Vec<Candidate> = (0..)
            .zip(loads)
            .map(|(device, &(waiting, running))| Candidate { device: DeviceId(device), waiting, running })
            .collect();
        assert_eq!(choose(&candidates, affinity), expected, "{loads:?} {affinity:?}");
    }

    #[test]
    fn the_least_loaded_answers() {
        check(&[], None, None);
        check(&[(0, 3), (1, 1), (0, 1)], None, Some(2));
        check(&[(5, 0), (0, 4), (3, 2)], None, Some(1));
    }

    #[test]
    fn among_equals_each_account_has_its_own_first() {
        let (idle, mut counts) = ([0, 1, 2, 3].map(idle), [0; 4]);
        for account in 0..1_000 {
            let account = AccountId::new(format!("account-{account}"));
            let at = super::choose(&idle, None, &account).unwrap();
            assert_eq!(super::choose(&idle, None, &account), Some(at));
            counts[at] += 1;
        }
        assert!(counts.iter().all(|count| (200..=300).contains(count)), "{counts:?}");
    }

    /// Where each of 1,000 sessions goes among these devices, all of them idle.
    fn homes(devices: &[u16]) -> Vec<DeviceId> {
        let candidates: Vec<_> = devices.iter().map(|&device| idle(device)).collect();
        (0..1_000).map(|session| candidates[choose(&candidates, Some(session * 7_919)).unwrap()].device).collect()
    }

    fn idle(device: u16) -> Candidate {
        Candidate { device: DeviceId(device), waiting: 0, running: 0 }
    }

    #[test]
    fn sessions_are_spread_over_all_devices() {
        let homes = homes(&[0, 1, 2, 3]);
        for device in 0..4 {
            let count = homes.iter().filter(|home| home.0 == device).count();
            assert!((200..=300).contains(&count), "device {device} has {count} of 1000");
        }
    }

    #[test]
    fn a_device_that_comes_or_goes_moves_only_its_own_sessions() {
        let (three, four) = (homes(&[0, 1, 2]), homes(&[3, 1, 0, 2]));
        let moved = three.iter().zip(&four).filter(|(before, after)| before != after).count();
        assert!(three.iter().zip(&four).all(|(before, after)| before == after || after.0 == 3));
        assert!((200..=300).contains(&moved), "{moved} of 1000 moved to the new device");
    }

    #[test]
    fn a_session_leaves_its_device_only_when_that_is_overloaded() {
        check(&[], Some(7), None);
        let home = choose(&[0, 1, 2].map(idle), Some(7)).unwrap();
        let with = |waiting, running, others: u64| {
            let mut candidates = [0, 1, 2].map(|device| Candidate { running: others, ..idle(device) });
            candidates[home] = Candidate { waiting, running, ..candidates[home] };
            choose(&candidates, Some(7)).unwrap()
        };
        assert_eq!(with(0, 64, 0), home, "a full batch without a queue");
        assert_eq!(with(9, 64, 64), home, "all are busy");
        assert_eq!(with(8, 8, 0), home, "a short queue");
        let other = with(40, 64, 8);
        assert_ne!(other, home, "a long queue, and others are idle");
        assert_eq!(with(90, 64, 9), other, "always the same other one");
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
