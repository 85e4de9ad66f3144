//! Devices and what is loaded on them. One supervisor actor a device owns its engine thread; every change republishes
//! the [`Fleet`], a snapshot that callers read without asking anybody.
//!
//!     desired models --reconcile--> load beside the old --> install --> publish --> retire the old
//!                                       '-- failed: the old one stays, the report says why
//!
//! There is one way to change what a device serves: say what it should serve. Starting, a reload, a hot-swap and the
//! recovery after a dead engine thread are all the same reconciliation.

mod actor;
mod devices;
mod encoders;
mod fleet;
mod loader;

pub use actor::{DeviceStatus, Outcome, Report, Supervisor};
pub use devices::{Devices, Pulses};
pub use fleet::{Fleet, FleetView, Replica};
pub use loader::Place;
