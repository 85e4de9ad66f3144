//! Compiles `kernels/`: with the feature `cuda` for GPUs, with `emulate` for the host, so that tests can run them where there is
//! no GPU. Without a feature it looks for nothing and does nothing.

#![allow(clippy::expect_used)] // A build that cannot go on says why and ends.

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    #[cfg(any(feature = "cuda", feature = "emulate"))]
    println!("cargo:rerun-if-changed=kernels");
    #[cfg(feature = "cuda")]
    cuda::compile();
    #[cfg(feature = "emulate")]
    emulate::compile();
}

/// The kernels' files.
#[cfg(any(feature = "cuda", feature = "emulate"))]
fn sources() -> Vec<std::path::PathBuf> {
    let folder = std::fs::read_dir("kernels").unwrap_or_else(|error| panic!("kernels/ cannot be read: {error}"));
    let is_kernel = |path: &std::path::PathBuf| path.extension().is_some_and(|extension| extension == "cu");
    let mut sources: Vec<_> = folder.flatten().map(|entry| entry.path()).filter(is_kernel).collect();
    sources.sort();
    sources
}

#[cfg(any(feature = "cuda", feature = "emulate"))]
fn out() -> std::path::PathBuf {
    std::env::var_os("OUT_DIR").expect("cargo sets it").into()
}

#[cfg(feature = "cuda")]
mod cuda {
    //! One fat binary a file, with machine code for each chip that is listed and code that a driver can compile for others, and a
    //! table of them: `KERNELS: &[(name, bytes)]`.

    use std::path::{Path, PathBuf};
    use std::process::Command;
    use std::{env, fs};

    /// Ampere, Ada, Hopper and Blackwell. The `a` allows what only that chip has.
    const CHIPS: [&str; 4] = ["80", "89", "90a", "100a"];
    /// Whatever is not listed compiles this when it starts.
    const OTHERS: &str = "80";
    /// Kernels that may put registers into memory, and how many bytes: heads of 256 numbers fill all that there are, and the other two
    /// do it once, outside their loops.
    const SPILLS: [(&str, u32); 3] = [("attend_wide_256", 96), ("attend_wide_64", 16), ("sample", 64)];

    pub fn compile() {
        println!("cargo:rerun-if-env-changed=NEUROND_CUDA_CHIPS");
        let nvcc = find().unwrap_or_else(|| {
            panic!("the feature cuda needs nvcc of CUDA 13.0: run scripts/fetch_cuda.sh, or set NVCC or CUDA_HOME")
        });
        let chosen = env::var("NEUROND_CUDA_CHIPS").ok();
        // Chosen to be none, a driver has to compile them all: enough for whoever only reads the code.
        let chips: Vec<&str> = match &chosen {
            Some(chips) => chips.split(',').filter(|chip| !chip.is_empty()).collect(),
            None => CHIPS.to_vec(),
        };
        let mut table =
            String::from("/// Each file of kernels/ and its fat binary.\npub static KERNELS: &[(&str, &[u8])] = &[\n");
        for source in super::sources() {
            let binary = super::out().join(source.with_extension("fatbin").file_name().expect("a file"));
            run(&nvcc, &source, &binary, &chips);
            let name = source.file_stem().expect("a file").to_string_lossy();
            table += &format!("    ({name:?}, include_bytes!({:?})),\n", binary.display().to_string());
        }
        fs::write(super::out().join("kernels.rs"), table + "];\n").expect("cargo's folder can be written to");
    }

    fn run(nvcc: &Path, source: &Path, binary: &Path, chips: &[&str]) {
        let mut command = Command::new(nvcc);
        command.args([
            "--fatbin",
            "-O3",
            "-std=c++17",
            "-lineinfo",
            "--threads",
            "2",
            "-Ikernels",
            "--compress-mode=size",
        ]);
        command.args(["-Xptxas", "-v,-warn-spills"]);
        for chip in chips {
            command.arg(format!("-gencode=arch=compute_{chip},code=sm_{chip}"));
        }
        command.arg(format!("-gencode=arch=compute_{OTHERS},code=compute_{OTHERS}"));
        let output = command.arg("-o").arg(binary).arg(source).output();
        let output = output.unwrap_or_else(|error| panic!("{} cannot be run: {error}", nvcc.display()));
        let said = String::from_utf8_lossy(&output.stderr);
        // Registers and shared memory of each kernel, for whoever asks with -vv.
        said.lines().for_each(|line| println!("{line}"));
        if !output.status.success() {
            panic!("nvcc: {}: {}\n{said}", source.display(), output.status);
        }
        // A kernel that begins to spill is slower by more than any review would notice.
        if let Some(spill) = said.lines().find(|line| spills(line)) {
            panic!(
                "nvcc: {}: {spill}: give it fewer registers to keep, or raise what build.rs allows it",
                source.display()
            );
        }
    }

    /// Whether a line says that a kernel spills more than it may: `… in function 'name', 12 bytes spill stores, …`.
    fn spills(line: &str) -> bool {
        let Some((name, rest)) =
            line.split_once("spilled to local memory in function '").and_then(|(_, rest)| rest.split_once('\''))
        else {
            return false;
        };
        let bytes = rest.trim_start_matches([',', ' ']).split(' ').next().and_then(|bytes| bytes.parse().ok());
        let allowed = SPILLS.iter().find(|(kernel, _)| name.starts_with(kernel)).map_or(0, |(_, bytes)| *bytes);
        bytes.unwrap_or(u32::MAX) > allowed
    }

    /// NVCC, then the folders of an installation, then PATH.
    fn find() -> Option<PathBuf> {
        for name in ["NVCC", "CUDA_HOME", "CUDA_PATH", "VIRTUAL_ENV"] {
            println!("cargo:rerun-if-env-changed={name}");
        }
        if let Some(nvcc) = env::var_os("NVCC") {
            return Some(nvcc.into());
        }
        let mut folders: Vec<PathBuf> =
            ["CUDA_HOME", "CUDA_PATH"].iter().filter_map(env::var_os).map(PathBuf::from).collect();
        if let Some(python) = env::var_os("VIRTUAL_ENV") {
            let versions = fs::read_dir(Path::new(&python).join("lib")).into_iter().flatten().flatten();
            folders.extend(versions.map(|version| version.path().join("site-packages/nvidia/cu13")));
        }
        let own = env::var_os("CARGO_MANIFEST_DIR").expect("cargo sets it");
        folders.extend([Path::new(&own).join(".cuda/nvidia/cu13"), "/usr/local/cuda".into()]);
        let path = env::var_os("PATH").unwrap_or_default();
        let candidates = folders.iter().map(|folder| folder.join("bin/nvcc"));
        let on_path = env::split_paths(&path).map(|folder| folder.join("nvcc"));
        candidates.chain(on_path).find(|nvcc| nvcc.exists())
    }
}

#[cfg(feature = "emulate")]
mod emulate {
    //! The same sources as C++, and the emulator that runs them. Kernels register themselves by name.

    use std::fs;
    use std::path::{Path, PathBuf};

    pub fn compile() {
        let mut build = cc::Build::new();
        build.cpp(true).std("c++17").opt_level(2).define("EMULATE", None).include("kernels");
        // Whether a host contracts products and sums is no matter of a test.
        build.flag("-ffp-contract=off").flag("-Wno-unknown-pragmas").flag("-Wno-attributes");
        build.file("kernels/emulate.cpp").file("kernels/emulate_check.cpp");
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
