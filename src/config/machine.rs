//! What of the machine and the moment a configuration depends on, read once at the rim, so that resolving is pure.

use std::collections::HashSet;
use std::path::{Path, PathBuf};

use crate::base::Millis;

/// The machine as this process sees it.
pub(super) struct Surroundings<'a> {
    /// CPUs this process may use: affinity and cgroup quota respected.
    pub cpus: usize,
    /// Of those, how many are whole cores and not siblings of one.
    pub cores: usize,
    /// Bytes of memory this process may use: the machine's, or the cgroup's limit.
    pub memory: u64,
    /// Now.
    pub now: Millis,
    /// An environment variable.
    pub variable: &'a dyn Fn(&str) -> Option<String>,
    /// The text of a file.
    pub text: &'a dyn Fn(&Path) -> std::io::Result<String>,
    /// When a file was last written; of a folder, its newest file.
    pub modified: &'a dyn Fn(&Path) -> std::io::Result<Millis>,
}

impl Surroundings<'static> {
    pub(super) fn read() -> Self {
        let cpus = std::thread::available_parallelism().map_or(1, usize::from);
        Self {
            cpus,
            cores: cores().clamp(1, cpus),
            memory: memory(),
            now: Millis::now(),
            variable: &|name| std::env::var(name).ok(),
            text: &|path| std::fs::read_to_string(path),
            modified: &modified,
        }
    }
}

/// Distinct cores among the CPUs this process may run on; `usize::MAX` where the system does not tell.
fn cores() -> usize {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let allowed = status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:")).unwrap_or_default();
    let siblings = cpu_list(allowed.trim()).into_iter().map(|cpu| {
        let path = format!("/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list");
        std::fs::read_to_string(path).unwrap_or_else(|_| cpu.to_string())
    });
    match siblings.collect::<HashSet<_>>().len() {
        0 => usize::MAX,
        cores => cores,
    }
}

/// `0-3,8` to `[0, 1, 2, 3, 8]`; what is not a number is left out.
fn cpu_list(text: &str) -> Vec<usize> {
    let range = |part: &str| {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        Some(first.parse::<usize>().ok()?..=last.parse::<usize>().ok()?)
    };
    text.split(',').filter_map(range).flatten().collect()
}

/// The least of the machine's memory and the limits of our cgroup and its parents; 1 GiB where the system does not tell.
fn memory() -> u64 {
    let info = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let kib = info
        .lines()
        .find_map(|line| line.strip_prefix("MemTotal:")?.trim().strip_suffix("kB")?.trim().parse::<u64>().ok());
    let machine = kib.map_or(1 << 30, |kib| kib << 10);
    let groups = std::fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let own = groups.lines().find_map(|line| line.strip_prefix("0::/")).unwrap_or_default();
    let limits = Path::new(own).ancestors().filter_map(|group| {
        let limit = std::fs::read_to_string(Path::new("/sys/fs/cgroup").join(group).join("memory.max")).ok()?;
        limit.trim().parse::<u64>().ok()
    });
    limits.fold(machine, u64::min)
}

fn modified(path: &Path) -> std::io::Result<Millis> {
    let newest = |paths: Vec<PathBuf>| -> std::io::Result<Millis> {
        let mut newest = 0;
        for path in paths {
            let at = std::fs::metadata(path)?.modified()?;
            let at = at.duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
            newest = newest.max(u64::try_from(at.as_millis()).unwrap_or(u64::MAX));
        }
        Ok(Millis(newest))
    };
    if !std::fs::metadata(path)?.is_dir() {
        return newest(vec![path.to_path_buf()]);
    }
    let inside = std::fs::read_dir(path)?.map(|file| file.map(|file| file.path())).collect::<Result<_, _>>()?;
    newest(inside)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cpu_lists_are_read_as_the_kernel_writes_them() {
        assert_eq!(cpu_list("0-3,8"), [0, 1, 2, 3, 8]);
        assert_eq!(cpu_list("5"), [5]);
        assert_eq!(cpu_list(""), [] as [usize; 0]);
    }

    #[test]
    fn this_machine_has_at_least_a_core_and_some_memory() {
        let here = Surroundings::read();
        assert!(here.cores >= 1 && here.cores <= here.cpus);
        assert!(here.memory > 64 << 20, "{}", here.memory);
    }

    #[test]
    fn a_folder_is_as_new_as_its_newest_file() {
        let folder = tempfile::tempdir().unwrap();
        let old = folder.path().join("a");
        std::fs::write(&old, "").unwrap();
        let long_ago = std::time::UNIX_EPOCH + std::time::Duration::from_secs(1_000);
        std::fs::File::options().write(true).open(&old).unwrap().set_modified(long_ago).unwrap();
        assert_eq!(modified(&old).unwrap(), Millis(1_000_000));
        assert_eq!(modified(folder.path()).unwrap(), Millis(1_000_000));
        std::fs::write(folder.path().join("b"), "").unwrap();
        assert!(modified(folder.path()).unwrap() > Millis(1_000_000));
        assert!(modified(&folder.path().join("c")).is_err());
    }
}
