//! Devices and what is loaded on them. One supervisor actor a device owns its engine thread; every change republishes
//! the [`Fleet`], a snapshot that callers read without asking anybody.

mod fleet;

pub use fleet::{Fleet, FleetView, Replica};
