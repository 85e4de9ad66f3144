//! The real process: signals, drain, hot-swap, systemd's socket, a device that dies, what a gateway holds, and what is left when it is killed.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod batch;
mod fleet;
mod gateway;
#[cfg(feature = "emulate")]
mod gpu;
mod harness;
mod killed;
mod parallel;
mod shared;
mod signals;
mod swap;

#[path = "../upstream/mod.rs"]
mod upstream;
