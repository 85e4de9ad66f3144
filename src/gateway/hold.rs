//! What a call of this machine's models holds of limits and of plans while it runs.

use crate::base::{Limit, Millis, Neurons, Result};
use crate::config::CatalogLimits;
use crate::gateway::limits;
use crate::gateway::step::LOCAL;
use crate::gateway::{Call, Gateway};
use crate::ledger::{Claim, Counts, Denied, Reservation, Spent, Standing};
use crate::task::Usage;

/// What pays for a call.
pub(super) enum Held {
    /// What is settled when it ends.
    Reserved(Box<Reservation>),
    /// An earlier run of the same call.
    Paid,
}

impl Held {
    /// What it may take; `None`: whatever it needs.
    pub(super) fn granted(&self) -> Option<Neurons> {
        match self {
            Self::Reserved(reservation) => Some(reservation.granted().neurons),
            Self::Paid => None,
        }
    }
}

impl Gateway {
    /// Holds what a call may use at most. `again`: it was tried before, and has been counted as a request.
    pub(super) async fn hold<Input>(&self, call: &Call<Input>, most: &Usage, again: bool) -> Result<Held> {
        let (config, terms, entry) = (self.config.get(), &call.terms, &call.entry);
        let mut windows = Vec::new();
        if terms.gateway.is_none() {
            windows.extend_from_slice(&terms.ruled.windows);
            terms.ruled.of_target(LOCAL, entry.id.as_str(), Some(entry.task), &mut windows);
        }
        if let Some(key) = &call.key {
            limits::of_budget(key, &terms.budget, false, &mut windows);
            if terms.gateway.is_none() {
                limits::of_budget(key, &terms.budget, true, &mut windows);
            }
        }
        let is_limited = match config.metering.limits.catalog {
            CatalogLimits::All => true,
            CatalogLimits::Tokens => call.key.is_some(),
            CatalogLimits::Off => false,
        };
        // Work that nobody waits for is done when there is room for it: how much of it is nobody's minute.
        if is_limited && !terms.is_once {
            windows.push(limits::of_catalog(&call.account, entry));
        }
        if again || terms.is_part {
            windows.retain(|window| window.counts != Counts::Requests);
        }
        let account = config.accounts.iter().find(|account| account.id == call.account);
        let plan = account.and_then(|account| account.plan).unwrap_or(config.metering.plan);
        let estimate = entry.price.charge(most);
        let claim = Claim {
            request: call.id,
            account: &call.account,
            plan: limits::plan(&plan),
            windows: &windows,
            tokens: u64::from(most.total_tokens()),
            neurons: estimate,
            cost: estimate,
            is_once: terms.is_once,
        };
        let held = match self.ledger.claim(&claim, Millis::now()).await {
            // Its answer was lost after it was paid for.
            Err(Denied::Settled) => Held::Paid,
            Err(denied) => {
                self.metrics.refused_by_limits.with_label_values(&[limits::label(&denied)]).inc();
                return Err(limits::refusal(denied, LOCAL, &entry.id));
            }
            Ok(reservation) => Held::Reserved(Box::new(reservation)),
        };
        if let Held::Reserved(reservation) = &held
            && let Some(standing) = reservation.standing()
        {
            let _ = terms.standing.set(standing.clone());
        }
        Ok(held)
    }
}

/// The line of the ledger for a call of a model of this machine.
pub(super) fn spent<Input>(call: &Call<Input>) -> Spent {
    Spent {
        key: call.key.clone(),
        gateway: call.terms.gateway.clone().unwrap_or_default(),
        provider: LOCAL.into(),
        model: call.entry.id.clone(),
        usage: Usage::default(),
        neurons: Neurons::ZERO,
        cost: Neurons::ZERO,
    }
}

/// How a limit stands, for headers.
pub fn limit(standing: &Standing) -> Limit {
    Limit { limit: standing.limit, left: standing.left, reset: std::time::Duration::from_millis(standing.reset_ms) }
}
