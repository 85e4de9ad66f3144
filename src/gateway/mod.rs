//! The life of a call, whatever surface it came through.

mod call;
mod delivery;

pub use call::Call;
pub use delivery::{Answer, Choice, Delivery};

use std::sync::Arc;

use crate::base::{Error, Kind, Result};
use crate::config::Live;
use crate::metrics::Metrics;
use crate::supervisor::FleetView;

/// Serves calls. Cheap to clone; one for the whole process.
#[derive(Clone)]
pub struct Gateway {
    /// Configuration in force.
    pub config: Live,
    /// What is loaded.
    pub fleet: FleetView,
    /// Where to count.
    pub metrics: Arc<Metrics>,
}

impl Gateway {
    /// Runs one call up to its first event, which is the point of no return: an error here is an ordinary error
    /// response; afterwards the [`Delivery`] carries on.
    pub async fn serve(&self, call: Call) -> Result<Delivery> {
        Err(Error::new(Kind::ModelUnavailable, format!("{} is not loaded", call.entry.id)))
    }
}
