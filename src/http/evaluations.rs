//! Runs evaluations, one after the other, beside everything else.
//!
//! ```text
//!   management API ─ wake ─> task ─ due ─> registry        the line, on disk: what a crash left undone is run at the start
//!                              ├─ sums ──> log             on a blocking thread
//!                              └─ evaluated ─> registry
//! ```

use std::sync::Arc;
use std::time::{Duration, Instant};

use actix_web::{rt, web};
use tokio::sync::Notify;
use tokio::time::timeout;
use tracing::{info, warn};

use crate::base::{Error, Result};
use crate::http::records;
use crate::logs::{Logs, Sums};
use crate::registry::{Due, Registry};

/// After what could not be written down, another try.
const PATIENCE: Duration = Duration::from_secs(60);

/// Whoever runs them. Cheap to clone.
#[derive(Clone)]
pub struct Evaluations(Arc<Notify>);

impl Evaluations {
    /// Starts the task on the runtime of the caller, which must not be one that serves requests.
    pub fn start(registry: Registry, logs: Logs) -> Self {
        let wake = Arc::new(Notify::new());
        rt::spawn(run(registry, logs, wake.clone()));
        Self(wake)
    }

    /// There may be something to run.
    pub(super) fn wake(&self) {
        self.0.notify_one();
    }
}

async fn run(registry: Registry, logs: Logs, wake: Arc<Notify>) {
    loop {
        while let Some(due) = registry.due() {
            let begun = Instant::now();
            let outcome = evaluate(&logs, &due).await;
            let Due { account, gateway, id, .. } = &due;
            let ms = begun.elapsed().as_millis() as u64;
            match &outcome {
                Ok(sums) => info!(%account, gateway, evaluation = %id, logs = sums.count, ms, "evaluated"),
                Err(error) => warn!(%account, gateway, evaluation = %id, %error, ms, "not evaluated"),
            }
            if let Err(error) = registry.evaluated(&due, outcome).await {
                warn!(%account, gateway, evaluation = %id, %error, "an evaluation waits: its result is not on disk");
                break;
            }
        }
        // Woken or not, there is nothing wrong with another look.
        let _ = timeout(PATIENCE, wake.notified()).await;
    }
}

async fn evaluate(logs: &Logs, due: &Due) -> Result<Sums> {
    let (store, sets) = (records::kept(logs)?.clone(), due.sets()?);
    let (account, gateway) = (due.account.clone(), due.gateway.clone());
    // Calls that ended before it was made are in it.
    logs.flush().await;
    let sums = web::block(move || store.sums(&account, &gateway, &sets)).await;
    sums.map_err(|error| Error::internal("the log was not summed up").with_source(error))?
}
