//! Which target next: what a failure means, whether and when to try again, and which targets rest.
//!
//!     targets --plan--> those that do not rest, in order --attempt (the caller's)--> outcome
//!                ^                                                                      |
//!                '-- one word a target <--published-- FallbackActor <--failures only----'
//!
//!     answer or error --classify--> Class --Backoff::next--> wait and retry, or fail over
//!
//! The usual call reads one atomic word a target and counts its success in another: nobody waits for the actor's thread. Only failures, and
//! targets that rest, are its business. Attempts themselves run in the call's own task; nothing here sends anything.

mod actor;
mod backoff;
mod breaker;
mod class;
mod recent;

pub use actor::{Fallback, Pass, Planned, Probe, TargetHealth};
pub use backoff::{Backoff, Growth, Next, Why, retry_after_ms};
pub use breaker::{AllRest, Policy, Rest};
pub use class::{Class, Failure, Toll, classify};

/// What can be tried: a model at a provider. Ours are targets like all others.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct Target {
    /// The provider's slug.
    pub provider: Box<str>,
    /// The provider's name of the model.
    pub model: Box<str>,
}

/// How an attempt ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Outcome {
    /// It was answered.
    Answered,
    /// It failed. [`Class::Credential`] and [`Class::Billing`] are reported only if the credential is ours: a caller's own bad key is no reason to rest a
    /// target for everybody.
    Failed(Class),
    /// Nothing was learnt: the caller hung up, or we refused the call ourselves.
    Abandoned,
}
