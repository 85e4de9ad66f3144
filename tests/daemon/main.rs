//! The real process: signals, drain, hot-swap, systemd's socket, a device that dies.

mod harness;
mod signals;
mod swap;
