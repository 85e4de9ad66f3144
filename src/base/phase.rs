//! Where the process is in its life.

/// Read by readiness probes, drains and long polls through one `watch` channel.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Phase {
    /// Models are loading; readiness is off.
    Starting,
    /// Serving.
    Ready,
    /// No new calls; what runs may end well.
    Draining,
}
