//! The real process: signals, drain, hot-swap, systemd's socket, a device that dies, and what a gateway holds.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod batch;
mod fleet;
mod gateway;
#[cfg(feature = "emulate")]
mod gpu;
mod harness;
mod parallel;
mod signals;
mod swap;

#[path = "../upstream/mod.rs"]
mod upstream;
