//! The real process: signals, drain, hot-swap, systemd's socket, a device that dies.

#![allow(clippy::unwrap_used)]

mod batch;
#[cfg(feature = "emulate")]
mod gpu;
mod harness;
mod parallel;
mod signals;
mod swap;
