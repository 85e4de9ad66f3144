//! Compiles `kernels/` for the host with the feature `emulate`, so that tests can run them where there is no GPU. Without it, it looks
//! for nothing and does nothing.

#![allow(clippy::expect_used)] // A build that cannot go on says why and ends.

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    #[cfg(feature = "emulate")]
    emulate::compile();
}

/// The kernels' files.
#[cfg(feature = "emulate")]
fn sources() -> Vec<std::path::PathBuf> {
    let folder = std::fs::read_dir("kernels").unwrap_or_else(|error| panic!("kernels/ cannot be read: {error}"));
    let is_kernel = |path: &std::path::PathBuf| path.extension().is_some_and(|extension| extension == "cu");
    let mut sources: Vec<_> = folder.flatten().map(|entry| entry.path()).filter(is_kernel).collect();
    sources.sort();
    sources
}

#[cfg(feature = "emulate")]
fn out() -> std::path::PathBuf {
    std::env::var_os("OUT_DIR").expect("cargo sets it").into()
}

#[cfg(feature = "emulate")]
mod emulate {
    //! The same sources as C++, and the emulator that runs them. Kernels register themselves by name.

    use std::fs;
    use std::path::{Path, PathBuf};

    pub fn compile() {
        println!("cargo:rerun-if-changed=kernels");
        let mut build = cc::Build::new();
        build.cpp(true).std("c++17").opt_level(2).define("EMULATE", None).include("kernels");
        // Whether a host contracts products and sums is no matter of a test.
        build.flag("-ffp-contract=off").flag("-Wno-unknown-pragmas").flag("-Wno-attributes");
        build.file("kernels/emulate.cpp");
        super::sources().iter().for_each(|source| {
            build.file(as_cpp(source));
        });
        // Nobody refers to what registers itself.
        build.link_lib_modifier("+whole-archive").compile("kernels");
    }

    /// A file of C++ that includes a kernel's: compilers go by the ending.
    fn as_cpp(source: &Path) -> PathBuf {
        let path = super::out().join(source.with_extension("cpp").file_name().expect("a file"));
        let whole = source.canonicalize().expect("it was listed");
        fs::write(&path, format!("#include \"{}\"\n", whole.display())).expect("cargo's folder can be written to");
        path
    }
}
