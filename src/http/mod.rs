//! HTTP: one file a wire surface, each parsing to a [`crate::gateway::Call`] and rendering events.

use std::sync::Arc;

use tokio::sync::watch;

use crate::base::Phase;
use crate::config::Live;
use crate::gateway::Gateway;
use crate::metrics::Metrics;
use crate::supervisor::FleetView;

/// What handlers reach for.
#[derive(Clone)]
pub struct Services {
    /// Configuration in force.
    pub config: Live,
    /// Serves calls.
    pub gateway: Gateway,
    /// What is loaded.
    pub fleet: FleetView,
    /// Where to count.
    pub metrics: Arc<Metrics>,
    /// Starting, ready, draining.
    pub phase: watch::Receiver<Phase>,
}
