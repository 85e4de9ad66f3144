//! The program: everything it does is in the library, where tests can reach it.

use std::process::ExitCode;

/// A call through the gateway takes some hundred small pieces of memory, which the system's allocator makes a tenth of its cost.
#[global_allocator]
static MEMORY: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    neurond::cli::main()
}
